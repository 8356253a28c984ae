"""What W&B is told, and that nothing of it holds training up: each step once over all legs, one warning if it fails.

W&B is a convenience: `metrics.jsonl` is the truth, and every leg of a run can be told from it again.
"""

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

SUPERSEDED = "superseded"


class WandbFeed:
    """Passes values on to the W&B run, on the main process, as long as there is one that works.

    `first` is the first step that W&B does not know yet from a leg before this one.
    """

    def __init__(self, accelerator: Accelerator, say: Callable[[str], None]) -> None:
        self._accelerator = accelerator
        self._say = say
        self._warned = False
        self.first = 0
        if accelerator.trackers:
            import wandb

            # W&B is silenced; what it would warn of comes here instead.
            wandb.termsetup(wandb.setup().settings, self)

    def begin(self, run_id: str, told: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
        """Bring a leg of a run that began earlier up to date: steps that are not at W&B yet are told again.

        An offline leg is told everything, so that it alone is to be sent; those before it are moved aside. Where legs
        before it were online or have been sent, it is told only what comes now: sending appends to what is there.

        Args:
            told: step and values of what the legs before recorded.
        """
        if not self._accelerator.trackers:
            return
        run = self._accelerator.get_tracker("wandb", unwrap=True)
        here = Path(run.dir).parent
        earlier = [path for path in here.parent.glob(f"*run-*-{run_id}") if path.is_dir() and path != here]
        offline = [path for path in earlier if path.name.startswith("offline-") and not any(path.glob("*.synced"))]
        told = list(told)
        if run.resumed:  # the server says what it has
            self.first = run.starting_step
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
        if step >= self.first or (closing and not self._knows(values)):
            self.attempt(lambda: self._accelerator.log(dict(values), step=max(step, self.first)))

    def attempt(self, telling: Callable[[], Any]) -> None:
        """Do something with W&B; if it fails, that is said once, and nothing more is tried."""
        if not self._accelerator.trackers:
            return
        try:
            telling()
        except failures() as error:
            self._accelerator.trackers.clear()
            self.warning(f"{type(error).__name__}: {error}")
            _tear_down()

    def finish(self) -> None:
        """Have W&B send what it has left, for a bounded time (`wandb_run.FINISH_SECONDS`)."""
        self.attempt(lambda: [tracker.finish() for tracker in self._accelerator.trackers])
        self._accelerator.trackers.clear()

    def info(self, message: str) -> None:
        """What W&B would print and nobody needs."""

    def warning(self, message: str) -> None:
        """Say, once, that W&B does not get everything."""
        if not self._warned:
            self._warned = True
            why = " ".join(message.split()).removeprefix("wandb: WARNING ")[:200]
            self._say(
                f"W&B: {why} (training goes on; metrics.jsonl has everything, and `wandb sync` may send the run's "
                "directory under wandb/ later)"
            )

    error = warning

    def _knows(self, values: Mapping[str, Any]) -> bool:
        """Whether W&B has these closing figures already: they are the same to the last bit."""
        summary = self._accelerator.get_tracker("wandb", unwrap=True).summary
        return all(summary.get(key) == value for key, value in values.items() if key.endswith("/loss"))


def failures() -> tuple[type[Exception], ...]:
    """What W&B raises when its server or its own service process fails."""
    import wandb
    from wandb.sdk.lib.service.service_token import WandbServiceConnectionError
    from wandb.sdk.mailbox.mailbox import MailboxClosedError
    from wandb.sdk.mailbox.mailbox_handle import HandleAbandonedError, ServerResponseError

    return (
        wandb.errors.Error,
        ConnectionError,
        TimeoutError,
        ValueError,  # an answer that makes no sense, of a proxy say
        HandleAbandonedError,
        MailboxClosedError,
        ServerResponseError,
        WandbServiceConnectionError,
    )


def _tear_down() -> None:
    """Let go of a service that does not answer; else W&B does at exit, with a traceback."""
    import wandb

    try:
        wandb.teardown()
    except failures():
        return
