"""`medqa COMMAND ...`, or `python -m medqa COMMAND ...`: what is done before and after a run. Each has `--help`.

Their options are in `options.py`.
"""

import argparse
import contextlib
import functools
import itertools
import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from medqa.config_file import default_output_dir, find_experiment, load_experiment
from medqa.errors import LAUNCHER_DIED, UserError, exit_code, writing
from medqa.files import write_json
from medqa.options import command_parser, data_locations, locations, run_words
from medqa.terminal import make_console, print_error, print_json, protect
from medqa.training.stopping import Stopper
from medqa.variables import settle_variables

# These end a command as an error would, so that it removes what it has begun to write. Ctrl-C is Python's own.
STOPPING = (signal.SIGTERM, signal.SIGHUP, LAUNCHER_DIED)
COMPUTE_NOTHING = ("plan", "compare", "dashboard")  # of a model; no number of theirs depends on the environment
TRAIN = Path(__file__).resolve().parent.parent / "train.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    protect()
    parser = command_parser()
    options, rest = parser.parse_known_args(_run_before_show(sys.argv[1:] if argv is None else argv))
    if options.command == "ask" and options.question is None and rest and not rest[0].startswith("-"):
        options.question = rest.pop(0)  # argparse looks for one before the first option only
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        with Stopper(STOPPING):
            return exit_code(lambda: run_command(options))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _run_before_show(words: Sequence[str]) -> list[str]:
    """The words of a command line; RUN, if it comes after `evaluate --show HOW`, with or without N, is moved before it.

    `--show` takes one word or two, which argparse cannot say: it would take RUN as well.
    """
    if list(words[:1]) != ["evaluate"] or "--show" not in words:
        return list(words)
    show = words.index("--show")
    taken = list(itertools.takewhile(lambda word: not word.startswith("-"), words[show + 1 :]))
    runs = [index for index, word in enumerate(taken) if index and not word.isdigit()]
    if len(runs) != 1:
        return list(words)
    run = show + 1 + runs[0]
    return [*words[:show], words[run], *words[show:run], *words[run + 1 :]]


def run_command(options: argparse.Namespace) -> None:
    """Run the command that the options name, in an environment that decides nothing of it.

    Raises:
        UserError: as `settle_variables`, and as the command.
    """
    refuse, on_cpu = options.command not in COMPUTE_NOTHING, getattr(options, "cpu", False)
    ignored = settle_variables(devices=("cpu",) if on_cpu else ("cpu", "cuda"), refuse=refuse)
    if os.environ.get("RANK", "0") == "0":
        for label, text in ignored:
            print_error(f"{label}: {text}")
    COMMANDS[options.command](options)


def plan(options: argparse.Namespace) -> None:
    """The `plan` command.

    Raises:
        UserError: the experiment, the model's configuration or the data cannot be had; no such GPU, or no such rate.
    """
    from medqa.commands.plan import find_machine, forecast, show_forecast
    from medqa.training.recorder import quiet_libraries

    if options.tflops is not None and not 0 < options.tflops < math.inf:
        raise UserError(f"--tflops {options.tflops:g}: a number above 0")
    quiet_libraries()
    experiment = load_experiment(options.exp, tiny=options.tiny, locations=locations(options), sets=options.set)
    machine = find_machine(experiment, options.gpu, options.cpu)
    found = forecast(find_experiment(options.exp).stem, experiment, machine, options.tflops)
    if options.json:
        print_json(found, indent=2)
    else:
        show_forecast(make_console(), found)


def compare(options: argparse.Namespace) -> None:
    """The `compare` command.

    Raises:
        UserError: a directory holds no run, or the page has no place.
    """
    from medqa.commands.compare.show import compare as compare_directories

    compare_directories(options.runs, options.out, force=options.force, numbers=options.json)


def dashboard(options: argparse.Namespace) -> None:
    """The `dashboard` command.

    Raises:
        UserError: as `commands.dashboard.make_dashboard` says.
    """
    from medqa.commands.dashboard import make_dashboard

    say = functools.partial(make_console().print, soft_wrap=True)
    make_dashboard(options.project, options.entity, options.name, options.json, say)


def verify_resume(options: argparse.Namespace) -> None:
    """The `verify-resume` command: exit code 0 only if everything is equal.

    Raises:
        UserError: the run itself does not work.
        SystemExit: with 1 where something differs: a defect of ours.
    """
    from medqa.commands import verify_resume as verify

    if options.kills < 1:
        raise UserError(f"--kills {options.kills}: at least 1")
    experiment = load_experiment(options.exp, tiny=options.tiny, locations=locations(options), sets=options.set)
    name = default_output_dir(options.exp, options.tiny, options.set, experiment).name
    directory = options.output_dir or Path("outputs") / "verify-resume" / name
    console = make_console()
    say = functools.partial(console.print, soft_wrap=True)
    with writing(directory), contextlib.ExitStack() as started:

        def start(words: list[str], log: Path) -> subprocess.Popen[bytes]:
            process = start_train(words, log)
            started.callback(process.kill)  # where this command is stopped, and does nothing to one that has ended
            return process

        found = verify.verify_resume(run_words(options), directory, options.kills, options.seed, start, say)
        write_json(found, directory / "certificate.json")
    verify.show_certificate(console, found)
    print_json(found)
    if not found["bitwise_equal"]:
        raise SystemExit(1)


