"""What the untuned model gives, kept on disk: the same for every run on that base model and data, so computed once.

In `$MEDQA_CACHE/baselines` (`~/.cache/medqa` where that is not set), as JSON with a checksum, by what it is made of. A
file that is damaged, or that cannot be written, is as if it were not there. Shared as the token ids are.
"""

import json
from pathlib import Path
from typing import Any

from medqa.data import token_cache
from medqa.files import Damaged, read_json
from medqa.limits import MAX_BASELINE_BYTES
from medqa.training.manifest import checksum


def find(what: Any) -> Any:
    """What is kept under `what`, the JSON value that it follows from; None where nothing is."""
    found = _read(_path(what))
    return None if found is None else found["value"]


def keep(what: Any, value: Any) -> None:
    """Keep a JSON value; where there is no room or no permission, do without."""
    found = {"value": value}
    content = json.dumps({**found, "checksum": checksum(found)}, ensure_ascii=False, allow_nan=False)
    token_cache.put(_path(what), content.encode())


def folder() -> Path:
    """Where the files lie."""
    return token_cache.folder().with_name("baselines")


def _path(what: Any) -> Path:
    """The file of what follows from `what`."""
    return folder() / f"{checksum(what)}.json"


def _read(path: Path) -> dict[str, Any] | None:
    """A file's content; None where it is not there or not whole."""
    try:
        found = read_json(path, MAX_BASELINE_BYTES)
    except Damaged:
        return None
    if not isinstance(found, dict) or found.keys() != {"value", "checksum"}:
        return None
    return found if found.pop("checksum") == checksum(found) else None
