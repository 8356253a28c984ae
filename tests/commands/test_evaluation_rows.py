"""`evaluation.jsonl` without a model: which texts it has, how it is merged, damaged files, and `--show`."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from medqa.__main__ import main
from medqa.commands.evaluate import Keeper, write_evaluation
from medqa.commands.evaluation_rows import Lines, read_evaluation, read_lines
from medqa.config import Experiment
from medqa.data.sources import Row
from medqa.evaluation.answers import Answer
from medqa.evaluation.text import score_rows

SYSTEMS = ("untuned", "own_template", "copied", "tuned")


def experiment(log_samples: bool | None, own: bool = True) -> Experiment:
    return Experiment.model_validate(
        {"data": {"files": {"notes": "notes.csv"} if own else {}}, "tracking": {"log_samples": log_samples}}
    )


def row(name: str, number: int) -> Row:
    return Row(f"{name}:{number}", name, f"question {name} {number}", f"answer {name} {number}", None)


def collected() -> Lines:
    """One public row and one of the user's own, with losses; the answers are generated."""
    rows = [row("medquad", 3), row("notes", 0)]
    losses = np.array([[6.0, 3, 4, 2], [5.0, 5, 0, 0]])
    lines = Lines()
    lines.add_losses("test", rows, {"untuned": losses + np.array([2, 0, 1, 0]), "tuned": losses})
    answers = {system: [Answer(f"{system} says", True), Answer("no", False)] for system in SYSTEMS}
    lines.add_answers("test", rows, answers, score_rows(rows, answers))
    return lines


@pytest.mark.parametrize(
    "log_samples, own, public_text, own_text, copied_text",
    [
        (None, True, True, False, False),  # a copied answer may be one of the user's own
        (None, False, True, False, True),
        (True, True, True, True, True),
        (False, True, False, False, False),
    ],
)
def test_texts_are_kept_as_samples_are(log_samples, own, public_text, own_text, copied_text):
    public, notes = collected().listed(experiment(log_samples, own))
    for line, there in ((public, public_text), (notes, own_text)):
        for key in ("question", "reference", "untuned_answer", "own_template_answer", "tuned_answer"):
            assert (key in line) == there, key
        assert ("copied_answer" in line) == (there and copied_text)
        assert {"id", "split", "source", "tuned_loss", "tuned_rougeL", "copied_rougeL", "tuned_stops"} <= line.keys()
    assert "question notes" not in json.dumps(public)


def test_the_numbers_of_a_row():
    public, notes = collected().listed(experiment(True))
    assert (public["tuned_loss"], public["tuned_tokens"]) == (2.0, 3)
    assert (public["untuned_answer_loss"], public["untuned_answer_tokens"]) == (2.5, 2)
    assert (notes["tuned_answer_loss"], notes["tuned_answer_tokens"]) == (None, 0)
    assert (public["tuned_stops"], notes["tuned_stops"], public["tuned_loops"]) == (True, False, False)
    assert (public["reference_words"], public["tuned_words"]) == (3, 2)
    assert not any("authors" in key for key in public), "they are of AfriMed-QA"
    lines = Lines()
    lines.add_losses("test", [row("medquad", 1)], {"tuned": np.array([[np.nan, 3, np.inf, 2]])})
    (line,) = lines.listed(experiment(None))
    assert (line["tuned_loss"], line["tuned_answer_loss"]) == (None, None)


FOUND = {
    "step": 7, "final": True, "data_fingerprint": "d", "base_fingerprint": "b", "experiment": {}, "quantization": "no",
    "dtype": "float32", "mixed_precision": "no", "limit": None,
}  # fmt: skip


def written(run: Path, lines: list[dict], tasks=("loss", "generation"), **changes) -> Path:
    run.mkdir(exist_ok=True)
    assert write_evaluation({**FOUND, "tasks": {task: {} for task in tasks}, **changes}, run, lines)
    return run


def line(number: int, split: str = "test", **measures) -> dict:
    texts = {"question": f"What is {number}?", "reference": f"It is {number}."}
    return {"id": f"medquad:{number}", "split": split, "source": "medquad", **texts, **measures}


def losses(untuned: float, own: float, tuned: float, tokens: int = 1) -> dict:
    values = {"untuned": untuned, "own_template": own, "tuned": tuned}
    found = {f"{system}_answer_loss": value for system, value in values.items()}
    return found | {f"{system}_answer_tokens": tokens for system in values}


