"""Verified copies of a run's checkpoints and results in another place: a Drive mount, a network share.

A thread makes them, so that a slow place does not hold training up; what fails is tried again. Every file is read back
and compared. The copy has the layout of a run's directory: a run goes on from it where its own directory is empty.
"""

import hashlib
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch

from medqa.config import Experiment
from medqa.errors import Interrupted, UserError, writing
from medqa.training.checkpoint import MANIFEST
from medqa.training.checkpoint_files import (
    CONTENT,
    UNFINISHED,
    checkpoints,
    flush,
    is_ours,
    make_way,
    prune,
    put_in_place,
    remove,
    unfinished,
)
from medqa.training.manifest import Damaged, read_manifest, verify
from medqa.training.plan import parameter_counts
from medqa.training.run_dir import ADAPTER_DIR, FILES, RUN_FILE, check_run_dir, clear, read_leg

RETRY_S = 30.0
UNSAID_WAIT_S = 2.0
LAST_WAIT_S = 600.0  # at the end of a run, for what is not copied yet
SIGNALLED_WAIT_S = 20.0  # what stops a run by a signal does not wait long


class Copies:
    """Keeps a copy of a run in `directory` up to date; does nothing for None. Used by the first process alone."""

    def __init__(self, directory: Path | None, output_dir: Path) -> None:
        self.directory = directory
        self.places = [output_dir] if directory is None else [output_dir, directory]  # of the run's files
        self._output_dir = output_dir
        self._thread: threading.Thread | None = None
        self._wanted, self._leaving = threading.Event(), threading.Event()
        self._needed: set[int] = set()
        self._verified: dict[str, str] = {}  # what was copied: name to sha256, or to the manifest's checksum

    def __enter__(self) -> "Copies":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Wait for the last copies, for a bounded time."""
        if self._thread is None:
            return
        self._leaving.set()  # before the other: what is begun after it is the last round
        self._wanted.set()
        seconds = SIGNALLED_WAIT_S if kind is not None and issubclass(kind, Interrupted) else LAST_WAIT_S
        self._thread.join(min(UNSAID_WAIT_S, seconds))
        if self._thread.is_alive():
            self._say(f"--persist-to {self.directory}: copying the rest, for at most {seconds:.0f} s")
            self._thread.join(seconds)
        if self._thread.is_alive():
            self._say(f"--persist-to {self.directory}: not everything is there yet: {self._output_dir} has all")

    def check(self, experiment: Experiment, fresh: bool) -> None:
        """See that the place is there, and this run's.

        Raises:
            UserError: the directory above it does not exist (a mount that is missing), it cannot be written to, or
                it holds another run.
        """
        place, output_dir = self.directory, self._output_dir
        if place is None:
            return
        if not place.absolute().parent.is_dir():
            raise UserError(f"--persist-to {place}: {place.absolute().parent} does not exist; is it mounted?")
        if place.absolute() == output_dir.absolute():
            raise UserError(f"--persist-to {place}: that is the output directory itself; choose another place")
        check_run_dir(place, experiment, fresh, "--persist-to")
        if fresh:
            return
        here, there = read_leg(output_dir), read_leg(place)
        if here is not None and there is not None and here.run_id != there.run_id:
            raise UserError(
                f"--persist-to {place} holds another run than {output_dir}; choose another place, or move one away"
            )

    def start(self, keep: int, fresh: bool, say: Callable[[str], None]) -> None:
        """Begin to copy; the first time what is there is compared with what should be.

        Raises:
            UserError: `fresh`, and the place holds what no run wrote, or cannot be cleared.
        """
        if self.directory is None:
            return
        if fresh and self.directory.is_dir():
            with writing(self.directory):
                clear(self.directory)
        self._keep, self._say = keep, say
        self._thread = threading.Thread(target=self._work, name="persist", daemon=True)
        self._thread.start()

    def wake(self, needed: set[int]) -> None:
        """There is something new; the checkpoints of the steps `needed` are to be kept."""
        self._needed = needed
        self._wanted.set()

    def _work(self) -> None:
        """Copy whenever there is something new, and again where it failed."""
        told: set[str] = set()
        failed = False
        while True:
            self._wanted.wait(RETRY_S if failed else None)
            self._wanted.clear()
            last_round = self._leaving.is_set()
            try:
                self._mirror()
                failed = False
                if last_round:
                    return
            except (OSError, Damaged) as error:
                failed = True
                reason = str(error)
                if reason not in told:
                    told.add(reason)
                    self._say(f"--persist-to {self.directory}: {reason}; training goes on, it is tried again")

    def _mirror(self) -> None:
        """Bring the copy up to date: the metrics before the checkpoints that they belong to, the summary last."""
        source, target = self._output_dir, self.directory
        target.mkdir(exist_ok=True)
        for path in unfinished(target):
            remove(path)
        # Looked for before the metrics are read: one that is saved in between would be there without its lines.
        places = [place for place in checkpoints(source) if is_ours(place)]
        for name in (RUN_FILE, *FILES[:-1]):
            self._copy(source / name, target / name)
        for place in places:
            self._copy_checkpoint(place, target / place.name)
        if (source / ADAPTER_DIR).is_dir():
            (target / ADAPTER_DIR).mkdir(exist_ok=True)
            for path in sorted((source / ADAPTER_DIR).iterdir()):
                self._copy(path, target / ADAPTER_DIR / path.name)
        self._copy(source / FILES[-1], target / FILES[-1])
        if self._needed:  # else nothing new was saved, and which one is the best is not known
            prune(target, self._keep, self._needed)

    def _copy(self, source: Path, target: Path) -> None:
        """Copy a file if it has changed, and compare what is read back."""
        if not source.is_file() or target.name.endswith(UNFINISHED):
            return
        content = source.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if self._verified.get(str(target)) == digest:
            return
        beside = target.with_name(target.name + UNFINISHED)
        beside.write_bytes(content)
        flush(beside)
        _forget_cached(beside)
        if hashlib.sha256(beside.read_bytes()).hexdigest() != digest:
            raise Damaged(f"{target.name} reads back differently from what was written")
        os.replace(beside, target)
        self._verified[str(target)] = digest

    def _copy_checkpoint(self, source: Path, target: Path) -> None:
        """Copy a checkpoint that is not there yet, and verify what is read back against its manifest."""
        try:
            wanted = read_manifest(source)
        except Damaged:
            return  # damaged, or just being pruned
        if self._verified.get(source.name) == str(wanted["files"]):
            return
        if not _holds(target, wanted):
            beside = target.with_name(target.name + UNFINISHED)
            make_way(beside)
            beside.mkdir()
            for name in (*CONTENT, MANIFEST):
                try:
                    shutil.copyfile(source / name, beside / name)
                except FileNotFoundError:
                    if source.exists():
                        raise
                    return remove(beside)  # pruned in the meantime: a newer one is there
                flush(beside / name)
                _forget_cached(beside / name)
            if verify(beside, CONTENT) != wanted:
                raise Damaged(f"{target.name} reads back differently from what was written")
            put_in_place(beside, target)
        self._verified[source.name] = str(wanted["files"])


def _holds(target: Path, wanted: dict) -> bool:
    """Whether the same checkpoint is there already, whole."""
    try:
        return verify(target, CONTENT) == wanted
    except Damaged:
        return False


def _forget_cached(path: Path) -> None:
    """Have the next read come from where the file lies, not from this machine's memory, where the system can."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


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
