"""4-bit weights: can they be had here, how they are made, and how they are kept once expanded."""

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from medqa import config
from medqa.model.precision import KEPT, Kept, Precision


def quantization_in_effect(
    model: config.Model, precision: Precision, device: torch.device, kept: Kept | None = None
) -> tuple[str, str | None]:
    """The quantization that can be had, and why where it is not the one asked for; `kept` as in `base.load_base`."""
    reason = four_bit_unavailable(device, precision.dtype) if model.quantization == "4bit" else None
    if reason is None and kept is not None and kept.quantization != model.quantization:
        reason = KEPT
    return ("none" if reason else model.quantization), reason


def four_bit_unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why 4-bit cannot be had on a device; None where it can. A small layer is quantized and used, before 2 GB are."""
    try:
        import bitsandbytes as bnb
        from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

        Bnb4BitHfQuantizer(four_bit_config(dtype)).validate_environment(device_map={"": str(device)})
        layer = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=dtype, quant_type="nf4").to(device)
        layer.support_avx512bf16_for_cpu = False
        layer(torch.ones(1, 64, device=device, dtype=dtype))
    except torch.OutOfMemoryError:  # a RuntimeError, but no reason to fall back
        raise
    except (ImportError, RuntimeError, ValueError) as error:
        return f"4-bit cannot be had here: {type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def four_bit_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 with double quantization (QLoRA, https://arxiv.org/abs/2305.14314)."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


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
