"""Checkpoints: all that an exact resume needs, without the base. A checkpoint is complete or ignored.

A checkpoint is written beside its place, flushed to disk, renamed into it and read back. Its manifest decides whether
it is whole, and says of which experiment, data, tokenizer and base model it is. No random state is kept: order and
noise follow from the step.
"""

import contextlib
import copy
import errno
import hashlib
import io
import json
import math
import os
import pickle
import platform
import re
import secrets
import struct
import subprocess
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import save

from medqa.errors import NotWritten, UserError
from medqa.files import UNFINISHED, Damaged, checksum, copy_file, flush, open_regular, parse_json, read_file
from medqa.limits import MAX_CHECKPOINT_FILE_BYTES, MAX_JSON_BYTES, MAX_SHOWN
from medqa.model.adapter_files import ADAPTER_FILES
from medqa.model.attention import SEGMENTED, VARLEN
from medqa.model.base import adapter_weights, load_adapter_weights
from medqa.model.settings import Part, SavedSettings, Settings
from medqa.model.sharding import is_sharded
from medqa.recorded import FORMAT, MANIFEST, NAME, checkpoints, read_manifest, step_of
from medqa.training.distributed import on_main
from medqa.training.state import PROGRESS, Progress, TrainState
from medqa.variables import recorded_variables

# ----------------------------------------------------------------------------------------------------
# What a run's numbers depend on besides experiment and data: the settings in effect, the machine, the libraries.
#
# A checkpoint keeps it. A run that goes on keeps the settings; where it cannot, or where the machine is of another
# kind, it says so, and is marked as not bit for bit the same from there on.

PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "tokenizers", "datasets")
COMPUTING = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")  # of them, those that move numbers


class Environment(Part):
    """The settings and the machine. `cpu_threads` is None on a GPU; those with a default are not in older checkpoints.

    `variables` are those of the environment that choose among kernels (`medqa/variables.py`); None: not recorded.
    """

    settings: SavedSettings
    device: str
    processes: int
    cpu_threads: int | None
    versions: dict[str, str]
    sharded: bool = False
    variables: dict[str, str] | None = None


def environment(accelerator: Accelerator, settings: Settings, model: PeftModel) -> Environment:
    """What is in effect in this process."""
    device = accelerator.device
    on_gpu = device.type == "cuda"
    return Environment(
        settings=SavedSettings.model_validate(
            {
                "mixed_precision": settings.mixed_precision,
                "dtype": settings.dtype_name,
                "quantization": settings.quantization,
                "attn_implementation": _attention(model.config._attn_implementation),
                "padding_free": settings.padding_free,
                "gradient_checkpointing": settings.gradient_checkpointing,
                "dequantize": settings.dequantize and settings.quantization == "4bit",
            }
        ),
        device=torch.cuda.get_device_name(device) if on_gpu else f"cpu {torch.backends.cpu.get_cpu_capability()}",
        processes=accelerator.num_processes,
        cpu_threads=None if on_gpu else torch.get_num_threads(),
        versions=versions(),
        sharded=is_sharded(model),
        variables=recorded_variables(),
    )


def _attention(implementation: str) -> str:
    """The attention kernel. Without padding a GPU may have one that does all segments, to other last digits."""
    return f"{implementation}, varlen" if implementation == SEGMENTED and VARLEN else implementation


def changes(before: Environment, now: Environment) -> list[str]:
    """What differs between two environments so that results may differ in their last digits."""
    compared = None not in (before.variables, now.variables)
    names = sorted({*(before.variables or {}), *(now.variables or {})}) if compared else []
    was, is_now = (
        {
            **env.settings.model_dump(),
            "device": env.device,
            "processes": env.processes,
            "CPU threads": env.cpu_threads,
            "sharded weights": env.sharded,
            **{name: env.versions.get(name) for name in COMPUTING},
            **{name: (env.variables or {}).get(name, "not set") for name in names},
        }
        for env in (before, now)
    )
    return [f"{key} {was[key]} before, {value} now" for key, value in is_now.items() if was[key] != value]


