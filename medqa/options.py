"""The options of `train.py`: where things are and how to start. The experiment file owns every number."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from medqa.errors import UserError
from medqa.experiment_file import Locations
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
        description="Fine-tune a language model on medical questions and answers with LoRA. Run it again to go on.",
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
        help="save and stop in time (1h30m, 45s); the same command goes on",
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
