"""How the recipes of runs differ, what a pair of runs shows, warnings, and which further runs would show more."""

import functools
import hashlib
import itertools
import json
import math
import os
import re
import shlex
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medqa.commands.compare.read import ANSWER_PERPLEXITY, CONFIG, EVALUATION, MEASURED, SUMMARY, Run, part
from medqa.commands.evaluation_table import number
from medqa.config import Experiment, evaluation_decides, flat
from medqa.config_file import load_experiment, own_names, parse_sets
from medqa.errors import UserError
from medqa.files import Damaged, read_json
from medqa.terminal import printable

TRAIN = Path(__file__).resolve().parents[3] / "train.py"
SEED = "training.seed"
BASE = "model.base"
LOCATIONS = ("data.medquad", "data.afrimedqa", "data.files")
PLACES = (*LOCATIONS, BASE)  # the same contents may be in several places
MOST_PAIRED = 6  # with more runs (a sweep) they are ranked, and not compared in pairs: 12 runs have 66 pairs
CONTENTS = "the data's contents"  # a difference although the configurations are the same
BASE_CONTENTS = "the base model's contents"  # likewise

# Keys that only decide how much is recorded, and when.
RECORDING = {
    "training.log_steps",
    "training.save_steps",
    "training.save_minutes",
    "training.keep_checkpoints",
    "training.process_timeout_s",
    "evaluation.samples",
    "evaluation.full_rows",
}
EVALUATED = {
    "evaluation.steps",
    "evaluation.rows",
}  # also only recording, unless evaluation decides when a run ends or which adapter it keeps
# How an update is computed: the result changes by rounding and by other dropout masks, the cost by much.
COST = {
    "model.dequantize",
    "model.attn_implementation",
    "model.gradient_checkpointing",
    "tokenization.padding",
    "training.per_device_batch_size",
    "training.padding_free",
    "training.micro_batch_tokens",
}


@dataclass(frozen=True)
class Pair:
    """Two runs, and every setting of the recipe that differs between them, as it was in effect."""

    first: Run
    second: Run
    keys: tuple[str, ...]

    @property
    def doubted(self) -> tuple[str, ...]:
        """Which of the two were trained in a way that is not known."""
        return tuple(run.label for run in (self.first, self.second) if run.doubts)


@dataclass(frozen=True)
class Proposal:
    """A run that differs from an existing one in a single change."""

    base: Run
    change: dict[str, Any]
    command: str


def recipe(values: dict[str, Any]) -> dict[str, Any]:
    """The settings, by `section.key`, that the computed result depends on."""
    decides = evaluation_decides(values["training.keep"], values["training.early_stopping_patience"])
    recording = RECORDING if decides else RECORDING | EVALUATED
    return {key: value for key, value in values.items() if key not in recording and not key.startswith("tracking.")}


def differing(first: Run, second: Run) -> tuple[str, ...]:
    """The settings in which two runs differ. The location of data does not count if the data are known to be equal."""
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
    """Every pair of runs, in the given order."""
    return [Pair(one, two, differing(one, two)) for one, two in itertools.combinations(runs, 2)]


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """`section.key` to its value in each run, where requested values or those in effect differ; without recording."""
    asked, used = [flat(run.experiment) for run in runs], [run.settings for run in runs]
    keys = [
        key
        for key in {key: None for values in asked for key in recipe(values)}
        if any(a[key] != asked[0][key] or u[key] != used[0][key] for a, u in zip(asked, used, strict=True))
    ]
    return {key: [told(a[key], u[key]) for a, u in zip(asked, used, strict=True)] for key in keys}


def told(asked: Any, used: Any) -> str:
    """A setting in words: the requested value, and the one in effect if it differs."""
    return shown(asked) if asked == used else f"{shown(asked)} (in effect: {shown(used)})"


