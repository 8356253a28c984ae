"""W&B fails in the middle of a run, or a run is killed and goes on: training goes on, and each step is told once."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from launching import figures
from wandb_file import read_finished_run
from wandb_server import WandbServer

from harness.processes import Forked
from medqa.training.recorder import read_metrics

pytestmark = pytest.mark.slow

UPDATES = 30
FEW = 12  # of a run in which nothing is killed while it trains
SETS = (
    "training.save_steps=4", "training.global_batch_size=8", "evaluation.steps=10", "evaluation.rows=4",
    "tokenization.max_length=48", "model.quantization=none", "lora.r=2", "tracking.log_model=false",
)  # fmt: skip
WARNING = "training continues; metrics.jsonl has all records"
FAULTS = ("refuse", "hang", "error", "deny", "killed", "killed offline")


def start(directory: Path, samples: int = 0, updates: int = UPDATES, **environment: str) -> Forked:
    # The table of samples needs more of a server than ours has.
    sets = (*SETS, f"training.max_steps={updates}", f"evaluation.samples={samples}")
    words = ["--exp", "exp_001", "--tiny", "--cpu", "--output-dir", str(directory), "--set", *sets]
    quiet = {"OMP_NUM_THREADS": "1", "NETRC": "/nonexistent", "WANDB_FINISH_TIMEOUT": "4"}
    return Forked(words, directory.with_suffix(".log"), quiet | environment)


def reach(process: Forked, directory: Path, step: int) -> None:
    path = directory / "metrics.jsonl"
    while not path.exists() or not any(r["split"] == "train" and r["step"] >= step for r in read_metrics(path)):
        assert process.poll() is None, directory.with_suffix(".log").read_text()
        time.sleep(0.002)


def service_of(process: Forked) -> int:
    """The process of W&B's own service for a run."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, after = path.read_text().split("(", 1)[1].rsplit(")", 1)
        except OSError:
            continue
        if name.startswith("wandb-core") and int(after.split()[1]) == process.pid:
            return int(path.parent.name)
    raise AssertionError("no service")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run without W&B, one with a server that works, and one with each fault, all at once."""
    place = tmp_path_factory.mktemp("runs")
    servers = {fault: WandbServer() for fault in ("none", *FAULTS)}
    offline = {"WANDB_MODE": "offline"}
    started = {"off": start(place / "off", WANDB_MODE="disabled")}
    for fault, server in servers.items():
        environment = offline if fault == "killed offline" else server.environment
        samples = 2 if fault in ("deny", "killed") else 0
        started[fault] = start(place / fault.replace(" ", "-"), samples, **environment)
    for fault in FAULTS:
        reach(started[fault], place / fault.replace(" ", "-"), 3)
        if fault.startswith("killed"):
            os.kill(service_of(started[fault]), signal.SIGKILL)
        else:
            servers[fault].fail(fault)
    codes = {name: process.wait(120) for name, process in started.items()}
    for server in servers.values():
        server.stop_hanging.set()
    return place, codes, servers


@pytest.mark.parametrize("fault", ["none", *FAULTS])
def test_training_goes_on_and_nothing_is_lost_from_the_metrics(runs, fault):
    place, codes, _ = runs
    directory = place / fault.replace(" ", "-")
    assert codes[fault] == 0, directory.with_suffix(".log").read_text()
    assert figures(directory) == figures(place / "off")
    assert (directory / "summary.json").exists()


@pytest.mark.parametrize("fault", FAULTS)
def test_it_is_said_once(runs, fault):
    said = (runs[0] / f"{fault.replace(' ', '-')}.log").read_text()
    assert said.count(WARNING) == 1, said
    assert said.count("wandb: ") == 0, said
    assert "Traceback" not in said


def test_without_a_fault_nothing_is_said_and_everything_is_there(runs):
    place, _, servers = runs
    assert WARNING not in (place / "none.log").read_text()
    told = [line for line in servers["none"].history if "train/loss" in line]
    assert [line["train/global_step"] for line in told] == list(range(1, UPDATES + 1))
    assert [line["train/loss"] for line in told] == [
        r["loss"] for r in figures(place / "none") if r["split"] == "train"
    ]


def test_a_service_process_that_hangs_is_not_waited_for_without_end(tmp_path):
    server = WandbServer()
    process = start(tmp_path / "run", 2, **server.environment)
    reach(process, tmp_path / "run", 3)
    service = service_of(process)
    os.kill(service, signal.SIGSTOP)
    assert process.wait(120) == 0
    os.kill(service, signal.SIGKILL)
    assert (tmp_path / "run.log").read_text().count(WARNING) == 1
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_service_process_that_is_dead_at_the_start_turns_wandb_off(tmp_path):
    from wandb.sdk.lib.service.service_token import UnixServiceToken

    address = UnixServiceToken(parent_pid=1, path="/nonexistent").env_value
    process = start(tmp_path / "run", updates=FEW, WANDB_MODE="offline", WANDB_SERVICE=address)
    assert process.wait(120) == 0, (tmp_path / "run.log").read_text()
    said = (tmp_path / "run.log").read_text()
    assert "W&B: off (" in said
    assert "metrics.jsonl has all records" in said
    assert "Traceback" not in said


def told_once(histories: dict[str, list[dict]], directory: Path) -> None:
    """Over everything that W&B has: the figures of the metrics file, each once."""
    for key in ("train/loss", "eval/answer_loss", "test/loss"):
        split, name = key.split("/")
        expected = [(r["step"], r[name]) for r in figures(directory) if r["split"] == split]
        found = [
            (line["train/global_step"], line[key]) for lines in histories.values() for line in lines if key in line
        ]
        assert found == expected, key


def newest(server: WandbServer) -> int:
    """The last update that the server knows of."""
    return max((line.get("train/global_step", 0) for line in server.history), default=0)


@pytest.mark.parametrize("kills", [(13,), (7, 17, 26)], ids=["one", "three"])
def test_an_online_run_that_is_killed_goes_on_without_doubled_or_lost_steps(kills, tmp_path):
    server = WandbServer()
    often = server.environment | {"WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "0.1"}
    known = [0]
    for step in kills:
        process = start(tmp_path / "run", **often)
        reach(process, tmp_path / "run", step)
        os.kill(process.pid, signal.SIGSTOP)
        deadline = time.monotonic() + 30  # until W&B's service has sent what it was told
        while (known_now := newest(server)) <= known[-1] and time.monotonic() < deadline:
            time.sleep(0.05)
        known.append(known_now)
        process.kill()
        process.wait()
    assert known == sorted(set(known)), "each time the server knew of a part"
    assert 0 < known[-1] < UPDATES
    assert start(tmp_path / "run", **often).wait(120) == 0
    said = (tmp_path / "run.log").read_text()
    assert WARNING not in said
    told_once({"server": server.history}, tmp_path / "run")


def test_the_newest_offline_session_has_everything_and_stands_alone(tmp_path):
    run = tmp_path / "run"
    for step in (7, 17):
        process = start(run, WANDB_MODE="offline")
        reach(process, run, step)
        process.kill()
        process.wait()
    assert start(run, WANDB_MODE="offline").wait(120) == 0
    sessions = list(run.glob("wandb/offline-run-*"))
    assert len(sessions) == 1
    assert (run / "wandb" / "latest-run").resolve() == sessions[0].resolve()
    assert len(list(run.glob("wandb/superseded/offline-run-*"))) == 2
    found = read_finished_run(next(sessions[0].glob("*.wandb")))
    told_once({"session": [found.history[step] for step in sorted(found.history)]}, run)
    # Had the session been sent already, the next one would be told only of what is new.
    (run / "summary.json").unlink()
    (sessions[0] / f"run-{found.id}.wandb.synced").touch()
    shutil.rmtree(run / "checkpoint-30")
    assert start(run, WANDB_MODE="offline").wait(120) == 0
    (second,) = [path for path in run.glob("wandb/offline-run-*") if path != sessions[0]]
    steps = set(read_finished_run(next(second.glob("*.wandb"))).history)
    assert min(steps) == 29
