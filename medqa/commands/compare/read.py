"""Read the files of runs for a comparison. A run may be in progress, killed, or edited by hand.

`conclusions.py` decides what several runs show together.
"""

import functools
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medqa.commands.evaluation_table import Figure, figures, number
from medqa.config import Experiment, flat, is_complete, planned_updates
from medqa.config_file import cut, load_experiment, read_yaml
from medqa.errors import UserError, together
from medqa.files import Damaged, Missing, read_file, read_json
from medqa.limits import MAX_COUNT, MAX_METRICS_BYTES
from medqa.recorded import checkpoints, differences, read_manifest
from medqa.terminal import printable

CONFIG, METRICS, SUMMARY = "config.yaml", "metrics.jsonl", "summary.json"
EVALUATION, DATA_REPORT = "evaluation.json", "data_report.json"
ADAPTER_DIR, ADAPTER_CONFIG = "lora_adapters", "adapter_config.json"
IN_ADAPTER_CONFIG = ("r", "lora_alpha", "lora_dropout", "target_modules")  # keys of `lora` that it has too

# A change of these settings also changes the answer tokens that perplexity is over. The prompt decides how an answer
# begins, which token ends it, and how much of it fits.
MEASURED = ("model.base", "tokenization.prompt", "tokenization.max_length", "tokenization.append_eos")
MOST_SHOWN = 12  # values of a file that a message names

Json = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        label: the name of its directory, or its path if the name is not unique.
        in_effect: `section.key` to what was used where that is not what the configuration requests.
        train, validation, test: its metrics by update, without values that are not finite.
        summary, evaluation, data_report: empty if the file is missing.
        figures: the metrics of the evaluation, by path (`loss.test.tuned.answer_perplexity`).
        damage: what could not be read, in words.
        doubts: how its files contradict `experiment` and `in_effect`, in words.
        fingerprints: of data and base model, from the newest checkpoint; empty if there is none.
    """

    label: str
    directory: Path
    experiment: Experiment
    in_effect: dict[str, Any]
    train: dict[int, Json] = field(default_factory=dict)
    validation: dict[int, Json] = field(default_factory=dict)
    validation_full: dict[int, Json] = field(default_factory=dict)
    test: dict[int, Json] = field(default_factory=dict)
    summary: Json = field(default_factory=dict)
    evaluation: Json = field(default_factory=dict)
    data_report: Json = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    damage: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    fingerprints: Json = field(default_factory=dict)

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """`section.key` to the value in effect. Cached, because every pair of runs compares them."""
        asked = flat(self.experiment)
        return asked | {key: used for key, used in self.in_effect.items() if key in asked}

    @property
    def measured_over(self) -> tuple[Any, ...]:
        """What decides over which tokens perplexities are: only those of runs that are alike in it are comparable."""
        return self.data_fingerprint, *(self.settings[key] for key in MEASURED)

    @property
    def planned(self) -> int | None:
        """The planned number of updates; None if it depends on an unknown number of rows."""
        rows = number(part(self.data_report, "splits", "train", "rows"))
        try:
            return planned_updates(self.experiment, int(rows or 0)) or None
        except UserError:
            return None

    @property
    def max_steps(self) -> int:
        """The planned number of updates; if that is not known, the recorded number."""
        return self.planned or self.updates

    @property
    def updates(self) -> int:
        """The number of recorded updates."""
        return max((*self.train, *self.validation, int(number(self.summary.get("updates")) or 0)))

    @property
    def adapter_step(self) -> int:
        """The update of the adapter: for a finished run, the one that was kept."""
        kept = number(self.summary.get("adapter_step"))
        return self.updates if kept is None or not self.finished else int(kept)

    @property
    def finished(self) -> bool:
        """Whether the run is complete, as in `training/run_dir.py`."""
        return isinstance(self.summary.get("final"), dict) and is_complete(self.summary, self.experiment)

    @property
    def state(self) -> str:
        """Whether it is finished, in words."""
        if self.finished:
            early = self.summary.get("stopped_early") is True
            return f"finished early, after {self.updates:,} of {self.max_steps:,} updates" if early else "finished"
        end = ", without its final evaluation" if self.all_updates_done else ""
        return f"unfinished: {self.updates:,} of {self.max_steps:,} updates{end}"

    @property
    def all_updates_done(self) -> bool:
        """Whether the last planned update is recorded."""
        return self.planned is not None and self.updates >= self.planned

    @property
    def data_fingerprint(self) -> str | None:
        """The fingerprint of rows and splits; None if it is not recorded."""
        found = (
            self.data_report.get("fingerprint"),
            self.summary.get("data_fingerprint"),
            self.fingerprints.get("data"),
        )
        return next((said for said in found if isinstance(said, str) and said), None)

    @property
    def base_fingerprint(self) -> str | None:
        """The fingerprint of the base model's configuration and weights; None if it is not recorded."""
        found = (self.summary.get("base_fingerprint"), self.fingerprints.get("base"))
        return next((said for said in found if isinstance(said, str) and said), None)


