"""Facts about a device: native bfloat16 of a CPU; memory in bytes, of a GPU's allocator or of this process on a CPU."""

import ctypes
import functools
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

CPUINFO = Path("/proc/cpuinfo")
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # the names in Linux, on x86 (two) and on Arm
BF16_QUERIES = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # functions of torch.cpu, on any system
BF16_SPEEDUP = 1.5  # the minimum speed relative to float32; with AVX512-BF16 it is about 5
BF16_SIZE, BF16_REPEATS = 384, 3  # the size of the matrices that are timed; all products take a few milliseconds
CGROUP = Path("/sys/fs/cgroup")
SPARE = 0.9  # of the free memory, the share that may be planned: allocators round up, and others need some
STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
RETURNED = 2**20  # bytes; for a model with 40M parameters, 128 KiB saved as much and was slower by a third


def no_native_bfloat16() -> str | None:
    """Why this CPU does not count as having native bfloat16, or None if it does.

    The CPU must have the instructions, and a matrix product in bfloat16 must be faster than in float32: some CPUs and
    virtual machines report the instructions without being faster. Each process measures this once.
    """
    if not _has_bfloat16_instructions():
        return "this CPU has no bfloat16 instructions (AVX512-BF16, AMX or Arm BF16)"
    speedup = _bfloat16_speedup()
    if speedup < BF16_SPEEDUP:
        return f"this CPU multiplies bfloat16 only {speedup:.1f} times as fast as float32"
    return None


def _has_bfloat16_instructions() -> bool:
    """Whether torch or Linux reports the instructions."""
    if any(getattr(torch.cpu, query, lambda: False)() for query in BF16_QUERIES):
        return True
    try:
        lines = CPUINFO.read_text(errors="replace").splitlines()
    except OSError:  # not Linux
        return False
    flags = next((line for line in lines if re.match(r"(flags|Features)\s*:", line)), "")
    return not BF16_FLAGS.isdisjoint(flags.split())


@functools.cache
def _bfloat16_speedup() -> float:
    """The speed of a matrix product in bfloat16 relative to float32: the best of a few, after a warm-up product."""
    pairs = {dtype: torch.ones(2, BF16_SIZE, BF16_SIZE, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    best = dict.fromkeys(pairs, float("inf"))
    for repeat in range(1 + BF16_REPEATS):
        for dtype, (a, b) in pairs.items():
            began = time.perf_counter()
            a @ b
            took = time.perf_counter() - began
            best[dtype] = min(best[dtype], took if repeat else best[dtype])
    return best[torch.float32] / best[torch.bfloat16]


@dataclass(frozen=True)
class Memory:
    """Peak bytes since the last reset. `reserved` is what the GPU's caching allocator holds, None on a CPU."""

    allocated: int
    reserved: int | None


def reset_peak(device: torch.device) -> None:
    """Reset the peak. Without a way to do so (not Linux), a CPU's peak stays that of the process since its start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR_REFS.exists():
        try:
            CLEAR_REFS.write_text("5")  # resets VmHWM, see proc_pid_clear_refs(5)
        except OSError:  # some containers do not permit it
            return


def available_memory(device: torch.device, sharing: int = 1) -> int:
    """The bytes that a run may plan with: of the free memory of the GPU, or, on a CPU, of machine and container.

    Args:
        sharing: the number of processes that share a CPU's memory.
    """
    if device.type == "cuda":
        return int(SPARE * torch.cuda.mem_get_info(device)[0])
    free = psutil.virtual_memory().available
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except OSError:  # not in a container, or cgroups version 1
        return int(SPARE * free / sharing)
    if limit != "max":
        cached = int(counts.get("inactive_file", 0))  # page cache, which the kernel frees when memory is needed
        free = min(free, max(0, int(limit) - int(used) + cached))
    return int(SPARE * free / sharing)


def usable_cpus() -> int:
    """The number of logical CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def return_freed_memory() -> bool:
    """Make the C library return freed blocks of `RETURNED` bytes and more to the system at once.

    glibc keeps freed memory: by default its threshold grows to 32 MiB with the freed blocks, and smaller blocks are
    returned only from the top of the heap. Returning them means new pages for each large tensor: the update takes 1.4
    to 1.8 times as long, with the same values.

    Returns:
        False with another C library, or if the user has decided (MALLOC_MMAP_THRESHOLD_, GLIBC_TUNABLES).
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        return False
    # Either option also keeps both thresholds from growing.
    return bool(mallopt(M_MMAP_THRESHOLD, RETURNED)) and bool(mallopt(M_TRIM_THRESHOLD, RETURNED))


def release(device: torch.device) -> None:
    """Free a GPU's cached memory, so that blocks of other sizes can be allocated."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_memory(device: torch.device) -> Memory:
    """The peak since the last reset."""
    if device.type == "cuda":
        return Memory(torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device))
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return Memory(int(line.split()[1]) * 1024, None)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return Memory(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, None)


def gibibytes(size: float) -> str:
    """A number of bytes in GiB, for a message."""
    return f"{size / 2**30:.1f}" if size >= 0.95 * 2**30 else f"{size / 2**30:.2f}"
