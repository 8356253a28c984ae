"""The loss of a micro-batch, with the head in chunks. Only this module shifts labels.

Two ways to the same number. Padded, plainly: all logits of all places. Without padding: attention inside each example
(`attention.py`), the head at the targets alone and in chunks.
"""

from typing import Any

import torch
from peft import PeftModel
from torch.nn import functional as F

from medqa.data.batches import IGNORED, MicroBatch
from medqa.model.attention import find_varlen_kernel, segments_arguments

# ----------------------------------------------------------------------------------------------------
# The vocabulary head and the loss at the targets only, in chunks: all logits together never exist.
#
# The head is frozen, so the gradient of a sum of losses with respect to what goes into it is known as soon as a
# chunk's logits are: it is kept in their place, and nothing is computed twice.

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


# ----------------------------------------------------------------------------------------------------


class LossModel(torch.nn.Module):
    """A model with its loss on top: what Accelerate wraps, so that no logits leave autocast and DDP."""

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model
        find_varlen_kernel(next(model.parameters()).device)

    def forward(self, micro_batch: MicroBatch, device: torch.device, each: bool) -> torch.Tensor:
        """The targets' summed loss in nats, float32; or, with `each`, the loss of each token, as in `token_losses`."""
        targets = F.pad(micro_batch.labels[:, 1:], (0, 1), value=IGNORED).flatten()  # the last position predicts none
        if micro_batch.segments is None:
            return self._padded(micro_batch, targets, device, each)
        return self._end_to_end(micro_batch, targets, device, each)

    def _padded(self, micro_batch: MicroBatch, targets: torch.Tensor, device: torch.device, each: bool) -> torch.Tensor:
        """Labels move and logits stay: slicing the logits would copy the largest tensor of the update."""
        assert micro_batch.attention_mask is not None
        logits = self.model(
            input_ids=micro_batch.input_ids.to(device, non_blocking=True),
            attention_mask=micro_batch.attention_mask.to(device, non_blocking=True),
            use_cache=False,
        ).logits
        losses = F.cross_entropy(
            logits.float().flatten(0, 1),
            targets.to(device, non_blocking=True),
            ignore_index=IGNORED,
            reduction="none" if each else "sum",
        )
        return losses.view(micro_batch.labels.shape)[:, :-1] if each else losses

    def _end_to_end(
        self, micro_batch: MicroBatch, targets: torch.Tensor, device: torch.device, each: bool
    ) -> torch.Tensor:
        """What is a target is known on the CPU, so that the device is never waited for."""
        assert micro_batch.segments is not None
        base = self.model.get_base_model()
        hidden = base.get_decoder()(
            input_ids=micro_batch.input_ids.to(device, non_blocking=True),
            use_cache=False,
            **segments_arguments(micro_batch.segments, base.config._attn_implementation, device),
        ).last_hidden_state[0]
        places = (targets != IGNORED).nonzero()[:, 0]
        right = targets[places].to(device, non_blocking=True)
        places = places.to(device, non_blocking=True)
        chosen, head = hidden.index_select(0, places), base.get_output_embeddings()
        if not each:
            return SummedLoss.apply(chosen, head.weight, head.bias, right)
        losses = torch.zeros(len(targets), device=device)
        return losses.index_copy(0, places, chunked_losses(chosen, head, right))[None, :-1]


def target_count(micro_batch: MicroBatch) -> int:
    """Target tokens: labels that count, the first position left out, since nothing predicts it."""
    return int((micro_batch.labels[:, 1:] != IGNORED).sum())


def token_losses(model: torch.nn.Module, micro_batch: MicroBatch, device: torch.device) -> torch.Tensor:
    """The loss of each token in nats, (examples, length - 1) or (1, tokens - 1), float32; 0 where it does not count.

    Entry t belongs to the id at t + 1. Without padding there is no graph.

    Args:
        model: a `LossModel`, as it is or as Accelerate prepared it.
    """
    return model(micro_batch, device, True)


def summed_loss(model: torch.nn.Module, micro_batch: MicroBatch, device: torch.device) -> torch.Tensor:
    """The sum of the target tokens' losses in nats, a float32 scalar with a graph. `model` as in `token_losses`."""
    return model(micro_batch, device, False)
