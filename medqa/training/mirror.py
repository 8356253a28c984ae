"""`--persist-to`: verified copies of checkpoints and results in another place, such as a mounted drive.

A thread makes them, so that a slow place does not hold training up; what fails is tried again. Every file is read back
and compared. The copy has the layout of a run's directory: a run goes on from it where its own directory is empty.

The place can go away while the run is on, and come back empty. What is there is therefore looked at before each copy,
and never remembered alone. The directory itself is made once, at the start: made again later it would lie on this
machine's own disk, below the place where something else had been mounted.

Whose the directory is stands in its run.json from the start. A run that is killed before its first checkpoint leaves
that behind: the next start goes on under its id, if no run that still lives holds the directory's lock.
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
    forget_cached,
    is_ours,
    measure,
    prune,
    remove_unfinished,
    verify_checkpoint,
)
from medqa.training.plan import parameter_counts
from medqa.training.run_dir import ADAPTER_DIR, FILES, RUN_FILE, RunLock, Session, check_run_dir, clear, read_session

RETRY_S = 30.0
UNSAID_WAIT_S = 2.0
LAST_WAIT_S = 600.0  # at the end of a run, for what is not copied yet
SIGNALLED_WAIT_S = 20.0  # what stops a run by a signal does not wait long
CLAIM_WAIT_S = 1.0  # for another process that is just writing whose the directory is

Seen = tuple[tuple[int, int] | None, ...]  # size and time of change of files; None for one that is not there


class Copies:
    """Keeps a copy of a run in `directory` up to date; does nothing for None. Used by the first process alone."""

    def __init__(self, directory: Path | None, output_dir: Path) -> None:
        self.directory = directory
        self.places = [output_dir] if directory is None else [output_dir, directory]  # of the run's files
        self._output_dir = output_dir
        self._lock = RunLock(output_dir if directory is None else directory, "--persist-to", "copies to it")
        self._run_id: str | None = None
        self._file_system: tuple[int, Path] | None = None  # of the directory: device, and where that is mounted
        self._thread: threading.Thread | None = None
        self._wanted, self._leaving = threading.Event(), threading.Event()
        self._needed: set[int] = set()
        self._verified: dict[Path, tuple[str, Seen]] = {}  # what was copied where: its checksum, and how it looked
        self._told: set[str] = set()
        self._complete = False

    def __enter__(self) -> "Copies":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Wait for the last copies, for a bounded time, and leave the directory to others."""
        with self._lock:
            self._wait(kind is not None and issubclass(kind, Interrupted))

    def _wait(self, signalled: bool) -> None:
        """Wait for the last copies; a run that was stopped by a signal does not wait long."""
        if self._thread is None:
            return
        self._leaving.set()  # before the other: what is begun after it is the last round
        self._wanted.set()
        seconds = SIGNALLED_WAIT_S if signalled else LAST_WAIT_S
        try:
            self._thread.join(min(UNSAID_WAIT_S, seconds))
            if self._thread.is_alive():
                self._say(f"--persist-to {self.directory}: copying the rest, for at most {seconds:.0f} s")
                self._thread.join(seconds)
        finally:  # a signal ends the waiting
            if not self._complete:
                self._say(f"--persist-to {self.directory}: not everything is there yet: {self._output_dir} has all")

    def check(self, experiment: Experiment, fresh: bool) -> None:
        """See that the place is there, and this run's.

        Raises:
            UserError: the directory above it does not exist (a mount that is missing), it cannot be written to, it
                holds another run, or another run is copying to it.
        """
        place, output_dir = self.directory, self._output_dir
        if place is None:
            return
        if not os.path.isdir(place.absolute().parent):
            raise UserError(f"--persist-to {place}: {place.absolute().parent} does not exist; is it mounted?")
        self._require_another_directory()
        check_run_dir(place, experiment, fresh, "--persist-to")
        self._lock.take_if_there()
        if fresh:
            return
        here, there = read_session(output_dir), read_session(place)
        if here is not None and there is not None and here.run_id != there.run_id:
            raise UserError(
                f"--persist-to {place} holds another run than {output_dir}; choose another place, or move one away"
            )

    def take(self) -> Session | None:
        """Take the place for this run alone; make it if need be.

        Returns:
            What a run that ended before its first checkpoint has noted there: this one goes on as that run. None where
            there is no such thing.

        Raises:
            UserError: another run is copying to it.
        """
        if self.directory is None:
            return None
        self._require_another_directory()
        with contextlib.suppress(OSError):  # the thread comes to the same, says it, and tries again
            self.directory.mkdir(exist_ok=True)
            self._lock.take()
        session = read_session(self.directory) if self._lock.held else None
        return None if session is None or session.saved else session

    def start(self, keep: int, fresh: bool, say: Callable[[str], None]) -> None:
        """Begin to copy; the first time what is there is compared with what should be.

        Raises:
            UserError: `fresh`, and the place holds what no run wrote, or cannot be cleared; or another run is copying
                to the same place.
        """
        if self.directory is None:
            return
        self.take()
        if fresh and self.directory.is_dir():
            with writing(self.directory):
                clear(self.directory)
        session = read_session(self._output_dir)
        self._run_id = None if session is None else session.run_id
        self._keep, self._say = keep, say
        with contextlib.suppress(OSError, Damaged):  # the thread comes to the same, says it, and tries again
            self._look()
        self._thread = threading.Thread(target=self._work, name="persist", daemon=True)
        self._thread.start()

    def wake(self, needed: set[int]) -> None:
        """There is something new; the checkpoints of the steps `needed` are to be kept."""
        self._needed = needed
        self._wanted.set()

    @property
    def _place(self) -> Path:
        """The directory that is copied to, where there is one."""
        assert self.directory is not None
        return self.directory

    def _require_another_directory(self) -> None:
        """Raise where the place is the output directory, by whatever name."""
        place, output_dir = self._place, self._output_dir
        same = os.path.realpath(place) == os.path.realpath(output_dir)
        if same or (os.path.exists(place) and os.path.exists(output_dir) and os.path.samefile(place, output_dir)):
            raise UserError(f"--persist-to {place}: that is the output directory itself; choose another place")

    def _work(self) -> None:
        """Copy whenever there is something new, and again where it failed."""
        failed = False
        while True:
            self._wanted.wait(RETRY_S if failed else None)
            self._wanted.clear()
            last_round = self._leaving.is_set()
            try:
                self._mirror()
            except (OSError, Damaged) as error:
                failed = True
                self._tell(f"{error}; training goes on, it is tried again")
                continue
            except UserError as error:
                self._say(f"{error}; nothing more is copied")
                return
            if failed:
                failed = False
                self._told.clear()
                self._say(f"--persist-to {self.directory}: everything is copied again")
            if last_round:
                self._complete = True
                return

    def _tell(self, reason: str) -> None:
        """Say something of the place, once."""
        if reason not in self._told:
            self._told.add(reason)
            self._say(f"--persist-to {self.directory}: {reason}")

    def _look(self) -> None:
        """See that the directory is there, on the file system that it was on at the start, and this run's.

        Raises:
            OSError, Damaged: it is not there, or not where it was.
            UserError: it holds another run.
        """
        place = self._place
        if self._file_system is None:
            place.mkdir(exist_ok=True)
        try:
            device = place.stat().st_dev
        except FileNotFoundError as error:
            raise Damaged("it has gone; mount it, or make it, again") from error
        mount = _mount_point(place)
        if self._file_system is None or mount == self._file_system[1]:
            self._file_system = device, mount
        elif device != self._file_system[0]:
            raise Damaged(f"what was mounted at {self._file_system[1]} at the start has gone; mount it again")
        noted = read_session(place)
        if noted is None and self._run_id is not None:
            self._lock.release()  # the file has gone, too, where the place came back empty
            self._lock.take()
            try:
                with (place / RUN_FILE).open("xb") as file:  # of two runs that start at once, one succeeds
                    file.write((self._output_dir / RUN_FILE).read_bytes())
                return
            except FileExistsError:
                time.sleep(CLAIM_WAIT_S)
                noted = read_session(place)
        another = noted is not None and self._run_id is not None and noted.run_id != self._run_id
        if another or self._lock.taken_over_by() is not None:
            raise UserError(
                f"--persist-to {place}: another run copies to it, or has; choose another place, or, once that run has "
                "ended, start over there with --fresh"
            )

    def _mirror(self) -> None:
        """Bring the copy up to date: the metrics before the checkpoints that they belong to, the summary last."""
        source, target = self._output_dir, self._place
        self._look()
        remove_unfinished(target)
        # Looked for before the metrics are read: one that is saved in between would be there without its lines.
        places = [place for place in checkpoints(source) if is_ours(place)]
        for name in (RUN_FILE, *FILES[:-1]):
            self._copy(source / name, target / name)
        for place in places:
            self._copy_checkpoint(place, target / place.name)
        if (source / ADAPTER_DIR).is_dir():
            (target / ADAPTER_DIR).mkdir(exist_ok=True)
            for name in sorted(ADAPTER_DIR_FILES):
                self._copy(source / ADAPTER_DIR / name, target / ADAPTER_DIR / name)
        self._copy(source / FILES[-1], target / FILES[-1])
        if self._needed:  # else nothing new was saved, and which one is the best is not known
            for reason in prune(target, self._keep, self._needed):
                self._tell(reason)

    def _copy(self, source: Path, target: Path) -> None:
        """Copy a file if the same is not there already, and compare what is read back."""
        if not source.is_file():
            return
        self._look()
        content = source.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if self._verified.get(target) == (digest, _seen(target)):
            return
        wanted = {"size": len(content), "sha256": digest}
        if not target.is_file() or target.stat().st_size != len(content) or measure(target) != wanted:
            with replacing(target) as file:
                file.write(content)
                file.flush()
                beside = target.with_name(target.name + UNFINISHED)
                flush(beside)
                forget_cached(beside)
                if measure(beside) != wanted:
                    raise Damaged(f"{target.name} reads back differently from what was written")
        self._verified[target] = digest, _seen(target)

    def _copy_checkpoint(self, source: Path, target: Path) -> None:
        """Copy a checkpoint that is not there yet, and verify what is read back against its manifest."""
        self._look()
        try:
            wanted = read_manifest(source)
        except Damaged:
            return  # damaged, or just being pruned
        files = [target / name for name in sorted(CHECKPOINT_FILES)]
        if self._verified.get(target) == (checksum(wanted), _seen(*files)):
            return
        if not _holds(target, wanted):
            try:
                copy_checkpoint(source, target)
            except (FileNotFoundError, Damaged):
                if (source / MANIFEST).exists():
                    raise
                return  # pruned in the meantime: a newer one is there
        self._verified[target] = checksum(wanted), _seen(*files)


