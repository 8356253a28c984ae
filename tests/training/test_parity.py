"""Parity with HF `Trainer`, which the original experiments used: figures of every update, and the weights they give.

The same rows in the same order, the same initial adapter, dropout 0, a pre-trained base, real 4-bit weights and the
real 8-bit optimizer. `Trainer` batches, masks, normalizes, clips, steps and schedules in its own way.
"""

from pathlib import Path

import pytest
import torch
from moved import apart, initial_adapter

from harness.hf_trainer import FIGURES, Curve, relative_differences, train_ours, train_theirs
from harness.parts import build
from medqa.model.base import adapter_weights
from medqa.model.loss import summed_loss, target_count

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260k"
UPDATES = 6
FIGURES_WITHIN = 1e-6  # relative
WEIGHTS_WITHIN = 1e-5  # of what training moved
RECIPES = {"exp_001": (4, 8), "exp_002": (4, 8), "exp_003": (8, 4)}  # micro-batch x accumulation


@pytest.fixture(scope="module")
def short(tiny):
    return lambda name, *sets: tiny(
        name,
        "lora.lora_dropout=0.0",
        f"training.max_steps={UPDATES}",
        "tokenization.max_length=128",
        *sets,
    )


@pytest.fixture(scope="module", params=RECIPES)
def recipe(request):
    return request.param


@pytest.fixture(scope="module")
def ours(recipe, short, tmp_path_factory) -> Curve:
    return train_ours(short(recipe), tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def theirs(recipe, short, tmp_path_factory) -> Curve:
    return train_theirs(short(recipe), tmp_path_factory.mktemp("theirs"))


def largest_difference(ours: Curve, theirs: Curve, name: str) -> float:
    return max(relative_differences(ours.figures[name], theirs.figures[name]))


def test_the_recipe_is_the_experiments_own(recipe, short):
    experiment = short(recipe)
    micro_batch, accumulation = RECIPES[recipe]
    assert experiment.model.quantization == "4bit"
    assert experiment.training.per_device_batch_size == micro_batch
    assert experiment.training.global_batch_size == micro_batch * accumulation


@pytest.mark.parametrize("name", FIGURES)
def test_every_update_has_trainers_figures(ours, theirs, name):
    assert len(ours.figures[name]) == len(theirs.figures[name]) == UPDATES
    assert largest_difference(ours, theirs, name) <= FIGURES_WITHIN


def test_final_weights_are_trainers(recipe, short, ours, theirs):
    assert len(ours.weights) == 2 * 7 * 2  # A and B of seven matrices in each of two layers
    assert apart(ours.weights, theirs.weights, initial_adapter(short(recipe))) <= WEIGHTS_WITHIN


def test_training_was_worth_comparing(recipe, ours):
    """Loss falls, weights move, and the gradient was clipped at least once, so clipping is compared as well."""
    losses, norms = ours.figures["loss"], ours.figures["grad_norm"]
    assert losses[-1] < 0.9 * losses[0]
    assert all(tensor.abs().max() > 0 for tensor in ours.weights.values())
    assert max(norms) > 1.0 > min(norms)
    if recipe == "exp_002":
        assert len(set(ours.figures["learning_rate"])) > UPDATES // 2
        assert ours.figures["learning_rate"][0] == 0.0


def test_both_sides_have_8_bit_optimizer_state(recipe, ours, theirs):
    types = [{tensor.dtype for tensor in curve.optimizer_tensors} for curve in (ours, theirs)]
    assert all((torch.uint8 in found) == (recipe == "exp_002") for found in types)


@pytest.mark.slow
@pytest.mark.skipif(not STORIES.exists(), reason=f"no other pre-trained base in {STORIES}")
def test_parity_on_another_base(short, tmp_path):
    """Another architecture's sizes, another tokenizer; a linear schedule, which no experiment has."""
    schedule = ("training.max_steps=4", "scheduler.name=linear", "scheduler.warmup_steps=1")
    experiment = short("exp_003", f"model.base={STORIES}", *schedule)
    ours, theirs = train_ours(experiment, tmp_path), train_theirs(experiment, tmp_path)
    assert all(largest_difference(ours, theirs, name) <= FIGURES_WITHIN for name in FIGURES)
    assert apart(ours.weights, theirs.weights, initial_adapter(experiment)) <= WEIGHTS_WITHIN


def test_a_mean_over_micro_batches_would_be_noticed(short, tmp_path):
    """The textbook loop, each micro-batch's mean divided by their number, is no match: this comparison can fail."""
    experiment = short("exp_001", "training.max_steps=3")
    reference = train_theirs(experiment, tmp_path)
    parts = build(experiment)
    parameters = [p for p in parts.adapted.parameters() if p.requires_grad]
    figures = {"loss": [], "grad_norm": []}
    for update in range(experiment.training.max_steps):
        micro_batches = parts.micro_batches(update)
        total = 0.0
        for micro_batch in micro_batches:
            mean = summed_loss(parts.model, micro_batch, parts.accelerator.device) / target_count(micro_batch)
            (mean / len(micro_batches)).backward()
            total += mean.item() / len(micro_batches)
        figures["loss"].append(total)
        figures["grad_norm"].append(torch.nn.utils.clip_grad_norm_(parameters, 1.0).item())
        parts.optimizer.step()
        parts.optimizer.zero_grad()
    for name, values in figures.items():
        assert max(relative_differences(values, reference.figures[name])) > 100 * FIGURES_WITHIN
    initial = initial_adapter(experiment)
    assert apart(adapter_weights(parts.adapted), reference.weights, initial) > 100 * WEIGHTS_WITHIN


def test_other_rows_would_be_noticed(short, tmp_path):
    """One row of the first update replaced."""
    experiment = short("exp_001", "training.max_steps=1")
    reference = train_theirs(experiment, tmp_path)
    parts = build(experiment)
    micro_batches = parts.micro_batches(0)
    micro_batches[3].input_ids[0] = micro_batches[3].input_ids[0].flip(0)
    result = parts.step(micro_batches)
    assert max(relative_differences([result.loss], reference.figures["loss"])) > 100 * FIGURES_WITHIN
