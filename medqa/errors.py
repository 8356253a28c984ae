"""The ways a run ends early on purpose, and the exit code each one has.

Everything else that escapes is a defect of ours: it keeps its traceback and exits with 1. A launcher makes 1 of every
code; so the first process also adds one word, a line, to the file that `$MEDQA_ENDING` names, where that is set:
`complete`, `in-time` (`--stop-after`), `signal`, `mistake` (the user's), `busy` (another run is on in the directory),
`stopped` (training stopped itself) or `lost` (another process died or did not answer); and before that `saved` for
every checkpoint. `launch/slurm.sbatch` reads it.
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
# What a disk, a mount or the system's limits answer, and no mistake of a program can cause.
OF_THE_SYSTEM = (
    errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ENXIO, errno.EBUSY, errno.EMFILE,
    errno.ENFILE, errno.ENAMETOOLONG, errno.ELOOP,
    getattr(errno, "EREMOTEIO", errno.EIO),  # Linux alone has it
)  # fmt: skip
# What torch's RuntimeErrors say: of a CPU, of a file that is mapped, of a GPU without an error of its own for that.
OUT_OF_MEMORY = ("can't allocate memory", "Cannot allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
LOST = "another process of this run has died or has not answered for training.process_timeout_s"
ENDING = "MEDQA_ENDING"
LAUNCHER_DIED = signal.SIGUSR1  # asked of the kernel in `training/stopping.py`
EXIT_USER_ERROR = 2
EXIT_TRAINING_STOPPED = 3


class UserError(Exception):
    """Something the user can mend: a bad option, key, file or row, missing data, no space.

    Its arguments are the problems, one message each, and the whole of what the user sees: what is wrong, where, and
    what to do.
    """

    def __str__(self) -> str:
        return listed(self.args)


class NotWritten(UserError):
    """A file cannot be written, because there is no space or no permission, or because its disk has gone."""


class Busy(UserError):
    """Another run is on in the output directory; it may end by itself."""


class TrainingStopped(Exception):
    """Training stopped itself: a non-finite loss or gradient, or out of memory. The last checkpoint stands."""


class ProcessStopped(TrainingStopped):
    """One of several processes stopped itself; the others do not know why, so that it must say so."""


class StoppedInTime(Exception):
    """`--stop-after` was reached: all is saved, and the run can be resumed."""


class Interrupted(BaseException):
    """Stopped by a signal. No `Exception`, so that nothing on the way takes it for a failure of its own."""

    def __init__(self, signum: int) -> None:
        name = signal.Signals(signum).name
        super().__init__("the launcher's end" if signum == LAUNCHER_DIED else name)
        self.signum = signum


def exit_code(body: Callable[[], None]) -> int:
    """Run `body` and give its exit code; what ended it early is said on stderr, by the first process of each host."""
    try:
        body()
    except UserError as error:
        return _say(error, f"error: {error}", EXIT_USER_ERROR, "busy" if isinstance(error, Busy) else "mistake")
    except (MemoryError, OSError, RuntimeError) as error:
        if is_out_of_memory(error):
            return _say(error, _no_memory(error), EXIT_TRAINING_STOPPED, "stopped")
        if isinstance(error, OSError) and (why := refusal(error)) is not None:
            return _say(error, f"error: {why}", EXIT_USER_ERROR, "mistake")
        if isinstance(error, RuntimeError) and _lost_a_process(error):
            return _say_alone(error, f"{LOST}: {str(error).splitlines()[0]}", EXIT_TRAINING_STOPPED, "lost")
        raise
    except ProcessStopped as error:
        return _say_alone(error, f"training stopped: {error}", EXIT_TRAINING_STOPPED, "stopped")
    except TrainingStopped as error:
        return _say(error, f"training stopped: {error}", EXIT_TRAINING_STOPPED, "stopped")
    except StoppedInTime as error:
        return _say(error, str(error), 0, "in-time")
    except Interrupted as error:
        return _say(error, f"stopped by {error}", 128 + error.signum, "signal")
    note("complete")
    return 0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory, on whatever device: torch has an exception of its own for that on a GPU alone."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    in_words = isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
    return in_words or isinstance(error, MemoryError | torch.OutOfMemoryError)


def _no_memory(error: BaseException) -> str:
    """What the user is told of memory that was not there."""
    what = str(error).partition("\n")[0] or "out of memory"
    return (
        f"training stopped: {what}; lower training.per_device_batch_size (training.micro_batch_tokens without padding) "
        "or tokenization.max_length, use model.quantization=4bit, or start it where there is more memory"
    )


def refusal(error: OSError, directory: Path | None = None, existed: bool = True) -> str | None:
    """What the user is told of a file that the system refuses to read or write; None where it is a defect of ours.

    Args:
        directory: what is being written to. Inside it every refusal is the system's, elsewhere those that no program
            can cause. Where the system does not say which file it was, no file is blamed.
        existed: whether that was there. Of a directory that no one has made yet it is not said that it has gone.
    """
    named = None if error.filename is None else Path(str(error.filename))
    inside = directory is not None and named is not None and named.absolute().is_relative_to(directory.absolute())
    of_the_system = error.errno in (*NO_SPACE, *OF_THE_SYSTEM) or (named is not None and error.errno in NO_PERMISSION)
    if is_out_of_memory(error) or not (inside or of_the_system):
        return None
    gone = directory is not None and error.errno not in NO_SPACE and not os.path.isdir(directory)
    below = inside and named != directory and error.errno == errno.ENOENT  # it was made in the meantime
    if gone and ((existed and (inside or named is None)) or below):
        return f"{directory}: has been removed, or is not mounted any more; see to it, then start again"
    advice = "make room there" if error.errno in NO_SPACE else "see to it"
    if named is not None:
        return f"{named}: {error.strerror}; {advice}, then start again"
    places = f"temporary files ({os.environ.get('TMPDIR', '/tmp')})" + (f" and of {directory}" if directory else "")
    return (
        f"{error.strerror}; the system does not say which file it was. Look at the disks of {places}; {advice}, then "
        "start again"
    )


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Turn the system's refusal to write in a directory into what the user is told.

    Raises:
        NotWritten: no space, no permission, or the directory has gone.
    """
    existed = os.path.isdir(directory)
    try:
        yield
    except OSError as error:
        if (why := refusal(error, directory, existed)) is None:
            raise
        raise NotWritten(why) from error


