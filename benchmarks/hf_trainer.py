"""One recipe, twice: by this project's loop and by HF `Trainer`, on the same rows from the same initial adapter.

`build` makes the parts of a run as `train.py` does, `train_ours` drives `medqa.training.loop.train` with them, and
`train_theirs` hands the same parts to `Trainer`, which batches, normalizes, clips, steps and schedules by itself.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments

from medqa.config import Data, Experiment, flat
from medqa.data.batches import IGNORED, MicroBatch, Stream
from medqa.data.sources import load_sources
from medqa.data.splits import Splits, split_sources
from medqa.data.tokens import Example, tokenize_splits
from medqa.evaluation.loss import Evaluator
from medqa.model.base import Base, adapter_weights, add_lora, check_model, load_base, load_tokenizer
from medqa.model.execution import Execution
from medqa.model.loss import LossModel
from medqa.model.precision import resolve_precision
from medqa.training.checkpoint import Fingerprints, Identity, RunState, Trained
from medqa.training.environment import environment
from medqa.training.execution import choose_execution
from medqa.training.interrupts import Deadline, Interrupts
from medqa.training.loop import StepResult, train, train_step
from medqa.training.memory import available_memory
from medqa.training.optimizer import build_optimizer
from medqa.training.plan import accumulation_steps
from medqa.training.probe import choose_micro_batch
from medqa.training.processes import build_accelerator
from medqa.training.scheduler import build_scheduler
from medqa.training.tracking import MetricsFile, Tracker, read_metrics

FIGURES = ("loss", "grad_norm", "learning_rate")
TRAINER_NAMES = {
    "adamw_torch": "adamw_torch_fused",  # Trainer's default, and what `medqa` builds
    "paged_adamw_8bit": "paged_adamw_8bit",
    "none": "constant",
    "linear": "linear",
    "cosine": "cosine",
}


@dataclass
class Parts:
    """The parts of a run on the CPU, as `train.py` names them."""

    experiment: Experiment
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    examples: dict[str, list[Example]]
    stream: Stream
    execution: Execution
    base: Base
    adapted: PeftModel
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler

    @property
    def trained(self) -> Trained:
        """What a checkpoint keeps."""
        return Trained(self.adapted, self.optimizer, self.scheduler, self.accelerator.scaler)

    @property
    def identity(self) -> Identity:
        """Whose a checkpoint is; the data's fingerprint is a made-up one."""
        precision = resolve_precision(self.experiment, True)
        return Identity(
            experiment=flat(self.experiment),
            fingerprints=Fingerprints(data="data", tokenizer="ids", base="base"),
            environment=environment(self.accelerator, precision, self.execution, self.base),
        )

    def evaluator(self, most_tokens: int = 1024, padding_free: bool | None = None) -> Evaluator:
        """What measures splits: without padding where the model permits, unless told."""
        if padding_free is None:
            padding_free = self.execution.evaluation_padding_free
        tokenization, pad = self.experiment.tokenization, self.tokenizer.pad_token_id
        return Evaluator(self.model, self.accelerator, tokenization, pad, most_tokens, padding_free)

    def packed(self, update: int, most_tokens: int) -> list[MicroBatch]:
        """The update's micro-batches (from 0) without padding."""
        return self.stream.packed(update, self.experiment.tokenization.loss_on, most_tokens)

    def micro_batches(self, update: int) -> list[MicroBatch]:
        """The update's micro-batches (from 0), padded."""
        return self.stream.micro_batches(
            update,
            self.experiment.training.per_device_batch_size,
            self.experiment.tokenization,
            self.tokenizer.pad_token_id,
        )

    def step(self, micro_batches: Sequence[MicroBatch], max_grad_norm: float | None = None) -> StepResult:
        """One `train_step`, with the experiment's settings."""
        self.model.train()
        return train_step(
            self.model,
            self.optimizer,
            self.scheduler,
            micro_batches,
            accelerator=self.accelerator,
            seed=self.experiment.training.seed,
            max_grad_norm=max_grad_norm or self.experiment.optimizer.max_grad_norm,
        )


