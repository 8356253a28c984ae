"""A trained adapter on its base again: found from a run's own files, a directory of PEFT's, or the hub."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import LoraConfig, PeftModel
from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from medqa.config import Experiment, Lora, Model
from medqa.errors import UserError
from medqa.experiment_file import Locations, load_experiment
from medqa.hub import hub_reachable
from medqa.length import is_complete
from medqa.model.base import adapter_weights, add_lora, check_model, load_adapter_weights, load_base, load_tokenizer
from medqa.model.execution import Execution
from medqa.model.precision import Precision, resolve_precision
from medqa.training.checkpoint import STATE, newest_whole, read_identity
from medqa.training.checkpoint_files import ADAPTER_FILES, STATE_FILE, checkpoints
from medqa.training.environment import Settings
from medqa.training.execution import choose_execution
from medqa.training.manifest import Damaged
from medqa.training.memory import available_memory
from medqa.training.run_dir import ADAPTER_DIR, CONFIG

# Of adapter_config.json, what this project's adapters are made of; of the rest, nothing may change what they compute.
USED = {"r", "lora_alpha", "target_modules", "bias", "lora_dropout"}
SAYS_NOTHING = {
    "peft_type", "task_type", "base_model_name_or_path", "inference_mode", "revision", "init_lora_weights",
    "peft_version", "auto_mapping",
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Where an adapter is, and what it was trained as.

    Attributes:
        name: what the user called it.
        run: the directory of its run; None for an adapter alone.
        directory: the two files of the adapter.
        step: the update that it is from, where known.
        final: whether its run is complete and this is what it ended with.
        experiment: of an adapter alone, only base and LoRA are known and the rest has its defaults.
        settings: in effect when it was trained, where known.
    """

    name: str
    run: Path | None
    directory: Path
    step: int | None
    final: bool
    experiment: Experiment
    settings: Settings | None


@dataclass(frozen=True)
class Adapted:
    """The adapter on its base, in evaluation mode; `disable_adapter()` of the model gives the base alone."""

    source: Source
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    precision: Precision
    execution: Execution
    quantization: str


def find_adapter(
    where: str,
    checkpoint: str | None = None,
    base: str | None = None,
    data: Locations | None = None,
) -> Source:
    """The adapter that `where` names: a run's directory, an adapter's, or an id on the hub.

    Args:
        checkpoint: of a run, `best`, or the update of a checkpoint; None: the final adapter, or the newest checkpoint
            of a run that is not complete.
        base: where the base model is, if not where it was.
        data: `section.key` of a run's data to where they are, if not where they were.

    Raises:
        UserError: there is none; it is damaged, or not LoRA as this project trains it; no such checkpoint.
    """
    path = Path(os.path.expanduser(where))
    if os.path.isfile(path / CONFIG):
        return _of_run(where, path, checkpoint, {"model.base": base, **(data or {})})
    if checkpoint is not None:
        raise UserError(f"--checkpoint {checkpoint}: {where} is not a run's directory; leave it out")
    if os.path.isdir(path):
        if not os.path.isfile(path / ADAPTER_FILES[1]):
            raise UserError(
                f"{where}: neither a run's directory ({CONFIG}) nor an adapter's ({ADAPTER_FILES[1]}); "
                "give the directory that train.py wrote, outputs/exp_002 say"
            )
        return _alone(where, path, base)
    return _alone(where, _from_hub(where), base)


def load_adapted(source: Source, device: torch.device) -> Adapted:
    """The adapter on its base, on this device, in the precision and quantization of its training where they can be had.

    Raises:
        UserError: base or adapter cannot be loaded, or do not fit each other.
    """
    experiment = source.experiment
    model_config = check_model(experiment.model, experiment.tokenization.max_length if source.run else 0)
    precision = resolve_precision(experiment, device.type == "cpu", source.settings)
    tokenizer = load_tokenizer(experiment.model.base, experiment.tokenization.pad_token)
    memory = available_memory(device)
    execution = choose_execution(experiment, model_config, precision, memory, len(tokenizer), source.settings)
    loaded = load_base(
        experiment.model, precision, execution, device, len(tokenizer), experiment.training.seed, source.settings
    )
    model = add_lora(loaded.model, experiment.lora, experiment.training.seed, execution.fast_lora(device.type))
    load_adapter_weights(model, source.directory, source.name)
    check_finite(model, source.directory)
    model.requires_grad_(False)
    return Adapted(source, model.eval(), tokenizer, precision, execution, loaded.quantization)


def check_finite(model: PeftModel, directory: Path) -> None:
    """Refuse an adapter that holds NaN or infinity.

    Raises:
        UserError: it does; names the directory that it is from.
    """
    if not all(weight.isfinite().all() for weight in adapter_weights(model).values()):
        raise UserError(f"{directory}: the adapter has weights that are not finite; choose another checkpoint")


