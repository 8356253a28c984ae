"""From a file, `--tiny`, `--model` and the like, and `--set` to an `Experiment`, or to one message with every problem.

Order: file < `--tiny` < `--model`, `--medquad`, `--afrimedqa`, `--data` < `--set`.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from medqa.config import LENGTH, Experiment, flat, may_change_on_resume
from medqa.errors import UserError
from medqa.files import Damaged, read_file
from medqa.key_advice import meant, wanted
from medqa.limits import MAX_NAME_BYTES, MAX_PROBLEMS, MAX_YAML_BYTES
from medqa.tiny import AFRIMEDQA_CSV, BASE_DIR, MEDQUAD_CSV
from medqa.yaml_core import cut, load_yaml, read_yaml, short

EXPERIMENTS_DIR = Path(__file__).resolve().parent.parent / "experiments"

# The recipe stays; these numbers suit a model of under a million parameters and a few hundred short rows.
TINY = {
    "model.base": str(BASE_DIR),
    "data.medquad": str(MEDQUAD_CSV),
    "data.afrimedqa": str(AFRIMEDQA_CSV),
    "data.files": {},
    "optimizer.learning_rate": 1e-2,
    "tokenization.max_length": 160,
    "training.max_steps": 40,
    "training.epochs": None,
    "training.log_steps": 1,
    "training.save_steps": 10,
    "evaluation.steps": 10,
}
TINY_WARMUP = 4  # for recipes that warm up at all

Locations = Mapping[str, str | Mapping[str, str] | None]  # `section.key` to what its own option says, None: nothing

WRITTEN_BY_RUNS = ("gradient_accumulation_steps", "in_effect")  # so that a run's config.yaml is an experiment file


@dataclass(frozen=True)
class Override:
    """One `section.key` laid over the file: its value, and the words it came from, for messages and names."""

    value: Any
    origin: str
    text: str


def load_experiment(
    name: str,
    *,
    tiny: bool = False,
    locations: Locations | None = None,
    sets: Sequence[str] = (),
) -> Experiment:
    """The experiment called `name` (or the file at that path) with everything laid over it.

    Args:
        name: a name in `experiments/` or the path of a YAML file.
        tiny: the embedded base model and data, and numbers that suit them.
        locations: `section.key` to the value of its own option (`--model`, ...), None where not given; that of
            `data.files` is laid over the file's by name.
        sets: the words after `--set`, `section.key=value` each.

    Raises:
        UserError: unknown experiment, unreadable file, or problems with keys and values, all in one message.
    """
    path = find_experiment(name)
    values, problems = _sections(read_yaml(path), str(path))
    origins = dict.fromkeys(values, str(path))
    if tiny:
        warmup = TINY_WARMUP if values.get("scheduler.warmup_steps") else 0
        for key, value in {**TINY, "scheduler.warmup_steps": warmup}.items():
            values[key], origins[key] = value, "--tiny"
    for key, location in (locations or {}).items():
        if key == "data.files" and location and isinstance(location, Mapping):
            before = values.get(key, {})
            if isinstance(before, dict):  # else it is refused below
                values[key], origins[key] = {**before, **location}, "--data"
        elif location is not None and key != "data.files":
            values[key], origins[key] = location, f"--{'model' if key == 'model.base' else key.split('.')[1]}"
    overrides, bad_words = parse_sets(sets)
    if len(given := overrides.keys() & set(LENGTH)) == 1:  # it takes the place of the other
        values.update(dict.fromkeys(set(LENGTH) - given))
    for key, override in overrides.items():
        values[key], origins[key] = override.value, override.origin
    experiment, bad_values = _validate(values, origins)
    problems += bad_words + bad_values
    if problems:
        more = [f"and {len(problems) - MAX_PROBLEMS:,} problems more"] if len(problems) > MAX_PROBLEMS else []
        raise UserError(*problems[:MAX_PROBLEMS], *more)
    return experiment


def find_experiment(name: str) -> Path:
    """The file of the experiment called `name`, which may be a path.

    Raises:
        UserError: there is none; lists the known names.
    """
    known = sorted(p.stem for p in EXPERIMENTS_DIR.glob("*.yaml") if not is_sweep(p))
    if name.endswith((".yaml", ".yml")) or "/" in name:
        given = os.path.expanduser(name)  # with isfile it never raises, unlike pathlib's: too long, no such user
        if not os.path.isfile(given):
            raise UserError(f"--exp {name}: no such file; known experiments: {', '.join(known)}")
        path = Path(given)
    else:
        path = EXPERIMENTS_DIR / f"{name}.yaml"
        if name not in known and not is_sweep(path):
            listed = ", ".join(known)
            raise UserError(f"--exp {name}: no such experiment; known: {listed} (or the path of a YAML file)")
    if is_sweep(path):
        raise UserError(
            f"--exp {name}: a W&B sweep, not an experiment: `wandb sweep {os.path.relpath(path)}` makes it, and "
            f"says how its trials are started; known experiments: {', '.join(known)}"
        )
    return path


def is_sweep(path: Path) -> bool:
    """Whether a file is the configuration of a W&B sweep, which no experiment can be taken for."""
    try:
        return re.search(rb"^(\xef\xbb\xbf)?parameters:", read_file(path, MAX_YAML_BYTES), re.M) is not None
    except Damaged:
        return False


def parse_sets(words: Sequence[str]) -> tuple[dict[str, Override], list[str]]:
    """The overrides in `--set` words, by key (the last one of a key counts), and the problems with the words."""
    overrides: dict[str, Override] = {}
    problems = []
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            problems.append(f"--set {cut(word)}: write section.key=value")
            continue
        try:
            value = load_yaml(text, f"--set {cut(word)}")
        except UserError as error:
            problems.append(str(error))
            continue
        if key in Experiment.model_fields and isinstance(value, dict):  # a whole section, as a nested sweep gives it
            for name, inner in value.items():
                overrides[f"{key}.{name}"] = Override(_without_none(f"{key}.{name}", inner), "--set", str(inner))
        else:
            overrides[key] = Override(_without_none(key, value), "--set", text)
    return overrides, problems


def _without_none(key: str, value: Any) -> Any:
    """Python's None, as W&B's agent writes what is null; in the two datasets it is a word, as on the command line."""
    return None if value == "None" and key not in ("data.medquad", "data.afrimedqa") else value


def default_output_dir(name: str, tiny: bool, sets: Sequence[str], experiment: Experiment) -> Path:
    """`outputs/<exp>[-tiny][,key=value...]`: overrides that make it another run are part of the name, sorted.

    Data of one's own are part of it by their names, however given: a path says who one is, and the directory's name is
    the run's on W&B. A length is where it is given in the other unit than the file's: neither goes on from the other.

    Raises:
        UserError: the experiment's file has a name that no directory can have.
    """
    overrides, _ = parse_sets(sets)
    path = find_experiment(name)
    filed, _ = _sections(read_yaml(path), str(path))
    filed |= TINY if tiny else {}
    other_unit = {key for key in LENGTH if any(filed.get(other) is not None for other in set(LENGTH) - {key})}
    words = {
        key: f"{key}={override.text}"
        for key, override in overrides.items()
        if key != "data.files" and (key in other_unit or not may_change_on_resume(key, experiment))
    }
    files = filed.get("data.files")
    if own_names(experiment.data.files) != own_names(files if isinstance(files, dict) else {}):
        words["data.files"] = f"data.files={own_names(experiment.data.files)}"
    own_name = f"{path.stem}{'-tiny' if tiny else ''}"
    if path.stem.strip(".") == "" or len(os.fsencode(own_name)) > MAX_NAME_BYTES:
        raise UserError(f"--exp {cut(name)}: its name cannot name a directory; rename it, or give an --output-dir")
    suffix = "".join(f",{word}" for word in sorted(re.sub(r"[^A-Za-z0-9._=+-]", "-", word) for word in words.values()))
    if len(suffix) > 80:
        suffix = "," + hashlib.sha256(suffix.encode()).hexdigest()[:16]
    return Path("outputs") / (own_name + suffix)


def own_names(files: Mapping[str, str]) -> str:
    """The names of data of one's own as part of a directory's name."""
    return "+".join(sorted(map(str, files))) or "none"


def _sections(raw: Any, where: str) -> tuple[dict[str, Any], list[str]]:
    """A file's content as `section.key` to value, and the problems with its shape."""
    if not isinstance(raw, dict):
        return {}, [f"{where}: an experiment file has sections ({', '.join(Experiment.model_fields)})"]
    values, problems = {}, []
    is_a_runs = all(key in raw for key in WRITTEN_BY_RUNS)
    for section, keys in raw.items():
        if is_a_runs and section in WRITTEN_BY_RUNS:
            continue
        if section not in Experiment.model_fields:
            problems.append(f"{where}: {cut(str(section))}: no such section{meant(str(section))}")
        elif not isinstance(keys, dict):
            problems.append(f"{where}: {section} = {short(keys)}: a section has keys, one a line, indented")
        else:
            values.update({f"{section}.{key}": value for key, value in keys.items()})
    return values, problems


