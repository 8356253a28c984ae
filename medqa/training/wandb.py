"""Weights & Biases: one run for each output directory, fed from the records of metrics.jsonl.

Nothing here prompts, and nothing delays a start for longer than `NETWORK_SECONDS`.
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
from medqa.variables import is_on

# ----------------------------------------------------------------------------------------------------
# What W&B is told, from a thread of its own: each step once over all sessions, and no failure there holds training up.
#
# W&B is a convenience: `metrics.jsonl` is the truth, and every session of a run can be told from it again. While its
# server is away W&B keeps everything on disk; what can fail in mid-run is its service process, which takes every
# call, and what asks the server first (tables, artifacts). The end is bounded here: W&B would wait without end for a
# service that hangs.

FINISH_SECONDS = 30  # for all that is still to be sent when the run ends
UPLOAD_SHARE = 0.8  # of it are for uploads: then W&B stops by itself, in good order
TEARDOWN_SECONDS = 5  # more, after a failure, to part from the service process
MOST_WAITING = 10_000  # calls; a service process that hangs must not fill the memory
SUPERSEDED = "superseded"


class WandbFeed:
    """Passes values on to the W&B run, on the main process, if there is one.

    `first` is the first step that W&B does not know yet from a session before this one.
    """

    def __init__(self, accelerator: Accelerator, say: Callable[[str], None]) -> None:
        self._accelerator, self._say = accelerator, say
        self.first = 0
        self._failed = False
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._parting = threading.Event()
        self._run: Any = None
        if accelerator.trackers:
            import wandb

            self._run = accelerator.get_tracker("wandb", unwrap=True)
            # Both from the start: from an exit hook Python 3.12 starts no thread any more.
            self._worker = threading.Thread(target=self._work, name="W&B feed", daemon=True)
            self._parter = threading.Thread(target=self._part, name="W&B parting", daemon=True)
            self._worker.start()
            self._parter.start()
            wandb.termsetup(wandb.setup().settings, self)  # W&B is silenced; what it would warn of comes here
            atexit.register(self._close)  # for a run that ends early; it comes before W&B's own hook

    def begin(self, told: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
        """Bring a session of a run that began earlier up to date: steps that are not at W&B yet are told again.

        An offline session is told everything, so that it alone is to be sent; those before it are moved aside. Where
        sessions before it were online or have been sent, it is told only what comes now: sending appends to what is
        there.

        Args:
            told: step and values of what the sessions before recorded.
        """
        if self._run is None:
            return
        here = Path(self._run.dir).parent
        earlier = [
            path for path in here.parent.glob(f"*run-*-{glob.escape(self._run.id)}") if path.is_dir() and path != here
        ]
        offline = [path for path in earlier if path.name.startswith("offline-") and not any(path.glob("*.synced"))]
        told = list(told)
        if self._run.resumed:  # the server says what it has
            self.first = self._run.starting_step
        elif here.name.startswith("offline-") and len(earlier) > len(offline):
            self.first = max((step for step, _ in told), default=-1) + 1
        for step, values in told:
            if step >= self.first:
                self.log(values, step)
        for path in offline:
            (here.parent / SUPERSEDED).mkdir(exist_ok=True)
            shutil.move(path, here.parent / SUPERSEDED / path.name)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Tell W&B of a step, unless an earlier session has."""
        closing = step == self.first - 1 and "train/loss" not in values  # came after that session's last update
        if step >= self.first or closing:
            self.attempt(partial(self._log, dict(values), step))

    def attempt(self, telling: Callable[[], Any], asks: bool = False) -> None:
        """Have the thread do something with W&B; what fails is said once. What `asks` the server waits for it."""
        if self._run is None:
            return
        if self._calls.qsize() < MOST_WAITING:
            self._calls.put(partial(self._try, telling, asks))
        else:
            self.warning("its service process takes nothing any more")

    def finish(self) -> None:
        """Have W&B send what is left, for a bounded time, and end the run."""
        if self._run is not None:
            self._close()
            atexit.unregister(self._close)
            self._accelerator.trackers.clear()

    def info(self, message: str) -> None:
        """What W&B would print and nobody needs."""

    def warning(self, message: str) -> None:
        """Say, once, that W&B does not get everything."""
        first, self._failed = not self._failed, True
        if first:
            why = " ".join(message.split()).removeprefix("wandb: WARNING ")[:200]
            online = "" if self._run.offline else "--include-online "  # else it passes over what was begun online
            self._say(
                f"W&B: {why} (training goes on; metrics.jsonl has everything, and `wandb sync {online}"
                f"{Path(self._run.dir).parent}` may send it later)"
            )

    error = warning

    def _work(self) -> None:
        while call := self._calls.get():
            call()

    def _try(self, call: Callable[[], Any], asks: bool = False) -> None:
        """Make a call; one that failed ends nothing, as later ones may reach W&B, or at least its files."""
        if asks and self._failed:
            return
        try:
            call()
        except failures() as error:
            self.warning(f"{type(error).__name__}: {error}")

    def _log(self, values: dict[str, Any], step: int) -> None:
        """Log; closing figures that are at W&B already, the same to the last bit, are not told again."""
        summary = self._run.summary if step < self.first else {}
        known = [summary.get(key) == value for key, value in values.items() if key.endswith("/loss")]
        if not known or not all(known):
            self._accelerator.log(values, step=max(step, self.first))

    def _close(self) -> None:
        """Finish in the thread; part from W&B where that fails."""
        trackers = list(self._accelerator.trackers)
        self._calls.put(partial(self._try, lambda: [tracker.finish() for tracker in trackers]))
        self._calls.put(None)
        self._worker.join(FINISH_SECONDS)
        if self._worker.is_alive():
            self.warning(f"not finished in {FINISH_SECONDS} s")
        if self._failed:
            self._parting.set()
            self._parter.join(TEARDOWN_SECONDS)

    def _part(self) -> None:
        """After a failure: W&B's hook at exit would wait for its service process, or show a traceback.

        To tear down takes that hook away first of all; should the rest of it hang, then only this thread.
        """
        import wandb

        self._parting.wait()
        with contextlib.suppress(SystemExit):  # which it raises where the service process was killed
            self._try(wandb.teardown)


