"""The options of `train.py`: where things are and how to start. The experiment file owns every number."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from medqa.errors import UserError

NOT_YET = ("--stop-after", "--persist-to", "--data")


def option_parser() -> argparse.ArgumentParser:
    """The parser; a wrong option ends the process with exit code 2 and says so."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Fine-tune a language model on medical questions and answers with LoRA. Run it again to go on.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--exp", required=True, metavar="NAME", help="runs experiments/NAME.yaml; the path of a YAML file works too")
    add("--tiny", action="store_true", help="the same recipe on the embedded model and data: offline, about a minute")
    add("--model", metavar="ID_OR_DIR", help="base model instead of the file's (hub id or local directory)")
    source = "instead of the file's: a local file, kaggle:OWNER/NAME, a hub dataset id, or none"
    add("--medquad", metavar="SOURCE", help=f"MedQuAD {source}; a directory of its XML files works too")
    add("--afrimedqa", metavar="SOURCE", help=f"AfriMed-QA {source}")
    add("--output-dir", type=Path, metavar="DIR", help="default: outputs/<exp>, with what --set changed in the name")
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="section.key=value",
        help="overrides the experiment file",
    )
    add("--fresh", action="store_true", help="start over in the output directory instead of resuming")
    add("--cpu", action="store_true", help="train on the CPU although there is a GPU")
    for name in NOT_YET:
        add(name, help=argparse.SUPPRESS)
    return parser


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, with `locations`: `section.key` to what `--model`, `--medquad` and `--afrimedqa` say."""
    options = option_parser().parse_args(argv)
    options.locations = {
        "model.base": options.model,
        "data.medquad": options.medquad,
        "data.afrimedqa": options.afrimedqa,
    }
    return options


def refuse_not_yet(options: argparse.Namespace) -> None:
    """Refuse options of later versions by name.

    Raises:
        UserError: one of them was given.
    """
    for name in NOT_YET:
        if getattr(options, name.strip("-").replace("-", "_")) is not None:
            raise UserError(f"{name}: not in this version yet")
