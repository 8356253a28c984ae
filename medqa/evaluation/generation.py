"""How good are the answers: greedy ones to held-out questions, beside the untuned model's and a copied one.

ROUGE against the reference answer says how alike the words are, not whether an answer is right.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medqa.data.sources import Row
from medqa.evaluation.inference import Answer
from medqa.evaluation.intervals import difference_figure, mean_figure
from medqa.evaluation.rouge import TYPES, authors_rouge_scores, rouge_scores

SYSTEMS = ("untuned", "own_template", "copied", "tuned")
COMPARED = (("tuned", "untuned"), ("tuned", "copied"))
AUTHORS_SOURCE = "afrimedqa"
SAMPLES = 5
LOOP_WORDS, LOOP_TIMES = 4, 3


def loops(text: str) -> bool:
    """Whether some run of four or more words stands three or more times in immediate succession.

    Words are what stands between spaces, in any case. A shorter run that goes on for twelve words or more is such a run
    as well: one word twelve times is four words three times.
    """
    numbers: dict[str, int] = {}
    words = np.array([numbers.setdefault(word, len(numbers)) for word in text.casefold().split()])
    for run in range(LOOP_WORDS, len(words) // LOOP_TIMES + 1):
        differs = np.flatnonzero(words[run:] != words[:-run])
        # A run repeated: as many words as all but the first time has are each what stood `run` words before.
        ends = np.concatenate([[-1], differs, [len(words) - run]])
        if np.diff(ends).max() - 1 >= run * (LOOP_TIMES - 1):
            return True
    return False


def score_generation(rows: Sequence[Row], answers: Mapping[str, Sequence[Answer]], seed: int) -> dict[str, Any]:
    """How the systems' answers to `rows` compare with the references. Each mean or share is a figure of intervals.py.

    Returns:
        For each system of `SYSTEMS` that is there `rouge1`, `rouge2`, `rougeL` (F, by rouge-score), where there are
        rows of AfriMed-QA `authors_rouge1`, ... (by the package `rouge`, on those rows), `stops` (share that ended by
        itself), `loops` (share, see `loops`), `length_ratio` (words of all answers over words of all references).
        `difference`: of `tuned - untuned` the same, but for the ratio, with `p_value`, and of `tuned - copied` ROUGE.
        `sources`: of each source and system `rougeL`. `samples`: the first rows with all their answers.
    """
    there = [system for system in SYSTEMS if system in answers]
    columns = {system: _columns(rows, answers[system]) for system in there}
    is_authors = np.array([row.source == AUTHORS_SOURCE for row in rows], dtype=bool)
    reference_words = [len(row.answer.split()) for row in rows]
    result: dict[str, Any] = {}
    for system in there:
        figures = {
            name: mean_figure(values, _weights(name, is_authors), seed) for name, values in columns[system].items()
        }
        words = [len(answer.text.split()) for answer in answers[system]]
        figures["length_ratio"] = mean_figure(words, reference_words, seed)
        result[system] = present(figures)
    result["difference"] = {
        f"{ours} - {theirs}": present(
            {
                name: difference_figure(values, columns[theirs][name], _weights(name, is_authors), seed)
                for name, values in columns[ours].items()
                if theirs != "copied" or "rouge" in name  # a copy always stops, and seldom loops
            }
        )
        for ours, theirs in COMPARED
        if ours in there and theirs in there
    }
    sources = sorted({row.source for row in rows})
    of_source = {source: [row.source == source for row in rows] for source in sources}
    result["sources"] = {
        source: {system: mean_figure(columns[system]["rougeL"], of_source[source], seed) for system in there}
        for source in sources
    }
    result["samples"] = [
        {"id": row.id, "source": row.source, "question": row.question, "reference": row.answer}
        | {system: answers[system][number].text for system in there}
        for number, row in enumerate(rows[:SAMPLES])
    ]
    return result


def present(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Those figures that there are rows for."""
    return {name: figure for name, figure in figures.items() if figure is not None}


def _columns(rows: Sequence[Row], answers: Sequence[Answer]) -> dict[str, np.ndarray]:
    """What is measured of each answer, by name; (rows,) each. The authors' ROUGE is 0 where it is not asked for."""
    texts, references = [answer.text for answer in answers], [row.answer for row in rows]
    columns = dict(zip(TYPES, rouge_scores(texts, references).T, strict=True))
    chosen = [i for i, row in enumerate(rows) if row.source == AUTHORS_SOURCE]
    authors = np.zeros((len(rows), len(TYPES)))
    authors[chosen] = authors_rouge_scores([texts[i] for i in chosen], [references[i] for i in chosen])
    columns |= {f"authors_{name}": values for name, values in zip(TYPES, authors.T, strict=True)}
    columns["stops"] = np.array([answer.stopped for answer in answers], dtype=float)
    columns["loops"] = np.array([loops(text) for text in texts], dtype=float)
    return columns


def _weights(name: str, is_authors: np.ndarray) -> np.ndarray | None:
    """Which rows a column is over."""
    return is_authors if name.startswith("authors_") else None
