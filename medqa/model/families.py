"""Which models can be a base: dense, decoder-only language models made of linear layers. All others are refused.

The decision uses the configuration and the layers that transformers builds from it, not a list of names. A dense
decoder that has not been tested here still runs, with padding, and the run says so (`attention.py`).
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.pytorch_utils import Conv1D

from medqa.config import Lora
from medqa.errors import UserError
from medqa.model.attention import TESTED

ADVICE = f"give a dense, decoder-only language model with --model; {', '.join(TESTED)} are tested"
OTHER_SENSES = ("vision", "audio", "image", "video", "speech")
NOT_ATTENTION = ("conv", "moe", "hybrid", "hybrid_sliding", "linear_attention")  # layer types of transformers
REACHED = 0.9  # the minimum share of matrix weights that are in layers supported by LoRA


def refuse_by_file(base: str, said: Mapping[str, Any]) -> None:
    """Refuse by config.json alone, before transformers interprets it.

    Args:
        said: config.json.

    Raises:
        UserError: the model needs its own code, or its weights are already quantized.
    """
    family = said.get("model_type")
    if said.get("auto_map") and family not in CONFIG_MAPPING:
        raise _refused(base, family, "needs code that comes with it (trust_remote_code), which is never run here")
    quantized = said.get("quantization_config")
    if quantized is not None:
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, Mapping) else "unknown"
        raise UserError(
            f"model.base = {base}: a {family} model whose weights are already quantized ({method}): "
            "give the unquantized model with --model; model.quantization=4bit quantizes it when it is loaded"
        )


def refuse_by_kind(base: str, said: Mapping[str, Any], loaded: Any, weights: int | None = None) -> None:
    """Refuse a model that is not a dense, decoder-only language model. No weight is read.

    Args:
        said: config.json.
        loaded: the configuration as transformers reads it.
        weights: the size of its weights in bytes, if known.

    Raises:
        UserError: the model is encoder-decoder, encoder-only, multimodal, a mixture of experts or recurrent, has layers
            that LoRA does not support, or has more parameters than its weights can hold.
    """
    family, parts = loaded.model_type, list(loaded.sub_configs)
    if loaded.get_text_config() is not loaded or any(sense in part for part in parts for sense in OTHER_SENSES):
        raise _refused(base, family, f"is multimodal: it has several models ({', '.join(parts)}), only one for text")
    if loaded.is_encoder_decoder:
        raise _refused(base, family, "is an encoder-decoder model, not decoder-only")
    if type(loaded) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _refused(base, family, "is not a causal language model in transformers")
    made = MODEL_FOR_CAUSAL_LM_MAPPING[type(loaded)]
    if getattr(loaded, "is_decoder", None) is False:  # also for Pythia, which is a decoder
        has_both = hasattr(loaded, "add_cross_attention")
        if has_both or made.__name__ not in (said.get("architectures") or [made.__name__]):
            raise _refused(base, family, "is an encoder: tokens attend to later tokens")
    if getattr(loaded, "use_bidirectional_attention", None) in (True, "all"):
        raise _refused(base, family, "has use_bidirectional_attention: tokens attend to later tokens")
    others = sorted(set(getattr(loaded, "layer_types", None) or []).intersection(NOT_ATTENTION))
    if made._is_stateful or others:
        layers = f" ({', '.join(others)})" if others else ""
        raise _refused(base, family, f"has recurrent or state-space layers{layers}, which cannot separate examples")
    model = without_contents(loaded)
    why = _unreached(model)
    if why is not None:
        raise _refused(base, family, why)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if weights is not None and parameters > weights:  # missing weights would be initialized, and fill memory
        raise UserError(
            f"model.base = {base}: config.json describes {parameters:,} parameters, but all of its weights together "
            f"have {weights:,} bytes: the files do not belong together, or are incomplete; download the model "
            "again, or give another with --model"
        )


def check_targets(model: torch.nn.Module, lora: Lora) -> None:
    """Refuse LoRA targets that the model does not have, and a rank above the dimensions of all of them.

    Raises:
        UserError: the model has no such linear layer; or `lora.r` is too large.
    """
    linear: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            last = name.rsplit(".", 1)[-1]
            linear[last] = max(linear.get(last, 0), module.in_features, module.out_features)
    unknown = [name for name in lora.target_modules if name not in linear]
    if unknown:
        raise UserError(
            f"lora.target_modules: {', '.join(map(repr, unknown))}: no such linear layer in the base model; it has "
            f"{', '.join(sorted(linear))}"
        )
    largest = max(linear[name] for name in lora.target_modules)
    if lora.r > largest:
        raise UserError(
            f"lora.r = {lora.r:,} exceeds the dimensions of every target layer (at most {largest:,}); use a lower "
            "rank, for example 8 to 64"
        )


def without_contents(loaded: Any) -> PreTrainedModel:
    """The model of a configuration on the meta device: with all layers, but without memory for weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(loaded))


def _unreached(model: torch.nn.Module) -> str | None:
    """Why LoRA would leave out much of a model; None if its layers are linear layers."""
    reached = other = 0
    for module in model.modules():
        if isinstance(module, Conv1D):
            return "has Conv1D layers, like GPT-2, and LoRA is added to linear layers only"
        convolution = isinstance(module, torch.nn.modules.conv._ConvNd)
        for parameter in module.parameters(recurse=False):
            if parameter.dim() == 3 and not convolution:
                return "is a mixture of experts, whose weights are not linear layers: LoRA would leave them out"
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                reached += parameter.numel()
            elif parameter.dim() > 1:
                other += parameter.numel()
    if other > (1 - REACHED) * (reached + other):
        return "has many of its weights outside of linear layers, where LoRA would leave them out"
    return None


def _refused(base: str, family: str | None, why: str) -> UserError:
    """The message about an unsupported model."""
    return UserError(f"model.base = {base}: a {family} model {why}; {ADVICE}")
