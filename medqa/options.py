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
    """A parser whose messages about wrong options are shown as all other messages are."""

    def error(self, message: str) -> NoReturn:
        """Show the message and the usage, and exit with code 2."""
        super().error(printable(message))


def option_parser() -> argparse.ArgumentParser:
    """The parser; a wrong option ends the process with exit code 2 and says so."""
    parser = Parser(
        prog="train.py",
        description="Fine-tune a language model on medical questions and answers. The same command resumes a run.",
        allow_abbrev=False,
    )
    add_run_options(parser)
    add = parser.add_argument
    add("--output-dir", type=Path, metavar="DIR", help="default: outputs/<exp>, with what --set changed in the name")
    add("--fresh", action="store_true", help="start over in the output directory instead of resuming")
    add(
        "--stop-after",
        type=duration,
        metavar="90m",
        help="save and stop in time (1h30m, 45s); the same command resumes",
    )
    add("--persist-to", type=Path, metavar="DIR", help="copy checkpoints and results there too, verified")
    return parser


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what is run, for every command that runs an experiment."""
    add = parser.add_argument
    add("--exp", required=True, metavar="NAME", help="runs experiments/NAME.yaml; the path of a YAML file works too")
    add("--tiny", action="store_true", help="the same recipe on the embedded model and data: offline, about a minute")
    add("--model", metavar="ID_OR_DIR", help="base model instead of the file's (hub id or local directory)")
    source = "instead of the file's: a local file, kaggle:OWNER/NAME, a hub dataset id (OWNER/NAME[:CONFIG]), or none"
    add("--medquad", metavar="SOURCE", help=f"MedQuAD {source}; a directory of its XML files works too")
    add("--afrimedqa", metavar="SOURCE", help=f"AfriMed-QA {source}")
    add_data_option(parser, "data of your own beside them, repeatable: .csv, .jsonl, .parquet or a hub dataset id")
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="section.key=value",
        help="overrides the experiment file",
    )
    add("--cpu", action="store_true", help="train on the CPU although there is a GPU")


def add_data_option(parser: argparse.ArgumentParser, about: str) -> None:
    """`--data`, once for each source."""
    parser.add_argument("--data", type=own_source, action="append", default=[], metavar="NAME=SOURCE", help=about)


def own_source(text: str) -> tuple[str, str]:
    """`NAME=SOURCE` as a pair.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    name, _, source = text.partition("=")
    if not name.strip() or not source.strip():
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME=SOURCE, for example notes=notes.csv")
    return name.strip(), source.strip()


def own_sources(options: argparse.Namespace) -> dict[str, str]:
    """What all `--data` say, name to source.

    Raises:
        UserError: a name is given twice.
    """
    names = [name for name, _ in options.data]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"--data: {', '.join(twice)}: given more than once; give each source a name of its own")
    return dict(options.data)


def run_words(options: argparse.Namespace) -> list[str]:
    """The options of `add_run_options` as words again."""
    words = ["--exp", options.exp, *(["--tiny"] if options.tiny else []), *(["--cpu"] if options.cpu else [])]
    for name in ("model", "medquad", "afrimedqa"):
        if (value := getattr(options, name)) is not None:
            words += [f"--{name}", value]
    words += [word for name, source in options.data for word in ("--data", f"{name}={source}")]
    return words + (["--set", *options.set] if options.set else [])


def locations(options: argparse.Namespace) -> Locations:
    """`section.key` to what `--model`, `--medquad`, `--afrimedqa` and `--data` say.

    Raises:
        UserError: two `--data` of one name.
    """
    return {"model.base": options.model, **data_locations(options)}


def data_locations(options: argparse.Namespace) -> Locations:
    """As `locations`, of the data alone."""
    return {
        "data.medquad": options.medquad,
        "data.afrimedqa": options.afrimedqa,
        "data.files": own_sources(options) or None,
    }


