"""Output on the console: the only module that prepares standard output and standard error, and that formats for them.

A console that cannot be written never ends or changes a run: not a reader that has exited (`| head`, Ctrl-C with
`| tee log`, a lost ssh connection), a full disk under the log, a closed stream, or an encoding without the character.
Text that cannot be written is dropped. `protect` ensures this for everything that writes to `sys.stdout` and
`sys.stderr`: `print`, progress bars, warnings, logging, and the flush when the interpreter exits.

Text from data, models and files of other people is shown literally: control characters become visible escapes, and
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
# Errors after which no reader is left. After any other error, for example a full disk, later text is tried again.
NOBODY_READS = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.ECONNRESET)
WAIT_FOR_READER_S = 10  # for a pipe that another program made non-blocking
# Categories of characters that could steer a terminal, hide text or reorder it: control characters, formats (overrides
# of the writing direction among them), halves of surrogate pairs, separators of lines and paragraphs.
UNSAFE_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp")
JOINERS = "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"  # emoji and Indic scripts need them
UNUSUAL = re.compile(r"[^\x20-\x7e\n\t]")

# The text between `scheme://` and the last `@` before the path of a URL. A password may contain the characters that
# end the host. So after `user:` the last `@` of the word counts, unless a port follows the colon.
CREDENTIALS = re.compile(r"(?<=://)(?:[^/?#\s@:]*:(?!\d+[/?#])(?:(?!://)\S)*|[^/?#\s]*)@")


def printable(text: str) -> str:
    r"""Text of unknown origin, safe to show on a terminal: ESC becomes `\x1b`, a right-to-left override `\u202e`.

    URLs are shown without user names and passwords.
    """
    return UNUSUAL.sub(_shown, without_credentials(text))


def without_credentials(text: str) -> str:
    """The text with each URL `http://user:password@host` shortened to `http://host`."""
    return CREDENTIALS.sub("", text) if "@" in text else text


def _shown(match: re.Match[str]) -> str:
    """The replacement of one character in `printable`."""
    character = match[0]
    if character in JOINERS or unicodedata.category(character) not in UNSAFE_CATEGORIES:
        return character
    return character.encode("unicode_escape").decode("ascii")


class _Forgiving(io.RawIOBase):
    """The raw layer of a text stream. Bytes that the system refuses to write count as written."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self.nobody_reads = False
        self.name = getattr(stream, "name", None)
        self._stream = stream  # a reference, because the stream closes the file when it is garbage-collected
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
    """Replace standard output and standard error by streams whose writes never fail. Safe to call again.

    Closed descriptors are opened on the null device. Otherwise a file of the run would get the number of a closed
    descriptor, and libraries that print would write into that file.
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
    """A stream like this one, whose writes never fail. A stream without a file (in a notebook) is returned as it is."""
    if not isinstance(stream, io.TextIOWrapper) or _lowest(stream) is not None:
        return stream
    stream.reconfigure(errors="backslashreplace")  # a library may have kept a reference to it
    with contextlib.suppress(OSError, ValueError):
        stream.flush()
    try:
        lowest = _Forgiving(stream)
    except (OSError, ValueError):  # in memory
        return stream
    return io.TextIOWrapper(
        lowest if stream.write_through else io.BufferedWriter(lowest),  # write-through: PYTHONUNBUFFERED
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _lowest(stream: Any) -> _Forgiving | None:
    """The raw layer of a stream that `protect` made; None for any other stream."""
    buffer = getattr(stream, "buffer", None)
    lowest = getattr(buffer, "raw", buffer)
    return lowest if isinstance(lowest, _Forgiving) else None


def nobody_reads() -> bool:
    """Whether the reader of standard output has exited, so that printing more is useless."""
    lowest = _lowest(sys.stdout)
    return lowest is not None and lowest.nobody_reads


class SafeConsole(Console):
    """rich's console, except that it shows every string by `printable` and does not exit when its reader has exited."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Make each string printable first, cells and titles of tables included. A `Text` is not changed."""
        return super().render_str(printable(text), **options)

    def on_broken_pipe(self) -> None:
        """Become quiet. rich calls this for a stream that `protect` could not replace."""
        self.quiet = True


def make_console(visible: bool = True) -> Console:
    """The console of a run or a command.

    A terminal gets rich's display. Files, pipes and notebooks get plain lines of a fixed width without control codes.
    (Colab's `!` claims to be a terminal, and every redraw of a progress bar would be a new line on the page.)

    Args:
        visible: False for the processes of a run other than its first, which print nothing.
    """
    protect()
    in_notebook = any(name in os.environ for name in NOTEBOOK_VARIABLES)
    console = SafeConsole(
        quiet=not visible,
        highlight=False,
        markup=False,  # a path may contain brackets
        emoji=False,  # or colons
        force_terminal=False if in_notebook else None,
    )
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    return console


def print_error(message: str) -> None:
    """Print a line on standard error."""
    print(printable(message), file=sys.stderr, flush=True)


def print_json(value: Any, **options: Any) -> None:
    """Print a value on standard output as JSON; `options` are those of `json.dumps`.

    Characters that standard output cannot show, or that could control a terminal, are escaped as in JSON.
    """
    text = json.dumps(value, ensure_ascii=False, **options)
    encoding = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "")
    if encoding not in ("utf8", "utf16", "utf32") or printable(text) != text:
        text = json.dumps(value, **options)
    print(text, flush=True)
