"""The parent's side: one process per arm, of which at most one works at a time."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gate import Job

ROOT = Path(__file__).parents[1]


class ArmFailed(Exception):
    """A process ended or answered nothing; the message has the end of its log."""


def environment(device: str) -> dict[str, str]:
    """What all processes run under: one thread, no network, no progress bars."""
    own = {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "WANDB_MODE": "disabled",
    }
    if device == "cpu":
        own["CUDA_VISIBLE_DEVICES"] = ""
    return {**os.environ, **own}


class Arm:
    """A process that does updates when asked."""

    def __init__(self, job: Job, scratch: Path) -> None:
        """Start it, and wait for its first update.

        Raises:
            ArmFailed: it did not come to that.
        """
        self.name = job.arm
        self._log = scratch / f"{job.arm}.log"
        path = job.write(scratch / f"{job.arm}.json")
        began = time.perf_counter()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker", str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env=environment(job.device),
            )
        self.first = self._answer() | {"wall_s": time.perf_counter() - began}

    def round(self, updates: int) -> dict[str, Any]:
        """Do so many updates; what they took."""
        try:
            self._process.stdin.write(f"{updates}\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise ArmFailed(self._end()) from error
        return self._answer()

    def stop(self) -> None:
        """Let it end: it does when its input does."""
        if not self._process.stdin.closed:
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise ArmFailed(self._end())
        return json.loads(line)

    def _end(self) -> str:
        """How it ended."""
        self.stop()
        lines = self._log.read_text(errors="replace").splitlines()
        return f"{self.name}: exit code {self._process.returncode}: " + "\n".join(lines[-15:])


def check_gradients(jobs: Mapping[str, Job], scratch: Path) -> dict[str, dict[str, float]]:
    """`gradient_check.compare` in a process of its own.

    Raises:
        ArmFailed: an arm's update is not Trainer's, or the check itself failed.
    """
    paths = [str(job.write(scratch / f"check-{arm}.json")) for arm, job in jobs.items()]
    return _result("benchmarks.gradient_check", paths, "cpu")


def profile(job: Job, scratch: Path) -> dict[str, Any]:
    """`profile_ops.profile` in a process of its own."""
    return _result("benchmarks.profile_ops", [str(job.write(scratch / "profile.json"))], job.device)


def _result(module: str, arguments: list[str], device: str) -> dict[str, Any]:
    """The last line that a module prints, as JSON."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(device),
        check=False,
    )
    if done.returncode != 0:
        raise ArmFailed(f"{module}: exit code {done.returncode}: " + "\n".join(done.stderr.splitlines()[-15:]))
    return json.loads(done.stdout.splitlines()[-1])
