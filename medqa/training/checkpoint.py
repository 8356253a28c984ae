"""Checkpoints: everything that an exact resume needs, without the base model. A checkpoint is valid or ignored.

A checkpoint is written to a temporary directory, flushed to disk, renamed, and read back. Its manifest decides whether
it is valid, and identifies its experiment, data, token ids and base model. No random state is saved: the order of the
data and the dropout masks follow from the step.
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
# The environment: what the numbers of a run depend on besides experiment and data. These are the settings after the
# changes for this machine, the machine, and the libraries.
#
# A checkpoint records it. A resumed run keeps the settings. If it cannot, or if the machine or a library is another,
# the run prints this, and records that later results may differ in the last digits.

PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "tokenizers", "datasets")
COMPUTING = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")  # those that can change results


class Environment(Part):
    """The settings, the machine and the libraries. Fields with a default are missing in older checkpoints.

    Attributes:
        device: the name of the GPU, or `cpu` and the instruction set that torch uses.
        cpu_threads: None on a GPU.
        variables: the environment variables that choose kernels (`medqa/variables.py`); None: not recorded.
    """

    settings: SavedSettings
    device: str
    processes: int
    cpu_threads: int | None
    versions: dict[str, str]
    sharded: bool = False
    variables: dict[str, str] | None = None

    @property
    def on_cpu(self) -> bool:
        """Whether the device is a CPU."""
        return self.cpu_threads is not None


def environment(accelerator: Accelerator, settings: Settings, model: PeftModel) -> Environment:
    """The environment of this process."""
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
                "bos": settings.bos,
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
    """The attention kernel. Padding-free on a GPU it may be a varlen kernel, which differs in the last digits."""
    return f"{implementation}, varlen" if implementation == SEGMENTED and VARLEN else implementation


def changes(before: Environment, now: Environment) -> list[str]:
    """The differences between two environments that may change the last digits of results."""
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
    """The versions of Python and of `PACKAGES`, without packages that are not installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of this code, with `-dirty` if files were changed; None if it is not a git checkout."""
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
# The manifest of a directory: the size and sha256 of each file, and a checksum of the manifest itself.
#
# Only the manifest decides whether a directory is valid, whatever wrote it (this process, a copy to a network share, a
# download). It is JSON. The reader knows which files must be listed, and does not take their names from the manifest.


def write_manifest(directory: Path, about: Mapping[str, Any]) -> None:
    """Write the manifest of all files in `directory`, with the keys of `about`.

    Raises:
        OSError: a file cannot be read or written.
    """
    body = {"format": FORMAT, **about, "files": {path.name: measure(path) for path in sorted(directory.iterdir())}}
    body["checksum"] = checksum(body)
    (directory / MANIFEST).write_text(json.dumps(body, indent=1, allow_nan=False), encoding="utf-8")


def verify(directory: Path, expected: Iterable[str]) -> dict[str, Any]:
    """Verify all files of a directory against its manifest, and return the manifest.

    Args:
        expected: exactly the file names that the manifest must list.

    Raises:
        Damaged: the directory is not valid; with the reason.
    """
    body = read_manifest(directory)
    files = body["files"]
    if not isinstance(files, dict) or files.keys() != set(expected):
        raise Damaged(f"{MANIFEST} is of another version: it lists other files")
    for name, entry in files.items():
        try:
            with open_regular(directory / name) as file:
                size = os.fstat(file.fileno()).st_size
                if not isinstance(entry, dict) or size != entry.get("size"):
                    raise Damaged(f"{name} has {size:,} bytes, another size than in {MANIFEST}")
                if size > MAX_CHECKPOINT_FILE_BYTES:  # a sparse file can have any size
                    raise Damaged(f"{name} has {size:,} bytes, more than a file of a checkpoint can have")
                if hashlib.file_digest(file, "sha256").hexdigest() != entry.get("sha256"):
                    raise Damaged(f"{name}: its sha256 is not that of {MANIFEST}")
        except OSError as error:
            raise Damaged(f"{name}: {error.strerror}") from error
    return body


def measure(path: Path) -> dict[str, Any]:
    """Size in bytes and sha256 of a file.

    Raises:
        OSError: it cannot be read, or is not a regular file (opening a pipe could block forever).
    """
    with open_regular(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"size": file.tell(), "sha256": digest}


# ----------------------------------------------------------------------------------------------------
# The directories of checkpoints: finding, removing, copying and renaming them.
#
# No function here removes or writes through a link, or removes files that a run did not write.

# The name of a checkpoint that is being written, or that was being removed.
LEFTOVER = re.compile(rf"{NAME.pattern}(\.[0-9a-f]{{8}})?{re.escape(UNFINISHED)}")
# The prefix that a network file system gives to a removed file that a process still has open. The file goes later.
STILL_OPEN = ".nfs"
TRAINING_FILE = "training_state.pt"
STATE_FILE = "state.json"
CONTENT = (*ADAPTER_FILES, TRAINING_FILE, STATE_FILE)
CHECKPOINT_FILES = {*CONTENT, MANIFEST}


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Verify a checkpoint, its name included, and return its manifest.

    Raises:
        Damaged: the checkpoint is not valid; with the reason.
    """
    body = verify(path, CONTENT)
    if _is_renamed(path, body):
        raise Damaged(f"{MANIFEST} has another update than the name of the directory, which was renamed or copied")
    return body


