"""Run work on untrusted input in a forked process with limits, so that it can neither hang nor fill the memory.

A base model may come with a chat template that loops for ever, a tokenizer that makes gigabytes of a word, or a
configuration that takes hours to build. A timeout by a signal would not help: a signal waits while C or Rust code runs
(one multiplication of a string, one call of a tokenizer), it does not limit memory, and its handler would conflict with
the one that stops runs. A forked process has everything loaded, starts within milliseconds, can be killed at any
moment, and its memory can be limited without limiting the parent's.

The work must not use the network, a GPU, or several threads, because these belong to the parent process.
"""

import contextlib
import faulthandler
import json
import os
import resource
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from medqa.limits import WORK_BYTES, WORK_SECONDS, WORK_WAIT_SECONDS

PARALLELISM = "TOKENIZERS_PARALLELISM"


class Failed(Exception):
    """The work raised an exception; the text has its type and message."""


class OverLimit(Failed):
    """The work exceeded a limit; the text names the limit."""


def limited(work: Callable[[], Any]) -> Any:
    """The result of `work`, computed in a forked process. It must be a JSON value.

    Raises:
        OverLimit: it took more time or memory than `medqa/limits.py` allows.
        Failed: it raised an exception.
    """
    reading, writing = os.pipe()
    child = _fork()
    if child == 0:
        _work_and_exit(work, writing)
    os.close(writing)
    try:
        answer = _read(reading)
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if answer is None:
        raise OverLimit(f"it does not end within {WORK_WAIT_SECONDS} s")
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        raise OverLimit(f"it takes more than {WORK_SECONDS} s")
    said = json.loads(answer) if answer.endswith(b"\n") else {"error": "MemoryError"}
    if said.get("error", "").startswith("MemoryError"):
        raise OverLimit(f"it takes more than {WORK_BYTES >> 20:,} MiB of memory, or crashes")
    if "error" in said:
        raise Failed(said["error"])
    return said["result"]


def _fork() -> int:
    """`os.fork`, without the warnings about threads and about parallelism in tokenizers."""
    before = os.environ.get(PARALLELISM)
    os.environ[PARALLELISM] = "false"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if child != 0:
        del os.environ[PARALLELISM]
        if before is not None:
            os.environ[PARALLELISM] = before
    return child


def _work_and_exit(work: Callable[[], Any], writing: int) -> NoReturn:
    """Run the work within the limits, write the result or the error, and end the process without cleaning up."""
    said: dict[str, Any] = {}
    try:
        try:
            for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(name, signal.SIG_DFL)
            silent = os.open(os.devnull, os.O_RDWR)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            faulthandler.disable()  # an abort for lack of memory is an expected result, not a bug
            _limit()
            said = {"result": work()}
        finally:
            error = sys.exception()
            if error is not None:
                reason = " ".join(str(error).split())[:300]
                said = {"error": f"{type(error).__name__}: {reason}" if reason else type(error).__name__}
            with os.fdopen(writing, "wb") as file:
                file.write(json.dumps(said).encode() + b"\n")
    finally:
        os._exit(0)  # whatever happens: the child must never continue as if it were the parent


def _limit() -> None:
    """Limit this process's CPU time, its memory beyond the current size, and core dumps."""
    limits = {resource.RLIMIT_CPU: WORK_SECONDS, resource.RLIMIT_CORE: 0}
    with contextlib.suppress(OSError):  # without /proc, as on macOS, memory cannot be limited
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limits[resource.RLIMIT_AS] = pages * resource.getpagesize() + WORK_BYTES
    for which, wanted in limits.items():
        _, hard = resource.getrlimit(which)
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(which, (allowed, hard))


def _read(reading: int) -> bytes | None:
    """Read until the other end is closed; None after a timeout."""
    end, found = time.monotonic() + WORK_WAIT_SECONDS, bytearray()
    while (left := end - time.monotonic()) > 0:
        if select.select([reading], [], [], left)[0]:
            part = os.read(reading, 1 << 20)
            if not part:
                return bytes(found)
            found += part
    return None
