"""The W&B run: one per output directory, through Accelerate's tracker, offline where online cannot be had.

Nothing here prompts, and nothing delays a start for longer than `NETWORK_SECONDS`.
"""

import contextlib
import netrc
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from accelerate import Accelerator

from medqa.config import PUBLIC, Experiment, Tracking
from medqa.data.sources import Row, is_hub_id
from medqa.data.tokens import Example
from medqa.errors import UserError
from medqa.evaluation.loss import fixed_subset
from medqa.files import Damaged, Missing, read_file
from medqa.hub import connects
from medqa.limits import MAX_NETRC_BYTES
from medqa.model.adapter_files import ADAPTER_DIR_FILES
from medqa.places import check_place
from medqa.terminal import without_credentials
from medqa.training.tracking import GLOBAL_STEP
from medqa.training.wandb_feed import FINISH_SECONDS, UPLOAD_SHARE, failures
from medqa.variables import is_on

NETWORK_SECONDS = 8
NOT_TEXT = "it takes paths and command lines in UTF-8 alone"
SAMPLES = "samples"  # the table
# With data of one's own: no command line, which names files (what is said of the machine goes with it), and, where code
# is saved, no patch of what is not committed, in which rows may stand.
OWN_DATA_SETTINGS = {"x_disable_meta": True, "disable_git": True}
SAMPLE_COLUMNS = ["step", "source", "question", "reference", "base answer", "tuned answer", "stopped by itself"]


def start_wandb(
    accelerator: Accelerator, experiment: Experiment, output_dir: Path, run_id: str, in_effect: Mapping[str, Any]
) -> str:
    """Start or continue the directory's run on the main process; says in one line where it goes.

    `WANDB_*` variables win over the file, as everywhere with W&B.
    """
    tracking = experiment.tracking
    config = {**shown_config(experiment), "in_effect": dict(in_effect)}
    if not wandb_wanted(tracking) or not accelerator.is_main_process:
        return "W&B: off"
    try:
        import wandb
    except ImportError as error:
        return f"W&B: off ({error}); metrics.jsonl has it all"
    mode, why = wandb_mode(tracking)

    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its telemetry waits up to 12 s for a dead server
    netrc_key("")  # before W&B opens the file
    _keep_files_below(output_dir / "wandb")
    arguments = {
        "entity": None if os.environ.get("WANDB_ENTITY") else tracking.entity,
        "group": None if "WANDB_RUN_GROUP" in os.environ else tracking.group,
        "name": None if "WANDB_NAME" in os.environ else tracking.run_name or output_dir.absolute().name,
        "tags": None if "WANDB_TAGS" in os.environ else tracking.tags,
        "id": os.environ.get("WANDB_RUN_ID", run_id),
        "dir": os.environ.get("WANDB_DIR", str(output_dir)),
        "resume": "allow",
    }
    project = os.environ.get("WANDB_PROJECT", tracking.project)
    unusable = (wandb.errors.CommError, wandb.errors.UsageError, ValueError)  # ValueError: a key or setting of odd form
    advice = "mend `tracking` or the WANDB_* variables, or use --set tracking.wandb=disabled"
    try:
        arguments["settings"] = wandb.Settings(
            init_timeout=NETWORK_SECONDS,
            finish_timeout=os.environ.get("WANDB_FINISH_TIMEOUT") or UPLOAD_SHARE * FINISH_SECONDS,
            finish_timeout_raises=True,
            console="off",
            **OWN_DATA_SETTINGS if experiment.data.files else {},
        )
    except unusable as error:
        raise UserError(f"W&B: {_gist(error)}; {advice}") from error
    if mode == "online":
        try:
            accelerator.init_trackers(project, config, {"wandb": {**arguments, "mode": mode}})
        except UnicodeEncodeError:
            return _off(accelerator, NOT_TEXT)
        except failures() as error:
            mode, why = "offline", f" ({_gist(error)})"
            accelerator.trackers.clear()
            os.environ.pop("WANDB_SERVICE", None)  # of a process before this one, maybe dead
            with contextlib.suppress(SystemExit, *failures()):
                wandb.teardown()  # else its service still holds the id: "run ID is in use"
    try:
        if mode == "offline":
            accelerator.init_trackers(project, config, {"wandb": {**arguments, "mode": mode}})
    except UnicodeEncodeError:
        return _off(accelerator, NOT_TEXT)
    except unusable as error:
        raise UserError(f"W&B: {_gist(error)}; {advice}") from error
    except failures() as error:
        return _off(accelerator, _gist(error))
    run = accelerator.get_tracker("wandb", unwrap=True)
    run.define_metric(GLOBAL_STEP)
    run.define_metric("*", step_metric=GLOBAL_STEP)
    sync = f"{Path(run.dir).parent}; `wandb sync` sends it, with all that came before"
    where = run.url if mode == "online" else sync
    return f"W&B: {mode}{why}, {where}"


