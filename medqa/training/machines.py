"""The machine that a run is planned for: this one, or a GPU that is not here, by name or by its memory."""

import math
from dataclasses import dataclass

import torch

from medqa.config import Experiment
from medqa.errors import UserError
from medqa.model.precision import BF16_CAPABILITY, DTYPES, Precision, resolve_precision
from medqa.training.memory import SPARE, available_memory
from medqa.training.plan import device_line

CONTEXT = 2**29  # bytes that a GPU's context and kernels take, about


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU. `memory` is in MiB, as its driver reports it; `tflops` is the vendor's, dense, in 16 bits."""

    capability: tuple[int, int]
    memory: int
    tflops: float


GPUS = {
    "t4": Gpu((7, 5), 15_360, 65),
    "l4": Gpu((8, 9), 23_034, 121),
    "a10": Gpu((8, 6), 23_028, 125),
    "a100": Gpu((8, 0), 40_960, 312),  # that with 40 GB
    "h100": Gpu((9, 0), 81_559, 989),
    "h200": Gpu((9, 0), 143_771, 989),
}


@dataclass(frozen=True)
class Machine:
    """What is planned for. `memory` is in bytes, all of it; `usable` is what a run may plan with."""

    name: str
    precision: Precision
    memory: int | None
    usable: int
    tflops: float | None
    computed: bool


def find_machine(experiment: Experiment, gpu: str | None, cpu: bool) -> Machine:
    """The GPU of this name, or with so many GiB; without one, this machine.

    Raises:
        UserError: no such GPU; or there is one here that torch cannot use.
    """
    if gpu is None:
        precision = resolve_precision(experiment, cpu)
        device = torch.device(precision.device_type)
        return Machine(device_line(device, 1), precision, None, available_memory(device), None, False)
    known = GPUS.get(gpu.lower())
    if known is None:
        known = Gpu(BF16_CAPABILITY, int(_gibibytes(gpu) * 2**10), 0)
    mixed_precision, dtype = experiment.training.mixed_precision, experiment.model.dtype
    if known.capability < BF16_CAPABILITY and "bf" in mixed_precision + dtype:
        mixed_precision, dtype = "fp16", "float16"
    memory = known.memory * 2**20
    name = gpu.upper() if gpu.lower() in GPUS else f"a GPU of {gpu} GiB"
    precision = Precision("cuda", mixed_precision, DTYPES[dtype], {})
    return Machine(name, precision, memory, max(0, int(SPARE * (memory - CONTEXT))), known.tflops or None, True)


def _gibibytes(text: str) -> float:
    """A number of GiB.

    Raises:
        UserError: it is none.
    """
    try:
        size = float(text)
    except ValueError:
        size = math.nan
    if not 0 < size < 1e6:
        raise UserError(f"--gpu {text}: no such GPU; known: {', '.join(GPUS)}, or a number of GiB (--gpu 24)")
    return size
