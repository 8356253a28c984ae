"""Loss and perplexity of a split, exact per token.

The loss is the sum of token losses over the number of target tokens, over all processes, in float64. It is not a mean
of batch means, so it does not depend on batch size, padding or the number of processes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from medqa.config import Tokenization
from medqa.data.batches import IGNORED, collate, divide, epoch_permutation, pack
from medqa.data.tokens import Example
from medqa.errors import TrainingStopped, UserError, is_out_of_memory
from medqa.model.loss import token_losses
from medqa.model.sharding import is_sharded, put_apart

COLUMNS = ("loss", "tokens", "answer_loss", "answer_tokens")


@dataclass(frozen=True)
class SplitLoss:
    """Mean losses of a split in nats per target token: `loss` over the experiment's targets, the others over answers.

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
        """The values as in `metrics.jsonl`."""
        return asdict(self)


@dataclass(frozen=True)
class Evaluator:
    """Measures splits with one model (a `LossModel`) and one tokenization, with at most `most_tokens` tokens at a time.

    Examples are concatenated without padding if the model supports it (`padding_free`), otherwise padded to the
    longest.
    """

    model: torch.nn.Module
    accelerator: Accelerator
    tokenization: Tokenization
    pad_token_id: int
    most_tokens: int
    padding_free: bool

    def measure(self, examples: Sequence[Example], done: Callable[[int], None] = lambda rows: None) -> SplitLoss:
        """The loss of the split."""
        return summarize(self.row_losses(examples, done), examples)

    def row_losses(
        self,
        examples: Sequence[Example],
        done: Callable[[int], None] = lambda rows: None,
        known: np.ndarray | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> np.ndarray:
        """By example: summed loss and number of its target tokens, then of its answer tokens; (examples, 4), float64.

        In nats. Every process gets the entire table. The model's train or eval mode is restored.

        Args:
            done: is called after each batch with the number of rows that this process has measured since the last call.
            known: the rows of the table that this process has measured earlier, NaN elsewhere. Batches that it has are
                not measured again, and it gets those that are, except for the rows of a batch that was halved: the last
                digits depend on what a row is batched with. Not with sharded weights.
            stop: is called before each batch; if it is true, the rows of this process's other batches are NaN.
        """
        accelerator = self.accelerator
        table = torch.zeros(len(examples), len(COLUMNS), dtype=torch.float64)
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad():
            batches = self.batches(examples)
            mine = batches[accelerator.process_index :: accelerator.num_processes]
            sharded = is_sharded(self.model)
            idle = sharded and len(batches) > len(mine) * accelerator.num_processes
            left = []  # batches to measure, and whether they are whole
            for batch in mine:
                if known is not None and np.isfinite(known[batch]).all():
                    table[batch] = torch.from_numpy(known[batch])
                else:
                    left.append((batch, True))
            while left and not stop():
                batch, whole = left.pop(0)
                try:
                    table[batch] = self._sums([examples[i] for i in batch])
                except (RuntimeError, MemoryError) as error:
                    # If sharded, the other processes do not expect another batch.
                    if not is_out_of_memory(error) or len(batch) == 1 or sharded:
                        raise
                    half = len(batch) // 2  # batching has no influence on the losses, except for the last digits
                    left[:0] = [(batch[:half], False), (batch[half:], False)]
                else:
                    if known is not None and whole:
                        known[batch] = table[batch].numpy()
                    done(len(batch))
            for batch, _ in left:
                table[batch] = torch.nan
            if idle:  # others have one more batch, and need this process's shards
                self._sums([examples[batches[-1][0]]])
            if sharded:
                put_apart(self.model)
        self.model.train(was_training)
        if accelerator.num_processes > 1:
            table = accelerator.reduce(table.to(accelerator.device), "sum").cpu()
        return table.numpy()

    def batches(self, examples: Sequence[Example]) -> list[list[int]]:
        """Indices of the examples of each batch, the longest examples first."""
        by_length = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids), reverse=True)
        lengths = [len(examples[i].input_ids) for i in by_length]
        cuts = [0]
        if self.padding_free and lengths:
            cuts = divide(lengths, self.most_tokens)
        while cuts[-1] < len(lengths):
            cuts.append(min(cuts[-1] + max(1, self.most_tokens // lengths[cuts[-1]]), len(lengths)))
        return [by_length[start:end] for start, end in pairwise(cuts)]

    def _sums(self, chosen: Sequence[Example]) -> torch.Tensor:
        """The rows of the table for these examples."""
        if self.padding_free:
            micro_batch = pack(chosen, "all")
        else:
            to_longest = self.tokenization.model_copy(update={"padding": "longest"})
            micro_batch = collate(chosen, to_longest, self.pad_token_id, loss_on="all")
        losses = token_losses(self.model, micro_batch, self.accelerator.device).cpu().double()
        row, position = (index[:, 1:] for index in micro_batch.token_indices())
        is_token = micro_batch.labels[:, 1:] != IGNORED
        is_answer = is_token & (position >= torch.tensor([example.answer_start for example in chosen])[row])
        is_target = is_answer if self.tokenization.loss_on == "answer" else is_token
        sums = [losses * is_target, is_target, losses * is_answer, is_answer]
        lines = torch.zeros(len(chosen), len(COLUMNS), dtype=torch.float64)
        return lines.index_add_(0, row.flatten(), torch.stack([each.double().flatten() for each in sums], dim=1))


def fixed_subset(examples: Sequence[Any], rows: int | None, seed: int) -> list[int]:
    """Sorted indices of the seeded subset of rows that is used during training; all rows if `rows` is None."""
    if rows is None or rows >= len(examples):
        return list(range(len(examples)))
    return sorted(epoch_permutation(seed, 0, len(examples))[:rows])


def summarize(table: np.ndarray, examples: Sequence[Example]) -> SplitLoss:
    """The loss of a split from `Evaluator.row_losses` of the same examples.

    Raises:
        TrainingStopped: the loss is not finite.
        UserError: no row has a target token.
    """
    loss_sum, tokens, answer_sum, answer_tokens = table.sum(axis=0)
    if not (math.isfinite(loss_sum) and math.isfinite(answer_sum)):
        bad = [examples[i].row.id for i in np.flatnonzero(~np.isfinite(table).all(axis=1))[:5]]
        raise TrainingStopped(f"the loss of a held-out row is not finite: {', '.join(bad)}")
    indices: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        indices.setdefault(example.row.source, []).append(index)
    sums = {source: table[chosen].sum(axis=0) for source, chosen in sorted(indices.items())}
    by_source = {source: _mean(answer, tokens_of) for source, (_, _, answer, tokens_of) in sums.items()}
    loss, answer_loss = _mean(loss_sum, tokens), _mean(answer_sum, answer_tokens)
    if loss is None:
        raise UserError(
            "no held-out row has a target token: tokenization.max_length cuts off every answer; set a larger "
            "value, or --set tokenization.loss_on=all"
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
    """exp(loss), for a loss in nats; at most exp(700), so that it is finite."""
    return math.exp(min(loss, 700.0))


def _mean(total: float, count: float) -> float | None:
    """The mean over `count` tokens; None if there are none."""
    return float(total / count) if count else None
