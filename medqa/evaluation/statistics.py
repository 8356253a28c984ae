"""Bootstrap intervals, paired tests, and the loss by parts of a split. Everything is seeded.

A `Figure` is a metric as `evaluation.json` has it: a dict with `value`, `low` and `high` (the 95 % interval), `rows`
(the number of rows), and for a difference `p_value`. With fewer than two rows there is no interval: `low`, `high` and
`p_value` are None.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from medqa.data.sources import Row
from medqa.data.splits import NGRAM
from medqa.evaluation.loss import perplexity

Values = Sequence[float] | np.ndarray  # one value for each row

Figure = dict[str, Any]
BASELINES = ("untuned", "own_template")  # the systems that are the base model; the verdict is against the better one
RESAMPLES = 2000
SWAPS = 9999  # resamples of a permutation test: the smallest p-value is 2 / (SWAPS + 1)
BATCH = 100  # resamples that are computed at once, to limit memory


def mean_figure(totals: Values, weights: Values | None = None, seed: int = 0) -> Figure | None:
    """The mean over rows, sum(totals) / sum(weights), with its interval; None if the weights are all 0.

    Args:
        totals: for each row a sum, for example of the loss over its tokens.
        weights: for each row the number of summands; None: 1 for each row.

    Percentile bootstrap over rows (Efron and Tibshirani, 1993, chapter 13), with scipy. With under a hundred rows of
    uneven length the interval is slightly too narrow: it contained the mean in 91 of 100 trials.
    """
    sums = np.asarray(totals, dtype=float)
    counts = np.ones_like(sums) if weights is None else np.asarray(weights, dtype=float)
    sums, counts = sums[counts > 0], counts[counts > 0]
    if not len(sums):
        return None
    low, high = _interval((sums, counts), _ratio, seed)
    return {"value": float(sums.sum() / counts.sum()), "low": low, "high": high, "rows": len(sums)}


def difference_figure(ours: Values, theirs: Values, weights: Values | None = None, seed: int = 0) -> Figure | None:
    """The difference (ours minus theirs) of means over the same rows, with its interval and a p-value.

    The p-value is two-sided, from a permutation test that swaps the two values within rows (Good, 2005, section 3.7),
    with
    scipy: it tests this mean, whatever its distribution. None if the weights are all 0.
    """
    first, second = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    counts = np.ones_like(first) if weights is None else np.asarray(weights, dtype=float)
    first, second, counts = first[counts > 0], second[counts > 0], counts[counts > 0]
    if not len(first):
        return None
    value = float((first - second).sum() / counts.sum())
    if len(first) < 2:
        return {"value": value, "low": None, "high": None, "p_value": None, "rows": len(first)}
    low, high = _interval((first - second, counts), _ratio, seed)
    tested = stats.permutation_test(
        (first, second),
        lambda a, b, axis: (a - b).sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=SWAPS,
        batch=BATCH,
        rng=np.random.default_rng(seed),
    )
    return {"value": value, "low": low, "high": high, "p_value": float(min(1.0, tested.pvalue)), "rows": len(first)}


def compared(systems: Iterable[str]) -> list[tuple[str, str]]:
    """The pairs of systems whose difference is measured: the fine-tuned model, and each other system in turn.

    Baselines come first, in the order of `BASELINES`. A pair's key in `evaluation.json` is "tuned - untuned", for
    example.
    """
    there = set(systems)
    return [("tuned", other) for other in (*BASELINES, "copied") if {"tuned", other} <= there]


def perplexity_figure(loss: Figure | None) -> Figure | None:
    """The perplexity of a loss in nats, with its interval."""
    if loss is None:
        return None
    return {key: value if value is None or key == "rows" else perplexity(value) for key, value in loss.items()}


def _ratio(sums: np.ndarray, counts: np.ndarray, axis: int) -> np.ndarray:
    """The ratio of the sums along an axis."""
    return sums.sum(axis=axis) / counts.sum(axis=axis)


def _interval(data: tuple[np.ndarray, ...], statistic: Any, seed: int) -> tuple[float | None, float | None]:
    """The 95 % interval."""
    if len(data[0]) < 2:
        return None, None
    found = stats.bootstrap(
        data,
        statistic,
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=RESAMPLES,
        batch=BATCH,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    low, high = float(found.low), float(found.high)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else (None, None)


# ----------------------------------------------------------------------------------------------------
# The loss of held-out rows, baseline against fine-tuned, with intervals: all rows, by source, and for rows that are far
# from training.
#
# Even a split that shares no question or answer with training asks about the same topics in similar words. So rows of
# topics that are not in training, and rows with few of their 13-grams in training, are also measured separately.

Tables = Mapping[str, np.ndarray]  # system -> `Evaluator.row_losses`, all of the same rows


def loss_report(tables: Tables, rows: Sequence[Row], shared: Mapping[str, Mapping[str, bool | None]], seed: int) -> Any:
    """The metrics of one split, as in `evaluation.json`.

    Args:
        tables: by system. `own_template` has another prompt, so only its answer columns are used. With the two systems
            on unquantized weights the result has `quantization`: the differences of answer losses that show what 4 bits
            cost.
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
        **_between_weights(tables, seed),
        "sources": {name: _figures(tables, np.array(chosen), seed) for name, chosen in by_source.items()},
        **{name: _figures(tables, np.array(chosen, dtype=bool), seed) for name, chosen in parts.items()},
    }