def _seen(*paths: Path) -> Seen:
    """How files look without being read."""
    found: list[tuple[int, int] | None] = []
    for path in paths:
        try:
            status = path.stat()
            found.append((status.st_size, status.st_mtime_ns))
        except (FileNotFoundError, NotADirectoryError):
            found.append(None)
    return tuple(found)


def _mount_point(path: Path) -> Path:
    """Where the file system that a path is on is mounted."""
    real = Path(os.path.realpath(path))
    return next(place for place in (real, *real.parents) if os.path.ismount(place))


def _holds(target: Path, wanted: dict) -> bool:
    """Whether the same checkpoint is there already, whole."""
    try:
        return verify_checkpoint(target) == wanted
    except Damaged:
        return False


def space_needed(
    place: Path | None, experiment: Experiment, model: torch.nn.Module, step: int, updates: int
) -> list[tuple[str, str]]:
    """The plan's line on what copies will take from update `step` to the last of so many; none where nothing is copied.

    A parameter that trains takes 4 bytes in the adapter and 8 in AdamW's state (8-bit: 2, and a little for scales).
    """
    if place is None:
        return []
    trainable, _ = parameter_counts(model)
    saves = -(-(updates - step) // experiment.training.save_steps)
    size = trainable * (4 + (2.1 if "8bit" in experiment.optimizer.name else 8)) + 100_000
    try:
        above = next(path for path in (place, *place.absolute().parents) if path.exists())
        free = f"{shutil.disk_usage(above).free / 1e9:,.1f} GB free"
    except OSError as error:
        free = f"free space unknown: {error.strerror}"
    line = (
        f"copies to {place}: {size / 1e6:,.1f} MB a checkpoint, {saves * size / 1e6:,.1f} MB for the {saves} to come "
        f"where deleted files stay in a trash, as on Google Drive; {free}"
    )
    return [("persist", line)]
