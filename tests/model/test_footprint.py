"""The memory model against memory: every byte that torch's CPU allocator gave and took in real updates."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from medqa.config import Experiment
from medqa.data.batches import MicroBatch, collate, pack
from medqa.data.sources import Row
from medqa.data.tokens import Example
from medqa.model.attention import SEGMENTED
from medqa.model.base import add_lora, load_base
from medqa.model.loss import LossModel
from medqa.model.memory import Footprint, Line, footprint, optimizer_bytes, tensors_of
from medqa.model.settings import DTYPES, Settings
from medqa.training.loop import train_step
from medqa.training.state import build_optimizer

pytestmark = pytest.mark.usefixtures("own_accelerator")

MODELS = {
    "small": {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5, "vocab_size": 512},
    "wide": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2, "vocab_size": 8000},
    "deep": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "vocab_size": 1000},
}
# model, padding, precision (mixed precision, type of the weights), quantization, checkpointing, optimizer, dequantize
CASES = {
    "small, max_length, fp32": ("small", "max_length", ("no", "float32"), "none", False, "adamw_torch", False),
    "wide, longest, fp32": ("wide", "longest", ("no", "float32"), "none", False, "adamw_torch", False),
    "deep, padding-free, bf16": ("deep", "none", ("bf16", "bfloat16"), "none", False, "adamw_torch", False),
    "deep, padding-free, bf16, checkpointing": (
        "deep", "none", ("bf16", "bfloat16"), "none", True, "paged_adamw_8bit", False,
    ),
    "wide, padding-free, chunks of the head, fp32": (
        "wide", "chunks", ("no", "float32"), "none", True, "adamw_torch", False,
    ),
    "wide, max_length, 4-bit, checkpointing": (
        "wide", "max_length", ("no", "float32"), "4bit", True, "paged_adamw_8bit", False,
    ),
    "deep, padding-free, 4-bit, bf16": ("deep", "none", ("bf16", "bfloat16"), "4bit", False, "adamw_torch", False),
    "wide, padding-free, 4-bit kept expanded": ("wide", "none", ("no", "float32"), "4bit", True, "adamw_torch", True),
    "small, longest, bf16 beside float32 weights": (
        "small", "longest", ("bf16", "float32"), "none", False, "adamw_torch", False,
    ),
}  # fmt: skip
LENGTHS = {"none": (100, 40, 180, 31), "chunks": (256,) * 10}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Llamas with random weights, on disk."""
    places = {}
    for name, sizes in MODELS.items():
        places[name] = tmp_path_factory.mktemp(name)
        config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, **sizes)
        LlamaForCausalLM(config).save_pretrained(places[name])
    return places


def example(length: int, vocabulary: int) -> Example:
    ids = np.random.default_rng(length).integers(3, vocabulary, length).astype(np.int32)
    return Example(Row(f"x:{length}", "x", "q", "a", None), ids, 5, False)


def case(name: str, models: dict[str, Path]) -> tuple[Experiment, Settings, list[MicroBatch]]:
    model, padding, (mixed, dtype), quantization, checkpointing, optimizer, dequantize = CASES[name]
    free = padding in LENGTHS
    experiment = Experiment.model_validate(
        {
            "model": {"base": str(models[model]), "quantization": quantization},
            "tokenization": {"max_length": 256, "padding": "longest" if free else padding},
            "optimizer": {"name": optimizer},
        }
    )
    settings = Settings(
        "cpu",
        mixed,
        DTYPES[dtype],
        quantization,
        attn_implementation=SEGMENTED if free else "sdpa",
        padding_free=free,
        gradient_checkpointing=checkpointing,
        dequantize=dequantize,
    )
    examples = [example(length, 500) for length in LENGTHS.get(padding, (200, 90, 120, 31))]
    if free:
        return experiment, settings, [pack(examples, "all"), pack(examples[1:], "all")]
    tokenization = experiment.tokenization
    return (
        experiment,
        settings,
        [collate(examples, tokenization, 2), collate(examples[1:], tokenization, 2)],
    )


def measured(experiment: Experiment, settings: Settings, batches: list[MicroBatch]) -> int:
    """Bytes of all tensors at the peak of the second update. The profiler sees each that is made and each that goes."""
    accelerator = Accelerator(cpu=True, mixed_precision=settings.mixed_precision)
    base = load_base(experiment.model, settings, torch.device("cpu"), 0, 0)
    adapted = add_lora(base, experiment.lora, 0, settings.fast_lora)
    bare = build_optimizer(adapted, experiment.optimizer)
    scheduler = torch.optim.lr_scheduler.ConstantLR(bare)
    model, optimizer = accelerator.prepare(LossModel(adapted).train(), bare)

    def update() -> None:
        train_step(model, optimizer, scheduler, batches, accelerator=accelerator, seed=0, max_grad_norm=1.0)

    update()
    optimizer.zero_grad()  # of what was made before it began, the profiler does not see that it goes
    there = list(tensors_of(adapted))
    there += [t for state in bare.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in there}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        update()
        optimizer.zero_grad()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert len(events) > 1000
    live = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    assert abs(live[-1]) < 10_000  # an update leaves nothing behind
    return sum(storages.values()) + int(live.max())


