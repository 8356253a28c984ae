"""`launch/slurm.sbatch`, run by bash with small stand-ins for Slurm's commands: what is requeued, and what is not."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import QUIET, ROOT, SECONDS, metrics, summary

from medqa import errors
from medqa.errors import Busy, Interrupted, ProcessStopped, StoppedInTime, TrainingStopped, UserError, exit_code
from medqa.training.run_dir import note_saved

SCRIPT = ROOT / "launch" / "slurm.sbatch"
COMMANDS = {
    # Runs the step here; its number is what scancel signals.
    "srun": 'echo "$*" >> "$FAKE/srun"; while [[ $1 == --* ]]; do shift; done\n'
    'export SLURM_NODEID=0; echo $$ > "$FAKE/step"; exec "$@"',
    "scontrol": 'if [ "$1" = requeue ]; then echo "$2" >> "$FAKE/requeued"; exit "${REFUSED:-0}"; fi\n'
    'if [ "$1 $2" = "show job" ]; then echo "PreemptTime=${PREEMPTED:-None}"; else printf "127.0.0.1\\nother\\n"; fi',
    "scancel": '[ "$*" = "--signal=TERM 77" ] && kill -TERM "$(cat "$FAKE/step")"',
}
# A trainer that ends as it is told: one line an attempt, "words for the file, exit code".
TRAINER = """
n=$(cat "$FAKE/attempts" 2>/dev/null || echo 0); echo $((n + 1)) > "$FAKE/attempts"
read -r words code < <(sed -n "$((n + 1))p" "$FAKE/endings")
[ "$words" = - ] || tr , '\\n' <<< "$words" >> "$MEDQA_ENDING"
exit "$code"
"""


class Slurm:
    """A folder with the stand-ins, and the script's environment."""

    def __init__(self, place: Path) -> None:
        self.place = place / "with a space"
        self.commands = self.place / "bin"
        self.commands.mkdir(parents=True)
        self.submitted = self.place / "repository"
        self.submitted.mkdir()
        (self.submitted / "train.py").touch()
        for name, body in COMMANDS.items():
            self.write(name, body)

    def write(self, name: str, body: str) -> None:
        (self.commands / name).write_text(f"#!/bin/bash\n{body}\n")
        (self.commands / name).chmod(0o755)

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        known = {
            "SLURM_SUBMIT_DIR": str(self.submitted), "SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "1",
            "SLURM_JOB_NODELIST": "n[1-2]", "FAKE": str(self.place), "VIRTUAL_ENV": sys.prefix,
            "MEDQA_BUSY_SECONDS": "0",
            "PATH": f"{self.commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        }  # fmt: skip
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "WANDB_", "MEDQA_E"))}
        return subprocess.Popen(
            ["bash", str(SCRIPT), *words], env=kept | QUIET | known | environment, text=True, stderr=subprocess.PIPE
        )

    def run(self, *words: str, **environment: str) -> tuple[int, str]:
        """Exit code and what was said."""
        process = self.start(*words, **environment)
        said = process.communicate(timeout=SECONDS)[1]
        return process.returncode, said

    def lines(self, name: str) -> list[str]:
        path = self.place / name
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def slurm(tmp_path):
    return Slurm(tmp_path)


