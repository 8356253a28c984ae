"""From a file to records: CSV, JSONL, parquet, and MedQuAD's XML.

Nothing here knows what a question is. Whatever is broken is refused with the file and, where there is one, the line:
a file that is read half, or shifted by a column, would train a model on nonsense without a word.
"""

import csv
import io
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medqa.errors import UserError
from medqa.files import Damaged, open_regular, parse_json
from medqa.files import read_file as read_bytes
from medqa.limits import MAX_DATA_BYTES, MAX_RECORDS

if TYPE_CHECKING:  # imported where it is used: a run reads one format
    from xml.etree.ElementTree import Element

Record = dict[str, object]

ERROR_PAGE = "what a web server says in place of the data; download the file itself, signed in if it asks for that"
# How files begin that are not what their names say, in lower case, and what to do. What stands in CSV, JSON, parquet or
# MedQuAD's XML begins with none of them.
OTHER_KINDS = {
    b"version https://git-lfs": "a Git LFS pointer, not the data; run `git lfs pull`, or download the file itself",
    b"<!doctype html": "a web page, not the data; download the file itself",
    b"<html": "a web page, not the data; download the file itself",
    b"404: not found": ERROR_PAGE,
    b"entry not found": ERROR_PAGE,
    b"invalid username or password": ERROR_PAGE,
    b"repository not found": ERROR_PAGE,
    b"access to dataset": ERROR_PAGE,
    b"\x1f\x8b": "compressed by gzip; unpack it",
    b"bzh91ay&sy": "compressed by bzip2; unpack it",
    b"\xfd7zxz": "compressed by xz; unpack it",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it",
    b"7z\xbc\xaf": "a 7-Zip archive; unpack it",
    b"pk\x03\x04": "a ZIP archive or an Excel workbook; unpack it, or save the sheet as CSV UTF-8",
    b"\xd0\xcf\x11\xe0": "an Excel workbook; save the sheet as CSV UTF-8",
    b"%pdf": "a PDF; give the data as text",
    b"sqlite format 3\0": "an SQLite database; export the table as CSV",
    b"arrow1\0\0": "an Arrow file; save it as parquet",
}
PARQUET = b"par1"
OTHER_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
# A field that may begin with white space and a quote: outside of quotes this is no quoted field, yet was meant as one.
SPACE_AND_QUOTE = re.compile(r'(?:^|[,\r\n])[^\S\r\n]+"')
NOT_A_LINE_END = re.compile(r"[^\S\r\n]")
END_OF_FILE = "\x1a"  # Ctrl-Z, with which DOS ended text files
BATCH = 1024  # rows of a parquet file that are decoded at once


@dataclass(frozen=True, slots=True)
class Table:
    """What was read: all column names as the source spells them, and the wanted cells by lower-case column name.

    A cell that is missing is absent or None. Cells of a CSV or XML file are text; the others may hold any type.
    """

    columns: tuple[str, ...]
    records: list[Record]


def read_file(path: Path, wanted: frozenset[str]) -> Table:
    """The wanted columns (lower-case names) of a `.csv`, `.jsonl` or `.parquet` file; suffix in any case.

    Raises UserError, naming the file and the line where it can, if it cannot be read or is broken.
    """
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: unknown kind of file; convert it to one of {', '.join(readers)}")
    _refuse_other_kinds(path)
    try:
        return reader(path, wanted)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def _refuse_other_kinds(path: Path) -> None:
    """Say what a file is that is not what its name says: what a reader of the named kind finds wrong would mislead."""
    try:
        if path.is_dir():
            raise UserError(f"{path}: cannot be read (Is a directory)")
        with open_regular(path) as file:
            head = file.read(512)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    head = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for beginning, what in OTHER_KINDS.items():
        if head.startswith(beginning):
            raise UserError(f"{path}: this is {what}")
    if head.startswith(b"<") and path.suffix.lower() != ".xml":
        raise UserError(f"{path}: this is an XML document or a web page, not the data; download the file itself")
    if head.startswith(PARQUET) and path.suffix.lower() != ".parquet":
        raise UserError(f"{path}: this is a parquet file; give it the suffix .parquet")


def add_record(records: list[Record], record: Record, where: Path | str) -> None:
    """Add a record, unless there are more than `MAX_RECORDS`."""
    if len(records) == MAX_RECORDS:
        raise UserError(f"{where}: more than {MAX_RECORDS:,} records; give fewer")
    records.append(record)


