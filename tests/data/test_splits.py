"""What a split promises: nothing shared when grouped, sources in proportion, the same for ever; and honest counts."""

import csv
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from medqa.config import Data
from medqa.data.sources import Row, load_sources
from medqa.data.splits import HELD_OUT, SPLITS, Splits, letters_and_digits, overlap_report, split_rows, write_splits_csv
from medqa.errors import UserError

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not (SHARED / "medquad.csv").exists(), reason=f"no real data in {SHARED}")
FRACTIONS = (0.8, 0.1, 0.1)


def rows_of(*pairs: tuple[str, str], source: str = "medquad", topic: str | None = None) -> list[Row]:
    return [Row(f"{source}:{n}", source, question, answer, topic) for n, (question, answer) in enumerate(pairs)]


def distinct(count: int, source: str = "medquad") -> list[Row]:
    return rows_of(*((f"{source} question {n}", f"{source} answer {n}") for n in range(count)), source=source)


def split_of(splits: Splits) -> dict[str, str]:
    return {row.id: name for name in SPLITS for row in getattr(splits, name)}


def test_rows_hang_together_by_questions_and_answers_over_other_rows() -> None:
    rows = rows_of(("A?", "one"), ("a", "TWO!"), ("b", "two"), ("B.", "three"), ("c", "four"), ("one", "c")) + distinct(
        50
    )
    rows = [Row(f"medquad:{n}", "medquad", row.question, row.answer, None) for n, row in enumerate(rows)]
    groups = split_rows(rows, "grouped", 0, FRACTIONS).groups
    assert [groups[row.id] for row in rows[:6]] == ["medquad:0"] * 4 + ["medquad:4", "medquad:5"]
    assert list(groups) == [row.id for row in rows]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("What is flu?", "what IS  flu", True),
        ("\uff21\uff11 \ufb01x", "a1 fix", True),  # full-width and a ligature: NFKC
        ("STRASSE", "stra\u00dfe", True),
        ("a_b", "ab", True),
        ("what is flu 2", "what is flu 3", False),
        ("caf\u00e9", "cafe", False),
        ("cafe\u0301", "caf\u00c9", True),
        ("\u0915\u093f", "\u0915\u0940", False),  # Hindi: the vowel signs i and ii
        ("\u0e01\u0e48", "\u0e01\u0e49", False),  # Thai: tones
        ("\u05d1\u05b0", "\u05d1\u05b1", False),  # Hebrew: points
        ("\U00011103\U00011127", "\U00011103\U00011128", False),  # Chakma, beyond the first 65,536 characters
        ("pain \u2764\ufe0f", "pain \u2764", True),  # the sign in colour
        ("?", "!", False),  # nothing left: compared as they stand
        ("?", "?", True),
    ],
)
def test_what_is_compared(one: str, other: str, same: bool) -> None:
    assert (letters_and_digits(one) == letters_and_digits(other)) is same


def test_words_that_differ_in_vowel_signs_are_told_apart() -> None:
    signs = "\u093e\u093f\u0940\u0941\u0942\u0947\u0948\u094b\u094c\u0902"
    pairs = [(f"\u0915{one}\u0932{other}", f"\u092e{one}\u0930{other}") for one in signs for other in signs]
    splits = split_rows(rows_of(*pairs), "grouped", 0, FRACTIONS)
    assert len(set(splits.groups.values())) == 100
    assert [len(getattr(splits, name)) for name in SPLITS] == [80, 10, 10]


def test_a_split_of_many_sources_looks_at_each_row_a_few_times() -> None:
    asked = [0]

    class Watched:
        def __init__(self, row: Row) -> None:
            self.row = row

        def __getattr__(self, name: str) -> object:
            asked[0] += name == "source"
            return getattr(self.row, name)

    rows = [Watched(row) for n in range(300) for row in distinct(10, f"s{n}")]
    splits = split_rows(rows, "grouped", 42, FRACTIONS)
    assert [len(getattr(splits, name)) for name in SPLITS] == [2400, 300, 300]
    assert asked[0] <= 10 * len(rows)


def test_signs_alone_do_not_glue_rows_together() -> None:
    rows = rows_of(*((f"question {n}", "!" * (n + 1)) for n in range(40)))
    assert len(set(split_rows(rows, "grouped", 0, FRACTIONS).groups.values())) == 40


