"""What cannot be a base is refused by name from its config.json alone, before a weight is there to be read.

Likewise files that must not be read, and those that would take all time or memory: by the file's name.
"""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from families import SIZES, make_base
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import medqa.__main__
import train
from medqa.config import Model, Tokenization
from medqa.config_file import load_experiment
from medqa.errors import UserError
from medqa.limits import MAX_JSON_BYTES, MAX_TOKENIZER_BYTES
from medqa.model.base import add_lora, check_model, load_tokenizer, tokens_without_weights
from medqa.model.base_files import base_fingerprint, check_configuration
from medqa.model.memory import fit_to_memory
from medqa.model.settings import resolve_settings
from medqa.tiny import BASE_DIR

SMALL = {**SIZES, "vocab_size": 64}
EXPERTS = {**SMALL, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ENCODER = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {"model_type": "llama", **SMALL}
REFUSED = {
    "encoder and decoder": ({"model_type": "t5", "d_model": 64}, "a t5 model is an encoder-decoder model"),
    "another": ({"model_type": "bart"}, "a bart model is an encoder-decoder model"),
    "encoder": ({"model_type": "bert", **ENCODER}, "a bert model is an encoder"),
    "encoder without a head for text": ({"model_type": "distilbert"}, "distilbert model is not a causal language"),
    "encoder by another head": (
        {"model_type": "roberta", **ENCODER, "architectures": ["RobertaForMaskedLM"]}, "a roberta model is an encoder"
    ),
    "sees both ways": (
        {"model_type": "gemma3_text", **SMALL, "use_bidirectional_attention": True},
        "a gemma3_text model has use_bidirectional_attention",
    ),
    "Gemma 3 with vision": (
        {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", **SMALL}},
        "a gemma3 model is multimodal: it has several models (text_config, vision_config)",
    ),
    "Gemma 3n": ({"model_type": "gemma3n"}, "a gemma3n model is multimodal: it has several models"),
    "Qwen 2.5 with vision": ({"model_type": "qwen2_5_vl"}, "a qwen2_5_vl model is multimodal: it has several models"),
    "LLaVA": ({"model_type": "llava", "text_config": TEXT}, "a llava model is multimodal: it has several models"),
    "text inside of a model": ({"model_type": "fuyu"}, "fuyu model is multimodal: it has several models (text_config)"),
    "vision beside flat text": ({"model_type": "git", **ENCODER}, "a git model is multimodal: it has several models"),
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
        "a llama model whose weights are already quantized (gptq)",
    ),
    "AWQ": ({**TEXT, "quantization_config": {"quant_method": "awq"}}, "already quantized (awq)"),
    "bitsandbytes": (
        {**TEXT, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        "already quantized (bitsandbytes): give the unquantized model",
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
    assert "its weights are in pytorch_model.bin, which can execute code when it is read" in message
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
    settings = resolve_settings(experiment, cpu=True)
    with pytest.raises(UserError, match=r"'q_proj'.*no such linear layer.*query_key_value"):
        fit_to_memory(settings, experiment, model_config, 64, 2**30)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gemma2", "gemma3_text"])
def test_looking_at_a_model_changes_nothing_of_its_configuration(family, tmp_path):
    """It is built once without contents; what is loaded afterwards must not inherit anything from that."""
    made = make_base(family, tmp_path)
    state = torch.get_rng_state()
    found = check_model(Model(base=str(made)), 64)
    assert torch.equal(torch.get_rng_state(), state)
    assert found._attn_implementation_internal is None
    assert found.to_diff_dict() == AutoConfig.from_pretrained(made).to_diff_dict()


# --- files


@pytest.fixture
def base(tmp_path) -> Path:
    """A copy of the embedded base model, to be spoilt."""
    return Path(shutil.copytree(BASE_DIR, tmp_path / "base"))


def changed(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def why_not(base: Path | str) -> str:
    """Why a base model is refused, by everything that looks at one before its weights are loaded."""

    def look() -> None:
        check_model(Model(base=str(base)), 64)
        load_tokenizer(str(base))

    with pytest.raises(UserError) as caught:
        look()
    assert str(caught.value).startswith(f"model.base = {base}: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Runs:
    """What a pickle can do: run a function when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def index_of(base: Path, name: object) -> None:
    """Have an index say that all weights are in this file, in place of the one that has them."""
    names = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}))


@pytest.mark.parametrize("name", ["weights.bin", "pytorch_model-00001-of-00001.bin", "model.pt", "weights", None, 7])
def test_an_index_may_list_safetensors_only(name, base, tmp_path):
    index_of(base, name)
    if isinstance(name, str):
        (base / name).write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    save_file({"a": torch.zeros(1)}, base / "x.safetensors")
    message = why_not(base)
    assert f"model.safetensors.index.json lists '{name}', which can execute code when it is read" in message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/model.safetensors", "a/../../b.safetensors"])
def test_an_index_may_list_files_of_its_directory_only(name, base):
    shutil.copytree(BASE_DIR, base.parent / "other")
    index_of(base, name)
    assert f"lists '{name}', which is not in the same directory" in why_not(base)


@pytest.mark.parametrize("content", ["[1]", "{", '{"weight_map": [1, 2]}', '{"weight_map": {"a": {}}}', "[" * 5000])
def test_a_damaged_index_is_refused_by_name(content, base):
    index_of(base, "model-00001.safetensors")
    (base / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json cannot be read" in why_not(base)


def test_weights_in_several_files_are_read(base):
    weights = load_file(base / "model.safetensors")
    parts = {"a.safetensors": sorted(weights)[:5], "b.safetensors": sorted(weights)[5:]}
    for name, keys in parts.items():
        save_file({key: weights[key] for key in keys}, base / name, metadata={"format": "pt"})
    index_of(base, "a.safetensors")
    found = {key: name for name, keys in parts.items() for key in keys}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": found}))
    assert check_model(Model(base=str(base)), 64).model_type == "llama"
    before = base_fingerprint(str(base))
    (base / "b.safetensors").write_bytes((base / "b.safetensors").read_bytes()[:-1] + b"\x01")
    assert base_fingerprint(str(base)) != before


def test_pickled_weights_beside_any_safetensors_are_refused(base, tmp_path):
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    (base / "training_args.bin").write_bytes(b"")
    check_model(Model(base=str(base)), 64)  # they are not what is read
    (base / "model.safetensors").rename(base / "x.safetensors")
    assert "its weights are in pytorch_model.bin, which can execute code" in why_not(base)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["adapter_model.bin", "other.safetensors"])
def test_a_configuration_may_not_name_other_weights(name, base):
    """transformers would read them; the fingerprint of the base would be that of model.safetensors."""
    changed(base / "config.json", transformers_weights=name)
    shutil.copy(base / "model.safetensors", base / name)
    assert f"config.json names its weights, transformers_weights = '{name}'" in why_not(base)


def test_an_adapter_in_the_base_is_refused(base):
    """transformers would load it along, train it and save it, with the fingerprint of the base without it."""
    (base / "adapter_config.json").write_text("{}")
    assert "adapter_config.json is there: an adapter beside the model" in why_not(base)
    (base / "config.json").unlink()
    assert "adapter_config.json is there: an adapter, not a base model: to start from it, use lora.init_from" in (
        why_not(base)
    )


def test_files_of_the_hub_are_looked_at_as_well(base, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    place = tmp_path / "hub" / "models--someone--model"
    snapshot = place / "snapshots" / ("a" * 40)
    shutil.copytree(base, snapshot)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("a" * 40)
    assert check_model(Model(base="someone/model"), 64).model_type == "llama"
    assert base_fingerprint("someone/model") == base_fingerprint(str(base))
    (snapshot / "adapter_config.json").write_text("{}")
    assert "hf download someone/model --local-dir DIR" in why_not("someone/model")
    (snapshot / "adapter_config.json").unlink()
    index_of(snapshot, "weights.bin")
    assert "model.safetensors.index.json lists 'weights.bin'" in why_not("someone/model")


# --- what would take all time or memory


@pytest.fixture
def impatient(monkeypatch) -> None:
    """The same limits, reached sooner."""
    monkeypatch.setattr("medqa.limited.WORK_SECONDS", 2)


def test_more_layers_than_any_model_has_are_refused(base):
    changed(base / "config.json", num_hidden_layers=200_000)
    assert "config.json: num_hidden_layers = 200000: more than 1,000 layers" in why_not(base)


@pytest.fixture
def bloom(tmp_path) -> list[str]:
    """The words for a run on a family that has no sdpa, which the experiment asks for."""
    said = {"model_type": "bloom", "hidden_size": 64, "n_layer": 1, "n_head": 4, "vocab_size": 1024}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**said)).save_pretrained(tmp_path / "bloom")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE_DIR / name, tmp_path / "bloom")
    words = ["--exp", "exp_003", "--tiny", "--cpu", "--model", str(tmp_path / "bloom"), "--set"]
    return [*words, "model.quantization=none", "lora.target_modules=[query_key_value]", "tracking.wandb=disabled"]


def test_a_model_that_cannot_be_built_as_it_is_asked_for_is_refused_by_a_run(bloom, tmp_path, capsys):
    """Its memory cannot be estimated: what is wrong is said when it is loaded."""
    assert train.main(["--output-dir", str(tmp_path / "run"), *bloom]) == 2
    message = capsys.readouterr().err
    assert f"model.base = {tmp_path / 'bloom'}: cannot be loaded" in message
    assert "BloomForCausalLM" in message
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_be_built_as_it_is_asked_for_is_refused_by_the_plan(bloom, tmp_path, capsys):
    assert medqa.__main__.main(["plan", *bloom]) == 2
    message = capsys.readouterr().err
    assert f"model.base = {tmp_path / 'bloom'}: cannot be loaded" in message
    assert "BloomForCausalLM" in message


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_layers", "n_layers", "n_layer", "decoder_layers"])
def test_each_name_of_a_number_of_layers_is_looked_at(key):
    with pytest.raises(UserError, match=f"{key} = 200000: more than 1,000 layers"):
        check_configuration("base", {key: 200_000})


@pytest.mark.parametrize("key", ["vocab_size_per_layer_input", "hidden_size_per_layer_input", "layer_scale"])
def test_other_numbers_that_speak_of_layers_are_no_number_of_layers(key):
    check_configuration("base", {key: 262_144})


def test_a_configuration_that_takes_all_time_or_memory_is_refused(base, impatient):
    changed(base / "config.json", num_labels=10**10)
    assert "the model that config.json describes cannot be built: it takes more than" in why_not(base)


def test_more_parameters_than_the_weights_can_hold_are_refused(base):
    changed(base / "config.json", num_hidden_layers=40)
    message = why_not(base)
    assert "but all of its weights together have" in message
    assert "download the model again" in message


REPLACES = {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 50}
TOKENIZERS = {
    "one that fills the memory": {"normalizer": {"type": "Sequence", "normalizers": [REPLACES] * 8}},
    "of letters": {"normalizer": {**REPLACES, "content": "e " * 500}},
    "of any text": {"normalizer": {**REPLACES, "pattern": {"Regex": "[a-z ]"}, "content": " e " * 20}},
    "of a rare word": {"normalizer": {**REPLACES, "pattern": {"String": "\u265a"}, "content": " e" * 5000}},
    "before all": {"normalizer": {"type": "Prepend", "prepend": " a" * 20_000}},
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizer_that_multiplies_text_is_refused(kind, base, impatient):
    changed(base / "tokenizer.json", **TOKENIZERS[kind])
    message = why_not(base)
    assert "tokenizer.json yields" in message or "its tokenizer.json cannot be used: it takes more than" in message


@pytest.mark.parametrize(
    "name, limit", [("tokenizer.json", MAX_TOKENIZER_BYTES), ("config.json", MAX_JSON_BYTES)], ids=lambda value: value
)
def test_files_of_an_absurd_size_are_not_read(name, limit, base):
    with (base / name).open("r+b") as file:
        file.truncate(limit + 1)
    assert f"{name} has {limit + 1:,} bytes (limit {limit:,})" in why_not(base)


@pytest.mark.parametrize("value", [[], {}, "many"], ids=str)
def test_odd_values_of_a_tokenizer_are_refused(value, base):
    changed(base / "tokenizer_config.json", model_max_length=value)
    assert "cannot be loaded from this directory" in why_not(base)


# --- tokens that the weights do not have, and adapters larger than what they are added to


@pytest.mark.parametrize("pad_token", ["eos", "[PAD]"])
def test_special_tokens_without_weights_are_said_at_the_start(pad_token, base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert tokens_without_weights(load_tokenizer(str(base), Tokenization(pad_token=pad_token)), 1024) == []
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(base)
    ((label, said),) = tokens_without_weights(load_tokenizer(str(base), Tokenization(pad_token=pad_token)), 1024)
    assert label == "tokenizer"
    assert said.startswith("its tokenizer has 2 token(s) beyond its 1,024 embeddings (<|im_end|>, <|im_start|>, ...)")
    assert "the model cannot be exported" in said


@pytest.mark.parametrize("kind", ["in a text", "the end of a text"])
def test_tokens_without_weights_that_may_occur_are_refused(kind, base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    if kind == "in a text":
        tokenizer.add_tokens(["paracetamol"])
    else:
        tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    tokenizer.save_pretrained(base)
    with pytest.raises(UserError, match=r"1 token\(s\) beyond its 1,024 embeddings, and texts may contain"):
        tokens_without_weights(load_tokenizer(str(base), Tokenization(pad_token="[PAD]")), 1024)


def test_the_plan_says_which_tokens_have_no_weights(base, tmp_path, capsys, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]})
    tokenizer.save_pretrained(base)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    words = [
        "--exp",
        "exp_002",
        "--tiny",
        "--cpu",
        "--model",
        str(base),
        "--output-dir",
        str(tmp_path / "run"),
        "--set",
    ]
    words += ["training.max_steps=1", "scheduler.warmup_steps=0", "evaluation.rows=4", "evaluation.samples=0"]
    assert train.main(words) == 0
    assert "its tokenizer has 1 token(s) beyond its 1,024 embeddings" in " ".join(capsys.readouterr().out.split())


def test_a_rank_beyond_every_matrix_is_refused_before_memory_is_taken(base):
    experiment = load_experiment("exp_002", tiny=True, sets=["lora.r=65536", "lora.target_modules=[q_proj,v_proj]"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    with pytest.raises(
        UserError, match=r"lora.r = 65,536 exceeds the dimensions of every target layer \(at most 128\)"
    ):
        add_lora(model, experiment.lora, 1)
