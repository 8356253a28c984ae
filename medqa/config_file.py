"""Read an experiment from a YAML file and the options (`--tiny`, `--model`, `--set`, ...); report all problems at once.

Order: file < `--tiny` < `--model`, `--medquad`, `--afrimedqa`, `--data` < `--set`.
"""

import difflib
import hashlib
import os
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml as pyyaml
from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, Event, NodeEvent, ScalarEvent
from ruamel.yaml.nodes import MappingNode, SequenceNode
from ruamel.yaml.resolver import VersionedResolver

from medqa.config import LENGTH, Experiment, flat, may_change_on_resume
from medqa.errors import UserError
from medqa.files import Damaged, read_file, write_file
from medqa.limits import (
    MAX_NAME_BYTES,
    MAX_NUMBER_LENGTH,
    MAX_PROBLEMS,
    MAX_SHOWN,
    MAX_YAML_BYTES,
    MAX_YAML_DEPTH,
    YAML_BYTES_OF_A_VALUE,
)
from medqa.tiny import AFRIMEDQA_CSV, BASE_DIR, MEDQUAD_CSV

# ----------------------------------------------------------------------------------------------------
# YAML by the core schema of YAML 1.2: `5e-5` is a number, `no` is a string, only true and false are booleans.
#
# ruamel.yaml's safe loader reads the text: nothing in a file can execute code, and a repeated key is an error. Its
# resolvers are replaced by those of the core schema, because ruamel's own also read dates and `1_000`.
# Source: https://yaml.org/spec/1.2.2/#103-core-schema
# schema

CORE_SCHEMA = (
    ("null", r"|~|null|Null|NULL", ["", "~", "n", "N"]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)


class CoreResolver(VersionedResolver):
    """Resolves plain scalars by the rules of the core schema only."""

    @property
    def versioned_resolver(self) -> dict[str, list[tuple[str, re.Pattern[str]]]]:
        """The candidates for a scalar by its first character."""
        return RESOLVERS


RESOLVERS: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
for name, pattern, first_characters in CORE_SCHEMA:
    for character in first_characters:
        RESOLVERS.setdefault(character, []).append((f"tag:yaml.org,2002:{name}", re.compile(f"^(?:{pattern})$")))


CORE_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}
NUMBER = re.compile("|".join(f"(?:{pattern})" for name, pattern, _ in CORE_SCHEMA if name in ("int", "float")))


ANOTHER_DOCUMENT = "but found another document"
# Messages of ruamel.yaml as patterns, and what the user is told instead.
IN_WORDS = {
    r"found character '\\t' that cannot start any token": "a tab where YAML allows only spaces; use spaces",
    r"found character '(.)' that cannot start any token": r"a value cannot begin with \1; put it in quotes",
    r"mapping values are not allowed here": (
        "a colon where no key can be; indent the line like its neighbours, or put a value with a colon in quotes"
    ),
    r"expected <block end>, but found .*": "the indentation does not match the lines before; indent the line like them",
    r"found undefined alias '(.*)'": r"*\1 is an alias, but there is no &\1; put a word that begins with * in quotes",
    r"found unexpected end of stream": "a quote is opened and not closed; close it",
}


