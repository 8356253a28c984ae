"""What goes wrong on real machines: memory, disks, signals, deadlines, places for copies; and random kills."""

import errno
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from moved import apart as share_apart
from moved import initial_adapter
from short_run import UPDATES, words

from harness.faults import SHORT, kill_round, words_for
from harness.parts import Parts, build, run_train
from harness.processes import Forked
from medqa.commands.verify_resume import certificate, contents
from medqa.errors import TrainingStopped, UserError
from medqa.model.base import adapter_weights
from medqa.model.loss import summed_loss
from medqa.options import duration
from medqa.training import checkpoint, mirror
from medqa.training.batches import find_micro_batch_tokens
from medqa.training.checkpoint import checkpoints, newest_valid, save_checkpoint
from medqa.training.mirror import Mirror
from medqa.training.recorder import MetricsFile, read_metrics
from medqa.training.state import Progress
from medqa.training.stopping import Stopper
from train import main

pytestmark = pytest.mark.usefixtures("apart")


def when(condition: Callable[[], bool], then: Callable[[], object]) -> threading.Thread:
    """Does something as soon as something is so, beside the run."""

    def watch() -> None:
        while not condition():
            time.sleep(0.002)
        then()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def updates(directory: Path) -> int:
    path = directory / "metrics.jsonl"
    return max((r["step"] for r in read_metrics(path) if r["split"] == "train"), default=0) if path.exists() else 0


def assert_nothing_torn(directory: Path) -> None:
    lines = (directory / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == len(list(read_metrics(directory / "metrics.jsonl")))
    assert newest_valid([directory]) is not None


# --- random kills


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, 6])
def test_random_kills_change_no_bit(kills, tmp_path, capsys):
    seed = int(os.environ.get("CHAOS_SEED", random.randrange(10**6)))
    with capsys.disabled():
        print(f"\nCHAOS_SEED={seed}")
    found = kill_round("exp_002", tmp_path, kills, seed)
    assert found["bitwise_equal"], found
    assert set(found["compared"]) == {
        "final adapter", "adapter in the last checkpoint", "optimizer", "scheduler", "scaler", "data order",
        "metrics, line by line", "before, after, test, best",
    }  # fmt: skip
    assert len(found["kills"]) >= kills - 1
    assert json.loads((tmp_path / "killed" / "summary.json").read_text())["resumes"] >= kills // 2

    # And what a certificate that is not one looks like: each tampered part is found by name.
    killed, words_of = tmp_path / "killed", words_for("exp_002")
    lines = (killed / "metrics.jsonl").read_text().splitlines()
    record = json.loads(lines[5]) | {"loss": math.nextafter(json.loads(lines[5])["loss"], 9)}
    (killed / "metrics.jsonl").write_text("\n".join([*lines[:5], json.dumps(record), *lines[6:]]) + "\n")
    adapter = killed / "lora_adapters" / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-1] + b"\x00")
    again = certificate(words_of, tmp_path / "straight", killed, [], seed)
    assert not again["bitwise_equal"]
    different = {name for name, item in again["compared"].items() if not item["equal"]}
    assert different == {"final adapter", "metrics, line by line"}


# --- signals and deadlines


def running(directory: Path, *options: str, updates_in_all: int = 400) -> Forked:
    """A process that would train for minutes."""
    log = directory.with_suffix(".log")
    process = Forked(words(directory, f"training.max_steps={updates_in_all}", options=options), log)
    while updates(directory) < 3:
        assert process.poll() is None, log.read_text()
        time.sleep(0.005)
    return process


def test_one_signal_saves_and_a_second_one_stops_at_once(tmp_path):
    once, twice = (running(tmp_path / name) for name in ("once", "twice"))
    for number in (signal.SIGHUP, signal.SIGCONT, signal.SIGTERM):  # as of a connection that is lost: one request
        os.kill(once.pid, number)
    os.kill(twice.pid, signal.SIGINT)
    os.kill(twice.pid, signal.SIGINT)
    code = once.wait(60)
    assert code in (128 + signal.SIGHUP, 128 + signal.SIGTERM)  # the system hands over several in an order of its own
    assert twice.wait(60) == 128 + signal.SIGINT
    reached = updates(tmp_path / "once")
    newest = tmp_path / "once" / f"checkpoint-{reached}"
    assert newest_valid([tmp_path / "once"]).path == newest
    name = signal.Signals(code - 128).name
    said = (tmp_path / "once.log").read_text()
    assert said.endswith(f"stopped by {name}\nsaved: {newest}; the same command resumes from it\n")
    assert_nothing_torn(tmp_path / "twice")
    saved = checkpoints(tmp_path / "twice")
    said = (tmp_path / "twice.log").read_text()
    assert (f"saved: {saved[-1]}" if saved else "no checkpoint is saved in") in said


