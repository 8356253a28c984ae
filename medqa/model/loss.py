"""The loss of a micro-batch. Only this module shifts labels.

Two ways to the same loss. Padded: the model computes the logits of all tokens, including padding. Padding-free:
attention stays inside each example (`attention.py`), and the vocabulary head is applied only at the targets, in chunks.
"""

from typing import Any

import torch
from peft import PeftModel
from torch.nn import functional as F

from medqa.data.batches import IGNORED, MicroBatch
from medqa.model.attention import find_varlen_kernel, segments_arguments

# ----------------------------------------------------------------------------------------------------
# The vocabulary head and the loss at the targets only, in chunks: the logits of all targets never exist at once.
#
# The head is frozen. So the gradient of the summed loss with respect to the head's input can be computed together with
# the loss, chunk by chunk. The backward pass only multiplies it by the gradient of the sum.

CHUNK_BYTES = 32 * 2**20  # logits of one chunk in float32


def chunked_losses(hidden: torch.Tensor, head: torch.nn.Linear, targets: torch.Tensor) -> torch.Tensor:
    """The loss of each target in nats: float32 of shape (targets), not differentiable.

    Args:
        hidden: the head's input at the targets, of shape (targets, width).
        targets: the token ids to predict, of shape (targets).
    """
    losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    for chunk in _chunks(len(targets), head.weight):
        logits = F.linear(hidden[chunk], head.weight, head.bias).float()
        losses[chunk] = F.cross_entropy(logits, targets[chunk], reduction="none")
    return losses


class SummedLoss(torch.autograd.Function):
    """The sum of the losses of the targets in nats, a float32 scalar. The head's weights get no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
    ) -> torch.Tensor:
        """Compute loss and gradient of each chunk: d loss / d logits = softmax - one-hot. Shapes: `chunked_losses`."""
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden)
        for chunk in _chunks(len(targets), weight):
            logits = F.linear(hidden[chunk], weight, bias)
            at_targets = (torch.arange(len(logits), device=logits.device), targets[chunk])
            log_probabilities = F.log_softmax(logits, dim=-1, dtype=torch.float32)
            total -= log_probabilities[at_targets].sum()
            d_logits = log_probabilities.exp_()
            d_logits[at_targets] -= 1
            gradient[chunk] = d_logits.to(logits.dtype) @ weight.to(logits.dtype)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, d_total: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """The gradient stored by `forward`, times the gradient of the sum."""
        (gradient,) = ctx.saved_tensors
        return gradient * d_total, None, None, None


def _chunks(targets: int, weight: torch.Tensor) -> list[slice]:
    """Slices of the targets, each with logits of at most CHUNK_BYTES."""
    size = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    return [slice(start, start + size) for start in range(0, targets, size)]


# ----------------------------------------------------------------------------------------------------


class LossModel(torch.nn.Module):
    """The model and its loss in one module. Accelerate prepares it, so that no logits leave autocast and DDP."""

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model
        find_varlen_kernel(next(model.parameters()).device)

    def forward(self, micro_batch: MicroBatch, device: torch.device, each: bool) -> torch.Tensor:
        """The summed loss of the targets in nats, float32; with `each` the loss of each token, as `token_losses`."""
        targets = F.pad(micro_batch.labels[:, 1:], (0, 1), value=IGNORED).flatten()  # the last token predicts nothing
        if micro_batch.segments is None:
            return self._padded(micro_batch, targets, device, each)
        return self._padding_free(micro_batch, targets, device, each)

    def _padded(self, micro_batch: MicroBatch, targets: torch.Tensor, device: torch.device, each: bool) -> torch.Tensor:
        """Loss over all logits. The labels are shifted, because slicing the logits would copy the largest tensor."""
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

    def _padding_free(
        self, micro_batch: MicroBatch, targets: torch.Tensor, device: torch.device, each: bool
    ) -> torch.Tensor:
        """Loss at the targets only. Their indices are computed on the CPU, so that nothing waits for the device."""
        assert micro_batch.segments is not None
        base = self.model.get_base_model()
        hidden = base.get_decoder()(
            input_ids=micro_batch.input_ids.to(device, non_blocking=True),
            use_cache=False,
            **segments_arguments(micro_batch.segments, base.config._attn_implementation, device),
        ).last_hidden_state[0]
        indices = (targets != IGNORED).nonzero()[:, 0]
        target_ids = targets[indices].to(device, non_blocking=True)
        indices = indices.to(device, non_blocking=True)
        chosen, head = hidden.index_select(0, indices), base.get_output_embeddings()
        if not each:
            return SummedLoss.apply(chosen, head.weight, head.bias, target_ids)
        losses = torch.zeros(len(targets), device=device)
        return losses.index_copy(0, indices, chunked_losses(chosen, head, target_ids))[None, :-1]


def target_count(micro_batch: MicroBatch) -> int:
    """The number of target tokens: labels that count in the loss, except the first, which no token predicts."""
    return int((micro_batch.labels[:, 1:] != IGNORED).sum())


def token_losses(model: torch.nn.Module, micro_batch: MicroBatch, device: torch.device) -> torch.Tensor:
    """The loss of each token in nats, float32 of shape (examples, length - 1) or, padding-free, (1, tokens - 1).

    Entry t is the loss of the token at t + 1, or 0 if that token is no target. Padding-free it is not differentiable.

    Args:
        model: a `LossModel`, prepared by Accelerate or not.
    """
    return model(micro_batch, device, True)


def summed_loss(model: torch.nn.Module, micro_batch: MicroBatch, device: torch.device) -> torch.Tensor:
    """The summed loss of the target tokens in nats, a differentiable float32 scalar. `model` as in `token_losses`."""
    return model(micro_batch, device, False)
