"""Whether a resumed run is the same run: what may change, what may not, and what the user is told."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from medqa.config import Experiment, flat
from medqa.config_file import read_yaml
from medqa.data.batches import TrainingData
from medqa.data.tokens import ids_fingerprint
from medqa.errors import UserError, listed
from medqa.model.base_files import base_fingerprint
from medqa.model.settings import Settings
from medqa.recorded import LOCATIONS, checkpoints, differences, with_later_keys
from medqa.training.checkpoint import (
    Fingerprints,
    Found,
    Identity,
    changes,
    environment,
    load_checkpoint,
)
from medqa.training.distributed import on_main
from medqa.training.state import Moved, Progress, TrainState

OUTPUT_DIR, PERSIST_TO = "--output-dir", "--persist-to"
WHAT = {"data": "the data", "tokenizer": "the token ids of the data", "base": "the base model"}


def identify(
    experiment: Experiment,
    data: TrainingData,
    tokenizer: PreTrainedTokenizerBase,
    model: PeftModel,
    settings: Settings,
    accelerator: Accelerator,
) -> Identity:
    """Whose the checkpoints of this run are.

    Raises:
        UserError: not all processes have the same data, tokens and base model: each reads them for itself.
    """

    def of_base() -> str:
        return base_fingerprint(experiment.model.base)

    fingerprints = Fingerprints(
        data=data.splits.fingerprint,
        tokenizer=ids_fingerprint(data.examples, tokenizer),
        base=of_base() if settings.shards == 1 else on_main(accelerator, of_base),  # sharded, the others have no files
    )
    if accelerator.num_processes > 1:
        found = gather_object([fingerprints.model_dump()])
        if differing := [what for name, what in WHAT.items() if len({each[name] for each in found}) > 1]:
            raise UserError(
                f"not all processes have read the same: {', '.join(differing)} differ; on several machines give files "
                "or caches (HF_HOME, KAGGLEHUB_CACHE) that they share, or the same copies on each"
            )
    return Identity(
        experiment=flat(experiment),
        fingerprints=fingerprints,
        environment=environment(accelerator, settings, model),
    )


def require_same_experiment(found: Found, experiment: Experiment, option: str) -> None:
    """See that a checkpoint is of this experiment.

    Args:
        option: the one that names the directory of its run.

    Raises:
        UserError: it is of another; lists the differences.
    """
    _refuse(f"{found.path} is of another experiment", differences(found.identity.experiment, experiment), option)


def resume(found: Found, state: TrainState, identity: Identity) -> None:
    """Load a checkpoint into the state. The state notes where the machine is of another kind than before.

    Raises:
        UserError: the checkpoint is of other data, another tokenizer or base model; the message lists the differences.
            Nothing is loaded then.
    """
    before, now = (found_or_now.fingerprints.model_dump() for found_or_now in (found.identity, identity))
    material = [f"{WHAT[name]}: {before[name][:12]} there, {now[name][:12]} now" for name in WHAT]
    _refuse(
        f"{found.path} was trained on other data, tokens or base model",
        [line for name, line in zip(WHAT, material, strict=True) if before[name] != now[name]],
        OUTPUT_DIR,
    )
    load_checkpoint(found, state)
    if changed := changes(found.identity.environment, identity.environment):
        state.progress.not_bitwise.append(Moved(state.progress.step, changed))


def resume_lines(found: Found | None, progress: Progress, damaged_lines: int) -> list[tuple[str, str]]:
    """The plan's lines on resuming: checkpoints passed over, what is lost, and where the last digits may differ."""
    lines = [("passed over", reason) for reason in (found.passed_over if found else ())]
    if found:
        lines.append(("resumed", f"after update {progress.step}, from {found.path}"))
    if progress.stopped_early:
        lines.append(("stopped early", f"after update {progress.step}; what is left is the final evaluation"))
    if damaged_lines:
        lines.append(("lost", f"{damaged_lines} damaged lines of metrics.jsonl"))
    return lines + [
        ("not bitwise", f"from update {moved.after_step + 1} on: {', '.join(moved.changed)}")
        for moved in progress.not_bitwise
    ]


def check_config(config: Path, experiment: Experiment, option: str) -> None:
    """Refuse a directory whose run is another experiment's.

    Raises:
        UserError: lists the differences.
    """
    try:
        saved = read_yaml(config)
    except UserError as error:
        if checkpoints(config.parent):
            return  # their manifests say whose the run is
        raise UserError(f"{error}; {ways_on(option)}") from error
    if not isinstance(saved, dict) or not saved.keys() & Experiment.model_fields.keys():
        if checkpoints(config.parent):
            return
        raise UserError(f"{config}: not a run's, or damaged; {ways_on(option)}")
    before = _flat(saved)
    _refuse(f"{option} {config.parent} holds the run of another experiment", differences(before, experiment), option)


def reads_elsewhere(config: Path, experiment: Experiment) -> bool:
    """Whether the run in this directory read its data or base model from other places than the experiment names."""
    if not config.is_file():
        return False
    try:
        saved = read_yaml(config)
    except UserError:
        return True  # damaged: who knows
    if not isinstance(saved, dict):
        return True
    before, now = with_later_keys(_flat(saved)), flat(experiment)
    return any(before.get(key) != now[key] for key in LOCATIONS)


def _refuse(what: str, found: list[str], option: str) -> None:
    """Raise with the differences, if there are any, and the ways on."""
    if found:
        afresh = (
            "; to start a new run from the weights of a checkpoint, choose another --output-dir and add "
            "--set lora.init_from=DIR/checkpoint-STEP"
        )
        more = afresh if option == OUTPUT_DIR else ""
        raise UserError(f"{what}: {listed(found)}\n{ways_on(option)}{more}")


def ways_on(option: str) -> str:
    """What to do about a directory that cannot be this run's.

    Where it is that of the copies, `--fresh` would remove the run in the output directory too, and is not advised.
    """
    return f"choose another {option}" + (", or start over there with --fresh" if option == OUTPUT_DIR else "")


def _flat(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A run's configuration as `section.key` to value."""
    return {f"{s}.{k}": v for s, keys in saved.items() if isinstance(keys, dict) for k, v in keys.items()}
