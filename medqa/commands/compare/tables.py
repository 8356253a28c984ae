"""The tables of a comparison as text, for the console and the page."""

import bisect
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from medqa.commands.compare.conclusions import (
    MOST_PAIRED,
    PLACES,
    Pair,
    Proposal,
    conclusion,
    differences,
    pairs,
    proposals,
    warnings,
)
from medqa.commands.compare.read import ANSWER_PERPLEXITY, Json, Run, part, read_runs
from medqa.commands.evaluation_table import Figure, count, in_words, number
from medqa.terminal import printable

# ----------------------------------------------------------------------------------------------------
# Metrics of runs side by side: losses against updates, examples and tokens; perplexity, speed, memory, time.

AXES = {"updates": "updates", "examples": "examples seen", "tokens": "target tokens seen"}
SYSTEMS = ("untuned", "tuned")
OWN_TEMPLATE = "own_template"
BASELINES = {"untuned": "baseline", OWN_TEMPLATE: in_words(OWN_TEMPLATE)}
SAMPLE_TEXTS = ("question", "reference", *BASELINES, "tuned")


@dataclass(frozen=True)
class Curve:
    """One run's loss: x by axis, y, and the number of rows of each point, if recorded."""

    run: Run
    x: dict[str, list[float]]
    y: list[float]
    rows: list[int | None]

    def on_the_usual_rows(self) -> list[bool]:
        """For each point, whether it has the most frequent number of rows; in version 0.1 the ends had all rows."""
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
    """Answer perplexity of one run, baseline and fine-tuned, on all validation and all test rows.

    `update` is the update of `validation` and `test`; without an evaluation of all rows, `test` has no interval.
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
    """What one run needed, if recorded: target tokens and examples per second, shares, bytes, seconds."""

    tokens_per_s: float | None
    examples_per_s: float | None
    padding_share: float | None
    peak_memory_bytes: float | None
    memory_device: str | None
    wall_clock_s: float | None


def curve(run: Run, records: dict[int, Json], key: str) -> Curve:
    """A metric against updates, examples and target tokens.

    Between two updates with recorded tokens, tokens are interpolated. Points after the last one are omitted.
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
    """Answer perplexities: from an evaluation of all rows, else from the summary, else from the last validation.

    Those of a run that measured only `evaluation.full_rows` rows before and after training are on some rows.
    """
    newest = max(run.validation, default=None)
    first = run.validation_full.get(0, {})
    last = (run.validation_full.get(newest) or run.validation.get(newest, {})) if newest else {}
    before = first.get("answer_perplexity", number(part(run.summary, "baseline", "answer_perplexity")))
    after = number(part(run.summary, "final", "answer_perplexity")) if run.finished else None
    said = Figure(number(part(run.summary, "test", "answer_perplexity")) if run.finished else None)
    of_test = count(run.test[max(run.test)].get("rows")) if run.test else None
    rows, of_validation = count(last.get("rows")), count(first.get("rows", last.get("rows")))
    bounded, some = run.experiment.evaluation.full_rows, list[OnSomeRows]()
    if bounded is not None and run.finished:
        seed, step = run.experiment.training.seed, run.adapter_step
        some.append(OnSomeRows("validation", step, of_validation or bounded, seed, Figure(before), Figure(after)))
        some.append(OnSomeRows("test", step, of_test or bounded, seed, Figure(None), said))
    if bounded is not None:
        said, of_test, of_validation = Figure(None), None, None
    untuned, tuned = (run.figures.get(ANSWER_PERPLEXITY.format(system), Figure(None)) for system in SYSTEMS)
    step_evaluated, limit = number(run.evaluation.get("step")), limit_of(run)
    whole = limit is None and step_evaluated in (None, run.adapter_step)
    if not whole and tuned.value is not None:
        limited = limit if tuned.rows is None else tuned.rows
        step_told = None if step_evaluated is None else int(step_evaluated)
        some.append(OnSomeRows("test", step_told, limited, seed_of(run), untuned, tuned))
    update = run.adapter_step if after is not None else newest
    if after is None and bounded is None and rows == count(first.get("rows")):
        after = last.get("answer_perplexity")
    elif after is None and "answer_perplexity" in last:
        some.append(OnSomeRows("validation", newest, rows, None, Figure(None), Figure(last["answer_perplexity"])))
    evaluated = whole and tuned.value is not None
    return Perplexity(
        None if bounded is not None else before,
        None if bounded is not None else after,
        of_validation,
        untuned if whole else Figure(None),
        tuned if evaluated else said,
        tuned.rows if evaluated and tuned.rows is not None else of_test,
        update,
        tuple(some),
    )


