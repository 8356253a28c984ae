"""Checkpoints: all that an exact resume needs, and nothing of the base model.

A checkpoint is written beside its place, flushed, and renamed into it, so it is whole or absent. It holds the adapter
(PEFT's file names), optimizer, scheduler, scaler and the state. No random state: order and noise follow from the step.
"""

import copy
import io
import json
import os
import pickle
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import save

from medqa.errors import UserError
from medqa.model.base import adapter_weights, load_adapter_weights

NAME = re.compile(r"checkpoint-(\d+)")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
TRAINING_FILE = "training_state.pt"
STATE_FILE = "state.json"


@dataclass
class RunState:
    """How far a run is. What follows from the step is not kept; `elapsed_s` and `peak_memory` are over all legs."""

    step: int = 0
    tokens_seen: int = 0
    best_step: int = 0
    best_loss: float | None = None
    elapsed_s: float = 0.0
    peak_memory: int = 0
    data_fingerprint: str = ""
    overflows: int = 0
    baseline: dict[str, Any] = field(default_factory=dict)

    def note_best(self, step: int, loss: float) -> None:
        """Remember the lowest loss on the fixed validation rows."""
        if self.best_loss is None or loss < self.best_loss:
            self.best_step, self.best_loss = step, loss


@dataclass(frozen=True)
class Trained:
    """The things whose state a checkpoint keeps, together because they are always saved and loaded together."""

    model: PeftModel
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler | None


def save_checkpoint(output_dir: Path, trained: Trained, state: RunState, accelerator: Accelerator, keep: int) -> None:
    """Write `checkpoint-<step>` from the main process, then remove all but the newest `keep`.

    Raises:
        UserError: it cannot be written (no space, no permission). Checkpoints that are there stay.
    """
    if accelerator.is_main_process:
        place = output_dir / f"checkpoint-{state.step}"
        if not place.exists():
            try:
                _write(place, trained, state)
            except OSError as error:
                raise UserError(f"{place}: cannot be written: {error}; free space and start again") from error
        for old in checkpoints(output_dir)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def checkpoints(output_dir: Path) -> list[Path]:
    """The run's checkpoints, by step (numerically: 100 comes after 50), oldest first."""
    found = [(int(match[1]), path) for path in output_dir.glob("checkpoint-*") if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if path.is_dir() and not path.is_symlink()]


def resume(output_dir: Path, trained: Trained, data_fingerprint: str, fresh: bool) -> RunState:
    """Continue from the newest checkpoint, or begin where there is none or a `fresh` start is wanted.

    Raises:
        UserError: as `load_checkpoint`.
    """
    found = checkpoints(output_dir)
    if fresh or not found:
        return RunState(data_fingerprint=data_fingerprint)
    return load_checkpoint(found[-1], trained, data_fingerprint)


def load_checkpoint(place: Path, trained: Trained, data_fingerprint: str) -> RunState:
    """Put a checkpoint's content into the model, optimizer, scheduler and scaler, and return its state.

    Raises:
        UserError: damaged, or of other data.
    """
    try:
        state = RunState(**json.loads((place / STATE_FILE).read_text(encoding="utf-8")))
        saved = torch.load(place / TRAINING_FILE, map_location="cpu", weights_only=True)
    except (OSError, ValueError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{place}: damaged: {error}; remove it to go on from an older one") from error
    if state.data_fingerprint != data_fingerprint:
        raise UserError(f"{place}: it was trained on other data; use another --output-dir, or --fresh to start over")
    load_adapter_weights(trained.model, place, "checkpoint")
    trained.optimizer.load_state_dict(saved["optimizer"])
    trained.scheduler.load_state_dict(saved["scheduler"])
    if trained.scaler is not None and saved["scaler"] is not None:
        trained.scaler.load_state_dict(saved["scaler"])
    return state


def save_adapter(model: PeftModel, directory: Path) -> None:
    """The adapter in PEFT's format: LoRA weights alone, even where the vocabulary grew by `[PAD]`."""
    # Python writes the files: where there is no space, that is an OSError, and not one of each library's own errors.
    (directory / ADAPTER_FILES[0]).write_bytes(save(adapter_weights(model), metadata={"format": "pt"}))
    config = copy.copy(model.peft_config["default"])
    config.inference_mode = True
    config.save_pretrained(directory)


def flush(path: Path) -> None:
    """Have the disk hold a file or a directory's entries before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(place: Path, trained: Trained, state: RunState) -> None:
    """A checkpoint in full, then renamed into its place."""
    unfinished = place.with_name(place.name + ".tmp")
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir()
    save_adapter(trained.model, unfinished)
    content = io.BytesIO()
    torch.save(
        {
            "optimizer": trained.optimizer.state_dict(),
            "scheduler": trained.scheduler.state_dict(),
            "scaler": trained.scaler.state_dict() if trained.scaler else None,
        },
        content,
    )
    (unfinished / TRAINING_FILE).write_bytes(content.getbuffer())
    (unfinished / STATE_FILE).write_text(json.dumps(asdict(state)), encoding="utf-8")
    for path in (*unfinished.iterdir(), unfinished):
        flush(path)
    unfinished.rename(place)
    flush(place.parent)
