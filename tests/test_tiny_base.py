"""The embedded base model and sample data: sizes, tokenizer, planned defects, and a rebuild with the same result."""

import csv
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from medqa.tiny import AFRIMEDQA_CSV, BASE_DIR, MEDQUAD_CSV
from medqa.tiny import build as tiny_build

ODD_TEXT = "  Fièvre à 38,5 °C → “malaria”?\n\n\tمرحبا 漢字 Ẹ̀kọ́ 👩🏾‍⚕️ e\u0301 \u200b\u00a0 , don't .  "


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(BASE_DIR)


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(BASE_DIR, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def text() -> str:
    return tiny_build.TEXT.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def raw_tokenizer(tokenizer: PreTrainedTokenizerBase):
    return tokenizer.backend_tokenizer


def loss_on(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    """Mean loss over windows that cover the ids once; `ids` has shape (tokens,)."""
    windows = ids[: len(ids) // tiny_build.WINDOW * tiny_build.WINDOW].view(-1, tiny_build.WINDOW)
    with torch.no_grad():
        return model(input_ids=windows, labels=windows).loss.item()


# --- base model


def test_base_is_small_enough_to_keep_in_the_repository():
    files = [path for path in BASE_DIR.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in files) <= 2_000_000


def test_base_has_the_shape_that_optimizers_and_exports_need(base):
    assert base.config.vocab_size == 1024
    assert base.config.intermediate_size >= 512
    assert base.config.num_key_value_heads < base.config.num_attention_heads
    assert not base.config.tie_word_embeddings
    linears = [module for module in base.model.layers.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linears) == 7 * base.config.num_hidden_layers
    assert all(size % 32 == 0 for linear in linears for size in linear.weight.shape)


def test_base_is_stored_in_bfloat16():
    weights = load_file(BASE_DIR / "model.safetensors")
    assert len(weights) == 3 + 9 * 2  # embeddings, last norm, head; nine tensors in each of two layers
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_base_has_learned_its_text(base, raw_tokenizer, text):
    assert loss_on(base, tiny_build.token_stream(raw_tokenizer, text)) < 3.0  # a guess among 1,024 words costs 6.9


# --- tokenizer


def test_tokenizer_resembles_tinyllamas(tokenizer):
    assert len(tokenizer) == 1024
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>"]) == [0, 1, 2]
    assert (tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token) == ("<unk>", "<s>", "</s>")
    assert tokenizer.pad_token == "</s>"
    assert tokenizer.padding_side == "right"
    assert tokenizer.model_max_length == 512
    assert "<|user|>" in tokenizer.chat_template


def test_tokenizer_adds_bos_and_no_eos(tokenizer):
    ids = tokenizer("What causes Malaria ?").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in ids
    assert tokenizer("").input_ids == [tokenizer.bos_token_id]


def test_tokenizer_gives_odd_text_back(tokenizer):
    ids = tokenizer(ODD_TEXT).input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == ODD_TEXT


def test_tokenizer_survives_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(ODD_TEXT).input_ids == tokenizer(ODD_TEXT).input_ids


def test_tokenizer_is_rebuilt_exactly(raw_tokenizer, text):
    assert tiny_build.train_tokenizer([text, *tiny_build.sample_words()]).to_str() == raw_tokenizer.to_str()


# --- sample data


def test_medquad_has_kaggles_columns_and_the_planned_defects():
    rows = read(MEDQUAD_CSV)
    assert list(rows[0]) == ["question", "answer", "source", "focus_area"]
    assert all(row["question"] and row["source"] and row["focus_area"] for row in rows)
    assert sum(row["answer"] == "" for row in rows) == 2
    counts = Counter((row["question"], row["answer"]) for row in rows)
    assert sorted(counts.values())[-3:] == [1, 2, 2]
    questions_by_answer = Counter(answer for _, answer in counts if answer)
    assert sorted(questions_by_answer.values())[-3:] == [1, 2, 3]


def test_afrimedqa_has_the_hubs_columns_and_the_planned_defects():
    rows = read(AFRIMEDQA_CSV)
    assert list(rows[0]) == [
        "sample_id",
        "question_type",
        "tier",
        "prompt",
        "question",
        "question_clean",
        "answer_options",
        "correct_answer",
        "answer_rationale",
        "specialty",
    ]
    assert Counter(row["question_type"] for row in rows) == {"mcq": 54, "saq": 22, "consumer_queries": 11}
    assert sum(row["answer_rationale"] == "" for row in rows) == 3
    assert len({row["sample_id"] for row in rows}) == len(rows)
    assert all(len(row["sample_id"]) == 64 and int(row["sample_id"], 16) for row in rows)
    # consumer queries alone have a scenario before the question
    assert all(bool(row["prompt"]) == (row["question_type"] == "consumer_queries") for row in rows)
    # the raw question differs from the clean one in white space only, and in some rows it does
    assert all(row["question"].split() == row["question_clean"].split() for row in rows)
    assert any(row["question"] != row["question_clean"] for row in rows)


def test_multiple_choice_options_parse_and_name_the_correct_one():
    for row in read(AFRIMEDQA_CSV):
        if row["question_type"] != "mcq":
            assert row["answer_options"] == row["correct_answer"] == ""
            continue
        options = json.loads(row["answer_options"])
        assert list(options) == [f"option{number}" for number in range(1, len(options) + 1)]
        assert len(set(options.values())) == len(options) >= 4
        assert row["correct_answer"] in options


def test_at_least_200_distinct_questions_are_usable_and_fit_one_window(tokenizer):
    pairs = {row["question"]: row["answer"] for row in read(MEDQUAD_CSV) if row["answer"]}
    for row in read(AFRIMEDQA_CSV):
        if row["answer_rationale"]:
            pairs[f"{row['prompt']}\n{row['question_clean']}\n{row['answer_options']}"] = row["answer_rationale"]
    assert len(pairs) == 281
    assert all(len(tokenizer(question + answer).input_ids) < tiny_build.WINDOW for question, answer in pairs.items())


def test_sample_answers_and_the_prompt_are_new_to_the_base(text):
    answers = [row["answer"] for row in read(MEDQUAD_CSV)] + [row["answer_rationale"] for row in read(AFRIMEDQA_CSV)]
    answers = [answer for answer in answers if answer]
    assert len(answers) == 283  # the usable questions and two duplicates
    assert not any(answer in text for answer in answers)
    assert "### Instruction:" not in text
    assert "### Response:" not in text


# --- rebuild


@pytest.mark.slow
def test_pretraining_is_deterministic_and_follows_its_seed(raw_tokenizer, text):
    threads = torch.get_num_threads()
    first = tiny_build.pretrain(raw_tokenizer, text, steps=6, seed=3).state_dict()
    torch.rand(5)  # the caller's generator has no say
    second = tiny_build.pretrain(raw_tokenizer, text, steps=6, seed=3).state_dict()
    other = tiny_build.pretrain(raw_tokenizer, text, steps=6, seed=4).state_dict()
    assert len(first) == 21
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.slow
def test_full_rebuild_gives_the_committed_base(base, raw_tokenizer, text, tmp_path):
    """Bit for bit on the kind of machine that built it; elsewhere each tensor within 1 % of its norm.

    Forced from AVX-512 to AVX2 kernels, the rebuild differed by 0.014 % of a tensor's norm.
    """
    tiny_build.main(["--output", str(tmp_path)])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (BASE_DIR / name).read_bytes()
    committed, rebuilt = (load_file(folder / "model.safetensors") for folder in (BASE_DIR, tmp_path))
    assert committed.keys() == rebuilt.keys()
    for name, tensor in committed.items():
        difference = (rebuilt[name].float() - tensor.float()).norm()
        assert difference <= 0.01 * tensor.float().norm(), name
    ids = tiny_build.token_stream(raw_tokenizer, text)
    rebuilt_base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert loss_on(rebuilt_base, ids) == pytest.approx(loss_on(base, ids), rel=0.01)