def answers(untuned: float, own: float, tuned: float) -> dict:
    values = {"untuned": untuned, "own_template": own, "tuned": tuned}
    found = {f"{system}_rougeL": value for system, value in values.items()}
    return found | {f"{system}_answer": f"{system} says so" for system in values} | {"tuned_stops": False}


def test_a_row_keeps_one_line_whatever_is_evaluated_when(tmp_path):
    run = written(tmp_path / "run", [line(10, **answers(1, 1, 1)), line(9, **answers(0, 0, 0))], ["generation"])
    both = [line(n, split, **losses(1, 2, 3)) for split in ("validation", "test") for n in (9, 10, 2)]
    written(run, both, ["loss"])
    found = read_lines(run, read_evaluation(run))
    assert [(each["split"], each["id"]) for each in found] == [
        (split, f"medquad:{n}") for split in ("validation", "test") for n in (2, 9, 10)
    ]
    assert found[5]["tuned_answer"] == "tuned says so"
    assert found[5]["tuned_answer_loss"] == 3
    without = {key: value for key, value in losses(1, 2, 4).items() if "own_template" not in key}
    written(run, [line(9, **without)], ["loss"])
    found = read_lines(run, read_evaluation(run))
    assert len(found) == 2, "rows that are in no task any more are gone"
    assert "own_template_answer_loss" not in found[0], "nothing of an earlier result of the same task stays"
    assert found[0].keys() > {"tuned_answer_loss", "tuned_rougeL"}
    written(run, [line(9, **without)], ["loss"], step=8)
    assert "tuned_rougeL" not in read_lines(run, read_evaluation(run))[0], "that was of another adapter"


def test_a_few_rows_do_not_take_the_place_of_all(tmp_path):
    run = written(tmp_path / "run", [line(n, **losses(1, 2, 3)) for n in range(4)])
    before = (run / "evaluation.jsonl").read_bytes()
    assert not write_evaluation({**FOUND, "tasks": {"loss": {}}, "limit": 1}, run, [line(0, **losses(1, 2, 9))])
    assert (run / "evaluation.jsonl").read_bytes() == before


def test_an_older_evaluation_has_no_lines_and_keeps_its_figures(tmp_path):
    run = written(tmp_path / "run", [], ["mcq"])
    assert not (run / "evaluation.jsonl").exists()
    evaluation = read_evaluation(run)
    assert evaluation.pop("rows_file") is None
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    written(run, [line(1, **losses(1, 2, 3))], ["loss"])
    assert set(read_evaluation(run)["tasks"]) == {"mcq", "loss"}
    assert len(read_lines(run, read_evaluation(run))) == 1


def show(capsys, run: Path, *words: str) -> str:
    assert main(["evaluate", str(run), "--show", *words]) == 0
    return capsys.readouterr().out


def shown_ids(told: str) -> list[str]:
    return [text.split()[1].rstrip(":") for text in told.splitlines() if text[:1].isdigit() and "medquad:" in text]


def test_rows_by_their_change_in_rouge(tmp_path, capsys):
    """Against the baseline that is better over all rows: here, that with its own template."""
    changes = {1: -0.1, 2: 0.3, 3: -0.4, 4: 0.0}
    lines = [line(n, **answers(0.0, 0.5, 0.5 + change)) for n, change in changes.items()]
    run = written(tmp_path / "run", [*lines, line(5, **losses(1, 1, 99)), line(6, "validation", **losses(1, 1, 99))])
    told = show(capsys, run, "worst", "3")
    assert told.startswith(
        "4 rows of test, the adapter of update 7; change in ROUGE-L against the baseline in its own chat template, the "
        "better of the two; 3 of them, the worst change first\n"
    )
    assert shown_ids(told) == ["medquad:3", "medquad:1", "medquad:4"]
    assert "1. medquad:3: ROUGE-L -0.4000" in told
    for text in (
        "    What is 3?",
        "    It is 3.",
        "    untuned says so",
        "    own_template says so",
        "    tuned says so",
    ):
        assert f"\n{text}\n" in told
    assert "  fine-tuned: ROUGE-L 0.1000, cut off\n" in told
    assert shown_ids(show(capsys, run, "best", "2")) == ["medquad:2", "medquad:4"]
    assert len(shown_ids(show(capsys, run, "best"))) == 4
    first = show(capsys, run, "random", "2")
    assert show(capsys, run, "random", "2") == first
    assert len(set(shown_ids(first))) == 2


