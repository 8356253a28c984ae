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

NOT_YET = ("evaluate", "ask", "compare")
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
    add_export_options(commands)
    return parser


def add_export_options(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The `export` command and its options."""
    parser = commands.add_parser(
        "export",
        help="base and adapter as one model: plain safetensors for servers, or GGUF for llama.cpp and Ollama",
        description="Merges the adapter into the weights it was trained on, measures the result against it on held-out "
        "prompts, and refuses one that differs; with tokenizer, prompt and model card.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="a run's directory, an adapter's, or an adapter's id on the hub")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="a directory that is not there yet")
    parser.add_argument("--format", choices=("merged", "gguf"), default="merged", help="default: merged")
    parser.add_argument(
        "--outtype",
        choices=("f32", "f16", "bf16", "q8_0"),
        help="merged: f32, f16, bf16 (default: f16; f32 for a base kept in float32); gguf: f16 (default), q8_0",
    )
    parser.add_argument(
        "--checkpoint", metavar="best|STEP", help="a checkpoint of the run instead of its final adapter"
    )
    parser.add_argument("--model", metavar="ID_OR_DIR", help="where the base model is, if not where it was")
    parser.add_argument("--cpu", action="store_true", help="on the CPU although there is a GPU")
    parser.add_argument("--push", metavar="REPO", help="hand the folder to this repository of the hub (made private)")


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


def export(options: argparse.Namespace) -> None:
    """The `export` command.

    Raises:
        UserError: as `results.export` says.
    """
    from medqa.results.export import Wanted
    from medqa.results.export import export as run_export
    from medqa.training.console import make_console, quiet_libraries

    quiet_libraries()
    console = make_console(True)
    run_export(
        Wanted(
            run=options.run,
            to=options.to,
            form=options.format,
            outtype=options.outtype,
            checkpoint=options.checkpoint,
            base=options.model,
            cpu=options.cpu,
            push=options.push,
        ),
        functools.partial(console.print, soft_wrap=True),
    )


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


COMMANDS = {"plan": plan, "export": export, "verify-resume": verify_resume}


if __name__ == "__main__":
    sys.exit(main())
