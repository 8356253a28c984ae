"""This project's arms of `compare.py`: the real loop, on rows that are ready."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from peft import PeftModel

from benchmarks.gate import Gate, Job
from benchmarks.worker import OURS
from medqa.config import Experiment
from medqa.data.batches import Stream
from medqa.data.sources import Row
from medqa.data.tokens import Example
from medqa.model.base import add_lora, check_model, load_base
from medqa.model.device import available_memory
from medqa.model.loss import LossModel
from medqa.model.memory import fit_to_memory
from medqa.model.settings import DTYPES, Settings, resolve_settings
from medqa.training.batches import choose_micro_batch
from medqa.training.distributed import build_accelerator, choose_kernels
from medqa.training.loop import StepResult, next_update, train, train_step
from medqa.training.optimizer import build_optimizer, build_scheduler
from medqa.training.recorder import MetricsFile, Tracker
from medqa.training.state import RunState
from medqa.training.stopping import Deadline, Interrupts

PAD = 2  # the stand-in's EOS


@dataclass
class Ours:
    """The parts of a run, as `train.py` names them."""

    experiment: Experiment
    accelerator: Accelerator
    stream: Stream
    settings: Settings
    adapted: PeftModel
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    state: RunState

    def step(self, max_grad_norm: float) -> StepResult:
        """The next update: batches as the loop makes them, then `train_step`."""
        self.model.train()
        result = train_step(
            self.model,
            self.optimizer,
            self.scheduler,
            next_update(self.stream, self.experiment, PAD, self.state, self.accelerator),
            accelerator=self.accelerator,
            seed=self.experiment.training.seed,
            max_grad_norm=max_grad_norm,
        )
        self.state.step += 1
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
    if job.device == "cpu" and job.dtype == "bfloat16":  # never chosen for a run on a CPU; here it is compared
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
    bare_optimizer = build_optimizer(adapted, experiment.optimizer)
    scheduler = build_scheduler(bare_optimizer, experiment.scheduler, training.max_steps)
    model, optimizer = accelerator.prepare(LossModel(adapted), bare_optimizer)
    state = RunState()
    choose_micro_batch(state, settings, model, stream, experiment, accelerator, print)
    return Ours(experiment, accelerator, stream, settings, adapted, model, optimizer, scheduler, state)


def run(job: Job, gate: Gate) -> None:
    """`medqa.training.loop.train`, held at the end of updates."""
    parts = build(job)
    size = job.rows_per_update

    def told(record: dict) -> None:
        """Of all tokens, as in the other arms; the record's are targets."""
        last = record["step"] * size
        gate.update_done(sum(len(parts.stream.at(position).input_ids) for position in range(last - size, last)))

    with tempfile.TemporaryDirectory() as directory:
        tracker = Tracker(True, MetricsFile(Path(directory) / "metrics.jsonl"))
        tracker.resume(-1, parts.experiment.training.max_steps)
        train(
            parts.accelerator,
            parts.model,
            parts.optimizer,
            parts.scheduler,
            parts.stream,
            parts.experiment,
            PAD,
            parts.state,
            updates=parts.experiment.training.max_steps,
            validate=_never,
            save=_never,
            tracker=tracker,
            interrupts=Interrupts(),
            deadline=Deadline(None),
            progress=told,
            say=print,
            clock=lambda: 0.0,
        )


def _never() -> None:
    raise AssertionError("evaluation.steps and training.save_steps should be beyond the updates asked for")
