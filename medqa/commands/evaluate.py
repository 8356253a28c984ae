"""`medqa evaluate RUN` measures a run's adapter on held-out rows beside the baseline, and logs it to W&B."""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from medqa.commands.adapter import Source, load_adapted, unchecked_base
from medqa.commands.figures import TASKS
from medqa.commands.tasks import Bench, load_held_out, measure_choices, measure_generation, measure_loss, measure_probes
from medqa.config import Experiment, Tracking
from medqa.errors import NotWritten, UserError, refusal
from medqa.files import Damaged, Missing, alone_in, read_json, write_json
from medqa.model.settings import resolve_settings, usable_gpu
from medqa.training.checkpoint import versions
from medqa.training.distributed import build_accelerator, make_accelerator
from medqa.training.recorder import MetricsFile, Tracker
from medqa.training.run_dir import ADAPTER_DIR, METRICS, WANDB_DIR, read_session
from medqa.training.wandb import WandbFeed, log_adapter, start_wandb, wandb_wanted
from medqa.variables import is_on

EVALUATION = "evaluation.json"
SAME_ADAPTER = (
    "step", "final", "data_fingerprint", "base_fingerprint", "experiment", "quantization", "dtype", "mixed_precision",
)  # fmt: skip


def evaluate(
    source: Source,
    tasks: Sequence[str],
    limit: int | None,
    cpu: bool,
    console: Console,
    keep: Callable[[Mapping[str, Any]], object],
) -> dict[str, Any]:
    """`evaluation.json`: the figures of the tasks.

    Args:
        limit: rows of each held-out split, and questions, to look at; None: all.
        keep: is given what is found so far after each task, on the main process.

    Raises:
        UserError: model or data cannot be had, or are not the run's.
    """
    if is_on("ACCELERATE_USE_FSDP"):
        raise UserError("evaluate needs the base whole on each device: launch it without FSDP (launch/four_gpus.yaml)")
    experiment = source.experiment
    settings = resolve_settings(experiment, cpu=cpu, saved=source.settings)
    untracked = experiment.model_copy(update={"tracking": Tracking(wandb="disabled")})
    accelerator = build_accelerator(untracked, settings)
    console.quiet = not accelerator.is_main_process
    with accelerator.main_process_first():
        adapted = load_adapted(source, accelerator.device)
        if (unchecked := unchecked_base(source)) is not None:
            console.print(unchecked, soft_wrap=True)
        held_out = load_held_out(source, adapted.tokenizer, limit)
    bench = Bench(adapted, held_out, accelerator, console, limit, experiment.training.seed)
    found: dict[str, Any] = {
        "run": source.name,
        "experiment": experiment.model_dump(),
        "step": source.step,
        "final": source.final,
        "limit": limit,
        "seed": bench.seed,
        "quantization": adapted.settings.quantization,
        "dtype": settings.dtype_name,
        "mixed_precision": settings.mixed_precision,
        "data_fingerprint": held_out.splits.fingerprint,
        "base_fingerprint": adapted.base,
        "versions": versions(),
        "tasks": {},
    }
    for task in TASKS:
        if task in tasks:
            found["tasks"][task] = MEASURES[task](bench)
            if accelerator.is_main_process:
                keep(found)
    return found


class Keeper:
    """Writes `evaluation.json` after each task, as far as it can be written.

    A run of somebody else, or on a read-only disk, can be evaluated too: that its figures are not kept is said before
    anything is computed. A disk that fills up later does not end the evaluation; `failed` then says why.
    """

    def __init__(self, run: Path, say: Callable[[str], None]) -> None:
        self.failed: str | None = None
        self._run, self._say = run, say
        self._keeps = True
        try:
            with tempfile.TemporaryFile(dir=run):
                pass
        except OSError as error:
            self._keeps = False
            say(f"{run} cannot be written to ({error.strerror}): the figures are shown at the end, and not kept")
        try:
            read_evaluation(run)
        except Missing:
            pass
        except Damaged as error:
            say(f"{error}: this evaluation takes its place")

    def write(self, found: Mapping[str, Any]) -> bool:
        """Keep what is found so far; returns whether it stands in `evaluation.json` now."""
        if not self._keeps:
            return False
        try:
            return write_evaluation(found, self._run)
        except OSError as error:
            self.failed = refusal(error, self._run)
            if self.failed is None:
                raise
            self._keeps = False
            self._say(f"{self.failed}: the figures are shown at the end, and not kept")
            return False

    def finish(self, found: Mapping[str, Any]) -> bool:
        """Keep all of it, and say where it is; returns whether it stands in `evaluation.json` now.

        Raises:
            NotWritten: it cannot be written, although there was a place for it at the start.
        """
        place, written = self._run / EVALUATION, self.write(found)
        if self.failed is not None:
            raise NotWritten(self.failed)
        if written:
            self._say(f"written to {place}")
        elif self._keeps:
            self._say(f"not written: {place} is of all rows")
        else:
            self._say(f"not kept: {self._run} cannot be written to")
        return written


