"""`medqa plan` estimates what a run takes before it starts: memory, tokens, operations, time, checkpoints.

Data and tokenizer are read, weights never. What is said of a GPU that is not here is computed, not measured.
"""

import io
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save
from transformers import AutoModelForCausalLM

from medqa.config import Experiment, planned_updates
from medqa.data.batches import Stream, epoch_permutation
from medqa.data.report import about_rows
from medqa.data.sources import load_sources
from medqa.data.splits import split_sources
from medqa.data.tokens import tokenize_splits
from medqa.errors import UserError
from medqa.model.base import LOAD_ERRORS, add_lora, cannot_load, check_model, load_tokenizer
from medqa.model.device import SPARE, available_memory
from medqa.model.memory import enough_tokens, fit_to_memory, footprint
from medqa.model.settings import BF16_CAPABILITY, DTYPES, Change, Settings, four_bit_unavailable, resolve_settings
from medqa.training.batches import most_in_an_update
from medqa.training.plan import accumulation_steps, device_line
from medqa.training.state import build_optimizer, build_scheduler

# ----------------------------------------------------------------------------------------------------
# The machine that a run is planned for: this one, or a GPU that is not here, by name or by its memory.

CONTEXT = 2**29  # bytes that a GPU's context and kernels take, about


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU. `memory` is in MiB, as its driver reports it; `tflops` is the vendor's, dense, in 16 bits."""

    capability: tuple[int, int]
    memory: int
    tflops: float


GPUS = {
    "t4": Gpu((7, 5), 15_360, 65),
    "l4": Gpu((8, 9), 23_034, 121),
    "a10": Gpu((8, 6), 23_028, 125),
    "a100": Gpu((8, 0), 40_960, 312),  # that with 40 GB
    "h100": Gpu((9, 0), 81_559, 989),
    "h200": Gpu((9, 0), 143_771, 989),
}


@dataclass(frozen=True)
class Machine:
    """What is planned for. `memory` is in bytes, all of it; `usable` is what a run may plan with."""

    name: str
    settings: Settings
    memory: int | None
    usable: int
    tflops: float | None
    computed: bool


def find_machine(experiment: Experiment, gpu: str | None, cpu: bool) -> Machine:
    """The GPU of this name, or with so many GiB; without one, this machine.

    Raises:
        UserError: no such GPU; or there is one here that torch cannot use.
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
    # Whether bitsandbytes works on a GPU that is not here can only be judged by whether it is installed.
    if quantization == "4bit" and (why_not := four_bit_unavailable(torch.device("cpu"), torch.float32)):
        quantization, changes = "none", {"model.quantization": ("4bit", "none", why_not)}
    settings = Settings("cuda", mixed_precision, DTYPES[dtype], quantization, changes=changes)
    return Machine(name, settings, memory, max(0, int(SPARE * (memory - CONTEXT))), known.tflops or None, True)


def _gibibytes(text: str) -> float:
    """A number of GiB.

    Raises:
        UserError: it is none.
    """
    try:
        size = float(text)
    except ValueError:
        size = math.nan
    if not 0 < size < 1e6:
        raise UserError(f"--gpu {text}: no such GPU; known: {', '.join(GPUS)}, or a number of GiB (--gpu 24)")
    return size


# ----------------------------------------------------------------------------------------------------

# ----------------------------------------------------------------------------------------------------
# What a run has to do: its tokens and padding counted, its floating-point operations, the bytes that it saves.
#
# All of it follows from the experiment, the examples' lengths and the model's shapes; no weight is read.


@dataclass(frozen=True)
class Shapes:
    """Of a model with its adapters: weights that take part in matrix products, in the layers and in the head; all.

    `adapter` has what a checkpoint keeps, by PEFT's names; `trained` is in the optimizer's order.
    """

    layers: int
    head: int
    total: int
    adapter: dict[str, torch.Size]
    trained: list[torch.Size]

    @property
    def trainable(self) -> int:
        """Weights that train."""
        return sum(shape.numel() for shape in self.trained)


def shapes(experiment: Experiment, model_config: Any) -> Shapes:
    """The shapes of this experiment's model; `model_config` is as `check_model` returns it."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(model_config)
        head = base.get_output_embeddings()
        products = sum(m.weight.numel() for m in base.modules() if isinstance(m, torch.nn.Linear) and m is not head)
        total = sum(parameter.numel() for parameter in base.parameters())
        base.requires_grad_(False)
        adapted = add_lora(base, experiment.lora.model_copy(update={"init_from": None}), 0)
    trained = {name: p.shape for name, p in adapted.named_parameters() if p.requires_grad}
    saved = {name.replace(".default.", "."): shape for name, shape in trained.items()}
    return Shapes(products, head.weight.numel(), total, saved, list(trained.values()))


