"""How a run computes its updates: what is decided, what the probe finds, what a resume keeps, and what is said."""

import json
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from launching import SECONDS
from safetensors.numpy import load, save
from transformers import AutoTokenizer, OlmoConfig, OlmoForCausalLM

from harness.parts import Observer, Parts, build
from harness.processes import Forked
from medqa import cache
from medqa.config_file import dump_yaml, load_experiment, load_yaml
from medqa.data import tokens
from medqa.data.batches import pack
from medqa.data.sources import Row
from medqa.model import attention
from medqa.model import device as memory
from medqa.model.attention import SEGMENTED
from medqa.model.base import check_model, load_base, load_tokenizer
from medqa.model.loss import summed_loss
from medqa.model.memory import enough_tokens, fit_to_memory, footprint
from medqa.model.settings import KEPT, Settings, resolve_settings
from medqa.tiny import BASE_DIR
from medqa.training import batches
from medqa.training.batches import Batches, find_micro_batch_tokens, full, most_in_an_update
from medqa.training.run import with_first_reason
from medqa.training.run_dir import CONFIG
from medqa.training.state import PROGRESS, Progress
from train import main

SHORT = (
    "training.padding_free=true", "training.max_steps=4", "training.save_steps=2", "training.global_batch_size=8",
    "evaluation.steps=2", "evaluation.rows=4", "evaluation.samples=0", "tokenization.max_length=64",
    "tracking.wandb=disabled", "model.quantization=none",
)  # fmt: skip
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB."


@pytest.fixture(autouse=True)
def apart():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def words(directory: Path, *sets: str, exp: str = "exp_002", options: tuple[str, ...] = ()) -> list[str]:
    return ["--exp", exp, "--tiny", "--cpu", "--output-dir", str(directory), *options, "--set", *SHORT, *sets]


def state(directory: Path, step: int):
    return PROGRESS.validate_json((directory / f"checkpoint-{step}" / "state.json").read_bytes())


def in_effect(directory: Path) -> dict:
    return load_yaml((directory / CONFIG).read_text(), "config.yaml")["in_effect"]


def summary(directory: Path) -> dict:
    return json.loads((directory / "summary.json").read_text())


# --- a run


def test_a_run_says_what_was_decided_and_keeps_it(tmp_path, capsys):
    directory = tmp_path / "run"
    assert main(words(directory, "model.quantization=4bit", "model.dequantize=auto", exp="exp_003")) == 0
    said = capsys.readouterr().out
    assert "padding-free, as many examples as memory allows" in said
    assert "model.gradient_checkpointing: true -> false (the estimate without it is " in said
    assert "model.dequantize: auto -> once, and kept so (the estimate with dequantized weights is " in said
    most = state(directory, 4).micro_batch_tokens
    assert f"padding-free micro-batches of at most {most:,} tokens: the largest possible batch fits" in said
    assert summary(directory)["micro_batch_tokens"] == most
    assert summary(directory)["quantization"] == "4bit"
    settings = json.loads((directory / "checkpoint-4" / "manifest.json").read_text())["environment"]["settings"]
    assert settings["padding_free"]
    assert settings["dequantize"]
    assert not settings["gradient_checkpointing"]
    assert settings["attn_implementation"] == "medqa_segmented"
    assert {"model.gradient_checkpointing", "model.dequantize"} <= in_effect(directory).keys()
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert {r["padding_share"] for r in records if r["split"] == "train"} == {0.0}
    assert json.loads((directory / "data_report.json").read_text())["padding_share"] == 0.0


def test_time_to_the_first_update_is_told_by_phase(tmp_path, capsys):
    directory = tmp_path / "run"
    assert main(words(directory)) == 0
    phases = summary(directory)["start_s"]
    assert list(phases) == ["imports", "data", "model", "start", "probe", "evaluation", "first update"]
    assert all(seconds >= 0 for seconds in phases.values())
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("startup ")]
    assert all(phase in line for phase in phases)


