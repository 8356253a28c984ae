"""The loop: `train`, then `train_step`, then the small things they use. That is all; no `Trainer` is behind it."""

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from medqa.config import Experiment
from medqa.data.batches import MicroBatch, Stream, stable_hash
from medqa.errors import Interrupted, TrainingStopped
from medqa.evaluation.loss import SplitLoss
from medqa.model.loss import summed_loss, target_count
from medqa.training.checkpoint import RunState
from medqa.training.interrupts import Interrupts
from medqa.training.memory import peak_memory
from medqa.training.tracking import Tracker

LOWEST_SCALE = 1.0  # an fp16 gradient that overflows even unscaled is no overflow but a fault


def train(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    stream: Stream,
    experiment: Experiment,
    pad_token_id: int,
    state: RunState,
    *,
    validate: Callable[[], SplitLoss],
    save: Callable[[], None],
    tracker: Tracker,
    interrupts: Interrupts,
    progress: Callable[[dict], None],
    clock: Callable[[], float],
) -> None:
    """Train from `state.step` to `training.max_steps` updates; `state` moves along.

    Args:
        model, optimizer: prepared by the accelerator; the scheduler is not.
        validate: the loss of the fixed validation rows, now.
        save: writes a checkpoint of everything as it is now.
        progress: told the figures of each update.
        clock: seconds of the run so far, over all its legs.

    Raises:
        Interrupted: a signal came; the update was finished and saved.
        TrainingStopped: a loss or gradient is not finite; the weights are those of the update before.
    """
    settings, evaluation = experiment.training, experiment.evaluation
    saved_at, first_update = clock(), state.step
    model.train()
    interrupts.finish_update = True
    while state.step < settings.max_steps:
        micro_batches = stream.micro_batches(
            state.step,
            settings.per_device_batch_size,
            experiment.tokenization,
            pad_token_id,
            accelerator.process_index,
            accelerator.num_processes,
        )
        started = time.perf_counter()
        try:
            result = train_step(
                model,
                optimizer,
                scheduler,
                micro_batches,
                accelerator=accelerator,
                seed=settings.seed,
                max_grad_norm=experiment.optimizer.max_grad_norm,
            )
        except (TrainingStopped, torch.OutOfMemoryError) as error:
            raise TrainingStopped(f"update {state.step + 1}: {error}; the newest checkpoint stands") from error
        update_s = time.perf_counter() - started
        if state.step == first_update:
            require_adapter_gradients(model)
        state.step += 1
        state.tokens_seen += result.tokens
        state.overflows += result.overflows
        last = state.step == settings.max_steps
        stop, save_due = agreed(
            accelerator, interrupts.received or 0, minutes_due(clock() - saved_at, settings.save_minutes)
        )

        memory = peak_memory(accelerator.device)
        record = {
            "step": state.step,
            "split": "train",
            "elapsed_s": clock(),
            "loss": result.loss,
            "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm,
            "tokens": result.tokens,
            "examples_seen": state.step * settings.global_batch_size,
            "tokens_seen": state.tokens_seen,
            "epoch": stream.epoch(state.step),
            "update_s": update_s,
            "tokens_per_s": result.tokens / update_s,
            "padding_share": result.padding_share,
            "peak_memory_bytes": memory.allocated,
            "peak_reserved_bytes": memory.reserved,
        }
        progress(record)
        if due(state.step, settings.log_steps) or last:
            tracker.log(record)
        if due(state.step, evaluation.steps) and not last:  # the last is evaluated on all rows, after the loop
            loss = validate()
            state.note_best(state.step, loss.loss)
            tracker.log({"step": state.step, "split": "eval", "elapsed_s": clock(), **loss.record()})
        if due(state.step, settings.save_steps) or last or save_due or stop:
            state.elapsed_s = saved_at = clock()
            state.peak_memory = max(state.peak_memory, memory.allocated)
            save()
            tracker.saved(state.step, clock() - saved_at)
        if stop:
            raise Interrupted(stop)
    interrupts.finish_update = False


@dataclass(frozen=True)
class StepResult:
    """One update. `loss` is the mean over its target tokens in nats; `grad_norm` is from before clipping."""

    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    padding_share: float
    overflows: int


