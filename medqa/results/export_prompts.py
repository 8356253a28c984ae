"""Prompts that a run never trained on, to measure an export with."""

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from medqa.config import Data
from medqa.data.batches import epoch_permutation
from medqa.data.sources import Row, load_sources
from medqa.data.splits import Splits, split_sources
from medqa.errors import UserError
from medqa.prompts import prompt_ids
from medqa.results.adapter import Source
from medqa.tiny import AFRIMEDQA_CSV, MEDQUAD_CSV

PROMPTS = 16
LONGEST = 256  # tokens of a prompt: what is measured is the weights, and long prompts cost time


@dataclass(frozen=True)
class HeldOutPrompts:
    """Questions, the ids of their prompts, and where they are from."""

    questions: list[str]
    ids: list[list[int]]
    where_from: str


def held_out_prompts(source: Source, tokenizer: PreTrainedTokenizerBase, room: int) -> HeldOutPrompts:
    """Some of the run's test questions.

    Where its data cannot be had or are others than it was trained on, and for an adapter without a run, they are the
    embedded sample's: of other data nobody knows which rows it was trained on.

    Args:
        room: tokens that a prompt may have at most.

    Raises:
        UserError: the base takes too few tokens for any of them.
    """
    why = ""
    if source.run is not None:
        why = " (the run's data cannot be had, or have changed)"
        with contextlib.suppress(UserError):
            splits = _splits(source.experiment.data)
            if source.data in (None, splits.fingerprint) and (found := _chosen(splits.test, tokenizer, room)):
                return HeldOutPrompts(*found, "the run's test questions")
    sample = Data(medquad=str(MEDQUAD_CSV), afrimedqa=str(AFRIMEDQA_CSV))
    if found := _chosen(_splits(sample).test, tokenizer, room):
        return HeldOutPrompts(*found, f"the embedded sample's test questions{why}")
    raise UserError(f"{source.name}: its base takes {room} tokens beside an answer: too few for any question")


def _splits(data: Data) -> Splits:
    """The rows of these sources, split."""
    return split_sources(load_sources(data), data)


def _chosen(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, room: int
) -> tuple[list[str], list[list[int]]] | None:
    """Questions and prompts of a seeded choice of rows; None if none fits."""
    questions = (rows[i].question for i in epoch_permutation(0, 0, len(rows)))
    pairs = ((question, prompt_ids(question, tokenizer)) for question in questions)
    found = list(itertools.islice((pair for pair in pairs if len(pair[1]) <= min(room, LONGEST)), PROMPTS))
    return ([question for question, _ in found], [ids for _, ids in found]) if found else None
