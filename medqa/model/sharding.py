"""Frozen weights sharded over all processes (torch's FSDP2), for a base model that does not fit one GPU.

Only frozen weights are sharded: those of a layer are gathered for its forward and again for its backward pass. Adapters
are replicated and DDP averages their gradients, as without sharding, so update, optimizer and checkpoints are the same.
All processes must run a forward pass together.
"""

import os

import torch
from accelerate import init_empty_weights
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from medqa.model.attention import find_varlen_kernel
from medqa.model.loss import LossModel
from medqa.model.settings import Settings

BLANK = torch.device("meta")  # a model on this device has shapes but no contents


def loading_device(device: torch.device, shards: int) -> torch.device:
    """The device on which this process loads the base: if sharded, the first process loads it into host memory."""
    if shards == 1:
        return device
    return torch.device("cpu") if os.environ["RANK"] == "0" else BLANK


def blank_base(where: str, settings: Settings, vocabulary: int) -> PreTrainedModel:
    """A base model without contents, with the shapes of the first process's model, resized to `vocabulary`.

    Args:
        where: its directory or hub id; only its configuration is read.
    """
    model_config = AutoConfig.from_pretrained(where, trust_remote_code=False)
    known = model_config.vocab_size
    model_config.vocab_size = max(known, vocabulary)
    with init_empty_weights(include_buffers=False):  # buffers follow from the configuration
        model = AutoModelForCausalLM.from_config(
            model_config,
            dtype=settings.dtype,
            attn_implementation=settings.attn_implementation,
            trust_remote_code=False,
        )
    model.tie_weights()  # the context manager unties them
    if vocabulary > known:
        bias = torch.empty(vocabulary, dtype=settings.dtype, device=BLANK)
        model.get_output_embeddings().bias = torch.nn.Parameter(bias)
    _without_memory(model)
    return model


def _without_memory(model: torch.nn.Module) -> None:
    """Replace weights on the meta device by expanded CPU tensors that take no memory (a single number each).

    Unlike on the meta device, adapters beside them are then created and loaded as beside real weights.
    """
    made: dict[int, torch.nn.Parameter] = {}  # keeps tied weights tied
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                blank = torch.zeros((), dtype=old.dtype).expand(old.shape)
                made.setdefault(id(old), torch.nn.Parameter(blank, requires_grad=False))
                module._parameters[name] = made[id(old)]


def keep_from_ddp(model: LossModel) -> None:
    """Make DDP ignore frozen weights: it neither compares nor broadcasts them."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    everything = [*model.state_dict(), *(name for name, _ in model.named_buffers())]
    ignored = [name for name in everything if name not in trained]
    model._ddp_params_and_buffers_to_ignore = ignored  # type: ignore[assignment] # DDP reads this attribute


def shard(model: LossModel, device: torch.device) -> None:
    """Shard the frozen weights of the first process's model over all processes, onto their devices.

    This is done layer by layer: a device holds its shards of the layers before, and one unsharded layer. Trainable
    parameters are not sharded.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    # Everything that is not a layer belongs to the root module: it is gathered from the root's forward on, also for
    # code that calls only a part of the model, or uses the head's weights.
    for module in (*model.model.get_base_model().get_decoder().layers, model):
        for parameter in module.parameters():
            if parameter not in trained and not isinstance(parameter, DTensor):
                parameter.data = _from_first(parameter.data, device)
        fully_shard(module, mesh=mesh, reshard_after_forward=module is not model, ignored_params=trained)
    find_varlen_kernel(device)  # `LossModel` tested the device of its weights, which was the host


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether a model, or a module in it, is sharded."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def put_apart(model: torch.nn.Module) -> None:
    """Reshard what a forward pass without a backward pass leaves unsharded. Every process calls it; nothing is sent.

    Saving would do it on the first process only, whose next forward pass would then wait for shards that nobody sends.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def frozen_bytes(model: torch.nn.Module) -> tuple[int, int]:
    """Bytes of a sharded model's frozen weights: those that this process holds between updates, and all of them."""
    here = total = 0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            here += local.untyped_storage().nbytes()
            total += parameter.numel() * parameter.element_size()
    return here, total


def _from_first(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Broadcast a tensor of the first process to this process's device."""
    first = torch.distributed.get_rank() == 0
    whole = tensor.to(device).contiguous() if first else torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    torch.distributed.broadcast(whole, 0)
    return whole
