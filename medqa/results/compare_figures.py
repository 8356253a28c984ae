"""The figures of runs that are set side by side: losses against what was seen, perplexity, speed, memory, time."""

import bisect
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from medqa.results.compare_runs import Json, Run, part
from medqa.results.figures import Figure, count, number
from medqa.terminal import printable

AXES = {"updates": "updates", "examples": "examples seen", "tokens": "target tokens seen"}
ANSWER_PERPLEXITY = "loss.test.{}.answer_perplexity"  # of an evaluation; untuned or tuned
SYSTEMS = ("untuned", "tuned")
SAMPLE_TEXTS = ("question", "reference", "untuned", "tuned")


@dataclass(frozen=True)
class Curve:
    """One run's loss: x by axis, y, and of how many rows each point is, where recorded."""

    run: Run
    x: dict[str, list[float]]
    y: list[float]
    rows: list[int | None]

    def on_the_usual_rows(self) -> list[bool]:
        """Of each point, whether it is of as many rows as most: before and after training a run measures them all."""
        usual = max(self.rows, key=self.rows.count, default=None)
        return [rows == usual for rows in self.rows]


@dataclass(frozen=True)
class OnSomeRows:
    """Answer perplexity on a part of the rows, or of another update than the adapter's: not for a ranking."""

    split: str
    update: int | None
    rows: int | None
    seed: int | None
    untuned: Figure
    tuned: Figure


@dataclass(frozen=True)
class Perplexity:
    """Answer perplexity of one run, before and after, on all validation and all test rows.

    `update` says what `validation` and `test` are of; without an evaluation of all rows, `test` has no interval.
    """

    validation_untuned: float | None
    validation: float | None
    validation_rows: int | None
    test_untuned: Figure
    test: Figure
    test_rows: int | None
    update: int | None
    on_some_rows: tuple[OnSomeRows, ...]


@dataclass(frozen=True)
class Performance:
    """What one run took, where recorded: target tokens and examples a second, shares, bytes, seconds."""

    tokens_per_s: float | None
    examples_per_s: float | None
    padding_share: float | None
    peak_memory_bytes: float | None
    memory_device: str | None
    wall_clock_s: float | None


def curve(run: Run, records: dict[int, Json], key: str) -> Curve:
    """A figure of these records against updates, examples and target tokens.

    Between two updates whose tokens are recorded they are taken in proportion. Points beyond the last one are left out.
    """
    batch = run.experiment.training.global_batch_size
    known = {0: 0.0} | {step: found["tokens_seen"] for step, found in run.train.items() if "tokens_seen" in found}
    recorded = sorted(known)
    steps = [step for step in sorted(records) if key in records[step] and step <= recorded[-1]]
    x: dict[str, list[float]] = {"updates": [float(step) for step in steps], "examples": [], "tokens": []}
    for step in steps:
        after = recorded[bisect.bisect_left(recorded, step)]
        before = after if after == step else recorded[bisect.bisect_left(recorded, step) - 1]
        share = (step - before) / (after - before) if after > before else 0.0
        x["tokens"].append(known[before] + (known[after] - known[before]) * share)
        x["examples"].append(run.train.get(step, {}).get("examples_seen", float(step) * batch))
    rows = [count(records[step].get("rows")) for step in steps]
    return Curve(run, x, [records[step][key] for step in steps], rows)


def perplexity(run: Run) -> Perplexity:
    """Answer perplexities: of an evaluation of all rows, else of the summary, else of validation so far."""
    newest = max(run.validation, default=None)
    first, last = run.validation.get(0, {}), run.validation.get(newest, {}) if newest else {}
    said = Figure(number(part(run.summary, "test", "answer_perplexity")) if run.finished else None)
    validation = number(part(run.summary, "final", "answer_perplexity")) if run.finished else None
    untuned, tuned = (run.figures.get(ANSWER_PERPLEXITY.format(system), Figure(None)) for system in SYSTEMS)
    step, limit = number(run.evaluation.get("step")), limit_of(run)
    some: list[OnSomeRows] = []
    whole = limit is None and step in (None, run.adapter_step)
    if not whole and tuned.value is not None:
        rows = limit if tuned.rows is None else tuned.rows
        some.append(OnSomeRows("test", None if step is None else int(step), rows, seed_of(run), untuned, tuned))
    update, rows = (run.adapter_step if validation is not None else newest), count(last.get("rows"))
    if validation is None and rows == count(first.get("rows")):
        validation = last.get("answer_perplexity")
    elif validation is None and "answer_perplexity" in last:
        some.append(OnSomeRows("validation", newest, rows, None, Figure(None), Figure(last["answer_perplexity"])))
    of_test = count(run.test[max(run.test)].get("rows")) if run.test else None
    return Perplexity(
        first.get("answer_perplexity", number(part(run.summary, "baseline", "answer_perplexity"))),
        validation,
        count(first.get("rows", last.get("rows"))),
        untuned if whole else Figure(None),
        tuned if whole and tuned.value is not None else said,
        tuned.rows if whole and of_test is None else of_test,
        update,
        tuple(some),
    )


def limit_of(run: Run) -> int | None:
    """How many rows of each split the evaluation was limited to, None where it looked at all."""
    return count(run.evaluation.get("limit"))


def seed_of(run: Run) -> int | None:
    """What chose the rows of an evaluation that looked at some of them."""
    return count(run.evaluation.get("seed"))


