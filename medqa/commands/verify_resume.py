"""`medqa verify-resume` tests that a run that is killed several times ends like an uninterrupted run.

It starts real processes and kills them with SIGKILL: during the start, during an update, during a save.
"""

import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.table import Table

from medqa.errors import UserError
from medqa.files import UNFINISHED, read_json
from medqa.recorded import NAME
from medqa.training.checkpoint import TRAINING_FILE, Found, git_commit, newest_valid
from medqa.training.recorder import read_metrics
from medqa.training.run_dir import ADAPTER_DIR, clear
from medqa.training.wandb import Record

# Fields that depend on time or on the machine's memory; everything else in a line must be equal.
CLOCK = {"elapsed_s", "update_s", "tokens_per_s", "save_s", "peak_memory_bytes", "peak_reserved_bytes"}
SETS = ("training.log_steps=1", "tracking.wandb=disabled")
POLL_S = 0.0005


class Process(Protocol):
    """A process, as in `subprocess.Popen`."""

    def poll(self) -> int | None:
        """The exit code; None while it runs."""

    def kill(self) -> None:
        """SIGKILL."""

    def wait(self) -> int:
        """Wait for the end, and return the exit code."""


Start = Callable[[list[str], Path], Process]  # options of train.py, and the file for its output


@dataclass(frozen=True)
class Kill:
    """One kill: `start` (before the session's first update), `update` or `save`, and what it left.

    `save_torn`: whether a checkpoint was left incomplete.
    """

    moment: str
    at_step: int
    update_reached: int
    checkpoint_left: int | None
    save_torn: bool


def verify_resume(
    words: Sequence[str], directory: Path, kills: int, seed: int, start: Start, say: Callable[[str], None]
) -> dict[str, Any]:
    """Run without interruption, run with kills, compare; returns the certificate.

    Args:
        words: options of `train.py` for the run.
        directory: where both runs and their output are kept; runs that are there are removed.

    Raises:
        UserError: the run itself fails, or the directory has files that no run wrote.
    """
    straight, killed = directory / "straight", directory / "killed"
    for run in (straight, killed):
        run.mkdir(parents=True, exist_ok=True)
        clear(run)
        run.with_suffix(".log").unlink(missing_ok=True)
    say(f"uninterrupted run in {straight}")
    started = time.monotonic()
    first_line = None
    process = _session(words, straight, start)
    while process.poll() is None:
        if first_line is None and _newest_update(straight):
            first_line = time.monotonic() - started
        time.sleep(0.01)
    _require_success(process, straight)

    records = [record for record in read_metrics(straight / "metrics.jsonl") if record["split"] == "train"]
    rng = random.Random(seed)
    told = []
    for moment, step, fraction in planned(records, kills, rng):
        process = _session(words, killed, start)
        during: dict[str, Any] = {"start": first_line or 1.0, "update": records[step - 1]["update_s"]}
        during["save"] = records[step - 1].get("save_s", 0.0)
        wait_s = fraction * during[moment]
        if not _reached(process, killed, moment, step, wait_s):
            _require_success(process, killed)
            say(f"the run ended before it could be killed ({moment}, update {step})")
            break
        process.kill()
        process.wait()
        left = _newest_checkpoint(killed)
        told.append(Kill(moment, step, _newest_update(killed), left, _saving(killed, 0)))
        say(f"killed ({moment}, update {step}): {told[-1].update_reached} reached, checkpoint {left}")
    process = _session(words, killed, start)
    process.wait()
    _require_success(process, killed)
    return certificate(words, straight, killed, told, seed)


