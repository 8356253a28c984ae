"""What a run records and shows: metrics.jsonl, progress, messages, the time of each phase."""

import contextlib
import io
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import rich.progress
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text
from transformers.utils import logging as transformers_logging

from medqa.config import Experiment
from medqa.data.batches import Stream
from medqa.errors import UserError
from medqa.evaluation.loss import SplitLoss
from medqa.files import Damaged, flush, naming, open_in_place, parse_json, read_file, write_file
from medqa.limits import MAX_COUNT, MAX_METRICS_BYTES
from medqa.model.device import peak_memory
from medqa.terminal import make_console, printable
from medqa.training.plan import Plan
from medqa.training.run_dir import METRICS, read_session
from medqa.training.state import Progress, StepResult
from medqa.training.wandb import (
    EVAL_NAMES,
    GLOBAL_STEP,
    MEMORY_NAMES,
    PERFORMANCE_NAMES,
    TRAIN_NAMES,
    Record,
    WandbFeed,
    start_wandb,
    wandb_names,
)

FIGURES = {"elapsed_s", "tokens", "rows", *TRAIN_NAMES, *EVAL_NAMES, *PERFORMANCE_NAMES, *MEMORY_NAMES}


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, each pair (step, split) exactly once, also after resumes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last_train: tuple[int, Record] | None = None  # where its line begins, and what it says

    def resume(self, step: int, max_steps: int) -> "Spent":
        """Drop what will be computed again, and a last line that a kill cut short; say what all of it took.

        What was recorded at `step` came before its checkpoint and stays; but a run's closing evaluation comes after the
        last one. With no checkpoint, `step` is -1.
        """
        records: list[Record] = []
        kept: dict[Any, bytes] = {}
        damaged = 0
        for line, record in _lines(self.path) if os.path.lexists(self.path) else ():
            if record is not None:
                records.append(record)
                before_it = record["step"] < step or (record["step"] == step and step < max_steps)
                if before_it or (record["step"] == step and record["split"] == "train"):
                    kept.setdefault((record["step"], record["split"]), line)
            elif line.endswith(b"\n"):  # else a last one that a kill cut short
                damaged += 1
        write_file(self.path, b"".join(kept.values()))
        return Spent(
            max((_number(record, "elapsed_s") for record in records), default=0.0),
            int(max((_number(record, "peak_memory_bytes") for record in records), default=0)),
            damaged,
        )

    def flush(self) -> None:
        """Have the disk hold all lines, before a checkpoint says that they need not be computed again."""
        flush(self.path)

    def append(self, record: Record) -> None:
        """Add a line and hand it to the system at once; where there is no room for all of it, add none of it.

        Raises:
            OSError: no room, or the file has gone.
        """
        with naming(self.path), open_in_place(self.path) as file:
            end = file.seek(0, os.SEEK_END)
            _write_all(file, end, _line(record).encode(), b"")
        if record["split"] == "train":
            self._last_train = (end, record)

    def amend_train(self, step: int, **more: float) -> bool:
        """Add fields to the newest `train` line if it is that of `step`; says whether it is.

        The line was written before what is added was known, so that a kill in between loses nothing. It and the lines
        after it are written over in one write; they only get longer.
        """
        if self._last_train is None or self._last_train[1]["step"] != step:
            return False
        start, record = self._last_train
        with naming(self.path), open_in_place(self.path) as file:
            file.seek(start)
            before = file.read()
            after = before.split(b"\n", 1)[1]
            _write_all(file, start, _line({**record, **more}).encode() + after, before)
        return True


@dataclass(frozen=True)
class Spent:
    """What a run's sessions have taken so far, what was lost with a kill included: seconds, and peak bytes.

    `damaged` counts lines, the last one apart, that could not be read and are lost.
    """

    elapsed_s: float
    peak_memory: int
    damaged: int


