"""A trained adapter on its base again: which one is found, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from medqa.__main__ import main
from medqa.commands import adapter as finding
from medqa.commands.adapter import find_adapter, load_adapted
from medqa.commands.export.merge import prepare
from medqa.config import Experiment
from medqa.errors import UserError
from medqa.model.base import adapter_weights, add_lora, load_tokenizer, save_tokenizer
from medqa.tiny import BASE_DIR
from medqa.training.before_after import save_final_adapter

CPU = torch.device("cpu")


@pytest.fixture
def run(tiny_run, tmp_path) -> Path:
    shutil.copytree(tiny_run, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def alone(tiny_run, tmp_path) -> Path:
    shutil.copytree(tiny_run / "lora_adapters", tmp_path / "alone")
    return tmp_path / "alone"


def edited(directory: Path, **changes: object) -> str:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return str(directory)


def test_a_runs_final_adapter_in_what_it_was_trained_in(tiny_run):
    source = find_adapter(str(tiny_run))
    assert (source.run, source.directory, source.step, source.final) == (tiny_run, tiny_run / "lora_adapters", 6, True)
    adapted = load_adapted(source, CPU)
    assert adapted.settings.quantization == "4bit"
    assert not adapted.model.training
    expected = load_file(tiny_run / "lora_adapters" / "adapter_model.safetensors")
    found = adapter_weights(adapted.model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(tensor.abs().max() > 0 for name, tensor in found.items() if "lora_B" in name)
    assert len(adapted.tokenizer) == 1025  # with [PAD]


def test_another_checkpoint(tiny_run):
    source = find_adapter(str(tiny_run), "4")
    assert (source.directory, source.step, source.final) == (tiny_run / "checkpoint-4", 4, False)
    best = json.loads((tiny_run / "summary.json").read_text())["best_step"]
    assert best in (2, 4, 6)
    assert find_adapter(str(tiny_run), "best").step == best
    with pytest.raises(UserError, match=r"--checkpoint 5: no such checkpoint; .* has 2, 4, 6"):
        find_adapter(str(tiny_run), "5")
    with pytest.raises(UserError, match=r"--checkpoint ../../etc: no such checkpoint"):
        find_adapter(str(tiny_run), "../../etc")


def test_a_best_checkpoint_that_was_not_kept_is_named(run):
    (run / "summary.json").unlink()
    path = run / "checkpoint-6" / "state.json"
    for step, said in ((5, "but its checkpoint was not kept"), (0, "no checkpoint improved on the baseline")):
        path.write_text(json.dumps({**json.loads(path.read_text()), "best_step": step}))
        manifest = json.loads((run / "checkpoint-6" / "manifest.json").read_text())
        rewrite_manifest(run / "checkpoint-6", manifest)
        with pytest.raises(UserError, match=said):
            find_adapter(str(run), "best")


def rewrite_manifest(directory: Path, manifest: dict) -> None:
    """A manifest that says the files are right as they are now."""
    from medqa.training.checkpoint import write_manifest

    (directory / "manifest.json").unlink()
    write_manifest(directory, {k: v for k, v in manifest.items() if k not in ("format", "files", "checksum")})


def test_an_unfinished_run_gives_its_newest_checkpoint(run):
    (run / "summary.json").unlink()
    assert (find_adapter(str(run)).step, find_adapter(str(run)).final) == (6, False)
    (run / "checkpoint-6" / "adapter_model.safetensors").write_bytes(b"torn")
    assert find_adapter(str(run)).step == 4
    with pytest.raises(UserError, match=r"checkpoint-6 is damaged: adapter_model.safetensors has 4 bytes"):
        find_adapter(str(run), "6")
    for path in run.glob("checkpoint-*"):
        shutil.rmtree(path)
    with pytest.raises(UserError, match="neither an adapter nor a checkpoint yet"):
        find_adapter(str(run))


def test_a_run_that_goes_on_is_not_its_old_end(run):
    """More updates under a constant rate: summary and final adapter are those of before until it ends again."""
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("max_steps: 6", "max_steps: 8"))
    source = find_adapter(str(run))
    assert (source.directory, source.step, source.final) == (run / "checkpoint-6", 6, False)


def test_an_automatic_quantization_is_the_one_that_the_run_used(run):
    config = run / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("quantization: 4bit", "quantization: auto"))
    assert find_adapter(str(run)).experiment.model.quantization == "4bit"  # from the newest checkpoint
    for path in run.glob("checkpoint-*"):
        shutil.rmtree(path)
    source = find_adapter(str(run))
    assert (source.experiment.model.quantization, source.settings) == ("4bit", None)  # from summary.json
    assert load_adapted(source, CPU).settings.quantization == "4bit"
    path = run / "summary.json"
    summary = json.loads(path.read_text())
    path.write_text(json.dumps({**summary, "quantization": "auto"}))
    with pytest.raises(UserError, match=r"says what the run used: write none or 4bit into .*config\.yaml"):
        find_adapter(str(run))


def test_a_run_without_checkpoints_is_loaded_as_its_summary_says(run):
    """4-bit weights were requested, and not available."""
    for path in run.glob("checkpoint-*"):
        shutil.rmtree(path)
    path = run / "summary.json"
    summary = json.loads(path.read_text())
    path.write_text(json.dumps({**summary, "quantization": "none"}))
    source = find_adapter(str(run))
    assert (source.experiment.model.quantization, source.settings) == ("none", None)
    assert load_adapted(source, CPU).settings.quantization == "none"
    path.write_text(json.dumps({**summary, "quantization": "8bit"}))
    assert find_adapter(str(run)).experiment.model.quantization == "4bit"  # nothing that can be used: as requested


def test_an_adapter_alone(alone, monkeypatch):
    source = find_adapter(str(alone))
    assert (source.run, source.experiment.lora.r, source.experiment.model.base) == (None, 8, str(BASE_DIR))
    adapted = load_adapted(source, CPU)
    assert adapted.settings.quantization == "none"
    with pytest.raises(UserError, match=r"--checkpoint 2: .* is not a run's directory"):
        find_adapter(str(alone), "2")
    with pytest.raises(UserError, match="no such directory; give another with --model"):
        load_adapted(find_adapter(str(alone), base="/nonexistent/base"), CPU)


def test_an_adapter_on_the_hub(alone, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(UserError, match="no such directory, and not available as an adapter on the hub"):
        find_adapter("someone/adapter")
    place = tmp_path / "hub" / "models--someone--adapter"
    shutil.copytree(alone, place / "snapshots" / "abc")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")
    assert find_adapter("someone/adapter").directory == place / "snapshots" / "abc"


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"use_dora": True}, "this adapter does not fit: use_dora = True in its configuration, no magnitudes in"),
        ({"use_dora": "yes"}, "adapter_config.json: use_dora: "),
        ({"modules_to_save": ["lm_head"]}, "it uses modules_to_save"),
        ({"rank_pattern": {"q_proj": 4}}, "it uses rank_pattern"),
        ({"fan_in_fan_out": True}, "it uses fan_in_fan_out"),
        ({"peft_type": "PROMPT_TUNING"}, "its peft_type is 'PROMPT_TUNING'"),
        ({"r": "eight"}, "adapter_config.json: r: "),
        ({"bias": "all"}, "adapter_config.json: bias: "),
        ({"base_model_name_or_path": None}, "adapter_config.json: base: "),
        ({"revision": "a1b2c3"}, "adapter_config.json names revision 'a1b2c3' of its base: give a directory"),
        ({"task_type": "SEQ_CLS"}, "it uses task_type = SEQ_CLS"),
        ({"layers_to_transform": 0}, "it uses layers_to_transform = 0"),
        ({"layers_to_transform": [0]}, "it uses layers_to_transform"),
        ({"use_rslora": True, "lora_bias": True}, "it uses lora_bias = True; only"),
        ({"something_new": {"a": 1}}, "it uses something_new"),
        ({"init_lora_weights": "pissa"}, "it uses init_lora_weights = pissa"),
        ({"init_lora_weights": "pissa_niter_4"}, "it uses init_lora_weights"),
        ({"init_lora_weights": "olora"}, "it uses init_lora_weights"),
        ({"init_lora_weights": "corda"}, "it uses init_lora_weights"),
        ({"init_lora_weights": "loftq"}, "it uses init_lora_weights"),
        ({"init_lora_weights": "eva"}, "it uses init_lora_weights"),
        ({"init_lora_weights": "mica"}, "it uses init_lora_weights"),
        ({"init_lora_weights": "lora_ga"}, "it uses init_lora_weights"),
        ({"r": 10**8}, "adapter_config.json: r: Input should be less than or equal to"),
        ({"r": 10**20}, "cannot be read: .*the number 100000000000000000000.* is too large"),
        ({"r": 65_536}, "this adapter does not fit: r = 65,536 in its configuration, 8 in"),
        ({"lora_alpha": 10**400}, "cannot be read: .*is too large"),
        ({"lora_alpha": 10**18}, "adapter_config.json: lora_alpha: "),
        ({"lora_dropout": float("nan")}, "cannot be read: .*NaN is not a JSON number"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_adapters_of_another_making_are_refused(changes, said, alone):
    with pytest.raises(UserError, match=said):
        find_adapter(edited(alone, **changes))


def test_an_adapter_to_start_from_must_be_plain_as_well(alone):
    """Its names and shapes fit, but it computes something else."""
    where = edited(alone, use_qalora=True)
    lora = Experiment().lora.model_copy(update={"init_from": where})
    with pytest.raises(UserError, match=r"lora.init_from = .*alone: not a plain LoRA adapter: it uses use_qalora"):
        add_lora(AutoModelForCausalLM.from_pretrained(BASE_DIR), lora, 1)
    edited(alone, use_qalora=False, use_rslora=True)
    with pytest.raises(UserError, match=r"this adapter was trained with use_rslora: True, and lora.use_rslora = False"):
        add_lora(AutoModelForCausalLM.from_pretrained(BASE_DIR), lora, 1)
    edited(alone, use_rslora=False)
    model = add_lora(AutoModelForCausalLM.from_pretrained(BASE_DIR), lora, 1)
    expected = load_file(alone / "adapter_model.safetensors")
    assert all(torch.equal(weight, expected[name]) for name, weight in adapter_weights(model).items())


@pytest.mark.parametrize("content", ["", "[1]", "{", "[" * 100_000, "\x00"], ids=repr)
def test_damaged_configurations_are_refused(content, alone):
    (alone / "adapter_config.json").write_text(content[:50_000])
    with pytest.raises(UserError, match="cannot be read"):
        find_adapter(str(alone))


def test_pickled_or_foreign_weights_are_refused(alone):
    (alone / "adapter_model.safetensors").rename(alone / "adapter_model.bin")
    with pytest.raises(UserError, match=r"no readable adapter_model.safetensors: adapter_model.bin can execute code"):
        load_adapted(find_adapter(str(alone)), CPU)
    (alone / "adapter_model.bin").rename(alone / "adapter_model.safetensors")
    with pytest.raises(UserError, match="this adapter does not fit: r = 4 in its configuration, 8 in adapter_model"):
        find_adapter(edited(alone, r=4))
    with pytest.raises(UserError, match="this adapter does not fit: its names or shapes differ"):
        load_adapted(find_adapter(edited(alone, r=8, target_modules=["q_proj"])), CPU)


@pytest.mark.parametrize("where", ["/nonexistent", ".", "", "a b/c d", "x" * 300, "no-slash-and-no-directory"])
def test_what_is_neither(where, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"no such directory|neither a run's directory"):
        find_adapter(where)


# --- the base that it was trained on


@pytest.fixture
def other_base(tmp_path) -> Path:
    """A base of the same shape, with noise on its weights."""
    place = Path(shutil.copytree(BASE_DIR, tmp_path / "other base"))
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: weight + 0.02 * torch.randn(weight.shape, generator=generator).to(weight.dtype)
        for name, weight in load_file(place / "model.safetensors").items()
    }
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    return place


def load_exact(source: finding.Source, device: torch.device) -> finding.Adapted:
    return prepare(source, device).load()


@pytest.mark.parametrize("load", [load_adapted, load_exact], ids=["adapted", "exact"])
@pytest.mark.parametrize("checkpoint", [None, "4"], ids=["final", "checkpoint"])
def test_another_base_than_in_training_is_refused(load, checkpoint, tiny_run, other_base, tmp_path):
    with pytest.raises(
        UserError, match=r"model.base = .*other base: not the base model that .* was trained on: .*--model"
    ):
        load(find_adapter(str(tiny_run), checkpoint, str(other_base)), CPU)
    same = Path(shutil.copytree(BASE_DIR, tmp_path / "the same elsewhere"))
    found = load(find_adapter(str(tiny_run), checkpoint, str(same)), CPU)
    assert found.base == json.loads((tiny_run / "summary.json").read_text())["base_fingerprint"]


def test_a_base_that_changed_in_place_is_refused_by_every_command(run, other_base, tmp_path, capsys):
    """As if the directory that config.yaml names had been written over."""
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(BASE_DIR), str(other_base)))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for words in (["evaluate"], ["ask", "Why ?"], ["export", "--to", str(tmp_path / "x")]):
        assert main([words[0], str(run), *words[1:], "--cpu"]) == 2
        assert "not the base model that" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "x").exists()


def test_a_checkpoint_alone_knows_its_base_and_an_adapter_alone_says_that_it_does_not(
    tiny_run, alone, other_base, tmp_path, capsys
):
    with pytest.raises(UserError, match="not the base model that"):
        load_adapted(
            find_adapter(str(shutil.copytree(tiny_run / "checkpoint-4", tmp_path / "any")), base=str(other_base)), CPU
        )
    said = "its base model in training is not recorded, so it cannot be checked"
    words = ["Why ?", "--max-new-tokens", "1", "--cpu"]
    assert main(["ask", str(alone), "--model", str(other_base), *words]) == 0
    assert said in capsys.readouterr().err
    assert main(["ask", str(tiny_run), *words]) == 0
    assert said not in capsys.readouterr().err


def test_a_run_that_recorded_no_base_is_still_used(run):
    """Nothing to compare with is no reason to refuse."""
    for path in run.glob("checkpoint-*"):
        shutil.rmtree(path)
    summary = json.loads((run / "summary.json").read_text())
    for key in ("base_fingerprint", "data_fingerprint", "adapter_sha256"):
        del summary[key]
    (run / "summary.json").write_text(json.dumps(summary))
    source = find_adapter(str(run))
    assert (source.final, source.base, source.data) == (True, None, None)
    assert "cannot be checked" in finding.unchecked_base(source)
    assert load_adapted(source, CPU).base != ""


# --- what was recorded of it


def test_a_configuration_that_was_changed_after_training_is_refused(run):
    config = run / "config.yaml"
    whole = config.read_text()
    config.write_text(whole.replace("lora_alpha: 16", "lora_alpha: 976"))
    with pytest.raises(
        UserError, match=r"config.yaml, with the options .* is not .*lora.lora_alpha: 16 there, 976 now"
    ):
        find_adapter(str(run))
    for path in run.glob("checkpoint-*"):
        shutil.rmtree(path)
    with pytest.raises(
        UserError, match=r"adapter_config.json: lora_alpha = 16, and .*config.yaml: lora.lora_alpha = 976"
    ):
        find_adapter(str(run))
    config.write_text(whole)
    edited(run / "lora_adapters", target_modules=["q_proj"])
    with pytest.raises(UserError, match=r"adapter_config.json: target_modules = \['q_proj'\], and .*config.yaml"):
        find_adapter(str(run))


def test_what_has_no_effect_after_training_may_differ(run):
    config = run / "config.yaml"
    config.write_text(
        config.read_text().replace("save_steps: 2", "save_steps: 3").replace("wandb: disabled", "wandb: auto")
    )
    assert find_adapter(str(run)).final


def test_a_final_adapter_that_is_not_the_runs_is_refused(run):
    path = run / "lora_adapters" / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({name: torch.zeros_like(weight) for name, weight in weights.items()}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"not the final adapter of the run: .* choose a checkpoint"):
        find_adapter(str(run))
    assert find_adapter(str(run), "6").step == 6


def test_a_renamed_checkpoint_is_not_what_it_is_called(run):
    shutil.copytree(run / "checkpoint-4", run / "checkpoint-40")
    with pytest.raises(UserError, match=r"checkpoint-40 is damaged: .* which was renamed"):
        find_adapter(str(run), "40")
    (run / "summary.json").unlink()
    assert find_adapter(str(run)).step == 6


def test_a_checkpoint_that_is_pruned_while_it_is_read_is_looked_for_again(run, monkeypatch):
    (run / "summary.json").unlink()
    read, pruned = finding.read_adapter, []

    def prune_and_read(directory: Path, what: str) -> dict[str, torch.Tensor]:
        if directory.name == "checkpoint-6" and not pruned:
            pruned.append(directory.rename(run / "aside"))
        return read(directory, what)

    monkeypatch.setattr(finding, "read_adapter", prune_and_read)
    source = find_adapter(str(run))
    assert pruned
    assert source.step == 4
    shutil.rmtree(run / "checkpoint-4")  # once found, it is not needed any more
    assert load_adapted(source, CPU).source.step == 4


@pytest.mark.parametrize("beginning", [False, "gaussian", "orthogonal"])
def test_beginnings_that_are_not_refused_compute_what_peft_computes(beginning, tmp_path):
    def base() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(BASE_DIR, dtype=torch.float32)

    torch.manual_seed(0)
    lora = LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    lora.init_lora_weights = beginning
    trained = get_peft_model(base(), lora)
    for name, weight in trained.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    trained.save_pretrained(tmp_path)
    ids = torch.tensor([[1, 5, 6, 7, 8, 9, 10]])
    ours = load_adapted(find_adapter(str(tmp_path), base=str(BASE_DIR)), CPU).model
    with torch.no_grad():
        expected, untuned = PeftModel.from_pretrained(base(), tmp_path).eval()(ids).logits, base()(ids).logits
        torch.testing.assert_close(ours(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert (expected - untuned).abs().max() > 0.1


# --- what a run leaves


def test_the_tokenizer_beside_the_adapter_is_one_for_transformers_4_too(tiny_run):
    """4.57 knows no TokenizersBackend, and takes no list of extra_special_tokens; tried by hand with 4.57.6."""
    said = json.loads((tiny_run / "lora_adapters" / "tokenizer_config.json").read_text())
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not said.keys() & {"backend", "is_local", "local_files_only", "auto_map", "extra_special_tokens"}
    template = (tiny_run / "lora_adapters" / "chat_template.jinja").read_text()
    assert said["chat_template"] == template == AutoTokenizer.from_pretrained(tiny_run / "lora_adapters").chat_template


def test_special_tokens_of_the_base_and_code_that_it_names_in_what_is_saved(tmp_path):
    base, saved = tmp_path / "base", tmp_path / "saved"
    shutil.copytree(BASE_DIR, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]})
    tokenizer.save_pretrained(base)
    said = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**said, "auto_map": {"AutoTokenizer": ["a.B", "a.C"]}}))
    saved.mkdir()
    finding_tokenizer = load_tokenizer(str(base))
    save_tokenizer(finding_tokenizer, saved)
    said = json.loads((saved / "tokenizer_config.json").read_text())
    assert said["additional_special_tokens"] == ["<|im_start|>"]
    assert not said.keys() & {"auto_map", "extra_special_tokens"}
    assert AutoTokenizer.from_pretrained(saved)("<|im_start|>").input_ids == finding_tokenizer("<|im_start|>").input_ids


def test_nothing_is_written_through_a_link(tiny_run, tmp_path):
    victim, run = tmp_path / "victim", tmp_path / "run"
    shutil.copytree(tiny_run / "lora_adapters", victim)
    before = {path: path.read_bytes() for path in victim.iterdir()}
    run.mkdir()
    (run / "lora_adapters").symlink_to(victim)
    adapted = load_adapted(find_adapter(str(tiny_run)), CPU)
    summary = {**json.loads((tiny_run / "summary.json").read_text()), "experiment": "another"}
    words = (adapted.model, adapted.tokenizer, summary, adapted.source.experiment)
    with pytest.raises(UserError, match="a file or a link that no run created"):
        save_final_adapter(run, *words)
    (run / "lora_adapters").unlink()
    (run / "lora_adapters").write_text("a file")
    with pytest.raises(UserError, match="a file or a link that no run created"):
        save_final_adapter(run, *words)
    (run / "lora_adapters").unlink()
    (run / "lora_adapters").mkdir()
    (run / "lora_adapters" / "README.md").symlink_to(victim / "README.md")
    assert (save_final_adapter(run, *words) / "README.md").read_text().startswith("---")
    assert {path: path.read_bytes() for path in victim.iterdir()} == before
    assert sorted(path.name for path in run.iterdir()) == ["lora_adapters"]