def planned(records: Sequence[Record], kills: int, rng: random.Random) -> list[tuple[str, int, float]]:
    """The kills, in the order of the run: when (start, update or save), at which update, and at which fraction of it.

    A third are during a save, every sixth is during the start, the others are during an update.
    """
    saves = [record["step"] for record in records if "save_s" in record]
    saves = saves[:-1] or saves  # the run may end before a kill in the last save
    moments = ["save"] * max(1, kills // 3) + ["start"] * (kills // 6)
    moments = (moments + ["update"] * kills)[:kills]
    plan = [
        (moment, rng.choice(saves) if moment == "save" else rng.randint(1, max(1, len(records) - 1)), rng.random())
        for moment in moments
    ]
    return sorted(plan, key=lambda item: item[1])


def certificate(words: Sequence[str], straight: Path, killed: Path, kills: Sequence[Kill], seed: int) -> dict[str, Any]:
    """Compare two finished runs: what is equal and what is not."""
    ours, theirs = contents(killed), contents(straight)
    environment = _last(straight).identity.environment
    return {
        "bitwise_equal": ours == theirs,
        "compared": {name: {"equal": ours.get(name) == theirs[name], "sha256": theirs[name]} for name in theirs},
        "kills": [asdict(kill) for kill in kills],
        "seed": seed,
        "command": list(words),
        "updates": _last(straight).path.name.removeprefix("checkpoint-"),
        "device": environment.device,
        "settings": environment.settings.model_dump(),
        "versions": environment.versions,
        "git_commit": git_commit(),
    }


def contents(run: Path) -> dict[str, str]:
    """SHA-256 of each part of a finished run.

    Tensors are compared by type, shape and bytes, numbers exactly, metrics line by line without the fields of `CLOCK`.
    """
    last = _last(run).path
    state = torch.load(last / TRAINING_FILE, map_location="cpu", weights_only=True)
    records = list(read_metrics(run / "metrics.jsonl"))
    summary = read_json(run / "summary.json")
    lines = [{key: value for key, value in record.items() if key not in CLOCK} for record in records]
    order = [record["order"] for record in records if record["split"] == "train"]
    parts = {
        "final adapter": (run / ADAPTER_DIR / "adapter_model.safetensors").read_bytes(),
        "adapter in the last checkpoint": (last / "adapter_model.safetensors").read_bytes(),
        **{name: _state_bytes(state[name]) for name in ("optimizer", "scheduler", "scaler")},
        "data order": json.dumps(order).encode() + (run / "splits.csv").read_bytes(),
        "metrics, line by line": "\n".join(json.dumps(line, sort_keys=True) for line in lines).encode(),
        "before, after, test, best": json.dumps(
            [summary[key] for key in ("baseline", "final", "test", "best_step", "updates")]
        ).encode(),
    }
    return {name: hashlib.sha256(content).hexdigest() for name, content in parts.items()}


def show_certificate(console: Console, found: dict[str, Any]) -> None:
    """Print the certificate as tables."""
    kills = Table(title=f"killed {len(found['kills'])} times (seed {found['seed']})")
    for column in ("moment", "planned update", "update reached", "checkpoint left", "incomplete save"):
        kills.add_column(column)
    for kill in found["kills"]:
        kills.add_row(*("-" if value is None else str(value) for value in kill.values()))
    console.print(kills)
    table = Table(title=f"{' '.join(found['command'])}: {found['updates']} updates on {found['device']}")
    for column in ("compared", "sha256 of the uninterrupted run", "bit for bit"):
        table.add_column(column)
    for name, item in found["compared"].items():
        table.add_row(name, item["sha256"][:16], "equal" if item["equal"] else "DIFFERENT")
    console.print(table)


def _session(words: Sequence[str], run: Path, start: Start) -> Process:
    """Start a session of the run."""
    return start([*words, "--output-dir", str(run), "--set", *SETS], run.with_suffix(".log"))


def _reached(process: Process, run: Path, moment: str, step: int, wait_s: float) -> bool:
    """Wait for the moment of a kill; False if the process ends before."""
    until = time.monotonic() + wait_s
    metrics = run / "metrics.jsonl"
    before = _modified(metrics)
    # A session first removes what the previous one left in the directory, then truncates the metrics.
    while _modified(metrics) == before and (moment != "start" or time.monotonic() < until):
        if process.poll() is not None:
            return False
        time.sleep(POLL_S)
    if moment == "start":
        return process.poll() is None
    while _newest_update(run) < step - (moment == "save"):
        if process.poll() is not None:
            return False
        time.sleep(POLL_S)
    while moment == "save" and not _saving(run, step):  # without a pause, because a save may take a few milliseconds
        if process.poll() is not None:
            return False
    time.sleep(wait_s)
    return process.poll() is None


def _modified(path: Path) -> int | None:
    """When a file was last written; None if it does not exist."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _saving(run: Path, step: int) -> bool:
    """Whether a checkpoint of this update or a later one is being written."""
    for entry in os.scandir(run):
        if entry.name.endswith(UNFINISHED) and (match := NAME.fullmatch(entry.name.removesuffix(UNFINISHED))):
            return int(match[1]) >= step
    return False


def _newest_update(run: Path) -> int:
    """The last update in the metrics file; 0 if there is none."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return 0
    return max((record["step"] for record in read_metrics(path) if record["split"] == "train"), default=0)


def _newest_checkpoint(run: Path) -> int | None:
    """The step of the newest valid checkpoint."""
    found = newest_valid([run])
    return None if found is None else int(found.path.name.removeprefix("checkpoint-"))


def _last(run: Path) -> Found:
    """The last checkpoint of a finished run."""
    found = newest_valid([run])
    if found is None:
        raise UserError(f"{run}: the finished run has no checkpoint")
    return found


def _require_success(process: Process, run: Path) -> None:
    """Raise an error with the last lines of a failed run."""
    if (code := process.wait()) != 0:
        log = run.with_suffix(".log")
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.exists() else []
        raise UserError(f"the run itself failed with exit code {code}: {' '.join(lines[-3:])} ({log})")


def _state_bytes(value: Any) -> bytes:
    """A nested state as bytes, which are different for different states."""
    return b"\n".join(_leaves(value, ""))


def _leaves(value: Any, path: str) -> Iterator[bytes]:
    """Each leaf with its path, its type and its bytes."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in items:
            yield from _leaves(part, f"{path}/{key}")
    elif isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        yield f"{path} {value.dtype} {tuple(value.shape)} ".encode() + flat.numpy().tobytes()
    else:
        yield f"{path} {type(value).__name__} {value!r}".encode()
