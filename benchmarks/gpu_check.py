"""The recipes at TinyLlama's true size on this machine's GPU: `make gpu-check`.

Each recipe runs through `train.py` itself for 20 updates, in bf16 and in fp16 with the scaler: twice straight, and once
stopped in the middle by a real SIGTERM and continued. The table has the losses, the time of an update, the peak memory,
and the largest difference between the continued adapter and the straight one beside that between the two straight ones.
A further run without `training.deterministic` says what determinism costs.

Weights are random, in TinyLlama-1.1B's shape; rows are synthetic, as long as MedQuAD's. So the losses mean nothing but
that they are finite and repeat. No network. `--shape tiny --cpu` tries the script itself on a machine without a GPU.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from medqa.tiny import BASE_DIR
from medqa.training.checkpoint import versions
from medqa.training.recorder import read_metrics

RECIPES = ("exp_001", "exp_002", "exp_003", "exp_004")
PRECISIONS = {"bf16": "bfloat16", "fp16": "float16"}
SHAPES: dict[str, dict[str, int]] = {
    "tinyllama": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1100,
        "max_position_embeddings": 1024,
    },
}
MEDQUAD_LENGTHS = (5.5, 0.85)  # of the log-normal whose median, mean and share over 512 tokens are like MedQuAD's


def main(argv: Sequence[str] | None = None) -> int:
    """Run the check, or one part of it in this process (`--part`); 2 where there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=RECIPES)
    parser.add_argument("--precisions", nargs="+", default=tuple(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--shape", default="tinyllama", choices=SHAPES)
    parser.add_argument(
        "--cpu", action="store_true", help="test this script on a CPU, in float32 unless the CPU has native bfloat16"
    )
    parser.add_argument("--out", type=Path, help="write the figures as JSON, too")
    parser.add_argument("--part", nargs=3, metavar=("RECIPE", "PRECISION", "DIR"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if not options.cpu and not torch.cuda.is_available():
        print("gpu-check: no GPU that torch can use; --shape tiny --cpu tries the script itself", file=sys.stderr)
        return 2
    if options.part:
        recipe, precision, place = options.part
        print(json.dumps(check(recipe, precision, Path(place), options.updates, options.cpu)))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        make_base(Path(scratch) / "base", SHAPES[options.shape])
        make_rows(Path(scratch) / "rows.jsonl", Path(scratch) / "base", 40 * options.updates + 100)
        results = [
            run_part(recipe, precision, Path(scratch), options)
            for recipe in options.recipes
            for precision in options.precisions
        ]
    report = {"machine": machine(options.cpu), "versions": versions(), "updates": options.updates, "results": results}
    show(report)
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def make_base(directory: Path, shape: dict[str, int]) -> None:
    """A base model with random weights, and the embedded tokenizer, filled up to the shape's vocabulary."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape)).to(torch.bfloat16).save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    tokenizer.add_tokens([f"<unused{i}>" for i in range(shape["vocab_size"] - len(tokenizer))])
    tokenizer.save_pretrained(directory)


def make_rows(path: Path, base: Path, count: int) -> None:
    """Questions and answers of random words, `count` of them, with token lengths like MedQuAD's prompts."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    random = np.random.default_rng(0)
    words = [
        f"{a}{b}" for a in ("fever", "heart", "skin", "child", "blood") for b in ("", "s", "ing", " pain", " test")
    ]
    tokens_per_word = len(tokenizer(" ".join(words))["input_ids"]) / len(words)
    with path.open("w", encoding="utf-8") as file:
        for number, length in enumerate(random.lognormal(*MEDQUAD_LENGTHS, size=count)):
            answer = " ".join(random.choice(words, size=max(5, int(length / tokens_per_word))))
            file.write(json.dumps({"question": f"Question {number}?", "answer": f"{number} {answer}"}) + "\n")


def run_part(recipe: str, precision: str, scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One recipe in one precision, in a process of its own: the choice of kernels is a process's."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--part", recipe, precision, str(scratch)]
    command += ["--updates", str(options.updates), *(["--cpu"] if options.cpu else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        return {"recipe": recipe, "precision": precision, "failed": f"exit code {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def check(recipe: str, precision: str, scratch: Path, updates: int, cpu: bool) -> dict[str, Any]:
    """The runs of one recipe in one precision, in this process, and what they show."""
    from train import main as train

    place = scratch / f"{recipe}-{precision}"

    def run(name: str, *sets: str) -> Path:
        reset_accelerate()
        words = ["--exp", recipe, "--model", str(scratch / "base"), "--medquad", str(scratch / "rows.jsonl")]
        words += ["--afrimedqa", "none", "--output-dir", str(place / name), *(["--cpu"] if cpu else [])]
        words += ["--set", f"training.max_steps={updates}", f"scheduler.warmup_steps={updates // 5}"]
        words += ["training.log_steps=1", "training.save_steps=1000000", "evaluation.steps=1000000"]
        words += ["data.fractions=[0.98, 0.01, 0.01]", "tracking.wandb=disabled", *sets]
        words += [f"training.mixed_precision={precision}", f"model.dtype={PRECISIONS[precision]}"]
        sys.stdout.flush()
        with open(os.devnull, "w") as quiet, redirected(quiet):
            code = train(words)
        if code not in (0, 128 + signal.SIGTERM):
            raise SystemExit(f"gpu-check: {recipe} {precision} {name}: exit code {code}")
        return place / name

    first, second = run("first"), run("second")
    stop_at(place / "continued" / "metrics.jsonl", updates // 2)
    run("continued")
    stopped_after = max(record["step"] for record in read_metrics(place / "continued" / "metrics.jsonl"))
    continued = run("continued")
    free = run("free", "training.deterministic=false")
    records = [record for record in read_metrics(first / "metrics.jsonl") if record["split"] == "train"]
    summary = json.loads((first / "summary.json").read_text())
    return {
        "recipe": recipe,
        "precision": precision,
        "quantization": summary["quantization"],
        "mixed_precision": summary["mixed_precision"],
        "losses": [record["loss"] for record in records],
        "overflows": summary["scaler_overflows"],
        "update_s": update_seconds(first),
        "update_s_not_deterministic": update_seconds(free),
        "peak_allocated_bytes": summary["peak_memory_bytes"],
        "peak_reserved_bytes": max((record["peak_reserved_bytes"] or 0) for record in records) or None,
        "stopped_after": stopped_after,
        "difference_of_two_straight_runs": difference(first, second),
        "difference_of_continued_and_straight": difference(first, continued),
    }


class redirected:
    """`contextlib.redirect_stdout` for the file descriptor: the run's console keeps the one it found."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def __enter__(self) -> None:
        self._saved = os.dup(1)
        os.dup2(self._target.fileno(), 1)

    def __exit__(self, *_: object) -> None:
        sys.stdout.flush()
        os.dup2(self._saved, 1)
        os.close(self._saved)


def reset_accelerate() -> None:
    """Accelerate's state is global to the process; each run is to begin as in a new one."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def stop_at(metrics: Path, step: int) -> None:
    """Send this process SIGTERM as soon as the update stands in the metrics, from a thread."""

    def wait() -> None:
        while not metrics.exists() or not any(
            r["split"] == "train" and r["step"] >= step for r in read_metrics(metrics)
        ):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def update_seconds(run: Path) -> float:
    """The median time of an update, the first two left out (kernels are chosen and memory is found in them)."""
    times = [record["update_s"] for record in read_metrics(run / "metrics.jsonl") if record["split"] == "train"]
    return statistics.median(times[2:])


def difference(run: Path, other: Path) -> float:
    """The largest difference of any adapter weight; 0 is bitwise."""
    ours, theirs = (load_file(place / "lora_adapters" / "adapter_model.safetensors") for place in (run, other))
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def machine(cpu: bool) -> str:
    """What it ran on."""
    return platform.processor() or platform.machine() if cpu else torch.cuda.get_device_name()


def show(report: dict[str, Any]) -> None:
    """The table."""
    table = Table(title=f"gpu-check on {report['machine']}, {report['updates']} updates", title_justify="left")
    columns = ("recipe", "in effect", "loss first, last", "overflows", "s/update", "not deterministic")
    for column in (*columns, "peak GiB (reserved)", "two straight", "continued"):
        table.add_column(column)
    for result in report["results"]:
        if "failed" in result:
            table.add_row(result["recipe"], result["precision"], result["failed"])
            continue
        reserved = result["peak_reserved_bytes"]
        table.add_row(
            result["recipe"],
            f"{result['quantization']}, {result['mixed_precision']}",
            f"{result['losses'][0]:.4f}, {result['losses'][-1]:.4f}",
            str(result["overflows"]),
            f"{result['update_s']:.3f}",
            f"{result['update_s_not_deterministic']:.3f}",
            f"{result['peak_allocated_bytes'] / 2**30:.2f}" + (f" ({reserved / 2**30:.2f})" if reserved else ""),
            f"{result['difference_of_two_straight_runs']:.1e}",
            f"{result['difference_of_continued_and_straight']:.1e} (after {result['stopped_after']})",
        )
    Console(width=None if sys.stdout.isatty() else 170).print(table)


if __name__ == "__main__":
    sys.exit(main())
