"""GGUF files of every family and of every kind of tokenizer: llama.cpp makes the same tokens, and computes the same."""

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from families import CONFIGS, make_base
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Fast
from transformers.utils.import_utils import is_serve_available

import train
from medqa.__main__ import main
from medqa.commands.adapter import find_adapter, load_adapted
from medqa.commands.export import card, fidelity, gguf, gguf_vocabulary
from medqa.config import Data, Tokenization
from medqa.data.sources import load_sources
from medqa.data.tokens import prompt_ids, prompt_of, set_prompt
from medqa.errors import UserError
from medqa.model.attention import attention_in_effect
from medqa.model.base import load_tokenizer
from medqa.tiny import MEDQUAD_CSV

library = pytest.importorskip("gguf", reason="writes GGUF")

SHARED = Path(__file__).resolve().parents[3] / "shared"
CPU = torch.device("cpu")
ABOUT = {"name": "x", "license": "other", "description": ""}
QUESTIONS = [
    "What is asthma ?",
    "How is malaria treated in 12345 children under 5 years?  ",
    "Fièvre à 39,5 °C; 漢字 🙂",
]


def in_llama_cpp(path: Path) -> fidelity.LlamaCpp:
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed (requirements-llama.txt)")
    return fidelity.LlamaCpp(path, 512)


# --- Tokenizers

ISOLATED = {"behavior": "isolated"}
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN_2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_3_5 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
GPT_4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(pattern: str) -> Any:
    """As in the tokenizer.json of Llama 3 and Qwen: split by the pattern, then bytes."""
    from tokenizers import Regex

    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), **ISOLATED), bytes_only])


GPT_2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Digits(individual_digits=True)
SPLITS = {  # what splits a text, the normalizer, `ignore_merges`, and llama.cpp's name for it
    "gpt-2": (GPT_2, None, False),
    "smollm": (pre_tokenizers.Sequence([DIGITS, GPT_2]), None, False),
    "llama-bpe": (split(LLAMA_3), None, True),
    "smaug-bpe": (split(LLAMA_3), None, False),
    "qwen2": (split(QWEN_2), normalizers.NFC(), False),
    "qwen35": (split(QWEN_3_5), normalizers.NFC(), False),
    "tekken": (split(TEKKEN), None, True),
    "gpt-4o": (split(GPT_4O), None, False),
}


def trained(texts: list[str], name: str) -> Fast:
    """A byte-level tokenizer whose merges were learned from these texts, split as the name says."""
    before, normalizer, ignore_merges = SPLITS[name]
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer, backend.decoder = before, decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=3000, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
    backend.train_from_iterator(texts, trainer)
    return wrapped(backend)


def wrapped(backend: Tokenizer) -> Fast:
    """The tokenizer of transformers, with the project's own prompt."""
    tokenizer = Fast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")
    set_prompt(tokenizer)
    return tokenizer


def gemma_like(texts: list[str]) -> Fast:
    """Pieces as in Gemma's tokenizer.json: no space in front, bytes for what is unknown, blank lines as tokens."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    bytes_of_all = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=2500, special_tokens=["<unk>", "<s>", "</s>", *bytes_of_all, "\n\n"], limit_alphabet=100
    )
    words = [word for text in texts for word in text.replace("\n", " ").split(" ")]
    backend.train_from_iterator(["▁" + word for word in words], trainer)
    described = json.loads(backend.to_str())
    added = [token for token in described["added_tokens"] if token["content"] not in bytes_of_all]
    described["added_tokens"] = [{**token, "special": token["content"] != "\n\n"} for token in added]
    vocabulary = described["model"]["vocab"]
    # Every way to join two pieces into a third is a merge, in the order of the results: SentencePiece's algorithm.
    described["model"]["merges"] = [
        [text[:i], text[i:]]
        for text in sorted(vocabulary, key=vocabulary.get)
        for i in range(1, len(text))
        if text not in bytes_of_all and {text[:i], text[i:]} <= vocabulary.keys()
    ]
    return wrapped(Tokenizer.from_str(json.dumps(described)))


def texts_of(source: Path, most: int) -> list[str]:
    rows = load_sources(Data(medquad=str(source), afrimedqa="none"))[0].rows[: most // 2]
    return [text for row in rows for text in (row.question, row.answer[:500])]


def vocabulary_only(tokenizer: Fast, path: Path) -> gguf_vocabulary.Vocabulary:
    """A file with this tokenizer and the smallest Llama."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer) + 3, num_key_value_heads=2, **sizes))
    words = gguf_vocabulary.vocabulary(tokenizer, len(tokenizer) + 3)
    gguf.write_gguf(path, model, tokenizer, words, "f16", ABOUT)
    return words


