"""Load the tokenizer and the frozen base model (plain or 4-bit), and add LoRA adapters."""

import contextlib
import json
import os
import pickle
import re
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from medqa import config
from medqa.config import Experiment
from medqa.data.tokens import prompt, set_prompt
from medqa.errors import UserError, is_out_of_memory
from medqa.files import write_file
from medqa.hub import hub_reachable
from medqa.limited import Failed, OverLimit, limited
from medqa.limits import MAX_TOKENS_PER_BYTE
from medqa.model.adapter_files import ADAPTER_CONFIG, plain_lora, read_adapter
from medqa.model.base_files import (
    TOKENIZER,
    check_configuration,
    check_files,
    directory_of,
    is_directory,
    location,
    weight_bytes,
)
from medqa.model.device import return_freed_memory
from medqa.model.families import check_targets, refuse_by_file, refuse_by_kind, without_contents
from medqa.model.fast_lora import use_fast_lora
from medqa.model.settings import Settings, four_bit_config
from medqa.model.sharding import BLANK, blank_base, loading_device

# ----------------------------------------------------------------------------------------------------
# 4-bit weights after loading.


def expand(model: PreTrainedModel) -> None:
    """Dequantize every 4-bit weight once, to the values that each forward and backward pass would compute again.

    The values stay those of the 4-bit weights. This saves time, and needs the memory that 4-bit weights save.
    """
    model.dequantize()
    model.is_loaded_in_4bit = False  # otherwise PEFT would look for the layers of bitsandbytes
    model.requires_grad_(False)


