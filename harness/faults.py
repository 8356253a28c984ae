"""Faults that are put into runs: damage to checkpoints, and kills at given moments."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.processes import Forked
from medqa.commands.verify_resume import verify_resume

# Few, short rows and updates: most of the time is spent in what is to be interrupted.
SHORT = (
    "training.max_steps=24", "training.save_steps=4", "training.global_batch_size=8", "evaluation.steps=6",
    "evaluation.rows=8", "evaluation.samples=0", "tokenization.max_length=64",
)  # fmt: skip


QUIET = ("--set", "training.log_steps=1", "tracking.wandb=disabled")


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "flipped": lambda path: path.write_bytes(_flipped(path.read_bytes())),
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "missing": lambda path: path.unlink(),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


def words_for(experiment: str) -> list[str]:
    """A small run of the experiment."""
    return ["--exp", experiment, "--tiny", "--cpu", "--set", *SHORT]


def kill_round(experiment: str, directory: Path, kills: int, seed: int) -> dict[str, Any]:
    """One certificate."""
    directory.mkdir(parents=True, exist_ok=True)
    Forked(["--help"], directory / "warm-up.log").wait()  # the server's imports are not part of a start
    return verify_resume(words_for(experiment), directory, kills, seed, Forked, lambda message: None)


def _flipped(content: bytes) -> bytes:
    """One bit in the middle is another."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