def versions() -> dict[str, str]:
    """Versions of Python and of what computes; a package that is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of this code (`-dirty` with changes), None where it is not a git checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


# ----------------------------------------------------------------------------------------------------
# A directory's manifest: what must be in it for it to be whole, with a checksum of its own.
#
# Whatever wrote a directory (this process, a copy to a network share, a download), the manifest alone decides whether
# it is whole. It is JSON, and the files that it names are fixed by the reader, never by the file.


def write_manifest(directory: Path, about: Mapping[str, Any]) -> None:
    """Write the manifest over all files in `directory`, with what it says `about` them.

    Raises:
        OSError: a file cannot be read or written.
    """
    body = {"format": FORMAT, **about, "files": {path.name: measure(path) for path in sorted(directory.iterdir())}}
    body["checksum"] = checksum(body)
    (directory / MANIFEST).write_text(json.dumps(body, indent=1, allow_nan=False), encoding="utf-8")


def verify(directory: Path, expected: Iterable[str]) -> dict[str, Any]:
    """The manifest of a directory whose files are all as it says.

    Args:
        expected: the names that the manifest must list, no more and no fewer.

    Raises:
        Damaged: with the reason.
    """
    body = read_manifest(directory)
    files = body["files"]
    if not isinstance(files, dict) or files.keys() != set(expected):
        raise Damaged(f"{MANIFEST} is of another version: it lists other files")
    for name, said in files.items():
        try:
            with open_regular(directory / name) as file:
                size = os.fstat(file.fileno()).st_size
                if not isinstance(said, dict) or size != said.get("size"):
                    raise Damaged(f"{name} has {size:,} bytes, not those of {MANIFEST}")
                if size > MAX_CHECKPOINT_FILE_BYTES:  # a file with holes can seem to be of any size
                    raise Damaged(f"{name} has {size:,} bytes, more than any checkpoint's")
                if hashlib.file_digest(file, "sha256").hexdigest() != said.get("sha256"):
                    raise Damaged(f"{name}: its sha256 is not that of {MANIFEST}")
        except OSError as error:
            raise Damaged(f"{name}: {error.strerror}") from error
    return body


def measure(path: Path) -> dict[str, Any]:
    """Size in bytes and sha256 of a file.

    Raises:
        OSError: it cannot be read, or is no regular file (opening a pipe would never end).
    """
    with open_regular(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"size": file.tell(), "sha256": digest}


# ----------------------------------------------------------------------------------------------------
# The directories of checkpoints: which there are, which may go, and how one comes into its place.
#
# Nothing here removes or writes through a link, or removes what a run did not write.

# A checkpoint that is being written, or what is left of one that was being removed.
LEFTOVER = re.compile(rf"{NAME.pattern}(\.[0-9a-f]{{8}})?{re.escape(UNFINISHED)}")
# What a network file system calls a removed file that a process still has open. It removes the file later by itself.
STILL_OPEN = ".nfs"
TRAINING_FILE = "training_state.pt"
STATE_FILE = "state.json"
CONTENT = (*ADAPTER_FILES, TRAINING_FILE, STATE_FILE)
CHECKPOINT_FILES = {*CONTENT, MANIFEST}


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint that is whole and under its own name.

    Raises:
        Damaged: with the reason.
    """
    body = verify(path, CONTENT)
    if _is_renamed(path, body):
        raise Damaged(
            f"{MANIFEST} says that it is of another update than its name: the directory was renamed or copied"
        )
    return body


def prune(output_dir: Path, keep: int, needed: set[int]) -> list[str]:
    """Remove all but the newest `keep` whole checkpoints and those at the steps `needed`.

    Damaged ones older than the newest go too. Only directories that hold nothing but a checkpoint's own files are
    removed: never a link, never one that somebody put something into, and never one that somebody has renamed.

    Returns:
        Why any could not be removed, as sentences: for each reason the oldest of which it holds, so that what is not
        new is the same sentence again.
    """
    found = checkpoints(output_dir)
    whole = [path for path in found if seems_whole(path)]
    kept = {*whole[-keep:], *(path for path in found if step_of(path) in needed)}
    old = [path for path in found[: found.index(whole[-1])] if path not in kept] if whole else []
    old = [*unfinished(output_dir), *(path for path in old if is_ours(path) and not _is_renamed(path))]
    stay: dict[str, str] = {}
    for path in sorted(old, key=lambda path: int(path.name.removeprefix("checkpoint-").split(".")[0])):
        try:
            remove(path)
        except OSError as error:
            stay.setdefault(str(error.strerror), _why_it_stays(output_dir, error))
    return list(stay.values())