def keep_unpacked(model: torch.nn.Module) -> None:
    """Prevent bitsandbytes from repacking 4-bit weights in the first evaluation on CPUs with AVX512-BF16.

    A repacked layer has no correct backward pass: gradients after it are silently wrong (measured cosine: 0.29).
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


# ----------------------------------------------------------------------------------------------------

TOKENIZER_CONFIG = "tokenizer_config.json"
# Keys of a tokenizer's configuration about where and how it was loaded, or which code would load it.
OF_THIS_MACHINE = ("backend", "is_local", "local_files_only", "auto_map")
SCRIPTS = "éßñœ “”–… αβγ жщю אבג عربي हिन्दी 中文 日本語 한국어 😀"

# Exceptions from loading a damaged, hostile or unknown model directory, except out of memory.
LOAD_ERRORS: tuple[type[Exception], ...] = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    ImportError,
    RuntimeError,
)
LOAD_ERRORS += (StrictDataclassError, SafetensorError, pickle.UnpicklingError)
LOAD_ERRORS += (AssertionError,)  # torch, of a padding_idx


def check_model(model: config.Model, max_length: int) -> Any:
    """Read and check the base model's configuration, before anything large is downloaded.

    Raises:
        UserError: the model is not available, has files that must not be read (`base_files.py`), is of an unsupported
            kind (`families.py`), or has a context shorter than `max_length`.
    """
    if not is_directory(model.base):
        if model.base.startswith((".", "/", "~")) or model.base.count("/") > 1:
            raise UserError(f"model.base = {model.base}: no such directory; give another with --model, or use --tiny")
        hub_reachable()  # if not, switches to offline mode, so that the next lines fail at once
    try:
        check_files(model.base)
        said, _ = PreTrainedConfig.get_config_dict(location(model.base))
        refuse_by_file(location(model.base), said)
        check_configuration(model.base, said)
        _try_configuration(model.base, said)
        loaded = AutoConfig.from_pretrained(location(model.base), trust_remote_code=False)
        refuse_by_kind(model.base, said, loaded, weight_bytes(model.base))
    except LOAD_ERRORS as error:
        raise cannot_load(model.base, error) from error
    longest = getattr(loaded, "max_position_embeddings", None)
    if longest is not None and max_length > longest:
        raise UserError(
            f"tokenization.max_length = {max_length}: {model.base} takes at most {longest} tokens; "
            f"use --set tokenization.max_length={longest}"
        )
    return loaded


def load_tokenizer(
    base: str, tokenization: config.Tokenization | None = None, bos: str = "tokenizer"
) -> PreTrainedTokenizerBase:
    """Load the base model's tokenizer, with padding on the right and the training prompt as its chat template.

    Args:
        tokenization: the prompt and the padding token; None: the defaults.
        bos: the rule for BOS, as in `set_prompt`.

    Raises:
        UserError: the tokenizer cannot be loaded, has no EOS token, is not a fast tokenizer, cannot express the prompt
            as a chat template, has a chat template that cannot be the prompt, or makes far too many tokens.
    """
    tokenization = tokenization or config.Tokenization()
    _try_tokenizer(base)
    try:
        tokenizer = AutoTokenizer.from_pretrained(location(base), trust_remote_code=False)
        if not tokenizer.is_fast or tokenizer.eos_token_id is None:
            why = "the model has no fast tokenizer" if not tokenizer.is_fast else "the tokenizer has no EOS token"
            raise UserError(f"model.base = {base}: {why}; choose another --model")
        tokenizer.padding_side = "right"
        if tokenization.pad_token == "eos":
            tokenizer.pad_token = tokenizer.eos_token
        else:
            # With a flag, not "if missing": TinyLlama-Chat's tokenizer already has a pad token.
            tokenizer.add_special_tokens({"pad_token": tokenization.pad_token})
        set_prompt(tokenizer, tokenization.prompt, bos)
    except LOAD_ERRORS as error:
        raise cannot_load(base, error) from error
    except Exception as error:
        if type(error) is not Exception:  # for a damaged tokenizer.json, tokenizers raises the base class itself
            raise
        raise cannot_load(base, error) from error
    return tokenizer


def tokens_without_weights(tokenizer: PreTrainedTokenizerBase, known: int) -> list[tuple[str, str]]:
    """Lines for the printed plan about tokens of the tokenizer that the weights lack, except the pad token.

    Args:
        known: the number of tokens that the weights have.

    Raises:
        UserError: a text may contain one of them, and the model has no embedding for it.
    """
    beyond = [token for token, number in tokenizer.get_vocab().items() if number >= known]
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    used = [t for t in beyond if t not in special or t in (tokenizer.bos_token, tokenizer.eos_token)]
    beyond = sorted(set(beyond) - {tokenizer.pad_token})
    what = f"its tokenizer has {len(beyond):,} token(s) beyond its {known:,} embeddings"
    if used:
        raise UserError(
            f"model.base = {tokenizer.name_or_path}: {what}, and texts may contain {sorted(used)[0]!r}: give the base "
            "that belongs to the tokenizer with --model"
        )
    if not beyond:
        return []
    return [
        ("tokenizer", f"{what} ({', '.join(beyond[:3])}, ...): not used in training, but the model cannot be exported")
    ]


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write a tokenizer's files so that transformers 4 and 5 can load them, with the chat template inside.

    They do not name code that the base's own tokenizer configuration names.

    Raises:
        OSError: they cannot be written.
    """
    # Written by Python first, because tokenizers has its own errors for a full disk.
    (directory / TOKENIZER).write_text(tokenizer.backend_tokenizer.to_str(pretty=True), encoding="utf-8")
    tokenizer.save_pretrained(directory, save_jinja_files=False)
    path = directory / TOKENIZER_CONFIG
    said = json.loads(path.read_text(encoding="utf-8"))
    if said.get("tokenizer_class") == "TokenizersBackend":  # the name in transformers 5, unknown to 4
        said["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(said.get("extra_special_tokens"), list):  # transformers 4 and 5 both read its older name
        said["additional_special_tokens"] = said.pop("extra_special_tokens")
    said = {key: value for key, value in said.items() if key not in OF_THIS_MACHINE}
    write_file(path, json.dumps(said, indent=2, ensure_ascii=False) + "\n")


def _try_configuration(base: str, said: Mapping[str, Any]) -> None:
    """Check in a limited process that the model of a configuration can be built, before it is built in this process.

    Args:
        said: config.json.

    Raises:
        UserError: the model cannot be built within the limits, for example because of too many layers or huge sizes.
    """
    where = directory_of(base)
    with contextlib.suppress(LookupError, TypeError, ImportError):  # imported once here, not in each limited process
        MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[said.get("model_type")]]

    def build() -> None:
        torch.set_num_threads(1)
        with contextlib.suppress(*LOAD_ERRORS):  # reported when the model is built in this process
            without_contents(AutoConfig.from_pretrained(where, trust_remote_code=False))

    try:
        limited(build)
    except Failed as error:
        raise UserError(
            f"model.base = {base}: the model that config.json describes cannot be built: {error}; download the "
            "model again, or give another with --model"
        ) from error


