"""The files and the lock of a run's directory: whether this experiment may use it, its first files, starting over."""

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
    newest_valid,
    remove,
    remove_unfinished,
    seems_valid,
)
from medqa.training.distributed import is_first_process, on_main
from medqa.training.state import Progress

OUTPUT_DIR, PERSIST_TO = "--output-dir", "--persist-to"


def require_same_experiment(found: Found, experiment: Experiment, option: str) -> None:
    """Check that a checkpoint belongs to this experiment.

    Args:
        option: the option that gave the directory of its run.

    Raises:
        UserError: it belongs to another experiment. The message lists the differences.
    """
    refuse_differences(
        f"{found.path} belongs to another experiment", differences(found.identity.experiment, experiment), option
    )


def check_config(config: Path, experiment: Experiment, option: str) -> None:
    """Check the `config.yaml` of a directory: its run must be of this experiment.

    Raises:
        UserError: it is of another experiment. The message lists the differences.
    """
    try:
        saved = read_yaml(config)
    except UserError as error:
        if checkpoints(config.parent):
            return  # their manifests identify the experiment
        raise UserError(f"{error}; {advice(option)}") from error
    if not isinstance(saved, dict) or not saved.keys() & Experiment.model_fields.keys():
        if checkpoints(config.parent):
            return
        raise UserError(f"{config}: not the file of a run, or damaged; {advice(option)}")
    before = _flat(saved)
    refuse_differences(
        f"{option} {config.parent} contains a run of another experiment", differences(before, experiment), option
    )


def has_other_locations(config: Path, experiment: Experiment) -> bool:
    """Whether the run of this `config.yaml` read its data or base model from other locations than the experiment."""
    if not config.is_file():
        return False
    try:
        saved = read_yaml(config)
    except UserError:
        return True  # damaged, so unknown
    if not isinstance(saved, dict):
        return True
    before, now = with_later_keys(_flat(saved)), flat(experiment)
    return any(before.get(key) != now[key] for key in LOCATIONS)


def refuse_differences(what: str, found: list[str], option: str = OUTPUT_DIR) -> None:
    """Raise UserError with the differences and what to do about them, if there are any."""
    if found:
        new_run = (
            "; to start a new run from the weights of a checkpoint, choose another --output-dir and add "
            "--set lora.init_from=DIR/checkpoint-STEP"
        )
        more = new_run if option == OUTPUT_DIR else ""
        raise UserError(f"{what}: {listed(found)}\n{advice(option)}{more}")


def advice(option: str) -> str:
    """What to do about a directory that this run cannot use.

    For the mirror `--fresh` is not advised, because it would also remove the run in the output directory.
    """
    return f"choose another {option}" + (", or start over with --fresh" if option == OUTPUT_DIR else "")