def load_yaml(text: str, where: str) -> Any:
    """Parse a YAML text within the limits of `medqa/limits.py`.

    Raises:
        UserError: the text is not valid YAML or exceeds a limit; the message names `where` and the line.
    """
    try:
        _check_size(text)
        return _loader().load(text)
    # The last four types: a tag such as `!!bool` on an unsuitable value, or an unknown version; ruamel does not check
    # these.
    except (YAMLError, ValueError, RecursionError, LookupError, TypeError, AttributeError, AssertionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        if getattr(error, "problem", None) == ANOTHER_DOCUMENT:
            raise UserError(f"{where}{line}: the text holds more than one YAML document; keep one") from error
        raise UserError(f"{where}{line}: not valid YAML: {cut(_in_words(error, text))}") from error


def _in_words(error: Exception, text: str) -> str:
    """Describe what is wrong with a YAML text, and what to do."""
    if isinstance(error, DuplicateKeyError):
        return _twice(error, text)
    if isinstance(error, AssertionError):
        return "the %YAML line names a version other than 1.1 and 1.2; remove the line"
    if isinstance(error, LookupError | TypeError | AttributeError):
        return "a tag (a word that begins with !!) does not fit the value that follows it; remove the tag"
    problem = (getattr(error, "problem", None) or str(error)).splitlines()[0]
    for pattern, words in IN_WORDS.items():
        if found := re.fullmatch(pattern, problem):
            return found.expand(words)
    return problem


def _twice(error: MarkedYAMLError, text: str) -> str:
    """Describe which key is repeated, and on which lines."""
    waiting = [_loader().compose(text)]
    while waiting:
        node = waiting.pop()
        pairs = node.value if isinstance(node, MappingNode) else []
        second = next((key for key, _ in pairs if key.start_mark.index == error.problem_mark.index), None)
        if second is not None:
            lines = [key.start_mark.line + 1 for key, _ in pairs if (key.tag, key.value) == (second.tag, second.value)]
            last = second.start_mark.line + 1
            where = f" (lines {lines[0]} and {last})" if lines[0] < last else ""
            return f"the key {second.value} is repeated{where}; keep one"
        waiting += [child for pair in pairs for child in pair]
        waiting += node.value if isinstance(node, SequenceNode) else []
    return "a key is repeated; keep one"


def read_yaml(path: Path) -> Any:
    """Read a YAML file that may be damaged or hostile.

    Raises:
        UserError: the file cannot be read, is not a regular file, or is refused by `load_yaml`.
    """
    try:
        text = read_file(path, MAX_YAML_BYTES).decode("utf-8-sig")
    except Damaged as error:
        raise UserError(f"{error} (cannot be read)") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read: not UTF-8 text (byte {error.start:,}); save it as UTF-8") from error
    return load_yaml(text, str(path))


def short(value: Any) -> str:
    """The `repr` of a value for a message, shortened if it is long."""
    return cut(_SHORT.repr(value))


def cut(text: str) -> str:
    """A text for a message, shortened if it is long."""
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict = 3, 12, 12
_SHORT.maxstring = _SHORT.maxother = MAX_SHOWN


def _loader() -> YAML:
    """The safe loader with the resolvers of the core schema; each instance loads one text."""
    loader = YAML(typ="safe", pure=True)
    loader.Resolver = CoreResolver
    return loader


def _check_size(text: str) -> None:
    """Check, before any value is built, that a text stays within the limits and has only tags of the core schema.

    An alias counts as much as what it repeats, because a few lines of aliases can stand for more than fits into memory.

    Raises:
        ValueError: the text is too long.
        MarkedYAMLError: the text expands beyond the limit, is nested too deeply, has an alias inside its own anchor, or
            has an unknown tag.
    """
    if len(text) > MAX_YAML_BYTES:
        raise ValueError(f"longer than {MAX_YAML_BYTES:,} bytes")
    of_anchor: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []  # for each open node its anchor, and the size of everything before it
    size = 0
    for event in _loader().parse(text):
        before, anchor = size, None
        if isinstance(event, NodeEvent) and len(open_nodes) >= MAX_YAML_DEPTH:
            raise _refused(event, "nested too deeply")
        if isinstance(event, ScalarEvent | CollectionStartEvent) and event.tag and event.tag not in CORE_TAGS:
            raise _refused(event, f"the tag {event.tag} is not one of YAML's core schema")
        if isinstance(event, ScalarEvent):
            may_be_number = event.implicit[0] or event.tag
            if may_be_number and len(event.value) > MAX_NUMBER_LENGTH and NUMBER.fullmatch(event.value):
                raise _refused(event, f"the number {event.value[:20]}... has {len(event.value):,} characters")
            size, anchor = size + YAML_BYTES_OF_A_VALUE + len(event.value), event.anchor
        elif isinstance(event, CollectionStartEvent):
            open_nodes.append((event.anchor, size))
            size += YAML_BYTES_OF_A_VALUE
        elif isinstance(event, CollectionEndEvent):
            anchor, before = open_nodes.pop()
        elif isinstance(event, AliasEvent):
            if event.anchor in (name for name, _ in open_nodes):
                raise _refused(event, f"the alias *{event.anchor} is inside the value that it repeats")
            size += of_anchor.get(event.anchor, 0)  # the loader refuses an alias without an anchor
        if anchor is not None:
            of_anchor[anchor] = size - before
        if size > MAX_YAML_BYTES:
            raise _refused(event, f"expands to more than {MAX_YAML_BYTES:,} bytes")


def _refused(event: Event, problem: str) -> MarkedYAMLError:
    """The error that the loader would raise at this position."""
    return MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


class Dumper(pyyaml.SafeDumper):
    """Writes YAML that 1.1 and 1.2 readers read alike; PyYAML by itself quotes 'no' and writes 5.0e-05."""


def _text(dumper: Dumper, text: str) -> pyyaml.ScalarNode:
    """Quote a string that the core schema would read as another type; PyYAML (YAML 1.1) would write 5e-5 unquoted."""
    plain = any(re.fullmatch(pattern, text) for _, pattern, _ in CORE_SCHEMA)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if plain else None)