def test_rows_by_their_change_in_loss_if_nothing_was_generated(tmp_path, capsys):
    """The better baseline is chosen per token, as in the verdict: the long row counts most."""
    lines = [
        line(1, **losses(1.0, 2.0, 1.5, tokens=100)),
        line(2, **losses(9.0, 2.0, 3.0)),
        line(3, **losses(1, 1, 0.5)),
    ]
    run = written(tmp_path / "run", [*lines, line(4, "validation", **losses(1, 1, 9))], ["loss"])
    told = show(capsys, run, "worst", "9")
    assert "change in answer loss against the baseline, the better of the two; 3 of them" in told
    assert shown_ids(told) == ["medquad:1", "medquad:3", "medquad:2"]
    assert "1. medquad:1: answer loss +0.5000" in told
    assert shown_ids(show(capsys, run, "best", "1")) == ["medquad:2"]


def test_texts_that_are_not_kept(tmp_path, capsys):
    without = {key: value for key, value in line(1, **answers(0, 0, 1)).items() if key not in ("question", "reference")}
    run = written(tmp_path / "run", [{k: v for k, v in without.items() if not k.endswith("_answer")}])
    assert "its texts are not kept: tracking.log_samples of the run does not allow it" in show(capsys, run, "best")


def test_a_text_cannot_look_like_something_else(tmp_path, capsys):
    hostile = "\x1b[2Jline\n9. medquad:99: ROUGE-L +1.0000\r\u202e [bold]x[/bold] :smile:" + "y" * 5000
    run = written(
        tmp_path / "run", [line(1, **answers(0, 0, 1)) | {"tuned_answer": hostile, "id": "medquad:\x1b[31m1"}]
    )
    told = show(capsys, run, "best")
    assert "\x1b" not in told
    assert "\u202e" not in told
    assert "\\x1b[2Jline\n    9. medquad:99" in told
    assert "[bold]x[/bold] :smile:" in told
    assert " ... (" in told
    assert len(told) < 3000


def test_values_that_are_no_numbers_are_left_out(tmp_path, capsys):
    odd = line(1, **answers(0, 0, 1)) | {
        "tuned_answer": 7,
        "untuned_answer": None,
        "question": ["x"],
        "tuned_stops": "no",
    }
    more = [line(2, **answers(0, 0, 1)) | {"tuned_rougeL": value} for value in ("1", None, True, [1], 1e300)]
    run = written(tmp_path / "run", [odd])
    assert shown_ids(show(capsys, run, "worst")) == ["medquad:1"]
    for value in more:
        run = written(tmp_path / "run", [value])
        assert main(["evaluate", str(run), "--show", "worst"]) == 2
        assert "no row of test has a loss or an answer; run `medqa evaluate" in capsys.readouterr().err


def test_the_change_is_from_a_baseline_though_there_are_unquantized_weights(tmp_path, capsys):
    """The adapter on unquantized weights is no baseline, and the run's own weights are compared."""
    unquantized = {"tuned_unquantized_answer_loss": 0.1, "untuned_unquantized_answer_loss": 0.2}
    run = written(tmp_path / "run", [line(1, **losses(3, 2, 1), **unquantized), line(2, **losses(1, 2, 3))])
    told = show(capsys, run, "worst")
    assert "against the baseline" in told
    assert "unquantized, the" not in told
    assert [part for part in told.split() if part.startswith(("+", "-"))] == ["+2.0000", "-2.0000"]


def test_a_file_that_is_too_long_is_refused(tmp_path, capsys, monkeypatch):
    run = written(tmp_path / "run", [line(1, **losses(1, 2, 3))])
    monkeypatch.setattr("medqa.commands.evaluation_rows.MAX_ROWS_BYTES", 100)
    assert main(["evaluate", str(run), "--show", "worst"]) == 2
    assert "evaluation.jsonl" in capsys.readouterr().err


def claims(run: Path, content: bytes) -> None:
    """Both files as somebody wrote them on purpose."""
    (run / "evaluation.jsonl").write_bytes(content)
    rows_file = {"lines": 1, "sha256": hashlib.sha256(content).hexdigest()}
    (run / "evaluation.json").write_text(json.dumps({**FOUND, "tasks": {}, "rows_file": rows_file}))


