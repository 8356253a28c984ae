"""A comparison as one HTML page with plots. The page loads nothing: no script, font, image or network.

Text from runs, such as names and answers, is escaped by Jinja; only the SVG that this module creates is not.
"""

import functools
import io
import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from medqa import places
from medqa.commands.compare.conclusions import Proposal, shown
from medqa.commands.compare.read import Run
from medqa.commands.compare.tables import (
    AXES,
    Comparison,
    Curve,
    curve,
    evaluation_tables,
    main_tables,
    perplexity,
    samples,
)
from medqa.errors import UserError
from medqa.files import write_file
from medqa.terminal import printable

# ----------------------------------------------------------------------------------------------------
# Plots as inline SVG, made with matplotlib. Text stays text; colours are those of the page, in light and dark mode.

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
# Colours by their names in the page's style sheet: (drawn in light mode, shown in dark mode).
INK, GRID = ("#1b1f24", "#e6edf3"), ("#d0d7de", "#3d444d")
# The colours of Okabe and Ito, which colour-blind people can tell apart, without yellow and black.
RUNS = (
    ("#0072b2", "#56b4e9"),
    ("#d55e00", "#e69f00"),
    ("#009e73", "#2fc79c"),
    ("#cc79a7", "#e59ac4"),
    ("#56b4e9", "#8fd0ff"),
    ("#a87900", "#f0e442"),
)
COLOURS = {"plot-ink": INK, "plot-grid": GRID} | {f"plot-run-{i}": pair for i, pair in enumerate(RUNS)}
MARKERS, LINES = "osD^vP", ("-", "--", ":", "-.")
HOLLOW = {"linestyle": "", "markerfacecolor": "none"}  # a point over other rows than the rest of its line
LONGEST_NAME = 32  # characters of a name in a plot


@dataclass(frozen=True)
class Plot:
    """A plot of the page: its title, and its SVG."""

    title: str
    svg: str


def plots(runs: Sequence[Run]) -> list[list[Plot]]:
    """All plots, in rows: loss of comparable runs, answer loss of all, answer perplexity."""
    rows = []
    hollow = any(not all(_validation_answer(run).on_the_usual_rows()) for run in runs)
    validated = "validation answer loss" + ", hollow where on other rows than the rest" * hollow
    for over, words in (("all", "prompt and answer"), ("answer", "the answer")):
        alike = [run for run in runs if run.experiment.tokenization.loss_on == over]
        if alike:
            title = f"loss over {words}: training (line) and validation (marks)"
            rows.append(_against_all(runs, title, [(_train, "line", alike), (_validation, "marks", alike)]))
    rows.append(_against_all(runs, validated, [(_validation_answer, "line and marks", list(runs))]))
    rows.append([_plot("answer perplexity, test", lambda axes: _intervals(axes, runs), len(runs))])
    return rows