def _try_tokenizer(base: str) -> None:
    """Check in a limited process that tokenizer.json can be loaded and used.

    A normalizer may replace any text by another, and matching a pattern may take for ever. They are tested on a text
    with printable ASCII, a few other scripts, and every string that tokenizer.json itself contains.

    Raises:
        UserError: it takes too much time or memory, or makes far too many tokens.
    """
    where = directory_of(base)
    path = where / TOKENIZER if where else None
    if path is None or not path.is_file():
        return

    def probe() -> list[int]:
        tokenizer = Tokenizer.from_file(str(path))
        patterns = re.findall(r'"String"\s*:\s*("(?:[^"\\]|\\.)*")', path.read_text(encoding="utf-8"))
        text = "\n".join((prompt(string.printable + SCRIPTS), *map(json.loads, patterns)))
        return [len(tokenizer.encode(text, add_special_tokens=False)), len(text.encode())]

    try:
        tokens, size = limited(probe)
    except OverLimit as error:
        raise UserError(
            f"model.base = {base}: its {TOKENIZER} cannot be used: {error} to tokenize a short text; download the "
            "model again, or give another with --model"
        ) from error
    except Failed:
        return  # reported when the tokenizer is loaded in this process
    if tokens > MAX_TOKENS_PER_BYTE * size:
        raise UserError(
            f"model.base = {base}: {TOKENIZER} yields {tokens:,} tokens for {size:,} bytes (limit "
            f"{MAX_TOKENS_PER_BYTE} per byte); it is probably damaged; download the model again, or give another with "
            "--model"
        )


def load_base(
    model: config.Model, settings: Settings, device: torch.device, vocabulary: int, seed: int
) -> PreTrainedModel:
    """Load the frozen base model onto its device, quantized as the settings say.

    If the model is to be sharded, the first process loads it into host memory, and the others build it on the meta
    device.

    Args:
        vocabulary: the size of the tokenizer; smaller embeddings are resized.

    Raises:
        UserError: the model cannot be loaded, or weights are missing or have another shape.
    """
    device = loading_device(device, settings.shards)
    torch.manual_seed(seed)  # for the new rows of resized embeddings
    if device == BLANK:
        loaded = blank_base(location(model.base), settings, vocabulary)
    else:
        loaded = _from_pretrained(model.base, settings, device)
    loaded.requires_grad_(False)
    if settings.quantization == "4bit" and settings.dequantize:
        expand(loaded)
    elif settings.quantization == "4bit" and device.type == "cpu":
        keep_unpacked(loaded)
    if vocabulary > loaded.get_input_embeddings().num_embeddings:
        _add_tokens(loaded, vocabulary)
    loaded.config.use_cache = False
    if settings.gradient_checkpointing:
        # The newer name, activation_checkpointing_enable, is not in transformers 5.17 yet.
        loaded.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return loaded


