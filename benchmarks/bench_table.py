"""The figures of `compare.py`: ratios to Trainer with their ranges, as a table, a plot, and a section of RESULTS.md."""

import re
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.cases import ARMS, HOST, MEMORY_TARGETS, SPEED_TARGETS

HEADING = "## `make bench`: beside HF Trainer and TRL"
COLUMNS = (
    "arm",
    "s/update",
    "x Trainer (range)",
    "target",
    "x by wall (range)",
    "peak memory, MB",
    "of Trainer's (range)",
    "target",
    "useful tokens/s",
    "of GEMM",
    "first update, s",
    "gradient error",
)
MEGA = 1e6


@dataclass(frozen=True)
class Ratios:
    """A median over the rounds and what it lies between."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: list[float]) -> "Ratios":
        """Of the rounds'."""
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.lowest:.2f} to {self.highest:.2f})"


@dataclass(frozen=True)
class ArmFigures:
    """An arm's figures in a case. Speed and wall: how many times Trainer's; memory: which share of Trainer's."""

    seconds: float
    speed: Ratios
    wall: Ratios
    peak_bytes: float
    memory: Ratios
    tokens_per_s: float
    utilisation: float
    first_update_s: float


def figures(case: Mapping[str, Any], arm: str) -> ArmFigures:
    """Within each round an arm's seconds per useful token beside Trainer's; then the median of the rounds."""
    clock = "wall_s" if case["case"]["device"] == "cuda" else "cpu_s"
    rounds, reference = case["arms"][arm]["rounds"], case["arms"]["trainer"]["rounds"]
    pairs = list(zip(rounds, reference, strict=True))

    def speed(key: str) -> Ratios:
        return Ratios.of([(theirs[key] / theirs["tokens"]) / (mine[key] / mine["tokens"]) for mine, theirs in pairs])

    tokens_per_s = statistics.median(one["tokens"] / one[clock] for one in rounds)
    return ArmFigures(
        seconds=statistics.median(one[clock] / one["updates"] for one in rounds),
        speed=speed(clock),
        wall=speed("wall_s"),
        peak_bytes=statistics.median(one["peak_bytes"] for one in rounds),
        memory=Ratios.of([mine["peak_bytes"] / theirs["peak_bytes"] for mine, theirs in pairs]),
        tokens_per_s=tokens_per_s,
        utilisation=tokens_per_s * case["flops_per_token"] / statistics.median(case["gemm_flops"]),
        first_update_s=case["arms"][arm]["first_update"]["wall_s"],
    )


def cells(case: Mapping[str, Any], name: str, arm: str) -> list[str]:
    """A line of the table."""
    found = figures(case, arm)
    on_cpu = case["case"]["device"] == "cpu"
    error = case.get("gradients", {}).get(arm)
    least, most = SPEED_TARGETS.get((name, arm)), MEMORY_TARGETS.get((name, arm))
    return [
        ARMS[arm],
        f"{found.seconds:.4g}",
        str(found.speed),
        verdict(f">= {least}", found.speed.median >= least) if least and on_cpu else "",
        str(found.wall),
        f"{found.peak_bytes / MEGA:,.0f}",
        str(found.memory),
        verdict(f"<= {most}", found.memory.median <= most) if most and on_cpu else "",
        f"{found.tokens_per_s:,.0f}",
        f"{found.utilisation:.0%}",
        f"{found.first_update_s:.1f}",
        f"{error['gradient']:.0e}" if error else "",
    ]


def verdict(target: str, met: bool) -> str:
    """The target, and whether it is met."""
    return f"{target} {'met' if met else 'MISSED'}"


def title(case: Mapping[str, Any], name: str) -> str:
    """What a table is of."""
    asked = case["case"]
    return (
        f"{name}: shape {Path(asked['shape']).name}, {asked['dtype']}, {asked['rows']} rows an update, quantization "
        f"{asked['quantization']}, {case['useful_share']:.0%} of Trainer's places useful; {case['rows']}; GEMM "
        f"{statistics.median(case['gemm_flops']) / 1e9:,.0f} GFLOP/s"
    )


def host_lines(case: Mapping[str, Any]) -> list[str]:
    """What an update of nearly no arithmetic costs: milliseconds of CPU time, by arm."""
    lines = []
    for arm, found in case["arms"].items():
        times = [1000 * one["cpu_s"] / one["updates"] for one in found["rounds"]]
        lines.append(f"{ARMS[arm]} {Ratios.of(times)}")
    return lines


