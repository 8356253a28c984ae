"""LoRA on a CPU with fewer passes over memory than PEFT: y + s B A dropout(x), with the same gradients.

Tensors of the output's size are updated once, in place, and the scale is applied to the r values between A and B. The
dropout masks have the distribution of dropout but are drawn faster: torch draws 53 bits for each number, on one thread,
and 16 are enough. So p is rounded to the nearest of 65,536 steps (0.05 becomes 0.0500031). The masks follow from
torch's generator, but differ from those of `torch.nn.Dropout` with the same seed.
"""

from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant

STEPS = 2**16  # a 16-bit number is below one of them with an exactly known probability


def use_fast_lora(model: torch.nn.Module) -> None:
    """Use this computation in every LoRA layer of a model on a CPU; types other than float32 keep PEFT's own."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_variant.update(dict.fromkeys(module.active_adapters, FastLora()))


class FastLora(LoraVariant):
    """PEFT's interface for another computation of a layer. Names, saving and loading stay those of any LoRA layer."""

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: object
    ) -> torch.Tensor:
        """The layer's output, from its input and the frozen layer's output, which is overwritten."""
        a, b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        dropout, scaling = module.lora_dropout[active_adapter], module.scaling[active_adapter]
        if x.device.type != "cpu" or torch.is_autocast_enabled("cpu") or {x.dtype, result.dtype} != {torch.float32}:
            return result + (b(a(dropout(x))) * scaling).to(result.dtype)
        p = getattr(dropout, "p", 0.0) if module.training else 0.0
        return _AddLora.apply(result, x, a.weight, b.weight, scaling, round(p * STEPS))


class _AddLora(torch.autograd.Function):
    """Saves for backward the layer's input, which others save too, and the 16 random bits for each of its values."""

    @staticmethod
    def forward(
        ctx: Any,
        result: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
        dropped: int,
    ) -> torch.Tensor:
        """Shapes: result (..., out), x (..., in), a (r, in), b (out, r). The dropout probability is dropped / STEPS."""
        flat, bits = x.flatten(0, -2), None
        if dropped:
            bits = draw_bits(flat)
            flat = flat * kept(bits, dropped)
        ctx.scale, ctx.dropped = scaling * STEPS / (STEPS - dropped), dropped
        inner = flat @ a.t()
        result.view(-1, result.shape[-1]).addmm_(inner, b.t(), alpha=ctx.scale)
        ctx.mark_dirty(result)
        ctx.save_for_backward(x, a, b, inner, bits)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the frozen layer's output, the input, A and B."""
        x, a, b, inner, bits = ctx.saved_tensors
        flat, d_result = x.flatten(0, -2), gradient.flatten(0, -2)
        d_inner = (d_result @ b).mul_(ctx.scale)
        d_b = (d_result.t() @ inner).mul_(ctx.scale)
        noise = None if bits is None else kept(bits, ctx.dropped)
        d_a = d_inner.t() @ (flat if noise is None else flat * noise)
        d_x = None
        if ctx.needs_input_grad[1]:
            d_x = d_inner @ a
            d_x = (d_x if noise is None else d_x.mul_(noise)).view(x.shape)
        return gradient, d_x, d_a, d_b, None, None


def draw_bits(x: torch.Tensor) -> torch.Tensor:
    """16 random bits (int16) for each value, from torch's generator, in the shape of x."""
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)  # all 64 bits of each
    return draws.view(torch.int16)[: x.numel()].view(x.shape)


def kept(bits: torch.Tensor, dropped: int) -> torch.Tensor:
    """1 where a value is kept, 0 where it is dropped. Comparing in float32, which is exact for 16 bits, is fastest."""
    return bits.to(torch.float32).ge_(dropped - STEPS // 2)
