"""Two gloo processes compute what one does, are stopped together, and one goes on where two stopped."""

import json
import signal

import pytest
from accelerate import Accelerator
from launching import PYTHON, finish, metrics, output, start, summary, torchrun, wait_for_update, wait_until_gone

WORDS = (
    "--exp", "exp_001", "--tiny", "--set", "training.max_steps=12", "training.save_steps=50", "evaluation.steps=6",
    "evaluation.rows=8", "tracking.wandb=disabled",
)  # fmt: skip
CLOSE = 1e-5


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run on one process, on two, and begun on two and ended on one."""
    place = tmp_path_factory.mktemp("processes")
    one, two, elastic = (place / name for name in ("one", "two", "elastic"))
    alone = start(PYTHON, one, *WORDS)
    together = start(torchrun(2), two, *WORDS)
    assert finish(alone, one) == 0, output(one)
    assert finish(together, two) == 0, output(two)
    stopped = start(torchrun(2), elastic, *WORDS)
    wait_for_update(stopped, elastic, 4)
    stopped.send_signal(signal.SIGTERM)
    assert finish(stopped, elastic) != 0
    wait_until_gone(elastic)
    assert not (elastic / "summary.json").exists()
    assert len(list(elastic.glob("checkpoint-*"))) == 1
    assert finish(start(PYTHON, elastic, *WORDS), elastic) == 0, output(elastic)
    return one, two, elastic


@pytest.mark.parametrize("other", [1, 2], ids=["two processes", "two, then one"])
def test_the_same_losses_update_for_update(runs, other):
    one, same = metrics(runs[0]), metrics(runs[other])
    assert [(r["step"], r["split"]) for r in one] == [(r["step"], r["split"]) for r in same]
    for ours, theirs in zip(one, same, strict=True):
        for key in ("loss", "grad_norm", "learning_rate", "answer_loss"):
            assert ours.get(key) == (None if key not in theirs else pytest.approx(theirs[key], rel=CLOSE))
        for key in ("tokens", "rows", "padding_share", "examples_seen", "tokens_seen", "epoch"):
            assert ours.get(key) == theirs.get(key)


def test_evaluation_is_the_same(runs):
    for part in ("baseline", "final", "test"):
        assert summary(runs[1])[part] == pytest.approx(summary(runs[0])[part], rel=CLOSE)
    assert summary(runs[1])["baseline"] == pytest.approx(summary(runs[0])["baseline"], rel=1e-9)


def test_what_is_told_of_the_processes(runs):
    assert (summary(runs[0])["processes"], summary(runs[1])["processes"]) == (1, 2)
    assert summary(runs[0])["gradient_accumulation_steps"] == 8
    assert summary(runs[1])["gradient_accumulation_steps"] == 4
    assert output(runs[1]).count("in the loss") == 2, "the plan is printed by the main process alone"
    assert output(runs[1]).count("update 12/12") == 1


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path, monkeypatch, capsys):
    from accelerate.state import AcceleratorState

    from train import main

    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(cpu=True)  # one that stands alone
    monkeypatch.setenv("WORLD_SIZE", "2")  # as a launcher of two would say
    assert main(["--exp", "exp_001", "--tiny", "--cpu", "--output-dir", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert "2 processes were launched, but this one knows of 1" in told
    assert not (tmp_path / "run").exists()
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
def test_a_batch_that_two_processes_cannot_share_is_refused(tmp_path):
    directory = tmp_path / "run"
    process = start(torchrun(2), directory, *WORDS, "training.global_batch_size=4")
    assert finish(process, directory) != 0
    told = output(directory)
    assert "does not divide" in told
    assert "training.per_device_batch_size=1 or 2" in told
    assert told.count("error: training.global_batch_size") == 1
    assert not directory.exists()
    assert json.dumps(told).count("Traceback") <= 1  # the launcher's own, about its child
