"""The files and the lock of a run's directory: is it this experiment's, its first files, starting over."""

import errno
import fcntl
import json
import os
import re
import secrets
import socket
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import psutil
from accelerate import Accelerator
from accelerate.utils import gather_object
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medqa.config import Experiment, flat, is_complete
from medqa.config_file import dump_yaml, read_yaml
from medqa.errors import Busy, UserError, listed, note
from medqa.files import NO_FLOCK, UNFINISHED, Damaged, copy_file, naming, parse_json, read_json, write_json
from medqa.limits import MAX_COUNT
from medqa.model.adapter_files import ADAPTER_DIR_FILES
from medqa.model.settings import Change
from medqa.places import check_place, require_utf8
from medqa.recorded import LOCATIONS, NAME, checkpoints, differences, with_later_keys
from medqa.training.checkpoint import (
    CHECKPOINT_FILES,
    LEFTOVER,
    STILL_OPEN,
    Found,
    copy_checkpoint,
    newest_whole,
    remove,
    remove_unfinished,
    seems_whole,
)
from medqa.training.distributed import is_first_process, on_main
from medqa.training.state import Progress

OUTPUT_DIR, PERSIST_TO = "--output-dir", "--persist-to"


def require_same_experiment(found: Found, experiment: Experiment, option: str) -> None:
    """See that a checkpoint is of this experiment.

    Args:
        option: the one that names the directory of its run.

    Raises:
        UserError: it is of another; lists the differences.
    """
    refuse_differences(
        f"{found.path} is of another experiment", differences(found.identity.experiment, experiment), option
    )


def check_config(config: Path, experiment: Experiment, option: str) -> None:
    """Refuse a directory whose run is another experiment's.

    Raises:
        UserError: lists the differences.
    """
    try:
        saved = read_yaml(config)
    except UserError as error:
        if checkpoints(config.parent):
            return  # their manifests say whose the run is
        raise UserError(f"{error}; {ways_on(option)}") from error
    if not isinstance(saved, dict) or not saved.keys() & Experiment.model_fields.keys():
        if checkpoints(config.parent):
            return
        raise UserError(f"{config}: not a run's, or damaged; {ways_on(option)}")
    before = _flat(saved)
    refuse_differences(
        f"{option} {config.parent} holds the run of another experiment", differences(before, experiment), option
    )


def reads_elsewhere(config: Path, experiment: Experiment) -> bool:
    """Whether the run in this directory read its data or base model from other places than the experiment names."""
    if not config.is_file():
        return False
    try:
        saved = read_yaml(config)
    except UserError:
        return True  # damaged: who knows
    if not isinstance(saved, dict):
        return True
    before, now = with_later_keys(_flat(saved)), flat(experiment)
    return any(before.get(key) != now[key] for key in LOCATIONS)


def refuse_differences(what: str, found: list[str], option: str = OUTPUT_DIR) -> None:
    """Raise with the differences, if there are any, and the ways on."""
    if found:
        afresh = (
            "; to start a new run from the weights of a checkpoint, choose another --output-dir and add "
            "--set lora.init_from=DIR/checkpoint-STEP"
        )
        more = afresh if option == OUTPUT_DIR else ""
        raise UserError(f"{what}: {listed(found)}\n{ways_on(option)}{more}")


def ways_on(option: str) -> str:
    """What to do about a directory that cannot be this run's.

    Where it is that of the copies, `--fresh` would remove the run in the output directory too, and is not advised.
    """
    return f"choose another {option}" + (", or start over there with --fresh" if option == OUTPUT_DIR else "")