Dumper.add_representer(str, _text)


def yaml_text(value: Any) -> str:
    """A value as YAML text that YAML 1.1 and 1.2 readers read alike."""
    return pyyaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def dump_yaml(value: Any, path: Path) -> None:
    """Write a value as a YAML file (`yaml_text`), durably and atomically.

    Raises:
        OSError: the file cannot be written.
    """
    write_file(path, yaml_text(value))


# ----------------------------------------------------------------------------------------------------

# ----------------------------------------------------------------------------------------------------
# Messages about a wrong key or value of an experiment file: the key that was probably meant, or the expected value.

# Names in Trainer, TRL, Axolotl, LLaMA-Factory, Unsloth, torchtune and LitGPT, and the key here with that meaning.
OTHER_TOOLS_NAMES = {
    "lr": "optimizer.learning_rate",
    "optim": "optimizer.name",
    "adam_beta1": "optimizer.betas",
    "adam_beta2": "optimizer.betas",
    "adam_epsilon": "optimizer.eps",
    "max_norm": "optimizer.max_grad_norm",
    "gradient_clipping": "optimizer.max_grad_norm",
    "lr_scheduler": "scheduler.name",
    "lr_scheduler_type": "scheduler.name",
    "warmup": "scheduler.warmup_steps",
    "num_warmup_steps": "scheduler.warmup_steps",
    "warmup_ratio": "scheduler.warmup_steps",
    "num_train_epochs": "training.epochs",
    "num_epochs": "training.epochs",
    "max_train_steps": "training.max_steps",
    "num_training_steps": "training.max_steps",
    "max_steps_per_epoch": "training.max_steps",
    "batch_size": "training.global_batch_size",
    "train_batch_size": "training.global_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size",
    "gradient_accumulation": "training.global_batch_size",
    "micro_batch_size": "training.per_device_batch_size",
    "per_device_train_batch_size": "training.per_device_batch_size",
    "bf16": "training.mixed_precision",
    "fp16": "training.mixed_precision",
    "precision": "training.mixed_precision",
    "random_seed": "training.seed",
    "packing": "training.padding_free",
    "sample_packing": "training.padding_free",
    "logging_steps": "training.log_steps",
    "checkpoint_steps": "training.save_steps",
    "save_total_limit": "training.keep_checkpoints",
    "eval_steps": "evaluation.steps",
    "load_in_4bit": "model.quantization",
    "quantization_bit": "model.quantization",
    "quantize": "model.quantization",
    "torch_dtype": "model.dtype",
    "base_model": "model.base",
    "model_name_or_path": "model.base",
    "model_id": "model.base",
    "activation_checkpointing": "model.gradient_checkpointing",
    "enable_activation_checkpointing": "model.gradient_checkpointing",
    "use_gradient_checkpointing": "model.gradient_checkpointing",
    "flash_attention": "model.attn_implementation",
    "flash_attn": "model.attn_implementation",
    "rank": "lora.r",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "alpha": "lora.lora_alpha",
    "dropout": "lora.lora_dropout",
    "rslora": "lora.use_rslora",
    "lora_use_rslora": "lora.use_rslora",
    "peft_use_rslora": "lora.use_rslora",
    "dora": "lora.use_dora",
    "lora_use_dora": "lora.use_dora",
    "peft_use_dora": "lora.use_dora",
    "chat_template": "tokenization.prompt",
    "lora_target": "lora.target_modules",
    "lora_target_modules": "lora.target_modules",
    "cutoff_len": "tokenization.max_length",
    "sequence_len": "tokenization.max_length",
    "max_seq_length": "tokenization.max_length",
    "max_seq_len": "tokenization.max_length",
    "train_on_inputs": "tokenization.loss_on",
    "train_on_prompt": "tokenization.loss_on",
    "completion_only_loss": "tokenization.loss_on",
    "assistant_only_loss": "tokenization.loss_on",
    "add_eos_token": "tokenization.append_eos",
    "report_to": "tracking.wandb",
    "wandb_project": "tracking.project",
    "run_name": "tracking.run_name",
    "patience": "training.early_stopping_patience",
    "load_best_model_at_end": "training.keep",
    "epoch": "training.epochs",
}


