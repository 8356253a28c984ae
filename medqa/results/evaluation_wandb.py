"""The figures of an evaluation in the summary of the run's W&B run."""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from medqa.config import Experiment, Tracking
from medqa.model.precision import usable_gpu
from medqa.training.processes import make_accelerator
from medqa.training.run_dir import ADAPTER_DIR, METRICS, WANDB_DIR, read_leg
from medqa.training.tracking import MetricsFile, Tracker
from medqa.training.wandb_feed import WandbFeed
from medqa.training.wandb_run import log_adapter, start_wandb, wandb_wanted


def log_evaluation(
    found: Mapping[str, Any], run: Path, experiment: Experiment, cpu: bool, say: Callable[[str], None]
) -> None:
    """Put the figures into the summary of the run's W&B run, as `evaluation/<task>/...`; to be called on one process.

    Each figure has its number of rows beside it, and `evaluation/limit` is None only where they are of all rows.

    An offline run is told all of training too, so that what is sent last is the whole of it.
    """
    leg = read_leg(run)
    if leg is None or not wandb_wanted(experiment.tracking):
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
    say(start_wandb(accelerator, experiment, run, leg.run_id, {}))
    feed = WandbFeed(accelerator, say)
    Tracker(True, MetricsFile(run / METRICS)).begin_feed(feed)
    values = {f"evaluation/{path}": value for path, value in flat_figures(found["tasks"])}
    values["evaluation/limit"] = found["limit"]
    if accelerator.trackers:
        summary = accelerator.get_tracker("wandb", unwrap=True).summary
        feed.attempt(lambda: summary.update(values))
        if feed.first == 0:  # nothing of the run is at W&B yet
            feed.attempt(
                lambda: log_adapter(accelerator, experiment.tracking, run / ADAPTER_DIR, leg.run_id), asks=True
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
