"""From Kaggle and the Hugging Face Hub to records. Asked for only what is not on this machine, and not for long."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from medqa.data.file_lock import alone_in
from medqa.data.readers import Record, Table, first_line, matching_columns, read_file
from medqa.errors import UserError
from medqa.hub import CONNECT_SECONDS, connects, hub_reachable

if TYPE_CHECKING:
    from datasets import DatasetDict

KAGGLE_HOST = "api.kaggle.com"
OPEN_COPIES = {"intronhealth/afrimedqa_v2": "afrimedqa/afrimedqa_v2"}  # gated dataset -> the same rows, ungated


def read_kaggle(handle: str, wanted: frozenset[str], option: str) -> Table:
    """The one CSV file of the Kaggle dataset `handle` ("owner/name"), from kagglehub's cache if it is there.

    `option` is the command-line option that an error should point to. Raises UserError.
    """
    try:
        import kagglehub
        from kagglehub import exceptions
    except ImportError as error:
        raise UserError(f"kaggle:{handle}: needs `pip install kagglehub`. {_elsewhere(option)}") from error
    pinned = _cached_version(handle)
    if pinned is None and not connects(f"https://{KAGGLE_HOST}"):
        why = f"not in kagglehub's cache, and {KAGGLE_HOST} cannot be reached within {CONNECT_SECONDS:.0f} s"
        raise UserError(f"kaggle:{handle}: {why}. {_elsewhere(option)}")
    refusals = (exceptions.BackendError, exceptions.CredentialError, exceptions.NotFoundError)
    refusals += (exceptions.DataCorruptionError, exceptions.UnauthenticatedError)
    try:
        folder = Path(kagglehub.dataset_download(pinned) if pinned else _download(handle))
    except (OSError, ValueError, *refusals) as error:  # requests' errors are OSErrors; ValueError: handle or archive
        why = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"kaggle:{handle}: {why}. {_elsewhere(option)}") from error
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".csv")
    if len(files) != 1:
        found = ", ".join(path.name for path in files) or "none"
        raise UserError(f"kaggle:{handle}: one CSV file expected, found {found} in {folder}; give one with {option}")
    return read_file(files[0], wanted)


def _download(handle: str) -> str:
    """The folder of the newest version, fetched unless another process does so first.

    kagglehub lets all that start at once write, unpack and remove one and the same archive; all but one fail, or read
    what is half there.
    """
    import kagglehub
    from kagglehub.config import get_cache_folder

    folder = Path(get_cache_folder())
    with contextlib.suppress(OSError):  # kagglehub will say so
        folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder / ".medqa.lock"):
        return kagglehub.dataset_download(_cached_version(handle) or handle)


def _cached_version(handle: str) -> str | None:
    """`handle` with the newest version that kagglehub holds complete: without a version it always asks the network."""
    from kagglehub.config import get_cache_folder

    folder = Path(get_cache_folder(), "datasets", handle)
    versions = [int(marker.stem) for marker in folder.glob("*.complete") if marker.stem.isdigit()]
    complete = [version for version in versions if (folder / "versions" / str(version)).is_dir()]
    return f"{handle}/versions/{max(complete)}" if complete else None


def read_hub(dataset_id: str, wanted: frozenset[str], option: str) -> Table:
    """All splits, one after the other, of the dataset "owner/name" on the Hugging Face Hub, or in its local cache.

    No code of the dataset is executed. `option` is the command-line option that an error should point to.
    Raises UserError: at once if the Hub cannot be reached, with the way to get access if it refuses.
    """
    reachable = hub_reachable()  # first: it decides whether `datasets` is imported in offline mode
    import datasets
    from huggingface_hub.errors import HTTPError  # of the HTTP library that the hub client uses, httpx or its successor

    denied = (datasets.exceptions.DatasetNotFoundError, HTTPError)
    # ValueError: a malformed id, or several configurations to choose from; RuntimeError: the dataset is a script.
    refusals = (*denied, datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError)
    try:
        return _hub_table(_load_hub_splits(dataset_id), wanted, dataset_id)
    except refusals as error:
        why = f"{type(error).__name__}: {first_line(error)}. "
        if not reachable:
            why = "not in the local cache, and the Hugging Face Hub cannot be reached. "
        elif isinstance(error, denied):
            why += _access(dataset_id, option)
        raise UserError(f"hub dataset {dataset_id}: {why}{_elsewhere(option)}") from error


def _load_hub_splits(dataset_id: str) -> "DatasetDict":
    from datasets import load_dataset

    try:  # of a CSV file the words "NA" and "None" would otherwise become missing values; other formats refuse this
        return load_dataset(dataset_id, keep_default_na=False)
    except ValueError as error:
        if "keep_default_na" not in str(error):
            raise
    return load_dataset(dataset_id)


def _access(dataset_id: str, option: str) -> str:
    """How to get at a dataset that the Hub refuses to show."""
    steps = f"Accept its terms at https://huggingface.co/datasets/{dataset_id}, then run `hf auth login`. "
    copy = OPEN_COPIES.get(dataset_id)
    return steps + (f"Or use the open copy: {with_value(option, copy)}. " if copy else "")


def _hub_table(splits: "DatasetDict", wanted: frozenset[str], where: str) -> Table:
    columns: dict[str, None] = {}
    records: list[Record] = []
    for split in splits.values():
        columns |= dict.fromkeys(split.column_names)
        spelled = matching_columns(split.column_names, wanted, where)
        for record in split.select_columns(list(spelled.values())):  # the others may be images: not to be decoded
            records.append({name: record[column] for name, column in spelled.items()})
    return Table(tuple(columns), records)


def _elsewhere(option: str) -> str:
    wanted, none = with_value(option, "PATH"), with_value(option, "none")
    return f"Give a local copy with {wanted}, or {none}; --tiny needs no data at all"


def with_value(option: str, value: str) -> str:
    """An option with its value: `--medquad none`, `--data notes=none`."""
    return f"{option}{'=' if option.startswith('--data ') else ' '}{value}"
