"""What is kept on disk between runs by what it is made of: token ids, and the baseline figures of an evaluation.

In `$MEDQA_CACHE` (`~/.cache/medqa` where that is not set), in `tokens` and `baselines`. A file that is damaged, or that
cannot be written, is as if it were not there. Several processes, runs and hosts may share the folder, and none waits
for another: each writes beside the place, under a name of its own (which `medqa/files.py` does not give), and moves the
whole file there. Only numbers and JSON are read.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from medqa.files import Damaged, checksum, parse_json, read_file, read_json
from medqa.limits import MAX_BASELINE_BYTES, MAX_DATA_BYTES

Arrays = dict[str, np.ndarray]

KEPT_FILES = 30  # the least recently used of more than so many are removed
CHECKSUM = "sha256"
BEGUN = "tmp"  # how the name of a folder begins in which a file is being written
ABANDONED_S = 86_400  # whoever began it that long ago was killed


def cached(key: str, make: Callable[[], Arrays], can_be: Callable[[Arrays], bool] = lambda found: True) -> Arrays:
    """What is kept under the key, a file name; else what `make` makes, which is kept from then on.

    Args:
        can_be: whether what is kept can be what `make` makes. Its checksum alone says only that the file is whole.
    """
    path = folder() / f"{key}.safetensors"
    found = _read(path)
    if found is None or not can_be(found):
        found = make()
        _write(path, found)
    return found


def folder() -> Path:
    """Where the files lie."""
    return Path(os.environ.get("MEDQA_CACHE") or os.path.expanduser("~/.cache/medqa")) / "tokens"


def _read(path: Path) -> Arrays | None:
    """A file's arrays; None where it is not there or not whole.

    Read and not mapped: a mapped file that another host removes takes the process with it on a network mount.
    """
    try:
        content = read_file(path, MAX_DATA_BYTES)
        arrays = load(content)
        header = parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")])  # as safetensors lays it out
    except (Damaged, SafetensorError, ValueError):
        return None
    metadata = header.get("__metadata__")
    whole = isinstance(metadata, dict) and metadata.get(CHECKSUM) == _checksum(arrays)
    with contextlib.suppress(OSError):  # another user's
        os.utime(path)  # used now
    return arrays if whole else None


def _write(path: Path, arrays: Arrays) -> None:
    """Keep the arrays; where there is no room or no permission, do without."""
    put(path, save(arrays, metadata={CHECKSUM: _checksum(arrays)}))
    with contextlib.suppress(OSError):  # another process removes some too
        files = sorted(path.parent.glob("*.safetensors"), key=lambda each: each.stat().st_mtime)
        for old in files[:-KEPT_FILES]:
            old.unlink(missing_ok=True)


def put(path: Path, content: bytes) -> None:
    """A file of a cache that several share: whole or not there; where there is no room or no permission, not there."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=BEGUN, dir=path.parent) as beside:
            unfinished = Path(beside, path.name)
            unfinished.write_bytes(content)
            os.replace(unfinished, path)
        for begun in path.parent.glob(BEGUN + "*"):
            if time.time() - begun.stat().st_mtime > ABANDONED_S:
                shutil.rmtree(begun, ignore_errors=True)


def _checksum(arrays: Arrays) -> str:
    """sha256 over names, types and contents."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------
# What the baseline gives, kept on disk: the same for every run on that base model and data, so computed once.
#
# In `$MEDQA_CACHE/baselines` (`~/.cache/medqa` where that is not set), as JSON with a checksum, by what it is made
# of. A file that is damaged, or that cannot be written, is as if it were not there. Shared as the token ids are.


def find(what: Any) -> Any:
    """What is kept under `what`, the JSON value that it follows from; None where nothing is."""
    found = _read_baseline(_path(what))
    return None if found is None else found["value"]


def keep(what: Any, value: Any) -> None:
    """Keep a JSON value; where there is no room or no permission, do without."""
    found = {"value": value}
    content = json.dumps({**found, "checksum": checksum(found)}, ensure_ascii=False, allow_nan=False)
    put(_path(what), content.encode())


def baseline_folder() -> Path:
    """Where the files lie."""
    return folder().with_name("baselines")


def _path(what: Any) -> Path:
    """The file of what follows from `what`."""
    return baseline_folder() / f"{checksum(what)}.json"


def _read_baseline(path: Path) -> dict[str, Any] | None:
    """A file's content; None where it is not there or not whole."""
    try:
        found = read_json(path, MAX_BASELINE_BYTES)
    except Damaged:
        return None
    if not isinstance(found, dict) or found.keys() != {"value", "checksum"}:
        return None
    return found if found.pop("checksum") == checksum(found) else None
