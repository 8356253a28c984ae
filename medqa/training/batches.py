"""Micro-batches that fit into memory: how the data stream is cut for this process.

Padding-free, an update is cut into as few micro-batches as memory allows. A probe finds this size before the first
update: a full micro-batch goes forward and backward, and if it does not fit, a smaller one is tried. With padding a
micro-batch has `training.per_device_batch_size` examples. In both cases the size is halved when memory runs out later.
"""

import heapq
from collections.abc import Sequence

import numpy as np
import torch
from accelerate import Accelerator

from medqa.config import Experiment
from medqa.data.batches import MicroBatch, Stream, pack
from medqa.data.tokens import Example
from medqa.errors import ProcessStopped, TrainingStopped, is_out_of_memory
from medqa.model.device import available_memory, peak_memory, release, reset_peak
from medqa.model.loss import summed_loss, target_count
from medqa.model.memory import enough_tokens, optimizer_bytes
from medqa.model.settings import Settings
from medqa.model.sharding import is_sharded
from medqa.training.recorder import Recorder
from medqa.training.state import EnvironmentChange, Progress

SHARDED_MARGIN = 0.8  # fraction of the estimated maximum; sharded runs cannot probe memory


class Batches:
    """The stream of training examples, cut into this process's micro-batches of each update.

    Attributes:
        stream: the training examples by position.
        progress: has the number of the next update, and the size of a micro-batch, which `probe` and `halve` change.
    """

    def __init__(
        self, stream: Stream, experiment: Experiment, pad_token_id: int, progress: Progress, accelerator: Accelerator
    ) -> None:
        self.stream, self.progress = stream, progress
        self.pad_token_id, self.accelerator = pad_token_id, accelerator
        self._experiment = experiment

    @property
    def most_tokens(self) -> int:
        """The most slots of a micro-batch in training: tokens including padding."""
        padded = self._experiment.training.per_device_batch_size * self._experiment.tokenization.max_length
        return self.progress.micro_batch_tokens or padded

    def next_update(self) -> list[MicroBatch]:
        """This process's micro-batches of the next update, padded or padding-free."""
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

    def halve(self, micro_batches: Sequence[MicroBatch], error: RuntimeError | MemoryError) -> str:
        """Halve the size of micro-batches from now on, because these ran out of memory.

        It lowers `progress.micro_batch_rows` or `progress.micro_batch_tokens`.

        Returns:
            The message for the console.

        Raises:
            ProcessStopped: there are several processes, and the others do not know that this one ran out of memory.
            TrainingStopped: a single example does not fit.
        """
        progress = self.progress
        rows, tokens, smallest = _largest(micro_batches)
        update = f"update {progress.step + 1}"
        if self.accelerator.num_processes > 1:
            raise ProcessStopped(f"{update}: {_out_of_memory(rows, tokens, error)}") from error
        if smallest:
            raise TrainingStopped(f"{update}: {_out_of_memory(1, tokens, error)}") from error
        if tokens is None:
            progress.micro_batch_rows = -(-rows // 2)
            before, now = f"{rows} rows", str(progress.micro_batch_rows)
        else:
            progress.micro_batch_tokens = -(-tokens // 2)
            before, now = f"{tokens} tokens", str(progress.micro_batch_tokens)
        return (
            f"{update}: out of memory with {before} in a micro-batch; repeating this update with {now}, and using "
            f"{now} from now on"
        )

    def probe(self, model: torch.nn.Module, settings: Settings, recorder: Recorder) -> None:
        """Find the most tokens of a padding-free micro-batch. With padding there is nothing to find.

        A resumed run keeps the size that it began with, or uses a smaller `training.micro_batch_tokens`.

        Args:
            model: the prepared `LossModel`.
        """
        given = self._experiment.training.micro_batch_tokens
        if settings.padding_free:
            how = self._find(model, given, settings.planned_tokens)
            tokens = self.progress.micro_batch_tokens
            recorder.message(f"padding-free micro-batches of at most {tokens:,} tokens: {how}")
        elif given is not None:
            recorder.message(
                "training.micro_batch_tokens has no effect with padding; set training.per_device_batch_size instead"
            )
        recorder.startup.record("probe")

    def _find(self, model: torch.nn.Module, given: int | None, planned: int | None) -> str:
        """Set the most tokens of a micro-batch, and return how that number was found."""
        progress, accelerator, examples = self.progress, self.accelerator, self.stream.examples
        before = progress.micro_batch_tokens
        if before is None:
            progress.micro_batch_multiple = accelerator.num_processes
        if given is not None and (before is None or given < before):  # never more, which may not fit
            progress.micro_batch_tokens = given
            if before is not None:
                changed = f"micro_batch_tokens {before} before, {given} now"
                progress.not_bitwise.append(EnvironmentChange(progress.step, [changed]))
            return "set by training.micro_batch_tokens"
        if before is not None:
            return "the size with which the run began"
        found = find_micro_batch_tokens(model, examples, self._experiment, accelerator, planned)
        progress.micro_batch_tokens = found
        if is_sharded(model):
            return "estimated; sharded runs cannot probe memory"
        first = first_try(examples, self._experiment, accelerator.device.type, planned)
        return _probe_result(found, first, longest_example(examples))


def token_counts(micro_batches: Sequence[MicroBatch]) -> torch.Tensor:
    """Sums over the micro-batches: target tokens, tokens, slots (tokens including padding) and `order`. Shape (4,)."""
    return torch.tensor(
        [
            sum(target_count(micro_batch) for micro_batch in micro_batches),
            sum(micro_batch.tokens for micro_batch in micro_batches),
            sum(micro_batch.input_ids.numel() for micro_batch in micro_batches),
            sum(micro_batch.order for micro_batch in micro_batches),
        ]
    )


def _largest(micro_batches: Sequence[MicroBatch]) -> tuple[int, int | None, bool]:
    """Rows and tokens of an update's largest micro-batch (tokens None: padded), and whether none smaller is possible.

    A padding-free micro-batch must have room for the longest example, so one of no more tokens cannot be made smaller.
    """
    rows = max(len(micro_batch.row_ids) for micro_batch in micro_batches)
    segments = [micro_batch.segments for micro_batch in micro_batches if micro_batch.segments is not None]
    if len(segments) < len(micro_batches):
        return rows, None, rows == 1
    tokens = max(micro_batch.tokens for micro_batch in micro_batches)
    return rows, tokens, tokens <= max(map(max, segments))


def _out_of_memory(rows: int, tokens: int | None, error: RuntimeError | MemoryError) -> str:
    """The message for an update that cannot be repeated in smaller micro-batches: several processes, or a single row.

    Args:
        rows, tokens: of the largest micro-batch; tokens None if it was padded.
    """
    what = str(error).partition("\n")[0] or "out of memory"
    if rows > 1:
        smaller = f"per_device_batch_size={rows // 2}" if tokens is None else f"micro_batch_tokens={tokens // 2}"
        return f"{what}, in one of several processes; start again with --set training.{smaller}"
    padded = "" if tokens is None else "training.padding_free=false with "
    return (
        f"{what}, with a single example in the micro-batch; lower tokenization.max_length, or use "
        f"model.quantization=4bit or {padded}model.gradient_checkpointing=true"
    )


def _probe_result(found: int, first: int, longest: int) -> str:
    """How the probe found the number of tokens, for the console."""
    if first == longest:
        return "equal to the longest example (no probe needed)"
    if found == first:
        return "the largest possible batch fits"
    if found == longest:
        return f"equal to the longest example; larger batches, up to {first:,} tokens, do not fit"
    return f"the largest that fits; {first:,} do not fit"


def find_micro_batch_tokens(
    model: torch.nn.Module,
    examples: Sequence[Example],
    experiment: Experiment,
    accelerator: Accelerator,
    planned: int | None,
) -> int:
    """The most tokens of a micro-batch, the same on all processes. All gradients are None afterwards.

    Args:
        model: the prepared `LossModel`.
        examples: the training examples.
        planned: the estimated maximum. On a CPU no more is tried, because the system kills a process that takes too
            much memory. With sharded weights the number follows from it without a probe, because a process that ran out
            of memory would leave the others waiting for its layers.
    """
    device = accelerator.device
    longest = max(examples, key=lambda example: len(example.input_ids))
    shortest_try = len(longest.input_ids)
    tokens = first_try(examples, experiment, device.type, planned)
    if is_sharded(model):
        assert planned is not None
        return min(tokens, max(int(SHARDED_MARGIN * planned), shortest_try))
    was_training = model.training
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    later = optimizer_bytes(trained, experiment.optimizer)  # allocated in the first optimizer step
    while tokens > shortest_try and (fits := fraction_that_fits(model, full(longest, tokens), accelerator, later)) < 1:
        tokens = max(shortest_try, int(fits * tokens))
    model.train(was_training)
    reset_peak(device)
    found = torch.tensor([tokens], device=device)
    return int(accelerator.gather(found).min()) if accelerator.num_processes > 1 else tokens


def first_try(examples: Sequence[Example], experiment: Experiment, device_type: str, planned: int | None) -> int:
    """Tokens of the first micro-batch to try: the largest possible one, on a CPU no more than planned."""
    tokens = most_in_an_update(examples, experiment.training.global_batch_size)
    if device_type == "cpu" and planned is not None:
        return min(tokens, enough_tokens(experiment, device_type), max(planned, longest_example(examples)))
    return tokens


def longest_example(examples: Sequence[Example]) -> int:
    """Tokens of the longest example, which is the smallest limit for a micro-batch."""
    return max(len(example.input_ids) for example in examples)


def most_in_an_update(examples: Sequence[Example], global_batch_size: int) -> int:
    """The most tokens that an update can have. An update larger than the training split repeats examples."""
    rounds, rest = divmod(global_batch_size, len(examples))
    lengths = [len(example.input_ids) for example in examples]
    return rounds * sum(lengths) + sum(heapq.nlargest(rest, lengths))


def full(longest: Example, tokens: int) -> MicroBatch:
    """A micro-batch of exactly `tokens` tokens, made of repetitions of one example, with all tokens as targets."""
    repetitions, rest = divmod(tokens, len(longest.input_ids))
    last = [Example(longest.row, np.resize(longest.input_ids, rest), 0, True)] if rest else []
    return pack([longest] * repetitions + last, "all")


def fraction_that_fits(model: torch.nn.Module, micro_batch: MicroBatch, accelerator: Accelerator, later: int) -> float:
    """1.0 if a forward and backward pass fits into memory, else the fraction of its tokens to try next.

    Args:
        later: bytes to keep free for allocations that come later.
    """
    device = accelerator.device
    release(device)
    reset_peak(device)
    before, room = peak_memory(device).allocated, available_memory(device, accelerator.num_processes) - later
    fraction = 0.5
    try:
        with accelerator.no_sync(model):
            summed_loss(model, micro_batch, device).backward()
        taken = peak_memory(device).allocated - before
        fraction = 1.0 if taken <= room else max(0.0, 0.9 * room / taken)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # Outside the handler, where the error's traceback no longer keeps the activations alive
    model.zero_grad()
    release(device)
    return fraction
