"""Runs with the base's own chat template, and runs with the old rule for BOS, from training to export."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from accelerate.state import AcceleratorState
from commands.test_adapter import rewrite_manifest
from transformers import AutoTokenizer

import train
from medqa.__main__ import main
from medqa.commands.adapter import find_adapter, load_adapted
from medqa.commands.ask import answer
from medqa.config_file import dump_yaml, read_yaml
from medqa.data.tokens import prompt, prompt_of
from medqa.tiny import BASE_DIR

CPU = torch.device("cpu")
SETS = ["training.max_steps=4", "training.global_batch_size=8", "training.save_steps=2", "evaluation.steps=2"]
SETS += ["evaluation.samples=1", "tracking.wandb=disabled", "training.keep_checkpoints=2", "scheduler.warmup_steps=0"]
SETS += ["scheduler.name=none"]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    AcceleratorState._reset_state(reset_partial_state=True)


def trained(directory: Path, *sets: str, base: Path = BASE_DIR) -> int:
    words = ["--exp", "exp_002", "--tiny", "--cpu", "--model", str(base), "--output-dir", str(directory)]
    return train.main([*words, "--set", *SETS, *sets])


def losses(directory: Path) -> dict[tuple[int, str], float]:
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {(each["step"], each["split"]): each["loss"] for each in map(json.loads, lines)}


# --- tokenization.prompt: chat


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> Path:
    """A finished run with the chat template of the embedded base, which is TinyLlama-Chat's."""
    directory = tmp_path_factory.mktemp("chat") / "run"
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("WANDB_MODE", "disabled")
        assert trained(directory, "tokenization.prompt=chat") == 0
    return directory


def test_the_saved_tokenizer_has_the_bases_template(chat):
    base = AutoTokenizer.from_pretrained(BASE_DIR)
    saved = AutoTokenizer.from_pretrained(chat / "lora_adapters")
    assert saved.chat_template == base.chat_template
    assert (chat / "lora_adapters" / "chat_template.jinja").read_text(encoding="utf-8") == base.chat_template
    card = (chat / "lora_adapters" / "README.md").read_text(encoding="utf-8")
    assert "```\n<|user|>\n{question}</s>\n<|assistant|>\n```" in card
    assert "### Instruction" not in card


@pytest.mark.parametrize("where", [".", "lora_adapters", "checkpoint-4"])
def test_the_adapter_gets_the_template_wherever_it_is_loaded_from(chat, where, monkeypatch):
    adapted = load_adapted(find_adapter(str(chat / where)), CPU)
    asked, generate = [], adapted.model.generate
    monkeypatch.setattr(
        adapted.model, "generate", lambda **words: asked.append(words["input_ids"]) or generate(**words)
    )
    answer(adapted, " What is asthma ?\n", 2)
    base = AutoTokenizer.from_pretrained(BASE_DIR)
    message = [{"role": "user", "content": "What is asthma ?"}]
    expected = base.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert asked[0][0].tolist() == expected


def test_a_run_cannot_change_its_prompt(chat, tmp_path, capsys):
    run = shutil.copytree(chat, tmp_path / "run")
    assert trained(run, "training.max_steps=6") == 2
    assert "tokenization.prompt: 'chat' there, 'instruction' now" in capsys.readouterr().err
    assert trained(run, "tokenization.prompt=chat", "training.max_steps=6") == 0
    assert json.loads((run / "summary.json").read_text())["updates"] == 6


@pytest.mark.slow
def test_evaluation_and_its_baseline_use_the_template(chat, tmp_path):
    run = shutil.copytree(chat, tmp_path / "run")
    assert main(["evaluate", str(run), "--cpu", "--limit", "6", "--tasks", "loss,generation,mcq"]) == 0
    tasks = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["tasks"]
    assert "own_template" not in tasks["loss"]["test"]
    assert "own_template" not in tasks["generation"]
    assert tasks["generation"]["rows"] == 6
    assert main(["evaluate", str(run), "--cpu", "--tasks", "loss"]) == 0
    found = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["tasks"]["loss"]["test"]["tuned"]
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))["test"]
    assert found["answer_loss"]["value"] == pytest.approx(summary["answer_loss"], rel=1e-5)
    assert found["loss"]["value"] == pytest.approx(summary["loss"], rel=1e-5)


def test_an_export_has_the_template(chat, tmp_path):
    base = AutoTokenizer.from_pretrained(BASE_DIR)
    assert main(["export", str(chat), "--to", str(tmp_path / "merged"), "--cpu"]) == 0
    saved = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert saved.chat_template == base.chat_template
    text = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    assert "The base's own chat template with one user message" in text
    assert "<|user|>\n{question}</s>\n<|assistant|>\n" in text
    assert main(["export", str(chat / "lora_adapters"), "--to", str(tmp_path / "g"), "--format", "gguf", "--cpu"]) == 0
    said = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "g" / "model.gguf").fields.items()}
    assert said["tokenizer.chat_template"] == base.chat_template
    assert said["tokenizer.ggml.add_bos_token"] is False
    template = "<|user|>\n{{ .Prompt }}</s>\n<|assistant|>\n{{ .Response }}</s>"
    assert f'TEMPLATE """{template}"""' in (tmp_path / "g" / "Modelfile").read_text(encoding="utf-8")


