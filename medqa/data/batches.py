"""The training data of a run: splits, examples, the stream of examples, and the micro-batches of an update.

The stream is an endless sequence of epoch permutations, each a pure function of seed and epoch. Update u consumes its
positions [u*B, (u+1)*B), where B is the global batch size, without regard to the ends of epochs. Nothing in this module
has a state that a checkpoint must save.
"""

import bisect
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from transformers import PreTrainedTokenizerBase

from medqa.config import Experiment, Tokenization, planned_updates
from medqa.data.sources import Source
from medqa.data.splits import Splits, split_sources
from medqa.data.tokens import Example, tokenize_splits

IGNORED = -100  # the label of a token that is no target: the default ignore_index of torch's cross_entropy


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The tensors of one forward and backward pass, on the CPU.

    Padded: `input_ids`, `attention_mask` and `labels` have shape (examples, length). Padding-free: the examples are
    concatenated, `input_ids` and `labels` have shape (1, tokens), `attention_mask` is None, and `segments` has the
    length of each example. There the first token of an example is never a target: it would be predicted from the last
    token of another example.

    Attributes:
        position: the stream position of the first example; the dropout mask follows from it.
        row_ids: the ids of the rows, in order; empty for `empty_micro_batch`.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    labels: torch.Tensor
    position: int
    row_ids: tuple[str, ...]
    segments: tuple[int, ...] | None = None

    @property
    def order(self) -> int:
        """Checksum of which rows stand at which stream positions; its sum does not depend on how an update is cut."""
        return sum(stable_hash(self.position + i, row_id) >> 31 for i, row_id in enumerate(self.row_ids))

    @property
    def tokens(self) -> int:
        """The number of tokens, without padding."""
        if self.attention_mask is not None:
            return int(self.attention_mask.sum())
        return self.input_ids.numel() if self.row_ids else 0

    def token_indices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """For each token the index of its example, and its index in that example; both from 0, shaped as `labels`."""
        if self.segments is None:
            example, position = torch.meshgrid(*map(torch.arange, self.labels.shape), indexing="ij")
            return example, position
        lengths = torch.tensor(self.segments)
        example = torch.arange(len(lengths)).repeat_interleave(lengths)
        first = lengths.cumsum(0) - lengths
        return example[None], (torch.arange(len(example)) - first[example])[None]


