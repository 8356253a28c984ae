"""What a run records and prints: metrics.jsonl, W&B, progress, messages, startup times."""

import contextlib
import io
import json
import os
import time
import warnings
from collections import deque
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
from medqa.training.forecast import duration
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
    WandbLogger,
    start_wandb,
    wandb_names,
)

NUMERIC_KEYS = {"elapsed_s", "tokens", "rows", *TRAIN_NAMES, *EVAL_NAMES, *PERFORMANCE_NAMES, *MEMORY_NAMES}


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, each pair (step, split) exactly once, also after resumes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last_train: tuple[int, Record] | None = None  # the offset of its line, and the record

    def truncate_after(self, step: int, max_steps: int) -> "EarlierUsage":
        """Drop the records after the checkpoint at `step`, which will be computed again, and unreadable lines.

        Records at `step` are older than its checkpoint, so they stay. But at `max_steps` the final evaluation comes
        after the checkpoint, so only the `train` record stays there.

        Args:
            step: -1 without a checkpoint.

        Returns:
            The time and memory that earlier sessions took, dropped records included.
        """
        records: list[Record] = []
        kept: dict[Any, bytes] = {}
        unreadable = 0
        for line, record in _lines(self.path) if os.path.lexists(self.path) else ():
            if record is not None:
                records.append(record)
                before = record["step"] < step or (record["step"] == step and step < max_steps)
                if before or (record["step"] == step and record["split"] == "train"):
                    kept.setdefault((record["step"], record["split"]), line)
            elif line.endswith(b"\n"):  # else it is the last line, which a kill truncated
                unreadable += 1
        write_file(self.path, b"".join(kept.values()))
        return EarlierUsage(
            max((_number(record, "elapsed_s") for record in records), default=0.0),
            int(max((_number(record, "peak_memory_bytes") for record in records), default=0)),
            unreadable,
        )

    def flush(self) -> None:
        """Flush all lines to disk. A checkpoint must not be newer than the records before it."""
        flush(self.path)

    def append(self, record: Record) -> None:
        """Append a record as one unbuffered line. If there is no space for the whole line, nothing is appended.

        Raises:
            OSError: no space left, or the file does not exist any more.
        """
        with naming(self.path), open_in_place(self.path) as file:
            end = file.seek(0, os.SEEK_END)
            _write_all(file, end, _line(record).encode(), b"")
        if record["split"] == "train":
            self._last_train = (end, record)

    def amend_train(self, step: int, **more: float) -> bool:
        """Add fields to the newest `train` line if it is that of `step`; return whether it is.

        The line is written before these fields are known, so that a kill in between loses no record. The line and those
        after it are overwritten in one write; they only get longer.
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
class EarlierUsage:
    """What the earlier sessions of a run took, including updates that a kill lost: seconds and peak memory in bytes.

    `unreadable` is the number of dropped lines that could not be read, without a truncated last line.
    """

    elapsed_s: float
    peak_memory: int
    unreadable: int


def read_metrics(path: Path) -> Iterator[Record]:
    """The records of a metrics file. Lines that are truncated or no record are skipped.

    Raises:
        UserError: the file does not exist, is not a regular file, or is too large.
    """
    return (record for _, record in _lines(path) if record is not None)


def _lines(path: Path) -> Iterator[tuple[bytes, Record | None]]:
    """The lines of a metrics file, each with its record, or with None if it cannot be read.

    Raises:
        UserError: as `read_metrics`.
    """
    try:
        content = read_file(path, MAX_METRICS_BYTES)
    except Damaged as error:
        raise UserError(f"{error}; restore the file of this run, or start over with --fresh") from error
    for line in io.BytesIO(content):
        try:
            found = parse_json(line) if line.endswith(b"\n") else None
        except ValueError:
            found = None
        yield line, found if _is_record(found) else None


def _is_record(found: Any) -> bool:
    """Whether a value is a record: it has a step and a split, and its metrics are numbers or null."""
    if not isinstance(found, dict) or not isinstance(sources := found.get("sources", {}), dict):
        return False
    step, values = found.get("step"), [found[key] for key in NUMERIC_KEYS if key in found]
    return (
        type(step) is int
        and 0 <= step <= MAX_COUNT
        and isinstance(found.get("split"), str)
        and all(value is None or type(value) in (int, float) for value in (*values, *sources.values()))
    )


class Tracker:
    """Writes records to metrics.jsonl and W&B on the main process; does nothing on the other processes.

    Args:
        check: called before each write; it raises if another run owns the directory now.
    """

    def __init__(
        self,
        is_main_process: bool,
        metrics: MetricsFile,
        wandb_logger: WandbLogger | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._is_main_process = is_main_process
        self._metrics = metrics
        self._check = check
        self.wandb_logger = wandb_logger

    def truncate_after(self, step: int, max_steps: int) -> EarlierUsage:
        """As `MetricsFile.truncate_after`; all zeros on the other processes, which keep no time."""
        return self._metrics.truncate_after(step, max_steps) if self._is_main_process else EarlierUsage(0.0, 0, 0)

    def attach_wandb(self, wandb_logger: WandbLogger) -> None:
        """Log the records of earlier sessions to W&B if it lacks them, and from now on every new record."""
        self.wandb_logger = wandb_logger
        if self._is_main_process:
            wandb_logger.log_earlier(
                (record["step"], wandb_names(record)) for record in read_metrics(self._metrics.path)
            )

    def flush(self) -> None:
        """As `MetricsFile.flush`."""
        if self._is_main_process:
            self._check()
            self._metrics.flush()

    def log(self, record: Record) -> None:
        """Log a record: one step of one split. It goes to the file first, then to W&B."""
        if self._is_main_process:
            self._check()
            self._metrics.append(record)
            if self.wandb_logger is not None:
                self.wandb_logger.log(wandb_names(record), record["step"])

    def log_save(self, step: int, save_s: float) -> None:
        """Add the seconds that saving the checkpoint of `step` took to the record of that update, if there is one."""
        if not self._is_main_process:
            return
        self._check()
        if self._metrics.amend_train(step, save_s=save_s) and self.wandb_logger is not None:
            self.wandb_logger.log({PERFORMANCE_NAMES["save_s"]: save_s, GLOBAL_STEP: step}, step)


def _write_all(file: io.FileIO, start: int, content: bytes, before: bytes) -> None:
    """Overwrite the file from `start` on with `content`; if that fails, restore `before`, the old content."""
    try:
        file.seek(start)
        written = 0
        while written < len(content):
            written += file.write(content[written:])
    except OSError:
        file.seek(start)
        file.write(before)  # not longer than the old content, so it needs no free space
        file.truncate(start + len(before))
        raise


def _number(record: Record, key: str) -> float:
    """A non-negative number of a record, 0 if it is missing or absurd. Users may have edited the file."""
    value = record.get(key) or 0
    return float(value) if 0 <= value < 1e18 else 0.0


def _line(record: Record) -> str:
    """A record as a line of the file."""
    return json.dumps(record, allow_nan=False) + "\n"


# ----------------------------------------------------------------------------------------------------
# What the console shows: the plan, progress, and the table of results. Only the main process prints.
#
# `medqa/terminal.py` decides whether the console can be redrawn or gets plain lines.


def quiet_libraries() -> None:
    """Silence warnings of libraries that a user cannot act on."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def show_plan(console: Console, title: str, plan: Plan) -> None:
    """Print the plan, and one training example with the segments that count in the loss."""
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


