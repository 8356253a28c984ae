"""`python -m medqa COMMAND ...`: what is done before and after a run. No command is in this version yet."""

import argparse
import sys
from collections.abc import Sequence

from medqa.errors import UserError, exit_code

NOT_YET = ("plan", "evaluate", "ask", "compare", "export", "verify-resume")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m medqa", description="Not in this version yet.")
    parser.add_argument("command", choices=NOT_YET)
    options, _ = parser.parse_known_args(argv)
    return exit_code(lambda: _refuse(options.command))


def _refuse(command: str) -> None:
    """Say that a command is not there yet.

    Raises:
        UserError: always.
    """
    raise UserError(f"python -m medqa {command}: not in this version yet")


if __name__ == "__main__":
    sys.exit(main())