@dataclass
class Curve:
    """What a training gave: loss, gradient norm and rate of each update, final LoRA weights, optimizer state."""

    figures: dict[str, list[float]]
    weights: dict[str, torch.Tensor]
    optimizer_tensors: list[torch.Tensor]


@functools.lru_cache(maxsize=4)
def _splits(data: str) -> Splits:
    """The rows of these data settings (as JSON, which can be hashed), read once a process."""
    settings = Data.model_validate_json(data)
    return split_sources(load_sources(settings), settings)


def build(experiment: Experiment, make_accelerator: Callable[[], Accelerator] | None = None) -> Parts:
    """The parts of a run on the CPU.

    Args:
        make_accelerator: in place of the experiment's own. Accelerate's state, global to the process, is made anew.
    """
    precision = resolve_precision(experiment, force_cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = make_accelerator() if make_accelerator else build_accelerator(experiment, precision)
    training = experiment.training
    splits = _splits(experiment.data.model_dump_json())
    tokenizer = load_tokenizer(experiment.model.base, experiment.tokenization.pad_token)
    _, examples = tokenize_splits(splits, tokenizer, experiment.tokenization, ("train", "validation"))
    stream = Stream(examples["train"], training.seed, training.global_batch_size)
    model_config = check_model(experiment.model, experiment.tokenization.max_length)
    execution = choose_execution(
        experiment, model_config, precision, available_memory(accelerator.device), len(tokenizer), None
    )
    base = load_base(experiment.model, precision, execution, accelerator.device, len(tokenizer), training.seed)
    if base.quantization != experiment.model.quantization:
        raise RuntimeError(base.reason)
    adapted = add_lora(base.model, experiment.lora, training.seed, execution.fast_lora("cpu"))
    bare_optimizer = build_optimizer(adapted, experiment.optimizer)
    scheduler = build_scheduler(bare_optimizer, experiment.scheduler, training.max_steps)
    model, optimizer = accelerator.prepare(LossModel(adapted), bare_optimizer)
    return Parts(
        experiment, accelerator, tokenizer, examples, stream, execution, base, adapted, model, optimizer, scheduler
    )


def run_train(
    parts: Parts,
    state: RunState,
    directory: Path,
    *,
    save: Callable[[], None] = lambda: None,
    interrupts: Interrupts | None = None,
    progress: Callable[[dict], None] = lambda record: None,
    say: Callable[[str], None] = lambda message: None,
) -> list[dict]:
    """`medqa.training.loop.train` without validation; the records it wrote into `directory`/metrics.jsonl.

    What stops it early is raised, as by `train`.
    """
    metrics = directory / "metrics.jsonl"
    tracker = Tracker(True, MetricsFile(metrics))
    tracker.resume(state.step, parts.experiment.training.max_steps)
    choose_micro_batch(state, parts.execution, parts.model, parts.stream, parts.experiment, parts.accelerator, say)
    train(
        parts.accelerator,
        parts.model,
        parts.optimizer,
        parts.scheduler,
        parts.stream,
        parts.experiment,
        parts.tokenizer.pad_token_id,
        state,
        updates=parts.experiment.training.max_steps,
        validate=_no_validation,
        save=save,
        tracker=tracker,
        interrupts=interrupts or Interrupts(),
        deadline=Deadline(None),
        progress=progress,
        say=say,
        clock=lambda: 0.0,
    )
    return list(read_metrics(metrics))


def _no_validation() -> None:
    raise AssertionError("evaluation.steps should be beyond training.max_steps")


def train_ours(experiment: Experiment, directory: Path) -> Curve:
    """The experiment by this project's loop."""
    parts = build(experiment)
    records = run_train(parts, RunState(), directory)
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
