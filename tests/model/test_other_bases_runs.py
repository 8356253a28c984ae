"""Whole runs on other families, by the commands that a user types: plan, train, go on, evaluate, ask, export."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from families import CONFIGS, make_base
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from medqa.__main__ import main as medqa
from medqa.config import Tokenization
from medqa.data.tokens import prompt_ids
from medqa.model.base import load_tokenizer
from train import main as train

UPDATES = 4
SETS = (
    "tracking.wandb=disabled", "training.global_batch_size=8", "training.save_steps=2", "evaluation.steps=2",
    "evaluation.rows=8", "evaluation.samples=0", "tokenization.max_length=128", "training.deterministic=true",
    "tokenization.pad_token='[PAD]'",
)  # fmt: skip
FAMILIES = ("qwen3", "gemma", "gemma2", "gemma3_text")
pytestmark = pytest.mark.slow


def words(base: Path, *sets: str) -> list[str]:
    return ["--exp", "exp_003", "--tiny", "--cpu", "--model", str(base), "--set", *SETS, *sets]


def run(directory: Path, base: Path, *sets: str) -> dict:
    """A run of `train.py`; its summary."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("OMP_NUM_THREADS", "1")
        given = words(base, *sets)
        assert train([*given[:6], "--output-dir", str(directory), *given[6:]]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return json.loads((directory / "summary.json").read_text())


@pytest.fixture(scope="module", params=FAMILIES)
def finished(request, tmp_path_factory) -> tuple[str, Path, Path]:
    """A family, its base, and a finished run on 4-bit weights, without padding where it can be."""
    family, directory = request.param, tmp_path_factory.mktemp(request.param)
    base = make_base(family, directory / "base")
    run(directory / "run", base, f"training.max_steps={UPDATES}", "training.padding_free=true")
    return family, base, directory / "run"


def test_a_run_trains_and_says_how_it_was_computed(finished):
    family, base, directory = finished
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["updates"] == UPDATES
    assert summary["final"]["loss"] < summary["baseline"]["loss"]
    told = (directory / "config.yaml").read_text()
    assert ("attn_logit_softcapping" in told) == (family == "gemma2")
    saved = AutoTokenizer.from_pretrained(directory / "lora_adapters")
    chat = [{"role": "user", "content": "What is asthma ?"}]
    ids = saved.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == prompt_ids("What is asthma ?", load_tokenizer(str(base), Tokenization(pad_token="[PAD]")))


def test_plan_counts_what_is_there(finished, capsys):
    """Tied embeddings once; the plan needs no weights."""
    family, base, _ = finished
    capsys.readouterr()
    assert medqa(["plan", *words(base, "training.padding_free=true", "model.quantization=none"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    tensors = load_file(base / "model.safetensors")  # has what is tied once
    assert found["parameters"]["base"] == sum(tensor.numel() for tensor in tensors.values())
    weights = 4 * found["parameters"]["base"]
    grown = CONFIGS[family]["vocab_size"] < 1028 and family != "qwen3"
    row = 4 * (64 + CONFIGS[family]["vocab_size"] + 1)  # one more embedding, and the bias of the head
    assert 0 <= found["memory"]["base"] - weights - grown * row < 2**12  # what is left are buffers
    assert found["parameters"]["trainable"] == sum(
        tensor.numel() for tensor in load_file(finished[2] / "lora_adapters" / "adapter_model.safetensors").values()
    )
    assert found["padding_free"] == (family != "gemma2")
    assert any("gemma2 caps" in note for note in found["notes"]) == (family == "gemma2")


def test_a_run_is_evaluated_beside_the_bases_own_template(finished, capsys):
    _, _, directory = finished
    assert medqa(["evaluate", str(directory), "--cpu", "--tasks", "loss,generation", "--limit", "3"]) == 0
    assert "its own chat template" in capsys.readouterr().out


def test_ask_answers(finished, capsys):
    _, _, directory = finished
    capsys.readouterr()
    assert medqa(["ask", str(directory), "What is asthma ?", "--cpu", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["step"] == UPDATES
    assert record["tokens"] > 0


def test_export_merges_into_tied_weights_and_measures_the_same(finished, tmp_path, capsys):
    family, _, directory = finished
    to = tmp_path / "merged"
    assert medqa(["export", str(directory), "--to", str(to), "--cpu", "--outtype", "f32"]) == 0
    assert "mean KL divergence" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(to)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert len(model.get_input_embeddings().weight) == CONFIGS[family]["vocab_size"]


def test_an_adapter_on_a_head_that_is_the_embeddings_cannot_be_merged(tmp_path, capsys):
    base = make_base("gemma", tmp_path / "base")
    sets = ("training.max_steps=2", "lora.target_modules=[q_proj,lm_head]", "tokenization.pad_token=eos")
    run(tmp_path / "run", base, *sets)
    assert medqa(["export", str(tmp_path / "run"), "--to", str(tmp_path / "x"), "--cpu"]) == 2
    assert "has tied embeddings" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "x").exists()


def test_gguf_is_measured_or_refused_by_name(finished, tmp_path, capsys):
    family, _, directory = finished
    odd = family in ("gemma2", "gemma3_text")  # their scores are scaled as no published model's are
    code = medqa(["export", str(directory), "--to", str(tmp_path / "x"), "--cpu", "--format", "gguf"])
    said = capsys.readouterr()
    assert code == (2 if odd else 0)
    expected = "query_pre_attn_scalar = 16 cannot be written as GGUF" if odd else "mean KL divergence"
    assert expected in " ".join((said.err if odd else said.out).split())
    assert (tmp_path / "x" / "model.gguf").exists() == (not odd)


@pytest.mark.parametrize("family", ["gemma3_text", "gemma2"])
def test_a_run_that_goes_on_is_bit_for_bit_the_straight_one(family, tmp_path):
    base = make_base(family, tmp_path / "base")
    sets = ("scheduler.name=none", "lora.lora_dropout=0.1", "training.padding_free=true")
    run(tmp_path / "straight", base, *sets, f"training.max_steps={UPDATES}")
    run(tmp_path / "parts", base, *sets, "training.max_steps=2")
    summary = run(tmp_path / "parts", base, *sets, f"training.max_steps={UPDATES}")
    assert (summary["resumes"], summary["updates"]) == (1, UPDATES)
    straight, parts = (
        load_file(tmp_path / name / "lora_adapters" / "adapter_model.safetensors") for name in ("straight", "parts")
    )
    assert all(torch.equal(straight[name], parts[name]) for name in straight)
    assert any(tensor.any() for name, tensor in straight.items() if "lora_B" in name)