def part(record: Any, *keys: str) -> Any:
    """The value at `keys` in nested objects; None if there is none."""
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read the runs in these directories.

    Raises:
        UserError: fewer than two, one of them twice, or directories that are not runs, in one message.
    """
    real = [os.path.realpath(path) for path in paths]
    twice = sorted({str(path) for i, path in enumerate(paths) if real[i] in real[:i]})
    if twice:
        raise UserError(f"{', '.join(twice)}: given twice; name each run once")
    if len(paths) < 2:
        raise UserError("compare: name two or more runs, for example outputs/exp_001 outputs/exp_002")
    names = [os.path.basename(path) for path in real]
    labels = [_one_line(name if names.count(name) == 1 else str(path)) for name, path in zip(names, paths, strict=True)]
    named = zip(paths, labels, strict=True)
    return together(*(lambda path=path, label=label: read_run(path, label) for path, label in named))


def read_run(directory: Path, label: str) -> Run:
    """Read the run in this directory.

    Raises:
        UserError: it is not a run, or its configuration cannot be read.
    """
    config = directory / CONFIG
    if not os.path.isfile(config):
        what = "not a run (no config.yaml)" if os.path.isdir(directory) else "no such directory"
        raise UserError(f"{directory}: {what}; give the directory that train.py wrote, for example outputs/exp_002")
    experiment = load_experiment(str(config.absolute()))
    damage: list[str] = []
    evaluation, found = _evaluation(directory / EVALUATION, damage)
    run = Run(
        label=label,
        directory=directory,
        experiment=experiment,
        in_effect=_in_effect(config),
        summary=_summary(_object(directory / SUMMARY, damage), damage),
        evaluation=evaluation,
        data_report=_object(directory / DATA_REPORT, damage),
        figures={_one_line(".".join(path)): figure for path, figure in found.items()},
    )
    updates = run.summary.get("updates", run.planned) if run.finished else run.planned
    records = _metrics(directory / METRICS, updates, damage)
    run = replace(
        run,
        train=records["train"],
        validation=records["eval"],
        # Earlier versions measured all rows before and after training, the fixed rows between, all as `eval`.
        validation_full=records["eval_full"] or records["eval"],
        test=records["test"],
    )
    damage += _not_as_recorded(run)
    if run.all_updates_done and not os.path.lexists(directory / SUMMARY):
        missing = (
            f"{SUMMARY} is missing, though all {run.max_steps:,} updates are recorded: the final evaluation is "
            "not done, or the file was removed; start the training command again to write it"
        )
        damage.append(missing)
    checkpoint, manifest = _newest_manifest(directory)
    fingerprints = part(manifest, "fingerprints")
    doubts = tuple(_one_line(doubt) for doubt in _doubts(run, checkpoint, manifest))
    fingerprints = fingerprints if isinstance(fingerprints, dict) else {}
    return replace(run, doubts=doubts, fingerprints=fingerprints, damage=tuple(map(_one_line, damage)))


def _newest_manifest(directory: Path) -> tuple[str, Json]:
    """The name and the manifest of a run's newest checkpoint with an intact manifest; empty if there is none."""
    for path in reversed(checkpoints(directory)):
        try:
            return path.name, read_manifest(path)
        except Damaged:
            continue
    return "", {}


