"""The run's model with shapes and no contents: what it will hold and do, known before a weight is read.

Made by the same calls as the model that trains, of tensors that have a type and a device but no memory.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from medqa.config import Experiment
from medqa.model.attention import SEGMENTED
from medqa.model.base import add_lora
from medqa.model.execution import Execution
from medqa.model.loss import LossModel
from medqa.model.precision import Precision

BLOCK, NESTED_BLOCK = 64, 256  # weights with one scale, and scales with one scale, in 4-bit weights


def shape_model(
    experiment: Experiment,
    model_config: Any,
    precision: Precision,
    execution: Execution,
    quantization: str,
    vocabulary: int | None,
    layers: int,
) -> LossModel:
    """The model of this experiment with so many layers, adapters and gradients included, ready to train.

    Args:
        model_config: as `check_model` returns it.
        quantization: the one in effect.
        vocabulary: the tokenizer's size, where it may be larger than the model's.
    """
    shallow, known = copy.deepcopy(model_config), model_config.vocab_size
    shallow.num_hidden_layers, shallow.vocab_size = layers, max(known, vocabulary or 0)
    if getattr(shallow, "layer_types", None):
        shallow.layer_types = shallow.layer_types[:layers]
    attention = execution.attn_implementation
    if attention not in ("sdpa", "eager", SEGMENTED):  # flash-attention, which is for GPUs: as lean as sdpa
        attention = SEGMENTED if execution.padding_free else "sdpa"
    four_bit = quantization == "4bit" and not execution.dequantize
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(shallow, dtype=precision.dtype, attn_implementation=attention)
        if shallow.vocab_size > known:  # as growing the embeddings leaves it
            bias = torch.zeros(shallow.vocab_size, dtype=precision.dtype)
            base.get_output_embeddings().bias = torch.nn.Parameter(bias)
        if four_bit:
            _to_four_bit(base, precision.dtype)
        base.requires_grad_(False)
        if execution.gradient_checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        lora = experiment.lora.model_copy(update={"init_from": None})
        fast = execution.fast_lora(precision.device_type)
        model = LossModel(add_lora(base, lora, experiment.training.seed, fast))
    _materialize(model)
    if four_bit:
        _quantize(model, precision.dtype)
    if precision.device_type == "cuda":
        _fuse_dropout(model)
    return model.train()


class Shape(torch.Tensor):
    """A tensor that has shape, type and place (a CPU) but no memory. What is computed of one is one.

    Much as torch's own FakeTensor, which does more and takes three times as long. Real tensors may come in, as token
    ids do, and are then only a shape too; what depends on values (which places are targets) is computed of real ones.
    """

    inner: torch.Tensor  # type: ignore[assignment] # a tensor's product of that name is not used

    @staticmethod
    def __new__(cls: type["Shape"], inner: torch.Tensor) -> "Shape":
        """A CPU's tensor with the type and strides of a meta tensor, which it keeps: its storage is what is counted."""
        host = torch.device("cpu")
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=host
        )

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # torch's own hints are narrower than what it passes
        cls,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """The operation on meta tensors; in place, what comes out is what went in."""
        if func is torch.ops.aten._fused_sdp_choice.default:  # which attention kernel: a CPU's answer is wanted
            return func(*each_tensor(_blank, args), **(kwargs or {}))
        wrappers: dict[int, torch.Tensor] = {}

        def unwrapped(tensor: torch.Tensor) -> torch.Tensor:
            if isinstance(tensor, Shape):
                wrappers[id(tensor.inner)] = tensor
                return tensor.inner
            return tensor if tensor.dim() == 0 else torch.empty_like(tensor, device="meta")

        def wrapped(tensor: torch.Tensor) -> torch.Tensor:
            return wrappers[id(tensor)] if id(tensor) in wrappers else Shape(tensor)

        named = {name: each_tensor(unwrapped, value) for name, value in (kwargs or {}).items()}
        if named.get("device") is not None:
            named["device"] = torch.device("meta")
        return each_tensor(wrapped, func(*each_tensor(unwrapped, args), **named))


def each_tensor(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """`value`, an operation's argument or result, with each tensor in it replaced; quicker than torch's tree_map."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)(each_tensor(function, part) for part in value)
    return value


def _blank(tensor: torch.Tensor) -> torch.Tensor:
    """A real tensor of the same shape, whose memory is never touched."""
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)


def _empty(*size: int, dtype: torch.dtype = torch.float32) -> Shape:
    return Shape(torch.empty(size, dtype=dtype, device="meta"))


def tensors_of(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Weights, buffers, and the scales of 4-bit weights, each once."""
    yield from model.buffers()
    for parameter in model.parameters():
        yield parameter
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            yield from (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)


def _materialize(model: torch.nn.Module) -> None:
    """Every weight and buffer on a CPU, as the mode in force makes tensors; what is shared stays shared."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in stores:
            for name, old in tensors.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new: torch.Tensor = _empty(*old.shape, dtype=old.dtype)
                    if isinstance(old, torch.nn.Parameter):
                        new = torch.nn.Parameter(new, requires_grad=old.requires_grad)
                        new.grad = _empty(*old.shape, dtype=old.dtype) if old.requires_grad else None
                    made[id(old)] = new
                tensors[name] = made[id(old)]


def _to_four_bit(base: PreTrainedModel, dtype: torch.dtype) -> None:
    """Linear layers other than the head become bitsandbytes', as transformers does it; their weights are not yet."""
    import bitsandbytes as bnb

    head = base.get_output_embeddings()
    for parent in list(base.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is torch.nn.Linear and layer is not head:
                has_bias = layer.bias is not None
                new = bnb.nn.Linear4bit(
                    layer.in_features, layer.out_features, has_bias, compute_dtype=dtype, quant_type="nf4"
                )
                new.support_avx512bf16_for_cpu = False
                setattr(parent, name, new)
    base.is_loaded_in_4bit = True


def _quantize(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Weights of 4-bit layers with the tensors that NF4 with double quantization has (https://arxiv.org/abs/2305.14314)."""
    import bitsandbytes as bnb
    from bitsandbytes.functional import QuantState

    for layer in model.modules():
        if not isinstance(layer, bnb.nn.Linear4bit):
            continue
        shape = layer.weight.shape
        scales = -(-shape.numel() // BLOCK)
        nested = QuantState(
            absmax=_empty(-(-scales // NESTED_BLOCK)),
            code=_empty(256),
            blocksize=NESTED_BLOCK,
            dtype=torch.float32,
        )
        packed = _empty((shape.numel() + 1) // 2, 1, dtype=torch.uint8)
        layer.weight = torch.nn.Parameter(packed, requires_grad=False)
        layer.weight.quant_state = QuantState(
            absmax=_empty(scales, dtype=torch.uint8),
            shape=shape,
            code=_empty(16),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=dtype,
            offset=_empty(),
            state2=nested,
        )


def _fuse_dropout(model: torch.nn.Module) -> None:
    """Dropout as a GPU has it, with a mask of one byte; a CPU keeps one as wide as the input."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and module.p > 0:
            module.forward = functools.partial(_fused_dropout, module.p)  # type: ignore[method-assign]


def _fused_dropout(p: float, x: torch.Tensor) -> torch.Tensor:
    """Dropout with this probability, as one operation."""
    return torch.native_dropout(x, p, True)[0]
