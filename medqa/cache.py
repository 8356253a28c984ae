"""The cache on disk: token ids, and the results of evaluations. The key is a hash of all inputs.

The files are in `$MEDQA_CACHE` (default `~/.cache/medqa`), in `tokens` and `baselines`. A file that is damaged, or that
cannot be written, is treated as missing. Several processes, runs and hosts may share the directory, and none waits for
another: each writes to a temporary file with a unique name (`medqa/files.py` would not give it one), and renames it
into place. Only numbers and JSON are read.
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

KEPT_FILES = 30  # files of token ids; beyond that number, the least recently used are removed
KEPT_RESULTS = 300  # files of evaluation results, likewise
CHECKSUM = "sha256"
BEGUN = "tmp"  # the prefix of the temporary directories in which files are written
ABANDONED_S = 86_400  # a temporary directory older than that was left by a killed process


def cached(key: str, make: Callable[[], Arrays], can_be: Callable[[Arrays], bool] = lambda found: True) -> Arrays:
    """The cached arrays of this key, which is a file name; if there are none, compute them with `make` and cache them.

    Args:
        can_be: whether cached arrays can be a result of `make`. The checksum alone only says that the file is intact.
    """
    path = folder() / f"{key}.safetensors"
    found = _read(path)
    if found is None or not can_be(found):
        found = make()
        _write(path, found)
    return found


def folder() -> Path:
    """The directory of the token ids."""
    return Path(os.environ.get("MEDQA_CACHE") or os.path.expanduser("~/.cache/medqa")) / "tokens"


def _read(path: Path) -> Arrays | None:
    """The arrays of a file; None if it is missing or damaged.

    The file is read, not memory-mapped: on a network mount, removing a mapped file on another host kills the process.
    """
    try:
        content = read_file(path, MAX_DATA_BYTES)
        arrays = load(content)
        header = parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")])  # the layout of safetensors
    except (Damaged, SafetensorError, ValueError):
        return None
    metadata = header.get("__metadata__")
    whole = isinstance(metadata, dict) and metadata.get(CHECKSUM) == _checksum(arrays)
    with contextlib.suppress(OSError):  # the file may belong to another user
        os.utime(path)  # marks it as recently used
    return arrays if whole else None


def _write(path: Path, arrays: Arrays) -> None:
    """Cache the arrays; without free space or permission, do nothing."""
    put(path, save(arrays, metadata={CHECKSUM: _checksum(arrays)}))
    _remove_old(path.parent, "*.safetensors", KEPT_FILES)


def _remove_old(folder: Path, names: str, kept: int) -> None:
    """Remove the least recently used files with such names, beyond a number of them."""
    with contextlib.suppress(OSError):  # another process may remove files at the same time
        for old in sorted(folder.glob(names), key=lambda each: each.stat().st_mtime)[:-kept]:
            old.unlink(missing_ok=True)


def put(path: Path, content: bytes) -> bool:
    """Write a file of the shared cache atomically; without free space or permission, do nothing and return False."""
    written = False
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=BEGUN, dir=path.parent) as beside:
            unfinished = Path(beside, path.name)
            unfinished.write_bytes(content)
            os.replace(unfinished, path)
            written = True
        for begun in path.parent.glob(BEGUN + "*"):
            if time.time() - begun.stat().st_mtime > ABANDONED_S:
                shutil.rmtree(begun, ignore_errors=True)
    return written


def _checksum(arrays: Arrays) -> str:
    """SHA-256 over names, types and contents."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------
# Results of evaluations: of the baseline, which are the same for every run with that base model and data; and the rows
# that an evaluation has measured so far.
#
# They are JSON files with a checksum, named by a hash of everything that they depend on.


def find(what: Any) -> Any:
    """The cached value that was kept under `what`, a JSON value that identifies it; None if there is none."""
    path = _path(what)
    found = _read_baseline(path)
    with contextlib.suppress(OSError):  # missing, or of another user
        os.utime(path)  # marks it as recently used
    return None if found is None else found["value"]


def keep(what: Any, value: Any) -> bool:
    """Cache a JSON value; without free space or permission, do nothing and return False."""
    found = {"value": value}
    content = json.dumps({**found, "checksum": checksum(found)}, ensure_ascii=False, allow_nan=False)
    kept = put(_path(what), content.encode())
    _remove_old(baseline_folder(), "*.json", KEPT_RESULTS)
    return kept


def forget(what: Any) -> None:
    """Remove the value that was kept under `what`, if there is one and if possible."""
    with contextlib.suppress(OSError):
        _path(what).unlink(missing_ok=True)


def baseline_folder() -> Path:
    """The directory of the baselines' results."""
    return folder().with_name("baselines")


def _path(what: Any) -> Path:
    """The file for the value that `what` identifies."""
    return baseline_folder() / f"{checksum(what)}.json"


def _read_baseline(path: Path) -> dict[str, Any] | None:
    """The content of a file; None if it is missing or damaged."""
    try:
        found = read_json(path, MAX_BASELINE_BYTES)
    except Damaged:
        return None
    if not isinstance(found, dict) or found.keys() != {"value", "checksum"}:
        return None
    return found if found.pop("checksum") == checksum(found) else None
