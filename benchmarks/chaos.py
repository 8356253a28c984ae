"""200 kills and every damage: `make chaos`, or `python -m benchmarks.chaos --kills 200 --workers 3 --out chaos.json`.

Each round is a certificate (`medqa/training/verify.py`): one experiment run straight and run killed, with another seed.
Then every file of a checkpoint is damaged in every way, and the run that goes on must end as the straight one. The runs
are real processes, forked from one that has the libraries imported already, so that a start costs no 8 seconds.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import runpy
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from medqa.training.checkpoint_files import CONTENT
from medqa.training.manifest import MANIFEST
from medqa.training.verify import contents, verify_resume

EXPERIMENTS = ("exp_001", "exp_002", "exp_003")
KILLS_A_ROUND = 10
TRAIN = Path(__file__).resolve().parents[1] / "train.py"
# Few, short rows and updates: most of the time is spent in what is to be interrupted.
SHORT = (
    "training.max_steps=24", "training.save_steps=4", "training.global_batch_size=8", "evaluation.steps=6",
    "evaluation.rows=8", "evaluation.samples=0", "tokenization.max_length=64",
)  # fmt: skip
QUIET = ("--set", "training.log_steps=1", "tracking.wandb=disabled")
DAMAGES: dict[str, Callable[[Path], Any]] = {
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "flipped": lambda path: path.write_bytes(_flipped(path.read_bytes())),
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "missing": lambda path: path.unlink(),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


class Forked:
    """A process with `train.py`'s main, or another script's, forked from a server that has imported everything.

    It has `Popen`'s methods, but for `wait`, which returns None when its time is over.
    """

    def __init__(
        self,
        words: list[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        script: Path = TRAIN,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["train"])
        self._process = context.Process(target=_train, args=(words, log, dict(environment or {}), script))
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        return self._process.exitcode

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()

    def send_signal(self, number: int) -> None:
        """A signal, to a process that has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int | None:
        """The exit code, once it has one."""
        self._process.join(timeout)
        return self._process.exitcode


def _train(words: list[str], log: Path, environment: dict[str, str], script: Path) -> None:
    """The child: what it prints goes into the log."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "ACCELERATE_"))]:
        del os.environ[name]  # among them the address of a W&B service of the process that began this
    os.environ |= environment
    with log.open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.argv = [str(script), *words]
    runpy.run_path(str(script), run_name="__main__")


def words_for(experiment: str) -> list[str]:
    """A small run of the experiment."""
    return ["--exp", experiment, "--tiny", "--cpu", "--set", *SHORT]


def kill_round(experiment: str, directory: Path, kills: int, seed: int) -> dict[str, Any]:
    """One certificate."""
    directory.mkdir(parents=True, exist_ok=True)
    Forked(["--help"], directory / "warm-up.log").wait()  # the server's imports are not part of a start
    return verify_resume(words_for(experiment), directory, kills, seed, Forked, lambda message: None)


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


def _flipped(content: bytes) -> bytes:
    """One bit in the middle is another."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


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
