"""`python -m medqa plan`: its table, its JSON, and that a real run has the numbers that it says."""

import json
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState

import train
from medqa.__main__ import main
from medqa.commands.plan import GPUS, find_machine
from medqa.tiny import BASE_DIR
from medqa.training.forecast import shown_seconds
from medqa.training.recorder import read_metrics

SETS = ["training.max_steps=4", "evaluation.rows=4", "evaluation.samples=0", "tracking.wandb=disabled"]
PARTS = ("base", "adapter", "optimizer", "gradients")
# What several tests plan, so that its memory is computed once: an estimate takes a second or two.
FREE = ("--gpu", "24", "--set", "training.padding_free=true", "model.dequantize=auto")
CHECKPOINTED = ("--gpu", "T4", "--set", "model.gradient_checkpointing=true")


KNOWN: dict[tuple[str, ...], dict] = {}  # a plan is a pure function of its words


def planned(capsys, *words: str, exp: str = "exp_002") -> dict:
    words = ("--exp", exp, *words, *(() if "--set" in words else ("--set",)), "training.max_steps=4")
    if words not in KNOWN:
        assert main(["plan", "--tiny", "--json", *words]) == 0
        KNOWN[words] = json.loads(capsys.readouterr().out)
    return KNOWN[words]


def refused(capsys, *words: str) -> str:
    assert main(["plan", "--exp", "exp_002", "--tiny", *words]) == 2
    found = capsys.readouterr()
    assert not found.out
    return found.err


def test_the_table_says_what_is_computed(capsys):
    bfloat16 = ("model.dtype=bfloat16", "training.mixed_precision=bf16")
    assert main(["plan", "--exp", "exp_002", "--tiny", *CHECKPOINTED, "training.max_steps=4", *bfloat16]) == 0
    said = capsys.readouterr().out
    assert "exp_002 on T4: computed, not measured" in said
    for word in (
        "updates",
        "padding",
        "operations",
        "the vendor's 65 TFLOP/s",
        "checkpoint",
        "logits and loss",
        "fits",
    ):
        assert word in said
    assert "mixed precision fp16, weights float16" in said


def test_a_number_of_gib(capsys):
    small, large = planned(capsys, "--gpu", "0.51"), planned(capsys, "--gpu", "24")
    assert small["machine"]["name"] == "a GPU of 0.51 GiB"
    assert large["machine"]["memory"] == 24 * 2**30
    assert small["time"] is None
    assert not small["memory"]["fits"]
    assert large["memory"]["fits"]
    assert large["memory"]["peak"] == small["memory"]["peak"]
    assert small["memory"]["most_tokens"] < small["memory"]["micro_batch"] < large["memory"]["most_tokens"]


def test_the_precision_is_that_of_the_gpu(tiny):
    bfloat16 = tiny("exp_002", "model.dtype=bfloat16", "training.mixed_precision=bf16")
    found = {name: find_machine(bfloat16, name, cpu=False).settings for name in (*GPUS, "16")}
    assert (found["t4"].mixed_precision, found["t4"].dtype) == ("fp16", torch.float16)
    for name in found.keys() - {"t4"}:
        assert (found[name].mixed_precision, found[name].dtype) == ("bf16", torch.bfloat16)
    asked = tiny("exp_002", "model.dtype=float32", "training.mixed_precision=no")
    assert find_machine(asked, "T4", cpu=False).settings.dtype == torch.float32


@pytest.mark.parametrize("gpu", ["rtx", "-3", "0", "nan", "inf", ""])
def test_an_unknown_gpu_is_refused_with_the_known_ones(gpu, capsys):
    said = refused(capsys, f"--gpu={gpu}")
    assert f"--gpu {gpu}: no such GPU; known: {', '.join(GPUS)}, or a number of GiB" in said


def test_other_mistakes_are_refused(capsys, tmp_path):
    assert "--tflops 0: a number above 0" in refused(capsys, "--tflops", "0")
    assert str(tmp_path / "none.csv") in refused(capsys, "--medquad", str(tmp_path / "none.csv"))
    assert "no such directory" in refused(capsys, "--model", str(tmp_path / "none"))
    assert "does not divide" in refused(capsys, "--set", "training.global_batch_size=30")


