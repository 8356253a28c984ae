"""From every place and format to the same rows; every broken input named with its file and the way out."""

import bz2
import csv
import errno
import gzip
import hashlib
import http.server
import json
import lzma
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from medqa.config import Data
from medqa.data.readers import read_file
from medqa.data.sources import Row, Source, load_sources
from medqa.errors import UserError

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not (SHARED / "medquad.csv").exists(), reason=f"no real data in {SHARED}")

MEDQUAD = [
    {"question": " What is flu ?\n", "answer": "  A viral infection,\nquoted as \"flu\".  ", "focus_area": "Influenza"},
    {"question": "What is NA ?", "answer": "NA", "focus_area": ""},
    {"question": "No answer ?", "answer": "", "focus_area": "Nothing"},
    {"question": "", "answer": "No question.", "focus_area": "Nothing"},
    {"question": "What is flu ?", "answer": "A viral infection,\nquoted as \"flu\".", "focus_area": "Influenza"},
    {"question": "Qu\u2019est-ce ? \u65e5\u672c\u2028x", "answer": "null", "focus_area": "Caf\u00e9"},
]  # fmt: skip
OPTIONS = '{"option1": "Malaria", "option2": " Flu ", "option3": "", "option4": "A cold"}'
AFRIMEDQA = [
    {"question_type": "mcq", "question": "raw", "question_clean": "Which ?", "answer_options": OPTIONS, "prompt": ""},
    {"question_type": "saq", "question": "Why ?", "question_clean": "", "answer_options": OPTIONS, "prompt": "Unused."},
    {"question_type": "consumer_queries", "question": "Should I ?", "question_clean": "", "answer_options": "",
     "prompt": "I have a rash."},
]  # fmt: skip
AFRIMEDQA = [record | {"answer_rationale": f"Because {number}."} for number, record in enumerate(AFRIMEDQA)]


def write(path: Path, records: list[dict]) -> str:
    """The records in the format that the suffix names; an empty cell is null where the format has one."""
    columns = list(records[0])
    match path.suffix.lower():
        case ".csv":
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(records)
        case ".jsonl":
            lines = (json.dumps({k: v or None for k, v in r.items()}, ensure_ascii=False) for r in records)
            path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
        case ".parquet":
            parquet.write_table(pa.table({c: [r[c] or None for r in records] for c in columns}), path)
    return str(path)


def write_xml(directory: Path, records: list[dict]) -> str:
    """MedQuAD's own layout, a document for each record, in files whose sorted order is that of the records."""
    from xml.sax.saxutils import escape

    for number, record in enumerate(records):
        file = directory / f"{number // 4}_Collection" / f"{number:07d}.{'XML' if number % 2 else 'xml'}"
        file.parent.mkdir(parents=True, exist_ok=True)
        q, a, focus = (escape(record[key]) for key in ("question", "answer", "focus_area"))
        file.write_text(
            f'<?xml version="1.0" encoding="UTF-8"?>\n<Document id="{number}" source="S" url="http://x"><Focus>{focus}'
            f'</Focus><QAPairs><QAPair pid="1"><Question qid="{number}-1" qtype="t">{q}</Question><Answer>{a}</Answer>'
            "</QAPair></QAPairs></Document>",
            encoding="utf-8",
        )
    return str(directory)


def medquad(location: str | Path) -> Source:
    (source,) = load_sources(Data(medquad=str(location), afrimedqa="none"))
    return source


def afrimedqa(location: str | Path) -> Source:
    (source,) = load_sources(Data(medquad="none", afrimedqa=str(location)))
    return source


