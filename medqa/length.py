"""How long a run is, in updates or in epochs, and whether one that has ended is the whole of what is asked for."""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from medqa.config import Experiment
from medqa.errors import UserError


def planned_updates(experiment: Experiment, rows: int) -> int:
    """Updates of a run that nothing stops early: as many as the file says, or as its epochs of `rows` examples take.

    An update goes straight across an epoch's end, so only the last epoch is rounded up to whole updates.

    Raises:
        UserError: warmup would take longer than the run.
    """
    training, warmup = experiment.training, experiment.scheduler.warmup_steps
    if training.max_steps is not None:
        return training.max_steps
    # As the decimal fraction that was written: 1.1 of 50 rows are 55, where a float has a little more.
    updates = math.ceil(Fraction(str(training.epochs)) * rows / training.global_batch_size)
    if warmup > updates:
        raise UserError(
            f"scheduler.warmup_steps = {warmup} is more than the {updates} updates that training.epochs = "
            f"{training.epochs:g} of {rows:,} rows are; use fewer, or more epochs"
        )
    return updates


def length(experiment: Experiment) -> dict[str, int | float | None]:
    """How long a run is to be, as its summary has it."""
    return {"max_steps": experiment.training.max_steps, "epochs": experiment.training.epochs}


def is_complete(summary: Mapping[str, Any], experiment: Experiment) -> bool:
    """Whether a run that left this summary is the whole of what is asked for: as long, or stopped early on the way."""
    whole = {"experiment", "baseline", "final", "test"} <= summary.keys()
    first_versions = {"max_steps": summary.get("updates"), "epochs": None}
    return whole and summary.get("length", first_versions) == length(experiment)