RECENT = 20  # updates whose speed the estimate of the remaining time follows
QUIET_S = 30.0  # without a terminal, an evaluation that takes longer prints a line about every so many seconds


def validation_text(loss: SplitLoss, baseline: SplitLoss | None, best: bool) -> str:
    """The perplexity and loss of the fixed validation rows, the change since the baseline, and whether it is the best.

    Of the answers where they have target tokens, else of all target tokens.
    """
    of_answers = loss.answer_loss is not None
    name = "answer_" if of_answers else ""
    value, before = (getattr(each, name + "perplexity", None) for each in (loss, baseline))
    text = f"validation {name.replace('_', ' ')}perplexity {value:.3f}"
    if before:
        text += f" ({value / before - 1:+.1%} since the baseline)"
    text += f", {name.replace('_', ' ')}loss {getattr(loss, name + 'loss'):.4f}, loss {loss.loss:.4f}"
    return text + ", best so far" * best


class RemainingTime:
    """Estimates the remaining time of training from the last updates, by tokens, and from the evaluations to come.

    Args:
        updates: the number of updates of the run.
        every: an evaluation follows each so many updates.
        expected: the seconds that an evaluation during training takes, and those of the final evaluation.
    """

    def __init__(self, updates: int, every: int, expected: tuple[float, float]) -> None:
        self._updates, self._every = updates, every
        self.evaluation_s, self._closing = expected
        self._recent: deque[tuple[float, float]] = deque(maxlen=RECENT)  # seconds and target tokens of an update
        self._tokens, self._seen, self._warm = 0.0, 0, False

    def note(self, seconds: float, tokens: float) -> None:
        """Count an update. The first one of a session is slow, and counts only until there is a second."""
        if self._seen == 1 and not self._warm:
            self._recent.clear()
            self._tokens, self._seen, self._warm = 0.0, 0, True
        self._recent.append((seconds, tokens))
        self._tokens, self._seen = self._tokens + tokens, self._seen + 1

    def seconds(self, step: int) -> float:
        """The estimate after update `step` and before its evaluation, in seconds; 0 before the first update."""
        if not self._recent:
            return 0.0
        spent, tokens = (sum(column) for column in zip(*self._recent, strict=True))
        # Recent seconds per token, and the mean number of tokens of an update: few updates with long examples, or with
        # short ones, do not mislead it. Without target tokens the mean over the updates has to do.
        an_update = spent / tokens * self._tokens / self._seen if tokens else spent / len(self._recent)
        evaluations = self._updates // self._every - (step - 1) // self._every
        return (self._updates - step) * an_update + evaluations * self.evaluation_s + self._closing