def limit_of(run: Run) -> int | None:
    """The number of rows of each split to which the evaluation was limited; None if there was no limit."""
    return count(run.evaluation.get("limit"))


def seed_of(run: Run) -> int | None:
    """The seed that chose the rows of a limited evaluation."""
    return count(run.evaluation.get("seed"))


def performance(run: Run) -> Performance:
    """Speed over the logged updates, without the first one, which warms up."""
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
    """Sample answers by question: `question`, `reference`, and `answers`, pairs of system and answer."""
    found: dict[tuple[str, str], Json] = {}
    for run in runs:
        listed = part(run.evaluation, "tasks", "generation", "samples")
        for sample in listed if isinstance(listed, list) else []:
            texts = {key: part(sample, key) for key in SAMPLE_TEXTS}
            said = {key: printable(text) for key, text in texts.items() if isinstance(text, str)}
            if "question" not in said:
                continue
            entry = found.setdefault(
                (str(part(sample, "id")), said["question"]),
                {"question": said["question"], "reference": said.get("reference", ""), "answers": []},
            )
            for system, name in BASELINES.items():
                baseline = (name, said.get(system, ""))
                if baseline[1] and baseline not in entry["answers"]:
                    others = {name, f"{name} of {run.label}"} & {other for other, _ in entry["answers"]}
                    entry["answers"].append((f"{name} of {run.label}" if others else name, baseline[1]))
            if "tuned" in said:
                entry["answers"].append((run.label, said["tuned"]))
    return list(found.values())


def evaluation_tasks(runs: Sequence[Run]) -> dict[str, dict[str, list[Figure | None]]]:
    """All metrics of the evaluations: by task and rows in words, then by path, one for each run (or None).

    Metrics of different rows have different keys.
    """
    tasks: dict[str, dict[str, list[Figure | None]]] = {}
    sets = row_sets(runs)
    for index, run in enumerate(runs):
        of_set = f", rows {sets[run.label]}" if sets else ""
        for path, figure in run.figures.items():
            task, _, rest = path.partition(".")
            lines = tasks.setdefault(f"{task}{_which_rows(run, task, rest)}{of_set}", {})
            lines.setdefault(rest or task, [None] * len(runs))[index] = figure
    return tasks


def row_sets(runs: Sequence[Run]) -> dict[str, str]:
    """By run, a letter for its held-out rows; empty if all runs have the same held-out rows."""
    known = list(dict.fromkeys(run.data_fingerprint for run in runs))
    return {run.label: _letters(known.index(run.data_fingerprint)) for run in runs} if len(known) > 1 else {}


