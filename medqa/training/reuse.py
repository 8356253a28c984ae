"""Results of evaluations that are not computed twice: what they depend on, and how they are found in the cache.

Runs and `medqa evaluate` share the results of the base model: the same model, precision, rows and machine give the same
numbers, to the last bit. Each result is kept in the cache (`medqa/cache.py`) under a description of everything that it
depends on. An interrupted evaluation keeps the rows that it has measured, and goes on after them. Those of a fine-tuned
model are kept for its own run only, under a digest of its weights.

Losses are kept by row, with all digits, so that a sum over them is the same whether they were computed or found. The
last digits of a row's losses depend on the rows that it is batched with, so the batches belong to the description, and
rows of a batch that was halved, because it ran out of memory, are not kept. With sharded weights nothing is kept: the
processes have to measure the same batches at the same time.
"""

import functools
import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from peft import PeftModel

from medqa import cache
from medqa.data.tokens import Example
from medqa.errors import StoppedInTime
from medqa.evaluation.loss import COLUMNS, Evaluator
from medqa.model.settings import Settings
from medqa.model.sharding import is_sharded
from medqa.training.checkpoint import environment
from medqa.training.distributed import on_main

Description = dict[str, Any]  # JSON

KEEP_S = 20.0  # seconds after which an evaluation keeps the rows measured so far, besides at its end
CODE = ("data", "model", "evaluation")  # the folders of medqa/ whose code computes the results


def computed_by(model: PeftModel, base: str, settings: Settings, accelerator: Accelerator) -> Description:
    """What a result of the base model depends on besides its inputs: the base, the precision and this machine.

    Args:
        base: the fingerprint of the base model.
    """
    here = environment(accelerator, settings, model).model_dump()
    training = ("padding_free", "gradient_checkpointing", "bos")  # without influence on an evaluation
    how = {key: value for key, value in here.pop("settings").items() if key not in training}
    del here["processes"]  # each measures whole batches
    return {
        **here,
        **how,
        "base": base,
        "evaluation_padding_free": settings.evaluation_padding_free,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "vocabulary": model.get_input_embeddings().num_embeddings,  # with tokens that were added to the base
        "code": _code(),
    }


@functools.cache
def _code() -> str:
    """A digest of the code that computes the results."""
    folders = (Path(__file__).parents[1] / name for name in CODE)
    return digest(*(path.read_bytes() for folder in folders for path in sorted(folder.glob("*.py"))))


def adapter_digest(model: PeftModel) -> str | None:
    """What identifies the adapter's weights; None if it adds exactly nothing to the base, as a fresh LoRA adapter."""
    trained = {name: p.detach() for name, p in sorted(model.named_parameters()) if p.requires_grad}
    if all("lora_A" in name or ("lora_B" in name and not weight.any()) for name, weight in trained.items()):
        return None
    parts = ((name.encode(), weight.float().cpu().numpy().tobytes()) for name, weight in trained.items())
    return digest(*(part for pair in parts for part in pair))


