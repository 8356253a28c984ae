"""The two files of a saved adapter: its weights, and what adapter_config.json says is computed with them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from medqa.config import Lora
from medqa.errors import UserError
from medqa.files import Damaged, read_json

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = (ADAPTER_WEIGHTS, ADAPTER_CONFIG)
# Of a final adapter's directory: beside those of the adapter a model card and the files of a tokenizer.
ADAPTER_DIR_FILES = {*ADAPTER_FILES, "README.md", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
# Of adapter_config.json, what this project's adapters are made of; of the rest, nothing may change what they compute.
USED = {"r", "lora_alpha", "target_modules", "bias", "lora_dropout"}
SAYS_NOTHING = {
    "peft_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping",
}  # fmt: skip
# Ways to begin that leave the base's weights as they are; the others (PiSSA, OLoRA, CorDA, LoftQ, ...) change them.
BEGINNINGS = (None, True, False, "gaussian", "orthogonal")


def read_adapter(directory: Path, what: str) -> dict[str, torch.Tensor]:
    """A saved adapter's weights, by PEFT's names.

    Args:
        what: what the user called it, for the message.

    Raises:
        UserError: no adapter there, or damaged.
    """
    path = directory / ADAPTER_WEIGHTS
    try:
        if not path.is_file():  # opening a pipe would never end
            pickled = (directory / "adapter_model.bin").is_file()
            raise FileNotFoundError("adapter_model.bin can run code when it is read" if pickled else "no such file")
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{what}: no readable {ADAPTER_WEIGHTS}: {error}; give a directory with a whole one") from error


def plain_lora(where: str, directory: Path) -> tuple[Lora, Mapping[str, Any]]:
    """What adapter_config.json says, where it is plain LoRA: base(x) + B A x * lora_alpha / r, and nothing else.

    Raises:
        UserError: it cannot be read, or says anything that would be computed otherwise.
    """
    try:
        said = read_json(directory / ADAPTER_CONFIG)
        if not isinstance(said, dict):
            raise Damaged("not an object")
    except Damaged as error:
        raise UserError(f"{where}: {ADAPTER_CONFIG} cannot be read: {error}; fetch the adapter again") from error
    defaults = LoraConfig(task_type="CAUSAL_LM").to_dict()
    other = sorted(
        key
        for key, value in said.items()
        if key not in USED | SAYS_NOTHING and not _unused(value) and value != defaults.get(key)
    )
    if said.get("init_lora_weights", True) in BEGINNINGS:
        other = [key for key in other if key != "init_lora_weights"]
    if said.get("peft_type") != "LORA" or other:
        why = f"its peft_type is {said.get('peft_type')!r}"
        if other:
            why = "it uses " + ", ".join(f"{key} = {str(said[key])[:60]}" for key in other[:8])
        raise UserError(f"{where}: not a plain LoRA adapter: {why}; only those that train.py makes can be used here")
    try:
        return Lora(**{key: said[key] for key in USED if key in said}), said
    except ValidationError as error:
        raise not_usable(where, error) from error


def _unused(value: Any) -> bool:
    """Whether a value says that something is not used. 0 does not: it may be the number of a layer."""
    return value is None or value is False or value in ("", [], {})


def not_usable(where: str, error: ValidationError) -> UserError:
    """What the user is told of a value in adapter_config.json that is not to be used."""
    key = ".".join(map(str, error.errors()[0]["loc"]))
    return UserError(
        f"{where}: {ADAPTER_CONFIG}: {key or 'content'}: {error.errors()[0]['msg']}; only adapters that train.py "
        "makes can be used here; give the base with --model where it names none"
    )
