"""A comparison, and its tables in words, which console and page show alike."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from medqa.results.compare_figures import Performance, evaluation_tasks, performance, perplexity
from medqa.results.compare_recipes import BASE, LOCATIONS, Pair, Proposal, conclusion, differences, pairs, proposals
from medqa.results.compare_runs import Figure, Run, read_runs
from medqa.results.compare_warnings import warnings
from medqa.terminal import printable

NOT_THERE = "–"
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
        fingerprint = run.summary.get("base_fingerprint")
        name = names.setdefault(fingerprint, model.base) if isinstance(fingerprint, str) and fingerprint else model.base
        experiment = run.experiment.model_copy(update={"model": model.model_copy(update={"base": name})})
        found.append(replace(run, experiment=experiment))
    return found


def main_tables(comparison: Comparison) -> list[Table]:
    """What is shown of every comparison."""
    return [_results(comparison.runs), _costs(comparison.runs), *_settings(comparison.runs), _pairs(comparison)]


def evaluation_tables(runs: Sequence[Run]) -> list[Table]:
    """One table for each task of the runs' evaluations."""
    head = ("figure", *(run.label for run in runs))
    return [
        Table(f"evaluation: {task}", head, [(path, *map(figure_text, figures)) for path, figures in rows.items()])
        for task, rows in evaluation_tasks(runs).items()
    ]


def figure_text(figure: Figure | None) -> str:
    """A figure with its interval."""
    if figure is None or figure.value is None:
        return NOT_THERE
    text = value_text(figure.value)
    if figure.low is not None and figure.high is not None:
        text += f" ({value_text(figure.low)} to {value_text(figure.high)})"
    return text if figure.p_value is None else f"{text}, p = {figure.p_value:.2g}"


def value_text(value: float | None) -> str:
    """A number to four digits, whole where it is whole or large."""
    if value is None:
        return NOT_THERE
    return f"{value:,.0f}" if abs(value) >= 1000 or value.is_integer() else f"{value:#.4g}"


def duration_text(seconds: float | None) -> str:
    """A time as one says it."""
    if seconds is None:
        return NOT_THERE
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _results(runs: Sequence[Run]) -> Table:
    """Answer perplexity before and after."""
    rows = []
    for run in runs:
        found = perplexity(run)
        after = value_text(found.validation)
        if not run.finished and found.validation is not None:
            after += f" at update {found.update}"
        figures = (figure_text(found.test_untuned), figure_text(found.test))
        rows.append((run.label, run.state, value_text(found.validation_untuned), after, *figures))
    head = ("run", "state", "validation, untuned", "validation, tuned", "test, untuned", "test, tuned")
    note = "lower is better; intervals come from python -m medqa evaluate"
    return Table("answer perplexity", head, rows, note)


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
    rows = [
        (
            f"{pair.first.label} and {pair.second.label}",
            ", ".join(pair.keys) or "nothing",
            conclusion(pair, comparison.pairs),
        )
        for pair in comparison.pairs
    ]
    return Table("what each two runs say", ("runs", "differ in", "so the comparison"), rows)
