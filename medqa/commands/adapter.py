"""Load a trained adapter on its base model: from a run's directory, a directory in PEFT's format, or the hub.

The adapter's weights, its configuration and its base model must be those that were recorded in training. Otherwise
metrics and answers would be those of another model.
"""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import PeftModel
from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from medqa.config import Experiment, Lora, Model, Tokenization, is_complete
from medqa.config_file import Locations, load_experiment, read_yaml
from medqa.data.tokens import prompt_saved_as
from medqa.errors import UserError, listed
from medqa.files import Damaged, read_file
from medqa.hub import hub_reachable
from medqa.limits import MAX_JSON_BYTES
from medqa.model.adapter_files import ADAPTER_FILES, not_usable, plain_lora, read_adapter
from medqa.model.base import check_model, fit_adapter, load_model, load_tokenizer
from medqa.model.base_files import base_fingerprint
from medqa.model.device import available_memory
from medqa.model.memory import fit_to_memory
from medqa.model.settings import SavedSettings, Settings, resolve_settings
from medqa.recorded import MANIFEST, checkpoints, differences
from medqa.training.checkpoint import CONTENT, Identity, measure, newest_valid, read_identity, read_progress, verify
from medqa.training.run_dir import ADAPTER_DIR, CONFIG, read_summary

TRIES = 20  # to read a checkpoint of a run that saves and removes them at the same time
CHAT_TEMPLATE = "chat_template.jinja"
COMPUTED_FROM = ("model", "lora", "data", "tokenization")  # sections that matter after training


