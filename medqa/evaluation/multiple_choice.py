"""Multiple-choice questions of AfriMed-QA, scored by log-likelihood and by the letter that an answer names.

The scores are those of EleutherAI's lm-evaluation-harness for the same questions and prompt: its `acc` and `acc_bytes`,
with an empty target delimiter, because an answer follows the training prompt directly.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from medqa.data.sources import (
    COLUMNS,
    LONE_SURROGATE,
    Cells,
    Row,
    read_source,
    right_letters,
    shown_options,
    shown_question,
)
from medqa.data.splits import letters_and_digits
from medqa.data.tokens import Example, prompt_of
from medqa.errors import UserError
from medqa.evaluation.answers import OwnTemplate, generate_answers
from medqa.evaluation.loss import COLUMNS as LOSS_COLUMNS
from medqa.evaluation.loss import Evaluator
from medqa.evaluation.statistics import compared, difference_figure, mean_figure

# ----------------------------------------------------------------------------------------------------
# The multiple-choice questions of AfriMed-QA whose question is in no training row.
#
# They are more than the rows of the dataset, because a question without a rationale can be used too.

NAME = "afrimedqa"
SIGNS = "-%/'"


@dataclass(frozen=True, slots=True)
class Question:
    """A multiple-choice question with one correct option."""

    id: str  # the id of its row, if there is one: "afrimedqa:<zero-based record>"
    text: str  # the question with its options, as the prompt shows it
    options: dict[str, str]  # by letter; at least two, all different
    right: str  # the letter of the correct option
    specialty: str | None


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """The usable questions in the order of the source, and the numbers of dropped records by reason."""

    questions: tuple[Question, ...]
    dropped: dict[str, int]


def load_questions(location: str, train: Sequence[Row]) -> QuestionSet:
    """Read the multiple-choice questions of AfriMed-QA whose question is in no training row.

    Records are dropped, and counted by reason: "empty question", "unreadable options", "fewer than two options",
    "options alike", "no right option", "several right options", "shared with training" (a training row has the same
    question by `letters_and_digits`, with its options, or without any), "duplicate" (an earlier question is the same
    except for case, whitespace and punctuation; "blood group A+" and "blood group A-" are different).

    Args:
        location: a path or a hub id, as for `load_sources`.
        train: all training rows, of every source.

    Raises:
        UserError: the source cannot be read.
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
    """The question of a record, or the reason why it is dropped; None for other types of records."""
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
    except UserError:  # not text
        right = []
    if len(right) != 1:
        return "several right options" if right else "no right option"
    text = shown_question(cells, cells.text("question"), options)
    return Question(f"{NAME}:{number}", text, options, right[0], _specialty(cells))


def _specialty(cells: Cells) -> str | None:
    """The specialty of a record; None if it is not text, because nothing depends on it."""
    found = cells.raw("specialty")
    return found.strip() or None if isinstance(found, str) and not LONE_SURROGATE.search(found) else None


def _without_options(question: str) -> str:
    """A question for comparisons, without the options below it."""
    return letters_and_digits(re.split(r"\n[A-Z]\. ", question, maxsplit=1)[0])


def _with_signs(question: str) -> str:
    """A question for comparisons: NFKC, lower case, only letters, digits and signs.

    Signs are symbols (+, <, =, degrees), and the punctuation that occurs in quantities and names of substances.
    """
    text = unicodedata.normalize("NFKC", question).casefold()
    return "".join(c for c in text if c.isalnum() or unicodedata.category(c)[0] in "MS" or c in SIGNS)


# ----------------------------------------------------------------------------------------------------

