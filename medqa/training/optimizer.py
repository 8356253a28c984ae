"""The optimizer over the trainable parameters."""

from typing import Any

import torch

from medqa.config import Optimizer
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
