"""Checkpoints are whole or absent: damage is named and passed over, other runs' are refused, nothing runs code."""

import errno
import fcntl
import functools
import json
import multiprocessing
import os
import pickle
import random
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import init_empty_weights
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from short_run import UPDATES, words
from transformers import LlamaConfig, LlamaForCausalLM

from harness.faults import DAMAGES
from medqa.commands.verify_resume import contents
from medqa.config import Experiment, Lora
from medqa.errors import UserError
from medqa.files import checksum
from medqa.limits import MAX_JSON_BYTES
from medqa.model.base import adapter_weights
from medqa.tiny import BASE_DIR, MEDQUAD_CSV
from medqa.training.checkpoint import (
    CONTENT,
    MANIFEST,
    checkpoints,
    is_ours,
    measure,
    newest_valid,
    prune,
    unfinished,
    write_manifest,
)
from medqa.training.recorder import read_metrics
from medqa.training.run_dir import LOCK_FILE, RUN_FILE, RunLock, clear, this_process
from train import main

pytestmark = pytest.mark.usefixtures("apart")


@pytest.fixture
def half(straight, tmp_path) -> Path:
    """The run as it was after update 4: checkpoints 2 and 4."""
    directory = Path(shutil.copytree(straight, tmp_path / "half"))
    (directory / "summary.json").unlink()
    shutil.rmtree(directory / "lora_adapters")
    shutil.rmtree(directory / "checkpoint-6")
    return directory


def rehash(place: Path, **changes: object) -> None:
    """A manifest as somebody who knows how would write it after changing files."""
    body = json.loads((place / MANIFEST).read_text()) | changes
    (place / MANIFEST).unlink()
    write_manifest(place, {key: value for key, value in body.items() if key not in ("checksum", "files", "format")})


def reseal(place: Path, change) -> None:
    """A manifest with a right checksum over a changed content."""
    body = json.loads((place / MANIFEST).read_text())
    del body["checksum"]
    change(body)
    body["checksum"] = checksum(body)
    (place / MANIFEST).write_text(json.dumps(body))


# --- damage


# A file of holes takes no time to make, and hours to read.
ALL_DAMAGES = DAMAGES | {"endless": lambda path: os.truncate(path, 2**40)}


@pytest.mark.parametrize("damage", ALL_DAMAGES)
@pytest.mark.parametrize("name", [*CONTENT, MANIFEST])
def test_every_damage_to_every_file_is_named_and_passed_over(name, damage, half):
    ALL_DAMAGES[damage](half / "checkpoint-4" / name)
    found = newest_valid([half])
    assert found.path == half / "checkpoint-2"
    (reason,) = found.skipped
    assert reason.startswith(f"{half / 'checkpoint-4'} is damaged: ")
    assert name in reason or MANIFEST in reason


@pytest.mark.parametrize("seed", range(20))
def test_any_one_bit_is_noticed(seed, half):
    rng = random.Random(seed)
    path = half / "checkpoint-4" / rng.choice([*CONTENT, MANIFEST])
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    assert newest_valid([half]).path.name == "checkpoint-2", path.name


