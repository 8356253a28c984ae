"""Read the two files of a saved adapter: its weights and adapter_config.json, which must describe plain LoRA."""

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
# The files of a final adapter's directory: those of the adapter, a model card, and a tokenizer.
ADAPTER_DIR_FILES = {*ADAPTER_FILES, "README.md", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
# The keys of adapter_config.json that this project's adapters use. No other key may change what the adapter computes.
USED = {"r", "lora_alpha", "target_modules", "bias", "lora_dropout", "use_rslora", "use_dora"}
SAYS_NOTHING = {
    "peft_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping",
}  # fmt: skip
# Values of init_lora_weights that leave the base's weights unchanged; others (PiSSA, OLoRA, CorDA, ...) change them.
BEGINNINGS = (None, True, False, "gaussian", "orthogonal")


def read_adapter(directory: Path, what: str) -> dict[str, torch.Tensor]:
    """The weights of a saved adapter, by PEFT's names.

    Args:
        what: how the user named the adapter, for the message.

    Raises:
        UserError: there is no adapter, or it is damaged.
    """
    path = directory / ADAPTER_WEIGHTS
    try:
        if not path.is_file():  # opening a named pipe would block
            pickled = (directory / "adapter_model.bin").is_file()
            raise FileNotFoundError("adapter_model.bin can execute code when it is read" if pickled else "no such file")
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{what}: no readable {ADAPTER_WEIGHTS}: {error}; give a directory with a valid one") from error


def plain_lora(where: str, directory: Path) -> tuple[Lora, Mapping[str, Any]]:
    """The LoRA section that adapter_config.json describes; the adapter may compute nothing else.

    That is base(x) + B A x * lora_alpha / r. With `use_rslora` the scale is lora_alpha / sqrt(r); with `use_dora` the
    adapter also has magnitudes.

    Raises:
        UserError: the file cannot be read, or describes an adapter that computes something else.
    """
    try:
        said = read_json(directory / ADAPTER_CONFIG)
        if not isinstance(said, dict):
            raise Damaged("not an object")
    except Damaged as error:
        raise UserError(f"{where}: {ADAPTER_CONFIG} cannot be read: {error}; download the adapter again") from error
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
        raise UserError(f"{where}: not a plain LoRA adapter: {why}; only adapters of train.py are supported")
    try:
        return Lora(**{key: said[key] for key in USED if key in said}), said
    except ValidationError as error:
        raise not_usable(where, error) from error


def _unused(value: Any) -> bool:
    """Whether a value disables an option. 0 does not: it may be the index of a layer."""
    return value is None or value is False or value in ("", [], {})


def not_usable(where: str, error: ValidationError) -> UserError:
    """The message about an unsupported value in adapter_config.json."""
    key = ".".join(map(str, error.errors()[0]["loc"]))
    return UserError(
        f"{where}: {ADAPTER_CONFIG}: {key or 'content'}: {error.errors()[0]['msg']}; only adapters of train.py "
        "are supported; give the base with --model if the file does not name it"
    )
