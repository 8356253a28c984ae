"""The processes of a run: the Accelerator, sharding, and what the main process decides for all of them."""

import importlib.util
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    DynamoBackend,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)

from medqa.config import Experiment
from medqa.errors import UserError
from medqa.model.loss import LossModel
from medqa.model.settings import Settings
from medqa.model.sharding import keep_from_ddp, shard
from medqa.training.wandb import wandb_wanted
from medqa.variables import SEVERAL, is_on, read_by_accelerate, settle_variables

Result = TypeVar("Result")
DETERMINISTIC_CUBLAS = (":4096:8", ":16:8")  # torch's documentation of use_deterministic_algorithms

# The variables by which `accelerate launch` passes an fsdp_config: the supported values, and the message for others.
# Other variables have no effect in version 2, or only on sharded checkpoints, and checkpoints here are not sharded.
FSDP_VALUES = {
    "FSDP_VERSION": (("2",), "only version 2 is supported; set fsdp_version: 2"),
    "FSDP_RESHARD_AFTER_FORWARD": (("true",), "must be true"),
    "FSDP_OFFLOAD_PARAMS": (("false",), "must be false: shards are not offloaded to the CPU"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": (("true",), "must be true: only the main process loads the base model"),
    "FSDP_AUTO_WRAP_POLICY": (("TRANSFORMER_BASED_WRAP",), "must be TRANSFORMER_BASED_WRAP, a unit per decoder layer"),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": ((), "leave it out: each decoder layer is a unit, and the rest is one"),
    "FSDP_IGNORED_MODULES": ((), "leave it out: exactly the frozen weights are sharded"),
    "FSDP_SHARDING_STRATEGY": (("FULL_SHARD", "1"), "must be FULL_SHARD: weights are sharded over all processes"),
    "FSDP_ACTIVATION_CHECKPOINTING": (("false",), "must be false: set model.gradient_checkpointing instead"),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": (("false",), "must be false: activations are not offloaded to the CPU"),
}


def build_accelerator(experiment: Experiment, settings: Settings) -> Accelerator:
    """The accelerator for this experiment. The settings decide precision and device type, the launcher the processes.

    Raises:
        UserError: as `make_accelerator`; or the processes have different precisions.
    """
    tracked = wandb_wanted(experiment.tracking) and importlib.util.find_spec("wandb") is not None
    on_cpu, timeout_s = settings.device_type == "cpu", experiment.training.process_timeout_s
    accelerator = make_accelerator(on_cpu, settings.mixed_precision, tracked, timeout_s)
    if accelerator.num_processes > 1:
        _require_one_precision(settings)
    return accelerator


def _require_one_precision(settings: Settings) -> None:
    """Check that all processes use the same precision, because each chooses it for its own machine.

    Raises:
        UserError: they do not. Every process raises it.
    """
    found = sorted(set(gather_object([f"{settings.mixed_precision} with weights in {settings.dtype_name}"])))
    if len(found) > 1:
        raise UserError(
            f"the processes have different precisions, because their hardware differs: {' and '.join(found)}; use "
            "--set training.mixed_precision=no model.dtype=float32, which every machine supports"
        )


def make_accelerator(on_cpu: bool, mixed_precision: str, tracked: bool, timeout_s: float) -> Accelerator:
    """An accelerator with exactly these settings, whatever the environment says. No other function creates one.

    The loop accumulates gradients and steps the scheduler itself. Accelerate gets neither: it would divide the loss by
    the accumulation steps, and step a prepared scheduler once per process.

    Args:
        tracked: whether W&B is used, through the accelerator's tracker.

    Raises:
        UserError: several processes were launched that are not connected, or an environment variable requests an
            unsupported setting.
    """
    settle_variables(devices=("cpu" if on_cpu else "cuda",))
    given = read_by_accelerate()
    try:
        accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision=mixed_precision,
            log_with="wandb" if tracked else None,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            dynamo_backend="no",
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_s)),
                DistributedDataParallelKwargs(broadcast_buffers=False),
            ],
        )
    except (ImportError, ValueError, torch.distributed.DistError) as error:
        if not given or (_launched() > 1 and isinstance(error, torch.distributed.DistError)):
            raise  # a DistError: another process did not start
        why = " ".join(str(error).split()) or type(error).__name__
        set_here = ", ".join(f"{name}={os.environ[name]}" for name in given if name in os.environ)
        raise UserError(
            f"the processes cannot be set up: {why[:300]}; the environment has {set_here}: correct these variables, or "
            f"`unset {' '.join(given)}`"
        ) from error
    if accelerator.num_processes != _launched():
        raise UserError(
            f"{_launched()} processes were launched, but this one is connected to {accelerator.num_processes} in all: "
            f"each would train alone in the same directory; launch with {SEVERAL}"
        )
    _require(accelerator, "cpu" if on_cpu else "cuda", mixed_precision)
    return accelerator


