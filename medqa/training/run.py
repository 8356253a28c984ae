"""A run and its directory, `outputs/<run>/`, from the first check to the last file.

`Run` is what `train.py` sees of the directory: the lock, the checkpoint to resume from, the files that describe the
run, saves, and the copies of `--persist-to`. Its parts are `run_dir.py` (names of files, lock, starting over),
`checkpoint.py` (what a checkpoint is) and `mirror.py` (copies). Nothing is written before `start`.
"""

import argparse
import contextlib
import functools
from pathlib import Path
from types import TracebackType

from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from medqa.config import Experiment, flat
from medqa.config_file import default_output_dir, find_experiment
from medqa.data.batches import TrainingData
from medqa.data.report import write_reports
from medqa.data.tokens import ids_fingerprint
from medqa.errors import UserError, saying_what_is_saved, writing
from medqa.model.base_files import base_fingerprint
from medqa.model.settings import SavedSettings, Settings
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
from medqa.training.mirror import Copies, space_needed
from medqa.training.plan import accumulation_steps
from medqa.training.recorder import Phases, Recorder
from medqa.training.run_dir import (
    RunLock,
    Session,
    check_run_dir,
    find_saved,
    left_alone,
    note_saved,
    refuse_differences,
    start_run,
    what_is_saved,
    write_config,
)
from medqa.training.state import Moved, Progress, TrainState


class Run:
    """One session of a run in its output directory; a context manager.

    Entering checks the directory and its mirror, takes the lock of a directory that a run has been in, and finds the
    newest valid checkpoint, here or in the mirror. Leaving waits for the last copies, and adds to an error what is
    saved.

    Attributes:
        name: the experiment's, by the name of its file.
        phases: where the time to the first update goes, counted from here on.
        output_dir: the directory: the one given, or `outputs/<name>` with what makes it another run.
        checkpoint: the checkpoint to resume from; None where the run starts from the beginning.
        summary: what `summary.json` holds of a run that is complete already; None where there is something to do.
        identity: whose the checkpoints of this run are; known after `start`.
        session: the run's id and how often it was resumed; known after `start`.
    """

    identity: Identity
    session: Session

    def __init__(self, experiment: Experiment, options: argparse.Namespace) -> None:
        self.phases = Phases()
        self.name = find_experiment(options.exp).stem
        default = default_output_dir(options.exp, options.tiny, options.set, experiment)
        self.output_dir: Path = options.output_dir or default
        self._experiment, self._fresh = experiment, options.fresh
        self._mirror: Path | None = options.persist_to
        self._lock, self._copies = RunLock(self.output_dir), Copies(self._mirror, self.output_dir)

    def __enter__(self) -> "Run":
        experiment, output_dir, mirror, fresh = self._experiment, self.output_dir, self._mirror, self._fresh
        with contextlib.ExitStack() as leaving:
            saved = functools.partial(what_is_saved, output_dir, mirror, fresh)
            leaving.enter_context(saying_what_is_saved(saved))
            leaving.enter_context(writing(output_dir))
            leaving.enter_context(self._lock)
            leaving.enter_context(self._copies)
            check_run_dir(output_dir, experiment, fresh)
            self._lock.take_if_there()
            self._copies.check(experiment, fresh)
            self.checkpoint, self.summary = (None, None) if fresh else find_saved(output_dir, mirror, experiment)
            self._leaving = leaving.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._leaving.__exit__(kind, error, trace)

    @property
    def saved_settings(self) -> SavedSettings | None:
        """The settings of the checkpoint to resume from, which a resumed run keeps."""
        return None if self.checkpoint is None else self.checkpoint.identity.environment.settings

    @property
    def places(self) -> list[Path]:
        """The directories that may hold a checkpoint of this run: its own, and its mirror."""
        return self._copies.places

    def check_ownership(self) -> None:
        """See, before a write, that no other run has taken the directory.

        Raises:
            UserError: another run has.
        """
        self._lock.check()

    def start(
        self,
        state: TrainState,
        data: TrainingData,
        tokenizer: PreTrainedTokenizerBase,
        settings: Settings,
        recorder: Recorder,
    ) -> list[tuple[str, str]]:
        """Load the checkpoint into `state` if there is one, write the first files, and return lines for the plan.

        Raises:
            UserError: data, token ids or base model are not those of the checkpoint; another run holds the directory;
                or the processes do not read the same. Nothing is written then.
        """
        experiment, accelerator = self._experiment, recorder.accelerator
        self.identity = identify(experiment, data, tokenizer, state.adapted, settings, accelerator)
        if self.checkpoint is not None:
            resume(self.checkpoint, state, self.identity)
        progress = state.progress
        self.session = start_run(
            self.output_dir, self._fresh, self.checkpoint, progress, self._lock, accelerator, self._copies.take
        )
        spent = recorder.resume(progress, data.updates)
        if accelerator.is_main_process:
            accumulation = accumulation_steps(experiment.training, accelerator.num_processes)
            write_config(self.output_dir, experiment, accumulation, settings.changes)
            write_reports(self.output_dir, data, experiment, settings.padding_free)
        self._start_copies(recorder)
        recorder.phases.done("model")
        return [
            *resume_lines(self.checkpoint, progress, spent.damaged),
            *left_alone(self.output_dir),
            *space_needed(self._mirror, experiment, state.adapted, progress.step, data.updates),
        ]

    def save(self, state: TrainState, recorder: Recorder) -> None:
        """Write a checkpoint of `state` durably, and have it copied.

        Raises:
            UserError: it cannot be written. The checkpoints that are there stay.
        """
        progress, accelerator = state.progress, recorder.accelerator
        began = progress.elapsed_s = recorder.clock()
        recorder.flush()
        keep = self._experiment.training.keep_checkpoints
        save_checkpoint(self.output_dir, state, self.identity, accelerator, keep, recorder.message_once)
        if accelerator.is_main_process:
            note_saved(self.output_dir)
            self._copies.wake({progress.step, progress.best_step})
        recorder.log_save(progress.step, recorder.clock() - began)

    def show_complete(self, recorder: Recorder) -> None:
        """Show the result of a run that is complete already, and copy what was not copied when it ended."""
        assert self.summary is not None
        self._start_copies(recorder)
        recorder.show_complete_run(self.summary)

    def _start_copies(self, recorder: Recorder) -> None:
        """Have the main process copy what there is to the mirror, now and after each save.

        Raises:
            UserError: the mirror holds what no run wrote, or another run has just begun to copy there.
        """
        keep = self._experiment.training.keep_checkpoints
        on_main(recorder.accelerator, lambda: self._copies.start(keep, self._fresh, recorder.message))
        self._copies.wake(set())  # what says whose the mirror is should be there soon