def test_a_rate_gives_the_time(capsys):
    found = planned(capsys, "--cpu", "--tflops", "0.05", "--set", *SETS, exp="exp_001")
    assert found["time"]["parts"]["updates"] == pytest.approx(found["operations"] / 0.05e12)
    assert found["basis"] == "computed, for this machine"


def test_the_time_is_that_of_the_whole_run(capsys):
    """The baseline, each point of the curve, the final evaluation and the sample answers are counted."""
    sets = ("evaluation.steps=2", "evaluation.rows=4", "evaluation.full_rows=8", "tracking.wandb=offline")
    words = ("--cpu", "--tflops", "0.05", "--set", *sets)
    found = planned(capsys, *words, "evaluation.samples=2")["time"]
    assert list(found["parts"]) == ["start", "baseline", "updates", "evaluations", "final evaluation", "samples"]
    assert found["seconds"] == pytest.approx(sum(found["parts"].values()))
    assert all(seconds > 0 for seconds in found["parts"].values())
    parts = found["parts"]
    assert parts["evaluations"] < 2 * parts["baseline"], "two points of four rows, of the baseline's eight"
    assert 1.3 * parts["baseline"] < parts["final evaluation"] < 3 * parts["baseline"], "eight rows of test, too"
    best = planned(capsys, *words, "evaluation.samples=0", "training.keep=best")["time"]["parts"]
    assert "samples" not in best
    assert best["final evaluation"] == pytest.approx(parts["final evaluation"] + parts["baseline"])


def test_a_cpu_is_timed(capsys):
    """No rate is given: matrix products are timed here, and no time is shown as 0 hours."""
    assert main(["plan", "--exp", "exp_002", "--tiny", "--cpu", "--set", *SETS]) == 0
    said = capsys.readouterr().out
    assert "that matrix products in float32 reach here" in " ".join(said.split()).replace("│ ", "")
    assert "0 hours" not in said


def test_times_are_shown_as_fits():
    assert shown_seconds({"start": 0.4, "updates": 20.3}) == "about 21 s (start < 1 s, updates 20 s)"
    assert shown_seconds({"start": 0.1}) == "about 1 s (start < 1 s)"
    assert shown_seconds({"start": 30.0, "updates": 9000.0}) == "about 2.5 h (start 30 s, updates 2.5 h)"


def test_ways_are_ordered_as_they_must_be(capsys):
    found = planned(capsys, "--gpu", "24")
    ways = {(way["quantization"], way["gradient_checkpointing"]): way for way in found["ways"]}
    assert len(ways) == 4
    assert found["memory"] == ways["4bit", False]
    for checkpointing in (False, True):
        assert ways["4bit", checkpointing]["base"] < ways["none", checkpointing]["base"]
    for bits in ("none", "4bit"):
        assert ways[bits, True]["activations"] < 0.2 * ways[bits, False]["activations"]
        assert ways[bits, True]["most_tokens"] > ways[bits, False]["most_tokens"]
    for way in ways.values():
        inside = max(way["logits_and_loss"], way["inside_a_layer"])
        assert way["peak"] == sum(way[part] for part in (*PARTS, "activations")) + inside


def test_without_padding_there_is_less_to_do(capsys):
    padded = planned(capsys, "--gpu", "24")
    free = planned(capsys, *FREE)
    assert free["padding_free"]
    assert free["run"]["places"] == free["run"]["tokens"] == padded["run"]["tokens"] < padded["run"]["places"]
    assert free["run"]["padding_share"] == 0
    assert 0.4 < free["operations"] / padded["operations"] < 0.7
    assert free["memory"]["micro_batch"] == free["run"]["largest_update"]


def test_without_padding_the_fastest_way_that_fits_is_taken(capsys):
    large = planned(capsys, *FREE)
    assert [way["dequantized"] for way in large["ways"]] == [False] * 4 + [True]
    assert large["memory"]["dequantized"]
    assert not large["memory"]["gradient_checkpointing"]
    small = planned(capsys, "--gpu", "0.53", *FREE[2:])
    assert small["memory"]["gradient_checkpointing"]
    assert small["memory"]["most_tokens"] < large["memory"]["most_tokens"]
    assert large["operations"] < small["operations"]


