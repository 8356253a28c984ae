"""From rows to token ids. Special tokens are put in by id, and an answer's first token is found by its place."""

import bisect
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
from transformers import PreTrainedTokenizerBase

from medqa.config import Tokenization
from medqa.data.sources import Row
from medqa.prompts import prompt

CHUNK = 1000  # rows that one call of the tokenizer gets


@dataclass(frozen=True, slots=True)
class Example:
    """One row as ids (int32): BOS, prompt, answer, EOS. `answer_start` is the index of the answer's first token."""

    row: Row
    input_ids: np.ndarray
    answer_start: int
    truncated: bool


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


def ids_fingerprint(examples: Mapping[str, Sequence[Example]], tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of all that a tokenizer makes of the data: two tokenizers that give the same ids are the same."""
    digest = hashlib.sha256(repr((len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)).encode())
    for name, split in sorted(examples.items()):
        for example in split:
            digest.update(f"{name} {example.answer_start} {len(example.input_ids)} ".encode())
            digest.update(example.input_ids.astype("<i4").tobytes())
    return digest.hexdigest()