def prune(output_dir: Path, keep: int, needed: set[int]) -> list[str]:
    """Remove all checkpoints except the newest `keep` valid ones and those of the steps `needed`.

    Damaged checkpoints older than the newest valid one are removed as well. A directory is removed only if it contains
    nothing but the files of a checkpoint: never a link, a directory with other files, or a renamed checkpoint.

    Returns:
        A message for each reason why checkpoints could not be removed. It names the oldest of them, so that the message
        for the same problem is the same after the next save.
    """
    found = checkpoints(output_dir)
    valid = [path for path in found if seems_valid(path)]
    kept = {*valid[-keep:], *(path for path in found if step_of(path) in needed)}
    old = [path for path in found[: found.index(valid[-1])] if path not in kept] if valid else []
    old = [*unfinished(output_dir), *(path for path in old if is_ours(path) and not _is_renamed(path))]
    problems: dict[str, str] = {}
    for path in sorted(old, key=lambda path: int(path.name.removeprefix("checkpoint-").split(".")[0])):
        try:
            remove(path)
        except OSError as error:
            problems.setdefault(str(error.strerror), _removal_problem(output_dir, error))
    return list(problems.values())


def _removal_problem(output_dir: Path, error: OSError) -> str:
    """The message for an old checkpoint that could not be removed, from the error that `remove` raised."""
    file = Path(str(error.filename))
    directory = file if file.parent == output_dir else file.parent
    name = f"checkpoint-{int(found[1])}" if (found := LEFTOVER.fullmatch(directory.name)) else directory.name
    what = "" if file == directory else f"{file.name}: "
    stays = "it stays" if name == directory.name else f"the rest of it stays, as {directory.name}"
    return (
        f"{output_dir}: the old {name} cannot be removed ({what}{error.strerror}); {stays}. This message is not "
        "repeated for other checkpoints"
    )


def is_ours(path: Path) -> bool:
    """Whether `path` is a directory, not a link, that contains only regular files with the names of a checkpoint's."""
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
    except OSError:  # it cannot be listed, or was just removed
        return False