ENDINGS = {
    "complete": (["saved,complete 0"], 0, False, ""),
    "complete already": (["complete 0"], 0, False, ""),
    "--stop-after": (["saved,saved,in-time 0"], 0, True, "requeued (in-time)"),
    "a mistake": (["mistake 2"], 1, False, "it would end the same way again"),
    "the disk filled up in mid-run": (["saved,mistake 2"], 1, False, "it would end the same way again"),
    "not finite": (["saved,stopped 3"], 1, False, "it would end the same way again"),
    "another node died": (["saved,lost 1"], 0, True, "requeued (lost)"),
    "another node died at once": (["lost 1"], 1, False, "before it had made a checkpoint"),
    "killed in mid-run": (["saved 137"], 0, True, "requeued"),
    "killed at once": (["- 137"], 1, False, "exit code 137"),
    "busy, then not": (["busy 2", "busy 2", "saved,complete 0"], 0, False, "(2 of 30)"),
    "busy for good": (["busy 2"] * 31, 1, False, "it would end the same way again"),
    "someone's SIGTERM": (["saved,signal 143"], 143, False, "neither by the time limit"),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_is_requeued(slurm, ending):
    attempts, code, requeued, said = ENDINGS[ending]
    (slurm.place / "endings").write_text("\n".join(attempts) + "\n")
    slurm.write("python", TRAINER)
    found, told = slurm.run("--exp", "exp_001")
    assert (found, slurm.lines("requeued")) == (code, ["77"] * requeued), told
    assert said in told
    assert slurm.lines("attempts") == [str(len(attempts))]


@pytest.mark.parametrize(("ending", "code", "requeued"), [("saved,signal 1", 0, ["77"]), ("signal 1", 1, [])])
def test_a_signal_to_one_of_several_is_the_launchers_for_another_has_died(slurm, ending, code, requeued):
    (slurm.place / "endings").write_text(f"{ending}\n")
    slurm.write("accelerate", TRAINER)
    found, told = slurm.run("--exp", "exp_001", SLURM_GPUS_ON_NODE="4")
    assert (found, slurm.lines("requeued")) == (code, requeued), told


def test_where_requeueing_is_refused_it_says_so(slurm):
    (slurm.place / "endings").write_text("saved,in-time 0\n")
    slurm.write("python", TRAINER)
    code, told = slurm.run(REFUSED="1")
    assert code == 1
    assert "the same sbatch command goes on" in told


SLOW_TRAINER = """
trap 'sleep 0.3; echo saved >> "$MEDQA_ENDING"; echo signal >> "$MEDQA_ENDING"; exit 143' TERM
touch "$FAKE/ready"
while true; do sleep 0.05; done
"""


@pytest.mark.parametrize(
    ("to_script", "to_step", "preempted", "code", "requeued"),
    [
        (signal.SIGUSR1, None, "None", 0, ["77"]),
        (signal.SIGTERM, signal.SIGTERM, "None", 143, []),
        (None, signal.SIGTERM, "None", 143, []),
        (signal.SIGTERM, signal.SIGTERM, "2026-11-25T07:16:50", 0, ["77"]),
        (None, signal.SIGTERM, "2026-11-25T07:16:50", 0, ["77"]),
    ],
    ids=["the time limit is near", "scancel", "scancel --signal", "preempted, both told", "preempted, the step told"],
)
def test_signals_wait_for_the_checkpoint(slurm, to_script, to_step, preempted, code, requeued):
    slurm.write("python", SLOW_TRAINER)
    process = slurm.start(PREEMPTED=preempted)
    deadline = time.monotonic() + SECONDS
    while not (slurm.place / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    if to_script:
        process.send_signal(to_script)
    if to_step:
        os.kill(int(slurm.lines("step")[0]), to_step)
    told = process.communicate(timeout=SECONDS)[1]
    assert (process.returncode, slurm.lines("requeued")) == (code, requeued), told


def test_the_words_are_handed_on_as_they_are_and_each_node_knows_its_place(slurm):
    slurm.write("accelerate", 'printf "%s|" "$@" > "$FAKE/launched"; echo complete >> "$MEDQA_ENDING"')
    words = ("--exp", "exp_001", "--output-dir", "a place/for it", "--set", "data.files={}")
    code, told = slurm.run(*words, SLURM_JOB_NUM_NODES="2", SLURM_GPUS_ON_NODE="8")
    assert code == 0, told
    launched = (slurm.place / "launched").read_text().split("|")[:-1]
    assert launched == [
        "launch", "--machine_rank", "0", "--config_file", "accelerate_config.yaml", "--multi_gpu",
        "--num_machines", "2", "--num_processes", "16",
        "--main_process_ip", "127.0.0.1", "--main_process_port", "20077", "train.py", *words,
    ]  # fmt: skip
    (step,) = slurm.lines("srun")
    assert step.startswith("--ntasks=2 --ntasks-per-node=1 --cpus-per-task=1 --kill-on-bad-exit=0 --wait=0 bash -c")
    code, _ = slurm.run(SLURM_GPUS_ON_NODE="4", MEDQA_LAUNCH_CONFIG="launch/fsdp2.yaml")
    launched = (slurm.place / "launched").read_text().split("|")
    assert launched[3:6] == ["--config_file", "launch/fsdp2.yaml", "--num_machines"]


def test_from_another_directory_it_is_refused(slurm):
    (slurm.submitted / "train.py").unlink()
    code, told = slurm.run()
    assert code == 2
    assert "call sbatch from the repository's root" in told
    assert slurm.lines("srun") == slurm.lines("requeued") == []


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    subprocess.run(["shellcheck", str(SCRIPT)], check=True)


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (None, "complete"),
        (StoppedInTime("in time"), "in-time"),
        (Interrupted(signal.SIGTERM), "signal"),
        (UserError("a mistake"), "mistake"),
        (Busy("another run"), "busy"),
        (OSError(28, "No space left"), "mistake"),
        (TrainingStopped("not finite"), "stopped"),
        (ProcessStopped("out of memory"), "stopped"),
        (RuntimeError("gloo: timed out"), "lost"),
    ],
)
def test_the_first_process_says_how_it_ended(error, word, tmp_path, monkeypatch, capsys):
    def body():
        if error is not None:
            raise error

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(errors.ENDING, str(tmp_path / "ending"))
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        exit_code(body)
        assert (tmp_path / "ending").exists() == (rank == "0")
    assert (tmp_path / "ending").read_text() == word + "\n"
    monkeypatch.setenv(errors.ENDING, str(tmp_path / "not" / "there"))
    before = exit_code(body)
    assert "not/there: No such file or directory" in capsys.readouterr().err
    monkeypatch.delenv(errors.ENDING)
    assert exit_code(body) == before


