"""Frozen weights in pieces, one on each process (torch's FSDP2), for a base that does not fit one card.

Only what is frozen is sharded: each layer's weights come together for its forward and again for its backward. Adapters
stay whole everywhere and DDP averages their gradients, as without sharding, so that the update, the optimizer and the
checkpoints are the same. A forward is then something that all processes do at once, or none.
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

BLANK = torch.device("meta")  # as the place to load to: a model of the right shapes, without contents


def loading_device(device: torch.device, shards: int) -> torch.device:
    """Where this process loads the base: on its device, but in the host's memory, and once, what is to be sharded."""
    if shards == 1:
        return device
    return torch.device("cpu") if os.environ["RANK"] == "0" else BLANK


def blank_base(where: str, settings: Settings, vocabulary: int) -> PreTrainedModel:
    """A base model without contents, in the shapes that the first process's has: loaded, and grown to `vocabulary`.

    Args:
        where: its directory or hub id; only its configuration is read.
    """
    model_config = AutoConfig.from_pretrained(where, trust_remote_code=False)
    known = model_config.vocab_size
    model_config.vocab_size = max(known, vocabulary)
    with init_empty_weights(include_buffers=False):  # those are made of the configuration
        model = AutoModelForCausalLM.from_config(
            model_config,
            dtype=settings.dtype,
            attn_implementation=settings.attn_implementation,
            trust_remote_code=False,
        )
    model.tie_weights()  # the context undoes it
    if vocabulary > known:
        bias = torch.empty(vocabulary, dtype=settings.dtype, device=BLANK)
        model.get_output_embeddings().bias = torch.nn.Parameter(bias)
    _without_memory(model)
    return model


def _without_memory(model: torch.nn.Module) -> None:
    """Give weights on the meta device a CPU's instead that take no memory: one number seen as a whole matrix.

    Unlike on meta, adapters are then made and loaded beside them as beside real ones.
    """
    made: dict[int, torch.nn.Parameter] = {}  # weights that are tied stay so
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                blank = torch.zeros((), dtype=old.dtype).expand(old.shape)
                made.setdefault(id(old), torch.nn.Parameter(blank, requires_grad=False))
                module._parameters[name] = made[id(old)]


def keep_from_ddp(model: LossModel) -> None:
    """Have DDP see to what trains, and to nothing else: neither compare nor send what is frozen."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    everything = [*model.state_dict(), *(name for name, _ in model.named_buffers())]
    ignored = [name for name in everything if name not in trained]
    model._ddp_params_and_buffers_to_ignore = ignored  # type: ignore[assignment] # where DDP looks for it


def shard(model: LossModel, device: torch.device) -> None:
    """Share the frozen weights of the first process's model out to all processes, onto their devices.

    Layer by layer: a device holds its pieces of those before, and one layer whole. What trains is left alone.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    # All that is not a layer is the root's: it is whole from the root's forward on, also for what calls only a part of
    # the model, or takes the head's weights.
    for module in (*model.model.get_base_model().get_decoder().layers, model):
        for parameter in module.parameters():
            if parameter not in trained and not isinstance(parameter, DTensor):
                parameter.data = _from_first(parameter.data, device)
        fully_shard(module, mesh=mesh, reshard_after_forward=module is not model, ignored_params=trained)
    find_varlen_kernel(device)  # a `LossModel` looks where its weights are, which was the host


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether a model, or something in it, is sharded."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def put_apart(model: torch.nn.Module) -> None:
    """Give up what a forward without a backward leaves whole; every process calls it, and nothing is sent.

    Saving would do it on the first process alone, and its next forward would then ask for pieces that nobody sends.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def frozen_bytes(model: torch.nn.Module) -> tuple[int, int]:
    """Bytes of a sharded model's frozen weights: those that this process holds between updates, and all."""
    here = total = 0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            here += local.untyped_storage().nbytes()
            total += parameter.numel() * parameter.element_size()
    return here, total


def _from_first(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The first process's tensor, on this process's device."""
    first = torch.distributed.get_rank() == 0
    whole = tensor.to(device).contiguous() if first else torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    torch.distributed.broadcast(whole, 0)
    return whole
