"""`results/<setting>.json`: what the experiments gave in one setting. Its form, reading it, putting a record into it.

A setting is a base model, a kind of machine, and a budget: columns of one table, whose figures can be compared.

A file is checked when it is read, and one that is damaged, or that something else wrote, is refused by name. How a
run's own files become a record is in `results_records.py`, the table of all files in `results_table.py`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator

from medqa.config import Section
from medqa.errors import UserError
from medqa.files import write_json

RECIPES = ("exp_001", "exp_002", "exp_003", "exp_004", "exp_005")
FORMAT = 2
LONGEST = 1_000_000  # bytes; one that is longer is not ours


class Part(Section):
    """Of exactly this form, and every number finite."""

    model_config = ConfigDict(allow_inf_nan=False)


class Figure(Part):
    """A figure, with the ends of its 95 % interval where it has one."""

    value: float
    low: float | None = None
    high: float | None = None


class Losses(Part):
    """Over all rows of a split. `answer_perplexity` is None where no answer has a token left."""

    perplexity: Figure
    answer_perplexity: Figure | None


class SplitLosses(Part):
    """Losses over `rows` rows of a split: baseline (`before`) and adapter (`after`).

    Where an evaluation failed, they are the run's own losses, without intervals; then test has no baseline.

    Attributes:
        own_template: answer perplexity of the baseline in its own chat template; None if it has none, or if the run
            was trained with it.
    """

    rows: int
    before: Losses | None
    own_template: Figure | None = None
    after: Losses


class Machine(Part):
    """What it ran on: GPUs, or a CPU with the number of threads. Memory is that of the smallest GPU, in bytes."""

    gpus: list[str]
    cpu: str | None = None
    threads: int | None = None
    memory_bytes: int | None
    driver: str | None
    cuda: str | None


class Moved(Part):
    """After which update a run that went on was no longer bit for bit the same, and what had changed."""

    after_step: int
    changed: list[str]


class Training(Part):
    """Of `summary.json` and `config.yaml`. `tokens_per_s`: target tokens, the median of the logged updates."""

    updates: int
    processes: int
    resumes: int
    wall_clock_s: float
    peak_memory_bytes: int
    memory_device: str
    tokens_per_s: float | None
    trainable_parameters: int
    total_parameters: int
    gradient_accumulation_steps: int
    quantization: Literal["none", "4bit"]
    mixed_precision: Literal["bf16", "fp16", "no"]
    scaler_overflows: int
    micro_batch_rows: int | None
    micro_batch_tokens: int | None
    in_effect: dict[str, str | int | float | bool]
    not_bitwise: list[Moved]


class Data(Part):
    """Which data, and how many rows of them were kept, by split."""

    medquad: str
    afrimedqa: str
    fingerprint: str
    rows: dict[str, int]


class Base(Part):
    """Which base model."""

    name: str
    fingerprint: str


class Generation(Part):
    """Answers to questions of the test split. By system: `untuned`, `own_template`, `copied`, `tuned`."""

    rows: int
    tokens: int
    rouge_l: dict[str, Figure]
    stops: dict[str, Figure]


class Choices(Part):
    """Multiple choice, by the log-likelihood of the options; chance is that of these questions."""

    rows: int
    chance: float
    accuracy: dict[str, Figure]


class Evaluation(Part):
    """Of `evaluation.json`. `limit`: rows of each split, and questions, that were looked at; None: all."""

    limit: int | None
    rows: dict[str, int]
    generation: Generation
    mcq: Choices | None
    advises_care: dict[str, Figure]


class Failure(Part):
    """What ended it. `exit_code` is that of `train.py` or `medqa evaluate`; negative: killed by that signal."""

    stage: Literal["training", "evaluation"]
    what: Literal["out of memory", "no space", "not finite", "killed", "an error"]
    exit_code: int
    message: str


class Record(Part):
    """One experiment on one machine. What a failure left undone is None.

    `caveats` say why it is no result of the experiment as its file has it, but a trial; empty for a result.
    """

    experiment: Literal[RECIPES]
    date: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$")]
    commits: list[str]
    caveats: list[str]
    machine: Machine
    versions: dict[str, str]
    training: Training | None = None
    validation: SplitLosses | None = None
    test: SplitLosses | None = None
    data: Data | None = None
    base: Base | None = None
    evaluation: Evaluation | None = None
    failure: Failure | None = None

    @model_validator(mode="after")
    def _whole(self) -> "Record":
        """Refuse one that is neither failed nor complete."""
        parts = (self.training, self.validation, self.test, self.data, self.base, self.evaluation)
        if self.failure is None and None in parts:
            raise ValueError("neither a failure nor all of its figures")
        return self


Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._+()/-]{0,99}$")]


class Setting(Part):
    """What all records of a file have in common.

    Attributes:
        machine: GPUs or CPU (`machine_label`).
        base: the base model.
        examples: the number of training examples, with repetition; None: as in the experiment files.
        rows: the number of evaluated rows of each split, and of questions; None: all.
    """

    machine: Label
    base: Label
    examples: Annotated[int, Field(ge=1)] | None = None
    rows: Annotated[int, Field(ge=1)] | None = None

    @property
    def label(self) -> str:
        """The setting in words: `SmolLM2-135M-Instruct, AMD EPYC 7B13 (2 threads), 800 examples, 200 rows`."""
        words = [self.base, self.machine]
        words += [f"{self.examples} examples"] if self.examples is not None else []
        words += [f"{self.rows} rows"] if self.rows is not None else []
        return ", ".join(words)


class Results(Part):
    """A file of `results/`: records of one setting, by experiment."""

    format: Literal[FORMAT]
    setting: Setting
    records: dict[Literal[RECIPES], Record]

    @model_validator(mode="after")
    def _named(self) -> "Results":
        """Refuse a record under another experiment's name."""
        if any(name != record.experiment for name, record in self.records.items()):
            raise ValueError("a record stands under another experiment's name")
        return self


