"""A run's data again: its rows, their split and their ids, seen to be those that it was trained on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from medqa.data.sources import Row, load_sources, used_sources
from medqa.data.splits import HELD_OUT, Splits, split_sources
from medqa.data.tokens import Example, tokenize_splits
from medqa.errors import UserError
from medqa.evaluation.loss import fixed_subset
from medqa.results.adapter import Source


@dataclass(frozen=True)
class HeldOut:
    """The splits, and the examples of the held-out ones, all or so many of each."""

    splits: Splits
    examples: Mapping[str, Sequence[Example]]

    def rows(self, split: str) -> Sequence[Row]:
        """The rows of a held-out split that are looked at."""
        return [example.row for example in self.examples[split]]


def load_held_out(source: Source, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> HeldOut:
    """Read the data of a run anew.

    Args:
        limit: so many rows of each held-out split, seeded, in order; None: all.

    Raises:
        UserError: they cannot be read, or are not those that the run was trained on.
    """
    data, tokenization = source.experiment.data, source.experiment.tokenization
    sources = load_sources(data)
    splits = split_sources(sources, data)
    if source.data not in (None, splits.fingerprint):
        where = " and ".join(used_sources(data).values())
        raise UserError(
            f"{source.name}: was trained on other rows, or split otherwise, than {where} hold now: rows held out now "
            "may have been trained on; give the data of then with --medquad, --afrimedqa, --data"
        )
    splits, examples = tokenize_splits(splits, tokenizer, tokenization, HELD_OUT)
    seed = source.experiment.training.seed
    return HeldOut(
        splits, {name: [found[i] for i in fixed_subset(found, limit, seed)] for name, found in examples.items()}
    )
