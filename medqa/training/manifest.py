"""A directory's manifest: what must be in it for it to be whole, with a checksum of its own.

Whatever wrote a directory (this process, a copy to a network share, a download), the manifest alone decides whether it
is whole. It is JSON, and the files that it names are fixed by the reader, never by the file.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from medqa.files import Damaged, open_regular, read_json
from medqa.limits import MAX_CHECKPOINT_FILE_BYTES

MANIFEST = "manifest.json"
FORMAT = 1


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


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest, its own checksum verified, the files not looked at.

    Raises:
        Damaged: missing, not readable as one, or changed since it was written.
    """
    try:
        body = read_json(directory / MANIFEST)
    except Damaged as error:
        reason = str(error).removeprefix(f"{directory / MANIFEST}: ")
        raise Damaged(f"{MANIFEST}: {reason}") from error
    if not isinstance(body, dict) or not {"format", "files", "checksum"} <= body.keys():
        raise Damaged(f"{MANIFEST} is torn")
    if body.pop("checksum") != checksum(body):
        raise Damaged(f"{MANIFEST}: its own checksum is wrong")
    if body["format"] != FORMAT:
        raise Damaged(f"{MANIFEST} is of another version: its format is not {FORMAT}")
    return body


def measure(path: Path) -> dict[str, Any]:
    """Size in bytes and sha256 of a file.

    Raises:
        OSError: it cannot be read, or is no regular file (opening a pipe would never end).
    """
    with open_regular(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"size": file.tell(), "sha256": digest}


def checksum(value: Any) -> str:
    """sha256 of a value's JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
