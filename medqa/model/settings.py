"""How this machine computes an experiment: precision, and the execution that time and memory allow.

Mixed precision, the type of the frozen weights and the compute type of 4-bit weights move together: float32 on a CPU,
bfloat16 on a GPU of compute capability 8.0 or more, float16 with a gradient scaler on an older one.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict

from medqa.config import Experiment
from medqa.errors import UserError
from medqa.variables import is_on

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
KEPT = "as in the checkpoint that the run goes on from"
DEVICES = Path("/dev")
BF16_CAPABILITY = (8, 0)  # a T4 (7.5) only emulates bfloat16, slowly, though torch says that it is supported


class Kept(Protocol):
    """Of a checkpoint's settings, those that matter here."""

    @property
    def mixed_precision(self) -> str:
        """As in the experiment."""

    @property
    def dtype(self) -> str:
        """As in the experiment."""

    @property
    def quantization(self) -> str:
        """As in the experiment."""


@dataclass(frozen=True)
class Precision:
    """The precision in effect. `reasons` has `section.key` to (asked, in effect, why) where the two differ."""

    device_type: str
    mixed_precision: str
    dtype: torch.dtype
    reasons: Mapping[str, tuple[str, str, str]]


def resolve_precision(experiment: Experiment, force_cpu: bool, kept: Kept | None = None) -> Precision:
    """The precision for this machine.

    Args:
        kept: the settings of the checkpoint that the run goes on from; kept where the machine can.

    Raises:
        UserError: a GPU is present but the installed torch cannot use it, and `force_cpu` is not set.
    """
    if force_cpu or not usable_gpu():
        return _adapted(experiment, "cpu", "no", "float32", "on a CPU everything is float32")
    capability = torch.cuda.get_device_capability()
    name = torch.cuda.get_device_name()
    mixed_precision: str = experiment.training.mixed_precision
    dtype: str = experiment.model.dtype
    if kept is not None:
        mixed_precision, dtype = kept.mixed_precision, kept.dtype
    if capability < BF16_CAPABILITY and "bf" in mixed_precision + dtype:
        reason = f"{name} has compute capability {capability[0]}.{capability[1]}: bfloat16 needs 8.0"
        return _adapted(experiment, "cuda", "fp16", "float16", reason)
    return _adapted(experiment, "cuda", mixed_precision, dtype, KEPT)


def usable_gpu() -> bool:
    """Whether there is a GPU that the installed torch can use; False where there is none or it is hidden on purpose.

    `accelerate launch --cpu`, or its configuration file's `use_cpu`, is as our own `--cpu`.

    Raises:
        UserError: there is one but torch cannot use it; says what to install.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or is_on("ACCELERATE_USE_CPU"):
        return False
    advice = "install a torch that fits the driver and the GPU (https://pytorch.org/get-started), or insist with --cpu"
    if not torch.cuda.is_available():
        if not _nvidia_device_present():
            return False
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise UserError(f"an NVIDIA GPU is present, but torch {torch.__version__}, {build}, cannot use it: {advice}")
    try:
        (torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")).sum().item()
    except torch.OutOfMemoryError:  # usable, only full: said where memory is really asked for
        return True
    except RuntimeError as error:  # "no kernel image is available": a wheel without code for this GPU
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{torch.cuda.get_device_name()} cannot be used by torch {torch.__version__}: {reason}; {advice}"
        ) from error
    return True


def _nvidia_device_present() -> bool:
    """Whether the kernel shows an NVIDIA GPU, whatever torch says (WSL shows /dev/dxg and the driver's library)."""
    # Any number: a container may be given the machine's third GPU alone, as /dev/nvidia2.
    in_wsl = Path("/dev/dxg").exists() and Path("/usr/lib/wsl/lib/libcuda.so").exists()
    return in_wsl or any(DEVICES.glob("nvidia[0-9]*"))


def _adapted(experiment: Experiment, device_type: str, mixed_precision: str, dtype: str, reason: str) -> Precision:
    """The given precision, with what was asked differently and why."""
    asked = {"training.mixed_precision": experiment.training.mixed_precision, "model.dtype": experiment.model.dtype}
    used = {"training.mixed_precision": mixed_precision, "model.dtype": dtype}
    reasons = {key: (asked[key], used[key], reason) for key in asked if asked[key] != used[key]}
    return Precision(device_type, mixed_precision, DTYPES[dtype], reasons)


class Part(BaseModel):
    """Read from a checkpoint: of exactly this form, or of another version."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Settings(Part):
    """The settings in effect, which a run that goes on keeps. Those with a default are not in older checkpoints."""

    mixed_precision: Literal["bf16", "fp16", "no"]
    dtype: Literal["bfloat16", "float16", "float32"]
    quantization: Literal["none", "4bit"]
    attn_implementation: str
    padding_free: bool = False
    gradient_checkpointing: bool = False
    dequantize: bool = False


# ----------------------------------------------------------------------------------------------------
# How a recipe's update is computed. Not what: with another execution it is the same update but for the last digits.

Change = tuple[str, str, str]  # asked, in effect, why


@dataclass(frozen=True)
class Execution:
    """What is decided before the model is loaded.

    Attributes:
        padding_free: training lays examples end to end (`data.batches.pack`); else it pads as the recipe says.
        evaluation_padding_free: evaluation does, whatever training does.
        attn_implementation: by the name that transformers knows it under.
        dequantize: 4-bit weights are expanded once, and kept so.
        planned_tokens: the most tokens of a micro-batch without padding for which the plan has room; None: not asked.
        shards: in how many pieces, on as many processes, the frozen weights are held; 1: whole.
        return_memory: freed memory goes back to the system at once (`training.memory`), which is slower.
        reasons: `section.key` to (asked, in effect, why) where the two differ.
    """

    padding_free: bool
    evaluation_padding_free: bool
    attn_implementation: str
    gradient_checkpointing: bool
    dequantize: bool
    planned_tokens: int | None = None
    shards: int = 1
    return_memory: bool = False
    reasons: Mapping[str, Change] = field(default_factory=dict)

    def fast_lora(self, device_type: str) -> bool:
        """Whether LoRA is computed as `fast_lora.py` does."""
        return self.padding_free and device_type == "cpu"
