"""The mirror (`--persist-to`): a verified copy of checkpoints and results in a second directory, for example a drive.

A thread copies, so that a slow mirror does not delay training, and repeats what fails. Every file is read back and
compared. The mirror has the layout of a run's directory: a run whose output directory is empty resumes from it.

A mounted drive can disappear during the run and come back empty. So the thread looks at the mirror before each copy
instead of relying on what it copied before. It creates the directory only once, at the start. Created later, it would
be on this machine's own disk, below the mount point of a drive that is gone.

`run.json` in the mirror identifies its owner from the start. A run that is killed before its first checkpoint leaves it
there, and the next start continues under the same id, unless a running process holds the mirror's lock.
"""

import contextlib
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch

from medqa.config import Experiment
from medqa.errors import Interrupted, UserError, writing
from medqa.files import UNFINISHED, Damaged, checksum, flush, replacing
from medqa.model.adapter_files import ADAPTER_DIR_FILES
from medqa.recorded import MANIFEST, checkpoints, read_manifest
from medqa.training.checkpoint import (
    CHECKPOINT_FILES,
    copy_checkpoint,
    drop_page_cache,
    is_ours,
    measure,
    prune,
    remove_unfinished,
    verify_checkpoint,
)
from medqa.training.plan import parameter_counts
from medqa.training.run_dir import ADAPTER_DIR, FILES, RUN_FILE, RunLock, Session, check_run_dir, clear, read_session

RETRY_S = 30.0
SILENT_WAIT_S = 2.0  # at the end of a run, before a message says that it waits
LAST_WAIT_S = 600.0  # at the end of a run, for the remaining files
SIGNALLED_WAIT_S = 20.0  # the same after a signal: whoever sent it does not wait long
CLAIM_WAIT_S = 1.0  # for another process that is just writing its run.json

FileStats = tuple[tuple[int, int] | None, ...]  # size and modification time of files; None for a missing file