def matching_columns(columns: Iterable[str], wanted: frozenset[str], where: Path | str) -> dict[str, str]:
    """Of `columns`, the wanted ones: lower-case name to the name as it is spelled.

    A name that differs from a wanted one in compatibility forms or in characters that show nothing (a zero-width
    space, a byte order mark) is that name.
    """
    found: dict[str, str] = {}
    for column in columns:
        shown = (c for c in unicodedata.normalize("NFKC", column) if unicodedata.category(c) != "Cf")
        name = "".join(shown).strip().lower()
        if name in found:
            raise UserError(f"{where}: two columns are called {name!r}; rename or remove one")
        if name in wanted:
            found[name] = column
    return found


def _utf8(path: Path) -> str:
    """The file's text, a byte order mark removed; anything but UTF-8 text is refused with its line."""
    try:
        data = read_bytes(path, MAX_DATA_BYTES)
    except Damaged as error:
        raise UserError(f"{error}; give a file that can be read whole") from error
    if not data.strip():
        raise UserError(f"{path}: the file is empty")
    position = data.find(b"\0")
    if position >= 0:
        line = data.count(b"\n", 0, position) + 1
        advice = "if it is UTF-16, save it again as UTF-8, else remove the byte"
        raise UserError(f"{path}, line {line}: holds a NUL byte, which no text has; {advice}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        what = f"byte 0x{data[error.start]:02x}"
        raise UserError(f"{path}, line {line}: not UTF-8 text ({what}); save it again as UTF-8") from error
    if text.rstrip("\r\n").endswith(END_OF_FILE):
        line = text.rstrip("\r\n").count("\n") + 1
        raise UserError(f"{path}, line {line}: ends with Ctrl-Z, DOS's end-of-file character; remove it")
    return text


def _read_csv(path: Path, wanted: frozenset[str]) -> Table:
    # The csv module in strict mode, not pandas: pandas fills short rows, may take a surplus field for an index, and
    # reads on after text that follows a closing quote. Here every record has as many fields as the header or is named.
    text = _utf8(path)
    _refuse_other_separators(text, wanted, path)
    previous_limit = csv.field_size_limit(2**31 - 1)  # the default refuses fields beyond 131,072 characters
    try:
        if SPACE_AND_QUOTE.search(text):
            _refuse_spaces_before_quotes(text, wanted, path)
        lines = _csv_lines(text, path)
        _, header = next(lines, (0, []))
        spelled = matching_columns(header, wanted, path)
        places = {name: header.index(column) for name, column in spelled.items()}
        records: list[Record] = []
        for line, fields in lines:
            if len(fields) != len(header):
                advice = "put text that holds commas in double quotes"
                if len(fields) < len(header):
                    advice = "a field is missing, or a line break is not in double quotes"
                counts = f"{len(fields)} fields where the header has {len(header)}"
                raise UserError(f"{path}, line {line}: {counts}; {advice}")
            add_record(records, {name: fields[place] for name, place in places.items()}, path)
    finally:
        csv.field_size_limit(previous_limit)
    return Table(tuple(header), records)


def _refuse_other_separators(text: str, wanted: frozenset[str], path: Path) -> None:
    """Name the separator of a file that has another one than the comma, by its header."""
    header = next((line for line in re.split(r"[\r\n]+", text[:100_000]) if line.strip()), "")
    if header.lower().lstrip('"').startswith("sep="):
        raise UserError(
            f"{path}, line 1: {header!r:.20} is Excel's note of the separator, not the header; remove the line"
            + ("" if "," in header else ", and save the file with commas between the fields")
        )

    def known(separator: str) -> bool:
        return any(name.strip().strip('"').strip().lower() in wanted for name in header.split(separator))

    for separator, what in OTHER_SEPARATORS.items():
        if separator in header and not known(",") and (known(separator) or "," not in header):
            raise UserError(
                f"{path}: the fields are separated by {what}; save the file with commas between them; columns found: "
                f"{header:.200}."
            )


def _refuse_spaces_before_quotes(text: str, wanted: frozenset[str], path: Path) -> None:
    """Refuse wanted fields that begin with white space and a quote: the quotes would be trained on.

    The text is read once as CSV is defined, and once with white space before fields skipped. Where no quote follows the
    two differ by that white space alone.
    """
    text = NOT_A_LINE_END.sub(" ", text)
    skipped = _csv_lines(text, path, skip_spaces=True)
    places: list[int] | None = None
    for line, fields in _csv_lines(text, path):
        try:
            _, others = next(skipped, (0, []))
        except UserError:  # text after a closing quote
            others = []
        if places is None:
            places = [place for place, name in enumerate(others) if name.strip().lower() in wanted]
        same = len(fields) == len(others)
        if not same or any(fields[p].lstrip() != others[p].lstrip() for p in places if p < len(fields)):
            raise UserError(
                f"{path}, line {line}: white space before a double quote, which is then part of the text; remove the "
                "white space"
            )


def _csv_lines(text: str, path: Path, skip_spaces: bool = False) -> Iterator[tuple[int, list[str]]]:
    """Each record that is not a blank line, with the line it starts on (a record may span many)."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=skip_spaces)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            where = f"{path}, record starting on line {line}"
            raise UserError(f"{where}: broken CSV ({error}); look for a quote not closed or not doubled") from error
        if fields is None:
            return
        if fields:
            yield line, fields


def _read_jsonl(path: Path, wanted: frozenset[str]) -> Table:
    rule = "each line must be one JSON object"
    columns: dict[str, None] = {}  # an ordered set: a record may lack a column that another one has
    records: list[Record] = []
    for number, line in enumerate(_utf8(path).split("\n"), start=1):  # splitlines() would also cut at U+2028 in a text
        if not line.strip():
            continue
        try:
            record = parse_json(line, unique_keys=True, any_number=True)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: broken JSON ({error}); {rule}") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: a JSON {type(record).__name__}; {rule}")
        columns |= dict.fromkeys(record)
        spelled = matching_columns(record, wanted, f"{path}, line {number}")
        add_record(records, {name: record[column] for name, column in spelled.items()}, path)
    return Table(tuple(columns), records)


def _read_parquet(path: Path, wanted: frozenset[str]) -> Table:
    import pyarrow
    from pyarrow import parquet

    records: list[Record] = []
    size = 0
    try:
        with open_regular(path) as content, parquet.ParquetFile(content) as file:
            columns = file.schema_arrow.names
            spelled = matching_columns(columns, wanted, path)
            names = {column: name for name, column in spelled.items()}
            if file.metadata.num_rows > MAX_RECORDS:  # before anything is decoded: a small file may claim many
                raise UserError(f"{path}: more than {MAX_RECORDS:,} records; give fewer")
            for batch in file.iter_batches(BATCH, columns=list(spelled.values())):
                for record in batch.rename_columns(names).to_pylist():
                    add_record(records, record, path)
                    size += sum(len(cell) for cell in record.values() if isinstance(cell, str))
                if size > MAX_DATA_BYTES:
                    raise UserError(f"{path}: more than {MAX_DATA_BYTES:,} characters of text; give fewer records")
            return Table(tuple(columns), records)
    except MemoryError:  # pyarrow's own is an ArrowException, too
        raise
    # ValueError: text that is no UTF-8, a field twice in a cell; OverflowError: a time that Python has not.
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise UserError(f"{path}: broken parquet file ({first_line(error)}); fetch or export it again") from error


def read_medquad_xml(directory: Path) -> Table:
    """The question-answer pairs of the original release: every `.xml` file below `directory`, in sorted order.

    Raises UserError naming the file if one is broken or is no MedQuAD document, or if there is none.
    """
    paths = sorted(path for path in directory.rglob("*") if path.suffix.lower() == ".xml" and path.is_file())
    if not paths:
        raise UserError(f"{directory}: no .xml file in this directory; give MedQuAD's own directory or a .csv file")
    records = [record for path in paths for record in _medquad_pairs(path)]
    return Table(("Question", "Answer", "Focus"), records)


def _medquad_pairs(path: Path) -> Iterator[Record]:
    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import ParseError, fromstring

    try:
        document = fromstring(read_bytes(path, MAX_DATA_BYTES))
    except (ParseError, DefusedXmlException, ValueError, LookupError) as error:  # the last two: unusable encodings
        _refuse_other_kinds(path)
        raise UserError(f"{path}: broken XML ({first_line(error)}); fetch the file again or remove it") from error
    except Damaged as error:
        raise UserError(f"{error}; fetch the file again or remove it") from error
    if document.tag != "Document":
        raise UserError(f"{path}: a <{document.tag}> where MedQuAD's files have a <Document>; remove the file")
    focus = _xml_text(document, "Focus")
    for pair in document.iter("QAPair"):
        for tag in ("Question", "Answer"):
            if len(pair.findall(tag)) > 1:
                raise UserError(f"{path}: a <QAPair> has more than one <{tag}>; remove one")
        yield {"question": _xml_text(pair, "Question"), "answer": _xml_text(pair, "Answer"), "focus": focus}


def _xml_text(parent: "Element", tag: str) -> str | None:
    found = parent.find(tag)
    return None if found is None else "".join(found.itertext())


def first_line(error: Exception) -> str:
    """The gist of a library's error message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
