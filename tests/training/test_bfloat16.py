"""Runs in bfloat16 on a CPU, also on one that only emulates it: parity, resume, and a complete run.

These tests measure no speed. Models and runs are small, because bfloat16 can be 70 times slower than float32.
"""

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from moved import apart, initial_adapter

from harness.hf_trainer import FIGURES, relative_differences, train_ours, train_theirs
from harness.parts import build
from medqa.__main__ import main as medqa
from medqa.commands.adapter import find_adapter
from medqa.config import flat
from medqa.config_file import load_experiment, load_yaml
from medqa.model import settings
from medqa.model.settings import KEPT
from medqa.recorded import differences
from medqa.training.checkpoint import environment
from train import main as train

BFLOAT16 = ("model.dtype=bfloat16", "training.mixed_precision=bf16")
SMALL = (
    "tokenization.max_length=48", "training.max_steps=3", "training.global_batch_size=8", "lora.lora_dropout=0.0",
    "scheduler.warmup_steps=0",
)  # fmt: skip
RUN = (
    *BFLOAT16, "training.padding_free=true", "training.max_steps=4", "training.save_steps=2", "evaluation.steps=2",
    "training.global_batch_size=8", "evaluation.rows=4", "evaluation.samples=0", "tokenization.max_length=48",
    "model.quantization=none", "tracking.wandb=disabled", "data.fractions=[0.9,0.05,0.05]",
)  # fmt: skip
SLOW = "this CPU has no bfloat16 instructions (AVX512-BF16, AMX or Arm BF16)"


