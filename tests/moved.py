"""How far two trained adapters are apart, in units of how far training moved them.

For trainings that differ by the order of summation alone. Element by element they cannot be compared: Adam divides each
gradient by its own size, so that one which is zero but for rounding becomes a full step, in either direction.
"""

from pathlib import Path

import pytest
import torch
from launching import metrics
from safetensors.torch import load_file

from medqa.config import Experiment
from medqa.config_file import load_experiment
from medqa.model.base import adapter_weights, load_model, load_tokenizer
from medqa.model.settings import resolve_settings

# A bound for `apart`. Another order of summation gives 1e-6 to 5e-4, depending on the processor. A gradient without the
# factor of the number of processes gives 5e-2, although Adam hides most of it; one changed row 0.3 (`test_moved.py`).
WITHIN = 5e-3
LOSSES_WITHIN = 1e-5  # relative
Adapter = dict[str, torch.Tensor]


def initial_adapter(experiment: Experiment) -> Adapter:
    """The adapter before the first update: it follows from the seed and from shapes, whatever the quantization."""
    model = experiment.model.model_copy(update={"quantization": "none"})
    experiment = experiment.model_copy(update={"model": model})
    tokenizer = load_tokenizer(model.base, experiment.tokenization)
    settings = resolve_settings(experiment, cpu=True)
    return adapter_weights(load_model(experiment, settings, tokenizer, torch.device("cpu")))


def apart(ours: Adapter, theirs: Adapter, initial: Adapter) -> float:
    """|ours - theirs| / |theirs - initial|, as the norm over all weights."""
    assert ours.keys() == theirs.keys() == initial.keys()
    moved = _distance(theirs, initial)
    assert moved > 0
    return _distance(ours, theirs) / moved


def runs_apart(ours: Path, theirs: Path) -> float:
    """`apart` for the final adapters of two runs of one experiment."""
    adapters = (load_file(run / "lora_adapters" / "adapter_model.safetensors") for run in (ours, theirs))
    return apart(*adapters, initial_adapter(load_experiment(str(theirs / "config.yaml"))))


def assert_same_run(ours: Path, theirs: Path, updates: int) -> None:
    """The same rows in each update, the same losses and gradient norms to 1e-5, the same adapter."""
    pairs = list(zip(metrics(ours), metrics(theirs), strict=True))
    assert sum(one["split"] == "train" for one, _ in pairs) == updates
    assert sum(one["split"] == "eval" for one, _ in pairs) >= 2
    for one, other in pairs:
        for key in ("step", "split", "order", "tokens", "rows", "tokens_seen"):
            assert one.get(key) == other.get(key), key
        for key in ("loss", "grad_norm", "answer_loss"):
            assert one.get(key) == (None if key not in other else pytest.approx(other[key], rel=LOSSES_WITHIN))
    assert runs_apart(ours, theirs) <= WITHIN


def _distance(ours: Adapter, theirs: Adapter) -> float:
    """The norm of the difference, over all weights together, in float64."""
    return sum(float((ours[name].double() - theirs[name].double()).square().sum()) for name in ours) ** 0.5
