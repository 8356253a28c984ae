"""Where the time goes from a process's start to the end of its first update."""

import time
from collections.abc import Callable

import psutil


class Phases:
    """A clock that is told when a phase is over. `seconds` has what each took, in order."""

    def __init__(self) -> None:
        """What was before, from the process's start on, is the imports."""
        self._last = time.perf_counter()
        self.seconds = {"imports": time.time() - psutil.Process().create_time()}
        self._first_update_seen = False

    def done(self, phase: str) -> None:
        """This phase, begun when the one before was over, is over now."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def until_first_update(
        self, progress: Callable[[dict], None], say: Callable[[str], None]
    ) -> Callable[[dict], None]:
        """`progress`, which is told of each update, and after the first also a line of all phases for `say`."""

        def told(record: dict) -> None:
            if not self._first_update_seen:
                self._first_update_seen = True
                self.done("first update")
                say(str(self))
            progress(record)

        return told

    def __str__(self) -> str:
        parts = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.seconds.items())
        return f"first update after {sum(self.seconds.values()):.1f} s: {parts}"
