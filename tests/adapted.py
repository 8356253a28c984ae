"""The embedded model with an adapter that does something, for what is measured with one."""

from collections.abc import Callable

import torch

from harness.parts import Parts, build
from medqa.config import Experiment


def adapted_parts(tiny: Callable[..., Experiment], *sets: str) -> Parts:
    """The parts of a run in evaluation mode, the adapter's B matrices away from the 0 that they begin with."""
    parts = build(tiny("exp_001", "model.quantization=none", *sets))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in parts.adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    parts.model.eval()
    return parts
