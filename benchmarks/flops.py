"""How much arithmetic an update needs, and how much this machine can do: the two numbers of a utilisation."""

import time
from collections.abc import Sequence

import torch

from benchmarks.standin import shape_of

GEMM_SIZE = {"cpu": 1536, "cuda": 8192}
SMALL = 384  # enough to tell whether a type is emulated
REPEATS = {"cpu": 3, "cuda": 20}


def flops_per_token(shape: str, lengths: Sequence[int], rank: int) -> float:
    """Floating point operations that LoRA needs for a useful token, all counted once: recomputing is no use.

    A frozen weight takes part forwards and in the gradient of its input (4 a weight), an adapter's in its own gradient
    too (6); attention is causal, and its length the mean over tokens.
    """
    s = shape_of(shape)
    hidden, inner, layers = s["hidden_size"], s["intermediate_size"], s["num_hidden_layers"]
    key_value = hidden // s["num_attention_heads"] * s["num_key_value_heads"]
    sizes = [(hidden, hidden)] * 2 + [(hidden, key_value)] * 2 + [(hidden, inner)] * 3
    frozen = layers * sum(a * b for a, b in sizes) + s["vocab_size"] * hidden
    adapter = layers * rank * sum(a + b for a, b in sizes)
    mean_length = sum(length**2 for length in lengths) / sum(lengths)
    attention = 3 * layers * 4 * hidden * mean_length / 2  # forwards once, backwards twice; half of the square
    return 4 * frozen + 6 * adapter + attention


def gemm_flops(device: str, dtype: str, size: int | None = None) -> float:
    """Floating point operations a second of one large matrix product, on one thread of a CPU: the best of a few."""
    size = size or GEMM_SIZE[device]
    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    best = 0.0
    for _ in range(REPEATS[device]):
        _synchronize(device)
        began = time.perf_counter() if device == "cuda" else time.thread_time()
        a @ b
        _synchronize(device)
        ended = time.perf_counter() if device == "cuda" else time.thread_time()
        best = max(best, 2 * size**3 / (ended - began))
    return best


def no_bfloat16() -> str | None:
    """Why bfloat16 is not worth comparing on this CPU; None where it is. Some only emulate it, a hundredfold slower."""
    ours, plain = (gemm_flops("cpu", dtype, SMALL) / 1e9 for dtype in ("bfloat16", "float32"))
    if ours >= plain / 2:
        return None
    return f"this CPU does not compute in bfloat16: {ours:.1f} GFLOP/s, against {plain:.0f} in float32"


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
