"""Write a model with its vocabulary as a GGUF file for llama.cpp and Ollama, and read it back to compare it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from medqa.commands.export.gguf_vocabulary import Vocabulary, bos_text, gguf_chat_template
from medqa.data.tokens import prompt_of
from medqa.errors import UserError
from medqa.model.attention import attention_in_effect

if TYPE_CHECKING:
    from gguf import GGUFWriter

# ----------------------------------------------------------------------------------------------------
# What llama.cpp computes for each family. What its code assumes is checked in config.json before anything is loaded.


@dataclass(frozen=True)
class Family:
    """How llama.cpp computes a family of models.

    Attributes:
        architecture: llama.cpp's name.
        fixed: values of config.json that its code assumes.
        paired: RoPE rotates neighbouring rows of queries and keys, not rows that are half a head apart.
        shifted: norms are multiplied by their weight and not, as in transformers, by 1 + weight.
        windows: some layers attend to a sliding window. Without it, the context is cut to the window.
        ropes: the types of RoPE beside `default`.
    """

    architecture: str
    fixed: Mapping[str, Any]
    paired: bool = False
    shifted: bool = False
    windows: bool = False
    ropes: tuple[str, ...] = ()


SILU = {"hidden_act": "silu"}
GEMMA = {"attention_bias": False, "tie_word_embeddings": True}
NEW_GEMMA = {**GEMMA, "hidden_activation": "gelu_pytorch_tanh"}
FAMILIES = {
    "llama": Family(
        "llama", {**SILU, "attention_bias": False, "mlp_bias": False}, paired=True, ropes=("linear", "llama3")
    ),
    "mistral": Family("llama", SILU, paired=True, ropes=("linear",)),
    "qwen2": Family("qwen2", SILU, ropes=("linear",)),
    "qwen3": Family("qwen3", {**SILU, "attention_bias": False}, ropes=("linear",)),
    "gemma": Family("gemma", {**GEMMA, "hidden_act": "gelu_pytorch_tanh"}, shifted=True),
    "gemma2": Family("gemma2", NEW_GEMMA, shifted=True, windows=True),
    "gemma3_text": Family(
        "gemma3",
        {**NEW_GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None},
        shifted=True,
        windows=True,
    ),
}
GEMMA_2_27B = 46  # the number of layers by which llama.cpp recognizes it, to scale its queries differently
Q8_BLOCK = 32  # weights that share one scale
FREQUENCIES = "rope_freqs.weight"  # by what each frequency of RoPE is divided


def check_expressible(config: Any, base: str) -> None:
    """Check before anything is loaded or written whether this model can be a GGUF file.

    Raises:
        UserError: another architecture, parts that llama.cpp does not compute, or the library is not installed.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError("--format gguf: run `pip install gguf` to use it") from error
    advice = "use --format merged, and llama.cpp's own convert_hf_to_gguf.py if it knows it"
    family = FAMILIES.get(config.model_type)
    if family is None:
        known = ", ".join(FAMILIES)
        raise UserError(f"model.base = {base}: a {config.model_type} model; only {known} are written as GGUF; {advice}")
    odd = [
        f"{key} = {getattr(config, key)}" for key, value in family.fixed.items() if getattr(config, key, value) != value
    ]
    for rope in _ropes(config).values():
        if rope.get("rope_type", "default") not in ("default", *family.ropes):
            odd.append(f"rope_type = {rope['rope_type']}")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            odd.append(f"partial_rotary_factor = {rope['partial_rotary_factor']}")
    if config.model_type == "qwen2" and _head_dim(config) * config.num_attention_heads != config.hidden_size:
        odd.append(f"head_dim = {_head_dim(config)}")
    if config.model_type == "gemma2":
        odd += [f"{key} = None" for key in SOFT_CAPS if getattr(config, key, None) is None]
    if family.windows:
        if config.query_pre_attn_scalar != _query_scalar(config):
            odd.append(f"query_pre_attn_scalar = {config.query_pre_attn_scalar}")
        if _window_period(config) is None:
            odd.append("layer_types without a period")
    if odd:
        raise UserError(f"model.base = {base}: {', '.join(odd)} cannot be written as GGUF; {advice}")


SOFT_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")


def context_length(config: Any) -> int:
    """The longest context for which the file computes what transformers computes.

    llama.cpp has no sliding window for some families. Within one window, its attention is the same.
    """
    window = getattr(config, "sliding_window", None)
    if window is None or FAMILIES[config.model_type].windows:
        return config.max_position_embeddings
    return min(window, config.max_position_embeddings)


