"""Records become rows of one shape: the two public datasets and own data. Unusable rows are dropped and counted."""

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
# One record of a source: its cells as text, and the options of a multiple-choice question among them.

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


# ----------------------------------------------------------------------------------------------------

NONE = "none"
KAGGLE = "kaggle:"
SUFFIXES = (".csv", ".parquet", ".jsonl")
# Of files that people have data in; no hub id is taken to end so.
FILE_SUFFIXES = (
    *SUFFIXES, ".7z", ".arrow", ".bz2", ".db", ".doc", ".docx", ".feather", ".gz", ".htm", ".html", ".json", ".md",
    ".ndjson", ".ods", ".pdf", ".pickle", ".pkl", ".rar", ".sqlite", ".tab", ".tar", ".tgz", ".tsv", ".txt", ".xls",
    ".xlsx", ".xml", ".xz", ".yaml", ".yml", ".zip", ".zst",
)  # fmt: skip
WEB_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
HUB_ADDRESS = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/datasets/([^/?#]+/[^/?#]+)/?$")
SHOWN_COLUMNS = 20

# What each part of a row is called in the copies that are about, in lower case; the first one that is not empty counts.
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
    """One question with its answer, as the prompt shows them."""

    id: str  # "<source>:<zero-based record in the source>", counting every record read, dropped ones too
    source: str
    question: str  # the options of a multiple-choice question below it, a consumer's prompt before it
    answer: str
    topic: str | None  # what MedQuAD calls the focus area; AfriMed-QA has none
    group: str | None = None  # of data of one's own: rows of one source and group belong together


@dataclass(frozen=True, slots=True)
class Source:
    """What one source gave: the rows kept, in its order, and how many of the records read were dropped and why."""

    name: str
    location: str  # a path, a hub id ("owner/name", "owner/name:config"), or "kaggle:" and a Kaggle handle
    rows: tuple[Row, ...]
    read: int
    dropped: dict[str, int]
    duplicates: tuple[Row, ...] = ()  # dropped, but what they belong to, the row that was kept belongs to as well


def load_sources(data: Data) -> list[Source]:
    """Read and clean all sources, each given as a path, a hub id, `kaggle:owner/name` (MedQuAD only) or `none`.

    A hub id is `owner/name`, or `owner/name:config` to name one of the dataset's configurations.

    Data of one's own come after the two datasets, by name. With `data.mcq_answers` "named" the answer to a
    multiple-choice question begins with the right option, as the question shows it; with "rationale" it is the
    rationale alone.

    Dropped, and counted by reason: "empty question", "empty answer", "unreadable options" (a multiple-choice question
    whose options are neither JSON nor a Python literal: it would make no sense without them), and "duplicate" (question
    and answer both equal those of an earlier row, of whatever source).

    Raises UserError, with the problems of all sources in one message.
    """
    used = used_sources(data)
    if not used:
        raise UserError("no data: --medquad and --afrimedqa are both none; give a source, --data say, or use --tiny")
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
    """Name to location of every source that is not `none`; those of one's own sorted, so that their order is none."""
    given = {"medquad": data.medquad, "afrimedqa": data.afrimedqa, **dict(sorted(data.files.items()))}
    return {name: location for name, location in given.items() if location.strip().lower() != NONE}


def read_source(name: str, location: str) -> Table:
    """Find out what `location` is, and read it.

    Raises:
        UserError: it is not there, cannot be read, or does not fit into memory.
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
    if os.path.exists(local):  # not Path.exists: it raises on names that are too long, and takes "" for "."
        return _read_local(name, Path(local), wanted)
    if location.startswith(KAGGLE):
        if name != "medquad":
            what = "AfriMed-QA is not on Kaggle" if name == "afrimedqa" else "MedQuAD alone is read from Kaggle"
            raise UserError(f"{location}: {what}; give {option} a path, a hub id or none")
        if location.count("/") != 1:
            raise UserError(f"{location}: not of the form {KAGGLE}owner/name; mend {option}, or give {none}")
        return read_kaggle(location.removeprefix(KAGGLE), wanted, option)
    if WEB_ADDRESS.match(location):
        # Without the query, which may hold a secret; of a path that was an address one slash is left.
        address = re.split(r"[?#]", without_credentials(re.sub(":/+", "://", location, count=1)), maxsplit=1)[0]
        if of_hub := HUB_ADDRESS.match(location):
            raise UserError(f"{address}: give the dataset's id: {with_value(option, of_hub[1])}")
        raise UserError(f"{address}: a web address; download the file, and give its path with {option}")
    if _looks_like_a_path(location):
        raise UserError(f"{location}: no such file or directory; mend {option}, or give {none}")
    if location.count("/") != 1:
        raise UserError(
            f"{location!r} is no existing path and no hub id (owner/name); give {option} one of these, or none"
        )
    try:
        return read_hub(location, wanted, option)
    except UserError as error:
        folder = location.split("/")[0]
        if not os.path.isdir(folder):
            raise
        raise UserError(f"{error}. There is a directory {folder} here, but nothing called {location}") from error


def _read_local(name: str, path: Path, wanted: frozenset[str]) -> Table:
    if not path.is_dir():
        return read_file(path, wanted)
    if name != "medquad":
        raise UserError(f"{path}: a directory; give {_asked_with(name)} a file ({', '.join(SUFFIXES)})")
    return read_medquad_xml(path)


def _asked_with(name: str) -> str:
    """Where on the command line a source is given."""
    return f"--{name}" if name in PUBLIC else f"--data {name}"


def _columns(name: str) -> Mapping[str, tuple[str, ...]]:
    return COLUMNS.get(name, OWN_COLUMNS)


def is_hub_id(location: str) -> bool:
    """Whether the location of data of one's own, if it is any, is on the hub: local files have a suffix."""
    return location.count("/") == 1 and not _looks_like_a_path(location)


def _looks_like_a_path(location: str) -> bool:
    return (
        location.partition(":")[0].lower().endswith(FILE_SUFFIXES)
        or location.startswith((".", "/", "~"))
        or location.count("/") > 1
        or "\\" in location
    )


def _cleaned(name: str, location: str, table: Table, named: bool, seen: set[tuple[str, str]]) -> Source:
    """The usable rows of `table`; `seen` holds the question-answer pairs of the rows before, and is added to."""
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
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "it holds no records"
        raise UserError(
            f"{location}: no usable rows among {len(table.records)} read ({reasons}); give {_asked_with(name)} "
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
        advice = f"Rename them, or mend {_asked_with(name)}"
        for separator, what in OTHER_SEPARATORS.items():
            if len(table.columns) == 1 and separator in table.columns[0]:
                advice = f"The fields are separated by {what}: save the file with commas between them"
        raise UserError(f"{location}: no column {wanted}; columns found: {found}. {advice}")


def _rows(name: str, location: str, table: Table, named: bool) -> Iterator[Row | str]:
    """For each record its row, or the reason why there is none. `named`: answers name the right option."""
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
