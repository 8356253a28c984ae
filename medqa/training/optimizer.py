"""The optimizer of the trainable parameters, the learning rate schedule, and the state that both are part of."""

from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import get_scheduler

from medqa.config import Experiment, Optimizer, Scheduler
from medqa.errors import UserError
from medqa.model.loss import LossModel
from medqa.training.distributed import prepare
from medqa.training.state import TrainState


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


# ----------------------------------------------------------------------------------------------------


def build_state(
    adapted: PeftModel, experiment: Experiment, updates: int, shards: int, accelerator: Accelerator
) -> TrainState:
    """The state of a run before its first update: model and optimizer prepared for these processes, and the schedule.

    The scheduler is not prepared: Accelerate would step it once for each process.

    Args:
        updates: how many updates the run has in all.
        shards: over how many processes the frozen weights are sharded.

    Raises:
        UserError: as `build_optimizer`.
    """
    bare_optimizer = build_optimizer(adapted, experiment.optimizer)
    scheduler = build_scheduler(bare_optimizer, experiment.scheduler, updates)
    model, optimizer = prepare(accelerator, LossModel(adapted), bare_optimizer, shards)
    return TrainState(model, adapted, optimizer, scheduler, accelerator.scaler)