# How the suggested key differs, where it does not have exactly the same meaning.
UNLIKE = {
    "gradient_accumulation_steps": "it is batch size x accumulation x GPUs",
    "gradient_accumulation": "it is batch size x accumulation x GPUs",
    "batch_size": "it is batch size x accumulation x GPUs",
    "train_batch_size": "it is batch size x accumulation x GPUs",
    "packing": "it removes padding without changing which rows an update has",
    "sample_packing": "it removes padding without changing which rows an update has",
}


def meant(key: str) -> str:
    """`; did you mean section.key?`, or an empty string if no known key is similar."""
    known = list(flat(Experiment()))
    last = key.split(".")[-1]
    if last in OTHER_TOOLS_NAMES:
        unlike = f" ({UNLIKE[last]})" if last in UNLIKE else ""
        return f"; did you mean {OTHER_TOOLS_NAMES[last]}?{unlike}"
    same_name = [name for name in known if name.split(".")[1] == last]
    neighbours = [name for name in known if name.startswith(key.split(".")[0] + ".")]
    sections = [] if "." in key else difflib.get_close_matches(key, Experiment.model_fields, 1)
    close = same_name or sections or _close_by_last(last, neighbours) or _close_by_last(last, known)
    close = close or difflib.get_close_matches(key, known, 1)
    return f"; did you mean {close[0]}?" if close else ""


def _close_by_last(last: str, known: list[str]) -> list[str]:
    """The known keys whose name without the section is similar to `last`."""
    names = {name.split(".")[1]: name for name in known}
    return [names[match] for match in difflib.get_close_matches(last, names, 1, cutoff=0.7)]


def wanted(key: str, detail: Mapping[str, Any]) -> str:
    """Describe what pydantic found wrong, in the words of docs/configuration.md."""
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    if key == "data.files":
        return "expected names with a file or a hub id each: {notes: notes.csv} (quote a name that is a number)"
    match detail["type"]:
        case "literal_error":
            return f"expected one of {detail['ctx']['expected']}"
        case "int_type":
            return "expected an integer"
        case "float_type":
            return "expected a number"
        case "bool_type":
            return "expected true or false"
        case "string_type":
            return "expected a string" + (" (`none` leaves the source out)" if key.startswith("data.") else "")
        case "list_type":
            return "expected a list"
        case "too_short" | "too_long":
            return _how_many(key, detail["ctx"]["actual_length"])
        case "string_unicode":
            return "expected UTF-8, but the value has bytes that are not UTF-8; rename the file or directory"
        case _:
            return detail["msg"][0].lower() + detail["msg"][1:]


def _how_many(key: str, given: int) -> str:
    """Describe how many values the list of this key takes, when it has the wrong length."""
    section, name = key.split(".")
    limits = type(getattr(Experiment(), section)).model_fields[name].metadata
    fewest = next((limit.min_length for limit in limits if hasattr(limit, "min_length")), 0)
    most = next((limit.max_length for limit in limits if hasattr(limit, "max_length")), given)
    bound = "exactly" if fewest == most else "at least" if given < fewest else "at most"
    number = fewest if given < fewest else most
    return f"expected a list of {bound} {number:,} value{'s' * (number != 1)}, found {given:,}"


# ----------------------------------------------------------------------------------------------------

EXPERIMENTS_DIR = Path(__file__).resolve().parent.parent / "experiments"

# `--tiny` keeps the recipe, with values that suit a model of under a million parameters and a few hundred short rows.
# The precision is float32, so that every machine has the same losses. `model.quantization: auto` becomes `4bit`, which
# `auto` would choose on no machine for so small a model.
TINY = {
    "model.base": str(BASE_DIR),
    "model.dtype": "float32",
    "data.medquad": str(MEDQUAD_CSV),
    "data.afrimedqa": str(AFRIMEDQA_CSV),
    "data.files": {},
    "optimizer.learning_rate": 1e-2,
    "tokenization.max_length": 160,
    "training.max_steps": 40,
    "training.epochs": None,
    "training.mixed_precision": "no",
    "training.log_steps": 1,
    "training.save_steps": 10,
    "evaluation.steps": 10,
}
TINY_WARMUP = 4  # for recipes that have warmup