def _doubts(run: Run, checkpoint: str, manifest: Json) -> Iterator[str]:
    """How the other files of a run contradict its configuration, because one of them was changed after training.

    The weights are not read. `medqa evaluate` refuses such a run.

    Args:
        checkpoint: the name of the newest checkpoint.
        manifest: its manifest.
    """
    experiment, directory = run.experiment, run.directory
    for path in (directory / ADAPTER_DIR, *checkpoints(directory)[-1:]):
        said = _adapter_config(path / ADAPTER_CONFIG)
        for key in IN_ADAPTER_CONFIG:
            here = getattr(experiment.lora, key)
            if key in said and not _alike(said[key], here):
                where = path.relative_to(directory) / ADAPTER_CONFIG
                yield f"lora.{key} = {_shown(here)} in {CONFIG}, {_shown(said[key])} in {where}"
        if said:
            break
    trained_as = manifest.get("experiment")
    if isinstance(trained_as, dict) and (found := differences(trained_as, experiment)):
        yield f"{CONFIG} is not what {checkpoint} was trained with: {'; '.join(found)}"
    for what, name, here in (
        ("data", "data", run.data_fingerprint),
        ("base", "base model", run.base_fingerprint),
    ):
        there = part(manifest, "fingerprints", what)
        if isinstance(there, str) and here not in (None, there):
            yield f"the fingerprint of the {name} in {checkpoint} differs from that in {DATA_REPORT} or {SUMMARY}"
    for key, name in (("model.quantization", "quantization"), ("training.mixed_precision", "mixed_precision")):
        used = run.summary.get(name)
        if run.finished and isinstance(used, str) and used != run.settings[key]:
            yield f"{key} = {_shown(run.settings[key])} in {CONFIG}, {_shown(used)} in {SUMMARY}"


def _adapter_config(path: Path) -> Json:
    """An adapter's configuration; empty if it is missing or cannot be read."""
    try:
        said = read_json(path)
    except Damaged:
        return {}
    return said if isinstance(said, dict) else {}


def _alike(one: Any, other: Any) -> bool:
    """Whether two values of a configuration are equal; names in any order."""
    if isinstance(one, list) and isinstance(other, list):
        return sorted(map(str, one)) == sorted(map(str, other))
    return type(one) is not bool and one == other


