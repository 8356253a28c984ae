"""The experiment files are complete, and differ from each other in exactly what the README's table says."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from medqa.config import Experiment, flat
from medqa.config_file import is_sweep, load_experiment, load_yaml
from medqa.model.base import add_lora
from medqa.training.plan import accumulation_steps

ROOT = Path(__file__).parents[1]
FILES = sorted(path for path in (ROOT / "experiments").iterdir() if not is_sweep(path))
NAMES = ("exp_001", "exp_002", "exp_003")

COMMON = {
    "model.base": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "model.quantization": "4bit",
    "model.dtype": "bfloat16",
    "model.dequantize": "never",
    "lora.r": 8,
    "lora.lora_alpha": 16,
    "lora.lora_dropout": 0.05,
    "lora.target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "lora.bias": "none",
    "lora.init_from": None,
    "lora.use_rslora": False,
    "lora.use_dora": False,
    "tokenization.prompt": "instruction",
    "data.medquad": "kaggle:pythonafroz/medquad-medical-question-answer-for-ai-research",
    "data.afrimedqa": "intronhealth/afrimedqa_v2",
    "data.files": {},
    "data.mcq_answers": "rationale",
    "data.split": "grouped",
    "data.split_seed": 42,
    "data.fractions": [0.8, 0.1, 0.1],
    "tokenization.max_length": 512,
    "tokenization.append_eos": True,
    "tokenization.loss_on": "all",
    "optimizer.weight_decay": 0.0,
    "optimizer.betas": [0.9, 0.999],
    "optimizer.eps": 1e-8,
    "optimizer.max_grad_norm": 1.0,
    "training.epochs": None,
    "training.global_batch_size": 32,
    "training.mixed_precision": "bf16",
    "training.seed": 42,
    "training.padding_free": False,
    "training.micro_batch_tokens": None,
    "training.log_steps": 10,
    "training.save_steps": 50,
    "training.keep_checkpoints": 3,
    "evaluation.steps": 100,
    "evaluation.rows": 256,
    "tracking.wandb": "auto",
}
TABLE = {  # section.key: in exp_001, exp_002, exp_003
    "tokenization.padding": ("longest", "max_length", "max_length"),
    "tokenization.pad_token": ("eos", "eos", "[PAD]"),
    "model.gradient_checkpointing": (False, False, True),
    "optimizer.name": ("adamw_torch", "paged_adamw_8bit", "adamw_torch"),
    "optimizer.learning_rate": (5e-5, 1e-4, 2e-4),
    "scheduler.name": ("none", "cosine", "none"),
    "scheduler.warmup_steps": (0, 20, 0),
    "training.max_steps": (908, 400, 400),
    "training.per_device_batch_size": (4, 4, 8),
    "tracking.tags": (["exp_001"], ["exp_002"], ["exp_003"]),
}
ACCUMULATION = (8, 8, 4)


RECOMMENDED = {  # what exp_004 changes of exp_001
    "model.quantization": "auto",
    "model.dequantize": "auto",
    "data.mcq_answers": "named",
    "tokenization.max_length": 1024,
    "tokenization.loss_on": "answer",
    "optimizer.learning_rate": 5e-4,
    "scheduler.name": "cosine",
    "scheduler.warmup_steps": 50,
    "training.max_steps": 1816,
    "training.global_batch_size": 16,
    "training.padding_free": True,
    "evaluation.steps": 200,
    "tracking.tags": ["exp_004"],
}


ON_A_CPU = {  # what exp_005 changes of exp_004
    "model.base": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "model.quantization": "none",
    "lora.r": 16,
    "lora.lora_alpha": 32,
    "tokenization.prompt": "chat",
    "optimizer.learning_rate": 1e-3,
    "scheduler.warmup_steps": 10,
    "training.max_steps": 150,
    "training.save_steps": 25,
    "evaluation.steps": 25,
    "evaluation.rows": 64,
    "evaluation.full_rows": 256,
    "tracking.tags": ["exp_005"],
}


def test_there_are_five_files():
    assert [path.name for path in FILES] == [f"{name}.yaml" for name in (*NAMES, "exp_004", "exp_005")]


def test_the_recipe_for_a_cpu_changes_what_its_header_says():
    recommended, on_a_cpu = flat(load_experiment("exp_004")), flat(load_experiment("exp_005"))
    assert {key: value for key, value in on_a_cpu.items() if value != recommended[key]} == ON_A_CPU


def test_the_recommended_recipe_changes_what_its_header_says():
    plain, recommended = flat(load_experiment("exp_001")), flat(load_experiment("exp_004"))
    assert {key: value for key, value in recommended.items() if value != plain[key]} == RECOMMENDED
    seen = [values["training.max_steps"] * values["training.global_batch_size"] for values in (plain, recommended)]
    assert seen[0] == seen[1]


@pytest.mark.parametrize("name", [path.stem for path in FILES])
def test_tiny_has_4_bit_weights_where_the_file_says_auto_but_a_word_of_the_users_counts_more(name):
    """`auto` would choose them on no machine for the embedded model; the recorded losses are of 4-bit weights."""
    expected = "none" if name == "exp_005" else "4bit"  # exp_005 says none
    assert load_experiment(name, tiny=True).model.quantization == expected
    for wanted in ("none", "auto"):
        sets = [f"model.quantization={wanted}"]
        assert load_experiment(name, tiny=True, sets=sets).model.quantization == wanted


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_complete_and_says_how_to_launch_it(path):
    text = path.read_text(encoding="utf-8")
    written = {f"{s}.{k}" for s, keys in load_yaml(text, str(path)).items() for k in keys}
    assert written == set(flat(Experiment())), "every key of every section is written out"
    header = text.split("\n\n")[0].splitlines()
    assert all(line.startswith("#") for line in header)
    assert header[0].startswith(f"# {path.stem}: ")
    assert f"#   accelerate launch train.py --exp {path.stem}" in header
    assert path.stem == "exp_001" or "Differences from exp_001:" in text


@pytest.mark.parametrize("place, name", enumerate(NAMES))
def test_a_file_holds_what_the_table_says(place, name):
    values = flat(load_experiment(name))
    expected = COMMON | {key: row[place] for key, row in TABLE.items()}
    assert {key: values[key] for key in expected} == expected


def test_the_files_differ_nowhere_else():
    everything = [flat(load_experiment(name)) for name in NAMES]
    differing = {key for key in everything[0] if len({repr(values[key]) for values in everything}) > 1}
    assert differing == set(TABLE)


def test_accumulation_steps_follow_from_the_batch_sizes():
    settings = [load_experiment(name).training for name in NAMES]
    assert tuple(accumulation_steps(training, 1) for training in settings) == ACCUMULATION
    assert [accumulation_steps(training, 2) for training in settings] == [4, 4, 2]
    assert [accumulation_steps(training, 4) for training in settings] == [2, 2, 1]


@pytest.fixture(scope="module")
def tinyllama() -> LlamaForCausalLM:
    """TinyLlama-1.1B's shape, without memory for its weights."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
        max_position_embeddings=2048,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def test_trainable_parameters_on_tinyllama_from_the_config_alone(tinyllama):
    total = sum(parameter.numel() for parameter in tinyllama.parameters())
    assert total == 1_100_048_384
    for name in NAMES:
        lora = load_experiment(name).lora
        by_hand = 0  # r * (inputs + outputs) for each layer that is adapted
        for path, module in tinyllama.named_modules():
            if path.rsplit(".", 1)[-1] in lora.target_modules:
                by_hand += lora.r * (module.in_features + module.out_features)
        assert by_hand == 6_307_840
    assert f"{100 * by_hand / (total + by_hand):.2f}" == "0.57"


