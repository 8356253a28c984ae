"""ROUGE by both packages: small cases by hand, the published ones exactly."""

import csv
import itertools
import random
import sys
from pathlib import Path

import pytest
from rouge_score.rouge_scorer import RougeScorer

from medqa.evaluation.text import TYPES, authors_rouge_scores, common_subsequence, rouge_scores

PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "published_rouge.csv"
# Answer, reference, F of ROUGE-1, -2, -L by rouge-score, and by rouge: which tells "the" and "The" apart.
BY_HAND = [
    ("the fever is high", "The fever was very high.", (2 / 3, 2 / 7, 2 / 3), (4 / 9, 0, 4 / 9)),
    ("The fever is high", "The fever was very high.", (2 / 3, 2 / 7, 2 / 3), (2 / 3, 2 / 7, 2 / 3)),
    ("pain pain pain", "pain", (1 / 2, 0, 1 / 2), (1, 0, 1)),  # counts, and sets
    ("high fever", "fever, high", (1, 0, 1 / 2), (1 / 2, 0, 1 / 2)),
    ("Drink water.", "Drink water.", (1, 1, 1), (1, 1, 1)),
    ("allergies", "allergy", (0, 0, 0), (0, 0, 0)),  # no stemmer: it would make them one word
    # A sentence's common subsequence is found in each sentence of the other: order between sentences is free.
    ("Take rest. Drink water.", "Drink water. Take rest.", (1, 2 / 3, 1 / 2), (1, 2 / 3, 1)),
    ("", "Drink water.", (0, 0, 0), (0, 0, 0)),
    ("...", "Drink water.", (0, 0, 0), (0, 0, 0)),
    ("Drink water.", "", (0, 0, 0), (0, 0, 0)),
]


@pytest.mark.parametrize("answer, reference, standard, authors", BY_HAND)
def test_by_hand(answer, reference, standard, authors):
    assert rouge_scores([answer], [reference])[0] == pytest.approx(standard, abs=1e-12)
    assert authors_rouge_scores([answer], [reference])[0] == pytest.approx(authors, abs=2e-8)  # it adds 1e-8


def test_no_answers():
    assert rouge_scores([], []).shape == authors_rouge_scores([], []).shape == (0, 3)


def test_a_long_sentence_does_not_end_the_run():
    words = [f"word{number}" for number in range(700)]
    limit = sys.getrecursionlimit()
    found = authors_rouge_scores([" ".join(words)], [" ".join(words[::2] + ["other"] * 350)])
    assert found[0, 0] == pytest.approx(2 * 350 / (700 + 351), abs=1e-7)
    assert sys.getrecursionlimit() == limit


def test_the_common_subsequence_is_the_one_of_the_table():
    for first, second in itertools.product(map("".join, itertools.product("ab", repeat=4)), ("abba", "b", "", "babab")):
        assert common_subsequence(first, second) == by_table(first, second)


def by_table(first: str, second: str) -> int:
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, j in itertools.product(range(1, len(first) + 1), range(1, len(second) + 1)):
        same = first[i - 1] == second[j - 1]
        table[i][j] = table[i - 1][j - 1] + 1 if same else max(table[i - 1][j], table[i][j - 1])
    return table[-1][-1]


def test_the_standard_is_the_package_itself():
    generator = random.Random(0)
    texts = [
        " ".join(generator.choices(["The", "the", "pain,", "fever.", "is", "5", "mg/kg", "severe-pain", "Ärzte"], k=90))
        for _ in range(40)
    ]
    scorer = RougeScorer(list(TYPES))  # as it is by default
    ours = rouge_scores(texts[:20], texts[20:])
    for line, answer, reference in zip(ours, texts[:20], texts[20:], strict=True):
        found = scorer.score(target=reference, prediction=answer)
        assert line.tolist() == [found[name].fmeasure for name in TYPES]


@pytest.mark.skipif(not PUBLISHED.exists(), reason=f"no {PUBLISHED}")
def test_the_authors_figures_are_reproduced():
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 50
    answers, references = [row["prediction"] for row in rows], [row["reference"] for row in rows]
    published = [[float(row[name]) for name in ("rouge1_f", "rouge2_f", "rougeL_f")] for row in rows]
    assert authors_rouge_scores(answers, references).tolist() == published
    standard = rouge_scores(answers, references)
    assert abs(standard - published).max() > 0.1  # why the two are told apart
