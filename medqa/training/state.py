"""What an update changes and a checkpoint keeps."""

from dataclasses import dataclass, field

import pydantic.dataclasses
import torch
from peft import PeftModel
from pydantic import ConfigDict, NonNegativeInt, PositiveInt, TypeAdapter

from medqa.evaluation.loss import SplitLoss


@dataclass(frozen=True)
class Moved:
    """After which update the machine was another, and what changed."""

    after_step: int
    changed: list[str]


@pydantic.dataclasses.dataclass(config=ConfigDict(extra="forbid", strict=True))
class RunState:
    """How far a run is. What follows from the step is not kept.

    `elapsed_s` and `peak_memory` are over all legs, `evaluation_s` is what the baseline took. `micro_batch_rows` is the
    most examples that a micro-batch has had room for (None: as many as configured). Without padding
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

    def note_best(self, step: int, loss: float) -> None:
        """Remember the lowest loss on the fixed validation rows, and how many evaluations ago it was; once a step."""
        if step == self.evaluated_step:
            return
        self.evaluated_step = step
        self.evaluations_since_best += 1
        if self.best_loss is None or loss < self.best_loss:
            self.best_step, self.best_loss, self.evaluations_since_best = step, loss, 0

    def halve(self, rows: int, tokens: int | None) -> tuple[str, str]:
        """Have smaller micro-batches after one of so many rows, and tokens, found no room; what was, and what will be.

        Args:
            tokens: None where micro-batches are padded, and rows are what is counted.
        """
        if tokens is None:
            self.micro_batch_rows = -(-rows // 2)
            return f"{rows} rows", f"{self.micro_batch_rows}"
        self.micro_batch_tokens = -(-tokens // 2)
        return f"{tokens} tokens", f"{self.micro_batch_tokens}"


STATE = TypeAdapter(RunState)


@dataclass(frozen=True)
class Trained:
    """The things whose state a checkpoint keeps, together because they are always saved and loaded together."""

    model: PeftModel
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    scaler: torch.amp.GradScaler | None
