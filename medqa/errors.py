"""The ways a run ends early on purpose, and the exit code each one has.

Every other exception is a defect of this code: it keeps its traceback, and the exit code is 1. A launcher turns every
exit code into 1. So the first process also appends one word, on a line of its own, to the file that `$MEDQA_ENDING`
names, if that variable is set: `complete`, `in-time` (`--stop-after`), `signal`, `mistake` (a user error), `busy`
(another run uses the directory), `stopped` (training stopped itself) or `lost` (another process died or did not
answer); and before that `saved` for every checkpoint. `launch/slurm.sbatch` reads this file.
"""

import contextlib
import errno
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from medqa.terminal import print_error

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_PERMISSION = (errno.EACCES, errno.EPERM)
# Errors of a disk, a mount or the limits of the system, which no mistake of a program can cause.
SYSTEM_ERRORS = (
    errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ENXIO, errno.EBUSY, errno.EMFILE,
    errno.ENFILE, errno.ENAMETOOLONG, errno.ELOOP,
    getattr(errno, "EREMOTEIO", errno.EIO),  # on Linux only
)  # fmt: skip
# Parts of the messages of RuntimeErrors that mean out of memory and are not a torch.OutOfMemoryError.
OUT_OF_MEMORY = (
    "can't allocate memory",  # a CPU: "DefaultCPUAllocator: can't allocate memory"
    "Cannot allocate memory",  # a file that torch maps into memory
    "out of memory",  # the CUDA runtime and driver: "CUDA error: out of memory", "CUDA driver error: out of memory"
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
)
LOST_PROCESS = "another process of this run has died or has not answered for training.process_timeout_s"
ENDING = "MEDQA_ENDING"
LAUNCHER_DIED = signal.SIGUSR1  # the kernel sends it; `training/stopping.py` asks for that
EXIT_USER_ERROR = 2
EXIT_TRAINING_STOPPED = 3


class UserError(Exception):
    """An error that the user can correct: a bad option, key, file or row, missing data, no space.

    Its arguments are the problems, one message each. The user sees nothing else, so each message says what is wrong,
    where, and what to do.
    """

    def __str__(self) -> str:
        return listed(self.args)


class NotWritten(UserError):
    """A file cannot be written: there is no space or no permission, or the disk is no longer there."""


class Busy(UserError):
    """Another run is using the output directory. The same command works when that run has ended."""


class TrainingStopped(Exception):
    """Training stopped itself: a non-finite loss or gradient, or out of memory. Saved checkpoints stay valid."""


class ProcessStopped(TrainingStopped):
    """One of several processes stopped itself. The others do not know why, so this process prints the reason."""


class StoppedInTime(Exception):
    """The run stopped before the `--stop-after` deadline. A checkpoint is saved, and the run can be resumed."""


class Interrupted(BaseException):
    """The run was stopped by a signal. It is no `Exception`, so that no `except Exception` of a library catches it."""

    def __init__(self, signum: int) -> None:
        name = signal.Signals(signum).name
        super().__init__("the end of the launcher" if signum == LAUNCHER_DIED else name)
        self.signum = signum


def exit_code(body: Callable[[], None]) -> int:
    """Run `body` and return its exit code. If an error ends it, the first process of each host prints it on stderr."""
    try:
        body()
    except UserError as error:
        return _report(error, f"error: {error}", EXIT_USER_ERROR, "busy" if isinstance(error, Busy) else "mistake")
    except (MemoryError, OSError, RuntimeError) as error:
        if is_out_of_memory(error):
            return _report(error, _out_of_memory_message(error), EXIT_TRAINING_STOPPED, "stopped")
        if isinstance(error, OSError) and (why := refusal(error)) is not None:
            return _report(error, f"error: {why}", EXIT_USER_ERROR, "mistake")
        if isinstance(error, RuntimeError) and _lost_a_process(error):
            return _report_alone(error, f"{LOST_PROCESS}: {str(error).splitlines()[0]}", EXIT_TRAINING_STOPPED, "lost")
        raise
    except ProcessStopped as error:
        return _report_alone(error, f"training stopped: {error}", EXIT_TRAINING_STOPPED, "stopped")
    except TrainingStopped as error:
        return _report(error, f"training stopped: {error}", EXIT_TRAINING_STOPPED, "stopped")
    except StoppedInTime as error:
        return _report(error, str(error), 0, "in-time")
    except Interrupted as error:
        return _report(error, f"stopped by {error}", 128 + error.signum, "signal")
    note("complete")
    return 0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error means out of memory, on any device. torch has an exception class for it on a GPU only."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    by_message = isinstance(error, RuntimeError) and any(part in str(error) for part in OUT_OF_MEMORY)
    return by_message or isinstance(error, MemoryError | torch.OutOfMemoryError)