class Mirror:
    """Keeps a copy of a run in `directory` up to date; does nothing for None. Only the main process copies.

    Attributes:
        directory: the mirror, `--persist-to`.
        directories: the output directory, then the mirror if there is one.
    """

    def __init__(self, directory: Path | None, output_dir: Path) -> None:
        self.directory = directory
        self.directories = [output_dir] if directory is None else [output_dir, directory]
        self._output_dir = output_dir
        self._lock = RunLock(output_dir if directory is None else directory, "--persist-to", "uses it as its mirror")
        self._run_id: str | None = None
        self._file_system: tuple[int, Path] | None = None  # of the mirror: device number and mount point
        self._thread: threading.Thread | None = None
        self._wanted, self._leaving = threading.Event(), threading.Event()
        self._needed: set[int] = set()
        self._verified: dict[Path, tuple[str, FileStats]] = {}  # of what was copied: checksum, and stats in the mirror
        self._reported: set[str] = set()
        self._complete = False

    def __enter__(self) -> "Mirror":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Wait until the mirror is complete, for a bounded time, and release its lock."""
        with self._lock:
            self._wait(kind is not None and issubclass(kind, Interrupted))

    def _wait(self, signalled: bool) -> None:
        """Wait until the mirror is complete, for a short time after a signal."""
        if self._thread is None:
            return
        self._leaving.set()  # before `_wanted`: the round that begins after it is the last one
        self._wanted.set()
        seconds = SIGNALLED_WAIT_S if signalled else LAST_WAIT_S
        try:
            self._thread.join(min(SILENT_WAIT_S, seconds))
            if self._thread.is_alive():
                self._report(f"--persist-to {self.directory}: copying the rest, for at most {seconds:.0f} s")
                self._thread.join(seconds)
        finally:  # also if a signal ends the wait
            if not self._complete:
                self._report(
                    f"--persist-to {self.directory}: the copy is incomplete; the complete run is in {self._output_dir}"
                )

    def check(self, experiment: Experiment, fresh: bool) -> None:
        """Check that the mirror can be used, and lock it if a run has used it before. Nothing is written.

        Raises:
            UserError: its parent directory does not exist (a missing mount), it cannot be written, it contains another
                run, or another run is using it.
        """
        mirror, output_dir = self.directory, self._output_dir
        if mirror is None:
            return
        if not os.path.isdir(mirror.absolute().parent):
            raise UserError(f"--persist-to {mirror}: {mirror.absolute().parent} does not exist; mount or create it")
        self._require_another_directory()
        check_run_dir(mirror, experiment, fresh, "--persist-to")
        self._lock.acquire_if_exists()
        if fresh:
            return
        here, there = read_session(output_dir), read_session(mirror)
        if here is not None and there is not None and here.run_id != there.run_id:
            raise UserError(
                f"--persist-to {mirror} contains another run than {output_dir}; choose another --persist-to, or move "
                "one of them away"
            )

    def acquire(self) -> Session | None:
        """Lock the mirror for this run, and create it if necessary.

        Returns:
            The session in the mirror's `run.json` if that run ended before its first checkpoint: this run continues
            under its id. Otherwise None.

        Raises:
            UserError: another run is using the mirror.
        """
        if self.directory is None:
            return None
        self._require_another_directory()
        with contextlib.suppress(OSError):  # the thread gets the same error, reports it, and tries again
            self.directory.mkdir(exist_ok=True)
            self._lock.acquire()
        session = read_session(self.directory) if self._lock.held else None
        return None if session is None or session.saved else session

    def start(self, keep: int, fresh: bool, report: Callable[[str], None]) -> None:
        """Start the copying thread. It compares files that are in the mirror already before it copies.

        Args:
            keep: how many checkpoints to keep in the mirror.
            fresh: clear the mirror first.
            report: called with messages, from the thread.

        Raises:
            UserError: `fresh`, and the mirror contains files that no run created, or cannot be cleared; or another run
                is using it.
        """
        if self.directory is None:
            return
        self.acquire()
        if fresh and self.directory.is_dir():
            with writing(self.directory):
                clear(self.directory)
        session = read_session(self._output_dir)
        self._run_id = None if session is None else session.run_id
        self._keep, self._report = keep, report
        with contextlib.suppress(OSError, Damaged):  # the thread gets the same error, reports it, and tries again
            self._check_mirror()
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    def wake(self, needed: set[int]) -> None:
        """Tell the thread that there are new files; it never removes checkpoints of the steps `needed`."""
        self._needed = needed
        self._wanted.set()

    @property
    def _target(self) -> Path:
        """The mirror, which must not be None."""
        assert self.directory is not None
        return self.directory

    def _require_another_directory(self) -> None:
        """Raise UserError if the mirror is the output directory, under any name."""
        target, output_dir = self._target, self._output_dir
        same = os.path.realpath(target) == os.path.realpath(output_dir)
        if same or (os.path.exists(target) and os.path.exists(output_dir) and os.path.samefile(target, output_dir)):
            raise UserError(f"--persist-to {target}: this is the output directory; choose another directory")

    def _work(self) -> None:
        """The thread: copy whenever there are new files, and try again after a failure."""
        failed = False
        while True:
            self._wanted.wait(RETRY_S if failed else None)
            self._wanted.clear()
            last_round = self._leaving.is_set()
            try:
                self._copy_all()
            except (OSError, Damaged) as error:
                failed = True
                self._report_once(f"{error}; training continues, and copying is tried again")
                continue
            except UserError as error:
                self._report(f"{error}; nothing more is copied")
                return
            if failed:
                failed = False
                self._reported.clear()
                self._report(f"--persist-to {self.directory}: the mirror is up to date again")
            if last_round:
                self._complete = True
                return

    def _report_once(self, problem: str) -> None:
        """Report a problem of the mirror, unless it was reported already."""
        if problem not in self._reported:
            self._reported.add(problem)
            self._report(f"--persist-to {self.directory}: {problem}")

    def _check_mirror(self) -> None:
        """Check that the mirror exists, on the file system that it was on at the start, and belongs to this run.

        Raises:
            OSError, Damaged: it does not exist, or is on another file system.
            UserError: it contains another run.
        """
        target = self._target
        if self._file_system is None:
            target.mkdir(exist_ok=True)
        try:
            device = target.stat().st_dev
        except FileNotFoundError as error:
            raise Damaged("it does not exist any more; mount or create it again") from error
        mount = _mount_point(target)
        if self._file_system is None or mount == self._file_system[1]:
            self._file_system = device, mount
        elif device != self._file_system[0]:
            raise Damaged(f"the file system that was mounted at {self._file_system[1]} is gone; mount it again")
        owner = read_session(target)
        if owner is None and self._run_id is not None:
            self._lock.release()  # if the mirror came back empty, the lock file is gone as well
            self._lock.acquire()
            try:
                with (target / RUN_FILE).open("xb") as file:  # of two runs that start at once, one succeeds
                    file.write((self._output_dir / RUN_FILE).read_bytes())
                return
            except FileExistsError:
                time.sleep(CLAIM_WAIT_S)
                owner = read_session(target)
        another = owner is not None and self._run_id is not None and owner.run_id != self._run_id
        if another or self._lock.new_owner() is not None:
            raise UserError(
                f"--persist-to {target} is in use by another run, or holds its copy; choose another directory, or, "
                "when that run has ended, start over with --fresh"
            )

    def _copy_all(self) -> None:
        """Bring the mirror up to date: metrics before the checkpoints that they belong to, the summary last."""
        source, target = self._output_dir, self._target
        self._check_mirror()
        remove_unfinished(target)
        # Listed before the metrics are copied: a checkpoint saved in between would be copied without its records.
        found = [path for path in checkpoints(source) if is_ours(path)]
        for name in (RUN_FILE, *FILES[:-1]):
            self._copy(source / name, target / name)
        for path in found:
            self._copy_checkpoint(path, target / path.name)
        if (source / ADAPTER_DIR).is_dir():
            (target / ADAPTER_DIR).mkdir(exist_ok=True)
            for name in sorted(ADAPTER_DIR_FILES):
                self._copy(source / ADAPTER_DIR / name, target / ADAPTER_DIR / name)
        self._copy(source / FILES[-1], target / FILES[-1])
        if self._needed:  # else nothing was saved in this session, and the best step is unknown
            for problem in prune(target, self._keep, self._needed):
                self._report_once(problem)

    def _copy(self, source: Path, target: Path) -> None:
        """Copy a file unless the mirror has the same content already, and verify the copy by reading it back."""
        if not source.is_file():
            return
        self._check_mirror()
        content = source.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if self._verified.get(target) == (digest, _stats(target)):
            return
        wanted = {"size": len(content), "sha256": digest}
        if not target.is_file() or target.stat().st_size != len(content) or measure(target) != wanted:
            with replacing(target) as file:
                file.write(content)
                file.flush()
                beside = target.with_name(target.name + UNFINISHED)
                flush(beside)
                drop_page_cache(beside)
                if measure(beside) != wanted:
                    raise Damaged(f"{target.name} reads back differently from what was written")
        self._verified[target] = digest, _stats(target)

    def _copy_checkpoint(self, source: Path, target: Path) -> None:
        """Copy a checkpoint that is not in the mirror yet, and verify the copy against its manifest."""
        self._check_mirror()
        try:
            wanted = read_manifest(source)
        except Damaged:
            return  # damaged, or being pruned
        files = [target / name for name in sorted(CHECKPOINT_FILES)]
        if self._verified.get(target) == (checksum(wanted), _stats(*files)):
            return
        if not _holds(target, wanted):
            try:
                copy_checkpoint(source, target)
            except (FileNotFoundError, Damaged):
                if (source / MANIFEST).exists():
                    raise
                return  # pruned meanwhile: there is a newer one
        self._verified[target] = checksum(wanted), _stats(*files)


def _stats(*paths: Path) -> FileStats:
    """Size and modification time of files, which are not read."""
    found: list[tuple[int, int] | None] = []
    for path in paths:
        try:
            status = path.stat()
            found.append((status.st_size, status.st_mtime_ns))
        except (FileNotFoundError, NotADirectoryError):
            found.append(None)
    return tuple(found)


def _mount_point(path: Path) -> Path:
    """The mount point of the file system that a path is on."""
    real = Path(os.path.realpath(path))
    return next(path for path in (real, *real.parents) if os.path.ismount(path))


def _holds(target: Path, wanted: dict) -> bool:
    """Whether `target` is a valid checkpoint with this manifest."""
    try:
        return verify_checkpoint(target) == wanted
    except Damaged:
        return False


def space_needed(
    mirror: Path | None, experiment: Experiment, model: torch.nn.Module, step: int, updates: int
) -> list[tuple[str, str]]:
    """The line of the plan with the disk space that the mirror needs from `step` to the last update; none without one.

    A trainable parameter takes 4 bytes in the adapter and 8 in AdamW's state (8-bit: 2, and a little for scales).
    """
    if mirror is None:
        return []
    trainable, _ = parameter_counts(model)
    saves = -(-(updates - step) // experiment.training.save_steps)
    size = trainable * (4 + (2.1 if "8bit" in experiment.optimizer.name else 8)) + 100_000
    try:
        above = next(path for path in (mirror, *mirror.absolute().parents) if path.exists())
        free = f"{shutil.disk_usage(above).free / 1e9:,.1f} GB free"
    except OSError as error:
        free = f"free space unknown: {error.strerror}"
    line = (
        f"{mirror}: {size / 1e6:,.1f} MB per checkpoint, {saves * size / 1e6:,.1f} MB for the next {saves} if deleted "
        f"files stay in a trash, as on Google Drive; {free}"
    )
    return [("mirror", line)]