def remove(path: Path) -> None:
    """Remove the directory of a checkpoint, for which `is_ours` must be true.

    The manifest is removed first, and then the directory is renamed. So what remains after a kill or an error does not
    have the name of a checkpoint, and `unfinished` finds it.

    Raises:
        OSError: the directory could not be removed entirely. The error is that of the first file; if that is the
            manifest, nothing was removed.
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
    """The directories that a killed save or removal has left."""
    for path in output_dir.glob(f"checkpoint-*{UNFINISHED}"):
        if LEFTOVER.fullmatch(path.name) and is_ours(path):
            yield path


def remove_unfinished(output_dir: Path) -> None:
    """Remove the directories that killed saves and removals have left, as far as possible."""
    for path in unfinished(output_dir):
        with contextlib.suppress(OSError):
            remove(path)


def put_in_place(written: Path, path: Path) -> None:
    """Rename a checkpoint from the temporary directory `written` to `path`, its final name.

    Raises:
        OSError: it cannot be renamed, or `path` is a link.
    """
    make_way(path)
    written.rename(path)
    flush(path.parent)


def copy_checkpoint(source: Path, target: Path) -> None:
    """Copy a valid checkpoint, verify the copy by reading it back, and rename it to `target`.

    Raises:
        OSError: it cannot be read or written. An existing `target` stays.
        Damaged: the copy reads back differently.
    """
    copy_dir = target.with_name(target.name + UNFINISHED)
    make_way(copy_dir)
    copy_dir.mkdir()
    try:
        for name in (*CONTENT, MANIFEST):
            copy_file(source / name, copy_dir / name)
            drop_page_cache(copy_dir / name)
        if verify(copy_dir, CONTENT) != read_manifest(source):
            raise Damaged(f"{target.name} reads back differently from what was written")
        put_in_place(copy_dir, target)
    except (OSError, Damaged):
        with contextlib.suppress(OSError):
            remove(copy_dir)  # it is useless, and the disk may be full
        raise


def drop_page_cache(path: Path) -> None:
    """Drop a file from the page cache if the system can, so that the next read comes from the disk or the server."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def make_way(path: Path) -> None:
    """Free the name `path`: remove a damaged or unfinished checkpoint there, or rename it if it has other files.

    Raises:
        OSError: it cannot be removed or renamed, or `path` is a link.
    """
    if path.is_symlink():
        raise OSError(errno.EEXIST, "a link that no run created is in the way; remove it", str(path))
    if is_ours(path):
        with contextlib.suppress(OSError):
            remove(path)
    if path.exists():
        path.rename(path.with_name(f"{path.name}.aside-{secrets.token_hex(4)}"))


def seems_valid(path: Path) -> bool:
    """Whether manifest, name and file sizes are right. The files are not read."""
    try:
        body = read_manifest(path)
        files = body["files"]
        return not _is_renamed(path, body) and all(
            (path / name).stat().st_size == files[name]["size"] for name in CONTENT
        )
    except (Damaged, OSError, KeyError, TypeError):
        return False


def _is_renamed(path: Path, body: Mapping[str, Any] | None = None) -> bool:
    """Whether the manifest of a checkpoint (`body` is its content) has another step than the name of the directory."""
    try:
        return (read_manifest(path) if body is None else body).get("step") != step_of(path)
    except Damaged:
        return False


# ----------------------------------------------------------------------------------------------------
# The identity of a checkpoint; saving and loading.


class Fingerprints(Part):
    """The sha256 of what a run is made of: the rows and their split, their token ids, the files of the base model."""

    data: str
    tokenizer: str
    base: str


class Identity(Part):
    """What a checkpoint belongs to, as in its manifest. The experiment is a mapping by `section.key`."""

    experiment: dict[str, Any]
    fingerprints: Fingerprints
    environment: Environment


@dataclass(frozen=True)
class Found:
    """A valid checkpoint, its identity, and the reasons why newer ones were skipped."""

    path: Path
    identity: Identity
    skipped: Sequence[str]


def save_checkpoint(
    output_dir: Path,
    state: TrainState,
    identity: Identity,
    accelerator: Accelerator,
    keep: int,
    report: Callable[[str], None],
) -> None:
    """Write `checkpoint-<step>` from the main process and read it back; then remove checkpoints that are not needed.

    Args:
        keep: how many checkpoints to keep.
        report: called with a message if old checkpoints cannot be removed. The save has succeeded nevertheless.

    Raises:
        UserError: the checkpoint cannot be written (no space, no permission). Existing checkpoints stay.
    """
    path = output_dir / f"checkpoint-{state.progress.step}"
    for problem in on_main(accelerator, lambda: _save(path, state, identity, keep)):
        report(problem)


