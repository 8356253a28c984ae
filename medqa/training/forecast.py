"""What a run computes, and how long that takes: its tokens, floating-point operations, and seconds by part.

Everything is counted from the experiment, the lengths of the examples and the shapes of the model. On a CPU the time
follows from the speed of matrix products there, which is measured in about a second, and from the share of that speed
that the parts of a run reach, which was measured once (docs/training.md). For a GPU all of it is computed.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from medqa.config import Experiment, planned_updates
from medqa.data.batches import Stream, epoch_permutation
from medqa.data.tokens import Example
from medqa.evaluation.answers import SAMPLE_TOKENS
from medqa.evaluation.loss import fixed_subset
from medqa.model.base import add_lora
from medqa.model.memory import enough_tokens
from medqa.model.settings import Settings
from medqa.training.wandb import sampled_rows, wandb_wanted

# ----------------------------------------------------------------------------------------------------
# The work of a run: its tokens and padding, and its floating-point operations.


@dataclass(frozen=True)
class Shapes:
    """The numbers of weights of a model with adapters: those in matrix products of the layers and of the head, and all.

    `adapter` has the tensors that a checkpoint stores, by PEFT's names; `trained` has the optimizer's order; `products`
    counts the frozen matrices by shape.
    """

    layers: int
    head: int
    total: int
    adapter: dict[str, torch.Size]
    trained: list[torch.Size]
    products: Counter[tuple[int, ...]]

    @property
    def trainable(self) -> int:
        """The number of trainable parameters."""
        return sum(shape.numel() for shape in self.trained)


def shapes(experiment: Experiment, model_config: Any) -> Shapes:
    """The shapes of this experiment's model; `model_config` is the result of `check_model`."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(model_config)
        head = base.get_output_embeddings()
        products = Counter(tuple(m.weight.shape) for m in base.modules() if isinstance(m, torch.nn.Linear))
        total = sum(parameter.numel() for parameter in base.parameters())
        base.requires_grad_(False)
        adapted = add_lora(base, experiment.lora.model_copy(update={"init_from": None}), 0)
    trained = {name: p.shape for name, p in adapted.named_parameters() if p.requires_grad}
    saved = {name.replace(".default.", "."): shape for name, shape in trained.items()}
    layers = sum(count * shape[0] * shape[1] for shape, count in products.items()) - head.weight.numel()
    return Shapes(layers, head.weight.numel(), total, saved, list(trained.values()), products)


def count(experiment: Experiment, stream: Stream, padding_free: bool) -> dict[str, Any]:
    """The tokens and padding of a run: counted, not estimated, because the order of the examples is known."""
    training, tokenization = experiment.training, experiment.tokenization
    rows = training.global_batch_size
    updates = planned_updates(experiment, len(stream.examples))
    order = _order(stream, updates * rows)
    lengths = np.array([len(example.input_ids) for example in stream.examples])[order]
    first = [max(1, e.answer_start) if tokenization.loss_on == "answer" else 1 for e in stream.examples]
    targets = int(np.maximum(lengths - np.array(first)[order], 0).sum())
    batches = lengths.reshape(-1, training.per_device_batch_size)
    longest = np.full(len(batches), tokenization.max_length)
    if tokenization.padding == "longest":
        longest = batches.max(axis=1)
    positions = int((longest * batches.shape[1]).sum())
    tokens = int(lengths.sum())
    return {
        "updates": updates,
        "examples": len(order),
        "epochs": stream.epoch(updates),
        "training_rows": len(stream.examples),
        "tokens": tokens,
        "target_tokens": targets,
        "places": tokens if padding_free else positions,
        "padding_share": 0.0 if padding_free else 1 - tokens / positions,
        "padding_share_padded": 1 - tokens / positions,
        "micro_batches": len(batches),
        "largest_micro_batch": int(longest.max() * batches.shape[1]),
        "longest_example": int(lengths.max()),
        "pairs": int((lengths**2).sum()) if padding_free else int((longest**2 * batches.shape[1]).sum()),
    }