def performance(run: Run) -> Performance:
    """Speed over the recorded updates, the first left out where there are more: it warms up."""
    records = [run.train[step] for step in sorted(run.train)]
    timed = [r for r in records if r.get("update_s", 0) > 0 and "tokens" in r]
    timed = timed[1:] or timed
    seconds = sum(record["update_s"] for record in timed)
    shares = [record["padding_share"] for record in records if "padding_share" in record]
    said = number(run.data_report.get("padding_share"))
    peaks = [record["peak_memory_bytes"] for record in records if "peak_memory_bytes" in record]
    elapsed = [r["elapsed_s"] for r in (*records, *run.validation.values()) if "elapsed_s" in r]
    device = run.summary.get("memory_device")
    batch = run.experiment.training.global_batch_size
    peak, wall = number(run.summary.get("peak_memory_bytes")), number(run.summary.get("wall_clock_s"))
    return Performance(
        number(sum(record["tokens"] for record in timed) / seconds) if seconds else None,
        number(batch * len(timed) / seconds) if seconds else None,
        fmean(shares) if shares else said,
        max(peaks, default=None) if peak is None or not run.finished else peak,
        printable(device) if isinstance(device, str) else None,
        max(elapsed, default=None) if wall is None or not run.finished else wall,
    )


def samples(runs: Sequence[Run]) -> list[Json]:
    """Sample answers by question: `question`, `reference`, and `answers`, pairs of who answers and the answer."""
    found: dict[tuple[str, str], Json] = {}
    for run in runs:
        listed = part(run.evaluation, "tasks", "generation", "samples")
        for sample in listed if isinstance(listed, list) else []:
            texts = {key: part(sample, key) for key in SAMPLE_TEXTS}
            said = {key: printable(text) for key, text in texts.items() if isinstance(text, str)}
            if "question" not in said:
                continue
            place = found.setdefault(
                (str(part(sample, "id")), said["question"]),
                {"question": said["question"], "reference": said.get("reference", ""), "answers": []},
            )
            untuned = ("untuned base", said.get("untuned", ""))
            if untuned[1] and untuned not in place["answers"]:
                others = [name for name, _ in place["answers"] if name.startswith("untuned base")]
                place["answers"].append((f"untuned base of {run.label}" if others else untuned[0], untuned[1]))
            if "tuned" in said:
                place["answers"].append((run.label, said["tuned"]))
    return list(found.values())


def evaluation_tasks(runs: Sequence[Run]) -> dict[str, dict[str, list[Figure | None]]]:
    """All figures of the evaluations: task and rows in words, then path, to the figure in each run.

    Figures of different rows stand under different keys. Where a run has none there, None stands in its place.
    """
    tasks: dict[str, dict[str, list[Figure | None]]] = {}
    sets = row_sets(runs)
    for place, run in enumerate(runs):
        of_set = f", rows {sets[run.label]}" if sets else ""
        for path, figure in run.figures.items():
            task, _, rest = path.partition(".")
            lines = tasks.setdefault(f"{task}{_which_rows(run, task, rest)}{of_set}", {})
            lines.setdefault(rest or task, [None] * len(runs))[place] = figure
    return tasks


def row_sets(runs: Sequence[Run]) -> dict[str, str]:
    """By run, a letter for the rows that it held out; empty where all runs held out the same ones."""
    known = list(dict.fromkeys(run.data_fingerprint for run in runs))
    return {run.label: _letters(known.index(run.data_fingerprint)) for run in runs} if len(known) > 1 else {}


def _letters(index: int) -> str:
    """A, B, ..., Z, AA, AB, ..."""
    return (_letters(index // 26 - 1) if index >= 26 else "") + chr(ord("A") + index % 26)


def _which_rows(run: Run, task: str, path: str) -> str:
    """In words, which rows a figure is of, where it is not of all that there are."""
    limit, seed = limit_of(run), "" if seed_of(run) is None else f", chosen by seed {seed_of(run)}"
    if path.endswith(".advises_care"):
        return ""  # questions of our own, all of them always
    if limit is not None:
        return f", on {limit:,} rows of each split{seed}"
    rows, there = part(run.evaluation, "tasks", task, "rows"), part(run.evaluation, "tasks", "loss", "test", "rows")
    written, of_test = count(rows), count(there) or perplexity(run).test_rows
    chosen = task in ("generation", "probes") and written is not None and of_test is not None and written < of_test
    return f", on {written:,} rows of test{seed}" if chosen else ""


def as_json(run: Run) -> dict[str, Any]:
    """One run's numbers."""
    loss = run.experiment.tokenization.loss_on
    curves = {"train": curve(run, run.train, "loss"), "validation": curve(run, run.validation, "loss")}
    curves["validation_answer"] = curve(run, run.validation, "answer_loss")
    return {
        "run": run.label,
        "directory": printable(str(run.directory)),
        "finished": run.finished,
        "updates": run.updates,
        "max_steps": run.max_steps,
        "loss_on": loss,
        "damage": list(run.damage),
        "answer_perplexity": asdict(perplexity(run)),
        "performance": asdict(performance(run)),
        "losses": {name: {**found.x, "loss": found.y, "rows": found.rows} for name, found in curves.items()},
        "evaluation": {path: asdict(figure) for path, figure in run.figures.items()},
    }
