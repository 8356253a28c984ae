"""A run and its output directory, `outputs/<run>/`, from the first check to the last file.

`Run` does everything that `train.py` needs of the directory: it takes the lock, finds the checkpoint to resume from,
writes the files that describe the run, saves checkpoints, and keeps the mirror (`--persist-to`) up to date. It is built
on `run_dir.py` (file names, lock, starting over), `checkpoint.py` (the content of a checkpoint) and `mirror.py`.
Nothing is written before `resume_or_start`.
"""

import argparse
import contextlib
import functools
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from medqa.config import Experiment, flat
from medqa.config_file import default_output_dir, find_experiment, read_yaml
from medqa.data.batches import TrainingData
from medqa.data.report import write_reports
from medqa.data.tokens import ids_fingerprint
from medqa.errors import UserError, adding_what_is_saved, writing
from medqa.limits import MAX_SHOWN
from medqa.model.base_files import base_fingerprint
from medqa.model.settings import KEPT, Change, SavedSettings, Settings
from medqa.terminal import printable
from medqa.training.checkpoint import (
    Fingerprints,
    Found,
    Identity,
    changes,
    environment,
    load_checkpoint,
    save_checkpoint,
)
from medqa.training.distributed import on_main
from medqa.training.mirror import Mirror, space_needed
from medqa.training.plan import accumulation_steps
from medqa.training.recorder import Recorder, StartupTimer
from medqa.training.run_dir import (
    CONFIG,
    RunLock,
    Session,
    check_run_dir,
    find_saved,
    note_saved,
    other_files,
    refuse_differences,
    start_run,
    what_is_saved,
    write_config,
)
from medqa.training.state import EnvironmentChange, Progress, TrainState


