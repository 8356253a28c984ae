"""A trained adapter on its base again: found from a run's own files, a directory of PEFT's, or the hub.

What was recorded of an adapter must be what is there: its weights, its configuration, and the base that it was trained
on. With anything else its figures and answers would be those of another model.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import PeftModel
from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from medqa.config import Experiment, Lora, Model, is_complete
from medqa.config_file import Locations, load_experiment
from medqa.errors import UserError, listed
from medqa.files import Damaged
from medqa.hub import hub_reachable
from medqa.model.adapter_files import ADAPTER_FILES, not_usable, plain_lora, read_adapter
from medqa.model.base import check_model, fit_adapter, load_model, load_tokenizer
from medqa.model.base_files import base_fingerprint
from medqa.model.device import available_memory
from medqa.model.memory import fit_to_memory
from medqa.model.settings import SavedSettings, Settings, resolve_settings
from medqa.recorded import MANIFEST, checkpoints, differences
from medqa.training.checkpoint import CONTENT, Fingerprints, measure, newest_whole, read_identity, read_progress, verify
from medqa.training.run_dir import ADAPTER_DIR, CONFIG, read_summary

TRIES = 20  # to find a checkpoint, in a run that saves and removes them at the same time
COMPUTED_FROM = ("model", "lora", "data", "tokenization")  # sections: after training, the rest has no effect


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
        weights: by PEFT's names. Read when it is found: a checkpoint may be gone by the time the base is loaded.
        base: the fingerprint of the base that it was trained on, where known.
        data: the fingerprint of the rows that it was trained on and of their split, where known.
    """

    name: str
    run: Path | None
    directory: Path
    step: int | None
    final: bool
    experiment: Experiment
    settings: SavedSettings | None
    weights: Mapping[str, torch.Tensor] = field(repr=False)
    base: str | None = None
    data: str | None = None


