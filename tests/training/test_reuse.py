"""Evaluations that are not computed twice: baselines of other runs, and what an interrupted evaluation has measured."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from launching import Group, finish, output
from short_run import words

from harness.parts import build
from medqa import cache
from medqa.evaluation.loss import Evaluator
from medqa.training.reuse import _checked, _keep, adapter_digest
from medqa.training.stopping import Stopper
from train import main

WITH_TOKENS = "tokenization.loss_on=all"
OF_ANSWERS = "tokenization.loss_on=answer"
FEW = ("training.max_steps=2", "evaluation.steps=100")

STOPPED = """
import os, sys
from medqa.evaluation.loss import Evaluator
from medqa.training.stopping import Stopper
from train import main

count, measure = 0, Evaluator._sums

def counted(evaluator, chosen):
    global count
    count += 1
    return measure(evaluator, chosen)

Evaluator._sums = counted
if "STOP" in os.environ and os.environ["RANK"] == "1":  # this process alone has no time left
    Stopper.within = lambda self, seconds: count >= int(os.environ["STOP"])
sys.exit(main())
"""


class Batches:
    """Counts the batches that evaluations measure, and sends this process a signal in one of them."""

    def __init__(self, patched: pytest.MonkeyPatch) -> None:
        self.count, self.stop_at = 0, 0
        measure = Evaluator._sums

        def counted(evaluator, chosen):
            found = measure(evaluator, chosen)
            self.count += 1
            if self.count == self.stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return found

        patched.setattr(Evaluator, "_sums", counted)


@pytest.fixture
def batches(monkeypatch, tmp_path) -> Batches:
    monkeypatch.setenv("MEDQA_CACHE", str(tmp_path / "cache"))
    return Batches(monkeypatch)


def ran(directory: Path, *sets: str, options: tuple[str, ...] = ()) -> int:
    AcceleratorState._reset_state(reset_partial_state=True)
    return main(words(directory, *FEW, *sets, options=options))


def losses(directory: Path) -> list[dict]:
    """What a run has written of its losses, as text, so that each digit counts."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    summary = json.loads((directory / "summary.json").read_text())
    return [{k: repr(v) for k, v in each.items() if k != "elapsed_s"} for each in found if each["split"] != "train"] + [
        {key: repr(summary[key]) for key in ("baseline", "final", "test")}
    ]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> dict:
    """Runs without interruption and without a cache: by `loss_on` the losses, and the batches of each evaluation."""
    found = {}
    for loss_on in (WITH_TOKENS, OF_ANSWERS):
        directory = tmp_path_factory.mktemp("unbroken")
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("MEDQA_CACHE", str(directory / "cache"))
            counted = Batches(patched)
            assert ran(directory / "run", loss_on) == 0
        found[loss_on] = losses(directory / "run")
        found["batches"] = counted.count
    return found


def test_a_baseline_is_measured_once_for_all_runs(unbroken, batches, tmp_path, capsys):
    assert ran(tmp_path / "first", WITH_TOKENS) == 0
    assert batches.count == unbroken["batches"]
    assert "are in the cache" not in capsys.readouterr().out
    batches.count = 0
    assert ran(tmp_path / "again", WITH_TOKENS, options=("--fresh",)) == 0
    assert "the losses of 22 rows are in the cache" in capsys.readouterr().out
    saved = unbroken["batches"] - batches.count
    assert 0.3 < saved / unbroken["batches"] < 0.4  # the batches of the baseline, about as many as of either split
    assert ran(tmp_path / "answers", OF_ANSWERS) == 0
    assert losses(tmp_path / "first") == losses(tmp_path / "again") == unbroken[WITH_TOKENS]
    assert losses(tmp_path / "answers") == unbroken[OF_ANSWERS]
    assert "are in the cache" in capsys.readouterr().out, "one table for both values of loss_on"


def test_runs_that_start_from_an_adapter_share_no_baseline(batches, tmp_path, capsys):
    """The same weights compute something else with another `lora_alpha`."""
    assert ran(tmp_path / "first") == 0
    start = f"lora.init_from={tmp_path / 'first' / 'lora_adapters'}"
    assert ran(tmp_path / "second", start) == 0
    assert ran(tmp_path / "third", start, "lora.lora_alpha=64") == 0
    assert capsys.readouterr().out.count("are in the cache") == 0
    second, third = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("second", "third"))
    assert second["baseline"]["answer_loss"] != third["baseline"]["answer_loss"]