def _order(stream: Stream, count: int) -> np.ndarray:
    """The index of the example at each of the first positions of the stream."""
    size = len(stream.examples)
    epochs = [epoch_permutation(stream.seed, epoch, size) for epoch in range(-(-count // size))]
    return np.concatenate(epochs)[:count]


def operations(
    experiment: Experiment,
    model_config: Any,
    run: dict[str, Any],
    found: Shapes,
    padding_free: bool,
    checkpointing: bool,
) -> int:
    """The floating-point operations of the run.

    For each token, a weight takes 2 in forward, 2 for the gradient of its input, and 2 more for its own gradient if it
    is trained (https://arxiv.org/abs/2001.08361, section 2.1). Attention takes 4 for each pair of tokens and unit of
    width in forward, half of it if causal attention skips later tokens, and twice that in backward. Checkpointing
    repeats the forward of the layers. With padding every token is computed, also in the head; without, the head
    computes targets.
    """
    attention = _attention(model_config, run["pairs"], padding_free)
    forward = 2 * run["places"] * (found.layers + found.trainable) + attention
    backward = 2 * run["places"] * (found.layers + 2 * found.trainable) + 2 * attention
    head = 4 * found.head * (run["target_tokens"] if padding_free else run["places"])
    return forward * (2 if checkpointing else 1) + backward + head


def _attention(model_config: Any, pairs: int, padding_free: bool) -> int:
    """The operations of attention in a forward pass, over so many pairs of tokens."""
    heads = model_config.num_attention_heads
    width = heads * (getattr(model_config, "head_dim", None) or model_config.hidden_size // heads)
    return model_config.num_hidden_layers * width * pairs * (2 if padding_free else 4)


def evaluation_operations(examples: Sequence[Example], model_config: Any, found: Shapes, padding_free: bool) -> int:
    """The floating-point operations of an evaluation of these rows: a forward pass, and the head at every token.

    Rows of similar length are batched, so padding is not counted.
    """
    lengths = np.array([len(example.input_ids) for example in examples], dtype=np.int64)
    tokens, pairs = int(lengths.sum()), int((lengths**2).sum())
    return 2 * tokens * (found.layers + found.trainable + found.head) + _attention(model_config, pairs, padding_free)


def evaluated(
    experiment: Experiment, examples: Mapping[str, Sequence[Example]]
) -> dict[str, tuple[int, list[Example]]]:
    """The evaluations of a run: how often each is made, and its rows, as `before_after.HeldOut` makes them."""
    evaluation, seed = experiment.evaluation, experiment.training.seed
    validation, test = examples["validation"], examples["test"]
    fixed, full = (fixed_subset(validation, rows, seed) for rows in (evaluation.rows, evaluation.full_rows))
    both = [validation[i] for i in sorted({*fixed, *full})]
    updates = planned_updates(experiment, len(examples["train"]))
    closing = both + [test[i] for i in fixed_subset(test, evaluation.full_rows, seed)]
    if experiment.training.keep == "best":
        closing += [validation[i] for i in full]
    return {
        "baseline": (1, both),
        "evaluations": (updates // evaluation.steps, [validation[i] for i in fixed]),
        "final evaluation": (1, closing),
    }


# ----------------------------------------------------------------------------------------------------
# Time.

TIMED_S = 0.8  # seconds for which matrix products are timed
TIMED_TOKENS, TIMED_ROWS = 512, 8192  # the largest input of a product that is timed, and its largest output
READ_BYTES = 2**27  # of weights, more than a cache holds


@dataclass(frozen=True)
class Rates:
    """How fast a machine computes.

    Attributes:
        training: floating-point operations a second in updates.
        evaluation: those in evaluations.
        reading: bytes of weights a second that a product with few rows reads.
        layer_s: seconds that each decoder layer takes for a generated token besides reading its weights.
        products: floating-point operations a second in matrix products; None if dequantizing weights is not counted.
        source: where they are from, in words.
    """

    training: float
    evaluation: float
    reading: float
    layer_s: float
    products: float | None
    source: str


# The share of the speed of matrix products that updates and evaluations reach on a CPU, by the type of the weights and
# whether training is padding-free; docs/training.md has the measurements.
SHARES = {
    ("float32", True): (0.68, 0.75),
    ("float32", False): (0.63, 0.73),
    ("bfloat16", True): (0.41, 0.41),
    ("bfloat16", False): (0.41, 0.41),
}
LAYER_S = 0.0009
DEQUANTIZED = 150  # operations of matrix products that take as long as dequantizing one 4-bit weight in an update
GENERATING = 60  # likewise, for a generated token


def cpu_rates(found: Shapes, settings: Settings) -> Rates:
    """The rates of this CPU: matrix products in the type of the weights are timed, in the shapes of the model."""
    products = product_rate(found.products, settings.dtype)
    training, evaluation = SHARES[settings.dtype_name, settings.padding_free]
    source = (
        f"{training:.0%} (evaluations {evaluation:.0%}) of the {products / 1e9:,.0f} GFLOP/s that matrix products in "
        f"{settings.dtype_name} reach here"
    )
    return Rates(training * products, evaluation * products, _reading_rate(settings.dtype), LAYER_S, products, source)


@torch.no_grad()
def product_rate(products: Mapping[tuple[int, ...], int], dtype: torch.dtype) -> float:
    """Floating-point operations a second in the frozen matrix products of a model, on this CPU, at rest.

    The fastest of several repetitions counts: the other ones were disturbed by other processes.
    """
    shapes = {(min(rows, TIMED_ROWS), columns): 0.0 for rows, columns in products}
    pairs = {s: (torch.ones(TIMED_TOKENS, s[1], dtype=dtype), torch.ones(s, dtype=dtype)) for s in shapes}
    began, rounds = time.perf_counter(), 0
    while rounds < 2 or time.perf_counter() - began < TIMED_S:
        for shape, (x, weight) in pairs.items():
            start = time.perf_counter()
            F.linear(x, weight)
            took = time.perf_counter() - start
            shapes[shape] = took if rounds < 2 else min(shapes[shape], took)
        rounds += 1
    spent = operations = 0.0
    for (rows, columns), count in products.items():
        timed = (min(rows, TIMED_ROWS), columns)
        operations += 2 * count * TIMED_TOKENS * rows * columns
        spent += count * shapes[timed] * rows / timed[0]
    return operations / spent


@torch.no_grad()
def _reading_rate(dtype: torch.dtype) -> float:
    """Bytes of weights a second that a product with few rows reads on this CPU."""
    weight = torch.ones(READ_BYTES // dtype.itemsize // 1024, 1024, dtype=dtype)
    x, best = torch.ones(4, 1024, dtype=dtype), float("inf")
    for _ in range(4):
        start = time.perf_counter()
        F.linear(x, weight)
        best = min(best, time.perf_counter() - start)
    return READ_BYTES / best


def seconds_by_part(
    experiment: Experiment,
    model_config: Any,
    examples: Mapping[str, Sequence[Example]],
    settings: Settings,
    run: dict[str, Any],
    found: Shapes,
    rates: Rates,
) -> dict[str, float]:
    """The seconds of the parts of a run after its start, in order; parts that it does not have are left out.

    Args:
        run: the result of `count`.
    """
    update_operations = operations(
        experiment, model_config, run, found, settings.padding_free, settings.gradient_checkpointing
    )
    updates_s = update_operations / rates.training
    evaluations, dequantizing = {}, 0.0  # seconds in which 4-bit weights are dequantized once
    if rates.products and settings.quantization == "4bit" and not settings.dequantize:
        dequantizing = DEQUANTIZED * found.layers / rates.products
        passes = 3 if settings.gradient_checkpointing else 2
        updates_s += passes * dequantizing * run["micro_batches"]
    for name, (times, rows) in evaluated(experiment, examples).items():
        needed = evaluation_operations(rows, model_config, found, settings.evaluation_padding_free)
        tokens = sum(len(example.input_ids) for example in rows)
        batches = tokens / enough_tokens(experiment, settings.device_type)
        evaluations[name] = times * (needed / rates.evaluation + batches * dequantizing)
    parts = {"baseline": evaluations["baseline"], "updates": updates_s}
    parts |= {name: evaluations[name] for name in ("evaluations", "final evaluation")}
    if wandb_wanted(experiment.tracking) and sampled_rows(examples["validation"], experiment):
        read = settings.dtype.itemsize * (found.layers + found.head) / rates.reading
        token = read + rates.layer_s * model_config.num_hidden_layers + dequantizing * GENERATING / DEQUANTIZED
        parts["samples"] = 2 * SAMPLE_TOKENS * token  # of the baseline and of the fine-tuned model, all rows at once
    return {name: seconds for name, seconds in parts.items() if seconds}


def duration(seconds: float) -> str:
    """A time as text: seconds below two minutes, then minutes, then hours with one decimal."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def shown_seconds(parts: Mapping[str, float]) -> str:
    """The seconds of a run as text: in all, and by part."""
    each = ", ".join(f"{name} {duration(seconds) if seconds >= 1 else '< 1 s'}" for name, seconds in parts.items())
    return f"about {duration(max(1.0, sum(parts.values())))} ({each})"
