"""Model cards are read by the hub as YAML, Markdown and HTML: no name that stands in one becomes any of these."""

import json
import re
from pathlib import Path

import pytest

from medqa.config import Experiment
from medqa.config_file import load_yaml
from medqa.training.before_after import code, front_matter, model_card, plain, public_name

HOSTILE = (
    "med: v2 #x\nlicense: mit\n---\n# Pwned <script>alert(1)</script> `a` | [b](http://evil) \N{PILE OF POO}\udce9"
)
PART = {"loss": 3.2, "perplexity": 24.5, "answer_loss": 3.7, "answer_perplexity": 40.4}
SUMMARY = {"baseline": PART, "final": PART, "test": PART, "updates": 4, "adapter_step": 4, "quantization": "none"}
SUMMARY |= {"mixed_precision": "no", "experiment": "exp_001"}


def header(card: str) -> dict:
    """The front matter as the hub finds it."""
    return load_yaml(re.match(r"---\n(.*?)\n---\n", card, flags=re.DOTALL)[1], "the header")


def test_the_adapters_card_holds_no_place_and_no_markup_of_a_name(tmp_path):
    place = tmp_path / HOSTILE.replace("/", "\N{DIVISION SLASH}").strip("\udce9")
    place.mkdir()
    experiment = Experiment.model_validate({"model": {"base": str(place)}})
    card = model_card({**SUMMARY, "experiment": HOSTILE}, experiment)
    assert header(card) == {
        "library_name": "peft",
        "license": "cc-by-nc-sa-4.0",
        "tags": ["lora", "medical", "question-answering"],
    }
    assert str(tmp_path) not in card
    assert "<script" not in card.replace("\\<", "")
    lines = [line for line in card.splitlines() if "Pwned" in line]
    assert lines == [
        f"# {plain(HOSTILE)}",
        f"A LoRA adapter for a base model in a local directory ({plain(place.name)}), "
        "trained on medical questions and answers with medqa:",
    ]
    named = model_card(SUMMARY, Experiment.model_validate({"model": {"base": "owner/a.model"}}))
    assert header(named)["base_model"] == "owner/a.model"
    assert "A LoRA adapter for `owner/a.model`, trained" in named


@pytest.mark.parametrize(
    "said, name",
    [
        ({"_name_or_path": "TinyLlama/TinyLlama-1.1B-Chat-v1.0"}, "TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
        ({"_name_or_path": "/home/somebody/base"}, None),
        ({"_name_or_path": "~/base"}, None),
        ({"_name_or_path": "base"}, None),
        ({"_name_or_path": "here/base"}, None),  # a local directory with this name exists
        ({"_name_or_path": "a/b\nlicense: mit"}, None),
        ({"_name_or_path": ["a/b"]}, None),
        ({}, None),
        ([], None),
    ],
)
def test_a_local_base_has_the_name_in_its_configuration(said, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "base").mkdir(parents=True)
    (tmp_path / "my-base").mkdir()
    (tmp_path / "my-base" / "config.json").write_text(json.dumps(said))
    for base in (str(tmp_path / "my-base"), "my-base", "./my-base/"):
        card = model_card(SUMMARY, Experiment.model_validate({"model": {"base": base}}))
        assert header(card).get("base_model") == name
        assert str(tmp_path) not in card
        expected = f"`{name}`" if name else "a base model in a local directory (my-base)"
        assert f"A LoRA adapter for {expected}, trained" in card


@pytest.mark.parametrize("value", [HOSTILE, "no", "1e5", "'", "...", "- a", "{{ x }}", "null", "a: b"])
def test_a_header_says_what_it_was_given(value):
    text = front_matter({"name": value, "tags": [value]})
    assert header(text) == {"name": value, "tags": [value]}
    assert text.count("\n---\n") == 1


def test_names_are_shown_and_are_not_markup():
    for shown in (plain(HOSTILE), code(HOSTILE)):
        assert "\n" not in shown
        assert "\N{PILE OF POO}" in shown
        assert "\udce9" not in shown
    assert not re.search(r"(?<!\\)[`<>|\[\]]", plain(HOSTILE))
    assert not set("`|") & set(code(HOSTILE)[1:-1])
    assert plain("exp_001-a.b") == "exp_001-a.b"


def test_a_path_is_no_public_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cached = tmp_path / "hub" / "models--Tiny--Llama-1.1B" / "snapshots" / ("0" * 40)
    for place in (cached, Path("owner") / "here"):
        place.mkdir(parents=True)
    assert public_name(str(cached)) == "Tiny/Llama-1.1B"
    assert public_name("Tiny/Llama-1.1B") == "Tiny/Llama-1.1B"
    assert public_name("gpt2") == "gpt2"
    for place in ("owner/here", str(tmp_path), "~/base", "../base", "./base", "/gone", "a/b/c", HOSTILE):
        assert public_name(place) is None, place