# ----------------------------------------------------------------------------------------------------
# Is it the same run?

WHAT = {"data": "the data", "tokenizer": "the token ids of the data", "base": "the base model"}


def identify(
    experiment: Experiment,
    data: TrainingData,
    tokenizer: PreTrainedTokenizerBase,
    model: PeftModel,
    settings: Settings,
    accelerator: Accelerator,
) -> Identity:
    """Whose the checkpoints of this run are.

    Raises:
        UserError: not all processes have the same data, tokens and base model: each reads them for itself.
    """

    def of_base() -> str:
        return base_fingerprint(experiment.model.base)

    fingerprints = Fingerprints(
        data=data.splits.fingerprint,
        tokenizer=ids_fingerprint(data.examples, tokenizer),
        base=of_base() if settings.shards == 1 else on_main(accelerator, of_base),  # sharded, the others have no files
    )
    if accelerator.num_processes > 1:
        found = gather_object([fingerprints.model_dump()])
        if differing := [what for name, what in WHAT.items() if len({each[name] for each in found}) > 1]:
            raise UserError(
                f"not all processes have read the same: {', '.join(differing)} differ; on several machines give files "
                "or caches (HF_HOME, KAGGLEHUB_CACHE) that they share, or the same copies on each"
            )
    return Identity(
        experiment=flat(experiment),
        fingerprints=fingerprints,
        environment=environment(accelerator, settings, model),
    )


def resume(found: Found, state: TrainState, identity: Identity) -> None:
    """Load a checkpoint into the state. The state notes where the machine is of another kind than before.

    Raises:
        UserError: the checkpoint is of other data, another tokenizer or base model; the message lists the differences.
            Nothing is loaded then.
    """
    before, now = (found_or_now.fingerprints.model_dump() for found_or_now in (found.identity, identity))
    material = [f"{WHAT[name]}: {before[name][:12]} there, {now[name][:12]} now" for name in WHAT]
    refuse_differences(
        f"{found.path} was trained on other data, tokens or base model",
        [line for name, line in zip(WHAT, material, strict=True) if before[name] != now[name]],
    )
    load_checkpoint(found, state)
    if changed := changes(found.identity.environment, identity.environment):
        state.progress.not_bitwise.append(Moved(state.progress.step, changed))


def resume_lines(found: Found | None, progress: Progress, damaged_lines: int) -> list[tuple[str, str]]:
    """The plan's lines on resuming: checkpoints passed over, what is lost, and where the last digits may differ."""
    lines = [("passed over", reason) for reason in (found.passed_over if found else ())]
    if found:
        lines.append(("resumed", f"after update {progress.step}, from {found.path}"))
    if progress.stopped_early:
        lines.append(("stopped early", f"after update {progress.step}; what is left is the final evaluation"))
    if damaged_lines:
        lines.append(("lost", f"{damaged_lines} damaged lines of metrics.jsonl"))
    return lines + [
        ("not bitwise", f"from update {moved.after_step + 1} on: {', '.join(moved.changed)}")
        for moved in progress.not_bitwise
    ]