MANIFESTS = {
    "not JSON": lambda path: path.write_text("{"),
    "not an object": lambda path: path.write_text("[]"),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "nested without end": lambda path: path.write_text("[" * 100_000),
    "endless": lambda path: path.write_bytes(b" " * MAX_JSON_BYTES + path.read_bytes()),
    "another format": lambda path: reseal(path.parent, lambda body: body.update(format=99)),
    "files elsewhere": lambda path: reseal(
        path.parent, lambda body: body.update(files={"../../x": measure(path.parent / "state.json")})
    ),
    "one file more": lambda path: reseal(path.parent, lambda body: body["files"].update(x={"size": 1, "sha256": ""})),
    "no files": lambda path: reseal(path.parent, lambda body: body.update(files=None)),
    "file without size": lambda path: reseal(path.parent, lambda body: body["files"].update({"state.json": 3})),
    "no experiment": lambda path: reseal(path.parent, lambda body: body.pop("experiment")),
    "another dtype": lambda path: reseal(
        path.parent, lambda body: body["environment"]["settings"].update(dtype="int3")
    ),
    "no environment": lambda path: reseal(path.parent, lambda body: body.update(environment=3)),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_manifests_that_are_none(kind, half):
    MANIFESTS[kind](half / "checkpoint-4" / MANIFEST)
    found = newest_valid([half])
    assert found.path.name == "checkpoint-2"
    assert MANIFEST in found.skipped[0]


def test_a_manifest_may_name_thousands_of_sources(half):
    files = {f"source_{i}": f"/data/{'a/long/path/' * 40}{i}.csv" for i in range(2000)}
    place = half / "checkpoint-4"
    body = json.loads((place / MANIFEST).read_text())
    rehash(place, experiment=body["experiment"] | {"data.files": files})
    assert (place / MANIFEST).stat().st_size > 1_000_000
    assert newest_valid([half]).identity.experiment["data.files"] == files


@pytest.mark.parametrize("name", ["checkpoint-40", "checkpoint-5"])
def test_a_checkpoint_under_another_name_is_passed_over(name, half, straight, capsys):
    shutil.copytree(half / "checkpoint-4", half / name)
    assert main(words(half)) == 0
    said = capsys.readouterr().out.replace("\n", "")
    assert f"skipped          {half / name} is damaged: manifest.json has another update than the name" in said
    assert "resumed          after update 4" in said
    shutil.rmtree(half / name)
    assert contents(half) == contents(straight)


def test_with_nothing_whole_left_the_run_does_not_start_over(half, capsys):
    (half / "checkpoint-4" / "state.json").write_text("{}")
    os.truncate(half / "checkpoint-2" / MANIFEST, 10)
    before = {path: path.read_bytes() for path in half.rglob("*") if path.is_file() and path.name != LOCK_FILE}
    assert main(words(half)) == 2
    said = capsys.readouterr().err
    assert "no valid checkpoint is left" in said
    assert f"{half / 'checkpoint-4'} is damaged: state.json" in said
    assert f"{half / 'checkpoint-2'} is damaged: manifest.json: not valid JSON" in said
    assert "--fresh" in said
    assert {path: path.read_bytes() for path in half.rglob("*") if path.is_file() and path.name != LOCK_FILE} == before


def test_checkpoints_that_have_gone_are_missed(half, capsys):
    for place in checkpoints(half):
        shutil.rmtree(place)
    assert main(words(half)) == 2
    assert "the checkpoints of this run are missing" in capsys.readouterr().err
    assert main(words(half, options=("--fresh",))) == 0


@pytest.mark.parametrize(
    "name, damage",
    [("training_state.pt", "cut"), (MANIFEST, "missing"), ("state.json", "a pipe"), ("adapter_config.json", "empty"),
     ("adapter_model.safetensors", "flipped")],
)  # fmt: skip
def test_a_run_goes_on_from_an_older_one_with_the_same_result(name, damage, half, straight, capsys):
    DAMAGES[damage](half / "checkpoint-4" / name)
    assert main(words(half)) == 0
    said = capsys.readouterr().out
    assert f"{half / 'checkpoint-4'} is damaged: {name}" in said.replace("\n", "")
    assert "resumed          after update 2" in said
    assert contents(half) == contents(straight)
    assert newest_valid([half]).path.name == "checkpoint-6"
    shutil.rmtree(half / "checkpoint-6")
    assert newest_valid([half]).path.name == "checkpoint-4", "the damaged one was written anew"


# --- whole, but of something else


def test_another_experiments_checkpoint_is_refused_whatever_lies_beside_it(half, capsys):
    (half / "config.yaml").unlink()
    assert main(words(half, "optimizer.learning_rate=1e-4", "training.global_batch_size=16")) == 2
    said = capsys.readouterr().err
    assert "checkpoint-4 belongs to another experiment" in said
    assert "optimizer.learning_rate: 0.01 there, 0.0001 now" in said
    assert "training.global_batch_size: 8 there, 16 now" in said
    assert "lora.init_from=" in said


def test_another_base_model_is_refused(half, tmp_path, capsys):
    base = Path(shutil.copytree(BASE_DIR, tmp_path / "base"))
    assert main(words(half, options=("--model", str(base)))) == 0, "the same model elsewhere is the same"
    shutil.rmtree(half / "checkpoint-6")
    (half / "summary.json").unlink()
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] += 0.5
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(words(half, options=("--model", str(base)))) == 2
    assert (
        "checkpoint-4 was trained with other data, token ids or another base model: base model: "
        in capsys.readouterr().err
    )