def train_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    micro_batches: Sequence[MicroBatch],
    *,
    accelerator: Accelerator,
    seed: int,
    max_grad_norm: float,
) -> StepResult:
    """One update over this process's micro-batches of it.

    Raises:
        TrainingStopped: the loss or the gradient norm is not finite, and no gradient scaler explains it. Nothing moved.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    counts = accelerator.reduce(token_counts(micro_batches).to(accelerator.device), "sum")
    targets = counts[0].clamp(min=1)  # of the whole update: the one denominator
    for overflows in itertools.count():  # noqa: B007 (it ends by break, and the count is part of the result)
        optimizer.zero_grad()
        losses = []
        for i, micro_batch in enumerate(micro_batches):
            torch.manual_seed(stable_hash(seed, "noise", micro_batch.position))
            last = i == len(micro_batches) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(model):
                loss = summed_loss(model, micro_batch, accelerator.device) / targets
                accelerator.backward(loss * accelerator.num_processes)  # DDP takes the mean, the sum is meant
            losses.append(loss.detach())
        total = accelerator.reduce(torch.stack(losses).sum(), "sum")
        norm = accelerator.clip_grad_norm_(parameters, max_grad_norm)
        # The update's one host synchronization.
        *loss_list, loss_value, norm_value, tokens, in_batch, places = torch.stack(
            [tensor.double() for tensor in (*losses, total, norm, *counts)]
        ).tolist()
        if math.isfinite(loss_value) and math.isfinite(norm_value):
            break
        if not math.isfinite(loss_value) or accelerator.scaler is None or accelerator.scaler.get_scale() < LOWEST_SCALE:
            optimizer.zero_grad()
            raise TrainingStopped(not_finite(loss_value, norm_value, micro_batches, loss_list))
        accelerator.scaler.update(accelerator.scaler.get_scale() / 2)  # an overflow: the same once more, lower
    learning_rate = scheduler.get_last_lr()[0]
    optimizer.step()
    scheduler.step()
    return StepResult(loss_value, norm_value, learning_rate, int(tokens), 1 - in_batch / places, overflows)


def token_counts(micro_batches: Sequence[MicroBatch]) -> torch.Tensor:
    """Target tokens, tokens, and places including padding, summed over the micro-batches."""
    return torch.tensor(
        [
            sum(target_count(micro_batch) for micro_batch in micro_batches),
            sum(micro_batch.tokens for micro_batch in micro_batches),
            sum(micro_batch.input_ids.numel() for micro_batch in micro_batches),
        ]
    )


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many updates happens after this one."""
    return step % every == 0


def minutes_due(seconds: float, minutes: float | None) -> bool:
    """Whether as many minutes have passed; never, if None."""
    return minutes is not None and seconds >= 60 * minutes


def agreed(accelerator: Accelerator, signum: int, save_due: bool) -> tuple[int, bool]:
    """The signal to stop for (0: none) and whether to save, the same on all processes: what any of them has."""
    if accelerator.num_processes == 1:
        return signum, save_due
    mine = torch.tensor([[signum, int(save_due)]], device=accelerator.device)
    signum, save = accelerator.gather(mine).amax(dim=0).tolist()
    return signum, bool(save)


def require_adapter_gradients(model: torch.nn.Module) -> None:
    """Check, once, that the update's gradient reached every LoRA B matrix: one left out would never train.

    Raises:
        TrainingStopped: one got none.
    """
    missing = [
        name
        for name, parameter in model.named_parameters()
        if "lora_B" in name and (parameter.grad is None or not parameter.grad.any())
    ]
    if missing:
        raise TrainingStopped(f"no gradient reached {len(missing)} adapter matrices, {missing[0]} among them")


def not_finite(loss: float, norm: float, micro_batches: Sequence[MicroBatch], losses: Sequence[float]) -> str:
    """What was not finite, and in which rows."""
    for micro_batch, value in zip(micro_batches, losses, strict=True):
        if not math.isfinite(value):
            return f"the loss is {value} in the micro-batch of rows {', '.join(micro_batch.row_ids)}"
    return f"the gradient norm is {norm} at a loss of {loss}" if math.isfinite(loss) else f"the loss is {loss}"
