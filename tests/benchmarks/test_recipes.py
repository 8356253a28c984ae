"""The experiments against each other: the arithmetic of it, and that the recommended recipe is the better one."""

import argparse
import json
import math

import numpy as np
import pytest

from benchmarks import splits_compared
from benchmarks.recipes import ARMS, arm, compare, main


def measured(loss: np.ndarray, tokens: np.ndarray) -> dict:
    return {"r": {"ids": [str(i) for i in range(len(loss))], "loss": loss, "tokens": tokens}}


def test_the_ratio_is_that_of_two_perplexities_and_the_test_is_paired():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 60, 200).astype(float)
    theirs = tokens * rng.gamma(4, 1, 200)  # rows differ far more than the arms do
    ours = theirs - tokens * rng.normal(0.05, 0.02, 200)
    line, last = compare({"a": measured(theirs, tokens), "b": measured(ours, tokens)})["readings"]["r"]
    assert line["answer_perplexity"] == pytest.approx(math.exp(theirs.sum() / tokens.sum()))
    assert line["ratio"] == pytest.approx(last["answer_perplexity"] / line["answer_perplexity"])
    low, high = line["interval"]
    assert low < line["ratio"] < high < 1
    assert high - low < 0.02
    assert line["wilcoxon_p"] < 1e-9
    assert line["rows_better"] > 0.9


def test_two_that_are_alike_are_not_told_apart():
    rng = np.random.default_rng(1)
    tokens = np.full(100, 20.0)
    theirs = tokens * rng.gamma(4, 1, 100)
    line, _ = compare({"a": measured(theirs, tokens), "b": measured(theirs + rng.normal(0, 1, 100), tokens)})[
        "readings"
    ]["r"]
    assert line["interval"][0] < 1 < line["interval"][1]
    assert line["wilcoxon_p"] > 0.01


def test_other_rows_are_refused():
    tokens, loss = np.ones(5), np.ones(5)
    other = measured(loss, tokens)
    other["r"]["ids"][0] = "another"
    with pytest.raises(RuntimeError, match="different rows"):
        compare({"a": other, "b": measured(loss, tokens)})


def test_all_arms_have_the_same_base():
    options = argparse.Namespace(model="a/directory", medquad=None, afrimedqa=None, tiny=False, examples=1280, set=[])
    assert {arm([name], options).model.quantization for name in ARMS} == {"4bit"}
    options.set = ["model.quantization=none"]
    assert {arm([name], options).model.quantization for name in ARMS} == {"none"}
    assert arm(["exp_004", "model.quantization=auto"], options).model.quantization == "auto"


@pytest.mark.slow
def test_the_recommended_recipe_beats_the_others_at_equal_examples(tmp_path):
    """On the embedded model and data, however the rows are read."""
    assert main(["--tiny", "--out", str(tmp_path / "found.json")]) == 0
    readings = json.loads((tmp_path / "found.json").read_text())["readings"]
    assert len(readings) == 2
    for lines in readings.values():
        assert [line["arm"] for line in lines] == ["exp_001", "exp_002", "exp_003", "exp_004"]
        for line in lines[:-1]:
            assert line["interval"][1] < 1
            assert line["wilcoxon_p"] < 0.05


@pytest.mark.slow
def test_the_three_splits_are_compared(tmp_path, monkeypatch, capsys):
    file = tmp_path / "RESULTS.md"
    file.write_text(f"before\n{splits_compared.BEGIN}\nan older table\n{splits_compared.END}\nafter\n")
    monkeypatch.setattr(splits_compared, "RESULTS", file)
    assert splits_compared.main(["--tiny", "--updates", "4", "--write"]) == 0
    written = file.read_text()
    lines = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in written.splitlines()}
    assert lines["held-out rows that share with training: topic"][1:] == ["100.0%", "0.0%"]
    assert lines["held-out rows that share with training: question or answer"][1:] == ["0.0%", "0.0%"]
    assert all(float(cell.split()[0]) < 1 for cell in lines["tuned over untuned"])
    assert "older" not in written
    assert written.startswith("before\n")
    assert written.endswith("after\n")
    assert lines["tuned over untuned"][2] in capsys.readouterr().out
