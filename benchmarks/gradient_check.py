"""Before anything is timed: do the arms compute the same update as `Trainer`? A faster wrong one is worth nothing.

One update without dropout, in float32, from the same adapter, whose B matrices are not zero (with zeros, A would get no
gradient at all); gradients unclipped. The loss alone is a poor test: segments not kept apart move it by 1e-4 only, and
the gradients by as much as they are.
"""

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks.gate import OURS, Job
from benchmarks.ours import build
from benchmarks.theirs import chosen_rows, make_trainer

LOSS_WITHIN = 1e-6  # relative
GRADIENT_WITHIN = 1e-5  # the largest difference, of the largest value in the tensor
SAME_UPDATE = ("plain", "padding_free", "rebalance")
UNCLIPPED = 1e12
STDDEV = 0.02  # of the B matrices: about what training makes of them


class GradientsDiffer(Exception):
    """An arm that should compute Trainer's update does not."""


@dataclass(frozen=True)
class Update:
    """Loss, the gradient of each adapter matrix, and the matrices before the update."""

    loss: float
    gradients: dict[str, torch.Tensor]
    adapter: dict[str, torch.Tensor]


class Gradients(TrainerCallback):
    """Keeps the gradients that Trainer has accumulated."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Copies them."""
        self.found = gradients(self._model)


def compare(jobs: Mapping[str, Job]) -> dict[str, dict[str, float]]:
    """Of each arm among `jobs` that should compute Trainer's update, the differences from it: `loss`, `gradient`.

    Raises:
        GradientsDiffer: one is larger than rounding explains.
    """
    reference = trainer_update(jobs["trainer"])
    found = {}
    for arm in SAME_UPDATE:
        if arm in jobs:
            update = our_update(jobs[arm]) if arm in OURS else trainer_update(jobs[arm])
            found[arm] = differences(update, reference)
    wrong = {arm: d for arm, d in found.items() if not within(d)}
    if wrong:
        raise GradientsDiffer(f"not Trainer's update: {json.dumps(wrong)}")
    return found


def within(found: Mapping[str, float]) -> bool:
    """Whether it is rounding. What is not a number is not."""
    return found["loss"] <= LOSS_WITHIN and found["gradient"] <= GRADIENT_WITHIN


def differences(update: Update, reference: Update) -> dict[str, float]:
    """Relative, of the loss and of the worst gradient.

    Raises:
        GradientsDiffer: other matrices, or not the same ones to begin with; then there is nothing to compare.
    """
    if update.adapter.keys() != reference.adapter.keys() or update.gradients.keys() != reference.gradients.keys():
        raise GradientsDiffer("the adapters do not have the same matrices, or not all have a gradient")
    if not all(torch.equal(update.adapter[name], reference.adapter[name]) for name in reference.adapter):
        raise GradientsDiffer("the updates did not begin with the same adapter")
    errors = [
        ((gradient - reference.gradients[name]).abs().max() / reference.gradients[name].abs().max()).item()
        for name, gradient in update.gradients.items()
    ]
    worst = max(errors) if all(error == error for error in errors) else float("nan")
    return {"loss": abs(update.loss - reference.loss) / abs(reference.loss), "gradient": worst}


def checked(job: Job) -> Job:
    """The same job without noise and without clipping, for one update in float32."""
    settings: dict[str, Any] = {**job.settings, "lora.lora_dropout": 0.0, "model.quantization": "none"}
    arguments = {**job.arguments, "max_grad_norm": 0.0, "max_steps": 1, "logging_steps": 1, "bf16": False}
    return replace(job, settings=settings, arguments=arguments, updates=1, dtype="float32", device="cpu")


def trainer_update(job: Job) -> Update:
    """A real `Trainer.train()` of one update."""
    job = checked(job)
    with tempfile.TemporaryDirectory() as directory:
        job = replace(job, arguments={**job.arguments, "output_dir": directory, "use_cpu": True})
        trainer = make_trainer(job, chosen_rows(job))
        wake(trainer.model)
        adapter = trainable(trainer.model)
        kept = Gradients(trainer.model)
        trainer.add_callback(kept)
        trainer.train()
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return Update(loss, kept.found, adapter)


def our_update(job: Job) -> Update:
    """The loop's own `train_step` on the loop's own micro-batches."""
    parts = build(checked(job))
    wake(parts.adapted)
    adapter = trainable(parts.adapted)
    result = parts.step(UNCLIPPED)
    return Update(result.loss, gradients(parts.adapted), adapter)


def wake(model: torch.nn.Module) -> None:
    """Give every B matrix values, the same in each arm."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_B" in name:
                parameter.copy_(STDDEV * torch.randn(parameter.shape, generator=generator))


def trainable(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of what trains."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the gradients there are."""
    return {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}


def main(paths: Sequence[str]) -> int:
    """For the jobs in these files: the differences as JSON; 1 where an arm's update is not Trainer's."""
    torch.set_num_threads(1)
    jobs = {job.arm: job for job in map(Job.read, paths)}
    try:
        print(json.dumps(compare(jobs)))
    except GradientsDiffer as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
