"""README, CONTRIBUTING and docs/ say what is: code is code, commands parse, what is named exists, links resolve."""

import importlib.util
import json
import re
import runpy
import shlex
import textwrap

import pytest
from documents import BEGINNINGS, PAGES, ROOT, TEXTS, all_commands, blocks, prose, slugs

from benchmarks.results import parse_options
from medqa.__main__ import COMMANDS as COMMANDS_OF_PACKAGE
from medqa.__main__ import main
from medqa.config import Experiment, flat
from medqa.config_file import find_experiment, load_experiment
from medqa.options import command_parser, locations, option_parser

README, CONTRIBUTING = TEXTS["README.md"], TEXTS["CONTRIBUTING.md"]
EVERYTHING = "\n".join(TEXTS.values())
LOOP = ROOT / "medqa" / "training" / "loop.py"
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
COMMANDS = all_commands()
NAMES = [[name] for name in COMMANDS_OF_PACKAGE]  # `medqa evaluate` in prose names the command
NOT_OURS = {  # options of accelerate, torchrun, Slurm, W&B and others that documents name
    "--config_file", "--num_processes", "--machine_rank", "--main_process_ip", "--main_process_port", "--multi_gpu",
    "--nproc_per_node", "--nodes", "--gpus-per-node", "--signal", "--count", "--record", "--experiments",
    "--processes", "--outputs", "--table", "--examples", "--no-deps", "--editable",
}  # fmt: skip


def train_words(command: str) -> list[str] | None:
    """The options of `train.py` in a command that starts it, or hands them on to it."""
    for script in ("train.py", "launch/slurm.sbatch"):
        if f" {script} " in f"{command} ":
            words = shlex.split(command)
            return words[words.index(script) + 1 :]
    return None


def package_words(command: str) -> list[str] | None:
    """What follows `medqa`, or `-m medqa`, in a command."""
    words = shlex.split(command)
    if words[:1] == ["medqa"]:
        return None if words[1:] in NAMES else words[1:]
    if words[0] in ("python", "torchrun") and "medqa" in words and words[words.index("medqa") - 1] == "-m":
        return words[words.index("medqa") + 1 :]
    return None


LAUNCHES = [(name, command) for name, command in COMMANDS if train_words(command) is not None]
OF_PACKAGE = [(name, command) for name, command in COMMANDS if package_words(command) is not None]


def test_every_page_is_linked_from_the_readme_or_a_page_that_is():
    assert len(PAGES) >= 10
    linked = set(re.findall(r"\]\((?:docs/)?([\w-]+\.md)(?:#[^)]*)?\)", EVERYTHING))
    assert {path.name for path in PAGES} <= linked


def test_the_readme_can_be_skimmed():
    assert len(README.splitlines()) <= 200


def test_the_code_shown_is_the_code():
    """Each part of it, between the lines `...` that leave something out, stands in the loop, apart from indentation."""
    (shown,) = (block for kind, block in blocks(README) if kind == "python" and "micro_batch" in block)
    code = LOOP.read_text(encoding="utf-8").splitlines()
    parts = [part.strip("\n").splitlines() for part in re.split(r"^ *\.\.\.$", shown, flags=re.MULTILINE)]
    assert sum(map(len, parts)) >= 12
    for part in filter(None, parts):
        wanted = textwrap.dedent("\n".join(part))
        places = range(len(code) - len(part) + 1)
        assert any(textwrap.dedent("\n".join(code[i : i + len(part)])) == wanted for i in places), wanted


def test_the_map_has_every_folder():
    shown = set(re.findall(r"\[`[\w./]+/`\]\(([\w./]+)\)", README))
    packages = {path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("medqa/*/__init__.py")}
    assert packages >= {"medqa/data", "medqa/model", "medqa/evaluation", "medqa/training", "medqa/tiny"}
    assert shown == packages | {
        "medqa", "experiments", "launch", "notebooks", "benchmarks", "results", "tests", "harness", "fuzz", "docs",
    }  # fmt: skip


def test_commands_are_shell_code():
    """A line of a shell block that is no command here would be tested by nothing."""
    for name, text in TEXTS.items():
        for line in [line for kind, block in blocks(text) if kind == "bash" for line in block.splitlines()]:
            assert line.strip().startswith(BEGINNINGS), (name, line)


def test_there_are_launch_lines():
    assert len({command for _, command in LAUNCHES}) >= 20
    assert len({command for _, command in OF_PACKAGE}) >= 10


@pytest.mark.parametrize("name, command", LAUNCHES)
def test_launch_lines_parse(name, command):
    options = option_parser().parse_args(train_words(command))
    load_experiment(options.exp, tiny=options.tiny, locations=locations(options), sets=options.set)


