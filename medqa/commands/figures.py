"""Figures of an evaluation, read from a file that anyone may have written.

A figure says of how many rows it is, because figures of different rows do not compare.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from medqa.limits import MAX_FIGURES

TASKS = ("loss", "generation", "mcq", "probes")
DEEPEST = 12  # how far figures may be nested
FEWEST_PAIRS = 6  # with five pairs the smallest two-sided p-value of a permutation test is 2 / 2**5, above 0.05
TOO_FEW = "too few rows to tell"
# Figures of other rows than the `rows` beside them; evaluations whose figures have no `rows` do not say how many.
OF_OTHER_ROWS = ("advises_care", "authors_rouge1", "authors_rouge2", "authors_rougeL")


@dataclass(frozen=True)
class Figure:
    """A figure, with the ends of its interval, the p-value of a difference, and the number of its rows, where known.

    `paired` says whether it is a difference that is tested in pairs of rows.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    rows: int | None = None
    paired: bool = False

    @property
    def too_few(self) -> bool:
        """Whether it is a difference of so few pairs that no test of it could reach 0.05."""
        return self.paired and (self.p_value is None or (self.rows is not None and self.rows < FEWEST_PAIRS))


def number(value: Any) -> float | None:
    """A number that anyone may have written: finite and of a size that occurs, or None."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and -1e18 < value < 1e18
    return float(value) if usable else None


def count(value: Any) -> int | None:
    """A number of rows that anyone may have written, or None."""
    found = number(value)
    return int(found) if found is not None and found >= 0 else None


def figures(tasks: Any) -> dict[tuple[str, ...], Figure]:
    """Every object with a `value` in the `tasks` of an evaluation, those that there are, by its path.

    Raises:
        ValueError: there are more than `MAX_FIGURES`.
    """
    found: dict[tuple[str, ...], Figure] = {}
    known = {task: tasks[task] for task in TASKS if task in tasks} if isinstance(tasks, dict) else {}
    for path, figure in _below(known, (), None):
        found[path] = figure
        if len(found) > MAX_FIGURES:
            raise ValueError(f"more than {MAX_FIGURES:,} figures")
    return found


def as_figure(node: Mapping[str, Any], rows: int | None = None) -> Figure:
    """One figure; `rows` is what is known of its rows where it does not say it itself."""
    own = count(node.get("rows"))
    value, low, high, p_value = (number(node.get(key)) for key in ("value", "low", "high", "p_value"))
    return Figure(value, low, high, p_value, rows if own is None else own, "p_value" in node)


def _below(node: Any, path: tuple[str, ...], rows: int | None) -> Iterator[tuple[tuple[str, ...], Figure]]:
    """The figures below a node; `rows` are those of the nearest node above that says so."""
    if not isinstance(node, dict) or len(path) > DEEPEST:
        return
    if "value" in node and not isinstance(node["value"], dict):
        yield path, as_figure(node, None if path and path[-1] in OF_OTHER_ROWS else rows)
        return
    here = count(node.get("rows"))
    rows = rows if here is None else here
    for key, value in node.items():
        yield from _below(value, (*path, key), None if key == "sources" else rows)
