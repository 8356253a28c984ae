"""The one place that talks to the console: how anything reaches standard output and standard error, and how it looks.

The console is not the run. A reader that has gone (`| head`, Ctrl-C with `| tee log`, a lost ssh connection), a full
disk under the log, a closed stream or an encoding without the character never ends or changes what is being done:
what cannot be written is left out. `protect` sees to that for everything that writes to `sys.stdout` and `sys.stderr`,
which also includes plain `print`, progress bars, warnings, logging, and the flush when the interpreter exits.

What data, models and files of other people say is shown as text: control characters become visible escapes, and
neither markup nor emoji names are interpreted.
"""

import contextlib
import errno
import io
import json
import os
import re
import select
import sys
import unicodedata
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

NOTEBOOK_VARIABLES = ("COLAB_RELEASE_TAG", "COLAB_GPU", "JPY_PARENT_PID", "KAGGLE_KERNEL_RUN_TYPE")
PLAIN_WIDTH = 160
# Errors after which nobody reads any more. After any other error, a full disk for example, later text is tried again.
NOBODY_READS = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.ECONNRESET)
WAIT_FOR_READER_S = 10  # of a pipe that somebody else made non-blocking
# Categories of characters that could steer a terminal, hide text or reorder it: control characters, formats (overrides
# of the writing direction among them), halves of surrogate pairs, separators of lines and paragraphs.
UNSAFE_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp")
JOINERS = "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"  # emoji and Indic scripts are written with them
UNUSUAL = re.compile(r"[^\x20-\x7e\n\t]")

# What stands between `scheme://` and the last `@` before the path of an address. A password may have the characters
# that end the host: after `user:` it is the last `@` of the word, unless what follows the colon is a port.
CREDENTIALS = re.compile(r"(?<=://)(?:[^/?#\s@:]*:(?!\d+[/?#])(?:(?!://)\S)*|[^/?#\s]*)@")


def printable(text: str) -> str:
    r"""Text of unknown origin, safe to show on a terminal: ESC becomes `\x1b`, a right-to-left override `\u202e`.

    Addresses are shown without user names and passwords.
    """
    return UNUSUAL.sub(_shown, without_credentials(text))


def without_credentials(text: str) -> str:
    """Text in which each address `http://user:password@host` is written without what stands before its `@`."""
    return CREDENTIALS.sub("", text) if "@" in text else text


def _shown(match: re.Match[str]) -> str:
    """One character as `printable` shows it."""
    character = match[0]
    if character in JOINERS or unicodedata.category(character) not in UNSAFE_CATEGORIES:
        return character
    return character.encode("unicode_escape").decode("ascii")


class _Forgiving(io.RawIOBase):
    """The lowest layer of a text stream: what the system refuses to take counts as written."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self.nobody_reads = False
        self.name = getattr(stream, "name", None)
        self._stream = stream  # kept, because it closes the file when it is collected
        self._descriptor = stream.fileno()

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        while left and not self.nobody_reads:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:
                if not select.select([], [self._descriptor], [], WAIT_FOR_READER_S)[1]:
                    break
            except OSError as error:
                self.nobody_reads = error.errno in NOBODY_READS
                break
        return memoryview(data).nbytes


def protect() -> None:
    """Make standard output and standard error forgiving, for the rest of the process. Safe to call again.

    Descriptors that were closed are opened on the null device; otherwise a file of the run would get their number, and
    with it what a library writes there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number, inheritable=True)
                os.close(null)
            os.set_inheritable(number, True)
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        closed = stream is None or stream.closed
        setattr(sys, name, open(os.devnull, "w", encoding="utf-8") if closed else _forgiving(stream))  # noqa: SIM115


def _forgiving(stream: TextIO) -> TextIO:
    """A stream like this one, whose writes do not fail. A stream that is no file (a notebook's) stays as it is."""
    if not isinstance(stream, io.TextIOWrapper) or _lowest(stream) is not None:
        return stream
    stream.reconfigure(errors="backslashreplace")  # it stays in use where a library took it before
    with contextlib.suppress(OSError, ValueError):
        stream.flush()
    try:
        lowest = _Forgiving(stream)
    except (OSError, ValueError):  # in memory
        return stream
    return io.TextIOWrapper(
        lowest if stream.write_through else io.BufferedWriter(lowest),  # the first: PYTHONUNBUFFERED
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _lowest(stream: Any) -> _Forgiving | None:
    """The layer that forgives, of a stream that `protect` made."""
    buffer = getattr(stream, "buffer", None)
    lowest = getattr(buffer, "raw", buffer)
    return lowest if isinstance(lowest, _Forgiving) else None


def nobody_reads() -> bool:
    """Whether the reader of standard output has gone, so that printing more is no use."""
    lowest = _lowest(sys.stdout)
    return lowest is not None and lowest.nobody_reads


class SafeConsole(Console):
    """rich's console, which shows every string as text of unknown origin and does not exit when its reader has gone."""

    def render_str(self, text: str, **options: Any) -> Text:
        """What rich makes of each string, of a table's cells and titles too. A `Text` is taken as it is."""
        return super().render_str(printable(text), **options)

    def on_broken_pipe(self) -> None:
        """What rich calls for a stream that `protect` could not make forgiving."""
        self.quiet = True


def make_console(speaks: bool = True) -> Console:
    """The console of a run or a command.

    Args:
        speaks: False for the processes of a run other than its first, which show nothing.

    On a terminal that is rich's display; elsewhere, notebooks included (Colab's `!` claims to be a terminal, and what
    is redrawn there floods the page), plain lines without control codes, of a fixed width.
    """
    protect()
    in_notebook = any(name in os.environ for name in NOTEBOOK_VARIABLES)
    console = SafeConsole(
        quiet=not speaks,
        highlight=False,
        markup=False,  # a path may have brackets
        emoji=False,  # or colons
        force_terminal=False if in_notebook else None,
    )
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    return console


def print_error(message: str) -> None:
    """A line on standard error."""
    print(printable(message), file=sys.stderr, flush=True)


def print_json(value: Any, **options: Any) -> None:
    """A value on standard output as JSON; `options` are those of `json.dumps`.

    What standard output cannot show, or what could steer a terminal, has JSON's own escapes.
    """
    text = json.dumps(value, ensure_ascii=False, **options)
    encoding = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "")
    if encoding not in ("utf8", "utf16", "utf32") or printable(text) != text:
        text = json.dumps(value, **options)
    print(text, flush=True)
