"""Where an update of ours without padding spends its time, by kind of operation: `compare.py --profile`.

Self CPU time of torch's operations, each counted where it runs, sorted by what called it and by the shapes of what it
multiplies. What the process takes on top is Python, dispatch and the profiler itself, so `host` is an upper bound.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from benchmarks.gate import Job
from benchmarks.ours import build

# The first that the name of an operation, or of what called it, contains.
CALLERS = (
    ("SummedLoss", "head and loss"),
    ("scaled_dot_product", "attention"),
    ("ScaledDotProduct", "attention"),
    ("varlen", "attention"),
    ("ropout", "dropout"),
    ("Optimizer.step", "optimizer"),
)
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "mkldnn", "mkl_linear", "gemm")
MOVES = ("aten::copy_", "aten::cat", "aten::clone", "aten::contiguous", "aten::_to_copy", "aten::index", "aten::fill_")


def measure(job: Job) -> dict[str, Any]:
    """One update after another that was warm-up: seconds by group, and the largest single operations."""
    parts = build(job)
    norm = parts.experiment.optimizer.max_grad_norm
    parts.step(norm)
    rank, vocabulary = parts.experiment.lora.r, parts.adapted.config.vocab_size
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if job.device == "cuda" else [])]
    bare = time.process_time()
    parts.step(norm)
    bare = time.process_time() - bare
    with profile(activities=activities, record_shapes=True) as profiled:
        began = time.process_time()
        parts.step(norm)
        took = time.process_time() - began
    groups: Counter[str] = Counter()
    single: Counter[str] = Counter()
    for event in profiled.events():
        seconds = (event.self_device_time_total if job.device == "cuda" else event.self_cpu_time_total) / 1e6
        groups[group(event, rank, vocabulary)] += seconds
        single[event.name] += seconds
    groups["host"] += max(0.0, took - sum(groups.values())) if job.device == "cpu" else 0.0
    return {
        "cpu_s": bare,
        "cpu_s_profiled": took,
        "groups": dict(groups.most_common()),
        "largest": dict(single.most_common(15)),
        "micro_batch_tokens": parts.state.progress.micro_batch_tokens,
    }


def group(event: FunctionEvent, rank: int, vocabulary: int) -> str:
    """What an operation belongs to."""
    names = [one.name for one in with_callers(event)]
    for part, found in CALLERS:
        if any(part in name for name in names):
            return found
    if not event.name.startswith(("aten::", "mkldnn", "mkl")):
        return "host"  # autograd's own nodes, Python functions, what the profiler marks
    if any(name in event.name for name in PRODUCTS):
        sides = {side for shape in event.input_shapes or () for side in shape if isinstance(side, int)}
        if vocabulary in sides:
            return "head and loss"
        return "GEMM, LoRA" if rank in sides else "GEMM, frozen weights"
    return "data movement" if event.name.startswith(MOVES) else "elementwise"


def with_callers(event: FunctionEvent) -> Iterator[FunctionEvent]:
    """The operation, and all that it is part of."""
    while event is not None:
        yield event
        event = event.cpu_parent


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure(Job.read(sys.argv[1]))))
