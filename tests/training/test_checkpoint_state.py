"""What a checkpoint says of optimizer, schedule and scaler is this run's, or nothing of it is loaded."""

import copy
import functools
import json
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from harness.parts import Parts, build, run_train
from medqa.errors import UserError
from medqa.files import Damaged
from medqa.model.base import adapter_weights
from medqa.training.checkpoint import (
    MANIFEST,
    QUANTIZED,
    load_checkpoint,
    newest_valid,
    read_training_state,
    save_checkpoint,
    write_manifest,
)
from medqa.training.state import Progress, TrainState

UPDATES = 3
SETS = (
    "model.quantization=none", "training.global_batch_size=8", "tokenization.max_length=96",
    f"training.max_steps={UPDATES}", "scheduler.warmup_steps=1",
)  # fmt: skip
NAN = float("nan")


class Kept:
    """The parts of a run after three updates, and its checkpoint."""

    def __init__(self, parts: Parts, directory: Path) -> None:
        self.parts, self.place = parts, directory / f"checkpoint-{UPDATES}"
        run_train(parts, Progress(), directory)
        save_checkpoint(directory, parts.state, parts.identity, parts.accelerator, 1, pytest.fail)
        self.saved = torch.load(self.place / "training_state.pt", weights_only=True)

    def changed(self, directory: Path, change: Callable[[Any], Any]) -> Path:
        """A copy of the checkpoint with another training state, and a manifest that is right for it."""
        place = Path(shutil.copytree(self.place, directory / self.place.name))
        saved = copy.deepcopy(self.saved)
        instead = change(saved)
        torch.save(saved if instead is None else instead, place / "training_state.pt")
        sign(place)
        return place

    def load(self, directory: Path) -> Progress:
        load_checkpoint(newest_valid([directory]), self.parts.state)
        return self.parts.state.progress


def sign(place: Path) -> None:
    body = json.loads((place / MANIFEST).read_text())
    (place / MANIFEST).unlink()
    write_manifest(place, {key: value for key, value in body.items() if key not in ("checksum", "files", "format")})


@pytest.fixture(scope="module")
def kept_of(tiny, tmp_path_factory) -> Callable[[str], Kept]:
    """The run with an optimizer, made once."""

    @functools.cache
    def make(optimizer: str) -> Kept:
        AcceleratorState._reset_state(reset_partial_state=True)
        experiment = tiny("exp_002", f"optimizer.name={optimizer}", *SETS)
        assert experiment.scheduler.name == "cosine"
        return Kept(build(experiment), tmp_path_factory.mktemp(optimizer))

    return make


@pytest.fixture
def adamw(kept_of) -> Kept:
    return kept_of("adamw_torch")


@pytest.fixture
def adamw_8bit(kept_of) -> Kept:
    return kept_of("paged_adamw_8bit")


@pytest.fixture(params=["adamw_torch", "paged_adamw_8bit"])
def kept(request, kept_of) -> Kept:
    return kept_of(request.param)


def assert_refused(kept: Kept, directory: Path, reason: str) -> None:
    """Said why, and nothing loaded."""
    weights, state = adapter_weights(kept.parts.adapted), copy.deepcopy(kept.parts.optimizer.state_dict())
    with pytest.raises(UserError, match=reason) as caught:
        kept.load(directory)
    assert f"{directory / kept.place.name}: valid, but its content does not fit" in str(caught.value)
    assert "--fresh" in str(caught.value)
    assert all(torch.equal(value, weights[name]) for name, value in adapter_weights(kept.parts.adapted).items())
    assert flat(kept.parts.optimizer.state_dict()) == flat(state)


