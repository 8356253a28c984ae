"""What differs between the recipes of runs, what a pair of them says, and the one-change runs that would say more."""

import hashlib
import itertools
import json
import math
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medqa.config import Experiment, evaluation_decides, flat
from medqa.errors import UserError
from medqa.experiment_file import load_experiment, own_names, parse_sets
from medqa.files import Damaged, read_json
from medqa.results.compare_runs import CONFIG, Run, part
from medqa.results.figures import number
from medqa.terminal import printable

TRAIN = Path(__file__).resolve().parents[2] / "train.py"
SEED = "training.seed"
BASE = "model.base"
LOCATIONS = ("data.medquad", "data.afrimedqa", "data.files")
CONTENTS = "the data's contents"  # differ although the configurations say the same
BASE_CONTENTS = "the base model's contents"  # likewise

# What only says how much is written down, and when.
RECORDING = {
    "training.log_steps",
    "training.save_steps",
    "training.save_minutes",
    "training.keep_checkpoints",
    "training.process_timeout_s",
    "evaluation.samples",
}
EVALUATED = {
    "evaluation.steps",
    "evaluation.rows",
}  # recording too, but where it decides when a run ends or what it keeps
# How an update is computed: its result changes by rounding and by other dropout noise, its cost by much.
COST = {
    "model.dequantize",
    "model.attn_implementation",
    "model.gradient_checkpointing",
    "tokenization.padding",
    "training.per_device_batch_size",
    "training.padding_free",
    "training.micro_batch_tokens",
}
# With these, the answer tokens that perplexity is of change too.
MEASURED = (BASE, "tokenization.max_length", "tokenization.append_eos")


@dataclass(frozen=True)
class Pair:
    """Two runs, and every setting of the recipe in which they differ, as it was in effect."""

    first: Run
    second: Run
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Proposal:
    """A run that differs from one that is there in one change alone."""

    base: Run
    change: dict[str, Any]
    command: str


def recipe(values: dict[str, Any]) -> dict[str, Any]:
    """Of all `section.key`, those that what is computed depends on."""
    decides = evaluation_decides(values["training.keep"], values["training.early_stopping_patience"])
    recording = RECORDING if decides else RECORDING | EVALUATED
    return {key: value for key, value in values.items() if key not in recording and not key.startswith("tracking.")}


def differing(first: Run, second: Run) -> tuple[str, ...]:
    """The settings in which two runs differ. Where data lie does not count if they are known to be the same."""
    one, two = recipe(first.settings), recipe(second.settings)
    keys = [key for key in two | one if first.settings[key] != second.settings[key]]
    if BASE not in keys and len({first.base_fingerprint, second.base_fingerprint} - {None}) == 2:
        keys.append(BASE_CONTENTS)
    fingerprints = {first.data_fingerprint, second.data_fingerprint}
    if len(fingerprints) == 1 and None not in fingerprints:
        return tuple(key for key in keys if key not in LOCATIONS)
    if len(fingerprints - {None}) == 2 and not any(key.startswith("data.") for key in keys):
        return (*keys, CONTENTS)
    return tuple(keys)


def pairs(runs: Sequence[Run]) -> list[Pair]:
    """Every two runs, in the order given."""
    return [Pair(one, two, differing(one, two)) for one, two in itertools.combinations(runs, 2)]


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """`section.key` to its value in each run, where these differ, as asked or in effect; recording left out."""
    asked, used = [flat(run.experiment) for run in runs], [run.settings for run in runs]
    keys = [
        key
        for key in {key: None for values in asked for key in recipe(values)}
        if any(a[key] != asked[0][key] or u[key] != used[0][key] for a, u in zip(asked, used, strict=True))
    ]
    return {key: [told(a[key], u[key]) for a, u in zip(asked, used, strict=True)] for key in keys}


def told(asked: Any, used: Any) -> str:
    """A setting in words: what was asked for, and what it came to."""
    return shown(asked) if asked == used else f"{shown(asked)} (in effect: {shown(used)})"


