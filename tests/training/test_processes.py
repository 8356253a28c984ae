"""Two gloo processes compute what one does, are stopped together, and one goes on where two stopped."""

import csv
import json

import pytest
import torch
from accelerate import Accelerator
from launching import (
    FAULTY,
    SECONDS,
    Group,
    finish,
    metrics,
    on_two_hosts,
    output,
    start,
    stop_after,
    summary,
    torchrun,
    wait_until_gone,
)
from moved import assert_same_run
from safetensors.torch import load_file

from medqa.tiny import MEDQUAD_CSV
from medqa.training.checkpoint import newest_valid

WORDS = (
    "--exp", "exp_001", "--tiny", "--set", "training.max_steps=10", "training.save_steps=50", "evaluation.steps=5",
    "evaluation.rows=8", "tracking.wandb=disabled", "training.global_batch_size=16",
)  # fmt: skip
CLOSE = 1e-5


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run on one process, on two, begun on two and ended on one, and the reverse."""
    words = (*WORDS, "model.quantization=none")
    place = tmp_path_factory.mktemp("processes")
    one, two, fewer, more = (place / name for name in ("one", "two", "fewer", "more"))
    alone = Group(one, *words)
    together = Group(two, *words, processes=2)
    assert finish(alone, one) == 0, output(one)
    assert finish(together, two) == 0, output(two)
    for directory, processes in ((more, 1), (fewer, 2)):
        stop_after(Group(directory, *words, processes=processes), directory, 3)
    for directory in (more, fewer):
        assert not (directory / "summary.json").exists()
        assert len(list(directory.glob("checkpoint-*"))) == 1
    second = {fewer: Group(fewer, *words), more: Group(more, *words, processes=2)}
    for directory, process in second.items():
        assert finish(process, directory) == 0, output(directory)
    return one, two, fewer, more


@pytest.mark.parametrize("other", [1, 2, 3], ids=["two processes", "two, then one", "one, then two"])
def test_the_same_losses_update_for_update(runs, other):
    one, same = metrics(runs[0]), metrics(runs[other])
    assert [(r["step"], r["split"]) for r in one] == [(r["step"], r["split"]) for r in same]
    for ours, theirs in zip(one, same, strict=True):
        for key in ("loss", "grad_norm", "learning_rate", "answer_loss"):
            assert ours.get(key) == (None if key not in theirs else pytest.approx(theirs[key], rel=CLOSE))
        for key in ("order", "tokens", "rows", "padding_share", "examples_seen", "tokens_seen", "epoch"):
            assert ours.get(key) == theirs.get(key)


def test_evaluation_is_the_same(runs):
    for part in ("baseline", "final", "test"):
        assert summary(runs[1])[part] == pytest.approx(summary(runs[0])[part], rel=CLOSE)
    assert summary(runs[1])["baseline"] == pytest.approx(summary(runs[0])["baseline"], rel=1e-9)


def test_what_is_told_of_the_processes(runs):
    assert (summary(runs[0])["processes"], summary(runs[1])["processes"]) == (1, 2)
    assert [change["changed"] for change in summary(runs[3])["not_bitwise"]] == [["processes 1 before, 2 now"]]
    assert summary(runs[0])["gradient_accumulation_steps"] == 4
    assert summary(runs[1])["gradient_accumulation_steps"] == 2
    assert output(runs[1]).count("in the loss") == 2, "the plan is printed by the main process alone"
    assert output(runs[1]).count("update 10/10") == 1


def test_processes_that_have_read_other_rows_are_refused(tmp_path):
    """On a first session there is no checkpoint to compare with: they would train on two data sets, without a word."""
    other = tmp_path / "other.csv"
    with MEDQUAD_CSV.open(newline="") as source, other.open("w", newline="") as target:
        rows = list(csv.DictReader(source))
        writer = csv.DictWriter(target, rows[0])
        writer.writeheader()
        writer.writerows(row | {"answer": row["answer"][::-1]} for row in rows)
    here, there = tmp_path / "here", tmp_path / "there"
    words = ("--medquad", str(other))
    assert on_two_hosts((here, WORDS), (there, (*words, *WORDS))) == [2, 2], output(here)
    for directory in (here, there):
        told = " ".join(output(directory).split())
        assert "processes loaded different data, token ids: " in told
        assert not directory.exists()


def test_the_first_process_hands_the_best_adapter_to_those_that_do_not_see_it(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    words = (*WORDS, "training.max_steps=4", "training.keep=best", "evaluation.steps=1", "evaluation.rows=null")
    words = (*words, "optimizer.learning_rate=0.05")
    assert on_two_hosts((here, words), (there, words)) == [0, 0], output(here) + output(there)
    told = summary(here)
    assert told["adapter_step"] == told["best_step"] < 4
    kept, best = (load_file(here / name / "adapter_model.safetensors") for name in
                  ("lora_adapters", f"checkpoint-{told['adapter_step']}"))  # fmt: skip
    assert all(torch.equal(kept[name], best[name]) for name in best)
    validation = {r["step"]: r["loss"] for r in metrics(here) if r["split"] == "eval"}
    best_loss = validation[told["best_step"]]
    assert told["final"]["loss"] == pytest.approx(best_loss, rel=1e-9), "both measure with it"
    assert not there.exists()


WITHOUT_PADDING = ("training.padding_free=true", "training.micro_batch_tokens=700")


def begun_on_two_ended_on_one(directory, *words):
    """A run without padding, stopped in the middle of it on two processes."""
    stop_after(Group(directory, *words, processes=2), directory, 3)
    assert len(list(directory.glob("checkpoint-*"))) == 1
    assert not (directory / "summary.json").exists()
    assert finish(Group(directory, *words), directory) == 0, output(directory)


def assert_same_whole_run(ours, theirs):
    """All that is measured, as much padding, and after all updates the adapter."""
    assert_same_run(ours, theirs, updates=10)
    pairs = list(zip(metrics(ours), metrics(theirs), strict=True))
    assert len(pairs) == 10 + 2 + 2 + 1 + 1  # updates; eval_full and eval before and after; eval after update 5; test
    for one, other in pairs:
        if one["split"] == "train":  # one token of a process that has nothing else to do is the most
            assert other["padding_share"] == pytest.approx(one["padding_share"], abs=1e-3)


@pytest.mark.slow
def test_without_padding_two_processes_compute_what_one_does(tmp_path):
    """Each example a micro-batch, so that one process's noise is that of two, whose number of them is even."""
    words = (*WORDS, *WITHOUT_PADDING, "training.micro_batch_tokens=1")
    alone = Group(tmp_path / "one", *words)
    begun_on_two_ended_on_one(tmp_path / "fewer", *words)
    assert finish(alone, tmp_path / "one") == 0, output(tmp_path / "one")
    assert_same_whole_run(tmp_path / "one", tmp_path / "fewer")
    assert "micro-batches of at most 1 tokens: the size with which the run began" in output(tmp_path / "fewer")