Locations = Mapping[str, str | Mapping[str, str] | None]  # `section.key` to the value of its option, or None

WRITTEN_BY_RUNS = ("gradient_accumulation_steps", "in_effect")  # accepted, so a run's config.yaml is an experiment file


@dataclass(frozen=True)
class Override:
    """An override of one `section.key`: its value, and the words it came from, for messages and directory names."""

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
    """Load the experiment called `name` (or the file at that path) and apply all options.

    Args:
        name: a name in `experiments/` or the path of a YAML file.
        tiny: use the embedded base model and data, and values that suit them.
        locations: `section.key` to the value of its own option (`--model`, ...), None where not given. The sources in
            `data.files` are added to those of the file, by name.
        sets: the words after `--set`, each of the form `section.key=value`.

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
        if values.get("model.quantization") == "auto":
            values["model.quantization"], origins["model.quantization"] = "4bit", "--tiny"
    for key, location in (locations or {}).items():
        if key == "data.files" and location and isinstance(location, Mapping):
            before = values.get(key, {})
            if isinstance(before, dict):  # another type is refused below
                values[key], origins[key] = {**before, **location}, "--data"
        elif location is not None and key != "data.files":
            values[key], origins[key] = location, f"--{'model' if key == 'model.base' else key.split('.')[1]}"
    overrides, bad_words = parse_sets(sets)
    if len(given := overrides.keys() & set(LENGTH)) == 1:  # the given key replaces the other one
        values.update(dict.fromkeys(set(LENGTH) - given))
    for key, override in overrides.items():
        values[key], origins[key] = override.value, override.origin
    experiment, bad_values = _validate(values, origins)
    problems += bad_words + bad_values
    if problems:
        more = [f"and {len(problems) - MAX_PROBLEMS:,} more problems"] if len(problems) > MAX_PROBLEMS else []
        raise UserError(*problems[:MAX_PROBLEMS], *more)
    return experiment


def find_experiment(name: str) -> Path:
    """Find the file of the experiment called `name`, which may be a path.

    Raises:
        UserError: there is no such file; the message lists the known experiments.
    """
    known = sorted(p.stem for p in EXPERIMENTS_DIR.glob("*.yaml") if not is_sweep(p))
    if name.endswith((".yaml", ".yml")) or "/" in name:
        given = os.path.expanduser(name)  # os.path.isfile does not raise on names that are too long, unlike pathlib
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
            f"--exp {name}: this is a W&B sweep, not an experiment: `wandb sweep {os.path.relpath(path)}` creates it, "
            f"and prints how to start its trials; known experiments: {', '.join(known)}"
        )
    return path


def is_sweep(path: Path) -> bool:
    """Whether a file is the configuration of a W&B sweep; no experiment has its keys."""
    try:
        return re.search(rb"^(\xef\xbb\xbf)?parameters:", read_file(path, MAX_YAML_BYTES), re.M) is not None
    except Damaged:
        return False


def parse_sets(words: Sequence[str]) -> tuple[dict[str, Override], list[str]]:
    """Parse `--set` words into overrides by key (the last one of a key counts), and a list of problems."""
    overrides: dict[str, Override] = {}
    problems = []
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key.strip():
            problems.append(f"--set {cut(word)}: write section.key=value")
            continue
        try:
            value = load_yaml(text, f"--set {cut(word)}")
        except UserError as error:
            problems.append(str(error))
            continue
        if key in Experiment.model_fields and isinstance(value, dict):  # an entire section, as a nested sweep gives it
            for name, inner in value.items():
                overrides[f"{key}.{name}"] = Override(_without_none(f"{key}.{name}", inner), "--set", str(inner))
        elif key in Experiment.model_fields:
            problems.append(f"--set {cut(word)}: {key} is a section; write {key}.key=value")
        else:
            overrides[key] = Override(_without_none(key, value), "--set", text)
    return overrides, problems


def _without_none(key: str, value: Any) -> Any:
    """Convert Python's None, which W&B's agent writes for null; for the two datasets it becomes the string `none`."""
    return None if value == "None" and key not in ("data.medquad", "data.afrimedqa") else value


def default_output_dir(name: str, tiny: bool, sets: Sequence[str], experiment: Experiment) -> Path:
    """`outputs/<exp>[-tiny][,key=value...]`: overrides that make it another run are part of the name, sorted.

    User data are part of the name by their source names, because a path can identify a person, and the name of the
    directory is that of the W&B run. A length is part of the name where it is in another unit than the file's, because
    neither run can resume the other.

    Raises:
        UserError: the name of the experiment's file cannot be the name of a directory.
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
        raise UserError(f"--exp {cut(name)}: no directory can have this name; rename the file, or give --output-dir")
    suffix = "".join(f",{word}" for word in sorted(re.sub(r"[^A-Za-z0-9._=+-]", "-", word) for word in words.values()))
    if len(suffix) > 80:
        suffix = "," + hashlib.sha256(suffix.encode()).hexdigest()[:16]
    return Path("outputs") / (own_name + suffix)


