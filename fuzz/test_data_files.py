"""Generated data files, `make fuzz`: odd text, odd formats, damage. Each is read right, or refused by name.

Apart from `make test`, because what it tries differs from run to run. A failure prints how to repeat it.
"""

import csv
import io
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medqa.config import PUBLIC, Data, Tokenization
from medqa.data.sources import Source, is_seen, load_sources
from medqa.data.splits import SPLITS, split_rows
from medqa.data.tokens import prompt_ids, tokenize
from medqa.errors import UserError
from medqa.model.base import load_tokenizer
from medqa.tiny import BASE_DIR

FUZZ = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", 1000)), deadline=None, print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)  # fmt: skip

# Of everything, and often of what readers stumble over.
NASTY = st.sampled_from(
    ["", " ", "\n", "\r\n", "\r", "\t", '"', '""', '","', "'", ",", ";", "\\", "\0", "\ufeff", "\u2028", "\u0085",
     "\x1a", "\ud800", "NA", "None", "null", "nan", "</s>", "<s>", "### Response:\n", "=1+1", "a\u0301", "\U0001f600",
     "\u202e", "]]>", "&amp;", "&#0;", "{", "[1]", "1e400", "../../x", "/etc/passwd"]
)  # fmt: skip
TEXT = st.lists(st.one_of(NASTY, st.text(max_size=20)), max_size=6).map("".join)
WHOLE = TEXT.map(lambda text: text.encode("utf-8", "ignore").decode().replace("\0", ""))
HUGE = st.builds(
    lambda text, times: text * times, st.sampled_from(["x", "word ", 'a"b', "é\n"]), st.integers(50_000, 90_000)
)
CELL = st.one_of(TEXT, HUGE, st.none(), st.booleans(), st.integers(), st.floats(), st.lists(st.integers(), max_size=2))
ANY = st.recursive(
    CELL, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6
)
NAME = st.one_of(
    st.sampled_from(["question", "answer", "Question", " answer ", "source", "focus_area", "group", "topic"]), TEXT
)
SOURCE = st.sampled_from(["medquad", "afrimedqa", "own"])
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "latin-1", "utf-32"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(BASE_DIR))


def data_of(option: str, path: Path) -> Data:
    """The one source; any other name than the two is data of one's own."""
    if option in PUBLIC:
        return Data(**{"medquad": "none", "afrimedqa": "none", option: str(path)})
    return Data(medquad="none", afrimedqa="none", files={option: str(path)})