def test_options_tell_questions_apart() -> None:
    rows = rows_of(("Which?\nA. flu", "x"), ("Which?\nA. cold", "y"), *((f"q{n}", f"a{n}") for n in range(40)))
    groups = split_rows(rows, "grouped", 0, FRACTIONS).groups
    assert groups["medquad:0"] != groups["medquad:1"]


@pytest.mark.parametrize("seed", range(12))
def test_grouped_shares_nothing_whatever_the_rows(seed: int) -> None:
    chance = random.Random(seed)
    texts = [(chance.randrange(150), chance.randrange(150), chance.choice("ab")) for _ in range(chance.randrange(100))]
    rows = [Row(f"{s}:{n}", s, f"Q{q}", f"a {answer}", None) for n, (q, answer, s) in enumerate(texts)]
    rows += distinct(60, "c")
    splits = split_rows(rows, "grouped", seed, FRACTIONS)
    names = split_of(splits)
    assert sorted(names) == sorted(row.id for row in rows)
    assert sum(len(getattr(splits, name)) for name in SPLITS) == len(rows)
    for part in (lambda row: row.question, lambda row: row.answer, lambda row: splits.groups[row.id]):
        places: dict[str, set[str]] = {}
        for row in rows:
            places.setdefault(part(row), set()).add(names[row.id])
        assert all(len(place) == 1 for place in places.values())


@pytest.mark.parametrize("method", ["grouped", "random"])
def test_each_source_in_proportion_and_in_the_order_given(method: str) -> None:
    rows = [row for pair in zip(distinct(100), distinct(100, "afrimedqa"), strict=True) for row in pair]
    rows += distinct(1000, "other")
    splits = split_rows(rows, method, 42, FRACTIONS)
    for name, share in zip(SPLITS, FRACTIONS, strict=True):
        part = getattr(splits, name)
        assert Counter(row.source for row in part) == {
            "medquad": 100 * share, "afrimedqa": 100 * share, "other": 1000 * share
        }  # fmt: skip
        assert list(part) == [row for row in rows if row in part]


@pytest.mark.parametrize("seed", range(8))
def test_a_giant_group_stays_in_training(seed: int) -> None:
    giant = [(f"Is disease {n} inherited?", "In a recessive manner.") for n in range(60)]
    small = [(f"twice {n // 2}", f"answer {n}") for n in range(340)]
    splits = split_rows(rows_of(*giant, *small), "grouped", seed, FRACTIONS)
    assert {split_of(splits)[f"medquad:{n}"] for n in range(60)} == {"train"}
    assert [len(getattr(splits, name)) for name in SPLITS] == [320, 40, 40]
    at_random = split_of(split_rows(rows_of(*giant, *small), "random", seed, FRACTIONS))
    assert {at_random[f"medquad:{n}"] for n in range(60)} > {"train"}


def test_a_group_within_the_room_but_too_large_a_share_of_it_stays_in_training() -> None:
    rows = rows_of(*((f"q{n}", "one answer for all") for n in range(30)), *((f"p{n}", f"a{n}") for n in range(4000)))
    for seed in range(10):  # 30 of 403 rows: 7 %
        names = split_of(split_rows(rows, "grouped", seed, FRACTIONS))
        assert {names[f"medquad:{n}"] for n in range(30)} == {"train"}


def test_small_data_may_hold_out_groups() -> None:
    rows = rows_of(*((f"q{n // 5}", f"a{n}") for n in range(100)))  # nothing but groups of five
    splits = split_rows(rows, "grouped", 1, FRACTIONS)
    assert [len(getattr(splits, name)) for name in SPLITS] == [80, 10, 10]


def test_the_split_depends_on_seed_and_rows_alone() -> None:
    rows = distinct(300)
    splits = split_rows(rows, "grouped", 42, FRACTIONS)
    assert split_rows(list(rows), "grouped", 42, FRACTIONS) == splits
    assert split_of(split_rows(rows, "grouped", 43, FRACTIONS)) != split_of(splits)
    beside = split_rows(distinct(200, "afrimedqa") + rows, "grouped", 42, FRACTIONS)
    assert {row: name for row, name in split_of(beside).items() if row in splits.groups} == split_of(splits)
    # Recorded: whatever changes these moves held-out rows of every existing run into training.
    assert [row.id for row in splits.test][:6] == [
        "medquad:2",
        "medquad:5",
        "medquad:8",
        "medquad:15",
        "medquad:29",
        "medquad:32",
    ]
    assert splits.fingerprint == "e995a697120742fb1fc07ce11d4b89424e63d9364d9eb30cc213fd85de51927f"