def test_peft_agrees_and_the_saved_adapter_stays_under_30_mb(tinyllama):
    with torch.device("meta"):
        adapted = add_lora(tinyllama, load_experiment("exp_003").lora, seed=42)
    trainable = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trainable) == 6_307_840
    assert all(parameter.dtype == torch.float32 for parameter in trainable)
    tensors = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    header = json.dumps({name: {"dtype": "F32", "shape": list(p.shape), "data_offsets": [0, 0]} for name, p in
                         tensors.items()})  # fmt: skip
    saved = sum(p.numel() * p.element_size() for p in tensors.values()) + 2 * len(header)
    assert 25_000_000 < saved < 30_000_000


def test_the_8_bit_optimizer_has_8_bit_state_in_exp_002(tinyllama):
    # bitsandbytes keeps fp32 state for tensors below 4,096 elements: on TinyLlama that is k and v_proj's B alone.
    lora = load_experiment("exp_002").lora
    with torch.device("meta"):
        model = get_peft_model(
            LlamaForCausalLM(tinyllama.config), LoraConfig(r=lora.r, target_modules=lora.target_modules)
        )
    small = {
        name.split(".")[-4] + "." + name.split(".")[-3]
        for name, p in model.named_parameters()
        if p.requires_grad and p.numel() < 4096
    }
    assert small == {"k_proj.lora_B", "v_proj.lora_B"}
