"""`medqa plan` estimates what a run needs before it starts: memory, tokens, operations, time, checkpoints.

It reads data and tokenizer, but no weights. Values for a GPU that is not present are computed, not measured. For this
CPU the speed of matrix products is measured.
"""

import io
import math
import time
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save

from medqa.config import Experiment
from medqa.data.batches import Stream
from medqa.data.report import about_rows
from medqa.data.sources import load_sources
from medqa.data.splits import split_sources
from medqa.data.tokens import tokenize_splits
from medqa.errors import UserError
from medqa.model.base import LOAD_ERRORS, cannot_load, check_model, load_tokenizer
from medqa.model.device import SPARE, available_memory
from medqa.model.memory import enough_tokens, fit_to_memory, footprint
from medqa.model.settings import BF16_CAPABILITY, DTYPES, Change, Settings, four_bit_unavailable, resolve_settings
from medqa.training.batches import most_in_an_update
from medqa.training.forecast import Rates, Shapes, count, cpu_rates, operations, seconds_by_part, shapes, shown_seconds
from medqa.training.plan import accumulation_steps, device_line
from medqa.training.state import build_optimizer, build_scheduler

# ----------------------------------------------------------------------------------------------------
# The machine that is planned for: this one, or a GPU that is not present, by name or by its memory.

CONTEXT = 2**29  # approximate bytes of a GPU's context and kernels


@dataclass(frozen=True)
class Gpu:
    """A GPU model. `memory` is in MiB, as the driver reports it; `tflops` is the vendor's value, dense, in 16 bits."""

    capability: tuple[int, int]
    memory: int
    tflops: float


GPUS = {
    "t4": Gpu((7, 5), 15_360, 65),
    "l4": Gpu((8, 9), 23_034, 121),
    "a10": Gpu((8, 6), 23_028, 125),
    "a100": Gpu((8, 0), 40_960, 312),  # the one with 40 GB
    "h100": Gpu((9, 0), 81_559, 989),
    "h200": Gpu((9, 0), 143_771, 989),
}


@dataclass(frozen=True)
class Machine:
    """The machine that is planned for. `memory` is its total in bytes; `usable` is what a run may plan with."""

    name: str
    settings: Settings
    memory: int | None
    usable: int
    tflops: float | None
    computed: bool


def find_machine(experiment: Experiment, gpu: str | None, cpu: bool) -> Machine:
    """The GPU with this name or with so many GiB; without one, this machine.

    Raises:
        UserError: no such GPU; or there is a GPU here that torch cannot use.
    """
    if gpu is None:
        settings = resolve_settings(experiment, cpu=cpu)
        device = torch.device(settings.device_type)
        return Machine(device_line(device, 1), settings, None, available_memory(device), None, False)
    known = GPUS.get(gpu.lower())
    if known is None:
        known = Gpu(BF16_CAPABILITY, int(_gibibytes(gpu) * 2**10), 0)
    mixed_precision, dtype = experiment.training.mixed_precision, experiment.model.dtype
    if known.capability < BF16_CAPABILITY and "bf" in mixed_precision + dtype:
        mixed_precision, dtype = "fp16", "float16"
    memory = known.memory * 2**20
    name = gpu.upper() if gpu.lower() in GPUS else f"a GPU of {gpu} GiB"
    quantization: str = experiment.model.quantization
    changes: dict[str, Change] = {}
    # For a GPU that is not present, it can only be checked whether bitsandbytes is installed.
    if quantization != "none" and (why_not := four_bit_unavailable(torch.device("cpu"), torch.float32)):
        quantization, changes = "none", {"model.quantization": (quantization, "none", why_not)}
    settings = Settings("cuda", mixed_precision, DTYPES[dtype], quantization, changes=changes)
    return Machine(name, settings, memory, max(0, int(SPARE * (memory - CONTEXT))), known.tflops or None, True)


