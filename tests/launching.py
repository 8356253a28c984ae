"""Real runs as processes, for the tests: start one, wait for an update, read what it left."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.processes import TRAIN, Forked

ROOT = Path(__file__).resolve().parent.parent
PYTHON = [sys.executable]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_config.yaml"]
TIMING = {"elapsed_s", "update_s", "tokens_per_s", "save_s", "peak_memory_bytes", "peak_reserved_bytes"}
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NETRC": "/nonexistent"}
SECONDS = 300  # a limit against hanging, not a measure

# train.py, but for the third update of the second process: a loss that is not finite, no memory, dead, or hanging.
FAULTY = """
import os, signal, sys
import torch
import medqa.training.loop as loop
import train

step, calls = loop.train_step, []

def faulty(model, *arguments, **more):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 3:
        if sys.argv[1] == "full":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if sys.argv[1] == "bad":
            with torch.no_grad():
                next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(float("nan"))
        else:
            os.kill(os.getpid(), signal.SIGKILL if sys.argv[1] == "dead" else signal.SIGSTOP)
    return step(model, *arguments, **more)

loop.train_step = faulty
sys.exit(train.main(sys.argv[2:]))
"""


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun(processes: int) -> list[str]:
    """`torchrun` on a free port of this machine."""
    return [
        *PYTHON, "-m", "torch.distributed.run", "--nproc_per_node", str(processes),
        "--master_addr", "127.0.0.1", "--master_port", str(free_port()),
    ]  # fmt: skip


def start(
    launcher: list[str], output_dir: Path, *words: str, script: Sequence[str] = ("train.py",)
) -> subprocess.Popen[str]:
    """`train.py` by a launcher, in a process group of its own, one thread each, without a network."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "ACCELERATE_"))}
    environment |= QUIET | {"PYTHONPATH": str(ROOT)}
    log = log_of(output_dir).open("a")
    command = [*launcher, *script, "--cpu", "--output-dir", str(output_dir), *words]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=log, text=True, start_new_session=True
    )


class Group:
    """A run on so many processes, forked (no imports to wait for), as a launcher would start them."""

    def __init__(
        self, output_dir: Path, *words: str, processes: int = 1, script: Path = TRAIN, leading: Sequence[str] = ()
    ) -> None:
        command = [*leading, "--cpu", "--output-dir", str(output_dir), *words]
        self._start(log_of(output_dir), command, processes, script, {})

    @classmethod
    def of(cls, output_dir: Path, words: Sequence[str], processes: int, script: Path, **environment: str) -> "Group":
        """Another script than `train.py`, with these words; what it prints goes where a run's output does."""
        group = cls.__new__(cls)
        group._start(log_of(output_dir), list(words), processes, script, environment)
        return group

    def _start(self, log: Path, words: list[str], processes: int, script: Path, environment: Mapping[str, str]) -> None:
        self._log = log
        self._log.touch()
        together = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.processes = []
        for rank in map(str, range(processes)):
            ranked = together | {"RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {}
            self.processes.append(Forked(words, self._log, QUIET | ranked | environment, script))

    def poll(self) -> int | None:
        """None while all run; then the exit code of one that has ended, of one that failed if there is one."""
        codes = [process.poll() for process in self.processes]
        return next((code for code in codes if code), None if None in codes else 0)

    def send_signal(self, number: int) -> None:
        """To each of them."""
        for process in self.processes:
            process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL to each of them."""
        self.send_signal(signal.SIGKILL)

    def wait(self, seconds: float | None = None) -> int:
        """The exit code, once all have ended; raises as `Popen.wait` does."""
        for process in self.processes:
            if process.wait(seconds) is None:
                raise subprocess.TimeoutExpired(str(self._log), seconds or 0)
        return self.poll() or 0


def finish(process: subprocess.Popen[str] | Group, output_dir: Path, seconds: float = SECONDS) -> int:
    """Wait for the end; the exit code. Its output is in the assertion if it takes too long."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill() if isinstance(process, Group) else os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"still running after {seconds} s:\n{output(output_dir)}") from None


def on_two_hosts(first: tuple[Path, Sequence[str]], second: tuple[Path, Sequence[str]]) -> list[int | None]:
    """A process each with an output directory and words of its own, which do not see the same files; exit codes."""
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "LOCAL_RANK": "0"}
    processes = [
        Forked(["--cpu", "--output-dir", str(directory), *words], log_of(directory), QUIET | together | {"RANK": rank})
        for rank, (directory, words) in (("0", first), ("1", second))
    ]
    return [process.wait(SECONDS) for process in processes]


def stop_after(process: subprocess.Popen[str] | Group, output_dir: Path, step: int) -> None:
    """Ask for the end once the update stands in `metrics.jsonl`, and see that the run ends as asked."""
    wait_for_update(process, output_dir, step)
    process.send_signal(signal.SIGTERM)
    assert finish(process, output_dir) == 128 + signal.SIGTERM, output(output_dir)
    wait_until_gone(output_dir)


def log_of(output_dir: Path) -> Path:
    """Where what a run prints goes."""
    return output_dir.with_name(output_dir.name + ".log")


def output(output_dir: Path) -> str:
    """What all processes of a run have printed."""
    return log_of(output_dir).read_text()


def wait_for_update(process: subprocess.Popen[str] | Group, output_dir: Path, step: int) -> None:
    """Return as soon as the update stands in `metrics.jsonl`."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if any(record["split"] == "train" and record["step"] >= step for record in metrics(output_dir)):
            return
        assert process.poll() is None, output(output_dir)
        time.sleep(0.02)
    raise AssertionError(f"no update {step}:\n{output(output_dir)}")


def metrics(output_dir: Path) -> list[dict]:
    """The whole lines of `metrics.jsonl`."""
    path = output_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def figures(output_dir: Path) -> list[dict]:
    """The metrics without what a clock or the machine decides."""
    return [{key: value for key, value in record.items() if key not in TIMING} for record in metrics(output_dir)]


def summary(output_dir: Path) -> dict:
    """`summary.json`."""
    return json.loads((output_dir / "summary.json").read_text())


def wait_until_gone(output_dir: Path) -> None:
    """Return when no process works on this directory any more (a trainer whose launcher is dead has no one to wait)."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        commands = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                commands.append(path.read_bytes())
            except OSError:  # it ended in between
                continue
        if not any(str(output_dir).encode() in command for command in commands):
            return
        time.sleep(0.1)
    raise AssertionError(f"a trainer was left behind:\n{output(output_dir)}")
