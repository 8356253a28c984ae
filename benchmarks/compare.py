"""HF Trainer, its options, TRL and this project's loop on the same rows, each in its own process: `make bench`.

Gradients are checked first: an arm that should compute Trainer's update and does not ends it. Then in each round every
arm does the same update, one after the other, in an order that rotates; ratios are within a round, per useful token.
"Trainer again" is Trainer a second time: what it differs by is noise. One thread; CPU seconds on a CPU, wall on a GPU.

No GPU was at hand: `--device cuda`, with its Liger and torch.compile arms, has never been run.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_table import draw, show, write_section
from benchmarks.cases import ARMS, FULL, HOST, QUICK_ARMS, RECIPES, Case, absent, make_cases
from benchmarks.flops import flops_per_token, gemm_flops, no_bfloat16
from benchmarks.pool import Arm, ArmFailed, check_gradients, profile
from benchmarks.standin import MEDQUAD, make_model, useful_share
from medqa.model.device import no_native_bfloat16
from medqa.training.checkpoint import versions

RESULTS = Path(__file__).parent / "RESULTS.md"
CHECK_ROWS = 16


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, show, and write; 1 where an arm's gradients are wrong or Trainer itself does not run."""
    options = parse(argv)
    if options.from_json:
        report = json.loads(options.from_json.read_text(encoding="utf-8"))
    else:
        try:
            report = run(options)
        except ArmFailed as error:
            print(f"bench: {error}", file=sys.stderr)
            return 1
    show(report)
    if options.plot:
        draw(report, options.plot)
    if options.write:
        write_section(report, RESULTS)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, with what `--quick` and the device make of them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--rounds", type=int, default=5, help="pairs of each arm and Trainer")
    parser.add_argument("--rows", type=int, default=32, help="in an update")
    parser.add_argument("--full", action="store_true", help="also at TinyLlama's shape in bf16 (exp_002)")
    parser.add_argument("--full-rows", type=int, default=4)
    parser.add_argument("--model", type=Path, help="compare on this model (a directory) only, in bf16")
    parser.add_argument("--no-host", action="store_true", help="leave the overhead of an update out")
    parser.add_argument("--profile", action="store_true", help="also where ours padding_free spends its time")
    parser.add_argument("--quantization", default="none", choices=("none", "4bit"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--medquad", type=Path, default=MEDQUAD if MEDQUAD.exists() else None)
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--write", action="store_true", help=f"put the figures into {RESULTS.name}")
    parser.add_argument("--from", dest="from_json", type=Path, help="show what --out wrote, and run nothing")
    parser.add_argument("--quick", action="store_true", help="one round of a tiny model: does the script itself work?")
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds, options.rows = 1, 4
        options.arms = [arm for arm in options.arms if arm in QUICK_ARMS]
    if "trainer" not in options.arms:
        options.arms.insert(0, "trainer")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU that torch can use")
    return options


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, as it goes into the JSON file."""
    torch.set_num_threads(1)
    left_out = dict(absent(options.arms, options.device))
    arms = [arm for arm in options.arms if arm not in left_out]
    if options.full and options.device == "cpu" and (why := no_bfloat16()):
        left_out[FULL] = why
    no_bf16 = no_native_bfloat16() if options.model and options.device == "cpu" else None
    if no_bf16 is not None:
        left_out["bfloat16"] = f"{no_bf16}; all arms use float32"
    for name, why in left_out.items():
        tell(f"{name} is left out: {why}")
    cases = make_cases(
        options.recipes,
        arms,
        options.rows,
        options.device,
        quick=options.quick,
        full=options.full and FULL not in left_out,
        full_rows=options.full_rows,
        host=not options.no_host,
        quantization=options.quantization,
        model=options.model,
        bfloat16=no_bf16 is None,
    )
    report = {"machine": machine(options.device), "versions": all_versions(), "left_out": left_out}
    report |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "rounds": options.rounds, "cases": {}}
    with tempfile.TemporaryDirectory() as scratch:
        for case in cases:
            report["cases"][case.name] = run_case(case, options, Path(scratch))
            report["load_at_end"] = os.getloadavg()
            options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")  # each case is minutes
    return report


def run_case(case: Case, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """One case: its gradients, then its rounds, then the profile."""
    base = base_of(case, scratch)
    place = scratch / case.name.replace(" ", "-")
    place.mkdir()
    experiment = case.experiment(base)
    rows = case.make_rows(experiment, options.medquad)
    file = rows.save(place / "rows.npz")
    jobs = case.jobs(experiment, base, file, options.rounds, place)
    result: dict[str, Any] = {"case": asdict(case), "rows": rows.origin}
    if case.name != HOST:
        tell(f"{case.name}: gradients")
        result["gradients"] = check_gradients(checked_jobs(case, options.medquad, scratch), place)
    used = [len(row) for row in rows.in_order((1 + options.rounds * case.updates) * case.rows)]
    padded_to = experiment.tokenization.max_length if experiment.tokenization.padding == "max_length" else None
    result["useful_share"] = useful_share(used, experiment.training.per_device_batch_size, padded_to)
    result["flops_per_token"] = flops_per_token(case.shape, used, experiment.lora.r)
    result |= run_rounds(case, jobs, options.rounds, place)
    if options.profile and case.name != HOST and "padding_free" in jobs:
        tell(f"{case.name}: profile")
        result["profile"] = profile(jobs["padding_free"], place)
    return result


def checked_jobs(case: Case, medquad: Path | None, scratch: Path) -> dict[str, Any]:
    """The jobs of the gradient check: the same recipe in float32 on the CPU, with fewer rows and a small model.

    There rounding is far below any mistake; in bfloat16 it is not.
    """
    shape = "p" if case.shape == "tinyllama" or case.model is not None else case.shape
    small = replace(case, shape=shape, dtype="float32", device="cpu", rows=min(case.rows, CHECK_ROWS))
    base = base_of(small, scratch)
    experiment = small.experiment(base)
    file = small.make_rows(experiment, medquad).save(scratch / "checked-rows.npz")
    return small.jobs(experiment, base, file, 0, scratch)


def base_of(case: Case, scratch: Path) -> Path:
    """The case's base model, made where it is not there yet."""
    if case.model is not None:
        return case.model.resolve()
    base = scratch / f"{case.shape}-{case.dtype}"
    return base if base.is_dir() else make_model(base, case.shape, case.dtype)


def run_rounds(case: Case, jobs: dict[str, Any], rounds: int, place: Path) -> dict[str, Any]:
    """The rounds, and what each arm's first update took. An arm of others that fails is named and left out."""
    running: dict[str, Arm] = {}
    failed: dict[str, str] = {}
    figures: dict[str, list[dict]] = {}
    gemm = []
    try:
        for arm, job in jobs.items():
            tell(f"{case.name}: {ARMS[arm]}: first update")
            try:
                running[arm] = Arm(job, place)
            except ArmFailed as error:
                if arm in ("trainer", "plain", "padding_free"):
                    raise
                failed[arm] = str(error)
                tell(failed[arm])
        figures = {arm: [] for arm in running}
        names = list(running)
        for number in range(rounds):
            gemm.append(gemm_flops(case.device, case.dtype))
            first = number % len(names)
            for arm in names[first:] + names[:first]:
                figures[arm].append(running[arm].round(case.updates))
            took = ", ".join(f"{arm} {figures[arm][-1]['cpu_s']:.2f}" for arm in names)
            tell(f"{case.name}: round {number + 1} of {rounds}: {took} CPU s")
    finally:
        for arm in running.values():
            arm.stop()
    arms = {arm: {"first_update": running[arm].first, "rounds": found} for arm, found in figures.items()}
    return {"gemm_flops": gemm, "arms": arms, "failed": failed}


def machine(device: str) -> dict[str, Any]:
    """What it runs on, and how busy that is already."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    found = {"cpu": names[0] if names else platform.processor() or platform.machine(), "cores": os.cpu_count()}
    found |= {"capability": torch.backends.cpu.get_cpu_capability(), "threads": 1, "device": device}
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found | {"load_at_start": os.getloadavg(), "platform": platform.platform()}


def all_versions() -> dict[str, str]:
    """The libraries', and the peers'."""
    found = {"python": platform.python_version(), **versions()}
    for package in ("trl", "liger-kernel"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def tell(message: str) -> None:
    """A line on how far it is."""
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
