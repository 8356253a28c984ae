"""The experiments against each other: trained on equally many examples, compared row by row on the same held-out rows.

Each arm is an experiment with what `--arm` sets. All start from the same base and see the same stream of rows; updates
are computed without padding, which changes none of them. The base has 4-bit weights in every arm, because exp_004's
`auto` could give it another base than the others; `--set` and `--arm` can say otherwise. Answer perplexity is measured
twice for all arms, as the first arm reads the rows and as the last one does, so that none gains by reading them in its
own way (length, named options).

    python -m benchmarks.recipes --model DIR --medquad medquad.csv --afrimedqa afrimedqa.csv --examples 6400
    python -m benchmarks.recipes --tiny
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy import stats

from harness.parts import build, run_train
from medqa.config import Experiment
from medqa.config_file import load_experiment
from medqa.data.sources import load_sources
from medqa.data.splits import split_sources
from medqa.data.tokens import tokenize
from medqa.evaluation.loss import fixed_subset, perplexity
from medqa.training.state import Progress

ARMS = ("exp_001", "exp_002", "exp_003", "exp_004")


def main(argv: Sequence[str] | None = None) -> int:
    """Train and measure every arm, print and write the comparison."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipes", description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="on the embedded model and data")
    parser.add_argument("--model")
    parser.add_argument("--medquad")
    parser.add_argument("--afrimedqa")
    parser.add_argument("--examples", type=int, default=1280, help="that each arm is trained on")
    parser.add_argument("--rows", type=int, help="held-out rows to measure; default all")
    parser.add_argument("--arm", nargs="+", action="append", metavar="EXP [section.key=value ...]", help="default: all")
    parser.add_argument("--set", nargs="+", default=[], metavar="section.key=value", help="for every arm")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    arms = {" ".join(words): arm(words, options) for words in options.arm or [[name] for name in ARMS]}
    first, *_, last = arms.values()
    readings = {"as the first arm": first, "as the last arm": last}
    measured = {}
    for name, experiment in arms.items():
        started = time.perf_counter()
        measured[name] = train_and_measure(experiment, readings, options.rows)
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    report = compare(measured)
    show(report)
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def arm(words: Sequence[str], options: argparse.Namespace) -> Experiment:
    """An experiment with its own settings over those for all, and updates for as many examples."""
    locations = {"model.base": options.model, "data.medquad": options.medquad, "data.afrimedqa": options.afrimedqa}
    quiet = ["tracking.wandb=disabled", "evaluation.steps=1000000", "training.save_steps=1000000"]
    quiet += ["training.log_steps=1000000", "training.padding_free=true", "model.quantization=4bit"]
    quiet += [*options.set, *words[1:]]  # the last one of a key counts
    found = load_experiment(
        words[0], tiny=options.tiny, locations=locations, sets=["training.max_steps=1000000", *quiet]
    )
    steps = options.examples // found.training.global_batch_size
    warmup = min(found.scheduler.warmup_steps, steps // 10)
    sets = [f"training.max_steps={steps}", f"scheduler.warmup_steps={warmup}", *quiet]
    return load_experiment(words[0], tiny=options.tiny, locations=locations, sets=sets)


def train_and_measure(
    experiment: Experiment, readings: dict[str, Experiment], rows: int | None
) -> dict[str, dict[str, np.ndarray | list[str]]]:
    """For each reading: row ids, and per row the summed loss and the number of answer tokens."""
    parts = build(experiment)
    with tempfile.TemporaryDirectory() as scratch:
        run_train(parts, Progress(), Path(scratch))
    found = {}
    for name, reading in readings.items():
        data = reading.data
        held_out = split_sources(load_sources(data), data).validation
        trained_on = {example.row.id for example in parts.examples["train"]}
        if leaked := [row.id for row in held_out if row.id in trained_on]:
            raise RuntimeError(f"{len(leaked)} held-out rows were trained on: the arms split the data differently")
        examples = tokenize(held_out, parts.tokenizer, reading.tokenization)
        examples = [examples[i] for i in fixed_subset(examples, rows, 0)]
        table = parts.evaluator(4096).row_losses(examples)
        found[name] = {"ids": [example.row.id for example in examples], "loss": table[:, 2], "tokens": table[:, 3]}
    return found


def compare(measured: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Answer perplexity of each arm, and the last arm against each: ratio with a 95 % interval, and a paired test.

    The interval is a bootstrap over rows (BCa); the test is Wilcoxon's signed-rank test over the rows' mean losses.
    """
    last = list(measured)[-1]
    report: dict[str, Any] = {"last": last, "readings": {}}
    for reading, ours in measured[last].items():
        lines = []
        for name, found in measured.items():
            theirs = found[reading]
            if theirs["ids"] != ours["ids"]:
                raise RuntimeError("the arms were measured on different rows")
            total, tokens = theirs["loss"].sum(), theirs["tokens"]
            line = {"arm": name, "answer_perplexity": perplexity(total / tokens.sum()), "rows": len(tokens)}
            if name != last:
                difference = ours["loss"] - theirs["loss"]
                interval = stats.bootstrap(
                    (difference, tokens), _ratio, paired=True, vectorized=True, n_resamples=2000, rng=0
                ).confidence_interval
                has_answer = tokens > 0
                means = difference[has_answer] / tokens[has_answer]
                line |= {
                    "ratio": float(_ratio(difference, tokens)),
                    "interval": [float(interval.low), float(interval.high)],
                    "rows_better": float((means < 0).mean()),
                    "wilcoxon_p": float(stats.wilcoxon(means).pvalue),
                }
            lines.append(line)
        report["readings"][reading] = lines
    return report


def _ratio(difference: np.ndarray, tokens: np.ndarray, axis: int = -1) -> np.ndarray:
    """Of two answer perplexities: exp of the difference of two token-weighted mean losses."""
    return np.exp(difference.sum(axis=axis) / tokens.sum(axis=axis))


def show(report: dict[str, Any]) -> None:
    """One table a reading."""
    for reading, lines in report["readings"].items():
        table = Table(
            "arm", "answer perplexity", f"{report['last']} against it", "95 %", "rows better", "p", title=reading
        )
        for line in lines:
            cells = [line["arm"], f"{line['answer_perplexity']:.3f}"]
            if "ratio" in line:
                low, high = line["interval"]
                cells += [f"x{line['ratio']:.3f}", f"{low:.3f} to {high:.3f}"]
                cells += [f"{100 * line['rows_better']:.0f} %", f"{line['wilcoxon_p']:.1e}"]
            table.add_row(*cells)
        Console(width=160).print(table)


if __name__ == "__main__":
    raise SystemExit(main())