class Run:
    """One session of a run in its output directory; a context manager.

    Entering checks the output directory and the mirror, locks the directory if a run has used it before, and finds the
    newest valid checkpoint, there or in the mirror. Leaving waits until the mirror is complete, and adds to an error a
    sentence about the saved checkpoint.

    Attributes:
        name: the name of the experiment: that of its file.
        startup: measures the time until the first update.
        output_dir: `--output-dir`, or `outputs/<name>` plus the overrides that change the results.
        checkpoint: the checkpoint to resume from; None if the run starts from the beginning.
        summary: the content of `summary.json` if the run is already complete, else None.
        identity: the experiment, data fingerprints and environment that every checkpoint of this run records; set by
            `resume_or_start`.
        session: the id of the run, and how often it was resumed; set by `resume_or_start`.
        in_effect: the `changes` of the settings in this session, that of the quantization with its first reason; set by
            `resume_or_start`. Only the main process needs it, and reads the reason.
    """

    identity: Identity
    in_effect: Mapping[str, Change]
    session: Session

    def __init__(self, experiment: Experiment, options: argparse.Namespace) -> None:
        self.startup = StartupTimer()
        self.name = find_experiment(options.exp).stem
        default = default_output_dir(options.exp, options.tiny, options.set, experiment)
        self.output_dir: Path = options.output_dir or default
        self._experiment, self._fresh = experiment, options.fresh
        self._mirror_dir: Path | None = options.persist_to
        self._lock, self._mirror = RunLock(self.output_dir), Mirror(self._mirror_dir, self.output_dir)

    def __enter__(self) -> "Run":
        experiment, output_dir, mirror, fresh = self._experiment, self.output_dir, self._mirror_dir, self._fresh
        with contextlib.ExitStack() as leaving:
            saved = functools.partial(what_is_saved, output_dir, mirror, fresh)
            leaving.enter_context(adding_what_is_saved(saved))
            leaving.enter_context(writing(output_dir))
            leaving.enter_context(self._lock)
            leaving.enter_context(self._mirror)
            check_run_dir(output_dir, experiment, fresh)
            self._lock.acquire_if_exists()
            self._mirror.check(experiment, fresh)
            self.checkpoint, self.summary = (None, None) if fresh else find_saved(output_dir, mirror, experiment)
            self._leaving = leaving.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._leaving.__exit__(kind, error, trace)

    @property
    def saved_settings(self) -> SavedSettings | None:
        """The settings in the checkpoint to resume from, which the resumed run keeps; None without one."""
        return None if self.checkpoint is None else self.checkpoint.identity.environment.settings

    @property
    def was_on_cpu(self) -> bool:
        """Whether the checkpoint to resume from was saved on a CPU; False without one."""
        return self.checkpoint is not None and self.checkpoint.identity.environment.on_cpu

    @property
    def directories(self) -> list[Path]:
        """The directories that may hold a checkpoint of this run: the output directory, then the mirror."""
        return self._mirror.directories

    def check_ownership(self) -> None:
        """Check, before a write, that no other run owns the directory now.

        Raises:
            UserError: another run does.
        """
        self._lock.check()

    def resume_or_start(
        self,
        state: TrainState,
        data: TrainingData,
        tokenizer: PreTrainedTokenizerBase,
        settings: Settings,
        recorder: Recorder,
    ) -> list[tuple[str, str]]:
        """Load the checkpoint into `state` if there is one, then write the first files of this session.

        Returns:
            Lines for the plan, as (label, text).

        Raises:
            UserError: data, token ids or base model are not those of the checkpoint; another run uses the directory; or
                processes loaded different data. Nothing is written then.
        """
        experiment, accelerator = self._experiment, recorder.accelerator
        self.identity = identify(experiment, data, tokenizer, state.adapted, settings, accelerator)
        self.in_effect = settings.changes
        if self.checkpoint is not None:
            load_into(state, self.checkpoint, self.identity)
        progress = state.progress
        self.session = start_run(
            self.output_dir, self._fresh, self.checkpoint, progress, self._lock, accelerator, self._mirror.acquire
        )
        earlier = recorder.restore(progress, data.updates)
        if accelerator.is_main_process:
            accumulation = accumulation_steps(experiment.training, accelerator.num_processes)
            self.in_effect = with_first_reason(settings.changes, self.output_dir / CONFIG)
            write_config(self.output_dir, experiment, accumulation, self.in_effect)
            write_reports(self.output_dir, data, experiment, settings.padding_free)
        self._start_mirror(recorder)
        recorder.startup.record("model")
        return [
            *resume_lines(self.checkpoint, progress, earlier.unreadable),
            *other_files(self.output_dir),
            *space_needed(self._mirror_dir, experiment, state.adapted, progress.step, data.updates),
        ]

    def save(self, state: TrainState, recorder: Recorder) -> None:
        """Write a checkpoint of `state` durably, and start copying it to the mirror.

        Raises:
            UserError: it cannot be written. Existing checkpoints stay.
        """
        progress, accelerator = state.progress, recorder.accelerator
        began = progress.elapsed_s = recorder.clock()
        recorder.flush()
        keep = self._experiment.training.keep_checkpoints
        save_checkpoint(self.output_dir, state, self.identity, accelerator, keep, recorder.message_once)
        if accelerator.is_main_process:
            note_saved(self.output_dir)
            self._mirror.wake({progress.step, progress.best_step})
        recorder.log_save(progress.step, recorder.clock() - began)

    def show_complete(self, recorder: Recorder) -> None:
        """Print the result of a run that is already complete, and complete its mirror."""
        assert self.summary is not None
        self._start_mirror(recorder)
        recorder.show_complete_run(self.summary)

    def _start_mirror(self, recorder: Recorder) -> None:
        """Start the mirror on the main process. It copies now, and after each save.

        Raises:
            UserError: the mirror contains files that no run created, or another run has just begun to use it.
        """
        keep = self._experiment.training.keep_checkpoints
        on_main(recorder.accelerator, lambda: self._mirror.start(keep, self._fresh, recorder.message))
        self._mirror.wake(set())  # copy run.json first: it identifies the owner of the mirror


_AS_BEFORE = " (as in the checkpoint)"