@pytest.mark.parametrize("name", SPLITS)
def test_a_way_to_split_is_recognized_by_what_it_does(name, tmp_path):
    tokenizer = trained(texts_of(MEDQUAD_CSV, 20), name)
    words = gguf_vocabulary.vocabulary(tokenizer, len(tokenizer))
    assert (words.model, words.pre) == ("gpt2", name)
    assert words.merges[0] == " ".join(json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"][0])


@pytest.mark.parametrize(
    "change, said",
    [
        ({"pre_tokenizer": split(r"\w+")}, r"llama.cpp has no way to prepare a text like Split \w+, ByteLevel"),
        ({"pre_tokenizer": pre_tokenizers.Digits()}, "a text like Digits"),
        ({"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)}, "a text like ByteLevel"),
        (
            {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), GPT_2])},
            "a text like Digits, ByteLevel",
        ),
        ({"normalizer": normalizers.Lowercase()}, "a text like Lowercase, ByteLevel"),
        ({"model": models.WordLevel({"a": 0, "</s>": 1}, unk_token="a")}, "its model is WordLevel, not BPE"),
        ({"model": models.BPE(end_of_word_suffix="</w>")}, "its model has end_of_word_suffix"),
    ],
)
def test_other_ways_are_refused_by_what_they_do(change, said):
    tokenizer = trained(texts_of(MEDQUAD_CSV, 20), "gpt-2")
    for key, value in change.items():
        setattr(tokenizer.backend_tokenizer, key, value)
    with pytest.raises(UserError) as refused:
        gguf_vocabulary.vocabulary(tokenizer, len(tokenizer))
    assert said in str(refused.value)


def test_the_same_patterns_with_another_use_of_merges_are_another_way():
    tokenizer = trained(texts_of(MEDQUAD_CSV, 20), "tekken")
    tokenizer.backend_tokenizer.model.ignore_merges = False
    with pytest.raises(UserError, match="has no way to prepare a text"):
        gguf_vocabulary.vocabulary(tokenizer, len(tokenizer))


def test_no_two_ids_have_one_text():
    """llama.cpp refuses such a file; Gemma has tokens that are called `<unused7>`."""
    backend = Tokenizer(models.BPE({"a": 0, "</s>": 1, "<unused3>": 2}, []))
    backend.pre_tokenizer = GPT_2
    words = gguf_vocabulary.vocabulary(wrapped(backend), 6)
    assert len(set(words.tokens)) == 6


def test_text_that_the_tokenizer_would_normalize_is_known():
    tokenizer = trained(texts_of(MEDQUAD_CSV, 20), "qwen2")
    assert gguf_vocabulary.changed_by_normalizer(tokenizer, "naïve".replace("ï", "i\u0308"))
    assert not gguf_vocabulary.changed_by_normalizer(tokenizer, "naïve")


def test_tokens_inside_a_text_are_found_before_pieces_are_joined():
    tokenizer = gemma_like(texts_of(MEDQUAD_CSV, 60))
    words = gguf_vocabulary.vocabulary(tokenizer, len(tokenizer))
    assert (words.model, words.pre, words.space_prefix) == ("llama", "default", False)
    assert words.kinds[words.tokens.index("\n\n")] == gguf_vocabulary.USER_DEFINED
    assert gguf_vocabulary.fit_to_prompts(tokenizer, words, QUESTIONS) == words


def test_the_space_in_front_is_set_as_the_prompt_needs_it():
    """Mistral's template: after its special tokens the tokenizer puts no space, but llama.cpp puts one by default."""
    tokenizer = gemma_like(texts_of(MEDQUAD_CSV, 60))
    backend = tokenizer.backend_tokenizer
    backend.normalizer, backend.pre_tokenizer = None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ message['content'] + '\\n' }}"
        "{% if add_generation_prompt or not loop.last %}{{ 'Answer: ' }}{% endif %}"
        "{% else %}{{ message['content'] + '</s>' }}{% endif %}{% endfor %}"
    )
    set_prompt(tokenizer, "chat")
    words = gguf_vocabulary.vocabulary(tokenizer, len(tokenizer))
    assert words.space_prefix
    assert not gguf_vocabulary.fit_to_prompts(tokenizer, words, QUESTIONS).space_prefix


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SPLITS, "gemma", "tinyllama-1.1b-shape", "stories260k"])
def test_a_thousand_real_rows_have_the_same_tokens_in_llama_cpp(name, tmp_path):
    source = SHARED / "data" / "medquad.csv"
    if not source.is_file():
        pytest.skip(f"{source} is absent")
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed (requirements-llama.txt)")
    texts = [*texts_of(source, 2000), gguf_vocabulary.ODD, "ÀÉÎ naïveTÊTE ΑΒγδ Straße's DON'T l'été 1234567 ½ ²"]
    if name in SPLITS or name == "gemma":
        tokenizer = gemma_like(texts) if name == "gemma" else trained(texts, name)
    else:
        if not (SHARED / "models" / name).is_dir():
            pytest.skip(f"{SHARED / 'models' / name} is absent")
        tokenizer = load_tokenizer(str(SHARED / "models" / name))
    vocabulary_only(tokenizer, tmp_path / "x.gguf")
    server, own, compared, differ = in_llama_cpp(tmp_path / "x.gguf"), prompt_of(tokenizer), 0, []
    for text in texts:
        if not gguf_vocabulary.changed_by_normalizer(tokenizer, text):
            compared += 1
            if server.tokens(own.text(text), bos=bool(own.bos), special=False) != own.ids(text):
                differ.append(text)
    assert compared >= 1900
    assert differ == []


