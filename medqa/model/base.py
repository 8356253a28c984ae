"""The tokenizer, the frozen base model (plain or 4-bit) and LoRA adapters on it."""

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
from medqa.data.tokens import chat_template, prompt
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
    """Expand every 4-bit weight, once, to what each forward and backward would expand it to again.

    The numbers stay those of 4-bit; what is saved is the work, what it costs is the memory that 4-bit saves.
    """
    model.dequantize()
    model.is_loaded_in_4bit = False  # else PEFT would look for bitsandbytes' layers
    model.requires_grad_(False)


def keep_unpacked(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights at the first evaluation on CPUs with AVX512-BF16.

    The packed layer has no backward: gradients after it are silently wrong (cosine 0.29 to the right ones, measured).
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


# ----------------------------------------------------------------------------------------------------

TOKENIZER_CONFIG = "tokenizer_config.json"
# In a tokenizer's configuration, what says where and by what it was loaded, or which code would load it.
OF_THIS_MACHINE = ("backend", "is_local", "local_files_only", "auto_map")
SCRIPTS = "éßñœ “”–… αβγ жщю אבג عربي हिन्दी 中文 日本語 한국어 😀"

# What loading a damaged, hostile or unknown model directory raises, out-of-memory excepted.
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
    """The base model's configuration, read before anything large is fetched.

    Raises:
        UserError: not on disk nor reachable, of files that are not to be read (`base_files.py`), no model of a kind
            that can be a base (`families.py`), or too short for `max_length`.
    """
    if not is_directory(model.base):
        if model.base.startswith((".", "/", "~")) or model.base.count("/") > 1:
            raise UserError(f"model.base = {model.base}: no such directory; give another with --model, or use --tiny")
        hub_reachable()  # where it is not, what follows fails at once instead of after a minute of retries
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


def load_tokenizer(base: str, pad_token: str) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, padding on the right, its chat template the training prompt.

    Args:
        pad_token: `eos`, or the token to add.

    Raises:
        UserError: it cannot be loaded, has no EOS, is not a fast one, cannot express the prompt as a chat template, or
            makes far more of a text than a tokenizer should.
    """
    _try_tokenizer(base)
    try:
        tokenizer = AutoTokenizer.from_pretrained(location(base), trust_remote_code=False)
        if not tokenizer.is_fast or tokenizer.eos_token_id is None:
            raise UserError(
                f"model.base = {base}: its tokenizer has no EOS or is not a fast one; choose another --model"
            )
        tokenizer.padding_side = "right"
        if pad_token == "eos":
            tokenizer.pad_token = tokenizer.eos_token
        else:
            # By flag, not "if absent": TinyLlama-Chat's tokenizer comes with a pad token already.
            tokenizer.add_special_tokens({"pad_token": pad_token})
        # The base's own template (TinyLlama's says `<|user|>`) would have servers send a prompt it was not trained on.
        tokenizer.chat_template = chat_template(tokenizer)
    except LOAD_ERRORS as error:
        raise cannot_load(base, error) from error
    except Exception as error:
        if type(error) is not Exception:  # over a damaged tokenizer.json, tokenizers raises the base class itself
            raise
        raise cannot_load(base, error) from error
    return tokenizer


def tokens_without_weights(tokenizer: PreTrainedTokenizerBase, known: int) -> list[tuple[str, str]]:
    """What the plan says of tokens that a base's tokenizer has and its weights have not, beside the token for padding.

    Args:
        known: how many tokens the weights have.

    Raises:
        UserError: a text may contain one of them, and the model would have to read or predict what it has not learned.
    """
    beyond = [token for token, number in tokenizer.get_vocab().items() if number >= known]
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    used = [t for t in beyond if t not in special or t in (tokenizer.bos_token, tokenizer.eos_token)]
    beyond = sorted(set(beyond) - {tokenizer.pad_token})
    what = f"its tokenizer has {len(beyond):,} token(s) that its {known:,} embeddings lack"
    if used:
        raise UserError(
            f"model.base = {tokenizer.name_or_path}: {what}, and texts may contain {sorted(used)[0]!r}: give the base "
            "that belongs to the tokenizer with --model"
        )
    if not beyond:
        return []
    return [
        ("tokenizer", f"{what} ({', '.join(beyond[:3])}, ...): they do not occur in training, but no export is made")
    ]


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write a tokenizer's files for any transformers from 4 on: the template inside, and a class that 4 has as well.

    No code that the base's own tokenizer configuration names is named in them.

    Raises:
        OSError: they cannot be written.
    """
    # Python writes as much first: tokenizers has errors of its own for a full disk.
    (directory / TOKENIZER).write_text(tokenizer.backend_tokenizer.to_str(pretty=True), encoding="utf-8")
    tokenizer.save_pretrained(directory, save_jinja_files=False)
    path = directory / TOKENIZER_CONFIG
    said = json.loads(path.read_text(encoding="utf-8"))
    if said.get("tokenizer_class") == "TokenizersBackend":  # what transformers 5 calls it, and 4 does not know
        said["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(said.get("extra_special_tokens"), list):  # what 4 reads under its name of old, as 5 does too
        said["additional_special_tokens"] = said.pop("extra_special_tokens")
    said = {key: value for key, value in said.items() if key not in OF_THIS_MACHINE}
    write_file(path, json.dumps(said, indent=2, ensure_ascii=False) + "\n")


def _try_configuration(base: str, said: Mapping[str, Any]) -> None:
    """See that the model of a configuration can be built within the limits, before it is built in this process.

    Args:
        said: config.json.

    Raises:
        UserError: it cannot: it has far too many layers, or sizes that no machine has room for.
    """
    where = directory_of(base)
    with contextlib.suppress(LookupError, TypeError, ImportError):  # imported here, it need not be imported twice
        MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[said.get("model_type")]]

    def build() -> None:
        torch.set_num_threads(1)
        with contextlib.suppress(*LOAD_ERRORS):  # what is wrong with it is said when it is built here
            without_contents(AutoConfig.from_pretrained(where, trust_remote_code=False))

    try:
        limited(build)
    except Failed as error:
        raise UserError(
            f"model.base = {base}: the model that config.json describes cannot be built: {error}; fetch the model "
            "again, or give another with --model"
        ) from error


def _try_tokenizer(base: str) -> None:
    """See that tokenizer.json can be loaded and used within the limits, before this process does.

    A normalizer may put any text in place of another, and a pattern may take for ever to match. What they do is seen on
    a probe: printable ASCII, a few other scripts, and every string that tokenizer.json itself looks for.

    Raises:
        UserError: it takes too long or too much memory, or makes far too many tokens.
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
            f"model.base = {base}: its {TOKENIZER} cannot be used: {error} to make tokens of a short text; fetch the "
            "model again, or give another with --model"
        ) from error
    except Failed:
        return  # what is wrong with it is said when it is loaded here
    if tokens > MAX_TOKENS_PER_BYTE * size:
        raise UserError(
            f"model.base = {base}: its {TOKENIZER} makes {tokens:,} tokens of {size:,} bytes of text, and at most "
            f"{MAX_TOKENS_PER_BYTE} for each byte are usable; fetch the model again, or give another with --model"
        )


def load_base(
    model: config.Model, settings: Settings, device: torch.device, vocabulary: int, seed: int
) -> PreTrainedModel:
    """The base model on its device, frozen, quantized as the settings say.

    A model that is to be sharded is loaded into the host's memory, by the first process alone; the others get a model
    without contents.

    Args:
        vocabulary: the tokenizer's size; the embeddings grow where it is larger than the model's.

    Raises:
        UserError: it cannot be loaded, or weights are missing or of another shape.
    """
    device = loading_device(device, settings.shards)
    torch.manual_seed(seed)  # for the rows that growing the embeddings adds
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
        # Its newer name, activation_checkpointing_enable, is not in transformers 5.17 yet.
        loaded.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return loaded


def load_model(
    experiment: Experiment, settings: Settings, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> PeftModel:
    """The frozen base with LoRA adapters, as this experiment and these settings want it.

    Raises:
        UserError: the base cannot be loaded, or the adapters do not fit it.
    """
    seed = experiment.training.seed
    if settings.return_memory:
        return_freed_memory()
    base = load_base(experiment.model, settings, device, len(tokenizer), seed)
    return add_lora(base, experiment.lora, seed, settings.fast_lora)


def add_lora(base: torch.nn.Module, lora: config.Lora, seed: int, fast: bool = False) -> PeftModel:
    """The base with LoRA adapters in float32, the only parameters that train.

    Args:
        fast: compute it on a CPU as `fast_lora.py` does, with other noise.

    Raises:
        UserError: a target module that the model does not have, or `init_from` does not fit.
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
            task_type="CAUSAL_LM",
        ),
    )
    if fast:
        use_fast_lora(model)
    if lora.init_from is not None:
        directory = Path(os.path.expanduser(lora.init_from))
        load_adapter_weights(model, directory, "lora.init_from")
        if (directory / ADAPTER_CONFIG).exists():  # the weights alone do not say that they are to be used otherwise
            plain_lora(f"lora.init_from = {directory}", directory)
    return model


