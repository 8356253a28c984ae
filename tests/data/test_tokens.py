"""From rows to ids: every row that is trained or measured on has an answer, and what is left out or cut is said."""

import json

import pytest

from medqa.config import Data, Tokenization
from medqa.data.batches import IGNORED, Stream, TrainingData, collate, pack
from medqa.data.report import about_rows, data_report
from medqa.data.sources import Row, load_sources
from medqa.data.splits import HELD_OUT, SPLITS, split_sources, write_splits_csv
from medqa.data.tokens import prompt_ids, tokenize, tokenize_splits
from medqa.errors import UserError
from medqa.model.base import load_tokenizer
from medqa.model.loss import target_count
from medqa.tiny import BASE_DIR


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(BASE_DIR))


@pytest.fixture
def data(tmp_path) -> Data:
    """Sixty rows of which every third has a question of 400 words."""
    long = "river stone apple cloud horse music paper light " * 50
    with (tmp_path / "n.jsonl").open("w") as file:
        for n in range(60):
            record = {"question": f"{long if n % 3 == 0 else ''}What is number {n} ?", "answer": f"It is number {n}."}
            file.write(json.dumps(record) + "\n")
    return Data(medquad="none", afrimedqa="none", files={"n": str(tmp_path / "n.jsonl")})


@pytest.mark.parametrize("loss_on", ["all", "answer"])
def test_a_row_is_kept_as_long_as_one_id_of_its_answer_fits(tokenizer, loss_on):
    row = Row("n:0", "n", "What is gout ?", "Crystals of uric acid in a joint.", None)
    whole = len(prompt_ids(row.question, tokenizer))
    for max_length in range(8, 2 * whole):
        tokenization = Tokenization(max_length=max_length, loss_on=loss_on)
        found = tokenize([row], tokenizer, tokenization)
        assert len(found) == (max_length > whole)
        for example in found:
            assert example.answer_start == whole
            for batch in (collate(found, tokenization, 2), pack(found, loss_on)):
                assert target_count(batch) > 0
                assert batch.labels[0, whole] != IGNORED


@pytest.mark.parametrize("loss_on", ["all", "answer"])
def test_rows_without_an_answer_are_left_out_everywhere_and_counted(tokenizer, data, tmp_path, tiny, loss_on):
    experiment = tiny("exp_001", "tokenization.max_length=64", f"tokenization.loss_on={loss_on}")
    experiment = experiment.model_copy(update={"data": data})
    sources = load_sources(data)
    every = split_sources(sources, data)
    splits, examples = tokenize_splits(every, tokenizer, experiment.tokenization)
    left_out = {f"n:{n}" for n in range(0, 60, 3)}
    assert {row.id for row in splits.beyond} == left_out
    assert set(splits.groups) == {f"n:{n}" for n in range(60)} - left_out
    assert splits.fingerprint == every.fingerprint
    for name in SPLITS:
        assert [e.row for e in examples[name]] == [r for r in getattr(every, name) if r.id not in left_out]
        assert tuple(e.row for e in examples[name]) == getattr(splits, name)
    assert any(row.id in left_out for name in HELD_OUT for row in getattr(every, name))

    found = TrainingData(sources, splits, examples, Stream(examples["train"], 42, 4), updates=1)
    report = data_report(found, experiment, True)
    assert report["sources"]["n"] == {
        "location": data.files["n"], "read": 60, "dropped": {"answer beyond max_length": 20}, "kept": 40,
    }  # fmt: skip
    assert sum(split["rows"] for split in report["splits"].values()) == 40
    assert sum(report["overlap"][name]["rows"] for name in HELD_OUT) == len(examples["validation"] + examples["test"])
    write_splits_csv(splits, tmp_path / "splits.csv")
    assert len((tmp_path / "splits.csv").read_text().splitlines()) == 41
    (line,) = about_rows(splits, examples, experiment)
    assert line.startswith("20 rows dropped: the question alone fills")


def test_rows_that_are_cut_are_said(tokenizer, tiny):
    experiment = tiny("exp_001", "tokenization.max_length=96")
    splits = split_sources(load_sources(experiment.data), experiment.data)
    cut, left_out = about_rows(*tokenize_splits(splits, tokenizer, experiment.tokenization), experiment)
    assert cut.startswith("74 of 279 rows are longer than tokenization.max_length = 96: their answers are truncated")
    assert left_out.startswith("2 rows dropped")
    whole = tiny("exp_001")
    assert about_rows(*tokenize_splits(splits, tokenizer, whole.tokenization), whole) == []


def test_a_split_of_which_nothing_is_left_is_refused(tokenizer, data):
    splits = split_sources(load_sources(data), data)
    with pytest.raises(UserError, match=r"max_length = 16 leaves no row in train and validation and test"):
        tokenize_splits(splits, tokenizer, Tokenization(max_length=16))


@pytest.mark.parametrize("method", ["grouped", "random"])
def test_answers_that_repeat_so_much_that_they_are_all_in_one_split_are_said(tokenizer, tmp_path, tiny, method):
    with (tmp_path / "n.csv").open("w") as file:
        file.write("question,answer\n")
        file.writelines(f"What is number {n} ?,{'Yes.' if n % 2 else f'It is number {n}.'}\n" for n in range(120))
    data = Data(medquad="none", afrimedqa="none", files={"n": str(tmp_path / "n.csv")}, split=method)
    experiment = tiny("exp_001").model_copy(update={"data": data})
    splits, examples = tokenize_splits(split_sources(load_sources(data), data), tokenizer, experiment.tokenization)
    found = about_rows(splits, examples, experiment)
    assert len(found) == (method == "grouped")
    assert all(
        line.startswith("60 of 120 rows are in one group, all of it in train: ") and "data.split=random" in line
        for line in found
    )
