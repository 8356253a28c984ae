"""What the tasks of an evaluation work with: model, data, processes, and what the untuned base gave before."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from medqa.evaluation.inference import end_ids
from medqa.evaluation.loss import Evaluator
from medqa.model.loss import LossModel
from medqa.results import baseline
from medqa.results.adapter import Adapted
from medqa.results.held_out import HeldOut
from medqa.training.environment import versions
from medqa.training.execution import enough_tokens
from medqa.training.processes import on_main


@dataclass(frozen=True)
class Bench:
    """What the tasks work with."""

    adapted: Adapted
    held_out: HeldOut
    accelerator: Accelerator
    console: Console
    limit: int | None
    seed: int
    written: dict[str, Any] = field(default_factory=dict)  # answers by system, for all tasks that need them

    @property
    def name(self) -> str:
        """The base model's."""
        return self.adapted.source.experiment.model.base

    @cached_property
    def model(self) -> torch.nn.Module:
        """The model with its loss on top, in mixed precision where the run is."""
        return self.accelerator.prepare_model(LossModel(self.adapted.model).eval(), evaluation_mode=True)

    def evaluator(self, longest: int) -> Evaluator:
        """Measures losses of rows of up to so many tokens; every token is a target."""
        experiment = self.adapted.source.experiment
        return Evaluator(
            self.model,
            self.accelerator,
            experiment.tokenization.model_copy(update={"loss_on": "all"}),
            self.adapted.tokenizer.pad_token_id,
            max(longest, enough_tokens(experiment, self.accelerator.device.type)),
            self.adapted.execution.evaluation_padding_free,
        )

    def reused(self, task: str, more: Any, make: Callable[[], Any]) -> Any:
        """What the untuned base gives in a task: kept from an earlier evaluation, else made on all processes.

        Args:
            more: JSON that it follows from, beside base model, data, precision and tokenizer: the very rows or prompts.
        """
        adapted = self.adapted
        what = {
            "task": task,
            "base": adapted.base,
            "quantization": adapted.quantization,
            "dtype": str(adapted.precision.dtype),
            "mixed_precision": adapted.precision.mixed_precision,
            "tokenizer": digest(adapted.tokenizer.backend_tokenizer.to_str().encode()),
            "ends": sorted(end_ids(adapted.model, adapted.tokenizer)),
            "device": self.accelerator.device.type,
            "data": self.held_out.splits.fingerprint,
            "tokenization": adapted.source.experiment.tokenization.model_dump(),
            "versions": versions(),
            "more": more,
        }
        found = on_main(self.accelerator, lambda: baseline.find(what))
        if found is not None:
            self.console.print(f"{task}: the untuned base as computed before")
            return found
        with adapted.model.disable_adapter():
            found = make()
        if self.accelerator.is_main_process:
            baseline.keep(what, found)
        return found

    def spread(
        self, label: str, items: Sequence[Any], work: Callable[[Sequence[Any], Callable[[int], None]], list]
    ) -> list:
        """The results of `work` on the items, one each, in their order; every process does its share of them.

        Args:
            work: given items and whom to tell how many more are done.
        """
        index, processes = self.accelerator.process_index, self.accelerator.num_processes
        mine = items[index::processes]
        with progress(self.console, label, len(mine)) as advance, self.accelerator.autocast(), torch.no_grad():
            done = work(mine, advance)
        if processes == 1:
            return done
        shares = gather_object([done])
        return [shares[i % processes][i // processes] for i in range(len(items))]


def digest(*parts: bytes) -> str:
    """sha256 of what a baseline follows from, each part told apart from the next."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()


@contextmanager
def progress(console: Console, label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal, a line elsewhere; yields whom to tell of so many more."""
    if not console.is_terminal:
        console.print(f"{label}: {total}")
        yield lambda count: None
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)