def load_adapter_weights(model: PeftModel, directory: Path, what: str) -> None:
    """Put a saved adapter's weights into the model's adapter.

    Raises:
        UserError: no adapter there, damaged, or of another shape than this one.
    """
    name = f"{what} = {directory}"
    fit_adapter(model, read_adapter(directory, name), name)


def fit_adapter(model: PeftModel, weights: Mapping[str, torch.Tensor], what: str) -> None:
    """Put an adapter's weights into the model's adapter.

    Raises:
        UserError: they are of another shape.
    """
    expected = {name: tensor.shape for name, tensor in adapter_weights(model).items()}
    if {name: tensor.shape for name, tensor in weights.items()} != expected:
        raise UserError(
            f"{what}: this adapter does not fit: its names or shapes differ from those that lora.r, "
            "lora.target_modules and the base model give"
        )
    set_peft_model_state_dict(model, dict(weights))


def adapter_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    """The adapter's weights by PEFT's names, on the CPU; nothing of the base model, even with a grown vocabulary."""
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}


def _from_pretrained(base: str, settings: Settings, device: torch.device) -> PreTrainedModel:
    """The model as transformers loads it, every weight read from the file."""
    if device.type == "cuda":  # by number, as Accelerate compares it
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
            "fetch the model again, or give another with --model"
        )
    return loaded


def _add_tokens(model: PreTrainedModel, vocabulary: int) -> None:
    """Grow the embeddings to `vocabulary` tokens; the new ones can be read but are never predicted.

    As one more class of the softmax a new token would shift every loss, and the adapter, which is saved without it,
    would give another loss on the untouched base. A bias of minus infinity takes its class away, at no cost.
    """
    known = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(vocabulary)
    head = model.get_output_embeddings()
    bias = torch.zeros(head.weight.shape[0], dtype=head.weight.dtype, device=head.weight.device)
    bias[known:] = -torch.inf
    head.bias = torch.nn.Parameter(bias)
    model.requires_grad_(False)


def cannot_load(base: str, error: Exception) -> UserError:
    """What the user is told when a base model cannot be loaded."""
    if is_directory(base):
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        return UserError(
            f"model.base = {base}: cannot be loaded from this directory: {reason}; "
            "fetch the model again (config.json, model.safetensors, tokenizer.json), or give another with --model"
        )
    why = "the Hugging Face Hub does not answer and it is not in the cache" if not hub_reachable() else str(error)
    return UserError(
        f"model.base = {base}: neither on disk nor to be had from the hub ({why}); "
        "give a local directory with --model, or try --tiny, which needs no network"
    )
