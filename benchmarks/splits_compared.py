"""The three ways to split the same data: what held-out rows share with training, and what a run on each measures.

    python -m benchmarks.splits_compared --model DIR --medquad medquad.csv --afrimedqa afrimedqa.csv --updates 100
    python -m benchmarks.splits_compared --tiny

One run a split, the same experiment, updates and seed. Test rows differ from split to split, and some are harder than
others: what compares is the ratio of tuned to untuned answer perplexity, on the same rows. `--write` puts the table
into `benchmarks/RESULTS.md`.
"""

import argparse
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.parts import build, run_train
from medqa.config import Experiment
from medqa.config_file import load_experiment
from medqa.data.sources import Source, load_sources
from medqa.data.splits import NGRAM, Splits, overlap_report, shared_with_training, split_sources
from medqa.data.tokens import tokenize
from medqa.evaluation.loss import fixed_subset
from medqa.evaluation.statistics import Figure, mean_figure, perplexity_figure
from medqa.options import add_data_option, own_sources
from medqa.training.state import Progress

RESULTS = Path(__file__).with_name("RESULTS.md")
BEGIN, END = "<!-- splits_compared: begin -->", "<!-- splits_compared: end -->"
METHODS = ("random", "grouped", "topic")
SHARED = ("question", "answer", "question_or_answer", "topic", f"{NGRAM}_grams")
TOKENS = 4096  # of a micro-batch when measuring


def main(argv: Sequence[str] | None = None) -> int:
    """Split, train and measure three times; print the table, and write it if asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.splits_compared", description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="on the embedded model and data")
    parser.add_argument("--model")
    parser.add_argument("--medquad")
    parser.add_argument("--afrimedqa")
    add_data_option(parser, "data of your own, too; repeatable")
    parser.add_argument("--exp", default="exp_004", help="default: exp_004")
    parser.add_argument("--updates", type=int, default=100, help="of each run (default 100)")
    parser.add_argument("--rows", type=int, help="test rows to measure; default all")
    parser.add_argument("--set", nargs="+", default=[], metavar="section.key=value")
    parser.add_argument("--write", action="store_true", help=f"put the table into {RESULTS.name}")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = {}
    sources: list[Source] = []
    for method in METHODS:
        started = time.perf_counter()
        experiment = arm(method, options)
        sources = sources or load_sources(experiment.data)
        splits = split_sources(sources, experiment.data)
        found[method] = measured(experiment, splits, options.rows)
        print(f"{method}: {time.perf_counter() - started:.0f} s", flush=True)
    text = table(found)
    print(text)
    if options.write:
        written = RESULTS.read_text(encoding="utf-8")
        pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
        if not pattern.search(written):
            parser.error(f"{RESULTS} has no place for the table: {BEGIN} and {END}")
        RESULTS.write_text(pattern.sub(lambda _: f"{BEGIN}\n{text}\n{END}", written), encoding="utf-8")
    return 0


def arm(method: str, options: argparse.Namespace) -> Experiment:
    """The experiment with this split and so many updates."""
    locations = {"model.base": options.model, "data.medquad": options.medquad, "data.afrimedqa": options.afrimedqa}
    locations["data.files"] = own_sources(options)
    quiet = ["tracking.wandb=disabled", "evaluation.steps=1000000", "training.save_steps=1000000"]
    quiet += [f"training.log_steps={options.updates}", "training.padding_free=true", f"data.split={method}"]
    warmup = f"scheduler.warmup_steps={min(50, options.updates // 10)}"
    sets = [f"training.max_steps={options.updates}", warmup, *quiet, *options.set]
    return load_experiment(options.exp, tiny=options.tiny, locations=locations, sets=sets)


def measured(experiment: Experiment, splits: Splits, limit: int | None) -> dict[str, Any]:
    """What held-out rows share, and the test rows' answer perplexity, untuned and tuned, with 95 % intervals.

    `apart` has the ratio of those test rows alone that share neither question nor answer with training, `shared` that
    of the others.
    """
    parts = build(experiment)
    examples = tokenize(splits.test, parts.tokenizer, experiment.tokenization)
    examples = [examples[i] for i in fixed_subset(examples, limit, 0)]
    trained_on = {example.row.id for example in parts.examples["train"]}
    if leaked := [example.row.id for example in examples if example.row.id in trained_on]:
        raise RuntimeError(f"{len(leaked)} test rows are trained on: the run splits its data in another way")
    evaluator = parts.evaluator(TOKENS)
    untuned = evaluator.row_losses(examples)
    with tempfile.TemporaryDirectory() as scratch:
        run_train(parts, Progress(), Path(scratch))
    tuned = evaluator.row_losses(examples)
    known = shared_with_training(splits)
    shares = np.array([bool(known[example.row.id]["question_or_answer"]) for example in examples])
    return {
        "overlap": overlap_report(splits)["held_out"],
        "groups": len(set(splits.groups.values())),
        "rows": len(examples),
        "untuned": answer_perplexity(untuned),
        "tuned": answer_perplexity(tuned),
        "ratio": ratio(tuned, untuned),
        "shared": ratio(tuned[shares], untuned[shares]),
        "apart": ratio(tuned[~shares], untuned[~shares]),
    }


def answer_perplexity(losses: np.ndarray) -> Figure | None:
    """Of `Evaluator.row_losses`."""
    return perplexity_figure(mean_figure(losses[:, 2], losses[:, 3]))


def ratio(tuned: np.ndarray, untuned: np.ndarray) -> Figure | None:
    """Tuned over untuned answer perplexity of the same rows: exp of the mean difference of their losses."""
    return perplexity_figure(mean_figure(tuned[:, 2] - untuned[:, 2], tuned[:, 3]))


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The comparison as Markdown: a column a split."""
    lines = ["| | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]

    def line(label: str, cells: Sequence[str]) -> None:
        lines.append(f"| {label} | " + " | ".join(cells) + " |")

    line("groups that are kept together", [f"{one['groups']:,}" if m != "random" else "" for m, one in found.items()])
    for what in SHARED:
        label = f"held-out rows that share with training: {what.replace('_', ' ')}"
        line(label, [f"{one['overlap'][what]['share']:.1%}" for one in found.values()])
    line("test rows measured", [f"{one['rows']:,}" for one in found.values()])
    for key, label in (
        ("untuned", "answer perplexity on test, untuned"),
        ("tuned", "answer perplexity on test, tuned"),
        ("ratio", "tuned over untuned"),
        ("apart", "the same, of rows that share neither question nor answer"),
        ("shared", "the same, of the others"),
    ):
        line(label, [shown(one[key]) for one in found.values()])
    return "\n".join(lines)


def shown(figure: Figure | None) -> str:
    """A figure with its interval, a dash where there is none."""
    if figure is None:
        return "-"
    interval = "" if figure["low"] is None else f" ({figure['low']:.4g} to {figure['high']:.4g})"
    return f"{figure['value']:.4g}{interval}"


if __name__ == "__main__":
    raise SystemExit(main())
