"""A run's directory: is it ours, is it this experiment's, and starting over in it."""

import json
import os
import secrets
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from medqa.config import Experiment, flat, may_change_on_resume
from medqa.data.report import write_json
from medqa.errors import UserError, listed
from medqa.training.checkpoint import ADAPTER_FILES, NAME, STATE_FILE, TRAINING_FILE, checkpoints
from medqa.yaml_core import dump_yaml, load_yaml

CONFIG = "config.yaml"
RUN_FILE = "run.json"
ADAPTER_DIR = "lora_adapters"
FILES = (CONFIG, "data_report.json", "splits.csv", "metrics.jsonl", "summary.json")
# Files of a tokenizer and a model card, beside those of the adapter.
ADAPTER_DIR_FILES = {*ADAPTER_FILES, "README.md", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
CHECKPOINT_FILES = {*ADAPTER_FILES, TRAINING_FILE, STATE_FILE}
LOCATIONS = {"data.medquad", "data.afrimedqa"}  # data may lie elsewhere: the fingerprint says whether they are the same


def check_run_dir(output_dir: Path, experiment: Experiment, fresh: bool) -> None:
    """See whether this experiment can run in this directory, changing nothing.

    Raises:
        UserError: not writable, or holding another experiment's run, with the differences, or files that no run wrote.
    """
    try:
        existing = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    except OSError as error:
        raise UserError(f"--output-dir {output_dir}: {error.strerror}; choose another") from error
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--output-dir {output_dir}: {existing} is not a directory one can write to; choose another")
    if fresh:
        _refuse_foreign(output_dir)
    elif (output_dir / CONFIG).is_file():
        _check_same(output_dir / CONFIG, experiment)
    elif not checkpoints(output_dir) and (foreign := _without_a_run(output_dir)):
        raise UserError(
            f"--output-dir {output_dir} holds what no run wrote and this one would write over: "
            f"{', '.join(path.name for path in foreign)}; choose another"
        )


@dataclass(frozen=True)
class Leg:
    """One start of a run: the id that the run keeps over all of them, and how many came before."""

    run_id: str
    resumes: int


def start_run(output_dir: Path, fresh: bool, accelerator: Accelerator) -> Leg:
    """Create the directory, cleared if `fresh`, and note one more leg; the main process does, the others wait.

    Raises:
        UserError: it cannot be written.
    """
    leg = _note_leg(output_dir, fresh) if accelerator.is_main_process else Leg("", 0)
    accelerator.wait_for_everyone()
    return leg


def _note_leg(output_dir: Path, fresh: bool) -> Leg:
    """As `start_run`, on the main process."""
    run_file = output_dir / RUN_FILE
    try:
        if fresh and output_dir.is_dir():
            clear(output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        leg = Leg(secrets.token_hex(4), 0)
        if run_file.is_file():
            before = json.loads(run_file.read_text(encoding="utf-8"))
            leg = Leg(str(before["run_id"]), int(before["resumes"]) + 1)
        write_json(asdict(leg), run_file)
    except OSError as error:
        raise UserError(f"--output-dir {output_dir}: cannot be written: {error}; choose another") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run_file}: damaged ({error}); --fresh starts over") from error
    return leg


def finished(output_dir: Path, experiment: Experiment) -> dict[str, Any] | None:
    """The summary of a run that is complete already, None of one that is not.

    Where data are read from another place than before, nothing is said to be complete: whether they are the same data
    shows when they are read.
    """
    path = output_dir / "summary.json"
    if _reads_elsewhere(output_dir / CONFIG, experiment):
        return None
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(summary, dict) and {"experiment", "baseline", "final", "test"} <= summary.keys()
    return summary if whole and summary.get("updates") == experiment.training.max_steps else None


def write_config(output_dir: Path, experiment: Experiment, accumulation: int, changes: dict[str, Any]) -> None:
    """`config.yaml`: the experiment in full, and what is in effect where that differs, with the reason."""
    effect = {key: {"asked": asked, "used": used, "reason": why} for key, (asked, used, why) in changes.items()}
    dump_yaml(
        {**experiment.model_dump(), "gradient_accumulation_steps": accumulation, "in_effect": effect},
        output_dir / CONFIG,
    )


def clear(output_dir: Path) -> None:
    """Remove a run's files, and nothing that a run did not write.

    Raises:
        UserError: as `check_run_dir` with `fresh`; nothing is removed then.
    """
    _refuse_foreign(output_dir)
    for folder in _folders(output_dir):
        if folder.is_dir():
            shutil.rmtree(folder)
    for name in (*FILES, RUN_FILE):  # that one last: it says whose the others are
        (output_dir / name).unlink(missing_ok=True)


def _refuse_foreign(output_dir: Path) -> None:
    """Refuse to clear a directory in which a link, or a foreign file in one of the run's folders, would be lost."""
    files = [output_dir / name for name in (*FILES, RUN_FILE)]
    foreign = [path for path in files if path.is_symlink() or path.is_dir()] or _without_a_run(output_dir)
    for folder, names in _folders(output_dir).items():
        if folder.is_symlink() or folder.is_file():
            foreign.append(folder)
        elif folder.is_dir():
            foreign += [
                path for path in folder.iterdir() if path.name not in names or path.is_symlink() or path.is_dir()
            ]
    if foreign:
        raise UserError(
            f"--fresh: {output_dir} holds what no run wrote: {', '.join(map(str, foreign[:5]))}; "
            "move it away, or choose another --output-dir"
        )


def _without_a_run(output_dir: Path) -> list[Path]:
    """What has the name of a run's file or folder in a directory that no run has begun in."""
    if (output_dir / RUN_FILE).exists():
        return []
    return [path for path in (*(output_dir / name for name in FILES), *_folders(output_dir)) if path.exists()]


def _folders(output_dir: Path) -> dict[Path, set[str]]:
    """The folders that a run writes here, and the names of the files it writes into each."""
    found = [path for path in output_dir.glob("checkpoint-*") if NAME.fullmatch(path.name.removesuffix(".tmp"))]
    return dict.fromkeys(found, CHECKPOINT_FILES) | {output_dir / ADAPTER_DIR: ADAPTER_DIR_FILES}


def _reads_elsewhere(config: Path, experiment: Experiment) -> bool:
    """Whether the run in this directory read its data from other places than the experiment names."""
    if not config.is_file():
        return False
    saved = load_yaml(config.read_text(encoding="utf-8", errors="replace"), str(config))["data"]
    return any(saved.get(key.split(".")[1]) != flat(experiment)[key] for key in LOCATIONS)


def _check_same(config: Path, experiment: Experiment) -> None:
    """Refuse a directory whose run is another experiment's.

    Raises:
        UserError: lists the differences.
    """
    try:
        saved = load_yaml(config.read_text(encoding="utf-8", errors="replace"), str(config))
    except (OSError, UserError) as error:
        raise UserError(f"{error}; --fresh starts over, or choose another --output-dir") from error
    if not isinstance(saved, dict) or not saved.keys() & Experiment.model_fields.keys():
        raise UserError(
            f"{config}: not a run's, or damaged; --fresh starts over if it is a run's, or choose another --output-dir"
        )
    before = {f"{s}.{k}": v for s, keys in saved.items() if isinstance(keys, dict) for k, v in keys.items()}
    differences = [
        f"{key}: {before.get(key)!r} there, {value!r} now"
        for key, value in flat(experiment).items()
        if before.get(key) != value
        and key not in LOCATIONS
        and not _may_change(key, before.get(key), value, experiment)
    ]
    if differences:
        raise UserError(
            f"--output-dir {config.parent} holds the run of another experiment: {listed(differences)}\n"
            "choose another --output-dir, or start over there with --fresh"
        )


def _may_change(key: str, before: Any, now: Any, experiment: Experiment) -> bool:
    """Whether the run may go on with this change; updates may be added, never taken back."""
    if key == "training.max_steps":
        return may_change_on_resume(key, experiment) and isinstance(before, int) and now > before
    return may_change_on_resume(key, experiment)
