"""All that an update changes and a checkpoint saves: model, optimizer, scheduler, scaler, and the progress of the run.

The order of the data and the dropout masks follow from the number of updates, so they are not saved.
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
class EnvironmentChange:
    """A change of machine, library or setting after an update: later results may differ in the last digits."""

    after_step: int
    changed: list[str]


@pydantic.dataclasses.dataclass(config=ConfigDict(extra="forbid", strict=True))
class Progress:
    """The progress of a run: `state.json` of a checkpoint. Values that follow from the step are left out.

    Attributes:
        elapsed_s, peak_memory: over all sessions.
        baseline, fixed_baseline: the losses before the first update, on all validation rows that are measured before
            and after training, and on the fixed validation rows (None in checkpoints of earlier versions).
        evaluation_s: seconds that the baseline took.
        micro_batch_rows: the most examples in a padded micro-batch, lowered when memory ran out (None: as configured).
        micro_batch_tokens: the most tokens in a padding-free micro-batch; None with padding.
        micro_batch_multiple: without padding the number of micro-batches per update is rounded up to a multiple of
            this; see `data.batches.divide`.
        overflows: attempts repeated because fp16 overflowed.
        not_bitwise: from which updates on results may differ in the last digits, and why.
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
    fixed_baseline: SplitLoss | None = None
    not_bitwise: list[EnvironmentChange] = field(default_factory=list)

    def advance(self, result: "StepResult") -> None:
        """Count an update after the optimizer step."""
        self.step += 1
        self.tokens_seen += result.tokens

    def patience_ended(self, patience: int | None) -> bool:
        """Whether the last `patience` evaluations in a row brought no lower loss. With None always False."""
        return patience is not None and self.evaluations_since_best >= patience

    def note_best(self, step: int, loss: float) -> bool:
        """Update the lowest loss on the fixed validation rows. A second call for the same step changes nothing.

        Returns:
            Whether the lowest loss is that of this step.
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
    """Everything that training changes.

    Attributes:
        model: the `LossModel` as Accelerate prepared it. Its forward returns the summed loss of a micro-batch.
        adapted: the `PeftModel` inside it. Checkpoints save its adapter.
        progress: the number of updates, and what else the run has counted.
    """

    model: torch.nn.Module
    adapted: PeftModel
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    scaler: torch.amp.GradScaler | None
    progress: Progress = field(default_factory=Progress)


@dataclass(frozen=True)
class StepResult:
    """Result of one update, over all processes.

    Attributes:
        loss: mean over the target tokens, in nats.
        grad_norm: the total gradient norm before clipping.
        tokens: target tokens.
        order: checksum of which rows the update consumed at which stream positions.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    padding_share: float
    order: int

    @classmethod
    def from_totals(
        cls,
        learning_rate: float,
        loss: float,
        grad_norm: float,
        targets: float,
        tokens: float,
        slots: float,
        order: float,
    ) -> "StepResult":
        """From the numbers on the device; the last four are `training.batches.token_counts` over all processes."""
        return cls(loss, grad_norm, learning_rate, int(targets), 1 - tokens / slots, int(order))


def check_adapter_gradients(model: torch.nn.Module) -> None:
    """Check that every LoRA B matrix has a gradient that is not zero. A matrix without a gradient would never train.

    Raises:
        TrainingStopped: a matrix has no gradient. The update has been applied already.
    """
    missing = [
        name
        for name, parameter in model.named_parameters()
        if "lora_B" in name and (parameter.grad is None or not parameter.grad.any())
    ]
    if missing:
        raise TrainingStopped(
            f"no gradient reached {len(missing)} adapter matrices, for example {missing[0]}; check lora.target_modules "
            "and the base model"
        )


# ----------------------------------------------------------------------------------------------------
# The optimizer.


def build_optimizer(model: torch.nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """Torch's fused AdamW, or bitsandbytes' paged 8-bit AdamW, for the trainable parameters.

    Raises:
        UserError: `paged_adamw_8bit` is requested and bitsandbytes cannot be imported.
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
# The learning rate scheduler, from transformers.

TRANSFORMERS_NAMES = {"none": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def build_scheduler(
    optimizer: torch.optim.Optimizer, settings: Scheduler, max_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate scheduler. The loop steps it once per update on any number of processes.

    Linear warmup as in transformers: the learning rate is lr*u/w at update u (from 0) of w warmup updates, hence 0 at
    the first update.
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
    """The state of a run before its first update: Accelerate prepares model and optimizer, but not the scheduler.

    A prepared scheduler would be stepped once for each process.

    Args:
        updates: number of updates of the whole run.
        shards: number of processes over which the frozen weights are sharded.

    Raises:
        UserError: as `build_optimizer`.
    """
    bare_optimizer = build_optimizer(adapted, experiment.optimizer)
    scheduler = build_scheduler(bare_optimizer, experiment.scheduler, updates)
    model, optimizer = prepare(accelerator, LossModel(adapted), bare_optimizer, shards)
    return TrainState(model, adapted, optimizer, scheduler, accelerator.scaler)
