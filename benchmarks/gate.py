"""An arm's side of the comparison: a process that does updates when told to, and says what they took.

Nothing of this project but a reader of memory is imported here, so that Trainer's processes hold what is Trainer's.
"""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medqa.model.device import peak_memory, reset_peak

# The arms of this project, and whether they train without padding.
OURS = {"plain": False, "padding_free": True, "padding_free_fp32": True}


class Done(Exception):
    """There are no more rounds. Raised inside the arm's own loop, which has no other way out in the middle."""


@dataclass(frozen=True)
class Job:
    """What an arm is to do. Written by the parent as JSON.

    Attributes:
        settings: the experiment as `section.key` to value, for this project's arms.
        arguments: `TrainingArguments` that say the same, for the others.
        rows: a file of `standin.Rows`.
        updates: the most that will be asked for.
        dtype: of the frozen weights; with bfloat16, autocast to it.
    """

    arm: str
    settings: dict[str, Any]
    arguments: dict[str, Any]
    base: str
    rows: str
    updates: int
    dtype: str
    device: str

    @classmethod
    def read(cls, path: str) -> "Job":
        """From the file that `write` wrote."""
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))

    def write(self, path: Path) -> Path:
        """As JSON."""
        path.write_text(json.dumps(vars(self)), encoding="utf-8")
        return path

    def ids(self) -> tuple[list[np.ndarray], list[int]]:
        """All rows' ids, and the order in which updates take them."""
        loaded = np.load(self.rows)
        ends = loaded["lengths"].cumsum()
        return np.split(loaded["ids"], ends[:-1]), loaded["order"].tolist()

    @property
    def rows_per_update(self) -> int:
        """The same for all arms."""
        return self.settings["training.global_batch_size"]


class Gate:
    """Holds the process at the end of an update until the next round; waiting takes no CPU time.

    The first update needs no asking. What is answered covers all from the release to the end of the round's last
    update: collation and logging too.
    """

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print goes to the log
        self._left, self._updates, self._tokens = 1, 1, 0
        self._cpu, self._wall = 0.0, time.perf_counter()

    def update_done(self, tokens: int) -> None:
        """An update of so many useful tokens is over.

        Raises:
            Done: it was the last one wanted.
        """
        self._tokens += tokens
        self._left -= 1
        if self._left == 0:
            self._answer()
            self._wait()

    def _answer(self) -> None:
        self._synchronize()
        cpu, wall = time.process_time() - self._cpu, time.perf_counter() - self._wall
        figures = {"cpu_s": cpu, "wall_s": wall, "tokens": self._tokens, "updates": self._updates}
        figures["peak_bytes"] = peak_memory(self._device).allocated
        print(json.dumps(figures), file=self._answers, flush=True)

    def _wait(self) -> None:
        line = sys.stdin.readline()
        if not line:
            raise Done
        self._left = self._updates = int(line)
        self._tokens = 0
        reset_peak(self._device)
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