def export(options: argparse.Namespace) -> None:
    """The `export` command.

    Raises:
        UserError: as `commands.export` says.
    """
    from medqa.commands.export.export import Wanted
    from medqa.commands.export.export import export as run_export
    from medqa.training.recorder import quiet_libraries

    quiet_libraries()
    console = make_console()
    run_export(
        Wanted(
            run=options.adapter,
            to=options.to,
            form=options.format,
            outtype=options.outtype,
            checkpoint=options.checkpoint,
            base=options.model,
            cpu=options.cpu,
            push=options.push,
            weights=options.weights,
        ),
        functools.partial(console.print, soft_wrap=True),
    )


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
    if options.show is not None:
        return show_evaluated(options)
    from medqa.commands import evaluate as evaluation
    from medqa.commands.adapter import find_adapter
    from medqa.commands.evaluate import log_evaluation
    from medqa.commands.evaluation_table import show_evaluation
    from medqa.training.distributed import is_first_process
    from medqa.training.recorder import quiet_libraries

    tasks = list(evaluation.TASKS) if options.tasks is None else evaluation.chosen_tasks(options.tasks)
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit {options.limit}: at least 1")
    quiet_libraries()
    source = find_adapter(options.adapter, options.checkpoint, options.model, data_locations(options))
    if source.run is None:
        raise UserError(
            f"{options.adapter}: an adapter alone does not say which rows it was not trained on; give its run's "
            "directory, outputs/exp_002 say"
        )
    console = make_console(is_first_process())
    say = functools.partial(console.print, soft_wrap=True)
    keeper = evaluation.Keeper(source.run, say)
    found = evaluation.evaluate(source, tasks, options.limit, options.cpu, console, keeper.write)
    if is_first_process():
        show_evaluation(console, found)
        if keeper.finish(found) and source.final:
            log_evaluation(found, source.run, source.experiment, options.cpu, say)


def show_evaluated(options: argparse.Namespace) -> None:
    """The `evaluate` command with `--show`: no model is loaded.

    Raises:
        UserError: an option that only an evaluation uses; the run has no evaluation, or a damaged one.
    """
    from medqa.commands.evaluation_rows import chosen_rows, show_rows

    of_evaluations = ("tasks", "limit", "checkpoint", "model", "cpu", "medquad", "afrimedqa", "data")
    given = [f"--{name}" for name in of_evaluations if getattr(options, name) not in (None, False, [])]
    if given:
        raise UserError(f"--show shows the last evaluation, and evaluates nothing; leave out {', '.join(given)}")
    how, rows = chosen_rows(options.show)
    show_rows(make_console(), Path(options.adapter), how, rows)


def ask(options: argparse.Namespace) -> None:
    """The `ask` command.

    Raises:
        UserError: no such adapter, or it cannot be loaded; no question, or one that is too long.
    """
    import torch

    from medqa.commands import ask as asking
    from medqa.commands.adapter import find_adapter, load_adapted, unchecked_base
    from medqa.model.settings import usable_gpu
    from medqa.training.recorder import quiet_libraries

    if options.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {options.max_new_tokens}: at least 1")
    if not 0 <= options.temperature < math.inf:
        raise UserError(f"--temperature {options.temperature:g}: expected a number of at least 0 (0 decodes greedily)")
    if not 0 < options.repetition_penalty < math.inf:
        raise UserError(
            f"--repetition-penalty {options.repetition_penalty:g}: expected a number above 0 (1 is no penalty)"
        )
    if options.prompt is not None and not options.compare:
        raise UserError(
            f"--prompt {options.prompt}: this is the prompt of the base model, and an adapter always gets the prompt "
            "of its training; add --compare"
        )
    quiet_libraries()
    source = find_adapter(options.adapter, options.checkpoint, options.model)
    adapted = load_adapted(source, torch.device("cuda" if not options.cpu and usable_gpu() else "cpu"))
    if (unchecked := unchecked_base(source)) is not None:
        print_error(unchecked)
    base_ids = asking.ids_for_base(adapted, options.prompt)
    own_ids = asking.ids_in_own_template(adapted) if options.compare and options.prompt is None else None
    how = asking.Decoding(options.temperature, options.repetition_penalty, base_ids, own_ids)
    print_error(source.which)
    print_error(asking.NOT_ADVICE)
    console, most = make_console(), options.max_new_tokens
    if options.question is not None and not options.json:
        asking.show_answer(adapted, options.question, most, options.compare, console, how)
    elif options.question is not None:
        asking.answer_lines(adapted, [options.question], most, options.compare, how)
    elif sys.stdin.isatty() and not options.json:
        asking.conversation(adapted, most, options.compare, console, how)
    else:
        asking.answer_lines(adapted, asking.piped_questions(sys.stdin), most, options.compare, how)


COMMANDS = {
    "plan": plan,
    "evaluate": evaluate,
    "ask": ask,
    "compare": compare,
    "dashboard": dashboard,
    "export": export,
    "verify-resume": verify_resume,
}


if __name__ == "__main__":
    sys.exit(main())
