"""How large micro-batches may be: the largest one is tried before the first update.

Without padding an update is cut into as few micro-batches as memory allows. What memory allows is tried, not
calculated: a full micro-batch goes forward and backward, and where it finds no room, or uses more than may be used, a
smaller one does.
"""

import heapq
from collections.abc import Callable, Sequence

import numpy as np
import torch
from accelerate import Accelerator

from medqa.config import Experiment
from medqa.data.batches import MicroBatch, Stream, pack
from medqa.data.tokens import Example
from medqa.evaluation.loss import Evaluator
from medqa.model.device import available_memory, peak_memory, release, reset_peak
from medqa.model.loss import summed_loss
from medqa.model.memory import enough_tokens, optimizer_bytes
from medqa.model.settings import Settings
from medqa.model.sharding import is_sharded
from medqa.training.state import Moved, RunState

UNTRIED = 0.8  # of the tokens that the plan has room for, where they cannot be tried


def choose_micro_batch(
    state: RunState,
    settings: Settings,
    model: torch.nn.Module,
    stream: Stream,
    experiment: Experiment,
    accelerator: Accelerator,
    say: Callable[[str], None],
) -> None:
    """Put the most tokens of a micro-batch into the state of a run that trains without padding.

    A run that goes on keeps its own, or takes fewer where the user gives fewer.
    """
    before, given = state.micro_batch_tokens, experiment.training.micro_batch_tokens
    if not settings.padding_free:
        if given is not None:
            say("training.micro_batch_tokens has no effect with padding: training.per_device_batch_size counts there")
        return
    how = "as when the run began"
    if before is None:
        state.micro_batch_multiple = accelerator.num_processes
    if given is not None and (before is None or given < before):  # never more: the run may have found no room for it
        how = "as training.micro_batch_tokens says"
        state.micro_batch_tokens = given
        if before is not None:
            state.not_bitwise.append(Moved(state.step, [f"micro_batch_tokens {before} before, {given} now"]))
    if state.micro_batch_tokens is None:
        planned = settings.planned_tokens
        state.micro_batch_tokens = find_micro_batch_tokens(model, stream.examples, experiment, accelerator, planned)
        how = (
            "as planned, not tried"
            if is_sharded(model)
            else _what_was_tried(state, stream, experiment, accelerator, planned)
        )
    say(f"without padding, micro-batches of at most {state.micro_batch_tokens:,} tokens: {how}")


def _what_was_tried(
    state: RunState, stream: Stream, experiment: Experiment, accelerator: Accelerator, planned: int | None
) -> str:
    """How the tokens of a micro-batch were found, in words."""
    longest = longest_example(stream.examples)
    first = first_try(stream.examples, experiment, accelerator.device.type, planned)
    if first == longest:
        return "as many as the longest example has, which is not cut; nothing was tried"
    if state.micro_batch_tokens == first:
        return "tried with the longest that can come"
    if state.micro_batch_tokens == longest:
        return f"as many as the longest example has; up to {first:,} were tried and did not fit"
    return f"tried; {first:,} did not fit"


def make_evaluator(
    state: RunState,
    settings: Settings,
    model: torch.nn.Module,
    experiment: Experiment,
    accelerator: Accelerator,
    pad_token_id: int,
) -> Evaluator:
    """What measures splits during a run, with about as many tokens at once as training has."""
    padded = experiment.training.per_device_batch_size * experiment.tokenization.max_length
    at_once = state.micro_batch_tokens or padded
    padding_free = settings.evaluation_padding_free
    return Evaluator(model, accelerator, experiment.tokenization, pad_token_id, at_once, padding_free)


def find_micro_batch_tokens(
    model: torch.nn.Module,
    examples: Sequence[Example],
    experiment: Experiment,
    accelerator: Accelerator,
    planned: int | None,
) -> int:
    """The most tokens of a micro-batch, the same on all processes. No gradient is left behind.

    Args:
        model: a `LossModel` as Accelerate prepared it.
        examples: the training examples.
        planned: the most to try on a CPU, where a process that takes too much memory is killed; and what is taken,
            untried, where weights are sharded: of a process without room the others would wait for their layers.
    """
    device = accelerator.device
    longest = max(examples, key=lambda example: len(example.input_ids))
    shortest_try = len(longest.input_ids)
    tokens = first_try(examples, experiment, device.type, planned)
    if is_sharded(model):
        assert planned is not None
        return min(tokens, max(int(UNTRIED * planned), shortest_try))
    was_training = model.training
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    later = optimizer_bytes(trained, experiment.optimizer)  # made in the first step, and there from then on
    while tokens > shortest_try and (fits := share_that_fits(model, full(longest, tokens), accelerator, later)) < 1:
        tokens = max(shortest_try, int(fits * tokens))
    model.train(was_training)
    reset_peak(device)
    found = torch.tensor([tokens], device=device)
    return int(accelerator.gather(found).min()) if accelerator.num_processes > 1 else tokens


def first_try(examples: Sequence[Example], experiment: Experiment, device_type: str, planned: int | None) -> int:
    """Tokens of the first micro-batch to try: the longest that can come, on a CPU no more than planned."""
    tokens = most_in_an_update(examples, experiment.training.global_batch_size)
    if device_type == "cpu" and planned is not None:
        return min(tokens, enough_tokens(experiment, device_type), max(planned, longest_example(examples)))
    return tokens


def longest_example(examples: Sequence[Example]) -> int:
    """Tokens of the longest example: no micro-batch is smaller."""
    return max(len(example.input_ids) for example in examples)


def most_in_an_update(examples: Sequence[Example], global_batch_size: int) -> int:
    """Tokens of the longest update that can come. One longer than the data repeats some of it."""
    rounds, rest = divmod(global_batch_size, len(examples))
    lengths = [len(example.input_ids) for example in examples]
    return rounds * sum(lengths) + sum(heapq.nlargest(rest, lengths))


def full(longest: Example, tokens: int) -> MicroBatch:
    """A micro-batch of exactly so many tokens, of copies of one example, every token a target."""
    whole, rest = divmod(tokens, len(longest.input_ids))
    last = [Example(longest.row, np.resize(longest.input_ids, rest), 0, True)] if rest else []
    return pack([longest] * whole + last, "all")


def share_that_fits(model: torch.nn.Module, micro_batch: MicroBatch, accelerator: Accelerator, later: int) -> float:
    """1.0 where a forward and backward fits into memory, else the share of its tokens to try next.

    Args:
        later: bytes that must stay free for what is not there yet.
    """
    device = accelerator.device
    release(device)
    reset_peak(device)
    before, room = peak_memory(device).allocated, available_memory(device, accelerator.num_processes) - later
    share = 0.5
    try:
        with accelerator.no_sync(model):
            summed_loss(model, micro_batch, device).backward()
        taken = peak_memory(device).allocated - before
        share = 1.0 if taken <= room else max(0.0, 0.9 * room / taken)
    except torch.OutOfMemoryError:
        pass  # half of it is tried next, out here, where the error no longer holds on to what filled the memory
    model.zero_grad()
    release(device)
    return share
