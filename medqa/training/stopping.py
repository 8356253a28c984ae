"""Signals: outside training they end the run at once, inside it the update is finished and saved first.

A second signal ends the run at once there too, because somebody is impatient. But signals often come in groups that are
one request: `timeout` sends SIGTERM twice, a service manager adds SIGHUP to SIGTERM, a lost ssh connection sends SIGHUP
from the shell and from the kernel, and a launcher hands on what its children have received already.

Under `accelerate launch` the trainer is a child that outlives a killed launcher. It asks the kernel for a signal of its
own (SIGUSR1) when the launcher dies.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from types import FrameType, TracebackType
from typing import Any

import psutil
import torch
from accelerate import Accelerator

from medqa.errors import LAUNCHER_DIED, Interrupted, StoppedInTime
from medqa.training.distributed import on_main

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, LAUNCHER_DIED)
GONE = (signal.SIGHUP, LAUNCHER_DIED)  # what they say is that something has gone: nobody is impatient
TOGETHER_S = 1.0  # signals of several kinds that come within this time are one request
PR_SET_PDEATHSIG = 1  # prctl(2)


class Stopper:
    """Decides when a run stops: at a signal, when its launcher dies, or in time for `--stop-after`.

    It holds the stopping signals while a run is on. `received` is the one to stop for, None while there is none.

    SIGHUP is left alone where it is ignored from the start: that is what `nohup` asks for.
    """

    def __init__(self, stopping: Sequence[signal.Signals] = STOPPING) -> None:
        self.received: int | None = None
        self._stopping = stopping
        self._first_at = 0.0
        self._seen: Counter[int] = Counter()
        self.finish_update = False  # set by the loop: note the signal instead of raising
        self._over = False
        self._previous: dict[int, Any] = {}
        self._deadline: float | None = None
        self._save_minutes: float | None = None
        self._asked_at = self._saved_at = self._longest = 0.0

    def __enter__(self) -> "Stopper":
        if os.environ.get("ACCELERATE_MIXED_PRECISION") is not None:  # set by accelerate launch, and by nothing else
            _signal_when_parent_dies()
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        held = [number for number in self._stopping if not (ignored and number == signal.SIGHUP)]
        self._previous = {number: signal.signal(number, self._handle) for number in held}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def until_over(self) -> Iterator[None]:
        """After it no signal stops anything any more, for the run has ended, and how is being said.

        Where one of several processes dies, the launcher ends the others, maybe before they have told of it.
        """
        try:
            yield
        finally:
            self._over = True

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._over:
            return
        self._seen[signum] += 1
        if self.received is None:
            self.received, self._first_at = signum, time.monotonic()
            if not self.finish_update:
                raise Interrupted(signum)
        elif self._impatient(signum):
            raise Interrupted(signum)

    def _impatient(self, signum: int) -> bool:
        """Whether a signal that is not the first is a request of its own, and not an echo of the first."""
        if signum in GONE:
            return False
        # torch's launcher hands every signal on as SIGTERM, maybe to a process that has received it already. A sweep's
        # trial is stopped by W&B's agent (SIGTERM) and by W&B in this process (SIGINT); no terminal reaches it.
        handed_on = signum == signal.SIGTERM and "TORCHELASTIC_RUN_ID" in os.environ
        typed_again = signum == self.received == signal.SIGINT
        together = not typed_again and time.monotonic() - self._first_at < TOGETHER_S
        echoes = 1 if handed_on or together or "WANDB_SWEEP_ID" in os.environ else 0
        return self._seen[signum] > echoes + (self.received == signum)

    def set_deadline(self, seconds: float | None) -> None:
        """Set when to be done, in seconds from the start of this process; None: no deadline."""
        running = time.time() - psutil.Process().create_time()
        self._deadline = None if seconds is None else time.monotonic() + seconds - running

    @contextlib.contextmanager
    def finishing_updates(self, save_minutes: float | None) -> Iterator[None]:
        """In this block a signal waits for the end of the update, where `agree` tells of it; after it, none waits.

        Args:
            save_minutes: how often `agree` asks for a save; None: never.

        Raises:
            Interrupted: a signal came during the last update, after the loop had asked for one.
        """
        self._save_minutes = save_minutes
        self._asked_at = self._saved_at = time.monotonic()
        self.finish_update = True
        try:
            yield
        finally:
            self.finish_update = False
        if self.received is not None:
            raise Interrupted(self.received)

    def agree(
        self, accelerator: Accelerator, step: int, updates: int, last: bool
    ) -> tuple[Interrupted | StoppedInTime | None, bool]:
        """Why to stop after this update (None: go on), and whether `save_minutes` have passed since the last save.

        The answer is the same on all processes, each of which must ask after every update.
        """
        now = time.monotonic()
        self._longest = max(self._longest, now - self._asked_at)
        self._asked_at = now
        save_due = self._save_minutes is not None and now - self._saved_at >= 60 * self._save_minutes
        # A save and another update, each perhaps slower than any so far, must still fit.
        late = self._within(2 * self._longest)
        signum = self.received or 0
        if accelerator.num_processes > 1:
            mine = torch.tensor([[signum, int(save_due), int(late)]], device=accelerator.device)
            signum, save_due, late = accelerator.gather(mine).amax(dim=0).tolist()
        if signum:
            return Interrupted(signum), bool(save_due)
        if late and not last:
            return StoppedInTime(f"stopped in time after update {step} of {updates}"), bool(save_due)
        return None, bool(save_due)

    def note_save(self) -> None:
        """Count `save_minutes` from now on."""
        self._saved_at = time.monotonic()

    def require_time(self, accelerator: Accelerator, seconds: float, step: int) -> None:
        """See that the deadline is not within so many seconds, which the final evaluation takes.

        Raises:
            StoppedInTime: it is.
        """
        if on_main(accelerator, lambda: self._within(seconds)):
            raise StoppedInTime(f"stopped in time after update {step}, the last, before the final evaluation")

    def _within(self, seconds: float) -> bool:
        """Whether the deadline comes in less than so many seconds."""
        return self._deadline is not None and time.monotonic() + seconds > self._deadline


def _signal_when_parent_dies() -> None:
    """Ask the kernel for `LAUNCHER_DIED` when the parent ends (Linux only; elsewhere nothing is sent)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, LAUNCHER_DIED)