def _flat(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A run's configuration by `section.key`."""
    return {f"{s}.{k}": v for s, keys in saved.items() if isinstance(keys, dict) for k, v in keys.items()}


# ----------------------------------------------------------------------------------------------------
# One run at a time in a directory.
#
# The lock is a kernel lock (`flock`), which ends with its process, however that process ends. On a file system without
# such locks (some network mounts) the content of the lock file decides: the lock is held if it names a process of this
# host, since the last boot, that is still running. The lock file of a machine that is gone blocks nobody.
#
# The hard case is a host without network that still runs, on a file system where a lock is valid on one host only, or
# where the server takes the lock from a host that does not answer (NFS does both). Another host then gets the lock. A
# process that acquires the lock writes its identity into the file, and reads the file before each later write
# (`check`). The older process finds another identity, and stops without writing. So the last process to acquire a
# directory owns it. A file that the older one was just writing is complete or absent, and belongs to the same run. If
# the lock is valid on all hosts, not even that happens: the newer process is refused until the older one has ended (if
# it is one of several processes and gets no answer, it ends within `training.process_timeout_s`).

LOCK_FILE = "run.lock"
MAX_LOCK_BYTES = 4096  # of the lock file, no more are read
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Holder(BaseModel):
    """The content of a lock file: host, id of its last boot, process id, start of the process in seconds since 1970."""

    model_config = ConfigDict(strict=True)

    host: str
    boot: str
    pid: Annotated[int, Field(gt=0)]
    started: float


class RunLock:
    """The lock of a directory; a context manager that releases it. Only the first process of a run acquires it.

    Args:
        option: the option that gave the directory.
        use: how a run uses the directory, for messages.
    """

    def __init__(self, output_dir: Path, option: str = "--output-dir", use: str = "is using it") -> None:
        self._output_dir, self._option, self._use = output_dir, option, use
        self._file: int | None = None
        self._mine: dict[str, Any] | None = None  # what this run has written into the lock file

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def release(self) -> None:
        """Release the lock, so that other runs can acquire it."""
        if self._file is not None:
            os.close(self._file)
            self._file = self._mine = None

    @property
    def held(self) -> bool:
        """Whether this run has acquired the lock."""
        return self._mine is not None

    def acquire_if_exists(self) -> None:
        """Lock the directory if a run has used it before. Only the first process does this; it writes nothing.

        Raises:
            UserError: another process holds the lock.
        """
        if is_first_process() and os.path.lexists(self._output_dir / LOCK_FILE):
            self._take()

    def acquire(self) -> None:
        """Lock the directory, unless this run holds the lock, and write this process into the lock file.

        Raises:
            UserError: another process holds the lock.
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
            os.fsync(self._file)  # so that other hosts of a network mount see it

    def check(self) -> None:
        """Check, before each write, that this run still owns the directory.

        Raises:
            UserError: another run has acquired it meanwhile.
        """
        if (holder := self.new_owner()) is not None:
            raise UserError(
                f"{self._option} {self._output_dir}: another run (process {holder['pid']} on {holder['host']}) now "
                "owns this directory; this run stopped without writing"
            )

    def new_owner(self) -> dict[str, Any] | None:
        """The process that acquired the directory after this run; None if this run still owns it."""
        if self._mine is None:
            return None
        try:  # opened by name, so that a network mount asks the server for the current content
            descriptor = self._open(os.O_RDONLY)
        except FileNotFoundError:
            return None  # removed by hand: no other run has acquired it
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
            if error.errno not in NO_FLOCK or is_running(holder):
                os.close(descriptor)
                who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
                raise Busy(
                    f"{self._option} {self._output_dir}: another run {self._use} ({who}); wait for it or stop it, or "
                    "choose another directory"
                ) from error
        self._file = descriptor

    def _open(self, flags: int) -> int:
        """Open the lock file and return its descriptor.

        Raises:
            UserError: it is not a regular file.
            OSError: it cannot be opened.
        """
        path = self._output_dir / LOCK_FILE
        problem = (
            f"{self._option} {self._output_dir}: {LOCK_FILE} is not a regular file; remove it, or choose another "
            "directory"
        )
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
    """The identity of this process: host, boot, process id and start."""
    process = psutil.Process()
    found = Holder(host=socket.gethostname(), boot=_boot(), pid=process.pid, started=process.create_time())
    return found.model_dump()


def is_running(holder: dict[str, Any] | None) -> bool:
    """Whether the holder of a lock is a running process of this machine, other than this process."""
    if holder is None or (holder["host"], holder["boot"]) != (socket.gethostname(), _boot()):
        return False
    try:
        started = psutil.Process(holder["pid"]).create_time()
    except (psutil.NoSuchProcess, OverflowError):
        return False
    return holder["pid"] != os.getpid() and abs(started - holder["started"]) < 1


def _holder(descriptor: int) -> dict[str, Any] | None:
    """The process that wrote the lock file; None if the file does not name one."""
    try:
        return Holder.model_validate(parse_json(os.pread(descriptor, MAX_LOCK_BYTES, 0))).model_dump()
    except ValueError:  # pydantic's ValidationError is one as well
        return None


def _boot() -> str:
    """An id that changes when the machine boots."""
    return BOOT_ID.read_text().strip() if BOOT_ID.exists() else str(int(psutil.boot_time()))


# ----------------------------------------------------------------------------------------------------
# The files of a run's directory.

CONFIG, METRICS, SUMMARY = "config.yaml", "metrics.jsonl", "summary.json"
RUN_FILE = "run.json"
RUN_ID = r"^[A-Za-z0-9_.-]{1,64}$"
ADAPTER_DIR = "lora_adapters"
WANDB_DIR = "wandb"
FILES = (CONFIG, "data_report.json", "splits.csv", METRICS, "evaluation.json", "evaluation.jsonl", SUMMARY)


def check_run_dir(output_dir: Path, experiment: Experiment, fresh: bool, option: str = OUTPUT_DIR) -> None:
    """Check whether this experiment can run in this directory. Nothing is changed.

    Raises:
        UserError: the directory is not writable, contains a run of another experiment (the message lists the
            differences), or contains files that no run created and this one would overwrite.
    """
    require_utf8(output_dir, option)
    for directory in (output_dir, output_dir / ADAPTER_DIR):
        check_place(directory, option)
    if unusable := list(_unusable_names(output_dir)):
        raise UserError(
            f"{option} {output_dir}: {', '.join(unusable)}: a link, or not the kind of file that a run writes there; "
            f"remove it, or choose another {option}"
        )
    if fresh:
        return _refuse_foreign(output_dir, option)
    if (output_dir / CONFIG).is_file():
        check_config(output_dir / CONFIG, experiment, option)
    elif not checkpoints(output_dir) and (foreign := _foreign_files(output_dir)):
        raise UserError(
            f"{option} {output_dir} contains files that this run would overwrite and that no run created: "
            f"{', '.join(path.name for path in foreign)}; choose another {option}"
        )


def _unusable_names(output_dir: Path) -> Iterator[str]:
    """Names that a run writes, but that are links it would follow, or not files or directories as it needs them.

    A file that a run replaces as a whole may be a link: the link is replaced, and its target stays unchanged.
    """
    inside = [f"{ADAPTER_DIR}/{name}" for name in sorted(ADAPTER_DIR_FILES)]
    folders = (ADAPTER_DIR, ADAPTER_DIR + UNFINISHED, WANDB_DIR)
    for name in (*FILES, RUN_FILE, LOCK_FILE, *folders, *inside):
        path = output_dir / name
        right_kind = os.path.isdir(path) if name in folders else os.path.isfile(path)
        followed = name in (METRICS, LOCK_FILE, *folders) and os.path.islink(path)
        if followed or (os.path.exists(path) and not right_kind):
            yield name
        elif name not in folders and os.path.isdir(output_dir / (name + UNFINISHED)):
            yield name + UNFINISHED


def other_files(output_dir: Path) -> list[tuple[str, str]]:
    """The line of the plan about files in the directory that do not belong to a run; none if there are none."""
    names = {*FILES, RUN_FILE, LOCK_FILE, ADAPTER_DIR, WANDB_DIR}
    ours = names | {name + UNFINISHED for name in names} | {folder.name for folder in _folders(output_dir)}
    there = os.listdir(output_dir) if os.path.isdir(output_dir) else []  # it may not be visible on another host
    others = sorted(name for name in there if name not in ours and not name.startswith(STILL_OPEN))
    if not others:
        return []
    more = f" and {len(others) - 3:,} more" if len(others) > 3 else ""
    return [("other files", f"{', '.join(others[:3])}{more} (not part of a run; ignored)")]


class SplitMetrics(BaseModel):
    """The metrics of one split."""

    model_config = ConfigDict(strict=True)

    loss: float
    perplexity: float | None
    answer_loss: float | None
    answer_perplexity: float | None


class Summary(BaseModel):
    """The fields of `summary.json` that are read; the file may have been edited. Those with a default may be absent."""

    model_config = ConfigDict(strict=True)

    experiment: str
    baseline: SplitMetrics
    final: SplitMetrics
    test: SplitMetrics
    updates: Annotated[int, Field(ge=0, le=MAX_COUNT)]
    best_step: Annotated[int, Field(ge=0, le=MAX_COUNT)]
    adapter_step: Annotated[int, Field(ge=0, le=MAX_COUNT)] = 0
    wall_clock_s: Annotated[float, Field(ge=0)]
    peak_memory_bytes: Annotated[int, Field(ge=0)]
    memory_device: str
    data_fingerprint: str | None = None
    base_fingerprint: str | None = None


class Session(BaseModel):
    """One start of a run, as in `run.json`.

    Attributes:
        run_id: the id of the run, the same in all its sessions.
        resumes: the number of earlier sessions.
        saved: whether a checkpoint has been saved. If there is none now, it was lost.
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
    mirror_session: Callable[[], Session | None] = lambda: None,
) -> Session:
    """Create and lock the directory, clear it if `fresh`, remove unfinished checkpoints, and record a new session.

    The main process does this, and the others wait. The session is recorded in `run.json` and in `progress`.

    Args:
        mirror_session: locks the mirror, and returns the session of a run that ended before its first checkpoint, if
            the mirror has one. Only the main process calls it, before anything is written.

    Raises:
        UserError: the directory cannot be written, another run is using it, or processes see different checkpoints.
    """
    steps = gather_object([progress.step]) if accelerator.num_processes > 1 else [progress.step]
    if len(set(steps)) > 1:  # DDP would average gradients of different adapters
        seen = ", ".join(map(str, sorted(set(steps))))
        raise UserError(
            f"{output_dir}: processes see different checkpoints there (of updates {seen}); on several machines use an "
            "--output-dir on a shared file system"
        )
    session = on_main(accelerator, lambda: _record_session(output_dir, fresh, found, progress, lock, mirror_session))
    progress.run_id, progress.resumes = session.run_id, session.resumes
    return session


