"""The directories of checkpoints: which there are, which may go, and how one comes into its place.

Nothing here removes or writes through a link, or removes what a run did not write.
"""

import errno
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from medqa.training.manifest import MANIFEST, Damaged, read_manifest

NAME = re.compile(r"checkpoint-(\d{1,12})")
UNFINISHED = ".tmp"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
TRAINING_FILE = "training_state.pt"
STATE_FILE = "state.json"
CONTENT = (*ADAPTER_FILES, TRAINING_FILE, STATE_FILE)
CHECKPOINT_FILES = {*CONTENT, MANIFEST}


def checkpoints(output_dir: Path) -> list[Path]:
    """Everything called like a checkpoint, by step (numerically: 100 comes after 50), oldest first; links too."""
    found = [(int(match[1]), path) for path in output_dir.glob("checkpoint-*") if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if path.is_dir()]


def prune(output_dir: Path, keep: int, needed: set[int]) -> None:
    """Remove all but the newest `keep` whole checkpoints and those at the steps `needed`.

    Damaged ones older than the newest go too. Only directories that hold nothing but a checkpoint's own files are
    removed: never a link, never one that somebody put something into.
    """
    found = checkpoints(output_dir)
    whole = [path for path in found if seems_whole(path)]
    if not whole:
        return
    for path in found[: found.index(whole[-1])]:
        if path not in whole[-keep:] and int(NAME.fullmatch(path.name)[1]) not in needed and is_ours(path):
            remove(path)


def is_ours(path: Path) -> bool:
    """Whether it is a directory, not a link to one, that holds regular files of a checkpoint's names alone."""
    return (
        path.is_dir()
        and not path.is_symlink()
        and all(entry.name in CHECKPOINT_FILES and entry.is_file(follow_symlinks=False) for entry in os.scandir(path))
    )


def remove(path: Path) -> None:
    """Remove a checkpoint's files, the manifest first: what is left of it after a kill is not whole."""
    for name in (MANIFEST, *CONTENT):
        (path / name).unlink(missing_ok=True)
    path.rmdir()


def unfinished(output_dir: Path) -> Iterator[Path]:
    """What a killed save has left behind."""
    for path in output_dir.glob(f"checkpoint-*{UNFINISHED}"):
        if NAME.fullmatch(path.name.removesuffix(UNFINISHED)) and is_ours(path):
            yield path


def put_in_place(beside: Path, place: Path) -> None:
    """Rename a checkpoint that is whole into its place.

    Raises:
        OSError: it cannot be, or the place is a link.
    """
    make_way(place)
    beside.rename(place)
    flush(place.parent)


def make_way(place: Path) -> None:
    """Remove a damaged or unfinished checkpoint; if there is more in it than a checkpoint's own files, move it aside.

    Raises:
        OSError: it cannot be, or the place is a link.
    """
    if place.is_symlink():
        raise OSError(errno.EEXIST, "a link that no run made is in the way; remove it", str(place))
    if is_ours(place):
        remove(place)
    elif place.exists():
        place.rename(place.with_name(f"{place.name}.aside-{secrets.token_hex(4)}"))


def flush(path: Path) -> None:
    """Have the disk hold a file or a directory's entries before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):  # some mounts cannot
            raise
    finally:
        os.close(descriptor)


def seems_whole(place: Path) -> bool:
    """Whether manifest and sizes are right; file contents are not read."""
    try:
        files = read_manifest(place)["files"]
        return all((place / name).stat().st_size == files[name]["size"] for name in CONTENT)
    except (Damaged, OSError, KeyError, TypeError):
        return False