AT_ONCE = 64  # questions between two progress reports
LETTER_TOKENS = 16  # enough for "The correct answer is option B."
METRICS = ("accuracy", "accuracy_per_byte", "letter")
# A single letter names an option only if it cannot be a word: "A patient with" begins with an article.
LETTER = re.compile(
    r"(?:\b(?:answer|option|choice)\b(?:\s+is)?(?:\s+option)?[\s:*(\"']*|^[\s*(\"']*)"
    r"(?P<letter>[A-Z])(?=[\s*\"']*(?:[.,:;)\n]|$)|\s+(?:is|because)\b)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Choices:
    """The results of one system for the questions.

    Attributes:
        log_likelihoods: the summed log-likelihood of each option in nats, NaN where a question has fewer options;
            (questions, most options), float64.
        letters: the letter that the greedy answer names, or an empty string; (questions,), str.
    """

    log_likelihoods: np.ndarray
    letters: np.ndarray


def option_examples(
    question: Question, tokenizer: PreTrainedTokenizerBase, template: OwnTemplate | None = None
) -> list[Example]:
    """Each option as the answer to the question, with the ids of lm-evaluation-harness 0.4 (`_encode_pair`).

    Whitespace at the end of the prompt belongs to the continuation. Prompt and continuation are tokenized together, and
    the continuation begins after as many tokens as the prompt alone has.

    Args:
        template: the base's own chat template, as the harness uses it with `--apply_chat_template`; None: the training
            prompt.
    """
    own = prompt_of(tokenizer)
    if template is None:
        bos, whole, encode = list(own.bos), own.aliased(question.text), own.encode
    else:
        bos, whole, encode = [], template.texts[question.text], template.encode
    context, options = whole.rstrip(), list(question.options.values())
    first, *rest = encode([context, *(whole + option for option in options)])
    return [
        Example(
            Row(question.id, NAME, question.text, option, None),
            np.array(bos + ids, dtype=np.int32),
            len(bos) + len(first),
            False,
        )
        for option, ids in zip(options, rest, strict=True)
    ]


def fitting(
    found: QuestionSet, tokenizer: PreTrainedTokenizerBase, longest: int | None, template: OwnTemplate | None = None
) -> QuestionSet:
    """The questions that fit into the model's context of `longest` tokens with each option and with a letter.

    The others are counted as "longer than the context", because they would have to be truncated. With `template` they
    have to fit in the base's own chat template too, so that every system answers the same questions.
    """
    if longest is None:
        return found
    kept = []
    for question in found.questions:
        asked = [option_examples(question, tokenizer)]
        if template is not None:
            asked.append(option_examples(question, tokenizer, template))
        needed = [len(example.input_ids) for options in asked for example in options]
        needed += [options[0].answer_start + LETTER_TOKENS + 1 for options in asked]
        if max(needed) <= longest:
            kept.append(question)
    dropped = dict(found.dropped)
    if len(kept) < len(found.questions):
        dropped["longer than the context"] = len(found.questions) - len(kept)
    return QuestionSet(tuple(kept), dropped)


def measure(
    evaluator: Evaluator,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    batch_size: int,
    template: OwnTemplate | None = None,
    progress: Callable[[int], None] | None = None,
) -> Choices:
    """Measure the model on the questions.

    Args:
        evaluator: measures losses of `model`; its batch size has no influence.
        questions: questions that fit into the model's context (`fitting`).
        batch_size: the number of answers that are generated at once.
        template: asks in the base's own chat template; None: in the training prompt.
        progress: called with the number of further questions for which one of the two parts is done.
    """
    width = max((len(question.options) for question in questions), default=0)
    likelihoods = np.full((len(questions), width), np.nan)
    for start in range(0, len(questions), AT_ONCE):
        chosen = questions[start : start + AT_ONCE]
        examples = [option_examples(question, tokenizer, template) for question in chosen]
        table = evaluator.row_losses([example for options in examples for example in options])
        losses = iter(table[:, LOSS_COLUMNS.index("answer_loss")])
        for number, options in enumerate(examples, start):
            likelihoods[number, : len(options)] = [-next(losses) for _ in options]
        if progress:
            progress(len(chosen))
    answers = generate_answers(
        model,
        tokenizer,
        [question.text for question in questions],
        max_new_tokens=LETTER_TOKENS,
        batch_size=batch_size,
        prompts=template,
        progress=progress,
    )
    letters = [named_letter(a.text, q.options) or "" for a, q in zip(answers, questions, strict=True)]
    return Choices(likelihoods, np.array(letters, dtype="U1"))


def named_letter(answer: str, options: Mapping[str, str]) -> str | None:
    """The first letter of an option that the answer names ("B.", "(b) Malaria", "The answer is B"); None if none."""
    found = (match["letter"].upper() for match in LETTER.finditer(answer))
    return next((letter for letter in found if letter in options), None)


def score(questions: Sequence[Question], results: Mapping[str, Choices], seed: int) -> dict[str, Any]:
    """How often each system chooses the correct option. Each share is a `Figure` of statistics.py.

    Returns:
        `rows`; `chance`, the expected accuracy of guessing (the mean of one over the number of options); for each
        system `accuracy` (by summed log-likelihood), `accuracy_per_byte` (by log-likelihood over the option's bytes in
        UTF-8), `letter` (by the named letter; naming none is wrong) and `no_letter` (share that names none);
        `difference`: of each pair of `compared`, with `p_value`; `specialties`: for each, if the source has
        them, `rows`, `chance`, and of each system `accuracy` and `accuracy_per_byte`. Without questions only `rows`.
    """
    if not questions:
        return {"rows": 0}
    columns = {system: _right(questions, choices) for system, choices in results.items()}
    chances = np.array([1 / len(question.options) for question in questions])
    result: dict[str, Any] = {"rows": len(questions), "chance": float(chances.mean())}
    for system, right in columns.items():
        result[system] = {name: mean_figure(right[name], None, seed) for name in METRICS}
        result[system]["no_letter"] = mean_figure(results[system].letters == "", None, seed)
    for ours, theirs in compared(columns):
        figures = {name: difference_figure(columns[ours][name], columns[theirs][name], None, seed) for name in METRICS}
        result.setdefault("difference", {})[f"{ours} - {theirs}"] = figures
    result["specialties"] = {}
    for specialty in sorted({question.specialty for question in questions if question.specialty}):
        chosen = np.array([question.specialty == specialty for question in questions])
        result["specialties"][specialty] = {"rows": int(chosen.sum()), "chance": float(chances[chosen].mean())} | {
            system: {name: mean_figure(right[name], chosen, seed) for name in METRICS[:2]}
            for system, right in columns.items()
        }
    return result


def _right(questions: Sequence[Question], choices: Choices) -> dict[str, np.ndarray]:
    """Whether each question was answered correctly, by metric; (questions,) of 0.0 and 1.0 each."""
    right = {name: np.zeros(len(questions)) for name in METRICS}
    for number, question in enumerate(questions):
        letters = list(question.options)
        sums = choices.log_likelihoods[number, : len(letters)]
        lengths = np.array([len(option.encode()) for option in question.options.values()])
        right["accuracy"][number] = letters[np.argmax(sums)] == question.right
        right["accuracy_per_byte"][number] = letters[np.argmax(sums / lengths)] == question.right
        right["letter"][number] = choices.letters[number] == question.right
    return right