def show(report: Mapping[str, Any]) -> None:
    """Tables on the console."""
    console = Console(width=None if sys.stdout.isatty() else 220)
    for name, case in report["cases"].items():
        if name == HOST:
            console.print("host: CPU ms an update, 8 micro-batches of 4 x 16 tokens through a tiny model:")
            console.print("; ".join(host_lines(case)), highlight=False)
            continue
        table = Table(title=title(case, name), title_justify="left")
        for column in COLUMNS:
            table.add_column(column)
        for arm in case["arms"]:
            table.add_row(*cells(case, name, arm))
        console.print(table)
        for line in profile_lines(case):
            console.print(line, highlight=False)
    for name, case in report["cases"].items():
        for arm, why in case["failed"].items():
            console.print(f"{name}: {ARMS[arm]} failed: {why}", highlight=False, markup=False)


def profile_lines(case: Mapping[str, Any]) -> list[str]:
    """The profile's groups by share, if there is one."""
    if "profile" not in case:
        return []
    groups = case["profile"]["groups"]
    total = sum(groups.values())
    shares = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in groups.items())
    micro_batch = f"micro-batches of at most {case['profile']['micro_batch_tokens']} tokens"
    return [f"where ours padding_free spends its time ({micro_batch}): {shares}"]


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Speed and peak memory beside Trainer's, by recipe."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = {name: case for name, case in report["cases"].items() if name != HOST}
    figure, axes = plt.subplots(len(cases), 2, figsize=(12, 2.6 * len(cases)), squeeze=False, sharey="row")
    for (name, case), (left, right) in zip(cases.items(), axes, strict=True):
        arms = [arm for arm in case["arms"] if arm != "trainer"][::-1]
        colours = ["#1f4e79" if arm in ("plain", "padding_free") else "#f2a65a" for arm in arms]
        found = [figures(case, arm) for arm in arms]
        for axis, ratios in ((left, [one.speed for one in found]), (right, [one.memory for one in found])):
            medians = [one.median for one in ratios]
            spread = [[m - r.lowest for m, r in zip(medians, ratios, strict=True)]]
            spread.append([r.highest - m for m, r in zip(medians, ratios, strict=True)])
            axis.barh([ARMS[arm].split(" (other")[0] for arm in arms], medians, color=colours, xerr=spread)
            axis.axvline(1, color="#666666", linewidth=1, linestyle="--")
            axis.spines[["top", "right"]].set_visible(False)
        left.set_title(f"{name}: speed, times Trainer's", loc="left")
        right.set_title("peak memory, of Trainer's", loc="left")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, facecolor="white")
    plt.close(figure)


def section(report: Mapping[str, Any]) -> str:
    """RESULTS.md's section."""
    machine = report["machine"]
    on = machine.get("gpu") or f"{machine['cpu']} ({machine['capability']}), {machine['cores']} cores, one thread used"
    loads = f"load {machine['load_at_start'][0]:.1f} at the start, {report['load_at_end'][0]:.1f} at the end"
    lines = [HEADING, "", f"{report['date'][:10]}, {on}; {loads}; {report['rounds']} rounds; "]
    lines[-1] += ", ".join(f"{name} {number}" for name, number in report["versions"].items()) + "."
    lines += ["Random weights; figures are of one run. An arm's ratio is the median of the rounds (and their range)."]
    for name, case in report["cases"].items():
        if name == HOST:
            lines += ["", "CPU ms an update of 8 micro-batches of 4 x 16 tokens through a tiny model:"]
            lines += ["", *(f"- {line}" for line in host_lines(case))]
            continue
        lines += ["", title(case, name) + ":", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        lines += [f"| {' | '.join(cells(case, name, arm))} |" for arm in case["arms"]]
        lines += [f"\n{line}." for line in profile_lines(case)]
        lines += [f"\n{ARMS[arm]} failed: {why.splitlines()[-1]}" for arm, why in case["failed"].items()]
    lines += ["", *(f"- {ARMS.get(name, name)} was left out: {why}." for name, why in report["left_out"].items())]
    return "\n".join(lines).rstrip() + "\n"


def write_section(report: Mapping[str, Any], path: Path) -> None:
    """Put the section into the file, in place of the one that is there."""
    text = path.read_text(encoding="utf-8")
    new = section(report)
    pattern = re.compile(rf"^{re.escape(HEADING)}$.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
    if pattern.search(text):
        text = pattern.sub(lambda _: new + "\n", text)
    else:
        text = f"{text.rstrip()}\n\n{new}"
    path.write_text(text.rstrip() + "\n", encoding="utf-8")
