"""A run directory that version 0.1 wrote is resumed, evaluated, exported and compared by the code of today.

`data/run_of_0.1` is `train.py --exp exp_003 --tiny --cpu` after 6 of 8 updates, with the base and the data in a place
that is not there any more. The expected figures are what version 0.1 itself computed when it resumed that directory.
"""

import json
import shutil
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from medqa.__main__ import main
from medqa.tiny import AFRIMEDQA_CSV, BASE_DIR, MEDQUAD_CSV
from train import main as train

OLD_RUN = Path(__file__).parent / "data" / "run_of_0.1"
MOVED = ["--model", str(BASE_DIR), "--medquad", str(MEDQUAD_CSV), "--afrimedqa", str(AFRIMEDQA_CSV), "--cpu"]
SETS = ["training.global_batch_size=8", "training.save_steps=3", "training.keep_checkpoints=1", "evaluation.steps=3"]
SETS += ["evaluation.samples=0", "tracking.wandb=disabled"]
WITHIN = 1e-4  # relative: another CPU rounds differently


@pytest.fixture
def old_run(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    AcceleratorState._reset_state(reset_partial_state=True)
    return Path(shutil.copytree(OLD_RUN, tmp_path / "run"))


def test_resumed_with_the_losses_that_version_0_1_computed(old_run):
    words = ["--exp", "exp_003", "--tiny", "--cpu", "--output-dir", str(old_run), "--set", "training.max_steps=8"]
    assert train([*words, *SETS]) == 0
    records = [json.loads(line) for line in (old_run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    train_loss = {record["step"]: record["loss"] for record in records if record["split"] == "train"}
    assert train_loss.keys() == set(range(1, 9))
    assert train_loss[7] == pytest.approx(3.984797716140747, rel=WITHIN)
    assert train_loss[8] == pytest.approx(3.915386438369751, rel=WITHIN)
    summary = json.loads((old_run / "summary.json").read_text(encoding="utf-8"))
    assert summary["updates"] == 8
    assert summary["resumes"] == 1
    assert summary["final"]["answer_loss"] == pytest.approx(4.804557511374129, rel=WITHIN)
    assert summary["test"]["answer_loss"] == pytest.approx(4.7966390504086664, rel=WITHIN)


def test_evaluated_exported_and_compared(old_run, tmp_path):
    assert main(["evaluate", str(old_run), *MOVED, "--tasks", "loss"]) == 0
    found = json.loads((old_run / "evaluation.json").read_text(encoding="utf-8"))
    summary = json.loads((OLD_RUN / "summary.json").read_text(encoding="utf-8"))
    tuned = found["tasks"]["loss"]["validation"]["tuned"]["answer_loss"]["value"]
    assert tuned == pytest.approx(summary["final"]["answer_loss"], rel=WITHIN)
    assert main(["export", str(old_run), "--model", str(BASE_DIR), "--cpu", "--to", str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    other = shutil.copytree(OLD_RUN, tmp_path / "other")
    assert main(["compare", str(old_run), str(other), "--out", str(tmp_path / "page.html")]) == 0
