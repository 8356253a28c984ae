"""Micro-batches that fit into memory: the data stream, cut for this process; smaller ones where memory is short.

Without padding an update is cut into as few micro-batches as memory allows. What memory allows is tried before the
first update, not calculated: a full micro-batch goes forward and backward, and where it does not fit, a smaller one is
tried. With padding a micro-batch has `training.per_device_batch_size` rows.
"""

import heapq
from collections.abc import Sequence

import numpy as np
import torch
from accelerate import Accelerator

from medqa.config import Experiment
from medqa.data.batches import MicroBatch, Stream, pack
from medqa.data.tokens import Example
from medqa.errors import ProcessStopped, TrainingStopped
from medqa.model.device import available_memory, peak_memory, release, reset_peak
from medqa.model.loss import summed_loss, target_count
from medqa.model.memory import enough_tokens, optimizer_bytes
from medqa.model.settings import Settings
from medqa.model.sharding import is_sharded
from medqa.training.recorder import Recorder
from medqa.training.state import Moved, Progress

UNTRIED = 0.8  # of the tokens that the plan has room for, where they cannot be tried


class Batches:
    """The stream of training examples, cut into this process's micro-batches of each update.

    Attributes:
        stream: the examples by their position.
        progress: says which update is next, and how large a micro-batch may be; `probe` and `halve` change the latter.
    """

    def __init__(
        self, stream: Stream, experiment: Experiment, pad_token_id: int, progress: Progress, accelerator: Accelerator
    ) -> None:
        self.stream, self.progress = stream, progress
        self.pad_token_id, self.accelerator = pad_token_id, accelerator
        self._experiment = experiment

    @property
    def most_tokens(self) -> int:
        """The most tokens, padding included, that a micro-batch of training may have."""
        padded = self._experiment.training.per_device_batch_size * self._experiment.tokenization.max_length
        return self.progress.micro_batch_tokens or padded

    def next_update(self) -> list[MicroBatch]:
        """This process's micro-batches of the next update, with padding or without."""
        progress, experiment = self.progress, self._experiment
        share = (self.accelerator.process_index, self.accelerator.num_processes)
        if progress.micro_batch_tokens is not None:
            return self.stream.packed(
                progress.step,
                experiment.tokenization.loss_on,
                progress.micro_batch_tokens,
                progress.micro_batch_multiple,
                *share,
            )
        return self.stream.micro_batches(
            progress.step,
            experiment.training.per_device_batch_size,
            experiment.tokenization,
            self.pad_token_id,
            *share,
            progress.micro_batch_rows,
        )

    def halve(self, micro_batches: Sequence[MicroBatch], error: torch.OutOfMemoryError) -> str:
        """Use micro-batches half as large as these from now on, because memory ran out; returns a message.

        Raises:
            ProcessStopped: there are several processes, and the others do not know of it.
            TrainingStopped: a single example does not fit.
        """
        progress = self.progress
        rows, tokens, smallest = _largest(micro_batches)
        update = f"update {progress.step + 1}"
        if self.accelerator.num_processes > 1:
            raise ProcessStopped(f"{update}: {_no_room(rows, tokens, error)}") from error
        if smallest:
            raise TrainingStopped(f"{update}: {_no_room(1, tokens, error)}") from error
        if tokens is None:
            progress.micro_batch_rows = -(-rows // 2)
            before, now = f"{rows} rows", str(progress.micro_batch_rows)
        else:
            progress.micro_batch_tokens = -(-tokens // 2)
            before, now = f"{tokens} tokens", str(progress.micro_batch_tokens)
        return (
            f"{update}: out of memory with {before} in a micro-batch; this update is repeated, and all that follow are "
            f"done, with {now}"
        )

    def probe(self, model: torch.nn.Module, settings: Settings, recorder: Recorder) -> None:
        """Find the most tokens of a micro-batch without padding. With padding there is nothing to find.

        A resumed run keeps the size that it began with, or takes the smaller one that the user gives.

        Args:
            model: a `LossModel` as Accelerate prepared it.
        """
        given = self._experiment.training.micro_batch_tokens
        if settings.padding_free:
            how = self._find(model, given, settings.planned_tokens)
            tokens = self.progress.micro_batch_tokens
            recorder.message(f"without padding, micro-batches of at most {tokens:,} tokens: {how}")
        elif given is not None:
            recorder.message(
                "training.micro_batch_tokens has no effect with padding: training.per_device_batch_size counts there"
            )
        recorder.phases.done("probe")

    def _find(self, model: torch.nn.Module, given: int | None, planned: int | None) -> str:
        """Set the most tokens of a micro-batch, and return how they were found."""
        progress, accelerator, examples = self.progress, self.accelerator, self.stream.examples
        before = progress.micro_batch_tokens
        if before is None:
            progress.micro_batch_multiple = accelerator.num_processes
        if given is not None and (before is None or given < before):  # never more: that may not have fitted
            progress.micro_batch_tokens = given
            if before is not None:
                progress.not_bitwise.append(Moved(progress.step, [f"micro_batch_tokens {before} before, {given} now"]))
            return "as training.micro_batch_tokens says"
        if before is not None:
            return "as when the run began"
        found = find_micro_batch_tokens(model, examples, self._experiment, accelerator, planned)
        progress.micro_batch_tokens = found
        if is_sharded(model):
            return "as planned, not tried"
        first = first_try(examples, self._experiment, accelerator.device.type, planned)
        return _what_was_tried(found, first, longest_example(examples))


def token_counts(micro_batches: Sequence[MicroBatch]) -> torch.Tensor:
    """Target tokens, tokens, places including padding, and `order`, summed over the micro-batches. Shape (4,)."""
    return torch.tensor(
        [
            sum(target_count(micro_batch) for micro_batch in micro_batches),
            sum(micro_batch.tokens for micro_batch in micro_batches),
            sum(micro_batch.input_ids.numel() for micro_batch in micro_batches),
            sum(micro_batch.order for micro_batch in micro_batches),
        ]
    )


def _largest(micro_batches: Sequence[MicroBatch]) -> tuple[int, int | None, bool]:
    """Of an update's largest micro-batch the rows, and the tokens (None: padded); and whether there is none smaller.

    Without padding a micro-batch has room for the longest row at least, so one of no more tokens is the smallest.
    """
    rows = max(len(micro_batch.row_ids) for micro_batch in micro_batches)
    segments = [micro_batch.segments for micro_batch in micro_batches if micro_batch.segments is not None]
    if len(segments) < len(micro_batches):
        return rows, None, rows == 1
    tokens = max(micro_batch.tokens for micro_batch in micro_batches)
    return rows, tokens, tokens <= max(map(max, segments))


def _no_room(rows: int, tokens: int | None, error: torch.OutOfMemoryError) -> str:
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


def _what_was_tried(found: int, first: int, longest: int) -> str:
    """How the tokens of a micro-batch were found, in words."""
    if first == longest:
        return "as many as the longest example has, which is not cut; nothing was tried"
    if found == first:
        return "tried with the longest that can come"
    if found == longest:
        return f"as many as the longest example has; up to {first:,} were tried and did not fit"
    return f"tried; {first:,} did not fit"


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