BETWEEN_WEIGHTS = (
    ("tuned", "untuned_unquantized"),  # with the sign changed: what is left of the gain
    ("tuned_unquantized", "untuned_unquantized"),
    ("untuned", "untuned_unquantized"),
    ("tuned", "tuned_unquantized"),
    ("tuned", "own_template_unquantized"),
    ("tuned_unquantized", "own_template_unquantized"),
)
ON_BOTH = ("untuned", "untuned_unquantized", "tuned", "tuned_unquantized")


def _between_weights(tables: Tables, seed: int) -> dict[str, Any]:
    """The differences of answer losses between 4-bit and unquantized weights, paired by rows; empty without both."""
    if not tables.keys() >= set(ON_BOTH):
        return {}
    answers = {system: table[:, 2] for system, table in tables.items()}
    tokens, found = tables["tuned"][:, 3], {}
    for ours, theirs in BETWEEN_WEIGHTS:
        if theirs not in tables:
            continue
        if (figure := difference_figure(answers[ours], answers[theirs], tokens, seed)) is not None:
            found[f"{ours} - {theirs}"] = {"answer_loss": figure}
    return {"quantization": found}


def _figures(tables: Tables, chosen: np.ndarray, seed: int) -> dict[str, Any]:
    """Every system's metrics on the chosen rows, and the differences between fine-tuned model and baselines."""
    found: dict[str, Any] = {"rows": int(chosen.sum())}
    if not found["rows"]:
        return found
    for system, table in tables.items():
        for name, column in _columns(system):
            figure = mean_figure(table[chosen, column], table[chosen, column + 1], seed)
            if figure is not None:  # None if all answers are truncated completely
                found.setdefault(system, {})[name] = figure
                found[system][name.replace("loss", "perplexity")] = perplexity_figure(figure)
    for ours, theirs in compared(tables):
        tuned, other = tables[ours][chosen], tables[theirs][chosen]
        found["tokens"], found["answer_tokens"] = int(tuned[:, 1].sum()), int(tuned[:, 3].sum())
        differences = {
            name: difference_figure(tuned[:, column], other[:, column], tuned[:, column + 1], seed)
            for name, column in _columns(theirs)
        }
        present = {name: figure for name, figure in differences.items() if figure is not None}
        found.setdefault("difference", {})[f"{ours} - {theirs}"] = present
    return found


def _columns(system: str) -> list[tuple[str, int]]:
    """The losses of a system that are shown, each with its column in `Evaluator.row_losses`.

    In the base's own chat template the prompt has other tokens, so a loss over the prompt cannot be compared.
    """
    return [("answer_loss", 2)] if system.startswith("own_template") else [("loss", 0), ("answer_loss", 2)]