def _why_it_stays(output_dir: Path, error: OSError) -> str:
    """What is told of an old checkpoint that could not be removed, by the error that `remove` raised."""
    file = Path(str(error.filename))
    place = file if file.parent == output_dir else file.parent
    name = f"checkpoint-{int(found[1])}" if (found := LEFTOVER.fullmatch(place.name)) else place.name
    what = "" if file == place else f"{file.name}: "
    stays = "it stays" if name == place.name else f"what is left of it stays, as {place.name}"
    return (
        f"{output_dir}: the old {name} cannot be removed ({what}{error.strerror}); {stays}; the same is not said again "
        "of others"
    )


def is_ours(path: Path) -> bool:
    """Whether it is a directory, not a link to one, that holds regular files of a checkpoint's names alone."""
    try:
        return (
            path.is_dir()
            and not path.is_symlink()
            and all(
                (entry.name in CHECKPOINT_FILES or entry.name.startswith(STILL_OPEN))
                and entry.is_file(follow_symlinks=False)
                for entry in os.scandir(path)
            )
        )
    except OSError:  # it cannot be listed, or has just gone
        return False


def remove(path: Path) -> None:
    """Remove a checkpoint's directory, one for which `is_ours` holds.

    The manifest goes first. What a kill, or an error after that, leaves is a leftover by its name: it is never taken
    for a checkpoint, and `unfinished` finds it.

    Raises:
        OSError: it cannot be removed, or not entirely: of the first file that could not be. Where that is the manifest,
            all of it is still there.
    """
    (path / MANIFEST).unlink(missing_ok=True)
    if NAME.fullmatch(path.name):
        path = path.rename(path.with_name(f"{path.name}.{secrets.token_hex(4)}{UNFINISHED}"))
    refused: list[OSError] = []
    for name in sorted(os.listdir(path)):
        try:
            os.unlink(path / name)
        except OSError as error:
            refused.append(error)
    try:
        path.rmdir()
    except OSError as error:
        left = sorted(os.listdir(path))
        if left and all(name.startswith(STILL_OPEN) for name in left):
            raise OSError(errno.EBUSY, "still open in another process", str(path / left[0])) from error
        raise (refused or [error])[0] from error


def unfinished(output_dir: Path) -> Iterator[Path]:
    """What a killed save or removal has left behind."""
    for path in output_dir.glob(f"checkpoint-*{UNFINISHED}"):
        if LEFTOVER.fullmatch(path.name) and is_ours(path):
            yield path


def remove_unfinished(output_dir: Path) -> None:
    """Remove what killed saves and removals have left behind. What cannot be removed is in nobody's way, and stays."""
    for path in unfinished(output_dir):
        with contextlib.suppress(OSError):
            remove(path)


def put_in_place(beside: Path, place: Path) -> None:
    """Rename a checkpoint that is whole into its place.

    Raises:
        OSError: it cannot be, or the place is a link.
    """
    make_way(place)
    beside.rename(place)
    flush(place.parent)


def copy_checkpoint(source: Path, target: Path) -> None:
    """Copy a whole checkpoint, verify what is read back, and put it in place.

    Raises:
        OSError: it cannot be read or written; what was there stays.
        Damaged: the copy reads back differently.
    """
    beside = target.with_name(target.name + UNFINISHED)
    make_way(beside)
    beside.mkdir()
    try:
        for name in (*CONTENT, MANIFEST):
            copy_file(source / name, beside / name)
            forget_cached(beside / name)
        if verify(beside, CONTENT) != read_manifest(source):
            raise Damaged(f"{target.name} reads back differently from what was written")
        put_in_place(beside, target)
    except (OSError, Damaged):
        with contextlib.suppress(OSError):
            remove(beside)  # half a checkpoint is of no use, and there may be no space
        raise


