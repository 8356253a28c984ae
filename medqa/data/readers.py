"""Read records from CSV, JSONL and parquet files, MedQuAD's XML, Kaggle and the Hugging Face Hub.

This module does not interpret the records. Whatever is broken is refused, with the file and, if possible, the line: a
file that is read in part, or shifted by a column, would silently train a model on nonsense.
"""

import contextlib
import csv
import io
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medqa.errors import UserError
from medqa.files import Damaged, alone_in, open_regular, parse_json
from medqa.files import read_file as read_bytes
from medqa.hub import CONNECT_SECONDS, connects, hub_reachable
from medqa.limits import MAX_DATA_BYTES, MAX_RECORDS

if TYPE_CHECKING:  # imported where it is used, because a run reads only one format
    from xml.etree.ElementTree import Element

Record = dict[str, object]

ERROR_PAGE = "an error page of a web server, not the data; download the file itself, signed in if required"
# Beginnings (in lower case) of files whose content is not what their name says, and what to do. No CSV, JSON, parquet
# or MedQuAD XML file begins with one of them.
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
# Whitespace and a quote at the beginning of a field. By the CSV rules this is not a quoted field, but was meant as one.
SPACE_AND_QUOTE = re.compile(r'(?:^|[,\r\n])[^\S\r\n]+"')
NOT_A_LINE_END = re.compile(r"[^\S\r\n]")
END_OF_FILE = "\x1a"  # Ctrl-Z, the end-of-file character of DOS text files
BATCH = 1024  # records of a parquet file that are decoded at once


@dataclass(frozen=True, slots=True)
class Table:
    """The content of a source: all column names as spelled there, and the wanted cells by lower-case column name.

    A missing cell is absent or None. Cells of CSV and XML files are text; those of other files may have any type.
    """

    columns: tuple[str, ...]
    records: list[Record]


def read_file(path: Path, wanted: frozenset[str]) -> Table:
    """Read the wanted columns (lower-case names) of a `.csv`, `.jsonl` or `.parquet` file; suffix in any case.

    Raises UserError, with the file and if possible the line, if the file cannot be read or is broken.
    """
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: unknown type of file; convert it to one of {', '.join(readers)}")
    _refuse_other_kinds(path)
    try:
        return reader(path, wanted)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def _refuse_other_kinds(path: Path) -> None:
    """Refuse a file whose content is of another type than its suffix; the reader's own error would be misleading."""
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
    """Append a record; refuse more than `MAX_RECORDS`."""
    if len(records) == MAX_RECORDS:
        raise UserError(f"{where}: more than {MAX_RECORDS:,} records; give fewer")
    records.append(record)


def matching_columns(columns: Iterable[str], wanted: frozenset[str], where: Path | str) -> dict[str, str]:
    """Map the lower-case name of each wanted column to its spelling in `columns`.

    Names are compared after Unicode normalization (NFKC) and without invisible characters (a zero-width space, a byte
    order mark).
    """
    found: dict[str, str] = {}
    for column in columns:
        shown = (c for c in unicodedata.normalize("NFKC", column) if unicodedata.category(c) != "Cf")
        name = "".join(shown).strip().lower()
        if name in found:
            raise UserError(f"{where}: two columns are named {name!r}; rename or remove one")
        if name in wanted:
            found[name] = column
    return found


def _utf8(path: Path) -> str:
    """The file's text without a byte order mark; anything but UTF-8 is refused with the line."""
    try:
        data = read_bytes(path, MAX_DATA_BYTES)
    except Damaged as error:
        raise UserError(f"{error}; give a file that can be read completely") from error
    if not data.strip():
        raise UserError(f"{path}: the file is empty")
    position = data.find(b"\0")
    if position >= 0:
        line = data.count(b"\n", 0, position) + 1
        advice = "if the file is UTF-16, save it as UTF-8, otherwise remove the byte"
        raise UserError(f"{path}, line {line}: contains a NUL byte, which is not text; {advice}")
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
    # The csv module in strict mode, not pandas: pandas fills short records, may take a surplus field for an index, and
    # accepts text after a closing quote. Here every record must have as many fields as the header.
    text = _utf8(path)
    _refuse_other_separators(text, wanted, path)
    previous_limit = csv.field_size_limit(2**31 - 1)  # by default, fields above 131,072 characters are refused
    try:
        if SPACE_AND_QUOTE.search(text):
            _refuse_spaces_before_quotes(text, wanted, path)
        lines = _csv_lines(text, path)
        _, header = next(lines, (0, []))
        spelled = matching_columns(header, wanted, path)
        indices = {name: header.index(column) for name, column in spelled.items()}
        records: list[Record] = []
        for line, fields in lines:
            if len(fields) != len(header):
                advice = "put text with commas in double quotes"
                if len(fields) < len(header):
                    advice = "a field is missing, or a line break is outside of double quotes"
                counts = f"{len(fields)} fields where the header has {len(header)}"
                raise UserError(f"{path}, line {line}: {counts}; {advice}")
            add_record(records, {name: fields[index] for name, index in indices.items()}, path)
    finally:
        csv.field_size_limit(previous_limit)
    return Table(tuple(header), records)