def collate(
    examples: Sequence[Example],
    tokenization: Tokenization,
    pad_token_id: int,
    position: int = 0,
    loss_on: str | None = None,
) -> MicroBatch:
    """Pad examples on the right into one micro-batch.

    Labels are masked by position, never by token id: EOS is learned even if it is the pad token as well.

    Args:
        loss_on: overrides `tokenization.loss_on`.
    """
    longest = max(len(example.input_ids) for example in examples)
    length = tokenization.max_length if tokenization.padding == "max_length" else longest
    input_ids = torch.full((len(examples), length), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for i, example in enumerate(examples):
        n = len(example.input_ids)
        first_label = example.answer_start if (loss_on or tokenization.loss_on) == "answer" else 0
        input_ids[i, :n] = torch.from_numpy(example.input_ids)
        attention_mask[i, :n] = 1
        labels[i, first_label:n] = input_ids[i, first_label:n]
    return MicroBatch(input_ids, attention_mask, labels, position, tuple(example.row.id for example in examples))


def pack(examples: Sequence[Example], loss_on: str, position: int = 0) -> MicroBatch:
    """Concatenate examples into one padding-free micro-batch."""
    ids = [torch.from_numpy(example.input_ids).long() for example in examples]
    labels = [one.clone() for one in ids]
    for example, label in zip(examples, labels, strict=True):
        label[: max(1, example.answer_start) if loss_on == "answer" else 1] = IGNORED
    return MicroBatch(
        torch.cat(ids)[None],
        None,
        torch.cat(labels)[None],
        position,
        tuple(example.row.id for example in examples),
        tuple(len(one) for one in ids),
    )


def empty_micro_batch(example: Example, position: int) -> MicroBatch:
    """A micro-batch without a target token, for a process with no micro-batch left that must join collective calls."""
    packed = pack([replace(example, input_ids=example.input_ids[:1])], "all", position)
    return MicroBatch(packed.input_ids, None, torch.full_like(packed.labels, IGNORED), position, (), packed.segments)


def divide(lengths: Sequence[int], most_tokens: int, multiple: int = 1) -> list[int]:
    """Cut a sequence of examples into as few pieces of at most `most_tokens` tokens as possible, of about equal size.

    Args:
        lengths: the number of tokens of each example, at most `most_tokens` (a longer one gets a piece of its own).
        multiple: the number of pieces is rounded up to a multiple of this, so that none of as many processes is
            idle for long. There are fewer pieces if more would not make the longest one shorter.

    Returns:
        The first index of each piece, and at the end the number of examples.
    """
    longest = max(lengths)
    most = max(most_tokens, longest)
    pieces = min(-(-(len(_cuts(lengths, most)) - 1) // multiple) * multiple, len(lengths))
    caps = range(longest, most)
    even = bisect.bisect_left(caps, True, key=lambda cap: len(_cuts(lengths, cap)) - 1 <= pieces)
    return _cuts(lengths, longest + even)


def _cuts(lengths: Sequence[int], most_tokens: int) -> list[int]:
    """The cuts if each piece takes as many examples as fit."""
    cuts, tokens = [0], 0
    for i, length in enumerate(lengths):
        if tokens and tokens + length > most_tokens:
            cuts.append(i)
            tokens = 0
        tokens += length
    return [*cuts, len(lengths)]


@functools.lru_cache(maxsize=4)
def epoch_permutation(seed: int, epoch: int, size: int) -> list[int]:
    """The order of `size` examples in an epoch: a pure function of the arguments."""
    generator = torch.Generator().manual_seed(stable_hash(seed, "epoch", epoch))
    return torch.randperm(size, generator=generator).tolist()


def stable_hash(*parts: int | str) -> int:
    """A hash of 63 bits that is the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8]) >> 1


@dataclass(frozen=True, slots=True)
class Stream:
    """The endless stream of training examples."""

    examples: Sequence[Example]
    seed: int
    global_batch_size: int

    def at(self, position: int) -> Example:
        """The example at a stream position (from 0)."""
        epoch, offset = divmod(position, len(self.examples))
        return self.examples[epoch_permutation(self.seed, epoch, len(self.examples))[offset]]

    def epoch(self, updates: int) -> float:
        """The number of epochs, with fraction, that `updates` updates make."""
        return updates * self.global_batch_size / len(self.examples)

    def micro_batches(
        self,
        update: int,
        per_device_batch_size: int,
        tokenization: Tokenization,
        pad_token_id: int,
        process_index: int = 0,
        num_processes: int = 1,
        most_rows: int | None = None,
    ) -> list[MicroBatch]:
        """This process's micro-batches of an update (from 0): every `num_processes`-th micro-batch of the update.

        The division of an update into micro-batches does not depend on the number of processes. So the dropout masks,
        which follow from the positions of the micro-batches, do not depend on it either.

        Args:
            most_rows: the most examples in a micro-batch, if fewer than `per_device_batch_size` fit into memory.
        """
        size = per_device_batch_size
        piece = min(most_rows or size, size)
        return [
            collate([self.at(p) for p in range(at, min(at + piece, start + size))], tokenization, pad_token_id, at)
            for start in self._starts(update, size, process_index, num_processes)
            for at in range(start, start + size, piece)
        ]

    def _starts(self, update: int, size: int, process_index: int, num_processes: int) -> Iterator[int]:
        """Stream positions at which this process's micro-batches of an update begin."""
        first = update * self.global_batch_size
        yield from range(first + process_index * size, first + self.global_batch_size, size * num_processes)

    def packed(
        self,
        update: int,
        loss_on: str,
        most_tokens: int,
        multiple: int = 1,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> list[MicroBatch]:
        """As `micro_batches`, padding-free: this process's micro-batches of an update (from 0).

        The division of an update, and with it the dropout masks, depend on `most_tokens` and `multiple`, not on the
        number of processes. Both are set when the run begins, from its memory and its number of processes.

        Args:
            most_tokens, multiple: see `divide`.
        """
        first = update * self.global_batch_size
        examples = [self.at(position) for position in range(first, first + self.global_batch_size)]
        cuts = divide([len(example.input_ids) for example in examples], most_tokens, multiple)
        pieces = [pack(examples[start:end], loss_on, first + start) for start, end in pairwise(cuts)]
        pieces += [empty_micro_batch(examples[0], first)] * (-len(pieces) % num_processes)  # as many on every process
        return pieces[process_index::num_processes]


# ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingData:
    """The data of a run: sources, rows by split, examples by split, and the stream of training examples.

    Attributes:
        splits: the rows of training, validation and test, without rows whose answer `max_length` cuts off entirely.
        examples: the tokenized rows by the name of their split.
        updates: the number of updates of the whole run.
    """

    sources: Sequence[Source]
    splits: Splits
    examples: Mapping[str, Sequence[Example]]
    stream: Stream
    updates: int


def split_and_tokenize(
    sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase, experiment: Experiment
) -> TrainingData:
    """Split and tokenize the sources as the experiment says.

    Raises:
        UserError: a split would have no rows.
    """
    splits = split_sources(sources, experiment.data)
    splits, examples = tokenize_splits(splits, tokenizer, experiment.tokenization)
    stream = Stream(examples["train"], experiment.training.seed, experiment.training.global_batch_size)
    return TrainingData(sources, splits, examples, stream, planned_updates(experiment, len(stream.examples)))