def _of_run(where: str, run: Path, checkpoint: str | None, locations: Locations) -> Source:
    """An adapter of a run."""
    experiment = load_experiment(str(run / CONFIG), locations=locations)
    experiment = experiment.model_copy(
        update={
            "lora": experiment.lora.model_copy(update={"init_from": None}),
            "model": experiment.model.model_copy(update={"gradient_checkpointing": False}),
        }
    )
    final = run / ADAPTER_DIR
    newest = newest_whole([run])
    summary = _summary(run)  # a run that goes on keeps that of its old end
    whole = is_complete(summary, experiment) and (final / ADAPTER_FILES[0]).is_file()
    if checkpoint is None and whole:
        settings = None if newest is None else newest.identity.environment.settings
        step = summary.get("adapter_step", summary.get("updates"))
        return Source(where, run, final, step, True, experiment, settings)
    if newest is None:
        raise UserError(f"{where}: this run has no adapter yet, nor a checkpoint; train it first, or longer")
    place = newest.path
    if checkpoint is not None:
        place = _checkpoint(where, run, newest.path, checkpoint)
    try:
        identity = read_identity(place)
    except Damaged as error:
        raise UserError(f"{place} is damaged: {error}; choose another with --checkpoint") from error
    step = int(place.name.rpartition("-")[2])
    return Source(where, run, place, step, False, experiment, identity.environment.settings)


def _checkpoint(where: str, run: Path, newest: Path, wanted: str) -> Path:
    """The directory of a run's checkpoint, `best` or a step."""
    there = [path.name.rpartition("-")[2] for path in checkpoints(run)]
    step = wanted
    if wanted == "best":
        step = str(_best_step(run, newest))
    if step == "0":
        raise UserError(f"--checkpoint {wanted}: of this run the untuned base was best, and no checkpoint is of that")
    if step not in there:
        what = f"best is update {step}, of which no checkpoint was kept" if wanted == "best" else "no such checkpoint"
        raise UserError(f"--checkpoint {wanted}: {what}; {where} has {', '.join(there)}")
    return run / f"checkpoint-{step}"


def _best_step(run: Path, newest: Path) -> int:
    """The update after which the fixed validation rows had the lowest loss."""
    summary, step = _summary(run), int(newest.name.rpartition("-")[2])
    if summary.get("updates") == step and isinstance(summary.get("best_step"), int):
        return summary["best_step"]  # the closing evaluation came after the last checkpoint
    try:
        return STATE.validate_json((newest / STATE_FILE).read_bytes()).best_step
    except ValidationError as error:
        raise UserError(f"{newest}: its {STATE_FILE} is of another version; name a step") from error


def _summary(run: Path) -> dict[str, Any]:
    """A run's summary; an empty one where there is none that can be read."""
    try:
        found = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _alone(where: str, directory: Path, base: str | None) -> Source:
    """An adapter without its run."""
    try:
        said = json.loads((directory / ADAPTER_FILES[1]).read_text(encoding="utf-8"))
        if not isinstance(said, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: {ADAPTER_FILES[1]} cannot be read: {error}; fetch the adapter again") from error
    defaults = LoraConfig().to_dict()
    other = sorted(
        key for key, value in said.items() if key not in USED | SAYS_NOTHING and value and value != defaults.get(key)
    )
    if said.get("peft_type") != "LORA" or other:
        why = f"it uses {', '.join(other)}" if other else f"its peft_type is {said.get('peft_type')!r}"
        raise UserError(f"{where}: not a plain LoRA adapter: {why}; only those that train.py makes can be used here")
    try:
        lora = Lora(**{key: said[key] for key in USED if key in said})
        model = Model(base=base or said.get("base_model_name_or_path") or "")
    except ValidationError as error:
        where_in = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(
            f"{where}: {ADAPTER_FILES[1]}: {where_in or 'content'}: {error.errors()[0]['msg']}; only adapters that "
            "train.py makes can be used here; give the base with --model where it names none"
        ) from error
    return Source(where, None, directory, None, True, Experiment(model=model, lora=lora), None)


def _from_hub(where: str) -> Path:
    """The directory of an adapter of the hub, fetched or from the cache."""
    hub_reachable()  # where it is not, what follows fails at once
    try:
        paths = [Path(hf_hub_download(where, name)) for name in reversed(ADAPTER_FILES)]
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = (
            str(error).splitlines()[0] if hub_reachable() else "the hub does not answer, and it is not in the cache"
        )
        there = ", ".join(sorted(str(path.parent) for path in Path("outputs").glob(f"*/{CONFIG}"))[:8])
        raise UserError(
            f"{where}: no such directory, nor an adapter to be had from the hub ({reason}); give the directory of a "
            f"run or of an adapter ({'there are ' + there if there else 'outputs has no run yet'})"
        ) from error
    return paths[0].parent
