"""Sweeps: `experiments/sweep.yaml`, the words of W&B's agent, what its trials leave, and the real agent itself."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from launching import metrics, output
from wandb import wandb_agent
from wandb.sdk.launch.sweeps import utils as sweep_utils
from wandb_server import WandbServer

from harness.processes import Forked
from medqa.config import flat
from medqa.config_file import default_output_dir, find_experiment, is_sweep, load_experiment, parse_sets
from medqa.errors import Interrupted, UserError
from medqa.options import option_parser
from medqa.training import stopping
from medqa.training.stopping import Stopper
from medqa.training.wandb import wandb_names

ROOT = Path(__file__).resolve().parent.parent
SWEEP_FILE = ROOT / "experiments" / "sweep.yaml"
SWEEP = yaml.safe_load(SWEEP_FILE.read_text(encoding="utf-8"))  # as `wandb sweep` reads it: YAML 1.1


def agent_words(**values) -> list[str]:
    """What W&B makes of a trial's values for `${args_no_hyphens}`."""
    arguments = {key.replace("__", "."): {"value": value} for key, value in values.items()}
    return sweep_utils.create_sweep_command_args({"args": arguments})["args_no_hyphens"]


@pytest.fixture
def agent_command(monkeypatch, tmp_path):
    """`agent_command(values)`: the whole command that W&B's agent starts for a trial of our sweep."""
    started = []
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_DIR", "WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH"):
        monkeypatch.setenv(name, str(tmp_path) if name == "WANDB_DIR" else "x")  # so that they are put back
    monkeypatch.setattr(wandb_agent.AgentProcess, "__init__", lambda self, command, **_: started.append(command))

    def command(values: dict) -> list[str]:
        agent = wandb_agent.Agent(api=None, queue=None, sweep_id="sweep")
        agent._sweep_command = list(SWEEP["command"])
        arguments = {key: {"value": value} for key, value in values.items()}
        agent._command_run({"run_id": "trial", "program": SWEEP["program"], "args": arguments})
        return started.pop()

    return command


def test_the_agents_words_mean_what_the_sweep_said():
    wanted = {
        "optimizer__learning_rate": 1.2345678901234e-05,
        "optimizer__eps": 1e-8,
        "training__padding_free": True,
        "training__deterministic": False,
        "training__save_minutes": None,
        "lora__target_modules": ["q_proj", "v_proj"],
        "data__fractions": [0.6, 0.2, 0.2],
        "model__quantization": "none",
        "tracking__tags": ["a b", "c"],
        "lora": {"r": 4, "lora_dropout": 0.1},
        "evaluation": {"samples": 0, "rows": None},
    }
    words = agent_words(**wanted)
    assert {"training.padding_free=True", "training.save_minutes=None"} <= set(words)  # Python's spelling, not YAML's
    found = flat(load_experiment("exp_001", sets=option_parser().parse_args(["--exp", "x", "--set", *words]).set))
    nested = {
        f"{section}.{key}": value for section in ("lora", "evaluation") for key, value in wanted.pop(section).items()
    }
    for key, value in {**{key.replace("__", "."): value for key, value in wanted.items()}, **nested}.items():
        assert found[key] == value, key
    assert [type(found[key]) for key in ("training.padding_free", "lora.r")] == [bool, int]


def test_a_nested_sweep_names_its_directories_like_a_flat_one():
    experiment = load_experiment("exp_001")
    flat_words, nested_words = agent_words(lora__r=4, lora__lora_alpha=8), agent_words(lora={"r": 4, "lora_alpha": 8})
    named = default_output_dir("exp_001", False, flat_words, experiment)
    assert named == Path("outputs/exp_001,lora.lora_alpha=8,lora.r=4")
    assert default_output_dir("exp_001", False, nested_words, experiment) == named
    _, problems = parse_sets([*agent_words(lora={"r": 4}), "lora"])
    assert problems == ["--set lora: write section.key=value"]
    with pytest.raises(UserError, match=r"lora\.rank: no such key|lora\.rank = 4: no such key"):
        load_experiment("exp_001", sets=agent_words(lora={"rank": 4}))