def computed(experiment: Experiment, settings: Settings) -> Footprint:
    config = LlamaConfig.from_pretrained(experiment.model.base)
    return footprint(experiment, config, settings)


@pytest.fixture(scope="module")
def peaks() -> dict[str, tuple[Footprint, int, int]]:
    """Of each case measured so far: the footprint, the places of its largest micro-batch, and the peak measured."""
    return {}


LONGER = (
    "wide, longest, fp32",
    "deep, padding-free, 4-bit, bf16",
    "wide, padding-free, 4-bit kept expanded",
)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LONGER)) for n in CASES])
def test_the_peak_is_that_of_the_allocator(name, models, peaks):
    experiment, settings, batches = case(name, models)
    found = computed(experiment, settings)
    peak = measured(experiment, settings, batches)
    places = max(batch.input_ids.numel() for batch in batches)
    peaks[name] = (found, places, peak)
    off = found.peak(places) / peak - 1
    print(f"{name}: {places} places, computed {found.peak(places):,}, measured {peak:,}, {off:+.1%}")
    assert found.peak(places) == pytest.approx(peak, rel=0.05)


def test_the_measurement_tells_configurations_apart(models, peaks):
    """A control: with another case's footprint, or without one of the parts, the comparison above fails."""
    if len(peaks) < len(CASES) - len(LONGER):
        pytest.skip("needs the cases above")
    free, padded = peaks["deep, padding-free, bf16"], peaks["small, max_length, fp32"]
    checkpointed = peaks["deep, padding-free, bf16, checkpointing"]
    for (_, places, peak), (other, _, _) in [(free, checkpointed), (checkpointed, free)]:
        assert other.peak(places) != pytest.approx(peak, rel=0.05)
    found, places, peak = padded
    for part in ("logits_and_loss", "activations"):
        less = replace(found, **{part: Line((1, 2), (0, 0))}, layers=Line((1, 2), (0, 0)))
        assert less.peak(places) != pytest.approx(peak, rel=0.05)
    assert found.peak(places // 2) != pytest.approx(peak, rel=0.05)


def test_what_fits_is_what_the_peak_says(models):
    found = computed(*case("deep, padding-free, bf16", models)[:2])
    for memory in (20_000_000, 100_000_000, 2_000_000_000):
        most = found.most_tokens(memory)
        assert found.peak(most) <= memory < found.peak(most + 1)
    assert found.most_tokens(found.fixed) == 0


def test_a_line_goes_through_its_points():
    line = Line((10, 20, 40), (100, 300, 400))
    assert [line.at(tokens) for tokens in (5, 10, 15, 20, 30, 40, 60, 0)] == [0, 100, 200, 300, 350, 400, 500, 0]


def test_all_layers_follow_from_two(models):
    """Exactly what running all of them gives, in every part."""
    experiment, settings, _ = case("deep, padding-free, 4-bit, bf16", models)
    found = computed(experiment, settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("medqa.model.memory.DEPTH", 4)
        whole = computed(experiment, settings)
    assert whole.layers.at(1000) == pytest.approx(found.layers.at(1000), rel=1e-3)
    assert whole.logits_and_loss.at(1000) == pytest.approx(found.logits_and_loss.at(1000), rel=1e-3)
    assert replace(whole, layers=found.layers, logits_and_loss=found.logits_and_loss) == found


def test_optimizer_state_is_what_the_optimizers_keep():
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in ((8, 500), (8, 513), (8, 2048))]
    for name in ("adamw_torch", "paged_adamw_8bit"):
        settings = Experiment.model_validate({"optimizer": {"name": name}}).optimizer
        optimizer = build_optimizer(torch.nn.ParameterList(parameters), settings)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        kept = [t for state in optimizer.state.values() for key, t in state.items() if torch.is_tensor(t)]
        kept = [t for t in kept if t.numel() != 256 or t.dtype != torch.float32]  # one table for all parameters
        assert optimizer_bytes(parameters, settings) == sum(t.numel() * t.element_size() for t in kept)


def test_nothing_is_made_of_the_shapes(models):
    """A model of a hundred gigabytes is as quick to plan for as a small one."""
    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
    )
    settings = Settings(
        "cuda",
        "bf16",
        torch.bfloat16,
        attn_implementation=SEGMENTED,
        padding_free=True,
        gradient_checkpointing=True,
    )
    found = footprint(Experiment(), config, settings)
    layer = 8192 * (2 * 8192 + 2 * 1024 + 3 * 28672 + 2)
    assert found.base == pytest.approx(2 * (80 * layer + 2 * 32000 * 8192 + 8192), rel=1e-6)
    # With checkpointing each layer keeps its input.
    assert found.activations.at(2000) - found.activations.at(1000) == pytest.approx(82 * 1000 * 8192 * 2, rel=0.05)
