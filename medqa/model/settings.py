"""How this machine computes an experiment: one object, `Settings`, from which everything else is built.

First, `resolve_settings` decides what depends on the hardware: the device, and the precision that it supports. Mixed
precision, the type of the frozen weights and the compute type of 4-bit weights change together: bfloat16 on a CPU with
native bfloat16, float32 on another CPU; bfloat16 on a GPU with compute capability 8.0 or higher, float16 with a
gradient scaler on an older one. Then, `fit_to_memory` (`medqa/model/memory.py`) decides what depends on model and
memory. A checkpoint stores the settings that its values depend on (`SavedSettings`), and a resumed run keeps them if
the machine can.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from transformers import BitsAndBytesConfig

from medqa import config
from medqa.config import Experiment
from medqa.errors import UserError, is_out_of_memory
from medqa.model.device import no_native_bfloat16
from medqa.variables import is_on

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
KEPT = "as in the checkpoint that the run resumes from"
DEVICES = Path("/dev")
BF16_CAPABILITY = (8, 0)  # a T4 (7.5) only emulates bfloat16, slowly, although torch reports support for it

Change = tuple[str, str, str]  # requested, in effect, reason


class Part(BaseModel):
    """A part of a checkpoint's manifest. A part with other keys was written by another version."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class SavedSettings(Part):
    """The settings that a checkpoint stores. Those with a default are not in checkpoints of the first versions."""

    mixed_precision: Literal["bf16", "fp16", "no"]
    dtype: Literal["bfloat16", "float16", "float32"]
    quantization: Literal["none", "4bit"]
    attn_implementation: str
    padding_free: bool = False
    gradient_checkpointing: bool = False
    dequantize: bool = False
    bos: Literal["always", "tokenizer"] = "always"


@dataclass(frozen=True)
class Settings:
    """How this machine computes an experiment. Other settings give the same update, except for the last digits.

    Attributes:
        device_type: `cpu` or `cuda`.
        mixed_precision: `bf16`, `fp16` or `no`, as in Accelerate.
        dtype: the type of the frozen weights, and the compute type of 4-bit weights.
        quantization: `none` or `4bit`; `auto` until `fit_to_memory` has decided.
        attn_implementation: the name of the attention implementation in transformers.
        padding_free: training concatenates examples without padding (`data.batches.pack`).
        evaluation_padding_free: evaluation does, whatever training does.
        gradient_checkpointing: activations are recomputed in the backward pass instead of being kept.
        dequantize: 4-bit weights are dequantized once, when they are loaded.
        planned_tokens: the maximum size in tokens of a micro-batch without padding, by the memory estimate; None if
            there is no estimate.
        shards: the number of processes over which the frozen weights are sharded; 1 if every process has all of them.
        bos: the rule for the BOS of the prompt, as in `data.tokens.set_prompt`. A resumed run keeps its rule.
        return_memory: freed memory is returned to the system at once (`medqa/model/device.py`), which is slower.
        changes: `section.key` to (requested, in effect, reason), where the two differ.
        precision_note: a line about the precision for the run's plan, in addition to the changes; or None.
    """

    device_type: str
    mixed_precision: str
    dtype: torch.dtype
    quantization: str = "none"
    attn_implementation: str = "sdpa"
    padding_free: bool = False
    evaluation_padding_free: bool = False
    gradient_checkpointing: bool = False
    dequantize: bool = False
    planned_tokens: int | None = None
    shards: int = 1
    return_memory: bool = False
    bos: Literal["always", "tokenizer"] = "tokenizer"
    changes: Mapping[str, Change] = field(default_factory=dict)
    precision_note: str | None = None

    @property
    def fast_lora(self) -> bool:
        """Whether `medqa/model/fast_lora.py` computes LoRA."""
        return self.padding_free

    @property
    def dtype_name(self) -> str:
        """The type of the frozen weights, as in experiment files."""
        return str(self.dtype).removeprefix("torch.")


def resolve_settings(
    experiment: Experiment, *, cpu: bool, saved: SavedSettings | None = None, keep_bf16: bool = False, shards: int = 1
) -> Settings:
    """Decide device, precision and quantization on this machine; `fit_to_memory` decides the rest.

    With `model.quantization: auto`, the quantization is also left to `fit_to_memory`, unless the checkpoint or this
    machine leaves no choice.

    Args:
        cpu: use the CPU even if there is a GPU.
        saved: the settings of the checkpoint that the run resumes from, which are kept if the machine can.
        keep_bf16: keep bfloat16 from `saved` also on a CPU that only emulates it. Without it, such a CPU uses float32.
        shards: the number of processes over which the frozen weights are sharded.

    Raises:
        UserError: a GPU is present but the installed torch cannot use it, and `cpu` is not set; or 4-bit weights of the
            checkpoint are to be sharded.
    """
    bos = "tokenizer" if saved is None else saved.bos
    settings = replace(_precision(experiment, cpu, saved, keep_bf16), shards=shards, bos=bos)
    quantization, reason = _quantization(experiment.model, settings, saved)
    changes = dict(settings.changes)
    if reason is not None:
        changes["model.quantization"] = (experiment.model.quantization, quantization, reason)
    return replace(settings, quantization=quantization, changes=changes)


