"""The training loop: `train`, `robust_step`, `train_step`. It does not use transformers' `Trainer`.

An *update* is one optimizer step over exactly `global_batch_size` examples, on any number of processes; a *micro-batch*
is one forward and backward pass. The examples of an update, and the dropout mask of each micro-batch, depend only on
the seed and on the position in the data stream. So a repeated or resumed update is the same update.
"""

import contextlib
import math
import time
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator

from medqa.config import Experiment
from medqa.data.batches import MicroBatch, stable_hash
from medqa.errors import TrainingStopped, is_out_of_memory
from medqa.evaluation.loss import SplitLoss
from medqa.model.loss import summed_loss
from medqa.training.batches import Batches, token_counts
from medqa.training.failures import GradientOverflow, diagnose, end_without_step, lower_scale, optimizer_step
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
    """Train until `updates` updates are done, or until early stopping. After each update: log, evaluate, save, stop.

    Args:
        evaluate: returns the loss of the fixed validation rows for the current weights.
        save: writes a checkpoint of `state`.

    Raises:
        Interrupted: a signal arrived. StoppedInTime: the `--stop-after` deadline is near. In both cases the current
            update was finished and a checkpoint saved.
        TrainingStopped: as `robust_step`; or an adapter matrix got no gradient in the first update, which was applied.
    """
    training, progress = experiment.training, state.progress
    state.model.train()
    with stopper.finishing_updates(training.save_minutes):  # from here on a signal waits for the end of the update
        while progress.step < updates and not progress.stopped_early:
            result, seconds = robust_step(state, batches, experiment, accelerator, recorder)
            if result.tokens and not progress.tokens_seen:  # only after the first update of the run
                check_adapter_gradients(state.model)
            progress.advance(result)
            last = progress.step == updates

            # Log
            recorder.log_update(progress, result, seconds, last)

            # Evaluate. After the last update the result decides `keep: best`, here and in a run that is extended later;
            # the final evaluation measures the same rows again, and logs them.
            improved = False
            if progress.step % experiment.evaluation.steps == 0:
                began, loss = time.perf_counter(), evaluate()
                improved = progress.note_best(progress.step, loss.loss)
                progress.stopped_early = not last and progress.patience_ended(training.early_stopping_patience)
                last = last or progress.stopped_early
                recorder.log_evaluation(progress, loss, time.perf_counter() - began, last)

            # Save. `agree` is a collective call: every process gets the same answer.
            stop_reason, save_due = stopper.agree(accelerator, progress.step, updates, last)
            save_best = improved and training.keep == "best"
            if progress.step % training.save_steps == 0 or last or stop_reason or save_due or save_best:
                save()
                stopper.note_save()

            # Stop
            if stop_reason is not None:
                raise stop_reason
    if progress.stopped_early:
        recorder.message(
            f"stopped early after update {progress.step} of {updates}: no lower validation loss in "
            f"{progress.evaluations_since_best} evaluations; the best was after update {progress.best_step}"
        )


def robust_step(
    state: TrainState, batches: Batches, experiment: Experiment, accelerator: Accelerator, recorder: Recorder
) -> tuple[StepResult, float]:
    """`train_step`, repeated in smaller micro-batches when out of memory, and at a lower scale when fp16 overflows.

    A repetition starts from the same weights and sees the same examples. The second value returned is the seconds for
    the update, including repeats after an fp16 overflow, excluding repeats after out of memory.

    Raises:
        TrainingStopped: as `train_step`, or the update failed and cannot be repeated. The message names the update.
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
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is for GPUs only, and a RuntimeError
            if not is_out_of_memory(error):
                raise
            # Changes progress.micro_batch_*, which `next_update` reads, and returns the message.
            # Raises if one example does not fit, or if there are several processes.
            message = batches.halve(micro_batches, error)
        # Outside the handler, where the error's traceback no longer keeps the activations alive
        end_without_step(accelerator)
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
    """One optimizer step: gradients accumulated over this process's micro-batches, averaged over processes, clipped.

    The loss is the sum over all target tokens of all micro-batches and processes, divided by their number. A mean of
    micro-batch means would give the tokens of short answers more weight.

    Args:
        model: the prepared `LossModel` (`state.model`), which returns the summed loss of a micro-batch, not logits.

    Raises:
        GradientOverflow, TrainingStopped: the loss or the gradient norm is not finite. No weight has changed.
        RuntimeError: out of memory before the optimizer step. No weight has changed.
        TrainingStopped: out of memory in `optimizer.step()`, which may have changed weights and cannot be repeated.
    """
    optimizer.zero_grad()
    # Target tokens, tokens, slots and order of the update, summed over all processes; see `token_counts`
    counts = accelerator.reduce(token_counts(micro_batches).to(accelerator.device), "sum")
    denominator = counts[0].clamp(min=1)  # the number of target tokens in the update, over all processes

    losses = []
    for i, micro_batch in enumerate(micro_batches):
        torch.manual_seed(stable_hash(seed, "noise", micro_batch.position))  # seeds the dropout mask
        is_last = i == len(micro_batches) - 1  # DDP communicates once, in the last backward pass
        with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
            share = summed_loss(model, micro_batch, accelerator.device) / denominator  # of the mean loss of the update
            accelerator.backward(share * accelerator.num_processes)  # DDP averages gradients; the sum is wanted
        losses.append(share.detach())

    mean_loss = accelerator.reduce(torch.stack(losses).sum(), "sum")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    total_norm = accelerator.clip_grad_norm_(parameters, max_grad_norm)
    # One synchronization with the host. An fp16 scaler adds one, and `Stopper.agree` one with several processes.
    totals = torch.stack([tensor.double() for tensor in (mean_loss, total_norm, *counts)])
    loss, norm, targets_seen, tokens, slots, order = totals.tolist()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        optimizer.zero_grad()
        # GradientOverflow with fp16 and a finite loss, else TrainingStopped
        raise diagnose(model, micro_batches, loss, norm, accelerator, seed)

    learning_rate = float(scheduler.get_last_lr()[0])
    if targets_seen:
        optimizer_step(optimizer)  # optimizer.step(); out of memory in it raises TrainingStopped
    else:  # no target token, so no gradient: momentum alone would change the weights
        end_without_step(accelerator)
    scheduler.step()
    return StepResult.from_totals(learning_rate, loss, norm, targets_seen, tokens, slots, order)