@dataclass(frozen=True)
class Adapted:
    """The adapter on its base, in evaluation mode; `disable_adapter()` of the model gives the base alone.

    `base` is the base's fingerprint.
    """

    source: Source
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    settings: Settings
    base: str


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
        return _of_changing_run(where, path, checkpoint, {"model.base": base, **(data or {})})
    if checkpoint is not None:
        raise UserError(f"--checkpoint {checkpoint}: {where} is not a run's directory; leave it out")
    if os.path.isdir(path):
        if not os.path.isfile(path / ADAPTER_FILES[1]):
            raise UserError(
                f"{where}: neither a run's directory ({CONFIG}) nor an adapter's ({ADAPTER_FILES[1]}); "
                "give the directory that train.py wrote, for example outputs/exp_002"
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
    tokenizer = load_tokenizer(experiment.model.base, experiment.tokenization.pad_token)
    settings = resolve_settings(experiment, cpu=device.type == "cpu", saved=source.settings)
    memory = available_memory(device)
    settings = fit_to_memory(settings, experiment, model_config, len(tokenizer), memory, source.settings)
    model = load_model(experiment, settings, tokenizer, device)
    base = require_same_base(source)
    fit_adapter(model, source.weights, source.name)
    model.requires_grad_(False)
    return Adapted(source, model.eval(), tokenizer, settings, base)


def require_same_base(source: Source) -> str:
    """The fingerprint of the base model, which must be the one that the adapter was trained on, where that is known.

    Called once the base is loaded: then all of its files are on this machine.

    Raises:
        UserError: it is another one.
    """
    base = source.experiment.model.base
    found = base_fingerprint(base)
    if source.base not in (None, found):
        raise UserError(
            f"model.base = {base}: not the base model that {source.name} was trained on: its config.json or weights "
            f"differ (fingerprint {source.base[:12]} then, {found[:12]} now); give a directory with the base of then "
            "with --model"
        )
    return found


def unchecked_base(source: Source) -> str | None:
    """What to say where nothing tells which base an adapter was trained on; None where that is known."""
    if source.base is not None:
        return None
    return (
        f"{source.name}: nothing here says which weights it was trained on: whether those of "
        f"{source.experiment.model.base} are the same cannot be checked"
    )


def _of_changing_run(where: str, run: Path, checkpoint: str | None, locations: Locations) -> Source:
    """An adapter of a run that may be going on: what is pruned while it is being read is looked for again."""
    for _ in range(TRIES):
        there = checkpoints(run)
        try:
            return _of_run(where, run, checkpoint, locations)
        except UserError:
            if checkpoints(run) == there:
                raise
    return _of_run(where, run, checkpoint, locations)


def _of_run(where: str, run: Path, checkpoint: str | None, locations: Locations) -> Source:
    """An adapter of a run.

    Raises:
        UserError: as `find_adapter`; or a checkpoint was pruned while it was read.
    """
    trained_as = load_experiment(str(run / CONFIG), locations=locations)
    experiment = trained_as.model_copy(
        update={
            "lora": trained_as.lora.model_copy(update={"init_from": None}),
            "model": trained_as.model.model_copy(update={"gradient_checkpointing": False}),
        }
    )
    newest = newest_whole([run])
    summary = _summary(run)  # a run that goes on keeps that of its old end
    place = run / ADAPTER_DIR
    final = checkpoint is None and is_complete(summary, experiment) and (place / ADAPTER_FILES[0]).is_file()
    identity = None if newest is None else newest.identity
    if final:
        step = _recorded(summary, "adapter_step" if "adapter_step" in summary else "updates", int)
        fingerprints = {name: _recorded(summary, f"{name}_fingerprint", str) for name in ("base", "data")}
    elif newest is None:
        raise UserError(f"{where}: this run has no adapter yet, nor a checkpoint; train it first, or longer")
    else:
        place = newest.path if checkpoint is None else _checkpoint(where, run, newest.path, checkpoint)
        try:
            identity, step = read_identity(place), read_progress(place).step
        except Damaged as error:
            raise UserError(f"{place} is damaged: {error}; choose another with --checkpoint") from error
        fingerprints = identity.fingerprints.model_dump()
    if identity is not None:
        _require_same_words(run, identity.experiment, trained_as)
        fingerprints = {**identity.fingerprints.model_dump(), **{k: v for k, v in fingerprints.items() if v}}
    _require_same_lora(run, place, experiment.lora)
    weights = _weights(where, place, _recorded(summary, "adapter_sha256", str) if final else None, experiment.lora)
    settings = identity.environment.settings if identity else None
    return Source(
        where,
        run,
        place,
        step,
        final,
        experiment,
        settings,
        weights,
        fingerprints.get("base"),
        fingerprints.get("data"),
    )


def _base_of_checkpoint(directory: Path) -> str | None:
    """The fingerprint of the base that a checkpoint was trained on, whatever its directory is called now.

    Returns:
        None where it is no checkpoint, but an adapter alone.

    Raises:
        UserError: the checkpoint is damaged.
    """
    if not (directory / MANIFEST).is_file():
        return None
    try:
        return Fingerprints.model_validate(verify(directory, CONTENT).get("fingerprints")).base
    except (Damaged, ValidationError) as error:
        raise UserError(f"{directory} is damaged: {error}; remove its {MANIFEST} to use the adapter alone") from error


def _require_same_words(run: Path, trained_as: Mapping[str, Any], experiment: Experiment) -> None:
    """Refuse a config.yaml that is not what the checkpoints of its run were trained with.

    Raises:
        UserError: lists the differences in what an adapter computes.
    """
    found = [line for line in differences(trained_as, experiment) if line.startswith(COMPUTED_FROM)]
    if found:
        raise UserError(
            f"{run / CONFIG}, with the options of this command, is not what the run was trained with: "
            f"{listed(found)}; put back what it was"
        )


def _require_same_lora(run: Path, place: Path, lora: Lora) -> None:
    """Refuse an adapter that is not of the kind that its run's config.yaml says.

    Raises:
        UserError: it says otherwise, or is not a plain LoRA adapter.
    """
    said, _ = plain_lora(str(place), place)
    for key in ("r", "lora_alpha", "target_modules"):
        here, there = (getattr(each, key) for each in (said, lora))
        if here != there and not (key == "target_modules" and set(here) == set(there)):
            raise UserError(
                f"{place / ADAPTER_FILES[1]}: {key} = {here}, and {run / CONFIG}: lora.{key} = {there}: one of them "
                "has been changed since the run was trained; put back what it was"
            )


def _weights(where: str, directory: Path, sha256: str | None, lora: Lora) -> dict[str, torch.Tensor]:
    """An adapter's weights.

    Args:
        sha256: that of their file, where it was recorded.
        lora: what they must be the weights of.

    Raises:
        UserError: they cannot be read, are not finite, not those that were recorded, or of another rank.
    """
    weights = read_adapter(directory, where if where == str(directory) else f"{where}: {directory}")
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise UserError(f"{directory}: the adapter has weights that are not finite; choose another checkpoint")
    if sha256 is not None and measure(directory / ADAPTER_FILES[0])["sha256"] != sha256:
        raise UserError(
            f"{directory / ADAPTER_FILES[0]}: not the adapter that the run ended with: its sha256 is not that of "
            "summary.json; choose a checkpoint with --checkpoint"
        )
    ranks = {tensor.shape[0] for name, tensor in weights.items() if ".lora_A." in name and tensor.dim() == 2}
    if ranks != {lora.r}:  # before memory is taken for as much as the configuration says
        raise UserError(
            f"{where}: this adapter does not fit: r = {lora.r:,} in its configuration, "
            f"{', '.join(map(str, sorted(ranks))) or 'nothing of LoRA'} in {ADAPTER_FILES[0]}"
        )
    return weights


def _checkpoint(where: str, run: Path, newest: Path, wanted: str) -> Path:
    """The directory of a run's checkpoint, `best` or a step."""
    there = [path.name.rpartition("-")[2] for path in checkpoints(run)]
    step = wanted
    if wanted == "best":
        step = str(_best_step(run, newest))
    if step == "0":
        raise UserError(f"--checkpoint {wanted}: of this run the baseline was best, and no checkpoint is of that")
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
        return read_progress(newest).best_step
    except Damaged as error:
        raise UserError(f"{newest}: {error}; name a step") from error


def _summary(run: Path) -> dict[str, Any]:
    """A run's summary; an empty one where there is none that can be believed."""
    return read_summary(run) or {}


def _recorded(summary: Mapping[str, Any], key: str, kind: type) -> Any:
    """A value of a summary, None where it has none of this type."""
    value = summary.get(key)
    return value if isinstance(value, kind) else None


def _alone(where: str, directory: Path, base: str | None) -> Source:
    """An adapter without its run. That of a checkpoint has a manifest, which knows the base it was trained on."""
    lora, said = plain_lora(where, directory)
    if base is None and said.get("revision") not in (None, "main"):
        raise UserError(
            f"{where}: {ADAPTER_FILES[1]}: revision = {str(said['revision'])[:80]!r} of its base: give a directory "
            "with the base of that revision with --model"
        )
    try:
        model = Model(base=base or said.get("base_model_name_or_path") or "")
    except ValidationError as error:
        raise not_usable(where, error) from error
    return Source(
        where,
        run=None,
        directory=directory,
        step=None,
        final=True,
        experiment=Experiment(model=model, lora=lora),
        settings=None,
        weights=_weights(where, directory, None, lora),
        base=_base_of_checkpoint(directory),
    )


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
