"""Summed token loss. The only place that shifts labels: the logits at a position predict the id after it."""

import torch
from torch.nn import functional as F

from medqa.data.batches import IGNORED, MicroBatch


def target_count(micro_batch: MicroBatch) -> int:
    """Target tokens: labels that count, the first position left out, since nothing predicts it."""
    return int((micro_batch.labels[:, 1:] != IGNORED).sum())


def token_losses(model: torch.nn.Module, micro_batch: MicroBatch, device: torch.device) -> torch.Tensor:
    """The loss of each token in nats, (examples, length - 1), float32; 0 where the label does not count.

    Entry t belongs to the id at t + 1.
    """
    logits, targets = _logits_and_targets(model, micro_batch, device)
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
    return losses.view(micro_batch.labels.shape)[:, :-1]


def summed_loss(model: torch.nn.Module, micro_batch: MicroBatch, device: torch.device) -> torch.Tensor:
    """The sum of the target tokens' losses in nats, a float32 scalar with a graph."""
    logits, targets = _logits_and_targets(model, micro_batch, device)
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def _logits_and_targets(
    model: torch.nn.Module, micro_batch: MicroBatch, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 logits (positions, vocabulary) and the id each predicts (positions); the last position predicts none.

    Labels move and logits stay: slicing the logits would copy the largest tensor of the update.
    """
    logits = model(
        input_ids=micro_batch.input_ids.to(device, non_blocking=True),
        attention_mask=micro_batch.attention_mask.to(device, non_blocking=True),
        use_cache=False,
    ).logits
    targets = F.pad(micro_batch.labels[:, 1:], (0, 1), value=IGNORED).to(device, non_blocking=True)
    return logits.float().flatten(0, 1), targets.flatten()
