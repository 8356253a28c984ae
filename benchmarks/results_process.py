"""An experiment's processes: started, waited for, stopped with us; and what is noted beside the run's directory."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Literal, Protocol

from benchmarks.results_file import Failure
from benchmarks.results_machine import ROOT, UNKNOWN, code_commit
from benchmarks.results_records import what_failed
from medqa.errors import Interrupted, UserError, writing
from medqa.files import write_json
from medqa.training.run_dir import RunLock

AT_LAST_S = 60.0  # that a trainer may take to save, after a signal
COMMITS = "commits.json"
Stage = Literal["training", "evaluation"]


class Process(Protocol):
    """What is used of `subprocess.Popen`."""

    def poll(self) -> int | None:
        """The exit code, None while it runs."""

    def terminate(self) -> None:
        """SIGTERM."""


Start = Callable[[Stage, list[str], int, Path], Process]


def run_stage(stage: Stage, run_dir: Path, words: list[str], processes: int, start: Start) -> Failure | None:
    """One process from start to end; what it says on stderr goes into a file in `beside(run_dir)`.

    Raises:
        Interrupted: a signal came; it was handed on, and the trainer has let go of its directory.
    """
    log = beside(run_dir) / f"{stage}.log"
    note_commit(run_dir)
    print(f"{stage} in {run_dir}; warnings and errors in {log}", flush=True)
    with _noting_signals() as received:
        process = start(stage, words, processes, log)
        told = False
        while (code := process.poll()) is None:
            if received and not told:
                process.terminate()
                told = True
            time.sleep(0.05)
        if received:
            _wait_until_free(run_dir)
            raise Interrupted(received[0])
    if code == 0:
        return None
    private = [run_dir.parent, ROOT, Path.home()]
    return what_failed(stage, code, log.read_text(encoding="utf-8", errors="replace"), private)


def start_process(stage: Stage, words: list[str], processes: int, log: Path) -> subprocess.Popen[bytes]:
    """`train.py` by `accelerate launch`, or `python -m medqa evaluate`, on so many processes."""
    if stage == "training":
        several = ["--multi_gpu", "--num_processes", str(processes)] if processes > 1 else []
        command = ["-m", "accelerate.commands.launch", "--config_file", "accelerate_config.yaml", *several, "train.py"]
    else:
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
        command = [*launcher, "-m", "medqa", "evaluate"]
    with log.open("wb") as errors:
        return subprocess.Popen([sys.executable, *command, *words], cwd=ROOT, stderr=errors)


@contextlib.contextmanager
def _noting_signals() -> Iterator[list[int]]:
    """Note the signals that stop, instead of dying of them."""
    received: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        received.append(signum)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait_until_free(run_dir: Path) -> None:
    """Return when no trainer holds the directory any more (to save, it outlives its launcher), or after a minute."""
    deadline = time.monotonic() + AT_LAST_S
    while time.monotonic() < deadline:
        try:
            return require_free(run_dir)
        except UserError:
            time.sleep(0.1)
    return None


def require_free(run_dir: Path) -> None:
    """See that no trainer is at work in a directory: one whose starter was killed goes on by itself.

    Raises:
        UserError: one is.
    """
    with RunLock(run_dir) as lock:
        lock.acquire_if_exists()


@contextlib.contextmanager
def only_one(run_dir: Path) -> Iterator[None]:
    """Hold our directory beside a run's.

    Raises:
        UserError: another `make results` holds it, or it cannot be made.
    """
    place = beside(run_dir)
    with writing(place), RunLock(place) as lock:
        place.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        yield


def noted_commits(run_dir: Path) -> list[str]:
    """The commits that have worked on a run, the first one first."""
    try:
        return [str(commit) for commit in json.loads((beside(run_dir) / COMMITS).read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return []


def note_commit(run_dir: Path) -> None:
    """Note that this code works on the run; the run's own note says `-dirty` once a result is in the README."""
    commits = [*noted_commits(run_dir), code_commit() or UNKNOWN]
    write_json(list(dict.fromkeys(commits)), beside(run_dir) / COMMITS)


def beside(run_dir: Path) -> Path:
    """Our own directory beside a run's, which holds only what runs write."""
    return run_dir.with_name(run_dir.name + ".work")
