"""What the files of a run say that it was trained as, and how an experiment differs from that.

Nothing heavy is imported here, so that `medqa compare` can ask too.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medqa.config import LENGTH, Experiment, flat, may_change_on_resume
from medqa.config_file import cut, short
from medqa.files import Damaged, checksum, read_json

MANIFEST = "manifest.json"
FORMAT = 1
NAME = re.compile(r"checkpoint-(\d{1,12})")
# These may lie elsewhere than before: their fingerprints say whether they are the same.
LOCATIONS = {"data.medquad", "data.afrimedqa", "data.files", "model.base"}
# Not yet in runs of the first versions.
LATER_KEYS = {"data.mcq_answers", "data.files", "training.early_stopping_patience", "training.keep"}


def checkpoints(output_dir: Path) -> list[Path]:
    """Everything called like a checkpoint, by step (numerically: 100 comes after 50), oldest first; links too."""
    return sorted(
        (path for path in output_dir.glob("checkpoint-*") if NAME.fullmatch(path.name) and path.is_dir()), key=step_of
    )


def step_of(path: Path) -> int:
    """The update of a checkpoint, by its name."""
    return int(path.name.rpartition("-")[2])


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest, its own checksum verified, the files not looked at.

    Raises:
        Damaged: missing, not readable as one, or changed since it was written.
    """
    try:
        body = read_json(directory / MANIFEST)
    except Damaged as error:
        reason = str(error).removeprefix(f"{directory / MANIFEST}: ")
        raise Damaged(f"{MANIFEST}: {reason}") from error
    if not isinstance(body, dict) or not {"format", "files", "checksum"} <= body.keys():
        raise Damaged(f"{MANIFEST} is torn")
    if body.pop("checksum") != checksum(body):
        raise Damaged(f"{MANIFEST}: its own checksum is wrong")
    if body["format"] != FORMAT:
        raise Damaged(f"{MANIFEST} is of another version: its format is not {FORMAT}")
    return body


def differences(before: Mapping[str, Any], experiment: Experiment) -> list[str]:
    """What makes `experiment` another one than that whose values were `before`, by `section.key`.

    A key that there was not yet had what is now its default. Of data of one's own the names count: they are in the ids
    of rows.
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
    """What there was, and of the keys that came later their defaults."""
    return {**{key: default for key, default in flat(Experiment()).items() if key in LATER_KEYS}, **before}


def _may_change(key: str, before: Any, now: Any, experiment: Experiment) -> bool:
    """Whether the run may go on with this change; updates may be added, never taken back."""
    if key in LENGTH:
        longer = isinstance(before, int | float) and now is not None and now > before
        return may_change_on_resume(key, experiment) and longer
    return may_change_on_resume(key, experiment)