def _flat(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A run's configuration as `section.key` to value."""
    return {f"{s}.{k}": v for s, keys in saved.items() if isinstance(keys, dict) for k, v in keys.items()}


# ----------------------------------------------------------------------------------------------------
# One run at a time in a directory.
#
# The lock is the kernel's (`flock`), which a dead process does not hold, whatever killed it. Where the file system
# has none (some network mounts), what the file says decides: a process of this host, since this boot, that still
# lives. A lock left by a machine that is gone holds nobody up.
#
# The hard case is a host that is cut off and alive, on a file system where a lock holds on one host alone, or is
# taken from a host that does not answer (NFS does both). Another host then gets the lock. Whoever takes it writes its
# name into the file, and each writer looks there before it writes (`check`): the older one finds another's name, and
# stops without writing. So the last to take a directory has it. What the older one was just writing is whole or
# absent, and of the same run; where the lock holds on all hosts, it is not even that, for the newer one is refused
# until the older one has ended (a process of several that gets no answer does, within `training.process_timeout_s`).

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
    """Holds a directory's lock until it is left. Only the first process of a run takes it.

    Args:
        option: by which the directory was given.
        does: what a run does with it, for messages.
    """

    def __init__(self, output_dir: Path, option: str = "--output-dir", does: str = "is on in it") -> None:
        self._output_dir, self._option, self._does = output_dir, option, does
        self._file: int | None = None
        self._mine: dict[str, Any] | None = None  # what the file says from when this run has written there

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def release(self) -> None:
        """Let others take it."""
        if self._file is not None:
            os.close(self._file)
            self._file = self._mine = None

    @property
    def held(self) -> bool:
        """Whether this run has taken it."""
        return self._mine is not None

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
        if (holder := self.taken_over_by()) is not None:
            raise UserError(
                f"{self._option} {self._output_dir}: another run (process {holder['pid']} on {holder['host']}) has "
                "taken it over while this one got no answer or had lost its lock; this one has stopped and leaves it "
                "alone"
            )

    def taken_over_by(self) -> dict[str, Any] | None:
        """Who has taken the directory since this run has; None where nobody has."""
        if self._mine is None:
            return None
        try:  # by its name: a network mount then asks the server who is in it now
            descriptor = self._open(os.O_RDONLY)
        except FileNotFoundError:
            return None  # removed by hand: nobody has taken it
        try:
            holder = _holder(descriptor)
        finally:
            os.close(descriptor)
        return None if holder == self._mine else holder

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
                    f"{self._option} {self._output_dir}: another run {self._does} ({who}); wait for it or stop it, or "
                    "choose another directory"
                ) from error
        self._file = descriptor

    def _open(self, flags: int) -> int:
        """A descriptor of the lock file.

        Raises:
            UserError: something else than a regular file is there.
            OSError: it cannot be opened.
        """
        path = self._output_dir / LOCK_FILE
        problem = f"{self._option} {self._output_dir}: {LOCK_FILE} is not a regular file; remove it, or choose another"
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


# ----------------------------------------------------------------------------------------------------
# The files of a run's directory.

CONFIG, METRICS, SUMMARY = "config.yaml", "metrics.jsonl", "summary.json"
RUN_FILE = "run.json"
RUN_ID = r"^[A-Za-z0-9_.-]{1,64}$"
ADAPTER_DIR = "lora_adapters"
WANDB_DIR = "wandb"
FILES = (CONFIG, "data_report.json", "splits.csv", METRICS, "evaluation.json", SUMMARY)


def check_run_dir(output_dir: Path, experiment: Experiment, fresh: bool, option: str = OUTPUT_DIR) -> None:
    """See whether this experiment can run in this directory, changing nothing.

    Raises:
        UserError: not writable, or holding another experiment's run, with the differences, or files that no run wrote.
    """
    require_utf8(output_dir, option)
    for place in (output_dir, output_dir / ADAPTER_DIR):
        check_place(place, option)
    if odd := list(_not_a_runs(output_dir)):
        raise UserError(
            f"{option} {output_dir}: {', '.join(odd)}: a link, or not the kind of file that a run writes there; remove "
            "it, or choose another"
        )
    if fresh:
        return _refuse_foreign(output_dir, option)
    if (output_dir / CONFIG).is_file():
        check_config(output_dir / CONFIG, experiment, option)
    elif not checkpoints(output_dir) and (foreign := _without_a_run(output_dir)):
        raise UserError(
            f"{option} {output_dir} holds what no run wrote and this one would write over: "
            f"{', '.join(path.name for path in foreign)}; choose another"
        )


def _not_a_runs(output_dir: Path) -> Iterator[str]:
    """The names of what a run would write through a link, or cannot replace by a file of its own.

    A file that is replaced whole may be a link: the link goes, and what it leads to stays as it is.
    """
    inside = [f"{ADAPTER_DIR}/{name}" for name in sorted(ADAPTER_DIR_FILES)]
    folders = (ADAPTER_DIR, ADAPTER_DIR + UNFINISHED, WANDB_DIR)
    for name in (*FILES, RUN_FILE, LOCK_FILE, *folders, *inside):
        path = output_dir / name
        of_its_kind = os.path.isdir(path) if name in folders else os.path.isfile(path)
        followed = name in (METRICS, LOCK_FILE, *folders) and os.path.islink(path)
        if followed or (os.path.exists(path) and not of_its_kind):
            yield name
        elif name not in folders and os.path.isdir(output_dir / (name + UNFINISHED)):
            yield name + UNFINISHED


