"""How the recipes of runs differ, what a pair of runs shows, its warnings, and which runs would show more."""

import functools
import hashlib
import itertools
import json
import math
import os
import re
import shlex
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medqa.commands.compare.read import ANSWER_PERPLEXITY, CONFIG, EVALUATION, SUMMARY, Run, part
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

    @property
    def doubted(self) -> tuple[str, ...]:
        """Those of the two of which it is not known how they were trained."""
        return tuple(run.label for run in (self.first, self.second) if run.doubts)


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
    if pair.doubted:
        return f"nothing: how {' and '.join(pair.doubted)} was trained is not known, see the warnings"
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
    seeds = [other for other in _believed(all_pairs) if other.keys == (SEED,)]
    mine = [o for o in seeds if {id(o.first), id(o.second)} & {id(pair.first), id(pair.second)}]
    if mine:
        other = mine[0]
        return f"isolates {what}; the noise of a seed, {other.first.label} against {other.second.label}{_gap(other)}"
    return f"isolates {what}, for one seed: one seed is one seed; repeat both with --set {SEED}=... to know the noise"


def _believed(found: Sequence[Pair]) -> list[Pair]:
    """The pairs of which it is known how both runs were trained."""
    return [pair for pair in found if not pair.doubted]


def _gap(pair: Pair) -> str:
    """By how much the answer perplexities of two runs differ."""
    values = [number(part(run.summary, "final", "answer_perplexity")) for run in (pair.first, pair.second)]
    return "" if None in values else f" (answer perplexity {values[0]:.4g} and {values[1]:.4g})"


def proposals(runs: Sequence[Run], found: Sequence[Pair]) -> list[Proposal]:
    """The runs that differ from the first one in one change toward another, but for those that are there already.

    Each setting that differs between any two runs differs from the first one in one of them. Where no two runs differ
    by the seed alone, the last one proposed does: it says how large the noise is.
    """
    base, found = runs[0], _believed(found)
    if base.doubts or printable(str(base.directory)) != str(base.directory):
        return []  # what it would be compared with is not known, or no command that can be shown names it
    changes = [change for p in found if p.first is base and len(p.keys) > 1 for change in one_changes(p)]
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


# ----------------------------------------------------------------------------------------------------
# What a comparison does not allow to conclude, by name.

OPTIONS = {"model.base": "--model", "data.medquad": "--medquad", "data.afrimedqa": "--afrimedqa"}


def warnings(runs: Sequence[Run], found: Sequence[Pair]) -> list[str]:
    """Every warning, the gravest first."""
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


def groups(runs: Sequence[Run], key: Callable[[Run], Hashable]) -> dict[Any, str]:
    """The names of the runs that have each value in common."""
    found: dict[Any, list[str]] = defaultdict(list)
    for run in runs:
        found[key(run)].append(run.label)
    return {value: ", ".join(labels) for value, labels in found.items()}


def _setting(key: str, run: Run) -> str:
    """A setting of a run, as text."""
    return str(run.settings[key])


def _summarized(key: str, run: Run) -> str:
    """What a run's summary says of something, as text."""
    return str(run.summary[key])


def _doubted(runs: Sequence[Run]) -> list[str]:
    """Runs whose files say different things of how they were trained."""
    return [
        f"{run.label}: how it was trained is not known, and nothing is concluded from it, because its files do not say "
        f"the same: {'; '.join(run.doubts)}. Put back what was changed since it was trained"
        for run in runs
        if run.doubts
    ]


def _unfinished(runs: Sequence[Run]) -> list[str]:
    """Runs that did not go to their end."""
    return [f"{run.label} is {run.state}; its figures are those so far" for run in runs if not run.finished]


def _damaged(runs: Sequence[Run]) -> list[str]:
    """What of a run could not be read."""
    return [f"{run.label}: {damage}" for run in runs for damage in run.damage]


def _several_changes(runs: Sequence[Run], found: Sequence[Pair]) -> list[str]:
    """Runs of which no difference has a single cause, and all in which they differ."""
    keys = list(dict.fromkeys(key for pair in found if len(pair.keys) > 1 for key in pair.keys))
    if not keys:
        return []
    within = [pair for pair in found if len(pair.keys) > 1]
    labels = dict.fromkeys(run.label for pair in within for run in (pair.first, pair.second))
    return [
        f"{', '.join(labels)} differ in several settings at once, {len(keys)} in all: {', '.join(keys)}. The "
        "comparison does not say which of them made the difference"
    ]


def _other_rows(runs: Sequence[Run]) -> list[str]:
    """Runs whose losses and perplexities are of other tokens."""
    said = []
    for key in MEASURED:
        if len(by := groups(runs, functools.partial(_setting, key))) > 1:
            values = "; ".join(f"{labels}: {value}" for value, labels in by.items())
            said.append(f"{key} ({values})")
    by = groups(runs, lambda run: run.data_fingerprint)
    if None in by:
        said.append(f"which rows they held out is not known of {by.pop(None)}")
    if len(by) > 1:
        said.append(f"other rows, answers or splits ({' / '.join(by.values())})")
    return [f"perplexities and losses are not of the same tokens, and not comparable: {', '.join(said)}"] * bool(said)


def _other_loss(runs: Sequence[Run]) -> list[str]:
    """Runs whose loss is over other tokens of the same rows."""
    by = groups(runs, lambda run: run.experiment.tokenization.loss_on)
    if len(by) < 2:
        return []
    return [
        f"the loss of {by['answer']} is over the answer alone, that of {by['all']} over prompt and answer: they are "
        "not comparable and drawn apart; answer loss and answer perplexity are the same of all. Target tokens, also a "
        "second, are other tokens too"
    ]