def forget_cached(path: Path) -> None:
    """Have the next read come from where the file lies, not from this machine's memory, where the system can."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def make_way(place: Path) -> None:
    """Remove a damaged or unfinished checkpoint; where that is impossible, or others' files are in it, move it aside.

    Raises:
        OSError: it cannot be, or the place is a link.
    """
    if place.is_symlink():
        raise OSError(errno.EEXIST, "a link that no run made is in the way; remove it", str(place))
    if is_ours(place):
        with contextlib.suppress(OSError):
            remove(place)
    if place.exists():
        place.rename(place.with_name(f"{place.name}.aside-{secrets.token_hex(4)}"))


def seems_whole(place: Path) -> bool:
    """Whether manifest, name and sizes are right; file contents are not read."""
    try:
        body = read_manifest(place)
        files = body["files"]
        return not _is_renamed(place, body) and all(
            (place / name).stat().st_size == files[name]["size"] for name in CONTENT
        )
    except (Damaged, OSError, KeyError, TypeError):
        return False


def _is_renamed(place: Path, body: Mapping[str, Any] | None = None) -> bool:
    """Whether a checkpoint's manifest, of which `body` is the content, names another update than its directory."""
    try:
        return (read_manifest(place) if body is None else body).get("step") != step_of(place)
    except Damaged:
        return False


# ----------------------------------------------------------------------------------------------------
# Whose a checkpoint is; saving and loading one.


class Fingerprints(Part):
    """sha256 of what a run is made of: the rows and their split, their token ids, the base model's files."""

    data: str
    tokenizer: str
    base: str


class Identity(Part):
    """Whose checkpoints these are, as their manifests say it. The experiment is by `section.key`."""

    experiment: dict[str, Any]
    fingerprints: Fingerprints
    environment: Environment


@dataclass(frozen=True)
class Found:
    """A whole checkpoint, whose it is, and why newer ones were passed over."""

    path: Path
    identity: Identity
    passed_over: Sequence[str]


def save_checkpoint(
    output_dir: Path,
    state: TrainState,
    identity: Identity,
    accelerator: Accelerator,
    keep: int,
    say: Callable[[str], None],
) -> None:
    """Write `checkpoint-<step>` from the main process and read it back; then remove what is older than needed.

    Args:
        say: told of old checkpoints that cannot be removed. The save has succeeded nevertheless.

    Raises:
        UserError: it cannot be written (no space, no permission). Checkpoints that are there stay.
    """
    place = output_dir / f"checkpoint-{state.progress.step}"
    for problem in on_main(accelerator, lambda: _save(place, state, identity, keep)):
        say(problem)


def _save(place: Path, state: TrainState, identity: Identity, keep: int) -> list[str]:
    """As `save_checkpoint`, on the main process."""
    try:
        remove_unfinished(place.parent)  # what could not be removed before
        if not _is_whole(place):
            _write(place, state, identity)
            verify_checkpoint(place)
    except OSError as error:
        raise NotWritten(f"{place}: cannot be written: {error}; free space and start again") from error
    except Damaged as error:
        if not os.path.isdir(place.parent):
            raise UserError(f"{place.parent}: has been removed, and the checkpoints in it; start again") from error
        raise UserError(f"{place}: reads back differently from what was written: {error}; check the disk") from error
    return prune(place.parent, keep, {state.progress.step, state.progress.best_step})


def newest_whole(places: Sequence[Path]) -> Found | None:
    """The newest whole checkpoint of the first of these directories that has one; None where there is none at all.

    Raises:
        UserError: there are some, and all are damaged; says of each why.
    """
    passed_over: list[str] = []
    for path in (path for place in places for path in reversed(checkpoints(place))):
        try:
            return Found(path, read_identity(path), passed_over)
        except Damaged as error:
            passed_over.append(f"{path} is damaged: {error}")
    if passed_over:
        raise UserError(
            f"no whole checkpoint is left: {'; '.join(passed_over)}; "
            "put back one that is whole, or start over with --fresh"
        )
    return None


def read_identity(path: Path) -> Identity:
    """Whose a checkpoint is, once all of it is verified.

    Raises:
        Damaged: it is not whole, or of another version.
    """
    body = verify_checkpoint(path)
    try:
        return Identity.model_validate({key: body.get(key) for key in Identity.model_fields})
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise Damaged(f"{MANIFEST} is of another version: {where}") from error