def _save(path: Path, state: TrainState, identity: Identity, keep: int) -> list[str]:
    """As `save_checkpoint`, on the main process."""
    try:
        remove_unfinished(path.parent)  # those that could not be removed before
        if not _is_valid(path):
            _write(path, state, identity)
            verify_checkpoint(path)
    except OSError as error:
        raise NotWritten(f"{path}: cannot be written: {error}; free space and start again") from error
    except Damaged as error:
        if not os.path.isdir(path.parent):
            raise UserError(f"{path.parent}: has been removed with its checkpoints; start again") from error
        raise UserError(f"{path}: reads back differently from what was written: {error}; check the disk") from error
    return prune(path.parent, keep, {state.progress.step, state.progress.best_step})


def newest_valid(directories: Sequence[Path]) -> Found | None:
    """The newest valid checkpoint in the first of these directories that has one; None if there are no checkpoints.

    Raises:
        UserError: there are checkpoints, and all are damaged. The message gives the reason for each.
    """
    skipped: list[str] = []
    for path in (path for directory in directories for path in reversed(checkpoints(directory))):
        try:
            return Found(path, read_identity(path), skipped)
        except Damaged as error:
            skipped.append(f"{path} is damaged: {error}")
    if skipped:
        raise UserError(
            f"no valid checkpoint is left: {'; '.join(skipped)}; restore a valid one, or start over with --fresh"
        )
    return None


def read_identity(path: Path) -> Identity:
    """Verify a checkpoint, and return its identity.

    Raises:
        Damaged: it is not valid, or was written by another version.
    """
    body = verify_checkpoint(path)
    try:
        return Identity.model_validate({key: body.get(key) for key in Identity.model_fields})
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise Damaged(f"{MANIFEST} is of another version: {where}") from error


