"""One run at a time in a directory.

The lock is the kernel's (`flock`), which a dead process does not hold, whatever killed it. Where the file system has
none (some network mounts), what the file says decides: a process of this host, since this boot, that still lives. A
lock left by a machine that is gone holds nobody up.
"""

import errno
import fcntl
import json
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from medqa.errors import UserError
from medqa.training.processes import is_first_process

LOCK_FILE = "run.lock"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


class RunLock:
    """Holds a directory's lock until it is left. Only the first process of a run takes it."""

    def __init__(self, output_dir: Path) -> None:
        self._output_dir = output_dir
        self._file: int | None = None

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def take_if_there(self) -> None:
        """Take the lock of a directory that a run has been in, as the first process of this one; nothing is written.

        Raises:
            UserError: another process holds it.
        """
        if is_first_process() and (self._output_dir / LOCK_FILE).is_file():
            self._take()

    def take(self) -> None:
        """Take the lock, if not taken yet, and write down who has it.

        Raises:
            UserError: another process holds it.
            OSError: the file cannot be written.
        """
        if self._file is None:
            self._take()
        text = json.dumps(this_process()).encode()
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, text, 0)

    def _take(self) -> None:
        """Open and lock the file."""
        path = self._output_dir / LOCK_FILE
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        holder = _holder(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_FLOCK or lives(holder):
                os.close(descriptor)
                who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
                raise UserError(
                    f"--output-dir {self._output_dir}: another run is on in it ({who}); wait for it or stop "
                    "it, or choose another directory"
                ) from error
        self._file = descriptor


def this_process() -> dict[str, Any]:
    """Host, boot and process, so that no other process is taken for this one."""
    process = psutil.Process()
    return {"host": socket.gethostname(), "boot": _boot(), "pid": process.pid, "started": process.create_time()}


def lives(holder: dict[str, Any] | None) -> bool:
    """Whether this holder is a living process of this machine other than this one."""
    if holder is None or (holder["host"], holder["boot"]) != (socket.gethostname(), _boot()):
        return False
    try:
        started = psutil.Process(holder["pid"]).create_time()
    except (psutil.NoSuchProcess, ValueError, TypeError, OverflowError):
        return False
    return holder["pid"] != os.getpid() and abs(started - holder["started"]) < 1


def _holder(descriptor: int) -> dict[str, Any] | None:
    """Who wrote the lock file, None where it does not say."""
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return None
    whole = isinstance(found, dict) and {"host", "boot", "pid", "started"} <= found.keys()
    return found if whole and isinstance(found["started"], int | float) else None


def _boot() -> str:
    """What changes when the machine starts again."""
    return BOOT_ID.read_text().strip() if BOOT_ID.exists() else str(int(psutil.boot_time()))