def test_a_family_that_was_not_tested_runs_plainly_and_says_so(tmp_path, capsys):
    """OLMo's layers have Llama's names, and its gradients may well be right; nobody has looked."""
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    torch.manual_seed(0)
    config = OlmoConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    OlmoForCausalLM(config).save_pretrained(tmp_path / "olmo")
    tokenizer.save_pretrained(tmp_path / "olmo")
    directory = tmp_path / "run"
    assert main(words(directory, options=("--model", str(tmp_path / "olmo")))) == 0
    said = capsys.readouterr().out
    why = "olmo models have not been tested without padding, only llama, mistral, qwen2, qwen3, gemma, gemma3_text"
    assert f"training.padding_free: true -> false ({why}" in said
    assert in_effect(directory)["training.padding_free"] == {"asked": "true", "used": "false", "reason": why}
    assert summary(directory)["micro_batch_tokens"] is None
    assert "micro-batches of at most" not in said


# --- kernels


@pytest.fixture
def one_kernel(monkeypatch):
    """A stand-in, on a CPU, for the kernel that does all segments at once; it notes whether gradients were on."""
    calls = []

    def kernel(query, key, value, scaling, bounds, longest):
        calls.append(torch.is_grad_enabled())
        lengths = bounds.diff().tolist()
        assert max(lengths) == longest
        parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
        return torch.cat([
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
            .transpose(1, 2)
            for q, k, v in parts
        ], dim=1)  # fmt: skip

    monkeypatch.setattr(attention, "_varlen", kernel)
    return calls


def test_one_kernel_for_all_segments_is_tried_before_the_model_runs_and_then_used(one_kernel, monkeypatch, parts):
    """Tried under `no_grad` too, where it has gradients all the same; within a forward it is only looked up."""
    packed = parts.packed(0, 300)
    expected = gradients(parts, packed)
    assert one_kernel == []
    with torch.no_grad():
        assert attention._varlen_works(torch.device("cpu"), torch.float32)
    assert one_kernel == [True]
    monkeypatch.setattr(attention, "VARLEN", {("cpu", torch.float32)})
    found = gradients(parts, packed)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(found, expected, strict=True))
    layers = len(parts.base.model.layers)
    assert len(one_kernel) == 1 + len(packed) * layers
    parts.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = gradients(parts, packed)
    assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))
    assert len(one_kernel) == 1 + 3 * len(packed) * layers


def gradients(parts: Parts, packed: list) -> list[torch.Tensor]:
    """Of one update, after which the weights are put back."""
    parts.model.train()
    trained = [parameter for parameter in parts.adapted.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in trained]
    parts.step(packed)
    with torch.no_grad():
        for parameter, kept_value in zip(trained, before, strict=True):
            parameter.copy_(kept_value)
    return [parameter.grad.clone() for parameter in trained]


def test_a_kernel_that_is_wrong_is_not_used(one_kernel, monkeypatch):
    right = attention._varlen
    monkeypatch.setattr(attention, "_varlen", lambda *given: 1.1 * right(*given))
    assert not attention._varlen_works(torch.device("cpu"), torch.float32)

    def unbuilt(*given):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(attention, "_varlen", unbuilt)
    assert not attention._varlen_works(torch.device("cpu"), torch.float32)

    def full(*given):
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr(attention, "_varlen", full)
    with pytest.raises(torch.OutOfMemoryError):
        attention._varlen_works(torch.device("cpu"), torch.float32)


def test_a_containers_limit_counts_and_the_files_it_has_read_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    free = memory.available_memory(torch.device("cpu"))
    stat = "file 700\ninactive_file 600"
    for name, text in (("memory.max", "1000"), ("memory.current", "900"), ("memory.stat", stat)):
        (tmp_path / name).write_text(text + "\n")
    assert memory.available_memory(torch.device("cpu")) == int(0.9 * 700)
    assert memory.available_memory(torch.device("cpu"), sharing=2) == int(0.9 * 350)
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_memory(torch.device("cpu")) == pytest.approx(free, rel=0.2)


# --- how many tokens


@pytest.fixture
def parts(tiny) -> Parts:
    return build(tiny("exp_001", "model.quantization=none", "training.padding_free=true", "tokenization.max_length=64"))


def find(parts: Parts, planned: int = 10**9) -> int:
    return find_micro_batch_tokens(parts.model, parts.stream.examples, parts.experiment, parts.accelerator, planned)


