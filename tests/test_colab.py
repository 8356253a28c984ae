"""`notebooks/colab.ipynb`, executed cell by cell in a real kernel: `--tiny`, offline, on a Colab that is made here.

A cell with other settings is put behind the settings, as papermill does it; no cell of the notebook is changed.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from medqa.config_file import find_experiment
from medqa.options import option_parser
from tests.launching import SECONDS, metrics, summary

ROOT = Path(__file__).resolve().parent.parent
PATH = ROOT / "notebooks" / "colab.ipynb"
LEFT_OUT = (".git", ".venv", "outputs", "exports", "wandb", "shared", "__pycache__", ".pytest_cache", ".ruff_cache")
QUICK = "training.global_batch_size=4 evaluation.samples=0 evaluation.rows=4"
BEFORE_TRAINING = ("settings", "gpu", "install", "drive")
SECRET = "hf_never_to_be_shown"
# What the notebook uses of google.colab: the names, and what they raise (`google/colab/{drive,errors,userdata}.py`).
COLAB = {
    "__init__": "",
    "errors": "class Error(Exception):\n    pass\n",
    "userdata": """
import json, os
from google.colab import errors
class NotebookAccessError(Exception):
    pass
class SecretNotFoundError(errors.Error):
    pass
class TimeoutException(errors.Error):
    pass
def get(key):
    found = json.loads(os.environ["FAKE_SECRETS"]).get(key, "missing")
    for word, error in ("missing", SecretNotFoundError), ("denied", NotebookAccessError), ("late", TimeoutException):
        if found == word:
            raise error(key)
    return found
""",
    "drive": """
import os
def mount(mountpoint):
    os.makedirs(os.environ["FAKE_DRIVE"], exist_ok=True)
    print("Mounted at", mountpoint)