def with_first_reason(changes: Mapping[str, Change], config: Path) -> dict[str, Change]:
    """The changes, and why the run first decided its quantization where it is now kept from the checkpoint.

    Args:
        config: the `config.yaml` of the session before. If it is missing, damaged or changed, nothing is added.
    """
    key = "model.quantization"
    asked, used, reason = changes.get(key, ("", "", ""))
    if reason != KEPT:
        return dict(changes)
    try:
        said: Any = read_yaml(config)
    except UserError:
        return dict(changes)
    for name in ("in_effect", key):
        said = said.get(name) if isinstance(said, dict) else None
    first = said.get("reason") if isinstance(said, dict) and said.get("used") == used else None
    if not isinstance(first, str) or first == KEPT or not 0 < len(first) <= 2 * MAX_SHOWN:
        return dict(changes)
    first = " ".join(printable(first).split()).removesuffix(_AS_BEFORE)
    return {**changes, key: (asked, used, first + _AS_BEFORE)}


# ----------------------------------------------------------------------------------------------------
# Whether a checkpoint belongs to this run

FINGERPRINT_NAMES = {"data": "data", "tokenizer": "token ids", "base": "base model"}


def identify(
    experiment: Experiment,
    data: TrainingData,
    tokenizer: PreTrainedTokenizerBase,
    model: PeftModel,
    settings: Settings,
    accelerator: Accelerator,
) -> Identity:
    """The experiment, data fingerprints and environment that every checkpoint of this run records.

    Raises:
        UserError: processes loaded different data, token ids or base models. Each process loads them itself.
    """

    def of_base() -> str:
        return base_fingerprint(experiment.model.base)

    fingerprints = Fingerprints(
        data=data.splits.fingerprint,
        tokenizer=ids_fingerprint(data.examples, tokenizer),
        # With sharded weights only the main process has the files of the base model.
        base=of_base() if settings.shards == 1 else on_main(accelerator, of_base),
    )
    if accelerator.num_processes > 1:
        found = gather_object([fingerprints.model_dump()])
        differing = [what for name, what in FINGERPRINT_NAMES.items() if len({each[name] for each in found}) > 1]
        if differing:
            raise UserError(
                f"processes loaded different {', '.join(differing)}: on several machines use files and caches "
                "(HF_HOME, KAGGLEHUB_CACHE) on a shared file system, or the same copies on each machine"
            )
    return Identity(
        experiment=flat(experiment),
        fingerprints=fingerprints,
        environment=environment(accelerator, settings, model),
    )


def load_into(state: TrainState, found: Found, identity: Identity) -> None:
    """Load a checkpoint into the state, if its data, token ids and base model are those of this run.

    A change of the environment that may change last digits is added to `state.progress.not_bitwise`.

    Raises:
        UserError: they are others. The message lists the differences, and nothing is loaded.
    """
    before, now = (each.fingerprints.model_dump() for each in (found.identity, identity))
    refuse_differences(
        f"{found.path} was trained with other data, token ids or another base model",
        [
            f"{what}: {before[name][:12]} there, {now[name][:12]} now"
            for name, what in FINGERPRINT_NAMES.items()
            if before[name] != now[name]
        ],
    )
    load_checkpoint(found, state)
    if changed := changes(found.identity.environment, identity.environment):
        state.progress.not_bitwise.append(EnvironmentChange(state.progress.step, changed))


def resume_lines(found: Found | None, progress: Progress, unreadable_lines: int) -> list[tuple[str, str]]:
    """Lines of the plan about resuming: skipped checkpoints, dropped lines, and where last digits may differ."""
    lines = [("skipped", reason) for reason in (found.skipped if found else ())]
    if found:
        lines.append(("resumed", f"after update {progress.step}, from {found.path}"))
    if progress.stopped_early:
        lines.append(("stopped early", f"after update {progress.step}; only the final evaluation remains"))
    if unreadable_lines:
        lines.append(("metrics.jsonl", f"{unreadable_lines} unreadable lines dropped"))
    return lines + [
        (
            "results may differ",
            f"in the last digits from update {change.after_step + 1}: {', '.join(change.changed)}",
        )
        for change in progress.not_bitwise
    ]
