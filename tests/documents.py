"""The documents for users, and the commands in them, for the tests that hold them to the code."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in DOCUMENTS}
BEGINNINGS = (
    ".", "accelerate launch", "done", "for ", "git clone", "i=0", "make", "medqa", "pip install", "pre-commit",
    "python", "ruff", "sbatch", "torchrun", "wandb", "WANDB_",
)  # fmt: skip


def blocks(text: str) -> list[tuple[str, str]]:
    """Language and content of each block of code."""
    return re.findall(r"^ *```(\w*)\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE)


def prose(text: str) -> str:
    """The text without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)


def commands(text: str) -> Iterator[str]:
    """Each simple command of the blocks of shell code; the variable of a `for` loop has its first value."""
    for block in (block for kind, block in blocks(text) if kind == "bash"):
        for line in block.splitlines():
            line = line.split("  #")[0].strip()
            loops = {name: words.split()[0] for name, words in re.findall(r"for (\w+) in ([^;]+);", line)}
            for part in re.split(r"; (?:do )?|& (?=\w)", line):
                part = re.sub(r"\$(\w+)", lambda found, loops=loops: loops.get(found[1], found[0]), part)
                part = re.sub(r"^(?:[A-Z_]+=\S* )+", "", part.strip())  # variables of the environment
                if part:
                    yield re.sub(r" >.*", "", part)


def inline_commands(text: str) -> list[str]:
    """What stands in backticks in the prose and begins as a command with arguments does; `...` leaves some out."""
    found = re.findall(r"`((?:medqa|python|accelerate launch|make|torchrun|sbatch) [^`]+)`", prose(text))
    return [command for command in found if not command.endswith(("...", "--help", "train.py", "-m medqa"))]


def all_commands() -> list[tuple[str, str]]:
    """Document and command, of all documents."""
    return [(name, found) for name, text in TEXTS.items() for found in (*commands(text), *inline_commands(text))]


def slugs(text: str) -> list[str]:
    """The anchors that GitHub gives the headings."""
    headings = re.findall(r"^#+ (.+)$", prose(text), flags=re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
