"""Estimate the memory of training before a weight is loaded, and decide which settings fit.

The estimate runs the code of training (forward, loss and backward of one micro-batch) on models with one and two
layers, whose tensors have shapes but no contents, and counts every storage that is created and freed. Two models show
what each further layer adds; a few micro-batch sizes show what each further token adds. The kernels of a CPU are used
also to estimate a GPU, for which nothing has been measured. Only tensors are counted: not the context and kernels of a
GPU (about 0.5 GiB), not the memory of Python and torch (about 0.5 GiB), and not fragmentation, which is large with a
CPU's
allocator: see `Footprint.resident` and `device.return_freed_memory`.
"""

import bisect
import contextlib
import copy
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from medqa.config import Experiment, Optimizer
from medqa.data.batches import MicroBatch
from medqa.model.attention import PRODUCTS, SEGMENTED, attention_in_effect, kernels_of, padding_needed
from medqa.model.base import LOAD_ERRORS, add_lora
from medqa.model.device import gibibytes
from medqa.model.families import check_targets, without_contents
from medqa.model.loss import CHUNK_BYTES, LossModel, summed_loss
from medqa.model.settings import KEPT, SavedSettings, Settings

# ----------------------------------------------------------------------------------------------------
# The peak memory of a computation, counted by the storages that are created and freed while it runs.


class Storages(TorchDispatchMode):
    """Counts the bytes of storages that are created while it is active, and their peak in each stretch of the run.

    A storage counts as freed when its finalizer runs, because autograd may keep it longer than any Python tensor.
    """

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._known = {_storage(tensor)._cdata for tensor in known}  # existed before, so they are not counted
        self.live = 0
        self.stretch = "layers"
        self.peak: dict[str, int] = {"layers": 0, "head": 0}
        self.on_entry: dict[str, int] = {}
        self._sizes: dict[int, int] = {}

    def enter(self, stretch: str) -> None:
        """Begin the stretch with this name."""
        self.stretch = stretch
        self.on_entry[stretch] = self.live
        self._note(0)

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one operation and count the storages that it created."""
        result = func(*args, **(kwargs or {}))
        each_tensor(self._count, result)
        self._note(_inside(func, args))
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = _storage(tensor)
        key = storage._cdata
        if key not in self._known and key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += self._sizes[key]
            weakref.finalize(storage, self._gone, key)

    def _note(self, inside: int) -> None:
        self.peak[self.stretch] = max(self.peak[self.stretch], self.live + inside)

    def _gone(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    """The storage of a tensor's contents."""
    return tensor.untyped_storage()


def _inside(operation: torch._ops.OpOverload, args: tuple) -> int:
    """Temporary memory that an operation hides: a 4-bit layer is dequantized inside its matrix product."""
    if operation.name() != "bitsandbytes::gemm_4bit":
        return 0
    inputs, shape = args[0], args[2]
    count = shape[0] * shape[1]
    return count * inputs.element_size() + 4 * count // BLOCK


# ----------------------------------------------------------------------------------------------------

# ----------------------------------------------------------------------------------------------------
# The model with shapes but without contents.
#
# It is built by the same calls as the model that is trained, of tensors that have a type and a device but no memory.

BLOCK, NESTED_BLOCK = 64, 256  # values with one scale: weights, and the scales themselves, in 4-bit weights


def shape_model(
    experiment: Experiment,
    model_config: Any,
    settings: Settings,
    vocabulary: int | None,
    layers: int,
) -> LossModel:
    """The model of this experiment with so many layers, with adapters and gradients, ready to train.

    Args:
        model_config: the result of `check_model`.
        vocabulary: the size of the tokenizer, if it may be larger than the model's.
    """
    shallow, known = copy.deepcopy(model_config), model_config.vocab_size
    shallow.num_hidden_layers, shallow.vocab_size = layers, max(known, vocabulary or 0)
    if getattr(shallow, "layer_types", None):
        shallow.layer_types = shallow.layer_types[:layers]
    attention = settings.attn_implementation
    if attention not in ("sdpa", "eager", SEGMENTED):  # flash-attention, which is for GPUs and needs as little as sdpa
        attention = SEGMENTED if settings.padding_free else "sdpa"
    four_bit = settings.quantization == "4bit" and not settings.dequantize
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(shallow, dtype=settings.dtype, attn_implementation=attention)
        if shallow.vocab_size > known:  # as after resizing the embeddings
            bias = torch.zeros(shallow.vocab_size, dtype=settings.dtype)
            base.get_output_embeddings().bias = torch.nn.Parameter(bias)
        if four_bit:
            _to_four_bit(base, settings.dtype)
        base.requires_grad_(False)
        if settings.gradient_checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        lora = experiment.lora.model_copy(update={"init_from": None})
        fast = settings.fast_lora
        model = LossModel(add_lora(base, lora, experiment.training.seed, fast))
    _materialize(model)
    if four_bit:
        _quantize(model, settings.dtype)
    if settings.device_type == "cuda":
        _fuse_dropout(model)
    return model.train()


