"""One run at a time in a directory.

The lock is the kernel's (`flock`), which a dead process does not hold, whatever killed it. Where the file system has
none (some network mounts), what the file says decides: a process of this host, since this boot, that still lives. A
lock left by a machine that is gone holds nobody up.

The hard case is a host that is cut off and alive, on a file system where a lock holds on one host alone, or is taken
from a host that does not answer (NFS does both). Another host then gets the lock. Whoever takes it writes its name into
the file, and each writer looks there before it writes (`check`): the older one finds another's name, and stops without
writing. So the last to take a directory has it. What the older one was just writing is whole or absent, and of the same
run; where the lock holds on all hosts, it is not even that, for the newer one is refused until the older one has ended
(a process of several that gets no answer does, within `training.process_timeout_s`).
"""

import errno
import fcntl
import json
import os
import socket
import stat
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import psutil
from pydantic import BaseModel, ConfigDict, Field

from medqa.data.file_lock import NO_FLOCK
from medqa.errors import Busy, UserError
from medqa.files import naming, parse_json
from medqa.training.processes import is_first_process

LOCK_FILE = "run.lock"
LONGEST = 4096  # bytes of it that are read
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Holder(BaseModel):
    """What a lock file says of who has it: host, that host's boot, process number, its start in seconds since 1970."""

    model_config = ConfigDict(strict=True)

    host: str
    boot: str
    pid: Annotated[int, Field(gt=0)]
    started: float


class RunLock:
    """Holds a directory's lock until it is left. Only the first process of a run takes it."""

    def __init__(self, output_dir: Path) -> None:
        self._output_dir = output_dir
        self._file: int | None = None
        self._mine: dict[str, Any] | None = None  # what the file says from when this run has written there

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = self._mine = None

    def take_if_there(self) -> None:
        """Take the lock of a directory that a run has been in, as the first process of this one; nothing is written.

        Raises:
            UserError: another process holds it.
        """
        if is_first_process() and os.path.lexists(self._output_dir / LOCK_FILE):
            self._take()

    def take(self) -> None:
        """Take the lock, if not taken yet, and write down who has it.

        Raises:
            UserError: another process holds it.
            OSError: the file cannot be written.
        """
        if self._file is None:
            self._take()
        assert self._file is not None
        self._mine = this_process()
        text = json.dumps(self._mine).encode()
        with naming(self._output_dir / LOCK_FILE):
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, text, 0)
            os.fsync(self._file)  # for the other hosts of a network mount to see

    def check(self) -> None:
        """See that nobody else has taken the directory since; to be asked before each write.

        Raises:
            UserError: another run has.
        """
        if self._mine is None:
            return
        try:  # by its name: a network mount then asks the server who is in it now
            descriptor = self._open(os.O_RDONLY)
        except FileNotFoundError:
            return  # removed by hand: nobody has taken it
        try:
            holder = _holder(descriptor)
        finally:
            os.close(descriptor)
        if holder is not None and holder != self._mine:
            raise UserError(
                f"--output-dir {self._output_dir}: another run (process {holder['pid']} on {holder['host']}) has taken "
                "it over while this one got no answer or had lost its lock; this one has stopped and leaves it alone"
            )

    def _take(self) -> None:
        """Open and lock the file."""
        descriptor = self._open(os.O_RDWR | os.O_CREAT)
        holder = _holder(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_FLOCK or lives(holder):
                os.close(descriptor)
                who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
                raise Busy(
                    f"--output-dir {self._output_dir}: another run is on in it ({who}); wait for it or stop "
                    "it, or choose another directory"
                ) from error
        self._file = descriptor

    def _open(self, flags: int) -> int:
        """A descriptor of the lock file.

        Raises:
            UserError: something else than a regular file is there.
            OSError: it cannot be opened.
        """
        path = self._output_dir / LOCK_FILE
        problem = f"--output-dir {self._output_dir}: {LOCK_FILE} is not a regular file; remove it, or choose another"
        try:
            descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):  # a link, a directory, a socket or a pipe
                raise UserError(problem) from error
            raise
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise UserError(problem)
        return descriptor


def this_process() -> dict[str, Any]:
    """Host, boot and process, so that no other process is taken for this one."""
    process = psutil.Process()
    found = Holder(host=socket.gethostname(), boot=_boot(), pid=process.pid, started=process.create_time())
    return found.model_dump()


def lives(holder: dict[str, Any] | None) -> bool:
    """Whether this holder is a living process of this machine other than this one."""
    if holder is None or (holder["host"], holder["boot"]) != (socket.gethostname(), _boot()):
        return False
    try:
        started = psutil.Process(holder["pid"]).create_time()
    except (psutil.NoSuchProcess, OverflowError):
        return False
    return holder["pid"] != os.getpid() and abs(started - holder["started"]) < 1


def _holder(descriptor: int) -> dict[str, Any] | None:
    """Who wrote the lock file, None where it does not say."""
    try:
        return Holder.model_validate(parse_json(os.pread(descriptor, LONGEST, 0))).model_dump()
    except ValueError:  # pydantic's is one, too
        return None


def _boot() -> str:
    """What changes when the machine starts again."""
    return BOOT_ID.read_text().strip() if BOOT_ID.exists() else str(int(psutil.boot_time()))