def _gibibytes(text: str) -> float:
    """Parse a number of GiB.

    Raises:
        UserError: it is not a number of GiB.
    """
    try:
        size = float(text)
    except ValueError:
        size = math.nan
    if not 0 < size < 1e6:
        raise UserError(f"--gpu {text}: no such GPU; known: {', '.join(GPUS)}, or a number of GiB (--gpu 24)")
    return size


# ----------------------------------------------------------------------------------------------------
# The bytes that a run saves.


def checkpoint_bytes(experiment: Experiment, found: Shapes, scaler: bool) -> dict[str, int]:
    """The bytes of a checkpoint's two large files; the other files have about 10 kB.

    The files are written to memory, with zeros, as `training.checkpoint` writes them.

    Args:
        scaler: whether there is a gradient scaler (fp16).
    """
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in found.trained]
    names = zip(found.adapter, parameters, strict=True)
    adapter = len(save({name: p.detach() for name, p in names}, metadata={"format": "pt"}))
    optimizer: Any = build_optimizer(torch.nn.ParameterList(parameters), experiment.optimizer)
    scheduler = build_scheduler(optimizer, experiment.scheduler, experiment.training.max_steps or 1)
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            parameter.grad = torch.zeros_like(parameter)
            if experiment.optimizer.name != "adamw_torch":
                optimizer.init_state(group, parameter, group_index, index)
    if experiment.optimizer.name == "adamw_torch":
        optimizer.step()
    content = io.BytesIO()
    state = torch.amp.GradScaler("cpu").state_dict() if scaler else None
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "scaler": state}, content)
    return {"adapter_model.safetensors": adapter, "training_state.pt": content.tell()}


# ----------------------------------------------------------------------------------------------------

UTILIZATION = 0.35  # of the vendor's rate, assumed
GPU_READING = 2e11  # bytes of weights a second for a generated token, assumed
GPU_LAYER_S = 0.001  # seconds of a decoder layer for a generated token, assumed
LOADING = 2.5e8  # bytes of weights a second while a model is loaded and adapters are added
NOTED = ("training.padding_free", "model.quantization", "model.attn_implementation")


def forecast(name: str, experiment: Experiment, machine: Machine, tflops: float | None = None) -> dict[str, Any]:
    """The estimate as a JSON object. All memory is in bytes, time in seconds.

    Args:
        name: the name of the experiment.
        tflops: the sustained rate of the machine, instead of a share of the vendor's value.

    Raises:
        UserError: the model's configuration, its tokenizer or the data are not available, or do not fit the experiment.
    """
    training, tokenization, data = experiment.training, experiment.tokenization, experiment.data
    accumulation = accumulation_steps(training, 1)
    model_config = check_model(experiment.model, tokenization.max_length)
    splits = split_sources(load_sources(data), data)
    tokenizer = load_tokenizer(experiment.model.base, tokenization)
    splits, examples = tokenize_splits(splits, tokenizer, tokenization)
    stream = Stream(examples["train"], training.seed, training.global_batch_size)
    settings = fit_to_memory(machine.settings, experiment, model_config, len(tokenizer), machine.usable)
    run = count(experiment, stream, settings.padding_free)
    run["largest_update"] = most_in_an_update(stream.examples, training.global_batch_size)
    chosen = _way(experiment, model_config, machine, settings, len(tokenizer), run)
    ways = [
        chosen if way == settings else _way(experiment, model_config, machine, way, len(tokenizer), run)
        for way in _ways(settings, experiment, machine)
    ]
    notes = [(key, *settings.changes[key]) for key in NOTED if key in settings.changes]
    found = shapes(experiment, model_config)
    flops = operations(experiment, model_config, run, found, settings.padding_free, settings.gradient_checkpointing)
    files = checkpoint_bytes(experiment, found, settings.mixed_precision == "fp16")
    start = time.time() - psutil.Process().create_time()  # imports and data take as long in a run
    rates = _rates(machine, settings, found, tflops)
    parts = None
    if rates is not None:
        parts = {"start": start + settings.dtype.itemsize * found.total / LOADING}
        parts |= seconds_by_part(experiment, model_config, examples, settings, run, found, rates)
    return {
        "experiment": name,
        "basis": "computed, not measured" if machine.computed else "computed, for this machine",
        "machine": {
            "name": machine.name,
            "memory": machine.memory,
            "usable": machine.usable,
            "mixed_precision": settings.mixed_precision,
            "dtype": settings.dtype_name,
        },
        "rows": about_rows(splits, examples, experiment),
        "notes": [
            f"{key} = {used}{', chosen' if asked == 'auto' else f', not {asked}'}: {why}"
            for key, asked, used, why in notes
        ],
        "padding_free": settings.padding_free,
        "gradient_accumulation_steps": None if settings.padding_free else accumulation,
        "run": run,
        "parameters": {"trainable": found.trainable, "base": found.total},
        "memory": chosen,
        "ways": ways,
        "operations": flops,
        "time": _time(parts, rates),
        "checkpoint": {**files, "total": sum(files.values())},
    }