@pytest.fixture(autouse=True)
def apart_from_others(monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def native(monkeypatch, why_not: str | None = None) -> None:
    """Pretend that this CPU has native bfloat16, or, with a reason, that it does not."""
    monkeypatch.setattr(settings, "no_native_bfloat16", lambda: why_not)


# --- parity with HF Trainer


RECIPES = ["exp_001", *(pytest.param(name, marks=pytest.mark.slow) for name in ("exp_002", "exp_003"))]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_update_equals_that_of_trainer(recipe, tiny, tmp_path, monkeypatch):
    """With padding, as in the recipe, and `TrainingArguments(bf16=True)`. On an AVX2 CPU the differences are 0."""
    native(monkeypatch)
    experiment = tiny(recipe, *SMALL, *BFLOAT16)
    assert build(experiment).settings.mixed_precision == "bf16"
    ours, theirs = train_ours(experiment, tmp_path), train_theirs(experiment, tmp_path)
    for name in FIGURES:
        assert max(relative_differences(ours.figures[name], theirs.figures[name])) <= 1e-6
    assert apart(ours.weights, theirs.weights, initial_adapter(experiment)) <= 1e-5
    (tmp_path / "metrics.jsonl").unlink()
    in_float32 = train_ours(tiny(recipe, *SMALL), tmp_path)
    assert max(relative_differences(ours.figures["loss"], in_float32.figures["loss"])) > 1e-5


def test_without_padding_the_update_equals_the_padded_one_within_rounding(tiny, monkeypatch):
    """The gradients have the same direction; the first loss differs by less than the rounding of bfloat16."""
    native(monkeypatch)
    found = []
    for free in ("true", "false"):
        sets = ("model.quantization=none", f"training.padding_free={free}")
        parts = build(tiny("exp_001", *SMALL, *BFLOAT16, *sets))
        assert parts.settings.fast_lora == (free == "true")
        result = parts.step(parts.packed(0, 10_000) if free == "true" else parts.micro_batches(0), max_grad_norm=1e9)
        gradients = [p.grad.flatten() for n, p in parts.adapted.named_parameters() if "lora_B" in n]
        found.append((result.loss, torch.cat(gradients)))
    (loss, gradient), (other_loss, other) = found
    assert loss == pytest.approx(other_loss, rel=2e-3)
    assert torch.nn.functional.cosine_similarity(gradient, other, dim=0) > 0.99


# --- a run


def words(directory: Path, *sets: str, options: tuple[str, ...] = ()) -> list[str]:
    return ["--exp", "exp_001", "--tiny", "--cpu", "--output-dir", str(directory), *options, "--set", *RUN, *sets]


def run(directory: Path, *sets: str, stopped: bool = False) -> None:
    """A session of a run; with `stopped`, it ends after update 2."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        if stopped:
            metrics = directory / "metrics.jsonl"
            late = lambda self, seconds: metrics.is_file() and metrics.read_text().count('"train"') >= 2  # noqa: E731
            patch.setattr("medqa.training.stopping.Stopper.within", late)
        assert train(words(directory, *sets, options=("--stop-after", "1d") if stopped else ())) == 0


def summary(directory: Path) -> dict:
    return json.loads((directory / "summary.json").read_text())


def in_effect(directory: Path) -> dict:
    return load_yaml((directory / "config.yaml").read_text(), "config.yaml")["in_effect"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """An uninterrupted run in bfloat16. Tests must not change it."""
    directory = tmp_path_factory.mktemp("straight") / "run"
    with pytest.MonkeyPatch.context() as patch:
        native(patch)
        run(directory)
    return directory


def test_a_complete_run_in_bfloat16(straight, monkeypatch, capsys):
    found = summary(straight)
    assert found["mixed_precision"] == "bf16"
    assert found["final"]["answer_loss"] < found["baseline"]["answer_loss"]
    assert not {"model.dtype", "training.mixed_precision"} & in_effect(straight).keys()
    saved = find_adapter(str(straight)).settings
    assert (saved.mixed_precision, saved.dtype, saved.padding_free) == ("bf16", "bfloat16", True)
    assert {weight.dtype for weight in find_adapter(str(straight)).weights.values()} == {torch.float32}
    native(monkeypatch)
    assert medqa(["evaluate", str(straight), "--cpu", "--tasks", "loss", "--limit", "8"]) == 0
    evaluation = json.loads((straight / "evaluation.json").read_text())
    assert (evaluation["mixed_precision"], evaluation["dtype"]) == ("bf16", "bfloat16")
    native(monkeypatch, SLOW)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert medqa(["evaluate", str(straight), "--cpu", "--tasks", "loss", "--limit", "8"]) == 0
    evaluation_again = json.loads((straight / "evaluation.json").read_text())
    assert (evaluation_again["mixed_precision"], evaluation_again["dtype"]) == ("no", "float32")
    one, other = (
        found["tasks"]["loss"]["validation"]["tuned"]["answer_loss"]["value"]
        for found in (evaluation, evaluation_again)
    )
    assert one == pytest.approx(other, rel=5e-3)


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(straight, tmp_path, monkeypatch, capsys):
    """It is resumed on a CPU that only emulates bfloat16. It keeps bfloat16, and the plan says so."""
    native(monkeypatch)
    run(tmp_path / "run", stopped=True)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    native(monkeypatch, SLOW)
    capsys.readouterr()
    run(tmp_path / "run")
    said = " ".join(capsys.readouterr().out.split())
    assert f"bfloat16, {KEPT}; it is slower than float32 here: {SLOW}" in said
    for name in ("lora_adapters/adapter_model.safetensors", "checkpoint-4/training_state.pt"):
        assert (tmp_path / "run" / name).read_bytes() == (straight / name).read_bytes()


def test_a_run_in_bfloat16_of_a_gpu_continues_in_float32(tmp_path, monkeypatch, capsys):
    """It is resumed on a CPU that only emulates bfloat16. As in version 0.1, the plan gives the reason."""
    native(monkeypatch)
    with pytest.MonkeyPatch.context() as patch:
        of_a_gpu = {"device": "NVIDIA A100-SXM4-40GB", "cpu_threads": None}
        patch.setattr("medqa.training.run.environment", lambda *given: environment(*given).model_copy(update=of_a_gpu))
        run(tmp_path / "run", stopped=True)
    saved = find_adapter(str(tmp_path / "run")).settings
    assert (saved.mixed_precision, saved.dtype) == ("bf16", "bfloat16")
    native(monkeypatch, SLOW)
    capsys.readouterr()
    run(tmp_path / "run")
    said = " ".join(capsys.readouterr().out.split())
    assert f"training.mixed_precision: bf16 -> no ({SLOW})" in said
    assert f"model.dtype: bfloat16 -> float32 ({SLOW})" in said
    assert "mixed_precision bf16 before, no now" in said
    assert summary(tmp_path / "run")["mixed_precision"] == "no"
    assert in_effect(tmp_path / "run")["model.dtype"] == {"asked": "bfloat16", "used": "float32", "reason": SLOW}
    saved = find_adapter(str(tmp_path / "run")).settings
    assert (saved.mixed_precision, saved.dtype) == ("no", "float32")


def test_a_run_that_started_in_float32_continues_in_float32(tmp_path, monkeypatch):
    """It starts on a CPU without native bfloat16, and is resumed on one that has it."""
    native(monkeypatch, SLOW)
    run(tmp_path / "run", stopped=True)
    assert in_effect(tmp_path / "run")["model.dtype"] == {"asked": "bfloat16", "used": "float32", "reason": SLOW}
    native(monkeypatch)
    run(tmp_path / "run")
    assert summary(tmp_path / "run")["mixed_precision"] == "no"
    assert in_effect(tmp_path / "run")["model.dtype"] == {"asked": "bfloat16", "used": "float32", "reason": KEPT}


def test_a_run_in_bfloat16_is_exported(straight, tmp_path, monkeypatch):
    """The export compares the models in float32, whatever the precision of training."""
    native(monkeypatch)
    assert medqa(["export", str(straight), "--cpu", "--to", str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged" / "model.safetensors").is_file()


# --- `--tiny` of the first versions


def test_a_tiny_run_of_the_first_versions_is_the_same_experiment():
    """It requested bfloat16. Other differences in precision still make another experiment."""
    now = load_experiment("exp_001", tiny=True)
    before = flat(now) | {"model.dtype": "bfloat16", "training.mixed_precision": "bf16"}
    assert differences(before, now) == []
    assert differences(before | {"model.dtype": "float16"}, now) == ["model.dtype: 'float16' there, 'float32' now"]
    own = load_experiment("exp_001", sets=["model.dtype=float32", "training.mixed_precision=no"])
    before = flat(own) | {"model.dtype": "bfloat16"}
    assert differences(before, own) == ["model.dtype: 'bfloat16' there, 'float32' now"]