def _off(accelerator: Accelerator, why: str) -> str:
    """Do without W&B; returns the line that says so."""
    accelerator.trackers.clear()
    return f"W&B: off ({why}); metrics.jsonl has it all"


def shown_config(experiment: Experiment) -> dict[str, Any]:
    """The experiment as W&B has it: of what lies on this machine the name alone, of data of one's own not even that."""
    config = experiment.model_dump()
    places = config["data"]["files"]
    config["data"]["files"] = {name: place if is_hub_id(place) else "a local file" for name, place in places.items()}
    for section, key in (("model", "base"), ("lora", "init_from"), ("data", "medquad"), ("data", "afrimedqa")):
        place = config[section][key]
        if place is not None and (os.path.exists(os.path.expanduser(place)) or os.path.isabs(place)):
            config[section][key] = Path(place).name
    return config


def sampled_rows(validation: Sequence[Example], experiment: Experiment) -> list[Row]:
    """The validation rows that W&B is shown answers to; of one's own only where `tracking.log_samples` is true."""
    asked = experiment.tracking.log_samples
    rows = [example.row for example in validation if asked is not False and (asked or example.row.source in PUBLIC)]
    return [rows[i] for i in fixed_subset(rows, experiment.evaluation.samples, experiment.training.seed)]


def wandb_wanted(tracking: Tracking) -> bool:
    """Whether there is to be a W&B run at all. WANDB_DISABLED means what it does to transformers."""
    return not is_on("WANDB_DISABLED") and _asked_mode(tracking) != "disabled"


def wandb_mode(tracking: Tracking) -> tuple[str, str]:
    """`online` or `offline`, and why where it is not what was asked. May take as long as `connects`."""
    if _asked_mode(tracking) in ("offline", "dryrun"):
        return "offline", ""
    why = out_of_reach()
    return ("offline", f" ({why})") if why else ("online", "")


def _asked_mode(tracking: Tracking) -> str:
    return os.environ.get("WANDB_MODE") or tracking.wandb


def out_of_reach() -> str:
    """Why W&B cannot be had online, and what to do; empty where it can. May take as long as `connects`."""
    url = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    shown = without_credentials(url)
    try:
        key, why = netrc_key(urlsplit(shown).netloc)
    except ValueError:
        return f"WANDB_BASE_URL={shown} is no address"
    if not (key or os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE")):
        return why or "no API key: run `wandb login` for online"
    return "" if connects(url) else f"{shown} does not answer"


def netrc_key(host: str) -> tuple[bool, str]:
    """Whether the netrc file has a key for a host, without asking for it; and why the file cannot be read, if so.

    W&B, and the HTTP library below it, would end in a traceback over such a file, or wait for ever on a pipe. They are
    given an empty one instead.
    """
    place = os.path.expanduser(os.environ.get("NETRC") or "~/.netrc")
    try:
        read_file(Path(place), MAX_NETRC_BYTES).decode()
        return netrc.netrc(place).authenticators(host) is not None, ""
    except Missing:
        return False, ""
    except (Damaged, UnicodeDecodeError, netrc.NetrcParseError) as error:
        os.environ["NETRC"] = os.devnull
        why = "not text in UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        return False, f"{place} cannot be read: {why}; mend the file, or set WANDB_API_KEY"


def _keep_files_below(directory: Path) -> None:
    """Have W&B write here what it cannot write below the home directory.

    Without its cache its service process writes its log to the terminal, and without its data no artifact is kept.
    """
    from wandb import env

    for name, place in (("WANDB_CACHE_DIR", env.get_cache_dir()), ("WANDB_DATA_DIR", env.get_data_dir())):
        try:
            check_place(Path(place), name)
        except UserError:
            os.environ[name] = str(directory.absolute() / name.split("_")[1].lower())


def log_samples(accelerator: Accelerator, rows: Sequence[Sequence[Any]], first: int = 0) -> None:
    """The table of sample answers, `SAMPLE_COLUMNS`, at their step, or at `first` where W&B is beyond it."""
    if accelerator.trackers and rows:
        data = [list(row) for row in rows]
        step = max(data[0][0], first)
        accelerator.trackers[0].log_table(SAMPLES, columns=SAMPLE_COLUMNS, data=data, step=step)


def log_adapter(accelerator: Accelerator, tracking: Tracking, directory: Path, name: str) -> None:
    """The adapter as an artifact, if `tracking.log_model`: the files that a run writes into its directory, no others.

    Somebody else may have made the directory: what a link in it points to is no part of the adapter.
    """
    if not (accelerator.trackers and tracking.log_model) or directory.is_symlink():
        return
    import wandb

    artifact = wandb.Artifact(name, type="model")
    for path in sorted(directory.iterdir()):
        if path.name in ADAPTER_DIR_FILES and stat.S_ISREG(path.lstat().st_mode):
            artifact.add_file(str(path))
    accelerator.get_tracker("wandb", unwrap=True).log_artifact(artifact)


def _gist(error: Exception) -> str:
    """An error's message on one line."""
    return without_credentials(" ".join(str(error).split()))[:300]
