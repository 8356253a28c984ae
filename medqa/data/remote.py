"""From Kaggle and the Hugging Face Hub to records. Asked for only what is not on this machine, and not for long."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from medqa.data.file_lock import alone_in
from medqa.data.readers import Record, Table, add_record, matching_columns, read_file
from medqa.errors import UserError
from medqa.hub import CONNECT_SECONDS, connects, hub_reachable
from medqa.limits import MAX_RECORDS

if TYPE_CHECKING:
    from datasets import DatasetDict

KAGGLE_HOST = "api.kaggle.com"
SHOWN_CONFIGURATIONS = 40
MOST_CAUSES = 6  # errors in a chain that are shown
LONGEST_CAUSE = 600  # characters of each
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
    refusals: tuple[type[Exception], ...]
    refusals = (exceptions.BackendError, exceptions.CredentialError, exceptions.NotFoundError)
    refusals += (exceptions.DataCorruptionError, exceptions.UnauthenticatedError)
    try:
        folder = Path(kagglehub.dataset_download(pinned) if pinned else _download(handle))
    except (OSError, ValueError, *refusals) as error:  # requests' errors are OSErrors; ValueError: handle or archive
        raise UserError(f"kaggle:{handle}: {causes(error)}. {_elsewhere(option)}") from error
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


def read_hub(location: str, wanted: frozenset[str], option: str) -> Table:
    """All splits, one after the other, of a dataset on the Hugging Face Hub, or in its local cache.

    No code of the dataset is executed.

    Args:
        location: "owner/name", or "owner/name:config" where the dataset has several configurations.
        option: the command-line option that an error should point to.

    Raises:
        UserError: at once if the Hub cannot be reached, with the way to get access if it refuses.
    """
    dataset_id, _, config = location.partition(":")
    reachable = hub_reachable()  # first: it decides whether `datasets` is imported in offline mode
    import datasets
    import yaml
    from huggingface_hub.errors import HTTPError  # of the HTTP library that the hub client uses, httpx or its successor

    denied = (datasets.exceptions.DatasetNotFoundError, HTTPError)
    # ValueError: a malformed id, or several configurations to choose from; RuntimeError: the dataset is a script; the
    # others: a README whose configurations are not what `datasets` expects, or a format that asks for another library.
    refusals: tuple[type[Exception], ...] = (
        *denied,
        datasets.exceptions.DatasetsError,
        OSError,
        ValueError,
        RuntimeError,
    )
    refusals += (TypeError, LookupError, AttributeError, ImportError, yaml.YAMLError)
    try:
        return _hub_table(_load_hub_splits(dataset_id, config or None, reachable), wanted, location)
    except refusals as error:
        configurations = _configurations(dataset_id) if reachable and isinstance(error, ValueError) else []
        if configurations and (config or len(configurations) > 1) and config not in configurations:
            what = f"no configuration {config!r}" if config else "several configurations, and none is named"
            there = ", ".join(configurations[:SHOWN_CONFIGURATIONS])
            if len(configurations) > SHOWN_CONFIGURATIONS:
                there += f" and {len(configurations) - SHOWN_CONFIGURATIONS} more"
            example = with_value(option, f"{dataset_id}:{configurations[0]}")
            raise UserError(f"hub dataset {dataset_id}: {what}; there are {there}; give one: {example}") from error
        why = f"{causes(error)}. "
        if not reachable:
            why = f"not in the local cache, and the Hugging Face Hub cannot be reached ({causes(error)}). "
            if not config and isinstance(error, ValueError):
                why += f"A configuration in the cache is named so: {with_value(option, dataset_id + ':NAME')}. "
        elif isinstance(error, denied):
            why += _access(dataset_id, option)
        raise UserError(f"hub dataset {location}: {why}{_elsewhere(option)}") from error


class _AsText(dict):
    """What pandas asks how to convert the cells of a column: for every column, as the text that they are.

    Without it pandas makes numbers of 007 and truth values of true, whatever the other files of the dataset hold.
    """

    def __contains__(self, column: object) -> bool:
        return True

    def __getitem__(self, column: object) -> type[str]:
        return str

    def get(self, column: object, default: object = None) -> type[str]:
        """The conversion for a column, by its name or its place."""
        return str


def _load_hub_splits(dataset_id: str, config: str | None, reachable: bool) -> "DatasetDict":
    """The splits of one configuration; cells of CSV files as text, without words that stand for missing values."""
    from datasets import load_dataset, load_dataset_builder
    from datasets.packaged_modules.csv.csv import Csv

    as_text = {"keep_default_na": False, "converters": _AsText()}
    if not reachable:  # then only the cache knows what kind of files they were, and with which options they were read
        for options in (as_text, {"keep_default_na": False}):
            with contextlib.suppress(ValueError):
                return load_dataset(dataset_id, config, **options)
        return load_dataset(dataset_id, config)
    builder = load_dataset_builder(dataset_id, config)
    if isinstance(builder, Csv):
        return load_dataset(dataset_id, builder.config.name, **as_text)
    return load_dataset(dataset_id, config)


def _configurations(dataset_id: str) -> list[str]:
    """The names of the dataset's configurations; none where the Hub does not say."""
    from datasets import exceptions, get_dataset_config_names

    try:
        return get_dataset_config_names(dataset_id)
    except (exceptions.DatasetsError, OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError):
        return []


def causes(error: BaseException) -> str:
    """An error's whole message, and those of all errors that led to it, the last cause at the end; on one line."""
    told: list[str] = []
    current: BaseException | None = error
    while current is not None and len(told) < MOST_CAUSES:
        text = " ".join(str(current).split()).rstrip(".")
        told.append(f"{type(current).__name__}: {text[:LONGEST_CAUSE]}" if text else type(current).__name__)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return "; because of ".join(dict.fromkeys(told))


def _access(dataset_id: str, option: str) -> str:
    """How to get at a dataset that the Hub refuses to show."""
    steps = f"Accept its terms at https://huggingface.co/datasets/{dataset_id}, then run `hf auth login`. "
    copy = OPEN_COPIES.get(dataset_id)
    return steps + (f"Or use the open copy: {with_value(option, copy)}. " if copy else "")


def _hub_table(splits: "DatasetDict", wanted: frozenset[str], where: str) -> Table:
    columns: dict[str, None] = {}
    records: list[Record] = []
    for split in splits.values():
        if split.num_rows > MAX_RECORDS:
            raise UserError(f"hub dataset {where}: more than {MAX_RECORDS:,} records; give a file with fewer")
        columns |= dict.fromkeys(split.column_names)
        if twice := [
            name for name in split.column_names if name.endswith(".1") and name[:-2].strip().lower() in wanted
        ]:
            # pandas renames the second of two columns of one name
            raise UserError(f"hub dataset {where}: two columns are called {twice[0][:-2]!r}; give a file with one")
        spelled = matching_columns(split.column_names, wanted, where)
        for record in split.select_columns(list(spelled.values())):  # the others may be images: not to be decoded
            add_record(records, {name: record[column] for name, column in spelled.items()}, where)
    return Table(tuple(columns), records)


def _elsewhere(option: str) -> str:
    wanted, none = with_value(option, "PATH"), with_value(option, "none")
    return f"Give a local copy with {wanted}, or {none}; --tiny needs no data at all"


def with_value(option: str, value: str) -> str:
    """An option with its value: `--medquad none`, `--data notes=none`."""
    return f"{option}{'=' if option.startswith('--data ') else ' '}{value}"