def load_model(
    experiment: Experiment, settings: Settings, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> PeftModel:
    """Load the frozen base model and add LoRA adapters, as the experiment and the settings say.

    Raises:
        UserError: the base model cannot be loaded, or the adapters do not fit it.
    """
    seed = experiment.training.seed
    if settings.return_memory:
        return_freed_memory()
    base = load_base(experiment.model, settings, device, len(tokenizer), seed)
    return add_lora(base, experiment.lora, seed, settings.fast_lora)


def add_lora(base: torch.nn.Module, lora: config.Lora, seed: int, fast: bool = False) -> PeftModel:
    """Add LoRA adapters in float32, which are the only trainable parameters.

    Args:
        fast: compute the adapters with `fast_lora.py`, which draws other dropout masks. PEFT always computes DoRA.

    Raises:
        UserError: the model does not have a target module, or `init_from` does not fit or is another kind of LoRA.
    """
    check_targets(base, lora)
    torch.manual_seed(seed)
    model = get_peft_model(
        base,
        LoraConfig(
            r=lora.r,
            lora_alpha=lora.lora_alpha,
            lora_dropout=lora.lora_dropout,
            target_modules=lora.target_modules,
            bias=lora.bias,
            use_rslora=lora.use_rslora,
            use_dora=lora.use_dora,
            task_type="CAUSAL_LM",
        ),
    )
    if fast and not lora.use_dora:
        use_fast_lora(model)
    if lora.init_from is not None:
        directory = Path(os.path.expanduser(lora.init_from))
        if (directory / ADAPTER_CONFIG).exists():  # the weights alone do not show which kind of LoRA it is
            _require_same_kind(directory, lora)
        load_adapter_weights(model, directory, "lora.init_from")
    return model


def _require_same_kind(directory: Path, lora: config.Lora) -> None:
    """Refuse an adapter to start from that is another kind of LoRA than the new adapter.

    Raises:
        UserError: it is not plain LoRA, or its `use_rslora` or `use_dora` differs from the `lora` section.
    """
    where = f"lora.init_from = {directory}"
    said, _ = plain_lora(where, directory)
    for key in ("use_rslora", "use_dora"):
        there, now = getattr(said, key), getattr(lora, key)
        if there != now:
            raise UserError(
                f"{where}: this adapter was trained with {key}: {there}, and lora.{key} = {now}; use --set "
                f"lora.{key}={str(there).lower()}, or start from another adapter"
            )


def load_adapter_weights(model: PeftModel, directory: Path, what: str) -> None:
    """Load a saved adapter's weights into the model's adapter.

    Raises:
        UserError: there is no adapter, it is damaged, or it has other shapes.
    """
    name = f"{what} = {directory}"
    fit_adapter(model, read_adapter(directory, name), name)


def fit_adapter(model: PeftModel, weights: Mapping[str, torch.Tensor], what: str) -> None:
    """Load weights into the model's adapter.

    Raises:
        UserError: the weights have other names or shapes.
    """
    expected = {name: tensor.shape for name, tensor in adapter_weights(model).items()}
    if {name: tensor.shape for name, tensor in weights.items()} != expected:
        raise UserError(
            f"{what}: this adapter does not fit: its names or shapes differ from those that follow from lora.r, "
            "lora.target_modules and the base model"
        )
    set_peft_model_state_dict(model, dict(weights))


def adapter_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    """The adapter's weights by PEFT's names, on the CPU, without weights of the base, even if its embeddings grew."""
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}


def _from_pretrained(base: str, settings: Settings, device: torch.device) -> PreTrainedModel:
    """Load the model with transformers; every weight must be in the files."""
    if device.type == "cuda":  # with an index, because Accelerate compares devices with one
        device = torch.device("cuda", torch.cuda.current_device())
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            location(base),
            dtype=settings.dtype,
            quantization_config=four_bit_config(settings.dtype) if settings.quantization == "4bit" else None,
            device_map={"": device},
            attn_implementation=settings.attn_implementation,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except LOAD_ERRORS as error:
        if is_out_of_memory(error):
            raise
        raise cannot_load(base, error) from error
    if info["missing_keys"]:
        raise UserError(
            f"model.base = {base}: weights are missing: {', '.join(sorted(info['missing_keys'])[:3])}, ...; "
            "download the model again, or give another with --model"
        )
    return loaded


def _add_tokens(model: PreTrainedModel, vocabulary: int) -> None:
    """Resize the embeddings to `vocabulary` tokens; new tokens can be input but are never predicted.

    As another class of the softmax, a new token would change every loss, and the adapter, which is saved without it,
    would have another loss on the original base. A bias of minus infinity excludes the class, at no cost.
    """
    known = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(vocabulary)
    head = model.get_output_embeddings()
    bias = torch.zeros(head.weight.shape[0], dtype=head.weight.dtype, device=head.weight.device)
    bias[known:] = -torch.inf
    head.bias = torch.nn.Parameter(bias)
    model.requires_grad_(False)


def cannot_load(base: str, error: Exception) -> UserError:
    """The message about a base model that cannot be loaded."""
    if is_directory(base):
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        return UserError(
            f"model.base = {base}: cannot be loaded from this directory: {reason}; download the model again "
            "(config.json, model.safetensors, tokenizer.json), or give another with --model"
        )
    why = "the Hugging Face Hub does not answer and it is not in the cache" if not hub_reachable() else str(error)
    return UserError(
        f"model.base = {base}: is not available, neither on disk nor on the hub ({why}); "
        "give a local directory with --model, or try --tiny, which needs no network"
    )