def left_alone(output_dir: Path) -> list[tuple[str, str]]:
    """The plan's line on what lies in the directory and is no run's; none where there is nothing."""
    names = {*FILES, RUN_FILE, LOCK_FILE, ADAPTER_DIR, WANDB_DIR}
    ours = names | {name + UNFINISHED for name in names} | {folder.name for folder in _folders(output_dir)}
    there = os.listdir(output_dir) if os.path.isdir(output_dir) else []  # another host may not see it
    others = sorted(name for name in there if name not in ours and not name.startswith(STILL_OPEN))
    if not others:
        return []
    more = f" and {len(others) - 3:,} more" if len(others) > 3 else ""
    return [("left alone", f"{', '.join(others[:3])}{more}: no run's, and nothing that this run reads or changes")]


class Figures(BaseModel):
    """The figures of one split."""

    model_config = ConfigDict(strict=True)

    loss: float
    perplexity: float | None
    answer_loss: float | None
    answer_perplexity: float | None


class Summary(BaseModel):
    """What is used of a `summary.json`, which anyone may have edited. What has a default may be absent."""

    model_config = ConfigDict(strict=True)

    experiment: str
    baseline: Figures
    final: Figures
    test: Figures
    updates: Annotated[int, Field(ge=0, le=MAX_COUNT)]
    best_step: Annotated[int, Field(ge=0, le=MAX_COUNT)]
    adapter_step: Annotated[int, Field(ge=0, le=MAX_COUNT)] = 0
    wall_clock_s: Annotated[float, Field(ge=0)]
    peak_memory_bytes: Annotated[int, Field(ge=0)]
    memory_device: str
    data_fingerprint: str | None = None
    base_fingerprint: str | None = None


class Session(BaseModel):
    """One start of a run: the id that the run keeps over all of them, and how many came before.

    `saved` says that there was a checkpoint once: where there is none now, it was lost.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    run_id: Annotated[str, Field(pattern=RUN_ID)]
    resumes: Annotated[int, Field(ge=0, le=MAX_COUNT)]
    saved: bool


def start_run(
    output_dir: Path,
    fresh: bool,
    found: Found | None,
    progress: Progress,
    lock: RunLock,
    accelerator: Accelerator,
    elsewhere: Callable[[], Session | None] = lambda: None,
) -> Session:
    """Make the directory, lock it, clear it if `fresh` and of what killed saves left, and note one more session.

    The main process does, the others wait. The session is noted in `progress` too.

    Args:
        elsewhere: gives the session of this run that was noted in another place, before its first checkpoint. The main
            process alone asks, before anything is written.

    Raises:
        UserError: it cannot be written, another run is on in it, or not all processes see the same checkpoint there.
    """
    steps = gather_object([progress.step]) if accelerator.num_processes > 1 else [progress.step]
    if len(set(steps)) > 1:  # each would train adapters of its own, and average their gradients
        seen = ", ".join(map(str, sorted(set(steps))))
        raise UserError(
            f"{output_dir}: not all processes see the same checkpoint there (of updates {seen}); on several machines "
            "give an --output-dir on a file system that they share"
        )
    session = on_main(accelerator, lambda: _note_session(output_dir, fresh, found, progress, lock, elsewhere))
    progress.run_id, progress.resumes = session.run_id, session.resumes
    return session


def _note_session(
    output_dir: Path,
    fresh: bool,
    found: Found | None,
    progress: Progress,
    lock: RunLock,
    elsewhere: Callable[[], Session | None],
) -> Session:
    """As `start_run`, on the main process."""
    begun = elsewhere()
    output_dir.mkdir(parents=True, exist_ok=True)
    lock.take()
    if fresh:
        clear(output_dir)
    remove_unfinished(output_dir)
    if found is not None and found.path.parent != output_dir:
        bring_back(found, output_dir)
    session = read_session(output_dir)
    if session is None and found is not None:
        run_id = progress.run_id if re.fullmatch(RUN_ID, progress.run_id) else _new_run_id()
        session = Session(run_id=run_id, resumes=min(progress.resumes, MAX_COUNT), saved=True)
    if session is None and not fresh:
        session = begun
    if session is None:
        session = Session(run_id=_new_run_id(), resumes=0, saved=False)
    else:
        session = session.model_copy(update={"resumes": session.resumes + 1})
    write_json(session.model_dump(), output_dir / RUN_FILE)
    return session


def _new_run_id() -> str:
    """An id for a run: the one that W&B's agent or the user has chosen, so that the run keeps it when it goes on."""
    chosen = os.environ.get("WANDB_RUN_ID", "")
    return chosen if re.fullmatch(RUN_ID, chosen) else secrets.token_hex(4)