@pytest.mark.parametrize(
    "content, said",
    [
        (b"{", "line 1: not valid JSON"),
        (b'{"id": "a:1", "split": "test", "source": "a"}\n[]\n', "line 2: not an object with id, split, source"),
        (b'{"id": 1, "split": "test", "source": "a"}\n', "line 1: not an object with id, split, source"),
        (b'{"id": "a:1", "split": "test", "source": "a", "x": NaN}\n', "line 1: not valid JSON: NaN"),
        (b"[" * 100_000 + b"\n", "line 1: not valid JSON: nested too deeply"),
        (b"\xff\n", "line 1: not valid JSON"),
        (b"", "no row of test has a loss or an answer"),
    ],
)
def test_a_file_of_somebody_else(content, said, tmp_path, capsys):
    run = written(tmp_path / "run", [line(1, **losses(1, 2, 3))])
    claims(run, content)
    assert main(["evaluate", str(run), "--show", "worst"]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1
    notes = []
    Keeper(run, notes.append)
    assert bool(notes) == bool(content)
    written(run, [line(1, **losses(1, 2, 3))])
    assert read_lines(run, read_evaluation(run)) == [line(1, **losses(1, 2, 3))]


@pytest.mark.parametrize(
    "kind", ["changed", "truncated", "directory", "pipe", "missing", "no evaluation.json", "no run"]
)
def test_what_cannot_be_shown(kind, tmp_path, capsys):
    run = written(tmp_path / "run", [line(n, **losses(1, 2, 3)) for n in range(3)])
    path = run / "evaluation.jsonl"
    content = path.read_bytes()
    if kind in ("directory", "pipe", "missing"):
        path.unlink()
    if kind == "changed":
        path.write_bytes(content.replace(b"3", b"4"))
    elif kind == "truncated":
        path.write_bytes(content[:100])
    elif kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "no evaluation.json":
        (run / "evaluation.json").unlink()
    elif kind == "no run":
        run = tmp_path / "other"
    before = {each: each.stat().st_mtime_ns for each in tmp_path.rglob("*")}
    assert main(["evaluate", str(run), "--show", "worst"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    expected = {
        "missing": f"{run}: it has no evaluation.jsonl; run `medqa evaluate {run}` first",
        "no evaluation.json": f"{run}: it has no evaluation.jsonl; run `medqa evaluate {run}` first",
        "no run": f"{run}: no such directory; give the directory of a run",
    }
    assert expected.get(kind, f"; run `medqa evaluate {run}` again, which replaces it") in told
    assert {each: each.stat().st_mtime_ns for each in tmp_path.rglob("*")} == before


def test_the_run_may_come_after_show(tmp_path, capsys):
    run = written(tmp_path / "run", [line(n, **losses(1, 2, n)) for n in (1, 2)])
    for words in (["worst", str(run)], ["worst", str(run), "2"], ["worst", "2", str(run)]):
        assert main(["evaluate", "--show", *words]) == 0
        assert shown_ids(capsys.readouterr().out) == ["medquad:2", "medquad:1"]
    assert main(["evaluate", "--show", "worst", str(run), "--cpu"]) == 2
    assert "leave out --cpu" in capsys.readouterr().err
    for words, said in (
        (["--show", "worst", "5"], "the following arguments are required: RUN"),
        ([str(run), "--show", "worst", "ten"], "unrecognized arguments: ten"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["evaluate", *words])
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, said",
    [
        (["--show", "most"], "--show most: write worst, best or random, and then the number of rows (default 5)"),
        (["--show", "worst", "0"], "--show worst 0: write"),
        (["--show", "worst", "-1"], "--show worst -1: write"),
        (["--show", "worst", "5", "6"], "--show worst 5 6: write"),
        (["--show", "worst", "\u0665"], "write worst, best or random"),
        (
            ["--show", "worst", "--limit", "3"],
            "--show shows the last evaluation, and evaluates nothing; leave out --limit",
        ),
        (["--show", "worst", "--checkpoint", "best", "--cpu"], "leave out --checkpoint, --cpu"),
    ],
)
def test_what_is_refused(words, said, tmp_path, capsys):
    run = written(tmp_path / "run", [line(1, **losses(1, 2, 3))])
    assert main(["evaluate", str(run), *words]) == 2
    assert said in capsys.readouterr().err
