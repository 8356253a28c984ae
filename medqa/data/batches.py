"""The training data of a run: splits, examples, the stream of examples, and the micro-batches of an update.

The stream is an endless sequence of epoch permutations, each a pure function of seed and epoch; update u consumes
positions [u*B, (u+1)*B) of it, B the global batch, straight across epoch ends. Nothing here has a state to save.
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

IGNORED = -100  # a label that is no target, as in torch's cross_entropy


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward and backward, on the CPU; `position` is the first example's in the stream.

    Padded: `input_ids`, `attention_mask` and `labels` are (examples, length). Without padding the examples lie end to
    end: `input_ids` and `labels` are (1, tokens), there is no mask, and `segments` has each example's length. A first
    token of an example is never a target there, since it would be predicted from another example's last.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    labels: torch.Tensor
    position: int
    row_ids: tuple[str, ...]
    segments: tuple[int, ...] | None = None

    @property
    def order(self) -> int:
        """A number that follows from which rows stand at which stream positions, however an update is cut."""
        return sum(stable_hash(self.position + i, row_id) >> 31 for i, row_id in enumerate(self.row_ids))

    @property
    def tokens(self) -> int:
        """Ids that are not padding."""
        if self.attention_mask is not None:
            return int(self.attention_mask.sum())
        return self.input_ids.numel() if self.row_ids else 0

    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each token, which example it is of and where in it it stands (from 0), both shaped as `labels`."""
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
    """Examples padded on the right into one micro-batch.

    Labels are masked by place, never by token id: EOS is learned even where it is the pad token too.

    Args:
        loss_on: in place of `tokenization.loss_on`.
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
    """Examples laid end to end into one micro-batch without padding."""
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


def nothing_to_do(example: Example, position: int) -> MicroBatch:
    """A micro-batch without a target, for a process that has none of the update's but must take part."""
    packed = pack([replace(example, input_ids=example.input_ids[:1])], "all", position)
    return MicroBatch(packed.input_ids, None, torch.full_like(packed.labels, IGNORED), position, (), packed.segments)


def divide(lengths: Sequence[int], most_tokens: int, multiple: int = 1) -> list[int]:
    """Where to cut a sequence of examples into as few pieces as possible, about equal, of at most so many tokens.

    Args:
        lengths: tokens of each example, each at most `most_tokens` (a longer one gets a piece of its own).
        multiple: there are at most so many pieces as the next multiple of it, so that none of as many processes idles
            for long; fewer where fewer are as even.

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
    """Where to cut so that each piece takes all it can."""
    cuts, tokens = [0], 0
    for i, length in enumerate(lengths):
        if tokens and tokens + length > most_tokens:
            cuts.append(i)
            tokens = 0
        tokens += length
    return [*cuts, len(lengths)]


@functools.lru_cache(maxsize=4)
def epoch_permutation(seed: int, epoch: int, size: int) -> list[int]:
    """The order of `size` examples in an epoch: a function of seed and epoch alone."""
    generator = torch.Generator().manual_seed(stable_hash(seed, "epoch", epoch))
    return torch.randperm(size, generator=generator).tolist()


def stable_hash(*parts: int | str) -> int:
    """63 bits that follow from the parts alone, on any machine."""
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
        """How many times the training set has been gone through after so many updates."""
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
        """This process's micro-batches of an update (from 0): every `num_processes`-th of the update's.

        The division of an update into micro-batches is the same on any number of processes, and with it the dropout
        noise of each, which follows from its position.

        Args:
            most_rows: cut each into pieces of at most so many examples, where memory has no room for more.
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
        """This process's micro-batches of an update (from 0) without padding: every `num_processes`-th of the update's.

        The division does not depend on the number of processes, nor does the noise, as in `micro_batches`.

        Args:
            most_tokens, multiple: see `divide`.
        """
        first = update * self.global_batch_size
        examples = [self.at(position) for position in range(first, first + self.global_batch_size)]
        cuts = divide([len(example.input_ids) for example in examples], most_tokens, multiple)
        pieces = [pack(examples[start:end], loss_on, first + start) for start, end in pairwise(cuts)]
        pieces += [nothing_to_do(examples[0], first)] * (-len(pieces) % num_processes)  # all have as many
        return pieces[process_index::num_processes]


# ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingData:
    """All that a run reads: its sources, their rows in splits, the rows as examples, and the stream to train on.

    Attributes:
        splits: rows of training, validation and test, without those of whose answer `max_length` leaves nothing.
        examples: the same by the name of the split.
        updates: how many updates the run has in all.
    """

    sources: Sequence[Source]
    splits: Splits
    examples: Mapping[str, Sequence[Example]]
    stream: Stream
    updates: int


def split_and_tokenize(
    sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase, experiment: Experiment
) -> TrainingData:
    """The data of a run, split and tokenized as the experiment says.

    Raises:
        UserError: a split would have no rows.
    """
    splits = split_sources(sources, experiment.data)
    splits, examples = tokenize_splits(splits, tokenizer, experiment.tokenization)
    stream = Stream(examples["train"], experiment.training.seed, experiment.training.global_batch_size)
    return TrainingData(sources, splits, examples, stream, planned_updates(experiment, len(stream.examples)))
