"""What W&B is told, from a thread of its own: each step once over all legs, and no failure there holds training up.

W&B is a convenience: `metrics.jsonl` is the truth, and every leg of a run can be told from it again. While its server
is away W&B keeps everything on disk; what can fail in mid-run is its service process, which takes every call, and what
asks the server first (tables, artifacts). The end is bounded here: W&B would wait without end for a service that hangs.
"""

import atexit
import contextlib
import glob
import importlib
import queue
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

FINISH_SECONDS = 30  # for all that is still to be sent when the run ends
UPLOAD_SHARE = 0.8  # of it are for uploads: then W&B stops by itself, in good order
TEARDOWN_SECONDS = 5  # more, after a failure, to part from the service process
MOST_WAITING = 10_000  # calls; a service process that hangs must not fill the memory
SUPERSEDED = "superseded"


class WandbFeed:
    """Passes values on to the W&B run, on the main process, if there is one.

    `first` is the first step that W&B does not know yet from a leg before this one.
    """

    def __init__(self, accelerator: Accelerator, say: Callable[[str], None]) -> None:
        self._accelerator, self._say = accelerator, say
        self.first = 0
        self._failed = False
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._parting = threading.Event()
        self._run: Any = None
        if accelerator.trackers:
            import wandb

            self._run = accelerator.get_tracker("wandb", unwrap=True)
            # Both from the start: from an exit hook Python 3.12 starts no thread any more.
            self._worker = threading.Thread(target=self._work, name="W&B feed", daemon=True)
            self._parter = threading.Thread(target=self._part, name="W&B parting", daemon=True)
            self._worker.start()
            self._parter.start()
            wandb.termsetup(wandb.setup().settings, self)  # W&B is silenced; what it would warn of comes here
            atexit.register(self._close)  # for a run that ends early; it comes before W&B's own hook

    def begin(self, told: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
        """Bring a leg of a run that began earlier up to date: steps that are not at W&B yet are told again.

        An offline leg is told everything, so that it alone is to be sent; those before it are moved aside. Where legs
        before it were online or have been sent, it is told only what comes now: sending appends to what is there.

        Args:
            told: step and values of what the legs before recorded.
        """
        if self._run is None:
            return
        here = Path(self._run.dir).parent
        earlier = [
            path for path in here.parent.glob(f"*run-*-{glob.escape(self._run.id)}") if path.is_dir() and path != here
        ]
        offline = [path for path in earlier if path.name.startswith("offline-") and not any(path.glob("*.synced"))]
        told = list(told)
        if self._run.resumed:  # the server says what it has
            self.first = self._run.starting_step
        elif here.name.startswith("offline-") and len(earlier) > len(offline):
            self.first = max((step for step, _ in told), default=-1) + 1
        for step, values in told:
            if step >= self.first:
                self.log(values, step)
        for path in offline:
            (here.parent / SUPERSEDED).mkdir(exist_ok=True)
            shutil.move(path, here.parent / SUPERSEDED / path.name)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Tell W&B of a step, unless an earlier leg has."""
        closing = step == self.first - 1 and "train/loss" not in values  # came after that leg's last update
        if step >= self.first or closing:
            self.attempt(partial(self._log, dict(values), step))

    def attempt(self, telling: Callable[[], Any], asks: bool = False) -> None:
        """Have the thread do something with W&B; what fails is said once. What `asks` the server waits for it."""
        if self._run is None:
            return
        if self._calls.qsize() < MOST_WAITING:
            self._calls.put(partial(self._try, telling, asks))
        else:
            self.warning("its service process takes nothing any more")

    def finish(self) -> None:
        """Have W&B send what is left, for a bounded time, and end the run."""
        if self._run is not None:
            self._close()
            atexit.unregister(self._close)
            self._accelerator.trackers.clear()

    def info(self, message: str) -> None:
        """What W&B would print and nobody needs."""

    def warning(self, message: str) -> None:
        """Say, once, that W&B does not get everything."""
        first, self._failed = not self._failed, True
        if first:
            why = " ".join(message.split()).removeprefix("wandb: WARNING ")[:200]
            online = "" if self._run.offline else "--include-online "  # else it passes over what was begun online
            self._say(
                f"W&B: {why} (training goes on; metrics.jsonl has everything, and `wandb sync {online}"
                f"{Path(self._run.dir).parent}` may send it later)"
            )

    error = warning

    def _work(self) -> None:
        while call := self._calls.get():
            call()

    def _try(self, call: Callable[[], Any], asks: bool = False) -> None:
        """Make a call; one that failed ends nothing, as later ones may reach W&B, or at least its files."""
        if asks and self._failed:
            return
        try:
            call()
        except failures() as error:
            self.warning(f"{type(error).__name__}: {error}")

    def _log(self, values: dict[str, Any], step: int) -> None:
        """Log; closing figures that are at W&B already, the same to the last bit, are not told again."""
        summary = self._run.summary if step < self.first else {}
        known = [summary.get(key) == value for key, value in values.items() if key.endswith("/loss")]
        if not known or not all(known):
            self._accelerator.log(values, step=max(step, self.first))

    def _close(self) -> None:
        """Finish in the thread; part from W&B where that fails."""
        trackers = list(self._accelerator.trackers)
        self._calls.put(partial(self._try, lambda: [tracker.finish() for tracker in trackers]))
        self._calls.put(None)
        self._worker.join(FINISH_SECONDS)
        if self._worker.is_alive():
            self.warning(f"not finished in {FINISH_SECONDS} s")
        if self._failed:
            self._parting.set()
            self._parter.join(TEARDOWN_SECONDS)

    def _part(self) -> None:
        """After a failure: W&B's hook at exit would wait for its service process, or show a traceback.

        To tear down takes that hook away first of all; should the rest of it hang, then only this thread.
        """
        import wandb

        self._parting.wait()
        with contextlib.suppress(SystemExit):  # which it raises where the service process was killed
            self._try(wandb.teardown)


# Exceptions of W&B that it does not name in public: one that a version does not have is left out.
PRIVATE = (
    "wandb.sdk.lib.asyncio_manager:AlreadyJoinedError",
    "wandb.sdk.lib.asyncio_manager:RunCancelledError",
    "wandb.sdk.lib.service.service_connection:WandbApiFailedError",
    "wandb.sdk.lib.service.service_token:WandbServiceConnectionError",
    "wandb.sdk.mailbox.mailbox:MailboxClosedError",  # the service process has gone ...
    "wandb.sdk.mailbox.mailbox_handle:HandleAbandonedError",  # ... and did while it was waited for
    "wandb.sdk.mailbox.mailbox_handle:ServerResponseError",
)


def failures() -> tuple[type[Exception], ...]:
    """What W&B raises where its server, its service process or its files fail."""
    import wandb

    private = []
    for place in PRIVATE:
        module, name = place.split(":")
        with contextlib.suppress(ImportError, AttributeError):
            private.append(getattr(importlib.import_module(module), name))
    return (
        wandb.errors.Error,  # refused credentials, among others
        *private,
        OSError,  # lost connections and timeouts, both to the service process; no space for W&B's files
        ValueError,  # an answer that makes no sense, of a proxy for example
    )
