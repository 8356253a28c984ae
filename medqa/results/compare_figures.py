"""The figures of runs that are set side by side: losses against what was seen, perplexity, speed, memory, time."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from medqa.results.compare_runs import Figure, Json, Run, number, part
from medqa.terminal import printable

AXES = {"updates": "updates", "examples": "examples seen", "tokens": "target tokens seen"}
ANSWER_PERPLEXITY = "loss.test.{}.answer_perplexity"  # of an evaluation; untuned or tuned
SAMPLE_TEXTS = ("question", "reference", "untuned", "tuned")


@dataclass(frozen=True)
class Curve:
    """One run's loss: x by axis, and y."""

    run: Run
    x: dict[str, list[float]]
    y: list[float]


@dataclass(frozen=True)
class Perplexity:
    """Answer perplexity of one run, before and after, on validation and test rows.

    `update` says what `validation` and `test` are of; without an evaluation, `test` has no interval.
    """

    validation_untuned: float | None
    validation: float | None
    validation_rows: int | None
    test_untuned: Figure
    test: Figure
    update: int | None


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
    """A figure of these records against updates, examples and tokens."""
    steps = [step for step in sorted(records) if key in records[step]]
    batch = run.experiment.training.global_batch_size
    tokens = {step: tokens_seen(run, step) for step in steps}
    steps = [step for step in steps if tokens[step] is not None]
    x = {
        "updates": [float(step) for step in steps],
        "examples": [run.train.get(step, {}).get("examples_seen", float(step * batch)) for step in steps],
        "tokens": [tokens[step] for step in steps],
    }
    return Curve(run, x, [records[step][key] for step in steps])


def tokens_seen(run: Run, step: int) -> float | None:
    """Target tokens consumed up to an update; between two that are recorded, in proportion."""
    known = {0: 0.0} | {s: record["tokens_seen"] for s, record in run.train.items() if "tokens_seen" in record}
    if step in known:
        return known[step]
    before, after = max(s for s in known if s < step), min((s for s in known if s > step), default=None)
    if after is None:
        return None
    return known[before] + (known[after] - known[before]) * (step - before) / (after - before)


def perplexity(run: Run) -> Perplexity:
    """Answer perplexities: of the evaluation where there is one, else of the summary, else of the newest validation."""
    newest = max(run.validation, default=None)
    last = run.validation.get(newest, {}) if newest else {}
    test = Figure(number(part(run.summary, "test", "answer_perplexity")) if run.finished else None)
    validation = number(part(run.summary, "final", "answer_perplexity")) if run.finished else None
    rows = number(last.get("rows"))
    untuned = number(part(run.summary, "baseline", "answer_perplexity"))
    return Perplexity(
        run.validation.get(0, {}).get("answer_perplexity", untuned),
        last.get("answer_perplexity") if validation is None else validation,
        None if rows is None else int(rows),
        run.figures.get(ANSWER_PERPLEXITY.format("untuned"), Figure(None)),
        run.figures.get(ANSWER_PERPLEXITY.format("tuned"), test),
        newest if validation is None else run.adapter_step,
    )


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
        sum(record["tokens"] for record in timed) / seconds if seconds else None,
        batch * len(timed) / seconds if seconds else None,
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
    """All figures of the evaluations: task, then path, to the figure in each run."""
    tasks: dict[str, dict[str, list[Figure | None]]] = {}
    for path in dict.fromkeys(path for run in runs for path in run.figures):
        task, _, rest = path.partition(".")
        tasks.setdefault(task, {})[rest or task] = [run.figures.get(path) for run in runs]
    return tasks


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
        "losses": {name: {**found.x, "loss": found.y} for name, found in curves.items()},
        "evaluation": {path: asdict(figure) for path, figure in run.figures.items()},
    }
