"""The mirror of a run (`--persist-to`): its files alone, only on request, and again after the directory was lost."""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.processes import Forked
from medqa.config import Experiment
from medqa.errors import Interrupted, UserError
from medqa.training import mirror as persist
from medqa.training.checkpoint import checkpoints
from medqa.training.mirror import Mirror
from medqa.training.run_dir import ADAPTER_DIR, LOCK_FILE, RUN_FILE
from train import main

ROOT_FILES = {"config.yaml", "data_report.json", "splits.csv", "metrics.jsonl", "summary.json", "run.json"}


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(persist, "RETRY_S", 0.02)
    monkeypatch.setattr(persist, "LAST_WAIT_S", 5.0)
    monkeypatch.setattr(persist, "CLAIM_WAIT_S", 0.2)


@pytest.fixture
def run(tiny_run, tmp_path) -> Path:
    """A finished run with checkpoints 2, 4 and 6."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def another_run(tiny_run: Path, directory: Path) -> Path:
    run = Path(shutil.copytree(tiny_run, directory))
    session = json.loads((run / RUN_FILE).read_text())
    (run / RUN_FILE).write_text(json.dumps(session | {"run_id": "another"}))
    return run


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def files(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name != "run.lock"
    }


def counted(copies: Mirror) -> list[int]:
    """Gets longer with each round of copying that has ended well."""
    rounds, copy_all = [], copies._copy_all
    copies._copy_all = lambda: (copy_all(), rounds.append(1))
    return rounds


@pytest.fixture
def began(run) -> Iterator[Callable[[Path], tuple[Mirror, list[str]]]]:
    """Begins to copy the run, and waits until all is there."""
    kept = []

    def begin(there: Path) -> tuple[Mirror, list[str]]:
        copies, said = Mirror(there, run), []
        rounds = counted(copies)
        copies.start(3, False, said.append)
        kept.append(copies)
        copies.wake({6})
        until(lambda: bool(rounds))
        assert files(there) == files(run)
        return copies, said

    yield begin
    for copies in kept:
        copies.__exit__(None, None, None)


# --- the place goes away


@pytest.mark.slow
def test_a_place_that_was_removed_is_said_and_not_made_again(run, began, tmp_path):
    there = tmp_path / "there"
    copies, said = began(there)
    shutil.rmtree(there)
    copies.wake({6})
    until(lambda: bool(said))
    assert said == [
        f"--persist-to {there}: it does not exist any more; mount or create it again; training continues, and copying "
        "is tried again"
    ]
    copies.__exit__(None, None, None)
    assert not there.exists()
    assert said[-1] == f"--persist-to {there}: the copy is incomplete; the complete run is in {run}"


def test_a_signal_that_ends_the_waiting_leaves_the_last_word(run, began, tmp_path, monkeypatch):
    there = tmp_path / "there"
    copies, said = began(there)
    shutil.rmtree(there)
    monkeypatch.setattr(persist, "LAST_WAIT_S", 60.0)
    monkeypatch.setattr(persist, "SILENT_WAIT_S", 0.1)

    def interrupt(signum, frame):
        raise Interrupted(signum)

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    try:
        with pytest.raises(Interrupted):
            copies.__exit__(None, None, None)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert "copying the rest, for at most 60 s" in said[-2]
    assert said[-1] == f"--persist-to {there}: the copy is incomplete; the complete run is in {run}"


def test_a_place_that_comes_back_empty_gets_everything_again(run, began, tmp_path):
    there = tmp_path / "there"
    copies, said = began(there)
    shutil.rmtree(there)
    copies.wake({6})
    until(lambda: bool(said))
    there.mkdir()
    until(lambda: len(said) == 2)
    copies.__exit__(None, None, None)
    assert said[1:] == [f"--persist-to {there}: the mirror is up to date again"]
    assert files(there) == files(run)
    assert set(files(there)) >= ROOT_FILES


@pytest.mark.parametrize(
    "name", ["config.yaml", "run.json", "splits.csv", "checkpoint-4/state.json", f"{ADAPTER_DIR}/tokenizer.json"]
)
@pytest.mark.parametrize("damage", ["missing", "cut", "another", "a pipe"])
def test_what_is_there_counts_and_not_what_was_copied(name, damage, run, began, tmp_path):
    there = tmp_path / "there"
    copies, said = began(there)
    path = there / name
    if damage == "cut":
        os.truncate(path, 5)
    else:
        path.unlink()
    if damage == "another":
        path.write_bytes(b"x" * (run / name).stat().st_size)
    elif damage == "a pipe":
        os.mkfifo(path)
    copies.wake({6})
    copies.__exit__(None, None, None)
    assert files(there).items() >= files(run).items()
    assert not said


def test_what_has_not_changed_is_not_read_again(run, began, tmp_path, monkeypatch):
    copies, _ = began(tmp_path / "there")
    rounds = counted(copies)
    monkeypatch.setattr(persist, "measure", lambda path: pytest.fail(f"{path} is read"))
    monkeypatch.setattr(persist, "verify_checkpoint", lambda path: pytest.fail(f"{path} is read"))
    copies.wake({6})
    until(lambda: bool(rounds))


@pytest.fixture
def disk(tmp_path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A place, and what mounts an empty disk there."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount() -> None:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=50m", "tmpfs", str(place)], capture_output=True)
        if done.returncode:
            pytest.skip(f"no permission to mount a disk: {done.stderr.decode().strip()}")

    yield place, mount
    while subprocess.run(["umount", "-l", str(place)], capture_output=True).returncode == 0:
        continue


@pytest.mark.parametrize("below", [".", "run"])
def test_nothing_is_copied_below_where_a_disk_was_mounted(below, run, began, disk, tmp_path):
    place, mount = disk
    mount()
    there = place / below
    copies, said = began(there)
    subprocess.run(["umount", "-l", str(place)], check=True)
    (run / "metrics.jsonl").write_text("")
    copies.wake({6})
    until(lambda: bool(said))
    assert "training continues, and copying is tried again" in said[0]
    assert any(advice in said[0] for advice in ("mount or create it again", "mount it again"))
    assert not list(place.iterdir())
    mount()
    there.mkdir(exist_ok=True)
    until(lambda: len(said) == 2)
    copies.__exit__(None, None, None)
    assert files(there) == files(run)
    assert said[1].endswith("the mirror is up to date again")
    assert set(files(there)) >= ROOT_FILES


def test_an_old_copy_that_cannot_be_removed_is_said_once(run, began, disk, tmp_path):
    place, mount = disk
    mount()
    (place / "x").write_text("")
    there = tmp_path / "there"
    copies, said = began(there)
    copies._keep = 1
    old = there / "checkpoint-2"
    subprocess.run(["mount", "--bind", str(place / "x"), str(old / "manifest.json")], check=True)
    try:
        shutil.rmtree(run / "checkpoint-2")
        for _ in range(3):
            rounds = counted(copies)
            copies.wake({6})
            until(lambda: bool(rounds))  # noqa: B023
    finally:
        subprocess.run(["umount", "-l", str(old / "manifest.json")], check=True)
    (line,) = said
    reason = f"{there}: the old checkpoint-2 cannot be removed (manifest.json: Device or resource busy); it stays"
    assert line.startswith(f"--persist-to {there}: {reason}. ")
    assert [path.name for path in checkpoints(there)] == ["checkpoint-2", "checkpoint-6"]


# --- the place is another's


def test_of_two_runs_that_start_at_once_one_is_refused(tiny_run, run, tmp_path):
    there, other = tmp_path / "there", another_run(tiny_run, tmp_path / "other")
    for _ in range(10):
        barrier, refused, all_said = threading.Barrier(2), [], []

        def begin(source: Path) -> None:
            with Mirror(there, source) as copies:
                barrier.wait()  # noqa: B023
                try:
                    copies.start(3, False, all_said.append)  # noqa: B023
                except UserError as error:
                    refused.append((source, str(error)))  # noqa: B023

        threads = [threading.Thread(target=begin, args=(source,)) for source in (run, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        ((loser, reason),) = refused
        assert reason.startswith(f"--persist-to {there}: another run uses it as its mirror (")
        assert "wait for it or stop it, or choose another directory" in reason
        winner = other if loser == run else run
        assert files(there) == files(winner)
        assert not all_said
        shutil.rmtree(there)


def test_a_place_that_another_run_has_taken_is_left_to_it(tiny_run, run, began, tmp_path):
    there, other = tmp_path / "there", another_run(tiny_run, tmp_path / "other")
    copies, said = began(there)
    shutil.rmtree(there)
    shutil.copytree(other, there)
    before = files(there)
    (run / "metrics.jsonl").write_text("")
    copies.wake({6})
    copies.__exit__(None, None, None)
    assert said == [
        f"--persist-to {there} is in use by another run, or holds its copy; choose another directory, or, when that "
        "run has ended, start over with --fresh; nothing more is copied",
        f"--persist-to {there}: the copy is incomplete; the complete run is in {run}",
    ]
    assert files(there) == before


def words(output_dir: Path, there: Path, *options: str) -> list[str]:
    """A run that saves for the first time after its last update."""
    sets = ["training.max_steps=4", "training.save_steps=100", "training.global_batch_size=8", "evaluation.rows=4"]
    sets += ["evaluation.samples=0", "model.quantization=none", "tracking.wandb=disabled"]
    words = ["--exp", "exp_003", "--tiny", "--cpu", "--output-dir", str(output_dir), "--persist-to", str(there)]
    return [*words, *options, "--set", *sets]


@pytest.mark.slow
def test_a_run_that_is_killed_before_its_first_checkpoint_goes_on_on_a_new_machine(tmp_path, own_accelerator):
    there = tmp_path / "there"
    process = Forked(words(tmp_path / "run", there), tmp_path / "log")
    until(lambda: (there / "config.yaml").exists() or process.poll() is not None)
    process.kill()
    process.wait()
    assert not checkpoints(there)
    before = json.loads((there / RUN_FILE).read_text())
    assert not before["saved"]
    shutil.rmtree(tmp_path / "run")
    assert main(words(tmp_path / "run", there)) == 0
    session = json.loads((there / RUN_FILE).read_text())
    assert session == {"run_id": before["run_id"], "resumes": 1, "saved": True}
    assert files(there) == files(tmp_path / "run")


@pytest.mark.parametrize("options", [(), ("--fresh",)])
def test_a_place_that_a_living_run_copies_to_is_refused(run, tmp_path, capsys, options, own_accelerator):
    there = tmp_path / "there"
    session = json.loads((run / RUN_FILE).read_text())
    (run / RUN_FILE).write_text(json.dumps(session | {"saved": False}))
    for path in checkpoints(run):
        shutil.rmtree(path)
    with Mirror(there, run) as copies:
        copies.start(3, False, pytest.fail)
        before = files(there)
        assert main(words(tmp_path / "other", there, *options)) == 2
        assert files(there) == before
    reason = f"--persist-to {there}: another run uses it as its mirror (process {os.getpid()} on "
    assert reason in (said := capsys.readouterr().err)
    assert "; wait for it or stop it, or choose another directory" in said
    assert not (tmp_path / "other").exists()


def test_a_run_that_another_host_has_taken_over_copies_no_more(run, began, tmp_path):
    there = tmp_path / "there"
    copies, said = began(there)
    holder = json.loads((there / LOCK_FILE).read_text())
    (there / LOCK_FILE).write_text(json.dumps(holder | {"host": "another"}))
    (run / "metrics.jsonl").write_text("")
    before = files(there)
    copies.wake({6})
    copies.__exit__(None, None, None)
    assert said[0].startswith(f"--persist-to {there} is in use by another run, or holds its copy; ")
    assert files(there) == before


def test_only_what_was_noted_before_the_first_checkpoint_is_gone_on_with(run, tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    session = json.loads((run / RUN_FILE).read_text())
    for saved in (False, True):
        (there / RUN_FILE).write_text(json.dumps(session | {"saved": saved}))
        with Mirror(there, tmp_path / "new") as copies:
            found = copies.acquire()
            assert (found is None) == saved


def test_a_place_that_says_nothing_readable_is_taken(run, began, tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    (there / RUN_FILE).write_text("")
    began(there)
    assert files(there) == files(run)


# --- the place is the output directory


NAMES = {
    "a link": lambda run: (run.with_name("link").symlink_to(run), run.with_name("link"))[1],
    "a link to a link": lambda run: (
        run.with_name("link").symlink_to(run.with_name("next")),
        run.with_name("next").symlink_to(run),
        run.with_name("link"),
    )[2],
    "a link above": lambda run: (
        run.parent.with_name("up").symlink_to(run.parent),
        run.parent.with_name("up") / run.name,
    )[1],
    "dots": lambda run: run.parent / "x" / ".." / run.name,
    "relative": lambda run: Path(os.path.relpath(run)),
    "itself": lambda run: run,
}


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("fresh", [False, True])
def test_the_output_directory_by_another_name_is_refused(kind, fresh, run):
    (run.parent / "x").mkdir()
    place = NAMES[kind](run)
    try:
        before = files(run)
        for attempt in (
            lambda: Mirror(place, run).check(Experiment(), fresh),
            lambda: Mirror(place, run).start(3, fresh, pytest.fail),
        ):
            with pytest.raises(UserError, match="this is the output directory") as caught:
                attempt()
            assert str(caught.value).startswith(f"--persist-to {place}: ")
        assert files(run) == before
    finally:
        run.parent.with_name("up").unlink(missing_ok=True)


def test_the_output_directory_mounted_elsewhere_is_refused(run, disk):
    place, mount = disk
    mount()  # whether that is possible at all
    subprocess.run(["umount", str(place)], check=True)
    subprocess.run(["mount", "--bind", str(run), str(place)], check=True)
    with pytest.raises(UserError, match="this is the output directory"):
        Mirror(place, run).check(Experiment(), True)


def test_only_what_a_run_writes_is_copied(run, began, tmp_path):
    (tmp_path / "secret").write_text("x")
    (run / ADAPTER_DIR / "notes.txt").symlink_to(tmp_path / "secret")
    (run / ADAPTER_DIR / "mine.bin").write_text("x")
    os.mkfifo(run / ADAPTER_DIR / "pipe")
    os.mkfifo(run / "evaluation.json")
    (run / "checkpoint-4" / "notes.txt").write_text("mine")
    copies, said = Mirror(tmp_path / "there", run), []
    with copies:
        copies.start(3, False, said.append)
    assert not said
    found = set(files(tmp_path / "there"))
    assert found >= ROOT_FILES
    assert not {f"{ADAPTER_DIR}/notes.txt", f"{ADAPTER_DIR}/mine.bin", "checkpoint-4/notes.txt"} & found
