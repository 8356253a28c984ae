"""Updates that fail: loss or gradient that is not finite, out of memory, float16 overflow."""

import math
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from medqa.data.batches import MicroBatch, stable_hash
from medqa.errors import TrainingStopped
from medqa.model.device import release
from medqa.model.loss import summed_loss

LOWEST_SCALE = 1.0  # an fp16 gradient that overflows even unscaled is no overflow but a fault


def lower(scaler: torch.amp.GradScaler) -> bool:
    """Halve an fp16 scale after an overflow, as the scaler itself would; False where it is as low as it may be."""
    scale = scaler.get_scale() / 2
    if scale < LOWEST_SCALE:
        return False
    scaler.update(scale)
    # update() with a scale leaves the count of good updates as it was.
    scaler.load_state_dict({**scaler.state_dict(), "_growth_tracker": 0})
    return True


def forget_attempt(accelerator: Accelerator) -> None:
    """Make room after an update that ran out of memory, and have the scaler forget that it was begun."""
    release(accelerator.device)
    if accelerator.scaler is not None:
        accelerator.scaler.update(accelerator.scaler.get_scale())


def step_or_stop(optimizer: torch.optim.Optimizer) -> None:
    """Change the weights. Unlike a micro-batch, a step that ran out of memory half way cannot be done again.

    Raises:
        TrainingStopped: it did.
    """
    try:
        optimizer.step()
    except torch.OutOfMemoryError as error:
        raise TrainingStopped(
            "out of memory in the optimizer's step; use optimizer.name=paged_adamw_8bit, or a smaller lora.r"
        ) from error


def sizes(micro_batches: Sequence[MicroBatch]) -> tuple[int, int | None, bool]:
    """Of an update's largest micro-batch the rows, and the tokens (None: padded); and whether there is none smaller.

    Without padding a micro-batch has room for the longest row at least, so one of no more tokens is the smallest.
    """
    rows = max(len(micro_batch.row_ids) for micro_batch in micro_batches)
    segments = [micro_batch.segments for micro_batch in micro_batches if micro_batch.segments is not None]
    if len(segments) < len(micro_batches):
        return rows, None, rows == 1
    tokens = max(micro_batch.tokens for micro_batch in micro_batches)
    return rows, tokens, tokens <= max(map(max, segments))


def no_room(rows: int, tokens: int | None, error: torch.OutOfMemoryError) -> str:
    """What to do where an update cannot be done again in smaller micro-batches: of several processes, or of one row.

    Args:
        rows, tokens: of the largest micro-batch; tokens None where it was padded.
    """
    what = str(error).splitlines()[0]
    if rows > 1:
        smaller = f"per_device_batch_size={rows // 2}" if tokens is None else f"micro_batch_tokens={tokens // 2}"
        return f"{what}, in one of several processes; set training.{smaller}"
    padded = "" if tokens is None else "training.padding_free=false with "
    return (
        f"{what}, with a single row in the micro-batch; lower tokenization.max_length, or use "
        f"model.quantization=4bit or {padded}model.gradient_checkpointing=true"
    )


def not_finite(
    model: torch.nn.Module,
    micro_batches: Sequence[MicroBatch],
    losses: Sequence[float],
    loss: float,
    norm: float,
    accelerator: Accelerator,
    seed: int,
) -> str:
    """What is not finite, and in which micro-batch and rows, of all processes, each of which must call this.

    Gradients add up over micro-batches: where a loss is finite and its gradient is not, each is done again by itself.

    Args:
        losses: of this process's micro-batches; `loss` and `norm` are those of the update.
    """
    found = []
    for i, (micro_batch, value) in enumerate(zip(micro_batches, losses, strict=True)):
        number = i * accelerator.num_processes + accelerator.process_index + 1
        where = f"micro-batch {number} (rows {', '.join(micro_batch.row_ids)})"
        if not math.isfinite(value):
            found.append(f"the loss is {value} in {where}")
        elif math.isfinite(loss) and not math.isfinite(alone := gradient_norm(model, micro_batch, accelerator, seed)):
            found.append(f"the gradient norm is {alone} at a loss of {loss} in {where}")
    found = gather_object(found) if accelerator.num_processes > 1 else found
    return "; ".join(found) or f"the gradient norm is {norm} at a loss of {loss}, but finite for each micro-batch alone"


def gradient_norm(model: torch.nn.Module, micro_batch: MicroBatch, accelerator: Accelerator, seed: int) -> float:
    """The gradient norm of one micro-batch by itself; no gradient is left behind."""
    model.zero_grad()
    torch.manual_seed(stable_hash(seed, "noise", micro_batch.position))
    with accelerator.no_sync(model):
        summed_loss(model, micro_batch, accelerator.device).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()
    model.zero_grad()
    return norm
