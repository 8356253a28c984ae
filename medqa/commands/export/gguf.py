"""Write a Llama model with its vocabulary as a GGUF file for llama.cpp and Ollama, and read it back to compare it."""

import heapq
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from medqa.data.tokens import prompt, prompt_of
from medqa.errors import UserError

# ----------------------------------------------------------------------------------------------------
# A tokenizer in GGUF's form: pieces with scores (SentencePiece's BPE), or bytes with merges (GPT-2's BPE).
#
# For the first kind llama.cpp uses neither merges nor `tokenizer.json`: it joins the neighbours whose union has the
# highest score. Scores that follow the order of the merges make it join the same pieces, if every way to join two
# pieces into a third is a merge. `joined_by_score` tests on real prompts whether that is so.

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's token types
WORD_START = "▁"
NO_SCORE = -1e9
ODD = "  two  spaces\n\n\t5 µg/ml € 漢字 🙂 naïve  "  # characters that few questions have


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary in GGUF's form.

    Attributes:
        model: `llama` (pieces with scores) or `gpt2` (bytes with merges).
        tokens: the text of each id; `kinds` and `scores` belong to them.
        merges: only for `gpt2`, in order.
        space_prefix: whether a space is put before text (only for `llama`).
    """

    model: str
    tokens: list[str]
    kinds: list[int]
    scores: list[float]
    merges: list[str] = field(default_factory=list)
    space_prefix: bool = False


def vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """The tokenizer's vocabulary, padded with unused tokens to the model's `size`.

    Raises:
        UserError: GGUF cannot express the tokenizer; the message says which part.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise _cannot(tokenizer, f"its model is {model['type']}, not BPE")
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ", 1)) for pair in model["merges"]]
    tokens, kinds = _tokens_and_kinds(tokenizer, described, size)
    if _is_byte_level(described):
        return Vocabulary("gpt2", tokens, kinds, [], [f"{left} {right}" for left, right in merges])
    if not model["byte_fallback"] or not _marks_words(described):
        what = (described["pre_tokenizer"] or described["normalizer"] or {}).get("type", "nothing")
        raise _cannot(tokenizer, f"its text is prepared by {what}, which llama.cpp may not support")
    rank: dict[str, int] = {}
    for left, right in merges:
        rank.setdefault(left + right, len(rank))
    kinds = [BYTE if _is_byte(text) and kind == NORMAL else kind for text, kind in zip(tokens, kinds, strict=True)]
    scores = [-float(rank[text]) if text in rank else NO_SCORE for text in tokens]
    scores = [score if kind == NORMAL else 0.0 for score, kind in zip(scores, kinds, strict=True)]
    start = tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).tokens[0]
    return Vocabulary("llama", tokens, kinds, scores, space_prefix=start.startswith(WORD_START))


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, found: Vocabulary, questions: list[str]) -> None:
    """Tokenize prompts by the written scores, as llama.cpp does, and compare.

    Raises:
        UserError: they give other ids than the tokenizer, so that prompts would differ from those in training.
    """
    if found.model != "llama":
        return  # the file has the merges themselves
    ids = {token: i for i, token in enumerate(found.tokens)}
    for question in (*questions, ODD):
        text = prompt(question)
        if (
            joined_by_score(found, text, ids)
            != tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        ):
            raise _cannot(tokenizer, f"its merges cannot be expressed as scores ({question[:60]!r} gives other tokens)")


def joined_by_score(found: Vocabulary, text: str, ids: Mapping[str, int]) -> list[int]:
    """The ids of a text, without BOS: neighbours are joined by the best score, leftmost first; the rest by bytes.

    Args:
        ids: the id of each of `found.tokens`.
    """
    symbols: list[str | None] = list((" " * found.space_prefix + text).replace(" ", WORD_START))
    before, after = list(range(-1, len(symbols) - 1)), [*range(1, len(symbols)), -1]
    waiting: list[tuple[float, int, int, str]] = []

    def offer(left: int, right: int) -> None:
        if left >= 0 and right >= 0 and (joined := f"{symbols[left]}{symbols[right]}") in ids:
            heapq.heappush(waiting, (-found.scores[ids[joined]], left, right, joined))

    for i in range(1, len(symbols)):
        offer(i - 1, i)
    while waiting:
        _, left, right, joined = heapq.heappop(waiting)
        if symbols[left] is None or symbols[right] is None or f"{symbols[left]}{symbols[right]}" != joined:
            continue  # one of them has been joined to another since then
        symbols[left], symbols[right] = joined, None
        after[left] = after[right]
        if after[left] >= 0:
            before[after[left]] = left
        offer(before[left], left)
        offer(left, after[left])
    result = []
    for symbol in filter(None, symbols):
        result += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return result


def gguf_chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template for llama.cpp, which itself puts the space before a first word after a BOS written as text."""
    template = tokenizer.get_chat_template()
    own = prompt_of(tokenizer).kind == "instruction"
    return template.replace("{{ bos_token }} ", "{{ bos_token }}", 1) if own else template


def bos_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of the BOS that the prompt begins with, which llama.cpp adds by itself; "" if the prompt has no BOS."""
    own, bos = prompt_of(tokenizer), tokenizer.bos_token or ""
    return bos if own.bos or (bos and own.before.startswith(bos)) else ""


def _tokens_and_kinds(
    tokenizer: PreTrainedTokenizerBase, described: dict[str, Any], size: int
) -> tuple[list[str], list[int]]:
    """The text and type of every id."""
    known = {i: text for text, i in tokenizer.get_vocab().items()}
    tokens = [known.get(i, f"<unused{i}>") for i in range(size)]
    kinds = [NORMAL if i in known else UNUSED for i in range(size)]
    for added in described["added_tokens"]:
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if tokenizer.unk_token_id is not None:
        kinds[tokenizer.unk_token_id] = UNKNOWN
    return tokens, kinds