def machine_label(machine: Machine) -> str:
    """`Tesla T4`; `4x Tesla T4`; `AMD EPYC 7B13 (2 threads)`."""
    counts = {name: machine.gpus.count(name) for name in machine.gpus}
    words = [name if count == 1 else f"{count}x {name}" for name, count in counts.items()]
    if not words:
        words = [f"{machine.cpu or 'CPU'} ({machine.threads} thread{'' if machine.threads == 1 else 's'})"]
    return as_label(" + ".join(words))


def as_label(text: str) -> str:
    """Text with only the characters of a `Label`."""
    return re.sub(r"[^A-Za-z0-9 ._+()/-]", "-", re.sub(r"\((R|TM)\)", "", text)).lstrip(" ._+()/-")[:100] or "unknown"


def slug(label: str) -> str:
    """The file name of a label, without its ending: `4x-tesla-t4`."""
    return re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")


def read_all(directory: Path) -> dict[str, Results]:
    """The files of a directory by their names without ending; none where there is no directory.

    Raises:
        UserError: with all files that cannot be read, are damaged, or that something else wrote.
    """
    found, problems = {}, []
    for path in sorted(directory.glob("*.json")):
        try:
            found[path.stem] = read_results(path)
        except UserError as error:
            problems += error.args
    if problems:
        raise UserError(*problems)
    return found


def read_results(path: Path) -> Results:
    """One file.

    Raises:
        UserError: it cannot be read, or is not of this form.
    """
    advice = "take it back from git, or remove it and run `make results` again"
    try:
        if path.stat().st_size > LONGEST:
            raise UserError(f"{path}: too long for a file of results; {advice}")
        found = Results.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        what = f"{where}: {first['msg']}" if where else first["msg"]
        raise UserError(f"{path}: no file of results, or damaged: {what}; {advice}") from error
    if slug(found.setting.label) != path.stem:
        right = f"{slug(found.setting.label)}.json"
        raise UserError(f"{path} has the results of another setting: {found.setting.label}; rename it to {right}")
    return found


def keep(record: Record, setting: Setting, directory: Path) -> bool:
    """Put a record into the file of its setting, in the place of that experiment's and of no other's.

    What the user can mend (exit code 2) never takes the place of figures: says whether it was written.

    Raises:
        UserError: the file that is there is damaged, or has records of another base model.
        OSError: it cannot be written.
    """
    path = directory / f"{slug(setting.label)}.json"
    records = read_results(path).records if path.exists() else {}
    _require_same_base(record, records, path)
    before = records.get(record.experiment)
    if record.failure is not None and record.failure.exit_code == 2 and before is not None and before.failure is None:
        return False
    records = dict(sorted({**records, record.experiment: record}.items()))
    directory.mkdir(parents=True, exist_ok=True)
    write_json(Results(format=FORMAT, setting=setting, records=records).model_dump(mode="json"), path)
    return True


def _require_same_base(record: Record, records: Mapping[str, Record], path: Path) -> None:
    """See that a record is of the same base model as those of the other experiments in its file.

    A name does not tell two models apart: a/Foo and b/Foo are both Foo. Failures without a base are not compared.

    Raises:
        UserError: it is of another one.
    """
    if record.base is None:
        return
    for name, other in records.items():
        if name != record.experiment and other.base is not None and other.base.fingerprint != record.base.fingerprint:
            raise UserError(
                f"{path}: {name} is of the base model with fingerprint {other.base.fingerprint[:12]}, and "
                f"{record.experiment} of another one, {record.base.fingerprint[:12]}, under the same name: nothing was "
                "recorded; pass another --base-name"
            )
