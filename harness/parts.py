"""The parts of a run, built as `train.py` builds them, to be driven one by one."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from medqa.config import Data, Experiment, flat
from medqa.data.batches import MicroBatch, Stream, TrainingData, split_and_tokenize
from medqa.data.sources import Source, load_sources
from medqa.data.tokens import Example
from medqa.evaluation.loss import Evaluator, SplitLoss
from medqa.model.base import check_model, load_model, load_tokenizer
from medqa.model.device import available_memory
from medqa.model.memory import fit_to_memory
from medqa.model.settings import Settings, resolve_settings
from medqa.training.batches import Batches
from medqa.training.checkpoint import Fingerprints, Identity, environment
from medqa.training.distributed import build_accelerator
from medqa.training.loop import StepResult, robust_step, train, train_step
from medqa.training.recorder import EarlierUsage, Recorder, StartupTimer, read_metrics
from medqa.training.run_dir import METRICS
from medqa.training.state import Progress, TrainState, build_state
from medqa.training.stopping import Stopper


@dataclass
class Parts:
    """The parts of a run on the CPU, as `train.py` names them."""

    experiment: Experiment
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    data: TrainingData
    settings: Settings
    state: TrainState

    @property
    def examples(self) -> Mapping[str, Sequence[Example]]:
        """The examples by split."""
        return self.data.examples

    @property
    def stream(self) -> Stream:
        """The training examples by position."""
        return self.data.stream

    @property
    def adapted(self) -> PeftModel:
        """The model as PEFT knows it."""
        return self.state.adapted

    @property
    def base(self) -> torch.nn.Module:
        """The base model that the adapters are on."""
        return self.adapted.get_base_model()

    @property
    def model(self) -> torch.nn.Module:
        """The `LossModel` as Accelerate prepared it."""
        return self.state.model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The prepared optimizer."""
        return self.state.optimizer

    @property
    def scheduler(self) -> torch.optim.lr_scheduler.LambdaLR:
        """The learning rate schedule."""
        return self.state.scheduler

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

    def update(self) -> StepResult:
        """The next update as the loop does it: `robust_step`, repeated where it must be, and counted."""
        recorder = Observer(self.experiment, self.accelerator, Path())
        progress = self.state.progress
        batches = Batches(self.stream, self.experiment, self.tokenizer.pad_token_id, progress, self.accelerator)
        self.model.train()
        result, _ = robust_step(self.state, batches, self.experiment, self.accelerator, recorder)
        progress.advance(result)
        return result


@functools.lru_cache(maxsize=4)
def _sources(data: str) -> Sequence[Source]:
    """The rows of these data settings (as JSON, which can be hashed), read once a process."""
    return load_sources(Data.model_validate_json(data))


def build(experiment: Experiment, make_accelerator: Callable[[], Accelerator] | None = None) -> Parts:
    """The parts of a run on the CPU.

    Args:
        make_accelerator: in place of the experiment's own. Accelerate's state, global to the process, is made anew.
    """
    settings = resolve_settings(experiment, cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = make_accelerator() if make_accelerator else build_accelerator(experiment, settings)
    tokenizer = load_tokenizer(experiment.model.base, experiment.tokenization)
    data = split_and_tokenize(_sources(experiment.data.model_dump_json()), tokenizer, experiment)
    model_config = check_model(experiment.model, experiment.tokenization.max_length)
    memory = available_memory(accelerator.device)
    settings = fit_to_memory(settings, experiment, model_config, len(tokenizer), memory)
    if experiment.model.quantization not in ("auto", settings.quantization):
        raise RuntimeError(settings.changes["model.quantization"])
    adapted = load_model(experiment, settings, tokenizer, accelerator.device)
    state = build_state(adapted, experiment, data.updates, settings.shards, accelerator)
    return Parts(experiment, accelerator, tokenizer, data, settings, state)


class Observer(Recorder):
    """A recorder that hands each update's record and each message to functions, and whose clock stands still."""

    def __init__(
        self,
        experiment: Experiment,
        accelerator: Accelerator,
        output_dir: Path,
        progress: Callable[[dict], None] = lambda record: None,
        say: Callable[[str], None] = lambda message: None,
    ) -> None:
        super().__init__(experiment, accelerator, output_dir, StartupTimer())
        self._progress, self._say = progress, say
        self.startup.record_first_update()  # so that no message tells how long it took

    def restore(self, progress: Progress, updates: int) -> EarlierUsage:
        """Keep the records up to the step, though no baseline was measured."""
        return self._tracker.truncate_after(progress.step, updates)

    def message(self, text: str) -> None:
        """Hand a message on."""
        self._say(text)

    def clock(self) -> float:
        """Always 0."""
        return 0.0

    def show_update(self, record: dict) -> None:
        """Hand a record on."""
        self._progress(record)


def run_train(
    parts: Parts,
    progress: Progress,
    directory: Path,
    *,
    save: Callable[[], None] = lambda: None,
    stopper: Stopper | None = None,
    told: Callable[[dict], None] = lambda record: None,
    say: Callable[[str], None] = lambda message: None,
) -> list[dict]:
    """`medqa.training.loop.train` without validation; the records it wrote into `directory`/metrics.jsonl.

    What stops it early is raised, as by `train`.

    Args:
        progress: becomes that of the parts' state.
        told: gets the record of each update.
    """
    parts.state.progress = progress
    recorder = Observer(parts.experiment, parts.accelerator, directory, told, say)
    recorder.restore(progress, parts.data.updates)
    batches = Batches(parts.stream, parts.experiment, parts.tokenizer.pad_token_id, progress, parts.accelerator)
    batches.probe(parts.model, parts.settings, recorder)
    with recorder.training(progress, parts.stream, parts.data.updates):
        train(
            parts.state,
            batches,
            parts.experiment,
            parts.accelerator,
            updates=parts.data.updates,
            evaluate=_no_validation,
            save=save,
            recorder=recorder,
            stopper=stopper or Stopper(),
        )
    return list(read_metrics(directory / METRICS))


def _no_validation() -> SplitLoss:
    raise AssertionError("evaluation.steps should be beyond training.max_steps")
