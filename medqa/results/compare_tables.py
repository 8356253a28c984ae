"""A comparison, and its tables in words, which console and page show alike."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from medqa.results.compare_figures import Performance, evaluation_tasks, performance, perplexity, row_sets
from medqa.results.compare_recipes import BASE, LOCATIONS, Pair, Proposal, conclusion, differences, pairs, proposals
from medqa.results.compare_runs import Run, read_runs
from medqa.results.compare_warnings import warnings
from medqa.results.figures import TOO_FEW, Figure
from medqa.terminal import printable

NOT_THERE = "-"
SOURCES = "where data and base model lie"


@dataclass(frozen=True)
class Comparison:
    """Runs, what their pairs say, what they do not allow to conclude, and the runs that would say more."""

    runs: list[Run]
    pairs: list[Pair]
    warnings: list[str]
    proposals: list[Proposal]


@dataclass(frozen=True)
class Table:
    """A titled table of words; the first column names its row."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""


def compare_runs(paths: Sequence[Path]) -> Comparison:
    """The comparison of the runs in these directories.

    Raises:
        UserError: as `read_runs`.
    """
    runs = _same_base_under_one_name(read_runs(paths))
    found = pairs(runs)
    return Comparison(runs, found, warnings(runs, found), proposals(runs, found))


def _same_base_under_one_name(runs: Sequence[Run]) -> list[Run]:
    """The runs, a base model that is known to be the same called the same, wherever it lay."""
    names: dict[str, str] = {}
    found = []
    for run in runs:
        model = run.experiment.model
        name = names.setdefault(run.base_fingerprint, model.base) if run.base_fingerprint else model.base
        experiment = run.experiment.model_copy(update={"model": model.model_copy(update={"base": name})})
        found.append(replace(run, experiment=experiment))
    return found


def main_tables(comparison: Comparison) -> list[Table]:
    """What is shown of every comparison."""
    runs = comparison.runs
    return [_results(runs), *_on_some_rows(runs), _costs(runs), *_settings(runs), _pairs(comparison)]


def evaluation_tables(runs: Sequence[Run]) -> list[Table]:
    """One table for each task of the runs' evaluations, and each choice of rows; with the runs that have it."""
    tables = []
    for task, lines in evaluation_tasks(runs).items():
        there = [i for i in range(len(runs)) if any(found[i] for found in lines.values())]
        rows = [(path, *_alike([found[i] for i in there])) for path, found in lines.items()]
        tables.append(Table(f"evaluation: {task}", ("figure", *(runs[i].label for i in there)), rows))
    return tables


def _alike(figures: Sequence[Figure | None]) -> list[str]:
    """The figures of one line, each with the number of its rows if these differ."""
    counts = {figure.rows for figure in figures if figure is not None}
    return [
        text if len(counts) < 2 or figure is None or figure.rows is None else f"{text}, {figure.rows:,} rows"
        for figure, text in zip(figures, map(figure_text, figures), strict=True)
    ]


def figure_text(figure: Figure | None) -> str:
    """A figure with its interval, and of a difference how sure it is."""
    if figure is None or figure.value is None:
        return NOT_THERE
    text = value_text(figure.value)
    if figure.low is not None and figure.high is not None:
        text += f" ({value_text(figure.low)} to {value_text(figure.high)})"
    if figure.too_few:
        return f"{text}, {TOO_FEW}"
    return text if figure.p_value is None else f"{text}, p = {figure.p_value:.2g}"


def value_text(value: float | None) -> str:
    """A number to four digits, whole where it is whole or large."""
    if value is None:
        return NOT_THERE
    return f"{value:,.0f}" if abs(value) >= 1000 or float(value).is_integer() else f"{value:#.4g}"


def duration_text(seconds: float | None) -> str:
    """A time as one says it."""
    if seconds is None:
        return NOT_THERE
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _results(runs: Sequence[Run]) -> Table:
    """Answer perplexity before and after, on all rows."""
    sets = row_sets(runs)
    rows: list[tuple[str, ...]] = []
    for run in runs:
        found = perplexity(run)
        after = value_text(found.validation)
        if not run.finished and found.validation is not None:
            after += f" at update {found.update}"
        of_rows = f"{value_text(found.validation_rows)} and {value_text(found.test_rows)}"
        of_rows += f", rows {sets[run.label]}" if sets else ""
        figures = (figure_text(found.test_untuned), figure_text(found.test))
        rows.append((run.label, run.state, of_rows, value_text(found.validation_untuned), after, *figures))
    head = (
        "run", "state", "rows of validation and test", "validation, untuned", "validation, tuned", "test, untuned",
        "test, tuned",
    )  # fmt: skip
    note = "lower is better; intervals come from python -m medqa evaluate"
    if sets:
        note += f"; rows {' and '.join(dict.fromkeys(sets.values()))} are not the same: figures of them do not compare"
    return Table("answer perplexity", head, rows, note)


def _on_some_rows(runs: Sequence[Run]) -> list[Table]:
    """Answer perplexity on fewer rows, or of another update: apart from what runs are ranked by."""
    rows: list[tuple[str, ...]] = []
    for run in runs:
        for found in perplexity(run).on_some_rows:
            what = found.split if found.update is None else f"{found.split}, at update {found.update:,}"
            chosen = "" if found.seed is None else f", chosen by seed {found.seed}"
            figures = (figure_text(found.untuned), figure_text(found.tuned))
            rows.append((run.label, what, f"{value_text(found.rows)}{chosen}", *figures))
    note = "of other rows, or of another update, than above: not to be compared with the figures there"
    head = ("run", "figure of", "rows", "untuned", "tuned")
    return [Table("answer perplexity on a part of the rows", head, rows, note)] * bool(rows)


def _costs(runs: Sequence[Run]) -> Table:
    """Speed, padding, memory, time."""
    rows = [(run.label, *_cost(performance(run))) for run in runs]
    head = ("run", "target tokens/s", "examples/s", "padding", "peak memory", "measured on", "time")
    note = (
        "speed over the recorded updates, without evaluation and saving; time with both; measured once, with whatever "
    )
    note += "else the machine did meanwhile"
    return Table("speed, memory, time", head, rows, note)


def _cost(found: Performance) -> tuple[str, ...]:
    """What one run took, in words."""
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
    """The recipe's settings that differ and, apart, where what they read lies."""
    found = differences(runs)
    head = ("setting", *(run.label for run in runs))
    apart = (*LOCATIONS, BASE)
    recipe = [(key, *map(printable, values)) for key, values in found.items() if key not in apart]
    places = [(key, *map(printable, values)) for key, values in found.items() if key in apart]
    same = "" if recipe else "nothing differs"
    tables = [Table("what differs between the configurations", head, recipe, same)]
    if places:
        fingerprints = {run.data_fingerprint for run in runs}
        known = len(fingerprints) == 1 and None not in fingerprints
        note = "rows and splits are the same" if known else "rows or splits are not the same, or not known to be"
        tables.append(Table(SOURCES, head, places, note))
    return tables


def _pairs(comparison: Comparison) -> Table:
    """What each two runs say."""
    rows: list[tuple[str, ...]] = [
        (
            f"{pair.first.label} and {pair.second.label}",
            ", ".join(pair.keys) or "nothing",
            conclusion(pair, comparison.pairs),
        )
        for pair in comparison.pairs
    ]
    return Table("what each two runs say", ("runs", "differ in", "so the comparison"), rows)