def write_evaluation(found: Mapping[str, Any], run: Path) -> bool:
    """`evaluation.json`, whole or as it was; tasks that were not asked for now keep what they had of the same adapter.

    What a limit has found never takes the place of what was found on all rows: says whether it was written.

    Raises:
        OSError: it cannot be written.
    """
    with alone_in(run):
        try:
            before = read_evaluation(run)
        except Damaged:
            before = {}
        tasks = found["tasks"]
        if "limit" in before and all(before.get(key) == found[key] for key in SAME_ADAPTER):
            if before["limit"] is None and found["limit"] is not None:
                return False
            if before["limit"] == found["limit"]:
                tasks = {**before["tasks"], **tasks}
        write_json({**found, "tasks": tasks}, run / EVALUATION)
    return True


def read_evaluation(run: Path) -> dict[str, Any]:
    """A run's `evaluation.json`.

    Raises:
        Missing: the run has none.
        Damaged: it is not what `write_evaluation` writes.
    """
    found = read_json(run / EVALUATION)
    if not isinstance(found, dict) or not isinstance(found.get("tasks"), dict):
        raise Damaged(f"{run / EVALUATION}: it holds no evaluation")
    return found


def chosen_tasks(words: str) -> list[str]:
    """The tasks of `--tasks`.

    Raises:
        UserError: one that there is not.
    """
    tasks = [word.strip() for word in words.split(",") if word.strip()]
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        raise UserError(f"--tasks {words}: no such task: {', '.join(unknown)}; there are {','.join(TASKS)}")
    return tasks


MEASURES: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "loss": measure_loss,
    "generation": measure_generation,
    "mcq": measure_choices,
    "probes": measure_probes,
}


# ----------------------------------------------------------------------------------------------------
# The figures of an evaluation in the summary of the run's W&B run.


def log_evaluation(
    found: Mapping[str, Any], run: Path, experiment: Experiment, cpu: bool, say: Callable[[str], None]
) -> None:
    """Put the figures into the summary of the run's W&B run, as `evaluation/<task>/...`; to be called on one process.

    Each figure has its number of rows beside it, and `evaluation/limit` is None only where they are of all rows.

    An offline run is told all of training too, so that what is sent last is the whole of it.
    """
    session = read_session(run)
    if session is None or not wandb_wanted(experiment.tracking):
        return
    if stranger := unconfirmed_entity(experiment.tracking):
        return say(
            f"W&B: not told: only the run's config.yaml names the entity {stranger}, and a directory may come from "
            f"anyone; set WANDB_ENTITY={stranger} to tell it"
        )
    if (run / WANDB_DIR).is_symlink() and "WANDB_DIR" not in os.environ:
        return say(f"W&B: not told: {run / WANDB_DIR} is a link; WANDB_DIR names where its files may be written")
    if not os.path.isfile(run / METRICS):
        return say(f"W&B: not told: {run} has no {METRICS}, and its curves belong to the figures")
    accelerator = make_accelerator(
        cpu or not usable_gpu(), found["mixed_precision"], True, experiment.training.process_timeout_s
    )
    say(start_wandb(accelerator, experiment, run, session.run_id, {}))
    feed = WandbFeed(accelerator, say)
    Tracker(True, MetricsFile(run / METRICS)).begin_feed(feed)
    values = {f"evaluation/{path}": value for path, value in flat_figures(found["tasks"])}
    values["evaluation/limit"] = found["limit"]
    if accelerator.trackers:
        summary = accelerator.get_tracker("wandb", unwrap=True).summary
        feed.attempt(lambda: summary.update(values))
        if feed.first == 0:  # nothing of the run is at W&B yet
            feed.attempt(
                lambda: log_adapter(accelerator, experiment.tracking, run / ADAPTER_DIR, session.run_id), asks=True
            )
    feed.finish()


def unconfirmed_entity(tracking: Tracking) -> str | None:
    """The entity that nothing but the run's directory names; None where it names none or WANDB_ENTITY wins over it.

    A directory from somebody else must not decide where an evaluation on this machine is sent.
    """
    return None if os.environ.get("WANDB_ENTITY") else tracking.entity


def flat_figures(found: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, float]]:
    """Every figure below, by its place; with `/low`, `/high`, `/p_value` and `/rows`."""
    for name, value in found.items():
        path = f"{place}/{name}" if place else str(name)
        if isinstance(value, Mapping) and "value" in value:
            yield path, value["value"]
            yield from (
                (f"{path}/{key}", value[key])
                for key in ("low", "high", "p_value", "rows")
                if value.get(key) is not None
            )
        elif isinstance(value, Mapping):
            yield from flat_figures(value, path)
