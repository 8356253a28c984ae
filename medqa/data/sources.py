"""The two datasets and data of one's own as rows of one shape; what is unusable is dropped and counted."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from medqa.config import PUBLIC, Data
from medqa.data.readers import OTHER_SEPARATORS, Table, read_file, read_medquad_xml
from medqa.data.records import REQUIRED, Cells, right_letters, shown_options, shown_question
from medqa.data.remote import read_hub, read_kaggle, with_value
from medqa.errors import UserError

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
        address = _without_password(location)
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


def _without_password(address: str) -> str:
    """A web address without user, password and query, which may hold a secret."""
    return re.sub(r":/.*@", "://", re.split(r"[?#]", address, maxsplit=1)[0])


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
