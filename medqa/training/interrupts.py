"""Signals: outside training they end the run at once, inside it the update is finished and saved first.

Under `accelerate launch` the trainer is a child that outlives a killed launcher; here it learns of the launcher's death
by a signal of its own (SIGUSR1), which must not count as the second, impatient one after a Ctrl-C that both received.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from types import FrameType, TracebackType

import psutil

from medqa.errors import LAUNCHER_DIED, Interrupted

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, LAUNCHER_DIED)
PR_SET_PDEATHSIG = 1  # prctl(2)


class Interrupts:
    """Holds the stopping signals while a run is on. `received` is the one to stop for, None while there is none."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._seen: Counter[int] = Counter()
        self.finish_update = False  # set by the loop: note the signal instead of raising
        self._over = False
        self._previous: dict[int, signal.Handlers | object] = {}

    def __enter__(self) -> "Interrupts":
        if os.environ.get("ACCELERATE_MIXED_PRECISION") is not None:  # set by accelerate launch, and by nothing else
            _signal_when_parent_dies()
        self._previous = {number: signal.signal(number, self._handle) for number in STOPPING}
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
        # A second signal may be an echo of the first: the launcher has died of it, or torch's hands it on as SIGTERM,
        # maybe to a process that got it already. A sweep's trial is stopped by W&B's agent (SIGTERM) and by W&B in this
        # process (SIGINT); no terminal reaches it.
        handed_on = signum == signal.SIGTERM and "TORCHELASTIC_RUN_ID" in os.environ
        echoes = 1 if handed_on or signum == LAUNCHER_DIED or "WANDB_SWEEP_ID" in os.environ else 0
        self._seen[signum] += 1
        impatient = self.received is not None and self._seen[signum] > echoes + (self.received == signum)
        self.received = self.received or signum
        if impatient or not self.finish_update:
            raise Interrupted(signum)


def _signal_when_parent_dies() -> None:
    """Ask the kernel for `LAUNCHER_DIED` when the parent ends (Linux only; elsewhere nothing is sent)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, LAUNCHER_DIED)


class Deadline:
    """When to be done (`--stop-after`), counted from the start of this process; None: never."""

    def __init__(self, seconds: float | None) -> None:
        running = time.time() - psutil.Process().create_time()
        self._end = None if seconds is None else time.monotonic() + seconds - running
        self.seconds = seconds

    def within(self, seconds: float) -> bool:
        """Whether it comes in less than so many seconds."""
        return self._end is not None and time.monotonic() + seconds > self._end


def elapsed(offset: float) -> float:
    """Seconds of the run: since this leg began, plus those of the legs before."""
    return time.perf_counter() + offset
