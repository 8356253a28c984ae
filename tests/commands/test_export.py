"""Exports: the adapter's model and no other, for every server; what cannot be kept is refused and leaves nothing."""

import base64
import contextlib
import dataclasses
import io
import json
import re
import resource
import shutil
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import train
from medqa.__main__ import main
from medqa.commands.adapter import find_adapter
from medqa.commands.evaluation_table import TOO_FEW
from medqa.commands.export import card, fidelity, gguf_vocabulary, merge
from medqa.commands.export import card as modelfile
from medqa.commands.export import export as export_module
from medqa.commands.export import gguf as gguf_file
from medqa.commands.export.fidelity import held_out_prompts
from medqa.config import Data
from medqa.config_file import load_yaml
from medqa.data.sources import load_sources
from medqa.data.tokens import prompt, prompt_ids, prompt_of
from medqa.errors import UserError
from medqa.model.base import load_tokenizer, save_tokenizer
from medqa.model.settings import four_bit_config
from medqa.tiny import AFRIMEDQA_CSV, BASE_DIR, MEDQUAD_CSV

gguf = pytest.importorskip("gguf", reason="writes GGUF")

SHARED = Path(__file__).resolve().parents[3] / "shared"
CPU = torch.device("cpu")
QUESTIONS = [
    "What is asthma ?",
    "  (a) 5 mg?\nA. one\nB. two  ",
    "Fièvre à 39,5 °C; µg/ml ≥ 5 — 漢字 🙂",
    "### Response:\nwhat   three  spaces\n\n\tand a tab",
    "{{ bos_token }} {% if %}",
]
SHORT = [
    "training.max_steps=12",
    "training.global_batch_size=4",
    "training.per_device_batch_size=4",
    "training.save_steps=6",
    "evaluation.rows=2",
]
SHORT += ["optimizer.learning_rate=1e-2", "data.fractions=[0.5,0.1,0.4]", "tracking.wandb=disabled"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, own_cache) -> Path:
    """exp_003: 4-bit, and `[PAD]` added to the vocabulary; few rows and updates, at a rate that makes them matter."""
    place = tmp_path_factory.mktemp("runs")
    for path in (MEDQUAD_CSV, AFRIMEDQA_CSV):
        pandas.read_csv(path).head(40).to_csv(place / path.name, index=False)
    words = ["--exp", "exp_003", "--tiny", "--cpu", "--output-dir", str(place / "exp_003"), "--set", *SHORT]
    words += ["--medquad", str(place / MEDQUAD_CSV.name), "--afrimedqa", str(place / AFRIMEDQA_CSV.name)]
    assert train.main(words) == 0
    assert "[PAD]" in (place / "exp_003" / "lora_adapters" / "tokenizer.json").read_text()
    return place / "exp_003"


@pytest.fixture(scope="module")
def exports(run, tmp_path_factory) -> dict[str, Path]:
    """One of each kind."""
    place = tmp_path_factory.mktemp("exports")
    kinds = {"f32": "merged", "f16": "merged", "gguf": "gguf", "q8_0": "gguf"}
    for name, form in kinds.items():
        outtype = [] if name in ("f16", "gguf") else ["--outtype", name]
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert main(["export", str(run), "--to", str(place / name), "--format", form, "--cpu", *outtype]) == 0
        (place / f"{name}.txt").write_text(said.getvalue())
    return {name: place / name for name in kinds}


@pytest.fixture(scope="module")
def exact(run):
    """The adapter in float32, prompts it was not trained on, and what it says after them."""
    adapted = merge.prepare(find_adapter(str(run)), CPU).load()
    held_out = held_out_prompts(adapted.source, adapted.tokenizer, 400)
    return adapted, held_out, fidelity.observe(adapted.model, adapted.tokenizer, held_out.ids)


@pytest.fixture(scope="module")
def merged(run):
    """The merged model in float32, as nothing has stored it."""
    return merge.merge(merge.prepare(find_adapter(str(run)), CPU).load().model)


@pytest.fixture
def briefly(monkeypatch):
    """Answers of few tokens are measured, where it is not their measure that is tested."""
    monkeypatch.setattr(fidelity, "ANSWER_TOKENS", 8)
    monkeypatch.setattr(fidelity, "SPEED_TOKENS", 4)