def _record_session(
    output_dir: Path,
    fresh: bool,
    found: Found | None,
    progress: Progress,
    lock: RunLock,
    mirror_session: Callable[[], Session | None],
) -> Session:
    """As `start_run`, on the main process."""
    begun = mirror_session()
    output_dir.mkdir(parents=True, exist_ok=True)
    lock.acquire()
    if fresh:
        clear(output_dir)
    remove_unfinished(output_dir)
    if found is not None and found.path.parent != output_dir:
        restore_from_mirror(found, output_dir)
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
    """A run id: `WANDB_RUN_ID` if W&B's agent or the user has set it, so that resumes keep it, else a random one."""
    chosen = os.environ.get("WANDB_RUN_ID", "")
    return chosen if re.fullmatch(RUN_ID, chosen) else secrets.token_hex(4)


def read_session(output_dir: Path) -> Session | None:
    """The session in a directory's `run.json`; None if there is no valid one. Checkpoints contain the same values."""
    try:
        return Session.model_validate(read_json(output_dir / RUN_FILE))
    except (Damaged, ValidationError):
        return None


def note_saved(output_dir: Path) -> None:
    """Record in `run.json` that a checkpoint exists, and write `saved` to `$MEDQA_ENDING`."""
    note("saved")
    session = read_session(output_dir)
    if session is not None and not session.saved:
        write_json(session.model_copy(update={"saved": True}).model_dump(), output_dir / RUN_FILE)