@pytest.mark.parametrize("name, command", OF_PACKAGE)
def test_commands_of_the_package_parse(name, command):
    options, rest = command_parser().parse_known_args(package_words(command))
    assert not rest
    if "exp" in options:
        load_experiment(options.exp, tiny=options.tiny, locations=locations(options), sets=options.set)


def test_configurations_of_the_launcher_exist():
    files = re.findall(r"(?:--config_file |MEDQA_LAUNCH_CONFIG=)(\S+)", "\n".join(command for _, command in COMMANDS))
    assert len(files) >= 4
    for file in files:
        assert (ROOT / file).is_file(), file


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


def test_experiments_named_exist():
    named = set(re.findall(r"\bexp_\w+\b", EVERYTHING))
    assert len(named) >= 4
    for name in named:
        find_experiment(name)


def test_options_named_are_options():
    """In prose and tables, where no parser reads them."""
    commands_of = next(action for action in command_parser()._actions if action.dest == "command").choices
    parsers = [option_parser(), *commands_of.values()]
    known = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    named = set(re.findall(r"`(--[a-z][a-z_-]*)", prose(EVERYTHING)))
    assert len(named) >= 12
    assert named <= known | NOT_OURS


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, flags=re.MULTILINE))
    wanted = set(re.findall(r"(?:^ *|`)make ([a-z-]+)", EVERYTHING, flags=re.MULTILINE))
    assert {"demo", "test", "test-slow", "gpu-check", "results", "bench", "chaos", "fuzz", "lint"} <= wanted <= targets


def test_what_make_results_is_given_parses():
    given = re.findall(r'RESULTS_ARGS="([^"]*)"', EVERYTHING)
    assert len(given) >= 6
    assert "benchmarks.results $(RESULTS_ARGS)" in MAKEFILE
    for words in [*given, "--table"]:
        parse_options(shlex.split(words))


def test_modules_that_are_run_exist():
    found = [words[2] for words in (shlex.split(command) for _, command in COMMANDS) if words[1:2] == ["-m"]]
    assert {"benchmarks.results", "benchmarks.recipes", "tests.test_trajectory"} <= set(found)
    for module in found:
        assert importlib.util.find_spec(module), module


def test_what_contributing_says_to_run_is_there():
    for words in (shlex.split(command) for name, command in COMMANDS if name == "CONTRIBUTING.md"):
        if words[:3] == ["python", "-m", "tests.test_trajectory"]:
            assert words[3:] in ([], ["--record"])
        for file in re.findall(r"PYTEST_ARGS=(\S+)", " ".join(words)):
            assert (ROOT / file).is_file()


def test_paths_named_exist():
    folders = r"medqa|tests|benchmarks|experiments|results|launch|notebooks|docs|\.ci"
    named = {
        (name, path)
        for name, text in TEXTS.items()
        for path in re.findall(rf"`((?:{folders})/(?!NAME)[^`<*=\s]*|requirements[\w-]*\.txt|\w+\.py)`", prose(text))
    }
    assert len(named) >= 35
    for name, path in named:
        assert (ROOT / path).exists(), (name, path)
    for name, path in re.findall(r"`([A-Z]+)`(?: and `[A-Z]+`)?(?: (?:in|of)) `([^`]+\.py)`", CONTRIBUTING):
        assert re.search(rf"^{name}\b", (ROOT / path).read_text(), flags=re.MULTILINE), (name, path)


def test_keys_named_are_keys():
    keys = set(flat(Experiment()))
    sections = "|".join(Experiment.model_fields)
    text = re.sub(r"```python.*?```", "", EVERYTHING, flags=re.DOTALL)
    named = set(re.findall(rf"(?<![\w./])((?:{sections})\.[a-z_0-9]+)\b(?![.(])", text))
    named = {name for name in named if not name.endswith((".py", ".md", ".csv", ".json", ".jsonl"))}
    assert len(named) >= 25
    assert not named - keys


def test_the_configuration_page_is_what_the_configuration_says():
    """`python docs/make_configuration.py` writes it."""
    maker = runpy.run_path(str(ROOT / "docs" / "make_configuration.py"))
    assert TEXTS["docs/configuration.md"] == maker["page"]()
    keys = [f"{name}.{key}" for name, section in Experiment() for key in type(section).model_fields]
    assert len(keys) >= 45
    for key in keys:
        assert f"| `{key.split('.')[1]}` |" in TEXTS["docs/configuration.md"], key


def test_links_resolve():
    anchors = 0
    for name, text in TEXTS.items():
        for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(text)):
            place, _, anchor = target.partition("#")
            path = (ROOT / name).parent / place if place else ROOT / name
            assert path.exists(), (name, target)
            if anchor:
                anchors += 1
                assert anchor in slugs(path.read_text(encoding="utf-8")), (name, target)
    assert anchors >= 10