def _head_dim(config: Any) -> int:
    """The width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _query_scalar(config: Any) -> int:
    """The width by whose root llama.cpp divides the scores of Gemma 2 and 3."""
    largest = config.model_type == "gemma2" and config.num_hidden_layers == GEMMA_2_27B
    return config.hidden_size // config.num_attention_heads if largest else _head_dim(config)


def _window_period(config: Any) -> int | None:
    """The number n where every n-th layer attends to everything and the others to a window; None if there is none."""
    slides = [kind == "sliding_attention" for kind in config.layer_types]
    periods = range(1, len(slides) + 2)
    return next((n for n in periods if slides == [i % n < n - 1 for i in range(len(slides))]), None)


def _ropes(config: Any) -> dict[str, dict[str, Any]]:
    """The parameters of RoPE of the layers of each type; with one type of layers only, of `full_attention`."""
    found = config.rope_parameters
    return {"full_attention": found} if "rope_theta" in found else found


# ----------------------------------------------------------------------------------------------------
# Weights.


def write_gguf(
    path: Path,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    words: Vocabulary,
    outtype: str,
    about: dict[str, str],
) -> None:
    """Write the model, which is in float32, as a GGUF file.

    Args:
        outtype: `f16` or `q8_0`; norms are float32 in both.
        about: `name`, `license`, `description`.

    Raises:
        UserError: there is no space.
    """
    from gguf import GGUFWriter

    config: Any = model.config
    writer = GGUFWriter(path, FAMILIES[config.model_type].architecture)
    try:
        _describe(writer, config, outtype, about)
        _describe_tokenizer(writer, tokenizer, words)
        for name, tensor in _tensors(model):
            shape, dtype = _stored_shape(tensor, outtype)
            size = int(np.prod(shape)) * dtype.itemsize
            kind = _kind(tensor.shape, outtype)
            writer.add_tensor_info(name, shape, dtype, size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, tensor in _tensors(model):  # one at a time, because a second copy would double the memory
            writer.write_tensor_data(_stored(tensor, outtype))
    except OSError as error:
        if error.errno is not None:
            raise
        # numpy reports a full disk only by the number of items that were not written.
        raise UserError(
            f"{path.parent.parent}: cannot be written: {error}; free space, or give another --to"
        ) from error
    finally:
        writer.close()


def load_gguf(path: Path, config: Any, device: torch.device) -> torch.nn.Module:
    """Read the model back from the file into transformers, in float32.

    Raises:
        RuntimeError: the file does not have exactly the weights of such a model.
    """
    attention, _ = attention_in_effect("sdpa", config)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=attention, trust_remote_code=False
    )
    weights = dict(read_weights(path, config))
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    return model.to(device).eval()


def read_weights(path: Path, config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight of a file, dequantized to float32, with transformers' name, order of rows, and norms."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    names = {there: here for here, there in _names(config).items()}
    for found in GGUFReader(path).tensors:
        if found.name == FREQUENCIES:
            continue  # they follow from the configuration
        values = torch.from_numpy(dequantize(found.data, found.tensor_type).astype(np.float32))
        here = names[found.name]
        heads = _rotated_heads(here, config)
        yield here, _shifted(rotate_halves(values, heads) if heads else values, here, config, -1.0)


def rotate_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder rows of queries or keys, [heads x size, hidden], from transformers' order to llama.cpp's.

    RoPE rotates pairs of a head's rows: (i, i + size/2) in transformers, (2i, 2i + 1) in llama.cpp and in Meta's files.
    """
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def rotate_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `rotate_pairs`."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight with llama.cpp's name, order of rows, and norms, float32, on the CPU."""
    config, weights = model.config, model.state_dict()
    for here, there in _names(config).items():
        heads = _rotated_heads(here, config)
        values = (rotate_pairs(weights[here], heads) if heads else weights[here]).float().cpu()
        yield there, _shifted(values, here, config, 1.0).contiguous()
    if _ropes(config)["full_attention"].get("rope_type") == "llama3":
        yield FREQUENCIES, _frequency_divisors(config)