def _letters(index: int) -> str:
    """A, B, ..., Z, AA, AB, ..."""
    return (_letters(index // 26 - 1) if index >= 26 else "") + chr(ord("A") + index % 26)


def _which_rows(run: Run, task: str, path: str) -> str:
    """In words, which rows a metric is over; empty if it is all rows."""
    limit, seed = limit_of(run), "" if seed_of(run) is None else f", chosen by seed {seed_of(run)}"
    if path.endswith(".advises_care"):
        return ""  # always all of our own questions
    if limit is not None:
        return f", on {limit:,} rows of each split{seed}"
    rows, there = part(run.evaluation, "tasks", task, "rows"), part(run.evaluation, "tasks", "loss", "test", "rows")
    written, of_test = count(rows), count(there) or perplexity(run).test_rows
    chosen = task in ("generation", "probes") and written is not None and of_test is not None and written < of_test
    return f", on {written:,} rows of test{seed}" if chosen else ""


def as_json(run: Run) -> dict[str, Any]:
    """The values of one run."""
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
        "doubts": list(run.doubts),
        "answer_perplexity": asdict(perplexity(run)),
        "performance": asdict(performance(run)),
        "losses": {name: {**found.x, "loss": found.y, "rows": found.rows} for name, found in curves.items()},
        "evaluation": {path: asdict(figure) for path, figure in run.figures.items()},
    }


# ----------------------------------------------------------------------------------------------------

NOT_THERE = "-"
SOURCES = "location of data and base model"


@dataclass(frozen=True)
class Comparison:
    """Runs, what their pairs show, the warnings, and runs that would show more."""

    runs: list[Run]
    pairs: list[Pair]
    warnings: list[str]
    proposals: list[Proposal]


@dataclass(frozen=True)
class Table:
    """A titled table of texts; the first column names the row."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""


def compare_runs(paths: Sequence[Path]) -> Comparison:
    """Compare the runs in these directories.

    Raises:
        UserError: as in `read_runs`.
    """
    runs = _same_base_under_one_name(read_runs(paths))
    found = pairs(runs)
    runs = _ranked(runs) if len(runs) > MOST_PAIRED else runs
    return Comparison(runs, found, warnings(runs, found), proposals(runs, found))


def _ranked(runs: Sequence[Run]) -> list[Run]:
    """The runs by their answer perplexity on validation, the lowest first.

    Runs that are measured over other tokens stay together. After the finished runs come the unfinished ones, then those
    without a value for all validation rows, and those of which it is not known how they were trained.
    """
    measured = [run.measured_over for run in runs]
    values = [perplexity(run).validation for run in runs]

    def place(index: int) -> tuple[int, bool, bool, float]:
        run, value = runs[index], values[index]
        unranked = value is None or bool(run.doubts)
        return measured.index(measured[index]), unranked, not run.finished, 0.0 if value is None else value

    return [runs[index] for index in sorted(range(len(runs)), key=place)]


def _same_base_under_one_name(runs: Sequence[Run]) -> list[Run]:
    """The runs, with one name for base models that are known to be the same, wherever they were."""
    names: dict[str, str] = {}
    found = []
    for run in runs:
        model = run.experiment.model
        name = names.setdefault(run.base_fingerprint, model.base) if run.base_fingerprint else model.base
        experiment = run.experiment.model_copy(update={"model": model.model_copy(update={"base": name})})
        found.append(replace(run, experiment=experiment))
    return found


def main_tables(comparison: Comparison) -> list[Table]:
    """The tables of every comparison. Of many runs, one table has the settings too, and pairs are not listed."""
    runs = comparison.runs
    if len(runs) > MOST_PAIRED:
        return [_trials(runs), *_on_some_rows(runs), _costs(runs), *_settings(runs)[1:]]
    return [_results(runs), *_on_some_rows(runs), _costs(runs), *_settings(runs), _pairs(comparison)]


def evaluation_tables(runs: Sequence[Run]) -> list[Table]:
    """One table for each task of the evaluations, and each choice of rows, with the runs that have it."""
    tables = []
    for task, lines in evaluation_tasks(runs).items():
        there = [i for i in range(len(runs)) if any(found[i] for found in lines.values())]
        rows = [(in_words(path), *_alike([found[i] for i in there])) for path, found in lines.items()]
        tables.append(Table(f"evaluation: {task}", ("metric", *(runs[i].label for i in there)), rows))
    return tables


def _alike(figures: Sequence[Figure | None]) -> list[str]:
    """The metrics of one line, each with the number of its rows if these differ."""
    counts = {figure.rows for figure in figures if figure is not None}
    return [
        text if len(counts) < 2 or figure is None or figure.rows is None else f"{text}, {figure.rows:,} rows"
        for figure, text in zip(figures, map(figure_text, figures), strict=True)
    ]


def figure_text(figure: Figure | None) -> str:
    """A metric with its interval, and for a difference its p-value."""
    if figure is None or figure.value is None:
        return NOT_THERE
    text = value_text(figure.value)
    if figure.low is not None and figure.high is not None:
        text += f" ({value_text(figure.low)} to {value_text(figure.high)})"
    return text + figure.note


def value_text(value: float | None) -> str:
    """A number with four digits, without decimals if it is an integer or large."""
    if value is None:
        return NOT_THERE
    return f"{value:,.0f}" if abs(value) >= 1000 or float(value).is_integer() else f"{value:#.4g}"


def duration_text(seconds: float | None) -> str:
    """A time in seconds, minutes or hours."""
    if seconds is None:
        return NOT_THERE
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


HEAD = (
    "run", "state", "rows of validation and test", "validation, baseline", "validation, fine-tuned", "test, baseline",
    "test, fine-tuned",
)  # fmt: skip


def _results(runs: Sequence[Run]) -> Table:
    """Answer perplexity of baseline and fine-tuned model, on all rows."""
    sets = row_sets(runs)
    rows: list[tuple[str, ...]] = []
    for run in runs:
        found = perplexity(run)
        after = value_text(found.validation)
        if not run.finished and found.validation is not None:
            after += f" at update {found.update}"
        of_rows = f"{value_text(found.validation_rows)} and {value_text(found.test_rows)}"
        of_rows += f", rows {sets[run.label]}" if sets else ""
        figures = (_of_baseline(run, found.test_untuned), figure_text(found.test))
        rows.append((run.label, run.state, of_rows, value_text(found.validation_untuned), after, *figures))
    note = "lower is better; medqa evaluate adds intervals"
    if sets:
        note += f"; rows {' and '.join(dict.fromkeys(sets.values()))} differ, so their metrics are not comparable"
    return Table("answer perplexity", HEAD, rows, note)


def _of_baseline(run: Run, untuned: Figure) -> str:
    """The test perplexity of the better baseline: the training prompt's, or that of the base's own chat template."""
    own = run.figures.get(ANSWER_PERPLEXITY.format(OWN_TEMPLATE), Figure(None))
    if untuned.value is None or own.value is None or own.value >= untuned.value:
        return figure_text(untuned)
    return f"{figure_text(own)}, in its own chat template"


def _trials(runs: Sequence[Run]) -> Table:
    """Answer perplexity of many runs, ranked, with the settings that differ."""
    results, found = _results(runs), differences(runs)
    settings = {key: values for key, values in found.items() if key not in PLACES}
    rows: list[tuple[str, ...]] = []
    for index, (label, state, of_rows, _, after, *of_test) in enumerate(results.rows):
        changed = ", ".join(f"{key}={printable(values[index])}" for key, values in settings.items())
        rows.append((label, state, after, changed or "nothing", *of_test, of_rows))
    head = ("run", "state", HEAD[4], "settings that differ", *HEAD[5:], HEAD[2])
    note = (
        f"sorted by validation; the first of {len(runs):,} is chosen by these rows, so its value on validation "
        f"flatters it, and its value on test does not; {results.note}"
    )
    return Table("answer perplexity", head, rows, note)


def _on_some_rows(runs: Sequence[Run]) -> list[Table]:
    """Answer perplexity on fewer rows, or of another update: not in the table by which runs are ranked."""
    rows: list[tuple[str, ...]] = []
    for run in runs:
        for found in perplexity(run).on_some_rows:
            what = found.split if found.update is None else f"{found.split}, at update {found.update:,}"
            chosen = "" if found.seed is None else f", chosen by seed {found.seed}"
            figures = (figure_text(found.untuned), figure_text(found.tuned))
            rows.append((run.label, what, f"{value_text(found.rows)}{chosen}", *figures))
    note = "over other rows, or of another update, than above: not comparable with the table above"
    head = ("run", "split", "rows", "baseline", "fine-tuned")
    return [Table("answer perplexity on a part of the rows", head, rows, note)] * bool(rows)


def _costs(runs: Sequence[Run]) -> Table:
    """Speed, padding, memory, time."""
    rows = [(run.label, *_cost(performance(run))) for run in runs]
    head = ("run", "target tokens/s", "examples/s", "padding", "peak memory", "measured on", "time")
    note = "speed over the logged updates, without evaluation and saving; time with both; measured once, with whatever "
    note += "else ran on the machine"
    return Table("speed, memory, time", head, rows, note)


def _cost(found: Performance) -> tuple[str, ...]:
    """What one run needed, in words."""
    peak = found.peak_memory_bytes
    return (
        NOT_THERE if found.tokens_per_s is None else f"{found.tokens_per_s:,.0f}",
        value_text(found.examples_per_s),
        NOT_THERE if found.padding_share is None else f"{found.padding_share:.1%}",
        NOT_THERE if peak is None else f"{peak / 2**30:.2f} GiB",
        found.memory_device or NOT_THERE,
        duration_text(found.wall_clock_s),
    )


def _settings(runs: Sequence[Run]) -> list[Table]:
    """The settings that differ and, in a table of its own, the locations that differ."""
    found = differences(runs)
    head = ("setting", *(run.label for run in runs))
    recipe = [(key, *map(printable, values)) for key, values in found.items() if key not in PLACES]
    locations = [(key, *map(printable, values)) for key, values in found.items() if key in PLACES]
    same = "" if recipe else "nothing differs"
    tables = [Table("what differs between the configurations", head, recipe, same)]
    if locations:
        fingerprints = {run.data_fingerprint for run in runs}
        known = len(fingerprints) == 1 and None not in fingerprints
        note = "rows and splits are the same" if known else "rows or splits differ, or are not known to be the same"
        tables.append(Table(SOURCES, head, locations, note))
    return tables


def _pairs(comparison: Comparison) -> Table:
    """What each pair of runs shows."""
    rows: list[tuple[str, ...]] = [
        (
            f"{pair.first.label} and {pair.second.label}",
            ", ".join(pair.keys) or "nothing",
            conclusion(pair, comparison.pairs),
        )
        for pair in comparison.pairs
    ]
    return Table("what each pair of runs shows", ("runs", "differ in", "so the comparison"), rows)