def _validate(values: Mapping[str, Any], origins: Mapping[str, str]) -> tuple[Experiment, list[str]]:
    """The experiment and every problem; keys with a problem are replaced by their defaults to find further ones."""
    known = flat(Experiment())
    problems: dict[str, str] = {}
    for key in values:
        if key not in known:
            shown = f"{cut(key)} = {short(values[key])}" if "." in key else cut(key)
            problems[key] = f"{origins[key]}: {shown}: no such key{meant(key)}"
    try:
        Experiment.model_validate(_nested({k: v for k, v in values.items() if k in known}))
    except ValidationError as error:
        for detail in error.errors():
            key = ".".join(str(part) for part in detail["loc"][:2])
            problems.setdefault(key, f"{origins[key]}: {key} = {short(values[key])}: {wanted(key, detail)}")
    experiment = Experiment.model_validate(_nested({k: v for k, v in values.items() if k not in problems}))
    found = list(problems.values())
    for keys, message in _impossible(experiment):
        if not problems.keys() & set(keys):
            where = ", ".join(dict.fromkeys(origins[key] for key in keys if key in origins)) or "the experiment"
            found.append(f"{where}: {message}")
    return experiment, found


def _nested(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`section.key` to value as sections."""
    sections: dict[str, dict[str, Any]] = {}
    for dotted, value in values.items():
        section, _, key = dotted.partition(".")
        sections.setdefault(section, {})[key] = value
    return sections


def _impossible(experiment: Experiment) -> Iterator[tuple[list[str], str]]:
    """Combinations that cannot be: the keys involved, and the message. The batch's is in `plan.accumulation_steps`."""
    model, data, training = experiment.model, experiment.data, experiment.training
    if training.max_steps is None and training.epochs is None:
        yield (
            ["training.max_steps", "training.epochs"],
            "training.max_steps is missing (or training.epochs): how many updates?",
        )
    if training.max_steps is not None and training.epochs is not None:
        yield ["training.max_steps", "training.epochs"], "training.max_steps and training.epochs: give one of the two"
    if training.max_steps is not None and experiment.scheduler.warmup_steps > training.max_steps:
        yield (
            ["scheduler.warmup_steps", "training.max_steps"],
            f"scheduler.warmup_steps = {experiment.scheduler.warmup_steps} is more than training.max_steps = "
            f"{training.max_steps}",
        )
    if {model.dtype, training.mixed_precision} in ({"float16", "bf16"}, {"bfloat16", "fp16"}):
        yield (
            ["model.dtype", "training.mixed_precision"],
            f"model.dtype = {model.dtype}, training.mixed_precision = {training.mixed_precision}: do not go together: "
            "bfloat16 with bf16, float16 with fp16",
        )
    if abs(sum(data.fractions) - 1) > 1e-6 or 0 in data.fractions:
        yield ["data.fractions"], f"data.fractions = {data.fractions}: train, validation and test, each above 0, sum 1"
    if experiment.tokenization.pad_token == "[PAD]" and "lm_head" in experiment.lora.target_modules:
        yield (
            ["tokenization.pad_token", "lora.target_modules"],
            "tokenization.pad_token = [PAD], lora.target_modules with lm_head: [PAD] makes lm_head larger than that of "
            "the base model, which the adapter would not fit; use pad_token: eos, or leave lm_head out",
        )
    if data.medquad == data.afrimedqa == "none" and not data.files:
        yield (
            ["data.medquad", "data.afrimedqa", "data.files"],
            "data.medquad and data.afrimedqa are both none, and data.files names nothing: no data",
        )
