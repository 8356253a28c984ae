"""Stopped by real signals in the middle, started again: the result is that of a run that was never stopped."""

import os
import signal
from pathlib import Path

import pytest
from launching import LAUNCH, Group, figures, finish, output, start, summary, wait_for_update, wait_until_gone

pytestmark = pytest.mark.slow  # in one process: test_equivalences.py and test_faults.py

UPDATES = 24
WORDS = (
    "--exp", "exp_002", "--tiny", "--set", f"training.max_steps={UPDATES}", "training.save_steps=10",
    "evaluation.steps=8", "evaluation.rows=8", "tracking.wandb=disabled", "training.global_batch_size=8",
)  # fmt: skip


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """A run that nothing interrupts."""
    directory = tmp_path_factory.mktemp("straight") / "run"
    assert finish(Group(directory, *WORDS), directory) == 0, output(directory)
    return directory


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Path:
    """A run in five sessions, of which the first four ended in other ways, with what each end looked like."""
    directory = tmp_path_factory.mktemp("interrupted") / "run"

    process = Group(directory, *WORDS)
    wait_for_update(process, directory, 3)
    process.send_signal(signal.SIGTERM)
    assert finish(process, directory) == 128 + signal.SIGTERM, output(directory)
    first = newest_step(directory)
    assert 3 <= first < UPDATES
    assert "resumes from it" in output(directory)

    process = start(LAUNCH, directory, *WORDS)  # the launcher is killed, and the trainer hears of it
    wait_for_update(process, directory, first + 3)
    process.kill()
    process.wait()
    wait_until_gone(directory)
    second = newest_step(directory)
    assert first + 3 <= second < UPDATES

    process = start(LAUNCH, directory, *WORDS)  # Ctrl-C: both get it, then the launcher's death is heard of as well
    wait_for_update(process, directory, second + 2)
    os.killpg(process.pid, signal.SIGINT)
    finish(process, directory)
    wait_until_gone(directory)
    third = newest_step(directory)
    assert second + 2 <= third < UPDATES

    process = Group(directory, *WORDS)  # no time for a checkpoint
    wait_for_update(process, directory, third + 1)
    process.kill()
    process.wait()
    assert newest_step(directory) in {third, 10, 20}

    process = Group(directory, *WORDS)
    assert finish(process, directory) == 0, output(directory)
    return directory


def newest_step(directory: Path) -> int:
    """The newest checkpoint's step; there is one."""
    return max(int(path.name.split("-")[1]) for path in directory.glob("checkpoint-*"))


def leaves(value, place=()):
    """All tensors and numbers of a nested state, with their places."""
    import torch

    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, part in items:
        if isinstance(part, dict | list | tuple):
            yield from leaves(part, (*place, key))
        elif part is not None:
            yield (*place, key), torch.as_tensor(part)


def test_the_adapter_is_the_same_to_the_last_bit(straight, interrupted):
    for place in ("lora_adapters/adapter_model.safetensors", f"checkpoint-{UPDATES}/adapter_model.safetensors"):
        assert (interrupted / place).read_bytes() == (straight / place).read_bytes()


def test_optimizer_and_schedule_are_the_same_to_the_last_bit(straight, interrupted):
    import torch

    ours, theirs = (
        torch.load(run / f"checkpoint-{UPDATES}" / "training_state.pt", weights_only=True)
        for run in (interrupted, straight)
    )
    assert ours["scheduler"] == theirs["scheduler"]
    found, expected = dict(leaves(ours["optimizer"])), dict(leaves(theirs["optimizer"]))
    assert any(value.dtype == torch.uint8 for value in expected.values())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[place], value) for place, value in expected.items())


def test_every_line_stands_once_and_says_the_same(straight, interrupted):
    assert figures(interrupted) == figures(straight)
    places = [(record["step"], record["split"]) for record in figures(interrupted)]
    assert len(places) == len(set(places)) == UPDATES + 4 + 2 + 1  # eval at 0, 8, 16, 24; eval_full at 0, 24; test


def test_legs_are_counted_and_time_adds_up(straight, interrupted):
    assert summary(straight)["resumes"] == 0
    assert summary(interrupted)["resumes"] == 4
    for part in ("baseline", "final", "test", "best_step", "updates"):
        assert summary(interrupted)[part] == summary(straight)[part]