def styles(index: int) -> dict[str, Any]:
    """The style of the run with this index."""
    return {
        "color": RUNS[index % len(RUNS)][0],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINES[index // len(RUNS) % len(LINES)],
    }


def of_the_page(style: str) -> str:
    """A style with the page's names for its colours."""
    for name, (drawn, _) in COLOURS.items():
        style = style.replace(drawn, f"var(--{name})")
    return style


def _train(run: Run) -> Curve:
    """The loss of each logged update."""
    return curve(run, run.train, "loss")


def _validation(run: Run) -> Curve:
    """The loss of each validation."""
    return curve(run, run.validation, "loss")


def _validation_answer(run: Run) -> Curve:
    """The answer loss of each validation."""
    return curve(run, run.validation, "answer_loss")


def _against_all(
    runs: Sequence[Run], title: str, layers: Sequence[tuple[Callable[[Run], Curve], str, Sequence[Run]]]
) -> list[Plot]:
    """One plot for each x axis."""
    from matplotlib.ticker import EngFormatter

    def draw(axes: "Axes", axis: str) -> None:
        """Draw all layers against this axis."""
        for curve_of, kind, drawn in layers:
            for run in drawn:
                found, style = curve_of(run), styles(runs.index(run))
                if kind == "line":
                    style |= {"marker": "", "linewidth": 0.8, "alpha": 0.7}
                elif kind == "marks":
                    style |= {"linestyle": "", "markersize": 5}
                else:
                    style |= {"linewidth": 1.2, "markersize": 5}
                usual = found.on_the_usual_rows()
                for points, more in ((True, {}), (False, HOLLOW)):
                    chosen = [i for i, there in enumerate(usual) if there == points]
                    if chosen:
                        axes.plot([found.x[axis][i] for i in chosen], [found.y[i] for i in chosen], **(style | more))
        axes.set_xlabel(AXES[axis])
        axes.set_ylabel("nats per token")
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k, because a phone has no room for 20000

    return [_plot(f"{title}, against {words}", functools.partial(draw, axis=axis)) for axis, words in AXES.items()]


def _intervals(axes: "Axes", runs: Sequence[Run]) -> None:
    """The answer perplexity of each run, with its interval if an evaluation has one."""
    for index, run in enumerate(runs):
        figure, style = perplexity(run).test, styles(index)
        if figure.value is not None:
            axes.plot([figure.value], [index], **style)
            if figure.low is not None and figure.high is not None:
                axes.plot([figure.low, figure.high], [index, index], color=style["color"], linewidth=2)
    axes.set_yticks(range(len(runs)), [_short(run.label) for run in runs])
    for label in axes.get_yticklabels():
        label.set_parse_math(False)  # a dollar sign in a name is not math
    axes.set_ylim(len(runs) - 0.5, -0.5)
    axes.set_xlabel("answer perplexity, with its interval if available")


def _short(name: str) -> str:
    """A name that leaves room for the plot."""
    return name if len(name) <= LONGEST_NAME else f"{name[:14]}…{name[-(LONGEST_NAME - 15) :]}"


def _plot(title: str, draw: Callable[["Axes"], None], lines: int | None = None) -> Plot:
    """A plot, with `lines` named lines if given: the same bytes for the same runs."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": INK[0],
        "axes.labelcolor": INK[0],
        "axes.edgecolor": GRID[0],
        "xtick.color": INK[0],
        "ytick.color": INK[0],
        "grid.color": GRID[0],
        "grid.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    # `rc_context` starts from the user's matplotlibrc, which must not change the page.
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **settings}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the browser's font has it
        if lines is None:
            figure = Figure(figsize=(4.2, 3.0))
            figure.subplots_adjust(left=0.16, bottom=0.17, right=0.97, top=0.97)
        else:  # make room for the names
            figure = Figure(figsize=(7.0, 1.0 + 0.32 * lines), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.grid(True)
        axes.set_axisbelow(True)
        draw(axes)
        if not axes.lines:
            axes.text(0.5, 0.5, "nothing recorded yet", transform=axes.transAxes, ha="center")
        written = io.BytesIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    return Plot(title, _inline(written.getvalue(), title))


def _inline(document: bytes, title: str) -> str:
    """An SVG document as an element of the page, with unique ids, and with colours and width set by the page."""
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.fromstring(document)
    own = re.sub(r"[^a-z]+", "-", title.lower())
    for metadata in root.findall(f"{{{SVG}}}metadata"):
        root.remove(metadata)
    for element in root.iter():
        for name, value in element.attrib.items():
            if name == "id":
                element.set(name, f"{own}-{value}")
            elif name == f"{{{XLINK}}}href":
                element.set(name, f"#{own}-{value[1:]}")
            elif name == "style":
                element.set(name, of_the_page(value))
            elif "url(#" in value:
                element.set(name, value.replace("url(#", f"url(#{own}-"))
    for name in ("width", "height"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-label", title)
    return ElementTree.tostring(root, encoding="unicode")


# ----------------------------------------------------------------------------------------------------

GENERATOR = "python -m medqa compare"
OWN_MARK = f'<meta name="generator" content="{GENERATOR}">'.encode()
HEAD_BYTES = 4096  # a page of this command has the mark within so many bytes
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
    """Render the page: the same text for the same files."""
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
    """The changes of a proposed run, in words."""
    return printable(", ".join(f"{key} = {shown(value)}" for key, value in proposal.change.items()))


def mark(index: int) -> str:
    """The line and marker of a run in the plots."""
    style = styles(index)
    colour = of_the_page(style["color"])
    return (
        f'<svg xmlns="{SVG}" viewBox="0 0 36 18" aria-hidden="true" style="fill: {colour}; stroke: {colour}">'
        f'<path d="M0 9h36" stroke-width="2" stroke-dasharray="{DASHES[style["linestyle"]]}"/>'
        f"{SHAPES[style['marker']]}</svg>"
    )


def check_place(out: Path, force: bool) -> None:
    """Check whether the page can be written there, without changing anything.

    Raises:
        UserError: there is something else, or no directory.
    """
    places.check_place(out.absolute().parent, "--out")
    if not os.path.isdir(out.absolute().parent):
        raise UserError(f"--out {out}: no directory {out.absolute().parent}; create it, or choose another file")
    try:
        os.lstat(out)
    except FileNotFoundError:
        return
    except OSError as error:  # for example a name that is too long
        raise UserError(f"--out {out}: cannot be written: {error.strerror}; choose another name") from error
    if not os.path.isfile(out):
        raise UserError(f"--out {out}: is not a regular file; choose another name")
    try:
        with out.open("rb") as file:
            ours = OWN_MARK in file.read(HEAD_BYTES)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be read: {error.strerror}; choose another name") from error
    if not ours and not force:
        raise UserError(f"--out {out}: not a page of this command; choose another name, or replace it with --force")


def write_page(page: str, out: Path) -> None:
    """Write the page atomically.

    Raises:
        UserError: there is no space or no permission.
    """
    try:
        write_file(out, page, among_others=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror}; free space, or choose another") from error
