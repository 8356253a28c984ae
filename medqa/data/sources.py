"""Turn records into rows: the two public datasets and user data. Unusable records are dropped and counted."""

import ast
import math
import os
import re
import string
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from medqa.config import PUBLIC, Data
from medqa.data.readers import (
    OTHER_SEPARATORS,
    Record,
    Table,
    read_file,
    read_hub,
    read_kaggle,
    read_medquad_xml,
    with_value,
)
from medqa.errors import UserError
from medqa.files import parse_json
from medqa.terminal import without_credentials

# ----------------------------------------------------------------------------------------------------
# One record of a source: its cells as text, and the options of a multiple-choice question.

REQUIRED = ("question", "answer")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # possible in JSON, but cannot be written to a file or tokenized
# Invisible characters: control and format characters (zero-width characters among them), whitespace, marks without a
# letter, and letters and symbols that are drawn as a blank (Hangul fillers, Braille blank, ...).
UNSEEN = {"Cc", "Cf", "Cs", "Zs", "Zl", "Zp", "Mn", "Me"}
BLANKS = "\u115f\u1160\u3164\uffa0\u2800\ufffc\U00013441\U00013442\U0001d159"


def is_seen(text: str) -> bool:
    """Whether a text has a visible character."""
    return any(unicodedata.category(c) not in UNSEEN and c not in BLANKS for c in text)


@dataclass(frozen=True, slots=True)
class Cells:
    """One record; its cells are found by the part of a row (question, answer, ...) that they are for."""

    columns: Mapping[str, tuple[str, ...]]
    record: Record
    where: str

    def text(self, part: str, numbers: bool = False) -> str:
        """The first visible text for `part`, stripped, or an empty string; UserError if a cell is not text.

        `numbers`: accept integers, also as floats, because pandas converts a column of integers with a missing value.
        """
        for column in self.columns[part]:
            cell = self.record.get(column)
            if _is_missing(cell):
                continue
            if numbers and (type(cell) is int or (isinstance(cell, float) and cell.is_integer())):
                cell = str(int(cell))
            if not isinstance(cell, str):
                wanted = "neither text nor an integer" if numbers else "not text"
                how = "correct or remove the record" if part in REQUIRED else "correct the record, or rename the column"
                raise UserError(f"{self.where}, column {column!r}: {cell!r:.60} is {wanted}; {how}")
            if LONE_SURROGATE.search(cell):
                raise UserError(
                    f"{self.where}, column {column!r}: contains half a character (a lone surrogate); correct the record"
                )
            if is_seen(cell):
                return cell.strip()
        return ""

    def raw(self, part: str) -> object:
        """The first cell for `part` that is not missing, of any type."""
        return next((cell for column in self.columns[part] if not _is_missing(cell := self.record.get(column))), None)


def _is_missing(cell: object) -> bool:
    return cell is None or (isinstance(cell, float) and math.isnan(cell))  # pandas' NaN for a missing text


def shown_options(cells: Cells) -> dict[str, str]:
    """The options of a multiple-choice question by letter. Raises ValueError if they cannot be read.

    They are used for the type "mcq" and, in copies without a question type, wherever there are options.
    """
    options = _options(cells.raw("options")) if cells.text("kind").lower() in ("mcq", "") else []
    lettered = zip(string.ascii_uppercase, options, strict=False)
    # An empty option is not shown but keeps its letter: option4 is D in every question.
    return {letter: option for letter, option in lettered if option}


def shown_question(cells: Cells, question: str, options: dict[str, str]) -> str:
    """The question with everything that is needed to answer it."""
    if cells.text("kind").lower() == "consumer_queries":
        return f"{cells.text('prompt')}\n{question}".strip()
    return "\n".join([question, *(f"{letter}. {option}" for letter, option in options.items())])


def right_letters(cells: Cells, options: dict[str, str]) -> list[str]:
    """The letters of the correct options (`option2`, or several) that are shown; empty if the record has none."""
    numbers = [int(number) for number in re.findall(r"option(\d{1,2})\b", cells.text("correct").lower())]
    letters = [string.ascii_uppercase[number - 1] for number in numbers if 0 < number <= len(string.ascii_uppercase)]
    return [letter for letter in letters if letter in options]


