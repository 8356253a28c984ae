"""What a run has to do: its tokens and padding counted, its floating-point operations, the bytes that it saves.

All of it follows from the experiment, the examples' lengths and the model's shapes; no weight is read.
"""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from transformers import AutoModelForCausalLM

from medqa.config import Experiment
from medqa.data.batches import Stream, epoch_permutation
from medqa.length import planned_updates
from medqa.model.base import add_lora
from medqa.training.optimizer import build_optimizer
from medqa.training.probe import most_in_an_update
from medqa.training.scheduler import build_scheduler


@dataclass(frozen=True)
class Shapes:
    """Of a model with its adapters: weights that take part in matrix products, in the layers and in the head; all.

    `adapter` has what a checkpoint keeps, by PEFT's names; `trained` is in the optimizer's order.
    """

    layers: int
    head: int
    total: int
    adapter: dict[str, torch.Size]
    trained: list[torch.Size]

    @property
    def trainable(self) -> int:
        """Weights that train."""
        return sum(shape.numel() for shape in self.trained)


def shapes(experiment: Experiment, model_config: Any) -> Shapes:
    """The shapes of this experiment's model; `model_config` is as `check_model` returns it."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(model_config)
        head = base.get_output_embeddings()
        products = sum(m.weight.numel() for m in base.modules() if isinstance(m, torch.nn.Linear) and m is not head)
        total = sum(parameter.numel() for parameter in base.parameters())
        base.requires_grad_(False)
        adapted = add_lora(base, experiment.lora.model_copy(update={"init_from": None}), 0)
    trained = {name: p.shape for name, p in adapted.named_parameters() if p.requires_grad}
    saved = {name.replace(".default.", "."): shape for name, shape in trained.items()}
    return Shapes(products, head.weight.numel(), total, saved, list(trained.values()))


def count(experiment: Experiment, stream: Stream, padding_free: bool) -> dict[str, Any]:
    """What a run goes through: counted, not estimated, since the order of the examples is known."""
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
    places = int((longest * batches.shape[1]).sum())
    tokens = int(lengths.sum())
    return {
        "updates": updates,
        "examples": len(order),
        "epochs": stream.epoch(updates),
        "training_rows": len(stream.examples),
        "tokens": tokens,
        "target_tokens": targets,
        "places": tokens if padding_free else places,
        "padding_share": 0.0 if padding_free else 1 - tokens / places,
        "padding_share_padded": 1 - tokens / places,
        "largest_micro_batch": int(longest.max() * batches.shape[1]),
        "longest_example": int(lengths.max()),
        "largest_update": most_in_an_update(stream.examples, rows),
        "pairs": int((lengths**2).sum()) if padding_free else int((longest**2 * batches.shape[1]).sum()),
    }


def _order(stream: Stream, count: int) -> np.ndarray:
    """Which example stands at each of the first positions of the stream."""
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
    """Floating-point operations of the whole run.

    A weight takes 2 a place in forward and 2 for the gradient of its input, and 2 more for its own if it trains
    (https://arxiv.org/abs/2001.08361, section 2.1); attention takes 4 a pair of places and unit of width in forward,
    half of it where causal attention leaves the later ones out, and twice that in backward. Checkpointing repeats the
    layers' forward. With padding all places are computed, and the head at all of them; without, at the targets.
    """
    heads = model_config.num_attention_heads
    width = heads * (getattr(model_config, "head_dim", None) or model_config.hidden_size // heads)
    attention = model_config.num_hidden_layers * width * run["pairs"] * (2 if padding_free else 4)
    forward = 2 * run["places"] * (found.layers + found.trainable) + attention
    backward = 2 * run["places"] * (found.layers + 2 * found.trainable) + 2 * attention
    head = 4 * found.head * (run["target_tokens"] if padding_free else run["places"])
    return forward * (2 if checkpointing else 1) + backward + head


def checkpoint_bytes(experiment: Experiment, found: Shapes, scaler: bool) -> dict[str, int]:
    """Bytes of a checkpoint's two large files; what else is in one takes some 10 kB.

    They are written, to memory and of zeros, as `training.checkpoint` writes them.

    Args:
        scaler: whether there is a gradient scaler (fp16).
    """
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in found.trained]
    names = zip(found.adapter, parameters, strict=True)
    adapter = len(save({name: p.detach() for name, p in names}, metadata={"format": "pt"}))
    optimizer: Any = build_optimizer(torch.nn.ParameterList(parameters), experiment.optimizer)
    scheduler = build_scheduler(optimizer, experiment.scheduler, experiment.training.max_steps or 1)
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            parameter.grad = torch.zeros_like(parameter)
            if experiment.optimizer.name != "adamw_torch":
                optimizer.init_state(group, parameter, group_index, index)
    if experiment.optimizer.name == "adamw_torch":
        optimizer.step()
    content = io.BytesIO()
    state = torch.amp.GradScaler("cpu").state_dict() if scaler else None
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "scaler": state}, content)
    return {"adapter_model.safetensors": adapter, "training_state.pt": content.tell()}
