"""`training_state.pt`: the state of optimizer, learning rate schedule and gradient scaler, written and read.

A file that is read may have been made up, checksums included. The optimizers' kernels read and write as many elements
as a parameter has, whatever the tensors of their state hold; options such as `maximize` turn training around; an entry
of a schedule's state can replace one of its methods. Everything is therefore compared with what this run's own
optimizer, schedule and scaler have before anything is loaded, and nothing is loaded but what cannot be known without
the file: the optimizer's tensors, and the scale. Options and learning rates are the run's own.
"""

import io
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from medqa.files import Damaged, open_regular
from medqa.limits import MAX_SHOWN
from medqa.training.state import TrainState

# bitsandbytes keeps the quantized tensors of a parameter's state below this key, older versions beside the others.
QUANTIZED = "__bnb_optimizer_quant_state__"
# Options that decide how the optimizer computes its step and not which: a run may go on with others.
HOW = ("foreach", "fused", "capturable", "differentiable")
NOT_NEGATIVE = ("exp_avg_sq", "state2", "absmax1", "absmax2", "qmap2")
KNOWN_OF_SCHEDULE = {"base_lrs", "last_epoch", "_step_count", "_last_lr"}
# What loading a file that somebody made up may raise, from zipfile and from torch's own reader of pickles.
MADE_UP = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
)


def training_state(state: TrainState) -> memoryview:
    """The content of the file."""
    content = io.BytesIO()
    torch.save(
        {
            "optimizer": state.optimizer.state_dict(),
            "scheduler": state.scheduler.state_dict(),
            "scaler": state.scaler.state_dict() if state.scaler else None,
        },
        content,
    )
    return content.getbuffer()


