"""What can go wrong in an update: a loss or gradient norm that is not finite, an fp16 overflow, out of memory."""

import math
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from medqa.data.batches import MicroBatch, stable_hash
from medqa.errors import TrainingStopped, is_out_of_memory
from medqa.model.device import release
from medqa.model.loss import summed_loss

LOWEST_SCALE = 1.0  # a gradient that is not finite even at this scale is a fault of the model or data, not of fp16


def lower_scale(scaler: torch.amp.GradScaler) -> bool:
    """Halve the fp16 scale after an overflow, as the scaler itself would; False if it is at its minimum already."""
    scale = scaler.get_scale() / 2
    if scale < LOWEST_SCALE:
        return False
    scaler.update(scale)
    # update() with a scale does not reset the count of successful updates.
    scaler.load_state_dict({**scaler.state_dict(), "_growth_tracker": 0})
    return True


def end_without_step(accelerator: Accelerator) -> None:
    """End an attempt in which the optimizer makes no step: free cached memory, and reset the fp16 scaler for the next.

    The scale stays. Without this the scaler would refuse to unscale the gradients of the next attempt.
    """
    release(accelerator.device)
    if accelerator.scaler is not None:
        accelerator.scaler.update(accelerator.scaler.get_scale())


def optimizer_step(optimizer: torch.optim.Optimizer) -> None:
    """Call `optimizer.step()`. A step that ran out of memory may have changed some weights, so it is never repeated.

    Raises:
        TrainingStopped: the optimizer step ran out of memory.
    """
    try:
        optimizer.step()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingStopped(
            "out of memory in the optimizer step; use optimizer.name=paged_adamw_8bit, or a smaller lora.r"
        ) from error


class GradientOverflow(Exception):
    """The gradient norm is not finite while the loss is, under an fp16 gradient scaler. No weight has changed.

    Attributes:
        diagnose: finds the micro-batch and its rows, and returns them as a message. It is a collective call: every
            process must make it.
    """

    def __init__(self, diagnose: Callable[[], str]) -> None:
        super().__init__("the gradient overflows")
        self.diagnose = diagnose


def diagnose(
    model: torch.nn.Module,
    micro_batches: Sequence[MicroBatch],
    loss: float,
    norm: float,
    accelerator: Accelerator,
    seed: int,
) -> GradientOverflow | TrainingStopped:
    """Return the exception to raise for an update whose loss or gradient norm is not finite.

    With a gradient scaler (fp16) and a finite loss it is `GradientOverflow`: this is normal under fp16, and the update
    can be repeated at a lower scale. Otherwise it is `TrainingStopped`, whose message names the micro-batches and rows.
    """

    def describe() -> str:
        return _describe_failure(model, micro_batches, loss, norm, accelerator, seed)

    if math.isfinite(loss) and accelerator.scaler is not None:
        return GradientOverflow(describe)
    return TrainingStopped(describe())


def _describe_failure(
    model: torch.nn.Module,
    micro_batches: Sequence[MicroBatch],
    loss: float,
    norm: float,
    accelerator: Accelerator,
    seed: int,
) -> str:
    """Say what is not finite, and in which micro-batches and rows of all processes. Every process must call this.

    Gradients add up over micro-batches, so each micro-batch is computed again by itself.
    """
    found = []
    for i, micro_batch in enumerate(micro_batches):
        number = i * accelerator.num_processes + accelerator.process_index + 1
        where = f"micro-batch {number} (rows {', '.join(micro_batch.row_ids)})"
        value, alone = _loss_and_norm(model, micro_batch, accelerator, seed)
        if not math.isfinite(value):
            found.append(f"the loss is {value} in {where}")
        elif math.isfinite(loss) and not math.isfinite(alone):
            found.append(f"the gradient norm is {alone} at a loss of {loss} in {where}")
    found = gather_object(found) if accelerator.num_processes > 1 else found
    return "; ".join(found) or f"the gradient norm is {norm} at a loss of {loss}, but finite for each micro-batch alone"


def _loss_and_norm(
    model: torch.nn.Module, micro_batch: MicroBatch, accelerator: Accelerator, seed: int
) -> tuple[float, float]:
    """Summed loss and gradient norm of one micro-batch by itself. All gradients are None afterwards."""
    model.zero_grad()
    torch.manual_seed(stable_hash(seed, "noise", micro_batch.position))  # the same dropout mask
    with accelerator.no_sync(model):
        loss = summed_loss(model, micro_batch, accelerator.device)
        loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return loss.item(), norm.item()
