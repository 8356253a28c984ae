"""Checkpoints: all that an exact resume needs, and nothing of the base model. Each is whole, or passed over.

A checkpoint is written beside its place, flushed to disk, renamed into it and read back. Its manifest decides whether
it is whole, and says of which experiment, data, tokenizer and base model it is. No random state is kept: order and
noise follow from the step.
"""

import contextlib
import copy
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pydantic.dataclasses
from accelerate import Accelerator
from peft import PeftModel
from pydantic import ConfigDict, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError
from safetensors.torch import save

from medqa.errors import NotWritten, UserError
from medqa.evaluation.loss import SplitLoss
from medqa.files import UNFINISHED, Damaged, flush, parse_json, read_file
from medqa.limits import MAX_JSON_BYTES
from medqa.model.adapter_files import ADAPTER_FILES
from medqa.model.base import adapter_weights, load_adapter_weights
from medqa.training.checkpoint_files import (
    STATE_FILE,
    TRAINING_FILE,
    checkpoints,
    make_way,
    prune,
    put_in_place,
    remove,
    remove_unfinished,
    step_of,
    verify_checkpoint,
)
from medqa.training.environment import Environment, Part
from medqa.training.manifest import MANIFEST, write_manifest
from medqa.training.processes import on_main
from medqa.training.training_state import Trained, read_training_state, training_state


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


class Fingerprints(Part):
    """sha256 of what a run is made of: the rows and their split, their token ids, the base model's files."""

    data: str
    tokenizer: str
    base: str


class Identity(Part):
    """Whose checkpoints these are, as their manifests say it. The experiment is by `section.key`."""

    experiment: dict[str, Any]
    fingerprints: Fingerprints
    environment: Environment


@dataclass(frozen=True)
class Found:
    """A whole checkpoint, whose it is, and why newer ones were passed over."""

    path: Path
    identity: Identity
    passed_over: Sequence[str]


def save_checkpoint(
    output_dir: Path,
    trained: Trained,
    state: RunState,
    identity: Identity,
    accelerator: Accelerator,
    keep: int,
    say: Callable[[str], None],
) -> None:
    """Write `checkpoint-<step>` from the main process and read it back; then remove what is older than needed.

    Args:
        say: told of old checkpoints that cannot be removed. The save has succeeded nevertheless.

    Raises:
        UserError: it cannot be written (no space, no permission). Checkpoints that are there stay.
    """
    place = output_dir / f"checkpoint-{state.step}"
    for problem in on_main(accelerator, lambda: _save(place, trained, state, identity, keep)):
        say(problem)


def _save(place: Path, trained: Trained, state: RunState, identity: Identity, keep: int) -> list[str]:
    """As `save_checkpoint`, on the main process."""
    try:
        remove_unfinished(place.parent)  # what could not be removed before
        if not _is_whole(place):
            _write(place, trained, state, identity)
            verify_checkpoint(place)
    except OSError as error:
        raise NotWritten(f"{place}: cannot be written: {error}; free space and start again") from error
    except Damaged as error:
        if not os.path.isdir(place.parent):
            raise UserError(f"{place.parent}: has been removed, and the checkpoints in it; start again") from error
        raise UserError(f"{place}: reads back differently from what was written: {error}; check the disk") from error
    return prune(place.parent, keep, {state.step, state.best_step})


def newest_whole(places: Sequence[Path]) -> Found | None:
    """The newest whole checkpoint of the first of these directories that has one; None where there is none at all.

    Raises:
        UserError: there are some, and all are damaged; says of each why.
    """
    passed_over: list[str] = []
    for path in (path for place in places for path in reversed(checkpoints(place))):
        try:
            return Found(path, read_identity(path), passed_over)
        except Damaged as error:
            passed_over.append(f"{path} is damaged: {error}")
    if passed_over:
        raise UserError(
            f"no whole checkpoint is left: {'; '.join(passed_over)}; "
            "put back one that is whole, or start over with --fresh"
        )
    return None