""",
}


def read() -> nbformat.NotebookNode:
    return nbformat.read(PATH, as_version=4)


def cell(source: str) -> nbformat.NotebookNode:
    return nbformat.v4.new_code_cell(source)


def named(one: nbformat.NotebookNode, name: str) -> nbformat.NotebookNode:
    """The same cell under another name."""
    return nbformat.from_dict({**one, "id": name, "outputs": []})


def with_settings(settings: dict[str, str], only: tuple[str, ...] = ()) -> nbformat.NotebookNode:
    """The notebook, or some cells of it, with a cell of other settings behind its own."""
    notebook = read()
    place = next(i for i, one in enumerate(notebook.cells) if "parameters" in one.metadata.get("tags", ()))
    notebook.cells.insert(place + 1, cell("\n".join(f"{name} = {value!r}" for name, value in settings.items())))
    if only:
        notebook.cells = [one for one in notebook.cells if one.id in only or one is notebook.cells[place + 1]]
    return notebook


def insert_after(notebook: nbformat.NotebookNode, name: str, source: str) -> None:
    place = next(i for i, one in enumerate(notebook.cells) if one.id == name)
    notebook.cells.insert(place + 1, cell(source))


def said(notebook: nbformat.NotebookNode, name: str) -> str:
    """What a cell printed, errors included."""
    outputs = next(one for one in notebook.cells if one.id == name).outputs
    return "".join(out.get("text") or "\n".join(out.get("traceback", ())) for out in outputs)


class Kernel(NotebookClient):
    """A client whose kernel can be found, to be interrupted or killed with all that it has started."""

    def kill(self) -> None:
        """SIGKILL to the kernel and everything below it: the machine is gone."""
        kernel = psutil.Process(self.km.provisioner.pid)
        for process in [kernel, *kernel.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


class Machine:
    """A place to work in, with an environment: a new one has nothing, like Colab's after a disconnect."""

    def __init__(self, home: Path, place: Path, **environment: str) -> None:
        self.place = place
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "JPY_", "COLAB_"))}
        self.environment = {
            **kept,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "NETRC": "/nonexistent",
            "IPYTHONDIR": str(home / "ipython"),
            "PYTHONPATH": str(home / "packages"),
            **environment,
        }

    def client(self, notebook: nbformat.NotebookNode) -> Kernel:
        place = {"metadata": {"path": str(self.place)}}
        return Kernel(notebook, timeout=SECONDS, kernel_name="python3", resources=place)

    def execute(self, notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
        self.client(notebook).execute(env=self.environment)
        return notebook

    def stopped(self, notebook: nbformat.NotebookNode) -> str:
        """The whole of what the cell shows at which the notebook stops."""
        with pytest.raises(CellExecutionError):
            self.execute(notebook)
        (shown,) = [out for one in notebook.cells for out in one.get("outputs", ()) if out.output_type == "error"]
        return "\n".join(shown.traceback)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working copy of this repository, as a user would have opened it."""
    place = tmp_path_factory.mktemp("colab") / "repository"
    shutil.copytree(ROOT, place, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return place


@pytest.fixture
def colab(tmp_path: Path) -> dict[str, str]:
    """`google.colab` in `packages` (a portion of the namespace, so that protobuf stays), and a Drive."""
    package = tmp_path / "packages" / "google" / "colab"
    package.mkdir(parents=True)
    for name, source in COLAB.items():
        (package / f"{name}.py").write_text(source)
    return {"FAKE_DRIVE": str(tmp_path / "drive" / "MyDrive"), "FAKE_SECRETS": "{}"}


# --- the file


def test_the_file_is_valid_small_and_clean():
    notebook = read()
    nbformat.validate(notebook)
    assert len(PATH.read_bytes()) < 20_000
    code = [one for one in notebook.cells if one.cell_type == "code"]
    assert 8 <= len(code) <= 10
    assert all(one.outputs == [] and one.execution_count is None for one in code), "no output is stored"
    assert [one.id for one in code] == [
        *BEFORE_TRAINING, "train", "evaluate", "compare", "ask", "export"
    ]  # fmt: skip
    assert all(notebook.cells[i - 1].cell_type == "markdown" for i, one in enumerate(notebook.cells) if one in code)
    assert notebook.metadata.accelerator == "GPU"
    assert notebook.metadata.colab.gpuType == "T4"


def test_its_settings_are_options_and_experiments_that_there_are():
    values: dict[str, str] = {}
    settings = next(one for one in read().cells if one.id == "settings")
    exec(settings.source, values)
    find_experiment(values["EXPERIMENT"])
    option_parser().parse_args(["--exp", "e", *values["OPTIONS"].split(), "--stop-after", values["STOP_AFTER"]])
    offered = settings.source.split("@param [")[1].split("]")[0]
    assert {f"{name}.yaml" for name in json.loads(f"[{offered}]")} <= {p.name for p in (ROOT / "experiments").iterdir()}


# --- its cells


@pytest.mark.slow
def test_every_cell_from_top_to_bottom(repository, tmp_path):
    options = f"--tiny --set training.max_steps=4 tracking.wandb=disabled {QUICK}"
    settings = {"OPTIONS": options, "EVALUATE": "--limit 4 --tasks loss", "EXPORT_FORMAT": "merged"}
    notebook = with_settings(settings)
    insert_after(notebook, "train", "shutil.copytree(KEPT, DRIVE / 'another')")
    Machine(tmp_path, repository / "notebooks").execute(notebook)  # where Jupyter opens it
    drive = repository / "outputs" / "drive"
    kept = drive / "exp_002-tiny"
    assert summary(kept)["updates"] == 4
    assert "update 4/4" in said(notebook, "train")
    assert json.loads((kept / "evaluation.json").read_text())["tasks"]["loss"]
    page = next(out for one in notebook.cells if one.id == "compare" for out in one.outputs if "data" in out)
    assert "&lt;!doctype html&gt;" in page.data["text/html"]
    assert (drive / "compare.html").stat().st_size > 10_000
    assert {"base: ", "tuned: "} <= {line[: line.find(":") + 2] for line in said(notebook, "ask").splitlines()}
    assert (drive / "exp_002-tiny-merged" / "model.safetensors").stat().st_size > 1_000_000
    everything = "".join(said(notebook, one.id) for one in notebook.cells if one.cell_type == "code")
    assert "\x1b[" not in everything, "no control codes"


def test_what_stands_before_training_on_colab(repository, tmp_path, colab):
    """Secrets there, missing, denied and late; a T4; again in the same kernel; a failing command; one that goes on."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "nvidia-smi").write_text("#!/bin/sh\necho 'Tesla T4, 15360 MiB, 7.5'\n")
    (programs / "nvidia-smi").chmod(0o755)
    colab |= {"PATH": f"{programs}:{os.environ['PATH']}"}
    colab["FAKE_SECRETS"] = json.dumps({"HF_TOKEN": f" {SECRET}\n", "WANDB_API_KEY": "denied"})
    folder = str(tmp_path / "drive" / "MyDrive" / "med qa")
    notebook = with_settings({"DRIVE_FOLDER": folder}, BEFORE_TRAINING)
    first = list(notebook.cells)
    notebook.cells += [
        cell(f"assert os.environ['HF_TOKEN'] == {SECRET!r}, 'another'\nassert 'WANDB_API_KEY' not in os.environ"),
        *[named(one, f"{one.id}-again") for one in first],
        cell("os.environ['FAKE_SECRETS'] = '{\"WANDB_API_KEY\": \"late\"}'"),
        named(first[-1], "late"),
        cell(
            "import builtins\n"
            "def print(*words, **options):\n"
            "    Path('seen').touch()\n"
            "    builtins.print(*words, **options)\n"
            "run('''python -c \"import pathlib, sys, time; print('first'); end = time.time() + 60\n"
            "while time.time() < end and not pathlib.Path('seen').exists(): time.sleep(0.05)\n"
            "sys.exit(not pathlib.Path('seen').exists())\"''')"  # what it prints is shown while it runs
        ),
        cell("run('python -c \"import sys; sys.exit(\\'what to mend\\')\"')"),
        cell("raise AssertionError('it went on')"),
    ]
    shown = Machine(tmp_path, repository, **colab).stopped(notebook)
    assert shown.startswith("Stopped: -c import sys")
    assert shown.endswith("ended with exit code 1; what it printed last says why")
    assert len(shown.splitlines()) == 1, "no traceback"
    assert "what to mend" in "".join(out.get("text", "") for out in notebook.cells[-2].outputs)
    assert "float16, with a gradient scaler" in said(notebook, "gpu")
    assert said(notebook, "install") == said(notebook, "install-again") == f"medqa is ready, with torch {torch()}\n"
    assert "WANDB_API_KEY: goes on without (NotebookAccessError)" in said(notebook, "drive")
    assert "HF_TOKEN: goes on without (SecretNotFoundError)" in said(notebook, "late")
    assert "WANDB_API_KEY: goes on without (TimeoutException)" in said(notebook, "late")
    assert "Mounted at /content/drive" in said(notebook, "drive")
    assert Path(folder).is_dir()
    assert SECRET not in json.dumps([one.outputs for one in notebook.cells if "outputs" in one])


def torch() -> str:
    """The version of torch that is here; not imported."""
    import importlib.metadata

    return importlib.metadata.version("torch")


def test_without_a_gpu_it_says_what_to_choose_and_stops(repository, tmp_path):
    empty = tmp_path / "bin"
    empty.mkdir()
    shown = Machine(tmp_path, repository, PATH=str(empty)).stopped(with_settings({}, ("settings", "gpu")))
    assert shown.startswith("Stopped: no GPU")
    assert "T4" in shown


@pytest.mark.parametrize("works", [True, False])
def test_installing_keeps_torch_and_says_what_is_still_missing(works, repository, tmp_path):
    """An old wandb in front of the real one is what the image has; a pip that is ours notes what it is asked."""
    packages = tmp_path / "packages"
    old = packages / "wandb-0.1.dist-info"
    (packages / "pip").mkdir(parents=True)
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: wandb\nVersion: 0.1\n")
    (packages / "pip" / "__init__.py").touch()
    install = f"shutil.rmtree({str(old)!r})" if works else "pass"
    note = f"import shutil, sys\nopen({str(tmp_path / 'asked')!r}, 'w').write(' '.join(sys.argv[1:]))\n{install}\n"
    (packages / "pip" / "__main__.py").write_text(note)
    notebook = with_settings({"OPTIONS": "--tiny"}, ("settings", "gpu", "install"))
    machine = Machine(tmp_path, repository)
    if works:
        machine.execute(notebook)
        assert said(notebook, "install") == f"medqa is ready, with torch {torch()}\n"
    else:
        shown = machine.stopped(notebook)
        assert shown.startswith("Stopped: wandb>=")
        assert "here 0.1" in shown
        assert "Disconnect and delete runtime" in shown
    asked = (tmp_path / "asked").read_text().split()
    assert asked[0] == "install"
    assert asked[-3:] == ["--editable", ".", f"torch=={torch()}"]


# --- the disconnect


@pytest.fixture
def published(repository: Path, tmp_path: Path) -> dict[str, str]:
    """The environment in which git takes the project's address for a repository of this working copy."""
    place = tmp_path / "published"
    shutil.copytree(repository, place, ignore=shutil.ignore_patterns(*LEFT_OUT))
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (["init", "--quiet"], ["add", "--all"], [*who, "commit", "--quiet", "--message", "all"]):
        subprocess.run(["git", "-C", str(place), *words], check=True)
    address = {"KEY_0": f"url.file://{place}.insteadOf", "VALUE_0": "https://github.com/medqa/medqa"}
    return {"GIT_CONFIG_COUNT": "1", **{f"GIT_CONFIG_{name}": value for name, value in address.items()}}


def on_a_machine(machine: Machine, notebook: nbformat.NotebookNode, run: Path, step: int, end: str) -> Kernel:
    """Execute until the run is at an update; then end it: `interrupt` (the stop button) or `kill`."""
    client = machine.client(notebook)
    raised: list[BaseException] = []

    def execute() -> None:
        try:
            client.execute(env=machine.environment)
        except (CellExecutionError, DeadKernelError) as error:
            raised.append(error)

    thread = threading.Thread(target=execute)
    thread.start()
    deadline = time.monotonic() + SECONDS
    while not any(record["step"] >= step for record in metrics(run)):
        assert thread.is_alive(), said(notebook, "train")
        assert time.monotonic() < deadline, said(notebook, "train")
        time.sleep(0.05)
    if end == "kill":
        client.kill()
    else:
        os.killpg(os.getpgid(client.km.provisioner.pid), signal.SIGINT)  # as Jupyter's managers do it
    thread.join(SECONDS)
    assert len(raised) == 1
    return client


@pytest.mark.slow
def test_a_run_outlives_the_stop_button_and_the_machine(tmp_path, colab, published):
    drive = tmp_path / "drive" / "MyDrive" / "medqa"
    kept = drive / "exp_002-tiny"
    options = f"--tiny --set training.max_steps=60 training.save_steps=5 training.log_steps=1 {QUICK}"
    settings = {"OPTIONS": options, "DRIVE_FOLDER": str(drive), "EVALUATE": "--limit 2 --tasks loss"}
    before = (*BEFORE_TRAINING, "train")

    content = tmp_path / "content"
    run = content / "medqa" / "outputs" / "exp_002-tiny"
    content.mkdir()
    machine = Machine(tmp_path, content, **colab, **published)
    notebook = with_settings(settings, (*before, "evaluate"))
    on_a_machine(machine, notebook, run, 8, "interrupt")
    assert "stopped by SIGINT" in said(notebook, "train")
    assert "Stopped: train.py --exp exp_002 ended with exit code 130" in said(notebook, "train")
    assert not said(notebook, "evaluate"), "Run all ends there"
    saved = max(record["step"] for record in metrics(run))
    assert (kept / f"checkpoint-{saved}").is_dir(), "the update was finished, saved, and copied"

    notebook = with_settings(settings, before)
    on_a_machine(machine, notebook, run, saved + 12, "kill")
    reached = max(record["step"] for record in metrics(run))
    shutil.rmtree(content)  # the machine has gone
    assert not (kept / "summary.json").exists()
    content.mkdir()
    notebook = machine.execute(with_settings(settings))  # every cell, on a new one
    found = summary(kept)
    assert found["updates"] == 60
    assert found["resumes"] == 2
    steps = [record["step"] for record in metrics(kept) if record["split"] == "train"]
    assert steps == list(range(1, 61))
    went_on = int(re.search(r"resumed\s+after\s+update\s+(\d+)", said(notebook, "train"))[1])
    assert saved <= went_on <= reached, "from Drive, not from the start"
    assert (drive / "exp_002-tiny-gguf" / "Modelfile").exists()
    assert "only exp_002-tiny so far" in said(notebook, "compare")

    notebook = machine.execute(with_settings(settings))  # once more in the same place: nothing is done twice
    assert "the run is already complete; nothing to do" in said(notebook, "train")
    assert "is there already" in said(notebook, "export")