@pytest.mark.slow
def test_without_padding_one_process_goes_on_with_the_noise_of_two(tmp_path):
    """How an update is cut, and so its noise, is that of the run's first session."""
    words = (*WORDS, *WITHOUT_PADDING)
    both = Group(tmp_path / "two", *words, processes=2)
    begun_on_two_ended_on_one(tmp_path / "fewer", *words)
    assert finish(both, tmp_path / "two") == 0, output(tmp_path / "two")
    assert_same_whole_run(tmp_path / "two", tmp_path / "fewer")


@pytest.mark.slow
def test_a_process_without_a_piece_takes_part(tmp_path):
    """Begun on one process with whole updates as one piece, ended on two, of which the second then has none."""
    words = (*WORDS, *WITHOUT_PADDING, "training.micro_batch_tokens=100000")
    alone = Group(tmp_path / "one", *words)
    stop_after(Group(tmp_path / "more", *words), tmp_path / "more", 4)
    assert finish(Group(tmp_path / "more", *words, processes=2), tmp_path / "more") == 0, output(tmp_path / "more")
    assert finish(alone, tmp_path / "one") == 0, output(tmp_path / "one")
    assert_same_whole_run(tmp_path / "one", tmp_path / "more")


@pytest.mark.slow
def test_when_one_process_fails_all_stop_in_time_and_the_checkpoint_is_whole(tmp_path):
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY)
    sets = ("training.save_steps=1", "training.process_timeout_s=20", "evaluation.rows=4", "model.quantization=none")
    for fault in ("dead", "full", "hangs"):  # one after another: on a busy machine six would start too slowly
        run = Group(tmp_path / fault, *WORDS, *sets, processes=2, script=script, leading=[fault])
        alive, other = run.processes
        assert alive.wait(SECONDS) == 3, output(tmp_path / fault)
        if fault == "hangs":
            other.kill()
        assert (other.wait(SECONDS) == 3) == (fault == "full")
        assert newest_valid([tmp_path / fault]).path.name == "checkpoint-2", fault
        assert {r["step"] for r in metrics(tmp_path / fault)} == {0, 1, 2}
    told = output(tmp_path / "full")
    assert "update 3: CUDA out of memory., in one of several processes; start again" in told
    assert "with --set training.per_device_batch_size=2" in told
    for fault in ("dead", "hangs"):
        told = output(tmp_path / fault)
        assert "process 0: another process of this run has died or has not answered" in told, told
        assert "the same command resumes from it" in told


@pytest.mark.slow
def test_when_one_process_dies_its_launcher_ends_those_that_are_left(tmp_path):
    script, run = tmp_path / "faulty.py", tmp_path / "run"
    script.write_text(FAULTY)
    words = (*WORDS, "training.save_steps=1", "training.process_timeout_s=60", "evaluation.rows=4")
    assert finish(start(torchrun(2), run, *words, script=[str(script), "dead"]), run) != 0
    wait_until_gone(run)
    assert newest_valid([run]).path.name == "checkpoint-2"
    assert {r["step"] for r in metrics(run)} == {0, 1, 2}
    assert "process 0: another process of this run has died or has not answered" in output(run)
    assert "the same command resumes from it" in output(run)


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path, monkeypatch, capsys):
    from accelerate.state import AcceleratorState

    from train import main

    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(cpu=True)  # one that stands alone
    said = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in said.items():  # as a launcher of two would
        monkeypatch.setenv(name, value)
    assert main(["--exp", "exp_001", "--tiny", "--cpu", "--output-dir", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert "2 processes were launched, but this one is connected to 1 in all" in told
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