def _out_of_memory_message(error: BaseException) -> str:
    """The message for a run that ended because it was out of memory."""
    what = str(error).partition("\n")[0] or "out of memory"
    return (
        f"training stopped: {what}; lower training.per_device_batch_size (with training.padding_free: "
        "training.micro_batch_tokens) or tokenization.max_length, use model.quantization=4bit, or use a machine with "
        "more memory"
    )


def refusal(error: OSError, directory: Path | None = None, existed: bool = True) -> str | None:
    """The message for a file that the system refuses to read or write; None if the error is a defect of this code.

    Args:
        directory: the directory being written to. Inside it every error counts as an error of the system; outside it,
            only those of `NO_SPACE`, `SYSTEM_ERRORS`, and of permissions for a file that the error names.
        existed: whether `directory` existed before. If not, the message does not say that it has been removed.
    """
    named = None if error.filename is None else Path(str(error.filename))
    inside = directory is not None and named is not None and named.absolute().is_relative_to(directory.absolute())
    by_system = error.errno in (*NO_SPACE, *SYSTEM_ERRORS) or (named is not None and error.errno in NO_PERMISSION)
    if is_out_of_memory(error) or not (inside or by_system):
        return None
    gone = directory is not None and error.errno not in NO_SPACE and not os.path.isdir(directory)
    below = inside and named != directory and error.errno == errno.ENOENT  # the run made it meanwhile
    if gone and ((existed and (inside or named is None)) or below):
        return f"{directory}: has been removed, or is no longer mounted; restore or mount it, then start again"
    advice = "free space there" if error.errno in NO_SPACE else "correct this"
    if named is not None:
        return f"{named}: {error.strerror}; {advice}, then start again"
    disks = f"temporary files ({os.environ.get('TMPDIR', '/tmp')})" + (f" and of {directory}" if directory else "")
    return (
        f"{error.strerror}; the system does not say for which file. Check the disks of {disks}; {advice}, then start "
        "again"
    )


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Turn an OSError from writing to a directory into an error that the user understands.

    Raises:
        NotWritten: no space, no permission, or the directory has been removed.
    """
    existed = os.path.isdir(directory)
    try:
        yield
    except OSError as error:
        if (why := refusal(error, directory, existed)) is None:
            raise
        raise NotWritten(why) from error


@contextlib.contextmanager
def adding_what_is_saved(saved: Callable[[], str]) -> Iterator[None]:
    """Add a sentence about the saved checkpoint to any error that ends a run early; `exit_code` prints it.

    Args:
        saved: returns the sentence.
    """
    try:
        yield
    except (NotWritten, TrainingStopped, StoppedInTime, Interrupted, RuntimeError) as error:
        error.add_note(saved())
        raise


def _lost_a_process(error: RuntimeError) -> bool:
    """Whether the error means that another process of the run died or does not answer. gloo raises a RuntimeError."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return several and (isinstance(error, torch.distributed.DistError) or "gloo" in str(error))


def _report(error: BaseException, message: str, code: int, ending: str) -> int:
    """Print the message once on each host, write the ending to `$MEDQA_ENDING`, and return `code`.

    Processes of one host see the same files and therefore have the same error; another host may not have them.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print_error(_with_notes(error, message))
    note(ending)
    return code


def _report_alone(error: BaseException, message: str, code: int, ending: str) -> int:
    """Print a message that only this process has, write the ending to `$MEDQA_ENDING`, and return `code`."""
    print_error(f"process {os.environ.get('RANK', '0')}: {_with_notes(error, message)}")
    note(ending)
    return code


def _with_notes(error: BaseException, message: str) -> str:
    """The message, followed by the notes of the error (`add_note`)."""
    return "\n".join([message, *getattr(error, "__notes__", ())])


def note(word: str) -> None:
    """Append a word to the file that `$MEDQA_ENDING` names. A failure is printed, and otherwise ignored."""
    path = os.environ.get(ENDING)
    if path and os.environ.get("RANK", "0") == "0":
        try:
            # O_NONBLOCK, because opening a pipe that nobody reads would wait for ever
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(word + "\n")
        except OSError as error:
            print_error(f"${ENDING}={path}: {error.strerror}")


def together(*steps: Callable[[], Any]) -> list[Any]:
    """The results of all steps. Each step runs even if an earlier one failed.

    Raises:
        UserError: with the problems of all steps that failed, so that the user can correct them at once.
    """
    results: list[Any] = []
    problems: list[str] = []
    for step in steps:
        try:
            results.append(step())
        except UserError as error:
            problems += error.args
    if problems:
        raise UserError(*problems)
    return results


def listed(problems: Sequence[str]) -> str:
    """Problems as one message: a single problem unchanged, several as an indented list."""
    return problems[0] if len(problems) == 1 else "".join(f"\n  - {problem}" for problem in problems)
