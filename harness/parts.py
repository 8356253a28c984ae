"""The parts of a run, built as `train.py` builds them, to be driven one by one."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from medqa.config import Data, Experiment, flat
from medqa.data.batches import MicroBatch, Stream
from medqa.data.sources import load_sources
from medqa.data.splits import Splits, split_sources
from medqa.data.tokens import Example, tokenize_splits
from medqa.evaluation.loss import Evaluator
from medqa.model.base import check_model, load_model, load_tokenizer
from medqa.model.device import available_memory
from medqa.model.loss import LossModel
from medqa.model.memory import fit_to_memory
from medqa.model.settings import Settings, resolve_settings
from medqa.training.batches import choose_micro_batch
from medqa.training.checkpoint import Fingerprints, Identity, Trained, environment
from medqa.training.distributed import build_accelerator
from medqa.training.loop import StepResult, train, train_step
from medqa.training.optimizer import build_optimizer, build_scheduler
from medqa.training.recorder import MetricsFile, Tracker, read_metrics
from medqa.training.state import RunState
from medqa.training.stopping import Deadline, Interrupts


@dataclass
class Parts:
    """The parts of a run on the CPU, as `train.py` names them."""

    experiment: Experiment
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    examples: dict[str, list[Example]]
    stream: Stream
    settings: Settings
    adapted: PeftModel
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler

    @property
    def base(self) -> torch.nn.Module:
        """The base model that the adapters are on."""
        return self.adapted.get_base_model()

    @property
    def trained(self) -> Trained:
        """What a checkpoint keeps."""
        return Trained(self.adapted, self.optimizer, self.scheduler, self.accelerator.scaler)

    @property
    def identity(self) -> Identity:
        """Whose a checkpoint is; the data's fingerprint is a made-up one."""
        return Identity(
            experiment=flat(self.experiment),
            fingerprints=Fingerprints(data="data", tokenizer="ids", base="base"),
            environment=environment(self.accelerator, self.settings, self.adapted),
        )

    def evaluator(self, most_tokens: int = 1024, padding_free: bool | None = None) -> Evaluator:
        """What measures splits: without padding where the model permits, unless told."""
        if padding_free is None:
            padding_free = self.settings.evaluation_padding_free
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
    settings = resolve_settings(experiment, cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = make_accelerator() if make_accelerator else build_accelerator(experiment, settings)
    training = experiment.training
    splits = _splits(experiment.data.model_dump_json())
    tokenizer = load_tokenizer(experiment.model.base, experiment.tokenization.pad_token)
    _, examples = tokenize_splits(splits, tokenizer, experiment.tokenization, ("train", "validation"))
    stream = Stream(examples["train"], training.seed, training.global_batch_size)
    model_config = check_model(experiment.model, experiment.tokenization.max_length)
    memory = available_memory(accelerator.device)
    settings = fit_to_memory(settings, experiment, model_config, len(tokenizer), memory)
    if settings.quantization != experiment.model.quantization:
        raise RuntimeError(settings.changes["model.quantization"])
    adapted = load_model(experiment, settings, tokenizer, accelerator.device)
    bare_optimizer = build_optimizer(adapted, experiment.optimizer)
    scheduler = build_scheduler(bare_optimizer, experiment.scheduler, training.max_steps)
    model, optimizer = accelerator.prepare(LossModel(adapted), bare_optimizer)
    return Parts(experiment, accelerator, tokenizer, examples, stream, settings, adapted, model, optimizer, scheduler)


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
    choose_micro_batch(state, parts.settings, parts.model, parts.stream, parts.experiment, parts.accelerator, say)
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
