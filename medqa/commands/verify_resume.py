"""`medqa verify-resume` shows that a run that is killed again and again ends as the same run left alone.

Real processes, really killed (SIGKILL): while they start, in the middle of an update, in the middle of a save.
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
from medqa.training.checkpoint import TRAINING_FILE, Found, git_commit, newest_whole
from medqa.training.recorder import read_metrics
from medqa.training.run_dir import ADAPTER_DIR, clear
from medqa.training.wandb import Record

# What a clock or the machine's memory decides; everything else in a line must be the same.
CLOCK = {"elapsed_s", "update_s", "tokens_per_s", "save_s", "peak_memory_bytes", "peak_reserved_bytes"}
SETS = ("training.log_steps=1", "tracking.wandb=disabled")
POLL_S = 0.0005


class Process(Protocol):
    """What is needed of a process: `subprocess.Popen` has it."""

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""

    def kill(self) -> None:
        """SIGKILL."""

    def wait(self) -> int:
        """Its exit code, once it has one."""


Start = Callable[[list[str], Path], Process]  # the options of train.py, and the file for what it prints


@dataclass(frozen=True)
class Kill:
    """One kill: `start` (before the session's first update), `update` or `save`, and where it met the run.

    `save_torn`: a checkpoint was left half written.
    """

    moment: str
    at_step: int
    update_reached: int
    checkpoint_left: int | None
    save_torn: bool


def verify_resume(
    words: Sequence[str], directory: Path, kills: int, seed: int, start: Start, say: Callable[[str], None]
) -> dict[str, Any]:
    """Run straight, run killed, compare; the certificate.

    Args:
        words: options of `train.py` that say what to run.
        directory: where both runs and what they print are kept; runs that are there are cleared.

    Raises:
        UserError: the run itself does not work, or the directory holds what no run wrote.
    """
    straight, killed = directory / "straight", directory / "killed"
    for place in (straight, killed):
        place.mkdir(parents=True, exist_ok=True)
        clear(place)
        place.with_suffix(".log").unlink(missing_ok=True)
    say(f"straight run in {straight}")
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
            say(f"over before it could be killed in the {moment} at update {step}")
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
    """Moments to kill at, in the order of the run: what is going on, at which update, and how far into it.

    A third of them in the middle of a save, every sixth while the process starts, the others in an update.
    """
    saves = [record["step"] for record in records if "save_s" in record]
    saves = saves[:-1] or saves  # a kill after the last one would leave nothing to kill
    moments = ["save"] * max(1, kills // 3) + ["start"] * (kills // 6)
    moments = (moments + ["update"] * kills)[:kills]
    plan = [
        (moment, rng.choice(saves) if moment == "save" else rng.randint(1, max(1, len(records) - 1)), rng.random())
        for moment in moments
    ]
    return sorted(plan, key=lambda item: item[1])


def certificate(words: Sequence[str], straight: Path, killed: Path, kills: Sequence[Kill], seed: int) -> dict[str, Any]:
    """What is equal and what is not, of two finished runs."""
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
    """What a finished run has come to: sha256 of each part.

    Tensors count by type, shape and bytes, numbers by their exact value, metrics by line, without the clock's fields.
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
    """The certificate as tables."""
    kills = Table(title=f"killed {len(found['kills'])} times (seed {found['seed']})")
    for column in ("moment", "aimed at update", "update reached", "checkpoint left", "save torn"):
        kills.add_column(column)
    for kill in found["kills"]:
        kills.add_row(*("-" if value is None else str(value) for value in kill.values()))
    console.print(kills)
    table = Table(title=f"{' '.join(found['command'])}: {found['updates']} updates on {found['device']}")
    for column in ("compared", "straight run's sha256", "bit for bit"):
        table.add_column(column)
    for name, item in found["compared"].items():
        table.add_row(name, item["sha256"][:16], "equal" if item["equal"] else "DIFFERENT")
    console.print(table)


def _session(words: Sequence[str], run: Path, start: Start) -> Process:
    """One start of the run."""
    return start([*words, "--output-dir", str(run), "--set", *SETS], run.with_suffix(".log"))


def _reached(process: Process, run: Path, moment: str, step: int, wait_s: float) -> bool:
    """Wait for the moment; False where the process ends before."""
    until = time.monotonic() + wait_s
    metrics = run / "metrics.jsonl"
    before = _modified(metrics)
    # The session's first act on its directory is to clear away what the one before left, then to cut the metrics short.
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
    while moment == "save" and not _saving(run, step):  # without a pause: a save may take a few milliseconds
        if process.poll() is not None:
            return False
    time.sleep(wait_s)
    return process.poll() is None


def _modified(path: Path) -> int | None:
    """When a file was last written, None where there is none."""
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
    """The last update in the metrics file, 0 for none."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return 0
    return max((record["step"] for record in read_metrics(path) if record["split"] == "train"), default=0)


def _newest_checkpoint(run: Path) -> int | None:
    """The step of the newest whole checkpoint."""
    found = newest_whole([run])
    return None if found is None else int(found.path.name.removeprefix("checkpoint-"))


def _last(run: Path) -> Found:
    """A finished run's last checkpoint."""
    found = newest_whole([run])
    if found is None:
        raise UserError(f"{run}: no checkpoint is left of a finished run")
    return found


def _require_success(process: Process, run: Path) -> None:
    """Raise with what a failed run said last."""
    if (code := process.wait()) != 0:
        log = run.with_suffix(".log")
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.exists() else []
        raise UserError(f"the run itself ended with exit code {code}: {' '.join(lines[-3:])} ({log})")


def _state_bytes(value: Any) -> bytes:
    """A nested state as bytes that differ wherever it differs."""
    return b"\n".join(_leaves(value, ""))


def _leaves(value: Any, place: str) -> Iterator[bytes]:
    """Each leaf with its place, its type and its bytes."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in items:
            yield from _leaves(part, f"{place}/{key}")
    elif isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        yield f"{place} {value.dtype} {tuple(value.shape)} ".encode() + flat.numpy().tobytes()
    else:
        yield f"{place} {type(value).__name__} {value!r}".encode()
