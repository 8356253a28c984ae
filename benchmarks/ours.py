"""This project's arms of `compare.py`: the real loop, on rows that are ready."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from peft import PeftModel

from benchmarks.gate import OURS, Gate, Job
from harness.parts import Observer
from medqa.config import Experiment
from medqa.data.batches import Stream
from medqa.data.sources import Row
from medqa.data.tokens import Example
from medqa.model.base import add_lora, check_model, load_base
from medqa.model.device import available_memory
from medqa.model.memory import fit_to_memory
from medqa.model.settings import DTYPES, Settings, resolve_settings
from medqa.training.batches import Batches
from medqa.training.distributed import build_accelerator, choose_kernels
from medqa.training.loop import StepResult, train, train_step
from medqa.training.state import TrainState, build_state
from medqa.training.stopping import Stopper

PAD = 2  # the stand-in's EOS


@dataclass
class Ours:
    """The parts of a run, as `train.py` names them."""

    experiment: Experiment
    accelerator: Accelerator
    settings: Settings
    state: TrainState
    batches: Batches

    @property
    def stream(self) -> Stream:
        """The rows by position."""
        return self.batches.stream

    @property
    def adapted(self) -> PeftModel:
        """The model as PEFT knows it."""
        return self.state.adapted

    @property
    def model(self) -> torch.nn.Module:
        """The `LossModel` as Accelerate prepared it."""
        return self.state.model

    def step(self, max_grad_norm: float) -> StepResult:
        """The next update: batches as the loop makes them, then `train_step`."""
        self.model.train()
        result = train_step(
            self.model,
            self.state.optimizer,
            self.state.scheduler,
            self.batches.next_update(),
            accelerator=self.accelerator,
            seed=self.experiment.training.seed,
            max_grad_norm=max_grad_norm,
        )
        self.state.progress.step += 1
        return result


def build(job: Job) -> Ours:
    """The parts, in `train.py`'s order, with the probe's choice of a micro-batch in the state."""
    sections: dict[str, dict] = {}
    for key, value in job.settings.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    sections["training"]["padding_free"] = OURS[job.arm]
    experiment = Experiment.model_validate(sections)
    training = experiment.training
    choose_kernels(training.deterministic)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    settings = resolve_settings(experiment, cpu=job.device == "cpu")
    if job.device == "cpu" and job.dtype == "bfloat16":  # also on a CPU for which a run would choose float32
        settings = replace(settings, mixed_precision="bf16", dtype=DTYPES["bfloat16"], changes={})
    accelerator = build_accelerator(experiment, settings)
    ids, _ = job.ids()
    examples = [Example(Row(f"row:{i}", "rows", "", "", None), row, 0, False) for i, row in enumerate(ids)]
    stream = Stream(examples, training.seed, training.global_batch_size)
    model_config = check_model(experiment.model, experiment.tokenization.max_length)
    vocabulary = model_config.vocab_size  # the tokenizer is not larger
    memory = available_memory(accelerator.device)
    settings = fit_to_memory(settings, experiment, model_config, vocabulary, memory)
    if settings.padding_free != OURS[job.arm]:
        raise RuntimeError(f"{job.arm}: {settings.changes}")
    base = load_base(experiment.model, settings, accelerator.device, vocabulary, training.seed)
    adapted = add_lora(base, experiment.lora, training.seed, settings.fast_lora)
    state = build_state(adapted, experiment, training.max_steps, settings.shards, accelerator)
    batches = Batches(stream, experiment, PAD, state.progress, accelerator)
    with tempfile.TemporaryDirectory() as directory:
        batches.probe(state.model, settings, Observer(experiment, accelerator, Path(directory), say=print))
    return Ours(experiment, accelerator, settings, state, batches)


def run(job: Job, gate: Gate) -> None:
    """`medqa.training.loop.train`, held at the end of updates."""
    parts = build(job)
    size = job.rows_per_update

    def told(record: dict) -> None:
        """Of all tokens, as in the other arms; the record's are targets."""
        last = record["step"] * size
        gate.update_done(sum(len(parts.stream.at(position).input_ids) for position in range(last - size, last)))

    with tempfile.TemporaryDirectory() as directory:
        recorder = Observer(parts.experiment, parts.accelerator, Path(directory), told, print)
        updates = parts.experiment.training.max_steps
        recorder.restore(parts.state.progress, updates)
        train(
            parts.state,
            parts.batches,
            parts.experiment,
            parts.accelerator,
            updates=updates,
            evaluate=_never,
            save=_never,
            recorder=recorder,
            stopper=Stopper(),
        )


def _never() -> NoReturn:
    raise AssertionError("evaluation.steps and training.save_steps should be beyond the updates asked for")
