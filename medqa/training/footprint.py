"""How much memory training takes, worked out before a weight is loaded.

The run's own code is run: forward, loss and backward of one micro-batch, on a model of one and of two layers whose
tensors have shapes and no contents, while every storage that comes and goes is counted. Two layers tell what each
further one adds; a few sizes of micro-batch tell what each further token adds. A CPU's kernels are asked also for a
GPU, where no figure is measured. Counted are tensors: not a GPU's context and kernels (about 0.5 GiB), not the memory
of Python and torch (about 0.5 GiB), and not what an allocator loses to fragments. A CPU's allocator loses much:
`Footprint.resident` and `memory.return_freed_memory`.
"""

import bisect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from medqa.config import Experiment, Optimizer
from medqa.data.batches import MicroBatch
from medqa.model.execution import Execution
from medqa.model.head import CHUNK_BYTES
from medqa.model.loss import LossModel, summed_loss
from medqa.model.precision import Precision
from medqa.training.shape_model import shape_model, tensors_of
from medqa.training.storages import Storages

DEPTH = 2  # layers of the larger model that is run
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
    precision: Precision,
    execution: Execution,
    quantization: str,
    vocabulary: int | None = None,
) -> Footprint:
    """The memory of this experiment's training. No weight is read, and no device is used.

    Args:
        model_config: as `check_model` returns it.
        quantization: the one in effect.
        vocabulary: the tokenizer's size, where it may be larger than the model's.
    """
    layers = model_config.num_hidden_layers
    depth = min(DEPTH, layers)
    arguments = (experiment, model_config, precision, execution, quantization, vocabulary)
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
    if execution.shards > 1:
        fixed["base"] = _sharded(fixed["base"], _frozen_bytes(_layers(deep)[0]), layers, execution.shards)
    batches = _micro_batches(experiment, execution, max(model_config.vocab_size, vocabulary or 0))
    samples = [_run(deep, batch, precision) for batch in batches[:2]]
    # What a layer takes while it is at work comes on top of what all layers keep, so both grow alike with the layers.
    kept = [_run(shallow, batch, precision).activations for batch in batches[:2]] if shallow else [0, 0]
    grown = [extend(sample.activations, one) - sample.activations for sample, one in zip(samples, kept, strict=True)]
    heads = [_run(_without_layers(deep), batch, precision) for batch in batches[2:]]
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


def _micro_batches(experiment: Experiment, execution: Execution, vocabulary: int) -> list[MicroBatch]:
    """Micro-batches of rising size, in which everything is a target.

    The first two are for the layers. Without padding the head works in chunks, so its memory grows otherwise from two
    chunks on, where one chunk's logits still stand when the next one's are made.
    """
    if not execution.padding_free:
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


def _run(model: LossModel, micro_batch: MicroBatch, precision: Precision) -> _Sample:
    """What a micro-batch takes."""
    decoder = model.model.get_base_model().get_decoder()
    device, dtype = torch.device("cpu"), precision.dtype
    mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision.mixed_precision)
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
