"""`lora.use_rslora` and `lora.use_dora`: results equal to PEFT's, memory, checkpoints, merging and GGUF."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from families import wake
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from transformers import AutoModelForCausalLM

from harness.parts import Parts, build
from medqa.__main__ import main
from medqa.commands.adapter import find_adapter, load_adapted
from medqa.errors import UserError
from medqa.model.fast_lora import FastLora
from medqa.tiny import BASE_DIR
from medqa.training.distributed import shards_from_launcher
from train import main as train

CPU = torch.device("cpu")
KINDS = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "both": {"use_rslora": True, "use_dora": True},
}
LOSS_WITHIN, GRADIENTS_WITHIN = 1e-5, 1e-4  # relative, float32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(params=KINDS)
def kind(request) -> dict[str, bool]:
    return KINDS[request.param]


def words(kind: dict[str, bool]) -> list[str]:
    return [f"lora.{key}={str(value).lower()}" for key, value in kind.items()]


def make(tiny, kind: dict[str, bool], *sets: str) -> Parts:
    given = ["lora.lora_dropout=0.0", "training.global_batch_size=8", "tokenization.max_length=96", *words(kind)]
    parts = build(tiny("exp_004", "model.quantization=none", *given, *sets))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in wake(parts, 0.05).adapted.named_parameters():
            if "magnitude" in name:  # move it away from its initial value, the norms of the base's rows
                parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
    return parts


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def update(parts: Parts, packed: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one update; the weights are restored afterwards."""
    before = {name: p.detach().clone() for name, p in trained(parts.adapted).items()}
    result = parts.step(parts.packed(0, 300) if packed else parts.micro_batches(0), max_grad_norm=1e9)
    gradients = {name: p.grad.clone() for name, p in trained(parts.adapted).items()}
    with torch.no_grad():
        for name, parameter in trained(parts.adapted).items():
            parameter.copy_(before[name])
    return result.loss, gradients


def peft_update(parts: Parts, kind: dict[str, bool]) -> tuple[float, dict[str, torch.Tensor]]:
    """The same update with transformers and PEFT alone: with padding, PEFT's layers and PyTorch's cross-entropy."""
    lora = parts.experiment.lora
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(BASE_DIR, dtype=torch.float32),
        LoraConfig(r=lora.r, lora_alpha=lora.lora_alpha, target_modules=TARGETS, task_type="CAUSAL_LM", **kind),
    )
    with torch.no_grad():
        for name, parameter in trained(model).items():
            parameter.copy_(trained(parts.adapted)[name])
    total, targets = torch.zeros(()), 0
    for batch in parts.micro_batches(0):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
        labels = batch.labels[:, 1:]
        total = total + torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        targets += int((labels != -100).sum())
    (total / targets).backward()
    return float(total / targets), {name: p.grad for name, p in trained(model).items()}


def assert_same(ours: tuple[float, dict[str, torch.Tensor]], theirs: tuple[float, dict[str, torch.Tensor]]) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=LOSS_WITHIN)
    assert ours[1].keys() == theirs[1].keys()
    for name, expected in theirs[1].items():
        assert expected.any(), name
        assert (ours[1][name] - expected).abs().max() <= GRADIENTS_WITHIN * expected.abs().max(), name


@pytest.mark.parametrize("padding_free", [True, False])
def test_an_update_equals_pefts(tiny, kind, padding_free):
    parts = make(tiny, kind, f"training.padding_free={str(padding_free).lower()}")
    assert parts.settings.padding_free is padding_free
    assert {p.dtype for p in trained(parts.adapted).values()} == {torch.float32}
    assert len(trained(parts.adapted)) == (42 if kind.get("use_dora") else 28)
    assert_same(update(parts, padding_free), peft_update(parts, kind))
    layers = [module for module in parts.adapted.modules() if isinstance(module, LoraLayer)]
    fast = {any(isinstance(each, FastLora) for each in layer.lora_variant.values()) for layer in layers}
    assert fast == {padding_free and not kind.get("use_dora", False)}
    scale = parts.experiment.lora.lora_alpha / (8**0.5 if kind.get("use_rslora") else 8)
    assert [layer.scaling["default"] for layer in layers] == pytest.approx([scale] * 14)


@pytest.mark.parametrize("dequantize", ["auto", "never"])
def test_an_update_in_4_bit_equals_the_padded_one(tiny, kind, dequantize):
    pytest.importorskip("bitsandbytes")
    sets = ["model.quantization=4bit", f"model.dequantize={dequantize}"]
    parts = make(tiny, kind, *sets)
    assert parts.settings.quantization == "4bit"
    assert parts.settings.dequantize is (dequantize == "auto")
    padded = make(tiny, kind, *sets, "training.padding_free=false", "model.dequantize=never")
    with torch.no_grad():
        for name, parameter in trained(padded.adapted).items():
            parameter.copy_(trained(parts.adapted)[name])
    assert_same(update(parts, parts.settings.padding_free), update(padded, False))


def test_it_trains_with_dropout_and_gradient_checkpointing(tiny, kind):
    parts = make(tiny, kind, "lora.lora_dropout=0.1", "model.gradient_checkpointing=true")
    first = parts.step(parts.packed(0, 300)).loss
    for number in range(1, 6):
        last = parts.step(parts.packed(number % 2, 300)).loss
    assert math.isfinite(last)
    assert last < first


# --- whole runs