def _ways(settings: Settings, experiment: Experiment, machine: Machine) -> list[Settings]:
    """The settings among which a run chooses, and those that can be requested; a row of the table for each."""
    weights = ["none"]
    if experiment.model.quantization != "4bit" or settings.quantization == "4bit":
        device = torch.device("cpu" if machine.computed else settings.device_type)
        if four_bit_unavailable(device, torch.float32 if machine.computed else settings.dtype) is None:
            weights.append("4bit")
    kinds = [(bits, again, False) for bits in weights for again in (False, True)]
    if settings.padding_free and settings.quantization == "4bit" and experiment.model.dequantize == "auto":
        kinds.append(("4bit", False, True))
    return [replace(settings, quantization=b, gradient_checkpointing=g, dequantize=d) for b, g, d in kinds]


def _way(
    experiment: Experiment,
    model_config: Any,
    machine: Machine,
    settings: Settings,
    vocabulary: int,
    run: dict[str, Any],
) -> dict[str, Any]:
    """One combination of settings: its memory by part and at the peak, and the largest micro-batch."""
    try:
        found = footprint(experiment, model_config, settings, vocabulary)
    except LOAD_ERRORS as error:  # the model cannot be built, for example with this attention implementation
        raise cannot_load(experiment.model.base, error) from error
    most = found.most_tokens(machine.usable)
    tokens = run["largest_micro_batch"]
    if settings.padding_free:
        tokens = experiment.training.micro_batch_tokens or min(most, run["largest_update"])
        if settings.device_type == "cpu":
            tokens = min(tokens, enough_tokens(experiment, "cpu"))
        tokens = max(tokens, run["longest_example"])
    peak = found.peak(tokens)
    return {
        "quantization": settings.quantization,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "dequantized": settings.dequantize,
        "micro_batch": tokens,
        "base": found.base,
        "adapter": found.adapter,
        "optimizer": found.optimizer,
        "gradients": found.gradients,
        "activations": found.activations.at(tokens),
        "logits_and_loss": found.logits_and_loss.at(tokens),
        "inside_a_layer": max(0, found.layers.at(tokens) - found.activations.at(tokens)),
        "peak": peak,
        "resident": found.resident(tokens) if settings.device_type == "cpu" else None,
        "fits": peak <= machine.usable,
        "most_tokens": most,
    }


def _rates(machine: Machine, settings: Settings, found: Shapes, tflops: float | None) -> Rates | None:
    """The rates of the machine; None if none is known, and on a GPU that is present."""
    if tflops is None and settings.device_type == "cpu":
        return cpu_rates(found, settings)
    if tflops is not None:
        rate, source = tflops * 1e12, "--tflops"
    elif machine.tflops is not None:
        rate = UTILIZATION * machine.tflops * 1e12
        source = f"{UTILIZATION:.0%} (assumed) of the vendor's {machine.tflops:g} TFLOP/s"
    else:
        return None
    return Rates(rate, rate, GPU_READING, GPU_LAYER_S, None, f"{rate / 1e12:.3g} TFLOP/s: {source}")


