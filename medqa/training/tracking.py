"""What a run records: `metrics.jsonl`, which is the truth, and W&B, which is fed from the same records."""

import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medqa.errors import UserError
from medqa.files import Damaged, flush, naming, open_in_place, parse_json, read_file, write_file
from medqa.limits import MAX_COUNT, MAX_METRICS_BYTES
from medqa.training.wandb_feed import WandbFeed

Record = dict[str, Any]

# Names on W&B of the keys that do not stand under their split's own name there.
PERFORMANCE_NAMES = {
    "tokens_per_s": "perf/tokens_per_second",
    "update_s": "perf/update_seconds",
    "padding_share": "perf/padding_share",
    "save_s": "perf/save_seconds",
}
MEMORY_NAMES = {"peak_memory_bytes": "perf/peak_allocated_gb", "peak_reserved_bytes": "perf/peak_reserved_gb"}
TRAIN_NAMES = ("loss", "learning_rate", "grad_norm", "epoch", "examples_seen", "tokens_seen")
EVAL_NAMES = ("loss", "perplexity", "answer_loss", "answer_perplexity")
FIGURES = {"elapsed_s", "tokens", "rows", *TRAIN_NAMES, *EVAL_NAMES, *PERFORMANCE_NAMES, *MEMORY_NAMES}
GLOBAL_STEP = "train/global_step"


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
    """What a run's legs have taken so far, what was lost with a kill included: seconds, and peak bytes.

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
        """From here on W&B is told too, first of what the legs before have recorded."""
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


def wandb_names(record: Record) -> dict[str, Any]:
    """A record under the names it has on W&B, with the step that everything is drawn against."""
    split = record["split"]
    names = TRAIN_NAMES if split == "train" else EVAL_NAMES
    values = {f"{split}/{name}": record[name] for name in names if record.get(name) is not None}
    values |= {name: record[key] for key, name in PERFORMANCE_NAMES.items() if key in record}
    values |= {source_name(split, name): loss for name, loss in record.get("sources", {}).items()}
    values |= {name: record[key] / 1e9 for key, name in MEMORY_NAMES.items() if record.get(key) is not None}
    return values | {GLOBAL_STEP: record["step"]}


def source_name(split: str, source: str) -> str:
    """The name on W&B of the answer loss of a source's rows in a split."""
    return f"{split}/{source}/answer_loss"


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
