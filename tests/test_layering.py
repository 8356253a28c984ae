"""Imports run down the table of wings only; what only some runs need is imported where it is used; nothing unsafe."""

import ast
import os
import re
import subprocess
import symtable
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.processes import Forked

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "medqa"
FILES = sorted(PACKAGE.rglob("*.py"))
WINGS = ("data", "model", "evaluation", "training", "commands")  # each may import from those before it
TOP = {
    "__init__",
    "__main__",
    "cache",
    "config",
    "config_file",
    "errors",
    "files",
    "hub",
    "limited",
    "limits",
    "options",
    "places",
    "recorded",
    "terminal",
    "variables",
}
LAZY = {"gguf", "xllamacpp", "wandb", "bitsandbytes", "kagglehub", "matplotlib", "wandb_workspaces", "defusedxml"}
LAZY |= {"rouge", "rouge_score", "sklearn", "nltk", "lm_eval"}
COMMANDS = "medqa.__main__"  # thin commands over all wings; nothing imports it


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def wing(name: str) -> str:
    """The wing of a module: `top`, `tiny` or one of `WINGS`."""
    parts = name.split(".")[1:]
    if not parts or (len(parts) == 1 and parts[0] in TOP):
        return "top"
    if parts[0] in (*WINGS, "tiny"):
        return parts[0]
    raise AssertionError(f"{name}: in no wing; design.md has the table")


def imports(node: ast.AST) -> Iterator[str]:
    """What is imported anywhere below a node, as dotted names; of `from medqa.x import y` medqa.x.y if a module."""
    for found in ast.walk(node):
        if isinstance(found, ast.Import):
            yield from (alias.name for alias in found.names)
        elif isinstance(found, ast.ImportFrom):
            assert not found.level, "no relative imports"
            for alias in found.names:
                full = f"{found.module}.{alias.name}"
                yield full if full in MODULES else found.module


MODULES = {module_name(path) for path in FILES}
GRAPH = {
    module_name(path): {name for name in imports(tree(path)) if name.split(".")[0] == "medqa"} for path in FILES
}  # fmt: skip


def may_import(importer: str, imported: str) -> bool:
    """Whether the table allows it."""
    here, there = wing(importer), wing(imported)
    if imported == COMMANDS:
        return False
    if importer == COMMANDS or here == there:
        return True
    if here == "top":
        return imported == "medqa.tiny"
    if here == "tiny":
        return False
    return there in ("top", "tiny") or WINGS.index(there) < WINGS.index(here)


