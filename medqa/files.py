"""How files are written durably, locked, and read although they may be damaged or hostile.

Writing: the content goes to a temporary file beside the target, is flushed to the disk, and is renamed into place; then
the directory is flushed. A reader therefore sees the old file or the new one, also after a power cut. Nothing is
written through a symbolic link: a link at the temporary name is removed, and a link at the target is replaced.

Reading: only regular files are opened (opening a pipe would wait for ever, and a device never ends), no more bytes than
`medqa/limits.py` allows are read, and JSON must be strict: no NaN, no Infinity, no numbers beyond 64 bits.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from medqa.limits import MAX_INTEGER, MAX_JSON_BYTES, MAX_JSON_DEPTH

UNFINISHED = ".tmp"
# What fsync answers on file systems that do not support it for this kind of file.
CANNOT_FLUSH = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


class Damaged(Exception):
    """Why a file or a directory cannot be used. The message names the file and the reason."""


class Missing(Damaged):
    """The file is not there."""


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add to the errors of this block which file it was: write() and fsync() do not say so."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def replacing(path: Path, *, among_others: bool = False) -> Iterator[IO[bytes]]:
    """Replace `path` with what the block writes to the yielded binary file, if the block ends without an exception.

    After an exception `path` is as it was before, and no temporary file is left.

    Args:
        among_others: the directory does not belong to a run, and a user may have a file with the temporary name that
            runs use: choose a name that is not in use.

    Raises:
        OSError: the file cannot be written; the error's `filename` is set.
    """
    beside = path.with_name(f".{secrets.token_hex(8)}{UNFINISHED}" if among_others else path.name + UNFINISHED)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    try:
        with naming(path):
            beside.unlink(missing_ok=True)  # left by a killed process, or a planted link
            with os.fdopen(os.open(beside, flags, 0o666), "wb") as file:
                yield file
                file.flush()
                _flush(file.fileno())
            os.replace(beside, path)
            flush(path.parent)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def write_file(path: Path, content: str | bytes, *, among_others: bool = False) -> None:
    """Write a file durably: the file has the new content, or keeps the old one. `among_others` as in `replacing`.

    Text is encoded as UTF-8. Characters that UTF-8 cannot encode (lone surrogates, which stand for undecodable bytes in
    paths) are written as backslash escapes.

    Raises:
        OSError: the file cannot be written; the error's `filename` is set.
    """
    with replacing(path, among_others=among_others) as file:
        file.write(content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace"))


def write_json(value: Any, path: Path) -> None:
    r"""Write a value as an indented JSON file, durably and atomically.

    A lone surrogate in a string becomes the JSON escape `\udcXX`, which JSON readers turn back into the same string.

    Raises:
        OSError: the file cannot be written.
        ValueError: the value holds NaN or infinity.
    """
    write_file(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def copy_file(source: Path, target: Path) -> None:
    """Copy a regular file durably: the target is a complete copy, or what it was before.

    Raises:
        OSError: the source cannot be read or is not a regular file, or the target cannot be written.
    """
    with open_regular(source) as content, replacing(target) as copy:
        shutil.copyfileobj(content, copy, 1 << 20)


def flush(path: Path) -> None:
    """Flush a file's content, or a directory's entries, to the disk.

    Raises:
        OSError: the disk could not be written. A file system that does not support the call is not an error.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            _flush(descriptor)
    finally:
        os.close(descriptor)


def _flush(descriptor: int) -> None:
    """`os.fsync`, except where the file system does not support it."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_FLUSH:
            raise


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file for reading in binary mode. Links to regular files are followed.

    Raises:
        OSError: the file cannot be opened, or it is a pipe, a device, a socket or a directory.
    """
    return os.fdopen(_open(path, os.O_RDONLY), "rb")


