"""What a result was made on: the code's commit, the GPUs and their driver."""

import concurrent.futures
import multiprocessing
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.results_file import Machine
from medqa.errors import UserError
from medqa.model.settings import usable_gpu

ROOT = Path(__file__).resolve().parents[1]
RESULT_PATHS = (":(exclude)README.md", ":(exclude)results")  # what `make results` itself changes
UNKNOWN = "unknown"  # in the place of a commit
NO_GPU = Machine(gpus=[], memory_bytes=None, driver=None, cuda=None)
CPU_INFO = Path("/proc/cpuinfo")


def code_commit() -> str | None:
    """The commit of this code, `-dirty` where a tracked file that is no result differs; None without git."""
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *RESULT_PATHS)
    if commit is None or changed is None:
        return None
    return f"{commit}-dirty" if changed else commit


def code_caveats(commits: Sequence[str | None]) -> list[str]:
    """Why code of these commits is none that others have, if so."""
    known = [commit for commit in commits if commit is not None and commit != UNKNOWN]
    caveats = [] if len(known) == len(commits) else ["not a git checkout"]
    return caveats + (["uncommitted changes"] if any(commit.endswith("-dirty") for commit in known) else [])


def _git(*words: str) -> str | None:
    """What git says of this checkout; None where there is none."""
    try:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def this_machine(processes: int, cpu: bool) -> Machine:
    """The GPUs that would be used, or the CPU.

    Raises:
        UserError: there are no GPUs that torch can use, or not so many.
    """
    if cpu:
        return NO_GPU.model_copy(update={"cpu": cpu_name(), "threads": torch.get_num_threads()})
    if torch.cuda.is_available():  # so far nothing is on the GPU: what this process held there, the runs would lack
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            found = pool.submit(ask_torch).result()
    else:
        found = ask_torch()
    if not found.gpus:
        raise UserError(
            "make results: there is no GPU that torch can use; run the same command on a machine with one, or pass "
            "--cpu, a small base model, and a budget: "
            'make results RESULTS_ARGS="--cpu --model HuggingFaceTB/SmolLM2-135M-Instruct --examples 800 --limit 200"'
        )
    if len(found.gpus) < processes:
        raise UserError(f"--processes {processes}: this machine shows {len(found.gpus)} GPU(s); give as many or fewer")
    return found.model_copy(update={"gpus": found.gpus[:processes]})


def cpu_name() -> str:
    """The model name of this machine's CPU, as Linux gives it; elsewhere its architecture."""
    try:
        lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] else platform.machine()


def ask_torch() -> Machine:
    """The GPUs that this process sees; none where there are none.

    Raises:
        UserError: there is one, but torch cannot use it.
    """
    if not usable_gpu():
        return NO_GPU
    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return Machine(
        gpus=[card.name for card in cards],
        memory_bytes=min(card.total_memory for card in cards),
        driver=driver_version(),
        cuda=torch.version.cuda or torch.version.hip,
    )


def driver_version() -> str | None:
    """The NVIDIA driver's, None where nothing says it."""
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return said[0] if said else None
