"""One process at a time, where the file system has locks: the kernel's, which no dead process holds.

The library `filelock` does not replace it: it locks no directory, asks again and again instead of waiting, and fails
where the file cannot be opened or its file system has no locks, where here nobody waits.
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)  # what a file system without locks answers


@contextlib.contextmanager
def alone_in(path: Path) -> Iterator[None]:
    """Wait until no other process is in this block for the path.

    Args:
        path: a directory, or a file that is made if there is none: network mounts hand on to other hosts the locks of
            files alone. Where there are no locks, or it cannot be opened, nobody waits: what the block does then shows.
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