@contextlib.contextmanager
def saying_what_is_saved(saved: Callable[[], str]) -> Iterator[None]:
    """Add to whatever ends a run early what is left of it, for the message that `exit_code` gives.

    Args:
        saved: says it, as a sentence about a checkpoint or its absence.
    """
    try:
        yield
    except (NotWritten, TrainingStopped, StoppedInTime, Interrupted, RuntimeError) as error:
        error.add_note(saved())
        raise


def _lost_a_process(error: RuntimeError) -> bool:
    """Whether it says that another process of the run has died or does not answer. gloo's is a plain RuntimeError."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return several and (isinstance(error, torch.distributed.DistError) or "gloo" in str(error))


def _say(error: BaseException, message: str, code: int, ending: str) -> int:
    """Print once on each host, whatever the number of processes, note the ending, and hand the code through.

    Processes of one host see the same files, so that what one has to say all have; another host may lack them.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print_error(_with_notes(error, message))
    note(ending)
    return code


def _say_alone(error: BaseException, message: str, code: int, ending: str) -> int:
    """Print what this process alone knows, note the ending, and hand the code through."""
    print_error(f"process {os.environ.get('RANK', '0')}: {_with_notes(error, message)}")
    note(ending)
    return code


def _with_notes(error: BaseException, message: str) -> str:
    """The message, and what was added to the error on its way."""
    return "\n".join([message, *getattr(error, "__notes__", ())])


def note(word: str) -> None:
    """Add the word to the file that is named for it; one that cannot be written is said, and changes nothing else."""
    path = os.environ.get(ENDING)
    if path and os.environ.get("RANK", "0") == "0":
        try:
            # Without waiting: opening a pipe that nobody reads would wait for ever.
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(word + "\n")
        except OSError as error:
            print_error(f"${ENDING}={path}: {error.strerror}")


def together(*steps: Callable[[], Any]) -> list[Any]:
    """The results of all steps, each tried even if one before it failed.

    Raises:
        UserError: with the problems of all that failed, so that they can be mended in one go.
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
    """Several problems as one message: one alone as it is, more as an indented list."""
    return problems[0] if len(problems) == 1 else "".join(f"\n  - {problem}" for problem in problems)