# Exceptions of W&B that it does not name in public: one that a version does not have is left out.
PRIVATE = (
    "wandb.sdk.lib.asyncio_manager:AlreadyJoinedError",
    "wandb.sdk.lib.asyncio_manager:RunCancelledError",
    "wandb.sdk.lib.service.service_connection:WandbApiFailedError",
    "wandb.sdk.lib.service.service_token:WandbServiceConnectionError",
    "wandb.sdk.mailbox.mailbox:MailboxClosedError",  # the service process has gone ...
    "wandb.sdk.mailbox.mailbox_handle:HandleAbandonedError",  # ... and did while it was waited for
    "wandb.sdk.mailbox.mailbox_handle:ServerResponseError",
)


def failures() -> tuple[type[Exception], ...]:
    """What W&B raises where its server, its service process or its files fail."""
    import wandb

    private = []
    for place in PRIVATE:
        module, name = place.split(":")
        with contextlib.suppress(ImportError, AttributeError):
            private.append(getattr(importlib.import_module(module), name))
    return (
        wandb.errors.Error,  # refused credentials, among others
        *private,
        OSError,  # lost connections and timeouts, both to the service process; no space for W&B's files
        ValueError,  # an answer that makes no sense, of a proxy for example
    )


Record = dict[str, Any]


# Names on W&B of the keys that do not stand under their split's own name there.
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
    """A record under the names it has on W&B, with the step that everything is drawn against."""
    split = record["split"]
    names = TRAIN_NAMES if split == "train" else EVAL_NAMES
    values = {f"{split}/{name}": record[name] for name in names if record.get(name) is not None}
    values |= {name: record[key] for key, name in PERFORMANCE_NAMES.items() if key in record}
    values |= {source_name(split, name): loss for name, loss in record.get("sources", {}).items()}
    values |= {name: record[key] / 1e9 for key, name in MEMORY_NAMES.items() if record.get(key) is not None}
    return values | {GLOBAL_STEP: record["step"]}


def source_name(split: str, source: str) -> str:
    """The name on W&B of the answer loss of a source's rows in a split."""
    return f"{split}/{source}/answer_loss"


# ----------------------------------------------------------------------------------------------------

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
