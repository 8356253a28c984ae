"""Which models can be a base: dense decoders of text, made of linear layers. All others are refused by name.

Decided by what a configuration says and by the layers that transformers makes of it, not by a list of names: a dense
decoder that nobody has tried here still runs, with padding, and says so (`attention.py`).
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
NOT_ATTENTION = ("conv", "moe", "hybrid", "hybrid_sliding", "linear_attention")  # of what transformers calls layers
REACHED = 0.9  # of the weights that are in matrices, the share that must be in layers which LoRA knows


def refuse_by_file(base: str, said: Mapping[str, Any]) -> None:
    """Refuse what the configuration's own words rule out, before transformers makes anything of them.

    Args:
        said: config.json.

    Raises:
        UserError: the model needs code of its own, or its weights are quantized already.
    """
    family = said.get("model_type")
    if said.get("auto_map") and family not in CONFIG_MAPPING:
        raise _refused(base, family, "needs code that comes with it, and code of others is never run here")
    quantized = said.get("quantization_config")
    if quantized is not None:
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, Mapping) else "unknown"
        raise UserError(
            f"model.base = {base}: a {family} model whose weights are quantized already ({method}): "
            "give the unquantized one with --model; model.quantization=4bit quantizes it when it is loaded"
        )


def refuse_by_kind(base: str, said: Mapping[str, Any], loaded: Any, weights: int | None = None) -> None:
    """Refuse what is no dense decoder of text. No weight is read.

    Args:
        said: config.json.
        loaded: the configuration, as transformers reads it.
        weights: the size of its weights in bytes, where known.

    Raises:
        UserError: encoder-decoder, encoder-only, of several senses, with experts, recurrent, of other layers than LoRA
            has something to add to, or of more parameters than its weights can hold.
    """
    family, parts = loaded.model_type, list(loaded.sub_configs)
    if loaded.get_text_config() is not loaded or any(sense in part for part in parts for sense in OTHER_SENSES):
        raise _refused(base, family, f"is made of several models ({', '.join(parts)}), only one of them for text")
    if loaded.is_encoder_decoder:
        raise _refused(base, family, "is an encoder and a decoder, not a decoder alone")
    if type(loaded) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _refused(base, family, "is no causal language model in transformers")
    made = MODEL_FOR_CAUSAL_LM_MAPPING[type(loaded)]
    if getattr(loaded, "is_decoder", None) is False:  # Pythia says so too, and yet is one
        has_both = hasattr(loaded, "add_cross_attention")
        if has_both or made.__name__ not in (said.get("architectures") or [made.__name__]):
            raise _refused(base, family, "is an encoder: each token sees those after it")
    if getattr(loaded, "use_bidirectional_attention", None) in (True, "all"):
        raise _refused(base, family, "has use_bidirectional_attention: each token sees those after it")
    others = sorted(set(getattr(loaded, "layer_types", None) or []).intersection(NOT_ATTENTION))
    if made._is_stateful or others:
        layers = f" ({', '.join(others)})" if others else ""
        raise _refused(base, family, f"has recurrent or state-space layers{layers}, in which examples cannot be told")
    model = without_contents(loaded)
    why = _unreached(model)
    if why is not None:
        raise _refused(base, family, why)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if weights is not None and parameters > weights:  # those that are missing would be made up, with all their memory
        raise UserError(
            f"model.base = {base}: config.json describes {parameters:,} parameters, and all of its weights together "
            f"have {weights:,} bytes: they do not belong together, or are not whole; fetch the model again, or give "
            "another with --model"
        )


def check_targets(model: torch.nn.Module, lora: Lora) -> None:
    """Refuse LoRA targets that the model does not have, and a rank that is larger than each of them.

    Raises:
        UserError: one is not there, or is no linear layer; or the adapter would be larger than what it is added to.
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
            f"lora.r = {lora.r:,}: more than each of the matrices that it is added to has rows or columns "
            f"({largest:,} at most); use a lower rank, 8 to 64 for example"
        )


def without_contents(loaded: Any) -> PreTrainedModel:
    """The model of a configuration, all of its layers, of tensors that have shapes and take no memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(loaded))


def _unreached(model: torch.nn.Module) -> str | None:
    """What LoRA would leave out of a model; None where its layers are linear ones."""
    reached = other = 0
    for module in model.modules():
        if isinstance(module, Conv1D):
            return "has Conv1D layers, as GPT-2, and LoRA is added to linear layers only"
        convolution = isinstance(module, torch.nn.modules.conv._ConvNd)
        for parameter in module.parameters(recurse=False):
            if parameter.dim() == 3 and not convolution:
                return "is a mixture of experts, whose weights are no linear layers: LoRA would leave them out"
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                reached += parameter.numel()
            elif parameter.dim() > 1:
                other += parameter.numel()
    if other > (1 - REACHED) * (reached + other):
        return "keeps many of its weights outside of linear layers, where LoRA would leave them out"
    return None


def _refused(base: str, family: str | None, why: str) -> UserError:
    """What the user is told."""
    return UserError(f"model.base = {base}: a {family} model {why}; {ADVICE}")
