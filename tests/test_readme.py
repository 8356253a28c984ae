"""README and CONTRIBUTING say what is: code is the code, commands parse and name what exists, the tree is the tree."""

import importlib.util
import inspect
import json
import re
import shlex
from pathlib import Path

import pytest

from benchmarks.results import parse_options
from medqa.__main__ import main
from medqa.command_options import command_parser
from medqa.config import Experiment, flat
from medqa.experiment_file import find_experiment, load_experiment
from medqa.options import locations, option_parser
from medqa.training.loop import train_step

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BOTH = README + CONTRIBUTING
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def blocks(text: str) -> list[tuple[str, str]]:
    """Language and content of each block of code."""
    return re.findall(r"```(\w*)\n(.*?)```", text, flags=re.DOTALL)


def commands(text: str) -> list[str]:
    """The lines of the blocks without a language, and what stands in backticks and begins as a command does."""
    lines = [line.split("  #")[0].strip() for kind, block in blocks(text) if not kind for line in block.splitlines()]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return [*filter(None, lines), *re.findall(r"`((?:make|python|ruff) [^`]+)`", prose)]


BLOCKS = blocks(README)
COMMANDS = [line.split("  #")[0].strip() for kind, block in BLOCKS if not kind for line in block.splitlines()]
LAUNCHES = [command for command in COMMANDS if command.startswith("accelerate launch")]


def test_the_code_shown_is_the_code():
    shown = [block for kind, block in BLOCKS if kind == "python"]
    assert len(shown) == 2  # the other one asks an adapter
    assert shown[0] == inspect.getsource(train_step)


def test_there_are_launch_lines():
    assert len(LAUNCHES) == 16


@pytest.mark.parametrize("command", LAUNCHES)
def test_launch_lines_parse(command):
    words = shlex.split(command)
    options = option_parser().parse_args(words[words.index("train.py") + 1 :])
    load_experiment(options.exp, tiny=options.tiny, locations=locations(options), sets=options.set)


def test_commands_of_the_package_parse():
    found = [shlex.split(command)[3:] for command in COMMANDS if command.startswith("python -m medqa ")]
    assert found
    for words in found:
        options, rest = command_parser().parse_known_args(words)
        assert not rest
        if "exp" in options:
            load_experiment(options.exp, tiny=options.tiny, sets=options.set)


@pytest.mark.parametrize(
    "words, said",
    [(["--exp", "exp_9"], "no such experiment"), (["--exp", "exp_001", "--kills", "0"], "--kills 0: at least 1")],
)
def test_verify_resume_refuses_what_it_cannot_do(words, said, capsys):
    assert main(["verify-resume", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_the_certificate_of_the_command_line(tmp_path, capfd):
    words = ["--exp", "exp_003", "--tiny", "--kills", "2", "--output-dir", str(tmp_path), "--cpu"]
    assert main(["verify-resume", *words, "--set", "training.max_steps=20", "evaluation.samples=0"]) == 0
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert found["bitwise_equal"]
    assert len(found["kills"]) == 2
    assert json.loads((tmp_path / "certificate.json").read_text()) == found


def test_inline_launch_lines_name_experiments():
    named = re.findall(r"--exp (\w+)", README)
    assert len(named) >= 6
    for name in named:
        find_experiment(name)


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, flags=re.MULTILINE))
    wanted = set(re.findall(r"(?:^ *|`)make ([a-z-]+)", BOTH, flags=re.MULTILINE))
    assert {"demo", "test", "test-all", "gpu-check", "results", "bench", "chaos", "fuzz", "lint"} <= wanted <= targets


def test_what_make_results_is_given_parses():
    given = re.findall(r'RESULTS_ARGS="([^"]*)"', BOTH)
    assert len(given) >= 6
    assert "benchmarks.results $(RESULTS_ARGS)" in MAKEFILE
    for words in [*given, "--table"]:
        parse_options(shlex.split(words))


def test_what_contributing_says_to_run_is_there():
    found = [shlex.split(command) for command in commands(CONTRIBUTING)]
    modules = [words[2] for words in found if words[:2] == ["python", "-m"]]
    assert set(modules) == {"medqa", "benchmarks.results", "tests.test_trajectory"}
    for module in modules:
        assert importlib.util.find_spec(module), module
    for words in found:
        if words[:3] == ["python", "-m", "medqa"]:
            options, rest = command_parser().parse_known_args(words[3:])
            assert not rest
            load_experiment(options.exp, tiny=options.tiny, sets=options.set)
        if words[:3] == ["python", "-m", "tests.test_trajectory"]:
            assert words[3:] in ([], ["--record"])
        assert words[0] in ("make", "python", "ruff"), words
        for file in re.findall(r"PYTEST_ARGS=(\S+)", " ".join(words)):
            assert (ROOT / file).is_file()


def test_what_contributing_names_exists():
    places = re.findall(r"`((?:medqa|tests|benchmarks|experiments|results|\.ci)/[^`<]*)`", CONTRIBUTING)
    assert len(places) >= 25
    for place in places:
        assert (ROOT / place).exists(), place
    for name, place in re.findall(r"`([A-Z]+)`(?: and `[A-Z]+`)?(?: (?:in|of)) `([^`]+)`", CONTRIBUTING):
        assert re.search(rf"^{name}\b", (ROOT / place).read_text(), flags=re.MULTILINE), (name, place)


def test_keys_named_are_keys():
    keys = set(flat(Experiment()))
    sections = "|".join(Experiment.model_fields)
    prose = re.sub(r"```python.*?```", "", README, flags=re.DOTALL)
    named = set(re.findall(rf"\b((?:{sections})\.[a-z_0-9]+)\b", prose))
    named = {name for name in named if not name.endswith((".py", ".md", ".csv", ".json"))}
    assert len(named) >= 12
    assert not named - keys


def test_the_tree_is_the_tree():
    tree = next(block for kind, block in BLOCKS if not kind and "loop.py" in block)
    shown = re.findall(r"([a-z_]+\.py)\b", tree)
    files = [p.name for p in (ROOT / "medqa").rglob("*.py") if p.name != "__init__.py" and p.parent.name != "tiny"]
    assert len(files) >= 25
    assert set(shown) == {*files, "train.py"}


def test_paths_linked_exist():
    for path in re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", BOTH):
        assert (ROOT / path).exists(), path
    headings = {re.sub(r"[^a-z0-9 -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in BOTH.splitlines()}
    anchors = re.findall(r"\]\((?:README\.md)?#([^)]+)\)", BOTH)
    assert len(anchors) >= 3
    assert set(anchors) <= headings