def open_in_place(path: Path) -> io.FileIO:
    """Open a regular file for unbuffered reading and writing. Links are not followed.

    Raises:
        OSError: the file cannot be opened, or it is a link, a pipe, a device, a socket or a directory.
    """
    return io.FileIO(_open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0)), "r+")


def _open(path: Path, flags: int) -> int:
    """The descriptor of a regular file. `O_NONBLOCK`, because opening a pipe would wait for its other end."""
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return descriptor


def read_file(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises:
        Missing: the file is not there.
        Damaged: the file is not a regular file, is longer than `limit`, or cannot be read.
    """
    try:
        with open_regular(path) as file:
            content = file.read(limit + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Missing(f"{path}: {error.strerror}") from error
    except OSError as error:
        raise Damaged(f"{path}: {error.strerror}") from error
    if len(content) > limit:
        raise Damaged(f"{path}: longer than {limit:,} bytes")
    return content


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> Any:
    """Read a JSON file that may be hostile or truncated.

    Raises:
        Missing: the file is not there.
        Damaged: the file is not a regular file, is longer than `limit` bytes, or is refused by `parse_json`.
    """
    content = read_file(path, limit)
    try:
        return parse_json(content)
    except ValueError as error:
        raise Damaged(f"{path}: not valid JSON: {error}") from error


def parse_json(text: str | bytes, *, unique_keys: bool = False, any_number: bool = False) -> Any:
    """Parse a JSON text by RFC 8259, within the limits of `medqa/limits.py`.

    Args:
        unique_keys: refuse an object that has a key twice. Without it the last value counts, as in Python's `json`.
        any_number: accept NaN, Infinity and numbers beyond 64 bits, as pandas writes them for missing cells.

    Raises:
        ValueError: the text is not JSON in UTF-8, holds NaN, Infinity, or a number beyond 64 bits (unless
            `any_number`), is nested too deeply, or repeats a key (with `unique_keys`).
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        value = json.loads(
            text,
            parse_constant=None if any_number else _refuse_constant,
            parse_int=None if any_number else _integer,
            parse_float=None if any_number else _float,
            object_pairs_hook=_unique if unique_keys else None,
        )
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if _deeper_than(value, MAX_JSON_DEPTH):
        raise ValueError("nested too deeply")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _integer(digits: str) -> int:
    if len(digits) <= 20 and abs(value := int(digits)) <= MAX_INTEGER:
        return value
    raise ValueError(f"the number {digits[:24]}... is too large")


def _float(digits: str) -> float:
    if math.isfinite(value := float(digits)):
        return value
    raise ValueError(f"the number {digits[:24]} is too large")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key!r} is repeated in one object")
            seen.add(key)
    return found


def _deeper_than(value: Any, limit: int) -> bool:
    """Whether lists and objects are nested more than `limit` deep. Iterative, so that deep nesting cannot overflow."""
    level = [value]
    for _ in range(limit + 1):
        level = [
            child
            for parent in level
            if isinstance(parent, dict | list)
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
        if not level:
            return False
    return any(isinstance(child, dict | list) for child in level)


def checksum(value: Any) -> str:
    """sha256 of a value's JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# ----------------------------------------------------------------------------------------------------
# File locks, so that one process works at a time. The kernel releases the lock of a process that dies.
#
# The library `filelock` is no replacement: it cannot lock a directory, it polls instead of waiting, and it fails where
# the file cannot be opened or the file system has no locks; this code then goes on without waiting.

NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)  # errors of file systems without locks


@contextlib.contextmanager
def alone_in(path: Path) -> Iterator[None]:
    """Wait until no other process is in this block for the path.

    Args:
        path: a directory, or a file, which is created if missing; network mounts pass only locks of files on to other
            hosts. Where the file system has no locks or the path cannot be opened, nobody waits, and an error shows in
            what the block does.
    """
    try:
        flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        descriptor = os.open(path, flags, 0o666)
    except OSError:
        yield
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
        yield
    finally:
        os.close(descriptor)
