"""Other families of base models beside Llama: Trainer's figures, `[PAD]`, adapters, no padding, answers.

Small random models (`families.py`), not the published weights.
"""

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from families import CONFIGS, make_base, wake
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.hf_trainer import FIGURES, relative_differences, train_ours, train_theirs
from harness.parts import Parts, build
from medqa.commands.adapter import find_adapter, load_adapted
from medqa.commands.ask import answer
from medqa.data.batches import MicroBatch
from medqa.data.tokens import prompt, prompt_ids
from medqa.evaluation.answers import end_ids, generate_answers, own_template_prompts, with_prompts
from medqa.model.attention import SEGMENTED, TESTED
from medqa.model.base import load_tokenizer
from medqa.terminal import printable
from medqa.training.checkpoint import save_adapter

WOKEN = 0.05
FAMILIES = tuple(CONFIGS)
FREE = tuple(family for family in FAMILIES if family != "gemma2")
QUICK = {"qwen3", "gemma", ("gemma3_text", True)}  # what `make test` tries; `make test-all` tries all
WINDOWED = {  # a window much shorter than the examples, in each family that has one, in all layers or in some
    "mistral": {"sliding_window": 12},
    "qwen2": {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    "gemma3_text": {"sliding_window": 12},
}
BEGINS = {"llama": 1, "mistral": 1, "qwen2": None, "qwen3": None, "gemma": 2, "gemma2": 2, "gemma3_text": 2}
ENDS = {"llama": {2}, "qwen3": {2, 0}, "gemma": {1, 1026}, "gemma2": {1, 1026}, "gemma3_text": {1, 1026}}
GROWN = {family for family in FAMILIES if not family.startswith("qwen")}  # Qwen has rows to spare, as the real ones
QUESTIONS = ["What is asthma ?", "How to prevent malaria, and what are the treatments for it in children ?", "Why ?"]
FIGURES_WITHIN, WEIGHTS_WITHIN, LOGITS_WITHIN = 1e-6, 1e-5, 1e-5
LOSSES_WITHIN, GRADIENTS_WITHIN = 1e-6, 1e-5


def tried(cases):
    """The cases as parameters, those that take too long together marked as slow."""
    return [pytest.param(case, id=str(case), marks=[] if case in QUICK else [pytest.mark.slow]) for case in cases]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """From a family, and what is changed of its configuration, to a base model's directory."""

    @functools.cache
    def made(family: str, windowed: bool = False) -> Path:
        return make_base(family, tmp_path_factory.mktemp(family), **(WINDOWED[family] if windowed else {}))

    return made


@pytest.fixture(scope="module")
def experiment(tiny, base):
    return lambda family, *sets, windowed=False: tiny(
        "exp_003",
        f"model.base={base(family, windowed)}",
        "model.quantization=none",
        "model.gradient_checkpointing=false",
        "lora.lora_dropout=0.0",
        "training.max_steps=3",
        "training.global_batch_size=8",
        "tokenization.max_length=96",
        "scheduler.warmup_steps=0",
        *sets,
    )


def worst(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest over the tensors of max |a - b| / max |b|."""
    assert ours.keys() == theirs.keys()
    assert len(theirs) == 28
    assert all(tensor.any() for tensor in theirs.values())
    return max(((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()).item() for name in theirs)


# --- beside HF Trainer


@pytest.mark.parametrize("family", tried(FAMILIES))
def test_every_update_and_the_final_weights_are_trainers(family, experiment, tmp_path):
    wanted = experiment(family, "optimizer.learning_rate=5e-3")
    ours, theirs = train_ours(wanted, tmp_path), train_theirs(wanted, tmp_path)
    for name in FIGURES:
        assert len(ours.figures[name]) == 3
        assert max(relative_differences(ours.figures[name], theirs.figures[name])) <= FIGURES_WITHIN
    assert worst(ours.weights, theirs.weights) <= WEIGHTS_WITHIN
    assert ours.figures["loss"][-1] < ours.figures["loss"][0]


@pytest.mark.slow
def test_parity_in_four_bits(experiment, tmp_path):
    """Real bitsandbytes weights and the real 8-bit optimizer, tied embeddings left as they are."""
    wanted = experiment("qwen3", "model.quantization=4bit", "model.dequantize=never", "optimizer.name=paged_adamw_8bit")
    parts = build(wanted)
    kinds = {name.rsplit(".", 1)[-1]: type(module).__name__ for name, module in parts.base.named_modules()}
    assert (kinds["q_proj"], kinds["down_proj"], kinds["lm_head"]) == ("Linear4bit", "Linear4bit", "Linear")
    ours, theirs = train_ours(wanted, tmp_path), train_theirs(wanted, tmp_path)
    assert all(max(relative_differences(ours.figures[n], theirs.figures[n])) <= FIGURES_WITHIN for n in FIGURES)
    assert worst(ours.weights, theirs.weights) <= WEIGHTS_WITHIN


# --- `[PAD]`, and the adapter on the untouched base


@pytest.fixture(scope="module", params=tried(FAMILIES))
def padded(request, experiment) -> tuple[str, Parts]:
    """A model that `[PAD]` was added to, with an adapter that does something."""
    parts = wake(build(experiment(request.param, "tokenization.pad_token='[PAD]'")), WOKEN)
    parts.model.eval()
    return request.param, parts


def test_pad_is_added_and_never_predicted(padded):
    family, parts = padded
    model, known = parts.base, CONFIGS[family]["vocab_size"]
    read, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    assert parts.tokenizer.pad_token == "[PAD]"
    assert model.config.tie_word_embeddings == (family not in ("llama", "mistral"))
    assert (read is head.weight) == model.config.tie_word_embeddings
    assert len(read) == known + (family in GROWN)
    if family in GROWN:
        assert parts.tokenizer.pad_token_id == known
        ids = torch.tensor([prompt_ids(QUESTIONS[1], parts.tokenizer)])
        with torch.no_grad():
            probabilities = parts.adapted(input_ids=ids).logits.softmax(-1)[0, :, known]
        # Where logits are capped, minus infinity becomes the cap: what is left is far below float32's last digit.
        assert probabilities.max() < (1e-12 if family == "gemma2" else 1e-30)


def test_the_adapter_alone_says_the_same_on_the_untouched_base(padded, base, tmp_path):
    """By PEFT and transformers without a line of ours, and by what `ask` does."""
    family, parts = padded
    save_adapter(parts.adapted, tmp_path)
    parts.tokenizer.save_pretrained(tmp_path)
    # Some versions of transformers would otherwise compute Gemma 2 with sdpa, without its caps.
    attention = "eager" if family == "gemma2" else "sdpa"
    words = {"dtype": torch.float32, "attn_implementation": attention}
    untouched = AutoModelForCausalLM.from_pretrained(base(family), **words)
    alone = PeftModel.from_pretrained(untouched, tmp_path).eval()
    known = CONFIGS[family]["vocab_size"]
    assert untouched.get_input_embeddings().weight.shape[0] == known
    ours = load_adapted(find_adapter(str(tmp_path), base=str(base(family))), torch.device("cpu"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert ids == prompt_ids(question, parts.tokenizer)
        input_ids = torch.tensor([ids])
        with torch.no_grad():
            trained, theirs, loaded = (
                model(input_ids=input_ids).logits[..., :known] for model in (parts.adapted, alone, ours.model)
            )
            with alone.disable_adapter():
                bare = alone(input_ids=input_ids).logits
        assert torch.allclose(theirs, trained, atol=LOGITS_WITHIN)
        assert torch.allclose(loaded, trained, atol=LOGITS_WITHIN)
        assert (bare - theirs).abs().max() > 100 * LOGITS_WITHIN
        new = alone.generate(
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=12, do_sample=False,
            eos_token_id=sorted(end_ids(alone, tokenizer)), pad_token_id=tokenizer.pad_token_id,
        )[0, len(ids) :]  # fmt: skip
        assert answer(ours, question, 12).text == printable(tokenizer.decode(new, skip_special_tokens=True).strip())


def test_the_prompt_begins_as_the_tokenizer_would_have_it(padded):
    """One BOS where the family has one, none where it has not; the EOS that ends an answer is the tokenizer's own."""
    family, parts = padded
    asked = prompt_ids(QUESTIONS[0], parts.tokenizer)
    text = parts.tokenizer(prompt(QUESTIONS[0]), add_special_tokens=False)["input_ids"]
    assert asked == ([] if BEGINS[family] is None else [BEGINS[family]]) + text
    whole = [example for example in parts.examples["train"] if not example.truncated]
    assert whole
    for example in whole:
        assert example.input_ids[-1] == parts.tokenizer.eos_token_id
        assert example.input_ids[: example.answer_start].tolist() == prompt_ids(example.row.question, parts.tokenizer)


# --- answers


@pytest.mark.parametrize("family", tried(ENDS))
def test_answers_end_where_the_family_ends_its_turns_and_do_not_depend_on_the_batch(family, experiment):
    parts = wake(build(experiment(family)), WOKEN)
    parts.model.eval()
    assert end_ids(parts.adapted, parts.tokenizer) == ENDS[family]
    words = {"max_new_tokens": 16}
    together = generate_answers(parts.adapted, parts.tokenizer, QUESTIONS, batch_size=3, **words)
    alone = generate_answers(parts.adapted, parts.tokenizer, QUESTIONS, batch_size=1, **words)
    assert together == alone
    assert len({found.text for found in together}) > 1
    head = parts.base.get_output_embeddings()
    for end in sorted(ENDS[family]):  # each of them ends an answer: the model is made to say nothing else
        head.bias = torch.nn.Parameter(torch.zeros(len(head.weight)), requires_grad=False)
        head.bias[end] = 1e4
        stopped = generate_answers(parts.adapted, parts.tokenizer, QUESTIONS, batch_size=3, **words)
        assert [(found.text, found.stopped) for found in stopped] == [("", True)] * 3


@pytest.mark.parametrize("family, begins", [("gemma", ["<bos>", "<start_of_turn>"]), ("qwen3", ["<|im_start|>"])])
def test_the_base_is_asked_in_its_own_template_too(family, begins, base, experiment):
    tokenizer = load_tokenizer(str(base(family)))
    parts = build(experiment(family))
    examples = parts.examples["validation"][:4]
    prompts = own_template_prompts(str(base(family)), [QUESTIONS[0], *(example.row.question for example in examples)])
    ids = prompts(QUESTIONS[0])
    assert tokenizer.convert_ids_to_tokens(ids[: len(begins)]) == begins
    assert ids.count(tokenizer.convert_tokens_to_ids(begins[0])) == (2 if family == "qwen3" else 1)
    others = with_prompts(examples, prompts)
    table = parts.evaluator().row_losses(others)
    assert np.isfinite(table).all()
    assert table[:, 3].tolist() == parts.evaluator().row_losses(examples)[:, 3].tolist()  # the same answer tokens


# --- without padding


@pytest.fixture(scope="module", params=tried([(f, False) for f in FREE] + [(f, True) for f in WINDOWED]))
def free(request, experiment) -> tuple[Parts, Parts]:
    """The same model twice: with transformers' own attention over padded rows, and without padding."""
    family, windowed = request.param
    found = []
    for asked in ("false", "true"):
        wanted = experiment(family, f"training.padding_free={asked}", "optimizer.max_grad_norm=1e9", windowed=windowed)
        found.append(wake(build(wanted), WOKEN))
    plain, packed = found
    assert packed.settings.padding_free
    assert packed.base.config._attn_implementation == SEGMENTED
    plain.base.set_attn_implementation("sdpa")
    if windowed:
        assert max(len(example.input_ids) for example in packed.examples["train"][:8]) > 12
    return plain, packed


def gradients(parts: Parts, micro_batches: list[MicroBatch]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and LoRA gradients of one `train_step`; the weights are put back."""
    trained = {name: p for name, p in parts.adapted.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    loss = parts.step(micro_batches, max_grad_norm=1e9).loss
    found = {name: p.grad.clone() for name, p in trained.items()}
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(before[name])
    return loss, found


@pytest.mark.parametrize("loss_on", ["all", "answer"])
def test_without_padding_loss_and_every_gradient_are_the_same(free, loss_on):
    plain, packed = free
    tokenization = plain.experiment.tokenization.model_copy(update={"loss_on": loss_on})
    padded = plain.stream.micro_batches(0, 4, tokenization, plain.tokenizer.pad_token_id)
    expected, theirs = gradients(plain, padded)
    for most in (1, 200, 10_000):  # an example a micro-batch, several, all in one
        loss, ours = gradients(packed, packed.stream.packed(0, loss_on, most))
        assert loss == pytest.approx(expected, rel=LOSSES_WITHIN)
        assert worst(ours, theirs) <= GRADIENTS_WITHIN
    model = packed.base.config
    if model.model_type == "mistral" and model.sliding_window:
        return  # all its layers have the window, and an answer is too far from the example before
    leaking = [dataclasses.replace(m, segments=(m.tokens,)) for m in packed.stream.packed(0, loss_on, 200)]
    assert worst(gradients(packed, leaking)[1], theirs) > 100 * GRADIENTS_WITHIN


def test_evaluation_without_padding_is_the_same(free):
    plain, packed = free
    rows = packed.examples["validation"][:12]
    ours, theirs = packed.evaluator(200).row_losses(rows), plain.evaluator(200, padding_free=False).row_losses(rows)
    assert np.allclose(ours, theirs, rtol=1e-5)
    assert (ours[:, 1] == theirs[:, 1]).all()


def test_capped_logits_are_computed_with_padding_and_eager_attention(experiment):
    settings = build(experiment("gemma2", "training.padding_free=true")).settings
    assert not settings.padding_free
    assert not settings.evaluation_padding_free
    assert settings.attn_implementation == "eager"
    assert "attn_logit_softcapping" in settings.changes["model.attn_implementation"][2]
    assert "gemma2 caps its attention scores" in settings.changes["training.padding_free"][2]


def test_every_family_that_is_said_to_be_tested_is():
    assert set(TESTED) == set(FREE)