def shown(value: Any) -> str:
    """A setting's value as it is written in an experiment file."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def conclusion(pair: Pair, all_pairs: Sequence[Pair]) -> str:
    """What the difference between two runs shows, and what it does not show."""
    if pair.doubted:
        return f"nothing: it is not known how {' and '.join(pair.doubted)} was trained, see the warnings"
    unfinished = [run.label for run in (pair.first, pair.second) if not run.finished]
    if len(pair.keys) > 1:
        text = f"{len(pair.keys)} settings differ: does not show which of them made the difference"
        return text + f"; unfinished: {', '.join(unfinished)}" * bool(unfinished)
    if unfinished:
        return f"nothing yet; unfinished: {', '.join(unfinished)}"
    if not pair.keys:
        return "the same recipe twice: differences come from the machines"
    if pair.keys == (SEED,):
        return f"only the seed differs: the noise that other differences have to exceed{_gap(pair)}"
    key = pair.keys[0]
    if key in MEASURED or key.startswith("data.") or key == CONTENTS:
        return f"only {key} differs, but it changes the tokens that perplexity is over: perplexities are not comparable"
    what = f"the cost of {key} (results differ only by rounding and noise)" if key in COST else f"the effect of {key}"
    seeds = [other for other in _believed(all_pairs) if other.keys == (SEED,)]
    mine = [o for o in seeds if {id(o.first), id(o.second)} & {id(pair.first), id(pair.second)}]
    if mine:
        other = mine[0]
        return f"isolates {what}; the noise of a seed, {other.first.label} against {other.second.label}{_gap(other)}"
    return f"isolates {what}, for one seed only; repeat both with --set {SEED}=... to measure the noise"


def _believed(found: Sequence[Pair]) -> list[Pair]:
    """The pairs of which it is known how both runs were trained."""
    return [pair for pair in found if not pair.doubted]


def _gap(pair: Pair) -> str:
    """By how much the answer perplexities of two runs differ."""
    values = [number(part(run.summary, "final", "answer_perplexity")) for run in (pair.first, pair.second)]
    return "" if None in values else f" (answer perplexity {values[0]:.4g} and {values[1]:.4g})"


def proposals(runs: Sequence[Run], found: Sequence[Pair]) -> list[Proposal]:
    """Runs that differ from the first one in one change toward another run, without those that exist already.

    Every setting that differs between any two runs differs from the first one in one of the proposed runs. If no two
    runs differ only in the seed, the last proposed run does: it shows how large the noise is. Of many runs, which are
    ranked, only that one is proposed: the best trial with another seed.
    """
    base, found = runs[0], _believed(found)
    if base.doubts or printable(str(base.directory)) != str(base.directory):
        return []  # it is not known what to compare with, or its path cannot be shown in a command
    toward = found if len(runs) <= MOST_PAIRED else []
    changes = [change for p in toward if p.first is base and len(p.keys) > 1 for change in one_changes(p)]
    if not any(pair.keys == (SEED,) for pair in found):
        another = {SEED: (base.experiment.training.seed + 1) % 2**63}
        changes += [(another, run) for run in [changed(base, another)] if run is not None]
    seen = [recipe(flat(run.experiment)) for run in runs if not run.doubts]
    proposed = []
    for change, experiment in changes:
        values = recipe(flat(experiment))
        if values not in seen:
            seen.append(values)
            proposed.append(Proposal(base, change, command(base, change)))
    return proposed


def one_changes(pair: Pair) -> Iterator[tuple[dict[str, Any], Experiment]]:
    """The changes from the first run toward the second, one setting each; two if one alone is refused."""
    asked, toward = flat(pair.first.experiment), flat(pair.second.experiment)
    if toward["model.quantization"] == "auto":  # what it chose; another run may choose otherwise
        toward["model.quantization"] = pair.second.settings["model.quantization"]
    keys = [key for key in pair.keys if key in asked and asked[key] != toward[key]]
    for key in keys:
        for together in ((key,), *((key, other) for other in keys if other != key)):
            change = {k: toward[k] for k in together}
            if (experiment := changed(pair.first, change)) is not None:
                yield change, experiment
                break


def changed(run: Run, change: dict[str, Any]) -> Experiment | None:
    """The experiment of a run with one change; None if it cannot be run or written on a command line."""
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
    """The context length of a base model in a local directory; infinity if it is not known."""
    try:
        said = read_json(Path(os.path.expanduser(base), "config.json"))
    except Damaged:
        said = None
    longest = number(part(said, "max_position_embeddings"))
    return math.inf if longest is None else longest


def word(key: str, value: Any) -> str | None:
    """`section.key=value` that `--set` reads as exactly this value; None if there is none."""
    texts = [value] if isinstance(value, str) else []
    for text in (*texts, json.dumps(value, ensure_ascii=False)):
        overrides, problems = parse_sets([f"{key}={text}"])
        if not problems and overrides[key].value == value and type(overrides[key].value) is type(value):
            return f"{key}={text}"
    return None


def command(run: Run, change: dict[str, Any]) -> str:
    """The command that starts a run with one change, for a shell in the current directory.

    It starts from the run's own configuration, which includes `--tiny`, `--model` and earlier `--set`. It names the
    output directory, because otherwise every run would be named after the file, `config`.
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
    if config.startswith(("-", "~")):  # it would be taken for an option or a home directory
        config = f"./{config}"
    launch = ["accelerate", "launch", train, "--exp", config, "--output-dir", f"outputs/{name}", "--set", *words]
    return shlex.join(launch)


# ----------------------------------------------------------------------------------------------------
# Warnings: what the comparison does not show.

OPTIONS = {"model.base": "--model", "data.medquad": "--medquad", "data.afrimedqa": "--afrimedqa"}