# Tensors with shape, type and device but no contents; operations on them give such tensors too. Real tensors, such as
# token ids, may be inputs. What depends on values (which positions are targets) is computed with real tensors only.
FAKE = FakeTensorMode(allow_non_fake_inputs=True)


def each_tensor(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """`value`, an operation's argument or result, with `function` applied to each tensor; faster than tree_map."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)(each_tensor(function, part) for part in value)
    return value


def _empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A CPU tensor without contents."""
    with FAKE:
        return torch.empty(size, dtype=dtype)


def tensors_of(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Weights, buffers, and the scales of 4-bit weights, each once."""
    yield from model.buffers()
    for parameter in model.parameters():
        yield parameter
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            yield from (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)


def _materialize(model: torch.nn.Module) -> None:
    """Convert every weight and buffer into a CPU tensor without contents. Shared tensors stay shared."""
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
    """Replace linear layers except the head by bitsandbytes', as transformers does; weights are not quantized yet."""
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
                # For DoRA, PEFT calls `dequantize` of a layer that has `W_q`.
                new.W_q, new.dequantize = torch.empty(0), functools.partial(_dequantized, new, dtype)
                setattr(parent, name, new)
    base.is_loaded_in_4bit = True


def _dequantized(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """The result of dequantizing the weights of a 4-bit layer: a whole matrix of this type."""
    shape = (layer.out_features, layer.in_features)
    return torch.empty(shape, dtype=dtype) if layer.weight.is_meta else _empty(*shape, dtype=dtype)


def _quantize(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Give 4-bit layers the tensors of NF4 with double quantization (https://arxiv.org/abs/2305.14314)."""
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
    """Use dropout as on a GPU, with a mask of one byte; a CPU keeps a mask as wide as the input."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and module.p > 0:
            module.forward = functools.partial(_fused_dropout, module.p)  # type: ignore[method-assign]


def _fused_dropout(p: float, x: torch.Tensor) -> torch.Tensor:
    """Dropout with this probability, as one operation."""
    return torch.native_dropout(x, p, True)[0]


# ----------------------------------------------------------------------------------------------------

DEPTH = 2  # layers of the larger of the two models
ESTIMATES: dict[str, "Footprint"] = {}  # the estimates of this process, by their arguments
MOST = 2**24  # the largest micro-batch in tokens that is considered
SMALL = 4096  # with fewer elements, bitsandbytes keeps 32-bit optimizer states
OPTIMIZER_BLOCK = 256  # elements with one scale in 8-bit optimizer states
# glibc keeps freed blocks of up to 32 MiB and cannot always reuse them. By default, the resident set beyond the weights
# grew to 1.6 to 1.85 times the peak of the tensors, for models with 40M and 135M parameters, with and without padding.
# With gradient checkpointing it grew to nearly 9 times, because little is kept and as much is allocated and freed.
CPU_RESIDENT = 1.85
TOKENS = (128, 256)  # sizes of micro-batches without padding that are run, in addition to multiples of the head's chunk
# The length of the segments that are run where `attention.PRODUCTS` computes the attention. For each segment in turn,
# the products allocate and free memory quadratic in its length. With short segments that memory is small, so the line
# through TOKENS describes the memory that grows with the tokens. The estimate omits the products' memory of one long
# segment.
SEGMENT = 64


@dataclass(frozen=True)
class Line:
    """Bytes as a function of tokens: exact at the measured sizes, linear between and beyond them."""

    tokens: tuple[int, ...]
    bytes: tuple[int, ...]

    def at(self, tokens: int) -> int:
        """The bytes for this number of tokens."""
        i = min(max(bisect.bisect_left(self.tokens, tokens), 1), len(self.tokens) - 1)
        slope = (self.bytes[i] - self.bytes[i - 1]) / (self.tokens[i] - self.tokens[i - 1])
        return max(0, round(self.bytes[i] + slope * (tokens - self.tokens[i])))


@dataclass(frozen=True)
class Footprint:
    """The bytes that training needs, by part.

    Attributes:
        base: the frozen weights, with the scales of 4-bit weights.
        adapter, optimizer, gradients: of the trainable parameters.
        activations: what the layers keep for the backward pass after the forward pass, by tokens.
        logits_and_loss: the maximum that head and loss need in addition.
        layers: the maximum while forward or backward is inside a layer, including activations; with gradient
            checkpointing including recomputed activations.
    """

    base: int
    adapter: int
    optimizer: int
    gradients: int
    activations: Line
    logits_and_loss: Line
    layers: Line

    @property
    def fixed(self) -> int:
        """The part that does not depend on the micro-batch."""
        return self.base + self.adapter + self.optimizer + self.gradients

    def peak(self, tokens: int) -> int:
        """The peak bytes of an update whose largest micro-batch has this number of tokens, padding included.

        The optimizer step allocates nothing new, so the peak is in forward or backward.
        """
        return self.fixed + self._made_and_freed(tokens)

    def resident(self, tokens: int) -> int:
        """The same for a CPU's resident set, if glibc keeps freed blocks and there is no gradient checkpointing."""
        return self.fixed + round(CPU_RESIDENT * self._made_and_freed(tokens))

    def _made_and_freed(self, tokens: int) -> int:
        """The maximum bytes of what a micro-batch allocates and frees."""
        in_head = self.activations.at(tokens) + self.logits_and_loss.at(tokens)
        return max(in_head, self.layers.at(tokens))

    def most_tokens(self, memory: int) -> int:
        """The largest micro-batch in tokens whose peak is within `memory` bytes; 0 if none is."""
        return bisect.bisect_right(range(1, MOST), memory, key=self.peak)


@dataclass(frozen=True)
class _Sample:
    """The bytes of one micro-batch beyond weights and gradients, with the names of `Footprint`."""

    activations: int
    logits_and_loss: int
    layers: int


def footprint(
    experiment: Experiment,
    model_config: Any,
    settings: Settings,
    vocabulary: int | None = None,
) -> Footprint:
    """Estimate the memory of this experiment's training, without reading a weight or using a device.

    An estimate takes one to two seconds and is cached by its arguments, because `medqa plan` needs it several times.

    Args:
        model_config: the result of `check_model`.
        vocabulary: the size of the tokenizer, if it may be larger than the model's.
    """
    asked = (model_config.to_json_string(use_diff=False), replace(settings, changes={}), vocabulary, DEPTH)
    key = "\n".join((experiment.model_dump_json(), *map(repr, asked)))
    if key not in ESTIMATES:
        ESTIMATES[key] = _footprint(experiment, model_config, settings, vocabulary)
    return ESTIMATES[key]


def _footprint(experiment: Experiment, model_config: Any, settings: Settings, vocabulary: int | None) -> Footprint:
    """`footprint` without the cache."""
    layers = model_config.num_hidden_layers
    depth = min(DEPTH, layers)
    arguments = (experiment, model_config, settings, vocabulary)
    deep = shape_model(*arguments, depth)
    shallow = shape_model(*arguments, 1) if layers > depth else None

    def extend(deeper: int, shallower: int) -> int:
        """Extrapolate from the models with `depth` layers and with one to all layers."""
        return deeper + (layers - depth) * (deeper - shallower)

    def whole(measure: Callable[[LossModel], int]) -> int:
        return extend(measure(deep), measure(shallow) if shallow else 0)

    fixed = {
        "base": whole(_frozen_bytes),
        "adapter": whole(lambda model: _bytes(_trainable(model))),
        "optimizer": whole(lambda model: optimizer_bytes(_trainable(model), experiment.optimizer)),
        "gradients": whole(lambda model: _bytes(t.grad for t in _trainable(model) if t.grad is not None)),
    }
    if settings.shards > 1:
        fixed["base"] = _sharded(fixed["base"], _frozen_bytes(_layers(deep)[0]), layers, settings.shards)
    batches = _micro_batches(experiment, settings, max(model_config.vocab_size, vocabulary or 0))
    samples = [_run(deep, batch, settings) for batch in batches[:2]]
    # A layer's temporary memory is on top of what all layers keep, so both grow alike with the number of layers.
    kept = [_run(shallow, batch, settings).activations for batch in batches[:2]] if shallow else [0, 0]
    grown = [extend(sample.activations, one) - sample.activations for sample, one in zip(samples, kept, strict=True)]
    heads = [_run(_without_layers(deep), batch, settings) for batch in batches[2:]]
    sizes = tuple(batch.input_ids.numel() for batch in batches)
    return Footprint(
        **fixed,
        activations=Line(sizes[:2], tuple(s.activations + g for s, g in zip(samples, grown, strict=True))),
        logits_and_loss=Line(sizes, tuple(sample.logits_and_loss for sample in (*samples, *heads))),
        layers=Line(sizes[:2], tuple(s.layers + g for s, g in zip(samples, grown, strict=True))),
    )


def optimizer_bytes(parameters: Sequence[torch.Tensor], optimizer: Optimizer) -> int:
    """The bytes of AdamW's two moments and step counts.

    In 8 bits, both moments have one byte and, for each block, one float32; small tensors stay in 32 bits.
    """
    total = 0
    for parameter in parameters:
        count = parameter.numel()
        if optimizer.name == "adamw_torch":
            total += 8 * count + 4
        elif count < SMALL:
            total += 8 * count
        else:
            total += 2 * (count + 4 * -(-count // OPTIMIZER_BLOCK))
    return total


def _sharded(base: int, layer: int, layers: int, shards: int) -> int:
    """The maximum bytes of sharded frozen weights: a shard of all, everything outside of layers, and three layers.

    One layer is in use, and the next one exists twice while it is copied into place.
    """
    return -(-base // shards) + base - layers * layer + min(3, layers) * layer


def _frozen_bytes(model: torch.nn.Module) -> int:
    """The bytes of frozen weights."""
    return _bytes(tensor for tensor in tensors_of(model) if not tensor.requires_grad)


def _layers(model: LossModel) -> torch.nn.ModuleList:
    """The decoder's layers."""
    return model.model.get_base_model().get_decoder().layers


def _trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The trainable parameters."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """The bytes of these tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _micro_batches(experiment: Experiment, settings: Settings, vocabulary: int) -> list[MicroBatch]:
    """Micro-batches of increasing size, in which every token is a target.

    The first two are for the layers. Without padding the head works in chunks, so its memory grows differently from two
    chunks on, where the logits of one chunk still exist when those of the next are computed.
    """
    if not settings.padding_free:
        length = experiment.tokenization.max_length
        return [_micro_batch((rows, length), None) for rows in (1, 2)]
    chunk = max(1, CHUNK_BYTES // (4 * vocabulary))
    sizes = [*TOKENS, *(n * chunk for n in (1, 2, 8) if n * chunk > TOKENS[-1])]
    if (settings.device_type, _activation_dtype(settings)) in PRODUCTS:
        return [_micro_batch((1, tokens), _segment_lengths(tokens, SEGMENT)) for tokens in sizes]
    return [_micro_batch((1, tokens), (tokens,)) for tokens in sizes]


def _segment_lengths(tokens: int, length: int) -> tuple[int, ...]:
    """The lengths of segments with `tokens` tokens in total: all of this length, except the last."""
    rest = tokens % length
    return (length,) * (tokens // length) + ((rest,) if rest else ())


def _activation_dtype(settings: Settings) -> torch.dtype:
    """The data type of activations."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(settings.mixed_precision, settings.dtype)


def _micro_batch(shape: tuple[int, int], segments: tuple[int, ...] | None) -> MicroBatch:
    """A micro-batch of this shape. With padding, its last token is padding, as otherwise there would be no mask."""
    input_ids = torch.zeros(shape, dtype=torch.long)
    mask = None
    if segments is None:
        mask = torch.ones_like(input_ids)
        mask[-1, -1] = 0
    return MicroBatch(input_ids, mask, torch.zeros_like(input_ids), 0, ("",) * shape[0], segments)


def _without_layers(model: LossModel) -> LossModel:
    """The same model without layers: only head and loss."""
    model.model.get_base_model().get_decoder().layers = torch.nn.ModuleList()
    return model


def _run(model: LossModel, micro_batch: MicroBatch, settings: Settings) -> _Sample:
    """Measure a micro-batch."""
    decoder = model.model.get_base_model().get_decoder()
    device = torch.device("cpu")
    mixed = settings.mixed_precision != "no"
    there = [*tensors_of(model), *(t.grad for t in tensors_of(model) if t.grad is not None)]
    with Storages(there) as storages:

        def out_of_layers(module: torch.nn.Module, arguments: tuple, output: Any) -> None:
            storages.enter("head")
            hidden = output.last_hidden_state
            if not hidden.requires_grad:  # there are no layers
                hidden.requires_grad_()
            hidden.register_hook(lambda gradient: storages.enter("layers"))

        hook = decoder.register_forward_hook(out_of_layers)
        try:
            with kernels_of(settings.device_type):
                with torch.autocast("cpu", _activation_dtype(settings), enabled=mixed):
                    loss = summed_loss(model, micro_batch, device)
                loss.backward()
        finally:
            hook.remove()
    activations = storages.on_entry["head"]
    return _Sample(activations, storages.peak["head"] - activations, storages.peak["layers"])


# ----------------------------------------------------------------------------------------------------
# How the updates are computed on this machine: with or without padding, checkpointing and dequantized 4-bit weights.
#
# These decisions change time and memory, but not the update. With `training.padding_free: false` none of them is made:
# the recipe is computed as it is written, to show what it costs. The settings of a checkpoint are kept.
#
# With `model.quantization: auto` there is one more decision, which does change the update: whether the base model has
# 4-bit weights. They make its loss higher, so they are used only if the run would not fit without them, however slow.

# A micro-batch of so many tokens keeps the processor busy; a larger one is hardly faster. Checkpointing and 4-bit
# weights in compressed form are used only if such a micro-batch would not fit otherwise.
ENOUGH_TOKENS = {"cpu": 1024, "cuda": 4096}


def fit_to_memory(
    settings: Settings,
    experiment: Experiment,
    model_config: Any,
    vocabulary: int,
    memory: int,
    saved: SavedSettings | None = None,
) -> Settings:
    """Complete the settings of a run, before the model is loaded.

    The decisions (padding, the attention implementation, gradient checkpointing, dequantized 4-bit weights) change time
    and memory, but not the update. With `training.padding_free: false` the recipe is computed as it is written. With
    `model.quantization: auto` it is also decided whether the weights are quantized, which changes the update.

    Args:
        settings: the result of `resolve_settings`.
        model_config: the base model's configuration, as transformers reads it.
        vocabulary: the size of the tokenizer.
        memory: the bytes that the run may use.
        saved: the settings of the checkpoint that the run resumes from, which are kept if the machine can.

    Raises:
        UserError: the model does not have a target module.
    """
    check_targets(without_contents(model_config), experiment.lora)
    model, changes = experiment.model, dict(settings.changes)

    # Attention, and whether examples can be concatenated without padding
    why_padded = padding_needed(experiment, model_config)
    attention, why_attention = attention_in_effect(model.attn_implementation, model_config)
    if why_padded is None and attention == "sdpa":
        attention = SEGMENTED
    asked = experiment.training.padding_free
    padding_free = asked and why_padded is None and (saved is None or saved.padding_free)
    if why_attention is not None:
        changes["model.attn_implementation"] = (model.attn_implementation, attention, why_attention)
    if settings.shards > 1 and experiment.evaluation.samples:
        why_none = "the base is sharded, and generating needs all processes"
        changes["evaluation.samples"] = (str(experiment.evaluation.samples), "0", why_none)
    if padding_free != asked:
        changes["training.padding_free"] = ("true", "false", why_padded or KEPT)
    settings = replace(
        settings,
        attn_implementation=attention,
        padding_free=padding_free,
        evaluation_padding_free=why_padded is None,
        gradient_checkpointing=model.gradient_checkpointing,
    )

    # Gradient checkpointing, and 4-bit or dequantized weights
    automatic = settings.quantization == "auto"
    planned, tokens = None, enough_tokens(experiment, settings.device_type)
    why = {"dequantize": "only without padding"}
    if padding_free and saved is not None:
        settings = replace(settings, gradient_checkpointing=saved.gradient_checkpointing, dequantize=saved.dequantize)
        planned = footprint(experiment, model_config, settings, vocabulary)
        why = {"checkpointing": KEPT, "dequantize": KEPT}
    elif padding_free:
        settings, why, planned = _fastest_that_fits(settings, experiment, model_config, vocabulary, memory)
        settings = replace(settings, planned_tokens=planned.most_tokens(memory))
    else:
        tokens = experiment.training.per_device_batch_size * experiment.tokenization.max_length
        if automatic:
            settings, why["quantization"] = _unquantized_if_it_fits(
                settings, experiment, model_config, vocabulary, memory, tokens
            )
        if settings.device_type == "cpu":
            with contextlib.suppress(*LOAD_ERRORS):  # reported when the model is loaded
                planned = footprint(experiment, model_config, settings, vocabulary)
    if automatic:
        changes["model.quantization"] = ("auto", settings.quantization, why["quantization"])
    if settings.gradient_checkpointing != model.gradient_checkpointing:
        asked_on, on = (str(each).lower() for each in (model.gradient_checkpointing, settings.gradient_checkpointing))
        changes["model.gradient_checkpointing"] = (asked_on, on, why["checkpointing"])
    if settings.quantization == "4bit" and model.dequantize == "auto":
        used = "once, and kept so" if settings.dequantize else "never"
        changes["model.dequantize"] = ("auto", used, why["dequantize"])

    # Whether freed memory must be returned to the system on a CPU
    short = settings.gradient_checkpointing or (planned is not None and planned.resident(tokens) > memory)
    return replace(settings, return_memory=settings.device_type == "cpu" and short, changes=changes)


def enough_tokens(experiment: Experiment, device_type: str) -> int:
    """The micro-batch size in tokens beyond which a larger one is hardly faster, but at least the longest example."""
    return max(ENOUGH_TOKENS[device_type], experiment.tokenization.max_length)


def _fastest_that_fits(
    settings: Settings, experiment: Experiment, model_config: Any, vocabulary: int, memory: int
) -> tuple[Settings, dict[str, str], Footprint]:
    """Choose the fastest combination of checkpointing and dequantized weights that fits; with reasons and footprint.

    If the quantization is still `auto`, unquantized weights come first, with checkpointing too. They count as fitting
    if the longest example does, although such micro-batches are slower than larger ones.
    """
    tokens, longest = enough_tokens(experiment, settings.device_type), experiment.tokenization.max_length
    asked = settings.quantization
    last_resort = ("none", True, False) if asked == "auto" else None
    ways = []  # (quantization, gradient checkpointing, dequantized weights), the preferred ones first
    if asked != "4bit":
        ways += [("none", False, False), ("none", True, False)]
    elif experiment.model.dequantize == "auto":
        ways += [("4bit", False, True)]
    if asked != "none":
        ways += [("4bit", False, False), ("4bit", True, False)]
    said = {}
    for way in ways:  # if none fits, the last one remains, and the trial before the first update reports it
        settings = replace(settings, quantization=way[0], gradient_checkpointing=way[1], dequantize=way[2])
        planned = footprint(experiment, model_config, settings, vocabulary)
        needed = longest if way == last_resort else tokens
        said[way] = (
            f"{gibibytes(planned.peak(needed))} GiB of {gibibytes(memory)} GiB for micro-batches of {needed:,} tokens"
        )
        if planned.peak(needed) <= memory:
            break
    chosen = settings.quantization
    expanded = ("4bit", False, True) if asked == "4bit" else ("none", False, False)  # both need the same memory
    why = {
        "checkpointing": f"the estimate without it is {said.get((chosen, False, False)) or said[way]}",
        "dequantize": f"the estimate with dequantized weights is {said.get(expanded)}",
    }
    if last_resort is not None:
        estimated = way if chosen == "none" else last_resort
        why["quantization"] = _about_unquantized(chosen, said[estimated], checkpointing=estimated[1])
    return settings, why, planned


def _unquantized_if_it_fits(
    settings: Settings, experiment: Experiment, model_config: Any, vocabulary: int, memory: int, tokens: int
) -> tuple[Settings, str]:
    """Choose the quantization of a recipe with padding, computed as it is written; with the reason.

    Args:
        tokens: the largest micro-batch, padding included.
    """
    unquantized = replace(settings, quantization="none")
    try:
        peak = footprint(experiment, model_config, unquantized, vocabulary).peak(tokens)
    except LOAD_ERRORS:  # reported when the model is loaded, if that fails too
        return unquantized, "the memory of this model cannot be estimated"
    chosen = unquantized if peak <= memory else replace(settings, quantization="4bit")
    estimate = f"{gibibytes(peak)} GiB of {gibibytes(memory)} GiB for micro-batches of {tokens:,} tokens"
    return chosen, _about_unquantized(chosen.quantization, estimate, settings.gradient_checkpointing)


def _about_unquantized(chosen: str, estimate: str, checkpointing: bool) -> str:
    """Why a quantization was chosen, from the estimate of unquantized weights."""
    fits = "the run fits" if chosen == "none" else "the run does not fit"
    with_it = " and with gradient checkpointing" if checkpointing else ""
    return f"{fits} without 4-bit weights: the estimate without them{with_it} is {estimate}"
