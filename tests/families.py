"""Small random models of other families, made from the configurations of the installed transformers.

Real architectures with what is peculiar to each kept: tied and scaled embeddings, norms of queries and keys, a head
width apart from the hidden size, windows, capped logits, tokenizers with and without BOS. Weights and tokenizer are
ours; nothing is fetched.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from harness.parts import Parts
from medqa.tiny import BASE_DIR

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # four times 32 is not the hidden size
    "max_position_embeddings": 512,
}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
GEMMA = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "tie_word_embeddings": True}
# Whatever the class's defaults are, what counts here is said. Qwen3 has more rows than tokens, as the real ones have.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"vocab_size": 1024, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False},
    "mistral": {"vocab_size": 1024, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": None},
    "qwen2": {"vocab_size": 1056, "eos_token_id": 2, "tie_word_embeddings": True},
    "qwen3": {"vocab_size": 1056, "eos_token_id": 2, "tie_word_embeddings": True},
    "gemma": {"vocab_size": 1027, **GEMMA},
    "gemma2": {"vocab_size": 1027, **GEMMA, **LAYERS, "sliding_window": 512, "query_pre_attn_scalar": 16},
    "gemma3_text": {"vocab_size": 1027, **GEMMA, **LAYERS, "sliding_window": 512, "query_pre_attn_scalar": 16},
}
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURNS = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for message in messages %}{{ '<start_of_turn>' + message['role'] + '\n' + message['content'] | trim"
    " + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def make_base(family: str, directory: Path, seed: int = 0, **changed: Any) -> Path:
    """A base model's directory: configuration, random weights in float32, tokenizer with the family's special tokens.

    Args:
        changed: of the configuration, in place of what is said above.
    """
    config = AutoConfig.for_model(family, **{**SIZES, **CONFIGS[family], **changed})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:  # at their first values, 0 or 1, not every mistake shows
                    parameter.add_(0.2 * torch.randn_like(parameter))
                elif "embed" not in name:  # larger than at first, so that attention is sharp and answers vary
                    parameter.mul_(6)
    ends = {"qwen": [2, 0], "gemma": [1, 1026]}.get(family[:-1] if family.startswith("qwen") else family[:5], 2)
    model.generation_config = GenerationConfig(eos_token_id=ends, bos_token_id=config.bos_token_id)
    model.save_pretrained(directory)
    make_tokenizer(family, directory)
    return directory


def make_tokenizer(family: str, directory: Path) -> None:
    """The embedded model's byte-level tokenizer with the special tokens of this family."""
    tokenizer = json.loads((BASE_DIR / "tokenizer.json").read_text(encoding="utf-8"))
    said: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if family.startswith("gemma"):
        _rename(tokenizer, ["<pad>", "<eos>", "<bos>"], ["<unk>", "<start_of_turn>", "<end_of_turn>"])
        begin = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
        tokenizer["post_processor"] |= {
            "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
        }
        tokens = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
        said |= {**tokens, "chat_template": TURNS}
    elif family.startswith("qwen"):
        _rename(tokenizer, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], [])
        tokenizer["post_processor"] = None
        said |= {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None, "chat_template": CHATML}
    else:
        said = json.loads((BASE_DIR / "tokenizer_config.json").read_text(encoding="utf-8"))
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(said), encoding="utf-8")


def _rename(tokenizer: dict[str, Any], first: list[str], more: list[str]) -> None:
    """Other names for ids 0, 1 and 2, and more special tokens behind the vocabulary."""
    words = tokenizer["model"]["vocab"]
    for token in tokenizer["added_tokens"]:
        del words[token["content"]]
        token["content"] = first[token["id"]]
        words[token["content"]] = token["id"]
    tokenizer["model"]["unk_token"] = None
    for content in more:
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": len(words), "content": content})
        words[content] = len(words)


def wake(parts: Parts, scale: float) -> Parts:
    """B matrices away from their 0, as training would have them, the same for the same shapes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in parts.adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return parts
