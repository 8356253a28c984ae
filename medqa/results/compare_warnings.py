"""What a comparison does not allow to conclude, by name."""

import functools
import os
import shlex
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from medqa.config import flat
from medqa.results.compare_figures import ANSWER_PERPLEXITY
from medqa.results.compare_recipes import CONTENTS, MEASURED, SEED, Pair
from medqa.results.compare_runs import EVALUATION, Run, part
from medqa.results.figures import number
from medqa.terminal import printable

OPTIONS = {"model.base": "--model", "data.medquad": "--medquad", "data.afrimedqa": "--afrimedqa"}


def warnings(runs: Sequence[Run], found: Sequence[Pair]) -> list[str]:
    """Every warning, the gravest first."""
    said = [
        *_unfinished(runs),
        *_damaged(runs),
        *_several_changes(runs, found),
        *_other_rows(runs),
        *_other_loss(runs),
        *_evaluations(runs),
        *_overlap(runs),
        *_subset(runs),
        *_machines(runs),
        *_one_seed(found),
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
        step = number(run.evaluation.get("step"))
        if step is not None and step != run.adapter_step:
            said.append(f"{run.label}: {EVALUATION} is of update {step:.0f}, the run's adapter of {run.adapter_step}")
        if run.evaluation.get("base_fingerprint", run.base_fingerprint) != run.base_fingerprint:
            said.append(f"{run.label}: {EVALUATION} is of another base model than the run's")
        figure = run.figures.get(ANSWER_PERPLEXITY.format("tuned"))
        if figure is None or figure.low is None:
            said.append(f"{run.label}: {EVALUATION} has no interval of the answer perplexity")
    by = groups([run for run in runs if run.evaluation], lambda run: number(run.evaluation.get("limit")))
    if set(by) - {None}:
        whole = "; ".join(f"{labels}: {'all rows' if n is None else f'{n:.0f} rows'}" for n, labels in by.items())
        said.append(f"evaluated on a part of the rows ({whole})")
    return said


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