def _refuse_other_separators(text: str, wanted: frozenset[str], path: Path) -> None:
    """Refuse a file with another separator than the comma, which the header shows, and name the separator."""
    header = next((line for line in re.split(r"[\r\n]+", text[:100_000]) if line.strip()), "")
    if header.lower().lstrip('"').startswith("sep="):
        raise UserError(
            f"{path}, line 1: {header!r:.20} is Excel's note about the separator, not the header; remove the line"
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
    """Refuse wanted fields that begin with whitespace and a quote, because the quotes would become training text.

    The text is parsed twice, the second time skipping whitespace before fields. Without such quotes, the results differ
    only in that whitespace.
    """
    text = NOT_A_LINE_END.sub(" ", text)
    skipped = _csv_lines(text, path, skip_spaces=True)
    indices: list[int] | None = None
    for line, fields in _csv_lines(text, path):
        try:
            _, others = next(skipped, (0, []))
        except UserError:  # text after a closing quote
            others = []
        if indices is None:
            indices = [index for index, name in enumerate(others) if name.strip().lower() in wanted]
        same = len(fields) == len(others)
        if not same or any(fields[i].lstrip() != others[i].lstrip() for i in indices if i < len(fields)):
            raise UserError(
                f"{path}, line {line}: whitespace before a double quote makes the quote part of the text; remove the "
                "whitespace"
            )


def _csv_lines(text: str, path: Path, skip_spaces: bool = False) -> Iterator[tuple[int, list[str]]]:
    """Each record that is not a blank line, with the number of its first line (a record may span several)."""
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
    columns: dict[str, None] = {}  # an ordered set, because records may have different keys
    records: list[Record] = []
    for number, line in enumerate(_utf8(path).split("\n"), start=1):  # splitlines() also splits at U+2028
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
            if file.metadata.num_rows > MAX_RECORDS:  # before decoding, because a small file may claim many records
                raise UserError(f"{path}: more than {MAX_RECORDS:,} records; give fewer")
            for batch in file.iter_batches(BATCH, columns=list(spelled.values())):
                for record in batch.rename_columns(names).to_pylist():
                    add_record(records, record, path)
                    size += sum(len(cell) for cell in record.values() if isinstance(cell, str))
                if size > MAX_DATA_BYTES:
                    raise UserError(f"{path}: more than {MAX_DATA_BYTES:,} characters of text; give fewer records")
            return Table(tuple(columns), records)
    except MemoryError:  # pyarrow's own MemoryError is also an ArrowException
        raise
    # OSError without errno: a page cannot be decompressed; ValueError: text that is not UTF-8, or a repeated field in a
    # cell; OverflowError: a time that Python cannot represent.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # an error of the system, not of the file
            raise
        raise UserError(f"{path}: broken parquet file ({first_line(error)}); download or export it again") from error


def read_medquad_xml(directory: Path) -> Table:
    """Read the question-answer pairs of the original release: every `.xml` file below `directory`, in sorted order.

    Raises UserError if there is no file, or a file is broken or is not a MedQuAD document; the message names the file.
    """
    paths = sorted(path for path in directory.rglob("*") if path.suffix.lower() == ".xml" and path.is_file())
    if not paths:
        raise UserError(f"{directory}: no .xml file in this directory; give the directory of MedQuAD, or a .csv file")
    records = [record for path in paths for record in _medquad_pairs(path)]
    return Table(("Question", "Answer", "Focus"), records)


def _medquad_pairs(path: Path) -> Iterator[Record]:
    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import ParseError, fromstring

    try:
        document = fromstring(read_bytes(path, MAX_DATA_BYTES))
    except (ParseError, DefusedXmlException, ValueError, LookupError) as error:  # the last two: unknown encodings
        _refuse_other_kinds(path)
        raise UserError(f"{path}: broken XML ({first_line(error)}); download the file again or remove it") from error
    except Damaged as error:
        raise UserError(f"{error}; download the file again or remove it") from error
    if document.tag != "Document":
        raise UserError(f"{path}: the root element is <{document.tag}>, not MedQuAD's <Document>; remove the file")
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
    """The first line of a library's error message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


# ----------------------------------------------------------------------------------------------------
# Records from Kaggle and the Hugging Face Hub. The network is used only for what is not cached, and with short
# timeouts.

if TYPE_CHECKING:
    from datasets import DatasetDict

KAGGLE_HOST = "api.kaggle.com"
SHOWN_CONFIGURATIONS = 40
MOST_CAUSES = 6  # of a chain of errors, how many are shown
LONGEST_CAUSE = 600  # characters that are shown of each
OPEN_COPIES = {"intronhealth/afrimedqa_v2": "afrimedqa/afrimedqa_v2"}  # gated dataset -> open copy of the same rows


def read_kaggle(handle: str, wanted: frozenset[str], option: str) -> Table:
    """Read the only CSV file of the Kaggle dataset `handle` ("owner/name"), from kagglehub's cache if it is there.

    `option` is the command-line option that error messages name. Raises UserError.
    """
    try:
        import kagglehub
        from kagglehub import exceptions
    except ImportError as error:
        raise UserError(f"kaggle:{handle}: run `pip install kagglehub` to read it. {_elsewhere(option)}") from error
    pinned = _cached_version(handle)
    if pinned is None and not connects(f"https://{KAGGLE_HOST}"):
        why = f"not in kagglehub's cache, and {KAGGLE_HOST} cannot be reached within {CONNECT_SECONDS:.0f} s"
        raise UserError(f"kaggle:{handle}: {why}. {_elsewhere(option)}")
    refusals: tuple[type[Exception], ...]
    refusals = (exceptions.BackendError, exceptions.CredentialError, exceptions.NotFoundError)
    refusals += (exceptions.DataCorruptionError, exceptions.UnauthenticatedError)
    try:
        folder = Path(kagglehub.dataset_download(pinned) if pinned else _download(handle))
    except (OSError, ValueError, *refusals) as error:  # OSError: from requests; ValueError: bad handle or archive
        raise UserError(f"kaggle:{handle}: {causes(error)}. {_elsewhere(option)}") from error
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".csv")
    if len(files) != 1:
        found = ", ".join(path.name for path in files) or "none"
        raise UserError(f"kaggle:{handle}: expected one CSV file, found {found} in {folder}; give one with {option}")
    return read_file(files[0], wanted)


def _download(handle: str) -> str:
    """The directory of the newest version, downloaded unless another process has done so meanwhile.

    kagglehub lets processes that start at the same time write, unpack and remove the same archive; all but one fail, or
    read incomplete files.
    """
    import kagglehub
    from kagglehub.config import get_cache_folder

    folder = Path(get_cache_folder())
    with contextlib.suppress(OSError):  # kagglehub will report it
        folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder / ".medqa.lock"):
        return kagglehub.dataset_download(_cached_version(handle) or handle)


def _cached_version(handle: str) -> str | None:
    """`handle` with the newest complete version in kagglehub's cache; without a version, kagglehub uses the network."""
    from kagglehub.config import get_cache_folder

    folder = Path(get_cache_folder(), "datasets", handle)
    versions = [int(marker.stem) for marker in folder.glob("*.complete") if marker.stem.isdigit()]
    complete = [version for version in versions if (folder / "versions" / str(version)).is_dir()]
    return f"{handle}/versions/{max(complete)}" if complete else None


def read_hub(location: str, wanted: frozenset[str], option: str) -> Table:
    """Read all splits, one after the other, of a dataset on the Hugging Face Hub or in its local cache.

    No code of the dataset is executed.

    Args:
        location: "owner/name", or "owner/name:config" where the dataset has several configurations.
        option: the command-line option that error messages name.

    Raises:
        UserError: the Hub cannot be reached (at once), or refuses (with how to get access), or the data are broken.
    """
    dataset_id, _, config = location.partition(":")
    reachable = hub_reachable()  # first, because it decides whether `datasets` is imported in offline mode
    import datasets
    import yaml
    from huggingface_hub.errors import HTTPError  # of the HTTP library that huggingface_hub uses

    denied = (datasets.exceptions.DatasetNotFoundError, HTTPError)
    # ValueError: a malformed id, or several configurations; RuntimeError: the dataset is a script; the others: a README
    # with unexpected configurations, or a format that needs another library.
    refusals: tuple[type[Exception], ...] = (
        *denied,
        datasets.exceptions.DatasetsError,
        OSError,
        ValueError,
        RuntimeError,
    )
    refusals += (TypeError, LookupError, AttributeError, ImportError, yaml.YAMLError)
    try:
        return _hub_table(_load_hub_splits(dataset_id, config or None, reachable), wanted, location)
    except refusals as error:
        configurations = _configurations(dataset_id) if reachable and isinstance(error, ValueError) else []
        if configurations and (config or len(configurations) > 1) and config not in configurations:
            what = f"no configuration {config!r}" if config else "several configurations, and none is given"
            there = ", ".join(configurations[:SHOWN_CONFIGURATIONS])
            if len(configurations) > SHOWN_CONFIGURATIONS:
                there += f" and {len(configurations) - SHOWN_CONFIGURATIONS} more"
            example = with_value(option, f"{dataset_id}:{configurations[0]}")
            raise UserError(f"hub dataset {dataset_id}: {what}; it has {there}; give one: {example}") from error
        why = f"{causes(error)}. "
        if not reachable:
            why = f"not in the local cache, and the Hugging Face Hub cannot be reached ({causes(error)}). "
            if not config and isinstance(error, ValueError):
                why += f"To use a cached configuration, give its name: {with_value(option, dataset_id + ':NAME')}. "
        elif isinstance(error, denied):
            why += _access(dataset_id, option)
        raise UserError(f"hub dataset {location}: {why}{_elsewhere(option)}") from error


class _AsText(dict):
    """A mapping for pandas' `converters`: every column is read as text.

    Without it pandas converts 007 to a number and true to a boolean, depending on the other values of the column.
    """

    def __contains__(self, column: object) -> bool:
        return True

    def __getitem__(self, column: object) -> type[str]:
        return str

    def get(self, column: object, default: object = None) -> type[str]:
        """The conversion for a column, by its name or its index."""
        return str


def _load_hub_splits(dataset_id: str, config: str | None, reachable: bool) -> "DatasetDict":
    """Load the splits of one configuration; cells of CSV files as text, and no string counts as a missing value."""
    from datasets import load_dataset, load_dataset_builder
    from datasets.packaged_modules.csv.csv import Csv

    as_text = {"keep_default_na": False, "converters": _AsText()}
    if not reachable:  # only the cache knows the file type, and the options with which the files were read
        for options in (as_text, {"keep_default_na": False}):
            with contextlib.suppress(ValueError):
                return load_dataset(dataset_id, config, **options)
        return load_dataset(dataset_id, config)
    builder = load_dataset_builder(dataset_id, config)
    if isinstance(builder, Csv):
        return load_dataset(dataset_id, builder.config.name, **as_text)
    return load_dataset(dataset_id, config)


def _configurations(dataset_id: str) -> list[str]:
    """The names of the dataset's configurations; empty if the Hub does not say."""
    from datasets import exceptions, get_dataset_config_names

    try:
        return get_dataset_config_names(dataset_id)
    except (exceptions.DatasetsError, OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError):
        return []


def causes(error: BaseException) -> str:
    """An error's full message and those of the errors that caused it, the root cause last; on one line."""
    told: list[str] = []
    current: BaseException | None = error
    while current is not None and len(told) < MOST_CAUSES:
        text = " ".join(str(current).split()).rstrip(".")
        told.append(f"{type(current).__name__}: {text[:LONGEST_CAUSE]}" if text else type(current).__name__)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return "; caused by ".join(dict.fromkeys(told))


def _access(dataset_id: str, option: str) -> str:
    """How to get access to a dataset that the Hub refuses to show."""
    steps = f"Accept its terms at https://huggingface.co/datasets/{dataset_id}, then run `hf auth login`. "
    copy = OPEN_COPIES.get(dataset_id)
    return steps + (f"Or use the open copy: {with_value(option, copy)}. " if copy else "")


def _hub_table(splits: "DatasetDict", wanted: frozenset[str], where: str) -> Table:
    columns: dict[str, None] = {}
    records: list[Record] = []
    for split in splits.values():
        if split.num_rows > MAX_RECORDS:
            raise UserError(f"hub dataset {where}: more than {MAX_RECORDS:,} records; give a file with fewer records")
        columns |= dict.fromkeys(split.column_names)
        if twice := [
            name for name in split.column_names if name.endswith(".1") and name[:-2].strip().lower() in wanted
        ]:
            # pandas renames the second of two columns with the same name
            raise UserError(f"hub dataset {where}: two columns are named {twice[0][:-2]!r}; give a file with one")
        spelled = matching_columns(split.column_names, wanted, where)
        for record in split.select_columns(list(spelled.values())):  # other columns may be images; do not decode them
            add_record(records, {name: record[column] for name, column in spelled.items()}, where)
    return Table(tuple(columns), records)


def _elsewhere(option: str) -> str:
    wanted, none = with_value(option, "PATH"), with_value(option, "none")
    return f"Give a local copy with {wanted}, or {none}; --tiny needs no download"


def with_value(option: str, value: str) -> str:
    """An option with its value, for example `--medquad none` or `--data notes=none`."""
    return f"{option}{'=' if option.startswith('--data ') else ' '}{value}"
