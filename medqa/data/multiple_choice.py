"""AfriMed-QA's multiple-choice questions, to choose in: those that no training row shares a question with.

More than the rows that are trained on: a question needs no rationale to be chosen in.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from medqa.data.records import LONE_SURROGATE, Cells, right_letters, shown_options, shown_question
from medqa.data.sources import COLUMNS, Row, read_source
from medqa.data.splits import letters_and_digits
from medqa.errors import UserError

NAME = "afrimedqa"
SIGNS = "-%/'"


@dataclass(frozen=True, slots=True)
class Question:
    """One multiple-choice question with one right option."""

    id: str  # as that of its row, if it has one: "afrimedqa:<zero-based record>"
    text: str  # as the prompt shows it, the options below it
    options: dict[str, str]  # by letter, at least two, all different
    right: str  # a letter
    specialty: str | None


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """The questions that can be measured, in the source's order, and how many others there are and why."""

    questions: tuple[Question, ...]
    dropped: dict[str, int]


def load_questions(location: str, train: Sequence[Row]) -> QuestionSet:
    """The multiple-choice questions of AfriMed-QA that no training row shares a question with.

    Dropped, and counted by reason: "empty question", "unreadable options", "fewer than two options", "options alike",
    "no right option", "several right options", "shared with training" (a training row has the same question by
    `letters_and_digits`, with its options or, whatever the options, without), "duplicate" (an earlier question is the
    same but for case, white space and punctuation; "blood group A+" and "blood group A-" are two).

    Args:
        location: as of `load_sources`: a path or a hub id.
        train: all rows that are trained on, of every source.

    Raises:
        UserError: it cannot be read.
    """
    trained = {letters_and_digits(row.question) for row in train} | {_without_options(row.question) for row in train}
    questions, seen = [], set()
    dropped: Counter[str] = Counter()
    for number, record in enumerate(read_source(NAME, location).records):
        cells = Cells(COLUMNS[NAME], record, f"{location}, record {number} (the first is 0)")
        found = _question(cells, number)
        if found is None:
            continue
        if isinstance(found, Question):
            names = {letters_and_digits(found.text), _without_options(found.text)}
            if names & trained:
                found = "shared with training"
            elif _with_signs(found.text) in seen:
                found = "duplicate"
        if isinstance(found, str):
            dropped[found] += 1
        else:
            seen.add(_with_signs(found.text))
            questions.append(found)
    return QuestionSet(tuple(questions), dict(dropped))


def _question(cells: Cells, number: int) -> Question | str | None:
    """The question of a record, or the reason why there is none; None for other kinds of records."""
    kind = cells.text("kind").lower()
    try:
        options = shown_options(cells)
    except ValueError:
        return "unreadable options"
    if kind not in ("mcq", "") or not (kind or options):
        return None
    if not cells.text("question"):
        return "empty question"
    if len(options) < 2:
        return "fewer than two options"
    if len(set(options.values())) < len(options):
        return "options alike"
    try:
        right = sorted(set(right_letters(cells, options)))
    except UserError:  # no text
        right = []
    if len(right) != 1:
        return "several right options" if right else "no right option"
    text = shown_question(cells, cells.text("question"), options)
    return Question(f"{NAME}:{number}", text, options, right[0], _specialty(cells))


def _specialty(cells: Cells) -> str | None:
    """What a record says of its specialty; None where that is no text: it decides nothing."""
    found = cells.raw("specialty")
    return found.strip() or None if isinstance(found, str) and not LONE_SURROGATE.search(found) else None


def _without_options(question: str) -> str:
    """A question as it is compared, the lettered options below it cut off."""
    return letters_and_digits(re.split(r"\n[A-Z]\. ", question, maxsplit=1)[0])


def _with_signs(question: str) -> str:
    """A question as it is compared with others that are asked: NFKC, lower case, letters, digits and signs alone.

    Signs are symbols (+, <, =, degrees), and of punctuation what stands in quantities and names of substances.
    """
    text = unicodedata.normalize("NFKC", question).casefold()
    return "".join(c for c in text if c.isalnum() or unicodedata.category(c)[0] in "MS" or c in SIGNS)
