"""The plan of a run, printed before its first update."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from medqa.config import Data, Experiment, Training
from medqa.data.batches import TrainingData
from medqa.data.report import about_rows, split_counts
from medqa.data.sources import used_sources
from medqa.data.tokens import Example
from medqa.errors import UserError
from medqa.model.device import usable_cpus
from medqa.model.settings import Settings
from medqa.model.sharding import frozen_bytes, is_sharded
from medqa.training.forecast import count, cpu_rates, seconds_by_part, shapes, shown_seconds

SHOWN_SOURCES = 40


def accumulation_steps(training: Training, num_processes: int) -> int:
    """Micro-batches that each process runs for one update.

    Raises:
        UserError: the global batch does not divide into equal micro-batches. The message names values that work.
    """
    at_once = training.per_device_batch_size * num_processes
    steps, rest = divmod(training.global_batch_size, at_once)
    if steps and not rest:
        return steps
    sizes = [
        b for b in range(1, training.global_batch_size + 1) if training.global_batch_size % (b * num_processes) == 0
    ]
    nearest = sorted({max(1, steps) * at_once, (steps + 1) * at_once})
    advice = f"training.global_batch_size={' or '.join(map(str, nearest))}"
    if sizes:
        advice = f"training.per_device_batch_size={' or '.join(map(str, sizes))}, or {advice}"
    raise UserError(
        f"training.global_batch_size = {training.global_batch_size} does not divide into micro-batches of "
        f"training.per_device_batch_size = {training.per_device_batch_size} on {num_processes} process(es); "
        f"with --set, these work: {advice}"
    )


def check_global_batch(training: Training, num_processes: int) -> None:
    """Check that the global batch divides into equal micro-batches on these processes.

    Raises:
        UserError: as `accumulation_steps`.
    """
    accumulation_steps(training, num_processes)


@dataclass(frozen=True)
class Plan:
    """What the console shows before the first update: labelled lines, and the text of one training example."""

    lines: list[tuple[str, str]]
    example: list[tuple[bool, str]]  # (counts in the loss, text), in order


def make_plan(
    experiment: Experiment,
    data: TrainingData,
    settings: Settings,
    model: PeftModel,
    accelerator: Accelerator,
    tokenizer: PreTrainedTokenizerBase,
    notes: Sequence[tuple[str, str]] = (),
) -> Plan:
    """The plan of a run on this machine.

    Args:
        notes: further lines, as (label, text).
    """
    stream, examples, updates = data.stream, data.examples, data.updates
    device, num_processes = accelerator.device, accelerator.num_processes
    training, scheduler = experiment.training, experiment.scheduler
    rows = {name: len(split) for name, split in examples.items()}
    mean_length = sum(len(e.input_ids) for e in stream.examples) / len(stream.examples)
    warmup = (
        f", {scheduler.warmup_steps} updates of warmup (learning rate 0 at the first)" if scheduler.warmup_steps else ""
    )
    trainable, total = parameter_counts(model)
    quantization = settings.quantization
    checkpointing = ", gradient checkpointing" if settings.gradient_checkpointing else ""
    batches = (
        f"{training.per_device_batch_size} examples on {num_processes} process(es): "
        f"gradient_accumulation_steps {accumulation_steps(training, num_processes)}"
    )
    if settings.padding_free:
        batches = f"padding-free, as many examples as memory allows, on {num_processes} process(es)"
    lines = [
        ("recipe", f"quantization {quantization}, {experiment.optimizer.name}{checkpointing}"),
        ("data", ", ".join(f"{name} {count:,}" for name, count in rows.items()) + " rows"),
        *(("rows", line) for line in about_rows(data.splits, examples, experiment)),
        *by_source(examples, experiment.data),
        (
            "updates",
            f"{updates:,} of {training.global_batch_size} examples, about "
            f"{training.global_batch_size * mean_length:,.0f} tokens: {stream.epoch(updates):.2f} epochs",
        ),
        ("micro-batches", batches),
        (
            "learning rate",
            f"{experiment.optimizer.learning_rate:g}, "
            f"{'constant' if scheduler.name == 'none' else scheduler.name}{warmup}",
        ),
        ("trainable params", f"{trainable:,} of {total:,} ({100 * trainable / total:.2f} %)"),
        ("device", device_line(device, num_processes)),
    ]
    if is_sharded(model):
        here, frozen = frozen_bytes(model)
        lines.append(("sharded", f"{here / 2**20:,.1f} of {frozen / 2**20:,.1f} MiB of frozen weights in each process"))
    lines += [("changed", f"{key}: {asked} -> {used} ({why})") for key, (asked, used, why) in settings.changes.items()]
    if settings.precision_note is not None:
        lines.append(("precision", settings.precision_note))
    if experiment.data.afrimedqa != "none":
        lines.append(("licence", "AfriMed-QA is CC BY-NC-SA 4.0: the adapter is for non-commercial use"))
    if device.type == "cpu" and total > 100e6:
        lines.append(("time", _time_on_cpu(experiment, data, settings, model.get_base_model().config, num_processes)))
    if settings.return_memory:
        lines.append(("low memory", "freed memory is returned to the system immediately; training is slower"))
    return Plan([*lines, *notes], loss_segments(stream.at(0), experiment.tokenization.loss_on, tokenizer.decode))


def _time_on_cpu(
    experiment: Experiment, data: TrainingData, settings: Settings, config: Any, num_processes: int
) -> str:
    """The forecast of a run after its start, on this CPU, which the processes share equally."""
    found = shapes(experiment, config)
    run = count(experiment, data.stream, settings.padding_free)
    parts = seconds_by_part(experiment, config, data.examples, settings, run, found, cpu_rates(found, settings))
    parts = {name: seconds / num_processes for name, seconds in parts.items()}
    return f"{shown_seconds(parts)} on this CPU{_idle_cpus(num_processes)}; a GPU is faster"


def _idle_cpus(num_processes: int) -> str:
    """How to use all CPUs if some are idle: `accelerate launch` starts one process with one thread."""
    cpus, threads = usable_cpus(), torch.get_num_threads()
    if threads * num_processes >= cpus:
        return ""
    launch = f"accelerate launch --num_cpu_threads_per_process {cpus // num_processes} train.py ..."
    return f" with {threads * num_processes} of {cpus} CPUs (all of them: {launch})"


def by_source(examples: Mapping[str, Sequence[Example]], data: Data) -> list[tuple[str, str]]:
    """With data of the user's own: the number of rows in each split of the first `SHOWN_SOURCES` sources."""
    counts = {split: split_counts(found) for split, found in examples.items()}
    lines = []
    for name in used_sources(data) if data.files else ():
        of_source = {split: count.get(name, 0) for split, count in counts.items()}
        line = f"{name}: " + ", ".join(f"{split} {count:,}" for split, count in of_source.items())
        if missing := [split for split, count in of_source.items() if not count]:  # groups of rows are never divided
            line += f"; no rows in {', '.join(missing)}, so its loss cannot be reported there"
        lines.append(("source", line))
    if rest := lines[SHOWN_SOURCES:]:
        lines[SHOWN_SOURCES:] = [("source", f"and {len(rest):,} more sources; data_report.json has them all")]
    return lines


def parameter_counts(model: torch.nn.Module) -> tuple[int, int]:
    """Trainable and all parameters. A 4-bit weight counts as the parameters that it represents."""
    trainable = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        count = state.shape.numel() if state is not None else parameter.numel()
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total


def device_line(device: torch.device, num_processes: int) -> str:
    """The device, and the command that uses all GPUs if some are idle."""
    if device.type != "cuda":
        return f"cpu, {torch.get_num_threads()} threads"
    visible = torch.cuda.device_count()
    line = torch.cuda.get_device_name(device)
    if visible > num_processes:
        launch = f"accelerate launch --multi_gpu --num_processes {visible} train.py ..."
        line += f"; {visible} GPUs are visible, {num_processes} used; all of them: {launch}"
    return line


def loss_segments(example: Example, loss_on: str, decode: Callable[[Any], str]) -> list[tuple[bool, str]]:
    """The example's text in segments that count in the loss or do not. The first token is never a target."""
    first = max(1, example.answer_start) if loss_on == "answer" else 1
    parts = [(False, example.input_ids[:first]), (True, example.input_ids[first:])]
    return [(counts, decode(ids)) for counts, ids in parts if len(ids)]