def refused(capsys, *words: str) -> str:
    """What the command says as it refuses."""
    capsys.readouterr()
    assert main(["export", *map(str, words), "--cpu"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "Traceback" not in said
    return said


def in_llama_cpp(path: Path) -> fidelity.LlamaCpp:
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed (requirements-llama.txt)")
    return fidelity.LlamaCpp(path, 512)


# Merged


def test_the_merged_model_is_what_peft_computes_on_the_4_bit_base(exports, run):
    """Beside plain transformers, PEFT and bitsandbytes: what a user of the adapter has."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = AutoModelForCausalLM.from_pretrained(
        BASE_DIR, dtype=torch.float32, quantization_config=four_bit_config(torch.float32)
    )
    for module in base.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    adapter = PeftModel.from_pretrained(base, run / "lora_adapters").eval()
    model = AutoModelForCausalLM.from_pretrained(exports["f32"]).eval()
    assert model.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(exports["f32"])
    for question in QUESTIONS:
        ids = torch.tensor([prompt_ids(question, tokenizer)])
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, adapter(ids).logits, rtol=1e-4, atol=1e-4)


def test_merged_files_are_plain_and_of_the_base_s_vocabulary(exports):
    for name, dtype in (("f32", torch.float32), ("f16", torch.float16)):
        place = exports[name]
        files = {path.name for path in place.iterdir()}
        assert files == {
            "README.md",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        }
        with safe_open(place / "model.safetensors", "pt") as weights:
            assert weights.get_tensor("lm_head.weight").shape[0] == 1024
            assert {weights.get_tensor(key).dtype for key in weights.keys()} == {dtype}  # noqa: SIM118
            assert not [key for key in weights.keys() if "lora" in key or "bias" in key]  # noqa: SIM118
        for file in files - {"model.safetensors"}:
            assert "[PAD]" not in (place / file).read_text(encoding="utf-8"), file
        config = json.loads((place / "config.json").read_text())
        assert config["vocab_size"] == 1024
        assert "quantization_config" not in config
        assert config["use_cache"] is True
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]  # for a transformers before 5
        said = json.loads((place / "generation_config.json").read_text())
        assert (said["do_sample"], said["eos_token_id"], said["pad_token_id"]) == (False, 2, 2)
        tokenizer = AutoTokenizer.from_pretrained(place)
        assert (tokenizer.pad_token, len(tokenizer)) == ("</s>", 1024)
        assert all(path.stat().st_mode & 0o777 == 0o644 for path in place.iterdir())


@pytest.mark.parametrize("base", ["tiny", "stories260k", "tinyllama-1.1b-shape"])
def test_every_chat_endpoint_gets_the_training_prompt(base, tmp_path):
    place = BASE_DIR if base == "tiny" else SHARED / "models" / base
    if not place.is_dir():
        pytest.skip(f"{place} is absent")
    tokenizer = load_tokenizer(str(place))
    save_tokenizer(tokenizer, tmp_path)
    merge.check_chat_template(tmp_path, tokenizer, QUESTIONS)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        trained = prompt_ids(question, tokenizer)
        # transformers serve (cli/serving/chat_completion.py) tokenizes at once; vLLM and TGI take the text first.
        served = saved.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
        text = saved.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        assert served["input_ids"] == saved(text, add_special_tokens=False)["input_ids"] == trained
        assert trained.count(tokenizer.bos_token_id) == 1
    with pytest.raises(Exception, match="only user and assistant"):
        saved.apply_chat_template([{"role": "system", "content": "x"}, *chat], tokenize=False)


def test_a_template_with_two_bos_is_found(tmp_path):
    tokenizer = load_tokenizer(str(BASE_DIR))
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    save_tokenizer(tokenizer, tmp_path)
    with pytest.raises(UserError, match="gives another prompt"):
        merge.check_chat_template(tmp_path, tokenizer, QUESTIONS[:1])


# Measured


def test_rows_that_may_have_been_trained_on_are_not_called_the_runs_test_questions(run, tmp_path):
    source = find_adapter(str(run))
    tokenizer = load_tokenizer(str(BASE_DIR))
    assert held_out_prompts(source, tokenizer, 400).where_from == "the run's test questions"
    changed = shutil.copytree(run, tmp_path / "run")
    data = tmp_path / "medquad.csv"
    rows = pandas.read_csv(source.experiment.data.medquad)
    rows.assign(answer=rows["answer"].where(rows.index != 3, "Another answer.")).to_csv(data, index=False)
    config = changed / "config.yaml"
    config.write_text(config.read_text().replace(source.experiment.data.medquad, str(data)))
    found = held_out_prompts(find_adapter(str(changed)), tokenizer, 400)
    assert (
        found.where_from == "the embedded sample's test questions (the run's data are not available, or have changed)"
    )


def test_float32_is_exact_and_16_bits_are_near(exact, exports):
    adapted, _, reference = exact
    found = fidelity.compare(merge.load_stored(exports["f32"], CPU), adapted.tokenizer, reference)
    assert found.kl < 1e-7
    assert found.equal == found.answers == 16
    half = fidelity.compare(merge.load_stored(exports["f16"], CPU), adapted.tokenizer, reference)
    assert found.kl < half.kl < 1e-4
    half.check("f16")


def test_weights_that_it_was_not_trained_on_are_refused(exact):
    adapted, _, reference = exact
    model = adapted.source.experiment.model.model_copy(update={"quantization": "none"})
    other = dataclasses.replace(
        adapted.source, settings=None, experiment=adapted.source.experiment.model_copy(update={"model": model})
    )
    wrong = merge.merge(merge.prepare(other, CPU).load().model)
    found = fidelity.compare(wrong, adapted.tokenizer, reference)
    assert found.kl > 3e-3
    for kind in fidelity.KL_LIMITS:
        with pytest.raises(UserError, match="differs from the adapter: mean KL divergence"):
            found.check(kind)


@pytest.mark.usefixtures("briefly")
def test_merged_into_the_bases_own_weights(run, tmp_path, capsys, monkeypatch):
    """What PEFT merges into the base as anybody loads it; on a machine without bitsandbytes too."""
    monkeypatch.setattr("medqa.model.settings.four_bit_unavailable", lambda device, dtype: "no bitsandbytes")
    base = AutoModelForCausalLM.from_pretrained(BASE_DIR, dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, str(run / "lora_adapters")).merge_and_unload().state_dict()
    words = ["--weights", "base", "--outtype", "f32", "--cpu"]
    assert main(["export", str(run), "--to", str(tmp_path / "own"), *words]) == 0
    found = merge.load_stored(tmp_path / "own", CPU).state_dict()
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert torch.allclose(weight, expected[name], atol=1e-6), name
    where = "the unquantized weights of its base, and not the 4-bit weights that it was trained on"
    assert f"merged into {where}" in capsys.readouterr().out
    text = " ".join((tmp_path / "own" / "README.md").read_text(encoding="utf-8").split())
    assert f"merged into {where}, stored as f32" in text
    assert "The adapter was on the unquantized weights for this comparison." in text
    assert "which this export does not have. Which weights are better has not been measured." in text


@pytest.mark.parametrize(
    "difference, verdict",
    [
        ({"value": 0.063, "low": 0.05, "high": 0.07, "p_value": 0.001}, "unquantized weights measure better"),
        ({"value": -0.063, "low": -0.07, "high": -0.05, "p_value": 0.001}, "4-bit weights measure better"),
        ({"value": 0.063, "low": -0.05, "high": 0.07, "p_value": 0.3}, "no significant difference"),
        ({"value": 0.063}, TOO_FEW),
    ],
)
def test_which_weights_measure_better_is_said(run, tmp_path, difference, verdict):
    place = Path(shutil.copytree(run, tmp_path / "run"))
    source = find_adapter(str(place))
    systems = {"tuned": {"answer_loss": {"value": 2.254}}, "tuned_unquantized": {"answer_loss": {"value": 2.191}}}
    pair = {"quantization": {"tuned - tuned_unquantized": {"answer_loss": difference}}}
    report = {"step": source.step, "limit": 49, "tasks": {"loss": {"test": {"rows": 49, **systems, **pair}}}}
    (place / "evaluation.json").write_text(json.dumps(report))
    assert card.which_measures_better(source) == (
        f"answer loss on test, 49 rows: 2.2540 with 4-bit weights, 2.1910 with unquantized weights: {verdict}"
    )
    for other in ({"step": 1}, {"tasks": {"loss": 3}}):
        (place / "evaluation.json").write_text(json.dumps({**report, **other}))
        assert card.which_measures_better(source) is None


def test_unquantized_weights_are_refused_where_there_are_no_others(run, tmp_path, capsys):
    said = refused(capsys, run / "lora_adapters", "--to", tmp_path / "x", "--weights", "base")
    assert "an adapter without its run is merged into them anyway; leave --weights out" in said
    place = Path(shutil.copytree(run, tmp_path / "run"))
    for path in place.glob("checkpoint-*"):
        shutil.rmtree(path)
    config = place / "config.yaml"
    config.write_text(config.read_text().replace("quantization: 4bit", "quantization: none"))
    summary = place / "summary.json"  # without checkpoints it says what the run used
    summary.write_text(summary.read_text().replace('"quantization": "4bit"', '"quantization": "none"'))
    said = refused(capsys, place, "--to", tmp_path / "x", "--weights", "base")
    assert "its weights were not quantized, so it is merged into them anyway; leave --weights out" in said
    assert not (tmp_path / "x").exists()


@pytest.mark.usefixtures("briefly")
def test_the_command_refuses_what_measures_badly(run, tmp_path, capsys, monkeypatch):
    """A merge that leaves the adapter out, and one that is not a number."""
    monkeypatch.setattr(export_module, "merge", lambda adapted: adapted.unload())
    assert "mean KL divergence" in refused(capsys, run, "--to", tmp_path / "x")
    monkeypatch.setattr(export_module, "merge", lambda adapted: _poisoned(merge.merge(adapted)))
    assert "mean KL divergence nan" in refused(capsys, run, "--to", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def _poisoned(model):
    model.model.norm.weight[0] = torch.nan
    return model


def test_answers_may_part_at_near_ties_only():
    log_probs = torch.log(torch.tensor([[0.5, 0.1, 0.4], [0.34, 0.33, 0.33], [0.9, 0.05, 0.05]]))
    reference = fidelity.Reference([[0]], [[0, 0]], [log_probs])
    assert fidelity.parting(reference, [[0, 0]]) == (1, 1, 0.0)
    assert fidelity.parting(reference, [[0, 1]])[2] == pytest.approx(np.log(0.34 / 0.33), abs=1e-6)
    assert fidelity.parting(reference, [[0]])[2] == np.inf
    for answer, good in (([0, 1], True), ([1, 0], False)):
        found = fidelity.Fidelity(0.0, 3, *fidelity.parting(reference, [answer]))
        if good:
            found.check("f16")
        else:
            with pytest.raises(UserError, match="1 of 1 greedy answers, by more than a near tie"):
                found.check("f16")


def test_4_bit_that_cannot_be_had_is_refused(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("medqa.model.settings.four_bit_unavailable", lambda device, dtype: "no bitsandbytes")
    monkeypatch.setattr(merge, "load_base", lambda *arguments: pytest.fail("loaded"))
    assert "trained on a base with quantization 4bit, which is not available here (no bitsandbytes)" in refused(
        capsys, run, "--to", tmp_path / "x"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("briefly")
def test_an_adapter_alone_and_a_checkpoint(run, tmp_path, capsys):
    assert main(["export", str(run / "lora_adapters"), "--to", str(tmp_path / "a" / "b"), "--cpu"]) == 0
    said = capsys.readouterr().out
    assert "not a run's directory, so its base is assumed not to be quantized" in said
    assert "the embedded sample's test questions" in said
    assert "license: other" in (tmp_path / "a" / "b" / "README.md").read_text()
    (tmp_path / "empty").mkdir()
    assert main(["export", str(run), "--to", str(tmp_path / "empty"), "--checkpoint", "6", "--cpu"]) == 0
    text = (tmp_path / "empty" / "README.md").read_text()
    assert "update 6, merged" in text
    assert "Not measured for this adapter." in text


# GGUF


def test_what_the_file_says(exports):
    reader = gguf.GGUFReader(exports["gguf"] / "model.gguf")
    said = {key: field.contents() for key, field in reader.fields.items()}
    config = json.loads((BASE_DIR / "config.json").read_text())
    assert said["general.architecture"] == "llama"
    assert said["general.name"] == "gguf"
    assert said["general.license"] == "cc-by-nc-sa-4.0"
    assert said["general.file_type"] == 1
    assert said["llama.context_length"] == config["max_position_embeddings"]
    assert said["llama.embedding_length"] == config["hidden_size"]
    assert said["llama.block_count"] == config["num_hidden_layers"]
    assert said["llama.feed_forward_length"] == config["intermediate_size"]
    assert said["llama.attention.head_count"] == config["num_attention_heads"]
    assert said["llama.attention.head_count_kv"] == config["num_key_value_heads"]
    assert said["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(config["rms_norm_eps"])
    assert said["llama.rope.freq_base"] == config["rope_parameters"]["rope_theta"]
    assert said["llama.rope.dimension_count"] == config["head_dim"]
    assert said["llama.vocab_size"] == len(said["tokenizer.ggml.tokens"]) == 1024
    assert "[PAD]" not in said["tokenizer.ggml.tokens"]
    assert said["tokenizer.ggml.model"] == "gpt2"
    assert said["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 1]
    ids = {key.split(".")[-1]: said[key] for key in said if key.endswith("_token_id")}
    assert ids == {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "padding_token_id": 2}
    assert (said["tokenizer.ggml.add_bos_token"], said["tokenizer.ggml.add_eos_token"]) == (True, False)
    assert said["tokenizer.chat_template"] == AutoTokenizer.from_pretrained(exports["f16"]).chat_template


@pytest.mark.parametrize("kind", ["gguf", "q8_0"])
def test_every_weight_is_the_merged_one(exports, merged, kind):
    """Read with the library alone; the order of rows, RoPE's pairs side by side, spelled out here once more."""
    weights = merged.state_dict()
    reader = gguf.GGUFReader(exports[kind] / "model.gguf")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, merged.config.num_hidden_layers)
    here = {names.get_name(name.removesuffix(".weight")) + ".weight": name for name in weights}
    assert {tensor.name for tensor in reader.tensors} == set(here)
    for tensor in reader.tensors:
        name = here[tensor.name]
        wanted = weights[name].numpy()
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        if heads:
            size = len(wanted) // heads
            order = [
                head * size + i + half for head in range(heads) for i in range(size // 2) for half in (0, size // 2)
            ]
            wanted = wanted[order]
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if wanted.ndim == 1:
            assert tensor.tensor_type.name == "F32"
            assert (found == wanted).all()
        elif kind == "gguf":
            assert tensor.tensor_type.name == "F16"
            assert (found == wanted.astype(np.float16).astype(np.float32)).all()
        else:
            assert tensor.tensor_type.name == "Q8_0"
            blocks = np.abs(wanted).reshape(len(wanted), -1, 32).max(axis=-1).repeat(32, axis=-1)
            assert (
                np.abs(found - wanted) <= blocks / 127 * 0.58 + 1e-7  # half a step, and the scale in float16
            ).all()


@pytest.mark.usefixtures("briefly")
def test_rows_in_another_order_are_refused(run, tmp_path, capsys, monkeypatch):
    """Written in transformers' order, as a file that loads and answers nonsense is."""
    monkeypatch.setattr(gguf_file, "rotate_pairs", lambda weight, heads: weight)
    assert "mean KL divergence" in refused(capsys, run, "--to", tmp_path / "x", "--format", "gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["gguf", "q8_0"])
def test_llama_cpp_makes_the_same_tokens_and_the_same_answers(exports, exact, kind):
    adapted, held_out, reference = exact
    model = in_llama_cpp(exports[kind] / "model.gguf")
    for question in QUESTIONS + held_out.questions:
        found = model.tokens(prompt(question), bos=True, special=False)
        assert found == prompt_ids(question, adapted.tokenizer), question
    answers = [model.answer(ids, fidelity.ANSWER_TOKENS) for ids in held_out.ids]
    found = fidelity.Fidelity(0.0, 1, *fidelity.parting(reference, answers))
    found.check("f16" if kind == "gguf" else kind)
    assert found.equal >= (15 if kind == "gguf" else 8)


def chat_ids(model: fidelity.LlamaCpp, question: str) -> list[int]:
    """The ids that the chat endpoint of llama.cpp's server makes of a question."""
    chat = [{"role": "user", "content": question}]
    return model.tokens(model.post("/apply-template", {"messages": chat})["prompt"], bos=True, special=True)


def test_llama_cpp_s_chat_endpoint_sends_the_training_prompt(exports, exact):
    model = in_llama_cpp(exports["gguf"] / "model.gguf")
    tokenizer = exact[0].tokenizer
    for question in QUESTIONS:
        assert chat_ids(model, question) == prompt_ids(question, tokenizer)
    chat = [{"role": "user", "content": QUESTIONS[0]}]
    answer = model.post("/v1/chat/completions", {"messages": chat, "temperature": 0, "max_tokens": 8})
    assert answer["usage"]["prompt_tokens"] == len(prompt_ids(QUESTIONS[0], tokenizer))


def test_the_modelfile_is_the_training_prompt(exports):
    text = (exports["gguf"] / "Modelfile").read_text(encoding="utf-8")
    assert text.startswith("FROM ./model.gguf\n")
    template = re.search(r'TEMPLATE """(.*?)"""', text, flags=re.DOTALL)[1]
    # Ollama leaves out what follows the last answer's place, and has llama.cpp put BOS in front.
    sent = template.split("{{ .Response }}")[0].replace("{{ .Prompt }}", "What is asthma ?")
    assert sent == prompt("What is asthma ?")
    assert template.endswith("{{ .Response }}</s>")
    assert "<s>" not in template
    lines = text.splitlines()
    for line in ('stop "</s>"', "num_ctx 512", "num_predict 256", "temperature 0", "repeat_penalty 1"):
        assert f"PARAMETER {line}" in lines
    assert "non-commercial" in text


def test_the_last_lines_are_commands(exports):
    for name in ("gguf", "q8_0"):
        commands = modelfile.ollama_commands(exports[name], "f16" if name == "gguf" else name)
        assert exports[name].with_name(f"{name}.txt").read_text().splitlines()[-len(commands) :] == commands
    assert modelfile.ollama_commands(Path("out/My Model"), "f16") == [
        "ollama create my-model -f 'out/My Model/Modelfile'",
        "ollama create my-model-q4_k_m --quantize q4_K_M -f 'out/My Model/Modelfile'  # smaller; not measured",
        "ollama run my-model",
    ]
    assert len(modelfile.ollama_commands(Path("x"), "q8_0")) == 2  # Ollama quantizes 16-bit files only


def small_llama(vocabulary: int, **changes) -> LlamaForCausalLM:
    """A Llama with weights that mean nothing."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, num_key_value_heads=2, **{**sizes, **changes})).eval()


def questions_of_medquad(most: int) -> list[str]:
    rows = load_sources(Data(medquad=str(MEDQUAD_CSV), afrimedqa="none"))[0].rows
    return [text for row in rows for text in (row.question, row.answer[:300])][:most]


@pytest.mark.parametrize("base", ["stories260k", "tinyllama-1.1b-shape"])
def test_a_vocabulary_of_pieces_is_written_with_scores(base, tmp_path):
    place = SHARED / "models" / base
    if not place.is_dir():
        pytest.skip(f"{place} is absent")
    tokenizer = load_tokenizer(str(place))
    size = {"stories260k": 512, "tinyllama-1.1b-shape": 32000}[base]
    words = gguf_vocabulary.vocabulary(tokenizer, size)
    assert (words.model, len(words.tokens), words.space_prefix) == ("llama", size, True)
    assert words.kinds[:4] == [2, 3, 3, 6]
    assert words.tokens[13] == "<0x0A>"
    questions = QUESTIONS + questions_of_medquad(80)
    assert gguf_vocabulary.fit_to_prompts(tokenizer, words, questions) == words
    model = small_llama(size)
    about = {"name": "x", "license": "other", "description": ""}
    gguf_file.write_gguf(tmp_path / "x.gguf", model, tokenizer, words, "f16", about)
    for name, weight in gguf_file.load_gguf(tmp_path / "x.gguf", model.config, CPU).state_dict().items():
        torch.testing.assert_close(weight, model.state_dict()[name].half().float(), rtol=1e-3, atol=1e-7)
    there = in_llama_cpp(tmp_path / "x.gguf")
    for question in questions:
        found = there.tokens(prompt(question), bos=True, special=False)
        assert found == prompt_ids(question, tokenizer), question
    for question in QUESTIONS:
        assert chat_ids(there, question) == prompt_ids(question, tokenizer)


def test_merges_that_scores_cannot_tell_are_refused():
    tokens = ["▁", "a", "b", "ab", "▁a"]
    ids = {token: i for i, token in enumerate(tokens)}
    for scores, joined in (([0, 0, 0, -1, -2], [0, 3]), ([0, 0, 0, -2, -1], [4, 2])):
        words = gguf_vocabulary.Vocabulary("llama", "default", tokens, [1] * 5, scores)
        assert gguf_vocabulary.joined_by_score(words, " ab", ids) == joined
    tokenizer = load_tokenizer(str(BASE_DIR))
    bytes_only = [f"<0x{i:02X}>" for i in range(256)]
    wrong = gguf_vocabulary.Vocabulary("llama", "default", bytes_only, [6] * 256, [0.0] * 256)
    with pytest.raises(UserError, match="its merges cannot be expressed as scores"):
        gguf_vocabulary.fit_to_prompts(tokenizer, wrong, ["What is it?"])


@pytest.mark.skipif(not (SHARED / "models" / "stories260k").is_dir(), reason="../shared/models/stories260k is absent")
def test_a_base_with_tied_embeddings_kept_in_float32(tmp_path, capsys):
    base = AutoModelForCausalLM.from_pretrained(SHARED / "models" / "stories260k")
    torch.manual_seed(0)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    adapted.save_pretrained(tmp_path / "adapter")
    words = ["export", str(tmp_path / "adapter"), "--cpu", "--model", str(SHARED / "models" / "stories260k")]
    assert main([*words, "--to", str(tmp_path / "m")]) == 0
    said = capsys.readouterr().out
    assert "f32: mean KL divergence" in said
    assert "greedy answers equal: 16 of 16" in said
    assert main([*words, "--to", str(tmp_path / "g"), "--format", "gguf"]) == 0
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "g" / "model.gguf").tensors}
    assert "output.weight" not in names
    assert "token_embd.weight" in names


# Bad input


def own_base(place: Path, change) -> Path:
    """The embedded base with its tokenizer.json changed."""
    shutil.copytree(BASE_DIR, place)
    described = json.loads((place / "tokenizer.json").read_text(encoding="utf-8"))
    change(described)
    (place / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
    return place


def words_first(described: dict) -> None:
    before = described["pre_tokenizer"]
    steps = [{"type": "Whitespace"}, before]
    described["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}


def more_tokens(described: dict) -> None:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    described["added_tokens"] += [{"id": 1024, "content": "<extra>", **flags}]


@pytest.mark.parametrize(
    "form, change, eos, said",
    [
        ("gguf", words_first, None, "llama.cpp has no way to prepare a text like Whitespace, ByteLevel"),
        ("gguf", None, "</s>\\n", "a Modelfile cannot quote it"),
        ("merged", more_tokens, None, "its tokenizer has 1025 tokens, but its weights have 1024"),
    ],
)
def test_what_the_base_alone_decides_is_refused_before_a_weight_is_loaded(
    form, change, eos, said, run, tmp_path, capsys, monkeypatch
):
    base = own_base(tmp_path / "base", change or (lambda described: None))
    monkeypatch.setattr(merge, "load_base", lambda *arguments: pytest.fail("loaded"))
    monkeypatch.setattr(export_module, "held_out_prompts", lambda *arguments: pytest.fail("read data"))
    if eos is not None:

        def with_eos(own, *more):
            return modelfile.modelfile(dataclasses.replace(own, end_text=eos), *more)

        monkeypatch.setattr(export_module, "modelfile", with_eos)
    words = [run / "lora_adapters", "--model", base, "--to", tmp_path / "x", "--format", form]
    assert said in refused(capsys, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_chat_template_that_would_send_another_prompt_is_refused_before_a_weight_is_loaded(
    run, tmp_path, capsys, monkeypatch
):
    load = merge.load_tokenizer

    def with_two_bos(*arguments):
        tokenizer = load(*arguments)
        tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
        return tokenizer

    monkeypatch.setattr(merge, "load_tokenizer", with_two_bos)
    monkeypatch.setattr(merge, "load_base", lambda *arguments: pytest.fail("loaded"))
    assert "gives another prompt" in refused(capsys, run, "--to", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("eos", ['"', "a\nb", "{{ .Prompt }}", "}}", "\\", "\x1b", "\u202e"])
def test_an_eos_that_a_modelfile_cannot_hold_is_refused(eos):
    own = prompt_of(load_tokenizer(str(BASE_DIR)))
    with pytest.raises(UserError, match="a Modelfile cannot quote it; use --format merged"):
        modelfile.modelfile(dataclasses.replace(own, end_text=eos), "", 512, "other")
    with pytest.raises(UserError, match="a Modelfile cannot quote it; use --format merged"):
        modelfile.modelfile(dataclasses.replace(own, before=f'x """ {eos} {{{{'), "", 512, "other")
    other = dataclasses.replace(own, end_text="<|im_end|>")
    assert 'PARAMETER stop "<|im_end|>"' in modelfile.modelfile(other, "", 512, "other")


def test_a_base_with_a_penalty_of_its_own_is_measured_without_it(run, tmp_path, capsys):
    """`generate` would take it up for the adapter and not for the export."""
    shutil.copytree(BASE_DIR, tmp_path / "base")
    path = tmp_path / "base" / "generation_config.json"
    own = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**own, "repetition_penalty": 1.5}))
    words = ["export", str(run), "--model", str(tmp_path / "base"), "--to", str(tmp_path / "out"), "--cpu"]
    assert main([*words, "--outtype", "f32"]) == 0
    assert "greedy answers equal: 16 of 16" in capsys.readouterr().out


def test_the_directory_one_stands_in_is_refused(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert main(["export", str(run), "--to", ".", "--cpu"]) == 2
    assert "--to .: cannot be replaced by the finished export" in capsys.readouterr().err


def test_nothing_is_overwritten_and_nothing_left(run, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    assert "not empty" in refused(capsys, run, "--to", tmp_path / "full")
    assert "not a directory" in refused(capsys, run, "--to", tmp_path / "file")
    assert "--format gguf has f16, q8_0" in refused(
        capsys, run, "--to", tmp_path / "x", "--format", "gguf", "--outtype", "bf16"
    )
    assert "--format merged has f32, f16, bf16" in refused(capsys, run, "--to", tmp_path / "x", "--outtype", "q8_0")
    assert "neither a run's directory" in refused(capsys, tmp_path, "--to", tmp_path / "x")
    assert "no such checkpoint" in refused(capsys, run, "--to", tmp_path / "x", "--checkpoint", "7")
    assert "no such directory" in refused(capsys, run, "--to", tmp_path / "x", "--model", "./nowhere")
    assert "is not a directory" in refused(capsys, run, "--to", tmp_path / "file" / "x" / "y")
    (tmp_path / "link").symlink_to("/scratch/not/mounted")
    said = refused(capsys, run, "--to", tmp_path / "link" / "x")
    assert f"{tmp_path}/link is a link to /scratch/not/mounted, which does not exist" in said
    (tmp_path / "link").unlink()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("form", ["merged", "gguf"])
def test_a_signal_leaves_nothing(run, tmp_path, capsys, monkeypatch, form, number):
    """What a service manager or a lost connection ends must not leave a model behind in a hidden directory."""
    seen = []

    def interrupted(directory: Path, *_: object) -> None:
        seen.extend(path.name for path in tmp_path.glob("new/.x-*/*"))
        signal.raise_signal(number)
        raise AssertionError("the signal did not end it")

    monkeypatch.setattr(export_module, "load_stored" if form == "merged" else "load_gguf", interrupted)
    before = signal.signal(number, signal.SIG_DFL)
    try:
        arguments = ["export", str(run), "--to", str(tmp_path / "new" / "x"), "--format", form, "--cpu"]
        assert main(arguments) == 128 + number
    finally:
        signal.signal(number, before)
    assert any(name.endswith((".safetensors", ".gguf")) for name in seen), "nothing was there to be left"
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err.endswith(f"stopped by {number.name}\n")


@pytest.mark.parametrize("form", ["merged", "gguf"])
def test_a_full_disk_leaves_nothing(run, tmp_path, capsys, form):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        said = refused(capsys, run, "--to", tmp_path / "new" / "x", "--format", form)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written" in said
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_said_before_anything_is_written(run, tmp_path, capsys, monkeypatch):
    usage = export_module.shutil._ntuple_diskusage(10**9, 10**9, 1000)
    monkeypatch.setattr(export_module.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(merge, "load_base", lambda *arguments: pytest.fail("loaded"))
    assert "2 MiB are needed, 0 are free" in refused(capsys, run, "--to", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_without_the_library_gguf_says_what_to_install(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install gguf" in refused(capsys, run, "--to", tmp_path / "x", "--format", "gguf")


# The card


def test_the_card_has_figures_licences_and_limits(exports, run):
    text = (exports["f16"] / "README.md").read_text(encoding="utf-8")
    summary = json.loads((run / "summary.json").read_text())
    assert "license: cc-by-nc-sa-4.0" in text
    assert "non-commercial use only" in text
    assert f"| answer perplexity, test, fine-tuned | {summary['test']['answer_perplexity']:.3f} |" in text
    assert "mean KL divergence" in text
    assert "greedy answers equal: " in text
    assert "tokens per second" in text
    assert "MiB of weights" in text
    assert "Not medical advice" in text
    assert "dequantized from 4 bits" in text
    assert "library_name: gguf" in (exports["gguf"] / "README.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("briefly")
def test_no_local_place_is_in_what_is_pushed(run, tmp_path):
    """The base is known by a path here, and so is the run; whoever fetches the export has neither."""
    place = tmp_path / "someone's"
    base = own_base(place / "base", lambda described: None)
    for form, name in (("merged", "whole"), ("gguf", "file")):
        words = ["export", str(run / "lora_adapters"), "--model", str(base), "--to", str(place / name), "--cpu"]
        assert main([*words, "--format", form]) == 0
        for path in (place / name).iterdir():
            content = path.read_bytes()
            for private in (b"someone", bytes(run.parent), str(BASE_DIR.parent).encode()):
                assert private not in content, path.name
        text = (place / name / "README.md").read_text(encoding="utf-8")
        header = load_yaml(text.split("---\n")[1], "the header")
        assert header["license"] == "other"
        assert "base_model" not in header
        assert "A base model in a local directory (base), fine-tuned" in text


def hostile_evaluation(run: Path, place: Path, step: object) -> str:
    """The card of a run whose files hold what somebody put there."""
    source = dataclasses.replace(find_adapter(str(run)), run=place, step=step)
    key = "x | y\n\n# Injected <script>alert(1)</script>\n\n[click](http://evil)"
    figure = {"value": 1.5, "low": 1.0, "high": 2.0}
    tasks = {"loss": {"test": {key: figure}}}
    (place / "evaluation.json").write_text(json.dumps({"step": step, "limit": None, "tasks": tasks}))
    own = prompt_of(load_tokenizer(str(BASE_DIR)))
    none = merge.MergedInto(quantized=False)
    measured = card.Measured(fidelity.Fidelity(0.0, 1, 1, 1, 0.0), "prompts", 1, 1.0, "CPU", none, own)
    return card.card(source, "name", "merged", "f16", measured)


@pytest.mark.parametrize("step", [4, "4\n# x", {"a": 1}, 10**400])
def test_what_a_run_s_files_say_is_no_markup(step, run, tmp_path):
    text = hostile_evaluation(run, tmp_path, step)
    headings = [line for line in text.splitlines() if line.startswith("#")]
    own = ["# name", "## How close it is to the adapter", "## Size and speed", "## Metrics", "## Prompt"]
    assert headings == [*own, "### Instruction:", "### Response:", "## Data", "## Limits"]
    assert "<script" not in text.replace("\\<", "")
    assert "](http" not in text.replace("\\]", "")
    assert (", update 4, merged" in text) == (step == 4)


@pytest.mark.parametrize("value", [10**400, float("nan"), 1e400, True, "1", None])
def test_figures_of_no_size_that_occurs_are_left_out(value, run, tmp_path):
    source = dataclasses.replace(find_adapter(str(run)), run=tmp_path)
    figure = {"value": value, "low": 1, "high": 2}
    found = {"step": source.step, "tasks": {"loss": {"test": {"tuned": {"answer_perplexity": figure}}}}}
    (tmp_path / "evaluation.json").write_text(json.dumps(found))
    assert card._figures(source) == "Not recorded."
    (tmp_path / "summary.json").write_text(json.dumps({"test": {"answer_perplexity": value}}))
    assert card._figures(source) == "Not recorded."


def test_figures_come_with_their_intervals_where_evaluate_has_them(tmp_path, run):
    source = dataclasses.replace(find_adapter(str(run)), run=tmp_path)
    test = {"answer_perplexity": {"value": 82.5, "low": 80.125, "high": 85.0}, "rows": 9, "odd": {"value": 1}}
    found = {"tasks": {"loss": {"test": {"tuned": test, "sources": {"x": test}}}}, "seed": 1, "step": source.step}
    (tmp_path / "evaluation.json").write_text(json.dumps(found))
    shown = card._figures(source)
    assert shown.endswith("| loss test fine-tuned answer perplexity | 82.5 | 80.12 to 85 | 9 |")
    found["tasks"]["loss"]["test"]["own_template"] = test
    (tmp_path / "evaluation.json").write_text(json.dumps(found))
    line = "| loss test baseline in its own chat template answer perplexity | 82.5 | 80.12 to 85 | 9 |"
    assert line in card._figures(source), "a base that is better in its own prompt is not hidden"
    (tmp_path / "evaluation.json").write_text(json.dumps(found | {"step": source.step + 1}))
    assert card._figures(source) == "Not recorded.", "of another adapter"
    (tmp_path / "evaluation.json").write_text("{")
    assert card._figures(source) == "Not recorded."


def test_an_adapter_trained_without_afrimedqa_may_be_used_commercially(run):
    source = find_adapter(str(run))
    data = source.experiment.data.model_copy(update={"afrimedqa": "none"})
    source = dataclasses.replace(source, experiment=source.experiment.model_copy(update={"data": data}))
    assert card.licence(source)[0] == "cc-by-4.0"


# The hub


@pytest.fixture
def hub(monkeypatch):
    """A hub of our own: what was asked of it, and the files it was given; `refuse` has it answer 403."""
    state = {"requests": [], "files": {}, "refuse": False, "created": None}

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Transfer-Encoding") == "chunked":
                while size := int(self.rfile.readline().strip() or b"0", 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
            state["requests"].append(self.path)
            if state["refuse"]:
                return self.answer(403, {"error": "You don't have the rights"})
            if self.path == "/api/repos/create":
                state["created"] = json.loads(body)
                return self.answer(200, {"url": f"{state['url']}/me/model", "name": "me/model"})
            if "/preupload/" in self.path:
                files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
                return self.answer(200, {"files": [{**file, "shouldIgnore": False} for file in files]})
            if "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        state["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                return self.answer(
                    200, {"commitOid": "0" * 40, "commitUrl": f"{state['url']}/me/model/commit/0", "success": True}
                )
            return self.answer(200, {"errors": [], "warnings": []})

        def do_GET(self):
            state["requests"].append(self.path)
            self.answer(200, {"id": "me/model", "siblings": [], "sha": "0" * 40})

        do_HEAD = do_GET

        def answer(self, code, said):
            data = json.dumps(said).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state["url"] = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", state["url"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(export_module, "hub_reachable", lambda: True)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_tests")
    yield state
    server.shutdown()


@pytest.mark.usefixtures("briefly")
def test_push_hands_the_folder_to_a_private_repository(hub, run, tmp_path, capsys):
    assert main(["export", str(run), "--to", str(tmp_path / "x"), "--push", "me/model", "--cpu"]) == 0
    assert "pushed to" in capsys.readouterr().out
    assert hub["created"]["name"] == "model"
    assert hub["created"].get("private") is True or hub["created"].get("visibility") == "private"
    assert hub["files"] == {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()}


@pytest.mark.usefixtures("briefly")
def test_a_refusal_of_the_hub_keeps_the_export(hub, run, tmp_path, capsys):
    hub["refuse"] = True
    said = refused(capsys, run, "--to", tmp_path / "x", "--push", "me/model")
    assert "--push me/model: upload failed" in said
    assert f"hf upload me/model {tmp_path / 'x'}" in said
    assert (tmp_path / "x" / "model.safetensors").exists()


def test_what_cannot_be_pushed_is_said_before_the_work(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "invalid name of a repository" in refused(capsys, run, "--to", tmp_path / "x", "--push", "a/b/c")
    assert "not logged in" in refused(capsys, run, "--to", tmp_path / "x", "--push", "me/model")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    monkeypatch.setattr(export_module, "hub_reachable", lambda: False)
    assert "the hub does not answer" in refused(capsys, run, "--to", tmp_path / "x", "--push", "me/model")
    assert list(tmp_path.iterdir()) == []
