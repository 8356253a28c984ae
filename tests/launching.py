"""Real runs as processes, for the tests: start one, wait for an update, read what it left."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = [sys.executable]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_config.yaml"]
TIMING = {"elapsed_s", "update_s", "tokens_per_s", "save_s", "peak_memory_bytes", "peak_reserved_bytes"}
SECONDS = 300  # a limit against hanging, not a measure


def torchrun(processes: int) -> list[str]:
    """`torchrun` on a free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        *PYTHON, "-m", "torch.distributed.run", "--nproc_per_node", str(processes),
        "--master_addr", "127.0.0.1", "--master_port", str(port),
    ]  # fmt: skip


def start(
    launcher: list[str], output_dir: Path, *words: str, script: Sequence[str] = ("train.py",)
) -> subprocess.Popen[str]:
    """`train.py` in a process group of its own, one thread each, without a network."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "ACCELERATE_"))}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NETRC": "/nonexistent", "PYTHONPATH": str(ROOT)}
    log = output_dir.with_name(output_dir.name + ".log").open("a")
    command = [*launcher, *script, "--cpu", "--output-dir", str(output_dir), *words]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=log, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen[str], output_dir: Path, seconds: float = SECONDS) -> int:
    """Wait for the end; the exit code. Its output is in the assertion if it takes too long."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"still running after {seconds} s:\n{output(output_dir)}") from None


def output(output_dir: Path) -> str:
    """What all processes of a run have printed."""
    return output_dir.with_name(output_dir.name + ".log").read_text()


def wait_for_update(process: subprocess.Popen[str], output_dir: Path, step: int) -> None:
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