def test_another_tokenizer_and_other_data_are_refused(half, tmp_path, capsys):
    base = Path(shutil.copytree(BASE_DIR, tmp_path / "base"))
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-200]
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    data = tmp_path / "medquad.csv"
    data.write_text(MEDQUAD_CSV.read_text().replace("fever", "Fever"))
    assert main(words(half, options=("--model", str(base), "--medquad", str(data)))) == 2
    said = capsys.readouterr().err
    assert "token ids: " in said
    assert " data: " in said
    assert "base model" not in said.replace("another base model", "")


# --- hostile


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_code_in_a_checkpoint_never_runs(half, tmp_path, capsys):
    place = half / "checkpoint-4"
    torch.save({"optimizer": Bomb(tmp_path / "ran"), "scheduler": {}, "scaler": None}, place / "training_state.pt")
    rehash(place)
    assert main(words(half)) == 2
    assert "its content does not fit" in capsys.readouterr().err
    (place / "training_state.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    rehash(place)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(words(half)) == 2
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "state",
    [
        b"[]",
        b"{}x",
        b'{"step": "four"}',
        b'{"other": 1}',
        b'{"step": 4, "baseline": 3}',
        b"\xff",
        b'{"step": -1}',
        b'{"step": 3}',
    ],
)
def test_made_up_states_are_refused(state, half, capsys):
    (half / "checkpoint-4" / "state.json").write_bytes(state)
    rehash(half / "checkpoint-4")
    assert main(words(half)) == 2
    assert f"{half / 'checkpoint-4'}: valid, but its content does not fit" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["empty", "other shapes", "other names", "half an optimizer", "no scheduler"])
def test_made_up_tensors_are_refused(kind, half, capsys):
    place = half / "checkpoint-4"
    saved = torch.load(place / "training_state.pt", weights_only=True)
    weights = load_file(place / "adapter_model.safetensors")
    if kind == "empty":
        saved = {}
    elif kind == "other shapes":
        weights = {name: torch.zeros(3) for name in weights}
    elif kind == "other names":
        weights = {f"x.{name}": tensor for name, tensor in weights.items()}
    elif kind == "half an optimizer":
        saved["optimizer"]["param_groups"][0]["params"].pop()
    else:
        del saved["scheduler"]
    torch.save(saved, place / "training_state.pt")
    save_file(weights, place / "adapter_model.safetensors")
    rehash(place)
    assert main(words(half)) == 2
    said = capsys.readouterr().err
    assert str(place) in said
    assert "does not fit" in said


# --- pruning and leftovers


@pytest.fixture
def many(straight, tmp_path) -> Path:
    """Checkpoints 1 to 9, all whole."""
    for step in range(1, 10):
        place = Path(shutil.copytree(straight / "checkpoint-2", tmp_path / "many" / f"checkpoint-{step}"))
        reseal(place, functools.partial(dict.update, step=step))
    return tmp_path / "many"


def steps(directory: Path) -> list[int]:
    return [int(path.name.split("-")[1]) for path in checkpoints(directory)]


def test_pruning_keeps_the_newest_and_the_needed(many):
    prune(many, 3, {2, 9})
    assert steps(many) == [2, 7, 8, 9]


