"""The options of `train.py` and of the commands."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, TypeAlias

from medqa.config_file import Locations
from medqa.errors import UserError
from medqa.terminal import printable

DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


class Parser(argparse.ArgumentParser):
    """An argument parser that makes its error messages printable, as all other messages are."""

    def error(self, message: str) -> NoReturn:
        """Show the message and the usage, and exit with code 2."""
        super().error(printable(message))


def option_parser() -> argparse.ArgumentParser:
    """The parser of `train.py`. A wrong option ends the process with a message and exit code 2."""
    parser = Parser(
        prog="train.py",
        description="Fine-tune a language model on medical questions and answers. The same command resumes a run.",
        allow_abbrev=False,
    )
    add_run_options(parser)
    add = parser.add_argument
    add("--output-dir", type=Path, metavar="DIR", help="default: outputs/<exp>, plus overrides that change results")
    add("--fresh", action="store_true", help="start over in the output directory instead of resuming")
    add(
        "--stop-after",
        type=duration,
        metavar="90m",
        help="save a checkpoint and stop before this time is over (1h30m, 45s); the same command resumes",
    )
    add("--persist-to", type=Path, metavar="DIR", help="mirror: copy checkpoints and results there, verified")
    return parser


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose the experiment, for every command that runs one."""
    add = parser.add_argument
    add("--exp", required=True, metavar="NAME", help="runs experiments/NAME.yaml; the path of a YAML file works too")
    add("--tiny", action="store_true", help="a small test run: embedded model and data, reduced settings")
    add("--model", metavar="ID_OR_DIR", help="base model instead of the file's (hub id or local directory)")
    source = "instead of the file's: a local file, kaggle:OWNER/NAME, a hub dataset id (OWNER/NAME[:CONFIG]), or none"
    add("--medquad", metavar="SOURCE", help=f"MedQuAD {source}; a directory of its XML files works too")
    add("--afrimedqa", metavar="SOURCE", help=f"AfriMed-QA {source}")
    add_data_option(parser, "your own data in addition, repeatable: .csv, .jsonl, .parquet or a hub dataset id")
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="section.key=value",
        help="override keys of the experiment file",
    )
    add("--cpu", action="store_true", help="train on the CPU even if there is a GPU")


def add_data_option(parser: argparse.ArgumentParser, about: str) -> None:
    """Add `--data`, which may be given once for each source."""
    parser.add_argument("--data", type=own_source, action="append", default=[], metavar="NAME=SOURCE", help=about)


def own_source(text: str) -> tuple[str, str]:
    """`NAME=SOURCE` as a pair.

    Raises:
        argparse.ArgumentTypeError: the text has another form.
    """
    name, _, source = text.partition("=")
    if not name.strip() or not source.strip():
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME=SOURCE, for example notes=notes.csv")
    return name.strip(), source.strip()


def own_sources(options: argparse.Namespace) -> dict[str, str]:
    """All `--data` options as a mapping from name to source.

    Raises:
        UserError: a name is given twice.
    """
    names = [name for name, _ in options.data]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"--data: {', '.join(twice)}: given more than once; give each source a name of its own")
    return dict(options.data)


def run_words(options: argparse.Namespace) -> list[str]:
    """The options of `add_run_options` as words of a command line."""
    words = ["--exp", options.exp, *(["--tiny"] if options.tiny else []), *(["--cpu"] if options.cpu else [])]
    for name in ("model", "medquad", "afrimedqa"):
        if (value := getattr(options, name)) is not None:
            words += [f"--{name}", value]
    words += [word for name, source in options.data for word in ("--data", f"{name}={source}")]
    return words + (["--set", *options.set] if options.set else [])


def locations(options: argparse.Namespace) -> Locations:
    """The values of `--model`, `--medquad`, `--afrimedqa` and `--data` by `section.key`; None if not given.

    Raises:
        UserError: a name is given twice with `--data`.
    """
    return {"model.base": options.model, **data_locations(options)}


def data_locations(options: argparse.Namespace) -> Locations:
    """As `locations`, for the data options only."""
    return {
        "data.medquad": options.medquad,
        "data.afrimedqa": options.afrimedqa,
        "data.files": own_sources(options) or None,
    }