def read_session(output_dir: Path) -> Session | None:
    """What a directory's run noted last; None where none has begun or it is damaged. Checkpoints have it too."""
    try:
        return Session.model_validate(read_json(output_dir / RUN_FILE))
    except (Damaged, ValidationError):
        return None


def note_saved(output_dir: Path) -> None:
    """Note, once, that there is a checkpoint now; each time for who started the run."""
    note("saved")
    session = read_session(output_dir)
    if session is not None and not session.saved:
        write_json(session.model_copy(update={"saved": True}).model_dump(), output_dir / RUN_FILE)


def find_saved(
    output_dir: Path, elsewhere: Path | None, experiment: Experiment
) -> tuple[Found | None, dict[str, Any] | None]:
    """What an earlier session of the run left: the checkpoint to resume from, and the summary of a complete run.

    Args:
        elsewhere: where the run is copied to; asked where `output_dir` has no checkpoint.

    Raises:
        UserError: the checkpoint is of another experiment, or those that there were are damaged or have gone: the run
            would silently start over.
    """
    return _find_checkpoint(output_dir, elsewhere, experiment), _finished(output_dir, experiment)


def _find_checkpoint(output_dir: Path, elsewhere: Path | None, experiment: Experiment) -> Found | None:
    """The newest whole checkpoint here, else the newest elsewhere; None at a run's start."""
    found = newest_whole([output_dir] if elsewhere is None else [output_dir, elsewhere])
    if found is not None:
        require_same_experiment(found, experiment, OUTPUT_DIR if found.path.parent == output_dir else PERSIST_TO)
    elif (output_dir / RUN_FILE).exists() and ((session := read_session(output_dir)) is None or session.saved):
        raise UserError(
            f"--output-dir {output_dir}: its checkpoints have gone (or {RUN_FILE}, which would say that there were "
            "none, is damaged); put one back, or start over with --fresh"
        )
    return found


def what_is_saved(output_dir: Path, elsewhere: Path | None, fresh: bool) -> str:
    """What the user is told after a run has ended early: the checkpoint that the next start resumes from.

    Args:
        elsewhere: where the run is copied to; a start looks there where `output_dir` has no checkpoint.
        fresh: whether the run was started with `--fresh`, which the next start must not be.
    """
    again = "the same command without --fresh" if fresh else "the same command"
    try:
        for place in (output_dir, elsewhere or output_dir):
            for path in reversed(checkpoints(place)):
                if seems_whole(path):
                    return f"saved: {path}; {again} resumes from it"
    except OSError as error:
        return f"what is saved cannot be seen: {error.filename}: {error.strerror}"
    return f"no checkpoint is saved in {output_dir} yet; the same command starts from the beginning"


def bring_back(found: Found, output_dir: Path) -> None:
    """Copy a whole checkpoint, and the files of its run, from where they were persisted to."""
    source = found.path.parent
    for name in (RUN_FILE, *FILES):
        if (source / name).is_file():
            copy_file(source / name, output_dir / name)
    try:
        copy_checkpoint(found.path, output_dir / found.path.name)
    except Damaged as error:
        raise UserError(f"{output_dir}: {error}; check the disk") from error


def _finished(output_dir: Path, experiment: Experiment) -> dict[str, Any] | None:
    """The summary of a run that is complete already, None of one that is not.

    Where data are read from another place than before, nothing is said to be complete: whether they are the same data
    shows when they are read.
    """
    if reads_elsewhere(output_dir / CONFIG, experiment):
        return None
    summary = read_summary(output_dir)
    return summary if summary is not None and is_complete(summary, experiment) else None