def own_names(files: Mapping[str, str]) -> str:
    """The names of user data as part of a directory's name."""
    return "+".join(sorted(map(str, files))) or "none"


def _sections(raw: Any, where: str) -> tuple[dict[str, Any], list[str]]:
    """Flatten a file's content into `section.key` to value, and list the problems with its form."""
    if not isinstance(raw, dict):
        return {}, [f"{where}: an experiment file must have sections ({', '.join(Experiment.model_fields)})"]
    values, problems = {}, []
    is_a_runs = all(key in raw for key in WRITTEN_BY_RUNS)
    for section, keys in raw.items():
        if is_a_runs and section in WRITTEN_BY_RUNS:
            continue
        if section not in Experiment.model_fields:
            problems.append(f"{where}: {cut(str(section))}: no such section{meant(str(section))}")
        elif not isinstance(keys, dict):
            problems.append(f"{where}: {section} = {short(keys)}: a section must have indented keys, one on each line")
        else:
            values.update({f"{section}.{key}": value for key, value in keys.items()})
    return values, problems


def _validate(values: Mapping[str, Any], origins: Mapping[str, str]) -> tuple[Experiment, list[str]]:
    """Build the experiment and list every problem; a key with a problem gets its default, so that others are found."""
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
    """Group `section.key` to value by section."""
    sections: dict[str, dict[str, Any]] = {}
    for dotted, value in values.items():
        section, _, key = dotted.partition(".")
        sections.setdefault(section, {})[key] = value
    return sections


def _impossible(experiment: Experiment) -> Iterator[tuple[list[str], str]]:
    """Find impossible combinations: the keys, and the message. `plan.accumulation_steps` checks the batch sizes."""
    model, data, training = experiment.model, experiment.data, experiment.training
    if training.max_steps is None and training.epochs is None:
        yield (
            ["training.max_steps", "training.epochs"],
            "training.max_steps or training.epochs is missing: set the length of the run",
        )
    if training.max_steps is not None and training.epochs is not None:
        yield ["training.max_steps", "training.epochs"], "training.max_steps and training.epochs: set only one"
    if training.max_steps is not None and experiment.scheduler.warmup_steps > training.max_steps:
        yield (
            ["scheduler.warmup_steps", "training.max_steps"],
            f"scheduler.warmup_steps = {experiment.scheduler.warmup_steps} is more than training.max_steps = "
            f"{training.max_steps}; set fewer warmup steps",
        )
    if {model.dtype, training.mixed_precision} in ({"float16", "bf16"}, {"bfloat16", "fp16"}):
        yield (
            ["model.dtype", "training.mixed_precision"],
            f"model.dtype = {model.dtype}, training.mixed_precision = {training.mixed_precision}: not compatible: "
            "use bfloat16 with bf16, or float16 with fp16",
        )
    if abs(sum(data.fractions) - 1) > 1e-6 or 0 in data.fractions:
        yield ["data.fractions"], f"data.fractions = {data.fractions}: each must be above 0, and their sum 1"
    if experiment.tokenization.pad_token == "[PAD]" and "lm_head" in experiment.lora.target_modules:
        yield (
            ["tokenization.pad_token", "lora.target_modules"],
            "tokenization.pad_token = [PAD], lora.target_modules with lm_head: [PAD] makes lm_head larger than in "
            "the base model, and the adapter would not fit there; use pad_token: eos, or remove lm_head",
        )
    if data.medquad == data.afrimedqa == "none" and not data.files:
        yield (
            ["data.medquad", "data.afrimedqa", "data.files"],
            "no data: data.medquad and data.afrimedqa are both none, and data.files is empty; set one of them",
        )
