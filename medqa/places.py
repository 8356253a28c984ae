"""Check that the directories and files named by options can be written, before any work is done."""

import errno
import os
import stat
from pathlib import Path

from medqa.errors import UserError

ROOM_BELOW = "x/" * 100  # as long as the paths of the files that are written below a directory


def check_place(path: Path, option: str) -> None:
    """Check that a directory exists at a path or can be created there, and can be written to. Nothing is changed.

    Raises:
        UserError: a component of the path is too long, is not a directory, is a dangling link, or is not writable.
    """
    told = f"{option} {path}"
    try:
        whole = path.absolute()
    except FileNotFoundError as error:
        raise UserError(f"{told}: the working directory has been removed; change to another") from error
    existing = Path(whole.anchor)
    missing: list[str] = []
    for name in whole.parts[1:]:
        if missing or not _is_directory(existing / name, told):
            missing.append(name)
        else:
            existing /= name
    for longest in (*(existing / name for name in missing), whole / ROOM_BELOW):
        try:
            os.lstat(longest)
        except OSError as error:  # it is expected not to exist
            if error.errno == errno.ENAMETOOLONG:
                raise UserError(f"{told}: {error.strerror}; choose a shorter one") from error
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{told}: the directory {existing} is not writable; choose another")


def require_utf8(path: Path, option: str) -> None:
    """Refuse a path that is not UTF-8, because the libraries that read and write weights accept only UTF-8.

    Raises:
        UserError: the path has bytes that are not UTF-8, or the locale does not let Python decode it.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{option} {path}: the path is not UTF-8; choose another (or set PYTHONUTF8=1 if the locale is ASCII)"
        ) from error


def _is_directory(path: Path, told: str) -> bool:
    """Whether there is a directory; False if there is nothing.

    Raises:
        UserError: there is something that is not a writable directory.
    """
    try:
        if stat.S_ISDIR(os.stat(path).st_mode):
            return True
        problem = f"{path} is not a directory"
    except FileNotFoundError:
        if not os.path.islink(path):
            return False
        problem = f"{path} is a link to {os.readlink(path)}, which does not exist"
    except OSError as error:
        circle = error.errno == errno.ELOOP
        problem = f"{path} is a link that leads to itself" if circle else f"{path}: {error.strerror}"
    raise UserError(f"{told}: {problem}; choose another")
