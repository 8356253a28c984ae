"""Evaluation beside training's forward pass, per token: `python -m benchmarks.evaluation_speed`.

The same rows through the same model, by `Evaluator.row_losses` and by what an update does before its backward pass, in
turn, in CPU seconds of one thread. Evaluation keeps the loss of every token, training that of the targets; both are
counted in the tokens of the rows, padding apart.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.cases import Case
from benchmarks.ours import PAD, build
from benchmarks.standin import MEDQUAD, make_model
from medqa.evaluation.loss import Evaluator
from medqa.model.loss import summed_loss
from medqa.model.memory import enough_tokens


def measure(recipe: str, arm: str, shape: str, rows: int, rounds: int) -> list[float]:
    """Tokens a CPU second of evaluation over those of training's forward, one ratio a round."""
    with tempfile.TemporaryDirectory() as scratch:
        base = make_model(Path(scratch, "base"), shape, "float32")
        case = Case(recipe, recipe, shape, "float32", rows, 1, (arm,), "cpu", "none")
        experiment = case.experiment(base)
        saved = case.make_rows(experiment, MEDQUAD if MEDQUAD.exists() else None).save(Path(scratch, "rows.npz"))
        parts = build(case.jobs(experiment, base, saved, rounds, Path(scratch))[arm])
    examples = [parts.stream.at(position) for position in range(rows)]
    evaluator = Evaluator(
        parts.model,
        parts.accelerator,
        experiment.tokenization,
        PAD,
        enough_tokens(experiment, "cpu"),
        parts.settings.evaluation_padding_free,
    )

    def forward() -> None:
        parts.model.train()
        for micro_batch in parts.batches.next_update():
            summed_loss(parts.model, micro_batch, parts.accelerator.device)

    seconds(forward), seconds(lambda: evaluator.row_losses(examples))  # warm
    return [seconds(forward) / seconds(lambda: evaluator.row_losses(examples)) for _ in range(rounds)]


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this process."""
    began = time.process_time()
    work()
    return time.process_time() - began


def main() -> None:
    """All three recipes, with padding and without."""
    parser = argparse.ArgumentParser(description="evaluation's tokens a second over those of training's forward")
    parser.add_argument("--shape", default="p")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for recipe in ("exp_001", "exp_002", "exp_003"):
        for arm in ("plain", "padding_free"):
            ratios = measure(recipe, arm, options.shape, options.rows, options.rounds)
            print(
                f"{recipe} {arm}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})", flush=True
            )


if __name__ == "__main__":
    main()