def flat(value: Any, place: str = "") -> dict[str, Any]:
    """The leaves of a nested state, tensors as their type, shape and bytes."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for name, part in items for key, leaf in flat(part, f"{place}/{name}").items()}
    if isinstance(value, torch.Tensor):
        return {place: (value.dtype, tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).tolist())}
    return {place: (type(value), value)}


def test_what_was_saved_is_loaded_to_the_last_bit(kept, tmp_path):
    kept.changed(tmp_path, lambda saved: None)
    with torch.no_grad():
        for state in kept.parts.optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    value.zero_()
    kept.parts.optimizer.param_groups[0]["lr"] = 7.0
    kept.parts.scheduler.last_epoch = 0
    assert kept.load(tmp_path).step == UPDATES
    now = kept.parts.state
    assert flat(now.optimizer.state_dict()) == flat(kept.saved["optimizer"])
    assert flat(now.scheduler.state_dict()) == flat(kept.saved["scheduler"])
    kinds = {
        value.dtype for state in now.optimizer.state.values() for value in state.values() if torch.is_tensor(value)
    }
    assert (torch.uint8 in kinds) == ("8bit" in kept.parts.experiment.optimizer.name)


# --- the optimizer's tensors


def each(key: str, make: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Another value of an entry in the state of every parameter that has it."""

    def change(saved: Any) -> None:
        found = 0
        for state in saved["optimizer"]["state"].values():
            for level in (state, state.get(QUANTIZED, {})):
                if key in level:
                    level[key] = make(level[key])
                    found += 1
        assert found

    return change