# --- Families

LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
WINDOW = {"query_pre_attn_scalar": 32, "sliding_window": 8}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, llama3": (
        "llama",
        {"rope_parameters": {**LLAMA_3_ROPE, "original_max_position_embeddings": 64}},
    ),
    "llama, linear": ("llama", {"rope_parameters": LINEAR}),
    "mistral": ("mistral", {}),
    "mistral, window": ("mistral", {"sliding_window": 256}),
    "qwen2": ("qwen2", {"head_dim": 16}),
    "qwen3": ("qwen3", {}),
    "qwen3, linear": ("qwen3", {"rope_parameters": LINEAR}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", WINDOW),
    "gemma3": ("gemma3_text", WINDOW),
}


@pytest.fixture(scope="module", params=CASES)
def written(request, tmp_path_factory) -> tuple[str, Any, Any, Path]:
    """A case, its model in transformers, its tokenizer, and its file."""
    family, changes = CASES[request.param]
    place = tmp_path_factory.mktemp("family")
    make_base(family, place / "base", **changes)
    config, tokenizer = AutoConfig.from_pretrained(place / "base"), load_tokenizer(str(place / "base"))
    gguf.check_expressible(config, "some/base")
    attention, _ = attention_in_effect("sdpa", config)
    model = AutoModelForCausalLM.from_pretrained(
        place / "base", dtype=torch.float32, attn_implementation=attention
    ).eval()
    words = gguf_vocabulary.vocabulary(tokenizer, config.vocab_size)
    gguf.write_gguf(place / "x.gguf", model, tokenizer, words, "f16", ABOUT)
    return request.param, model, tokenizer, place / "x.gguf"


def test_every_weight_is_read_back(written):
    _, model, _, path = written
    read = gguf.load_gguf(path, model.config, CPU)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(read.state_dict()[name], weight, rtol=1e-3, atol=1e-6)


def after(model: Any, ids: list[int]) -> torch.Tensor:
    """Log-probabilities of the next token."""
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0, -1].double(), dim=-1)