def read_training_state(path: Path, state: TrainState, step: int, moved: bool) -> dict[str, Any]:
    """The states of `optimizer`, `scheduler` and `scaler` after update `step`, to be loaded into those of `state`.

    Args:
        moved: whether any of those updates had a target, so that the optimizer made a step.

    Raises:
        Damaged: the file's content is not the state that this run's optimizer, schedule and scaler have after `step`
            updates. Nothing is loaded.
    """
    try:
        saved = _unpickled(path, state)
        if not isinstance(saved, dict) or saved.keys() != {"optimizer", "scheduler", "scaler"}:
            raise Damaged("does not hold the states of optimizer, scheduler and scaler")
        schedule = state.scheduler
        rates = [
            float(rate * factor(step)) for rate, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        return {
            "optimizer": _optimizer_state(saved["optimizer"], state.optimizer, rates, step, moved),
            "scheduler": _scheduler_state(saved["scheduler"], state.scheduler, rates, step),
            "scaler": _scaler_state(saved["scaler"], state.scaler),
        }
    except Damaged as error:
        raise Damaged(f"{path.name}: {error}") from error
    except OSError as error:
        raise Damaged(f"{path.name}: {error.strerror}") from error


def _unpickled(path: Path, state: TrainState) -> Any:
    """What the file holds. A file much longer than such states, or one that unpacks to more than it holds, is refused.

    Raises:
        Damaged, OSError: it cannot be read.
    """
    parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    most = 1_000_000 + sum(16 * parameter.numel() + 10_000 for parameter in parameters)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise Damaged(f"has {size:,} bytes, more than this run's states can take")
        try:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
            if any(entry.compress_type for entry in entries) or sum(entry.file_size for entry in entries) > size:
                raise Damaged("is packed, which torch.save does not do")
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
        except MADE_UP as error:
            raise Damaged(f"cannot be read ({type(error).__name__}: {str(error)[:MAX_SHOWN]})") from error


def _optimizer_state(
    saved: Any, optimizer: torch.optim.Optimizer, rates: list[float], step: int, moved: bool
) -> dict[str, Any]:
    """The saved tensors with this run's own options.

    Raises:
        Damaged: an option is another than in this run, or a tensor is not as this run's optimizer has it.
    """
    own = optimizer.state_dict()["param_groups"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    ids = [number for group in own for number in group["params"]]
    if not isinstance(saved, dict) or saved.keys() != {"state", "param_groups"} or not isinstance(saved["state"], dict):
        raise Damaged("optimizer: not the state of an optimizer")
    groups = saved["param_groups"]
    if not isinstance(groups, list) or len(groups) != len(own):
        raise Damaged(f"optimizer: has not the {len(own)} groups of parameters of this run")
    groups_now = [group | {"lr": rate} for group, rate in zip(own, rates, strict=True)]
    for group, now in zip(groups, groups_now, strict=True):
        _require_options("optimizer", group, now, {"params", "lr"}, ignored=HOW)
    state = saved["state"]
    if state.keys() != (set(ids) if moved else set()):
        raise Damaged(f"optimizer: the state is not that of the {len(ids)} parameters of this run")
    flat = {number: _flat(of_one) for number, of_one in state.items()}
    for number, parameter in zip(ids, parameters, strict=True):
        if number in flat:
            _require_tensors(f"optimizer: parameter {number}", flat[number], _layout(optimizer, parameter), step)
    return {"state": flat, "param_groups": groups_now}


def _flat(of_one: Any) -> dict[str, Any]:
    """A parameter's state on one level, as all versions of bitsandbytes read it."""
    if not isinstance(of_one, dict):
        raise Damaged("optimizer: the state of a parameter is no table")
    quantized = of_one.get(QUANTIZED, {})
    if not isinstance(quantized, dict):
        raise Damaged("optimizer: the quantized state of a parameter is no table")
    return {key: value for key, value in of_one.items() if key != QUANTIZED} | quantized


def _layout(optimizer: Any, parameter: torch.Tensor) -> dict[str, tuple[tuple[int, ...], torch.dtype] | None]:
    """Shapes and types of the tensors that an optimizer keeps for a parameter. None stands for a plain integer."""
    inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate's is a wrapper
    shape, count = tuple(parameter.shape), parameter.numel()
    if isinstance(inner, torch.optim.AdamW):
        same = (shape, parameter.dtype)
        return {"step": ((), torch.float32), "exp_avg": same, "exp_avg_sq": same}
    if count < inner.args.min_8bit_size:  # bitsandbytes keeps the state of small parameters in 32 bits
        return {"step": None, "state1": (shape, torch.float32), "state2": (shape, torch.float32)}
    quantized, levels, blocks = (shape, torch.uint8), ((256,), torch.float32), ((-(-count // 256),), torch.float32)
    return {
        "step": None,
        **{"state1": quantized, "qmap1": levels, "absmax1": blocks},
        **{"state2": quantized, "qmap2": levels, "absmax2": blocks},
    }


def _require_tensors(
    what: str, found: Mapping[str, Any], layout: Mapping[str, tuple[tuple[int, ...], torch.dtype] | None], step: int
) -> None:
    """See that a parameter's state has these tensors, and that they hold what an optimizer can have put into them."""
    if found.keys() != layout.keys():
        raise Damaged(f"{what}: its state has not the entries {', '.join(layout)}")
    for name, expected in layout.items():
        value = found[name]
        if expected is None:
            fits = type(value) is int
        else:
            fits = (
                type(value) is torch.Tensor
                and (tuple(value.shape), value.dtype) == expected
                and value.layout == torch.strided
                and value.device.type == "cpu"
                and value.is_contiguous()
            )
        if not fits:
            wanted = "an integer" if expected is None else f"a tensor of shape {expected[0]} and type {expected[1]}"
            raise Damaged(f"{what}: {name} is not {wanted}")
        if isinstance(value, torch.Tensor) and not value.isfinite().all():
            raise Damaged(f"{what}: {name} holds values that are not finite")
        if name in NOT_NEGATIVE and (value < 0).any():
            raise Damaged(f"{what}: {name} holds negative values")
    if not 1 <= found["step"] <= step or found["step"] % 1:
        raise Damaged(f"{what}: its step is not one of the {step} updates")


def _scheduler_state(
    saved: Any, scheduler: torch.optim.lr_scheduler.LambdaLR, rates: list[float], step: int
) -> dict[str, Any]:
    """The state of this run's schedule after update `step`, which follows from the step.

    Raises:
        Damaged: the saved one is another.
    """
    now = scheduler.state_dict() | {"last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
    _require_options("scheduler", saved, now, KNOWN_OF_SCHEDULE)
    if unfit := [key for key in saved if key not in now and hasattr(scheduler, key)]:
        raise Damaged(f"scheduler: {unfit[0]} is not a part of its state")
    return now


def _scaler_state(saved: Any, scaler: torch.amp.GradScaler | None) -> dict[str, Any] | None:
    """This run's scaler with the saved scale, and the count of updates since it changed; None where there is none.

    Raises:
        Damaged: an option is another than in this run, or the scale is none.
    """
    if scaler is None or saved is None or not (now := scaler.state_dict()):
        return None
    _require_options("scaler", saved, now, set(now), ignored=("scale", "_growth_tracker"))
    scale, tracker = saved["scale"], saved["_growth_tracker"]
    if type(scale) is not float or not 0 < scale < math.inf or type(tracker) is not int or tracker < 0:
        raise Damaged("scaler: its scale is not a positive number, or its count is none")
    return now | {"scale": scale, "_growth_tracker": tracker}


def _require_options(
    what: str, saved: Any, now: Mapping[str, Any], needed: set[str], ignored: tuple[str, ...] = ()
) -> None:
    """See that saved options are those of this run.

    An option that only one of two versions of a library knows is not compared. It has to be a plain number or None.
    """
    if not isinstance(saved, dict) or not needed <= saved.keys() or not all(isinstance(key, str) for key in saved):
        raise Damaged(f"{what}: its options are not complete")
    for key, value in saved.items():
        if key in ignored or key not in now:
            fits = value is None or isinstance(value, bool | int | float)
        else:
            fits = _same(value, now[key])
        if not fits:
            raise Damaged(f"{what}: {key} is another than in this run")


def _same(saved: Any, now: Any) -> bool:
    """Whether a saved option is that of this run. Learning rates may differ by their rounding in another version."""
    if isinstance(now, list | tuple):
        return type(saved) is type(now) and len(saved) == len(now) and all(map(_same, saved, now))
    if isinstance(now, float):
        return type(saved) is float and math.isclose(saved, now, rel_tol=1e-6, abs_tol=1e-15)
    return type(saved) is type(now) and saved == now
