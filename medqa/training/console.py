"""What the terminal shows: the plan, progress, and the closing table. From the main process only.

What a terminal can redraw and what is shown elsewhere is decided in `medqa/terminal.py`.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text
from transformers.utils import logging as transformers_logging

from medqa.terminal import printable
from medqa.training.plan import Plan


def quiet_libraries() -> None:
    """Keep messages off the terminal that a user can do nothing about."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def show_plan(console: Console, title: str, plan: Plan) -> None:
    """The plan, and one training example with what of it counts in the loss."""
    rows = [(label, text.replace("\n", "\\n"), "none") for label, text in plan.lines]
    for counts, text in plan.example:
        rows.append(("in the loss" if counts else "not in the loss", _shortened(text), "green" if counts else "dim"))
    if not console.is_terminal:
        for label, text, _ in [("run", title, ""), *rows]:
            console.print(f"{label:<16} {text}", soft_wrap=True)
        return
    console.rule(title)
    grid = Table.grid(padding=(0, 2))
    for label, text, style in rows:
        grid.add_row(Text(label, style="bold"), Text(printable(text), style=style))
    console.print(grid)


class ProgressLine:
    """A bar on a terminal, a line every so many updates elsewhere."""

    def __init__(self, console: Console, first_step: int, max_steps: int, log_steps: int) -> None:
        self._console = console
        self._max_steps, self._log_steps = max_steps, log_steps
        self._bar = Progress(
            # Of 80 columns the bar alone gives way.
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}", markup=False),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            console=console,
            expand=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=max_steps, completed=first_step, figures="")

    def __enter__(self) -> "ProgressLine":
        self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def update(self, record: Mapping[str, Any]) -> None:
        """Show the figures of one update."""
        step = record["step"]
        figures = (
            f"loss {record['loss']:.4f}  rate {record['learning_rate']:.2e}  {record['tokens_per_s']:,.0f} tokens/s  "
            f"peak {record['peak_memory_bytes'] / 2**30:.1f} GiB"
        )
        self._bar.update(self._task, completed=step, figures=figures)
        if not self._console.is_terminal and (step % self._log_steps == 0 or step == self._max_steps):
            left = (self._max_steps - step) * record["update_s"]
            left = f"{left:.0f} s" if left < 120 else f"{left / 60:.0f} min"
            self._console.print(f"update {step}/{self._max_steps}  {figures}  about {left} left", soft_wrap=True)


def show_result(console: Console, summary: Mapping[str, Any], adapter_dir: Path | None = None) -> None:
    """Baseline against final on the validation set, and the test set once; and where the adapter is."""
    table = Table(title=f"{summary['experiment']}: before and after", title_justify="left")
    table.add_column("")
    for column in ("validation, untuned", "validation, tuned", "test, tuned"):
        table.add_column(column, justify="right")
    for key in ("loss", "perplexity", "answer_loss", "answer_perplexity"):
        figures = [summary[part][key] for part in ("baseline", "final", "test")]
        table.add_row(key.replace("_", " "), *("-" if value is None else f"{value:.4f}" for value in figures))
    console.print(table)
    console.print(
        f"{summary['updates']} updates in {summary['wall_clock_s']:.0f} s, "
        f"peak memory {summary['peak_memory_bytes'] / 2**30:.2f} GiB ({summary['memory_device']})"
    )
    if adapter_dir is not None:
        console.print(f"adapter in {adapter_dir}", soft_wrap=True)


def _shortened(text: str, length: int = 600) -> str:
    """Text for a table's cell, on one line."""
    text = text.replace("\n", "\\n")
    return text if len(text) <= length else text[:length] + " ..."