def test_llama_cpp_computes_what_transformers_computes(written):
    """The full distributions of some next tokens, and greedy answers, which may part at near ties only."""
    _, model, tokenizer, path = written
    server, vocabulary = in_llama_cpp(path), model.config.vocab_size
    prompts = [prompt_ids(question, tokenizer) for question in QUESTIONS]
    for question, ids in zip(QUESTIONS, prompts, strict=True):
        assert server.tokens(prompt_of(tokenizer).text(question), bos=True, special=False) == ids
    reference = fidelity.observe(model, tokenizer, prompts)
    divergences = []
    for ids, answer in zip(prompts, reference.answers, strict=True):
        for end in (len(ids) // 2, len(ids), len(ids) + len(answer) // 2, len(ids) + len(answer)):
            body = {"prompt": (ids + answer)[:end], "n_predict": 1, "temperature": 0, "n_probs": vocabulary}
            said = server.post("/completion", body).get("completion_probabilities")
            if not said:  # a token that is no complete character is not reported
                continue
            found = torch.full((vocabulary,), -60.0, dtype=torch.float64)
            for each in said[0]["top_logprobs"]:
                found[each["id"]] = max(each["logprob"], -60.0)
            expected = after(model, (ids + answer)[:end])
            divergences.append(float((expected.exp() * (expected - found)).sum()))
    assert len(divergences) >= 6
    assert max(divergences) < 1e-3, divergences
    answers = [server.answer(ids, fidelity.ANSWER_TOKENS) for ids in prompts]
    fidelity.Fidelity(0.0, 1, *fidelity.parting(reference, answers)).check("f16")


def test_the_file_says_what_its_family_needs(written):
    case, model, _, path = written
    config = model.config
    said = {key: field.contents() for key, field in library.GGUFReader(path).fields.items()}
    architecture = {"mistral": "llama", "gemma3_text": "gemma3"}.get(config.model_type, config.model_type)
    assert said["general.architecture"] == architecture
    assert said[f"{architecture}.attention.key_length"] == (16 if case == "qwen2" else 32)
    assert said[f"{architecture}.context_length"] == (256 if case == "mistral, window" else 512)
    assert (f"{architecture}.attention.sliding_window" in said) == (architecture in ("gemma2", "gemma3"))
    names = {tensor.name for tensor in library.GGUFReader(path).tensors}
    assert ("output.weight" in names) == (not config.tie_word_embeddings)
    assert ("rope_freqs.weight" in names) == (case == "llama, llama3")
    assert said.get(f"{architecture}.rope.scaling.factor") == (4.0 if "linear" in case else None)
    if architecture == "gemma2":
        assert said["gemma2.attn_logit_softcapping"] == config.attn_logit_softcapping
        assert said["gemma2.final_logit_softcapping"] == config.final_logit_softcapping
    if architecture == "gemma3":
        assert (said["gemma3.rope.freq_base"], said["gemma3.rope.freq_base_swa"]) == (1e6, 1e4)
        assert said["gemma3.attention.sliding_window_pattern"] == 2


@pytest.mark.parametrize(
    "family, change, said",
    [
        ("opt", {}, "a opt model; only llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3_text are written as GGUF"),
        ("llama", {"attention_bias": True}, "attention_bias = True cannot be written as GGUF"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type = dynamic",
        ),
        ("qwen3", {"rope_parameters": {**LLAMA_3_ROPE, "original_max_position_embeddings": 64}}, "rope_type = llama3"),
        ("qwen2", {"head_dim": 32}, "head_dim = 32 cannot be written"),
        ("gemma", {"tie_word_embeddings": False}, "tie_word_embeddings = False"),
        ("gemma2", {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar = 16"),
        ("gemma2", {"query_pre_attn_scalar": 32, "final_logit_softcapping": None}, "final_logit_softcapping = None"),
        ("gemma3_text", {**WINDOW, "final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ("gemma3_text", {**WINDOW, "hidden_activation": "silu"}, "hidden_activation = silu"),
        (
            "gemma3_text",
            {**WINDOW, "layer_types": ["full_attention", "sliding_attention"]},
            "layer_types without a period",
        ),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused_by_name(family, change, said):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    own = {} if family == "opt" else {**sizes, "head_dim": 16 if family == "qwen2" else 32, **CONFIGS[family], **change}
    with pytest.raises(UserError) as refused:
        gguf.check_expressible(AutoConfig.for_model(family, **own), "some/base")
    assert said in str(refused.value)


# --- Prompts

MODEL_TURNS = (  # as in Gemma's own template
    "{{ bos_token }}{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else 'user' %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


@pytest.mark.parametrize("kind", ["instruction", "chat"])
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_the_chat_endpoint_sends_the_prompt_of_the_run(family, kind, tmp_path):
    """With BOS (Gemma) and without (Qwen), with EOS or the template's own end of turn."""
    make_base(family, tmp_path / "base", **(WINDOW if family == "gemma3_text" else {}))
    path = tmp_path / "base" / "tokenizer_config.json"
    tokenizer_config = json.loads(path.read_text(encoding="utf-8"))
    if family == "gemma3_text":
        tokenizer_config["chat_template"] = MODEL_TURNS
        path.write_text(json.dumps(tokenizer_config), encoding="utf-8")
    tokenizer = load_tokenizer(str(tmp_path / "base"), Tokenization(prompt=kind))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    words = gguf_vocabulary.vocabulary(tokenizer, model.config.vocab_size)
    gguf.write_gguf(tmp_path / "x.gguf", model, tokenizer, words, "f16", ABOUT)
    said = {key: field.contents() for key, field in library.GGUFReader(tmp_path / "x.gguf").fields.items()}
    own, gemma = prompt_of(tokenizer), family == "gemma3_text"
    assert said["tokenizer.ggml.add_bos_token"] is gemma
    assert said["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert said.get("tokenizer.ggml.eot_token_id") == (own.end if own.end != tokenizer.eos_token_id else None)
    assert (own.end != tokenizer.eos_token_id) == (gemma and kind == "chat")
    text = card.modelfile(own, gguf_vocabulary.bos_text(tokenizer), 512, "other")
    assert f'PARAMETER stop "{own.end_text}"' in text
    assert "<bos>" not in text, "llama.cpp puts it in front"
    server = in_llama_cpp(tmp_path / "x.gguf")
    for question in QUESTIONS:
        asked = {"messages": [{"role": "user", "content": question}]}
        sent = server.tokens(server.post("/apply-template", asked)["prompt"], bos=True, special=True)
        # Qwen's template does not strip whitespace around a question, which training does.
        expected = own.ids(question)
        assert sent == expected or question != question.strip()
        ollama = (own.before + question.strip() + own.after).removeprefix(gguf_vocabulary.bos_text(tokenizer))
        assert server.tokens(ollama, bos=True, special=kind == "chat") == expected


# --- Clients over HTTP


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run on the embedded base, in float32, so that servers compute the same."""
    directory = tmp_path_factory.mktemp("run") / "run"
    AcceleratorState._reset_state(reset_partial_state=True)
    sets = ["training.max_steps=4", "training.global_batch_size=8", "evaluation.samples=0", "tracking.wandb=disabled"]
    words = ["--exp", "exp_004", "--tiny", "--cpu", "--output-dir", str(directory)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("OMP_NUM_THREADS", "1")
        assert train.main([*words, "--set", *sets, "model.quantization=none", "evaluation.rows=4"]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return directory


def greedy(run: Path, question: str, most: int) -> tuple[list[int], list[int], str]:
    """The prompt, `generate`'s greedy answer, and its text."""
    adapted = load_adapted(find_adapter(str(run)), CPU)
    ids = prompt_ids(question, adapted.tokenizer)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fidelity, "ANSWER_TOKENS", most)
        (answer,) = fidelity.greedy(adapted.model, adapted.tokenizer, [ids])
    return ids, answer, adapted.tokenizer.decode(answer, skip_special_tokens=True)


def request(port: int, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, response.read()


@pytest.fixture
def transformers_serve(run, tmp_path) -> Iterator[tuple[int, Path]]:
    """`transformers serve` with the merged export; its port."""
    if not is_serve_available():
        pytest.skip("transformers serve needs fastapi, uvicorn, openai (requirements-llama.txt)")
    assert main(["export", str(run), "--to", str(tmp_path / "m"), "--cpu", "--outtype", "f32"]) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "from transformers.cli.transformers import main; main()"
    words = ["serve", str(tmp_path / "m"), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen([sys.executable, "-c", code, *words], stdout=log, stderr=log, env=environment)
    try:
        for _ in range(300):
            try:
                if request(port, "GET", "/health")[0] == 200:
                    break
            except OSError:
                assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(1)
        yield port, tmp_path / "m"
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.slow
def test_transformers_serve_answers_as_the_adapter_does(run, transformers_serve):
    port, place = transformers_serve
    for question in ("What is asthma ?", "(a) 5 mg?\nA. one\nB. two"):
        ids, answer, text = greedy(run, question, 24)
        asked = {"model": str(place), "messages": [{"role": "user", "content": question}], "max_tokens": 24}
        status, said = request(port, "POST", "/v1/chat/completions", {**asked, "temperature": 0, "stream": False})
        assert status == 200, said
        found = json.loads(said)
        assert found["choices"][0]["message"]["content"].strip() == text.strip()
        assert found["usage"]["prompt_tokens"] == len(ids)
        assert found["usage"]["completion_tokens"] in (len(answer), len(answer) - 1)  # with or without EOS
    assert AutoTokenizer.from_pretrained(place)(text)["input_ids"]


@pytest.mark.slow
def test_llama_cpp_s_server_answers_as_the_adapter_does(run, tmp_path):
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed (requirements-llama.txt)")
    assert main(["export", str(run), "--to", str(tmp_path / "g"), "--cpu", "--format", "gguf"]) == 0
    server = in_llama_cpp(tmp_path / "g" / "model.gguf")
    for question in ("What is asthma ?", "(a) 5 mg?\nA. one\nB. two"):
        ids, answer, _ = greedy(run, question, 24)
        asked = {"messages": [{"role": "user", "content": question}], "max_tokens": 24, "temperature": 0}
        found = server.post("/v1/chat/completions", {**asked, "logprobs": True, "top_logprobs": 1})
        assert found["usage"]["prompt_tokens"] == len(ids)
        made = [each["id"] for each in found["choices"][0]["logprobs"]["content"]]
        assert made == answer[: len(made)]
        assert len(answer) - len(made) <= 1  # EOS is not reported
