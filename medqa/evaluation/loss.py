"""Token-exact loss and perplexity of a split.

Sums of token losses over sums of target tokens, over all processes, in float64: never a mean of batch means, so the
result does not depend on batch size, padding or the number of processes.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from medqa.config import Tokenization
from medqa.data.batches import IGNORED, Example, collate, epoch_permutation
from medqa.errors import TrainingStopped, UserError
from medqa.model.loss import token_losses

COLUMNS = ("loss", "tokens", "answer_loss", "answer_tokens")


@dataclass(frozen=True)
class SplitLoss:
    """Mean losses in nats per target token of a split; `loss` over the experiment's targets, the rest over answers.

    `sources` has the answer loss by source. A mean over no tokens is None.
    """

    loss: float
    perplexity: float
    answer_loss: float | None
    answer_perplexity: float | None
    tokens: int
    rows: int
    sources: dict[str, float | None]

    def record(self) -> dict[str, Any]:
        """As in `metrics.jsonl`."""
        return asdict(self)


@dataclass(frozen=True)
class Evaluator:
    """Measures splits with one model and one tokenization."""

    model: torch.nn.Module
    accelerator: Accelerator
    tokenization: Tokenization
    pad_token_id: int
    batch_size: int

    def measure(self, examples: Sequence[Example]) -> SplitLoss:
        """The split's figures, now."""
        return summarize(self.row_losses(examples), examples)

    def row_losses(self, examples: Sequence[Example]) -> np.ndarray:
        """As `row_losses`."""
        return row_losses(self.model, examples, self.accelerator, self.tokenization, self.pad_token_id, self.batch_size)


def fixed_subset(examples: Sequence[Example], rows: int | None, seed: int) -> list[int]:
    """The indices of the rows that stand for the split during training: seeded, in order; all for None."""
    if rows is None or rows >= len(examples):
        return list(range(len(examples)))
    return sorted(epoch_permutation(seed, 0, len(examples))[:rows])


def row_losses(
    model: torch.nn.Module,
    examples: Sequence[Example],
    accelerator: Accelerator,
    tokenization: Tokenization,
    pad_token_id: int,
    batch_size: int,
) -> np.ndarray:
    """Per example: summed loss and count of its target tokens, then of its answer tokens. (examples, 4), float64, nats.

    Every process gets the whole table. The model's mode is left as it was.
    """
    table = torch.zeros(len(examples), len(COLUMNS), dtype=torch.float64)
    by_length = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids), reverse=True)
    batches = [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
    unpadded = tokenization.model_copy(update={"padding": "longest"})
    was_training = model.training
    model.eval()
    with torch.no_grad():
        mine = batches[accelerator.process_index :: accelerator.num_processes]
        while mine:
            batch = mine.pop(0)
            chosen = [examples[i] for i in batch]
            micro_batch = collate(chosen, unpadded, pad_token_id, loss_on="all")
            try:
                losses = token_losses(model, micro_batch, accelerator.device).cpu().double()
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                half = len(batch) // 2  # how rows are batched makes no difference to their losses
                mine[:0] = [batch[:half], batch[half:]]
                continue
            is_token = micro_batch.labels[:, 1:] != IGNORED
            place = torch.arange(1, micro_batch.labels.shape[1])
            is_answer = is_token & (place >= torch.tensor([[e.answer_start] for e in chosen]))
            is_target = is_answer if tokenization.loss_on == "answer" else is_token
            sums = [(losses * is_target).sum(1), is_target.sum(1), (losses * is_answer).sum(1), is_answer.sum(1)]
            table[batch] = torch.stack([column.double() for column in sums], dim=1)
    model.train(was_training)
    if accelerator.num_processes > 1:
        table = accelerator.reduce(table.to(accelerator.device), "sum").cpu()
    return table.numpy()


def summarize(table: np.ndarray, examples: Sequence[Example]) -> SplitLoss:
    """The split's figures from `row_losses` of the same examples.

    Raises:
        TrainingStopped: the loss is not finite.
        UserError: no row has a target token.
    """
    loss_sum, tokens, answer_sum, answer_tokens = table.sum(axis=0)
    if not (math.isfinite(loss_sum) and math.isfinite(answer_sum)):
        bad = [examples[i].row.id for i in np.flatnonzero(~np.isfinite(table).all(axis=1))[:5]]
        raise TrainingStopped(f"the loss of a held-out row is not finite: {', '.join(bad)}")
    by_source = {}
    for source in sorted({example.row.source for example in examples}):
        chosen = table[[example.row.source == source for example in examples]].sum(axis=0)
        by_source[source] = _mean(chosen[2], chosen[3])
    loss, answer_loss = _mean(loss_sum, tokens), _mean(answer_sum, answer_tokens)
    if loss is None:
        raise UserError(
            "no held-out row has a target token: tokenization.max_length cuts off every answer; raise it, "
            "or use --set tokenization.loss_on=all"
        )
    return SplitLoss(
        loss=loss,
        perplexity=perplexity(loss),
        answer_loss=answer_loss,
        answer_perplexity=None if answer_loss is None else perplexity(answer_loss),
        tokens=int(tokens),
        rows=len(examples),
        sources=by_source,
    )


def perplexity(loss: float) -> float:
    """exp(loss), for a loss in nats; capped where a float ends."""
    return math.exp(min(loss, 700.0))


def _mean(total: float, count: float) -> float | None:
    """A mean over `count` tokens, None over none."""
    return float(total / count) if count else None
