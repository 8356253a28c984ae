"""What the files of a run record about its training, and how an experiment differs from that.

Nothing slow is imported here, because `medqa compare` uses it too.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medqa.config import LENGTH, Experiment, flat, may_change_on_resume
from medqa.config_file import cut, short
from medqa.files import Damaged, checksum, read_json
from medqa.tiny import BASE_DIR, MEDQUAD_CSV

MANIFEST = "manifest.json"
FORMAT = 1
NAME = re.compile(r"checkpoint-(\d{1,12})")
# The location of data and base model may change: fingerprints tell whether the contents are the same.
LOCATIONS = {"data.medquad", "data.afrimedqa", "data.files", "model.base"}
# Keys that the first versions did not have.
LATER_KEYS = {
    "data.mcq_answers", "data.files", "lora.use_rslora", "lora.use_dora", "tokenization.prompt",
    "training.early_stopping_patience", "training.keep", "evaluation.full_rows",
}  # fmt: skip
# The values that `--tiny` sets now, after those that runs with `--tiny` had in the first versions. Such a run can still
# be resumed, because the precision of a resumed run follows from its checkpoint (`SavedSettings`) and the machine.
TINY_PRECISION = {"model.dtype": ("bfloat16", "float32"), "training.mixed_precision": ("bf16", "no")}


def checkpoints(output_dir: Path) -> list[Path]:
    """Every entry that is named like a checkpoint, sorted by step (100 after 50), oldest first; links included."""
    return sorted(
        (path for path in output_dir.glob("checkpoint-*") if NAME.fullmatch(path.name) and path.is_dir()), key=step_of
    )


def step_of(path: Path) -> int:
    """The step of a checkpoint, from its name."""
    return int(path.name.rpartition("-")[2])


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest and verify its own checksum; the other files are not checked.

    Raises:
        Damaged: it is missing, is not a manifest, or was changed after it was written.
    """
    try:
        body = read_json(directory / MANIFEST)
    except Damaged as error:
        reason = str(error).removeprefix(f"{directory / MANIFEST}: ")
        raise Damaged(f"{MANIFEST}: {reason}") from error
    if not isinstance(body, dict) or not {"format", "files", "checksum"} <= body.keys():
        raise Damaged(f"{MANIFEST} is incomplete")
    if body.pop("checksum") != checksum(body):
        raise Damaged(f"{MANIFEST}: its own checksum is wrong")
    if body["format"] != FORMAT:
        raise Damaged(f"{MANIFEST} was written by another version: its format is not {FORMAT}")
    return body


def differences(before: Mapping[str, Any], experiment: Experiment) -> list[str]:
    """List in which `section.key` the experiment differs from the recorded values `before`, in a way that matters.

    A key that the recorded version did not have counts as its default. Of user data only the names count, because they
    are part of the row ids.
    """
    before = with_later_keys(before)
    files = before["data.files"]
    there, now = sorted(map(str, files)) if isinstance(files, Mapping) else [], sorted(experiment.data.files)
    names = [f"data.files: {cut(', '.join(there)) or 'none'} there, {cut(', '.join(now)) or 'none'} now"]
    names = [] if there == now else names
    return names + [
        f"{key}: {short(before.get(key))} there, {short(value)} now"
        for key, value in flat(experiment).items()
        if before.get(key) != value
        and key not in LOCATIONS
        and not _may_change(key, before.get(key), value, experiment)
    ]


def with_later_keys(before: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded values, with the defaults of keys that the recorded version did not have."""
    return {**{key: default for key, default in flat(Experiment()).items() if key in LATER_KEYS}, **before}


def _may_change(key: str, before: Any, now: Any, experiment: Experiment) -> bool:
    """Whether the run may be resumed with this change; a length may only grow.

    `model.quantization: auto` keeps what the run has, so any recorded quantization is compatible with it. A run of
    exp_004 from before it had `auto` recorded `4bit`.
    """
    if key == "model.quantization" and now == "auto":
        return True
    if key in LENGTH:
        longer = isinstance(before, int | float) and now is not None and now > before
        return may_change_on_resume(key, experiment) and longer
    if experiment.model.base == str(BASE_DIR) or experiment.data.medquad == str(MEDQUAD_CSV):
        return (before, now) == TINY_PRECISION.get(key) or may_change_on_resume(key, experiment)
    return may_change_on_resume(key, experiment)
