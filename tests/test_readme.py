"""The README says what is: its code is the code, its commands parse and name what exists, its tree is the tree."""

import inspect
import json
import re
import shlex
from pathlib import Path

import pytest

from medqa.__main__ import main
from medqa.command_options import command_parser
from medqa.config import Experiment, flat
from medqa.experiment_file import find_experiment, load_experiment
from medqa.options import option_parser
from medqa.training.loop import train_step

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line.split("  #")[0].strip() for kind, block in BLOCKS if not kind for line in block.splitlines()]
LAUNCHES = [command for command in COMMANDS if command.startswith("accelerate launch")]


def test_the_code_shown_is_the_code():
    shown = [block for kind, block in BLOCKS if kind == "python"]
    assert len(shown) == 2  # the other one asks an adapter
    assert shown[0] == inspect.getsource(train_step)


def test_there_are_launch_lines():
    assert len(LAUNCHES) == 12


@pytest.mark.parametrize("command", LAUNCHES)
def test_launch_lines_parse(command):
    words = shlex.split(command)
    options = option_parser().parse_args(words[words.index("train.py") + 1 :])
    load_experiment(options.exp, tiny=options.tiny, sets=options.set)


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
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    wanted = set(re.findall(r"(?:^|`)make ([a-z-]+)", README, flags=re.MULTILINE))
    assert {"demo", "test", "test-all", "gpu-check"} <= wanted <= targets


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
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / path).exists(), path