def test_pruning_counts_whole_ones_only_and_keeps_the_last_of_them(many):
    for step in (7, 8, 9):
        os.truncate(many / f"checkpoint-{step}" / "training_state.pt", 5)
    prune(many, 2, set())
    assert steps(many) == [5, 6, 7, 8, 9], "what is newer than the newest whole one is not touched"
    for step in (4, 5):
        shutil.rmtree(many / f"checkpoint-{step}", ignore_errors=True)
    prune(many, 2, set())
    assert 6 in steps(many)
    shutil.rmtree(many / "checkpoint-6")
    prune(many, 1, set())
    assert steps(many) == [7, 8, 9], "with nothing whole nothing is removed"


def test_pruning_touches_no_link_and_nothing_of_others(many, tmp_path):
    outside = Path(shutil.copytree(many / "checkpoint-1", tmp_path / "outside"))
    shutil.rmtree(many / "checkpoint-1")
    (many / "checkpoint-1").symlink_to(outside)
    (many / "checkpoint-2" / "notes.txt").write_text("mine")
    (many / "checkpoint-3" / "state.json").unlink()
    (many / "checkpoint-3" / "state.json").symlink_to(outside / "state.json")
    (many / "checkpoint-4.bak").mkdir()
    (many / "checkpoint-best").mkdir()
    (many / "checkpoint-0x5").write_text("mine")
    prune(many, 1, set())
    assert steps(many) == [1, 2, 3, 9]
    assert (many / "checkpoint-2" / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in outside.iterdir()) == sorted([*CONTENT, MANIFEST])
    assert {"checkpoint-4.bak", "checkpoint-best", "checkpoint-0x5"} <= {path.name for path in many.iterdir()}


def test_a_run_prunes_as_it_goes_and_keeps_its_best(straight, tmp_path):
    run = tmp_path / "run"
    # The last update is not due for an evaluation, and what the closing one finds is not in its checkpoint.
    assert main(words(run, "training.keep_checkpoints=1", "training.save_steps=1", "evaluation.steps=4")) == 0
    losses = {r["step"]: r["loss"] for r in read_metrics(run / "metrics.jsonl") if r["split"] == "eval"}
    assert losses[4] < losses[0]
    assert json.loads((run / "checkpoint-6" / "state.json").read_text())["best_step"] == 4
    assert steps(run) == [4, UPDATES]


def test_leftovers_of_a_killed_save_go_and_nothing_else(half, straight, tmp_path):
    shutil.copytree(straight / "checkpoint-6", half / "checkpoint-6.tmp")
    (half / "checkpoint-6.tmp" / MANIFEST).unlink()
    shutil.copytree(half / "checkpoint-6.tmp", half / "checkpoint-5.tmp")
    shutil.copytree(straight / "checkpoint-6", half / "checkpoint-8.tmp")
    (half / "checkpoint-8.tmp" / "notes.txt").write_text("mine")
    (half / "checkpoint-9.tmp").symlink_to(tmp_path)
    assert sorted(path.name for path in unfinished(half)) == ["checkpoint-5.tmp", "checkpoint-6.tmp"]
    assert main(words(half)) == 0
    left = {path.name for path in half.iterdir()}
    assert not {"checkpoint-5.tmp", "checkpoint-6.tmp"} & left
    assert {"checkpoint-8.tmp", "checkpoint-9.tmp"} <= left
    assert contents(half) == contents(straight)


def test_what_somebody_put_where_a_checkpoint_goes_is_moved_aside(half, straight):
    (half / "checkpoint-6").mkdir()
    (half / "checkpoint-6" / "notes.txt").write_text("mine")
    assert main(words(half)) == 0
    assert contents(half) == contents(straight)
    (aside,) = half.glob("checkpoint-6.aside-*")
    assert (aside / "notes.txt").read_text() == "mine"
    assert is_ours(half / "checkpoint-6")