def digest(*parts: bytes) -> str:
    """SHA-256 of several parts, each with its length."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()


def rows_digest(examples: Sequence[Example]) -> str:
    """What the losses of these examples depend on, besides the model."""
    return digest(*(b"%d " % example.answer_start + example.input_ids.tobytes() for example in examples))


def reused(accelerator: Accelerator, what: Description, make: Callable[[], Any]) -> tuple[Any, bool]:
    """A result, JSON, from the cache, or computed on all processes; and whether it is from the cache."""
    found = on_main(accelerator, lambda: cache.find(what))
    if found is not None:
        return found, True
    made = make()
    if accelerator.is_main_process:
        cache.keep(what, made)
    return made, False


# ----------------------------------------------------------------------------------------------------
# Losses by row, which are kept in parts while they are measured.


@dataclass(frozen=True)
class Measured:
    """The losses of rows.

    Attributes:
        table: as `Evaluator.row_losses` returns it.
        seconds: how long it took to measure them, perhaps earlier or by another run.
        found: whether they were in the cache, and nothing was measured.
    """

    table: np.ndarray
    seconds: float
    found: bool


def measured(
    evaluator: Evaluator,
    examples: Sequence[Example],
    model: Description,
    show: Callable[[int, int], AbstractContextManager[Callable[[int], None]]],
    late: Callable[[float], bool] = lambda seconds: False,
) -> Measured:
    """The losses of these rows: from the cache, or measured, after those that an interrupted evaluation has measured.

    Args:
        model: what the model computes: the result of `computed_by`, and its adapter.
        show: shows the progress. It gets the number of rows and how many of them are measured already, and gives a
            function to call with each number of further rows.
        late: whether fewer than so many seconds are left, so that the evaluation has to stop.

    Raises:
        StoppedInTime: `late` became true. The rows measured so far are kept.
    """
    accelerator, loss_on = evaluator.accelerator, evaluator.tokenization.loss_on
    began = time.perf_counter()
    if is_sharded(evaluator.model):
        with show(len(examples), 0) as done:
            table = evaluator.row_losses(examples, done)
        return Measured(table, time.perf_counter() - began, False)
    what = {
        **model,
        "task": "losses by row",
        "rows": rows_digest(examples),
        "batches": evaluator.batches(examples),
        "pad_token_id": None if evaluator.padding_free else evaluator.pad_token_id,
    }
    table, seconds = _checked(on_main(accelerator, lambda: cache.find(what)), examples)
    if np.isfinite(table).all():
        return Measured(_on_targets(table, loss_on), seconds / accelerator.num_processes, True)
    everywhere = evaluator.tokenization.model_copy(update={"loss_on": "all"})  # one table for both values of `loss_on`
    evaluator = replace(evaluator, tokenization=everywhere)
    part = _Part({**what, "process": [accelerator.process_index, accelerator.num_processes]}, examples, late)
    earlier = min(part.rows * accelerator.num_processes, len(examples))
    with show(len(examples), earlier) as done, part:
        table = evaluator.row_losses(examples, part.counting(done), part.table, part.is_late)
    if left := int(np.isnan(table[:, 1]).sum()):  # a model's own NaN is in the losses, not in the number of tokens
        raise StoppedInTime(
            f"stopped before the --stop-after deadline, in an evaluation: {len(examples) - left:,} of "
            f"{len(examples):,} rows are measured, and kept in {cache.baseline_folder()}"
        )
    kept, seconds = float(part.rows), part.seconds
    if accelerator.num_processes > 1:
        mine = torch.tensor([kept, seconds], dtype=torch.float64, device=accelerator.device)
        kept, seconds = accelerator.reduce(mine, "sum").tolist()
    if kept == len(examples):  # no loss is NaN, and no batch was halved
        if accelerator.is_main_process:
            _keep(what, table, seconds)
        cache.forget(part.what)
    return Measured(_on_targets(table, loss_on), seconds / accelerator.num_processes, False)


def _on_targets(table: np.ndarray, loss_on: str) -> np.ndarray:
    """The table of rows in which every token is a target, as it is with `loss_on`."""
    return table[:, [2, 3, 2, 3]] if loss_on == "answer" else table


class _Part:
    """The rows that this process has measured: kept in the cache while it measures them, and when something ends it.

    Attributes:
        what: what they are kept under.
        table: the losses of the rows, NaN where they are not measured.
        seconds: how long it took to measure them, in all sessions.
    """

    def __init__(self, what: Description, examples: Sequence[Example], late: Callable[[float], bool]) -> None:
        self.what, self._late = what, late
        self.table, self._before = _checked(cache.find(what), examples)
        self._began = self._last = self._kept = time.perf_counter()
        self._longest = 0.0

    @property
    def rows(self) -> int:
        """The number of rows in the table that are measured."""
        return int(np.isfinite(self.table).all(axis=1).sum())

    @property
    def seconds(self) -> float:
        """How long it took to measure them."""
        return self._before + time.perf_counter() - self._began

    def __enter__(self) -> None:
        self._began = self._last = self._kept = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        _keep(self.what, self.table, self.seconds)

    def counting(self, done: Callable[[int], None]) -> Callable[[int], None]:
        """`done`, which is called after each batch, and keeps the rows from time to time."""

        def count(rows: int) -> None:
            now = time.perf_counter()
            self._longest, self._last = max(self._longest, now - self._last), now
            if now - self._kept >= KEEP_S:
                self._kept = now
                _keep(self.what, self.table, self.seconds)
            done(rows)

        return count

    def is_late(self) -> bool:
        """Whether the time left is too short for another batch, as slow as the slowest so far.

        If the rows cannot be kept, the evaluation goes on: a session that starts again would get no further.
        """
        return self._late(2 * self._longest) and _keep(self.what, self.table, self.seconds)


def _keep(what: Description, table: np.ndarray, seconds: float) -> bool:
    """Keep the finite rows of a table, as index and sums. JSON has all digits of a number.

    Returns:
        False if the cache cannot be written.
    """
    indices = np.flatnonzero(np.isfinite(table).all(axis=1))
    if not len(indices):
        return True
    lines = [[int(index), *table[index].tolist()] for index in indices]
    return cache.keep(what, {"rows": lines, "seconds": seconds})


def _checked(found: Any, examples: Sequence[Example]) -> tuple[np.ndarray, float]:
    """The table that `_keep` kept, with NaN in rows that it has not, and the seconds. Without a valid one, all NaN."""
    table = np.full((len(examples), len(COLUMNS)), np.nan)
    try:
        lines, seconds = np.array(found["rows"], dtype=np.float64), float(found["seconds"])
    except (KeyError, OverflowError, TypeError, ValueError):
        return table, 0.0
    if lines.ndim != 2 or lines.shape[1] != 1 + len(COLUMNS) or not (np.isfinite(lines).all() and 0 <= seconds < 1e9):
        return table, 0.0
    if not np.isin(lines[:, 0], np.arange(len(examples))).all():
        return table, 0.0
    indices = lines[:, 0].astype(int)
    lengths = [(len(example.input_ids), example.answer_start) for example in examples]
    tokens = np.array([[length - 1, length - max(1, start)] for length, start in lengths])  # the first is no target
    if not (tokens[indices] == lines[:, [2, 4]]).all():
        return table, 0.0
    table[indices] = lines[:, 1:]
    return table, seconds