def one(key: str, make: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Another value of an entry in the state of the last parameter."""

    def change(saved: Any) -> None:
        state = list(saved["optimizer"]["state"].values())[-1]
        level = state if key in state else state[QUANTIZED]
        level[key] = make(level[key])

    return change


def strided(value: torch.Tensor) -> torch.Tensor:
    """As many places as it has, all of them the same one."""
    return torch.zeros(1, dtype=value.dtype).expand(value.shape)


def set_one(value: torch.Tensor, to: float) -> torch.Tensor:
    value = value.clone()
    value.view(-1)[-1] = to
    return value


TENSORS = {
    "too small": lambda value: torch.zeros(3, dtype=value.dtype),
    "too large": lambda value: torch.zeros(*value.shape, 2, dtype=value.dtype),
    "as many in another shape": lambda value: value.reshape(-1, 1),
    "transposed": lambda value: value.T.contiguous() if value.shape[0] != value.shape[-1] else value[:0],
    "in one place": strided,
    "turned": lambda value: value.T.contiguous().T,
    "of another type": lambda value: value.double(),
    "of whole numbers": lambda value: value.to(torch.int64),
    "of half the size": lambda value: value.half(),
    "complex": lambda value: value.to(torch.complex64),
    "sparse": lambda value: value.to_sparse(),
    "nowhere": lambda value: value.to("meta"),
    "a parameter": lambda value: torch.nn.Parameter(value, requires_grad=False),
    "not finite": lambda value: set_one(value, NAN),
    "infinite": lambda value: set_one(value, float("inf")),
    "a word": lambda value: "x",
    "nothing": lambda value: None,
    "a list": lambda value: value.tolist(),
    "a number": lambda value: 1.0,
    "a table": lambda value: {"x": value},
}


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_are_not_the_optimizers(kind, key, adamw, tmp_path):
    adamw.changed(tmp_path, one(key, TENSORS[kind]))
    assert_refused(adamw, tmp_path, rf"training_state.pt: optimizer: parameter \d+: {key} ")


@pytest.mark.parametrize("key", ["state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2"])
@pytest.mark.parametrize(
    "kind", ["too small", "too large", "turned", "in one place", "of another type", "nowhere", "not finite", "a word"]
)
def test_tensors_that_are_not_the_8_bit_optimizers(kind, key, adamw_8bit, tmp_path):
    small = kind in ("not finite", "infinite") and key.startswith("state")  # of 8 bits they cannot be
    if kind == "turned" and not key.startswith("state"):
        adamw_8bit.changed(tmp_path, each(key, lambda value: value.reshape(-1, 1)))
    else:
        adamw_8bit.changed(tmp_path, (one_small if small else each)(key, TENSORS[kind]))
    assert_refused(adamw_8bit, tmp_path, rf"training_state.pt: optimizer: parameter \d+: {key} ")


def one_small(key: str, make: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Another value in the state of a parameter that is too small for 8 bits."""

    def change(saved: Any) -> None:
        states = [state[QUANTIZED] for state in saved["optimizer"]["state"].values()]
        level = next(state for state in states if "qmap1" not in state)
        level[key] = make(level[key])

    return change


@pytest.mark.parametrize("key", ["exp_avg_sq", "state2", "absmax1", "absmax2", "qmap2"])
def test_what_cannot_be_negative(key, kept_of, tmp_path):
    kept = kept_of("adamw_torch" if key == "exp_avg_sq" else "paged_adamw_8bit")
    kept.changed(tmp_path, (one_small if key == "state2" else each)(key, lambda value: set_one(value, -1e-3)))
    assert_refused(kept, tmp_path, f"{key} holds negative values")


STEPS = {
    "negative": lambda value: value * -1,
    "none yet": lambda value: value * 0,
    "of later": lambda value: value + 1,
    "a fraction": lambda value: value - 0.5,
    "not a number": lambda value: value * NAN,
    "endless": lambda value: value * float("inf"),
    "of the other kind": lambda value: value.item() if torch.is_tensor(value) else torch.tensor(float(value)),
    "several": lambda value: torch.ones(2),
    "a word": lambda value: "3",
    "huge": lambda value: 10**400,
    "a truth": lambda value: True,
}


@pytest.mark.parametrize("kind", STEPS)
def test_steps_that_the_optimizer_has_not_made(kind, kept, tmp_path):
    kept.changed(tmp_path, each("step", STEPS[kind]))
    assert_refused(
        kept, tmp_path, r"training_state.pt: optimizer: parameter \d+: (its )?step (is not|holds values that are not) "
    )


def change_state(change: Callable[[dict], Any]) -> Callable[[Any], None]:
    return lambda saved: change(saved["optimizer"]["state"]) and None


PLACES = {
    "none at all": change_state(lambda state: state.clear()),
    "one too few": change_state(lambda state: state.popitem()),
    "one too many": change_state(lambda state: state.update({999: copy.deepcopy(state[0])})),
    "by name": change_state(lambda state: state.update({"0": state.pop(0)})),
    "a list": lambda saved: saved["optimizer"].update(state=list(saved["optimizer"]["state"].values())),
    "an entry too many": change_state(lambda state: state[0].update(max_exp_avg_sq=torch.zeros(3))),
    "an entry too few": change_state(lambda state: state[0].pop("step")),
    "of one parameter nothing": change_state(lambda state: state[0].clear()),
    "of one parameter a list": change_state(lambda state: state.update({0: [1, 2]})),
    "half quantized": change_state(lambda state: state[0].update({QUANTIZED: 3})),
    "in part": lambda saved: saved["optimizer"].pop("state"),
    "with more": lambda saved: saved["optimizer"].update(x=1),
    "not there": lambda saved: saved.update(optimizer=None),
    "two groups": lambda saved: saved["optimizer"]["param_groups"].append(saved["optimizer"]["param_groups"][0]),
    "no groups": lambda saved: saved["optimizer"].update(param_groups=[]),
    "groups by name": lambda saved: saved["optimizer"].update(param_groups={"0": {}}),
    "a group that is none": lambda saved: saved["optimizer"].update(param_groups=[3]),
    "other parameters": lambda saved: saved["optimizer"]["param_groups"][0]["params"].reverse(),
    "fewer parameters": lambda saved: saved["optimizer"]["param_groups"][0]["params"].pop(),
}


@pytest.mark.parametrize("kind", PLACES)
def test_states_of_other_parameters(kind, kept, tmp_path):
    kept.changed(tmp_path, lambda saved: PLACES[kind](saved) and None)
    assert_refused(kept, tmp_path, "training_state.pt: optimizer: ")


# --- options, learning rates, the schedule


OPTIONS = {
    "lr": [1e9, -1.0, NAN, "x", None, torch.tensor(1.0), [1.0]],
    "betas": ["ab", (0.9, 0.5), [0.9, 0.999], (0.9,), (0.9, torch.tensor(0.5)), None],
    "eps": [1.0, 0.0, "x"],
    "weight_decay": [0.5, -1.0],
    "initial_lr": [1.0, {}],
    "maximize": [True, 1, "x"],
    "amsgrad": [True],
    "foreach": ["x", {}],
    "fused": [torch.tensor(1.0)],
    "capturable": [[]],
    "differentiable": ["x"],
    "decoupled_weight_decay": [False],
    "params": [None, "x", 3],
    "something else": [torch.zeros(3), "x", [1]],
    5: [1],
}


@pytest.mark.parametrize("key, value", [(key, value) for key, values in OPTIONS.items() for value in values], ids=str)
def test_other_options_are_not_taken(key, value, adamw, tmp_path):
    adamw.changed(tmp_path, lambda saved: saved["optimizer"]["param_groups"][0].update({key: value}))
    assert_refused(adamw, tmp_path, "training_state.pt: optimizer: (its options|.* is another than in this run)")


@pytest.mark.parametrize("key, value", [("alpha", 5.0), ("t_alpha", 3), ("lr", 1.0), ("betas", "ab"), ("eps", "x")])
def test_other_options_of_the_8_bit_optimizer_are_not_taken(key, value, adamw_8bit, tmp_path):
    adamw_8bit.changed(tmp_path, lambda saved: saved["optimizer"]["param_groups"][0].update({key: value}))
    assert_refused(adamw_8bit, tmp_path, f"optimizer: {key} is another than in this run")


def test_options_of_other_versions_of_torch_are_neither_loaded_nor_missed(adamw, tmp_path):
    def other_version(saved: Any) -> None:
        group = saved["optimizer"]["param_groups"][0]
        del group["decoupled_weight_decay"]
        group.update(foreach=True, fused=None, capturable=True, of_tomorrow=5)
        del saved["scheduler"]["_is_initial"]
        saved["scheduler"]["verbose"] = False

    adamw.changed(tmp_path, other_version)
    adamw.load(tmp_path)
    (group,) = adamw.parts.optimizer.param_groups
    assert group["fused"] is True
    assert group["capturable"] is False
    assert group["decoupled_weight_decay"] is True
    assert "of_tomorrow" not in group
    assert not hasattr(adamw.parts.scheduler, "verbose")


SCHEDULES = {
    "a method": {"step": 5},
    "another method": {"get_last_lr": 3},
    "the optimizer": {"optimizer": None},
    "a function": {"lr_lambdas": [{"__call__": 3}]},
    "functions too many": {"lr_lambdas": [{}, {}]},
    "words": {"base_lrs": ["x"], "last_epoch": "y", "_step_count": None},
    "another update": {"last_epoch": 10**9},
    "another count": {"_step_count": 1},
    "another rate": {"_last_lr": [0.5]},
    "another base": {"base_lrs": [0.5]},
    "rates too many": {"_last_lr": [0.01, 0.01]},
    "a tensor": {"_last_lr": [torch.tensor(0.01)]},
    "something else": {"x": "y"},
    "a table": {"_is_initial": {}},
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_other_schedules_are_not_taken(kind, kept, tmp_path):
    kept.changed(tmp_path, lambda saved: saved["scheduler"].update(SCHEDULES[kind]))
    assert_refused(kept, tmp_path, "training_state.pt: scheduler: ")


@pytest.mark.parametrize("value", [None, [], {}, 3, {"last_epoch": UPDATES}])
def test_schedules_that_are_none(value, adamw, tmp_path):
    adamw.changed(tmp_path, lambda saved: saved.update(scheduler=value))
    assert_refused(adamw, tmp_path, "training_state.pt: scheduler: its options are not complete")


def test_a_saved_learning_rate_is_never_the_one_that_is_used(kept, tmp_path):
    saved = kept.saved["scheduler"]["_last_lr"][0]
    kept.changed(tmp_path, lambda state: state["scheduler"].update(_last_lr=[saved * (1 + 1e-9)]))
    kept.load(tmp_path)
    assert kept.parts.scheduler.get_last_lr() == [saved]
    assert kept.parts.optimizer.param_groups[0]["lr"] == saved


# --- the scaler


@pytest.fixture
def scaled(adamw) -> TrainState:
    return replace(adamw.parts.state, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**14))


def state_of(scaler: torch.amp.GradScaler, **changes: Any) -> dict[str, Any]:
    return scaler.state_dict() | changes


def read_scaler(kept: Kept, state: TrainState, directory: Path, value: Any) -> Any:
    place = kept.changed(directory, lambda saved: saved.update(scaler=value))
    return read_training_state(place / "training_state.pt", state, UPDATES, True)["scaler"]


def test_the_scale_goes_on(scaled, adamw, tmp_path):
    value = state_of(scaled.scaler, scale=2.0**9, _growth_tracker=7)
    found = read_scaler(adamw, scaled, tmp_path, value)
    scaled.scaler.load_state_dict(found)
    assert scaled.scaler.state_dict() == value
    assert read_scaler(adamw, adamw.parts.state, tmp_path / "none", value) is None


@pytest.mark.parametrize(
    "changes",
    [{"scale": 0.0}, {"scale": -1.0}, {"scale": NAN}, {"scale": float("inf")}, {"scale": "x"}, {"scale": 10**400},
     {"scale": torch.tensor(1.0)}, {"_growth_tracker": -1}, {"_growth_tracker": 1.5}, {"_growth_tracker": None},
     {"growth_factor": 0.0}, {"growth_factor": "x"}, {"backoff_factor": 1.0}, {"growth_interval": 0},
     {"step": torch.zeros(1)}],
    ids=str,
)  # fmt: skip
def test_other_scalers_are_not_taken(changes, scaled, adamw, tmp_path):
    with pytest.raises(Damaged, match=r"^training_state\.pt: scaler: "):
        read_scaler(adamw, scaled, tmp_path, state_of(scaled.scaler, **changes))


@pytest.mark.parametrize("value", [{}, [], 3, "x", {"scale": 1.0}])
def test_scalers_that_are_none(value, scaled, adamw, tmp_path):
    with pytest.raises(Damaged, match=r"^training_state\.pt: scaler: "):
        read_scaler(adamw, scaled, tmp_path, value)


# --- the file


@pytest.mark.parametrize("value", [None, [], 3, "x", {}, {"optimizer": {}}, torch.zeros(2)], ids=str)
def test_files_of_something_else(value, adamw, tmp_path):
    adamw.changed(tmp_path, lambda saved: [] if value is None else value)
    assert_refused(adamw, tmp_path, "training_state.pt: does not hold the states of optimizer, scheduler")


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def packed(path: Path, saved: Any) -> None:
    """The same content, compressed, and a gigabyte of zeros."""
    torch.save(saved, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
        archive.writestr("archive/data/999", bytes(2**20))


FILES = {
    "code": lambda path, saved: torch.save({"optimizer": Bomb(path.with_name("ran"))}, path),
    "a bare pickle of code": lambda path, saved: path.write_bytes(pickle.dumps(Bomb(path.with_name("ran")))),
    "empty": lambda path, saved: path.write_bytes(b""),
    "not an archive": lambda path, saved: path.write_bytes(b"\0" * 1000),
    "an archive of something else": lambda path, saved: zipfile.ZipFile(path, "w").close(),
    "packed": packed,
    "endless": lambda path, saved: (torch.save(saved, path), os.truncate(path, 2**26)),
    "in the old form": lambda path, saved: torch.save(saved, path, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_none(kind, adamw, tmp_path):
    place = adamw.changed(tmp_path, lambda saved: None)
    FILES[kind](place / "training_state.pt", adamw.saved)
    sign(place)
    assert_refused(adamw, tmp_path, "training_state.pt: (cannot be read|is compressed|has [0-9,]+ bytes, more than)")
    assert not (place / "ran").exists()


@pytest.mark.parametrize("seed", range(20))
def test_any_changed_bytes_are_refused_or_harmless(seed, adamw, tmp_path):
    """Bytes of the pickle and of the archive's own records, with checksums that are right for them."""
    place = adamw.changed(tmp_path, lambda saved: None)
    path, rng = place / "training_state.pt", random.Random(seed)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        (entry,) = (entry for entry in archive.infolist() if entry.filename.endswith("data.pkl"))
        start = archive.start_dir
    for _ in range(rng.randint(1, 8)):
        where = rng.randrange(entry.header_offset, entry.header_offset + entry.file_size + 64)
        if rng.random() < 0.4:
            where = rng.randrange(start, len(content))
        content[where] = rng.randrange(256)
    path.write_bytes(content)
    try:
        found = read_training_state(path, adamw.parts.state, UPDATES, True)
    except Damaged:
        pass
    else:
        assert found["scheduler"] == adamw.parts.scheduler.state_dict()
