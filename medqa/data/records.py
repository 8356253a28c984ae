"""One record of a source: its cells as text, and the options of a multiple-choice question among them."""

import ast
import math
import re
import string
import unicodedata
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from medqa.data.readers import Record
from medqa.errors import UserError
from medqa.files import parse_json

REQUIRED = ("question", "answer")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell one; it can be neither written to a file nor tokenized
# What no reader of a text sees: control and format characters (zero-width ones among them), white space, marks without
# a letter; and what counts as a letter or a symbol, yet is drawn as a blank (Hangul's fillers, Braille's, ...).
UNSEEN = {"Cc", "Cf", "Cs", "Zs", "Zl", "Zp", "Mn", "Me"}
BLANKS = "\u115f\u1160\u3164\uffa0\u2800\ufffc\U00013441\U00013442\U0001d159"


def is_seen(text: str) -> bool:
    """Whether a text has anything that a reader sees."""
    return any(unicodedata.category(c) not in UNSEEN and c not in BLANKS for c in text)


@dataclass(frozen=True, slots=True)
class Cells:
    """One record, its cells asked for by the part of a row they make up."""

    columns: Mapping[str, tuple[str, ...]]
    record: Record
    where: str

    def text(self, part: str, numbers: bool = False) -> str:
        """The first text for `part` that shows anything, outer whitespace removed, else ""; UserError if not text.

        `numbers`: whole ones will do, also as floats: pandas makes these of them where one is missing.
        """
        for column in self.columns[part]:
            cell = self.record.get(column)
            if _is_missing(cell):
                continue
            if numbers and (type(cell) is int or (isinstance(cell, float) and cell.is_integer())):
                cell = str(int(cell))
            if not isinstance(cell, str):
                wanted = "neither text nor a whole number" if numbers else "not text"
                how = "mend or remove the record" if part in REQUIRED else "mend the record, or rename the column"
                raise UserError(f"{self.where}, column {column!r}: {cell!r:.60} is {wanted}; {how}")
            if LONE_SURROGATE.search(cell):
                raise UserError(
                    f"{self.where}, column {column!r}: half a character (a lone surrogate); mend the record"
                )
            if is_seen(cell):
                return cell.strip()
        return ""

    def raw(self, part: str) -> object:
        """The first cell for `part` that is not missing, of whatever type."""
        return next((cell for column in self.columns[part] if not _is_missing(cell := self.record.get(column))), None)


def _is_missing(cell: object) -> bool:
    return cell is None or (isinstance(cell, float) and math.isnan(cell))  # pandas writes NaN for a missing text


def shown_options(cells: Cells) -> dict[str, str]:
    """The options of a multiple-choice question by letter. Raises ValueError if they cannot be read.

    They are shown for the kind "mcq" and, in copies that do not tell the kind, wherever there are any.
    """
    options = _options(cells.raw("options")) if cells.text("kind").lower() in ("mcq", "") else []
    lettered = zip(string.ascii_uppercase, options, strict=False)
    # An empty option is not shown, yet keeps its letter: option4 is D in every question.
    return {letter: option for letter, option in lettered if option}


def shown_question(cells: Cells, question: str, options: dict[str, str]) -> str:
    """The question with all that is needed to answer it."""
    if cells.text("kind").lower() == "consumer_queries":
        return f"{cells.text('prompt')}\n{question}".strip()
    return "\n".join([question, *(f"{letter}. {option}" for letter, option in options.items())])


def right_letters(cells: Cells, options: dict[str, str]) -> list[str]:
    """The letters of the right options (`option2`, or several) among those shown; [] where the record does not say."""
    numbers = [int(number) for number in re.findall(r"option(\d{1,2})\b", cells.text("correct").lower())]
    letters = [string.ascii_uppercase[number - 1] for number in numbers if 0 < number <= len(string.ascii_uppercase)]
    return [letter for letter in letters if letter in options]


def _options(cell: object) -> list[str]:
    """The options in their order, an empty one as ""; [] if there are none. Raises ValueError if unreadable."""
    parsed = _parsed(cell) if isinstance(cell, str) else cell
    if _is_missing(parsed):
        return []
    values = list(parsed.values()) if isinstance(parsed, dict) else parsed
    if not isinstance(values, list) or len(values) > len(string.ascii_uppercase):
        raise ValueError("neither a mapping nor a list of up to 26 options")
    return [_option(value) for value in values]


def _parsed(text: str) -> object:
    """JSON or, as some copies have it, a Python literal in single quotes. Raises ValueError for anything else."""
    if text.strip().lower() in ("", "null", "nan", "none"):
        return None
    try:
        return parse_json(text, unique_keys=True, any_number=True)
    except ValueError:
        pass  # not JSON, or a key twice: the Python spelling, in which that is refused as well, is tried next
    try:
        with warnings.catch_warnings(action="ignore", category=SyntaxWarning):  # "\d" in an option is no one's mistake
            literal = ast.parse(text.strip(), mode="eval")
        for found in ast.walk(literal):
            if isinstance(found, ast.Dict) and len({ast.dump(key) for key in found.keys if key}) < len(found.keys):
                raise ValueError("a key stands twice")
        return ast.literal_eval(literal)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError("neither JSON nor a Python literal") from error


def _option(value: object) -> str:
    if _is_missing(value):
        return ""
    if not isinstance(value, str | int | float) or (isinstance(value, str) and LONE_SURROGATE.search(value)):
        raise ValueError(f"an option is {value!r:.60}")
    return str(value).strip() if is_seen(str(value)) else ""
