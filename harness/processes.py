"""Runs in forked processes that have imported the libraries already."""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path

TRAIN = Path(__file__).resolve().parents[1] / "train.py"


class Forked:
    """A process with `train.py`'s main, or another script's, forked from a server that has imported everything.

    It has `Popen`'s methods, but for `wait`, which returns None when its time is over.
    """

    def __init__(
        self,
        words: list[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        script: Path = TRAIN,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["train"])
        self._process = context.Process(target=_train, args=(words, log, dict(environment or {}), script))
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        return self._process.exitcode

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()

    def send_signal(self, number: int) -> None:
        """A signal, to a process that has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int | None:
        """The exit code, once it has one."""
        self._process.join(timeout)
        return self._process.exitcode


def _train(words: list[str], log: Path, environment: dict[str, str], script: Path) -> None:
    """The child: what it prints goes into the log."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "ACCELERATE_"))]:
        del os.environ[name]  # among them the address of a W&B service of the process that began this
    os.environ |= environment
    with log.open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.argv = [str(script), *words]
    runpy.run_path(str(script), run_name="__main__")
