"""All that an update changes and a checkpoint keeps: model, optimizer, schedule, scaler, and how far the run is.

What follows from the number of updates alone is not kept: the order of the data and the dropout noise.
"""

from dataclasses import dataclass, field
from typing import Any

import pydantic.dataclasses
import torch
from accelerate import Accelerator
from peft import PeftModel
from pydantic import ConfigDict, NonNegativeInt, PositiveInt, TypeAdapter
from transformers import get_scheduler

from medqa.config import Experiment, Optimizer, Scheduler
from medqa.errors import TrainingStopped, UserError
from medqa.evaluation.loss import SplitLoss
from medqa.model.loss import LossModel
from medqa.training.distributed import prepare


@dataclass(frozen=True)
class Moved:
    """After which update the machine was another, and what changed."""

    after_step: int
    changed: list[str]


@pydantic.dataclasses.dataclass(config=ConfigDict(extra="forbid", strict=True))
class Progress:
    """How far a run is. What follows from the step is not kept.

    `elapsed_s` and `peak_memory` are over all sessions. `evaluation_s` is what the baseline took. `micro_batch_rows` is
    the most examples that a micro-batch has had room for (None: as many as configured). Without padding,
    `micro_batch_tokens` bounds a micro-batch instead, and their number is a multiple of `micro_batch_multiple`; see
    `data.batches.divide`.
    """

    step: NonNegativeInt = 0
    tokens_seen: NonNegativeInt = 0
    best_step: NonNegativeInt = 0
    best_loss: float | None = None
    evaluated_step: NonNegativeInt = 0
    evaluations_since_best: NonNegativeInt = 0
    stopped_early: bool = False
    elapsed_s: float = 0.0
    peak_memory: NonNegativeInt = 0
    evaluation_s: float = 0.0
    overflows: NonNegativeInt = 0
    micro_batch_rows: PositiveInt | None = None
    micro_batch_tokens: PositiveInt | None = None
    micro_batch_multiple: PositiveInt = 1
    run_id: str = ""
    resumes: NonNegativeInt = 0
    baseline: SplitLoss | None = None
    not_bitwise: list[Moved] = field(default_factory=list)

    def advance(self, result: "StepResult") -> None:
        """Count an update that has been applied."""
        self.step += 1
        self.tokens_seen += result.tokens

    def patience_ended(self, patience: int | None) -> bool:
        """Whether so many evaluations in a row have not been better than the best before; never, if None."""
        return patience is not None and self.evaluations_since_best >= patience

    def note_best(self, step: int, loss: float) -> bool:
        """Remember the lowest loss on the fixed validation rows, and how many evaluations ago it was; once a step.

        Returns whether the lowest loss is that of this step.
        """
        if step == self.evaluated_step:
            return self.best_step == step
        self.evaluated_step = step
        self.evaluations_since_best += 1
        if self.best_loss is None or loss < self.best_loss:
            self.best_step, self.best_loss, self.evaluations_since_best = step, loss, 0
        return self.best_step == step


PROGRESS = TypeAdapter(Progress)


@dataclass
class TrainState:
    """What training changes, and what a checkpoint keeps of it.

    Attributes:
        model: the `LossModel` as Accelerate prepared it, for the forward and backward passes.
        adapted: the same model as PEFT knows it; its adapter is what is saved.
        progress: how far the run is; the rest of the state follows from the weights.
    """

    model: torch.nn.Module
    adapted: PeftModel
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    scaler: torch.amp.GradScaler | None
    progress: Progress = field(default_factory=Progress)


@dataclass(frozen=True)
class StepResult:
    """One update. `loss` is the mean over its target tokens in nats; `grad_norm` is the norm before clipping.

    `order` is a number that follows from which rows the update consumed at which stream positions.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    padding_share: float
    order: int

    @classmethod
    def from_figures(
        cls,
        learning_rate: float,
        loss: float,
        grad_norm: float,
        targets: float,
        tokens: float,
        places: float,
        order: float,
    ) -> "StepResult":
        """From what the devices computed, the last four as `training.batches.token_counts` over all processes."""
        return cls(loss, grad_norm, learning_rate, int(targets), 1 - tokens / places, int(order))


def check_adapter_gradients(model: torch.nn.Module) -> None:
    """Check that the update's gradient reached every LoRA B matrix. A matrix without a gradient would never train.

    Raises:
        TrainingStopped: a matrix got no gradient.
    """
    missing = [
        name
        for name, parameter in model.named_parameters()
        if "lora_B" in name and (parameter.grad is None or not parameter.grad.any())
    ]
    if missing:
        raise TrainingStopped(f"no gradient reached {len(missing)} adapter matrices, {missing[0]} among them")


# ----------------------------------------------------------------------------------------------------
# The optimizer.


def build_optimizer(model: torch.nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """AdamW from torch (fused), or bitsandbytes' paged 8-bit AdamW, over the parameters that train.

    Raises:
        UserError: the 8-bit optimizer is asked for and bitsandbytes is not installed.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    arguments: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.betas[0], settings.betas[1]),
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    if settings.name == "adamw_torch":
        return torch.optim.AdamW(parameters, fused=True, **arguments)
    try:
        from bitsandbytes.optim import PagedAdamW8bit
    except ImportError as error:
        raise UserError(
            f"optimizer.name = paged_adamw_8bit: bitsandbytes cannot be imported ({error}); "
            "install it, or use --set optimizer.name=adamw_torch"
        ) from error
    return PagedAdamW8bit(parameters, **arguments)


# ----------------------------------------------------------------------------------------------------
# The learning rate as a function of the update, by transformers' own formulas.

TRANSFORMERS_NAMES = {"none": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def build_scheduler(
    optimizer: torch.optim.Optimizer, settings: Scheduler, max_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule, to be stepped once per update on any number of processes, so it is never prepared.

    Warmup is transformers' convention: update u of w uses u/w of the rate, from u = 0, so the very first moves nothing.
    """
    return get_scheduler(
        TRANSFORMERS_NAMES[settings.name],
        optimizer,
        num_warmup_steps=settings.warmup_steps,
        num_training_steps=max_steps,
    )


# ----------------------------------------------------------------------------------------------------
# The state before the first update.


def build_state(
    adapted: PeftModel, experiment: Experiment, updates: int, shards: int, accelerator: Accelerator
) -> TrainState:
    """The state of a run before its first update: model and optimizer prepared for these processes, and the schedule.

    The scheduler is not prepared: Accelerate would step it once for each process.

    Args:
        updates: how many updates the run has in all.
        shards: over how many processes the frozen weights are sharded.

    Raises:
        UserError: as `build_optimizer`.
    """
    bare_optimizer = build_optimizer(adapted, experiment.optimizer)
    scheduler = build_scheduler(bare_optimizer, experiment.scheduler, updates)
    model, optimizer = prepare(accelerator, LossModel(adapted), bare_optimizer, shards)
    return TrainState(model, adapted, optimizer, scheduler, accelerator.scaler)
