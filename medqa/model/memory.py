"""How much memory training takes, estimated before a weight is loaded, and what fits.

The run's own code is run: forward, loss and backward of one micro-batch, on a model of one and of two layers whose
tensors have shapes and no contents, while every storage that comes and goes is counted. Two layers tell what each
further one adds; a few sizes of micro-batch tell what each further token adds. A CPU's kernels are asked also for a
GPU, where no figure is measured. Counted are tensors: not a GPU's context and kernels (about 0.5 GiB), not the memory
of Python and torch (about 0.5 GiB), and not what an allocator loses to fragments. A CPU's allocator loses much:
`Footprint.resident` and `memory.return_freed_memory`.
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
from medqa.model.attention import SEGMENTED, attention_in_effect, padding_needed
from medqa.model.base import LOAD_ERRORS, add_lora
from medqa.model.device import gibibytes
from medqa.model.families import check_targets, without_contents
from medqa.model.loss import CHUNK_BYTES, LossModel, summed_loss
from medqa.model.settings import KEPT, SavedSettings, Settings

# ----------------------------------------------------------------------------------------------------
# What a computation holds in memory at its peak, counted by the storages that come and go while it runs.


class Storages(TorchDispatchMode):
    """Counts the bytes of storages made under it, and their peak in each stretch of the run.

    A storage that its own finalizer reports gone is gone for autograd too, which may outlive every Python tensor.
    """

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._known = {_storage(tensor)._cdata for tensor in known}  # there before, so not made here
        self.live = 0
        self.stretch = "layers"
        self.peak: dict[str, int] = {"layers": 0, "head": 0}
        self.on_entry: dict[str, int] = {}
        self._sizes: dict[int, int] = {}

    def enter(self, stretch: str) -> None:
        """From here on it is this stretch."""
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
        """Run one operation and count what it made."""
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
    """Where a tensor's contents would be."""
    return tensor.untyped_storage()


def _inside(operation: torch._ops.OpOverload, args: tuple) -> int:
    """What an operation takes while it runs and does not show: a 4-bit layer is expanded inside its product."""
    if operation.name() != "bitsandbytes::gemm_4bit":
        return 0
    inputs, shape = args[0], args[2]
    count = shape[0] * shape[1]
    return count * inputs.element_size() + 4 * count // BLOCK


# ----------------------------------------------------------------------------------------------------

# ----------------------------------------------------------------------------------------------------
# The run's model with shapes and no contents: what it will hold and do, known before a weight is read.
#
# Made by the same calls as the model that trains, of tensors that have a type and a device but no memory.

BLOCK, NESTED_BLOCK = 64, 256  # weights with one scale, and scales with one scale, in 4-bit weights


def shape_model(
    experiment: Experiment,
    model_config: Any,
    settings: Settings,
    vocabulary: int | None,
    layers: int,
) -> LossModel:
    """The model of this experiment with so many layers, adapters and gradients included, ready to train.

    Args:
        model_config: as `check_model` returns it.
        vocabulary: the tokenizer's size, where it may be larger than the model's.
    """
    shallow, known = copy.deepcopy(model_config), model_config.vocab_size
    shallow.num_hidden_layers, shallow.vocab_size = layers, max(known, vocabulary or 0)
    if getattr(shallow, "layer_types", None):
        shallow.layer_types = shallow.layer_types[:layers]
    attention = settings.attn_implementation
    if attention not in ("sdpa", "eager", SEGMENTED):  # flash-attention, which is for GPUs: as lean as sdpa
        attention = SEGMENTED if settings.padding_free else "sdpa"
    four_bit = settings.quantization == "4bit" and not settings.dequantize
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(shallow, dtype=settings.dtype, attn_implementation=attention)
        if shallow.vocab_size > known:  # as growing the embeddings leaves it
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


# Tensors with shape, type and device, and no contents. What is computed of them is such a tensor too; real tensors, as
# token ids, may come in. What depends on values (which places are targets) is computed of real tensors alone.
FAKE = FakeTensorMode(allow_non_fake_inputs=True)