def load_checkpoint(found: Found, state: TrainState) -> None:
    """Put a checkpoint's content into the state: adapter, optimizer, scheduler, scaler and progress.

    Raises:
        UserError: its content does not fit, though it is whole.
    """
    try:
        progress = read_progress(found.path)
        saved = read_training_state(found.path / TRAINING_FILE, state, progress.step, progress.tokens_seen > 0)
    except Damaged as error:
        raise UserError(
            f"{found.path}: whole, but its content does not fit this version ({error}); resume with the version that "
            "wrote it, or move this checkpoint away to resume from an older one, or start over with --fresh"
        ) from error
    load_adapter_weights(state.adapted, found.path, "checkpoint")
    if not all(weight.isfinite().all() for weight in adapter_weights(state.adapted).values()):
        raise UserError(
            f"{found.path}: its adapter has weights that are not finite; move it away to resume from an older one"
        )
    state.optimizer.load_state_dict(saved["optimizer"])
    state.scheduler.load_state_dict(saved["scheduler"])
    if state.scaler is not None and saved["scaler"] is not None:
        state.scaler.load_state_dict(saved["scaler"])
    state.progress = progress


def read_progress(path: Path) -> Progress:
    """How far the run was when a checkpoint was saved.

    Raises:
        Damaged: the file cannot be read, is of another version, or is not of the update in the checkpoint's name.
    """
    content = read_file(path / STATE_FILE, MAX_JSON_BYTES)
    try:
        parse_json(content)  # stricter than what follows: no NaN, no number beyond 64 bits
        progress = PROGRESS.validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise Damaged(f"{STATE_FILE}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except ValueError as error:
        raise Damaged(f"{STATE_FILE}: {error}") from error
    if progress.step != step_of(path) or max(progress.best_step, progress.evaluated_step) > progress.step:
        raise Damaged(f"{STATE_FILE} is of another update than {path.name}")
    return progress


def save_adapter(model: PeftModel, directory: Path) -> None:
    """The adapter in PEFT's format: LoRA weights alone, even where the vocabulary grew by `[PAD]`."""
    # Python writes the files: where there is no space, that is an OSError, and not one of each library's own errors.
    (directory / ADAPTER_FILES[0]).write_bytes(save(adapter_weights(model), metadata={"format": "pt"}))
    config = copy.copy(model.peft_config["default"])
    config.inference_mode = True
    config.save_pretrained(directory)


def _write(place: Path, state: TrainState, identity: Identity) -> None:
    """A checkpoint in full beside its place, then renamed into it; or nothing, if it cannot be written."""
    beside = place.with_name(place.name + UNFINISHED)
    make_way(beside)
    beside.mkdir()
    try:
        _fill(beside, state, identity)
    except OSError:
        with contextlib.suppress(OSError):
            remove(beside)  # half a checkpoint is of no use, and there may be no space
        raise
    put_in_place(beside, place)


def _fill(directory: Path, state: TrainState, identity: Identity) -> None:
    """All files of a checkpoint, flushed."""
    save_adapter(state.adapted, directory)
    (directory / TRAINING_FILE).write_bytes(training_state(state))
    (directory / STATE_FILE).write_text(json.dumps(asdict(state.progress)), encoding="utf-8")
    write_manifest(directory, {"step": state.progress.step, **identity.model_dump()})
    for path in (*directory.iterdir(), directory):
        flush(path)


def _is_whole(place: Path) -> bool:
    """Whether a whole checkpoint is there."""
    try:
        verify_checkpoint(place)
    except Damaged:
        return False
    return True


# ----------------------------------------------------------------------------------------------------
# `training_state.pt`: the state of optimizer, learning rate schedule and gradient scaler, written and read.

# bitsandbytes keeps the quantized tensors of a parameter's state below this key, older versions beside the others.
QUANTIZED = "__bnb_optimizer_quant_state__"
# Options that decide how the optimizer computes its step and not which: a run may go on with others.
HOW = ("foreach", "fused", "capturable", "differentiable")
NOT_NEGATIVE = ("exp_avg_sq", "state2", "absmax1", "absmax2", "qmap2")
KNOWN_OF_SCHEDULE = {"base_lrs", "last_epoch", "_step_count", "_last_lr"}
# What loading a file that somebody made up may raise, from zipfile and from torch's own reader of pickles.
MADE_UP = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
)


def training_state(state: TrainState) -> memoryview:
    """The content of the file."""
    content = io.BytesIO()
    torch.save(
        {
            "optimizer": state.optimizer.state_dict(),
            "scheduler": state.scheduler.state_dict(),
            "scaler": state.scaler.state_dict() if state.scaler else None,
        },
        content,
    )
    return content.getbuffer()