def read_metrics(path: Path) -> Iterator[Record]:
    """The records of a metrics file; a line that is not whole, or not a record, is passed over.

    Raises:
        UserError: the file is not there, is not a regular file, or is too long.
    """
    return (record for _, record in _lines(path) if record is not None)


def _lines(path: Path) -> Iterator[tuple[bytes, Record | None]]:
    """The lines of a metrics file, each with its record; None where it is damaged.

    Raises:
        UserError: as `read_metrics`.
    """
    try:
        content = read_file(path, MAX_METRICS_BYTES)
    except Damaged as error:
        raise UserError(f"{error}; put back the run's own, or start over with --fresh") from error
    for line in io.BytesIO(content):
        try:
            found = parse_json(line) if line.endswith(b"\n") else None
        except ValueError:
            found = None
        yield line, found if _is_record(found) else None


def _is_record(found: Any) -> bool:
    """Whether a value has what every record has, and figures where records have figures."""
    if not isinstance(found, dict) or not isinstance(sources := found.get("sources", {}), dict):
        return False
    step, figures = found.get("step"), [found[key] for key in FIGURES if key in found]
    return (
        type(step) is int
        and 0 <= step <= MAX_COUNT
        and isinstance(found.get("split"), str)
        and all(value is None or type(value) in (int, float) for value in (*figures, *sources.values()))
    )


