"""From a file to records: CSV, JSONL, parquet, and MedQuAD's XML.

Nothing here knows what a question is. Whatever is broken is refused with the file and, where there is one, the line:
a file that is read half, or shifted by a column, would train a model on nonsense without a word.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medqa.errors import UserError

if TYPE_CHECKING:  # imported where it is used: a run reads one format
    from xml.etree.ElementTree import Element

Record = dict[str, object]


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
    try:
        return reader(path, wanted)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def matching_columns(columns: Iterable[str], wanted: frozenset[str], where: Path | str) -> dict[str, str]:
    """Of `columns`, the wanted ones: lower-case name to the name as it is spelled."""
    found: dict[str, str] = {}
    for column in columns:
        name = column.strip().lower()
        if name in found:
            raise UserError(f"{where}: two columns are called {name!r}; rename or remove one")
        if name in wanted:
            found[name] = column
    return found


def _utf8(path: Path) -> str:
    """The file's text, a byte order mark removed; anything but UTF-8 text is refused with its line."""
    data = path.read_bytes()
    if not data.strip():
        raise UserError(f"{path}: the file is empty")
    position, what = data.find(b"\0"), "a NUL byte"  # UTF-16 has them, too
    if position < 0:
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            position, what = error.start, f"byte 0x{data[error.start]:02x}"
    line = data.count(b"\n", 0, position) + 1
    raise UserError(f"{path}, line {line}: not UTF-8 text ({what}); save it again as UTF-8")


def _read_csv(path: Path, wanted: frozenset[str]) -> Table:
    # The csv module in strict mode, not pandas: pandas fills short rows, may take a surplus field for an index, and
    # reads on after text that follows a closing quote. Here every record has as many fields as the header or is named.
    reader = csv.reader(io.StringIO(_utf8(path), newline=""), strict=True)
    previous_limit = csv.field_size_limit(2**31 - 1)  # the default refuses fields beyond 131,072 characters
    try:
        lines = _csv_lines(reader, path)
        _, header = next(lines, (0, []))
        spelled = matching_columns(header, wanted, path)
        places = {name: header.index(column) for name, column in spelled.items()}
        records: list[Record] = []
        for line, fields in lines:
            if len(fields) != len(header):
                counts = f"{len(fields)} fields where the header has {len(header)}"
                raise UserError(f"{path}, line {line}: {counts}; put text that holds commas in double quotes")
            records.append({name: fields[place] for name, place in places.items()})
    finally:
        csv.field_size_limit(previous_limit)
    return Table(tuple(header), records)


def _csv_lines(reader: "csv._reader", path: Path) -> Iterator[tuple[int, list[str]]]:
    """Each record that is not a blank line, with the line it starts on (a record may span many)."""
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
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: JSONDecodeError, integers of over 4,300 digits
            raise UserError(f"{path}, line {number}: broken JSON ({error}); {rule}") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: a JSON {type(record).__name__}; {rule}")
        columns |= dict.fromkeys(record)
        spelled = matching_columns(record, wanted, f"{path}, line {number}")
        records.append({name: record[column] for name, column in spelled.items()})
    return Table(tuple(columns), records)


def _read_parquet(path: Path, wanted: frozenset[str]) -> Table:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            spelled = matching_columns(columns, wanted, path)
            cells = file.read(columns=list(spelled.values()))
            names = {column: name for name, column in spelled.items()}
            return Table(tuple(columns), cells.rename_columns(names).to_pylist())
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
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
    from defusedxml.ElementTree import ParseError, parse

    try:
        document = parse(path).getroot()
    except (ParseError, DefusedXmlException, ValueError, LookupError) as error:  # the last two: unusable encodings
        raise UserError(f"{path}: broken XML ({first_line(error)}); fetch the file again or remove it") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    if document.tag != "Document":
        raise UserError(f"{path}: a <{document.tag}> where MedQuAD's files have a <Document>; remove the file")
    focus = _xml_text(document, "Focus")
    for pair in document.iter("QAPair"):
        yield {"question": _xml_text(pair, "Question"), "answer": _xml_text(pair, "Answer"), "focus": focus}


def _xml_text(parent: "Element", tag: str) -> str | None:
    found = parent.find(tag)
    return None if found is None else "".join(found.itertext())


def first_line(error: Exception) -> str:
    """The gist of a library's error message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
