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
from medqa.errors import Interrupted, ProcessStopped, StoppedInTime, TrainingStopped
from medqa.evaluation.loss import SplitLoss
from medqa.model.device import peak_memory
from medqa.model.loss import summed_loss, target_count
from medqa.training.failures import forget_attempt, lower, no_room, not_finite, sizes, step_or_stop
from medqa.training.recorder import Tracker
from medqa.training.state import RunState
from medqa.training.stopping import Deadline, Interrupts


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
    updates: int,
    validate: Callable[[], SplitLoss],
    save: Callable[[], None],
    tracker: Tracker,
    interrupts: Interrupts,
    deadline: Deadline,
    progress: Callable[[dict], None],
    say: Callable[[str], None],
    clock: Callable[[], float],
) -> None:
    """Train from `state.step` to so many `updates`, or until it stops early; `state` moves along.

    Args:
        model, optimizer: prepared by the accelerator; the scheduler is not.
        validate: the loss of the fixed validation rows, now.
        save: writes a checkpoint of everything as it is now.
        deadline: when to have saved and stopped.
        progress: told the figures of each update.
        say: told what a user should hear of.
        clock: seconds of the run so far, over all its legs.

    Raises:
        Interrupted: a signal came; the update was finished and saved.
        StoppedInTime: the deadline is near; likewise.
        TrainingStopped: a loss or gradient is not finite, or memory is short even for single rows; the weights are
            those of the update before.
    """
    settings, evaluation = experiment.training, experiment.evaluation
    saved_at, longest = clock(), 0.0
    model.train()
    interrupts.finish_update = True
    while state.step < updates and not state.stopped_early:
        began = started = time.perf_counter()
        result = None
        while result is None:
            micro_batches = next_update(stream, experiment, pad_token_id, state, accelerator)
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
            except TrainingStopped as error:
                raise TrainingStopped(f"update {state.step + 1}: {error}") from error
            except torch.OutOfMemoryError as error:
                rows, tokens, smallest = sizes(micro_batches)
                if accelerator.num_processes > 1:
                    raise ProcessStopped(f"update {state.step + 1}: {no_room(rows, tokens, error)}") from error
                if smallest:
                    raise TrainingStopped(f"update {state.step + 1}: {no_room(1, tokens, error)}") from error
            if result is None:  # out here, where the error no longer holds on to what filled the memory
                forget_attempt(accelerator)
                before, now = state.halve(rows, tokens)
                say(
                    f"update {state.step + 1}: out of memory with {before} in a micro-batch; the update is done "
                    f"again, and all that follow are done, with {now}"
                )
        update_s = time.perf_counter() - started
        if result.tokens and not state.tokens_seen:  # once in a run, so that a resume never stops what had gone on
            require_adapter_gradients(model)
        state.step += 1
        state.tokens_seen += result.tokens
        state.overflows += result.overflows
        last = state.step == updates
        # A save and another update, each maybe slower than any so far, must still fit.
        late = deadline.within(2 * max(longest, time.perf_counter() - began))
        stop, save_due, late = agreed(
            accelerator, interrupts.received or 0, minutes_due(clock() - saved_at, settings.save_minutes), late
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
            "order": f"{result.order:x}",
            "overflows": state.overflows,
            "peak_memory_bytes": memory.allocated,
            "peak_reserved_bytes": memory.reserved,
        }
        progress(record)
        if due(state.step, settings.log_steps) or last:
            tracker.log(record)
        if due(state.step, evaluation.steps):
            loss = validate()
            state.note_best(state.step, loss.loss)  # before the save: a longer run that goes on from it knows
            state.stopped_early = not last and patience_ended(state, settings.early_stopping_patience)
            last = last or state.stopped_early
            if not last:  # the last is recorded on all rows, after the loop
                tracker.log({"step": state.step, "split": "eval", "elapsed_s": clock(), **loss.record()})
            elif not due(state.step, settings.log_steps):
                tracker.log(record)
            save_due = save_due or (settings.keep == "best" and state.best_step == state.step)
        if due(state.step, settings.save_steps) or last or save_due or stop or late:
            state.elapsed_s = saved_at = clock()
            state.peak_memory = max(state.peak_memory, memory.allocated)
            save()
            tracker.saved(state.step, clock() - saved_at)
        longest = max(longest, time.perf_counter() - began)
        if stop:
            raise Interrupted(stop)
        if late and not last:
            raise StoppedInTime(f"stopped in time after update {state.step} of {updates}")
    if state.stopped_early:
        say(
            f"stopped early after update {state.step} of {updates}: no lower validation loss in "
            f"{state.evaluations_since_best} evaluations, the best was after update {state.best_step}"
        )
    interrupts.training_is_over()


