"""What cannot be a base is refused by name from its config.json alone, before a weight is there to be read."""

import json
from pathlib import Path

import pytest
import torch
from families import SIZES, make_base
from transformers import AutoConfig

from medqa.config import Model
from medqa.errors import UserError
from medqa.experiment_file import load_experiment
from medqa.model.base import check_model
from medqa.model.precision import resolve_precision
from medqa.training.execution import choose_execution

SMALL = {**SIZES, "vocab_size": 64}
EXPERTS = {**SMALL, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ENCODER = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {"model_type": "llama", **SMALL}
REFUSED = {
    "encoder and decoder": ({"model_type": "t5", "d_model": 64}, "a t5 model is an encoder and a decoder"),
    "another": ({"model_type": "bart"}, "a bart model is an encoder and a decoder"),
    "encoder": ({"model_type": "bert", **ENCODER}, "a bert model is an encoder"),
    "encoder without a head for text": ({"model_type": "distilbert"}, "a distilbert model is no causal language model"),
    "encoder by another head": (
        {"model_type": "roberta", **ENCODER, "architectures": ["RobertaForMaskedLM"]}, "a roberta model is an encoder"
    ),
    "sees both ways": (
        {"model_type": "gemma3_text", **SMALL, "use_bidirectional_attention": True},
        "a gemma3_text model has use_bidirectional_attention",
    ),
    "Gemma 3 with vision": (
        {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", **SMALL}},
        "a gemma3 model is made of several models (text_config, vision_config)",
    ),
    "Gemma 3n": ({"model_type": "gemma3n"}, "a gemma3n model is made of several models"),
    "Qwen 2.5 with vision": ({"model_type": "qwen2_5_vl"}, "a qwen2_5_vl model is made of several models"),
    "LLaVA": ({"model_type": "llava", "text_config": TEXT}, "a llava model is made of several models"),
    "text inside of a model": ({"model_type": "fuyu"}, "a fuyu model is made of several models (text_config)"),
    "vision beside flat text": ({"model_type": "git", **ENCODER}, "a git model is made of several models"),
    "Mixtral": ({"model_type": "mixtral", **EXPERTS, "num_local_experts": 4}, "a mixtral model is a mixture of"),
    "Qwen 3 with experts": (
        {"model_type": "qwen3_moe", **EXPERTS, "num_experts": 4}, "a qwen3_moe model is a mixture of experts"
    ),
    "experts in later layers only": (
        {"model_type": "deepseek_v3", **EXPERTS, "n_routed_experts": 8, "n_group": 2, "topk_group": 1,
         "first_k_dense_replace": 1},
        "a deepseek_v3 model is a mixture of experts",
    ),
    "state space": ({"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2}, "a mamba model has recurrent"),
    "hybrid": ({"model_type": "jamba"}, "a jamba model has recurrent or state-space layers"),
    "hybrid of linear attention": ({"model_type": "qwen3_next"}, "qwen3_next model has recurrent"),
    "hybrid of convolutions": (
        {"model_type": "lfm2", **SMALL, "layer_types": ["conv", "full_attention"]},
        "a lfm2 model has recurrent or state-space layers (conv)",
    ),
    "GPT-2": ({"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2}, "a gpt2 model has Conv1D layers"),
    "GPTQ": (
        {**TEXT, "quantization_config": {"quant_method": "gptq", "bits": 4}},
        "a llama model whose weights are quantized already (gptq)",
    ),
    "AWQ": ({**TEXT, "quantization_config": {"quant_method": "awq"}}, "quantized already (awq)"),
    "bitsandbytes": (
        {**TEXT, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        "quantized already (bitsandbytes): give the unquantized one",
    ),
    "code of its own": (
        {"model_type": "chatling", "auto_map": {"AutoConfig": "configuration_chatling.ChatlingConfig"}},
        "a chatling model needs code that comes with it",
    ),
}  # fmt: skip


def refusal(directory: Path, said: dict) -> str:
    (directory / "config.json").write_text(json.dumps(said), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        check_model(Model(base=str(directory)), 64)
    assert list(directory.glob("*.safetensors")) == []
    return str(caught.value)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_a_base_is_refused_by_name(kind, tmp_path):
    said, expected = REFUSED[kind]
    message = refusal(tmp_path, said)
    assert message.startswith(f"model.base = {tmp_path}: ")
    assert expected in message
    assert "--model" in message
    assert "quantization" in expected or "quantized" in expected or "gemma3_text are tested" in message
    assert "\n" not in message


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    message = refusal(tmp_path, TEXT)
    assert "its weights are in pytorch_model.bin, which can run code when it is read" in message
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert check_model(Model(base=str(tmp_path)), 64).model_type == "llama"


@pytest.mark.parametrize(
    "said",
    [
        {"model_type": "gpt_neox", **ENCODER, "is_decoder": False, "architectures": ["GPTNeoXForCausalLM"]},
        {"model_type": "olmo2", **SMALL},
        {"model_type": "phi3", **SMALL, "pad_token_id": 0},
        {"model_type": "stablelm", **SMALL},
        {"model_type": "llama", **SMALL, "auto_map": {"AutoConfig": "theirs.Config"}},
    ],
    ids=lambda said: said["model_type"],
)
def test_other_dense_decoders_are_not_refused(said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(said), encoding="utf-8")
    assert check_model(Model(base=str(tmp_path)), 64).model_type == said["model_type"]


def test_targets_that_a_family_does_not_have_are_refused_before_its_weights_are_read(tmp_path):
    """Pythia calls its layers otherwise; there is no weight here to read."""
    said = {"model_type": "gpt_neox", **ENCODER, "architectures": ["GPTNeoXForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(said), encoding="utf-8")
    experiment = load_experiment("exp_003", tiny=True, sets=[f"model.base={tmp_path}", "model.quantization=none"])
    model_config = check_model(experiment.model, 64)
    precision = resolve_precision(experiment, force_cpu=True)
    with pytest.raises(UserError, match=r"'q_proj'.*no such linear layer.*query_key_value"):
        choose_execution(experiment, model_config, precision, 2**30, 64, None)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gemma2", "gemma3_text"])
def test_looking_at_a_model_changes_nothing_of_its_configuration(family, tmp_path):
    """It is built once without contents; what is loaded afterwards must not inherit anything from that."""
    made = make_base(family, tmp_path)
    state = torch.get_rng_state()
    found = check_model(Model(base=str(made)), 64)
    assert torch.equal(torch.get_rng_state(), state)
    assert found._attn_implementation_internal is None
    assert found.to_diff_dict() == AutoConfig.from_pretrained(made).to_diff_dict()