def read(content: bytes, suffix: str, option: str = "medquad", name: str = "data") -> Source | None:
    """What is read of a file, None if it is refused. The file stays as it is, and alone."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / f"{name}{suffix}"
        path.write_bytes(content)
        try:
            (source,) = load_sources(data_of(option, path))
        except UserError as error:
            assert str(path) in str(error)
            source = None
        assert os.listdir(directory) == [path.name]
        assert path.read_bytes() == content
    return source


def assert_clean(source: Source | None) -> None:
    """Rows are text, and are accounted for."""
    if source is None:
        return
    assert source.read == len(source.rows) + sum(source.dropped.values())
    assert len({row.id for row in source.rows}) == len(source.rows)
    for row in source.rows:
        assert row.id.split(":")[0] == source.name
        for text in (row.question, row.answer):
            assert text
            assert text == text.strip()
            text.encode("utf-8")


def damaged(draw: Callable, content: bytes) -> bytes:
    """A file cut, with bytes changed, or as it is."""
    content = bytearray(content)
    for place in draw(st.lists(st.integers(0, max(0, len(content) - 1)), max_size=4)):
        if content:
            content[place] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)


def encoded(text: str, encoding: str) -> bytes:
    return text.encode(encoding, "surrogatepass" if encoding.startswith("utf") else "replace")


@FUZZ
@given(st.data())
def test_csv(data):
    names = data.draw(st.lists(NAME, max_size=5)) + data.draw(
        st.sampled_from([[], ["question", "answer"], ["question", "answer", "group", "topic"]])
    )
    rows = data.draw(st.lists(st.lists(CELL.map(str), max_size=8), max_size=6))
    text = io.StringIO()
    writer = csv.writer(
        text, lineterminator=data.draw(st.sampled_from(["\n", "\r\n", "\r"])), escapechar="\\",
        delimiter=data.draw(st.sampled_from([",", ";", "\t"])), quoting=data.draw(st.sampled_from([0, 1, 2])),
    )  # fmt: skip
    writer.writerows([names, *rows])
    content = damaged(data.draw, encoded(text.getvalue(), data.draw(st.sampled_from(ENCODINGS))))
    assert_clean(read(content, ".csv", data.draw(SOURCE)))


@FUZZ
@given(st.data())
def test_jsonl(data):
    records = data.draw(st.lists(st.dictionaries(NAME, ANY, max_size=4) | ANY, max_size=6))
    end = data.draw(st.sampled_from(["\n", "\r\n", "\r", "\n\n"]))
    text = end.join(json.dumps(record, ensure_ascii=data.draw(st.booleans())) for record in records)
    deep = data.draw(st.sampled_from(["", "[" * 100_000, '{"question":' * 50_000, '{"question": 1' + "0" * 5000 + "}"]))
    content = damaged(data.draw, encoded(text + end + deep, data.draw(st.sampled_from(ENCODINGS))))
    assert_clean(read(content, ".jsonl", data.draw(SOURCE)))


@FUZZ
@given(st.data())
def test_parquet(data):
    columns = data.draw(
        st.sampled_from(
            [["question", "answer"], ["question", "answer", "question "], ["question", "answer", "group"], ["x"], []]
        )
    )
    kinds = [WHOLE, st.integers(-(2**60), 2**60), st.floats(), st.booleans(), st.lists(WHOLE, max_size=2), st.binary()]
    count = data.draw(st.integers(0, 5))
    table = pa.table(
        [
            data.draw(st.lists(st.none() | data.draw(st.sampled_from(kinds)), min_size=count, max_size=count))
            for _ in columns
        ],
        names=columns,
    )
    place = io.BytesIO()
    pq.write_table(table, place, compression=data.draw(st.sampled_from(["snappy", "gzip", "none", "zstd"])))
    assert_clean(read(damaged(data.draw, place.getvalue()), ".parquet", data.draw(SOURCE)))


@FUZZ
@given(
    st.binary(max_size=3000) | TEXT.map(lambda text: encoded(text, "utf-8")),
    st.sampled_from([".csv", ".jsonl", ".parquet"]),
)
def test_anything(content, suffix):
    assert_clean(read(content, suffix))


@FUZZ
@given(st.data())
def test_xml(data):
    inner = "".join(
        f"<QAPair><Question>{data.draw(TEXT)}</Question><Answer>{data.draw(TEXT)}</Answer></QAPair>"
        for _ in range(data.draw(st.integers(0, 3)))
    )
    head = data.draw(
        st.sampled_from(
            ["", '<?xml version="1.0" encoding="utf-16"?>', '<!DOCTYPE x [<!ENTITY a "b"><!ENTITY c "&a;&a;">]>',
             '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]>']
        )
    )  # fmt: skip
    content = damaged(data.draw, encoded(f"{head}<Document><QAPairs>{inner}&a;</QAPairs></Document>", "utf-8"))
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "1_x").mkdir()
        path = Path(directory) / "1_x" / "0000001.xml"
        path.write_bytes(content)
        try:
            sources = load_sources(Data(medquad=directory, afrimedqa="none"))
        except UserError as error:
            assert directory in str(error)
        else:
            assert_clean(sources[0])
            assert "root:" not in str(sources[0].rows)
        assert path.read_bytes() == content


PAIRS = st.lists(
    st.tuples(WHOLE, WHOLE), min_size=1, max_size=8, unique_by=lambda pair: (pair[0].strip(), pair[1].strip())
)


@FUZZ
@given(PAIRS, st.sampled_from([".csv", ".jsonl", ".parquet"]), st.data())
def test_what_is_well_formed_is_read_as_it_stands(pairs, suffix, data):
    """Whatever the text: every row whose question and answer are not empty, and no other."""
    rows = [{"question": question, "answer": answer} for question, answer in pairs]
    if suffix == ".csv":
        text = io.StringIO()
        end = data.draw(st.sampled_from(["\n", "\r\n"]))
        writer = csv.DictWriter(text, ["question", "answer"], lineterminator=end, quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
        content = text.getvalue().encode(data.draw(st.sampled_from(["utf-8", "utf-8-sig"])))
    elif suffix == ".jsonl":
        content = "".join(json.dumps(row, ensure_ascii=data.draw(st.booleans())) + "\n" for row in rows).encode()
    else:
        place = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), place)
        content = place.getvalue()
    expected = [(question.strip(), answer.strip()) for question, answer in pairs]
    expected = [pair for pair in expected if all(map(is_seen, pair))]
    source = read(content, suffix)
    found = [] if source is None else [(row.question, row.answer) for row in source.rows]
    assert found == list(dict.fromkeys(expected))


@settings(FUZZ, max_examples=100)
@given(st.lists(st.tuples(WHOLE, WHOLE), min_size=20, max_size=30))
def test_whatever_is_read_can_be_split_and_tokenized(tokenizer, pairs):
    content = "".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in pairs).encode()
    source = read(content, ".jsonl")
    if source is None:
        return
    try:
        splits = split_rows(source.rows, "grouped", 42, (0.8, 0.1, 0.1))
    except UserError:
        return  # too few groups for three splits
    rows = [row for name in SPLITS for row in getattr(splits, name)]
    assert sorted(row.id for row in rows) == sorted(row.id for row in source.rows)
    examples = tokenize(rows, tokenizer, Tokenization(max_length=64))
    short = {row.id for row in rows if len(prompt_ids(row.question, tokenizer)) < 56}
    assert short <= {example.row.id for example in examples}
    for example in examples:
        assert 0 < example.answer_start < len(example.input_ids) <= 64
        assert 0 <= example.input_ids.min() <= example.input_ids.max() < len(tokenizer)