@dataclass(frozen=True)
class Source:
    """Where an adapter is, and how it was trained.

    Attributes:
        name: how the user named it.
        run: the directory of its run; None for an adapter alone.
        directory: the directory with the two files of the adapter.
        step: its update, if known.
        final: whether its run is complete and this is its final adapter.
        experiment: for an adapter alone, only base, LoRA and prompt are known and the rest has its defaults. Its
            `model.quantization` is never `auto`, but what the run used.
        settings: the settings in effect in training, if known.
        weights: by PEFT's names. Read when it is found, because a checkpoint may be removed before the base is loaded.
        base: the fingerprint of the base model in training, if known.
        data: the fingerprint of rows and splits in training, if known.
        bos: the rule for the BOS of the prompt, as in `data.tokens.set_prompt`.
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
    bos: str = "tokenizer"

    @property
    def which(self) -> str:
        """Which adapter this is, in words: the final adapter or a checkpoint of a run, or an adapter alone."""
        if self.run is None:
            return f"{self.name}: an adapter without its run"
        of_step = "" if self.step is None else f" of update {self.step:,}"
        return f"{self.name}: the {'final adapter' if self.final else 'checkpoint'}{of_step}"


@dataclass(frozen=True)
class Adapted:
    """An adapter on its base model, in evaluation mode; `disable_adapter()` of the model gives the base alone.

    `base` is the fingerprint of the base model.
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
    """Find the adapter that `where` names: a run's directory, an adapter's directory, or an id on the hub.

    Args:
        checkpoint: of a run, `best` or the step of a checkpoint; None: the final adapter, or the newest checkpoint if
            the run is not complete.
        base: the location of the base model, if it has moved.
        data: `section.key` of the run's data to their location, if they have moved.

    Raises:
        UserError: there is no adapter or no such checkpoint; or it is damaged, or not plain LoRA.
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


def load_adapted(source: Source, device: torch.device, quantized: bool = True) -> Adapted:
    """Load the adapter on its base, onto this device, with the precision and quantization of training if available.

    Args:
        quantized: False: on the unquantized weights of the base, in the precision of training.

    Raises:
        UserError: base or adapter cannot be loaded, or do not fit each other.
    """
    experiment = source.experiment
    model_config = check_model(experiment.model, experiment.tokenization.max_length if source.run else 0)
    tokenizer = load_tokenizer(experiment.model.base, experiment.tokenization, source.bos)
    settings = resolve_settings(experiment, cpu=device.type == "cpu", saved=source.settings)
    if not quantized:
        settings = replace(settings, quantization="none")
    memory = available_memory(device)
    settings = fit_to_memory(settings, experiment, model_config, len(tokenizer), memory, source.settings)
    model = load_model(experiment, settings, tokenizer, device)
    base = require_same_base(source)
    fit_adapter(model, source.weights, source.name)
    model.requires_grad_(False)
    return Adapted(source, model.eval(), tokenizer, settings, base)


def require_same_base(source: Source) -> str:
    """The fingerprint of the base model, which must be the one of training, if that is known.

    Call it after the base is loaded, when all of its files are on this machine.

    Raises:
        UserError: it is another base model.
    """
    base = source.experiment.model.base
    found = base_fingerprint(base)
    if source.base not in (None, found):
        raise UserError(
            f"model.base = {base}: not the base model that {source.name} was trained on: its config.json or weights "
            f"differ (fingerprint {source.base[:12]} in training, {found[:12]} now); give the original base "
            "with --model"
        )
    return found


def unchecked_base(source: Source) -> str | None:
    """A warning if it is not known which base an adapter was trained on; otherwise None."""
    if source.base is not None:
        return None
    return (
        f"{source.name}: its base model in training is not recorded, so it cannot be checked whether the weights of "
        f"{source.experiment.model.base} are the same"
    )


def _of_changing_run(where: str, run: Path, checkpoint: str | None, locations: Locations) -> Source:
    """Find an adapter of a run that may be training: if a checkpoint is removed while it is read, look again."""
    for _ in range(TRIES):
        there = checkpoints(run)
        try:
            return _of_run(where, run, checkpoint, locations)
        except UserError:
            if checkpoints(run) == there:
                raise
    return _of_run(where, run, checkpoint, locations)


def _of_run(where: str, run: Path, checkpoint: str | None, locations: Locations) -> Source:
    """Find an adapter of a run.

    Raises:
        UserError: as in `find_adapter`; or a checkpoint was removed while it was read.
    """
    trained_as = load_experiment(str(run / CONFIG), locations=locations)
    experiment = trained_as.model_copy(
        update={
            "lora": trained_as.lora.model_copy(update={"init_from": None}),
            "model": trained_as.model.model_copy(update={"gradient_checkpointing": False}),
        }
    )
    newest = newest_valid([run])
    summary = _summary(run)  # a run that is continued has the summary of its earlier end
    directory = run / ADAPTER_DIR
    final = checkpoint is None and is_complete(summary, experiment) and (directory / ADAPTER_FILES[0]).is_file()
    identity = None if newest is None else newest.identity
    if final:
        step = _recorded(summary, "adapter_step" if "adapter_step" in summary else "updates", int)
        fingerprints = {name: _recorded(summary, f"{name}_fingerprint", str) for name in ("base", "data")}
    elif newest is None:
        raise UserError(f"{where}: this run has neither an adapter nor a checkpoint yet; train it first, or longer")
    else:
        directory = newest.path if checkpoint is None else _checkpoint(where, run, newest.path, checkpoint)
        try:
            identity, step = read_identity(directory), read_progress(directory).step
        except Damaged as error:
            raise UserError(f"{directory} is damaged: {error}; choose another with --checkpoint") from error
        fingerprints = identity.fingerprints.model_dump()
    if identity is not None:
        _require_same_words(run, identity.experiment, trained_as)
        fingerprints = {**identity.fingerprints.model_dump(), **{k: v for k, v in fingerprints.items() if v}}
    _require_same_lora(run, directory, experiment.lora)
    settings = identity.environment.settings if identity else None
    model = _as_used(run, experiment.model, settings, summary)
    experiment = experiment.model_copy(update={"model": model})
    weights = _weights(where, directory, _recorded(summary, "adapter_sha256", str) if final else None, experiment.lora)
    recorded = read_yaml(run / CONFIG).get("tokenization", {})
    return Source(
        where,
        run,
        directory,
        step,
        final,
        experiment,
        settings,
        weights,
        fingerprints.get("base"),
        fingerprints.get("data"),
        settings.bos if settings else "tokenizer" if "prompt" in recorded else "always",
    )


def _as_used(run: Path, model: Model, settings: SavedSettings | None, summary: Mapping[str, Any]) -> Model:
    """The section `model` with the quantization that the run used.

    That differs from the requested one with `auto`, and where 4-bit weights were not available.

    Args:
        settings: those of a checkpoint, which loading keeps whatever the section says; None without one.
        summary: used if there is no checkpoint.

    Raises:
        UserError: `auto` is requested, and what the run used is not recorded.
    """
    used = settings.quantization if settings else summary.get("quantization")
    if model.quantization != "auto" and (settings is not None or used not in ("none", "4bit")):
        return model
    if used not in ("none", "4bit"):
        raise UserError(
            f"{run}: model.quantization = auto, and neither a checkpoint nor summary.json says what the run used: "
            f"write none or 4bit into {run / CONFIG}"
        )
    return model.model_copy(update={"quantization": used})


def _trained_as(directory: Path) -> tuple[str | None, str, str]:
    """What is known of an adapter alone: the fingerprint of its base, its prompt, and the rule for the BOS.

    A checkpoint has a manifest; the name of its directory does not matter. A final adapter has the chat template of its
    prompt in its directory. An adapter with neither is assumed to be trained with the project's own prompt.

    Raises:
        UserError: the checkpoint is damaged.
    """
    if (directory / MANIFEST).is_file():
        try:
            body = verify(directory, CONTENT)
            identity = Identity.model_validate({key: body.get(key) for key in Identity.model_fields})
        except (Damaged, ValidationError) as error:
            raise UserError(
                f"{directory} is damaged: {error}; remove its {MANIFEST} to use the adapter alone"
            ) from error
        prompt = str(identity.experiment.get("tokenization.prompt", "instruction"))
        return identity.fingerprints.base, prompt, identity.environment.settings.bos
    try:
        template = read_file(directory / CHAT_TEMPLATE, MAX_JSON_BYTES).decode("utf-8", "replace")
    except Damaged:
        return None, "instruction", "tokenizer"
    return None, *prompt_saved_as(template)


def _require_same_words(run: Path, trained_as: Mapping[str, Any], experiment: Experiment) -> None:
    """Refuse a config.yaml that differs from the experiment in the run's checkpoints.

    Raises:
        UserError: lists the differences that affect what an adapter computes.
    """
    found = [line for line in differences(trained_as, experiment) if line.startswith(COMPUTED_FROM)]
    if found:
        raise UserError(
            f"{run / CONFIG}, with the options of this command, is not what the run was trained with: "
            f"{listed(found)}; restore the original values"
        )


def _require_same_lora(run: Path, directory: Path, lora: Lora) -> None:
    """Refuse an adapter whose adapter_config.json contradicts the run's config.yaml.

    Raises:
        UserError: it does, or it is not a plain LoRA adapter.
    """
    said, _ = plain_lora(str(directory), directory)
    for key in ("r", "lora_alpha", "target_modules", "use_rslora", "use_dora"):
        here, there = (getattr(each, key) for each in (said, lora))
        if here != there and not (key == "target_modules" and set(here) == set(there)):
            raise UserError(
                f"{directory / ADAPTER_FILES[1]}: {key} = {here}, and {run / CONFIG}: lora.{key} = {there}: one "
                "of them has been changed since the run was trained; restore the original value"
            )


def _weights(where: str, directory: Path, sha256: str | None, lora: Lora) -> dict[str, torch.Tensor]:
    """Read an adapter's weights.

    Args:
        sha256: of their file, if it was recorded.
        lora: the configuration that they must fit.

    Raises:
        UserError: they cannot be read, are not finite, are not the recorded ones, or have another rank.
    """
    weights = read_adapter(directory, where if where == str(directory) else f"{where}: {directory}")
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise UserError(f"{directory}: weights of the adapter are not finite; choose another checkpoint")
    if sha256 is not None and measure(directory / ADAPTER_FILES[0])["sha256"] != sha256:
        raise UserError(
            f"{directory / ADAPTER_FILES[0]}: not the final adapter of the run: its sha256 differs from that in "
            "summary.json; choose a checkpoint with --checkpoint"
        )
    ranks = {tensor.shape[0] for name, tensor in weights.items() if ".lora_A." in name and tensor.dim() == 2}
    if ranks != {lora.r}:  # before memory is allocated for the rank in the configuration
        raise UserError(
            f"{where}: this adapter does not fit: r = {lora.r:,} in its configuration, "
            f"{', '.join(map(str, sorted(ranks))) or 'no LoRA weights'} in {ADAPTER_FILES[0]}"
        )
    if any("lora_magnitude_vector" in name for name in weights) != lora.use_dora:
        raise UserError(
            f"{where}: this adapter does not fit: use_dora = {lora.use_dora} in its configuration, "
            f"{'no magnitudes' if lora.use_dora else 'magnitudes'} in {ADAPTER_FILES[0]}"
        )
    return weights


def _checkpoint(where: str, run: Path, newest: Path, wanted: str) -> Path:
    """The directory of a run's checkpoint, given as `best` or a step."""
    there = [path.name.rpartition("-")[2] for path in checkpoints(run)]
    step = wanted
    if wanted == "best":
        step = str(_best_step(run, newest))
    if step == "0":
        raise UserError(f"--checkpoint {wanted}: no checkpoint improved on the baseline; give a step, or leave it out")
    if step not in there:
        what = f"best is update {step}, but its checkpoint was not kept" if wanted == "best" else "no such checkpoint"
        raise UserError(f"--checkpoint {wanted}: {what}; {where} has {', '.join(there)}")
    return run / f"checkpoint-{step}"