class Tracker:
    """Takes records on the main process and passes them on; does nothing on the others.

    Args:
        check: asked before each write; raises where the directory is no longer this run's.
    """

    def __init__(
        self,
        is_main_process: bool,
        metrics: MetricsFile,
        feed: WandbFeed | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._is_main_process = is_main_process
        self._metrics = metrics
        self._check = check
        self.feed = feed

    def resume(self, step: int, max_steps: int) -> Spent:
        """As `MetricsFile.resume`; on the other processes, which keep no time, nothing was spent."""
        return self._metrics.resume(step, max_steps) if self._is_main_process else Spent(0.0, 0, 0)

    def begin_feed(self, feed: WandbFeed) -> None:
        """From here on W&B is told too, first of what the sessions before have recorded."""
        self.feed = feed
        if self._is_main_process:
            feed.begin((record["step"], wandb_names(record)) for record in read_metrics(self._metrics.path))

    def flush(self) -> None:
        """As `MetricsFile.flush`."""
        if self._is_main_process:
            self._check()
            self._metrics.flush()

    def log(self, record: Record) -> None:
        """Record one step of one split: into the file, then to W&B where there is a run."""
        if self._is_main_process:
            self._check()
            self._metrics.append(record)
            if self.feed is not None:
                self.feed.log(wandb_names(record), record["step"])

    def saved(self, step: int, save_s: float) -> None:
        """Record how long the checkpoint of `step` held up training, in seconds, if the update itself is recorded."""
        if not self._is_main_process:
            return
        self._check()
        if self._metrics.amend_train(step, save_s=save_s) and self.feed is not None:
            self.feed.log({PERFORMANCE_NAMES["save_s"]: save_s, GLOBAL_STEP: step}, step)


def _write_all(file: io.FileIO, start: int, content: bytes, before: bytes) -> None:
    """Write `content` from `start` to the end of the file, or leave there what was `before`."""
    try:
        file.seek(start)
        written = 0
        while written < len(content):
            written += file.write(content[written:])
    except OSError:
        file.seek(start)
        file.write(before)  # no longer than what was there: it needs no room
        file.truncate(start + len(before))
        raise


def _number(record: Record, key: str) -> float:
    """A figure of a record that anyone may have edited."""
    value = record.get(key) or 0
    return float(value) if 0 <= value < 1e18 else 0.0


def _line(record: Record) -> str:
    """A record as its line."""
    return json.dumps(record, allow_nan=False) + "\n"


# ----------------------------------------------------------------------------------------------------
# What the terminal shows: the plan, progress, and the closing table. From the main process only.
#
# What a terminal can redraw and what is shown elsewhere is decided in `medqa/terminal.py`.


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
        self._bar = rich.progress.Progress(
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
            f"loss {record['loss']:.4f}  lr {record['learning_rate']:.2e}  {record['tokens_per_s']:,.0f} tokens/s  "
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
    for column in ("validation, baseline", "validation, fine-tuned", "test, fine-tuned"):
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


# ----------------------------------------------------------------------------------------------------
# Where the time goes from a process's start to the end of its first update.


class Phases:
    """A clock that is told when a phase is over. `seconds` has what each took, in order."""

    def __init__(self) -> None:
        """What was before, from the process's start on, is the imports."""
        self.started = self._last = time.perf_counter()
        self.seconds = {"imports": time.time() - psutil.Process().create_time()}
        self._first_update_seen = False

    def done(self, phase: str) -> None:
        """This phase, begun when the one before was over, is over now."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def first_update_done(self) -> bool:
        """End the last phase with the first update of this session; says whether this update was the first."""
        if self._first_update_seen:
            return False
        self._first_update_seen = True
        self.done("first update")
        return True

    def __str__(self) -> str:
        parts = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.seconds.items())
        return f"first update after {sum(self.seconds.values()):.1f} s: {parts}"


# ----------------------------------------------------------------------------------------------------


class Recorder:
    """All that a run tells: `metrics.jsonl`, W&B, the console, and the clock that these need.

    Every process has a recorder; only that of the main process writes and shows anything.

    Attributes:
        phases: where the time to the first update goes.
        feed: tells W&B, once `start_wandb` has been called.

    Args:
        check: is called before each write; raises where the directory is no longer this run's.
    """

    feed: WandbFeed

    def __init__(
        self,
        experiment: Experiment,
        accelerator: Accelerator,
        output_dir: Path,
        phases: Phases,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.accelerator, self.output_dir, self.phases = accelerator, output_dir, phases
        self._experiment = experiment
        quiet_libraries()
        self._console = make_console(accelerator.is_main_process)
        self._tracker = Tracker(accelerator.is_main_process, MetricsFile(output_dir / METRICS), check=check)
        self._before = 0.0  # seconds of the sessions before this one
        self._bar: ProgressLine | None = None
        self._epoch: Callable[[int], float] = lambda step: 0.0
        self._newest: Record | None = None  # the newest train record that is not in the file
        self._said: set[str] = set()

    def message(self, text: str) -> None:
        """Show a line on the console."""
        self._console.print(text, soft_wrap=True)

    def message_once(self, text: str) -> None:
        """Show a line that was not shown before in this session."""
        if text not in self._said:
            self._said.add(text)
            self.message(text)

    def clock(self) -> float:
        """Seconds of the run, all sessions together."""
        return self._before + time.perf_counter() - self.phases.started

    def resume(self, progress: Progress, updates: int) -> Spent:
        """Bring the metrics file to where the run resumes; count the time and memory of the sessions before.

        Args:
            updates: how many updates the run has in all.
        """
        spent = self._tracker.resume(
            progress.step if progress.baseline else -1, progress.step if progress.stopped_early else updates
        )
        progress.peak_memory = max(progress.peak_memory, spent.peak_memory)
        self._before = max(progress.elapsed_s, spent.elapsed_s)
        return spent

    def show_plan(self, name: str, plan: Plan) -> None:
        """Show the plan of the experiment of this name on the console."""
        show_plan(self._console, f"{name} in {self.output_dir}", plan)

    def show_result(self, summary: Mapping[str, Any], adapter_dir: Path | None = None) -> None:
        """Show the closing table on the console."""
        show_result(self._console, summary, adapter_dir)

    def show_complete_run(self, summary: Mapping[str, Any]) -> None:
        """Show the result of a run that is complete already, and tell W&B where a sweep's trial repeats it."""
        self.message(f"{self.output_dir} is complete already")
        tell_trial(self.accelerator, self._experiment, self.output_dir, self.message)
        self.show_result(summary)

    def start_wandb(self, run_id: str, changes: Mapping[str, Any]) -> None:
        """Begin to tell W&B: first what the sessions before have recorded, then what is recorded from now on."""
        self.message(start_wandb(self.accelerator, self._experiment, self.output_dir, run_id, changes))
        self.feed = WandbFeed(self.accelerator, self.message)
        self._tracker.begin_feed(self.feed)
        self.phases.done("start")

    @contextlib.contextmanager
    def training(self, progress: Progress, stream: Stream, updates: int) -> Iterator[None]:
        """Show the progress of training in this block."""
        self._epoch = stream.epoch
        with ProgressLine(self._console, progress.step, updates, self._experiment.training.log_steps) as self._bar:
            yield

    def log_update(self, progress: Progress, result: StepResult, seconds: float, last: bool) -> None:
        """Record an update and show it. Updates between two `log_steps` are shown and not recorded."""
        memory = peak_memory(self.accelerator.device)
        progress.elapsed_s = self.clock()
        progress.peak_memory = max(progress.peak_memory, memory.allocated)
        record = {
            "step": progress.step,
            "split": "train",
            "elapsed_s": progress.elapsed_s,
            "loss": result.loss,
            "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm,
            "tokens": result.tokens,
            "examples_seen": progress.step * self._experiment.training.global_batch_size,
            "tokens_seen": progress.tokens_seen,
            "epoch": self._epoch(progress.step),
            "update_s": seconds,
            "tokens_per_s": result.tokens / seconds,
            "padding_share": result.padding_share,
            "order": f"{result.order:x}",
            "overflows": progress.overflows,
            "peak_memory_bytes": memory.allocated,
            "peak_reserved_bytes": memory.reserved,
        }
        if self.phases.first_update_done():
            self.message(str(self.phases))
        self.show_update(record)
        self._newest = record
        if progress.step % self._experiment.training.log_steps == 0 or last:
            self._log_newest()

    def show_update(self, record: Record) -> None:
        """Show the figures of an update."""
        if self._bar is not None:
            self._bar.update(record)

    def log_evaluation(self, progress: Progress, loss: SplitLoss, last: bool) -> None:
        """Record an evaluation of the fixed validation rows.

        After the last update it is not recorded, because the final evaluation of all rows takes its place; but the
        update itself is then, whatever `log_steps` says: early stopping may have made it the last one.
        """
        if last:
            self._log_newest()
        else:
            self.log_split(progress.step, "eval", loss)

    def log_split(self, step: int, split: str, loss: SplitLoss) -> None:
        """Record the losses of a split after `step` updates."""
        self._tracker.log({"step": step, "split": split, "elapsed_s": self.clock(), **loss.record()})

    def log_save(self, step: int, seconds: float) -> None:
        """Record how long the checkpoint of `step` held up training."""
        self._tracker.saved(step, seconds)

    def flush(self) -> None:
        """Have the disk hold all records, before a checkpoint says that they need not be computed again."""
        self._tracker.flush()

    def _log_newest(self) -> None:
        """Record the newest update, once."""
        if self._newest is not None:
            self._tracker.log(self._newest)
            self._newest = None


# ----------------------------------------------------------------------------------------------------
# A sweep's trial that tries what an earlier one has tried: the same recipe on the same data gives the same run.


def tell_trial(accelerator: Accelerator, experiment: Experiment, output_dir: Path, say: Callable[[str], None]) -> None:
    """Bring a sweep's W&B run up to date with a directory whose run is complete already; else do nothing.

    The id is the one that W&B's agent has chosen. Its run would stay without a single value, and the search would learn
    nothing from the trial.
    """
    session = read_session(output_dir)
    if "WANDB_SWEEP_ID" not in os.environ or session is None or not accelerator.is_main_process:
        return
    say(start_wandb(accelerator, experiment, output_dir, session.run_id, {}))
    feed = WandbFeed(accelerator, say)
    Tracker(True, MetricsFile(output_dir / METRICS)).begin_feed(feed)
    feed.finish()
