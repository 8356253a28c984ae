"""LoRA with fewer passes over memory than PEFT: y + s B A dropout(x), with the same gradients, on any device.

Tensors of the output's size are updated once, in place, and the scale is applied to the r values between A and B.
Matrix products use the type of autocast, or the type of the frozen layer's output without autocast. A and B are cast to
it. PEFT would copy the layer's input to float32; this code uses the input as it is. The gradients of A and B have the
type of A and B (float32).

The dropout masks have the distribution of dropout but are drawn faster: on a CPU torch draws 53 bits for each number,
on one thread, and 16 are enough. So p is rounded to the nearest of 65,536 steps (0.05 becomes 0.0500031). The masks
follow from torch's generator, but differ from those of `torch.nn.Dropout` with the same seed.
"""

from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant

STEPS = 2**16  # a 16-bit number is below one of them with an exactly known probability


def use_fast_lora(model: torch.nn.Module) -> None:
    """Use this computation in every LoRA layer of a model, instead of PEFT's own."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_variant.update(dict.fromkeys(module.active_adapters, FastLora()))
            module.cast_input_dtype_enabled = False  # PEFT would copy the input to float32 first


class FastLora(LoraVariant):
    """PEFT's interface for another computation of a layer. Names, saving and loading stay those of any LoRA layer."""

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: object
    ) -> torch.Tensor:
        """The layer's output, from its input and the frozen layer's output, which is overwritten."""
        a, b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        dropout, scaling = module.lora_dropout[active_adapter], module.scaling[active_adapter]
        p = getattr(dropout, "p", 0.0) if module.training else 0.0
        device, dtype = x.device.type, result.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        return _AddLora.apply(result, x, a.weight, b.weight, scaling, round(p * STEPS), dtype)


class _AddLora(torch.autograd.Function):
    """Saves for backward the layer's input, which others save too, and the 16 random bits for each of its values.

    It casts all operands of its matrix products itself, so autocast changes nothing, in forward or in backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        result: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
        dropped: int,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Shapes: result (..., out), x (..., in), a (r, in), b (out, r). The dropout probability is dropped / STEPS.

        Matrix products use `dtype`.
        """
        flat, bits = x.flatten(0, -2).to(dtype), None
        if dropped:
            bits = draw_bits(flat)
            flat = flat * kept(bits, dropped, dtype)
        ctx.scale, ctx.dropped, ctx.dtype = scaling * STEPS / (STEPS - dropped), dropped, dtype
        inner = flat @ a.to(dtype).t()
        output = result.view(-1, result.shape[-1])
        if result.dtype == dtype:
            output.addmm_(inner, b.to(dtype).t(), alpha=ctx.scale)
        else:
            output.add_(inner @ b.to(dtype).t(), alpha=ctx.scale)
        ctx.mark_dirty(result)
        ctx.save_for_backward(x, a, b, inner, bits)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the frozen layer's output, the input, A and B."""
        x, a, b, inner, bits = ctx.saved_tensors
        flat, d_result = (tensor.flatten(0, -2).to(ctx.dtype) for tensor in (x, gradient))
        d_inner = (d_result @ b.to(ctx.dtype)).mul_(ctx.scale)
        d_b = (d_result.t() @ inner).to(b.dtype).mul_(ctx.scale)
        mask = None if bits is None else kept(bits, ctx.dropped, ctx.dtype)
        d_a = (d_inner.t() @ (flat if mask is None else flat * mask)).to(a.dtype)
        d_x = None
        if ctx.needs_input_grad[1]:
            d_x = d_inner @ a.to(ctx.dtype)
            d_x = (d_x if mask is None else d_x.mul_(mask)).view(x.shape).to(x.dtype)
        return gradient, d_x, d_a, d_b, None, None, None


def draw_bits(x: torch.Tensor) -> torch.Tensor:
    """16 random bits (int16) for each value, from the generator of x's device, in the shape of x."""
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)  # all 64 bits
    return draws.view(torch.int16)[: x.numel()].view(x.shape)


def kept(bits: torch.Tensor, dropped: int, dtype: torch.dtype) -> torch.Tensor:
    """The dropout mask in `dtype`: 1 where a value is kept, 0 where it is dropped.

    The comparison writes `dtype` directly, in one pass over memory.
    """
    return torch.ge(bits, dropped - STEPS // 2, out=torch.empty_like(bits, dtype=dtype))
