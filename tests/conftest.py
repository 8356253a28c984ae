"""What several test files share: experiments at the embedded model's size. Parts of a run: `harness.hf_trainer`.

Nothing heavy is imported here, so that a file that needs no model starts at once.
"""

import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:  # for a bare `pytest`, which, unlike `python -m pytest`, leaves it out
    sys.path.insert(0, str(ROOT))

from medqa.config import Experiment  # noqa: E402
from medqa.config_file import load_experiment  # noqa: E402

QUIET = ("tracking.wandb=disabled", "evaluation.steps=100000", "training.save_steps=100000")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is read from, or left in, the user's own cache; processes that tests start inherit it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MEDQA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def hangups() -> None:
    """Tests send SIGHUP. Under `nohup`, or a CI that ignores it, programs leave it ignored, ours too."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def shared_estimates() -> Iterator[None]:
    """The memory of runs that differ only in what takes none (updates, rows, places) is computed once in a process.

    `footprint` itself computes it anew for every other experiment, which takes a second or two.
    """
    memory = sys.modules.get("medqa.model.memory")
    if memory is None:  # no test that is run here needs it
        yield
        return
    compute, known = memory._footprint, {}

    def shared(experiment: Experiment, model_config: Any, settings: Any, vocabulary: int | None) -> Any:
        lora = experiment.lora.model_copy(update={"init_from": None})
        optimizer, length = experiment.optimizer.name, experiment.tokenization.max_length
        what = (experiment.model.base, lora, optimizer, length, experiment.training.seed)
        how = replace(settings, changes={}, planned_tokens=None, evaluation_padding_free=False, return_memory=False)
        key = repr((what, how, model_config.to_json_string(use_diff=False), vocabulary, memory.DEPTH))
        if key not in known:
            known[key] = compute(experiment, model_config, settings, vocabulary)
        return known[key]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(memory, "_footprint", shared)
        yield


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Experiment]:
    """`tiny("exp_001", "lora.lora_dropout=0.0", ...)`: an experiment on the embedded model; later words win."""
    return lambda name, *sets: load_experiment(name, tiny=True, sets=[*QUIET, *sets])


@pytest.fixture
def own_accelerator() -> Iterator[None]:
    """Accelerate's state is global to the process: a test that makes an unusual one leaves none behind."""
    yield
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, as small as they come: 4-bit, `[PAD]`, six updates. Not to be changed: copy it."""
    from accelerate.state import AcceleratorState

    from train import main

    directory = tmp_path_factory.mktemp("tiny") / "run"
    sets = ("training.max_steps=6", "training.global_batch_size=8", "training.save_steps=2", "evaluation.steps=2")
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("OMP_NUM_THREADS", "1")
        words = ["--exp", "exp_003", "--tiny", "--cpu", "--output-dir", str(directory), "--set", *sets]
        assert main([*words, "evaluation.samples=0", "tracking.wandb=disabled"]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return directory
