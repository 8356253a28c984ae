"""Token ids kept on disk between runs, by what they are made of: the texts, the tokenizer, the settings.

In `$MEDQA_CACHE/tokens` (`~/.cache/medqa` where that is not set). A file that is damaged, or that cannot be written, is
as if it were not there. Several processes and runs may share the folder: files are written beside their place and moved
into it. Only numbers are read.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

Arrays = dict[str, np.ndarray]

KEPT_FILES = 30  # the least recently used of more than so many are removed
CHECKSUM = "sha256"


def cached(key: str, make: Callable[[], Arrays]) -> Arrays:
    """What is kept under the key, a file name; else what `make` makes, which is kept from then on."""
    path = folder() / f"{key}.safetensors"
    found = _read(path)
    if found is None:
        found = make()
        _write(path, found)
    return found


def folder() -> Path:
    """Where the files lie."""
    return Path(os.environ.get("MEDQA_CACHE") or os.path.expanduser("~/.cache/medqa")) / "tokens"


def _read(path: Path) -> Arrays | None:
    """A file's arrays; None where it is not there or not whole."""
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            whole = (file.metadata() or {}).get(CHECKSUM) == _checksum(arrays)
    except (OSError, SafetensorError):
        return None
    with contextlib.suppress(OSError):  # another user's
        os.utime(path)  # used now
    return arrays if whole else None


def _write(path: Path, arrays: Arrays) -> None:
    """Keep the arrays; where there is no room or no permission, do without."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as beside:
            unfinished = Path(beside, path.name)
            unfinished.write_bytes(save(arrays, metadata={CHECKSUM: _checksum(arrays)}))
            os.replace(unfinished, path)
        files = sorted(path.parent.glob("*.safetensors"), key=lambda each: each.stat().st_mtime)
        for old in files[:-KEPT_FILES]:
            old.unlink(missing_ok=True)
    except OSError:
        return


def _checksum(arrays: Arrays) -> str:
    """sha256 over names, types and contents."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