SETS = ["training.max_steps=4", "training.global_batch_size=8", "training.save_steps=2", "evaluation.steps=2"]
SETS += ["evaluation.samples=0", "tracking.wandb=disabled", "scheduler.name=none", "scheduler.warmup_steps=0"]
SETS += ["optimizer.learning_rate=1e-2"]


def run_words(directory: Path, *sets: str) -> list[str]:
    return ["--exp", "exp_003", "--tiny", "--cpu", "--output-dir", str(directory), "--set", *SETS, *sets]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A finished run of each kind, with 4-bit weights and `[PAD]`."""
    found = {}
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("OMP_NUM_THREADS", "1")
        for name, kind in KINDS.items():
            found[name] = tmp_path_factory.mktemp(name) / "run"
            AcceleratorState._reset_state(reset_partial_state=True)
            assert train(run_words(found[name], *words(kind))) == 0
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_run_is_resumed_bit_for_bit(runs, name, tmp_path):
    run = shutil.copytree(runs[name], tmp_path / "run")
    shutil.rmtree(run / "checkpoint-4")
    (run / "summary.json").unlink()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train(run_words(run, *words(KINDS[name]))) == 0
    for file in ("lora_adapters/adapter_model.safetensors", "checkpoint-4/training_state.pt"):
        assert (run / file).read_bytes() == (runs[name] / file).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_peft_loads_the_adapter_and_every_command_accepts_it(runs, name, tmp_path, capsys):
    said = json.loads((runs[name] / "lora_adapters" / "adapter_config.json").read_text())
    assert {key: said[key] for key in KINDS[name]} == KINDS[name]
    ids = torch.tensor([[1, 5, 6, 7, 8, 9, 10]])
    base = AutoModelForCausalLM.from_pretrained(BASE_DIR, dtype=torch.float32)
    alone = load_adapted(find_adapter(str(runs[name] / "lora_adapters")), CPU)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(base, runs[name] / "lora_adapters").eval()(ids).logits
        torch.testing.assert_close(alone.model(ids).logits[..., : expected.shape[-1]], expected, rtol=1e-4, atol=1e-4)
    run = shutil.copytree(runs[name], tmp_path / "run")
    assert main(["evaluate", str(run), "--cpu", "--tasks", "loss"]) == 0
    found = json.loads((run / "evaluation.json").read_text())["tasks"]["loss"]["test"]["tuned"]["answer_loss"]
    assert found["value"] == pytest.approx(
        json.loads((run / "summary.json").read_text())["test"]["answer_loss"], rel=1e-5
    )
    capsys.readouterr()
    assert main(["export", str(run), "--cpu", "--to", str(tmp_path / "m"), "--outtype", "f32"]) == 0
    assert "greedy answers equal: 16 of 16" in capsys.readouterr().out
    assert main(["export", str(run), "--cpu", "--to", str(tmp_path / "g"), "--format", "gguf"]) == 0


@pytest.mark.slow
def test_a_run_with_another_kind_is_refused(runs, tmp_path, capsys):
    run = shutil.copytree(runs["dora"], tmp_path / "run")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train(run_words(run)) == 2
    assert "lora.use_dora: True there, False now" in capsys.readouterr().err
    config = run / "lora_adapters" / "adapter_config.json"
    said = json.loads(config.read_text())
    config.write_text(json.dumps({**said, "use_rslora": True}))
    with pytest.raises(
        UserError, match=r"use_rslora = True, and .*lora.use_rslora = False: one of them has been changed"
    ):
        find_adapter(str(run))


@pytest.mark.slow
def test_an_adapter_to_start_from_must_be_of_the_same_kind(runs, tmp_path, capsys):
    start = f"lora.init_from={runs['dora'] / 'lora_adapters'}"
    for number, sets in enumerate(([], ["lora.use_dora=true", "lora.use_rslora=true"])):
        AcceleratorState._reset_state(reset_partial_state=True)
        assert train(run_words(tmp_path / str(number), start, *sets)) == 2
        told = capsys.readouterr().err
        assert "this adapter was trained with use_" in told
        assert ("use --set lora.use_dora=true" if not sets else "use --set lora.use_rslora=false") in told
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train(run_words(tmp_path / "same", start, "lora.use_dora=true")) == 0
    first, second = (json.loads((d / "summary.json").read_text()) for d in (runs["dora"], tmp_path / "same"))
    assert second["baseline"]["loss"] == pytest.approx(first["final"]["loss"], rel=1e-5)


def test_sharded_weights_are_refused(tiny, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"lora.use_dora = true: DoRA needs the whole weights of each layer"):
        shards_from_launcher(tiny("exp_001", "model.quantization=none", "lora.use_dora=true"))


@pytest.mark.slow
def test_the_plan_counts_the_magnitudes(capsys):
    found = {}
    for use in ("false", "true"):
        words = ["plan", "--exp", "exp_004", "--tiny", "--cpu", "--json", "--set", f"lora.use_dora={use}"]
        assert main(words) == 0
        found[use] = json.loads(capsys.readouterr().out)
    more = found["true"]["parameters"]["trainable"] - found["false"]["parameters"]["trainable"]
    base = AutoModelForCausalLM.from_pretrained(BASE_DIR)
    outputs = sum(m.out_features for n, m in base.named_modules() if n.rsplit(".", 1)[-1] in TARGETS)
    assert more == outputs
    assert found["true"]["checkpoint"]["total"] >= found["false"]["checkpoint"]["total"] + 3 * 4 * outputs
    assert found["true"]["memory"] != found["false"]["memory"]