class ProgressLine:
    """A progress bar on a terminal; without a terminal a line every `log_steps` updates."""

    def __init__(
        self, console: Console, first_step: int, max_steps: int, log_steps: int, remaining: RemainingTime | None = None
    ) -> None:
        self._console = console
        self._max_steps, self._log_steps = max_steps, log_steps
        self.remaining = remaining or RemainingTime(max_steps, max_steps, (0.0, 0.0))
        self._validation = ""
        self._bar = rich.progress.Progress(
            # On a narrow terminal only the bar shrinks.
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[metrics]}", markup=False),
            TextColumn("{task.fields[left]}", markup=False, table_column=Column(no_wrap=True)),
            console=console,
            expand=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=max_steps, completed=first_step, metrics="", left="")

    def __enter__(self) -> "ProgressLine":
        self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def update(self, record: Mapping[str, Any]) -> None:
        """Show the metrics of one update."""
        step = record["step"]
        metrics = (
            f"loss {record['loss']:.4f}  lr {record['learning_rate']:.2e}  {record['tokens_per_s']:,.0f} tokens/s  "
            f"peak {record['peak_memory_bytes'] / 2**30:.1f} GiB"
        )
        self.remaining.note(record["update_s"], record["tokens"])
        left = duration(self.remaining.seconds(step))
        self._bar.update(self._task, completed=step, metrics=metrics + self._validation, left=f"{left} left")
        if not self._console.is_terminal and (step % self._log_steps == 0 or step == self._max_steps):
            self._console.print(f"update {step}/{self._max_steps}  {metrics}  about {left} left", soft_wrap=True)

    def note_validation(self, loss: SplitLoss, seconds: float) -> None:
        """Show the perplexity of the newest evaluation from now on, and count the seconds that it took."""
        perplexity = loss.perplexity if loss.answer_perplexity is None else loss.answer_perplexity
        self._validation = f"  validation {perplexity:.3f}"
        self.remaining.evaluation_s = seconds


def show_result(console: Console, summary: Mapping[str, Any], adapter_dir: Path | None = None) -> None:
    """Print the losses before and after training, and the directory of the adapter."""
    table = Table(title=f"{summary['experiment']}: before and after", title_justify="left")
    table.add_column("")
    for column in ("validation, baseline", "validation, fine-tuned", "test, fine-tuned"):
        table.add_column(column, justify="right")
    for key in ("loss", "perplexity", "answer_loss", "answer_perplexity"):
        values = [summary[part][key] for part in ("baseline", "final", "test")]
        table.add_row(key.replace("_", " "), *("-" if value is None else f"{value:.4f}" for value in values))
    console.print(table)
    console.print(
        f"{summary['updates']} updates in {summary['wall_clock_s']:.0f} s, "
        f"peak memory {summary['peak_memory_bytes'] / 2**30:.2f} GiB ({summary['memory_device']})"
    )
    if adapter_dir is not None:
        console.print(f"adapter in {adapter_dir}", soft_wrap=True)


def _shortened(text: str, length: int = 600) -> str:
    """Text on one line, for the cell of a table."""
    text = text.replace("\n", "\\n")
    return text if len(text) <= length else text[:length] + " ..."


# ----------------------------------------------------------------------------------------------------
# The time from the start of the process to the end of its first update.