def _options(cell: object) -> list[str]:
    """The options in order, an empty one as an empty string; an empty list if there are none. May raise ValueError."""
    parsed = _parsed(cell) if isinstance(cell, str) else cell
    if _is_missing(parsed):
        return []
    values = list(parsed.values()) if isinstance(parsed, dict) else parsed
    if not isinstance(values, list) or len(values) > len(string.ascii_uppercase):
        raise ValueError("neither a mapping nor a list of up to 26 options")
    return [_option(value) for value in values]


def _parsed(text: str) -> object:
    """Parse JSON or, as in some copies, a Python literal in single quotes. Raises ValueError for anything else."""
    if text.strip().lower() in ("", "null", "nan", "none"):
        return None
    try:
        return parse_json(text, unique_keys=True, any_number=True)
    except ValueError:
        pass  # not JSON, or a repeated key: try a Python literal, where a repeated key is refused too
    try:
        with warnings.catch_warnings(action="ignore", category=SyntaxWarning):  # "\d" in an option is not a mistake
            literal = ast.parse(text.strip(), mode="eval")
        for found in ast.walk(literal):
            if isinstance(found, ast.Dict) and len({ast.dump(key) for key in found.keys if key}) < len(found.keys):
                raise ValueError("a key is repeated")
        return ast.literal_eval(literal)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError("neither JSON nor a Python literal") from error


def _option(value: object) -> str:
    if _is_missing(value):
        return ""
    if not isinstance(value, str | int | float) or (isinstance(value, str) and LONE_SURROGATE.search(value)):
        raise ValueError(f"an option is {value!r:.60}")
    return str(value).strip() if is_seen(str(value)) else ""


# ----------------------------------------------------------------------------------------------------