def load_checkpoint(found: Found, state: TrainState) -> None:
    """Load a checkpoint into the state: adapter, optimizer, scheduler, scaler and progress.

    Raises:
        UserError: its content does not fit this run or this version, although the checkpoint is valid.
    """
    try:
        progress = read_progress(found.path)
        saved = read_training_state(found.path / TRAINING_FILE, state, progress.step, progress.tokens_seen > 0)
    except Damaged as error:
        raise UserError(
            f"{found.path}: valid, but its content does not fit this version ({error}); resume with the version that "
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
    """The progress of the run in a checkpoint.

    Raises:
        Damaged: the file cannot be read, is of another version, or has another step than the name of the checkpoint.
    """
    content = read_file(path / STATE_FILE, MAX_JSON_BYTES)
    try:
        parse_json(content)  # stricter than the validation below: no NaN, no number beyond 64 bits
        progress = PROGRESS.validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise Damaged(f"{STATE_FILE}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except ValueError as error:
        raise Damaged(f"{STATE_FILE}: {error}") from error
    if progress.step != step_of(path) or max(progress.best_step, progress.evaluated_step) > progress.step:
        raise Damaged(f"{STATE_FILE} has another step than {path.name}")
    return progress


def save_adapter(model: PeftModel, directory: Path) -> None:
    """Write the adapter in PEFT's format: only LoRA weights, even if the vocabulary was extended by `[PAD]`."""
    # Python writes the files, so that a full disk raises an OSError and not an exception class of some library.
    (directory / ADAPTER_FILES[0]).write_bytes(save(adapter_weights(model), metadata={"format": "pt"}))
    config = copy.copy(model.peft_config["default"])
    config.inference_mode = True
    config.save_pretrained(directory)


def _write(path: Path, state: TrainState, identity: Identity) -> None:
    """Write a checkpoint to a temporary directory, and rename it to `path`. After an error nothing remains."""
    unfinished_dir = path.with_name(path.name + UNFINISHED)
    make_way(unfinished_dir)
    unfinished_dir.mkdir()
    try:
        _fill(unfinished_dir, state, identity)
    except OSError:
        with contextlib.suppress(OSError):
            remove(unfinished_dir)  # it is useless, and the disk may be full
        raise
    put_in_place(unfinished_dir, path)


def _fill(directory: Path, state: TrainState, identity: Identity) -> None:
    """Write all files of a checkpoint, and flush them to disk."""
    save_adapter(state.adapted, directory)
    (directory / TRAINING_FILE).write_bytes(training_state(state))
    (directory / STATE_FILE).write_text(json.dumps(asdict(state.progress)), encoding="utf-8")
    write_manifest(directory, {"step": state.progress.step, **identity.model_dump()})
    for path in (*directory.iterdir(), directory):
        flush(path)


def _is_valid(path: Path) -> bool:
    """Whether `path` is a valid checkpoint; all files are read."""
    try:
        verify_checkpoint(path)
    except Damaged:
        return False
    return True


# ----------------------------------------------------------------------------------------------------
# `training_state.pt`: writing and reading the states of optimizer, learning rate scheduler and gradient scaler.

# bitsandbytes stores the quantized tensors of a parameter's state under this key. Older versions had no such level.
QUANTIZED = "__bnb_optimizer_quant_state__"
# Options that choose the implementation of the optimizer step and not its result; they may change on resume.
HOW = ("foreach", "fused", "capturable", "differentiable")
NOT_NEGATIVE = ("exp_avg_sq", "state2", "absmax1", "absmax2", "qmap2")
KNOWN_OF_SCHEDULE = {"base_lrs", "last_epoch", "_step_count", "_last_lr"}
# The exceptions of zipfile and torch.load for a manipulated file.
LOAD_ERRORS = (
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
    """The content of the file as bytes."""
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


def read_training_state(path: Path, state: TrainState, step: int, stepped: bool) -> dict[str, Any]:
    """Read and validate the states of `optimizer`, `scheduler` and `scaler` after update `step`. Nothing is loaded.

    Args:
        stepped: whether any of those updates had a target token, so that the optimizer made a step.

    Raises:
        Damaged: the content cannot be the state of this run's optimizer, scheduler and scaler after `step` updates.
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
            "optimizer": _optimizer_state(saved["optimizer"], state.optimizer, rates, step, stepped),
            "scheduler": _scheduler_state(saved["scheduler"], state.scheduler, rates, step),
            "scaler": _scaler_state(saved["scaler"], state.scaler),
        }
    except Damaged as error:
        raise Damaged(f"{path.name}: {error}") from error
    except OSError as error:
        raise Damaged(f"{path.name}: {error.strerror}") from error


def _unpickled(path: Path, state: TrainState) -> Any:
    """The object in the file. A file that is too large for these states, or compressed, is refused.

    Raises:
        Damaged, OSError: it cannot be read.
    """
    parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    most = 1_000_000 + sum(16 * parameter.numel() + 10_000 for parameter in parameters)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise Damaged(f"has {size:,} bytes, more than the states of this run can have")
        try:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
            if any(entry.compress_type for entry in entries) or sum(entry.file_size for entry in entries) > size:
                raise Damaged("is compressed, which torch.save never does")
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
        except LOAD_ERRORS as error:
            raise Damaged(f"cannot be read ({type(error).__name__}: {str(error)[:MAX_SHOWN]})") from error


def _optimizer_state(
    saved: Any, optimizer: torch.optim.Optimizer, rates: list[float], step: int, stepped: bool
) -> dict[str, Any]:
    """The saved tensors with the options of this run.

    Raises:
        Damaged: an option is another than in this run, or a tensor is not one that this run's optimizer can have.
    """
    own = optimizer.state_dict()["param_groups"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    ids = [number for group in own for number in group["params"]]
    if not isinstance(saved, dict) or saved.keys() != {"state", "param_groups"} or not isinstance(saved["state"], dict):
        raise Damaged("optimizer: not the state of an optimizer")
    groups = saved["param_groups"]
    if not isinstance(groups, list) or len(groups) != len(own):
        raise Damaged(f"optimizer: does not have the {len(own)} parameter groups of this run")
    groups_now = [group | {"lr": rate} for group, rate in zip(own, rates, strict=True)]
    for group, now in zip(groups, groups_now, strict=True):
        _require_options("optimizer", group, now, {"params", "lr"}, ignored=HOW)
    state = saved["state"]
    if state.keys() != (set(ids) if stepped else set()):
        raise Damaged(f"optimizer: the state is not that of the {len(ids)} parameters of this run")
    flat = {number: _flat(of_one) for number, of_one in state.items()}
    for number, parameter in zip(ids, parameters, strict=True):
        if number in flat:
            _require_tensors(f"optimizer: parameter {number}", flat[number], _layout(optimizer, parameter), step)
    return {"state": flat, "param_groups": groups_now}


def _flat(of_one: Any) -> dict[str, Any]:
    """The state of a parameter on one level, which all versions of bitsandbytes can load."""
    if not isinstance(of_one, dict):
        raise Damaged("optimizer: the state of a parameter is not a dict")
    quantized = of_one.get(QUANTIZED, {})
    if not isinstance(quantized, dict):
        raise Damaged("optimizer: the quantized state of a parameter is not a dict")
    return {key: value for key, value in of_one.items() if key != QUANTIZED} | quantized


def _layout(optimizer: Any, parameter: torch.Tensor) -> dict[str, tuple[tuple[int, ...], torch.dtype] | None]:
    """Shape and dtype of the tensors that an optimizer keeps for a parameter. None stands for a Python integer."""
    inner = getattr(optimizer, "optimizer", optimizer)  # unwrap Accelerate's optimizer
    shape, count = tuple(parameter.shape), parameter.numel()
    if isinstance(inner, torch.optim.AdamW):
        same = (shape, parameter.dtype)
        return {"step": ((), torch.float32), "exp_avg": same, "exp_avg_sq": same}
    if count < inner.args.min_8bit_size:  # bitsandbytes keeps small parameters' state in 32 bits
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
    """Check that the state of a parameter has exactly these tensors, with values that an optimizer can produce."""
    if found.keys() != layout.keys():
        raise Damaged(f"{what}: its state does not have exactly the entries {', '.join(layout)}")
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
    """The state of this run's scheduler after update `step`, which follows from the step.

    Raises:
        Damaged: the saved state is another.
    """
    now = scheduler.state_dict() | {"last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
    _require_options("scheduler", saved, now, KNOWN_OF_SCHEDULE)
    if unfit := [key for key in saved if key not in now and hasattr(scheduler, key)]:
        raise Damaged(f"scheduler: {unfit[0]} is not part of its state")
    return now


def _scaler_state(saved: Any, scaler: torch.amp.GradScaler | None) -> dict[str, Any] | None:
    """The state of this run's scaler with the saved scale and growth tracker; None if there is no scaler.

    Raises:
        Damaged: an option is another than in this run, or the scale or the growth tracker is invalid.
    """
    if scaler is None or saved is None or not (now := scaler.state_dict()):
        return None
    _require_options("scaler", saved, now, set(now), ignored=("scale", "_growth_tracker"))
    scale, tracker = saved["scale"], saved["_growth_tracker"]
    if type(scale) is not float or not 0 < scale < math.inf or type(tracker) is not int or tracker < 0:
        raise Damaged("scaler: its scale is not a positive number, or its growth tracker is invalid")
    return now | {"scale": scale, "_growth_tracker": tracker}


def _require_options(
    what: str, saved: Any, now: Mapping[str, Any], needed: set[str], ignored: tuple[str, ...] = ()
) -> None:
    """Check that saved options equal those of this run.

    An option that only one version of a library knows is not compared; it must be a number, a bool or None.
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
    """Whether a saved option equals that of this run, up to the rounding of floats in another version."""
    if isinstance(now, list | tuple):
        return type(saved) is type(now) and len(saved) == len(now) and all(map(_same, saved, now))
    if isinstance(now, float):
        return type(saved) is float and math.isclose(saved, now, rel_tol=1e-6, abs_tol=1e-15)
    return type(saved) is type(now) and saved == now
