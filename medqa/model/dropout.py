"""LoRA's dropout on a CPU, where torch's own takes a tenth of an update and more: the same law, drawn faster.

Each number is kept with probability 1 - p and then divided by it, as in `torch.nn.Dropout`. torch draws 53 bits for
each on one thread; 16 are enough, so p is taken to the nearest of 65,536 steps (0.05 becomes 0.0500031). The noise
follows from torch's generator, as any, but is not that of `torch.nn.Dropout` from the same seed.
"""

import torch

STEPS = 2**16  # a 16-bit number is below one of them with a probability known exactly


class FastDropout(torch.nn.Module):
    """`torch.nn.Dropout` for float tensors on a CPU; elsewhere torch's own, which is fast there."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Noise in training, nothing else; same shape."""
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":
            return torch.nn.functional.dropout(x, self.p)
        return _Dropout.apply(x, round(self.p * STEPS))


class _Dropout(torch.autograd.Function):
    """Keeps the 16 bits drawn for each number, half of what torch keeps, and makes the noise of them again."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor, dropped: int) -> torch.Tensor:
        """A number is dropped where its bits are among the lowest `dropped` of all steps."""
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)  # all 64 bits of each
        bits = draws.view(torch.int16)[: x.numel()].view(x.shape)
        ctx.save_for_backward(bits)
        ctx.dropped = dropped
        return x * _noise(bits, dropped, x.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The same noise."""
        (bits,) = ctx.saved_tensors
        return gradient * _noise(bits, ctx.dropped, gradient.dtype), None


def _noise(bits: torch.Tensor, dropped: int, dtype: torch.dtype) -> torch.Tensor:
    """0 or 1 / (1 - p) for each number. In float32, which holds any 16-bit number, comparing is fastest."""
    kept = bits.to(torch.float32).ge_(dropped - STEPS // 2)
    return kept.mul_(STEPS / (STEPS - dropped)).to(dtype)


def use_fast_dropout(model: torch.nn.Module) -> None:
    """Replace every `torch.nn.Dropout` in a model."""
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Dropout):
            model.set_submodule(name, FastDropout(module.p).train(module.training))