def read_identity(path: Path) -> Identity:
    """Whose a checkpoint is, once all of it is verified.

    Raises:
        Damaged: it is not whole, or of another version.
    """
    body = verify_checkpoint(path)
    try:
        return Identity.model_validate({key: body.get(key) for key in Identity.model_fields})
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise Damaged(f"{MANIFEST} is of another version: {where}") from error


def load_checkpoint(found: Found, trained: Trained) -> RunState:
    """Put a checkpoint's content into the model, optimizer, scheduler and scaler, and return its state.

    Raises:
        UserError: its content does not fit, though it is whole.
    """
    try:
        state = read_state(found.path)
        saved = read_training_state(found.path / TRAINING_FILE, trained, state.step, state.tokens_seen > 0)
    except Damaged as error:
        raise UserError(
            f"{found.path}: whole, but its content does not fit this version ({error}); go on with the version that "
            "wrote it, or move this checkpoint away to go on from an older one, or start over with --fresh"
        ) from error
    load_adapter_weights(trained.model, found.path, "checkpoint")
    if not all(weight.isfinite().all() for weight in adapter_weights(trained.model).values()):
        raise UserError(
            f"{found.path}: its adapter has weights that are not finite; move it away to go on from an older one"
        )
    trained.optimizer.load_state_dict(saved["optimizer"])
    trained.scheduler.load_state_dict(saved["scheduler"])
    if trained.scaler is not None and saved["scaler"] is not None:
        trained.scaler.load_state_dict(saved["scaler"])
    return state


def read_state(path: Path) -> RunState:
    """How far the run was when a checkpoint was saved.

    Raises:
        Damaged: the file cannot be read, is of another version, or is not of the update in the checkpoint's name.
    """
    content = read_file(path / STATE_FILE, MAX_JSON_BYTES)
    try:
        parse_json(content)  # stricter than what follows: no NaN, no number beyond 64 bits
        state = STATE.validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise Damaged(f"{STATE_FILE}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except ValueError as error:
        raise Damaged(f"{STATE_FILE}: {error}") from error
    if state.step != step_of(path) or max(state.best_step, state.evaluated_step) > state.step:
        raise Damaged(f"{STATE_FILE} is of another update than {path.name}")
    return state


def save_adapter(model: PeftModel, directory: Path) -> None:
    """The adapter in PEFT's format: LoRA weights alone, even where the vocabulary grew by `[PAD]`."""
    # Python writes the files: where there is no space, that is an OSError, and not one of each library's own errors.
    (directory / ADAPTER_FILES[0]).write_bytes(save(adapter_weights(model), metadata={"format": "pt"}))
    config = copy.copy(model.peft_config["default"])
    config.inference_mode = True
    config.save_pretrained(directory)


def _write(place: Path, trained: Trained, state: RunState, identity: Identity) -> None:
    """A checkpoint in full beside its place, then renamed into it; or nothing, if it cannot be written."""
    beside = place.with_name(place.name + UNFINISHED)
    make_way(beside)
    beside.mkdir()
    try:
        _fill(beside, trained, state, identity)
    except OSError:
        with contextlib.suppress(OSError):
            remove(beside)  # half a checkpoint is of no use, and there may be no space
        raise
    put_in_place(beside, place)


def _fill(directory: Path, trained: Trained, state: RunState, identity: Identity) -> None:
    """All files of a checkpoint, flushed."""
    save_adapter(trained.model, directory)
    (directory / TRAINING_FILE).write_bytes(training_state(trained))
    (directory / STATE_FILE).write_text(json.dumps(asdict(state)), encoding="utf-8")
    write_manifest(directory, {"step": state.step, **identity.model_dump()})
    for path in (*directory.iterdir(), directory):
        flush(path)


def _is_whole(place: Path) -> bool:
    """Whether a whole checkpoint is there."""
    try:
        verify_checkpoint(place)
    except Damaged:
        return False
    return True