NONE = "none"
KAGGLE = "kaggle:"
SUFFIXES = (".csv", ".parquet", ".jsonl")
# File suffixes. No hub id is assumed to end with one.
FILE_SUFFIXES = (
    *SUFFIXES, ".7z", ".arrow", ".bz2", ".db", ".doc", ".docx", ".feather", ".gz", ".htm", ".html", ".json", ".md",
    ".ndjson", ".ods", ".pdf", ".pickle", ".pkl", ".rar", ".sqlite", ".tab", ".tar", ".tgz", ".tsv", ".txt", ".xls",
    ".xlsx", ".xml", ".xz", ".yaml", ".yml", ".zip", ".zst",
)  # fmt: skip
WEB_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
HUB_ADDRESS = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/datasets/([^/?#]+/[^/?#]+)/?$")
SHOWN_COLUMNS = 20

# Column names, in lower case, for each part of a row, in the copies in circulation. The first non-empty cell counts.
COLUMNS: dict[str, dict[str, tuple[str, ...]]] = {
    "medquad": {
        "question": ("question",),
        "answer": ("answer",),
        "topic": ("focus_area", "focus", "question_focus"),
    },
    "afrimedqa": {
        "question": ("question_clean", "question"),
        "answer": ("answer_rationale", "rationale"),
        "kind": ("question_type",),
        "options": ("answer_options",),
        "correct": ("correct_answer",),
        "prompt": ("prompt",),
        "specialty": ("specialty",),
    },
}
OWN_COLUMNS: dict[str, tuple[str, ...]] = {
    "question": ("question",),
    "answer": ("answer",),
    "group": ("group",),
    "topic": ("topic", "focus_area"),
}


@dataclass(frozen=True, slots=True)
class Row:
    """A question with its answer, as the prompt shows them."""

    id: str  # "<source>:<zero-based record in the source>"; all records are counted, also dropped ones
    source: str
    question: str  # for multiple choice with the options below it; a consumer query with its prompt before it
    answer: str
    topic: str | None  # MedQuAD's focus area; AfriMed-QA has none
    group: str | None = None  # of user data: rows of one source with the same group stay in one split


@dataclass(frozen=True, slots=True)
class Source:
    """The rows of one source in order, the number of records read, and the numbers of dropped records by reason."""

    name: str
    location: str  # a path, a hub id ("owner/name", "owner/name:config"), or "kaggle:" and a Kaggle handle
    rows: tuple[Row, ...]
    read: int
    dropped: dict[str, int]
    duplicates: tuple[Row, ...] = ()  # dropped rows; the row that was kept also belongs to their groups and topics


def load_sources(data: Data) -> list[Source]:
    """Read and clean all sources, each given as a path, a hub id, `kaggle:owner/name` (MedQuAD only) or `none`.

    A hub id is `owner/name`, or `owner/name:config` to name one of the dataset's configurations.

    User data come after the two datasets, sorted by name. With `data.mcq_answers` "named" the answer to a
    multiple-choice question begins with the correct option, as the question shows it; with "rationale" it is only the
    rationale.

    Records are dropped, and counted by reason: "empty question", "empty answer", "unreadable options" (the options of a
    multiple-choice question are neither JSON nor a Python literal; without them it makes no sense), and "duplicate"
    (question and answer equal those of an earlier row of any source).

    Raises UserError, with the problems of all sources in one message.
    """
    used = used_sources(data)
    if not used:
        raise UserError(
            "no data: --medquad and --afrimedqa are both none; give a source, for example --data notes=notes.csv, or "
            "use --tiny"
        )
    sources, problems = [], []
    seen: set[tuple[str, str]] = set()
    for name, location in used.items():
        try:
            sources.append(_cleaned(name, location, read_source(name, location), data.mcq_answers == "named", seen))
        except UserError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise UserError(*problems)
    return sources


def used_sources(data: Data) -> dict[str, str]:
    """Name to location of every source that is not `none`; user data sorted, so that their order has no effect."""
    given = {"medquad": data.medquad, "afrimedqa": data.afrimedqa, **dict(sorted(data.files.items()))}
    return {name: location for name, location in given.items() if location.strip().lower() != NONE}


def read_source(name: str, location: str) -> Table:
    """Find out what kind of location it is, and read it.

    Raises:
        UserError: there is no such source, it cannot be read, or it does not fit into memory.
    """
    try:
        return _read_source(name, location)
    except MemoryError as error:
        raise UserError(f"{location}: too large for the memory of this machine; give fewer records") from error


def _read_source(name: str, location: str) -> Table:
    """As `read_source`."""
    option = _asked_with(name)
    none = with_value(option, NONE)
    wanted = frozenset(column for columns in _columns(name).values() for column in columns)
    local = os.path.expanduser(location)
    if os.path.exists(local):  # Path.exists raises on names that are too long, and takes "" for "."
        return _read_local(name, Path(local), wanted)
    if location.startswith(KAGGLE):
        if name != "medquad":
            what = "AfriMed-QA is not on Kaggle" if name == "afrimedqa" else "only MedQuAD is read from Kaggle"
            raise UserError(f"{location}: {what}; give {option} a path, a hub id or none")
        if location.count("/") != 1:
            raise UserError(f"{location}: not of the form {KAGGLE}owner/name; correct {option}, or give {none}")
        return read_kaggle(location.removeprefix(KAGGLE), wanted, option)
    if WEB_ADDRESS.match(location):
        # Without the query, which may contain a secret. In a path that was a URL, only one slash is left.
        address = re.split(r"[?#]", without_credentials(re.sub(":/+", "://", location, count=1)), maxsplit=1)[0]
        if of_hub := HUB_ADDRESS.match(location):
            raise UserError(f"{address}: give the dataset's id: {with_value(option, of_hub[1])}")
        raise UserError(f"{address}: is a web address; download the file, and give its path with {option}")
    if _looks_like_a_path(location):
        raise UserError(f"{location}: no such file or directory; correct {option}, or give {none}")
    if location.count("/") != 1:
        raise UserError(
            f"{location!r} is neither an existing path nor a hub id (owner/name); give {option} one of these, or none"
        )
    try:
        return read_hub(location, wanted, option)
    except UserError as error:
        folder = location.split("/")[0]
        if not os.path.isdir(folder):
            raise
        raise UserError(f"{error}. There is a directory {folder} here, but no {location}") from error


def _read_local(name: str, path: Path, wanted: frozenset[str]) -> Table:
    if not path.is_dir():
        return read_file(path, wanted)
    if name != "medquad":
        raise UserError(f"{path}: is a directory; give {_asked_with(name)} a file ({', '.join(SUFFIXES)})")
    return read_medquad_xml(path)


def _asked_with(name: str) -> str:
    """The command-line option of a source."""
    return f"--{name}" if name in PUBLIC else f"--data {name}"


def _columns(name: str) -> Mapping[str, tuple[str, ...]]:
    return COLUMNS.get(name, OWN_COLUMNS)


def is_hub_id(location: str) -> bool:
    """Whether a location of user data is a hub id. Local files are recognized by their suffix."""
    return location.count("/") == 1 and not _looks_like_a_path(location)


def _looks_like_a_path(location: str) -> bool:
    return (
        location.partition(":")[0].lower().endswith(FILE_SUFFIXES)
        or location.startswith((".", "/", "~"))
        or location.count("/") > 1
        or "\\" in location
    )


def _cleaned(name: str, location: str, table: Table, named: bool, seen: set[tuple[str, str]]) -> Source:
    """The usable rows of `table`. `seen` has the question-answer pairs of all rows before, and is extended."""
    _require_columns(name, location, table)
    rows, duplicates = [], []
    dropped: Counter[str] = Counter()
    for found in _rows(name, location, table, named):
        if isinstance(found, str):
            dropped[found] += 1
        elif (found.question, found.answer) in seen:
            dropped["duplicate"] += 1
            duplicates.append(found)
        else:
            seen.add((found.question, found.answer))
            rows.append(found)
    if not rows:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "it has no records"
        raise UserError(
            f"{location}: no usable row among {len(table.records)} records ({reasons}); give {_asked_with(name)} "
            "other data, or none"
        )
    return Source(name, location, tuple(rows), len(table.records), dict(dropped), tuple(duplicates))


def _require_columns(name: str, location: str, table: Table) -> None:
    present = {column.strip().lower() for column in table.columns}
    missing = [_columns(name)[part] for part in REQUIRED if present.isdisjoint(_columns(name)[part])]
    if missing:
        wanted = " and ".join(" or ".join(columns) for columns in missing)
        found = ", ".join(f"{column:.200}" for column in table.columns[:SHOWN_COLUMNS]) or "none"
        if len(table.columns) > SHOWN_COLUMNS:
            found += f" and {len(table.columns) - SHOWN_COLUMNS:,} more"
        advice = f"Rename them, or correct {_asked_with(name)}"
        for separator, what in OTHER_SEPARATORS.items():
            if len(table.columns) == 1 and separator in table.columns[0]:
                advice = f"The fields are separated by {what}: save the file with commas between them"
        raise UserError(f"{location}: no column {wanted}; columns found: {found}. {advice}")


def _rows(name: str, location: str, table: Table, named: bool) -> Iterator[Row | str]:
    """For each record its row, or the reason why it is dropped. `named`: answers begin with the correct option."""
    for number, record in enumerate(table.records):
        cells = Cells(_columns(name), record, f"{location}, record {number} (the first is 0)")
        question, answer = cells.text("question"), cells.text("answer")
        if not question or not answer:
            yield "empty answer" if question else "empty question"
            continue
        try:
            if name == "afrimedqa":
                options = shown_options(cells)
                question = shown_question(cells, question, options)
                if named:
                    right = (f"{letter}. {options[letter]}" for letter in right_letters(cells, options))
                    answer = "\n\n".join([*right, answer])
        except ValueError:
            yield "unreadable options"
            continue
        own = name not in PUBLIC
        topic = "" if name == "afrimedqa" else cells.text("topic", numbers=own)
        group = cells.text("group", numbers=True) if own else ""
        yield Row(f"{name}:{number}", name, question, answer, topic or None, group or None)