def test_every_trial_of_the_sweep_is_a_run_of_its_own(agent_command):
    assert set(SWEEP) == {"name", "project", "program", "command", "method", "metric", "parameters", "early_terminate"}
    rate, rank = SWEEP["parameters"]["optimizer.learning_rate"], SWEEP["parameters"]["lora.r"]
    assert isinstance(rate["min"], float)
    assert isinstance(rate["max"], float)  # 1e-4 would be a word here
    directories = set()
    trials = [(rate["min"], rank["values"][0]), (rate["max"], rank["values"][-1]), (0.00038123456789012345, 16)]
    for learning_rate, r in trials:
        command = agent_command({"optimizer.learning_rate": learning_rate, "lora.r": r})
        assert command[:3] == ["/usr/bin/env", "python", "train.py"]
        options = option_parser().parse_args(command[3:])
        experiment = load_experiment(options.exp, sets=options.set)
        assert (experiment.optimizer.learning_rate, experiment.lora.r) == (learning_rate, r)
        assert not experiment.tracking.log_model
        directory = default_output_dir(options.exp, options.tiny, options.set, experiment)
        assert directory.name.startswith(f"{options.exp},lora.r={r},optimizer.learning_rate=")
        directories.add(directory)
    assert len(directories) == len(trials)


def test_the_sweep_goes_by_what_a_run_logs():
    experiment = load_experiment("exp_004")
    record = {"step": 0, "split": "eval", "loss": 1.0, "answer_loss": 1.0}
    assert SWEEP["metric"] == {"name": "eval/answer_loss", "goal": "minimize"}
    assert SWEEP["metric"]["name"] in wandb_names(record)
    stop = SWEEP["early_terminate"]
    values = 2 + (experiment.training.max_steps - 1) // experiment.evaluation.steps
    assert stop["min_iter"] * stop["eta"] < values
    said = SWEEP_FILE.read_text(encoding="utf-8")
    assert f"every {experiment.evaluation.steps} updates" in said
    assert (
        f"{experiment.evaluation.steps * (stop['min_iter'] - 1)} updates of {experiment.training.max_steps:,}" in said
    )
    assert f"lora.lora_alpha stays {experiment.lora.lora_alpha}" in said
    assert experiment.tracking.project == SWEEP["project"]


@pytest.mark.parametrize("name", ["sweep", str(SWEEP_FILE)])
def test_a_sweep_is_no_experiment(name, tmp_path):
    with pytest.raises(UserError, match=r"a W&B sweep, not an experiment: `wandb sweep .*sweep\.yaml`") as caught:
        find_experiment(name)
    assert str(caught.value).endswith("known experiments: exp_001, exp_002, exp_003, exp_004, exp_005")
    with pytest.raises(UserError, match="known: exp_001, exp_002, exp_003, exp_004, exp_005 "):
        find_experiment("sweeps")
    (tmp_path / "own.yml").write_text("lora: {r: 4}\n# parameters: none\n")
    assert find_experiment(str(tmp_path / "own.yml")) == tmp_path / "own.yml"
    assert not is_sweep(tmp_path)


def test_both_signals_of_a_stopped_trial_are_one_stop(monkeypatch):
    def received(*signals: int) -> Stopper:
        with Stopper() as interrupts:
            interrupts.finish_update = True
            for number in signals:
                signal.raise_signal(number)
        return interrupts

    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    assert received(signal.SIGTERM, signal.SIGINT).received == signal.SIGTERM
    assert received(signal.SIGINT, signal.SIGTERM).received == signal.SIGINT
    with pytest.raises(Interrupted):
        received(signal.SIGTERM, signal.SIGTERM, signal.SIGTERM)
    monkeypatch.delenv("WANDB_SWEEP_ID")
    monkeypatch.setattr(stopping, "TOGETHER_S", 0.0)
    with pytest.raises(Interrupted):
        received(signal.SIGTERM, signal.SIGINT)


def answer_losses(lines: list[dict]) -> dict[int, float]:
    """Step to validation loss, of a history."""
    return {line["train/global_step"]: line["eval/answer_loss"] for line in lines if "eval/answer_loss" in line}


