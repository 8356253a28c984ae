"""200 kills and every damage: `make chaos`, or `python -m benchmarks.chaos --kills 200 --workers 3 --out chaos.json`.

Each round is a certificate (`medqa/commands/verify_resume.py`): one experiment, run straight and run killed, with
another seed.
Then every file of a checkpoint is damaged in every way, and the run that goes on must end as the straight one. The runs
are real processes, forked from one that has the libraries imported already, so that a start costs no 8 seconds.
"""

import argparse
import concurrent.futures
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness.faults import DAMAGES, QUIET, kill_round, words_for
from harness.processes import Forked
from medqa.commands.verify_resume import contents
from medqa.training.checkpoint import CONTENT, MANIFEST

EXPERIMENTS = ("exp_001", "exp_002", "exp_003")
KILLS_A_ROUND = 10


def damage_round(experiment: str, directory: Path, name: str, damage: str) -> dict[str, Any]:
    """Damage one file of the newest checkpoint of a run that stopped half way, go on, and compare with a straight run.

    Args:
        directory: holds `straight`, a finished run, and `half`, the same with its last updates undone.
    """
    place = directory / f"{name}-{damage.replace(' ', '-')}"
    shutil.copytree(directory / "half", place)
    newest = max(place.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    DAMAGES[damage](newest / name)
    log = place.with_suffix(".log")
    code = Forked([*words_for(experiment), *QUIET, "--output-dir", str(place)], log).wait()
    named = f"{newest} is damaged" in log.read_text()
    return {
        "experiment": experiment, "file": name, "damage": damage, "exit_code": code, "named": named,
        "bitwise_equal": code == 0 and contents(place) == contents(directory / "straight"),
    }  # fmt: skip


def half_done(straight: Path, half: Path) -> None:
    """A run that stopped after its last checkpoint but one was written: a copy without what came later."""
    shutil.copytree(straight, half)
    (half / "summary.json").unlink()
    shutil.rmtree(half / "lora_adapters")
    places = sorted(half.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.rmtree(places[-1])


def main() -> int:
    """All rounds; exit code 0 only if every one ended as it should."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 1))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        found = run_all(Path(temporary), options.kills, options.workers, options.seed)
    found["seconds"] = time.monotonic() - started
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in found.items() if not isinstance(value, list)}))
    return 0 if found["all_as_they_should"] else 1


def run_all(directory: Path, kills: int, workers: int, seed: int) -> dict[str, Any]:
    """Kill rounds until so many kills are done, and every damage of every file for each experiment."""
    certificates: list[dict[str, Any]] = []
    damages: list[dict[str, Any]] = []
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        while (done := sum(len(found["kills"]) for found in certificates)) < kills:
            first = seed + len(certificates)
            rounds = range(first, first + max(1, -(-(kills - done) // KILLS_A_ROUND)))
            tasks = [
                pool.submit(kill_round, EXPERIMENTS[(i - seed) % 3], directory / f"round-{i}", KILLS_A_ROUND, i)
                for i in rounds
            ]
            for task in concurrent.futures.as_completed(tasks):
                certificates.append(task.result())
                _tell_round(certificates[-1])
        straight = {}
        for i, experiment in enumerate(EXPERIMENTS):
            straight[experiment] = directory / f"damage-{experiment}"
            shutil.copytree(directory / f"round-{seed + i}" / "straight", straight[experiment] / "straight")
            half_done(straight[experiment] / "straight", straight[experiment] / "half")
        tasks = [
            pool.submit(damage_round, experiment, straight[experiment], name, damage)
            for experiment in EXPERIMENTS
            for name in (*CONTENT, MANIFEST)
            for damage in DAMAGES
        ]
        for task in concurrent.futures.as_completed(tasks):
            damages.append(task.result())
            if not (damages[-1]["bitwise_equal"] and damages[-1]["named"]):
                print("NOT AS IT SHOULD:", damages[-1], flush=True)
    all_kills = [kill for found in certificates for kill in found["kills"]]
    equal = sum(found["bitwise_equal"] for found in certificates)
    good = sum(found["bitwise_equal"] and found["named"] for found in damages)
    return {
        "kills": len(all_kills),
        "kills_by_moment": {m: sum(k["moment"] == m for k in all_kills) for m in ("start", "update", "save")},
        "saves_torn": sum(kill["save_torn"] for kill in all_kills),
        "rounds": len(certificates),
        "rounds_bitwise_equal": equal,
        "damages": len(damages),
        "damages_named_and_bitwise_equal": good,
        "all_as_they_should": equal == len(certificates) and good == len(damages),
        "certificates": certificates,
        "damage_list": damages,
    }


def _tell_round(found: dict[str, Any]) -> None:
    """One line a round."""
    verdict = "equal" if found["bitwise_equal"] else "DIFFERENT"
    print(f"{found['command'][1]} seed {found['seed']}: {len(found['kills'])} kills: {verdict}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
