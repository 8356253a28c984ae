"""What a run will take, before it starts: memory, tokens, floating-point operations, time, bytes of a checkpoint.

Data and tokenizer are read, weights never. What is said of a GPU that is not here is computed, not measured.
"""

from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from medqa.config import Experiment
from medqa.data.batches import Stream
from medqa.data.report import about_rows
from medqa.data.sources import load_sources
from medqa.data.splits import split_sources
from medqa.data.tokens import tokenize_splits
from medqa.model.attention import SEGMENTED, attention_in_effect, padding_needed
from medqa.model.base import check_model, load_tokenizer
from medqa.model.execution import Execution
from medqa.model.four_bit import four_bit_unavailable
from medqa.training.execution import enough_tokens
from medqa.training.footprint import footprint
from medqa.training.machines import Machine
from medqa.training.plan import accumulation_steps
from medqa.training.workload import checkpoint_bytes, count, operations, shapes

UTILIZATION = 0.35  # of a vendor's figure, assumed


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
    notes = []
    why_padded = padding_needed(experiment, model_config)
    padding_free = training.padding_free and why_padded is None
    if training.padding_free and why_padded:
        notes.append(f"training.padding_free = false, not true: {why_padded}")
    quantization = experiment.model.quantization
    why_not = _no_four_bit(machine)
    if quantization == "4bit" and why_not:
        quantization = "none"
        notes.append(f"model.quantization = none, not 4bit: {why_not}")
    run = count(experiment, stream, padding_free)
    attention, why_attention = attention_in_effect(experiment.model.attn_implementation, model_config)
    if why_attention is not None:
        notes.append(f"model.attn_implementation = {attention}, not sdpa: {why_attention}")
    if why_padded is None and attention == "sdpa":
        attention = SEGMENTED
    kinds = [(bits, again, False) for bits in (("none",) if why_not else ("none", "4bit")) for again in (False, True)]
    if padding_free and quantization == "4bit" and experiment.model.dequantize == "auto":
        kinds.append(("4bit", False, True))
    ways = []
    for bits, checkpointing, expanded in kinds:
        execution = Execution(padding_free, why_padded is None, attention, checkpointing, expanded)
        ways.append(_way(experiment, model_config, machine, execution, bits, len(tokenizer), run))
    chosen = _chosen(experiment, machine, ways, quantization, padding_free)
    found = shapes(experiment, model_config)
    flops = operations(experiment, model_config, run, found, padding_free, chosen["gradient_checkpointing"])
    files = checkpoint_bytes(experiment, found, machine.precision.mixed_precision == "fp16")
    return {
        "experiment": name,
        "basis": "computed, not measured" if machine.computed else "computed, for this machine",
        "machine": {
            "name": machine.name,
            "memory": machine.memory,
            "usable": machine.usable,
            "mixed_precision": machine.precision.mixed_precision,
            "dtype": str(machine.precision.dtype).removeprefix("torch."),
        },
        "rows": about_rows(splits, examples, experiment),
        "notes": notes,
        "padding_free": padding_free,
        "gradient_accumulation_steps": None if padding_free else accumulation,
        "run": run,
        "parameters": {"trainable": found.trainable, "base": found.total},
        "memory": chosen,
        "ways": ways,
        "operations": flops,
        "time": _time(flops, machine, tflops),
        "checkpoint": {**files, "total": sum(files.values())},
    }


def _no_four_bit(machine: Machine) -> str | None:
    """Why there can be no 4-bit weights; None where there can. For a GPU that is not here bitsandbytes must be."""
    if machine.computed:
        return four_bit_unavailable(torch.device("cpu"), torch.float32)
    return four_bit_unavailable(torch.device(machine.precision.device_type), machine.precision.dtype)


def _chosen(
    experiment: Experiment, machine: Machine, ways: list[dict[str, Any]], quantization: str, padding_free: bool
) -> dict[str, Any]:
    """The way that a run takes: as the recipe says with padding; without, the fastest that fits (`execution.py`)."""
    ours = [way for way in ways if way["quantization"] == quantization]
    if not padding_free:
        asked = experiment.model.gradient_checkpointing
        return next(way for way in ours if way["gradient_checkpointing"] == asked)
    ours.sort(key=lambda way: (not way["dequantized"], way["gradient_checkpointing"]))
    enough = enough_tokens(experiment, machine.precision.device_type)
    return next((way for way in ours if way["most_tokens"] >= enough), ours[-1])


def _way(
    experiment: Experiment,
    model_config: Any,
    machine: Machine,
    execution: Execution,
    quantization: str,
    vocabulary: int,
    run: dict[str, Any],
) -> dict[str, Any]:
    """One way to compute the recipe: what it holds by part, at its peak, and how large micro-batches may be."""
    found = footprint(experiment, model_config, machine.precision, execution, quantization, vocabulary)
    most = found.most_tokens(machine.usable)
    places = run["largest_micro_batch"]
    if execution.padding_free:
        places = experiment.training.micro_batch_tokens or min(most, run["largest_update"])
        if machine.precision.device_type == "cpu":
            places = min(places, enough_tokens(experiment, "cpu"))
        places = max(places, run["longest_example"])
    peak = found.peak(places)
    return {
        "quantization": quantization,
        "gradient_checkpointing": execution.gradient_checkpointing,
        "dequantized": execution.dequantize,
        "micro_batch": places,
        "base": found.base,
        "adapter": found.adapter,
        "optimizer": found.optimizer,
        "gradients": found.gradients,
        "activations": found.activations.at(places),
        "logits_and_loss": found.logits_and_loss.at(places),
        "inside_a_layer": max(0, found.layers.at(places) - found.activations.at(places)),
        "peak": peak,
        "resident": found.resident(places) if machine.precision.device_type == "cpu" else None,
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
