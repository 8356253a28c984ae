"""The loss of held-out rows, untuned against tuned, with intervals: all rows, by source, and rows apart from training.

A split in which no question or answer of training stands again still asks about the same topics in much the same words:
rows of a topic that training has not seen, and rows with few of their 13-grams in training, are told apart.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medqa.data.sources import Row
from medqa.data.splits import NGRAM
from medqa.evaluation.intervals import difference_figure, mean_figure, perplexity_figure

Tables = Mapping[str, np.ndarray]  # system -> `Evaluator.row_losses` of the same rows


def loss_report(tables: Tables, rows: Sequence[Row], shared: Mapping[str, Mapping[str, bool | None]], seed: int) -> Any:
    """The figures of one split, as `evaluation.json` has them.

    Args:
        tables: by system; of one whose prompt is another (`own_template`), the answer's columns alone count.
        shared: row id to what it shares with training, from `data.splits.shared_with_training`.
    """
    parts = {
        "unseen_topics": [row.topic is not None and shared[row.id]["topic"] is False for row in rows],
        "few_shared_13_grams": [shared[row.id][f"{NGRAM}_grams"] is False for row in rows],
    }
    known = [shared[row.id] for row in rows]
    by_source = {name: [row.source == name for row in rows] for name in sorted({row.source for row in rows})}
    return {
        "shared_with_training": {
            what: sum(row[what] is True for row in known) / max(sum(row[what] is not None for row in known), 1)
            for what in ("question_or_answer", "topic", f"{NGRAM}_grams")
        },
        **_figures(tables, np.ones(len(rows), dtype=bool), seed),
        "sources": {name: _figures(tables, np.array(chosen), seed) for name, chosen in by_source.items()},
        **{name: _figures(tables, np.array(chosen, dtype=bool), seed) for name, chosen in parts.items()},
    }


def _figures(tables: Tables, chosen: np.ndarray, seed: int) -> dict[str, Any]:
    """Of the chosen rows, every system's figures and the difference that tuning made."""
    found: dict[str, Any] = {"rows": int(chosen.sum())}
    if not found["rows"]:
        return found
    for system, table in tables.items():
        losses = {"answer_loss": mean_figure(table[chosen, 2], table[chosen, 3], seed)}
        if system != "own_template":
            losses = {"loss": mean_figure(table[chosen, 0], table[chosen, 1], seed)} | losses
        for name, figure in losses.items():
            if figure is not None:  # rows so long that all of the answer is cut off
                found.setdefault(system, {})[name] = figure
                found[system][name.replace("loss", "perplexity")] = perplexity_figure(figure)
    if {"tuned", "untuned"} <= tables.keys():
        tuned, untuned = tables["tuned"][chosen], tables["untuned"][chosen]
        found["tokens"], found["answer_tokens"] = int(tuned[:, 1].sum()), int(tuned[:, 3].sum())
        differences = {
            name: difference_figure(tuned[:, column], untuned[:, column], tuned[:, column + 1], seed)
            for name, column in (("loss", 0), ("answer_loss", 2))
        }
        found["difference"] = {name: figure for name, figure in differences.items() if figure is not None}
    return found