def warnings(runs: Sequence[Run], found: Sequence[Pair]) -> list[str]:
    """All warnings, the most serious first."""
    believed = _believed(found)
    said = [
        *_doubted(runs),
        *_unfinished(runs),
        *_damaged(runs),
        *_several_changes(runs, believed),
        *_other_rows(runs),
        *_other_loss(runs),
        *_evaluations(runs),
        *_overlap(runs),
        *_subset(runs),
        *_machines(runs),
        *_one_seed(believed),
        *_moved(runs[0]),
    ]
    return [printable(text) for text in said]


def named(labels: Iterable[str]) -> str:
    """The names of runs; of many, only the first ones and how many more there are."""
    known = list(labels)
    first = ", ".join(known[:MOST_PAIRED])
    return first if len(known) <= MOST_PAIRED else f"{first} and {len(known) - MOST_PAIRED:,} more"


def groups(runs: Sequence[Run], key: Callable[[Run], Hashable]) -> dict[Any, str]:
    """The names of the runs that share a value, by value."""
    found: dict[Any, list[str]] = defaultdict(list)
    for run in runs:
        found[key(run)].append(run.label)
    return {value: named(labels) for value, labels in found.items()}


def _setting(key: str, run: Run) -> str:
    """A setting of a run, as text."""
    return str(run.settings[key])


def _summarized(key: str, run: Run) -> str:
    """A value of a run's summary, as text."""
    return str(run.summary[key])


def _doubted(runs: Sequence[Run]) -> list[str]:
    """Runs whose files contradict each other about how they were trained."""
    return [
        f"{run.label}: it is not known how it was trained, and nothing is concluded from it: its files contradict "
        f"each other: {'; '.join(run.doubts)}. Restore what was changed since it was trained"
        for run in runs
        if run.doubts
    ]


def _unfinished(runs: Sequence[Run]) -> list[str]:
    """Runs that are not finished."""
    return [f"{run.label} is {run.state}; its metrics are those so far" for run in runs if not run.finished]


def _damaged(runs: Sequence[Run]) -> list[str]:
    """Files of runs that could not be read."""
    return [f"{run.label}: {damage}" for run in runs for damage in run.damage]


def _several_changes(runs: Sequence[Run], found: Sequence[Pair]) -> list[str]:
    """Runs that differ in several settings, so that no difference has a single cause."""
    keys = list(dict.fromkeys(key for pair in found if len(pair.keys) > 1 for key in pair.keys))
    if not keys:
        return []
    within = [pair for pair in found if len(pair.keys) > 1]
    labels = dict.fromkeys(run.label for pair in within for run in (pair.first, pair.second))
    return [
        f"{named(labels)} differ in several settings at once, {len(keys)} in all: {', '.join(keys)}. The "
        "comparison does not show which of them made the difference"
    ]


def _other_rows(runs: Sequence[Run]) -> list[str]:
    """Runs whose losses and perplexities are over other tokens."""
    said = []
    for key in MEASURED:
        if len(by := groups(runs, functools.partial(_setting, key))) > 1:
            values = "; ".join(f"{labels}: {value}" for value, labels in by.items())
            said.append(f"{key} ({values})")
    by = groups(runs, lambda run: run.data_fingerprint)
    if None in by:
        said.append(f"it is not known which rows {by.pop(None)} held out")
    if len(by) > 1:
        said.append(f"other rows, answers or splits ({' / '.join(by.values())})")
    return [f"perplexities and losses are over different tokens, and not comparable: {', '.join(said)}"] * bool(said)


def _other_loss(runs: Sequence[Run]) -> list[str]:
    """Runs whose loss is over other tokens of the same rows."""
    by = groups(runs, lambda run: run.experiment.tokenization.loss_on)
    if len(by) < 2:
        return []
    return [
        f"the loss of {by['answer']} is over the answer only, that of {by['all']} over prompt and answer: they are "
        "not comparable and have separate plots; answer loss and answer perplexity are comparable. Target tokens, and "
        "target tokens per second, differ in the same way"
    ]


def _evaluations(runs: Sequence[Run]) -> list[str]:
    """Evaluations that are missing, of another update, or of a part of the rows."""
    said = []
    without = [run for run in runs if not run.evaluation]
    if without:
        commands = [shlex.join(["python", "-m", "medqa", "evaluate", str(run.directory)]) for run in without]
        how = " && ".join(commands) if len(without) <= MOST_PAIRED else f"{commands[0]}, for example"
        names = named(run.label for run in without)
        said.append(f"{names}: no interval of the perplexity and no sample answers; run {how}")
    for run in runs:
        if not run.evaluation:
            continue
        said += [f"{run.label}: {text}" for text in (_other_update(run), _other_base(run)) if text]
        figure = run.figures.get(ANSWER_PERPLEXITY.format("tuned"))
        if figure is None or figure.low is None:
            said.append(f"{run.label}: {EVALUATION} has no interval of the answer perplexity")
    by = groups([run for run in runs if run.evaluation], lambda run: number(run.evaluation.get("limit")))
    if set(by) - {None}:
        parts = "; ".join(f"{labels}: {'all rows' if n is None else f'{n:.0f} rows'}" for n, labels in by.items())
        said.append(f"evaluated on a part of the rows ({parts})")
    return said


