"""How a run's updates are computed on this machine: with or without padding, checkpointing, expanded 4-bit weights.

What is decided here changes time and memory, never the update. With `training.padding_free: false` nothing is decided:
the recipe is computed as it is written, and what it costs is what it shows. Settings of a checkpoint are kept.
"""

from typing import Any

import torch

from medqa.config import Experiment
from medqa.model.attention import SEGMENTED, attention_in_effect, padding_needed
from medqa.model.execution import Change, Execution
from medqa.model.families import check_targets, without_contents
from medqa.model.four_bit import quantization_in_effect
from medqa.model.precision import KEPT, Precision
from medqa.training.environment import Settings
from medqa.training.footprint import Footprint, footprint
from medqa.training.memory import gibibytes

# A micro-batch of so many tokens keeps the processor busy; larger ones gain little. What is not needed for one of them
# to fit (checkpointing, compressed weights) is left out.
ENOUGH_TOKENS = {"cpu": 1024, "cuda": 4096}


def choose_execution(
    experiment: Experiment,
    model_config: Any,
    precision: Precision,
    memory: int,
    vocabulary: int,
    kept: Settings | None,
    shards: int = 1,
) -> Execution:
    """The execution for this machine, before the model is loaded.

    Args:
        model_config: the base model's, as transformers reads it.
        memory: bytes that may be planned with.
        vocabulary: the tokenizer's size.
        kept: the settings of the checkpoint that the run goes on from.
        shards: in how many pieces, on as many processes, the frozen weights are held.

    Raises:
        UserError: a target module that the model does not have.
    """
    check_targets(without_contents(model_config), experiment.lora)
    asked, model = experiment.training.padding_free, experiment.model
    quantization, _ = quantization_in_effect(model, precision, torch.device(precision.device_type), kept)
    why_padded = padding_needed(experiment, model_config)
    attention, why_attention = attention_in_effect(model.attn_implementation, model_config)
    if why_padded is None and attention == "sdpa":
        attention = SEGMENTED
    padding_free = asked and why_padded is None and (kept is None or kept.padding_free)
    chosen, why, planned_tokens = (model.gradient_checkpointing, False), {"dequantize": "only without padding"}, None
    arguments = (experiment, model_config, precision, memory, vocabulary, attention, quantization, shards)
    on_cpu, tokens = precision.device_type == "cpu", enough_tokens(experiment, precision.device_type)
    planned = None
    if padding_free:
        fixed = None if kept is None else (kept.gradient_checkpointing, kept.dequantize)
        chosen, why, planned = _what_fits(*arguments, fixed)
        if kept is None:
            planned_tokens = planned.most_tokens(memory)
        else:
            why = {"checkpointing": KEPT, "dequantize": KEPT}
    elif on_cpu:
        tokens = experiment.training.per_device_batch_size * experiment.tokenization.max_length
        padded = Execution(False, False, attention, *chosen, shards=shards)
        planned = footprint(experiment, model_config, precision, padded, quantization, vocabulary)
    checkpointing, dequantize = chosen
    return_memory = on_cpu and (checkpointing or (planned is not None and planned.resident(tokens) > memory))
    reasons: dict[str, Change] = {}
    if why_attention is not None:
        reasons["model.attn_implementation"] = (model.attn_implementation, attention, why_attention)
    if shards > 1 and experiment.evaluation.samples:
        why_none = "the base is sharded, and all processes would have to write each answer"
        reasons["evaluation.samples"] = (str(experiment.evaluation.samples), "0", why_none)
    if padding_free != asked:
        reasons["training.padding_free"] = ("true", "false", why_padded or KEPT)
    if checkpointing != model.gradient_checkpointing:
        on = str(checkpointing).lower()
        asked_on = str(model.gradient_checkpointing).lower()
        reasons["model.gradient_checkpointing"] = (asked_on, on, why["checkpointing"])
    if quantization == "4bit" and model.dequantize == "auto":
        used = "once, and kept so" if dequantize else "never"
        reasons["model.dequantize"] = ("auto", used, why["dequantize"])
    return Execution(
        padding_free,
        why_padded is None,
        attention,
        checkpointing,
        dequantize,
        planned_tokens,
        shards,
        return_memory,
        reasons,
    )


def enough_tokens(experiment: Experiment, device_type: str) -> int:
    """Tokens of a micro-batch beyond which larger ones gain little, or of the longest example where that is more."""
    return max(ENOUGH_TOKENS[device_type], experiment.tokenization.max_length)


def _what_fits(
    experiment: Experiment,
    model_config: Any,
    precision: Precision,
    memory: int,
    vocabulary: int,
    attention: str,
    quantization: str,
    shards: int,
    fixed: tuple[bool, bool] | None,
) -> tuple[tuple[bool, bool], dict[str, str], Footprint]:
    """Checkpointing and expanded weights or not, the fastest that fits or the `fixed` one; why; and its footprint."""
    tokens = enough_tokens(experiment, precision.device_type)
    ways = [(False, False), (True, False)]
    if fixed is not None:
        ways = [fixed]
    elif quantization == "4bit" and experiment.model.dequantize == "auto":
        ways.insert(0, (False, True))
    peaks = {}
    for way in ways:  # the last one, if none fits: the probe will say
        execution = Execution(True, True, attention, *way, shards=shards)
        planned = footprint(experiment, model_config, precision, execution, quantization, vocabulary)
        peaks[way] = gibibytes(planned.peak(tokens))
        if planned.peak(tokens) <= memory:
            break
    of = f"of {gibibytes(memory)} GiB for micro-batches of {tokens:,} tokens"
    why = {
        "checkpointing": f"the plan without it is {peaks.get((False, False)) or peaks[way]} GiB {of}",
        "dequantize": f"the plan with weights expanded is {peaks.get((False, True))} GiB {of}",
    }
    return way, why, planned
