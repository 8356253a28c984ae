"""`python -m medqa COMMAND ...`: what is done before and after a run. Each command has `--help`."""

import argparse
import functools
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from medqa.errors import UserError, exit_code, writing
from medqa.experiment_file import default_output_dir, find_experiment, load_experiment
from medqa.options import add_run_options, locations, run_words

NOT_YET = ("export",)
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
    evaluate = commands.add_parser(
        "evaluate",
        help="how good a run's adapter is on held-out rows, beside the untuned base, with intervals",
        description="Loss, generated answers, multiple choice and red flags on rows that training has not seen; on the "
        "console, in RUN/evaluation.json and on W&B. What the untuned base gives is computed once, and kept.",
        allow_abbrev=False,
    )
    add_adapter_options(evaluate, "RUN", "the directory of a run")
    evaluate.add_argument(
        "--tasks", default="loss,generation,mcq,probes", metavar="A,B", help="default: loss,generation,mcq,probes"
    )
    evaluate.add_argument("--limit", type=int, metavar="N", help="look at N rows of each split, and N questions")
    evaluate.add_argument("--medquad", metavar="SOURCE", help="where MedQuAD is now, if not where it was")
    evaluate.add_argument("--afrimedqa", metavar="SOURCE", help="where AfriMed-QA is now, if not where it was")
    ask = commands.add_parser(
        "ask",
        help="ask an adapter something",
        description="One answer; without a question, question after question at the terminal, or, where questions are "
        "piped in, a JSON line for each line. Each stands alone, as in training. Not medical advice.",
        allow_abbrev=False,
    )
    add_adapter_options(ask, "RUN_OR_ADAPTER", "the directory of a run or of an adapter, or an adapter on the hub")
    ask.add_argument("question", nargs="?", metavar="QUESTION", help="in quotation marks")
    ask.add_argument("--json", action="store_true", help="print a JSON line for each answer")
    ask.add_argument("--compare", action="store_true", help="show the base model's answer beside it")
    ask.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="where an answer is cut (256)")
    return parser


def add_adapter_options(parser: argparse.ArgumentParser, name: str, what: str) -> None:
    """The options that say which adapter is meant."""
    parser.add_argument("adapter", metavar=name, help=what)
    parser.add_argument("--checkpoint", metavar="best|STEP", help="another adapter of the run than its last")
    parser.add_argument("--model", metavar="ID_OR_DIR", help="where the base model is now, if not where it was")
    parser.add_argument("--cpu", action="store_true", help="use the CPU although there is a GPU")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    parser = command_parser()
    options, rest = parser.parse_known_args(argv)
    if options.command in NOT_YET:
        return exit_code(functools.partial(_refuse, options.command))
    if options.command == "ask" and options.question is None and rest and not rest[0].startswith("-"):
        options.question = rest.pop(0)  # argparse looks for one before the first option only
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return exit_code(lambda: COMMANDS[options.command](options))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


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


def evaluate(options: argparse.Namespace) -> None:
    """The `evaluate` command.

    Raises:
        UserError: no such run or task; the model or the data cannot be had, or the data are not the run's.
    """
    from medqa.results import evaluate as evaluation
    from medqa.results.adapter import find_adapter
    from medqa.results.evaluation_wandb import log_evaluation
    from medqa.results.show_evaluation import show_evaluation
    from medqa.training.console import make_console, quiet_libraries
    from medqa.training.processes import is_first_process

    tasks = evaluation.chosen_tasks(options.tasks)
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit {options.limit}: at least 1")
    quiet_libraries()
    data = {"data.medquad": options.medquad, "data.afrimedqa": options.afrimedqa}
    source = find_adapter(options.adapter, options.checkpoint, options.model, data)
    if source.run is None:
        raise UserError(
            f"{options.adapter}: an adapter alone does not say which rows it was not trained on; give its run's "
            "directory, outputs/exp_002 say"
        )
    console = make_console(is_first_process())
    with writing(source.run):
        found = evaluation.evaluate(source, tasks, options.limit, options.cpu, console)
        if is_first_process():
            evaluation.write_evaluation(found, source.run)
            show_evaluation(console, found)
            console.print(f"written to {source.run / evaluation.EVALUATION}")
            if source.final:
                log_evaluation(found, source.run, source.experiment, options.cpu, console.print)


def ask(options: argparse.Namespace) -> None:
    """The `ask` command.

    Raises:
        UserError: no such adapter, or it cannot be loaded; no question, or one that is too long.
    """
    import torch

    from medqa.model.precision import usable_gpu
    from medqa.results import ask as asking
    from medqa.results.adapter import find_adapter, load_adapted
    from medqa.training.console import make_console, quiet_libraries

    if options.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {options.max_new_tokens}: at least 1")
    quiet_libraries()
    source = find_adapter(options.adapter, options.checkpoint, options.model)
    adapted = load_adapted(source, torch.device("cuda" if not options.cpu and usable_gpu() else "cpu"))
    print(asking.NOT_ADVICE, file=sys.stderr, flush=True)
    console, most = make_console(True), options.max_new_tokens
    if options.question is not None and not options.json:
        asking.show_answer(adapted, options.question, most, options.compare, console)
    elif options.question is not None:
        asking.answer_lines(adapted, [options.question], most, options.compare)
    elif sys.stdin.isatty() and not options.json:
        asking.conversation(adapted, most, options.compare, console)
    else:
        asking.answer_lines(adapted, asking.piped_questions(sys.stdin), most, options.compare)


def _refuse(command: str) -> None:
    """Say that a command is not there yet.

    Raises:
        UserError: always.
    """
    raise UserError(f"python -m medqa {command}: not in this version yet")


COMMANDS = {"plan": plan, "evaluate": evaluate, "ask": ask, "compare": compare, "verify-resume": verify_resume}


if __name__ == "__main__":
    sys.exit(main())