def test_without_a_cache_a_deadline_does_not_end_the_baseline(unbroken, batches, tmp_path, capsys, monkeypatch):
    """What it has measured could not be kept, so that no session would get further."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEDQA_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(Stopper, "within", lambda self, seconds: batches.count == 3)
    assert ran(tmp_path / "run", WITH_TOKENS, options=("--stop-after", "1d")) == 0
    assert "deadline" not in capsys.readouterr().err
    assert losses(tmp_path / "run") == unbroken[WITH_TOKENS]


@pytest.mark.parametrize("stop_at", ["baseline", "validation", "test"])
def test_an_interrupted_evaluation_goes_on_where_it_was(stop_at, unbroken, batches, tmp_path, capsys):
    an_evaluation = unbroken["batches"] // 3
    done = {"baseline": 2, "validation": an_evaluation + 2, "test": unbroken["batches"] - 1}[stop_at]
    batches.stop_at = done
    assert ran(tmp_path / "run", WITH_TOKENS) == 128 + signal.SIGTERM
    assert batches.count == done
    batches.stop_at, batches.count = 0, 0
    assert ran(tmp_path / "run", WITH_TOKENS) == 0
    assert "rows were measured before an interruption" in capsys.readouterr().out
    assert batches.count == unbroken["batches"] - (done - 1), "all but the one in which the signal came, once"
    assert losses(tmp_path / "run") == unbroken[WITH_TOKENS]


def test_a_deadline_ends_an_evaluation_and_what_it_measured_is_kept(unbroken, batches, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Stopper, "within", lambda self, seconds: batches.count == 3)
    assert ran(tmp_path / "run", WITH_TOKENS, options=("--stop-after", "1d")) == 0
    assert "--stop-after deadline, in an evaluation" in capsys.readouterr().err
    monkeypatch.setattr(Stopper, "within", lambda self, seconds: batches.count == unbroken["batches"] - 2)
    assert ran(tmp_path / "run", WITH_TOKENS, options=("--stop-after", "1d")) == 0
    assert "--stop-after deadline, in an evaluation" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setenv("MEDQA_CACHE", str(tmp_path / "cache"))
    assert ran(tmp_path / "run", WITH_TOKENS) == 0
    assert losses(tmp_path / "run") == unbroken[WITH_TOKENS]


@pytest.mark.slow
def test_several_processes_share_and_resume(unbroken, tmp_path):
    script = tmp_path / "train_and_stop.py"
    script.write_text(STOPPED)
    sets, own = words(tmp_path / "run", *FEW, WITH_TOKENS), {"MEDQA_CACHE": str(tmp_path / "cache")}
    stopped = Group.of(tmp_path / "run", [*sets[:3], "--stop-after", "1d", *sets[3:]], 2, script, STOP="2", **own)
    assert finish(stopped, tmp_path / "run") == 0, output(tmp_path / "run")
    assert "--stop-after deadline, in an evaluation" in output(tmp_path / "run")
    assert finish(Group.of(tmp_path / "run", sets, 2, script, **own), tmp_path / "run") == 0, output(tmp_path / "run")
    assert "rows were measured before an interruption" in output(tmp_path / "run")
    again = words(tmp_path / "again", *FEW, WITH_TOKENS)
    assert finish(Group.of(tmp_path / "again", again, 2, script, **own), tmp_path / "again") == 0
    assert "are in the cache" in output(tmp_path / "again")
    assert losses(tmp_path / "again") == losses(tmp_path / "run")
    assert losses(tmp_path / "run")[:2] == unbroken[WITH_TOKENS][:2], "the baseline is that of one process"


def test_rows_of_halved_batches_are_not_kept(tiny, monkeypatch):
    from medqa.model.loss import token_losses

    def limited(model, micro_batch, device):
        if len(micro_batch.row_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return token_losses(model, micro_batch, device)

    parts = build(tiny("exp_001"))
    rows, evaluator = parts.examples["validation"][:5], parts.evaluator(2000)
    sizes = [len(batch) for batch in evaluator.batches(rows)]
    assert max(sizes) > 2, sizes
    known = np.full((len(rows), 4), np.nan)
    monkeypatch.setattr("medqa.evaluation.loss.token_losses", limited)
    table = evaluator.row_losses(rows, known=known)
    assert np.isfinite(table).all()
    assert np.isnan(known).all(axis=1).sum() == sum(size for size in sizes if size > 2)


def test_only_weights_that_add_nothing_are_the_base(tiny, tmp_path):
    fresh = build(tiny("exp_001")).adapted
    assert adapter_digest(fresh) is None
    b = next(p for name, p in fresh.named_parameters() if "lora_B" in name)
    with torch.no_grad():
        b[0, 0] = 1e-6
    first = adapter_digest(fresh)
    with torch.no_grad():
        b[0, 0] = 2e-6
    assert None not in (first, adapter_digest(fresh))
    assert first != adapter_digest(fresh)
    assert adapter_digest(build(tiny("exp_001", "lora.use_dora=true")).adapted) is not None, "its norms round"


def lines_of(*changes: tuple[int, int, object]) -> list[list]:
    lines: list[list] = [[0, 1.25, 9, 0.5, 4], [1, 2.5, 7, 1.5, 2]]
    for row, column, value in changes:
        lines[row][column] = value
    return lines


@pytest.fixture
def two_rows(tiny) -> list:
    from dataclasses import replace

    one = build(tiny("exp_001")).examples["validation"][0]
    ids = np.arange(1, 11)
    return [replace(one, input_ids=ids, answer_start=6), replace(one, input_ids=ids[:8], answer_start=6)]


def test_a_kept_table_is_found_with_every_digit(two_rows, monkeypatch, tmp_path):
    monkeypatch.setenv("MEDQA_CACHE", str(tmp_path))
    table = np.array([[0.1 + 0.2, 9, 1 / 3, 4], [np.nan] * 4])
    _keep({"a": 1}, table, 2.5)
    found, seconds = _checked(cache.find({"a": 1}), two_rows)
    assert found.tobytes() == table.tobytes()
    assert seconds == 2.5
    cache.forget({"a": 1})
    assert cache.find({"a": 1}) is None


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        "rows",
        {"rows": lines_of()},
        {"rows": lines_of(), "seconds": "x"},
        {"rows": lines_of(), "seconds": -1},
        {"rows": lines_of(), "seconds": float("nan")},
        {"rows": [], "seconds": 1.0},
        {"rows": [[0, 1.0, 9]], "seconds": 1.0},
        {"rows": [[[0], 1.0, 9, 0.5, 4]], "seconds": 1.0},
        {"rows": lines_of((0, 1, "a")), "seconds": 1.0},
        {"rows": lines_of((0, 1, None)), "seconds": 1.0},
        {"rows": lines_of((0, 1, 10**400)), "seconds": 1.0},
        {"rows": lines_of((0, 1, float("inf"))), "seconds": 1.0},
        {"rows": lines_of((1, 0, 2)), "seconds": 1.0},
        {"rows": lines_of((1, 0, -1)), "seconds": 1.0},
        {"rows": lines_of((1, 0, 0.5)), "seconds": 1.0},
        {"rows": lines_of((1, 2, 8)), "seconds": 1.0},
        {"rows": lines_of((1, 4, 3)), "seconds": 1.0},
    ],
    ids=str,
)
def test_a_table_that_cannot_be_is_measured_again(value, two_rows):
    table, seconds = _checked(value, two_rows)
    assert np.isnan(table).all()
    assert seconds == 0
    assert np.isfinite(_checked({"rows": lines_of(), "seconds": 1.0}, two_rows)[0]).all()


def test_the_results_used_least_recently_are_removed(monkeypatch, tmp_path):
    monkeypatch.setenv("MEDQA_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "KEPT_RESULTS", 3)
    for i in range(6):
        cache.keep(["result", i], i)
        os.utime(cache._path(["result", i]), (i, i))
        assert cache.find(["result", 0]) == 0  # used again and again
    assert [cache.find(["result", i]) for i in range(6)] == [0, None, None, None, 4, 5]