def test_auto_is_planned_as_it_would_be_chosen(capsys):
    """With padding, so the recipe's own micro-batches decide."""
    auto = ("--set", "model.quantization=auto")
    large, small = planned(capsys, "--gpu", "24", *auto), planned(capsys, "--gpu", "0.51", *auto)
    assert (large["memory"]["quantization"], small["memory"]["quantization"]) == ("none", "4bit")
    assert large["notes"][0].startswith("model.quantization = none, chosen: the run fits without 4-bit weights: ")
    assert small["notes"][0].startswith("model.quantization = 4bit, chosen: the run does not fit without 4-bit")
    for found in (large, small):
        assert [way["quantization"] for way in found["ways"]] == ["none", "none", "4bit", "4bit"]
        assert found["memory"] in found["ways"]


def test_operations_by_hand(capsys):
    """With padding: 4 a weight and place, 6 a trained one, and 12 a pair of places and unit of width."""
    found = planned(capsys, "--gpu", "24")
    config = json.loads((BASE_DIR / "config.json").read_text())
    width, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    kv = width * config["num_key_value_heads"] // config["num_attention_heads"]
    weights = layers * width * (2 * width + 2 * kv + 3 * inner) + width * config["vocab_size"]
    trained = layers * 8 * (4 * width + 2 * (width + kv) + 3 * (width + inner))
    assert found["parameters"]["trainable"] == trained
    places, length = found["run"]["places"], 160
    assert places == 4 * 32 * length
    assert found["operations"] == places * (4 * weights + 6 * trained + 12 * layers * width * length)
    again = planned(capsys, *CHECKPOINTED)
    head = 2 * places * width * config["vocab_size"]
    forward = places * (2 * weights + 2 * trained + 4 * layers * width * length) - head
    assert again["operations"] == found["operations"] + forward


def test_no_weight_is_read(capsys, tmp_path):
    bare = shutil.copytree(BASE_DIR, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    with_weights, without = planned(capsys, "--gpu", "24"), planned(capsys, "--gpu", "24", "--model", str(bare))
    assert without == with_weights


@pytest.mark.parametrize("exp", ["exp_001", pytest.param("exp_002", marks=pytest.mark.slow)])
def test_a_real_run_has_these_numbers(exp, capsys, tmp_path):
    found = planned(capsys, "--cpu", "--set", *SETS, exp=exp)
    words = ["--exp", exp, "--tiny", "--cpu", "--output-dir", str(tmp_path), "--set", *SETS]
    try:
        assert train.main(words) == 0
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    updates = [record for record in read_metrics(tmp_path / "metrics.jsonl") if record["split"] == "train"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(updates) == found["run"]["updates"] == 4
    assert updates[-1]["epoch"] == found["run"]["epochs"]
    assert updates[-1]["tokens_seen"] == found["run"]["target_tokens"]
    assert summary["trainable_parameters"] == found["parameters"]["trainable"]
    assert summary["total_parameters"] == found["parameters"]["base"] + found["parameters"]["trainable"]
    assert summary["gradient_accumulation_steps"] == found["gradient_accumulation_steps"]
    # Each update's share is of its own places: with as many examples in each, tokens over places.
    in_all = [(1 - r["padding_share"], r["tokens"] + r["examples_seen"] / r["step"]) for r in updates]
    assert sum(tokens for _, tokens in in_all) == found["run"]["tokens"]
    places = sum(tokens / share for share, tokens in in_all)
    assert places == pytest.approx(found["run"]["places"])
    assert found["run"]["padding_share"] == pytest.approx(1 - found["run"]["tokens"] / places)
    for name in ("adapter_model.safetensors", "training_state.pt"):
        assert (tmp_path / "checkpoint-4" / name).stat().st_size == found["checkpoint"][name], name
    whole = sum(path.stat().st_size for path in (tmp_path / "checkpoint-4").iterdir())
    assert found["checkpoint"]["total"] < whole < found["checkpoint"]["total"] + 20_000