def shown(value: Any) -> str:
    """A setting's value as it is written in an experiment file."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def conclusion(pair: Pair, all_pairs: Sequence[Pair]) -> str:
    """What the difference between two runs says, and what it does not."""
    unfinished = [run.label for run in (pair.first, pair.second) if not run.finished]
    if len(pair.keys) > 1:
        text = f"{len(pair.keys)} settings at once: does not say which of them made the difference"
        return text + f"; and {' and '.join(unfinished)} not finished" * bool(unfinished)
    if unfinished:
        return f"nothing yet: {' and '.join(unfinished)} not finished"
    if not pair.keys:
        return "the same recipe twice: any difference is that of the machines"
    if pair.keys == (SEED,):
        return f"another seed alone: the noise that other differences have to exceed{_gap(pair)}"
    key = pair.keys[0]
    if key in MEASURED or key.startswith("data.") or key == CONTENTS:
        return f"{key} alone, but with it the tokens that perplexity is of: the perplexities are not comparable"
    what = f"the cost of {key} (results differ by rounding and noise alone)" if key in COST else f"the effect of {key}"
    seeds = [other for other in all_pairs if other.keys == (SEED,)]
    mine = [o for o in seeds if {id(o.first), id(o.second)} & {id(pair.first), id(pair.second)}]
    if mine:
        other = mine[0]
        return f"isolates {what}; the noise of a seed, {other.first.label} against {other.second.label}{_gap(other)}"
    return f"isolates {what}, for one seed: one seed is one seed; repeat both with --set {SEED}=... to know the noise"


def _gap(pair: Pair) -> str:
    """By how much the answer perplexities of two runs differ."""
    values = [number(part(run.summary, "final", "answer_perplexity")) for run in (pair.first, pair.second)]
    return "" if None in values else f" (answer perplexity {values[0]:.4g} and {values[1]:.4g})"


def proposals(runs: Sequence[Run], found: Sequence[Pair]) -> list[Proposal]:
    """The runs that differ from the first one in one change toward another, but for those that are there already.

    Each setting that differs between any two runs differs from the first one in one of them. Where no two runs differ
    by the seed alone, the last one proposed does: it says how large the noise is.
    """
    base = runs[0]
    if printable(str(base.directory)) != str(base.directory):
        return []  # no command that can be shown names it
    changes = [change for p in found if p.first is base and len(p.keys) > 1 for change in one_changes(p)]
    if not any(pair.keys == (SEED,) for pair in found):
        another = {SEED: (base.experiment.training.seed + 1) % 2**63}
        changes += [(another, run) for run in [changed(base, another)] if run is not None]
    seen = [recipe(flat(run.experiment)) for run in runs]
    proposed = []
    for change, experiment in changes:
        values = recipe(flat(experiment))
        if values not in seen:
            seen.append(values)
            proposed.append(Proposal(base, change, command(base, change)))
    return proposed


def one_changes(pair: Pair) -> Iterator[tuple[dict[str, Any], Experiment]]:
    """The changes from the first run toward the second, one setting each; two where one alone is refused."""
    asked, toward = flat(pair.first.experiment), flat(pair.second.experiment)
    keys = [key for key in pair.keys if key in asked and asked[key] != toward[key]]
    for key in keys:
        for together in ((key,), *((key, other) for other in keys if other != key)):
            change = {k: toward[k] for k in together}
            if (experiment := changed(pair.first, change)) is not None:
                yield change, experiment
                break


def changed(run: Run, change: dict[str, Any]) -> Experiment | None:
    """The experiment of a run with one change, None where it cannot be run or written on a command line."""
    words = [written for key, value in change.items() if (written := word(key, value)) is not None]
    if len(words) < len(change):
        return None
    try:
        experiment = load_experiment(str((run.directory / CONFIG).absolute()), sets=words)
    except UserError:
        return None
    at_once = experiment.training.per_device_batch_size * max(1, int(number(run.summary.get("processes")) or 1))
    fits = experiment.tokenization.max_length <= longest_input(experiment.model.base)
    return experiment if fits and not experiment.training.global_batch_size % at_once else None


def longest_input(base: str) -> float:
    """How many tokens a base model takes, where it lies on the disk and says so."""
    try:
        said = read_json(Path(os.path.expanduser(base), "config.json"))
    except Damaged:
        said = None
    longest = number(part(said, "max_position_embeddings"))
    return math.inf if longest is None else longest


def word(key: str, value: Any) -> str | None:
    """`section.key=value` that `--set` reads as exactly this value, None where there is none."""
    texts = [value] if isinstance(value, str) else []
    for text in (*texts, json.dumps(value, ensure_ascii=False)):
        overrides, problems = parse_sets([f"{key}={text}"])
        if not problems and overrides[key].value == value and type(overrides[key].value) is type(value):
            return f"{key}={text}"
    return None


def command(run: Run, change: dict[str, Any]) -> str:
    """The launch line of a run with one change, as it is typed into a shell here.

    Its base is the run's own configuration: `--tiny`, `--model` and earlier `--set` are in that. The directory is
    named, because it would be called after the file, `config`, for any run.
    """
    words = [str(word(key, value)) for key, value in change.items()]
    said = [
        f"{key}={own_names(value)}" if key == "data.files" else str(word(key, value)) for key, value in change.items()
    ]
    name = re.sub(r"[^A-Za-z0-9._=+,-]", "-", ",".join((run.label, *said)))
    if len(name) > 120:
        name = f"{name[:100]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    train = "train.py" if os.path.realpath("train.py") == str(TRAIN) else str(TRAIN)
    config = str(run.directory / CONFIG)
    if config.startswith(("-", "~")):  # an option, a home directory
        config = f"./{config}"
    launch = ["accelerate", "launch", train, "--exp", config, "--output-dir", f"outputs/{name}", "--set", *words]
    return shlex.join(launch)
