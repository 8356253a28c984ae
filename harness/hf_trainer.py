"""One recipe, twice: by this project's loop and by HF `Trainer`, on the same rows from the same initial adapter.

`build` makes the parts of a run as `train.py` does, `train_ours` drives `medqa.training.loop.train` with them, and
`train_theirs` hands the same parts to `Trainer`, which batches, normalizes, clips, steps and schedules by itself.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from harness.parts import Parts, build, run_train
from medqa.config import Experiment
from medqa.data.batches import IGNORED
from medqa.model.base import adapter_weights
from medqa.training.plan import accumulation_steps
from medqa.training.state import Progress

FIGURES = ("loss", "grad_norm", "learning_rate")
TRAINER_NAMES = {
    "adamw_torch": "adamw_torch_fused",  # Trainer's default, and what `medqa` builds
    "paged_adamw_8bit": "paged_adamw_8bit",
    "none": "constant",
    "linear": "linear",
    "cosine": "cosine",
}


@dataclass
class Curve:
    """What a training gave: loss, gradient norm and rate of each update, final LoRA weights, optimizer state."""

    figures: dict[str, list[float]]
    weights: dict[str, torch.Tensor]
    optimizer_tensors: list[torch.Tensor]


def train_ours(experiment: Experiment, directory: Path) -> Curve:
    """The experiment by this project's loop."""
    parts = build(experiment)
    records = run_train(parts, Progress(), directory)
    figures = {name: [record[name] for record in records] for name in FIGURES}
    return Curve(figures, adapter_weights(parts.adapted), _state_tensors(parts.optimizer))


def make_trainer(parts: Parts, directory: Path, callbacks: Sequence[TrainerCallback] = ()) -> Trainer:
    """HF `Trainer` for the same experiment; it gets the stream's rows in the stream's order."""
    experiment = parts.experiment
    training, optimizer = experiment.training, experiment.optimizer
    tokenization, pad_token_id = experiment.tokenization, parts.tokenizer.pad_token_id
    positions = range(training.max_steps * training.global_batch_size)
    rows = [{"input_ids": parts.stream.at(position).input_ids.tolist()} for position in positions]
    length = tokenization.max_length if tokenization.padding == "max_length" else None
    arguments = TrainingArguments(
        output_dir=str(directory),
        use_cpu=True,
        bf16=parts.settings.mixed_precision == "bf16",
        seed=training.seed,
        max_steps=training.max_steps,
        per_device_train_batch_size=training.per_device_batch_size,
        gradient_accumulation_steps=accumulation_steps(training, 1),
        train_sampling_strategy="sequential",
        optim=TRAINER_NAMES[optimizer.name],
        learning_rate=optimizer.learning_rate,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_epsilon=optimizer.eps,
        max_grad_norm=optimizer.max_grad_norm,
        lr_scheduler_type=TRAINER_NAMES[experiment.scheduler.name],
        warmup_steps=experiment.scheduler.warmup_steps,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return Trainer(
        model=parts.adapted,
        args=arguments,
        train_dataset=rows,
        data_collator=functools.partial(_collate, pad_token_id=pad_token_id, length=length),
        processing_class=parts.tokenizer,
        callbacks=list(callbacks),
    )


def train_theirs(experiment: Experiment, directory: Path) -> Curve:
    """The experiment by HF `Trainer`."""
    parts = build(experiment)
    trainer = make_trainer(parts, directory)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    figures = {name: [float(entry[name]) for entry in logs] for name in FIGURES}
    return Curve(figures, adapter_weights(parts.adapted), _state_tensors(trainer.optimizer))


def _collate(rows: Sequence[dict[str, list[int]]], pad_token_id: int, length: int | None) -> dict[str, torch.Tensor]:
    """Rows padded on the right, to the longest where there is no `length`; padding is no target."""
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    length = length or max(map(len, ids))

    def padded(tensors: Sequence[torch.Tensor], value: int) -> torch.Tensor:
        return torch.stack([torch.nn.functional.pad(t, (0, length - len(t)), value=value) for t in tensors])

    return {
        "input_ids": padded(ids, pad_token_id),
        "attention_mask": padded([torch.ones_like(t) for t in ids], 0),
        "labels": padded(ids, IGNORED),
    }


def _state_tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The tensors of the optimizer's state."""
    return [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]


def relative_differences(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """|a - b| / |b| of each pair; 0 where both are 0."""
    return [0.0 if a == b else abs(a - b) / abs(b) if b else float("inf") for a, b in zip(ours, theirs, strict=True)]
