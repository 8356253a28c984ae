"""A trained adapter on its base again: which one is found, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from medqa.errors import UserError
from medqa.model.base import adapter_weights
from medqa.results.adapter import find_adapter, load_adapted
from medqa.tiny import BASE_DIR

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
    assert adapted.quantization == "4bit"
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
    best = find_adapter(str(run), "best").step
    path = run / "checkpoint-6" / "state.json"
    for step, said in ((best + 1, "of which no checkpoint was kept"), (0, "the untuned base was best")):
        path.write_text(json.dumps({**json.loads(path.read_text()), "best_step": step}))
        manifest = json.loads((run / "checkpoint-6" / "manifest.json").read_text())
        rewrite_manifest(run / "checkpoint-6", manifest)
        with pytest.raises(UserError, match=said):
            find_adapter(str(run), "best")


def rewrite_manifest(directory: Path, manifest: dict) -> None:
    """A manifest that says the files are right as they are now."""
    from medqa.training.manifest import write_manifest

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
    with pytest.raises(UserError, match="no adapter yet, nor a checkpoint"):
        find_adapter(str(run))


def test_a_run_that_goes_on_is_not_its_old_end(run):
    """More updates under a constant rate: summary and final adapter are those of before until it ends again."""
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("max_steps: 6", "max_steps: 8"))
    source = find_adapter(str(run))
    assert (source.directory, source.step, source.final) == (run / "checkpoint-6", 6, False)


def test_an_adapter_alone(alone, monkeypatch):
    source = find_adapter(str(alone))
    assert (source.run, source.experiment.lora.r, source.experiment.model.base) == (None, 8, str(BASE_DIR))
    adapted = load_adapted(source, CPU)
    assert adapted.quantization == "none"
    with pytest.raises(UserError, match=r"--checkpoint 2: .* is not a run's directory"):
        find_adapter(str(alone), "2")
    with pytest.raises(UserError, match="no such directory; give another with --model"):
        load_adapted(find_adapter(str(alone), base="/nonexistent/base"), CPU)


def test_an_adapter_on_the_hub(alone, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(UserError, match="no such directory, nor an adapter to be had from the hub"):
        find_adapter("someone/adapter")
    place = tmp_path / "hub" / "models--someone--adapter"
    shutil.copytree(alone, place / "snapshots" / "abc")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")
    assert find_adapter("someone/adapter").directory == place / "snapshots" / "abc"


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"use_dora": True}, "it uses use_dora"),
        ({"modules_to_save": ["lm_head"]}, "it uses modules_to_save"),
        ({"rank_pattern": {"q_proj": 4}}, "it uses rank_pattern"),
        ({"fan_in_fan_out": True}, "it uses fan_in_fan_out"),
        ({"peft_type": "PROMPT_TUNING"}, "its peft_type is 'PROMPT_TUNING'"),
        ({"r": "eight"}, "adapter_config.json: r: "),
        ({"bias": "all"}, "adapter_config.json: bias: "),
        ({"base_model_name_or_path": None}, "adapter_config.json: base: "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_adapters_of_another_making_are_refused(changes, said, alone):
    with pytest.raises(UserError, match=said):
        find_adapter(edited(alone, **changes))


@pytest.mark.parametrize("content", ["", "[1]", "{", "[" * 100_000, "\x00"], ids=repr)
def test_damaged_configurations_are_refused(content, alone):
    (alone / "adapter_config.json").write_text(content[:50_000])
    with pytest.raises(UserError, match="cannot be read"):
        find_adapter(str(alone))


def test_pickled_or_foreign_weights_are_refused(alone):
    (alone / "adapter_model.safetensors").rename(alone / "adapter_model.bin")
    with pytest.raises(UserError, match=r"no readable adapter_model.safetensors"):
        load_adapted(find_adapter(str(alone)), CPU)
    (alone / "adapter_model.bin").rename(alone / "adapter_model.safetensors")
    with pytest.raises(UserError, match="this adapter does not fit"):
        load_adapted(find_adapter(edited(alone, r=4)), CPU)


@pytest.mark.parametrize("where", ["/nonexistent", ".", "", "a b/c d", "x" * 300, "no-slash-and-no-directory"])
def test_what_is_neither(where, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"no such directory|neither a run's directory"):
        find_adapter(where)
