"""The training loop: `train`, `robust_step`, `train_step`. There is no `Trainer` behind it.

An *update* is one optimizer step over exactly `global_batch_size` examples, on however many processes; a *micro-batch*
is one forward and backward pass. Which examples an update sees, and the dropout noise of each micro-batch, depend only
on the seed and on the position in the data stream. So a repeated or resumed update is the same update.
"""

import contextlib
import math
import time
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator

from medqa.config import Experiment
from medqa.data.batches import MicroBatch, stable_hash
from medqa.errors import TrainingStopped
from medqa.evaluation.loss import SplitLoss
from medqa.model.loss import summed_loss
from medqa.training.batches import Batches, token_counts
from medqa.training.failures import GradientOverflow, diagnose, forget_attempt, lower_scale, step_or_stop
from medqa.training.recorder import Recorder
from medqa.training.state import StepResult, TrainState, check_adapter_gradients
from medqa.training.stopping import Stopper


def train(
    state: TrainState,
    batches: Batches,
    experiment: Experiment,
    accelerator: Accelerator,
    *,
    updates: int,
    evaluate: Callable[[], SplitLoss],
    save: Callable[[], None],
    recorder: Recorder,
    stopper: Stopper,
) -> None:
    """Train until `updates` updates are done, or until early stopping. After each: log, evaluate, save, stop.

    Args:
        evaluate: returns the loss of the fixed validation rows for the current weights.
        save: writes a checkpoint of `state`.

    Raises:
        Interrupted, StoppedInTime: a signal came, or the deadline is near. The update was finished and saved.
        TrainingStopped: a loss or gradient is not finite, or a single example does not fit into memory. The weights are
            those of the update before.
    """
    training, progress = experiment.training, state.progress
    state.model.train()
    with stopper.finishing_updates(training.save_minutes):  # a signal now waits for the end of the update
        while progress.step < updates and not progress.stopped_early:
            result, seconds = robust_step(state, batches, experiment, accelerator, recorder)
            if result.tokens and not progress.tokens_seen:  # once in a run, however often it is resumed
                check_adapter_gradients(state.model)
            progress.advance(result)
            last = progress.step == updates

            # Log
            recorder.log_update(progress, result, seconds, last)

            # Evaluate. The evaluation after the last update covers all rows and comes after the loop.
            improved = False
            if progress.step % experiment.evaluation.steps == 0:
                loss = evaluate()
                improved = progress.note_best(progress.step, loss.loss)
                progress.stopped_early = not last and progress.patience_ended(training.early_stopping_patience)
                last = last or progress.stopped_early
                recorder.log_evaluation(progress, loss, last)

            # Save: all processes take the same decision
            stop, save_due = stopper.agree(accelerator, progress.step, updates, last)
            save_best = improved and training.keep == "best"
            if progress.step % training.save_steps == 0 or last or stop or save_due or save_best:
                save()
                stopper.note_save()

            # Stop
            if stop is not None:
                raise stop
    if progress.stopped_early:
        recorder.message(
            f"stopped early after update {progress.step} of {updates}: no lower validation loss in "
            f"{progress.evaluations_since_best} evaluations; the best was after update {progress.best_step}"
        )


def robust_step(
    state: TrainState, batches: Batches, experiment: Experiment, accelerator: Accelerator, recorder: Recorder
) -> tuple[StepResult, float]:
    """`train_step`, repeated in smaller micro-batches when out of memory, and at a lower scale when fp16 overflows.

    A failed attempt has changed no weight, and its repetition sees the same examples. The second value is the seconds
    that the successful attempt took, failed scales included.
    """
    micro_batches, started, overflows = batches.next_update(), time.perf_counter(), 0
    while True:
        try:
            result = train_step(
                state.model,
                state.optimizer,
                state.scheduler,
                micro_batches,
                accelerator=accelerator,
                seed=experiment.training.seed,
                max_grad_norm=experiment.optimizer.max_grad_norm,
            )
            state.progress.overflows += overflows
            return result, time.perf_counter() - started
        except GradientOverflow as overflow:
            if not lower_scale(accelerator.scaler):
                raise TrainingStopped(f"update {state.progress.step + 1}: {overflow.diagnose()}") from overflow
            overflows += 1
            continue
        except TrainingStopped as error:
            raise TrainingStopped(f"update {state.progress.step + 1}: {error}") from error
        except torch.OutOfMemoryError as error:
            message = batches.halve(micro_batches, error)  # raises where there is nothing smaller
        # Outside the handler, where the error's traceback no longer keeps the activations alive
        forget_attempt(accelerator)
        recorder.message(message)
        micro_batches, started, overflows = batches.next_update(), time.perf_counter(), 0


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
    """One update: the gradients of this process's micro-batches are accumulated, clipped and applied.

    The loss is the sum over all target tokens of all micro-batches and processes, divided by their number. A mean of
    micro-batch means would give the tokens of short answers more weight.

    Raises:
        GradientOverflow, TrainingStopped, torch.OutOfMemoryError: no weight has changed.
    """
    optimizer.zero_grad()
    counts = accelerator.reduce(token_counts(micro_batches).to(accelerator.device), "sum")
    targets = counts[0].clamp(min=1)  # of the whole update: the one denominator

    losses = []
    for i, micro_batch in enumerate(micro_batches):
        torch.manual_seed(stable_hash(seed, "noise", micro_batch.position))
        is_last = i == len(micro_batches) - 1  # DDP communicates once, in the last backward pass
        with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
            loss = summed_loss(model, micro_batch, accelerator.device) / targets
            accelerator.backward(loss * accelerator.num_processes)  # DDP averages gradients; the sum is wanted
        losses.append(loss.detach())

    total = accelerator.reduce(torch.stack(losses).sum(), "sum")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = accelerator.clip_grad_norm_(parameters, max_grad_norm)
    # The only host synchronization of the update
    figures = torch.stack([tensor.double() for tensor in (total, norm, *counts)]).tolist()
    if not (math.isfinite(figures[0]) and math.isfinite(figures[1])):
        optimizer.zero_grad()
        raise diagnose(model, micro_batches, figures[0], figures[1], accelerator, seed)

    learning_rate = float(scheduler.get_last_lr()[0])
    if figures[2]:
        step_or_stop(optimizer)
    else:  # without a target there is no gradient, and momentum alone would move the weights
        forget_attempt(accelerator)
    scheduler.step()
    return StepResult.from_figures(learning_rate, *figures)
