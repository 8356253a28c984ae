"""A comparison as one HTML page that needs nothing else: no script, no font, no image, no network.

What comes from runs, their names and answers, is escaped by Jinja; only the SVG that `compare_plots.py` makes is not.
"""

import os
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from medqa import places
from medqa.errors import UserError
from medqa.files import write_file
from medqa.results.compare_figures import samples
from medqa.results.compare_plots import COLOURS, SVG, of_the_page, plots, styles
from medqa.results.compare_recipes import Proposal, shown
from medqa.results.compare_tables import Comparison, evaluation_tables, main_tables
from medqa.terminal import printable

GENERATOR = "python -m medqa compare"
OWN_MARK = f'<meta name="generator" content="{GENERATOR}">'.encode()
HEAD_BYTES = 4096  # within which a page of ours has the mark
SHAPES = {
    "o": '<circle cx="18" cy="9" r="5"/>',
    "s": '<path d="M13 4h10v10h-10z"/>',
    "D": '<path d="M18 3l6 6-6 6-6-6z"/>',
    "^": '<path d="M18 3l6 11h-12z"/>',
    "v": '<path d="M18 15l6-11h-12z"/>',
    "P": '<path d="M16 4h4v3h3v4h-3v3h-4v-3h-3v-4h3z"/>',
}
DASHES = {"-": "", "--": "6 3", ":": "2 3", "-.": "6 3 2 3"}


def render(comparison: Comparison) -> str:
    """The page: the same text for the same files."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    runs = comparison.runs
    return environment.get_template("page.html").render(
        generator=GENERATOR,
        runs=runs,
        warnings=comparison.warnings,
        tables=main_tables(comparison),
        proposals=comparison.proposals,
        changes=changes,
        plots=plots(runs),
        colours=COLOURS,
        marks={run.label: mark(i) for i, run in enumerate(runs)},
        evaluations=evaluation_tables(runs),
        samples=samples(runs),
    )


def changes(proposal: Proposal) -> str:
    """What a proposed run changes, in words."""
    return printable(", ".join(f"{key} = {shown(value)}" for key, value in proposal.change.items()))


def mark(index: int) -> str:
    """A piece of the line, with its mark, that a run has in the plots."""
    style = styles(index)
    colour = of_the_page(style["color"])
    return (
        f'<svg xmlns="{SVG}" viewBox="0 0 36 18" aria-hidden="true" style="fill: {colour}; stroke: {colour}">'
        f'<path d="M0 9h36" stroke-width="2" stroke-dasharray="{DASHES[style["linestyle"]]}"/>'
        f"{SHAPES[style['marker']]}</svg>"
    )


def check_place(out: Path, force: bool) -> None:
    """See whether the page can be written there, changing nothing.

    Raises:
        UserError: there is something else, or no directory to write into.
    """
    places.check_place(out.absolute().parent, "--out")
    if not os.path.isdir(out.absolute().parent):
        raise UserError(f"--out {out}: no directory {out.absolute().parent}; make it, or choose another file")
    if not os.path.lexists(out):
        return
    if not os.path.isfile(out):
        raise UserError(f"--out {out}: there is something that is no file; choose another name")
    try:
        with out.open("rb") as file:
            ours = OWN_MARK in file.read(HEAD_BYTES)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be read: {error.strerror}; choose another name") from error
    if not ours and not force:
        raise UserError(f"--out {out}: not a page of this command; choose another name, or replace it with --force")


def write_page(page: str, out: Path) -> None:
    """Write the page: whole, or what was there stays.

    Raises:
        UserError: no room or permission.
    """
    try:
        write_file(out, page)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror}; make room, or choose another") from error