def each_tensor(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """`value`, an operation's argument or result, with each tensor in it replaced; quicker than torch's tree_map."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)(each_tensor(function, part) for part in value)
    return value


def _empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor on a CPU that has no contents."""
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
    """Give every weight and buffer the form of a CPU's tensor without contents. What is shared stays shared."""
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


# ----------------------------------------------------------------------------------------------------

DEPTH = 2  # layers of the larger model that is run
ESTIMATES: dict[str, "Footprint"] = {}  # those of this process, by what was asked
MOST = 2**24  # tokens of a micro-batch that are thought of
SMALL = 4096  # below so many elements bitsandbytes keeps 32-bit state
OPTIMIZER_BLOCK = 256  # elements with one scale, in 8-bit state
# glibc keeps freed blocks of up to 32 MiB and cannot always use them again. Left alone, the resident set beyond the
# weights grew to 1.6 to 1.85 times the tensors' own peak: models of 40M and 135M parameters, with and without padding.
# With gradient checkpointing it grew to nearly 9 times, since little is held and as much is made and freed.
CPU_RESIDENT = 1.85
TOKENS = (128, 256)  # of micro-batches without padding that are run, beside those of whole chunks of the head


@dataclass(frozen=True)
class Line:
    """Bytes by tokens: exact at the tokens that were tried, straight between them and beyond the outer ones."""

    tokens: tuple[int, ...]
    bytes: tuple[int, ...]

    def at(self, tokens: int) -> int:
        """Bytes at so many tokens."""
        i = min(max(bisect.bisect_left(self.tokens, tokens), 1), len(self.tokens) - 1)
        slope = (self.bytes[i] - self.bytes[i - 1]) / (self.tokens[i] - self.tokens[i - 1])
        return max(0, round(self.bytes[i] + slope * (tokens - self.tokens[i])))


@dataclass(frozen=True)
class Footprint:
    """Bytes that training holds, by part.

    Attributes:
        base: the frozen weights, with their scales where they are in 4 bits.
        adapter, optimizer, gradients: of what trains.
        activations: what the layers keep for backward once forward has gone through them, by tokens.
        logits_and_loss: the most that the head and the loss take beside these.
        layers: the most that is held while forward or backward is inside a layer, activations included; with
            gradient checkpointing this has the activations that are made again.
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
        """What does not depend on the micro-batch."""
        return self.base + self.adapter + self.optimizer + self.gradients

    def peak(self, tokens: int) -> int:
        """Bytes at the peak of an update whose largest micro-batch has so many places, padding included.

        The optimizer's step makes nothing new, so the peak is in forward or backward.
        """
        return self.fixed + self._made_and_freed(tokens)

    def resident(self, tokens: int) -> int:
        """The same, of a CPU's resident set, if glibc keeps freed blocks and there is no gradient checkpointing."""
        return self.fixed + round(CPU_RESIDENT * self._made_and_freed(tokens))

    def _made_and_freed(self, tokens: int) -> int:
        """Bytes of what a micro-batch makes and frees, at their most."""
        in_head = self.activations.at(tokens) + self.logits_and_loss.at(tokens)
        return max(in_head, self.layers.at(tokens))

    def most_tokens(self, memory: int) -> int:
        """The most places of a micro-batch whose peak fits into so many bytes; 0 if none."""
        return bisect.bisect_right(range(1, MOST), memory, key=self.peak)


@dataclass(frozen=True)
class _Sample:
    """What one micro-batch took beyond weights and gradients; named as in `Footprint`."""

    activations: int
    logits_and_loss: int
    layers: int


def footprint(
    experiment: Experiment,
    model_config: Any,
    settings: Settings,
    vocabulary: int | None = None,
) -> Footprint:
    """The memory of this experiment's training. No weight is read, and no device is used.

    An estimate takes one to two seconds and is kept for the same question: `medqa plan` asks several times.

    Args:
        model_config: as `check_model` returns it.
        vocabulary: the tokenizer's size, where it may be larger than the model's.
    """
    asked = (model_config.to_json_string(use_diff=False), replace(settings, changes={}), vocabulary, DEPTH)
    key = "\n".join((experiment.model_dump_json(), *map(repr, asked)))
    if key not in ESTIMATES:
        ESTIMATES[key] = _footprint(experiment, model_config, settings, vocabulary)
    return ESTIMATES[key]


def _footprint(experiment: Experiment, model_config: Any, settings: Settings, vocabulary: int | None) -> Footprint:
    """As `footprint`, computed."""
    layers = model_config.num_hidden_layers
    depth = min(DEPTH, layers)
    arguments = (experiment, model_config, settings, vocabulary)
    deep = shape_model(*arguments, depth)
    shallow = shape_model(*arguments, 1) if layers > depth else None

    def extend(deeper: int, shallower: int) -> int:
        """From `depth` layers, and one, to all."""
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
    # What a layer takes while it is at work comes on top of what all layers keep, so both grow alike with the layers.
    kept = [_run(shallow, batch, settings).activations for batch in batches[:2]] if shallow else [0, 0]
    grown = [extend(sample.activations, one) - sample.activations for sample, one in zip(samples, kept, strict=True)]
    heads = [_run(_without_layers(deep), batch, settings) for batch in batches[2:]]
    places = tuple(batch.input_ids.numel() for batch in batches)
    return Footprint(
        **fixed,
        activations=Line(places[:2], tuple(s.activations + g for s, g in zip(samples, grown, strict=True))),
        logits_and_loss=Line(places, tuple(sample.logits_and_loss for sample in (*samples, *heads))),
        layers=Line(places[:2], tuple(s.layers + g for s, g in zip(samples, grown, strict=True))),
    )


def optimizer_bytes(parameters: Sequence[torch.Tensor], optimizer: Optimizer) -> int:
    """Bytes of AdamW's two moments and step counts.

    In 8 bits both moments have one byte and, for each block, one float32; small tensors stay in 32 bits.
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
    """Bytes of sharded frozen weights at their most: a piece of all, what is no layer whole, and three layers.

    One layer is at work, the next one has arrived, and stands twice while it is put in place.
    """
    return -(-base // shards) + base - layers * layer + min(3, layers) * layer


def _frozen_bytes(model: torch.nn.Module) -> int:
    """What does not train takes."""
    return _bytes(tensor for tensor in tensors_of(model) if not tensor.requires_grad)


def _layers(model: LossModel) -> torch.nn.ModuleList:
    """The decoder's layers."""
    return model.model.get_base_model().get_decoder().layers


def _trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that train."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """What these tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _micro_batches(experiment: Experiment, settings: Settings, vocabulary: int) -> list[MicroBatch]:
    """Micro-batches of rising size, in which everything is a target.

    The first two are for the layers. Without padding the head works in chunks, so its memory grows otherwise from two
    chunks on, where one chunk's logits still stand when the next one's are made.
    """
    if not settings.padding_free:
        length = experiment.tokenization.max_length
        return [_micro_batch((rows, length), None) for rows in (1, 2)]
    chunk = max(1, CHUNK_BYTES // (4 * vocabulary))
    sizes = [*TOKENS, *(n * chunk for n in (1, 2, 8) if n * chunk > TOKENS[-1])]
    return [_micro_batch((1, tokens), (tokens,)) for tokens in sizes]


def _micro_batch(shape: tuple[int, int], segments: tuple[int, ...] | None) -> MicroBatch:
    """One of this shape; padded, its last place is padding, since without any there would be no mask."""
    input_ids = torch.zeros(shape, dtype=torch.long)
    mask = None
    if segments is None:
        mask = torch.ones_like(input_ids)
        mask[-1, -1] = 0
    return MicroBatch(input_ids, mask, torch.zeros_like(input_ids), 0, ("",) * shape[0], segments)


def _without_layers(model: LossModel) -> LossModel:
    """The same model, head and loss alone."""
    model.model.get_base_model().get_decoder().layers = torch.nn.ModuleList()
    return model


def _run(model: LossModel, micro_batch: MicroBatch, settings: Settings) -> _Sample:
    """What a micro-batch takes."""
    decoder = model.model.get_base_model().get_decoder()
    device, dtype = torch.device("cpu"), settings.dtype
    mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(settings.mixed_precision)
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
            with torch.autocast("cpu", mixed or dtype, enabled=mixed is not None):
                loss = summed_loss(model, micro_batch, device)
            loss.backward()
        finally:
            hook.remove()
    activations = storages.on_entry["head"]
    return _Sample(activations, storages.peak["head"] - activations, storages.peak["layers"])


# ----------------------------------------------------------------------------------------------------
# How a run's updates are computed on this machine: with or without padding, checkpointing, expanded 4-bit weights.
#
# What is decided here changes time and memory, never the update. With `training.padding_free: false` nothing is
# decided: the recipe is computed as it is written, and what it costs is what it shows. Settings of a checkpoint are
# kept.

# A micro-batch of so many tokens keeps the processor busy; larger ones gain little. What is not needed for one of them
# to fit (checkpointing, compressed weights) is left out.
ENOUGH_TOKENS = {"cpu": 1024, "cuda": 4096}


def fit_to_memory(
    settings: Settings,
    experiment: Experiment,
    model_config: Any,
    vocabulary: int,
    memory: int,
    saved: SavedSettings | None = None,
) -> Settings:
    """The settings of a run in full, before the model is loaded.

    What is decided here (padding, the attention kernel, gradient checkpointing, expanded 4-bit weights) changes time
    and memory, never the update. With `training.padding_free: false` the recipe is computed as it is written.

    Args:
        settings: as `resolve_settings` returns them.
        model_config: the base model's, as transformers reads it.
        vocabulary: the tokenizer's size.
        memory: bytes that the run may use.
        saved: the settings of the checkpoint that the run resumes from. They are kept where the machine can.

    Raises:
        UserError: a target module that the model does not have.
    """
    check_targets(without_contents(model_config), experiment.lora)
    model, changes = experiment.model, dict(settings.changes)

    # Attention, and whether examples can lie end to end without padding
    why_padded = padding_needed(experiment, model_config)
    attention, why_attention = attention_in_effect(model.attn_implementation, model_config)
    if why_padded is None and attention == "sdpa":
        attention = SEGMENTED
    asked = experiment.training.padding_free
    padding_free = asked and why_padded is None and (saved is None or saved.padding_free)
    if why_attention is not None:
        changes["model.attn_implementation"] = (model.attn_implementation, attention, why_attention)
    if settings.shards > 1 and experiment.evaluation.samples:
        why_none = "the base is sharded, and all processes would have to write each answer"
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

    # Gradient checkpointing, and packed or expanded 4-bit weights
    planned, tokens = None, enough_tokens(experiment, settings.device_type)
    why = {"dequantize": "only without padding"}
    if padding_free and saved is not None:
        settings = replace(settings, gradient_checkpointing=saved.gradient_checkpointing, dequantize=saved.dequantize)
        planned = footprint(experiment, model_config, settings, vocabulary)
        why = {"checkpointing": KEPT, "dequantize": KEPT}
    elif padding_free:
        settings, why, planned = _fastest_that_fits(settings, experiment, model_config, vocabulary, memory)
        settings = replace(settings, planned_tokens=planned.most_tokens(memory))
    elif settings.device_type == "cpu":
        with contextlib.suppress(*LOAD_ERRORS):  # what is wrong with the model is said when it is loaded
            planned = footprint(experiment, model_config, settings, vocabulary)
        tokens = experiment.training.per_device_batch_size * experiment.tokenization.max_length
    if settings.gradient_checkpointing != model.gradient_checkpointing:
        asked_on, on = (str(each).lower() for each in (model.gradient_checkpointing, settings.gradient_checkpointing))
        changes["model.gradient_checkpointing"] = (asked_on, on, why["checkpointing"])
    if settings.quantization == "4bit" and model.dequantize == "auto":
        used = "once, and kept so" if settings.dequantize else "never"
        changes["model.dequantize"] = ("auto", used, why["dequantize"])

    # Whether a CPU's allocator has to return what is freed
    short = settings.gradient_checkpointing or (planned is not None and planned.resident(tokens) > memory)
    return replace(settings, return_memory=settings.device_type == "cpu" and short, changes=changes)


def enough_tokens(experiment: Experiment, device_type: str) -> int:
    """Tokens of a micro-batch beyond which larger ones gain little, or of the longest example where that is more."""
    return max(ENOUGH_TOKENS[device_type], experiment.tokenization.max_length)


def _fastest_that_fits(
    settings: Settings, experiment: Experiment, model_config: Any, vocabulary: int, memory: int
) -> tuple[Settings, dict[str, str], Footprint]:
    """Checkpointing and expanded weights or not, whatever is the fastest that fits; the reasons; and its footprint."""
    tokens = enough_tokens(experiment, settings.device_type)
    ways = [(False, False), (True, False)]  # (gradient checkpointing, expanded weights), the fastest first
    if settings.quantization == "4bit" and experiment.model.dequantize == "auto":
        ways.insert(0, (False, True))
    peaks = {}
    for way in ways:  # the last one, if none fits: the probe will say
        settings = replace(settings, gradient_checkpointing=way[0], dequantize=way[1])
        planned = footprint(experiment, model_config, settings, vocabulary)
        peaks[way] = gibibytes(planned.peak(tokens))
        if planned.peak(tokens) <= memory:
            break
    of = f"of {gibibytes(memory)} GiB for micro-batches of {tokens:,} tokens"
    why = {
        "checkpointing": f"the plan without it is {peaks.get((False, False)) or peaks[way]} GiB {of}",
        "dequantize": f"the plan with weights expanded is {peaks.get((False, True))} GiB {of}",
    }
    return settings, why, planned