@pytest.mark.slow
def test_nothing_depends_on_the_hash_seed_of_the_process() -> None:
    code = (
        "from tests.data.test_splits import *;"
        "s = split_rows(distinct(200) + distinct(60, 'b'), 'grouped', 7, FRACTIONS);"
        "print(s.fingerprint, s.groups, overlap_report(s))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True,
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(outputs) == 1


def test_the_fingerprint_stands_for_all_that_is_trained_on() -> None:
    rows = distinct(100)
    changed = {
        "question": [*rows[:-1], Row(rows[-1].id, "medquad", "medquad question 99.", rows[-1].answer, None)],
        "answer": [*rows[:-1], Row(rows[-1].id, "medquad", rows[-1].question, "medquad answer 99 ", None)],
        "border": [*rows[:-1], Row(rows[-1].id, "medquad", "medquad question 99m", "edquad answer 99", None)],
        "id": [*rows[:-1], Row("medquad:100", "medquad", rows[-1].question, rows[-1].answer, None)],
        "order": rows[::-1],
        "fewer": rows[:-1],
    }
    prints = {name: split_rows(found, "random", 42, FRACTIONS).fingerprint for name, found in changed.items()}
    prints |= {"rows": split_rows(rows, "random", 42, FRACTIONS).fingerprint}
    prints |= {"seed": split_rows(rows, "random", 43, FRACTIONS).fingerprint}
    assert len(set(prints.values())) == len(prints)
    topics = [Row(row.id, row.source, row.question, row.answer, "a topic") for row in rows]  # which no model sees
    assert split_rows(topics, "random", 42, FRACTIONS).fingerprint == prints["rows"]


@pytest.mark.parametrize(
    ("rows", "fractions", "parts"),
    [
        ([], FRACTIONS, ["0 rows", "train and validation and test"]),
        (distinct(3), FRACTIONS, ["3 rows", "validation and test", "[0.8, 0.1, 0.1]", "give more data"]),
        (
            rows_of(*((f"q{n}", "same") for n in range(90))),
            FRACTIONS,
            [
                "90 rows in 1 separable groups",
                "up to 90 rows stay together because they share a question",
                "data.split=random",
            ],
        ),
        (distinct(100), (0.9, 0.1, 0.0), ["leave no row for test"]),
    ],
)
def test_too_few_rows_to_split(rows: list[Row], fractions: tuple[float, float, float], parts: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        split_rows(rows, "grouped", 42, fractions)
    assert [part for part in parts if part not in str(raised.value)] == []


def test_splits_csv_holds_every_row_once(tmp_path: Path) -> None:
    rows = distinct(30) + rows_of(("same", "x"), ("same", "y"), source="own, or not")
    splits = split_rows(rows, "grouped", 42, FRACTIONS)
    (tmp_path / "splits.csv").write_text("an older file")
    write_splits_csv(splits, tmp_path / "splits.csv")
    with (tmp_path / "splits.csv").open(newline="") as file:
        lines = list(csv.reader(file))
    assert lines[0] == ["id", "split", "group"]
    assert lines[1:] == [[row.id, split_of(splits)[row.id], splits.groups[row.id]] for row in rows]
    assert lines[-1][2] == "own, or not:0"
    assert os.listdir(tmp_path) == ["splits.csv"]


def test_splits_csv_that_cannot_be_written_leaves_what_is_there(tmp_path: Path) -> None:
    splits = split_rows(distinct(30), "grouped", 42, FRACTIONS)
    (tmp_path / "splits.csv").mkdir()
    for path in (tmp_path / "no" / "splits.csv", tmp_path / "splits.csv"):
        with pytest.raises(UserError, match=r"splits\.csv: cannot be written"):
            write_splits_csv(splits, path)
    assert os.listdir(tmp_path) == ["splits.csv"]


def words(first: int, last: int) -> str:
    return " ".join(f"w{n}" for n in range(first, last))


def test_overlap_counts_by_hand() -> None:
    train = rows_of(("Q one?", "A one."), ("Q two?", words(0, 40)), topic="Flu")
    validation = [
        Row("v:0", "medquad", "q ONE", "new", "FLU"),  # question and topic
        Row("v:1", "medquad", "new", "a ONE", "Cold"),  # answer
        # 33 words have 21 runs of 13; the first 23 words stand in training: 11 runs, more than half
        Row("v:2", "medquad", "new 2", words(0, 23).upper() + ", " + words(100, 110), None),
    ]
    test = [
        Row("t:0", "medquad", "new 3", words(0, 22) + " " + words(100, 110), None),  # 10 of 20 runs: not more than half
        Row("t:1", "medquad", "new 4", words(0, 12), None),  # 12 words: no run of 13
        Row("t:2", "medquad", words(0, 40), words(5, 18), None),  # one run of one; the question's runs do not count
        Row("t:3", "medquad", "Q-one", "a, one", "flu"),
    ]
    report = overlap_report(Splits(tuple(train), tuple(validation), tuple(test), {}, ""))

    def line(name: str) -> dict[str, tuple[int, int]]:
        return {what: (found["rows"], found["of"]) for what, found in report[name].items() if what != "rows"}

    assert {name: part["rows"] for name, part in report.items()} == {"validation": 3, "test": 4, "held_out": 7}
    assert line("validation") == {
        "question": (1, 3), "answer": (1, 3), "question_or_answer": (2, 3), "topic": (1, 2), "13_grams": (1, 1),
        "group": (0, 0)
    }  # fmt: skip
    assert line("test") == {
        "question": (1, 4), "answer": (1, 4), "question_or_answer": (1, 4), "topic": (1, 1), "13_grams": (1, 2),
        "group": (0, 0)
    }  # fmt: skip
    assert line("held_out") == {
        "question": (2, 7), "answer": (2, 7), "question_or_answer": (3, 7), "topic": (2, 3), "13_grams": (2, 3),
        "group": (0, 0)
    }  # fmt: skip
    assert report["held_out"]["question_or_answer"]["share"] == 3 / 7


@pytest.fixture(scope="module")
def real_rows() -> list[Row]:
    sources = load_sources(Data(medquad=str(SHARED / "medquad.csv"), afrimedqa=str(SHARED / "afrimedqa_v2.csv")))
    return [row for source in sources for row in source.rows]


def whole_groups(rows: list[Row], method: str, counted: tuple[int, int], held_out_at_most: int) -> Splits:
    """The split, every group of it in one part, the large ones in training, each source in proportion.

    `counted`: groups, and the rows of the largest.
    """
    splits = split_rows(rows, method, 42, FRACTIONS)
    sizes = Counter(splits.groups.values())
    assert (len(sizes), max(sizes.values())) == counted
    names = split_of(splits)
    assert all(names[row] == names[group] for row, group in splits.groups.items())
    assert {names[row] for row, group in splits.groups.items() if sizes[group] > held_out_at_most} == {"train"}
    for source in ("medquad", "afrimedqa"):
        total = sum(row.source == source for row in rows)
        for name, fraction in zip(SPLITS, FRACTIONS, strict=True):
            part = sum(row.source == source for row in getattr(splits, name))
            assert part / total == pytest.approx(fraction, abs=0.005)
    return splits


@needs_shared
def test_the_real_files_grouped(real_rows: list[Row]) -> None:
    report = overlap_report(whole_groups(real_rows, "grouped", (15_332, 377), held_out_at_most=50))
    for name in (*HELD_OUT, "held_out"):
        assert report[name]["question_or_answer"]["rows"] == 0
    assert report["held_out"]["topic"]["share"] == pytest.approx(0.85, abs=0.03)
    assert report["held_out"]["13_grams"]["share"] == pytest.approx(0.19, abs=0.03)


@pytest.mark.slow
@needs_shared
def test_the_real_files_by_topic(real_rows: list[Row]) -> None:
    report = overlap_report(whole_groups(real_rows, "topic", (5_773, 2_129), held_out_at_most=81))
    for name in (*HELD_OUT, "held_out"):
        assert report[name]["question_or_answer"]["rows"] == report[name]["topic"]["rows"] == 0
        assert report[name]["topic"]["of"] > 1_000


@pytest.mark.slow
@needs_shared
def test_the_real_files_at_random(real_rows: list[Row]) -> None:
    report = overlap_report(split_rows(real_rows, "random", 42, FRACTIONS))["held_out"]
    assert report["question"]["share"] == pytest.approx(0.167, abs=0.015)
    assert report["answer"]["share"] == pytest.approx(0.034, abs=0.01)
    assert report["question_or_answer"]["share"] == pytest.approx(0.198, abs=0.015)