def _other_update(run: Run) -> str | None:
    """A warning if the evaluation is of another update than the run's adapter."""
    step = number(run.evaluation.get("step"))
    if step is None or step == run.adapter_step:
        return None
    ours = f"the run's adapter of {run.adapter_step}" if run.finished else f"the newest update is {run.updates}"
    return f"{EVALUATION} is of update {step:.0f}, {ours}"


def _other_base(run: Run) -> str | None:
    """A warning if the evaluation is of another base model than the run, or may be."""
    if "base_fingerprint" not in run.evaluation:
        return None  # an evaluation of the first versions
    said = run.evaluation["base_fingerprint"]
    if not isinstance(said, str) or not said:
        return f"{EVALUATION} does not record its base model"
    if run.base_fingerprint is None:
        return (
            f"it is not known whether {EVALUATION} is of the run's base model, which neither {SUMMARY} nor a "
            "checkpoint records"
        )
    return f"{EVALUATION} is of another base model than the run's" if said != run.base_fingerprint else None


def _overlap(runs: Sequence[Run]) -> list[str]:
    """Runs whose held-out rows overlap with training; those with the same overlap together."""
    by: dict[tuple[str, str], list[str]] = defaultdict(list)
    for run in runs:
        how = f"(data.split = {run.experiment.data.split})"
        share = number(part(run.data_report, "overlap", "held_out", "question_or_answer", "share"))
        if share:
            what = f"held-out rows share a question or an answer with training, which flatters perplexity {how}"
            by[f"{share:.1%}", what].append(run.label)
        of_groups = number(part(run.data_report, "overlap", "held_out", "group", "share"))
        if of_groups:
            by[f"{of_groups:.1%}", f"held-out rows that have a group share it with training {how}"].append(run.label)
    return [
        f"{named(labels)}: {share} of {'its' if len(labels) == 1 else 'their'} {what}"
        for (share, what), labels in by.items()
    ]


def _subset(runs: Sequence[Run]) -> list[str]:
    """Curves whose points are over different rows."""
    return [
        f"{labels}: validation during training is on a fixed subset of {counts[0]:.0f} of {counts[1]:.0f} rows, before "
        "and after it on all: the ends of the curve are not comparable with its middle"
        for counts, labels in groups(runs, _fewest_and_first).items()
        if counts is not None and counts[0] < counts[1]
    ]


def _fewest_and_first(run: Run) -> tuple[float, float] | None:
    """The smallest number of rows of a run's validations, and that of the first one; None if not recorded."""
    rows = [record["rows"] for _, record in sorted(run.validation.items()) if "rows" in record]
    return (min(rows), rows[0]) if rows else None


def _machines(runs: Sequence[Run]) -> list[str]:
    """Runs whose cost was measured on different machines."""
    said = []
    for key in ("memory_device", "processes", "cpu_threads"):
        by = groups([run for run in runs if key in run.summary], functools.partial(_summarized, key))
        if len(by) > 1:
            said.append(f"{key} ({'; '.join(f'{labels}: {value}' for value, labels in by.items())})")
    return [f"speed, memory and time were measured on different machines: {', '.join(said)}"] * bool(said)


def _one_seed(found: Sequence[Pair]) -> list[str]:
    """A warning if nothing shows how much a seed changes."""
    if any(pair.keys == (SEED,) for pair in found) or not any(set(pair.keys) - {CONTENTS} for pair in found):
        return []
    return ["one seed each: the noise of a seed is not known; the last of the proposed runs would show it"]


def _moved(base: Run) -> list[str]:
    """Files that the proposed runs would read, but that have moved."""
    if printable(str(base.directory)) != str(base.directory):
        return [f"{base.label}: its directory cannot be named in a command, so no runs are proposed; rename it"]
    values = {(key, option): flat(base.experiment)[key] for key, option in OPTIONS.items()}
    values |= {
        (f"data.files {name}", f"--data {name}="): location for name, location in base.experiment.data.files.items()
    }
    return [
        f"{base.label}: {key} = {value} does not exist, so the proposed commands need {option}"
        for (key, option), value in values.items()
        if value.startswith((".", "/", "~")) and not os.path.exists(os.path.expanduser(value))
    ]