@pytest.fixture
def open_elsewhere(monkeypatch):
    """As a network file system does with files that another process has open: removed, they are there under a name."""
    unlink = os.unlink

    def hide(path, *, dir_fd=None):
        if os.path.basename(path).startswith(".nfs"):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
        if dir_fd is None and os.path.basename(path) == "adapter_model.safetensors":
            return os.rename(path, Path(path).with_name(".nfs0000000000abcdef"))
        return unlink(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", hide)


def leftovers(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("checkpoint-*") if path.name.endswith(".tmp"))


@pytest.mark.usefixtures("open_elsewhere")
def test_files_that_are_open_elsewhere_stop_no_save(straight, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(words(run, "training.keep_checkpoints=1", "training.save_steps=1")) == 0
    said = capsys.readouterr().out.replace("\n", "")
    first = leftovers(run)[0].name
    assert first.startswith("checkpoint-1.")
    what = "the old checkpoint-1 cannot be removed (.nfs0000000000abcdef: still open in another process)"
    assert said.count("cannot be removed") == 1
    assert (
        f"{run}: {what}; the rest of it stays, as {first}. This message is not repeated for other checkpoints" in said
    )
    assert steps(run) == [4, 6], "4 is the best"
    assert len(leftovers(run)) == 4, "of 1, 2, 3 and 5"
    for left in leftovers(run):
        assert [path.name for path in left.iterdir()] == [".nfs0000000000abcdef"]
    assert contents(run) == contents(straight)


@pytest.mark.usefixtures("open_elsewhere")
def test_what_is_left_of_a_removal_is_no_checkpoint_and_in_nobodys_way(half, straight):
    prune(half, 1, set())
    (left,) = leftovers(half)
    assert newest_valid([half]).path.name == "checkpoint-4"
    assert newest_valid([half]).skipped == []
    shutil.rmtree(half / "checkpoint-4")
    assert newest_valid([half]) is None
    shutil.copytree(straight / "checkpoint-4", half / "checkpoint-4")
    shutil.copytree(straight / "checkpoint-6", half / "checkpoint-6")
    os.truncate(half / "checkpoint-6" / "state.json", 3)  # which a save finds in its way
    (left / ".nfs0000000000abcdef").rename(left / "state.json")  # as if it were still to be removed
    assert main(words(half)) == 0
    assert contents(half) == contents(straight)
    assert not left.exists()


@pytest.mark.usefixtures("open_elsewhere")
def test_fresh_where_files_are_open_elsewhere(half, straight):
    assert main(words(half, options=("--fresh",))) == 0
    assert contents(half) == contents(straight)
    assert len(leftovers(half)) == 2
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(words(half, options=("--fresh",))) == 0
    assert contents(half) == contents(straight)


@pytest.fixture
def busy(tmp_path):
    """Makes a file one that cannot be removed, by mounting another on it."""
    source = tmp_path / "busy"
    source.write_text("busy")

    def make(path: Path) -> None:
        done = subprocess.run(["mount", "--bind", str(source), str(path)], capture_output=True)
        if done.returncode:
            pytest.skip(f"no permission to mount: {done.stderr.decode().strip()}")

    yield make
    for line in Path("/proc/self/mounts").read_text().splitlines():
        if line.split()[1].startswith(str(tmp_path)):  # it may have been moved
            subprocess.run(["umount", "-l", line.split()[1]], check=True)


def test_a_checkpoint_of_which_nothing_can_be_removed_stays_whole(many, busy):
    manifest = (many / "checkpoint-3" / MANIFEST).read_bytes()
    busy(many / "checkpoint-3" / MANIFEST)
    (said,) = prune(many, 2, set())
    what = "the old checkpoint-3 cannot be removed (manifest.json: Device or resource busy); it stays. "
    assert said.startswith(f"{many}: {what}")
    assert steps(many) == [3, 8, 9]
    subprocess.run(["umount", str(many / "checkpoint-3" / MANIFEST)], check=True)
    assert (many / "checkpoint-3" / MANIFEST).read_bytes() == manifest
    busy(many / "checkpoint-8" / "state.json")
    (said,) = prune(many, 1, set())
    (left,) = leftovers(many)
    assert "the old checkpoint-8 cannot be removed (state.json: Device or resource busy)" in said
    assert f"; the rest of it stays, as {left.name}. " in said
    assert steps(many) == [9]


def test_what_stays_of_an_old_checkpoint_is_said_in_one_sentence_with_its_cause(many, monkeypatch):
    """As of a file that is marked immutable; the same sentence at the next save, which therefore is not shown again."""
    unlink = os.unlink

    def refuse(path, *, dir_fd=None):
        if os.path.basename(path) == "state.json":
            raise OSError(errno.EPERM, os.strerror(errno.EPERM), str(path))
        return unlink(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", refuse)
    (said,) = prune(many, 7, set())
    left = leftovers(many)
    assert [path.name.split(".")[0] for path in left] == ["checkpoint-1", "checkpoint-2"]
    what = "the old checkpoint-1 cannot be removed (state.json: Operation not permitted)"
    assert said == (
        f"{many}: {what}; the rest of it stays, as {left[0].name}. This message is not repeated for other checkpoints"
    )
    assert prune(many, 3, set()) == [said]
    assert len(leftovers(many)) == 6
    monkeypatch.setattr(os, "unlink", unlink)
    assert prune(many, 3, set()) == []
    assert leftovers(many) == []
    assert steps(many) == [7, 8, 9]


def test_a_damaged_checkpoint_that_cannot_be_removed_is_moved_aside(half, straight, busy):
    shutil.copytree(straight / "checkpoint-6", half / "checkpoint-6")
    busy(half / "checkpoint-6" / MANIFEST)
    assert main(words(half)) == 0
    assert contents(half) == contents(straight)
    assert len(list(half.glob("checkpoint-6.aside-*"))) == 1


@pytest.fixture
def nobody(tmp_path):
    """Not root, who may do everything."""
    if os.getuid():
        yield
        return
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == 0 and path not in (Path("/"), Path("/tmp")):
            path.chmod(path.stat().st_mode | 0o755)
    for path in tmp_path.rglob("*"):
        os.chown(path, 65534, 65534)
    os.setresuid(65534, 65534, 0)
    yield
    os.setresuid(0, 0, 0)


def test_a_write_protected_checkpoint_stays_and_fresh_removes_nothing(many, nobody):
    (many / RUN_FILE).write_text('{"run_id": "x", "resumes": 0, "saved": true}')
    (many / "checkpoint-3").chmod(0o555)
    try:
        before = {path: path.read_bytes() for path in many.rglob("*") if path.is_file()}
        with pytest.raises(UserError, match=r"no permission to remove files in .*checkpoint-3; nothing was removed"):
            clear(many)
        assert {path: path.read_bytes() for path in many.rglob("*") if path.is_file()} == before
        (said,) = prune(many, 2, set())
        assert "the old checkpoint-3 cannot be removed (manifest.json: Permission denied); it stays. " in said
        assert steps(many) == [3, 8, 9]
        assert newest_valid([many]).path.name == "checkpoint-9"
    finally:
        (many / "checkpoint-3").chmod(0o755)


def test_a_linked_checkpoint_is_gone_on_from_and_not_written_through(half, straight, tmp_path):
    shutil.move(half / "checkpoint-4", tmp_path / "elsewhere")
    (half / "checkpoint-4").symlink_to(tmp_path / "elsewhere")
    before = {path.name: path.read_bytes() for path in (tmp_path / "elsewhere").iterdir()}
    assert main(words(half)) == 0
    assert contents(half) == contents(straight)
    assert {path.name: path.read_bytes() for path in (tmp_path / "elsewhere").iterdir()} == before


# --- size


def test_tinyllamas_checkpoint_is_as_small_as_promised(tmp_path):
    """From its configuration: 26 MB of adapter, 52 MB of AdamW's state. No weight of the base is made for it."""
    lora = Experiment().lora
    assert lora == Lora()
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    with init_empty_weights():
        model = get_peft_model(
            LlamaForCausalLM(config),
            LoraConfig(r=lora.r, lora_alpha=lora.lora_alpha, target_modules=lora.target_modules, task_type="CAUSAL_LM"),
        )
    shapes = {name: tensor.shape for name, tensor in model.named_parameters() if tensor.requires_grad}
    count = sum(shape.numel() for shape in shapes.values())
    assert count == 22 * 8 * (4 * 2048 + 2 * (2048 + 256) + 3 * (2048 + 5632))  # q, o; k, v; gate, up, down
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes.values()]
    save_file({name: p.detach() for name, p in zip(shapes, parameters, strict=True)}, tmp_path / "adapter")
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.save({"optimizer": optimizer.state_dict()}, tmp_path / "state")
    assert 4 * count < (tmp_path / "adapter").stat().st_size < 26e6
    assert 8 * count < (tmp_path / "state").stat().st_size < 52e6


def test_a_checkpoint_has_the_bytes_of_its_parameters(straight):
    weights = load_file(straight / "checkpoint-6" / "adapter_model.safetensors")
    count = sum(tensor.numel() for tensor in weights.values())
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert 4 * count < (straight / "checkpoint-6" / "adapter_model.safetensors").stat().st_size < 4 * count + 5_000
    assert 8 * count < (straight / "checkpoint-6" / "training_state.pt").stat().st_size < 8 * count + 60_000
    assert callable(adapter_weights)


def test_saving_time_is_reported(straight):
    saved = [record["step"] for record in read_metrics(straight / "metrics.jsonl") if "save_s" in record]
    assert saved == [2, 4, 6]


# --- one run at a time


def test_a_second_run_is_refused_at_once(half, capsys):
    with RunLock(half) as held:
        held.acquire()
        assert main(words(half)) == 2
    said = capsys.readouterr()
    assert f"another run is using it (process {os.getpid()} on " in said.err
    assert not said.out


def test_another_process_that_died_holds_nobody_up(half):
    forked = multiprocessing.get_context("fork")
    held = forked.Event()

    def hold() -> None:
        lock = RunLock(half)
        lock.acquire()
        held.set()
        time.sleep(600)

    other = forked.Process(target=hold)
    other.start()
    assert held.wait(60)
    with RunLock(half) as mine, pytest.raises(UserError, match=f"process {other.pid} on "):
        mine.acquire_if_exists()
    other.kill()
    other.join()
    with RunLock(half) as mine:
        mine.acquire()


@pytest.fixture
def no_flock(monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


ALIVE = {"pid": os.getppid(), "started": psutil.Process(os.getppid()).create_time()}
OTHERS = {
    "of a machine that is gone": {**this_process(), **ALIVE, "host": "colab-1"},
    "from before this boot": {**this_process(), **ALIVE, "boot": "before"},
    "of a process that is dead": {**this_process(), "pid": 2**22 - 7},
    "of a process whose number another one has": {**this_process(), "pid": os.getppid(), "started": 5.0},
    "of this process": this_process(),
    "of nobody": [],
    "odd": {"host": 1, "boot": None, "pid": "x", "started": "y"},
}


@pytest.mark.usefixtures("no_flock")
@pytest.mark.parametrize("kind", OTHERS)
def test_where_there_are_no_locks_a_left_one_holds_nobody_up(kind, half):
    (half / LOCK_FILE).write_text(json.dumps(OTHERS[kind]))
    with RunLock(half) as mine:
        mine.acquire()
    assert json.loads((half / LOCK_FILE).read_text()) == this_process()


@pytest.mark.usefixtures("no_flock")
def test_where_there_are_no_locks_a_living_process_is_known_by_its_file(half):
    (half / LOCK_FILE).write_text(json.dumps(this_process() | ALIVE))
    with RunLock(half) as mine, pytest.raises(UserError, match="another run is using it"):
        mine.acquire()