def _shown(value: Any) -> str:
    """A value for a message."""
    return cut(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


def _one_line(text: str) -> str:
    """A name on one line; a file name may have line ends and undecodable bytes."""
    return " ".join(printable(text).split())


def _in_effect(config: Path) -> dict[str, Any]:
    """What was used instead of what was requested, by `section.key`."""
    said = part(read_yaml(config), "in_effect")
    changes = said if isinstance(said, dict) else {}
    return {key: used for key, change in changes.items() if isinstance(used := part(change, "used"), str | int | float)}


def _object(path: Path, damage: list[str]) -> Json:
    """The object in a JSON file; empty if the file is missing, or damaged, which is added to `damage`."""
    try:
        found = read_json(path)
        if not isinstance(found, dict):
            raise Damaged("it is not a JSON object")
        if not found:
            raise Damaged("it is an empty JSON object")
    except Missing:
        return {}
    except Damaged as error:
        _note(damage, path, error)
        return {}
    return found


def _note(damage: list[str], path: Path, error: Exception) -> None:
    """Add that a file is ignored, and why."""
    damage.append(_one_line(f"{path.name} cannot be read and is ignored: {str(error).removeprefix(f'{path}: ')}"))


Size = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Bytes = Annotated[int, Field(ge=0, le=10**18)]
Finite = Annotated[float, Field(gt=-1e18, lt=1e18)]


class _Figures(BaseModel):
    """The metrics of a split in a summary."""

    model_config = ConfigDict(strict=True)

    loss: Finite
    perplexity: Finite | None
    answer_loss: Finite | None
    answer_perplexity: Finite | None


class _Summary(BaseModel):
    """The values of a summary that are used here. The first versions did not write those with a default."""

    model_config = ConfigDict(strict=True)

    experiment: str
    baseline: _Figures
    final: _Figures
    test: _Figures
    updates: Size
    wall_clock_s: Annotated[float, Field(ge=0, le=MAX_COUNT)]
    peak_memory_bytes: Bytes
    memory_device: str
    best_step: Size = 0
    adapter_step: Size = 0
    length: dict[str, int | float | None] = {}
    stopped_early: bool = False
    resumes: Size = 0
    processes: Size = 1
    cpu_threads: Size | None = None
    quantization: str = ""
    mixed_precision: str = ""
    data_fingerprint: str | None = None
    base_fingerprint: str | None = None
    versions: dict[str, str] = {}


def _summary(said: Json, damage: list[str]) -> Json:
    """A summary without invalid values. Invalid and missing values are added to `damage`."""
    if not said:
        return said
    try:
        _Summary.model_validate(said)
    except ValidationError as error:
        locations = [(tuple(map(str, each["loc"]))[:2], each["type"] == "missing") for each in error.errors()]
    else:
        return said
    left_out = dict.fromkeys(location for location, missing in locations if not missing)
    if left_out:
        values = [f"{'.'.join(location)} = {_shown(part(said, *location))}" for location in left_out]
        more = f" and {len(values) - MOST_SHOWN:,} more" if len(values) > MOST_SHOWN else ""
        damage.append(f"{SUMMARY} has invalid values, which are ignored: {', '.join(values[:MOST_SHOWN])}{more}")
    if missing := [".".join(location) for location, missing in locations if missing]:
        damage.append(f"{SUMMARY} lacks values: {', '.join(missing)}")
    kept = {key: dict(value) if isinstance(value, dict) else value for key, value in said.items()}
    for *above, key in left_out:
        (kept[above[0]] if above else kept).pop(key, None)
    return kept


def _not_as_recorded(run: Run) -> Iterator[str]:
    """Where a summary contradicts the metrics of the same updates."""
    last: Any = run.summary.get("updates")
    whole = run.summary.get("adapter_step", last) == last  # otherwise `final` is of a checkpoint, without metrics
    for name, records, step in (
        ("baseline", run.validation_full, 0),
        ("final", run.validation_full, last),
        ("test", run.test, last),
    ):
        if name == "final" and not whole:
            continue
        record = records.get(step, {}) if isinstance(step, int) else {}
        for key in _Figures.model_fields:
            ours, theirs = number(part(run.summary, name, key)), record.get(key)
            if ours is not None and theirs is not None and not math.isclose(ours, theirs, rel_tol=1e-6):
                yield (
                    f"{name}.{key} = {ours:.6g} in {SUMMARY}, {theirs:.6g} in {METRICS} at update {step:,}: one of "
                    "them was changed, and it is not known which"
                )


def _evaluation(path: Path, damage: list[str]) -> tuple[Json, dict[tuple[str, ...], Figure]]:
    """An evaluation and its metrics."""
    evaluation = _object(path, damage)
    try:
        return evaluation, figures(evaluation.get("tasks"))
    except ValueError as error:
        _note(damage, path, error)
        return {}, {}


def _metrics(path: Path, updates: int | None, damage: list[str]) -> dict[str, dict[int, Json]]:
    """The lines of each split, by update; if there are several, the first one, as a resume keeps it.

    A last line without a line end is being written, or was cut short by a kill; a resume repeats it.

    Args:
        updates: the number of updates of the run, if known; lines beyond it do not belong to the run.
    """
    found: dict[str, dict[int, Json]] = {"train": {}, "eval": {}, "eval_full": {}, "test": {}}
    try:
        lines = read_file(path, MAX_METRICS_BYTES).splitlines(keepends=True)
    except Missing:
        lines = []
    except Damaged as error:
        _note(damage, path, error)
        lines = []
    bad, not_finite, again, beyond = 0, 0, 0, 0
    for line in lines:
        if not line.endswith(b"\n"):
            continue
        try:
            record = json.loads(line)  # accepts NaN, so that the other values of the line can be used
        except (ValueError, RecursionError):
            record = None
        step, split = part(record, "step"), part(record, "split")
        if not isinstance(step, int) or number(step) is None or step < 0 or split not in tuple(found):
            bad += 1
            continue
        if updates is not None and step > updates:
            beyond += 1
            continue
        if step in found[split]:
            again += 1
            continue
        told = {key: value for key, value in record.items() if isinstance(value, int | float)}
        kept = {key: value for key, said in told.items() if (value := number(said)) is not None}
        not_finite += len(told) - len(kept)
        found[split][step] = kept
    if bad:
        damage.append(f"{bad} damaged line(s) of {path.name} are ignored")
    if again:
        damage.append(f"{again} line(s) of {path.name} repeat an update and split, and are ignored")
    if beyond:
        damage.append(f"{beyond} line(s) of {path.name} are of updates beyond the {updates:,} of the run and ignored")
    if not_finite:
        damage.append(f"{not_finite} value(s) of {path.name} are not finite and ignored")
    return found


ANSWER_PERPLEXITY = "loss.test.{}.answer_perplexity"  # a path in an evaluation; of `untuned` or `tuned`