def circle(graph: dict[str, set[str]]) -> list[str] | None:
    """A circle of imports, if there is one."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        for other in sorted(graph.get(name, ())):
            if found := walk(other, [*path, name]):
                return found
        done.add(name)
        return None

    return next((found for name in sorted(graph) if (found := walk(name, []))), None)


def test_every_file_is_in_a_wing():
    assert len(FILES) >= 35
    found = {wing(name) for name in MODULES}
    assert found >= {"top", "tiny", "data", "model", "evaluation", "training"}
    with pytest.raises(AssertionError, match=r"medqa.utils: in no wing"):
        wing("medqa.utils")
    with pytest.raises(AssertionError, match="in no wing"):
        wing("medqa.helpers.x")


def test_imports_run_down_the_table():
    edges = [(importer, imported) for importer, names in GRAPH.items() for imported in sorted(names)]
    assert len(edges) >= 80
    assert [edge for edge in edges if not may_import(*edge)] == []


def test_the_rule_forbids_what_it_should():
    for importer, imported in [
        ("medqa.data.batches", "medqa.model.loss"),
        ("medqa.model.base", "medqa.training.plan"),
        ("medqa.evaluation.loss", "medqa.training.loop"),
        ("medqa.training.loop", "medqa.commands.compare.show"),
        ("medqa.config", "medqa.data.sources"),
        ("medqa.data.tokens", "medqa.__main__"),
    ]:
        assert not may_import(importer, imported)
    assert may_import("medqa.training.loop", "medqa.model.loss")
    assert may_import("medqa.commands.compare.show", "medqa.training.recorder")


def test_there_is_no_circle():
    assert circle(GRAPH) is None
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


# ----------------------------------------------------------------------------------------------------
# Width. A module may be long, but what others use of it is narrow, and so is each call. Limits only go down.

NAMES = 9  # of a module that others use
PARAMETERS = 9  # of a function, `self` apart
WIDE = {  # modules that are wider, and how wide
    "medqa.limits": 31,  # a table
    "medqa.training.checkpoint": 28,
    "medqa.training.run_dir": 20,
    "medqa.config": 17,
    "medqa.files": 17,
    "medqa.training.wandb": 17,
    "medqa.errors": 16,
    "medqa.config_file": 12,
    "medqa.data.sources": 12,
    "medqa.commands.compare.tables": 11,
    "medqa.model.settings": 11,
    "medqa.commands.compare.conclusions": 10,
    "medqa.data.batches": 10,
    "medqa.model.base": 12,
    "medqa.training.before_after": 10,
}


def names_used() -> dict[str, set[str]]:
    """Of each module the names that other modules of the package and `train.py` import from it."""
    found: dict[str, set[str]] = {}
    for path in (*FILES, ROOT / "train.py"):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom) and node.module in MODULES:
                names = {alias.name for alias in node.names if f"{node.module}.{alias.name}" not in MODULES}
                found.setdefault(node.module, set()).update(names)
    return found


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """All functions and methods, with the file that they are in."""
    for path in (*FILES, ROOT / "train.py"):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield str(path.relative_to(ROOT)), node


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Its parameters, `self` apart."""
    arguments = function.args
    every = [one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return [name for name in every if name not in ("self", "cls")]


def test_modules_are_narrow():
    used = {module: len(names) for module, names in names_used().items()}
    assert len(used) >= 40
    too_wide = {module: width for module, width in used.items() if width > WIDE.get(module, NAMES)}
    assert too_wide == {}
    shrunk = {module: used.get(module, 0) for module, width in WIDE.items() if used.get(module, 0) < width}
    assert shrunk == {}, "the limits of these can go down"


def test_functions_take_few_parameters():
    found = [(where, function.name, len(parameters(function))) for where, function in functions()]
    assert len(found) >= 700
    assert [each for each in found if each[2] > PARAMETERS] == []


def test_train_py_is_the_table_of_contents_of_a_run():
    script = tree(ROOT / "train.py")
    used = {name for name in imports(script) if name.startswith("medqa")}
    assert used <= MODULES
    assert len(used) >= 15
    text = (ROOT / "train.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 100
    assert not [node for node in ast.walk(script) if isinstance(node, ast.ClassDef | ast.For | ast.While)]
    assert ";" not in text
    (run,) = [t for t in symtable.symtable(text, "train.py", "exec").get_children() if t.get_name() == "fine_tune"]
    assert len(run.get_locals()) <= 20


def test_private_modules_of_wandb_are_used_in_one_place():
    private = {
        str(path.relative_to(ROOT))
        for path in (*FILES, ROOT / "train.py")
        for name in imports(tree(path))
        if name.startswith("wandb.")
    }
    assert private <= {"medqa/training/wandb.py"}


def test_tests_of_the_package_do_not_import_benchmarks():
    """What both need is in `harness`. Only tests of the benchmarks, and of the table in the README, import them."""
    of_benchmarks = {"test_bench.py", "test_recipes.py", "test_results.py", "test_readme.py"}
    users = {
        path.name
        for path in (ROOT / "tests").rglob("*.py")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "benchmarks"
    }
    assert len(users) >= 2
    assert users <= of_benchmarks


def test_every_module_is_documented():
    assert [path for path in FILES if not ast.get_docstring(tree(path))] == []


def at_import(module: ast.Module) -> Iterator[str]:
    """What is imported when the module is: outside functions and `if TYPE_CHECKING`."""
    waiting: list[ast.AST] = list(module.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            waiting.extend(node.orelse)
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imports(node)
        waiting.extend(ast.iter_child_nodes(node))


def test_what_only_some_runs_need_is_imported_where_it_is_used():
    used = {name.split(".")[0] for path in FILES for name in imports(tree(path))}
    assert {"wandb", "bitsandbytes", "kagglehub", "defusedxml"} <= used
    for path in (*FILES, ROOT / "train.py"):
        assert not {name.split(".")[0] for name in at_import(tree(path))} & LAZY, path
    sample = ast.parse("if x:\n  import wandb\nclass A:\n  import kagglehub\ndef f():\n  import bitsandbytes")
    assert set(at_import(sample)) == {"wandb", "kagglehub"}


def test_the_package_imports_and_runs_without_them(tmp_path):
    code = f"""
import sys
from importlib.machinery import PathFinder
class WithoutThem(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {LAZY!r} else PathFinder.find_spec(name, path, target)
sys.meta_path = [WithoutThem if finder is PathFinder else finder for finder in sys.meta_path]
sys.path.insert(0, {str(ROOT)!r})
import train
words = ["--exp", "exp_004", "--tiny", "--cpu", "--output-dir", "out", "--set", "training.max_steps=4"]
words += ["model.dequantize=never", "training.global_batch_size=4"]
sys.exit(train.main([*words, "evaluation.rows=4", "evaluation.samples=1", "tracking.wandb=auto"]))
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    assert "W&B: off" in done.stdout
    assert "model.quantization: 4bit -> none (4-bit is not available" in done.stdout
    assert (tmp_path / "out" / "summary.json").exists()


DISTRIBUTIONS = {"sklearn": "scikit-learn", "yaml": "pyyaml", "ruamel": "ruamel-yaml"}  # where the names differ


def test_what_is_imported_is_declared_and_nothing_else():
    used = {name.split(".")[0] for path in (*FILES, ROOT / "train.py") for name in imports(tree(path))}
    used -= sys.stdlib_module_names | {"medqa", "train", "xllamacpp"}
    used = {DISTRIBUTIONS.get(name, name).replace("_", "-").lower() for name in used}
    assert len(used) >= 20
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    pinned = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    for declared in (project, [line for line in pinned if line and not line.startswith("#")]):
        names = {
            re.split(r"[=<>!~\[]", line)[0].strip().replace("_", "-").replace(".", "-").lower() for line in declared
        }
        assert names == used


def handlers(module: ast.Module) -> Iterator[ast.ExceptHandler]:
    return (node for node in ast.walk(module) if isinstance(node, ast.ExceptHandler))


def caught(handler: ast.ExceptHandler) -> set[str]:
    """The names in an `except` clause."""
    return {node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)} if handler.type else {""}


def reraises_subclasses(handler: ast.ExceptHandler) -> bool:
    """Whether it begins with `if type(error) is not Exception: raise`: for a library that raises that class itself."""
    return ast.unparse(handler.body[0]) == f"if type({handler.name}) is not Exception:\n    raise"


def test_nothing_is_caught_that_is_not_named():
    found = [(path, handler) for path in (*FILES, ROOT / "train.py") for handler in handlers(tree(path))]
    assert len(found) >= 30
    broad = [(path.name, h) for path, h in found if caught(h) & {"", "Exception", "BaseException"}]
    assert all(reraises_subclasses(handler) for _, handler in broad)
    assert [name for name, _ in broad] == ["base.py"]


def calls(name: str) -> Iterator[tuple[Path, ast.Call]]:
    """Calls of a function or method of this name."""
    for path in (*FILES, ROOT / "train.py"):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == name:
                yield path, node


def keyword(call: ast.Call, name: str) -> object:
    """The constant given for a keyword, None where it is not given."""
    return next((k.value.value for k in call.keywords if k.arg == name and isinstance(k.value, ast.Constant)), None)


def test_no_code_comes_in_with_data_or_models():
    loads = [call for _, call in calls("load") if ast.unparse(call.func) == "torch.load"]
    assert len(loads) >= 1
    assert all(keyword(call, "weights_only") is True for call in loads)
    from_hub = [
        call for path, call in calls("from_pretrained") if path.parent.name != "tiny" and "Auto" in ast.unparse(call)
    ]
    assert len(from_hub) >= 3
    assert all(keyword(call, "trust_remote_code") is False for call in from_hub)
    assert any(keyword(call, "use_safetensors") is True for call in from_hub)
    for name in ("eval", "exec", "__import__"):
        assert [path for path, call in calls(name) if isinstance(call.func, ast.Name)] == []
    pickles = [path.name for path in FILES for name in imports(tree(path)) if name in ("dill", "joblib", "cloudpickle")]
    assert pickles == []


def test_no_trainer_is_behind_it():
    names = {name for path in FILES for name in imports(tree(path))}
    assert not {name for name in names if name.split(".")[0] in ("trl", "lightning", "axolotl")}
    imported = {
        alias.name
        for path in (*FILES, ROOT / "train.py")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert not imported & {"Trainer", "TrainingArguments", "SFTTrainer", "Seq2SeqTrainer"}


def test_nothing_that_linux_alone_has_is_needed_to_import_it(tmp_path):
    """As on macOS: names that only Linux has are taken away, after the libraries have been imported."""
    large = {"accelerate", "datasets", "pandas", "peft", "pydantic", "rich", "torch", "transformers"}
    imported = {name for path in (*FILES, ROOT / "train.py") for name in at_import(tree(path))}
    libraries = sorted(name for name in imported if name.split(".")[0] in large)
    code = f"""
import contextlib, errno, importlib, os, resource, select, signal, socket, sys
for name in {libraries!r}:
    module, _, last = name.rpartition(".")
    try:
        importlib.import_module(name)
    except ImportError:
        getattr(importlib.import_module(module), last)
gone = {{errno: "EREMOTEIO ENOMEDIUM EMEDIUMTYPE EKEYEXPIRED EUCLEAN ENOTUNIQ EREMCHG ECOMM EHWPOISON EBADFD".split(),
        os: "posix_fadvise sched_getaffinity memfd_create eventfd O_DIRECT O_TMPFILE O_PATH O_NOATIME getxattr".split(),
        signal: "SIGPWR SIGSTKFLT SIGPOLL SIGRTMIN SIGRTMAX sigtimedwait sigwaitinfo".split(),
        resource: "prlimit RLIMIT_NICE RLIMIT_RTPRIO RLIMIT_RTTIME RLIMIT_SIGPENDING RLIMIT_MSGQUEUE".split(),
        select: "epoll".split(), socket: "AF_NETLINK AF_PACKET SO_PEERCRED".split()}}
for module, names in gone.items():
    for name in names:
        with contextlib.suppress(AttributeError):
            delattr(module, name)
for name in [name for name in sys.modules if name.split(".")[0] in ("medqa", "train")]:
    del sys.modules[name]  # imported by the process that this one is a fork of
for name in {[*sorted(MODULES - {COMMANDS}), COMMANDS, "train"]!r}:
    importlib.import_module(name)
"""
    script, log = tmp_path / "import.py", tmp_path / "log"
    script.write_text(code)
    assert Forked([], log, script=script).wait(180) == 0, log.read_text()