@dataclass(frozen=True)
class StepResult:
    """One update. `loss` is the mean over its target tokens in nats; `grad_norm` is from before clipping.

    `order` is a number that follows from which rows it consumed at which stream positions.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    padding_share: float
    overflows: int
    order: int


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
        torch.OutOfMemoryError: a micro-batch does not fit. Nothing moved: the update can be done again in smaller ones.
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
        *loss_list, loss_value, norm_value, tokens, in_batch, places, order = torch.stack(
            [tensor.double() for tensor in (*losses, total, norm, *counts)]
        ).tolist()
        if math.isfinite(loss_value) and math.isfinite(norm_value):
            break
        if not math.isfinite(loss_value) or accelerator.scaler is None or not lower(accelerator.scaler):
            optimizer.zero_grad()
            raise TrainingStopped(
                not_finite(model, micro_batches, loss_list, loss_value, norm_value, accelerator, seed)
            )
    learning_rate = float(scheduler.get_last_lr()[0])
    if tokens:
        step_or_stop(optimizer)
    else:  # there is no gradient, and the optimizer would move the weights by its momentum alone
        forget_attempt(accelerator)
    scheduler.step()
    return StepResult(loss_value, norm_value, learning_rate, int(tokens), 1 - in_batch / places, overflows, int(order))


def next_update(
    stream: Stream, experiment: Experiment, pad_token_id: int, state: RunState, accelerator: Accelerator
) -> list[MicroBatch]:
    """This process's micro-batches of the next update, with padding as the recipe says, or without."""
    index, processes, tokenization = accelerator.process_index, accelerator.num_processes, experiment.tokenization
    if state.micro_batch_tokens is not None:
        return stream.packed(
            state.step, tokenization.loss_on, state.micro_batch_tokens, state.micro_batch_multiple, index, processes
        )
    rows = experiment.training.per_device_batch_size
    return stream.micro_batches(state.step, rows, tokenization, pad_token_id, index, processes, state.micro_batch_rows)


def token_counts(micro_batches: Sequence[MicroBatch]) -> torch.Tensor:
    """Target tokens, tokens, places including padding, and `order`, summed over the micro-batches."""
    return torch.tensor(
        [
            sum(target_count(micro_batch) for micro_batch in micro_batches),
            sum(micro_batch.tokens for micro_batch in micro_batches),
            sum(micro_batch.input_ids.numel() for micro_batch in micro_batches),
            sum(micro_batch.order for micro_batch in micro_batches),
        ]
    )


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many updates happens after this one."""
    return step % every == 0


def patience_ended(state: RunState, patience: int | None) -> bool:
    """Whether so many evaluations in a row have not been better than the best before; never, if None."""
    return patience is not None and state.evaluations_since_best >= patience


def minutes_due(seconds: float, minutes: float | None) -> bool:
    """Whether as many minutes have passed; never, if None."""
    return minutes is not None and seconds >= 60 * minutes


def agreed(accelerator: Accelerator, signum: int, save_due: bool, late: bool) -> tuple[int, bool, bool]:
    """The signal to stop for (0: none), whether to save, whether it is late, on all processes: what any of them has."""
    if accelerator.num_processes == 1:
        return signum, save_due, late
    mine = torch.tensor([[signum, int(save_due), int(late)]], device=accelerator.device)
    signum, save, is_late = accelerator.gather(mine).amax(dim=0).tolist()
    return signum, bool(save), bool(is_late)


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