def duration(text: str) -> float:
    """`90m`, `1h30m` or `45s` in seconds.

    Raises:
        argparse.ArgumentTypeError: the text is no duration, or the duration is zero.
    """
    found = DURATION.fullmatch(text)
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups()) if found else (0, 0, 0, 0)
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if not 0 < total < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r}: write 90m, 1h30m or 45s")
    return float(total)


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line of `train.py`. The attribute `locations` is the result of that function.

    Raises:
        UserError: a name is given twice with `--data`.
    """
    options = option_parser().parse_args(argv)
    options.locations = locations(options)
    return options


# ----------------------------------------------------------------------------------------------------
# The options of `medqa COMMAND`.

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


def command_parser() -> argparse.ArgumentParser:
    """The parser of `medqa COMMAND`."""
    parser = Parser(prog="medqa", description="Plan, evaluate, compare and export runs, and ask their models.")
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (_plan, _evaluate, _ask, _compare, _dashboard, _export, _verify_resume):
        add(commands)
    return parser


def _plan(commands: Commands) -> None:
    """Add `plan`."""
    parser = commands.add_parser(
        "plan",
        help="estimate memory, tokens, operations, time and checkpoint size of a run, before any weight is loaded",
        description="Estimates the memory of a run by part and at its peak, whether it fits and with which "
        "micro-batches, with and without 4-bit weights and gradient checkpointing; and tokens, padding, operations, "
        "time and the size of a checkpoint.",
        allow_abbrev=False,
    )
    add_run_options(parser)
    parser.add_argument(
        "--gpu", metavar="NAME_OR_GIB", help="the GPU to plan for: t4, l4, a10, a100, h100, h200, or its memory in GiB"
    )
    parser.add_argument(
        "--tflops", type=float, metavar="RATE", help="sustained TFLOP/s of the machine, to estimate the time"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, all memory in bytes")


def _evaluate(commands: Commands) -> None:
    """Add `evaluate`."""
    parser = commands.add_parser(
        "evaluate",
        help="evaluate a run's adapter on held-out rows against the baseline, with confidence intervals",
        description="Measures loss, generated answers, multiple choice and red flags on rows that training has not "
        "seen. The results go to the console, to RUN/evaluation.json, row by row to RUN/evaluation.jsonl, and to W&B. "
        "The baseline is computed only once.",
        allow_abbrev=False,
    )
    _add_adapter_options(parser, "RUN", "the directory of a run")
    parser.add_argument("--tasks", metavar="A,B", help="default: loss,generation,mcq,probes")
    parser.add_argument("--limit", type=int, metavar="N", help="evaluate only N rows of each split, and N questions")
    parser.add_argument(
        "--show",
        nargs="+",
        metavar=("worst|best|random", "N"),
        help="evaluate nothing, but show rows of the last evaluation: the N (default 5) with the worst or the best "
        "change from the baseline, or N random ones",
    )
    parser.add_argument("--medquad", metavar="SOURCE", help="where MedQuAD is now, if it was moved")
    parser.add_argument("--afrimedqa", metavar="SOURCE", help="where AfriMed-QA is now, if it was moved")
    add_data_option(parser, "where your own data are now, if they were moved; repeatable")


def _ask(commands: Commands) -> None:
    """Add `ask`."""
    parser = commands.add_parser(
        "ask",
        help="answer questions with an adapter",
        description="Answers one question. Without QUESTION it asks for questions at the terminal; if questions are "
        "piped in, it prints a JSON line for each line. Each question stands alone, as in training. Not medical "
        "advice.",
        allow_abbrev=False,
    )
    _add_adapter_options(parser, "RUN_OR_ADAPTER", "the directory of a run or of an adapter, or an adapter on the hub")
    parser.add_argument("question", nargs="?", metavar="QUESTION", help="in quotation marks")
    parser.add_argument("--json", action="store_true", help="print a JSON line for each answer")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="also show the answers of the base model, with the prompt of training and in its own chat template",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=256,
        metavar="N",
        help="maximum number of tokens of an answer (default 256)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="sampling temperature; 0 (default) decodes greedily",
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="P",
        help="repetition penalty as in transformers; 1 (default) is no penalty",
    )
    parser.add_argument(
        "--prompt",
        choices=("instruction", "chat"),
        help="with --compare: the only prompt for the base model: the project's own prompt, or the base's own chat "
        "template (default: the prompt of training, and the template)",
    )


def _compare(commands: Commands) -> None:
    """Add `compare`."""
    parser = commands.add_parser(
        "compare",
        help="compare runs on the console and in one HTML page, and name the conclusions they do not support",
        description="Reads the directories of two runs or more, finished or not, and writes one page that needs no "
        "network: settings that differ, losses, perplexity, speed, memory, time, evaluations, sample answers; the "
        "conclusions that the comparison does not support, and the commands of runs that would support them.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="directories that train.py wrote, two or more"
    )
    parser.add_argument("--out", type=Path, default=Path("compare.html"), metavar="FILE", help="default: compare.html")
    parser.add_argument("--force", action="store_true", help="replace a file that this command did not write")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON instead of tables")


def _dashboard(commands: Commands) -> None:
    """Add `dashboard`."""
    parser = commands.add_parser(
        "dashboard",
        help="create a W&B workspace with the metrics of runs: loss, loss by source, speed, memory, samples",
        description="Creates a new workspace in a W&B project, and prints its URL.",
        allow_abbrev=False,
    )
    parser.add_argument("--project", metavar="NAME", help="default: WANDB_PROJECT, or medqa")
    parser.add_argument("--entity", metavar="NAME", help="user or team; default: WANDB_ENTITY, or the account's own")
    parser.add_argument("--name", metavar="NAME", help="name of the workspace")
    parser.add_argument(
        "--json", action="store_true", help="print the workspace as JSON instead of creating it; needs no network"
    )


def _verify_resume(commands: Commands) -> None:
    """Add `verify-resume`."""
    parser = commands.add_parser(
        "verify-resume",
        help="kill and resume a run repeatedly, and check that its results are bit for bit those without kills",
        description="Runs the experiment without interruption, and a second time with kills at random moments and a "
        "resume after each. Compares adapter, optimizer, schedule, data order and every metric; prints a certificate.",
        allow_abbrev=False,
    )
    add_run_options(parser)
    parser.add_argument("--kills", type=int, default=6, metavar="N", help="number of kills (default 6)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments (default 0)")
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="default: outputs/verify-resume/<run>")


def _add_adapter_options(parser: argparse.ArgumentParser, name: str, what: str) -> None:
    """Add the options that choose an adapter."""
    parser.add_argument("adapter", metavar=name, help=what)
    parser.add_argument("--checkpoint", metavar="best|STEP", help="use this checkpoint instead of the final adapter")
    parser.add_argument("--model", metavar="ID_OR_DIR", help="where the base model is now, if it was moved")
    parser.add_argument("--cpu", action="store_true", help="use the CPU even if there is a GPU")


def _export(commands: Commands) -> None:
    """Add `export`."""
    parser = commands.add_parser(
        "export",
        help="merge base and adapter into one model: safetensors for servers, or GGUF for llama.cpp and Ollama",
        description="Merges the adapter into the weights it was trained on, compares the merged model with the adapter "
        "on held-out prompts, and refuses to write it if they differ. Adds tokenizer, prompt and model card. If the "
        "adapter was trained on 4-bit weights, it can be merged into the unquantized weights instead.",
        allow_abbrev=False,
    )
    _add_adapter_options(parser, "RUN", "a run's directory, an adapter's, or an adapter's id on the hub")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="output directory; must not exist yet")
    parser.add_argument("--format", choices=("merged", "gguf"), default="merged", help="default: merged")
    parser.add_argument(
        "--outtype",
        choices=("f32", "f16", "bf16", "q8_0"),
        help="merged: f32, f16, bf16 (default: f16; f32 for a base kept in float32); gguf: f16 (default), q8_0",
    )
    parser.add_argument(
        "--weights",
        choices=("trained", "base"),
        default="trained",
        help="of a run with 4-bit weights: merge into the weights that training computed with (default, dequantized "
        "from 4 bits), or into the base's own weights",
    )
    parser.add_argument(
        "--push", metavar="REPO", help="upload the directory to this repository of the hub (created as private)"
    )
