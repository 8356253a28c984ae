"""What `compare.py` gives to every arm alike: a base model of random weights, and rows as long as MedQuAD's."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from benchmarks.gpu_check import MEDQUAD_LENGTHS, SHAPES
from medqa.config import Data, Tokenization
from medqa.data.batches import epoch_permutation
from medqa.data.sources import load_sources
from medqa.data.tokens import tokenize
from medqa.tiny import BASE_DIR

SHARED = Path(__file__).parents[2] / "shared"
MEDQUAD = SHARED / "data" / "medquad.csv"
LLAMA_TOKENIZER = SHARED / "models" / "tinyllama-1.1b-shape"
SPECIAL = 3  # of the Llama 2 vocabulary, and of ours: unknown, BOS and EOS come first
BOS, EOS = 1, 2

# `p`: on 32,000 words the head of so narrow a model would be half of all work, and on TinyLlama it is a sixteenth.
STANDIN_SHAPES: dict[str, dict[str, int]] = {
    "p": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "vocab_size": 4000,
        "max_position_embeddings": 2048,
    },
    "tiny": SHAPES["tiny"],
    "tinyllama": SHAPES["tinyllama"],
}


def shape_of(shape: str) -> dict[str, int]:
    """The sizes of a model: of the stand-in with this name, or of the model in this directory."""
    if shape in STANDIN_SHAPES:
        return STANDIN_SHAPES[shape]
    return json.loads((Path(shape) / "config.json").read_text(encoding="utf-8"))


def make_model(directory: Path, shape: str, dtype: str) -> Path:
    """A directory that any `from_pretrained` reads: the shape's config, random weights, the embedded tokenizer.

    The tokenizer is there because TRL and Trainer ask for one; its vocabulary is smaller than the model's, and no row
    is made with it.
    """
    disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(**STANDIN_SHAPES[shape], bos_token_id=BOS, eos_token_id=EOS)
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(directory)
    return directory


@dataclass(frozen=True)
class Rows:
    """Token ids of rows, and in which order updates take them."""

    ids: list[np.ndarray]
    order: list[int]
    origin: str

    def save(self, path: Path) -> Path:
        """As one file, which `load_rows` reads."""
        lengths = np.array([len(row) for row in self.ids])
        np.savez(path, ids=np.concatenate(self.ids), lengths=lengths, order=np.array(self.order))
        return path

    def in_order(self, count: int) -> list[np.ndarray]:
        """The first `count` of the stream."""
        return [self.ids[i] for i in self.order[:count]]


def make_rows(
    count: int, max_length: int, vocabulary: int, seed: int, medquad: Path | None, model: Path | None = None
) -> Rows:
    """`count` rows, cut to `max_length`, in the order of this project's first epoch.

    From MedQuAD's own rows and the Llama tokenizer where both are at hand; else of random ids, as long as MedQuAD's.

    Args:
        model: the directory of a real model. Its tokenizer makes the ids, which are not changed.
    """
    if medquad is not None and model is not None:
        ids = real_ids(count, max_length, medquad, model)
        return Rows(ids, list(epoch_permutation(seed, 0, len(ids))), f"{medquad.name}, tokenized by {model.name}")
    if medquad is not None and LLAMA_TOKENIZER.is_dir():
        ids, origin = real_ids(count, max_length, medquad), f"{medquad.name}, tokenized by the Llama 2 vocabulary"
    else:
        ids, origin = synthetic_ids(count, max_length), "random ids, lengths log-normal like MedQuAD's"
    folded = [fold(row, vocabulary) for row in ids]
    return Rows(folded, list(epoch_permutation(seed, 0, len(folded))), origin)


def even_rows(count: int, length: int, vocabulary: int) -> Rows:
    """Rows that are all of one length, for what an update costs beside its arithmetic."""
    random = np.random.default_rng(0)
    ids = [random.integers(SPECIAL, vocabulary, length, dtype=np.int32) for _ in range(count)]
    return Rows(ids, list(range(count)), f"random ids, {length} a row")


def real_ids(count: int, max_length: int, medquad: Path, tokenizer_of: Path = LLAMA_TOKENIZER) -> list[np.ndarray]:
    """Of MedQuAD's rows so many, drawn with a fixed seed, as this project tokenizes them."""
    rows = [row for source in load_sources(Data(medquad=str(medquad), afrimedqa="none")) for row in source.rows]
    drawn = np.random.default_rng(0).permutation(len(rows))[:count]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    examples = tokenize([rows[i] for i in drawn], tokenizer, Tokenization(max_length=max_length))
    return [example.input_ids for example in examples]


def synthetic_ids(count: int, max_length: int) -> list[np.ndarray]:
    """Rows of random ids between BOS and EOS."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(*MEDQUAD_LENGTHS, size=count).astype(int), 8, max_length)
    rows = [random.integers(SPECIAL, 32000, length, dtype=np.int32) for length in lengths]
    for row in rows:
        row[0], row[-1] = BOS, EOS
    return rows


def fold(ids: np.ndarray, vocabulary: int) -> np.ndarray:
    """Ids within a smaller vocabulary. Special ones stay, and no other becomes one."""
    folded = SPECIAL + (ids - SPECIAL) % (vocabulary - SPECIAL)
    return np.where(ids < SPECIAL, ids, folded).astype(np.int32)


def useful_share(lengths: Sequence[int], micro_batch: int, padded_to: int | None) -> float:
    """Of the places that padding computes, how many hold a token; padded to the longest where `padded_to` is None."""
    chunks = [lengths[i : i + micro_batch] for i in range(0, len(lengths), micro_batch)]
    return sum(lengths) / sum(len(chunk) * (padded_to or max(chunk)) for chunk in chunks)
