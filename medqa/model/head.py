"""The vocabulary head and the loss at the targets only, in chunks: all logits together never exist.

The head is frozen, so the gradient of a sum of losses with respect to what goes into it is known as soon as a chunk's
logits are: it is kept in their place, and nothing is computed twice.
"""

from typing import Any

import torch
from torch.nn import functional as F

CHUNK_BYTES = 32 * 2**20  # of one chunk's logits in float32


def chunked_losses(hidden: torch.Tensor, head: torch.nn.Linear, targets: torch.Tensor) -> torch.Tensor:
    """The loss of each target in nats, float32 (targets), without a graph.

    Args:
        hidden: (targets, width), what the head gets.
        targets: (targets), the right ids.
    """
    losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    for chunk in _chunks(len(targets), head.weight):
        logits = F.linear(hidden[chunk], head.weight, head.bias).float()
        losses[chunk] = F.cross_entropy(logits, targets[chunk], reduction="none")
    return losses


class SummedLoss(torch.autograd.Function):
    """The sum of the targets' losses in nats, a float32 scalar; the head's weights get no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
    ) -> torch.Tensor:
        """Shapes as in `chunked_losses`. Loss and gradient of each chunk: d loss / d logits = softmax - one-hot."""
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden)
        for chunk in _chunks(len(targets), weight):
            logits = F.linear(hidden[chunk], weight, bias)
            right = (torch.arange(len(logits), device=logits.device), targets[chunk])
            log_probabilities = F.log_softmax(logits, dim=-1, dtype=torch.float32)
            total -= log_probabilities[right].sum()
            d_logits = log_probabilities.exp_()
            d_logits[right] -= 1
            gradient[chunk] = d_logits.to(logits.dtype) @ weight.to(logits.dtype)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, d_total: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """The gradient kept, times that of the sum."""
        (gradient,) = ctx.saved_tensors
        return gradient * d_total, None, None, None


def _chunks(targets: int, weight: torch.Tensor) -> list[slice]:
    """Slices of the targets, each with logits of at most CHUNK_BYTES."""
    size = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    return [slice(start, start + size) for start in range(0, targets, size)]