def afrimedqa_questions(tmp_path: Path, *records: dict) -> list[str]:
    base = {"question": "Q ?", "question_type": "mcq", "answer_rationale": "R."}
    lines = [json.dumps(base | record | {"answer_rationale": f"R{n}."}) for n, record in enumerate(records)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    return [row.question for row in afrimedqa(tmp_path / "a.jsonl").rows]


def test_every_format_gives_the_same_medquad_rows(tmp_path: Path) -> None:
    files = [write(tmp_path / f"m{suffix}", MEDQUAD) for suffix in (".csv", ".jsonl", ".parquet", ".CSV")]
    sources = [medquad(file) for file in [*files, write_xml(tmp_path / "xml", MEDQUAD)]]
    assert len(sources) == 5
    for source in sources:
        assert source.rows == (
            Row("medquad:0", "medquad", "What is flu ?", 'A viral infection,\nquoted as "flu".', "Influenza"),
            Row("medquad:1", "medquad", "What is NA ?", "NA", None),
            Row("medquad:5", "medquad", "Qu\u2019est-ce ? \u65e5\u672c\u2028x", "null", "Caf\u00e9"),
        )
        assert source.read == 6
        assert source.dropped == {"empty answer": 1, "empty question": 1, "duplicate": 1}
    assert [source.location for source in sources[:4]] == files


def test_every_format_gives_the_same_afrimedqa_rows(tmp_path: Path) -> None:
    for suffix in (".csv", ".jsonl", ".parquet"):
        source = afrimedqa(write(tmp_path / f"a{suffix}", AFRIMEDQA))
        assert source.rows == (
            Row("afrimedqa:0", "afrimedqa", "Which ?\nA. Malaria\nB. Flu\nD. A cold", "Because 0.", None),
            Row("afrimedqa:1", "afrimedqa", "Why ?", "Because 1.", None),
            Row("afrimedqa:2", "afrimedqa", "I have a rash.\nShould I ?", "Because 2.", None),
        )
        assert source.dropped == {}


@pytest.mark.parametrize(
    ("header", "topic"),
    [
        ("question,answer,source,focus_area", "T"),
        ("Question,Answer,qtype,Focus", "T"),
        ("QUESTION, Answer ,x,focus", "T"),
        ("question,answer,x,question_focus", "T"),
        ("question,answer,qtype,source", None),
    ],
)
def test_medquad_column_variants(tmp_path: Path, header: str, topic: str | None) -> None:
    (tmp_path / "m.csv").write_text(f"{header}\nQ ?,A.,x,T\n")
    assert medquad(tmp_path / "m.csv").rows == (Row("medquad:0", "medquad", "Q ?", "A.", topic),)


def test_afrimedqa_column_variants(tmp_path: Path) -> None:
    for header in ("question,answer_rationale", "Question_Clean,Rationale", "question,RATIONALE"):
        (tmp_path / "a.csv").write_text(f"{header}\nQ ?,R.\n")
        assert afrimedqa(tmp_path / "a.csv").rows == (Row("afrimedqa:0", "afrimedqa", "Q ?", "R.", None),)


@pytest.mark.parametrize(
    "options",
    [
        '{"option1": "x", "option2": "y"}',
        '["x", " y "]',
        "{'option1': 'x', 'option2': 'y'}",
        "['x', 'y']",
        {"option1": "x", "option2": "y", "option3": None},
        ["x", "y"],
    ],
)
def test_options_are_read_in_every_spelling(tmp_path: Path, options: object) -> None:
    assert afrimedqa_questions(tmp_path, {"answer_options": options}) == ["Q ?\nA. x\nB. y"]


def test_numbers_may_be_options_and_a_copy_may_lack_the_kind(tmp_path: Path) -> None:
    numbers = {"answer_options": '{"option1": 7, "option2": 0.5}', "question_type": None}
    assert afrimedqa_questions(tmp_path, numbers) == ["Q ?\nA. 7\nB. 0.5"]


@pytest.mark.parametrize("options", [None, "", "  ", "{}", "[]", "null", "nan", "None", "NaN", float("nan")])
def test_no_options_leave_the_question_alone(tmp_path: Path, options: object) -> None:
    assert afrimedqa_questions(tmp_path, {"answer_options": options}) == ["Q ?"]


@pytest.mark.parametrize(
    "options",
    ["{'option1': ", "x, y", '"x"', "7", "__import__('os')", '{"option1": {"a": 1}}', "[" * 9999, 5, ["x"] * 27,
     '["\\ud800"]', "{[]: 1}"],
)  # fmt: skip
def test_unreadable_options_drop_a_multiple_choice_row_and_no_other(tmp_path: Path, options: object) -> None:
    record = {"question": "Q ?", "answer_rationale": "R.", "answer_options": options}
    lines = [json.dumps(record | {"question_type": kind, "question": kind}) for kind in ("mcq", "saq", "MCQ")]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    source = afrimedqa(tmp_path / "a.jsonl")
    assert [row.id for row in source.rows] == ["afrimedqa:1"]
    assert source.dropped == {"unreadable options": 2}


def test_duplicates_are_found_over_both_sources_and_the_first_wins(tmp_path: Path) -> None:
    same = {"question": "Q ?", "answer": "A."}
    one = write(tmp_path / "m.csv", [same, same, {"question": "Q ?", "answer": "B."}])
    two = write(
        tmp_path / "a.csv",
        [{"question": " Q ? ", "answer_rationale": "A."}, {"question": "q ?", "answer_rationale": "A."}],
    )
    first, second = load_sources(Data(medquad=one, afrimedqa=two))
    assert ([row.id for row in first.rows], first.dropped) == (["medquad:0", "medquad:2"], {"duplicate": 1})
    assert ([row.id for row in second.rows], second.dropped) == (["afrimedqa:1"], {"duplicate": 1})


def test_nan_is_a_missing_text(tmp_path: Path) -> None:  # as pandas writes one
    (tmp_path / "m.jsonl").write_text('{"question": "Q ?", "answer": NaN}\n{"question": "Q ?", "answer": "NaN"}\n')
    source = medquad(tmp_path / "m.jsonl")
    assert ([row.answer for row in source.rows], source.dropped) == (["NaN"], {"empty answer": 1})


def test_csv_dialects_that_people_have(tmp_path: Path) -> None:
    body = 'question,answer\r\n"Q ""x"" ?","A,\r\nB."\r\n\r\n" 5"" long",x\r\n'
    (tmp_path / "m.csv").write_bytes(b"\xef\xbb\xbf" + body.encode())  # as Excel saves "CSV UTF-8"
    rows = medquad(tmp_path / "m.csv").rows
    assert [(row.question, row.answer) for row in rows] == [('Q "x" ?', "A,\r\nB."), ('5" long', "x")]
    (tmp_path / "long.csv").write_text(f"question,answer\nQ ?,{'a' * 200_000}\n")  # beyond csv's default field limit
    limit = csv.field_size_limit()
    assert len(medquad(tmp_path / "long.csv").rows[0].answer) == 200_000
    assert csv.field_size_limit() == limit


GOOD = "question,answer\nQ ?,A.\n"
BROKEN_FILES = [
    ("empty.csv", b"", "empty.csv: the file is empty"),
    ("blank.jsonl", b"\n \n", "the file is empty"),
    ("header.csv", b"question,answer\n", "no usable row among 0 records (it has no records)"),
    ("columns.csv", b"query,response\nx,y\n", "no column question and answer; columns found: query, response."),
    ("column.csv", b"question,reply\nx,y\n", "no column answer; columns found: question, reply."),
    ("semicolon.csv", b"question;answer\nx;y\n", "the fields are separated by semicolons"),
    ("bom.csv", b"\xef\xbb\xbf", "columns found: none"),
    ("twice.csv", b"question,answer,Question\nx,y,z\n", "two columns are named 'question'"),
    ("unseen.csv", "question,answer,answer\u200b\nx,y,z\n".encode(), "two columns are named 'answer'"),
    ("wide.csv", "question,answer,ａｎｓｗｅｒ\nx,y,z\n".encode(), "two columns are named 'answer'"),
    ("long.csv", GOOD.encode() + b"Q, ?,A.\n", "long.csv, line 3: 3 fields where the header has 2"),
    ("short.csv", GOOD.encode() + b"\nQ ?\n", "short.csv, line 4: 1 fields where the header has 2"),
    ("all_long.csv", b"question,answer\na,b,c\nd,e,f\n", "all_long.csv, line 2: 3 fields"),
    ("quote.csv", GOOD.encode() + b'Q ?,"A.\nx,y\nz,w\n', "quote.csv, record starting on line 3: broken CSV"),
    ("after.csv", GOOD.encode() + b'"Q" ?,A.\n', "after.csv, record starting on line 3: broken CSV"),
    ("nul.csv", "question,answer\né ?,A.\nQ\0,A.\n".encode(), "nul.csv, line 3: contains a NUL byte"),
    ("utf16.csv", GOOD.encode("utf-16"), "save it as UTF-8"),
    ("latin1.csv", GOOD.encode() + "é,A.\n".encode("latin-1"), "latin1.csv, line 3: not UTF-8 text (byte 0xe9)"),
    ("unusable.csv", b"question,answer\nQ ?,\n,A.\n", "no usable row among 2 records (1 empty answer, 1 empty"),
    ("broken.jsonl", b'{"question": "Q", "answer": "A"}\n{"question": \n', "broken.jsonl, line 2: broken JSON"),
    ("array.jsonl", b'["Q", "A"]\n', "array.jsonl, line 1: a JSON list; each line must be one JSON object"),
    ("deep.jsonl", b"[" * 100_000, "deep.jsonl, line 1: broken JSON"),
    ("number.jsonl", b'{"question": "Q", "answer": "A"}\n{"question": "Q", "answer": 7}\n',
     "record 1 (the first is 0), column 'answer': 7 is not text"),
    ("object.jsonl", b'{"question": {"a": 1}, "answer": "A"}', "column 'question': {'a': 1} is not text"),
    ("surrogate.jsonl", b'{"question": "Q\\ud800", "answer": "A"}', "surrogate.jsonl, record 0"),
    ("twice.jsonl", b'{"question": "Q", "Question": "P", "answer": "A"}', "two columns are named 'question'"),
    ("broken.parquet", b"PAR1 and then nothing", "broken.parquet"),
    ("short.parquet", b"PAR1", "short.parquet"),
    ("table.xlsx", b"PK", "table.xlsx: unknown type of file; convert it to one of .csv, .jsonl, .parquet"),
    ("one.xml", b"<Document/>", "one.xml: unknown type of file"),
    ("tabs.csv", b"question\tanswer\nx, y\tz\n", "the fields are separated by tabs; save the file with commas"),
    ("bars.csv", b"id|Question|ANSWER,x\n1|x|y\n", "the fields are separated by vertical bars"),
    ("quoted.csv", b'"question";"answer"\r\n"x";"y"\r\n', "the fields are separated by semicolons"),
    ("bom_semicolon.csv", "\ufeffquestion;answer\nx, y, z;w\n".encode(), "the fields are separated by semicolons"),
    ("sep.csv", b"sep=;\r\nquestion;answer\r\nx;y\r\n", 
     "line 1: 'sep=;' is Excel's note about the separator, not the header; remove the line, and save the file with"),
    ("sep_comma.csv", b"SEP=,\nquestion,answer\nx,y\n", "not the header; remove the line"),
    ("space.csv", GOOD.encode() + b'Q, "A"\n', "space.csv, line 3: whitespace before a double quote"),
    ("space_comma.csv", GOOD.encode() + b'"Q",\t"A, B"\n', "line 3: whitespace before a double quote"),
    ("space_line.csv", GOOD.encode() + b'"Q",  "A\n B"\n', "space_line.csv, line 3: whitespace before a double quote"),
    ("space_text.csv", GOOD.encode() + b'Q, "A" is a letter\n', "line 3: whitespace before a double quote"),
    ("space_first.csv", GOOD.encode() + b' "Q",A\n', "line 3: whitespace before a double quote"),
    ("space_header.csv", b'question, "answer"\nQ,A\n', "line 1: whitespace before a double quote"),
    ("ctrlz.csv", GOOD.encode() + b"\x1a", "line 3: ends with Ctrl-Z, DOS's end-of-file character; remove it"),
    ("ctrlz.jsonl", b'{"question": "Q", "answer": "A"}\r\n\x1a\r\n', "ctrlz.jsonl, line 2: ends with Ctrl-Z"),
    ("lines.csv", GOOD.encode() + b"Q\nQ,A\n", "line 3: 1 fields where the header has 2; a field is missing"),
    ("pointer.csv", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "this is a Git LFS pointer"),
    ("pointer.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run `git lfs pull`"),
    ("pointer.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "this is a Git LFS pointer"),
    ("page.csv", b"\n <!DOCTYPE html>\n<html><title>a, b</title>", "this is a web page, not the data"),
    ("page.parquet", b"<HTML><body>Not found", "this is a web page, not the data"),
    ("denied.csv", b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>', "an XML document or a web page"),
    ("missing.jsonl", b"404: Not Found", "this is an error page of a web server, not the data"),
    ("gzip.csv", gzip.compress(GOOD.encode()), "this is compressed by gzip; unpack it"),
    ("gzip.jsonl", gzip.compress(b"{}"), "this is compressed by gzip; unpack it"),
    ("bzip2.csv", bz2.compress(GOOD.encode()), "this is compressed by bzip2; unpack it"),
    ("xz.csv", lzma.compress(GOOD.encode()), "this is compressed by xz; unpack it"),
    ("workbook.csv", b"PK\x03\x04\x14\0", "a ZIP archive or an Excel workbook"),
    ("parquet.csv", b"PAR1\x15\x04", "this is a parquet file; give it the suffix .parquet"),
    ("keys.jsonl", b'{"question": "Q", "answer": "A"}\n{"question": "Q", "answer": "A", "x": 1, "answer": "v7"}\n',
     "keys.jsonl, line 2: broken JSON (the key 'answer' is repeated in one object)"),
    ("inner.jsonl", b'{"question": "Q", "answer": "A", "x": {"a": 1, "a": 2}}', "the key 'a' is repeated"),
    ("case.jsonl", b'{"question": "Q", "answer": "A", "Answer": "B"}', "line 1: two columns are named 'answer'"),
    ("spaces.csv", b"question,answer, ANSWER\nx,y,z\n", "two columns are named 'answer'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), BROKEN_FILES, ids=[case[0] for case in BROKEN_FILES])
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as raised:
        medquad(tmp_path / name)
    assert name in str(raised.value)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (' " ""quoted"" at once"', '"quoted" at once'),  # the white space is within the quotes
        ('"yes, ""no"", \t""maybe"""', 'yes, "no", \t"maybe"'),
        ('"a\n ""b"""', 'a\n "b"'),
        (" no quote", "no quote"),
        ('5 "feet" long', '5 "feet" long'),
    ],
)
def test_quotes_within_a_field_are_text(tmp_path: Path, text: str, answer: str) -> None:
    text = text.removeprefix(" ") if text.startswith(' "') else text
    (tmp_path / "m.csv").write_text(f'question,answer,x\n"Q, ""x""",{text},\n')
    assert [row.answer for row in medquad(tmp_path / "m.csv").rows] == [answer]
    (tmp_path / "m.csv").write_text(f'question,answer,x\nQ,{text}, "not read"\n')  # a column that is not wanted
    assert [row.answer for row in medquad(tmp_path / "m.csv").rows] == [answer]


def test_other_separators_within_text_are_text(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("question,answer;x,a|b\nQ; ?,A\tB;C,\n".replace("answer;x", "answer"))
    assert [(row.question, row.answer) for row in medquad(tmp_path / "m.csv").rows] == [("Q; ?", "A\tB;C")]


def test_what_cannot_be_seen_is_no_answer(tmp_path: Path) -> None:
    unseen = [*"\u200b\ufeff\u00a0\u2060\u200e\u00ad\u3000\u180e\0\x7f\u3164\u2800\u115f\ufe0f\u0301\u034f\U000e0041"]
    unseen += ["\u200b\n\u200c", "\ufeff "]
    seen = ["0", "-", "\u2713", "\u0915\u093e", "\u200b.", "\U0001f600", "\ue000"]
    records = [{"question": f"Q {n}", "answer": answer} for n, answer in enumerate([*unseen, *seen])]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, records)))
    source = medquad(tmp_path / "m.jsonl")
    assert [row.answer for row in source.rows] == seen
    assert source.dropped == {"empty answer": len(unseen)}


@pytest.mark.parametrize("spelling", ['{"option1": "x", "option1": "y"}', "{'option1': 'x', 'option1': 'y'}"])
def test_options_of_which_one_stands_twice_are_unreadable(tmp_path: Path, spelling: str) -> None:
    record = {"question": "Q ?", "answer_rationale": "R.", "answer_options": spelling, "question_type": "mcq"}
    records = [record, record | {"question_type": "saq"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    source = afrimedqa(tmp_path / "a.jsonl")
    assert (len(source.rows), source.dropped) == (1, {"unreadable options": 1})


def test_limits_are_asked_before_a_file_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for suffix in (".csv", ".jsonl", ".parquet"):
        write(tmp_path / f"m{suffix}", MEDQUAD)
    (tmp_path / "empty.parquet").write_bytes(b"")
    monkeypatch.setattr("medqa.data.readers.MAX_RECORDS", 6)
    assert [len(medquad(tmp_path / f"m{suffix}").rows) for suffix in (".csv", ".jsonl", ".parquet")] == [3, 3, 3]
    monkeypatch.setattr("medqa.data.readers.MAX_RECORDS", 5)
    for suffix in (".csv", ".jsonl", ".parquet"):
        with pytest.raises(UserError, match=rf"m{suffix}: more than 5 records; give fewer"):
            medquad(tmp_path / f"m{suffix}")
    monkeypatch.setattr("medqa.data.readers.MAX_RECORDS", 100)
    monkeypatch.setattr("medqa.data.readers.MAX_DATA_BYTES", 100)
    for suffix, message in ((".csv", "longer than 100 bytes"), (".parquet", "more than 100 characters of text")):
        with pytest.raises(UserError, match=rf"m{suffix}: .*{message}"):
            medquad(tmp_path / f"m{suffix}")


def test_a_parquet_file_that_claims_millions_of_rows_is_refused_at_once(tmp_path: Path) -> None:
    """A file of a few kilobytes, whose rows would take gigabytes."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 3_000_000, pa.int8()), pa.array(["x"]))
    parquet.write_table(pa.table({"question": column, "answer": column}), tmp_path / "m.parquet", compression="zstd")
    assert (tmp_path / "m.parquet").stat().st_size < 100_000
    with pytest.raises(UserError, match=r"m\.parquet: more than 2,000,000 records"):
        medquad(tmp_path / "m.parquet")


def test_what_memory_cannot_hold_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "m.parquet", MEDQUAD)

    def full(*_: object) -> None:
        raise pa.ArrowMemoryError("malloc of size 9 failed")

    monkeypatch.setattr("medqa.data.readers.add_record", full)
    with pytest.raises(UserError, match=r"m\.parquet: too large for the memory of this machine; give fewer records"):
        medquad(tmp_path / "m.parquet")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_pipe_in_place_of_a_file_is_refused(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"m{suffix}")
    with pytest.raises(UserError, match=rf"m{suffix}: cannot be read \(not a regular file\)"):
        medquad(tmp_path / f"m{suffix}")


def test_a_field_twice_in_a_parquet_cell_is_refused(tmp_path: Path) -> None:
    options = pa.StructArray.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["option1", "option1"])
    table = pa.table({"question": ["Q"], "answer_rationale": ["R"], "answer_options": options})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: broken parquet file \(.*duplicate field names"):
        afrimedqa(tmp_path / "a.parquet")


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd", "lz4", "brotli"])
def test_a_damaged_page_of_a_parquet_file_is_answered_as_a_truncated_file_is(tmp_path: Path, compression: str) -> None:
    cells = [f"{n * 7919 % 10007} in words" for n in range(3000)]
    path = tmp_path / "m.parquet"
    parquet.write_table(
        pa.table({"question": cells, "answer": cells}), path, compression=compression, use_dictionary=False
    )
    whole = path.read_bytes()
    path.write_bytes(whole[:2000] + b"\xff" * 200 + whole[2200:])
    with pytest.raises(UserError, match=r"m\.parquet: broken parquet file \(.+\); download or export it again$"):
        medquad(path)


def test_what_the_system_refuses_of_a_parquet_file_is_not_blamed_on_the_file(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path / "m.parquet", MEDQUAD)

    def failing_disk(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", failing_disk)
    with pytest.raises(UserError, match=r"m\.parquet: cannot be read \(Input/output error\)"):
        medquad(tmp_path / "m.parquet")


def test_many_columns_are_not_all_listed(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text(",".join(f"c{n}" for n in range(5000)) + "\n")
    with pytest.raises(UserError, match=r"columns found: c0, .*, c19 and 4,980 more\. Rename"):
        medquad(tmp_path / "m.csv")


def test_parquet_cells_that_are_not_text_are_refused(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"question": ["Q"], "answer": [1.5]}), tmp_path / "n.parquet")
    with pytest.raises(UserError, match=r"n\.parquet, record 0 .* column 'answer': 1\.5 is not text"):
        medquad(tmp_path / "n.parquet")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<Document><Focus>x</Focus>", "broken XML"),
        (b"", "broken XML"),
        (b"\xff\xfe\x00", "broken XML"),
        (b'<?xml version="1.0" encoding="no-such"?><Document/>', "broken XML"),
        (b'<!DOCTYPE d [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><Document>&b;</Document>', "broken XML"),
        (b"<html/>", "the root element is <html>, not MedQuAD's <Document>"),
    ],
)
def test_broken_xml_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    write_xml(tmp_path, MEDQUAD)
    (tmp_path / "1_Collection" / "bad.xml").write_bytes(content)
    with pytest.raises(UserError) as raised:
        medquad(tmp_path)
    assert "bad.xml" in str(raised.value)
    assert message in str(raised.value)


def test_an_answer_twice_in_xml_is_refused(tmp_path: Path) -> None:
    (tmp_path / "b.xml").write_text(
        "<Document><QAPair><Question>Q</Question><Answer>A</Answer><Answer>B</Answer></QAPair></Document>"
    )
    with pytest.raises(UserError, match=r"b\.xml: a <QAPair> has more than one <Answer>"):
        medquad(tmp_path)


def test_a_pointer_among_xml_files_is_said(tmp_path: Path) -> None:
    write_xml(tmp_path, MEDQUAD)
    (tmp_path / "1_Collection" / "bad.xml").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match=r"bad\.xml: this is a Git LFS pointer"):
        medquad(tmp_path)


def test_a_directory_without_xml_and_a_document_without_pairs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \.xml file in this directory"):
        medquad(tmp_path)
    (tmp_path / "a.xml").write_text("<Document><Focus>x</Focus><QAPairs/></Document>")
    with pytest.raises(UserError, match=r"no usable row among 0 records"):
        medquad(tmp_path)
    (tmp_path / "b.xml").write_text(
        "<Document><QAPairs><QAPair><Question>Q <b>x</b> ?</Question></QAPair>"
        "<QAPair><Question>Q <b>x</b> ?</Question><Answer>A</Answer></QAPair></QAPairs></Document>"
    )
    assert medquad(tmp_path).rows == (Row("medquad:1", "medquad", "Q x ?", "A", None),)


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError, match=r"folder\.csv: cannot be read \(Is a directory\)"):
        read_file(tmp_path / "folder.csv", frozenset({"question"}))


@pytest.mark.parametrize(
    ("given", "messages"),
    [
        (("none", " None "), ["no data", "--medquad", "--afrimedqa", "--tiny"]),
        (("no.csv", "none"), ["no.csv: no such file or directory", "--medquad none"]),
        (("./nothing", "~/no/such"), ["./nothing: no such file", "~/no/such: no such file", "--afrimedqa none"]),
        (("a/b/c", "x/y.PARQUET"), ["a/b/c: no such file", "x/y.PARQUET: no such file"]),
        (
            ("medquad", ""),
            ["'medquad' is neither an existing path nor a hub id (owner/name)", "'' is neither an existing path"],
        ),
        (("x" * 4096, "/" + "x" * 4095), ["is neither an existing path", "no such file"]),
        (("kaggle:medquad", "kaggle:a/b"), ["not of the form kaggle:owner/name", "AfriMed-QA is not on Kaggle"]),
        (("data/train.json", "data/all.TSV"), ["data/train.json: no such file", "data/all.TSV: no such file"]),
        (("data/m.csv.gz", "x/y.xlsx"), ["data/m.csv.gz: no such file", "x/y.xlsx: no such file"]),
        (
            ("https://me:S3CRET@x.org/m.csv?key=S3CRET", "http:/S3CRET@x/y"),
            [
                "https://x.org/m.csv: is a web address; download the file, and give its path with --medquad",
                "http://x/y: is a web",
            ],
        ),
        (
            ("https://me:S3C/RET@x.org/m.csv", "http://me:S3CRET#S3CRET@x.org/m.csv"),
            ["https://x.org/m.csv: is a web", "http://x.org/m.csv: is a web"],
        ),
        (
            ("https://huggingface.co/datasets/x/y", "hf.co/datasets/x/y"),
            ["give the dataset's id: --medquad x/y", "hf.co/datasets/x/y: no such file"],
        ),
        (("none", str(ROOT)), ["a directory; give --afrimedqa a file (.csv, .parquet, .jsonl)"]),
    ],
)
def test_wrong_locations_are_refused_together(given: tuple[str, str], messages: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        load_sources(Data(medquad=given[0], afrimedqa=given[1]))
    assert [message for message in messages if message not in str(raised.value)] == []
    assert "S3CRET" not in str(raised.value)


def test_a_file_that_is_missing_from_a_directory_is_not_only_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(location: str, *_: object) -> None:
        raise UserError(f"hub dataset {location}: not there")

    monkeypatch.setattr("medqa.data.sources.read_hub", denied)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"hub dataset data/train: not there$"):
        medquad("data/train")
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match=r"not there\. There is a directory data here, but no data/train$"):
        medquad("data/train")


def test_afrimedqa_columns_wanted_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no column question_clean or question and answer_rationale or rationale; col"):
        afrimedqa(write(tmp_path / "m.csv", [{"q": "x", "a": "y"}]))


def test_kagglehub_cache_answers_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nothing listens there
    dataset = tmp_path / "datasets" / "someone" / "medquad"
    for version in (2, 10):  # the newest, in numeric order
        (dataset / "versions" / str(version)).mkdir(parents=True)
        write(dataset / "versions" / str(version) / "m.csv", [{"question": "Q ?", "answer": f"Version {version}."}])
        (dataset / f"{version}.complete").touch()
    (dataset / "11.complete").touch()  # whose files were removed
    (dataset / "versions" / "12").mkdir()  # not downloaded to the end
    assert [row.answer for row in medquad("kaggle:someone/medquad").rows] == ["Version 10."]
    write(dataset / "versions" / "10" / "other.csv", MEDQUAD)
    with pytest.raises(UserError, match=r"expected one CSV file, found m\.csv, other\.csv"):
        medquad("kaggle:someone/medquad")


LOAD = """
import json, sys, time
from medqa.config import Data
from medqa.data.sources import load_sources
from medqa.errors import UserError
for given in json.load(sys.stdin):
    start = time.monotonic()
    try:
        sources = load_sources(Data(medquad=given[0], afrimedqa=given[1]))
        result = [[row.question, row.answer] for source in sources for row in source.rows]
    except UserError as error:
        result = str(error)
    print("RESULT", json.dumps([result, time.monotonic() - start]))
"""


def load_in_a_fresh_process(cases: list[tuple[str, str]], **environment: str) -> list[tuple[str | list, float]]:
    """What `load_sources` gives or says for each case, and its seconds; the hub's state is fixed per process."""
    process = subprocess.run(
        [sys.executable, "-c", LOAD],
        input=json.dumps(cases), capture_output=True, text=True, cwd=ROOT, timeout=120,
        env={k: v for k, v in os.environ.items() if not k.startswith("HF_")} | environment,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    results = [json.loads(line.removeprefix("RESULT ")) for line in lines if line.startswith("RESULT ")]
    assert len(results) == len(cases)
    return results


def test_unreachable_hubs_are_said_within_seconds(tmp_path: Path) -> None:
    start = time.monotonic()
    nowhere = {"HTTPS_PROXY": "http://127.0.0.1:9", "KAGGLEHUB_CACHE": str(tmp_path), "HF_HOME": str(tmp_path)}
    kaggle = "kaggle:pythonafroz/medquad-medical-question-answer-for-ai-research"
    ((message, _),) = load_in_a_fresh_process([(kaggle, "intronhealth/afrimedqa_v2")], **nowhere)
    assert time.monotonic() - start < 15
    for part in (kaggle, "api.kaggle.com cannot be reached", "--medquad PATH", "--medquad none", "--tiny",
                 "intronhealth/afrimedqa_v2", "Hugging Face Hub cannot be reached", "--afrimedqa PATH",
                 "--afrimedqa none"):  # fmt: skip
        assert part in message


JSONL = "".join(json.dumps({"question": f"Q {n} ?", "answer": f"A {n}"}) + "\n" for n in range(3)).encode()
TWO = b"---\nconfigs:\n- config_name: easy\n  data_files: easy.%b\n- config_name: hard\n  data_files: hard.%b\n---\n"
REPOSITORIES = {
    "open/data": {"m.csv": b"question,answer,Focus\nWhat ?,NA,Flu\nWho ?,,Flu\nWhen ?,None,\n"},
    "two/csv": {
        "README.md": TWO.replace(b"%b", b"csv"),
        "easy.csv": b"question,answer\nQ ?,easy\n",
        "hard.csv": b"question,answer\nQ ?,NA\nP ?,007\n",
    },
    "two/jsonl": {
        "README.md": TWO.replace(b"%b", b"jsonl"),
        "easy.jsonl": JSONL,
        "hard.jsonl": JSONL.replace(b"A", b"B"),
    },
    "one/named": {  # one configuration, of another separator, beside a file that is not part of it
        "README.md": b"---\nconfigs:\n- config_name: main\n  data_files: a.csv\n  sep: ';'\n---\n",
        "a.csv": b"question;answer\nQ ?;A, B\n",
        "other.csv": b"question,answer\nP ?,B\n",
    },
    "text/numbers": {
        "train.csv": b"question,answer,group\nQ ?,007,1\nP ?,0.50,\n",
        "test.csv": b"question,answer,group\nR ?,true,2\n",
    },
    "bad/latin": {"m.csv": "question,answer\nQ ?,caf\u00e9\n".encode("latin-1")},
    "bad/columns": {"train.csv": b"question,answer\nQ,A\n", "test.csv": b"question,answer,more\nQ,A,x\n"},
    "bad/twice": {"m.csv": b"question,answer,answer\nQ,A,B\n"},
    "bad/semicolons": {"m.csv": b"question;answer\nQ;A\n"},
    "bad/readme": {"README.md": b"---\nconfigs:\n- config_name: x\n  data_files: 7\n---\n", "a.jsonl": JSONL},
    "bad/script": {"script.py": b"print('x')\n"},
}


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub's interface as the real client asks for."""

    protocol_version = "HTTP/1.1"
    commit = "a" * 40

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        name = next((name for name in REPOSITORIES if f"/{name}" in path), None)
        if "/intronhealth/" in path or "/gated/" in path:
            self.reply(403 if "intronhealth" in path else 401, b"", {"X-Error-Code": "GatedRepo"})
        elif name is None:
            self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})
        else:
            self.answer(path, name, REPOSITORIES[name])

    def answer(self, path: str, name: str, files: dict[str, bytes]) -> None:
        commit, file = {"X-Repo-Commit": self.commit}, path.rsplit("/", 1)[-1]
        tree = [
            {"type": "file", "path": f, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for f, content in files.items()
        ]
        if "/resolve/" in path and file in files:
            self.reply(200, files[file], {"ETag": f'"{hashlib.sha1(files[file]).hexdigest()}"', **commit})
        elif "/tree/" in path or "/paths-info/" in path:
            self.reply(200, json.dumps(tree).encode(), {})
        elif path.startswith(f"/api/datasets/{name}"):
            siblings = [{"rfilename": f} for f in files]
            self.reply(200, json.dumps({"id": name, "sha": self.commit, "siblings": siblings}).encode(), {})
        else:
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound", **commit})

    do_HEAD = do_POST = do_GET

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_the_real_client_against_a_hub(tmp_path: Path, hub: str) -> None:
    rows = [["What ?", "NA"], ["When ?", "None"]]  # words as they stand in the hub's CSV, not missing values
    cases = [("open/data", "none"), ("gated/data", "none"), ("none", "intronhealth/afrimedqa_v2"), ("no/such", "none")]
    no_proxy = dict.fromkeys(("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"), "")
    results = load_in_a_fresh_process(cases, HF_ENDPOINT=hub, HF_HOME=str(tmp_path), **no_proxy)
    (found, _), (gated, _), (afrimed, _), (missing, seconds) = results
    assert found == rows
    for message, name in ((gated, "gated/data"), (afrimed, "intronhealth/afrimedqa_v2"), (missing, "no/such")):
        assert f"hub dataset {name}: DatasetNotFoundError" in message
        assert f"https://huggingface.co/datasets/{name}, then run `hf auth login`" in message
    assert "--afrimedqa afrimedqa/afrimedqa_v2" in afrimed
    assert "--afrimedqa none" in afrimed
    assert "afrimedqa/afrimedqa_v2" not in gated
    assert seconds < 15
    offline = load_in_a_fresh_process([cases[0]], HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert offline[0][0] == rows  # from the cache


@pytest.mark.slow
def test_hub_datasets_of_every_form(tmp_path: Path, hub: str) -> None:
    """In one process, for the sake of time: configurations, text as it stands, and what is wrong said to the end."""
    none = dict.fromkeys(("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"), "")
    names = ["two/csv:hard", "two/jsonl:hard", "one/named", "text/numbers"]
    wrong = ["two/csv", "two/jsonl", "two/csv:none", *(name for name in REPOSITORIES if name.startswith("bad/"))]
    cases = [(name, "none") for name in names + wrong]
    results = load_in_a_fresh_process(cases, HF_ENDPOINT=hub, HF_HOME=str(tmp_path), **none)
    found = {name: result for (name, _), (result, _) in zip(cases, results, strict=True)}
    assert found["two/csv:hard"] == [["Q ?", "NA"], ["P ?", "007"]]
    assert found["two/jsonl:hard"] == [[f"Q {n} ?", f"B {n}"] for n in range(3)]
    assert found["one/named"] == [["Q ?", "A, B"]]
    assert sorted(found["text/numbers"]) == [["P ?", "0.50"], ["Q ?", "007"], ["R ?", "true"]]
    for name in ("two/csv", "two/jsonl"):
        assert found[name].endswith(
            f"hub dataset {name}: several configurations, and none is given; it has easy, hard; give one: "
            f"--medquad {name}:easy"
        )
    assert "no configuration 'none'; it has easy, hard; give one: --medquad two/csv:easy" in found["two/csv:none"]
    assert "byte 0xe9" in found["bad/latin"]
    assert "more: large_string" in found["bad/columns"]
    assert "two columns are named 'answer'" in found["bad/twice"]
    assert "The fields are separated by semicolons" in found["bad/semicolons"]
    assert found["bad/readme"].startswith("medquad: hub dataset bad/readme: ")
    assert "script.py" in found["bad/script"]
    assert all("--medquad" in found[name] for name in wrong if name not in ("bad/twice", "bad/semicolons"))
    cached = load_in_a_fresh_process([*cases[:2], cases[3]], HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert [result for result, _ in cached] == [found[name] for name in (names[0], names[1], names[3])]
    ((message, _),) = load_in_a_fresh_process([("two/csv", "none")], HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert "To use a cached configuration, give its name: --medquad two/csv:NAME" in message


@needs_shared
def test_the_real_files() -> None:
    sources = load_sources(Data(medquad=str(SHARED / "medquad.csv"), afrimedqa=str(SHARED / "afrimedqa_v2.csv")))
    counts = [(source.name, source.read, len(source.rows), source.dropped) for source in sources]
    assert counts == [
        ("medquad", 16_412, 16_359, {"empty answer": 5, "duplicate": 48}),
        ("afrimedqa", 5_410, 1_604, {"empty answer": 3_806}),
    ]
    for row in (row for source in sources for row in source.rows):
        assert row.question == row.question.strip() != ""
        assert row.answer == row.answer.strip() != ""
    afrimed = sources[1].rows
    assert sum("\nA. " in row.question for row in afrimed) > 100
    assert {row.topic for row in afrimed} == {None}
