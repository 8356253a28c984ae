"""What `test_checkpoint.py` and `test_faults.py` share: a run in this process, and the state that it leaves."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from short_run import words


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each run by itself: Accelerate's state is the process's otherwise. One thread, as in all of them."""
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished `short_run` with checkpoints 2, 4 and 6. Not to be changed: copy it."""
    from accelerate.state import AcceleratorState

    from train import main

    directory = tmp_path_factory.mktemp("straight") / "run"
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("OMP_NUM_THREADS", "1")
        assert main(words(directory)) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return directory