def _time(parts: dict[str, float] | None, rates: Rates | None) -> dict[str, Any] | None:
    """The seconds of the run and of each part of it; None if no rate is known."""
    if parts is None or rates is None:
        return None
    return {
        "seconds": sum(parts.values()),
        "parts": parts,
        "tflops": rates.training / 1e12,
        "source": rates.source,
    }


def show_forecast(console: Console, forecast: dict[str, Any]) -> None:
    """Print the estimate as tables."""
    machine, run, memory = forecast["machine"], forecast["run"], forecast["memory"]
    title = f"{forecast['experiment']} on {machine['name']}: {forecast['basis']}"
    table = Table(title=title, title_justify="left", show_header=False)
    padding = f"{run['padding_share']:.1%} padding"
    if forecast["padding_free"]:
        padding = f"no padding; the recipe's micro-batches would have {run['padding_share_padded']:.1%}"
    lines = [
        ("updates", f"{run['updates']:,} of {run['examples'] // run['updates']} examples: {run['epochs']:.2f} epochs"),
        ("tokens", f"{run['tokens']:,}, {run['target_tokens']:,} of them targets; {padding}"),
        ("precision", f"mixed precision {machine['mixed_precision']}, weights {machine['dtype']}"),
        ("operations", f"{forecast['operations'] / 1e15:.3g} PFLOP"),
        *_time_lines(forecast["time"]),
        ("checkpoint", f"{_mebibytes(forecast['checkpoint']['total'])} each"),
        *(("rows", line) for line in forecast["rows"]),
        *(("in effect", note) for note in forecast["notes"]),
    ]
    for line in lines:
        table.add_row(*line)
    console.print(table)

    table = Table(title="memory at the peak", title_justify="left")
    table.add_column(f"micro-batches of {memory['micro_batch']:,} tokens")
    table.add_column("MiB", justify="right")
    parts = ("base", "adapter", "optimizer", "gradients", "activations", "logits_and_loss", "inside_a_layer", "peak")
    for part in parts:
        table.add_row(part.replace("_", " "), f"{memory[part] / 2**20:,.1f}", end_section=part in parts[-2:])
    console.print(table)
    console.print("Logits and loss, and memory inside a layer, are not needed at the same time: the larger one counts.")
    if memory["resident"] is not None:
        console.print(
            f"A CPU's allocator may keep freed memory: up to {memory['resident'] / 2**30:.2f} GiB in total. If that "
            "does not fit, and with gradient checkpointing, the run returns freed memory at once, which is slower."
        )

    title = f"of {machine['usable'] / 2**30:.2f} GiB that a run may plan with; > marks what the run chooses"
    table = Table(title=title, title_justify="left")
    for column in ("", "weights", "checkpointing", "tokens", "peak GiB", "fits", "most tokens"):
        table.add_column(column, justify="left" if column in ("", "weights", "checkpointing") else "right")
    for way in forecast["ways"]:
        table.add_row(
            ">" if way == memory else "",
            machine["dtype"] if way["quantization"] == "none" else "4bit" + ", dequantized" * way["dequantized"],
            "yes" if way["gradient_checkpointing"] else "no",
            f"{way['micro_batch']:,}",
            f"{way['peak'] / 2**30:.2f}",
            "yes" if way["fits"] else "no",
            f"{way['most_tokens']:,}",
            style="bold" if way == memory else None,
        )
    console.print(table)
    console.print("Tokens are those of a micro-batch, padding included.")
    if forecast["time"] is not None:
        console.print(
            "The time is that of a whole run, without what is cached: tokens, and the baseline if another run with the "
            "same base and rows has measured it. Sample answers are counted if W&B is on.",
        )


def _time_lines(time: dict[str, Any] | None) -> list[tuple[str, str]]:
    """The time of a run, and what it is based on."""
    if time is None:
        return [("time", "give a rate with --tflops")]
    return [("time", shown_seconds(time["parts"])), ("rate", time["source"])]


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
