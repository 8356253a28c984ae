"""One process at a time, where the file system has locks: the kernel's, which no dead process holds."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)  # what a file system without locks answers


@contextlib.contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Wait until no other process is in this block for the directory; nothing is written there.

    Where there are no locks, or the directory cannot be opened, nobody waits: what the block does in it then shows.
    """
    try:
        descriptor = os.open(directory, os.O_RDONLY)
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