def _launched() -> int:
    """The number of processes according to the launcher. With MPI on CPUs Accelerate sets this variable."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _require(accelerator: Accelerator, device_type: str, mixed_precision: str) -> None:
    """Check that Accelerate has the requested settings. All accelerators of a process share the state of the first.

    Raises:
        UserError: it has others.
    """
    plain = (DistributedType.NO, DistributedType.MULTI_CPU if device_type == "cpu" else DistributedType.MULTI_GPU)
    found = {
        "gradient accumulation": (accelerator.gradient_accumulation_steps, (1,)),
        "dynamo": (accelerator.state.dynamo_plugin.backend, (DynamoBackend.NO,)),
        "distribution": (accelerator.distributed_type, plain),
        "device": (accelerator.device.type, (device_type,)),
        "mixed precision": (accelerator.mixed_precision, (mixed_precision,)),
    }
    wrong = [f"{what} is {value}" for what, (value, right) in found.items() if value not in right]
    if wrong:
        raise UserError(
            f"Accelerate has other settings than the experiment: {', '.join(wrong)}; if this process created an "
            "Accelerator before, start a new process (in a notebook: restart the runtime)"
        )


def shards_from_launcher(experiment: Experiment) -> int:
    """Read from the launcher's variables over how many processes the frozen weights are sharded; 1: they are not.

    The launcher's FSDP variables are then removed from the environment. Otherwise Accelerate would shard the model
    itself on GPUs (and silently not on CPUs) instead of preparing it for DDP, and transformers would load it
    differently.

    Raises:
        UserError: the launcher requests an unsupported FSDP setting.
    """
    asked = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("FSDP_")}
    sharded = is_on("ACCELERATE_USE_FSDP")
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    if not sharded:
        return 1
    shards = _launched()
    asked.setdefault("FSDP_VERSION", "1")
    problems = [
        f"{name.lower()} = {asked[name]}: {why}; see launch/fsdp2.yaml"
        for name, (right, why) in FSDP_VALUES.items()
        if name in asked and asked[name].lower() not in [value.lower() for value in right]
    ]
    if experiment.model.quantization == "4bit" and shards > 1:
        problems.append(
            f"model.quantization = {experiment.model.quantization}: 4-bit weights cannot be sharded; use "
            "--set model.quantization=none, or launch without FSDP (launch/four_gpus.yaml)"
        )
    if experiment.lora.use_dora and shards > 1:
        problems.append(
            "lora.use_dora = true: DoRA needs the whole weights of each layer, and they are sharded; use "
            "--set lora.use_dora=false, or launch without FSDP (launch/four_gpus.yaml)"
        )
    if problems:
        raise UserError(*problems)
    return shards


def prepare(
    accelerator: Accelerator, model: LossModel, optimizer: torch.optim.Optimizer, shards: int
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Prepare model and optimizer with Accelerate, and shard the frozen weights if `shards` is more than 1.

    Args:
        shards: the result of `shards_from_launcher`.
    """
    if shards == 1:
        return accelerator.prepare(model, optimizer)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(accelerator.device)
    keep_from_ddp(model)
    # The model is sharded after DDP wraps it: Accelerate refuses to wrap a sharded model on GPUs. It must not move the
    # model to the device before, because the unsharded model may not fit there.
    prepared, optimizer = accelerator.prepare(model, optimizer, device_placement=[False, True])
    shard(model, accelerator.device)
    return prepared, optimizer


def is_first_process() -> bool:
    """Whether this is the process of rank 0. Unlike `is_main_process` it needs no accelerator."""
    return os.environ.get("RANK", "0") == "0"


def on_main(accelerator: Accelerator, step: Callable[[], Result]) -> Result:
    """Run `step` on the main process only, and return its result on every process. A collective call.

    Raises:
        UserError: the error of `step`, on every process. Otherwise the others would wait for the main process forever.
    """
    outcome: list = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = step()
        except UserError as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def choose_kernels(deterministic: bool) -> None:
    """Choose deterministic or the fastest kernels on a GPU. On a CPU all kernels are deterministic.

    An operation without a deterministic kernel causes a warning, and the run continues.
    """
    if torch.cuda.is_available():
        given = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
        if not given or (deterministic and given not in DETERMINISTIC_CUBLAS):
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read once, before the first computation on the GPU
        torch.use_deterministic_algorithms(deterministic, warn_only=True)


def shut_down(accelerator: Accelerator) -> None:
    """Finish the trackers and destroy the process group.

    Destroying the group joins its threads while this thread holds Python's global lock (GIL). A thread of gloo may
    still be waiting for the GIL to free the tensors of the last collective: a deadlock at the end of a finished run,
    seen on a busy machine with torch 2.13. The pause releases the GIL so that the thread can finish.
    """
    if accelerator.num_processes > 1:
        time.sleep(0.5)
    accelerator.end_training()
