"""When a run stops: signals, the death of the launcher, and the `--stop-after` deadline.

Outside the training loop a signal ends the run at once. Inside it the current update is finished and saved first, and a
second signal ends the run at once. But several signals are often one request: `timeout` sends SIGTERM twice, a service
manager adds SIGHUP to SIGTERM, a lost ssh connection sends SIGHUP from the shell and from the kernel, and a launcher
forwards signals that its children have received already.

Under `accelerate launch` this process is a child, and a killed launcher does not end it. So it asks the kernel to send
SIGUSR1 when the launcher dies.
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
LOST_PARENT = (signal.SIGHUP, LAUNCHER_DIED)  # the terminal or the launcher is gone; never a second request of the user
TOGETHER_S = 1.0  # signals of different kinds within this time are one request
PR_SET_PDEATHSIG = 1  # prctl(2)


class Stopper:
    """Decides when a run stops: at a signal, when its launcher dies, or before the `--stop-after` deadline.

    A context manager: it handles the stopping signals inside its block. A SIGHUP that is ignored from the start stays
    ignored, because `nohup` requests that.

    Attributes:
        received: the first stopping signal received; None before.
        finish_update: whether a signal is only stored, until the update is finished; the loop sets it.
    """

    def __init__(self, stopping: Sequence[signal.Signals] = STOPPING) -> None:
        self.received: int | None = None
        self._stopping = stopping
        self._first_at = 0.0
        self._seen: Counter[int] = Counter()
        self.finish_update = False
        self._ignore_signals = False
        self._previous: dict[int, Any] = {}
        self._deadline: float | None = None
        self._save_minutes: float | None = None
        self._asked_at = self._saved_at = self._longest = 0.0

    def __enter__(self) -> "Stopper":
        if os.environ.get("ACCELERATE_MIXED_PRECISION") is not None:  # only accelerate launch sets it
            _signal_when_parent_dies()
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        held = [number for number in self._stopping if not (ignored and number == signal.SIGHUP)]
        self._previous = {number: signal.signal(number, self._handle) for number in held}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def ignore_signals_afterwards(self) -> Iterator[None]:
        """Ignore all stopping signals after this block, because the run has ended and its exit message follows.

        When one of several processes dies, the launcher stops the others, perhaps before they have printed theirs.
        """
        try:
            yield
        finally:
            self._ignore_signals = True

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._ignore_signals:
            return
        self._seen[signum] += 1
        if self.received is None:
            self.received, self._first_at = signum, time.monotonic()
            if not self.finish_update:
                raise Interrupted(signum)
        elif self._is_second_request(signum):
            raise Interrupted(signum)

    def _is_second_request(self, signum: int) -> bool:
        """Whether a signal after the first is a request of its own, and not a repetition of the first."""
        if signum in LOST_PARENT:
            return False
        # torch's launcher forwards every signal as SIGTERM, perhaps to a process that has received it already. A trial
        # of a sweep is stopped by W&B's agent (SIGTERM) and by W&B in this process (SIGINT); it has no terminal.
        forwarded = signum == signal.SIGTERM and "TORCHELASTIC_RUN_ID" in os.environ
        typed_again = signum == self.received == signal.SIGINT
        together = not typed_again and time.monotonic() - self._first_at < TOGETHER_S
        repetitions = 1 if forwarded or together or "WANDB_SWEEP_ID" in os.environ else 0
        return self._seen[signum] > repetitions + (self.received == signum)

    def set_deadline(self, seconds: float | None) -> None:
        """Set the deadline in seconds from the start of this process; None: no deadline."""
        running = time.time() - psutil.Process().create_time()
        self._deadline = None if seconds is None else time.monotonic() + seconds - running

    @contextlib.contextmanager
    def finishing_updates(self, save_minutes: float | None) -> Iterator[None]:
        """In this block a signal does not raise. The loop finishes the update, and `agree` then returns the signal.

        Args:
            save_minutes: minutes after which `agree` reports that a save is due; None: never.

        Raises:
            Interrupted: on leaving the block, if a signal arrived after the last call of `agree`.
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
        """Decide after an update, together with the other processes, whether to stop and whether to save.

        This is a collective call: every process must make it after every update, and all get the same answer.

        Returns:
            The exception to raise (None: continue), and whether `save_minutes` have passed since the last save.
        """
        now = time.monotonic()
        self._longest = max(self._longest, now - self._asked_at)
        self._asked_at = now
        save_due = self._save_minutes is not None and now - self._saved_at >= 60 * self._save_minutes
        # Another update and a save must still fit, each as slow as the slowest iteration so far.
        late = self.within(2 * self._longest)
        signum = self.received or 0
        if accelerator.num_processes > 1:
            mine = torch.tensor([[signum, int(save_due), int(late)]], device=accelerator.device)
            signum, save_due, late = accelerator.gather(mine).amax(dim=0).tolist()
        if signum:
            return Interrupted(signum), bool(save_due)
        if late and not last:
            reason = f"stopped before the --stop-after deadline, after update {step} of {updates}"
            return StoppedInTime(reason), bool(save_due)
        return None, bool(save_due)

    def note_save(self) -> None:
        """Restart the count of `save_minutes`."""
        self._saved_at = time.monotonic()

    def require_time(self, accelerator: Accelerator, seconds: float, step: int) -> None:
        """Check that `seconds`, the estimate for the final evaluation, are left before the `--stop-after` deadline.

        Raises:
            StoppedInTime: they are not. The checkpoint of the last update has been saved.
        """
        if on_main(accelerator, lambda: self.within(seconds)):
            raise StoppedInTime(
                f"stopped before the --stop-after deadline, after the last update ({step}); "
                "the final evaluation has not run"
            )

    def within(self, seconds: float) -> bool:
        """Whether fewer than `seconds` are left before the deadline."""
        return self._deadline is not None and time.monotonic() + seconds > self._deadline


def _signal_when_parent_dies() -> None:
    """Ask the kernel to send `LAUNCHER_DIED` when the parent process ends. Without Linux nothing is sent."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, LAUNCHER_DIED)
