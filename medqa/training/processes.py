"""The processes of a run: Accelerate's view of them, checked."""

import importlib.util
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast_object_list

from medqa.config import Experiment
from medqa.errors import UserError
from medqa.model.precision import Precision
from medqa.training.wandb_run import wandb_wanted

Result = TypeVar("Result")


def build_accelerator(experiment: Experiment, precision: Precision) -> Accelerator:
    """The accelerator for this experiment: precision is the experiment's, processes and devices the launcher's.

    Accumulation and schedule are the loop's own business, so Accelerate is told of neither: it would divide the loss
    by the accumulation steps and step a prepared scheduler once per process.

    Raises:
        UserError: several processes were launched that do not know of each other.
    """
    tracked = wandb_wanted(experiment.tracking) and importlib.util.find_spec("wandb") is not None
    timeout = timedelta(seconds=experiment.training.process_timeout_s)
    accelerator = Accelerator(
        cpu=precision.device_type == "cpu",
        mixed_precision=precision.mixed_precision,
        log_with="wandb" if tracked else None,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timeout),
            DistributedDataParallelKwargs(broadcast_buffers=False),
        ],
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise UserError(
            f"{launched} processes were launched, but this one knows of {accelerator.num_processes}: each would train "
            "alone in the same directory; launch with `torchrun --nproc_per_node N train.py ...` or "
            "`accelerate launch --multi_gpu --num_processes N train.py ...`"
        )
    return accelerator


def is_first_process() -> bool:
    """Whether the launcher counts this as the first process; known before there is an accelerator."""
    return os.environ.get("RANK", "0") == "0"


def on_main(accelerator: Accelerator, step: Callable[[], Result]) -> Result:
    """The result of a step that the main process does; the others wait for it.

    Raises:
        UserError: the step's, on every process: else the others would wait for one that has given up.
    """
    outcome: list = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = step()
        except UserError as error:
            outcome[1] = error.args
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(*outcome[1])
    return outcome[0]


def choose_kernels(deterministic: bool) -> None:
    """On a GPU, deterministic kernels or the fastest; a CPU's are deterministic anyway.

    Only warned about, not refused, is an operation that has no deterministic kernel: the run goes on.
    """
    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, before anything is computed there
        torch.use_deterministic_algorithms(deterministic, warn_only=True)


def leave(accelerator: Accelerator) -> None:
    """Finish the trackers and leave the process group.

    A group that is freed under Python's global lock joins its threads, and one of gloo's may still be waiting for that
    very lock, to let go of the last collective's tensors: a deadlock at the end of a finished run, seen on a busy
    machine with torch 2.13. The pause gives the lock up for once.
    """
    if accelerator.num_processes > 1:
        time.sleep(0.5)
    accelerator.end_training()