def test_each_checkpoint_is_noted(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv(errors.ENDING, str(tmp_path / "ending"))
    for _ in range(2):
        note_saved(tmp_path)
    assert (tmp_path / "ending").read_text() == "saved\nsaved\n"


WORDS = (
    "--exp", "exp_001", "--tiny", "--cpu", "--set", "training.max_steps=60", "evaluation.steps=100",
    "evaluation.rows=8", "training.save_steps=500", "training.log_steps=1", "training.global_batch_size=8",
    "tracking.wandb=disabled",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("cards", ["1", "2"])
def test_a_real_run_goes_on_until_it_is_complete(slurm, tmp_path, cards):
    """The time limit in mid-run, the requeued job, one more start; then a mistake."""
    place = tmp_path / "a run"
    words, more = (*WORDS, "--output-dir", str(place)), {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_GPUS_ON_NODE": cards}
    more |= {"ACCELERATE_USE_CPU": "true", "SLURM_JOB_ID": "77"}
    first = slurm.start(*words, **more)
    deadline = time.monotonic() + SECONDS
    while not any(r["split"] == "train" and r["step"] >= 3 for r in metrics(place)) and time.monotonic() < deadline:
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.02)
    first.send_signal(signal.SIGUSR1)
    told = first.communicate(timeout=SECONDS)[1]
    assert (first.returncode, slurm.lines("requeued")) == (0, ["77"]), told
    (saved,) = place.glob("checkpoint-*")
    assert not (place / "summary.json").exists()
    code, told = slurm.run(*words, **more)
    assert (code, slurm.lines("requeued")) == (0, ["77"]), told
    assert summary(place)["resumes"] == 1
    assert summary(place)["processes"] == int(cards)
    steps = [r["step"] for r in metrics(place) if r["split"] == "train"]
    assert steps == list(range(1, 61))
    assert 3 <= int(saved.name.split("-")[1]) < 60
    files = {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
    code, told = slurm.run(*words, **more)
    assert (code, slurm.lines("requeued")) == (0, ["77"]), told
    assert files == {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
    code, told = slurm.run(*words, "optimizer.learning_rate=7", "--set", "lora.rank=3", **more)
    assert (code, slurm.lines("requeued")) == (1, ["77"]), told
