"""The processes of a run: the Accelerator, what it shares out, and what processes decide together."""

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

# How `accelerate launch` hands over an fsdp_config, the values that say what we do, and what to say of others.
# What is not here has no meaning in version 2, or only for sharded checkpoints, and ours have nothing sharded in them.
FSDP_VALUES = {
    "FSDP_VERSION": (("2",), "only version 2 is supported: fsdp_version: 2"),
    "FSDP_RESHARD_AFTER_FORWARD": (("true",), "a base that may be whole after forward needs no sharding"),
    "FSDP_OFFLOAD_PARAMS": (("false",), "pieces are not kept in the host's memory"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": (("true",), "the base is always loaded once, by the first process"),
    "FSDP_AUTO_WRAP_POLICY": (("TRANSFORMER_BASED_WRAP",), "each decoder layer is a group, and the rest is one"),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": ((), "leave it out: each decoder layer is a group, and the rest is one"),
    "FSDP_IGNORED_MODULES": ((), "leave it out: all frozen weights are sharded, and no others"),
    "FSDP_SHARDING_STRATEGY": (("FULL_SHARD", "1"), "weights are shared out among all processes"),
    "FSDP_ACTIVATION_CHECKPOINTING": (("false",), "the experiment says it: model.gradient_checkpointing"),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": (("false",), "activations are not kept in the host's memory"),
}


def build_accelerator(experiment: Experiment, settings: Settings) -> Accelerator:
    """The accelerator for this experiment: precision is the experiment's, processes and devices the launcher's.

    Raises:
        UserError: as `make_accelerator`.
    """
    tracked = wandb_wanted(experiment.tracking) and importlib.util.find_spec("wandb") is not None
    on_cpu, timeout_s = settings.device_type == "cpu", experiment.training.process_timeout_s
    return make_accelerator(on_cpu, settings.mixed_precision, tracked, timeout_s)


def make_accelerator(on_cpu: bool, mixed_precision: str, tracked: bool, timeout_s: float) -> Accelerator:
    """An accelerator that is what is asked, whatever the environment says; the only place where one is made.

    Accumulation and schedule are the loop's own business, so Accelerate is told of neither: it would divide the loss
    by the accumulation steps and step a prepared scheduler once per process.

    Args:
        tracked: whether W&B is told, through the accelerator's tracker.

    Raises:
        UserError: several processes were launched that do not know of each other, or a variable asks for what is not
            done here.
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
            raise  # the latter: another process has not come
        why = " ".join(str(error).split()) or type(error).__name__
        set_here = ", ".join(f"{name}={os.environ[name]}" for name in given if name in os.environ)
        raise UserError(
            f"the processes cannot be set up: {why[:300]}; the environment has {set_here}: mend what is wrong, or "
            f"`unset {' '.join(given)}`"
        ) from error
    if accelerator.num_processes != _launched():
        raise UserError(
            f"{_launched()} processes were launched, but this one knows of {accelerator.num_processes}: each would "
            f"train alone in the same directory; launch with {SEVERAL}"
        )
    _require(accelerator, "cpu" if on_cpu else "cuda", mixed_precision)
    return accelerator


def _launched() -> int:
    """How many processes there are, by the launcher; of MPI's Accelerate notes it on CPUs."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _require(accelerator: Accelerator, device_type: str, mixed_precision: str) -> None:
    """See that Accelerate does what it was asked: all accelerators of a process share the first one's state.

    Raises:
        UserError: something else decided.
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
            f"Accelerate is not set up as the experiment says: {', '.join(wrong)}; if something else in this process "
            "made an accelerator before, start a new process (in a notebook: restart the runtime)"
        )


def take_shards(experiment: Experiment) -> int:
    """In how many pieces the frozen weights are held: one for each process where FSDP was launched, else 1 (whole).

    The launcher's variables are taken out of the environment: Accelerate, which would itself shard on GPUs and, without
    a word, not on CPUs, is to see processes for DDP, and transformers is to load as it always does.

    Raises:
        UserError: something is asked of FSDP that is not done here.
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
    if experiment.model.quantization != "none" and shards > 1:
        problems.append(
            f"model.quantization = {experiment.model.quantization}: 4-bit weights cannot be sharded; use "
            "--set model.quantization=none, or launch without FSDP (launch/four_gpus.yaml)"
        )
    if problems:
        raise UserError(*problems)
    return shards


def prepare(
    accelerator: Accelerator, model: LossModel, optimizer: torch.optim.Optimizer, shards: int
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Model and optimizer as Accelerate prepares them for these processes; the frozen weights in pieces if so asked.

    Args:
        shards: as `take_shards` gives it.
    """
    if shards == 1:
        return accelerator.prepare(model, optimizer)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(accelerator.device)
    keep_from_ddp(model)
    # Sharded under DDP, not before: Accelerate refuses to make DDP of a sharded model on GPUs, and moves others whole.
    model_of_all, optimizer = accelerator.prepare(model, optimizer, device_placement=[False, True])
    shard(model, accelerator.device)
    return model_of_all, optimizer


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
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def choose_kernels(deterministic: bool) -> None:
    """On a GPU, deterministic kernels or the fastest; a CPU's are deterministic anyway.

    Only warned about, not refused, is an operation that has no deterministic kernel: the run goes on.
    """
    if torch.cuda.is_available():
        given = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
        if not given or (deterministic and given not in DETERMINISTIC_CUBLAS):
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read once, before anything is computed there
        torch.use_deterministic_algorithms(deterministic, warn_only=True)


def shut_down(accelerator: Accelerator) -> None:
    """Finish the trackers and leave the process group.

    A group that is freed under Python's global lock joins its threads, and one of gloo's may still be waiting for that
    very lock, to let go of the last collective's tensors: a deadlock at the end of a finished run, seen on a busy
    machine with torch 2.13. The pause gives the lock up for once.
    """
    if accelerator.num_processes > 1:
        time.sleep(0.5)
    accelerator.end_training()