def count(experiment: Experiment, stream: Stream, padding_free: bool) -> dict[str, Any]:
    """What a run goes through: counted, not estimated, since the order of the examples is known."""
    training, tokenization = experiment.training, experiment.tokenization
    rows = training.global_batch_size
    updates = planned_updates(experiment, len(stream.examples))
    order = _order(stream, updates * rows)
    lengths = np.array([len(example.input_ids) for example in stream.examples])[order]
    first = [max(1, e.answer_start) if tokenization.loss_on == "answer" else 1 for e in stream.examples]
    targets = int(np.maximum(lengths - np.array(first)[order], 0).sum())
    batches = lengths.reshape(-1, training.per_device_batch_size)
    longest = np.full(len(batches), tokenization.max_length)
    if tokenization.padding == "longest":
        longest = batches.max(axis=1)
    places = int((longest * batches.shape[1]).sum())
    tokens = int(lengths.sum())
    return {
        "updates": updates,
        "examples": len(order),
        "epochs": stream.epoch(updates),
        "training_rows": len(stream.examples),
        "tokens": tokens,
        "target_tokens": targets,
        "places": tokens if padding_free else places,
        "padding_share": 0.0 if padding_free else 1 - tokens / places,
        "padding_share_padded": 1 - tokens / places,
        "largest_micro_batch": int(longest.max() * batches.shape[1]),
        "longest_example": int(lengths.max()),
        "largest_update": most_in_an_update(stream.examples, rows),
        "pairs": int((lengths**2).sum()) if padding_free else int((longest**2 * batches.shape[1]).sum()),
    }