def duration(text: str) -> float:
    """`90m`, `1h30m` or `45s` in seconds.

    Raises:
        argparse.ArgumentTypeError: it is none, or nothing at all.
    """
    found = DURATION.fullmatch(text)
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups()) if found else (0, 0, 0, 0)
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if not 0 < total < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r}: write 90m, 1h30m or 45s")
    return float(total)


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, with `locations` as that function gives them.

    Raises:
        UserError: two `--data` of one name.
    """
    options = option_parser().parse_args(argv)
    options.locations = locations(options)
    return options


# ----------------------------------------------------------------------------------------------------
# The options of `medqa COMMAND`.

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


def command_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = Parser(prog="medqa", description="What is done before and after a run.")
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (_plan, _evaluate, _ask, _compare, _dashboard, _export, _verify_resume):
        add(commands)
    return parser


def _plan(commands: Commands) -> None:
    """`plan`."""
    parser = commands.add_parser(
        "plan",
        help="memory, tokens, operations, time and checkpoint sizes of a run, before any weight is loaded",
        description="Memory by part and at its peak, whether it fits and with which micro-batches, with and without "
        "4-bit weights and gradient checkpointing; tokens, padding, operations, time, bytes of a checkpoint.",
        allow_abbrev=False,
    )
    add_run_options(parser)
    parser.add_argument("--gpu", metavar="NAME_OR_GIB", help="plan for t4, l4, a10, a100, h100, h200 or so many GiB")
    parser.add_argument("--tflops", type=float, metavar="RATE", help="TFLOP/s that the machine keeps up, for the time")
    parser.add_argument("--json", action="store_true", help="print JSON, all memory in bytes")


def _evaluate(commands: Commands) -> None:
    """`evaluate`."""
    parser = commands.add_parser(
        "evaluate",
        help="how good a run's adapter is on held-out rows, compared with the baseline, with intervals",
        description="Loss, generated answers, multiple choice and red flags on rows that training has not seen; on the "
        "console, in RUN/evaluation.json and on W&B. The baseline is computed once, and kept.",
        allow_abbrev=False,
    )
    _add_adapter_options(parser, "RUN", "the directory of a run")
    parser.add_argument(
        "--tasks", default="loss,generation,mcq,probes", metavar="A,B", help="default: loss,generation,mcq,probes"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="look at N rows of each split, and N questions")
    parser.add_argument("--medquad", metavar="SOURCE", help="where MedQuAD is now, if not where it was")
    parser.add_argument("--afrimedqa", metavar="SOURCE", help="where AfriMed-QA is now, if not where it was")
    add_data_option(parser, "where data of your own are now, if not where they were; repeatable")


def _ask(commands: Commands) -> None:
    """`ask`."""
    parser = commands.add_parser(
        "ask",
        help="ask an adapter something",
        description="One answer; without a question, question after question at the terminal, or, where questions are "
        "piped in, a JSON line for each line. Each stands alone, as in training. Not medical advice.",
        allow_abbrev=False,
    )
    _add_adapter_options(parser, "RUN_OR_ADAPTER", "the directory of a run or of an adapter, or an adapter on the hub")
    parser.add_argument("question", nargs="?", metavar="QUESTION", help="in quotation marks")
    parser.add_argument("--json", action="store_true", help="print a JSON line for each answer")
    parser.add_argument("--compare", action="store_true", help="show the base model's answer beside it")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="where an answer is cut (256)")


def _compare(commands: Commands) -> None:
    """`compare`."""
    parser = commands.add_parser(
        "compare",
        help="runs side by side, on the console and as one HTML page, and what they do not allow to conclude",
        description="Reads the directories of two runs or more, finished or not, and writes one page that needs no "
        "network: settings that differ, losses, perplexity, speed, memory, time, evaluations, sample answers; which "
        "conclusions the comparison does not allow, and the commands of the runs that would allow them.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="directories that train.py wrote, two or more"
    )
    parser.add_argument("--out", type=Path, default=Path("compare.html"), metavar="FILE", help="default: compare.html")
    parser.add_argument("--force", action="store_true", help="replace a file that this command did not write")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON instead of tables")


def _dashboard(commands: Commands) -> None:
    """`dashboard`."""
    parser = commands.add_parser(
        "dashboard",
        help="a workspace on W&B with what runs log: loss, by source, speed and memory, samples",
        description="Creates a workspace in a W&B project, each time a new one, and prints its address.",
        allow_abbrev=False,
    )
    parser.add_argument("--project", metavar="NAME", help="default: WANDB_PROJECT, or medqa")
    parser.add_argument("--entity", metavar="NAME", help="user or team; default: WANDB_ENTITY, or the account's own")
    parser.add_argument("--name", metavar="NAME", help="what the workspace is called")
    parser.add_argument("--json", action="store_true", help="print what would be created, without a network")


def _verify_resume(commands: Commands) -> None:
    """`verify-resume`."""
    parser = commands.add_parser(
        "verify-resume",
        help="kill a run again and again, and see that it ends bit for bit as if it had been left alone",
        description="Runs the experiment straight, then again, killed at random moments and resumed each time; "
        "compares adapter, optimizer, schedule, data order and every metric, and prints a certificate.",
        allow_abbrev=False,
    )
    add_run_options(parser)
    parser.add_argument("--kills", type=int, default=6, metavar="N", help="how many times (default 6)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="default: outputs/verify-resume/<run>")


def _add_adapter_options(parser: argparse.ArgumentParser, name: str, what: str) -> None:
    """The options that say which adapter is meant."""
    parser.add_argument("adapter", metavar=name, help=what)
    parser.add_argument("--checkpoint", metavar="best|STEP", help="another adapter of the run than its last")
    parser.add_argument("--model", metavar="ID_OR_DIR", help="where the base model is now, if not where it was")
    parser.add_argument("--cpu", action="store_true", help="use the CPU although there is a GPU")


def _export(commands: Commands) -> None:
    """`export`."""
    parser = commands.add_parser(
        "export",
        help="base and adapter as one model: plain safetensors for servers, or GGUF for llama.cpp and Ollama",
        description="Merges the adapter into the weights it was trained on, measures the result against it on held-out "
        "prompts, and refuses one that differs; with tokenizer, prompt and model card.",
        allow_abbrev=False,
    )
    _add_adapter_options(parser, "RUN", "a run's directory, an adapter's, or an adapter's id on the hub")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="a directory that is not there yet")
    parser.add_argument("--format", choices=("merged", "gguf"), default="merged", help="default: merged")
    parser.add_argument(
        "--outtype",
        choices=("f32", "f16", "bf16", "q8_0"),
        help="merged: f32, f16, bf16 (default: f16; f32 for a base kept in float32); gguf: f16 (default), q8_0",
    )
    parser.add_argument("--push", metavar="REPO", help="hand the folder to this repository of the hub (made private)")
