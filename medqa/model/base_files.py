"""Find the files of a base model, and check them before anything reads them.

Only safetensors are read, only from the base's own directory, and no code that comes with a model is ever run.
"""

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers.utils import cached_file

from medqa.errors import UserError
from medqa.files import Damaged, read_json
from medqa.limits import MAX_JSON_BYTES, MAX_LAYERS, MAX_TOKENIZER_BYTES
from medqa.model.adapter_files import ADAPTER_CONFIG

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
# Keys with the number of layers. Other keys have "layers" in their names, too; Gemma 3n's may be 262,144.
LAYERS = re.compile(r"^(num|n|encoder|decoder)_(.*_)?layers?$")
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Files that are read completely, and their maximum sizes in bytes.
LARGEST = {
    CONFIG: MAX_JSON_BYTES,
    INDEX: MAX_JSON_BYTES,
    "generation_config.json": MAX_JSON_BYTES,
    "tokenizer_config.json": MAX_JSON_BYTES,
    "special_tokens_map.json": MAX_JSON_BYTES,
    "added_tokens.json": MAX_JSON_BYTES,
    "chat_template.jinja": MAX_JSON_BYTES,
    "chat_template.json": MAX_JSON_BYTES,
    TOKENIZER: MAX_TOKENIZER_BYTES,
    "tokenizer.model": MAX_TOKENIZER_BYTES,
    "vocab.json": MAX_TOKENIZER_BYTES,
    "vocab.txt": MAX_TOKENIZER_BYTES,
    "merges.txt": MAX_TOKENIZER_BYTES,
}
FETCHED = (CONFIG, ADAPTER_CONFIG, INDEX, TOKENIZER, "tokenizer_config.json")  # of a base on the hub, to be checked


def location(base: str) -> str:
    """A local directory with `~` expanded, or the hub id unchanged."""
    return os.path.expanduser(base) if is_directory(base) else base


def is_directory(base: str) -> bool:
    """Whether it is a local directory. Uses `os.path`, which does not raise on invalid names, unlike pathlib."""
    return os.path.isdir(os.path.expanduser(base))


def directory_of(base: str) -> Path | None:
    """The directory of a base model's files on this machine; None if they have not been downloaded from the hub."""
    if is_directory(base):
        return Path(location(base))
    config = _local_or_cached(base, CONFIG)
    return config.parent if config else None


def check_files(base: str) -> None:
    """Check a base model's files before anything reads them; those on the hub, except the weights, are downloaded.

    Raises:
        UserError: weights that are not safetensors or are in another directory, an adapter that transformers would load
            together with the base, or a file that is larger than `medqa/limits.py` allows.
        OSError: the hub has no such repository.
    """
    there = {name: path for name in (LARGEST if is_directory(base) else FETCHED) if (path := _fetched(base, name))}
    for name, path in there.items():
        if name in LARGEST and path.stat().st_size > LARGEST[name]:
            raise UserError(
                f"model.base = {base}: {name} has {path.stat().st_size:,} bytes (limit {LARGEST[name]:,}); no usable "
                "model has such a large file: download the model again, or give another with --model"
            )
    if _fetched(base, ADAPTER_CONFIG):
        what = "an adapter beside the model, which transformers would load with it: move it out"
        if CONFIG not in there:
            what = "an adapter, not a base model: to start from it, use lora.init_from; give its base with --model"
        elif not is_directory(base):
            what += f" of a copy (`hf download {base} --local-dir DIR`) and give the copy with --model"
        raise UserError(f"model.base = {base}: {ADAPTER_CONFIG} is there: {what}")
    weights = _weight_names(base, _fetched)
    if weights is None and is_directory(base):
        pickled = [name for name in os.listdir(location(base)) if name.endswith(PICKLED)]
        if pickled:
            name = min(pickled, key=lambda name: ("model" not in name, name))
            raise _not_safetensors(base, f"its weights are in {name}")


def check_configuration(base: str, said: Mapping[str, Any]) -> None:
    """Refuse a configuration that makes transformers read other weights, or has more layers than any real model.

    Args:
        said: config.json.

    Raises:
        UserError: the configuration is refused.
    """
    if said.get("transformers_weights") is not None:
        raise UserError(
            f"model.base = {base}: {CONFIG} names its weights, transformers_weights = "
            f"{str(said['transformers_weights'])[:80]!r}: only {WEIGHTS} and what {INDEX} lists are read; if you trust "
            "it, save it again with transformers' save_pretrained, or give another with --model"
        )
    for key, value in said.items():
        if LAYERS.search(key) and isinstance(value, int) and value > MAX_LAYERS:
            raise UserError(
                f"model.base = {base}: {CONFIG}: {key} = {str(value)[:40]}: more than {MAX_LAYERS:,} layers; download "
                "the model again, or give another with --model"
            )


def weight_bytes(base: str) -> int | None:
    """The size of the weights of a base model in a local directory; None otherwise."""
    names = _weight_names(base, _local_or_cached) if is_directory(base) else None
    paths = [_local_or_cached(base, name) for name in names or ()]
    return sum(path.stat().st_size for path in paths if path) or None


def base_fingerprint(base: str) -> str:
    """SHA-256 over the configuration and the weights of a base model on this machine, file by file.

    The name of its directory or its id has no influence.
    """
    digest = hashlib.sha256()
    for name in (CONFIG, *(_weight_names(base, _local_or_cached) or ())):
        path = _local_or_cached(base, name)
        if path is not None:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _weight_names(base: str, find: Callable[[str, str], Path | None]) -> list[str] | None:
    """The names of the files from which transformers reads the weights; None if there are none.

    Raises:
        UserError: the index is damaged, or lists a file that is not safetensors or is in another directory.
    """
    if find(base, WEIGHTS):
        return [WEIGHTS]
    index = find(base, INDEX)
    if index is None:
        return None
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (Damaged, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"model.base = {base}: {INDEX} cannot be read: {error}; download the model again, or give another with "
            "--model"
        ) from error
    for name in names:
        path = PurePosixPath(name) if isinstance(name, str) else None
        if path is None or path.suffix != ".safetensors":
            raise _not_safetensors(base, f"{INDEX} lists {str(name)[:80]!r}")
        if path.is_absolute() or ".." in path.parts or "\\" in name:
            raise UserError(
                f"model.base = {base}: {INDEX} lists {name[:80]!r}, which is not in the same directory; download "
                "the model again, or give another with --model"
            )
    return names


def _fetched(base: str, name: str) -> Path | None:
    """A file of a base model, from its directory or downloaded from the hub; None if it does not exist.

    Raises:
        OSError: the hub has no such repository, or the name is invalid.
    """
    if is_directory(base):
        return _local_or_cached(base, name)
    found = cached_file(
        base,
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found else None


def _local_or_cached(base: str, name: str) -> Path | None:
    """A file of a base model, from its directory or from the hub's cache; None if it is not there."""
    if is_directory(base):
        path = Path(location(base), name)
        return path if path.is_file() else None
    found = try_to_load_from_cache(base, name)
    return Path(found) if isinstance(found, str) else None


def _not_safetensors(base: str, what: str) -> UserError:
    """The message about weights that are pickled, or of an unknown format."""
    return UserError(
        f"model.base = {base}: {what}, which can execute code when it is read: only safetensors are read; if you trust "
        "it, save it again with transformers' save_pretrained, or give another with --model"
    )
