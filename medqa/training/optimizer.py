"""The optimizer of the trainable parameters, and the learning rate schedule."""

from typing import Any

import torch
from transformers import get_scheduler

from medqa.config import Optimizer, Scheduler
from medqa.errors import UserError


def build_optimizer(model: torch.nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """AdamW from torch (fused), or bitsandbytes' paged 8-bit AdamW, over the parameters that train.

    Raises:
        UserError: the 8-bit optimizer is asked for and bitsandbytes is not installed.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    arguments: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.betas[0], settings.betas[1]),
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    if settings.name == "adamw_torch":
        return torch.optim.AdamW(parameters, fused=True, **arguments)
    try:
        from bitsandbytes.optim import PagedAdamW8bit
    except ImportError as error:
        raise UserError(
            f"optimizer.name = paged_adamw_8bit: bitsandbytes cannot be imported ({error}); "
            "install it, or use --set optimizer.name=adamw_torch"
        ) from error
    return PagedAdamW8bit(parameters, **arguments)


# ----------------------------------------------------------------------------------------------------
# The learning rate as a function of the update, by transformers' own formulas.

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
