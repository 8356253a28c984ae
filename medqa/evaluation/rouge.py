"""ROUGE-1, ROUGE-2 and ROUGE-L F (Lin, 2004), by two packages that differ.

`rouge-score` is Google's reimplementation of the original script and the field's standard: lower case, letters and
digits only, no stemmer (its own default, and that of Hugging Face's `evaluate`), ROUGE-L over the whole text.
`rouge` is what the authors of AfriMed-QA used: words as they stand between spaces, sets of n-grams in place of counts,
ROUGE-L as a union over sentences. Its figures differ by up to 0.16 and must not stand beside the others unlabelled.
"""

import contextlib
import sys
from collections.abc import Iterator, Sequence

import numpy as np

TYPES = ("rouge1", "rouge2", "rougeL")
AUTHORS_TYPES = ("rouge-1", "rouge-2", "rouge-l")  # the same three in the package `rouge`
DEPTH = 1000  # frames that the callers of `rouge` and its own other functions may need


def rouge_scores(answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """F of ROUGE-1, ROUGE-2 and ROUGE-L of each answer against its reference, by `rouge-score`; (answers, 3).

    For ROUGE-L its words and its F, but not its table of all pairs of words, which takes minutes over a test set.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.scoring import fmeasure
    from rouge_score.tokenizers import DefaultTokenizer

    scorer, tokenizer = RougeScorer(list(TYPES[:2]), use_stemmer=False), DefaultTokenizer(use_stemmer=False)
    table = np.zeros((len(answers), len(TYPES)))
    for line, answer, reference in zip(table, answers, references, strict=True):
        found = scorer.score(target=reference, prediction=answer)
        line[:2] = [found[name].fmeasure for name in TYPES[:2]]
        words, right = tokenizer.tokenize(answer), tokenizer.tokenize(reference)
        if words and right:
            common = common_subsequence(words, right)
            line[2] = fmeasure(common / len(words), common / len(right))
    return table


def common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest common subsequence, a whole row of the table at once as the bits of an integer.

    Hyyro, "Bit-parallel LCS-length computation revisited" (2004): a bit that is 0 is a step of the row.
    """
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    whole = (1 << len(first)) - 1
    row = whole
    for word in second:
        matches = row & places.get(word, 0)
        row = (row + matches | row - matches) & whole
    return len(first) - row.bit_count()


def authors_rouge_scores(answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """The same by `rouge`, as the authors of AfriMed-QA called it: on the texts as they are; (answers, 3).

    It refuses a text that is empty or dots alone: such an answer has 0.
    """
    from rouge import Rouge

    scorer = Rouge(metrics=list(AUTHORS_TYPES), stats=["f"])
    table = np.zeros((len(answers), len(TYPES)))
    for line, answer, reference in zip(table, answers, references, strict=True):
        if answer.strip(".") and reference.strip("."):
            with _room_to_recurse(len(answer.split()) + len(reference.split())):
                found = scorer.get_scores(answer, reference)[0]
            line[:] = [found[name]["f"] for name in AUTHORS_TYPES]
    return table


@contextlib.contextmanager
def _room_to_recurse(words: int) -> Iterator[None]:
    """`rouge` walks back through two sentences by recursion, a frame a word; Python's limit would stop long ones."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, words + DEPTH))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)
