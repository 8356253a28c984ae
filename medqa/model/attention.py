"""Causal attention for concatenated examples: each token attends only to tokens of its own example.

It is registered with transformers under its own name, so that the code of a model family calls it. It never builds a
mask for the entire sequence, which would need memory quadratic in its length and most of what padding-free training
saves.
"""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from medqa.config import Experiment

SEGMENTED = "medqa_segmented"
VARLEN: set[tuple[str, torch.dtype]] = set()  # devices and types with the variable-length kernel (`find_varlen_kernel`)
# Devices and types for which batched matrix products compute the attention of segments of up to SHORT tokens. In
# bfloat16 on a CPU they took 0.3 to 0.5 of the time of torch's kernel for up to 400 tokens, and 0.9 for 800
# (AVX512-BF16, one thread). In float32 they are not faster.
PRODUCTS: set[tuple[str, torch.dtype]] = {("cpu", torch.bfloat16)}
SHORT = 600
# Families whose padding-free gradients a test compares with padded ones. Others may scale or cap logits, or mix layers.
TESTED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text")
CAPPED_SCORES = "attn_logit_softcapping"


def attention_in_effect(asked: str, model_config: Any) -> tuple[str, str | None]:
    """The attention implementation that the model supports, and the reason if it is not the requested one."""
    if asked == "sdpa" and getattr(model_config, CAPPED_SCORES, None) is not None:
        return "eager", f"{model_config.model_type} caps its attention scores ({CAPPED_SCORES}); sdpa cannot do that"
    return asked, None


def padding_needed(experiment: Experiment, model_config: Any) -> str | None:
    """Why a model must run with padding; None if it need not."""
    family = model_config.model_type
    for what, key in (("attention scores", CAPPED_SCORES), ("logits", "final_logit_softcapping")):
        if getattr(model_config, key, None) is not None:
            return f"{family} caps its {what} ({key} = {getattr(model_config, key):g}), which needs padding"
    if family not in TESTED:
        return f"{family} models have not been tested without padding, only {', '.join(TESTED)}"
    if experiment.model.attn_implementation == "eager":
        return "eager attention supports only masks"
    if "lm_head" in experiment.lora.target_modules:
        return "lm_head has an adapter, and without padding its weights must be frozen"
    return None


def segments_arguments(segments: Sequence[int], attention: str, device: torch.device) -> dict[str, Any]:
    """The arguments of the model's forward that keep attention inside each segment.

    Names and types are those of transformers' kernels for padding-free input, which flash-attention reads. `segments`
    is for `segmented_attention`. `position_ids` (1, tokens) restart at each segment.
    """
    lengths = torch.tensor(segments)
    ends = lengths.cumsum(0)
    position_ids = torch.arange(int(ends[-1])) - (ends - lengths).repeat_interleave(lengths)
    bounds = F.pad(ends, (1, 0)).int().to(device, non_blocking=True)
    arguments = {
        "position_ids": position_ids[None].to(device, non_blocking=True),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(segments),
        "max_length_k": max(segments),
    }
    if attention == SEGMENTED:
        arguments["segments"] = tuple(segments)
        # Four dimensions mark a finished mask, so that transformers neither builds one nor checks, with a device
        # synchronization, whether positions restart. Its content is not used.
        arguments["attention_mask"] = torch.empty(1, 1, 1, 0, device=device)
    return arguments


def segmented_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segments: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each segment; without segments, transformers' `sdpa`.

    Args:
        query: (1, heads, tokens, width); key and value have as many heads or a divisor of that number.
        segments: the length of each segment, in order; their sum is the number of tokens.
        sliding_window: in kwargs, how many tokens each token attends to, itself included; None: all before it.

    Returns:
        (1, tokens, heads, width), and None instead of attention weights.
    """
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    window = kwargs.get("sliding_window")
    if window is not None and window >= max(segments):
        window = None
    if window is None and dropout == 0 and (query.device.type, query.dtype) in VARLEN:
        return _varlen(query, key, value, scaling, kwargs["cu_seq_lens_q"], kwargs["max_length_q"]), None
    grouped = key.shape[1] != query.shape[1]
    if grouped and query.device.type == "cuda":  # otherwise older GPUs would use the kernel that needs most memory
        groups, grouped = query.shape[1] // key.shape[1], False
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    products = dropout == 0 and (query.device.type, query.dtype) in PRODUCTS
    outputs = []
    for q, k, v in zip(*(tensor.split(segments, dim=2) for tensor in (query, key, value)), strict=True):
        mask = None
        if window is not None and q.shape[2] > window:
            positions = torch.arange(q.shape[2], device=q.device)
            back = positions[:, None] - positions
            mask = (back >= 0) & (back < window)
        if products and q.shape[2] <= SHORT:
            scale = q.shape[3] ** -0.5 if scaling is None else scaling
            outputs.append(_Products.apply(q, k, v, scale, mask))
            continue
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1), None


class _Products(torch.autograd.Function):
    """Causal attention of one segment with batched matrix products. Backward recomputes the attention weights.

    On a CPU, torch's softmax computes in float32 for every input type, and rounds only the result.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the output, (1, heads, tokens, width). Shapes of the inputs as in `segmented_attention`, with batch 1.

        Args:
            mask: (tokens, tokens), true where a token attends to another; None: causal.
        """
        ctx.scale = scale
        ctx.save_for_backward(query, key, value, mask)
        with torch.autocast(query.device.type, enabled=False):
            weights = _weights(query, key, scale, mask)
            return (weights @ value[0]).view(query.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of query, key and value."""
        query, key, value, mask = ctx.saved_tensors
        with torch.autocast(query.device.type, enabled=False):
            weights = _weights(query, key, ctx.scale, mask)
            d_output = _grouped(gradient, key)
            d_weights = d_output @ value[0].transpose(1, 2)
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            d_query = (d_scores @ key[0]).mul_(ctx.scale).view(query.shape)
            d_key = d_scores.transpose(1, 2) @ (_grouped(query, key) * ctx.scale)
            return d_query, d_key[None], (weights.transpose(1, 2) @ d_output)[None], None, None


