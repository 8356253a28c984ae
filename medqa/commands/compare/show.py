"""`medqa compare` shows runs side by side on the console and as a page, with warnings.

It only reads the files of the runs and loads no model, so that a run may be training meanwhile.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as ConsoleTable

from medqa.commands.compare.conclusions import MOST_PAIRED, conclusion, differences
from medqa.commands.compare.page import changes, check_place, render, write_page
from medqa.commands.compare.tables import (
    Comparison,
    Table,
    as_json,
    compare_runs,
    evaluation_tables,
    main_tables,
    samples,
)
from medqa.terminal import make_console, print_json, printable

MOST_LINES = 100  # rows of a table on the console
# Parts of an evaluation that only the page shows.
LEFT_OUT = {"sources", "unseen_topics", "few_shared_13_grams", "specialties", "validation"}


def compare(paths: Sequence[Path], out: Path, *, force: bool = False, numbers: bool = False) -> None:
    """Compare the runs in these directories: a page at `out`, and tables on the console.

    Args:
        force: replace a file that this command did not write.
        numbers: print JSON instead of tables.

    Raises:
        UserError: fewer than two runs, directories that are not runs, or the page cannot be written. Nothing is
            written.
    """
    check_place(out, force)
    comparison = compare_runs(paths)
    write_page(render(comparison), out)
    if numbers:
        print_json({**as_object(comparison), "page": printable(str(out))}, indent=2, allow_nan=False)
    else:
        show(comparison, out)


def as_object(comparison: Comparison) -> dict[str, Any]:
    """The comparison as a JSON object. Many runs are in the order of their rank, and `pairs` is empty."""
    runs = comparison.runs
    return {
        "runs": [as_json(run) for run in runs],
        "differences": {
            key: dict(zip((run.label for run in runs), map(printable, values), strict=True))
            for key, values in differences(runs).items()
        },
        "pairs": []
        if len(runs) > MOST_PAIRED
        else [
            {
                "runs": [pair.first.label, pair.second.label],
                "differ_in": list(pair.keys),
                "conclusion": conclusion(pair, comparison.pairs),
            }
            for pair in comparison.pairs
        ],
        "warnings": comparison.warnings,
        "proposals": [
            {"base": p.base.label, "change": p.change, "command": printable(p.command)} for p in comparison.proposals
        ],
        "samples": samples(runs),
    }


def show(comparison: Comparison, out: Path) -> None:
    """Print the tables, the warnings and the commands."""
    console = make_console()
    for table in main_tables(comparison):
        _show_table(console, table)
    evaluations = evaluation_tables(comparison.runs)
    if len(comparison.runs) <= MOST_PAIRED:
        for table in map(_in_short, evaluations):
            _show_table(console, table)
    elif evaluations:
        console.print("the other metrics of the evaluations are on the page", soft_wrap=True)
    if comparison.warnings:
        console.print("\nWhat this comparison does not show", style="bold")
    for warning in comparison.warnings:
        console.print(f"- {warning}", soft_wrap=True)
    if comparison.proposals:
        console.print("\nRuns with one change each that would show more", style="bold")
    for proposal in comparison.proposals:
        console.print(f"# {proposal.base.label} with {changes(proposal)}", soft_wrap=True)
        console.print(proposal.command, soft_wrap=True)
    console.print(f"\nplots, samples and everything above: {out}", soft_wrap=True)


def _in_short(table: Table) -> Table:
    """An evaluation's table without parts of the rows, and without validation."""
    rows = [row for row in table.rows if not LEFT_OUT & set(row[0].split("."))][:MOST_LINES]
    left_out = "" if len(rows) == len(table.rows) else "validation, sources and more are on the page"
    return replace(table, rows=rows, note=left_out)


def _show_table(console: Console, table: Table) -> None:
    """Print one table with its note below."""
    if table.rows:
        drawn = ConsoleTable(title=table.title, title_justify="left")
        for name in table.head:
            drawn.add_column(name, overflow="fold")
        for row in table.rows:
            drawn.add_row(*row)
        console.print(drawn)
    else:
        console.print(f"{table.title}: {table.note}", soft_wrap=True)
        return
    if table.note:
        console.print(f"({table.note})", soft_wrap=True)