def _best_step(run: Path, newest: Path) -> int:
    """The update with the lowest loss on the fixed validation rows."""
    summary, step = _summary(run), int(newest.name.rpartition("-")[2])
    if summary.get("updates") == step and isinstance(summary.get("best_step"), int):
        return summary["best_step"]  # the final evaluation came after the last checkpoint
    try:
        return read_progress(newest).best_step
    except Damaged as error:
        raise UserError(f"{newest}: {error}; give a step with --checkpoint") from error


def _summary(run: Path) -> dict[str, Any]:
    """A run's summary; an empty one if it is missing or damaged."""
    return read_summary(run) or {}


def _recorded(summary: Mapping[str, Any], key: str, kind: type) -> Any:
    """A value of a summary; None if it is missing or of another type."""
    value = summary.get(key)
    return value if isinstance(value, kind) else None


def _alone(where: str, directory: Path, base: str | None) -> Source:
    """Find an adapter without its run."""
    lora, said = plain_lora(where, directory)
    if base is None and said.get("revision") not in (None, "main"):
        raise UserError(
            f"{where}: {ADAPTER_FILES[1]} names revision {str(said['revision'])[:80]!r} of its base: give a directory "
            "with that revision of the base with --model"
        )
    try:
        model = Model(base=base or said.get("base_model_name_or_path") or "")
        fingerprint, prompt, bos = _trained_as(directory)
        tokenization = Tokenization.model_validate({"prompt": prompt})
    except ValidationError as error:
        raise not_usable(where, error) from error
    return Source(
        where,
        run=None,
        directory=directory,
        step=None,
        final=True,
        experiment=Experiment(model=model, lora=lora, tokenization=tokenization),
        settings=None,
        weights=_weights(where, directory, None, lora),
        base=fingerprint,
        bos=bos,
    )


def _from_hub(where: str) -> Path:
    """The directory of an adapter on the hub, downloaded or from the cache."""
    hub_reachable()  # if not, switches to offline mode, so that the next lines fail at once
    try:
        paths = [Path(hf_hub_download(where, name)) for name in reversed(ADAPTER_FILES)]
        with contextlib.suppress(OSError, HfHubHTTPError):  # it tells with which prompt the adapter was trained
            hf_hub_download(where, CHAT_TEMPLATE)
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = (
            str(error).splitlines()[0] if hub_reachable() else "the hub does not answer, and it is not in the cache"
        )
        there = ", ".join(sorted(str(path.parent) for path in Path("outputs").glob(f"*/{CONFIG}"))[:8])
        raise UserError(
            f"{where}: no such directory, and not available as an adapter on the hub ({reason}); give the directory of "
            f"a run or of an adapter ({'there are ' + there if there else 'outputs has no run yet'})"
        ) from error
    return paths[0].parent
