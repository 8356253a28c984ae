"""Two hosts, started by the real launcher on each, and one of them cut off in mid-run; two hosts and one directory."""

import json
import os
import signal
import subprocess
import time

import psutil
import pytest
from hosts import Hosts, refusal
from launching import PYTHON, SECONDS, Group, finish, metrics, output, summary, torchrun, wait_for_update

from medqa.errors import Busy, UserError
from medqa.training.checkpoint import newest_valid
from medqa.training.recorder import MetricsFile, Tracker
from medqa.training.run_dir import LOCK_FILE, RunLock, this_process

UPDATES = 30
WORDS = (
    "--exp", "exp_001", "--tiny", "--set", f"training.max_steps={UPDATES}", "training.save_steps=4",
    "training.log_steps=1", "training.global_batch_size=16", "training.process_timeout_s=20", "evaluation.steps=1000",
    "evaluation.rows=8", "tracking.wandb=disabled",
)  # fmt: skip
CLOSE = 1e-5


@pytest.fixture
def hosts():
    if reason := refusal():
        pytest.skip(reason)
    with Hosts() as joined:
        yield joined


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The same run on one process, uninterrupted."""
    directory = tmp_path_factory.mktemp("straight") / "run"
    assert finish(Group(directory, *WORDS), directory) == 0, output(directory)
    return directory


def ended(process, log):
    """The exit code, or what was printed if it does not end."""
    try:
        return process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        raise AssertionError(log.read_text()) from None


def trainer(hosts, name):
    """The process on a host that trains: the one without children."""
    return next(pid for pid in hosts.processes(name) if not psutil.Process(pid).children())


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["beta", "alpha"], ids=["not the first", "the first, alive and stuck"])
def test_a_host_that_is_cut_off_ends_the_run_in_time_and_the_other_goes_on_alone(cut, hosts, straight, tmp_path):
    run, survivor = tmp_path / "run", {"alpha": "beta", "beta": "alpha"}[cut]
    logs = {name: tmp_path / f"{name}.log" for name in ("alpha", "beta")}
    words = ("--output-dir", str(run), *WORDS)
    launched = {name: hosts.launch(rank, logs[name], *words) for rank, name in enumerate(logs)}
    deadline = time.monotonic() + SECONDS
    while not any(record["step"] >= 5 for record in metrics(run)):
        assert all(process.poll() is None for process in launched.values()), [log.read_text() for log in logs.values()]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    stuck = trainer(hosts, cut) if cut == "alpha" else None
    if stuck:
        os.kill(stuck, signal.SIGSTOP)
    hosts.cut_off(cut)

    assert ended(launched[survivor], logs[survivor]) == 1
    alone = PYTHON if survivor == "alpha" else torchrun(2)
    again = [*alone, "train.py", "--cpu", *words]
    if stuck:  # it holds the lock of the disk that it still has, and is not written beside
        before = (run / "metrics.jsonl").read_bytes()
        refused = hosts.start(survivor, tmp_path / "refused.log", [*PYTHON, "train.py", "--cpu", *words])
        assert ended(refused, tmp_path / "refused.log") == 2
        assert f"another run is using it (process {stuck} on alpha)" in (tmp_path / "refused.log").read_text()
        assert (run / "metrics.jsonl").read_bytes() == before
        os.kill(stuck, signal.SIGCONT)
    assert ended(launched[cut], logs[cut]) == 1
    for rank, log in enumerate(logs.values()):
        told = log.read_text()
        assert f"process {rank}: another process of this run has died or has not answered" in told
        assert "the same command resumes from it" in told
    assert hosts.processes("alpha") == hosts.processes("beta") == []
    assert newest_valid([run]).path.name == f"checkpoint-{max(r['step'] for r in metrics(run)) // 4 * 4}"
    assert not (run / "summary.json").exists()

    log = tmp_path / "again.log"
    assert ended(hosts.start(survivor, log, again, GLOO_SOCKET_IFNAME="lo"), log) == 0, log.read_text()
    ours, theirs = metrics(run), metrics(straight)
    assert [(r["step"], r["split"]) for r in ours] == [(r["step"], r["split"]) for r in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=CLOSE)
        assert one.get("order") == other.get("order")
    changes = [change["changed"] for change in summary(run)["not_bitwise"]]
    assert changes == ([["processes 2 before, 1 now"]] if survivor == "alpha" else [])
    assert summary(run)["resumes"] == 1


def test_who_takes_a_directory_last_has_it(tmp_path):
    """Where a lock does not reach the other host."""
    with RunLock(tmp_path) as ours:
        ours.check()  # nothing is taken yet
        ours.acquire()
        ours.check()
        other = this_process() | {"host": "beta", "pid": 5}
        (tmp_path / LOCK_FILE).write_text(json.dumps(other))
        with pytest.raises(UserError, match=r"another run \(process 5 on beta\) now owns this directory") as refused:
            ours.check()
        assert not isinstance(refused.value, Busy)  # to wait for it would not help
        metrics_file = tmp_path / "metrics.jsonl"
        metrics_file.write_text("")
        tracker = Tracker(True, MetricsFile(metrics_file), check=ours.check)
        record = {"step": 1, "split": "train"}
        for write in (lambda: tracker.log(record), tracker.flush, lambda: tracker.log_save(1, 0.5)):
            with pytest.raises(UserError, match="now owns this directory"):
                write()
        assert metrics_file.read_text() == ""
        (tmp_path / LOCK_FILE).write_text("")  # as it is while the other writes its name: known the next time
        ours.check()
        (tmp_path / LOCK_FILE).unlink()
        ours.check()


# Locks that hold on one host alone, as on some network mounts: here none at all; and updates that take their time.
UNLOCKED = """
import sys, time
import medqa.training.run_dir as lock
import medqa.training.loop as loop
import train

lock.fcntl.flock = lambda *given: None
step = loop.train_step
loop.train_step = lambda *given, **more: (time.sleep(0.2), step(*given, **more))[1]
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_where_locks_do_not_reach_the_other_host_the_older_run_stops_without_writing(straight, tmp_path):
    script, run = tmp_path / "unlocked.py", tmp_path / "run"
    script.write_text(UNLOCKED)
    older = Group(run, *WORDS, script=script)
    wait_for_update(older, run, 9)
    newer = Group(run, *WORDS, script=script)
    assert finish(older, run) == 2, output(run)
    assert "now owns this directory" in output(run)
    assert finish(newer, run) == 0, output(run)
    ours, theirs = metrics(run), metrics(straight)
    assert [(r["step"], r["split"]) for r in ours] == [(r["step"], r["split"]) for r in theirs]
    assert [r["loss"] for r in ours] == [r["loss"] for r in theirs]
    assert summary(run)["resumes"] == 1