def _grouped(tensor: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Reshape (1, heads, tokens, width) to (heads of `key`, rows, width). Heads with the same key are adjacent."""
    return tensor.reshape(key.shape[1], -1, tensor.shape[3])


def _weights(query: torch.Tensor, key: torch.Tensor, scale: float, mask: torch.Tensor | None) -> torch.Tensor:
    """The attention weights, with shape (heads of `key`, rows, tokens)."""
    length = key.shape[2]
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=key.device).tril_()
    scores = (_grouped(query, key) * scale) @ key[0].transpose(1, 2)
    scores.view(-1, length, length).masked_fill_(~mask, -torch.inf)
    return scores.softmax(-1)


@contextlib.contextmanager
def kernels_of(device_type: str) -> Iterator[None]:
    """Select the kernels of this device for tensors on a CPU, because the memory estimate of a GPU runs on a CPU."""
    before = PRODUCTS.copy()
    PRODUCTS.intersection_update({kind for kind in PRODUCTS if kind[0] == device_type})
    try:
        yield
    finally:
        PRODUCTS.update(before)


def segmented_mask(attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """No mask if there is neither padding nor a window; otherwise the mask of `sdpa`."""
    if attention_mask is None and kwargs["q_length"] == kwargs["kv_length"] and kwargs.get("local_size") is None:
        return None
    return sdpa_mask(attention_mask=attention_mask, **kwargs)


def find_varlen_kernel(device: torch.device) -> None:
    """Test whether torch's variable-length attention kernel works on a device, and use it from then on.

    Call it before the model runs: inside a forward pass the test would have no gradients under `no_grad`, and its
    tensors would be among those that a checkpointed layer saves.
    """
    if device.type == "cuda":
        VARLEN.update((device.type, dtype) for dtype in (torch.bfloat16, torch.float16) if _varlen_works(device, dtype))


@torch.enable_grad()
def _varlen_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel agrees with plain attention in a small case, in output and gradients.

    The kernel is for 16-bit types and compute capability 8.0 or higher. It is tested, because no list is reliable.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401 (to find out whether it exists)
    except ImportError:
        return False
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(1, heads, 48, 64, generator=generator) for heads in (4, 2, 2)]
    query, key, value = inputs = [tensor.to(device, dtype).requires_grad_() for tensor in made]
    bounds = torch.tensor([0, 17, 48], dtype=torch.int32, device=device)
    try:
        ours = _varlen(query, key, value, 0.125, bounds, 31)
        ours_gradients = torch.autograd.grad(ours.square().sum(), inputs)
    except torch.OutOfMemoryError:  # also a RuntimeError, but says nothing about the kernel
        raise
    except (RuntimeError, ValueError):  # raised if the kernel does not support this GPU or type
        return False
    parts = zip(*(tensor.split((17, 31), dim=2) for tensor in inputs), strict=True)
    plain = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.125, enable_gqa=True).transpose(1, 2)
        for q, k, v in parts
    ]
    theirs = torch.cat(plain, dim=1)
    theirs_gradients = torch.autograd.grad(theirs.square().sum(), inputs)
    pairs = zip((ours, *ours_gradients), (theirs, *theirs_gradients), strict=True)
    return all((a - b).float().norm() <= 0.02 * b.float().norm() for a, b in pairs)


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    bounds: torch.Tensor,
    longest: int,
) -> torch.Tensor:
    """The same result as `segmented_attention`, with a single kernel."""
    from torch.nn.attention.varlen import varlen_attn

    groups = query.shape[1] // key.shape[1]
    grouped: dict[str, Any] = {}
    if groups > 1 and "enable_gqa" in inspect.signature(varlen_attn).parameters:  # not in torch 2.11 yet
        grouped = {"enable_gqa": True}
    elif groups > 1:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    packed = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=(-1, 0), **grouped)
    return cast(torch.Tensor, packed)[None]


AttentionInterface.register(SEGMENTED, segmented_attention)
AttentionMaskInterface.register(SEGMENTED, segmented_mask)
