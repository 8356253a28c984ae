"""`python -m medqa evaluate RUN`: how good is a run's adapter really, on held-out rows, beside the untuned base."""

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from medqa.config import Tracking
from medqa.data.report import write_json
from medqa.data.splits import HELD_OUT, shared_with_training
from medqa.data.tokens import Example
from medqa.errors import UserError
from medqa.evaluation.loss import Evaluator
from medqa.evaluation.loss_report import loss_report
from medqa.model.base import base_fingerprint
from medqa.model.loss import LossModel
from medqa.model.precision import resolve_precision
from medqa.results import baseline
from medqa.results.adapter import Adapted, Source, load_adapted
from medqa.results.held_out import HeldOut, load_held_out
from medqa.results.own_template import own_prompts, with_prompts
from medqa.training.environment import versions
from medqa.training.execution import enough_tokens
from medqa.training.processes import build_accelerator, on_main

EVALUATION = "evaluation.json"
TASKS = ("loss", "generation", "mcq", "probes")


@dataclass(frozen=True)
class Bench:
    """What the tasks work with."""

    adapted: Adapted
    held_out: HeldOut
    accelerator: Accelerator
    console: Console
    limit: int | None
    seed: int

    def reused(self, task: str, more: Any, make: Callable[[], Any]) -> Any:
        """What the untuned base gives in a task: kept from an earlier evaluation, else made on all processes.

        Args:
            more: JSON that it follows from, beside base model, data, precision and number of rows.
        """
        adapted = self.adapted
        what = {
            "task": task,
            "base": base_fingerprint(adapted.source.experiment.model.base),
            "quantization": adapted.quantization,
            "dtype": str(adapted.precision.dtype),
            "device": self.accelerator.device.type,
            "data": self.held_out.splits.fingerprint,
            "tokenization": adapted.source.experiment.tokenization.model_dump(),
            "limit": self.limit,
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


def evaluate(source: Source, tasks: Sequence[str], limit: int | None, cpu: bool, console: Console) -> dict[str, Any]:
    """`evaluation.json`: the figures of the tasks.

    Args:
        limit: rows of each held-out split, and questions, to look at; None: all.

    Raises:
        UserError: model or data cannot be had, or are not the run's.
    """
    experiment = source.experiment
    precision = resolve_precision(experiment, cpu, source.settings)
    untracked = experiment.model_copy(update={"tracking": Tracking(wandb="disabled")})
    accelerator = build_accelerator(untracked, precision)
    console.quiet = not accelerator.is_main_process
    with accelerator.main_process_first():
        adapted = load_adapted(source, accelerator.device)
        held_out = load_held_out(source, adapted.tokenizer, limit)
    bench = Bench(adapted, held_out, accelerator, console, limit, experiment.training.seed)
    return {
        "run": source.name,
        "experiment": experiment.model_dump(),
        "step": source.step,
        "final": source.final,
        "limit": limit,
        "seed": bench.seed,
        "quantization": adapted.quantization,
        "dtype": str(precision.dtype).removeprefix("torch."),
        "data_fingerprint": held_out.splits.fingerprint,
        "versions": versions(),
        "tasks": {task: MEASURES[task](bench) for task in TASKS if task in tasks},
    }


def measure_loss(bench: Bench) -> dict[str, Any]:
    """The `loss` task, by split."""
    adapted, accelerator = bench.adapted, bench.accelerator
    experiment = adapted.source.experiment
    everything = experiment.tokenization.model_copy(update={"loss_on": "all"})
    evaluator = Evaluator(
        accelerator.prepare_model(LossModel(adapted.model), evaluation_mode=True),
        accelerator,
        everything,
        adapted.tokenizer.pad_token_id,
        enough_tokens(experiment, accelerator.device.type),
        adapted.execution.evaluation_padding_free,
    )
    shared = shared_with_training(bench.held_out.splits)
    prompts = own_prompts(experiment.model.base)
    report = {}
    for split in HELD_OUT:
        examples = bench.held_out.examples[split]
        losses = functools.partial(_row_losses, bench, evaluator, split)
        tables = {"untuned": bench.reused(f"loss of {split}", None, functools.partial(losses, examples, "untuned"))}
        if prompts is not None:
            own = functools.partial(losses, with_prompts(examples, prompts), "untuned, in the base's own chat template")
            tables["own_template"] = bench.reused(f"loss of {split}, own template", None, own)
        tables["tuned"] = losses(examples, "tuned")
        rows = bench.held_out.rows(split)
        report[split] = loss_report({name: np.array(t) for name, t in tables.items()}, rows, shared, bench.seed)
    return report


def _row_losses(
    bench: Bench, evaluator: Evaluator, split: str, examples: Sequence[Example], of: str
) -> list[list[float]]:
    """`Evaluator.row_losses` as lists, and that they are computed."""
    bench.console.print(f"loss: {len(examples)} rows of {split}, {of}")
    return evaluator.row_losses(examples).tolist()


@contextmanager
def progress(console: Console, label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal, a line elsewhere; yields whom to tell of so many more."""
    if not console.is_terminal:
        console.print(f"{label}: {total}")
        yield lambda count: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)


def write_evaluation(found: Mapping[str, Any], run: Path) -> None:
    """`evaluation.json`, whole or as it was; tasks that were not asked for now keep what they had of the same adapter.

    Raises:
        OSError: it cannot be written.
    """
    path = run / EVALUATION
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        same = all(before[key] == found[key] for key in ("step", "final", "limit", "data_fingerprint", "experiment"))
        tasks = {**before["tasks"], **found["tasks"]} if same else found["tasks"]
    except (OSError, ValueError, LookupError, TypeError):
        tasks = found["tasks"]
    write_json({**found, "tasks": tasks}, path)


def chosen_tasks(words: str) -> list[str]:
    """The tasks of `--tasks`.

    Raises:
        UserError: one that there is not.
    """
    tasks = [word.strip() for word in words.split(",") if word.strip()]
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        raise UserError(f"--tasks {words}: no such task: {', '.join(unknown)}; there are {','.join(TASKS)}")
    return tasks


MEASURES: dict[str, Callable[[Bench], dict[str, Any]]] = {"loss": measure_loss}
