"""Weights & Biases (W&B): one W&B run for each output directory, with the records of metrics.jsonl.

No function here prompts the user, or delays the start for longer than `NETWORK_SECONDS`.
"""

import atexit
import contextlib
import glob
import importlib
import netrc
import os
import queue
import shutil
import stat
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from accelerate import Accelerator

from medqa.config import Experiment, Tracking
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
from medqa.variables import is_on

# ----------------------------------------------------------------------------------------------------
# Logging to W&B from a thread of its own: each step once over all sessions. No failure of W&B delays training.
#
# W&B is optional: `metrics.jsonl` has all records, and they can be logged to W&B again from it. Without a connection
# W&B keeps everything on disk. Two things can fail during a run: W&B's service process, which receives every call, and
# calls that need the server (tables, artifacts). The wait at the end is bounded here, because W&B would wait forever
# for a service process that hangs.

FINISH_SECONDS = 30  # for everything that is still to be sent when the run ends
UPLOAD_SHARE = 0.8  # the part of it for uploads; W&B then stops by itself
TEARDOWN_SECONDS = 5  # in addition, after a failure, to shut down the service process
MAX_PENDING_CALLS = 10_000  # so that a service process that hangs does not fill the memory
SUPERSEDED = "superseded"


class WandbLogger:
    """Logs to the W&B run on the main process; does nothing on the others, or without a W&B run.

    Attributes:
        first: the first step that earlier sessions have not logged to W&B.

    Args:
        report: called with a message if W&B fails.
    """

    def __init__(self, accelerator: Accelerator, report: Callable[[str], None]) -> None:
        self._accelerator, self._report = accelerator, report
        self.first = 0
        self._failed = False
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._teardown_due = threading.Event()
        self._run: Any = None
        if accelerator.trackers:
            import wandb

            self._run = accelerator.get_tracker("wandb", unwrap=True)
            # Both are started now, because an exit hook cannot start threads from Python 3.12 on.
            self._worker = threading.Thread(target=self._work, name="W&B logger", daemon=True)
            self._tearer = threading.Thread(target=self._tear_down, name="W&B teardown", daemon=True)
            self._worker.start()
            self._tearer.start()
            wandb.termsetup(wandb.setup().settings, self)  # W&B prints nothing; its warnings come to this object
            atexit.register(self._close)  # for a run that ends early; it runs before W&B's own hook

    def log_earlier(self, recorded: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
        """Log the steps of earlier sessions that W&B lacks.

        An offline session gets all of them, so that only this session must be uploaded; the directories of earlier
        offline sessions are moved to `superseded`. But if earlier sessions were online or have been uploaded, an
        offline session gets only new steps, because an upload appends to what W&B has.

        Args:
            recorded: step and values of the records of earlier sessions.
        """
        if self._run is None:
            return
        here = Path(self._run.dir).parent
        earlier = [
            path for path in here.parent.glob(f"*run-*-{glob.escape(self._run.id)}") if path.is_dir() and path != here
        ]
        offline = [path for path in earlier if path.name.startswith("offline-") and not any(path.glob("*.synced"))]
        recorded = list(recorded)
        if self._run.resumed:  # the server has told which step is next
            self.first = self._run.starting_step
        elif here.name.startswith("offline-") and len(earlier) > len(offline):
            self.first = max((step for step, _ in recorded), default=-1) + 1
        for step, values in recorded:
            if step >= self.first:
                self.log(values, step)
        for path in offline:
            (here.parent / SUPERSEDED).mkdir(exist_ok=True)
            shutil.move(path, here.parent / SUPERSEDED / path.name)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Log the values of a step, unless an earlier session has."""
        final = step == self.first - 1 and "train/loss" not in values  # an evaluation after the last update
        if step >= self.first or final:
            self.attempt(partial(self._log, dict(values), step))

    def attempt(self, call: Callable[[], Any], online: bool = False) -> None:
        """Run a call of W&B's API in the thread. A failure is reported once, and otherwise ignored.

        Args:
            online: the call needs the server. It is skipped after a failure.
        """
        if self._run is None:
            return
        if self._calls.qsize() < MAX_PENDING_CALLS:
            self._calls.put(partial(self._try, call, online))
        else:
            self.warning("its service process does not respond")

    def finish(self) -> None:
        """Let W&B upload the rest, for a bounded time, and finish the W&B run."""
        if self._run is not None:
            self._close()
            atexit.unregister(self._close)
            self._accelerator.trackers.clear()

    def info(self, message: str) -> None:
        """Drop an informational message of W&B."""

    def warning(self, message: str) -> None:
        """Report, once, that W&B may lack records."""
        first, self._failed = not self._failed, True
        if first:
            why = " ".join(message.split()).removeprefix("wandb: WARNING ")[:200]
            online = "" if self._run.offline else "--include-online "  # else it skips runs that began online
            self._report(
                f"W&B: {why} (training continues; metrics.jsonl has all records, and `wandb sync {online}"
                f"{Path(self._run.dir).parent}` may upload them later)"
            )

    error = warning

    def _work(self) -> None:
        while call := self._calls.get():
            call()

    def _try(self, call: Callable[[], Any], online: bool = False) -> None:
        """Make a call. After a failure later calls are still made: they may reach W&B, or at least its files."""
        if online and self._failed:
            return
        try:
            call()
        except failures() as error:
            self.warning(f"{type(error).__name__}: {error}")

    def _log(self, values: dict[str, Any], step: int) -> None:
        """Log the values, except a final evaluation that W&B has already with exactly the same losses."""
        summary = self._run.summary if step < self.first else {}
        known = [summary.get(key) == value for key, value in values.items() if key.endswith("/loss")]
        if not known or not all(known):
            self._accelerator.log(values, step=max(step, self.first))

    def _close(self) -> None:
        """Finish the W&B run in the thread. If that fails, shut down W&B's service process."""
        trackers = list(self._accelerator.trackers)
        self._calls.put(partial(self._try, lambda: [tracker.finish() for tracker in trackers]))
        self._calls.put(None)
        self._worker.join(FINISH_SECONDS)
        if self._worker.is_alive():
            self.warning(f"not finished in {FINISH_SECONDS} s")
        if self._failed:
            self._teardown_due.set()
            self._tearer.join(TEARDOWN_SECONDS)

    def _tear_down(self) -> None:
        """Shut down W&B after a failure. Otherwise its exit hook would wait for the service process, or fail.

        `wandb.teardown` removes that hook first. If it hangs after that, only this thread hangs.
        """
        import wandb

        self._teardown_due.wait()
        with contextlib.suppress(SystemExit):  # raised if the service process was killed
            self._try(wandb.teardown)


# Private exceptions of W&B. Those that the installed version does not have are left out.
PRIVATE = (
    "wandb.sdk.lib.asyncio_manager:AlreadyJoinedError",
    "wandb.sdk.lib.asyncio_manager:RunCancelledError",
    "wandb.sdk.lib.service.service_connection:WandbApiFailedError",
    "wandb.sdk.lib.service.service_token:WandbServiceConnectionError",
    "wandb.sdk.mailbox.mailbox:MailboxClosedError",  # the service process has exited ...
    "wandb.sdk.mailbox.mailbox_handle:HandleAbandonedError",  # ... during a call
    "wandb.sdk.mailbox.mailbox_handle:ServerResponseError",
)


def failures() -> tuple[type[Exception], ...]:
    """The exceptions of W&B when its server, its service process or its files fail."""
    import wandb

    private = []
    for path in PRIVATE:
        module, name = path.split(":")
        with contextlib.suppress(ImportError, AttributeError):
            private.append(getattr(importlib.import_module(module), name))
    return (
        wandb.errors.Error,  # for example refused credentials
        *private,
        OSError,  # lost connections and timeouts of the service process; no space for W&B's files
        ValueError,  # an invalid response, for example of a proxy
    )


Record = dict[str, Any]


# The W&B names of the keys that are not prefixed by their split.
PERFORMANCE_NAMES = {
    "tokens_per_s": "perf/tokens_per_second",
    "update_s": "perf/update_seconds",
    "padding_share": "perf/padding_share",
    "save_s": "perf/save_seconds",
}


MEMORY_NAMES = {"peak_memory_bytes": "perf/peak_allocated_gb", "peak_reserved_bytes": "perf/peak_reserved_gb"}


TRAIN_NAMES = ("loss", "learning_rate", "grad_norm", "epoch", "examples_seen", "tokens_seen")


EVAL_NAMES = ("loss", "perplexity", "answer_loss", "answer_perplexity")


GLOBAL_STEP = "train/global_step"


def wandb_names(record: Record) -> dict[str, Any]:
    """The values of a record under their W&B names, with the step that is the x-axis of all charts."""
    split = record["split"]
    names = TRAIN_NAMES if split == "train" else EVAL_NAMES
    values = {f"{split}/{name}": record[name] for name in names if record.get(name) is not None}
    values |= {name: record[key] for key, name in PERFORMANCE_NAMES.items() if key in record}
    values |= {source_name(split, name): loss for name, loss in record.get("sources", {}).items()}
    values |= {name: record[key] / 1e9 for key, name in MEMORY_NAMES.items() if record.get(key) is not None}
    return values | {GLOBAL_STEP: record["step"]}


def source_name(split: str, source: str) -> str:
    """The W&B name of the answer loss of a source in a split."""
    return f"{split}/{source}/answer_loss"


# ----------------------------------------------------------------------------------------------------

NETWORK_SECONDS = 8
NOT_UTF8 = "it accepts only paths and command lines in UTF-8"
SAMPLES = "samples"  # the name of the table
# With the user's own data W&B gets neither the command line, which names files (the metadata of the machine are left
# out with it), nor a patch of uncommitted changes, which may contain rows.
OWN_DATA_SETTINGS = {"x_disable_meta": True, "disable_git": True}
SAMPLE_COLUMNS = ["step", "source", "question", "reference", "base answer", "tuned answer", "stopped by itself"]


def start_wandb(
    accelerator: Accelerator, experiment: Experiment, output_dir: Path, run_id: str, in_effect: Mapping[str, Any]
) -> str:
    """Start or resume the W&B run of the directory on the main process; return a line for the console.

    `WANDB_*` variables override the experiment file, as is usual for W&B.

    Args:
        in_effect: settings that differ from the experiment.

    Raises:
        UserError: W&B refuses the settings of `tracking` or of the `WANDB_*` variables.
    """
    tracking = experiment.tracking
    config = {**shown_config(experiment), "in_effect": dict(in_effect)}
    if not wandb_wanted(tracking) or not accelerator.is_main_process:
        return "W&B: off"
    try:
        import wandb
    except ImportError as error:
        return f"W&B: off ({error}); metrics.jsonl has all records"
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
    unusable = (wandb.errors.CommError, wandb.errors.UsageError, ValueError)  # ValueError: an invalid key or setting
    advice = "correct `tracking` or the WANDB_* variables, or use --set tracking.wandb=disabled"
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
            return _off(accelerator, NOT_UTF8)
        except failures() as error:
            mode, why = "offline", f" ({_gist(error)})"
            accelerator.trackers.clear()
            os.environ.pop("WANDB_SERVICE", None)  # of an earlier process, which may have exited
            with contextlib.suppress(SystemExit, *failures()):
                wandb.teardown()  # else its service process keeps the id: "run ID is in use"
    try:
        if mode == "offline":
            accelerator.init_trackers(project, config, {"wandb": {**arguments, "mode": mode}})
    except UnicodeEncodeError:
        return _off(accelerator, NOT_UTF8)
    except unusable as error:
        raise UserError(f"W&B: {_gist(error)}; {advice}") from error
    except failures() as error:
        return _off(accelerator, _gist(error))
    run = accelerator.get_tracker("wandb", unwrap=True)
    run.define_metric(GLOBAL_STEP)
    run.define_metric("*", step_metric=GLOBAL_STEP)
    if mode == "online":
        return f"W&B: online, {run.url}"
    directory = Path(run.dir).parent
    return f"W&B: offline{why} in {directory}; upload with `wandb sync {directory}`"


def _off(accelerator: Accelerator, why: str) -> str:
    """Continue without W&B; return the line for the console."""
    accelerator.trackers.clear()
    return f"W&B: off ({why}); metrics.jsonl has all records"


def shown_config(experiment: Experiment) -> dict[str, Any]:
    """The experiment for W&B: local paths are reduced to file names, and those of the user's own data are left out."""
    config = experiment.model_dump()
    files = config["data"]["files"]
    config["data"]["files"] = {name: path if is_hub_id(path) else "a local file" for name, path in files.items()}
    for section, key in (("model", "base"), ("lora", "init_from"), ("data", "medquad"), ("data", "afrimedqa")):
        path = config[section][key]
        if path is not None and (os.path.exists(os.path.expanduser(path)) or os.path.isabs(path)):
            config[section][key] = Path(path).name
    return config


def sampled_rows(validation: Sequence[Example], experiment: Experiment) -> list[Row]:
    """The validation rows whose answers are logged to W&B; the user's own only if `tracking.log_samples` is true."""
    rows = [example.row for example in validation if experiment.tracking.shows_text_of(example.row.source)]
    return [rows[i] for i in fixed_subset(rows, experiment.evaluation.samples, experiment.training.seed)]


def wandb_wanted(tracking: Tracking) -> bool:
    """Whether to use W&B at all. WANDB_DISABLED has the same meaning as in transformers."""
    return not is_on("WANDB_DISABLED") and _asked_mode(tracking) != "disabled"


def wandb_mode(tracking: Tracking) -> tuple[str, str]:
    """`online` or `offline`, and the reason if it is not the requested mode. May take as long as `connects`."""
    if _asked_mode(tracking) in ("offline", "dryrun"):
        return "offline", ""
    why = unreachable_reason()
    return ("offline", f" ({why})") if why else ("online", "")


def _asked_mode(tracking: Tracking) -> str:
    return os.environ.get("WANDB_MODE") or tracking.wandb


def unreachable_reason() -> str:
    """Why W&B cannot be used online, and what to do; empty if it can. May take as long as `connects`."""
    url = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    shown = without_credentials(url)
    try:
        key, why = netrc_key(urlsplit(shown).netloc)
    except ValueError:
        return f"WANDB_BASE_URL={shown} is not a URL"
    if not (key or os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE")):
        return why or "no API key: run `wandb login` to log online"
    return "" if connects(url) else f"{shown} does not answer"


def netrc_key(host: str) -> tuple[bool, str]:
    """Whether the netrc file has a key for a host; and the reason if the file cannot be read, else an empty string.

    W&B and the HTTP library that it uses would fail on an unreadable file, or wait forever for a pipe. So NETRC is then
    set to an empty file.
    """
    path = os.path.expanduser(os.environ.get("NETRC") or "~/.netrc")
    try:
        read_file(Path(path), MAX_NETRC_BYTES).decode()
        return netrc.netrc(path).authenticators(host) is not None, ""
    except Missing:
        return False, ""
    except (Damaged, UnicodeDecodeError, netrc.NetrcParseError) as error:
        os.environ["NETRC"] = os.devnull
        why = "not text in UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        return False, f"{path} cannot be read: {why}; correct the file, or set WANDB_API_KEY"


def _keep_files_below(directory: Path) -> None:
    """Let W&B write its cache and data to this directory if it cannot write to the home directory.

    Without a cache directory its service process logs to the terminal, and without a data directory it keeps no
    artifacts.
    """
    from wandb import env

    for name, default in (("WANDB_CACHE_DIR", env.get_cache_dir()), ("WANDB_DATA_DIR", env.get_data_dir())):
        try:
            check_place(Path(default), name)
        except UserError:
            os.environ[name] = str(directory.absolute() / name.split("_")[1].lower())


def log_samples(accelerator: Accelerator, rows: Sequence[Sequence[Any]], first: int = 0) -> None:
    """Log the table of sample answers (`SAMPLE_COLUMNS`) at their step, or at `first` if W&B is already beyond it."""
    if accelerator.trackers and rows:
        data = [list(row) for row in rows]
        step = max(data[0][0], first)
        accelerator.trackers[0].log_table(SAMPLES, columns=SAMPLE_COLUMNS, data=data, step=step)


def log_adapter(accelerator: Accelerator, tracking: Tracking, directory: Path, name: str) -> None:
    """Log the adapter as an artifact, if `tracking.log_model`: only files that a run writes into its directory.

    Links are left out, because somebody else may have created them, and their targets are not part of the adapter.
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
    """The message of an error on one line."""
    return without_credentials(" ".join(str(error).split()))[:300]
