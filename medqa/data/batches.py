"""From rows to an update's micro-batches: ids, the stream of examples, padding.

The stream is an endless sequence of epoch permutations, each a pure function of seed and epoch; update u consumes
positions [u*B, (u+1)*B) of it, B the global batch, straight across epoch ends. Nothing here has a state to save.
"""

import bisect
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from medqa.config import Tokenization
from medqa.data.sources import Row
from medqa.prompts import prompt

CHUNK = 1000  # rows that one call of the tokenizer gets
IGNORED = -100  # a label that is no target, as in torch's cross_entropy


@dataclass(frozen=True, slots=True)
class Example:
    """One row as ids (int32): BOS, prompt, answer, EOS. `answer_start` is the index of the answer's first token."""

    row: Row
    input_ids: np.ndarray
    answer_start: int
    truncated: bool


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward and backward. Tensors are (examples, length), on the CPU; `position` is the first example's."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    position: int
    row_ids: tuple[str, ...]

    @property
    def order(self) -> int:
        """A number that follows from which rows stand at which stream positions, however an update is cut."""
        return sum(stable_hash(self.position + i, row_id) >> 31 for i, row_id in enumerate(self.row_ids))

    @property
    def tokens(self) -> int:
        """Ids that are not padding."""
        return int(self.attention_mask.sum())


def tokenize(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, tokenization: Tokenization) -> list[Example]:
    """Each row as an `Example`.

    BOS and EOS are put in by id: a special token spelled in the text (`</s>` on a web page) stays text, and EOS is
    never cut off by accident nor there twice. A row that does not fit with its EOS is cut and has none.
    """
    chunks = (rows[i : i + CHUNK] for i in range(0, len(rows), CHUNK))
    return [example for chunk in chunks for example in _tokenize(chunk, tokenizer, tokenization)]


def _tokenize(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, tokenization: Tokenization) -> Iterator[Example]:
    """One call of the tokenizer. Offsets take far more memory than ids, so not all rows are in one."""
    prompts = [prompt(row.question) for row in rows]
    encoded = tokenizer(
        [head + row.answer for head, row in zip(prompts, rows, strict=True)],
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,  # its "longer than the maximum" is what max_length is for
    )
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    eos = [tokenizer.eos_token_id] if tokenization.append_eos else []
    for row, head, ids, offsets in zip(rows, prompts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        # A token that began in the prompt and ends in the answer predicts answer text: it counts as answer.
        answer_start = len(bos) + bisect.bisect_right(offsets, len(head), key=itemgetter(1))
        whole = bos + ids + eos
        fits = len(whole) <= tokenization.max_length
        cut = whole if fits else (bos + ids)[: tokenization.max_length]
        yield Example(row, np.array(cut, dtype=np.int32), min(answer_start, len(cut)), not fits)


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


def ids_fingerprint(examples: Mapping[str, Sequence[Example]], tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of all that a tokenizer makes of the data: two tokenizers that give the same ids are the same."""
    digest = hashlib.sha256(repr((len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)).encode())
    for name, split in sorted(examples.items()):
        for example in split:
            digest.update(f"{name} {example.answer_start} {len(example.input_ids)} ".encode())
            digest.update(example.input_ids.astype("<i4").tobytes())
    return digest.hexdigest()


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