def read_training_state(path: Path, state: TrainState, step: int, moved: bool) -> dict[str, Any]:
    """The states of `optimizer`, `scheduler` and `scaler` after update `step`, to be loaded into those of `state`.

    Args:
        moved: whether any of those updates had a target, so that the optimizer made a step.

    Raises:
        Damaged: the file's content is not the state that this run's optimizer, schedule and scaler have after `step`
            updates. Nothing is loaded.
    """
    try:
        saved = _unpickled(path, state)
        if not isinstance(saved, dict) or saved.keys() != {"optimizer", "scheduler", "scaler"}:
            raise Damaged("does not hold the states of optimizer, scheduler and scaler")
        schedule = state.scheduler
        rates = [
            float(rate * factor(step)) for rate, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        return {
            "optimizer": _optimizer_state(saved["optimizer"], state.optimizer, rates, step, moved),
            "scheduler": _scheduler_state(saved["scheduler"], state.scheduler, rates, step),
            "scaler": _scaler_state(saved["scaler"], state.scaler),
        }
    except Damaged as error:
        raise Damaged(f"{path.name}: {error}") from error
    except OSError as error:
        raise Damaged(f"{path.name}: {error.strerror}") from error


def _unpickled(path: Path, state: TrainState) -> Any:
    """What the file holds. A file much longer than such states, or one that unpacks to more than it holds, is refused.

    Raises:
        Damaged, OSError: it cannot be read.
    """
    parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    most = 1_000_000 + sum(16 * parameter.numel() + 10_000 for parameter in parameters)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise Damaged(f"has {size:,} bytes, more than this run's states can take")
        try:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
            if any(entry.compress_type for entry in entries) or sum(entry.file_size for entry in entries) > size:
                raise Damaged("is packed, which torch.save does not do")
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
        except MADE_UP as error:
            raise Damaged(f"cannot be read ({type(error).__name__}: {str(error)[:MAX_SHOWN]})") from error


def _optimizer_state(
    saved: Any, optimizer: torch.optim.Optimizer, rates: list[float], step: int, moved: bool
) -> dict[str, Any]:
    """The saved tensors with this run's own options.

    Raises:
        Damaged: an option is another than in this run, or a tensor is not as this run's optimizer has it.
    """
    own = optimizer.state_dict()["param_groups"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    ids = [number for group in own for number in group["params"]]
    if not isinstance(saved, dict) or saved.keys() != {"state", "param_groups"} or not isinstance(saved["state"], dict):
        raise Damaged("optimizer: not the state of an optimizer")
    groups = saved["param_groups"]
    if not isinstance(groups, list) or len(groups) != len(own):
        raise Damaged(f"optimizer: has not the {len(own)} groups of parameters of this run")
    groups_now = [group | {"lr": rate} for group, rate in zip(own, rates, strict=True)]
    for group, now in zip(groups, groups_now, strict=True):
        _require_options("optimizer", group, now, {"params", "lr"}, ignored=HOW)
    state = saved["state"]
    if state.keys() != (set(ids) if moved else set()):
        raise Damaged(f"optimizer: the state is not that of the {len(ids)} parameters of this run")
    flat = {number: _flat(of_one) for number, of_one in state.items()}
    for number, parameter in zip(ids, parameters, strict=True):
        if number in flat:
            _require_tensors(f"optimizer: parameter {number}", flat[number], _layout(optimizer, parameter), step)
    return {"state": flat, "param_groups": groups_now}


def _flat(of_one: Any) -> dict[str, Any]:
    """A parameter's state on one level, as all versions of bitsandbytes read it."""
    if not isinstance(of_one, dict):
        raise Damaged("optimizer: the state of a parameter is no table")
    quantized = of_one.get(QUANTIZED, {})
    if not isinstance(quantized, dict):
        raise Damaged("optimizer: the quantized state of a parameter is no table")
    return {key: value for key, value in of_one.items() if key != QUANTIZED} | quantized


def _layout(optimizer: Any, parameter: torch.Tensor) -> dict[str, tuple[tuple[int, ...], torch.dtype] | None]:
    """Shapes and types of the tensors that an optimizer keeps for a parameter. None stands for a plain integer."""
    inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate's is a wrapper
    shape, count = tuple(parameter.shape), parameter.numel()
    if isinstance(inner, torch.optim.AdamW):
        same = (shape, parameter.dtype)
        return {"step": ((), torch.float32), "exp_avg": same, "exp_avg_sq": same}
    if count < inner.args.min_8bit_size:  # bitsandbytes keeps the state of small parameters in 32 bits
        return {"step": None, "state1": (shape, torch.float32), "state2": (shape, torch.float32)}
    quantized, levels, blocks = (shape, torch.uint8), ((256,), torch.float32), ((-(-count // 256),), torch.float32)
    return {
        "step": None,
        **{"state1": quantized, "qmap1": levels, "absmax1": blocks},
        **{"state2": quantized, "qmap2": levels, "absmax2": blocks},
    }


def _require_tensors(
    what: str, found: Mapping[str, Any], layout: Mapping[str, tuple[tuple[int, ...], torch.dtype] | None], step: int
) -> None:
    """See that a parameter's state has these tensors, and that they hold what an optimizer can have put into them."""
    if found.keys() != layout.keys():
        raise Damaged(f"{what}: its state has not the entries {', '.join(layout)}")
    for name, expected in layout.items():
        value = found[name]
        if expected is None:
            fits = type(value) is int
        else:
            fits = (
                type(value) is torch.Tensor
                and (tuple(value.shape), value.dtype) == expected
                and value.layout == torch.strided
                and value.device.type == "cpu"
                and value.is_contiguous()
            )
        if not fits:
            wanted = "an integer" if expected is None else f"a tensor of shape {expected[0]} and type {expected[1]}"
            raise Damaged(f"{what}: {name} is not {wanted}")
        if isinstance(value, torch.Tensor) and not value.isfinite().all():
            raise Damaged(f"{what}: {name} holds values that are not finite")
        if name in NOT_NEGATIVE and (value < 0).any():
            raise Damaged(f"{what}: {name} holds negative values")
    if not 1 <= found["step"] <= step or found["step"] % 1:
        raise Damaged(f"{what}: its step is not one of the {step} updates")


def _scheduler_state(
    saved: Any, scheduler: torch.optim.lr_scheduler.LambdaLR, rates: list[float], step: int
) -> dict[str, Any]:
    """The state of this run's schedule after update `step`, which follows from the step.

    Raises:
        Damaged: the saved one is another.
    """
    now = scheduler.state_dict() | {"last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
    _require_options("scheduler", saved, now, KNOWN_OF_SCHEDULE)
    if unfit := [key for key in saved if key not in now and hasattr(scheduler, key)]:
        raise Damaged(f"scheduler: {unfit[0]} is not a part of its state")
    return now


def _scaler_state(saved: Any, scaler: torch.amp.GradScaler | None) -> dict[str, Any] | None:
    """This run's scaler with the saved scale, and the count of updates since it changed; None where there is none.

    Raises:
        Damaged: an option is another than in this run, or the scale is none.
    """
    if scaler is None or saved is None or not (now := scaler.state_dict()):
        return None
    _require_options("scaler", saved, now, set(now), ignored=("scale", "_growth_tracker"))
    scale, tracker = saved["scale"], saved["_growth_tracker"]
    if type(scale) is not float or not 0 < scale < math.inf or type(tracker) is not int or tracker < 0:
        raise Damaged("scaler: its scale is not a positive number, or its count is none")
    return now | {"scale": scale, "_growth_tracker": tracker}


def _require_options(
    what: str, saved: Any, now: Mapping[str, Any], needed: set[str], ignored: tuple[str, ...] = ()
) -> None:
    """See that saved options are those of this run.

    An option that only one of two versions of a library knows is not compared. It has to be a plain number or None.
    """
    if not isinstance(saved, dict) or not needed <= saved.keys() or not all(isinstance(key, str) for key in saved):
        raise Damaged(f"{what}: its options are not complete")
    for key, value in saved.items():
        if key in ignored or key not in now:
            fits = value is None or isinstance(value, bool | int | float)
        else:
            fits = _same(value, now[key])
        if not fits:
            raise Damaged(f"{what}: {key} is another than in this run")


def _same(saved: Any, now: Any) -> bool:
    """Whether a saved option is that of this run. Learning rates may differ by their rounding in another version."""
    if isinstance(now, list | tuple):
        return type(saved) is type(now) and len(saved) == len(now) and all(map(_same, saved, now))
    if isinstance(now, float):
        return type(saved) is float and math.isclose(saved, now, rel_tol=1e-6, abs_tol=1e-15)
    return type(saved) is type(now) and saved == now
