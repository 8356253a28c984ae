"""From a place or a file format to records: CSV, JSONL, parquet, MedQuAD's XML, Kaggle and the Hugging Face Hub.

Nothing here knows what a question is. Whatever is broken is refused with the file and, where there is one, the line:
a file that is read half, or shifted by a column, would train a model on nonsense without a word.
"""

import csv
import io
import json
import os
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from medqa.errors import UserError
from medqa.hub import CONNECT_SECONDS, hub_reachable

if TYPE_CHECKING:  # imported where they are used: a run reads one format, from one place
    from xml.etree.ElementTree import Element

    from datasets import DatasetDict

Record = dict[str, object]

KAGGLE_HOST = "api.kaggle.com"
OPEN_COPIES = {"intronhealth/afrimedqa_v2": "afrimedqa/afrimedqa_v2"}  # gated dataset -> the same rows, ungated


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


def _matching(columns: Iterable[str], wanted: frozenset[str], where: Path | str) -> dict[str, str]:
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
        spelled = _matching(header, wanted, path)
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
        spelled = _matching(record, wanted, f"{path}, line {number}")
        records.append({name: record[column] for name, column in spelled.items()})
    return Table(tuple(columns), records)


def _read_parquet(path: Path, wanted: frozenset[str]) -> Table:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            spelled = _matching(columns, wanted, path)
            cells = file.read(columns=list(spelled.values()))
            names = {column: name for name, column in spelled.items()}
            return Table(tuple(columns), cells.rename_columns(names).to_pylist())
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: broken parquet file ({_first_line(error)}); fetch or export it again") from error


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
        raise UserError(f"{path}: broken XML ({_first_line(error)}); fetch the file again or remove it") from error
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


def read_kaggle(handle: str, wanted: frozenset[str], option: str) -> Table:
    """The one CSV file of the Kaggle dataset `handle` ("owner/name"), from kagglehub's cache if it is there.

    `option` is the command-line option that an error should point to. Raises UserError.
    """
    try:
        import kagglehub
        from kagglehub import exceptions
    except ImportError as error:
        raise UserError(f"kaggle:{handle}: needs `pip install kagglehub`. {_elsewhere(option)}") from error
    pinned = _cached_version(handle)
    if pinned is None and not _connects(KAGGLE_HOST):
        why = f"not in kagglehub's cache, and {KAGGLE_HOST} cannot be reached within {CONNECT_SECONDS:.0f} s"
        raise UserError(f"kaggle:{handle}: {why}. {_elsewhere(option)}")
    refusals = (exceptions.BackendError, exceptions.CredentialError, exceptions.NotFoundError)
    refusals += (exceptions.DataCorruptionError, exceptions.UnauthenticatedError)
    try:
        folder = Path(kagglehub.dataset_download(pinned or handle))
    except (OSError, ValueError, *refusals) as error:  # requests' errors are OSErrors; ValueError: handle or archive
        why = f"{type(error).__name__}: {_first_line(error)}"
        raise UserError(f"kaggle:{handle}: {why}. {_elsewhere(option)}") from error
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".csv")
    if len(files) != 1:
        found = ", ".join(path.name for path in files) or "none"
        raise UserError(f"kaggle:{handle}: one CSV file expected, found {found} in {folder}; give one with {option}")
    return read_file(files[0], wanted)


def _cached_version(handle: str) -> str | None:
    """`handle` with the newest version that kagglehub holds complete: without a version it always asks the network."""
    from kagglehub.config import get_cache_folder

    folder = Path(get_cache_folder(), "datasets", handle)
    versions = [int(marker.stem) for marker in folder.glob("*.complete") if marker.stem.isdigit()]
    complete = [version for version in versions if (folder / "versions" / str(version)).is_dir()]
    return f"{handle}/versions/{max(complete)}" if complete else None


def _connects(host: str) -> bool:
    """Whether `host`, or the configured proxy in its place, accepts a connection within `CONNECT_SECONDS`."""
    proxy = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    try:
        address = urlsplit(proxy or f"https://{host}")
        socket.create_connection((address.hostname or "", address.port or 443), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError):  # ValueError: a proxy whose port is no number
        return False
    return True


def read_hub(dataset_id: str, wanted: frozenset[str], option: str) -> Table:
    """All splits, one after the other, of the dataset "owner/name" on the Hugging Face Hub, or in its local cache.

    No code of the dataset is executed. `option` is the command-line option that an error should point to.
    Raises UserError: at once if the Hub cannot be reached, with the way to get access if it refuses.
    """
    reachable = hub_reachable()  # first: it decides whether `datasets` is imported in offline mode
    import datasets
    from huggingface_hub.errors import HTTPError  # of the HTTP library that the hub client uses, httpx or its successor

    denied = (datasets.exceptions.DatasetNotFoundError, HTTPError)
    # ValueError: a malformed id, or several configurations to choose from; RuntimeError: the dataset is a script.
    refusals = (*denied, datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError)
    try:
        return _hub_table(_load_hub_splits(dataset_id), wanted, dataset_id)
    except refusals as error:
        why = f"{type(error).__name__}: {_first_line(error)}. "
        if not reachable:
            why = "not in the local cache, and the Hugging Face Hub cannot be reached. "
        elif isinstance(error, denied):
            why += _access(dataset_id, option)
        raise UserError(f"hub dataset {dataset_id}: {why}{_elsewhere(option)}") from error


def _load_hub_splits(dataset_id: str) -> "DatasetDict":
    from datasets import load_dataset

    try:  # of a CSV file the words "NA" and "None" would otherwise become missing values; other formats refuse this
        return load_dataset(dataset_id, keep_default_na=False)
    except ValueError as error:
        if "keep_default_na" not in str(error):
            raise
    return load_dataset(dataset_id)


def _access(dataset_id: str, option: str) -> str:
    """How to get at a dataset that the Hub refuses to show."""
    steps = f"Accept its terms at https://huggingface.co/datasets/{dataset_id}, then run `hf auth login`. "
    copy = OPEN_COPIES.get(dataset_id)
    return steps + (f"Or use the open copy: {option} {copy}. " if copy else "")


def _hub_table(splits: "DatasetDict", wanted: frozenset[str], where: str) -> Table:
    columns: dict[str, None] = {}
    records: list[Record] = []
    for split in splits.values():
        columns |= dict.fromkeys(split.column_names)
        spelled = _matching(split.column_names, wanted, where)
        for record in split.select_columns(list(spelled.values())):  # the others may be images: not to be decoded
            records.append({name: record[column] for name, column in spelled.items()})
    return Table(tuple(columns), records)


def _elsewhere(option: str) -> str:
    return f"Give a local copy with {option} PATH, or {option} none; --tiny needs no data at all"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