def _order(stream: Stream, count: int) -> np.ndarray:
    """Which example stands at each of the first positions of the stream."""
    size = len(stream.examples)
    epochs = [epoch_permutation(stream.seed, epoch, size) for epoch in range(-(-count // size))]
    return np.concatenate(epochs)[:count]


def operations(
    experiment: Experiment,
    model_config: Any,
    run: dict[str, Any],
    found: Shapes,
    padding_free: bool,
    checkpointing: bool,
) -> int:
    """Floating-point operations of the whole run.

    A weight takes 2 a place in forward and 2 for the gradient of its input, and 2 more for its own if it trains
    (https://arxiv.org/abs/2001.08361, section 2.1); attention takes 4 a pair of places and unit of width in forward,
    half of it where causal attention leaves the later ones out, and twice that in backward. Checkpointing repeats the
    layers' forward. With padding all places are computed, and the head at all of them; without, at the targets.
    """
    heads = model_config.num_attention_heads
    width = heads * (getattr(model_config, "head_dim", None) or model_config.hidden_size // heads)
    attention = model_config.num_hidden_layers * width * run["pairs"] * (2 if padding_free else 4)
    forward = 2 * run["places"] * (found.layers + found.trainable) + attention
    backward = 2 * run["places"] * (found.layers + 2 * found.trainable) + 2 * attention
    head = 4 * found.head * (run["target_tokens"] if padding_free else run["places"])
    return forward * (2 if checkpointing else 1) + backward + head


def checkpoint_bytes(experiment: Experiment, found: Shapes, scaler: bool) -> dict[str, int]:
    """Bytes of a checkpoint's two large files; what else is in one takes some 10 kB.

    They are written, to memory and of zeros, as `training.checkpoint` writes them.

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

UTILIZATION = 0.35  # of a vendor's figure, assumed
NOTED = ("training.padding_free", "model.quantization", "model.attn_implementation")


def forecast(name: str, experiment: Experiment, machine: Machine, tflops: float | None = None) -> dict[str, Any]:
    """The forecast, as JSON has it. All memory is in bytes, time in seconds.

    Args:
        name: what the experiment is called.
        tflops: the rate that the machine keeps up; in place of a share of the vendor's figure.

    Raises:
        UserError: the model's configuration, its tokenizer or the data cannot be had, or do not fit the experiment.
    """
    training, tokenization, data = experiment.training, experiment.tokenization, experiment.data
    accumulation = accumulation_steps(training, 1)
    model_config = check_model(experiment.model, tokenization.max_length)
    splits = split_sources(load_sources(data), data)
    tokenizer = load_tokenizer(experiment.model.base, tokenization.pad_token)
    splits, examples = tokenize_splits(splits, tokenizer, tokenization)
    stream = Stream(examples["train"], training.seed, training.global_batch_size)
    settings = fit_to_memory(machine.settings, experiment, model_config, len(tokenizer), machine.usable)
    run = count(experiment, stream, settings.padding_free)
    chosen = _way(experiment, model_config, machine, settings, len(tokenizer), run)
    ways = [
        chosen if way == settings else _way(experiment, model_config, machine, way, len(tokenizer), run)
        for way in _ways(settings, experiment, machine)
    ]
    notes = [(key, *settings.changes[key]) for key in NOTED if key in settings.changes]
    found = shapes(experiment, model_config)
    flops = operations(experiment, model_config, run, found, settings.padding_free, settings.gradient_checkpointing)
    files = checkpoint_bytes(experiment, found, settings.mixed_precision == "fp16")
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
        "notes": [f"{key} = {used}, not {asked}: {why}" for key, asked, used, why in notes],
        "padding_free": settings.padding_free,
        "gradient_accumulation_steps": None if settings.padding_free else accumulation,
        "run": run,
        "parameters": {"trainable": found.trainable, "base": found.total},
        "memory": chosen,
        "ways": ways,
        "operations": flops,
        "time": _time(flops, machine, tflops),
        "checkpoint": {**files, "total": sum(files.values())},
    }


def _ways(settings: Settings, experiment: Experiment, machine: Machine) -> list[Settings]:
    """The settings between which a run chooses, and those that one could ask for: a line each in the table."""
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
    """One way to compute the recipe: what it holds by part, at its peak, and how large micro-batches may be."""
    try:
        found = footprint(experiment, model_config, settings, vocabulary)
    except LOAD_ERRORS as error:  # the model cannot be built so, with such attention for example
        raise cannot_load(experiment.model.base, error) from error
    most = found.most_tokens(machine.usable)
    places = run["largest_micro_batch"]
    if settings.padding_free:
        places = experiment.training.micro_batch_tokens or min(most, run["largest_update"])
        if settings.device_type == "cpu":
            places = min(places, enough_tokens(experiment, "cpu"))
        places = max(places, run["longest_example"])
    peak = found.peak(places)
    return {
        "quantization": settings.quantization,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "dequantized": settings.dequantize,
        "micro_batch": places,
        "base": found.base,
        "adapter": found.adapter,
        "optimizer": found.optimizer,
        "gradients": found.gradients,
        "activations": found.activations.at(places),
        "logits_and_loss": found.logits_and_loss.at(places),
        "inside_a_layer": max(0, found.layers.at(places) - found.activations.at(places)),
        "peak": peak,
        "resident": found.resident(places) if settings.device_type == "cpu" else None,
        "fits": peak <= machine.usable,
        "most_tokens": most,
    }


def _time(flops: int, machine: Machine, tflops: float | None) -> dict[str, Any] | None:
    """How long so many operations take; None where no rate is known."""
    if tflops is not None:
        return {"seconds": flops / (tflops * 1e12), "tflops": tflops, "source": "--tflops"}
    if machine.tflops is None:
        return None
    rate = UTILIZATION * machine.tflops
    source = f"{UTILIZATION:.0%} (assumed) of the vendor's {machine.tflops:g} TFLOP/s"
    return {"seconds": flops / (rate * 1e12), "tflops": rate, "source": source}


def show_forecast(console: Console, forecast: dict[str, Any]) -> None:
    """The forecast as tables."""
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
        ("time", _shown_time(forecast["time"])),
        ("checkpoint", f"{_mebibytes(forecast['checkpoint']['total'])} each"),
        *(("rows", line) for line in forecast["rows"]),
        *(("in effect", note) for note in forecast["notes"]),
    ]
    for line in lines:
        table.add_row(*line)
    console.print(table)

    table = Table(title="memory at the peak", title_justify="left")
    table.add_column(f"micro-batches of {memory['micro_batch']:,} places")
    table.add_column("MiB", justify="right")
    parts = ("base", "adapter", "optimizer", "gradients", "activations", "logits_and_loss", "inside_a_layer", "peak")
    for part in parts:
        table.add_row(part.replace("_", " "), f"{memory[part] / 2**20:,.1f}", end_section=part in parts[-2:])
    console.print(table)
    console.print("Logits and loss, and what is inside a layer, are not there at once: the larger counts.")
    if memory["resident"] is not None:
        console.print(
            f"A CPU's allocator may keep freed memory: up to {memory['resident'] / 2**30:.2f} GiB in all. Where that "
            "does not fit, and with gradient checkpointing, the run has it returned at once, and is slower."
        )

    title = f"of {machine['usable'] / 2**30:.2f} GiB that a run may plan with; > is the way it takes"
    table = Table(title=title, title_justify="left")
    for column in ("", "weights", "checkpointing", "places", "peak GiB", "fits", "most places"):
        table.add_column(column, justify="left" if column in ("", "weights", "checkpointing") else "right")
    for way in forecast["ways"]:
        table.add_row(
            ">" if way == memory else "",
            machine["dtype"] if way["quantization"] == "none" else "4bit" + ", expanded" * way["dequantized"],
            "yes" if way["gradient_checkpointing"] else "no",
            f"{way['micro_batch']:,}",
            f"{way['peak'] / 2**30:.2f}",
            "yes" if way["fits"] else "no",
            f"{way['most_tokens']:,}",
            style="bold" if way == memory else None,
        )
    console.print(table)
    console.print("Places are the tokens of a micro-batch, padding included. The time is that of the updates alone.")


def _shown_time(time: dict[str, Any] | None) -> str:
    """The time, and what it is computed from."""
    if time is None:
        return "give a rate with --tflops"
    minutes = time["seconds"] / 60
    amount = f"{minutes / 60:,.1f} hours" if minutes >= 120 else f"{minutes:,.1f} minutes"
    return f"{amount} at {time['tflops']:.3g} TFLOP/s: {time['source']}"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