def _precision(experiment: Experiment, cpu: bool, saved: SavedSettings | None, keep_bf16: bool) -> Settings:
    """Decide the device and its precision."""
    if cpu or not usable_gpu():
        return _precision_on_cpu(experiment, saved, keep_bf16)
    capability = torch.cuda.get_device_capability()
    name = torch.cuda.get_device_name()
    mixed_precision: str = experiment.training.mixed_precision
    dtype: str = experiment.model.dtype
    if saved is not None:
        mixed_precision, dtype = saved.mixed_precision, saved.dtype
    if capability < BF16_CAPABILITY and "bf" in mixed_precision + dtype:
        reason = f"{name} has compute capability {capability[0]}.{capability[1]}: bfloat16 needs 8.0"
        return _with_precision(experiment, "cuda", "fp16", "float16", reason)
    return _with_precision(experiment, "cuda", mixed_precision, dtype, KEPT)


def _precision_on_cpu(experiment: Experiment, saved: SavedSettings | None, keep_bf16: bool) -> Settings:
    """Decide the precision on a CPU: the requested or saved bfloat16 if this CPU has it natively; otherwise float32."""
    mixed_precision: str = experiment.training.mixed_precision
    dtype: str = experiment.model.dtype
    if saved is not None:
        mixed_precision, dtype = saved.mixed_precision, saved.dtype
    if mixed_precision == "fp16" or dtype == "float16":  # not bfloat16 instead, which was not requested
        return _with_precision(experiment, "cpu", "no", "float32", "float16 is supported on GPUs only")
    slow = no_native_bfloat16() if "bf" in mixed_precision + dtype else None
    if slow is not None and (saved is None or not keep_bf16):
        return _with_precision(experiment, "cpu", "no", "float32", slow)
    settings = _with_precision(experiment, "cpu", mixed_precision, dtype, KEPT)
    if slow is None:
        return settings
    return replace(settings, precision_note=f"bfloat16, {KEPT}; it is slower than float32 here: {slow}")


def _with_precision(
    experiment: Experiment, device_type: str, mixed_precision: str, dtype: str, reason: str
) -> Settings:
    """Settings with the given precision, and the changes from the requested one."""
    asked = {"training.mixed_precision": experiment.training.mixed_precision, "model.dtype": experiment.model.dtype}
    used = {"training.mixed_precision": mixed_precision, "model.dtype": dtype}
    changes = {key: (asked[key], used[key], reason) for key in asked if asked[key] != used[key]}
    return Settings(device_type, mixed_precision, DTYPES[dtype], changes=changes)


def _quantization(model: config.Model, settings: Settings, saved: SavedSettings | None) -> tuple[str, str | None]:
    """The quantization on this machine, and the reason if it is not the requested one."""
    wanted = model.quantization if saved is None else saved.quantization
    if settings.shards > 1 and wanted == "4bit":  # `shards_from_launcher` does not know the checkpoint
        raise UserError(
            "the run started with 4-bit weights, which cannot be sharded: launch it without FSDP "
            "(launch/four_gpus.yaml), or start another run with --set model.quantization=none"
        )
    if settings.shards > 1 and wanted == "auto":
        return "none", "4-bit weights cannot be sharded"
    if wanted != "none":
        reason = four_bit_unavailable(torch.device(settings.device_type), settings.dtype)
        if reason is not None:
            return "none", reason
    return wanted, (None if wanted == model.quantization else KEPT)


def four_bit_unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why 4-bit is not available on a device, or None. Try a small layer first, before loading the model."""
    try:
        import bitsandbytes as bnb
        from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

        Bnb4BitHfQuantizer(four_bit_config(dtype)).validate_environment(device_map={"": str(device)})
        layer = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=dtype, quant_type="nf4").to(device)
        layer.support_avx512bf16_for_cpu = False
        layer(torch.ones(1, 64, device=device, dtype=dtype))
    except (ImportError, RuntimeError, ValueError) as error:
        if is_out_of_memory(error):  # not a reason to fall back
            raise
        return f"4-bit is not available: {type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def four_bit_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 with double quantization (QLoRA, https://arxiv.org/abs/2305.14314)."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def usable_gpu() -> bool:
    """Whether the installed torch can use a GPU; False if there is none or it is hidden on purpose.

    `accelerate launch --cpu`, or `use_cpu` in its configuration file, has the effect of `--cpu`.

    Raises:
        UserError: there is a GPU but torch cannot use it; the message says what to install.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or is_on("ACCELERATE_USE_CPU"):
        return False
    advice = "install a torch that fits the driver and the GPU (https://pytorch.org/get-started), or use --cpu"
    if not torch.cuda.is_available():
        if not _nvidia_device_present():
            return False
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise UserError(f"an NVIDIA GPU is present, but torch {torch.__version__}, {build}, cannot use it: {advice}")
    try:
        (torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")).sum().item()
    except torch.OutOfMemoryError:  # usable but full, which is reported when memory is needed
        return True
    except RuntimeError as error:  # "no kernel image is available": the wheel has no code for this GPU
        reason = str(error).splitlines()[0]
        raise UserError(
            f"torch {torch.__version__} cannot use {torch.cuda.get_device_name()}: {reason}; {advice}"
        ) from error
    return True


def _nvidia_device_present() -> bool:
    """Whether the kernel has an NVIDIA GPU, whatever torch reports (in WSL: /dev/dxg and the driver's library)."""
    # Any number, because a container may have only the machine's third GPU, as /dev/nvidia2.
    in_wsl = Path("/dev/dxg").exists() and Path("/usr/lib/wsl/lib/libcuda.so").exists()
    return in_wsl or any(DEVICES.glob("nvidia[0-9]*"))