def find_saved(
    output_dir: Path, mirror: Path | None, experiment: Experiment
) -> tuple[Found | None, dict[str, Any] | None]:
    """The checkpoint to resume from, and the summary of the run if it is complete; each None if there is none.

    Args:
        mirror: searched if `output_dir` has no checkpoint.

    Raises:
        UserError: the checkpoint belongs to another experiment, or all checkpoints of the run are damaged or missing.
            Otherwise the run would silently start over.
    """
    return _find_checkpoint(output_dir, mirror, experiment), finished(output_dir, experiment)


def _find_checkpoint(output_dir: Path, mirror: Path | None, experiment: Experiment) -> Found | None:
    """The newest valid checkpoint in `output_dir`, else in the mirror; None if no run has saved one."""
    found = newest_valid([output_dir] if mirror is None else [output_dir, mirror])
    if found is not None:
        require_same_experiment(found, experiment, OUTPUT_DIR if found.path.parent == output_dir else PERSIST_TO)
    elif (output_dir / RUN_FILE).exists() and ((session := read_session(output_dir)) is None or session.saved):
        raise UserError(
            f"--output-dir {output_dir}: the checkpoints of this run are missing, or {RUN_FILE} is damaged; restore a "
            "checkpoint, or start over with --fresh"
        )
    return found


def what_is_saved(output_dir: Path, mirror: Path | None, fresh: bool) -> str:
    """The sentence for a run that ended early: which checkpoint the next start resumes from.

    Args:
        mirror: searched if `output_dir` has no checkpoint.
        fresh: whether this run was started with `--fresh`, which would delete the checkpoint the next time.
    """
    again = "the same command without --fresh" if fresh else "the same command"
    try:
        for directory in (output_dir, mirror or output_dir):
            for path in reversed(checkpoints(directory)):
                if seems_valid(path):
                    return f"saved: {path}; {again} resumes from it"
    except OSError as error:
        return f"the saved checkpoints cannot be listed: {error.filename}: {error.strerror}"
    return f"no checkpoint is saved in {output_dir} yet; the same command starts from the beginning"


def restore_from_mirror(found: Found, output_dir: Path) -> None:
    """Copy a valid checkpoint and the files of its run from the mirror to the output directory."""
    source = found.path.parent
    for name in (RUN_FILE, *FILES):
        if (source / name).is_file():
            copy_file(source / name, output_dir / name)
    try:
        copy_checkpoint(found.path, output_dir / found.path.name)
    except Damaged as error:
        raise UserError(f"{output_dir}: {error}; check the disk") from error


