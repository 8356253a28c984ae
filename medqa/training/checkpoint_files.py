"""The directories of checkpoints: which there are, which may go, and how one comes into its place.

Nothing here removes or writes through a link, or removes what a run did not write.
"""

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from medqa.files import UNFINISHED, Damaged, copy_file, flush
from medqa.model.adapter_files import ADAPTER_FILES
from medqa.training.manifest import MANIFEST, read_manifest, verify

NAME = re.compile(r"checkpoint-(\d{1,12})")
# A checkpoint that is being written, or what is left of one that was being removed.
LEFTOVER = re.compile(rf"{NAME.pattern}(\.[0-9a-f]{{8}})?{re.escape(UNFINISHED)}")
# What a network file system calls a removed file that a process still has open. It removes the file later by itself.
STILL_OPEN = ".nfs"
TRAINING_FILE = "training_state.pt"
STATE_FILE = "state.json"
CONTENT = (*ADAPTER_FILES, TRAINING_FILE, STATE_FILE)
CHECKPOINT_FILES = {*CONTENT, MANIFEST}


def checkpoints(output_dir: Path) -> list[Path]:
    """Everything called like a checkpoint, by step (numerically: 100 comes after 50), oldest first; links too."""
    return sorted(
        (path for path in output_dir.glob("checkpoint-*") if NAME.fullmatch(path.name) and path.is_dir()), key=step_of
    )


def step_of(path: Path) -> int:
    """The update of a checkpoint, by its name."""
    return int(path.name.rpartition("-")[2])


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
        Why any could not be removed, as sentences, which are the same for all of the same reason.
    """
    found = checkpoints(output_dir)
    whole = [path for path in found if seems_whole(path)]
    stay = set()
    for path in found[: found.index(whole[-1])] if whole else ():
        if path not in whole[-keep:] and step_of(path) not in needed and is_ours(path) and not _is_renamed(path):
            try:
                remove(path)
            except OSError as error:
                stay.add(
                    f"{output_dir}: an old checkpoint could not be removed, and stays: {error.strerror}; the same is "
                    "not said again of others"
                )
    return sorted(stay)


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
        OSError: it cannot be removed, or not entirely. Where the manifest could not be, all of it is still there.
    """
    (path / MANIFEST).unlink(missing_ok=True)
    if NAME.fullmatch(path.name):
        path = path.rename(path.with_name(f"{path.name}.{secrets.token_hex(4)}{UNFINISHED}"))
    for entry in list(os.scandir(path)):
        with contextlib.suppress(OSError):
            os.unlink(entry)
    path.rmdir()  # which says why, where something is left


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