def test_a_trial_that_meets_a_complete_run_is_told_all_the_same(tiny_run, tmp_path):
    server, directory = WandbServer(), tmp_path / "trial"
    sets = ("training.max_steps=6", "training.global_batch_size=8", "training.save_steps=2", "evaluation.steps=2")
    words = ["--exp", "exp_003", "--tiny", "--cpu", "--set", *sets, "evaluation.samples=0", "--output-dir"]
    quiet = {"OMP_NUM_THREADS": "1", "NETRC": "/nonexistent", **server.environment}
    trial = {"WANDB_SWEEP_ID": "sweep", "WANDB_RUN_ID": "second", "WANDB_PROJECT": "p", "WANDB_DIR": str(tmp_path)}
    for name in ("trial", "alone"):
        shutil.copytree(tiny_run, tmp_path / name)
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    started = [
        Forked([*words, str(tmp_path / name)], tmp_path / f"{name}.log", quiet | environment)
        for name, environment in (("trial", trial), ("alone", {"WANDB_RUN_ID": "alone"}))
    ]
    assert [process.wait(120) for process in started] == [0, 0], (tmp_path / "trial.log").read_text()
    assert "the run is already complete" in (tmp_path / "trial.log").read_text()
    recorded = {record["step"]: record["answer_loss"] for record in metrics(directory) if record["split"] == "eval"}
    assert answer_losses(server.runs["second"]) == recorded
    assert server.configs["second"]["lora"]["value"]["r"] == 8
    assert set(server.runs) == {"second"}  # outside a sweep a complete run is left alone
    assert before == {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_the_real_agent(tmp_path):
    """Trials by `wandb agent`: one is stopped in its middle, one goes on with it, one finds it complete."""
    server = WandbServer()
    command = list(SWEEP["command"])
    at = command.index("exp_004") + 1
    sizes = ["training.max_steps=150", "training.global_batch_size=8", "training.log_steps=1", "evaluation.rows=8"]
    command[at:at] = ["--tiny", "--cpu"]
    command[-1:] = [*sizes, "evaluation.samples=0", "evaluation.steps=50", "model.dequantize=never", command[-1]]
    server.sweep = SWEEP | {"command": command}
    values = {"optimizer.learning_rate": {"value": 0.0012345678901234}, "lora.r": {"value": 2}}
    directories = tmp_path / "outputs"

    def at_work(running: dict[str, bool]) -> bool:
        found = list(directories.glob("*/metrics.jsonl"))
        return bool(found) and any(r["split"] == "train" and r["step"] >= 3 for r in metrics(found[0].parent))

    def run(name: str) -> tuple:
        return (lambda running: not running, {"type": "run", "run_id": name, "program": program, "args": values})

    program = str(ROOT / "train.py")
    stop = (at_work, {"type": "stop", "run_id": "stopped"})
    server.commands = [
        run("stopped"),
        stop,
        run("second"),
        run("third"),
        (lambda running: not running, {"type": "exit"}),
    ]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment = kept | server.environment | {"OMP_NUM_THREADS": "1", "NETRC": "/nonexistent"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    log = tmp_path / "outputs.log"
    with log.open("w") as file:
        agent = [sys.executable, "-m", "wandb", "agent", "me/medqa/sweep"]
        done = subprocess.run(agent, cwd=tmp_path, env=environment, stdout=file, stderr=file, timeout=400)
    assert done.returncode == 0, output(directories)
    directory, *others = directories.iterdir()
    assert others == []  # the three tried the same
    assert "stopped by SIGTERM" in output(directories)
    assert "the run is already complete" in output(directories)
    recorded = {record["step"]: record["answer_loss"] for record in metrics(directory) if record["split"] == "eval"}
    assert set(recorded) == {0, 50, 100, 150}
    assert answer_losses(server.runs["second"]) == recorded
    assert answer_losses(server.runs["third"]) == recorded
    stopped = [line["train/global_step"] for line in server.runs["stopped"]]
    assert 3 <= max(stopped) < 150
    said = json.loads((directory / "run.json").read_text())
    assert (said["run_id"], said["resumes"]) == ("stopped", 1)  # going on by hand is the first trial's W&B run
