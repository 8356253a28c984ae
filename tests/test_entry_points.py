"""The `medqa` command: what pyproject.toml declares is the package's `main`, under one name however it starts."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import medqa.__main__
from medqa.config_file import load_yaml
from medqa.options import command_parser

ROOT = Path(__file__).resolve().parents[1]


def declared() -> EntryPoint:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert list(scripts) == ["medqa"]
    return EntryPoint("medqa", scripts["medqa"], "console_scripts")


def test_the_command_is_the_packages_main():
    assert declared().load() is medqa.__main__.main


def test_it_shows_its_help(capsys):
    with pytest.raises(SystemExit) as ended:
        declared().load()(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: medqa ")
    for command in medqa.__main__.COMMANDS:
        assert re.search(rf"^    {command} ", text, flags=re.MULTILINE), command


def test_every_command_shows_its_help(capsys):
    assert len(medqa.__main__.COMMANDS) >= 7
    for command in medqa.__main__.COMMANDS:
        with pytest.raises(SystemExit) as ended:
            command_parser().parse_args([command, "--help"])
        assert ended.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: medqa {command} ")


def test_python_m_medqa_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "medqa", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: medqa ")


def test_make_installs_the_command():
    assert "$(PIP) --no-deps --editable ." in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_the_hooks_before_a_commit_use_the_linter_of_the_tests():
    """Another version would format otherwise than `make lint` checks."""
    wanted = re.search(r"^ruff==\S+$", (ROOT / "requirements-dev.txt").read_text(encoding="utf-8"), re.MULTILINE)
    hooks = load_yaml((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"), "the hooks")["repos"][0]["hooks"]
    assert [hook["entry"].split()[:2] for hook in hooks] == [["ruff", "check"], ["ruff", "format"]]
    assert [hook["additional_dependencies"] for hook in hooks] == [[wanted[0]]] * 2


def test_what_the_type_checker_may_not_look_at_is_named_and_does_not_grow():
    found = [line for path in ROOT.glob("medqa/**/*.py") for line in path.read_text().splitlines() if "# type:" in line]
    assert len(found) <= 4
    assert all(re.search(r"# type: ignore\[[a-z-]+\]", line) for line in found)
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    assert settings["files"] == ["medqa", "train.py"]
    (left_out,) = settings["overrides"]
    assert left_out.keys() == {"module", "follow_imports"}
    assert not [name for name in left_out["module"] if name.startswith("medqa")]
    assert "\t$(BIN)/mypy\n" in (ROOT / "Makefile").read_text(encoding="utf-8")