def _is_byte_level(described: dict[str, Any]) -> bool:
    """Whether text is split by GPT-2's pattern only, and then by bytes."""
    before = described["pre_tokenizer"] or {}
    plain = before.get("use_regex") and not before.get("add_prefix_space")
    return before.get("type") == "ByteLevel" and bool(plain) and described["normalizer"] is None


def _marks_words(described: dict[str, Any]) -> bool:
    """Whether the only change to a text is a mark in place of each space, and perhaps one in front."""
    normalizer, before = described["normalizer"], described["pre_tokenizer"]
    if before is not None:
        metaspace = before.get("type") == "Metaspace" and before.get("replacement") == WORD_START
        return metaspace and not before.get("split") and normalizer is None
    steps = normalizer["normalizers"] if normalizer and normalizer.get("type") == "Sequence" else [normalizer]
    replacing = {"type": "Replace", "pattern": {"String": " "}, "content": WORD_START}
    return steps in ([replacing], [{"type": "Prepend", "prepend": WORD_START}, replacing])


def _is_byte(text: str) -> bool:
    """Whether it is a token for one byte, for example `<0x0A>`."""
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _cannot(tokenizer: PreTrainedTokenizerBase, why: str) -> UserError:
    """The error about a tokenizer that GGUF cannot express."""
    return UserError(
        f"model.base = {tokenizer.name_or_path}: its tokenizer cannot be written as GGUF: {why}; use --format merged"
    )


# ----------------------------------------------------------------------------------------------------

if TYPE_CHECKING:
    from gguf import GGUFWriter

ARCHITECTURE = "llama"
# Values of config.json that llama.cpp's Llama assumes.
FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
Q8_BLOCK = 32  # weights that share one scale


def check_expressible(config: Any, base: str) -> None:
    """Check before anything is loaded or written whether this model can be a GGUF file.

    Raises:
        UserError: another architecture, a Llama with unsupported parts, or the library is not installed.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError("--format gguf: run `pip install gguf` to use it") from error
    advice = "use --format merged, and llama.cpp's own convert_hf_to_gguf.py if it knows it"
    if config.model_type != ARCHITECTURE:
        raise UserError(f"model.base = {base}: a {config.model_type} model; only llama is written as GGUF; {advice}")
    odd = [f"{key} = {getattr(config, key)}" for key, value in FIXED.items() if getattr(config, key, value) != value]
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        odd.append(f"rope_type = {rope['rope_type']}")
    if odd:
        raise UserError(f"model.base = {base}: {', '.join(odd)} cannot be written as GGUF; {advice}")


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

    writer = GGUFWriter(path, ARCHITECTURE)
    try:
        _describe(writer, model.config, outtype, about)
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
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    weights = dict(read_weights(path, config))
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    return model.to(device).eval()


def read_weights(path: Path, config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight of a file, dequantized to float32, with transformers' name and order of rows."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    names = {there: here for here, there in _names(config).items()}
    for found in GGUFReader(path).tensors:
        values = torch.from_numpy(dequantize(found.data, found.tensor_type).astype(np.float32))
        here = names[found.name]
        heads = _rotated_heads(here, config)
        yield here, rotate_halves(values, heads) if heads else values


def rotate_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder rows of queries or keys, [heads x size, hidden], from transformers' order to llama.cpp's.

    RoPE rotates pairs of a head's rows: (i, i + size/2) in transformers, (2i, 2i + 1) in llama.cpp and in Meta's files.
    """
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def rotate_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `rotate_pairs`."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight with llama.cpp's name and order of rows, float32, on the CPU."""
    weights = model.state_dict()
    for here, there in _names(model.config).items():
        heads = _rotated_heads(here, model.config)
        yield there, (rotate_pairs(weights[here], heads) if heads else weights[here]).float().cpu().contiguous()


def _names(config: Any) -> dict[str, str]:
    """Map transformers' name of each weight to llama.cpp's. Tied embeddings occur once, as in llama.cpp.

    Raises:
        RuntimeError: llama.cpp has no name for a weight; `check_expressible` should have refused the model.
    """
    from gguf import MODEL_ARCH, get_tensor_name_map

    known = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    with torch.device("meta"):  # only the names are needed
        names = AutoModelForCausalLM.from_config(config, trust_remote_code=False).state_dict().keys()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    found = {name: known.get_name(name, (".weight",)) for name in names if name not in tied}
    if unknown := [name for name, there in found.items() if there is None]:
        raise RuntimeError(f"llama.cpp has no name for {', '.join(unknown)}")
    return {name: str(there) for name, there in found.items()}


def _rotated_heads(name: str, config: Any) -> int:
    """The number of heads of a weight whose rows RoPE rotates; 0 for other weights."""
    if name.endswith("q_proj.weight"):
        return config.num_attention_heads
    return config.num_key_value_heads if name.endswith("k_proj.weight") else 0


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


def _describe(writer: "GGUFWriter", config: Any, outtype: str, about: dict[str, str]) -> None:
    """Write the model's description."""
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_type("model")
    writer.add_name(about["name"])
    writer.add_license(about["license"])
    writer.add_description(about["description"])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(LlamaFileType.MOSTLY_Q8_0 if outtype == "q8_0" else LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(GGML_QUANT_VERSION)


def _describe_tokenizer(writer: "GGUFWriter", tokenizer: PreTrainedTokenizerBase, words: Vocabulary) -> None:
    """Write the tokenizer: one BOS if the prompt has one, no EOS, and the training prompt as the chat template."""
    own = prompt_of(tokenizer)
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre("gpt-2" if words.model == "gpt2" else "default")
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