def limited(monkeypatch, most: int) -> list[int]:
    """Micro-batches of more tokens do not fit; the sizes tried."""
    tried = []

    def tries(model, micro_batch, device):
        tried.append(micro_batch.tokens)
        if micro_batch.tokens > most:
            raise torch.OutOfMemoryError(FULL)
        return summed_loss(model, micro_batch, device)

    monkeypatch.setattr(batches, "summed_loss", tries)
    return tried


HELD = """
import sys
import psutil, torch
from medqa.model.device import return_freed_memory
returned = sys.argv[1] == "yes" and return_freed_memory()
for size in range(1, 24):
    del_me = torch.ones(size * 2**18)  # a freed block of 1 to 24 MiB raises glibc's threshold
del del_me
before = psutil.Process().memory_info().rss
blocks = [torch.ones(2**19 + 2**16 * (i % 2)) for i in range(64)]  # 2 MiB and 2.25 MiB in turn
kept = blocks[1::2]
del blocks
print(returned, (psutil.Process().memory_info().rss - before) / 2**20, sum(t.nbytes for t in kept) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")
def test_freed_memory_is_returned_where_asked(tmp_path):
    script = tmp_path / "held.py"
    script.write_text(HELD)

    def run(asked: str, **variables: str) -> tuple[str, float, float]:
        log = tmp_path / f"{asked}-{len(variables)}.log"
        assert Forked([asked], log, variables, script).wait(SECONDS) == 0, log.read_text()
        returned, grown, kept = log.read_text().split()
        return returned, float(grown), float(kept)

    returned, grown, kept = run("yes")
    assert returned == "True"
    assert grown < kept + 8
    returned, grown, kept = run("no")
    assert returned == "False"
    assert grown > kept + 32  # the control: half of the blocks were freed and stay
    assert run("yes", MALLOC_MMAP_THRESHOLD_="33554432")[0] == "False"  # what the user has set stands


@pytest.mark.parametrize("exp, free", [("exp_004", True), ("exp_002", False)])
def test_memory_is_returned_only_where_what_is_kept_would_not_fit(tiny, exp, free):
    experiment = tiny(exp, "model.quantization=none", "model.gradient_checkpointing=false")
    model_config, settings = check_model(experiment.model, 512), resolve_settings(experiment, cpu=True)
    asked = replace(settings, padding_free=free, evaluation_padding_free=True, attn_implementation=SEGMENTED)
    planned = footprint(experiment, model_config, asked, 1024)
    tokens = enough_tokens(experiment, "cpu")
    if not free:
        tokens = experiment.training.per_device_batch_size * experiment.tokenization.max_length

    def chosen(memory: int, *sets: str) -> Settings:
        recipe = load_experiment(exp, tiny=True, sets=["model.quantization=none", *sets])
        return fit_to_memory(settings, recipe, model_config, 1024, memory)

    assert planned.peak(tokens) < planned.resident(tokens) < 2 * planned.peak(tokens)
    ample = chosen(planned.resident(tokens), "model.gradient_checkpointing=false")
    short = chosen(planned.resident(tokens) - 1, "model.gradient_checkpointing=false")
    assert (ample.return_memory, ample.gradient_checkpointing) == (False, False)
    assert (short.return_memory, short.gradient_checkpointing) == (True, False)
    if not free:
        assert chosen(2**40, "model.gradient_checkpointing=true").return_memory


def test_the_probe_tries_the_longest_micro_batch_and_then_less(parts, monkeypatch):
    tried = limited(monkeypatch, 300)
    assert find(parts) == 256
    assert tried == [1024, 512, 256]
    assert all(p.grad is None for p in parts.adapted.parameters())
    assert parts.model.training


def test_the_probe_ends_at_the_longest_example(parts, monkeypatch):
    tried = limited(monkeypatch, 0)
    longest = max(len(example.input_ids) for example in parts.stream.examples)
    assert find(parts) == longest
    assert tried[-1] > longest


def test_the_probe_takes_no_more_than_memory_has_room_for(parts, monkeypatch):
    """What was used is more than may be: the next try is as much smaller."""
    monkeypatch.setattr(batches, "available_memory", lambda device, sharing: 10 * 2**20)
    used = iter([0, 100 * 2**20, 0, 8 * 2**20])
    monkeypatch.setattr(batches, "peak_memory", lambda device: type("M", (), {"allocated": next(used)}))
    monkeypatch.setattr(batches, "optimizer_bytes", lambda parameters, optimizer: 2 * 2**20)  # that comes later
    tried = limited(monkeypatch, 10**9)
    assert find(parts) == tried[-1] == int(0.9 * 8 / 100 * 1024)


def test_on_a_cpu_nothing_is_tried_that_the_plan_has_no_room_for(parts, monkeypatch):
    tried = limited(monkeypatch, 10**9)
    assert find(parts, planned=200) == 200
    assert tried == [200]


def test_a_full_micro_batch_has_exactly_so_many_tokens(parts):
    example = parts.stream.examples[0]
    for tokens_wanted in (len(example.input_ids), 200, 1024):
        assert full(example, tokens_wanted).tokens == tokens_wanted
    lengths = sorted(len(e.input_ids) for e in parts.stream.examples)
    assert most_in_an_update(parts.stream.examples, 3) == sum(lengths[-3:])
    assert most_in_an_update(parts.stream.examples, len(lengths) + 1) == sum(lengths) + lengths[-1]


def test_tokens_that_the_user_gives_are_not_tried(tmp_path, capsys, monkeypatch):
    tried = limited(monkeypatch, 0)
    assert main(words(tmp_path / "run", "training.micro_batch_tokens=100")) == 0
    assert tried == []
    assert "at most 100 tokens: set by training.micro_batch_tokens" in capsys.readouterr().out
    assert state(tmp_path / "run", 4).micro_batch_tokens == 100


def test_tokens_that_have_no_effect_are_told_of(tmp_path, capsys):
    assert main(words(tmp_path / "run", "training.padding_free=false", "training.micro_batch_tokens=100")) == 0
    said = capsys.readouterr().out
    assert "training.micro_batch_tokens has no effect with padding" in said
    assert f"adapter in {tmp_path / 'run' / 'lora_adapters'}" in said


def test_a_resume_keeps_the_tokens_and_the_result(tmp_path, capsys, monkeypatch):
    """Stopped after update 2 on a machine with less memory, continued on one with more: bit for bit the same."""
    first, straight = tmp_path / "first", tmp_path / "straight"
    limited(monkeypatch, 300)
    assert main(words(straight)) == 0
    calls = []
    monkeypatch.setattr(
        "medqa.training.stopping.Stopper.within", lambda self, seconds: len(calls) == 1 or calls.append(1)
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(words(first, options=("--stop-after", "1d"))) == 0
    assert [path.name for path in first.glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.undo()
    tried = limited(monkeypatch, 10**9)
    capsys.readouterr()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(words(first)) == 0
    assert tried == []
    assert "micro-batches of at most 256 tokens: the size with which the run began" in capsys.readouterr().out
    for name in ("lora_adapters/adapter_model.safetensors", "checkpoint-4/training_state.pt"):
        assert (first / name).read_bytes() == (straight / name).read_bytes()


def test_a_run_that_goes_on_may_be_given_fewer_tokens_and_not_more(tmp_path, capsys):
    """What an out-of-memory of one of several processes tells the user to do."""
    directory = tmp_path / "run"
    assert main(words(directory, "training.max_steps=2", exp="exp_001")) == 0
    before = state(directory, 2).micro_batch_tokens
    for step, given, told in (
        (3, before + 500, "the size with which the run began"),
        (4, 90, "set by training.micro_batch_tokens"),
    ):
        AcceleratorState._reset_state(reset_partial_state=True)
        sets = (f"training.max_steps={step}", f"training.micro_batch_tokens={given}")
        assert main(words(directory, *sets, exp="exp_001")) == 0
        assert told in capsys.readouterr().out
        assert state(directory, step).micro_batch_tokens == min(before, given)
    assert summary(directory)["not_bitwise"] == [
        {"after_step": 3, "changed": [f"micro_batch_tokens {before} before, 90 now"]}
    ]


def test_out_of_memory_later_halves_the_tokens(tmp_path, capsys, monkeypatch):
    tried = []

    def tries(model, micro_batch, device):
        tried.append(micro_batch.tokens)
        if len(tried) == 2:
            raise torch.OutOfMemoryError(FULL)
        return summed_loss(model, micro_batch, device)

    monkeypatch.setattr("medqa.training.loop.summed_loss", tries)
    assert main(words(tmp_path / "run", "lora.lora_dropout=0.0")) == 0
    assert f"update 2: out of memory with {tried[1]} tokens in a micro-batch; " in capsys.readouterr().out
    assert max(tried[2:]) <= -(-tried[1] // 2)
    assert summary(tmp_path / "run")["micro_batch_tokens"] == -(-tried[1] // 2)


def test_where_the_longest_row_alone_does_not_fit_the_run_ends(tmp_path, capsys, monkeypatch):
    def tries(model, micro_batch, device):
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr("medqa.training.loop.summed_loss", tries)
    assert main(words(tmp_path / "run")) == 3
    assert "with a single example in the micro-batch; lower tokenization.max_length" in capsys.readouterr().err


@pytest.mark.parametrize(
    "planned, room, tries, said",
    [
        (10**9, 10**9, [1024], "1,024 tokens: the largest possible batch fits"),
        (10**9, 300, [1024, 512, 256], "256 tokens: the largest that fits; 1,024 do not fit"),
        (
            10**9,
            0,
            [1024, 512, 256, 128],
            "64 tokens: equal to the longest example; larger batches, up to 1,024",
        ),
        (10, 10**9, [], "64 tokens: equal to the longest example (no probe needed)"),
    ],
)
def test_what_is_said_of_the_tokens_is_what_was_done(planned, room, tries, said, parts, monkeypatch):
    tried, told, chosen = limited(monkeypatch, room), [], Progress()
    assert max(len(example.input_ids) for example in parts.stream.examples) == 64
    probe(parts, replace(parts.settings, planned_tokens=planned), chosen, told.append)
    assert tried == tries
    (line,) = told
    assert f"micro-batches of at most {said}" in line


def probe(parts: Parts, settings: Settings, progress: Progress, say: Callable[[str], None]) -> None:
    batches = Batches(parts.stream, parts.experiment, parts.tokenizer.pad_token_id, progress, parts.accelerator)
    batches.probe(parts.model, settings, Observer(parts.experiment, parts.accelerator, Path(), say=say))


def test_two_processes_agree_on_the_smaller(parts, monkeypatch):
    """The other one has room for 128."""
    monkeypatch.setattr(type(parts.accelerator), "num_processes", property(lambda self: 2))
    monkeypatch.setattr(parts.accelerator, "gather", lambda found: torch.cat([found, torch.tensor([128])]))
    chosen = Progress()
    probe(parts, parts.settings, chosen, lambda said: None)
    assert (chosen.micro_batch_tokens, chosen.micro_batch_multiple) == (128, 2)


# --- 4-bit weights only where nothing else fits: `model.quantization: auto`


def test_auto_takes_4_bit_weights_only_where_the_run_would_not_fit_without(tiny):
    experiment = tiny("exp_004", "model.quantization=auto")
    model_config, settings = check_model(experiment.model, 512), resolve_settings(experiment, cpu=True)
    assert settings.quantization == "auto"
    tokens, longest = enough_tokens(experiment, "cpu"), experiment.tokenization.max_length
    assert longest < tokens
    asked = replace(settings, padding_free=True, evaluation_padding_free=True, attn_implementation=SEGMENTED)

    def peak(checkpointing: bool, size: int) -> int:
        way = replace(asked, quantization="none", gradient_checkpointing=checkpointing)
        return footprint(experiment, model_config, way, 1024).peak(size)

    def chosen(memory: int) -> tuple[str, bool, bool]:
        found = fit_to_memory(settings, experiment, model_config, 1024, memory)
        requested, used, why = found.changes["model.quantization"]
        assert (requested, used) == ("auto", found.quantization)
        assert ("does not fit" in why) == (used == "4bit"), why
        return found.quantization, found.gradient_checkpointing, found.dequantize

    large, small = peak(False, tokens), peak(True, longest)
    assert small < peak(True, tokens) < large
    assert chosen(large) == ("none", False, False)
    assert chosen(large - 1) == ("none", True, False)
    assert chosen(small) == ("none", True, False)  # slower micro-batches come before 4 bits
    assert chosen(small - 1)[::2] == ("4bit", False)  # never dequantized: that needs the memory of unquantized weights
    assert chosen(1) == ("4bit", True, False)


def test_auto_in_a_recipe_with_padding_counts_the_micro_batches_of_the_recipe(tiny):
    experiment = tiny("exp_003", "model.quantization=auto")
    model_config, settings = check_model(experiment.model, 512), resolve_settings(experiment, cpu=True)
    plain = replace(settings, quantization="none", gradient_checkpointing=True)
    tokens = experiment.training.per_device_batch_size * experiment.tokenization.max_length
    needed = footprint(experiment, model_config, plain, 1024).peak(tokens)
    for room, used in ((needed, "none"), (needed - 1, "4bit")):
        found = fit_to_memory(settings, experiment, model_config, 1024, room)
        assert (found.quantization, found.gradient_checkpointing) == (used, True)  # checkpointing as it is written
        assert f"with gradient checkpointing is {needed / 2**30:.2f} GiB" in found.changes["model.quantization"][2]


def test_auto_where_4_bit_is_not_available(tiny, monkeypatch):
    monkeypatch.setattr("medqa.model.settings.four_bit_unavailable", lambda device, dtype: "no 4-bit here")
    experiment = tiny("exp_003", "model.quantization=auto")
    found = fit_to_memory(resolve_settings(experiment, cpu=True), experiment, check_model(experiment.model, 512), 99, 1)
    assert found.quantization == "none"
    assert found.changes["model.quantization"] == ("auto", "none", "no 4-bit here")


@pytest.mark.parametrize(
    "asked, first, later, used",
    [("auto", 2**40, 1, "none"), ("auto", 1, 2**40, "4bit"), ("4bit", 2**40, 2**40, "4bit")],
    ids=["room at the start", "room later", "a run from before auto"],
)
def test_a_resumed_run_keeps_what_it_chose(asked, first, later, used, tmp_path, capsys, monkeypatch):
    directory = tmp_path / "run"
    padded = ("training.padding_free=false", "training.save_steps=1", "training.log_steps=1")

    def run(quantization: str, memory: int, updates: int) -> int:
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setattr("train.available_memory", lambda device, processes: memory)
        sets = (*padded, f"model.quantization={quantization}", f"training.max_steps={updates}")
        return main(words(directory, *sets, exp="exp_003"))

    assert run(asked, first, 1) == 0
    if asked == "auto":
        reason = in_effect(directory)["model.quantization"]["reason"]
        assert ("does not fit" in reason) == (used == "4bit")
        assert f"model.quantization: auto -> {used} ({reason})" in capsys.readouterr().out
        assert (summary(directory)["quantization"], summary(directory)["quantization_reason"]) == (used, reason)
    for updates in (2, 3):  # the reason does not grow
        assert run("auto", later, updates) == 0
        kept = f"{reason} (as in the checkpoint)" if asked == "auto" else KEPT
        assert in_effect(directory)["model.quantization"] == {"asked": "auto", "used": used, "reason": kept}
        assert summary(directory)["quantization_reason"] == kept
    settings = json.loads((directory / "checkpoint-3" / "manifest.json").read_text())["environment"]["settings"]
    assert settings["quantization"] == summary(directory)["quantization"] == used
    assert summary(directory)["not_bitwise"] == []
    other = "none" if used == "4bit" else "4bit"
    assert run(other, later, 4) == 2
    assert f"model.quantization: 'auto' there, '{other}' now" in capsys.readouterr().err


FIRST = {"asked": "auto", "used": "none", "reason": "it fits"}


@pytest.mark.parametrize(
    "found, expected",
    [
        ({"in_effect": {"model.quantization": FIRST}}, "it fits (as in the checkpoint)"),
        ({"in_effect": {"model.quantization": FIRST | {"reason": "a\nb\x1b"}}}, r"a b\x1b (as in the checkpoint)"),
        ({"in_effect": {"model.quantization": FIRST | {"reason": KEPT}}}, KEPT),
        ({"in_effect": {"model.quantization": FIRST | {"used": "4bit"}}}, KEPT),
        ({"in_effect": {"model.quantization": FIRST | {"reason": 1}}}, KEPT),
        ({"in_effect": {"model.quantization": FIRST | {"reason": "x" * 9999}}}, KEPT),
        ({"in_effect": {"model.quantization": "none"}}, KEPT),
        ({"in_effect": [1]}, KEPT),
        ("{", KEPT),
        (None, KEPT),
    ],
)
def test_the_first_reason_of_a_damaged_configuration_is_left_out(found, expected, tmp_path):
    config = tmp_path / CONFIG
    if isinstance(found, str):
        config.write_text(found)
    elif found is not None:
        dump_yaml(found, config)
    changes = {"model.quantization": ("auto", "none", KEPT), "model.dtype": ("bfloat16", "float32", KEPT)}
    wanted = {**changes, "model.quantization": ("auto", "none", expected)}
    assert with_first_reason(changes, config) == wanted
    changed = {"model.quantization": ("auto", "none", "4-bit is not available here")}
    assert with_first_reason(changed, config) == changed


# --- 4-bit weights, expanded


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_expanded_weights_give_the_same_bits(tiny, dtype):
    """Output and gradients, with and without autocast."""
    experiment = tiny("exp_001", "model.dtype=bfloat16")
    settings = resolve_settings(experiment, cpu=True)
    settings = replace(settings, mixed_precision="bf16", dtype=getattr(torch, dtype))
    found = []
    for dequantize in (False, True):
        found_settings = replace(settings, padding_free=True, dequantize=dequantize)
        base = load_base(experiment.model, found_settings, torch.device("cpu"), 1024, 0)
        kinds = {type(module).__name__ for module in base.modules() if isinstance(module, torch.nn.Linear)}
        assert ("Linear4bit" in kinds) == (not dequantize)
        assert not any(parameter.requires_grad for parameter in base.parameters())
        embedded = base.get_input_embeddings()(torch.arange(3, 90)[None]).detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = base(inputs_embeds=embedded).logits
        found.append((logits.detach(), torch.autograd.grad(logits.float().square().sum(), embedded)[0]))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][1].any()


# --- token ids on disk


@pytest.fixture
def rows():
    return [
        Row(f"medquad:{i}", "medquad", f"What is number {i} ?", f"It is {i} </s> and {i + 1}.", None) for i in range(8)
    ]


@pytest.fixture
def kept(tmp_path, monkeypatch, tiny, rows):
    """Tokenizes with the cache on; counts how often the tokenizer was really asked."""
    monkeypatch.setenv("MEDQA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tokens, "WORTH_KEEPING", 1)
    made, real = [], tokens._tokenize
    monkeypatch.setattr(tokens, "_tokenize", lambda *given: made.append(1) or real(*given))
    tokenizer = load_tokenizer(str(BASE_DIR))

    def tokenize(rows=rows, **settings):
        tokenization = tiny("exp_001").tokenization.model_copy(update=settings)
        examples = tokens.tokenize(rows, tokenizer, tokenization)
        return [(e.input_ids.tolist(), e.answer_start, e.truncated) for e in examples], len(made)

    return tokenize


def files(tmp_path) -> list[Path]:
    return sorted((tmp_path / "cache" / "tokens").iterdir())


def test_a_second_start_does_not_tokenize_again(kept, tmp_path):
    first, asked = kept()
    assert asked == 1
    assert kept() == (first, 1)
    just = max(answer_start for _, answer_start, _ in first) + 1
    shorter, asked = kept(max_length=just)  # cut after the ids are read
    assert asked == 1
    assert len(shorter) == len(first)
    assert all(len(ids) == just and truncated for ids, _, truncated in shorter)
    assert len(files(tmp_path)) == 1


WRONG = {
    "short lengths": lambda ids, lengths, in_prompt: {"lengths": lengths[:-1]},
    "no ids": lambda ids, lengths, in_prompt: {"ids": None},
    "another array": lambda ids, lengths, in_prompt: {"more": lengths},
    "beyond the vocabulary": lambda ids, lengths, in_prompt: {"ids": ids + 10**6},
    "negative ids": lambda ids, lengths, in_prompt: {"ids": -ids},
    "other ids": lambda ids, lengths, in_prompt: {"ids": ids[::-1].copy()},
    "negative lengths": lambda ids, lengths, in_prompt: {"lengths": -lengths},
    "lengths that cancel": lambda ids, lengths, in_prompt: {"lengths": lengths + np.array([-99, 99] * 4, np.int32)},
    "lengths in two dimensions": lambda ids, lengths, in_prompt: {"lengths": lengths.reshape(2, -1)},
    "ids as fractions": lambda ids, lengths, in_prompt: {"ids": ids.astype(np.float32)},
    "no ids at all": lambda ids, lengths, in_prompt: {"ids": ids[:0]},
    "negative prompts": lambda ids, lengths, in_prompt: {"in_prompt": in_prompt * 0 - 5},
    "prompts longer than rows": lambda ids, lengths, in_prompt: {"in_prompt": lengths + 1},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_whole_file_of_other_content_is_made_again(kept, tmp_path, name):
    """Its checksum is right; what it says cannot be, or is not, the ids of these texts."""
    first, _ = kept()
    (path,) = files(tmp_path)
    good = load(path.read_bytes())
    changed = {key: array for key, array in {**good, **WRONG[name](**good)}.items() if array is not None}
    path.write_bytes(save(changed, metadata={cache.CHECKSUM: cache._checksum(changed)}))
    assert kept() == (first, 2)
    assert load(path.read_bytes()).keys() == good.keys()
    assert kept() == (first, 2)


@pytest.mark.parametrize("metadata", [b"null", b"[]", b'{"sha256": "x"}'])
def test_a_file_with_an_odd_header_is_made_again(kept, tmp_path, metadata):
    first, _ = kept()
    (path,) = files(tmp_path)
    header = b'{"__metadata__":%b,"ids":{"dtype":"I32","shape":[0],"data_offsets":[0,0]}}' % metadata
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert kept() == (first, 2)
    assert kept() == (first, 2)


def test_other_texts_are_other_ids(kept, rows, tmp_path):
    kept()
    changed = [*rows[:-1], Row("medquad:7", "medquad", "What?", "Another answer.", None)]
    assert kept(changed)[1] == 2
    assert len(files(tmp_path)) == 2


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "another's"])
def test_a_damaged_file_is_made_again(kept, tmp_path, damage):
    first, _ = kept()
    (path,) = files(tmp_path)
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-3] ^= 1
    path.write_bytes({"cut": content[:-9], "flipped": content, "empty": b"", "another's": b"\x80\x04pickle."}[damage])
    assert kept() == (first, 2)
    assert kept() == (first, 2)


def test_where_nothing_can_be_kept_it_works_all_the_same(kept, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder would be")
    first, asked = kept()
    assert (asked, kept()) == (1, (first, 2))


def test_no_more_than_so_many_files_are_kept(tmp_path, monkeypatch):

    monkeypatch.setenv("MEDQA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "KEPT_FILES", 3)
    for i in range(5):
        cache.cached(f"key{i}", lambda: {"a": np.arange(3)})
        cache.cached("key0", lambda: {"a": np.arange(3)})  # used again and again
    assert len(files(tmp_path)) == 3
    assert (tmp_path / "cache" / "tokens" / "key0.safetensors").exists()


def test_an_answer_that_begins_inside_a_token_counts_from_there(kept, rows, monkeypatch):
    """Where a prompt's ids alone are not how the text's ids begin, places in the text decide."""
    kept()
    tokenizer = load_tokenizer(str(BASE_DIR))
    monkeypatch.setattr(tokens.Prompt, "aliased", lambda self, question: f"Q {question} A: o")
    joined = [Row(row.id, row.source, row.question, "ne" + row.answer, None) for row in rows]
    examples, _ = kept(joined)
    for ids, start, _ in examples:
        before = tokenizer.decode(ids[1:start])
        assert "Q What" in before
        assert not before.endswith("one")


def test_packing_needs_no_padding_token_at_all(parts):
    packed = pack(parts.examples["train"][:4], "all")
    assert packed.input_ids.numel() == sum(packed.segments) == packed.tokens
