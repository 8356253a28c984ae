"""What a run's numbers depend on besides experiment and data: the settings in effect, the machine, the libraries.

A checkpoint keeps it. A run that goes on keeps the settings; where it cannot, or where the machine is of another kind,
it says so, and is marked as not bit for bit the same from there on.
"""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from pydantic import BaseModel, ConfigDict

from medqa.model.attention import SEGMENTED, VARLEN
from medqa.model.base import Base
from medqa.model.execution import Execution
from medqa.model.precision import Precision
from medqa.model.sharding import is_sharded
from medqa.variables import recorded_variables

PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "tokenizers", "datasets")
COMPUTING = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")  # of them, those that move numbers


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


class Environment(Part):
    """The settings and the machine. `cpu_threads` is None on a GPU; those with a default are not in older checkpoints.

    `variables` are those of the environment that choose among kernels (`medqa/variables.py`); None: not recorded.
    """

    settings: Settings
    device: str
    processes: int
    cpu_threads: int | None
    versions: dict[str, str]
    sharded: bool = False
    variables: dict[str, str] | None = None


def environment(accelerator: Accelerator, precision: Precision, execution: Execution, base: Base) -> Environment:
    """What is in effect in this process."""
    device = accelerator.device
    on_gpu = device.type == "cuda"
    return Environment(
        settings=Settings.model_validate(
            {
                "mixed_precision": precision.mixed_precision,
                "dtype": str(precision.dtype).removeprefix("torch."),
                "quantization": base.quantization,
                "attn_implementation": _attention(base.model.config._attn_implementation),
                "padding_free": execution.padding_free,
                "gradient_checkpointing": execution.gradient_checkpointing,
                "dequantize": execution.dequantize and base.quantization == "4bit",
            }
        ),
        device=torch.cuda.get_device_name(device) if on_gpu else f"cpu {torch.backends.cpu.get_cpu_capability()}",
        processes=accelerator.num_processes,
        cpu_threads=None if on_gpu else torch.get_num_threads(),
        versions=versions(),
        sharded=is_sharded(base.model),
        variables=recorded_variables(),
    )


def _attention(implementation: str) -> str:
    """The attention kernel. Without padding a GPU may have one that does all segments, to other last digits."""
    return f"{implementation}, varlen" if implementation == SEGMENTED and VARLEN else implementation


def changes(before: Environment, now: Environment) -> list[str]:
    """What differs between two environments so that results may differ in their last digits."""
    compared = None not in (before.variables, now.variables)
    names = sorted({*(before.variables or {}), *(now.variables or {})}) if compared else []
    was, is_now = (
        {
            **env.settings.model_dump(),
            "device": env.device,
            "processes": env.processes,
            "CPU threads": env.cpu_threads,
            "sharded weights": env.sharded,
            **{name: env.versions.get(name) for name in COMPUTING},
            **{name: (env.variables or {}).get(name, "not set") for name in names},
        }
        for env in (before, now)
    )
    return [f"{key} {was[key]} before, {value} now" for key, value in is_now.items() if was[key] != value]


def versions() -> dict[str, str]:
    """Versions of Python and of what computes; a package that is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of this code (`-dirty` with changes), None where it is not a git checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()
