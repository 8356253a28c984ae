"""The console is not the run: what cannot be written to it is left out, and what is shown there is only text."""

import errno
import io
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import pytest
from accelerate.state import AcceleratorState
from launching import LAUNCH, PYTHON, QUIET, ROOT, wait_until_gone
from rich.text import Text
from test_console import RECORD, SUMMARY

from medqa import __main__ as commands
from medqa.errors import exit_code, refusal
from medqa.terminal import make_console, nobody_reads, print_error, print_json, printable, protect
from medqa.training.checkpoint import newest_valid
from medqa.training.plan import Plan
from medqa.training.recorder import ProgressLine, show_plan, show_result
from train import main

BIDI = "\N{RIGHT-TO-LEFT OVERRIDE}"
STEERING = f"a\x1b]0;title\x07\x1b[2J\x9b31m\r\x08{BIDI}b"
ESCAPED = r"a\x1b]0;title\x07\x1b[2J\x9b31m\r\x08\u202eb"
UNUSUAL = "naïve µg 漢字 🙂 \N{EM DASH} \N{NO-BREAK SPACE}"
RUN = [
    "--exp", "exp_001", "--tiny", "--cpu", "--set", "training.max_steps=2", "training.global_batch_size=4",
    "evaluation.rows=4", "evaluation.samples=0", "tokenization.max_length=200", "lora.r=2", "tracking.wandb=disabled",
    "model.quantization=none", "training.log_steps=1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def apart(monkeypatch) -> Iterator[None]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def without_reader() -> TextIO:
    """A pipe that nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w", encoding="utf-8")


def gone_terminal() -> TextIO:
    """A terminal whose other end has been closed: EIO."""
    ours, theirs = pty.openpty()
    os.close(ours)
    return open(theirs, "w", encoding="utf-8")


def full_disk() -> TextIO:
    """A file on a disk without space: ENOSPC."""
    return open("/dev/full", "w", encoding="utf-8")


def closed() -> TextIO:
    """A stream that was closed in this process."""
    stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    stream.close()
    return stream


BROKEN: dict[str, Callable[[], TextIO]] = {
    "no reader": without_reader, "gone terminal": gone_terminal, "full disk": full_disk,
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        (STEERING, ESCAPED),
        (UNUSUAL, UNUSUAL),
        ("क्‍ष 👩‍⚕️", "क्‍ष 👩‍⚕️"),  # joiners shape what is written
        ("\udce9 \x7f \u2028 \ufeff \U000e0041", r"\udce9 \x7f \u2028 \ufeff \U000e0041"),
    ],
)
def test_what_steers_a_terminal_becomes_visible(text, shown):
    assert printable(text) == shown
    assert printable(shown) == shown


@pytest.mark.parametrize("terminal", [False, True])
def test_whatever_is_shown_is_only_text(terminal, monkeypatch, capsys):
    for name in ("COLAB_GPU", "JPY_PARENT_PID", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    page = io.StringIO()
    page.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdout", page)
    console = make_console()
    console.print(f"row {STEERING} :dog: [red]x[/red]", soft_wrap=True)
    show_plan(console, f"exp :dog: {STEERING}", Plan([("data", STEERING)], [(True, STEERING + " :dog:\nmore")]))
    show_result(console, {**SUMMARY, "memory_device": STEERING, "experiment": STEERING}, Path(f"/x/{STEERING}/:dog:"))
    shown = page.getvalue()
    assert shown.count(ESCAPED) >= 5
    assert shown.count(":dog:") >= 4
    assert "[red]x[/red]" in shown
    for part in ("\x1b]0;", "\x1b[2J", "\x9b", "\x07", BIDI, "\N{DOG}"):
        assert part not in shown
    print_error(f"error: columns found: {STEERING}")
    assert capsys.readouterr().err == f"error: columns found: {ESCAPED}\n"


@pytest.mark.parametrize("kind", BROKEN)
def test_a_console_that_cannot_be_written_is_left_alone(kind, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, BROKEN[kind]())
    monkeypatch.setenv("TERM", "xterm")
    console = make_console()
    print("x" * 100_000, flush=True)
    print("to stderr", file=sys.stderr)
    console.print(Text("styled", style="bold"))
    with ProgressLine(console, 0, 3, 1) as progress:  # on a terminal a thread draws it
        for step in (1, 2, 3):
            progress.update(RECORD | {"step": step})
    print_error("error")
    sys.stdout.flush()
    sys.stderr.flush()
    assert nobody_reads() == (kind != "full disk")


def test_a_disk_that_has_room_again_is_written_again(tmp_path, monkeypatch):
    written = tmp_path / "log"
    with full_disk() as stream, written.open("w") as room:
        monkeypatch.setattr(sys, "stdout", stream)
        protect()
        print("lost", flush=True)
        os.dup2(room.fileno(), stream.fileno())
        print("kept", flush=True)
    assert written.read_text() == "kept\n"


def test_a_pipe_that_is_full_for_a_moment_loses_nothing(monkeypatch):
    """As where another program has made the pipe non-blocking: a write then fails, although somebody reads."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    monkeypatch.setattr(sys, "stdout", open(writer, "w", encoding="utf-8"))  # noqa: SIM115
    protect()
    child = os.fork()
    if child == 0:
        os.close(writer)
        found = b""
        while len(found) < 300_001:
            found += os.read(reader, 65536)
            time.sleep(0.01)
        os._exit(0 if found == b"x" * 300_000 + b"\n" else 1)
    print("x" * 300_000, flush=True)
    assert os.waitpid(child, 0)[1] == 0
    os.close(reader)


def test_an_unbuffered_stream_stays_unbuffered(tmp_path, monkeypatch):
    """What `PYTHONUNBUFFERED` asks for, so that a log shows each line at once."""
    log = tmp_path / "log"
    stream = io.TextIOWrapper(log.open("wb", buffering=0), encoding="utf-8", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    protect()
    protect()
    print("at once", end="")
    assert log.read_text() == "at once"
    assert not nobody_reads()


@pytest.mark.parametrize("make", [closed, lambda: None, io.StringIO], ids=["closed", "none", "in memory"])
def test_streams_that_are_no_files_stay_usable(make, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, make())
    protect()
    print("x", flush=True)
    make_console().print("y")


ENDINGS = {
    "no reader": ('{} | true', None),
    "no reader of both": ('{} 2>&1 | true', None),
    "full disk": ('{} > /dev/full 2>&1', None),
    "closed": ('{} >&- 2>&-', None),
    "all closed": ('{} <&- >&- 2>&-', None),
    "ascii": ('PYTHONIOENCODING=ascii:strict {}', r"na\xefve"),
    "latin": ('PYTHONIOENCODING=latin-1:strict {}', r"\u6f22\u5b57"),
    "posix": ('env LC_ALL=POSIX PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 {}', r"na\xefve"),
}  # fmt: skip
SAYS = f"""
import sys, time, logging, warnings
early = logging.StreamHandler()
logging.getLogger().addHandler(early)
sys.path.insert(0, {str(ROOT)!r})
from medqa.terminal import make_console, protect
protect()
time.sleep(0.2)
for _ in range(3):
    print({UNUSUAL!r}, {STEERING!r})
    make_console().print({UNUSUAL!r})
    warnings.warn({UNUSUAL!r}, stacklevel=1)
    logging.getLogger().warning("logged")
    print("tail", file=sys.stderr)
open(sys.argv[1], "w").write("done")
print("not flushed")
sys.exit(7)
"""


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_exit_code_is_the_programs_own(ending, tmp_path):
    """Python itself makes 120 of the code of a program whose last text cannot be flushed."""
    command, said = ENDINGS[ending]
    script = tmp_path / "says.py"
    script.write_text(SAYS, encoding="utf-8")
    program = f"{sys.executable} {script} {tmp_path / 'done'}"
    done = subprocess.run(
        ["bash", "-c", command.format(program) + '; exit "${PIPESTATUS[0]}"'], capture_output=True, timeout=120
    )
    assert done.returncode == 7, done.stderr.decode()
    assert (tmp_path / "done").read_text() == "done"
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr
    if said is not None:
        assert said.encode() in done.stdout


def test_files_do_not_get_the_number_of_a_closed_stream(tmp_path):
    """Else a library that writes to descriptor 1 writes into the first file that the run opens."""
    script = tmp_path / "opens.py"
    script.write_text(
        f"import sys, os\nsys.path.insert(0, {str(ROOT)!r})\nfrom medqa.terminal import protect\nprotect()\n"
        "sys.exit(os.open(os.devnull, os.O_RDONLY))\n"
    )
    done = subprocess.run(["bash", "-c", f"{sys.executable} {script} <&- >&- 2>&-"], timeout=120)
    assert done.returncode > 2


# --- runs and commands


def row_of(directory: Path) -> Path:
    """Data that no other encoding than UTF-8 can show, and that would steer a terminal."""
    path = directory / "own.jsonl"
    rows = [{"question": f"What is {UNUSUAL} {i} ?", "answer": f"It is {STEERING} {UNUSUAL} {i}."} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(directory: Path, *options: str) -> list[str]:
    place = RUN.index("--set")
    own = ["--medquad", "none", "--afrimedqa", "none", "--data", f"own={row_of(directory)}"]
    return [*RUN[:place], *own, "--output-dir", str(directory / "run"), *options, *RUN[place:]]


@pytest.mark.parametrize("kind", BROKEN)
def test_a_run_does_not_need_its_console(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("MEDQA_ENDING", str(tmp_path / "ending"))
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, BROKEN[kind]())
    assert main(words(tmp_path)) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["updates"] == 2
    assert (tmp_path / "ending").read_text().split()[-1] == "complete"
    monkeypatch.setattr(sys, "stdout", BROKEN[kind]())
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(words(tmp_path)) == 0, "complete already"
    assert main([*words(tmp_path), "lora.rr=3"]) == 2, "a mistake keeps its code, though nobody hears of it"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_run_and_a_plan_in_another_encoding(encoding, tmp_path, monkeypatch):
    log = tmp_path / "log"
    with log.open("w", encoding=encoding) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(words(tmp_path)) == 0
        location = words(tmp_path)[4:10]
        assert commands.main(["plan", "--exp", "exp_001", "--tiny", "--cpu", *location]) == 0
        other = tmp_path / "naïve-漢字"
        shutil.copytree(tmp_path / "run", other)
        assert commands.main(["compare", str(tmp_path / "run"), str(other), "--out", str(tmp_path / "x.html")]) == 0
        assert commands.main(["ask", str(other), "--cpu", "--max-new-tokens", "3", UNUSUAL]) == 0
        assert commands.main(["ask", str(other), "--cpu", "--max-new-tokens", "3", "--json", UNUSUAL]) == 0
        sys.stdout.flush()
    said = log.read_bytes().decode(encoding)
    assert r"\u6f22\u5b57" in said
    assert ESCAPED in said
    assert "\x1b" not in said
    last = next(line for line in reversed(said.splitlines()) if line.startswith("{"))
    assert json.loads(last)["question"] == UNUSUAL


@pytest.mark.slow
def test_commands_do_their_work_without_a_reader(tiny_run, tmp_path, monkeypatch, capsys):
    plan = ["plan", "--exp", "exp_001", "--tiny", "--cpu"]
    page, other = tmp_path / "page.html", shutil.copytree(tiny_run, tmp_path / "other")
    for arguments in (
        ["compare", str(tiny_run), str(other), "--out", str(page)],
        ["compare", str(tiny_run), str(other), "--json", "--out", str(page)],
        plan,
        [*plan, "--json"],
        ["evaluate", str(other), "--cpu", "--tasks", "loss", "--limit", "2"],
        ["ask", str(tiny_run), "--cpu", "--max-new-tokens", "2", "What is flu ?"],
        ["ask", str(tiny_run), "--cpu", "--max-new-tokens", "2", "--compare", "What is flu ?"],
        ["ask", str(tiny_run), "--cpu", "--max-new-tokens", "2", "--json", "What is flu ?"],
    ):
        page.unlink(missing_ok=True)
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setattr(sys, "stdout", without_reader())
        assert commands.main(arguments) == 0, arguments
        sys.stdout.flush()
        assert page.exists() == (arguments[0] == "compare")
    assert json.loads((other / "evaluation.json").read_text())["limit"] == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "error" not in said


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("text", [UNUSUAL, STEERING, "\x9b31m", BIDI])
def test_json_stays_json_and_steers_nothing(text, encoding, monkeypatch):
    page = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", page)
    print_json({"a": text}, indent=2)
    written = page.buffer.getvalue().decode(encoding)
    assert json.loads(written) == {"a": text}
    assert printable(written) == written
    assert (text in written) == (encoding == "utf-8" and text == UNUSUAL)


def test_a_conversation_ends_with_its_terminal(tiny_run, monkeypatch, capfd):
    """The other end of the terminal is closed while a question is waited for; before, bytes of another encoding."""
    ours, theirs = pty.openpty()
    os.write(ours, b"caf\xe9 ?\n")
    monkeypatch.setattr(sys, "stdin", open(theirs, encoding="utf-8"))  # noqa: SIM115
    asked = []

    def answered(adapted, question, *_: object) -> None:
        asked.append(question)
        os.close(ours)

    monkeypatch.setattr("medqa.commands.ask.show_answer", answered)
    assert commands.main(["ask", str(tiny_run), "--cpu"]) == 0
    assert asked == ["caf\udce9 ?"]  # which is refused by name, see test_ask.py


def test_no_question_comes_from_a_closed_stream(tiny_run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert commands.main(["ask", str(tiny_run), "--cpu"]) == 0
    assert capsys.readouterr().out == ""


def test_an_ending_in_a_pipe_that_nobody_reads_is_not_waited_for(tmp_path, monkeypatch, capsys):
    os.mkfifo(tmp_path / "ending")
    monkeypatch.setenv("MEDQA_ENDING", str(tmp_path / "ending"))
    assert exit_code(lambda: None) == 0
    assert f"$MEDQA_ENDING={tmp_path / 'ending'}: " in capsys.readouterr().err


def test_no_more_questions_are_answered_when_nobody_reads(tiny_run, monkeypatch):
    asked = []

    def questions() -> Iterator[str]:
        for number in range(1000):
            asked.append(number)
            yield f"What is flu {number} ?"

    monkeypatch.setattr("medqa.commands.ask.piped_questions", lambda stream: questions())
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys, "stdout", without_reader())
    assert commands.main(["ask", str(tiny_run), "--cpu", "--max-new-tokens", "2"]) == 0
    assert asked == [0]


class InTerminal:
    """A pipeline with the trainer as its first program, at a terminal of its own."""

    def __init__(self, directory: Path, pipe: str, launcher: list[str]) -> None:
        directory.mkdir()
        self.run, self._codes = directory / "run", directory / "codes"
        command = " ".join([*launcher, "train.py", *words(directory)]).replace("max_steps=2", "max_steps=900")
        # The shell must outlive the signal to note the code; a trap with a command is not inherited.
        line = f'trap : INT HUP; {command} {pipe}; echo "${{PIPESTATUS[0]}}" > {self._codes}'
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")} | QUIET
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            for number in (signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)  # whatever the tests were started under
            os.execve("/bin/bash", ["bash", "-c", line], environment)

    def wait_for(self, seen: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 400
        while not seen():
            assert time.monotonic() < deadline
            assert os.waitpid(self.pid, os.WNOHANG) == (0, 0), "ended before its time"
            time.sleep(0.05)

    def updates(self) -> int:
        path = self.run / "metrics.jsonl"
        return path.read_text().count('"split": "train"') if path.exists() else 0

    def code(self) -> int:
        self.drain()
        os.waitpid(self.pid, 0)
        return int(self._codes.read_text())

    def drain(self) -> None:
        """Read what the terminal shows until nothing has it open any more."""
        while True:
            try:
                os.read(self.terminal, 65536)
            except OSError:  # EIO: nothing has it open; EBADF: closed here
                return


@pytest.mark.slow
def test_a_stop_saves_whatever_becomes_of_the_log(tmp_path):
    """Ctrl-C and a lost connection end `tee` first: the run is saved all the same, and ends with its own code."""
    log = tmp_path / "log"
    runs = {
        "ctrl-c": InTerminal(tmp_path / "ctrl-c", f"2>&1 | tee {log}", PYTHON),
        "lost": InTerminal(tmp_path / "lost", "2>&1 | tee /dev/null", PYTHON),
        "terminal": InTerminal(tmp_path / "terminal", "", PYTHON),
        "head": InTerminal(tmp_path / "head", "2>&1 | head -3", PYTHON),
        "launched": InTerminal(tmp_path / "launched", "2>&1 | tee /dev/null", LAUNCH),
    }
    for run in runs.values():
        run.wait_for(lambda run=run: run.updates() >= 3)
    for name in ("ctrl-c", "head", "launched"):
        os.write(runs[name].terminal, b"\x03")
    for name in ("lost", "terminal"):
        os.close(runs[name].terminal)
        os.killpg(runs[name].pid, signal.SIGHUP)
    codes = {name: run.code() for name, run in runs.items()}
    del codes["launched"]  # the launcher's own
    assert codes == {"ctrl-c": 130, "head": 130, "lost": 129, "terminal": 129}
    wait_until_gone(runs["launched"].run)
    for name, run in runs.items():
        assert newest_valid([run.run]).path.name == f"checkpoint-{run.updates()}", name
    assert "update 3/900" in log.read_text()


# --- which file is blamed


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS, errno.EBUSY])
def test_the_file_that_was_refused_is_named_and_no_other(number, tmp_path):
    text = os.strerror(number)
    elsewhere = refusal(OSError(number, text, "/tmp/elsewhere/file"), tmp_path)
    assert elsewhere.startswith(f"/tmp/elsewhere/file: {text}")
    assert str(tmp_path) not in elsewhere
    assert refusal(OSError(number, text, str(tmp_path / "x")), tmp_path).startswith(f"{tmp_path / 'x'}: {text}")
    unnamed = refusal(OSError(number, text), tmp_path)
    assert unnamed.startswith(text)
    if number != errno.EBUSY:
        assert "does not say for which file" in unnamed


@pytest.mark.parametrize(
    "number",
    [errno.ENOTEMPTY, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.EACCES],
)
def test_every_refusal_inside_the_directory_is_the_users_to_mend(number, tmp_path):
    assert refusal(OSError(number, "why", str(tmp_path / "a" / "b")), tmp_path).startswith(
        f"{tmp_path / 'a' / 'b'}: why"
    )


def test_defects_are_not_told_as_the_systems(tmp_path):
    for error in (FileNotFoundError(errno.ENOENT, "no", "/etc/x"), PermissionError(errno.EPERM, "no"), OSError("no")):
        assert refusal(error, tmp_path) is None
        assert refusal(error) is None


def test_a_small_place_for_temporary_files_is_not_needed(mounted, tmp_path, monkeypatch):
    place = mounted("size=4k")
    (place / "fill").write_bytes(b"x" * 4096)
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setattr("tempfile.tempdir", str(place))
    assert main(words(tmp_path)) == 0
    to = tmp_path / "merged"
    assert commands.main(["export", str(tmp_path / "run"), "--to", str(to), "--cpu"]) == 0
    for directory in (to, tmp_path / "run" / "lora_adapters"):
        assert {"tokenizer.json", "tokenizer_config.json", "README.md"} <= set(os.listdir(directory))
    assert sorted(os.listdir(place)) == ["fill"]
    assert not list((tmp_path / "run").glob("*.tmp"))


@pytest.fixture
def mounted(tmp_path) -> Iterator[Callable[[str], Path]]:
    """Mounts a tmpfs; what it returns mounts it anew with other options."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True)
        if done.returncode:
            pytest.skip(f"no permission to mount a small disk: {done.stderr.decode().strip()}")
        return place

    yield mount
    while subprocess.run(["umount", str(place)], capture_output=True).returncode == 0:
        continue