def _names(config: Any) -> dict[str, str]:
    """Map transformers' name of each weight to llama.cpp's. Tied embeddings occur once, as in llama.cpp.

    Raises:
        RuntimeError: llama.cpp has no name for a weight; `check_expressible` should have refused the model.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    architecture = numbers[FAMILIES[config.model_type].architecture]
    known = get_tensor_name_map(architecture, config.num_hidden_layers)
    with torch.device("meta"):  # only the names are needed
        names = AutoModelForCausalLM.from_config(config, trust_remote_code=False).state_dict().keys()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    found = {name: known.get_name(name, (".weight", ".bias")) for name in names if name not in tied}
    if unknown := [name for name, there in found.items() if there is None]:
        raise RuntimeError(f"llama.cpp has no name for {', '.join(unknown)}")
    return {name: str(there) for name, there in found.items()}


def _rotated_heads(name: str, config: Any) -> int:
    """The number of heads of a weight whose rows are in another order in the file; 0 for other weights."""
    if not FAMILIES[config.model_type].paired:
        return 0
    if name.endswith("q_proj.weight"):
        return config.num_attention_heads
    return config.num_key_value_heads if name.endswith("k_proj.weight") else 0


def _shifted(weight: torch.Tensor, name: str, config: Any, by: float) -> torch.Tensor:
    """The weight, plus `by` if it is the weight of a norm that has another zero in the file."""
    return weight + by if FAMILIES[config.model_type].shifted and name.endswith("norm.weight") else weight


def _frequency_divisors(config: Any) -> torch.Tensor:
    """By what llama.cpp divides the frequencies of a plain RoPE to get those of Llama 3, [half the head's width]."""
    dim, theta = _head_dim(config), _ropes(config)["full_attention"]["rope_theta"]
    plain = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device=torch.device("cpu"))
    return plain / scaled


def _kind(shape: torch.Size, outtype: str) -> Any:
    """The type in which a weight is stored: norms in float32; rows that 8-bit blocks do not divide in float16."""
    from gguf import GGMLQuantizationType

    if len(shape) == 1:
        return GGMLQuantizationType.F32
    whole = outtype == "q8_0" and shape[-1] % Q8_BLOCK == 0
    return GGMLQuantizationType.Q8_0 if whole else GGMLQuantizationType.F16


def _stored_shape(tensor: torch.Tensor, outtype: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of the stored array."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quant_shape_to_byte_shape

    kind = _kind(tensor.shape, outtype)
    if kind == GGMLQuantizationType.Q8_0:
        return quant_shape_to_byte_shape(tuple(tensor.shape), kind), np.dtype(np.uint8)
    return tuple(tensor.shape), np.dtype(np.float32 if kind == GGMLQuantizationType.F32 else np.float16)


def _stored(tensor: torch.Tensor, outtype: str) -> np.ndarray:
    """The stored array."""
    from gguf.quants import quantize

    return quantize(tensor.numpy(), _kind(tensor.shape, outtype))


# ----------------------------------------------------------------------------------------------------
# Metadata.


def _describe(writer: "GGUFWriter", config: Any, outtype: str, about: dict[str, str]) -> None:
    """Write the model's description."""
    from gguf import GGML_QUANT_VERSION, LlamaFileType, RopeScalingType

    head_dim, ropes = _head_dim(config), _ropes(config)
    writer.add_type("model")
    writer.add_name(about["name"])
    writer.add_license(about["license"])
    writer.add_description(about["description"])
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(ropes["full_attention"]["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    if ropes["full_attention"].get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(ropes["full_attention"]["factor"])
    if FAMILIES[config.model_type].windows and (period := _window_period(config)) is not None:
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern(period)
    if "sliding_attention" in ropes:
        writer.add_rope_freq_base_swa(ropes["sliding_attention"]["rope_theta"])
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(LlamaFileType.MOSTLY_Q8_0 if outtype == "q8_0" else LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(GGML_QUANT_VERSION)


def _describe_tokenizer(writer: "GGUFWriter", tokenizer: PreTrainedTokenizerBase, words: Vocabulary) -> None:
    """Write the tokenizer: one BOS if the prompt has one, no EOS, and the training prompt as the chat template."""
    own = prompt_of(tokenizer)
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    if words.scores:
        writer.add_token_scores(words.scores)
    writer.add_token_types(words.kinds)
    if words.merges:
        writer.add_token_merges(words.merges)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if own.end != tokenizer.eos_token_id:
        writer.add_eot_token_id(own.end)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(bool(bos_text(tokenizer)))
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(words.space_prefix)
    writer.add_chat_template(gguf_chat_template(tokenizer))
