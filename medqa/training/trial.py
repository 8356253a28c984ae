"""A sweep's trial that tries what an earlier one has tried: the same recipe on the same data gives the same run."""

import os
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator

from medqa.config import Experiment
from medqa.training.run_dir import read_leg
from medqa.training.tracking import MetricsFile, Tracker
from medqa.training.wandb_feed import WandbFeed
from medqa.training.wandb_run import start_wandb


def tell_trial(accelerator: Accelerator, experiment: Experiment, output_dir: Path, say: Callable[[str], None]) -> None:
    """Bring a sweep's W&B run up to date with a directory whose run is complete already; else do nothing.

    The id is the one that W&B's agent has chosen. Its run would stay without a single value, and the search would learn
    nothing from the trial.
    """
    leg = read_leg(output_dir)
    if "WANDB_SWEEP_ID" not in os.environ or leg is None or not accelerator.is_main_process:
        return
    say(start_wandb(accelerator, experiment, output_dir, leg.run_id, {}))
    feed = WandbFeed(accelerator, say)
    Tracker(True, MetricsFile(output_dir / "metrics.jsonl")).begin_feed(feed)
    feed.finish()