def read_summary(output_dir: Path) -> dict[str, Any] | None:
    """A run's `summary.json`; None where it is not there, is damaged, or lacks what every version has written."""
    try:
        summary = read_json(output_dir / SUMMARY)
        Summary.model_validate(summary)
    except (Damaged, ValidationError):
        return None
    return summary


def write_config(output_dir: Path, experiment: Experiment, accumulation: int, changes: Mapping[str, Change]) -> None:
    """`config.yaml`: the experiment in full, and what is in effect where that differs, with the reason."""
    effect = {key: {"asked": asked, "used": used, "reason": why} for key, (asked, used, why) in changes.items()}
    dump_yaml(
        {**experiment.model_dump(), "gradient_accumulation_steps": accumulation, "in_effect": effect},
        output_dir / CONFIG,
    )


def clear(output_dir: Path) -> None:
    """Remove a run's files, and nothing that a run did not write.

    Raises:
        UserError: as `check_run_dir` with `fresh`, and nothing is removed then; or a file cannot be removed.
    """
    _refuse_foreign(output_dir)
    folders = [folder for folder in _folders(output_dir) if folder.is_dir()]
    why: dict[Path, str] = {}
    for folder in folders:
        try:
            remove(folder)
        except OSError as error:  # what stays is looked at below
            why[folder] = f"{error.filename}: {error.strerror}"
    if stuck := [why.get(folder, str(folder)) for folder in folders if _holds_files(folder)]:
        raise UserError(f"--fresh: cannot be removed: {', '.join(stuck[:5])}; choose another directory")
    for name in (*FILES, RUN_FILE):  # that one last: it says whose the others are
        (output_dir / (name + UNFINISHED)).unlink(missing_ok=True)
        (output_dir / name).unlink(missing_ok=True)


def _refuse_foreign(output_dir: Path, option: str = OUTPUT_DIR) -> None:
    """Refuse to clear a directory in which a link, or a foreign file in one of the run's folders, would be lost.

    One whose folders nothing can be removed from is refused as well, before the rest of it is lost.
    """
    files = [output_dir / name for name in (*FILES, RUN_FILE)]
    foreign = [path for path in files if path.is_symlink() or (path.exists() and not path.is_file())]
    foreign = foreign or _without_a_run(output_dir)
    for folder, names in _folders(output_dir).items():
        if folder.is_symlink() or folder.is_file():
            foreign.append(folder)
        elif folder.is_dir():
            foreign += [
                path
                for path in folder.iterdir()
                if not (path.name.removesuffix(UNFINISHED) in names or path.name.startswith(STILL_OPEN))
                or path.is_symlink()
                or path.is_dir()
            ]
    if foreign:
        raise UserError(
            f"--fresh: {output_dir} holds what no run wrote: {', '.join(map(str, foreign[:5]))}; "
            f"move it away, or choose another {option}"
        )
    folders = [folder for folder in (output_dir, *_folders(output_dir)) if folder.is_dir()]
    if stuck := [folder for folder in folders if not os.access(folder, os.W_OK | os.X_OK)]:
        raise UserError(
            f"--fresh: there is no permission to remove what is in {', '.join(map(str, stuck[:5]))}; nothing was "
            f"removed: allow it, or choose another {option}"
        )


def _holds_files(folder: Path) -> bool:
    """Whether there is anything in a folder, other than files that a network file system will remove by itself."""
    return folder.is_dir() and any(not entry.name.startswith(STILL_OPEN) for entry in os.scandir(folder))


def _without_a_run(output_dir: Path) -> list[Path]:
    """What has the name of a run's file or folder in a directory that no run has begun in."""
    if (output_dir / RUN_FILE).exists():
        return []
    return [path for path in (*(output_dir / name for name in FILES), *_folders(output_dir)) if path.exists()]


def _folders(output_dir: Path) -> dict[Path, set[str]]:
    """The folders that a run writes here, and the names of the files it writes into each."""
    found = [path for path in output_dir.glob("checkpoint-*") if any(p.fullmatch(path.name) for p in (NAME, LEFTOVER))]
    adapters = (output_dir / ADAPTER_DIR, output_dir / (ADAPTER_DIR + UNFINISHED))
    return dict.fromkeys(found, CHECKPOINT_FILES) | dict.fromkeys(adapters, ADAPTER_DIR_FILES)