def _evaluations(runs: Sequence[Run]) -> list[str]:
    """Evaluations that are missing, of another update, or of a part of the rows."""
    said = []
    without = [run for run in runs if not run.evaluation]
    if without:
        how = [shlex.join(["python", "-m", "medqa", "evaluate", str(run.directory)]) for run in without]
        names = ", ".join(run.label for run in without)
        said.append(f"{names}: no interval of the perplexity and no sample answers; {' && '.join(how)} gives them")
    for run in runs:
        if not run.evaluation:
            continue
        said += [f"{run.label}: {text}" for text in (_other_update(run), _other_base(run)) if text]
        figure = run.figures.get(ANSWER_PERPLEXITY.format("tuned"))
        if figure is None or figure.low is None:
            said.append(f"{run.label}: {EVALUATION} has no interval of the answer perplexity")
    by = groups([run for run in runs if run.evaluation], lambda run: number(run.evaluation.get("limit")))
    if set(by) - {None}:
        whole = "; ".join(f"{labels}: {'all rows' if n is None else f'{n:.0f} rows'}" for n, labels in by.items())
        said.append(f"evaluated on a part of the rows ({whole})")
    return said


def _other_update(run: Run) -> str | None:
    """What to say of an evaluation that is of another update than the run's adapter."""
    step = number(run.evaluation.get("step"))
    if step is None or step == run.adapter_step:
        return None
    ours = f"the run's adapter of {run.adapter_step}" if run.finished else f"the newest update is {run.updates}"
    return f"{EVALUATION} is of update {step:.0f}, {ours}"


def _other_base(run: Run) -> str | None:
    """What to say of an evaluation that is of another base model than the run, or may be."""
    if "base_fingerprint" not in run.evaluation:
        return None  # of the first versions
    said = run.evaluation["base_fingerprint"]
    if not isinstance(said, str) or not said:
        return f"{EVALUATION} does not say of which base model it is"
    if run.base_fingerprint is None:
        return (
            f"whether {EVALUATION} is of the base model that the run was trained on is not known: neither {SUMMARY} "
            "nor a checkpoint says which one that was"
        )
    return f"{EVALUATION} is of another base model than the run's" if said != run.base_fingerprint else None


def _overlap(runs: Sequence[Run]) -> list[str]:
    """Runs that were tested on what they were trained on."""
    said = []
    for run in runs:
        share = number(part(run.data_report, "overlap", "held_out", "question_or_answer", "share"))
        if share:
            said.append(
                f"{run.label}: {share:.1%} of its held-out rows share a question or an answer with training, which "
                f"flatters its perplexity (data.split = {run.experiment.data.split})"
            )
        of_groups = number(part(run.data_report, "overlap", "held_out", "group", "share"))
        if of_groups:
            said.append(
                f"{run.label}: {of_groups:.1%} of its held-out rows that have a group share it with training "
                f"(data.split = {run.experiment.data.split})"
            )
    return said


def _subset(runs: Sequence[Run]) -> list[str]:
    """Curves whose points are not of the same rows."""
    return [
        f"{labels}: validation during training is on a fixed subset of {counts[0]:.0f} of {counts[1]:.0f} rows, before "
        "and after it on all: the ends of the curve are of other rows than its middle"
        for counts, labels in groups(runs, _fewest_and_first).items()
        if counts is not None and counts[0] < counts[1]
    ]


def _fewest_and_first(run: Run) -> tuple[float, float] | None:
    """The fewest rows of a run's validations, and those of its first one; None where not recorded."""
    rows = [record["rows"] for _, record in sorted(run.validation.items()) if "rows" in record]
    return (min(rows), rows[0]) if rows else None


def _machines(runs: Sequence[Run]) -> list[str]:
    """Runs whose cost was not measured on one machine."""
    said = []
    for key in ("memory_device", "processes", "cpu_threads"):
        by = groups([run for run in runs if key in run.summary], functools.partial(_summarized, key))
        if len(by) > 1:
            said.append(f"{key} ({'; '.join(f'{labels}: {value}' for value, labels in by.items())})")
    return [f"speed, memory and time are of other machines: {', '.join(said)}"] * bool(said)


def _one_seed(found: Sequence[Pair]) -> list[str]:
    """Whether nothing tells how much a seed makes."""
    if any(pair.keys == (SEED,) for pair in found) or not any(set(pair.keys) - {CONTENTS} for pair in found):
        return []
    return [
        "one seed each: how far two runs of one recipe are apart is not known here; the last of the proposed runs "
        "would tell"
    ]


def _moved(base: Run) -> list[str]:
    """What the proposed runs would read, but is not where it was."""
    if printable(str(base.directory)) != str(base.directory):
        return [f"{base.label}: no command can name its directory, so no runs are proposed; rename it"]
    values = {(key, option): flat(base.experiment)[key] for key, option in OPTIONS.items()}
    values |= {(f"data.files {name}", f"--data {name}="): place for name, place in base.experiment.data.files.items()}
    return [
        f"{base.label}: {key} = {value} is not there, so the proposed commands need {option}"
        for (key, option), value in values.items()
        if value.startswith((".", "/", "~")) and not os.path.exists(os.path.expanduser(value))
    ]
