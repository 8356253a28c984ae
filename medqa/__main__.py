"""`python -m medqa COMMAND ...`: what is done before and after a run. Each command has `--help`."""

import argparse
import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from medqa.errors import UserError, exit_code
from medqa.experiment_file import default_output_dir, find_experiment, load_experiment
from medqa.options import add_run_options, locations, run_words

NOT_YET = ("evaluate", "ask", "export")
TRAIN = Path(__file__).resolve().parent.parent / "train.py"


def command_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(prog="python -m medqa", description="What is done before and after a run.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in NOT_YET:
        commands.add_parser(name, help="not in this version yet", add_help=False)
    plan = commands.add_parser(
        "plan",
        help="memory, tokens, operations, time and checkpoint sizes of a run, before any weight is loaded",
        description="Memory by part and at its peak, whether it fits and with which micro-batches, with and without "
        "4-bit weights and gradient checkpointing; tokens, padding, operations, time, bytes of a checkpoint.",
        allow_abbrev=False,
    )
    add_run_options(plan)
    plan.add_argument("--gpu", metavar="NAME_OR_GIB", help="plan for t4, l4, a10, a100, h100, h200 or so many GiB")
    plan.add_argument("--tflops", type=float, metavar="RATE", help="TFLOP/s that the machine keeps up, for the time")
    plan.add_argument("--json", action="store_true", help="print JSON, all memory in bytes")
    compare = commands.add_parser(
        "compare",
        help="runs side by side, on the console and as one HTML page, and what they do not allow to conclude",
        description="Reads the directories of two runs or more, finished or not, and writes one page that needs no "
        "network: settings that differ, losses, perplexity, speed, memory, time, evaluations, sample answers; which "
        "conclusions the comparison does not allow, and the commands of the runs that would allow them.",
        allow_abbrev=False,
    )
    compare.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="directories that train.py wrote, two or more"
    )
    compare.add_argument("--out", type=Path, default=Path("compare.html"), metavar="FILE", help="default: compare.html")
    compare.add_argument("--force", action="store_true", help="replace a file that this command did not write")
    compare.add_argument("--json", action="store_true", help="print the numbers as JSON instead of tables")
    verify = commands.add_parser(
        "verify-resume",
        help="kill a run again and again, and see that it ends bit for bit as if it had been left alone",
        description="Runs the experiment straight, then again, killed at random moments and resumed each time; "
        "compares adapter, optimizer, schedule, data order and every metric, and prints a certificate.",
        allow_abbrev=False,
    )
    add_run_options(verify)
    verify.add_argument("--kills", type=int, default=6, metavar="N", help="how many times (default 6)")
    verify.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    verify.add_argument("--output-dir", type=Path, metavar="DIR", help="default: outputs/verify-resume/<run>")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    parser = command_parser()
    options, rest = parser.parse_known_args(argv)
    if options.command in NOT_YET:
        return exit_code(functools.partial(_refuse, options.command))
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return exit_code(lambda: COMMANDS[options.command](options))


def plan(options: argparse.Namespace) -> None:
    """The `plan` command.

    Raises:
        UserError: the experiment, the model's configuration or the data cannot be had; no such GPU, or no such rate.
    """
    from medqa.training.console import make_console, quiet_libraries
    from medqa.training.forecast import forecast, show_forecast
    from medqa.training.machines import find_machine

    if options.tflops is not None and not 0 < options.tflops < math.inf:
        raise UserError(f"--tflops {options.tflops:g}: a number above 0")
    quiet_libraries()
    experiment = load_experiment(options.exp, tiny=options.tiny, locations=locations(options), sets=options.set)
    machine = find_machine(experiment, options.gpu, options.cpu)
    found = forecast(find_experiment(options.exp).stem, experiment, machine, options.tflops)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        show_forecast(make_console(True), found)


def compare(options: argparse.Namespace) -> None:
    """The `compare` command.

    Raises:
        UserError: a directory holds no run, or the page has no place.
    """
    from medqa.results.compare import compare as compare_directories

    compare_directories(options.runs, options.out, force=options.force, numbers=options.json)


def verify_resume(options: argparse.Namespace) -> None:
    """The `verify-resume` command: exit code 0 only if everything is equal.

    Raises:
        UserError: the run itself does not work.
        SystemExit: with 1 where something differs: a defect of ours.
    """
    from medqa.training import verify

    if options.kills < 1:
        raise UserError(f"--kills {options.kills}: at least 1")
    experiment = load_experiment(options.exp, tiny=options.tiny, locations=locations(options), sets=options.set)
    name = default_output_dir(options.exp, options.tiny, options.set, experiment).name
    directory = options.output_dir or Path("outputs") / "verify-resume" / name
    console = Console(highlight=False, markup=False)
    found = verify.verify_resume(
        run_words(options), directory, options.kills, options.seed, start_train, functools.partial(console.print)
    )
    (directory / "certificate.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    verify.show_certificate(console, found)
    print(json.dumps(found))
    if not found["bitwise_equal"]:
        raise SystemExit(1)


def start_train(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    """`train.py` as a process of its own."""
    with log.open("ab") as output:
        environment = {**os.environ, "WANDB_MODE": "disabled"}
        return subprocess.Popen([sys.executable, str(TRAIN), *words], stdout=output, stderr=output, env=environment)


def _refuse(command: str) -> None:
    """Say that a command is not there yet.

    Raises:
        UserError: always.
    """
    raise UserError(f"python -m medqa {command}: not in this version yet")


COMMANDS = {"plan": plan, "compare": compare, "verify-resume": verify_resume}


if __name__ == "__main__":
    sys.exit(main())
