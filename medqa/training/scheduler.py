"""The learning rate as a function of the update, by transformers' own formulas."""

import torch
from transformers import get_scheduler

from medqa.config import Scheduler

TRANSFORMERS_NAMES = {"none": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def build_scheduler(
    optimizer: torch.optim.Optimizer, settings: Scheduler, max_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule, to be stepped once per update on any number of processes, so it is never prepared.

    Warmup is transformers' convention: update u of w uses u/w of the rate, from u = 0, so the very first moves nothing.
    """
    return get_scheduler(
        TRANSFORMERS_NAMES[settings.name],
        optimizer,
        num_warmup_steps=settings.warmup_steps,
        num_training_steps=max_steps,
    )