def test_stop_after_saves_in_time_and_goes_on(tmp_path):
    process = running(tmp_path / "run", "--stop-after", "9s", updates_in_all=4000)
    assert process.wait(60) == 0
    said = (tmp_path / "run.log").read_text()
    assert "stopped before the --stop-after deadline, after update" in said
    assert "the same command resumes from it" in said
    reached = updates(tmp_path / "run")
    assert 3 <= reached < 4000
    assert newest_valid([tmp_path / "run"]).path.name == f"checkpoint-{reached}"
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_deadline_before_the_closing_evaluation_leaves_it_for_the_next_start(straight, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Stopper, "within", lambda self, seconds: updates(tmp_path / "run") == UPDATES)
    assert main(words(tmp_path / "run", options=("--stop-after", "1d"))) == 0
    assert "the final evaluation has not run" in capsys.readouterr().err
    assert not (tmp_path / "run" / "summary.json").exists()
    monkeypatch.undo()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(words(tmp_path / "run")) == 0
    assert contents(tmp_path / "run") == contents(straight)


@pytest.mark.parametrize("text, seconds", [("90m", 5400), ("1h30m", 5400), ("45s", 45), ("2d1h", 176400)])
def test_durations(text, seconds):
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "90", "m", "1.5h", "0s", "90 m", "5x", "99999999999d", "1h1h"])
def test_what_is_no_duration_is_refused(text, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--exp", "exp_001", "--stop-after", text])
    assert caught.value.code == 2
    assert "90m, 1h30m or 45s" in capsys.readouterr().err


# --- memory


@pytest.fixture
def parts(tiny) -> Parts:
    return build(tiny("exp_001", "lora.lora_dropout=0.0", "training.max_steps=4", "training.global_batch_size=10",
                      "training.per_device_batch_size=5", "tokenization.max_length=64"))  # fmt: skip


def short_of_memory(monkeypatch, rows: int, from_call: int = 0) -> list[int]:
    """From a call on, micro-batches of more rows than this do not fit; the sizes of all that were tried."""
    tried = []

    def limited(model, micro_batch, device):
        tried.append(len(micro_batch.row_ids))
        if len(tried) > from_call and len(micro_batch.row_ids) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return summed_loss(model, micro_batch, device)

    monkeypatch.setattr("medqa.training.loop.summed_loss", limited)
    return tried


def test_out_of_memory_splits_and_gives_the_same_result(parts, tmp_path, monkeypatch):
    (tmp_path / "plain").mkdir()
    (tmp_path / "short").mkdir()
    initial = initial_adapter(parts.experiment)
    expected = run_train(parts, Progress(), tmp_path / "plain")
    weights = adapter_weights(parts.adapted)
    again, state, said = build(parts.experiment), Progress(), []
    tried = short_of_memory(monkeypatch, rows=2, from_call=3)  # in the second micro-batch of the second update
    records = run_train(again, state, tmp_path / "short", say=said.append)
    assert tried == [5, 5, 5, 5, 3, *[2, 2, 1] * 6]
    assert state.micro_batch_rows == 2
    assert said == [
        f"update 2: out of memory with {rows} rows in a micro-batch; repeating this update with {smaller}, "
        f"and using {smaller} from now on"
        for rows, smaller in ((5, 3), (3, 2))
    ]
    for ours, theirs in zip(records, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        assert {k: ours[k] for k in ("order", "tokens")} == {k: theirs[k] for k in ("order", "tokens")}
    assert share_apart(adapter_weights(again.adapted), weights, initial) <= 1e-4


def full_of_memory() -> None:
    """Run out of memory on this CPU: torch raises a plain RuntimeError for that."""
    torch.empty(10**15)


@pytest.mark.parametrize("padding_free", [False, True])
def test_out_of_memory_on_a_cpu_is_repeated_in_smaller_micro_batches(tiny, tmp_path, padding_free):
    sets = (
        "lora.lora_dropout=0.0",
        "training.max_steps=2",
        "training.global_batch_size=8",
        "tokenization.max_length=64",
    )
    sets += ("training.per_device_batch_size=4", f"training.padding_free={str(padding_free).lower()}")
    expected = run_train(build(tiny("exp_001", *sets)), Progress(), tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    parts, said, shapes = build(tiny("exp_001", *sets)), [], []
    most_tokens = parts.stream.packed(0, parts.experiment.tokenization.loss_on, 10**9)[0].tokens if padding_free else 0

    def forward_hook(module, inputs, output):
        shapes.append(tuple(output.shape[:2]))
        if len(output) > 2 or (padding_free and output.shape[1] == most_tokens):
            full_of_memory()

    parts.base.get_input_embeddings().register_forward_hook(forward_hook)
    state = Progress(micro_batch_tokens=10**6) if padding_free else Progress()
    records = run_train(parts, state, tmp_path, say=said.append)
    assert state.step == 2
    if padding_free:
        assert (shapes[0], state.micro_batch_tokens) == ((1, most_tokens), -(-most_tokens // 2))
    else:
        assert ([len(said), state.micro_batch_rows], [rows for rows, _ in shapes]) == ([1, 2], [4, *[2] * 8])
        assert said[0].startswith("update 1: out of memory with 4 rows in a micro-batch; repeating this update with 2,")
    for ours, theirs in zip(records, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["order"] == theirs["order"]


def test_other_runtime_errors_end_the_run_as_they_are(parts, tmp_path):
    def forward_hook(module, inputs, output):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    parts.base.get_input_embeddings().register_forward_hook(forward_hook)
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2 shapes cannot be multiplied$"):
        run_train(parts, Progress(), tmp_path)


def test_the_probe_tries_a_smaller_batch_when_a_cpu_is_out_of_memory(tiny, tmp_path):
    parts = build(tiny("exp_001", "training.padding_free=true", "training.global_batch_size=8"))
    sizes: list[int] = []

    def forward_hook(module, inputs, output):
        sizes.append(output.shape[1])
        if len(sizes) == 1:
            full_of_memory()

    parts.base.get_input_embeddings().register_forward_hook(forward_hook)
    found = find_micro_batch_tokens(parts.model, parts.stream.examples, parts.experiment, parts.accelerator, None)
    assert found == sizes[1] == sizes[0] // 2


def test_the_smaller_size_is_kept_over_a_resume_and_reported(tmp_path, monkeypatch, capsys):
    directory = tmp_path / "run"
    short_of_memory(monkeypatch, rows=2)
    assert main(words(directory, "training.max_steps=4")) == 0
    assert "update 1: out of memory with 4 rows in a micro-batch" in capsys.readouterr().out
    monkeypatch.undo()
    tried = short_of_memory(monkeypatch, rows=99)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(words(directory)) == 0
    assert set(tried) == {2}
    assert json.loads((directory / "summary.json").read_text())["micro_batch_rows"] == 2


def test_a_single_row_that_does_not_fit_ends_the_run(tmp_path, monkeypatch, capsys):
    directory = tmp_path / "run"
    short_of_memory(monkeypatch, rows=0, from_call=5)
    assert main(words(directory)) == 3
    said = capsys.readouterr().err
    assert "update 3: CUDA out of memory" in said
    assert "with a single example in the micro-batch; lower tokenization.max_length" in said
    assert newest_valid([directory]).path.name == "checkpoint-2"


def full_of_gpu_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("run_out", [full_of_memory, full_of_gpu_memory])
def test_out_of_memory_in_the_optimizers_step_is_not_done_again(parts, tmp_path, monkeypatch, run_out):
    def full(self, closure=None):
        run_out()

    monkeypatch.setattr(type(parts.optimizer), "step", full)
    with pytest.raises(TrainingStopped, match=r"update 1: out of memory in the optimizer step; use optimizer\.name"):
        run_train(parts, Progress(), tmp_path)


CPU_FULL = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."
NO_MEMORY = (torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(CPU_FULL), MemoryError())


@pytest.mark.parametrize("error", [*NO_MEMORY, RuntimeError("a defect")], ids=repr)
def test_evaluation_makes_do_with_less(error, parts, monkeypatch):
    from medqa.model.loss import token_losses

    def limited(model, micro_batch, device):
        if len(micro_batch.row_ids) > 2:
            raise error
        return token_losses(model, micro_batch, device)

    rows = parts.examples["train"][:9]
    expected = parts.evaluator().row_losses(rows)
    monkeypatch.setattr("medqa.evaluation.loss.token_losses", limited)
    if error not in NO_MEMORY:
        with pytest.raises(RuntimeError, match="a defect"):
            parts.evaluator().row_losses(rows)
        return
    for padding_free in (True, False):
        found = parts.evaluator(padding_free=padding_free).row_losses(rows)
        assert found == pytest.approx(expected, rel=1e-6)


# --- disks


@pytest.fixture
def mounted(tmp_path):
    """Mounts a tmpfs of a size; what it returns mounts it anew with other options."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True)
        if done.returncode:
            pytest.skip(f"no permission to mount a small disk: {done.stderr.decode().strip()}")
        return place

    yield mount
    while subprocess.run(["umount", str(place)], capture_output=True).returncode == 0:
        continue


def test_a_full_disk(mounted, straight, capsys):
    disk = mounted("size=280k")
    assert main(words(disk / "run")) == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert "free space" in said or "make room" in said
    assert_nothing_torn(disk / "run")
    assert not list((disk / "run").glob("*.tmp*")), "half a checkpoint does not fill the disk up"
    mounted("remount,size=50m")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(words(disk / "run")) == 0
    assert contents(disk / "run") == contents(straight)


@pytest.mark.slow
def test_a_disk_that_fills_at_any_moment(mounted, straight, capsys):
    """Each time with a little more room: the configuration, the data's report, metrics, saves, the adapter fail."""
    disk = mounted("size=40k")
    ends = []
    for size in (40, 80, 120, 180, 240, 300, 360, 440, 560, 720, 1000, 4000):
        mounted(f"remount,size={size}k")
        AcceleratorState._reset_state(reset_partial_state=True)
        ends.append(main(words(disk / "run")))
        said = capsys.readouterr().err
        assert ends[-1] in (0, 2), said
        assert "Traceback" not in said
        if ends[-1] == 0:
            break
    assert ends.count(2) >= 5
    assert ends[-1] == 0
    assert contents(disk / "run") == contents(straight)


def test_a_disk_that_became_read_only(mounted, tmp_path, capsys, tiny):
    disk = mounted("size=10m")
    assert main(words(disk / "run", "training.max_steps=2")) == 0
    file = MetricsFile(disk / "run" / "metrics.jsonl")
    parts = build(tiny("exp_001", "model.quantization=none"))
    mounted("remount,ro")
    with pytest.raises(OSError, match="Read-only") as caught:
        file.append({"step": 9, "split": "train"})
    assert caught.value.errno == errno.EROFS
    with pytest.raises(UserError, match=r"checkpoint-0: cannot be written: .*Read-only"):
        save_checkpoint(disk / "run", parts.state, parts.identity, parts.accelerator, 3, pytest.fail)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(words(disk / "run")) == 2
    assert "is not writable" in capsys.readouterr().err


def test_a_directory_removed_in_mid_run(tmp_path, capsys):
    directory = tmp_path / "run"
    watch = when(lambda: (directory / "checkpoint-4").exists(), lambda: os.rename(directory, tmp_path / "elsewhere"))
    assert main(words(directory, "training.max_steps=200")) == 2
    watch.join(10)
    said = capsys.readouterr().err
    assert f"{directory}" in said
    assert "has been removed" in said or "cannot be written" in said
    assert_nothing_torn(tmp_path / "elsewhere")


@pytest.mark.parametrize("room", [0, 1, 40, 100])
@pytest.mark.parametrize("what", ["append", "amend"])
def test_the_metrics_file_is_never_torn(what, room, tmp_path):
    """A limit on a file's size stands for the full disk: the write is short, or refused."""
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.truncate_after(-1, 9)
    file.append({"step": 1, "split": "train", "text": "x" * 50})
    file.append({"step": 1, "split": "eval", "text": "y" * 50})
    before = file.path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + room, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"too large: '{re.escape(str(file.path))}'"):
            file.append({"step": 2, "split": "train", "z": "z" * 200}) if what == "append" else file.amend_train(
                1, z=2.0**0.5 * 10**300, **{f"more_{i}": 1.0 for i in range(20)}
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.path.read_bytes() == before
    file.append({"step": 2, "split": "train"})
    assert len(list(read_metrics(file.path))) == 3


# --- another machine


@pytest.mark.slow
def test_a_run_that_goes_on_with_other_threads_says_so(straight, tmp_path, capsys):
    directory = Path(shutil.copytree(straight, tmp_path / "run"))
    shutil.rmtree(directory / "checkpoint-6")
    (directory / "summary.json").unlink()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert main(words(directory)) == 0
    finally:
        torch.set_num_threads(threads)
    what = f"CPU threads {threads} before, {threads + 1} now"
    assert f"results may differ in the last digits from update 5: {what}" in capsys.readouterr().out
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["not_bitwise"] == [{"after_step": 4, "changed": [what]}]
    assert json.loads((straight / "summary.json").read_text())["not_bitwise"] == []


def test_quantization_is_kept_where_it_was_not_to_be_had(tmp_path, capsys, monkeypatch):
    directory = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr("medqa.model.settings.four_bit_unavailable", lambda device, dtype: "no 4-bit here")
        assert main(words(directory, "model.quantization=4bit", "training.max_steps=4")) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(words(directory, "model.quantization=4bit")) == 0
    assert "model.quantization: 4bit -> none (as in the checkpoint" in capsys.readouterr().out
    summary = json.loads((directory / "summary.json").read_text())
    assert (summary["quantization"], summary["not_bitwise"]) == ("none", [])


def test_time_of_a_killed_session_counts(straight, tmp_path):
    directory = Path(shutil.copytree(straight, tmp_path / "run"))
    shutil.rmtree(directory / "checkpoint-6")
    (directory / "summary.json").unlink()
    with (directory / "metrics.jsonl").open("a") as file:  # as if the session had gone on for long without another save
        file.write(json.dumps({"step": 6, "split": "train", "elapsed_s": 5000.0, "peak_memory_bytes": 2**42}) + "\n")
    assert main(words(directory)) == 0
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["wall_clock_s"] > 5000
    assert summary["peak_memory_bytes"] == 2**42
    assert contents(directory) == contents(straight)


# --- copies elsewhere


def same_files(ours: Path, theirs: Path) -> None:
    """The copy has all that a run leaves, but for its lock, and maybe checkpoints from before the machine was new."""
    left = {str(path.relative_to(ours)) for path in ours.rglob("*") if path.is_file() and path.name != "run.lock"}
    copied = {str(path.relative_to(theirs)) for path in theirs.rglob("*") if path.is_file() and path.name != "run.lock"}
    assert left <= copied
    assert all(name.startswith("checkpoint-") and ".tmp" not in name for name in copied - left)
    for name in left:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def test_everything_is_copied_and_a_new_machine_goes_on_from_there(straight, tmp_path, capsys):
    run, there = tmp_path / "run", tmp_path / "drive" / "run"
    there.parent.mkdir()
    options = ("--persist-to", str(there))
    assert main(words(run, "training.max_steps=4", options=options)) == 0
    said = capsys.readouterr().out
    assert f"mirror           {there}: 0.2 MB per checkpoint, 0.5 MB for the next 2" in said
    assert "GB free" in said
    same_files(run, there)
    shutil.rmtree(run)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(words(run, options=options)) == 0
    assert "resumed          after update 4" in capsys.readouterr().out
    same_files(run, there)
    ours, theirs = contents(run), contents(straight)
    # The first part ended at update 4, whose closing evaluation is over all rows.
    assert {name for name in ours if ours[name] != theirs[name]} == {"metrics, line by line"}
    assert json.loads((run / "summary.json").read_text())["resumes"] == 1


def test_a_damaged_directory_goes_on_from_the_copy(straight, tmp_path, capsys):
    run, there = tmp_path / "run", tmp_path / "there"
    assert main(words(run, "training.max_steps=4", options=("--persist-to", str(there)))) == 0
    for place in checkpoints(run):
        os.truncate(place / "state.json", 3)
    os.truncate(there / "checkpoint-4" / "training_state.pt", 100)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(words(run, options=("--persist-to", str(there)))) == 0
    said = capsys.readouterr().out
    assert "resumed          after update 2" in said
    assert len(re.findall(r"^skipped +\S", said, flags=re.MULTILINE)) == 3
    assert contents(run) == contents(straight)
    same_files(run, there)


def test_a_full_place_for_copies_never_stops_training(mounted, straight, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mirror, "LAST_WAIT_S", 1.0)
    monkeypatch.setattr(mirror, "RETRY_S", 0.05)
    disk = mounted("size=200k")
    run, options = tmp_path / "run", ("--persist-to", str(disk / "run"))
    assert main(words(run, options=options)) == 0
    said = capsys.readouterr().out.replace("\n", "")
    assert said.count("No space left on device") == 1
    assert "training continues, and copying is tried again" in said
    assert "the copy is incomplete" in said
    assert contents(run) == contents(straight)
    mounted("remount,size=50m")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(words(run, options=options)) == 0
    assert "the run is already complete" in capsys.readouterr().out
    same_files(run, disk / "run")


def test_a_place_for_copies_that_hangs_never_stops_training(straight, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mirror, "LAST_WAIT_S", 0.5)
    stuck = threading.Event()
    monkeypatch.setattr(mirror, "flush", lambda path: stuck.wait(60))
    assert main(words(tmp_path / "run", options=("--persist-to", str(tmp_path / "there")))) == 0
    stuck.set()
    assert "the copy is incomplete" in capsys.readouterr().out.replace("\n", "")
    assert contents(tmp_path / "run") == contents(straight)


def test_copies_that_read_back_differently_are_noticed_and_made_again(straight, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mirror, "RETRY_S", 0.05)
    spoilt = []

    def spoil(path: Path) -> None:
        if path.name == "training_state.pt" and len(spoilt) < 2:
            spoilt.append(path)
            os.truncate(path, 1000)

    monkeypatch.setattr(checkpoint, "drop_page_cache", spoil)
    run, there = tmp_path / "run", tmp_path / "there"
    assert main(words(run, options=("--persist-to", str(there)))) == 0
    assert len(spoilt) == 2
    assert "training continues, and copying is tried again" in capsys.readouterr().out.replace("\n", "")
    same_files(run, there)


def test_a_checkpoint_is_never_copied_without_its_metrics(straight, tmp_path, monkeypatch):
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    shutil.rmtree(run / "checkpoint-6")
    copies = Mirror(tmp_path / "there", run)
    copy = copies._copy

    def save_meanwhile(source: Path, target: Path) -> None:
        copy(source, target)
        if source.name == "metrics.jsonl" and not (run / "checkpoint-6").exists():
            shutil.copytree(straight / "checkpoint-6", run / "checkpoint-6")

    monkeypatch.setattr(copies, "_copy", save_meanwhile)
    copies._copy_all()
    assert [path.name for path in checkpoints(tmp_path / "there")] == ["checkpoint-2", "checkpoint-4"]
    copies._copy_all()
    assert [path.name for path in checkpoints(tmp_path / "there")][-1] == "checkpoint-6"


def test_copies_of_another_run_are_not_mixed_with_this_one(tmp_path, capsys):
    there = tmp_path / "there"
    for name in ("one", "two"):
        AcceleratorState._reset_state(reset_partial_state=True)
        options = ("--persist-to", str(there)) if name == "one" else ()
        assert main(words(tmp_path / name, "training.max_steps=2", options=options)) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(words(tmp_path / "two", options=("--persist-to", str(there)))) == 2
    assert "contains another run than" in capsys.readouterr().err
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(words(tmp_path / "two", "lora.r=4", options=("--fresh", "--persist-to", str(there)))) == 0
    same_files(tmp_path / "two", there)


def test_the_settings_of_chaos_are_short():
    assert "training.max_steps=24" in SHORT
