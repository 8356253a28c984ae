"""Whether something can be written where an option says, seen before any work is done."""

import errno
import os
import stat
from pathlib import Path

from medqa.errors import UserError

ROOM_BELOW = "x/" * 100  # a path as long as those of the files that are written below a directory


def check_place(path: Path, option: str) -> None:
    """See that a directory is at a path, or can be made there, and can be written to. Nothing is changed.

    Raises:
        UserError: a name on the way is too long, is not a directory, is a link to what is not there, or may not be
            written to.
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
        except OSError as error:  # that it is not there is what is wanted
            if error.errno == errno.ENAMETOOLONG:
                raise UserError(f"{told}: {error.strerror}; choose a shorter one") from error
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{told}: {existing} is not a directory one can write to; choose another")


def require_utf8(path: Path, option: str) -> None:
    """Refuse a path that libraries cannot be told of: those that read and write weights take UTF-8 alone.

    Raises:
        UserError: the path has bytes that are not UTF-8, or the locale does not let Python read them as such.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{option} {path}: not a path in UTF-8; choose another (or set PYTHONUTF8=1 where the locale is ASCII)"
        ) from error


def _is_directory(path: Path, told: str) -> bool:
    """Whether a directory is there; False where nothing is.

    Raises:
        UserError: something else is there.
    """
    try:
        if stat.S_ISDIR(os.stat(path).st_mode):
            return True
        problem = f"{path} is not a directory one can write to"
    except FileNotFoundError:
        if not os.path.islink(path):
            return False
        problem = f"{path} is a link to {os.readlink(path)}, which is not there"
    except OSError as error:
        circle = error.errno == errno.ELOOP
        problem = f"{path} is a link that leads back to itself" if circle else f"{path}: {error.strerror}"
    raise UserError(f"{told}: {problem}; choose another")
