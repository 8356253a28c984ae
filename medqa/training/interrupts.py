"""Signals: outside training they end the run at once, inside it the update is finished and saved first.

Under `accelerate launch` the trainer is a child that outlives a killed launcher; here it learns of the launcher's death
by a signal of its own (SIGUSR1), which must not count as the second, impatient one after a Ctrl-C that both received.
"""

import ctypes
import os
import signal
import sys
from types import FrameType, TracebackType

from medqa.errors import LAUNCHER_DIED, Interrupted

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, LAUNCHER_DIED)
PR_SET_PDEATHSIG = 1  # prctl(2)


class Interrupts:
    """Holds the stopping signals while a run is on. `received` is the one to stop for, None while there is none."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.finish_update = False  # set by the loop: note the signal instead of raising
        self._previous: dict[int, signal.Handlers | object] = {}

    def __enter__(self) -> "Interrupts":
        if os.environ.get("ACCELERATE_MIXED_PRECISION") is not None:  # set by accelerate launch, and by nothing else
            _signal_when_parent_dies()
        self._previous = {number: signal.signal(number, self._handle) for number in STOPPING}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if not self.finish_update or signum == self.received:
            raise Interrupted(signum)
        if self.received is None:
            self.received = signum


def _signal_when_parent_dies() -> None:
    """Ask the kernel for `LAUNCHER_DIED` when the parent ends (Linux only; elsewhere nothing is sent)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, LAUNCHER_DIED)