def finished(output_dir: Path, experiment: Experiment) -> dict[str, Any] | None:
    """The summary of a run that is already complete, else None.

    A run whose data or base model now come from another location does not count as complete. Whether they are the same
    is known only when they are read.
    """
    if has_other_locations(output_dir / CONFIG, experiment):
        return None
    summary = read_summary(output_dir)
    return summary if summary is not None and is_complete(summary, experiment) else None


def read_summary(output_dir: Path) -> dict[str, Any] | None:
    """A run's `summary.json`; None if it is missing or damaged, or lacks fields that every version writes."""
    try:
        summary = read_json(output_dir / SUMMARY)
        Summary.model_validate(summary)
    except (Damaged, ValidationError):
        return None
    return summary


def write_config(output_dir: Path, experiment: Experiment, accumulation: int, changes: Mapping[str, Change]) -> None:
    """Write `config.yaml`: all keys of the experiment, and the settings that this machine changed, with reasons."""
    effect = {key: {"asked": asked, "used": used, "reason": why} for key, (asked, used, why) in changes.items()}
    dump_yaml(
        {**experiment.model_dump(), "gradient_accumulation_steps": accumulation, "in_effect": effect},
        output_dir / CONFIG,
    )


def clear(output_dir: Path) -> None:
    """Remove the files of a run, and no others.

    Raises:
        UserError: as `check_run_dir` with `fresh`, before anything is removed; or a file cannot be removed.
    """
    _refuse_foreign(output_dir)
    folders = [folder for folder in _folders(output_dir) if folder.is_dir()]
    why: dict[Path, str] = {}
    for folder in folders:
        try:
            remove(folder)
        except OSError as error:  # reported below, if files remain
            why[folder] = f"{error.filename}: {error.strerror}"
    if stuck := [why.get(folder, str(folder)) for folder in folders if _holds_files(folder)]:
        raise UserError(f"--fresh cannot remove {', '.join(stuck[:5])}; choose another directory")
    for name in (*FILES, RUN_FILE):  # run.json last, because it identifies the run
        (output_dir / (name + UNFINISHED)).unlink(missing_ok=True)
        (output_dir / name).unlink(missing_ok=True)


def _refuse_foreign(output_dir: Path, option: str = OUTPUT_DIR) -> None:
    """Raise UserError if clearing the directory would remove a link, or a file that no run created.

    Also raise if files of the run cannot be removed for lack of permission, before any file is removed.
    """
    files = [output_dir / name for name in (*FILES, RUN_FILE)]
    foreign = [path for path in files if path.is_symlink() or (path.exists() and not path.is_file())]
    foreign = foreign or _foreign_files(output_dir)
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
            f"--fresh: {output_dir} contains files that no run created: {', '.join(map(str, foreign[:5]))}; "
            f"move them away, or choose another {option}"
        )
    folders = [folder for folder in (output_dir, *_folders(output_dir)) if folder.is_dir()]
    if stuck := [folder for folder in folders if not os.access(folder, os.W_OK | os.X_OK)]:
        raise UserError(
            f"--fresh: no permission to remove files in {', '.join(map(str, stuck[:5]))}; nothing was removed; change "
            f"the permissions, or choose another {option}"
        )


def _holds_files(folder: Path) -> bool:
    """Whether a folder contains anything except files that a network file system will remove by itself."""
    return folder.is_dir() and any(not entry.name.startswith(STILL_OPEN) for entry in os.scandir(folder))


def _foreign_files(output_dir: Path) -> list[Path]:
    """Files and folders with names that a run uses, in a directory that no run has used."""
    if (output_dir / RUN_FILE).exists():
        return []
    return [path for path in (*(output_dir / name for name in FILES), *_folders(output_dir)) if path.exists()]


def _folders(output_dir: Path) -> dict[Path, set[str]]:
    """The folders that a run writes, and the names of the files that it writes into each."""
    found = [path for path in output_dir.glob("checkpoint-*") if any(p.fullmatch(path.name) for p in (NAME, LEFTOVER))]
    adapters = (output_dir / ADAPTER_DIR, output_dir / (ADAPTER_DIR + UNFINISHED))
    return dict.fromkeys(found, CHECKPOINT_FILES) | dict.fromkeys(adapters, ADAPTER_DIR_FILES)