class StartupTimer:
    """Measures the phases of the startup, up to the first update.

    Attributes:
        started: when this timer was made, on the clock of `time.perf_counter`.
        seconds: by phase, in order.
    """

    def __init__(self) -> None:
        """Start the timer. The time since the start of the process is recorded as the phase `imports`."""
        self.started = self._last = time.perf_counter()
        self.seconds = {"imports": time.time() - psutil.Process().create_time()}
        self._first_update_seen = False

    def record(self, phase: str) -> None:
        """Record the seconds since the end of the previous phase under the name of this one."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def record_first_update(self) -> bool:
        """Record the phase `first update` on the first call; return whether this call was the first."""
        if self._first_update_seen:
            return False
        self._first_update_seen = True
        self.record("first update")
        return True

    def __str__(self) -> str:
        parts = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in self.seconds.items())
        return f"startup {sum(self.seconds.values()):.1f} s ({parts})"


# ----------------------------------------------------------------------------------------------------


class Recorder:
    """Everything that a run logs or prints: `metrics.jsonl`, W&B, the console; and the clock of the run.

    Every process has a recorder, but only that of the main process writes and prints.

    Attributes:
        startup: measures the time until the first update.
        wandb_logger: logs to W&B; set by `start_wandb`.

    Args:
        check: called before each write; it raises if another run owns the directory now.
    """

    wandb_logger: WandbLogger

    def __init__(
        self,
        experiment: Experiment,
        accelerator: Accelerator,
        output_dir: Path,
        startup: StartupTimer,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.accelerator, self.output_dir, self.startup = accelerator, output_dir, startup
        self._experiment = experiment
        quiet_libraries()
        self._console = make_console(accelerator.is_main_process)
        self._tracker = Tracker(accelerator.is_main_process, MetricsFile(output_dir / METRICS), check=check)
        self._before = 0.0  # seconds of earlier sessions
        self._bar: ProgressLine | None = None
        self._epoch: Callable[[int], float] = lambda step: 0.0
        self._newest: Record | None = None  # the newest train record that is not in the file
        self._messages: set[str] = set()

    def message(self, text: str) -> None:
        """Print a line on the console."""
        self._console.print(text, soft_wrap=True)

    def message_once(self, text: str) -> None:
        """Print a line, unless it was printed in this session before."""
        if text not in self._messages:
            self._messages.add(text)
            self.message(text)

    def clock(self) -> float:
        """Seconds of the run, all sessions together."""
        return self._before + time.perf_counter() - self.startup.started

    def restore(self, progress: Progress, updates: int) -> EarlierUsage:
        """Truncate metrics.jsonl after the step of the checkpoint, and add the time and memory of earlier sessions.

        Args:
            updates: the number of updates of the whole run.
        """
        earlier = self._tracker.truncate_after(
            progress.step if progress.baseline else -1, progress.step if progress.stopped_early else updates
        )
        progress.peak_memory = max(progress.peak_memory, earlier.peak_memory)
        self._before = max(progress.elapsed_s, earlier.elapsed_s)
        return earlier

    def show_plan(self, name: str, plan: Plan) -> None:
        """Print the plan of the experiment with this name."""
        show_plan(self._console, f"{name} in {self.output_dir}", plan)

    def show_result(self, summary: Mapping[str, Any], adapter_dir: Path | None = None) -> None:
        """Print the table of results."""
        show_result(self._console, summary, adapter_dir)

    def show_complete_run(self, summary: Mapping[str, Any]) -> None:
        """Print the result of a run that is already complete; log it to W&B if a trial of a sweep repeats the run."""
        self.message(f"{self.output_dir}: the run is already complete; nothing to do (use --fresh to start over)")
        log_repeated_trial(self.accelerator, self._experiment, self.output_dir, self.message)
        self.show_result(summary)

    def start_wandb(self, run_id: str, changes: Mapping[str, Any]) -> None:
        """Start W&B and log to it: first records of earlier sessions that it lacks, then all new records."""
        self.message(start_wandb(self.accelerator, self._experiment, self.output_dir, run_id, changes))
        self.wandb_logger = WandbLogger(self.accelerator, self.message)
        self._tracker.attach_wandb(self.wandb_logger)
        self.startup.record("start")

    @contextlib.contextmanager
    def training(
        self, progress: Progress, stream: Stream, updates: int, expected: tuple[float, float] = (0.0, 0.0)
    ) -> Iterator[None]:
        """Show the progress of training in this block.

        Args:
            expected: the seconds that an evaluation during training takes, and those of the final evaluation.
        """
        self._epoch = stream.epoch
        remaining = RemainingTime(updates, self._experiment.evaluation.steps, expected)
        log_steps = self._experiment.training.log_steps
        with ProgressLine(self._console, progress.step, updates, log_steps, remaining) as self._bar:
            yield
        self._bar = None

    @contextlib.contextmanager
    def evaluating(self, title: str, rows: int, earlier: int = 0) -> Iterator[Callable[[int], None]]:
        """Show the progress of an evaluation in this block, which calls what it gets with each number of rows done.

        On a terminal that is a bar with the remaining time; else a line about every half minute. With several processes
        the rows of the main process stand for all.

        Args:
            earlier: the number of rows that an interrupted evaluation has measured.
        """
        if earlier:
            self.message(f"{title}: {earlier:,} of {rows:,} rows were measured before an interruption")
        began = printed = time.perf_counter()
        measured, processes = earlier, self.accelerator.num_processes
        name = TextColumn("{task.description}", markup=False)
        columns = (name, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        bar = rich.progress.Progress(*columns, console=self._console, transient=True)
        bar.disable = not self._console.is_terminal
        task = bar.add_task(title, total=rows, completed=earlier)

        def done(more: int) -> None:
            """Count rows."""
            nonlocal measured, printed
            measured = min(measured + more * processes, rows)
            bar.update(task, completed=measured)
            now = time.perf_counter()
            if not self._console.is_terminal and now - printed >= QUIET_S and measured < rows:
                printed, left = now, (now - began) / (measured - earlier) * (rows - measured)
                self.message(f"{title}: {measured:,} of {rows:,} rows, about {duration(left)} left")

        with bar:
            yield done

    def log_update(self, progress: Progress, result: StepResult, seconds: float, last: bool) -> None:
        """Show an update, and log it every `log_steps` updates and if it is the last."""
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
        if self.startup.record_first_update():
            self.message(str(self.startup))
        self.show_update(record)
        self._newest = record
        if progress.step % self._experiment.training.log_steps == 0 or last:
            self._log_newest()

    def show_update(self, record: Record) -> None:
        """Show the metrics of an update in the progress display."""
        if self._bar is not None:
            self._bar.update(record)

    def log_evaluation(self, progress: Progress, loss: SplitLoss, seconds: float = 0.0, last: bool = False) -> None:
        """Log and show an evaluation of the fixed validation rows.

        Args:
            seconds: that it took, where it was one during training.
            last: it was the evaluation during training after the last update. Then it is not logged, because the final
                evaluation measures the same rows again. The update itself is logged, whatever `log_steps` is, because
                early stopping may have made it the last one.
        """
        if last:
            self._log_newest()
            return
        self.log_split(progress.step, "eval", loss)
        best = progress.best_step == progress.step
        baseline = progress.fixed_baseline
        if baseline is not None and baseline.rows != loss.rows:  # `evaluation.rows` was changed on resume
            baseline = None
        text = validation_text(loss, baseline, best)
        self.message(f"update {progress.step}: {text}")
        if self._bar is not None:
            self._bar.note_validation(loss, seconds)

    def log_split(self, step: int, split: str, loss: SplitLoss) -> None:
        """Log the losses of a split after `step` updates."""
        self._tracker.log({"step": step, "split": split, "elapsed_s": self.clock(), **loss.record()})

    def log_save(self, step: int, seconds: float) -> None:
        """Log the seconds that saving the checkpoint of `step` took."""
        self._tracker.log_save(step, seconds)

    def flush(self) -> None:
        """Flush all records to disk. A checkpoint must not be newer than the records before it."""
        self._tracker.flush()

    def _log_newest(self) -> None:
        """Log the newest update, unless it is logged already."""
        if self._newest is not None:
            self._tracker.log(self._newest)
            self._newest = None


# ----------------------------------------------------------------------------------------------------
# A trial of a sweep that repeats an earlier one: the same recipe on the same data gives the same run.


def log_repeated_trial(
    accelerator: Accelerator, experiment: Experiment, output_dir: Path, report: Callable[[str], None]
) -> None:
    """In a sweep, log the metrics of a run that is already complete to the W&B run of the trial; else do nothing.

    W&B's agent has chosen the id of that W&B run. Without this it would stay empty, and the search would learn nothing
    from the trial.
    """
    session = read_session(output_dir)
    if "WANDB_SWEEP_ID" not in os.environ or session is None or not accelerator.is_main_process:
        return
    report(start_wandb(accelerator, experiment, output_dir, session.run_id, {}))
    wandb_logger = WandbLogger(accelerator, report)
    Tracker(True, MetricsFile(output_dir / METRICS)).attach_wandb(wandb_logger)
    wandb_logger.finish()
