"""Measures of generated text: ROUGE, repetition, and a baseline that copies answers from training.

ROUGE against the reference answer measures how similar the words are, not whether an answer is right.
"""

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from medqa.data.sources import Row
from medqa.evaluation.answers import Answer
from medqa.evaluation.statistics import compared, difference_figure, mean_figure

# ----------------------------------------------------------------------------------------------------
# F-scores of ROUGE-1, ROUGE-2 and ROUGE-L (Lin, 2004), by two packages that differ.
#
# `rouge-score` is Google's reimplementation of the original script and the most widely used: lower case, only letters
# and digits, no stemmer (its default, and that of Hugging Face's `evaluate`), ROUGE-L over the entire text. `rouge` is
# what the authors of AfriMed-QA used: words are split at spaces, sets of n-grams instead of counts, ROUGE-L as a union
# over sentences. Its values differ by up to 0.16 and must not be shown beside the others without a label.

TYPES = ("rouge1", "rouge2", "rougeL")
AUTHORS_TYPES = ("rouge-1", "rouge-2", "rouge-l")  # their names in the package `rouge`
DEPTH = 1000  # stack frames for the callers of `rouge` and its other functions


def rouge_scores(answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """F-scores of ROUGE-1, ROUGE-2 and ROUGE-L of each answer against its reference, by `rouge-score`; (answers, 3).

    ROUGE-L uses the package's tokenizer and F-score, but not its dynamic program, which takes minutes for a test set.
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
    """The length of the longest common subsequence; each row of the dynamic program is one integer's bits.

    Hyyro, "Bit-parallel LCS-length computation revisited" (2004): a bit that is 0 is a step in the row.
    """
    masks: dict[str, int] = {}
    for index, word in enumerate(first):
        masks[word] = masks.get(word, 0) | 1 << index
    whole = (1 << len(first)) - 1
    row = whole
    for word in second:
        matches = row & masks.get(word, 0)
        row = (row + matches | row - matches) & whole
    return len(first) - row.bit_count()


def authors_rouge_scores(answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """F-scores by the package `rouge`, called as the authors of AfriMed-QA did, on the unchanged texts; (answers, 3).

    The package refuses a text that is empty or consists of dots; such an answer has 0.
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
    """Raise the recursion limit: `rouge` traces back through two sentences recursively, with one frame per word."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, words + DEPTH))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


# ----------------------------------------------------------------------------------------------------

SYSTEMS = ("untuned", "own_template", "copied", "tuned")
AUTHORS_SOURCE = "afrimedqa"
SAMPLES = 5
LOOP_WORDS, LOOP_TIMES = 4, 3


def loops(text: str) -> bool:
    """Whether a sequence of four or more words occurs three or more times in immediate succession.

    Words are split at spaces; case does not count. A shorter sequence that is repeated over twelve words or more counts
    too: one word twelve times is four words three times.
    """
    numbers: dict[str, int] = {}
    words = np.array([numbers.setdefault(word, len(numbers)) for word in text.casefold().split()])
    for run in range(LOOP_WORDS, len(words) // LOOP_TIMES + 1):
        differs = np.flatnonzero(words[run:] != words[:-run])
        # In a repetition, every word after the first period equals the word `run` positions before.
        ends = np.concatenate([[-1], differs, [len(words) - run]])
        if np.diff(ends).max() - 1 >= run * (LOOP_TIMES - 1):
            return True
    return False


Columns = Mapping[str, np.ndarray]  # a measure to its value for each row


def score_rows(rows: Sequence[Row], answers: Mapping[str, Sequence[Answer]]) -> dict[str, Columns]:
    """The measures of each system's answer to each row.

    Returns:
        By system, the columns, (rows,) each: `rouge1`, `rouge2`, `rougeL`, `authors_rouge1`, ... (NaN for rows of other
        sources than AfriMed-QA), `stops` and `loops` (1.0 or 0.0), `words`.
    """
    return {system: _columns(rows, given) for system, given in answers.items()}


def score_generation(
    rows: Sequence[Row],
    answers: Mapping[str, Sequence[Answer]],
    seed: int,
    columns: Mapping[str, Columns] | None = None,
) -> dict[str, Any]:
    """Compare the systems' answers to `rows` with the references. Each mean or share is a `Figure` of statistics.py.

    Args:
        columns: the result of `score_rows` for the same rows and answers; None: it is computed.

    Returns:
        For each given system `rouge1`, `rouge2`, `rougeL` (F-scores of rouge-score); if there are rows of AfriMed-QA,
        `authors_rouge1`, ... (of the package `rouge`, on those rows); `stops` (share that ended by itself), `loops`
        (share, see `loops`), `length_ratio` (words of all answers over words of all references). `difference`: of each
        pair of `compared`, with `p_value`, for all except the ratio; against `copied` only for ROUGE. `sources`: by
        source and system `rougeL`. `samples`: the first rows with all their answers.
    """
    there = sorted(answers, key=lambda system: SYSTEMS.index(system) if system in SYSTEMS else len(SYSTEMS))
    columns = score_rows(rows, answers) if columns is None else columns
    reference_words = [len(row.answer.split()) for row in rows]
    result: dict[str, Any] = {}
    for system in there:
        figures = {
            name: mean_figure(*_weighted(values), seed) for name, values in columns[system].items() if name != "words"
        }
        figures["length_ratio"] = mean_figure(columns[system]["words"], reference_words, seed)
        result[system] = present(figures)
    result["difference"] = {
        f"{ours} - {theirs}": present(
            {
                name: difference_figure(first, _weighted(columns[theirs][name])[0], weights, seed)
                for name, (first, weights) in {n: _weighted(values) for n, values in columns[ours].items()}.items()
                # A copied answer always stops, and rarely loops.
                if name != "words" and (theirs != "copied" or "rouge" in name)
            }
        )
        for ours, theirs in compared(there)
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
    """The metrics that are not None."""
    return {name: figure for name, figure in figures.items() if figure is not None}


def _columns(rows: Sequence[Row], answers: Sequence[Answer]) -> dict[str, np.ndarray]:
    """The measures of each answer, by name; (rows,) each. The authors' ROUGE is NaN for rows of other sources."""
    texts, references = [answer.text for answer in answers], [row.answer for row in rows]
    columns = dict(zip(TYPES, rouge_scores(texts, references).T, strict=True))
    chosen = [i for i, row in enumerate(rows) if row.source == AUTHORS_SOURCE]
    authors = np.full((len(rows), len(TYPES)), np.nan)
    authors[chosen] = authors_rouge_scores([texts[i] for i in chosen], [references[i] for i in chosen])
    columns |= {f"authors_{name}": values for name, values in zip(TYPES, authors.T, strict=True)}
    columns["stops"] = np.array([answer.stopped for answer in answers], dtype=float)
    columns["loops"] = np.array([loops(text) for text in texts], dtype=float)
    columns["words"] = np.array([len(text.split()) for text in texts], dtype=float)
    return columns


def _weighted(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A column without NaN, and its weights: which rows it is over."""
    return np.nan_to_num(values), np.isfinite(values)


# ----------------------------------------------------------------------------------------------------
# A simple baseline: copy the answer of the most similar training question.

CHUNK = 256  # questions that are compared with all training questions at once: 8 bytes for each pair


def copied_answers(train: Sequence[Row], questions: Sequence[str]) -> list[Answer]:
    """For each question the answer of the nearest training question.

    Nearest by the cosine of TF-IDF vectors with scikit-learn's defaults: words of two or more letters or digits in
    lower case, counts times smoothed inverse document frequency. Of equally near questions the first counts; a question
    that shares no word with training gets the answer of the first row.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer()
    asked = [row.question for row in train]
    if not any(map(vectorizer.build_analyzer(), asked)):
        return [Answer(train[0].answer, True)] * len(questions)  # scikit-learn refuses a vocabulary without words
    known = vectorizer.fit_transform(asked).T.tocsr()  # rows have unit length, so a product is the cosine
    copied = []
    for start in range(0, len(questions), CHUNK):
        cosines = (vectorizer.transform(questions[start : start + CHUNK]) @ known).toarray()
        copied += [Answer(train[nearest].answer, True) for nearest in np.argmax(cosines, axis=1)]
    return copied