def test_a_base_without_a_template_is_refused(tmp_path, capsys):
    base = without_post_processor(tmp_path / "base")
    said = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8"))
    del said["chat_template"]
    (base / "tokenizer_config.json").write_text(json.dumps(said), encoding="utf-8")
    assert trained(tmp_path / "run", "tokenization.prompt=chat", base=base) == 2
    told = capsys.readouterr().err
    assert f"model.base = {base}: tokenization.prompt = chat, but it has no chat template" in told
    assert not (tmp_path / "run").exists()


# --- BOS if the base's tokenizer adds one


def without_post_processor(directory: Path) -> Path:
    """The embedded base with a tokenizer that has a BOS token but adds none, as those of GPT-2 and SmolLM2."""
    shutil.copytree(BASE_DIR, directory)
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["post_processor"] = None
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return without_post_processor(tmp_path_factory.mktemp("without") / "base")


def in_the_old_form(run: Path) -> None:
    """Change the files of a run to their form before `tokenization.prompt` existed."""
    for checkpoint in run.glob("checkpoint-*"):
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
        del manifest["experiment"]["tokenization.prompt"]
        del manifest["environment"]["settings"]["bos"]
        rewrite_manifest(checkpoint, manifest)
    config = read_yaml(run / "config.yaml")
    del config["tokenization"]["prompt"]
    dump_yaml(config, run / "config.yaml")


@pytest.fixture(scope="module")
def old(base, tmp_path_factory) -> dict[str, Path]:
    """Runs of 2 and of 4 updates with the old rule, in the form of its version."""
    found = {}
    resolve = train.resolve_settings
    for name, updates in (("half", 2), ("whole", 4)):
        found[name] = tmp_path_factory.mktemp("old") / name
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("WANDB_MODE", "disabled")
            patched.setattr(train, "resolve_settings", lambda *a, **k: replace(resolve(*a, **k), bos="always"))
            assert trained(found[name], f"training.max_steps={updates}", base=base) == 0
        in_the_old_form(found[name])
    return found


def first_ids(where: Path, base: Path) -> list[int]:
    adapted = load_adapted(find_adapter(str(where), base=str(base)), CPU)
    return prompt_of(adapted.tokenizer).ids("Why ?")


def test_a_new_run_has_no_bos_if_the_tokenizer_adds_none(base, tmp_path):
    assert trained(tmp_path / "run", base=base) == 0
    plain = AutoTokenizer.from_pretrained(base)
    assert plain.bos_token_id == 1
    expected = plain(prompt("Why ?"), add_special_tokens=False)["input_ids"]
    for place in (".", "lora_adapters", "checkpoint-4"):
        assert first_ids(tmp_path / "run" / place, base) == expected
    assert "bos_token" not in (tmp_path / "run" / "lora_adapters" / "chat_template.jinja").read_text(encoding="utf-8")
    words = ["--model", str(base), "--cpu", "--format", "gguf"]
    assert main(["export", str(tmp_path / "run"), *words, "--to", str(tmp_path / "g")]) == 0
    said = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "g" / "model.gguf").fields.items()}
    assert said["tokenizer.ggml.add_bos_token"] is False
    assert "This text without a BOS" in (tmp_path / "g" / "README.md").read_text(encoding="utf-8")


def test_a_run_with_the_old_rule_is_resumed_with_it(base, old, tmp_path):
    run = shutil.copytree(old["half"], tmp_path / "run")
    assert trained(run, base=base) == 0
    whole = losses(old["whole"])
    assert {"train", "eval", "test"} <= {split for _, split in whole}
    assert {key: loss for key, loss in losses(run).items() if key in whole} == whole
    manifest = json.loads((run / "checkpoint-4" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["environment"]["settings"]["bos"] == "always"
    assert manifest["experiment"]["tokenization.prompt"] == "instruction"
    assert trained(run, "training.max_steps=5", base=base) == 0, "and again"


@pytest.mark.slow
def test_a_run_with_the_old_rule_is_evaluated_and_exported_with_it(base, old, tmp_path):
    run = shutil.copytree(old["whole"], tmp_path / "run")
    for place in (".", "lora_adapters", "checkpoint-2"):
        assert first_ids(run / place, base)[0] == 1
    assert main(["evaluate", str(run), "--cpu", "--tasks", "loss"]) == 0
    found = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["tasks"]["loss"]["test"]["tuned"]
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))["test"]
    assert found["answer_loss"]["value"] == pytest.approx(summary["answer_loss"], rel=1e-5)
    assert main(["export", str(run), "--to", str(tmp_path / "merged"), "--cpu"]) == 0
    saved = AutoTokenizer.from_pretrained(tmp_path / "merged")
    message = [{"role": "user", "content": "Why ?"}]
    ids = saved.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == first_ids(run, base)
    shutil.rmtree(run / "checkpoint-2")
    shutil.rmtree(run / "checkpoint-4")
    assert first_ids(run, base)[0] == 1, "config.yaml alone shows the rule"
