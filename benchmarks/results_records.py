"""A run's own files to a record of `results/<setting>.json`, and a process that failed to what is said of it.

Nothing is computed here but a median: every figure is copied from what a run and its evaluation wrote.
"""

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from benchmarks.results_file import (
    Base,
    Choices,
    Data,
    Evaluation,
    Failure,
    Figure,
    Generation,
    Losses,
    Machine,
    Moved,
    Record,
    SplitLosses,
    Training,
)
from medqa.commands.compare.read import Run, read_run
from medqa.errors import UserError
from medqa.training.checkpoint import versions
from medqa.training.recorder import read_metrics
from medqa.training.wandb import shown_config

SHOWN = re.compile(r"^(error: |training stopped: |process \d+: )")
# Of `accelerate launch` (CalledProcessError's words) and of torch's launcher, whose own codes are 1.
CHILD_CODE = re.compile(r"returned non-zero exit status (\d+)|exitcode\s*:\s*(-?\d+)")
CHILD_SIGNAL = re.compile(r"died with <Signals\.SIG\w+: (\d+)>")
LONGEST_MESSAGE = 600  # characters


def make_record(
    experiment: str,
    run_dir: Path,
    *,
    commits: Sequence[str],
    caveats: Sequence[str],
    machine: Machine,
    failure: Failure | None,
) -> Record:
    """The record of a run from its own files; of a failed one, what there is.

    Raises:
        UserError: a file is damaged, or is not what this version writes.
    """
    about: dict[str, Any] = {
        "experiment": experiment,
        "date": datetime.now(UTC).date().isoformat(),
        "commits": list(commits),
        "caveats": list(caveats),
        "machine": machine,
        "versions": versions(),
        "failure": failure,
    }
    if failure is not None and failure.stage == "training":
        return Record(**about)
    try:
        run = read_run(run_dir, experiment)
        return Record(**{**about, "versions": run.summary["versions"]}, **_figures(run, failure is None))
    except (LookupError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{run_dir}: its files are not those of a finished run: {reason}; remove the directory and start again"
        ) from error


def _figures(run: Run, evaluated: bool) -> dict[str, Any]:
    """The parts of a record that a finished run gives."""
    summary, shown = run.summary, shown_config(run.experiment)
    tasks = run.evaluation["tasks"] if evaluated else {}
    losses = tasks["loss"] if evaluated else {}
    speeds = [
        record["tokens_per_s"] for record in read_metrics(run.directory / "metrics.jsonl") if record["split"] == "train"
    ]
    same = {"processes", "resumes", "updates", "wall_clock_s", "peak_memory_bytes", "memory_device", "mixed_precision"}
    same |= {"trainable_parameters", "total_parameters", "gradient_accumulation_steps", "quantization"}
    same |= {"scaler_overflows", "micro_batch_rows", "micro_batch_tokens"}
    return {
        "training": Training(
            **{key: summary[key] for key in same},
            tokens_per_s=statistics.median(speeds) if speeds else None,
            in_effect=run.in_effect,
            not_bitwise=[Moved(**moved) for moved in summary["not_bitwise"]],
        ),
        "validation": _split(losses, "validation", run, before=summary["baseline"], after=summary["final"]),
        "test": _split(losses, "test", run, before=None, after=summary["test"]),
        "data": Data(
            medquad=shown["data"]["medquad"],
            afrimedqa=shown["data"]["afrimedqa"],
            fingerprint=summary["data_fingerprint"],
            rows={split: counts["rows"] for split, counts in run.data_report["splits"].items()},
        ),
        "base": Base(name=shown["model"]["base"], fingerprint=summary["base_fingerprint"]),
        "evaluation": _evaluation(run.evaluation["limit"], tasks) if evaluated else None,
    }


def _split(
    losses: Mapping[str, Any], split: str, run: Run, before: Mapping[str, Any] | None, after: Mapping[str, Any]
) -> SplitLosses:
    """The losses of a split as the evaluation measured them, or, without an evaluation, as the run did."""
    all_rows = run.data_report["splits"][split]["rows"]
    bound = run.experiment.evaluation.full_rows
    return SplitLosses(
        rows=losses[split]["rows"] if losses else min(all_rows, bound or all_rows),
        before=_losses(before, losses, split, "untuned"),
        own_template=_figure(losses.get(split, {}).get("own_template", {}).get("answer_perplexity")),
        after=_losses(after, losses, split, "tuned"),
    )


def _losses(told: Mapping[str, Any] | None, losses: Mapping[str, Any], split: str, system: str) -> Losses | None:
    """With intervals from the evaluation if there is one, else from the run's summary (`told`) if it has them."""
    if losses:
        found = losses[split][system]
        answer = _figure(found.get("answer_perplexity"))
        return Losses(perplexity=_figure(found["perplexity"]), answer_perplexity=answer)
    if told is None:
        return None
    answer = told["answer_perplexity"]
    return Losses(
        perplexity=Figure(value=told["perplexity"]), answer_perplexity=None if answer is None else Figure(value=answer)
    )


def _evaluation(limit: int | None, tasks: Mapping[str, Any]) -> Evaluation:
    """Of an evaluation with all tasks."""
    written, chosen, probed = tasks["generation"], tasks["mcq"], tasks["probes"]

    def by_system(task: Mapping[str, Any], name: str) -> dict[str, Figure]:
        systems = ("untuned", "own_template", "copied", "tuned")
        return {system: _figure(task[system][name]) for system in systems if name in task.get(system, {})}

    return Evaluation(
        limit=limit,
        rows={split: part["rows"] for split, part in tasks["loss"].items()},
        generation=Generation(
            rows=written["rows"],
            tokens=written["tokens"],
            rouge_l=by_system(written, "rougeL"),
            stops=by_system(written, "stops"),
        ),
        mcq=Choices(rows=chosen["rows"], chance=chosen["chance"], accuracy=by_system(chosen, "accuracy"))
        if chosen["rows"]
        else None,
        advises_care=by_system(probed, "advises_care"),
    )


def _figure(found: Mapping[str, Any] | None) -> Figure | None:
    """A figure of `evaluation.json`, without its p-value."""
    return None if found is None else Figure(**{key: found.get(key) for key in ("value", "low", "high")})


def what_failed(stage: Literal["training", "evaluation"], code: int, log: str, private: Sequence[Path]) -> Failure:
    """What ended a process, from its exit code and what it wrote on stderr.

    Args:
        code: of the process that was started; a launcher's own is 1, and what it says of the trainer's counts.
        private: directories whose place on this machine is left out of the message.
    """
    lines = log.splitlines()
    codes = [int(next(filter(None, found.groups()))) for found in CHILD_CODE.finditer(log)]
    codes += [-int(found[1]) for found in CHILD_SIGNAL.finditer(log)]
    code = next((found for found in codes if found not in (0, 1)), code)
    begins = [i for i, line in enumerate(lines) if SHOWN.match(line)]
    if begins:
        end = next((i for i in range(begins[-1] + 1, len(lines)) if not lines[i].startswith("  - ")), len(lines))
        message = "\n".join(lines[begins[-1] : end])
    else:
        message = next((line for line in reversed(lines) if line.strip()), "")
    for place in private:
        message = message.replace(f"{place}/", "")
    message = "".join(c if c.isprintable() or c == "\n" else " " for c in message)[:LONGEST_MESSAGE]
    return Failure(stage=stage, what=_kind(code, message), exit_code=code, message=message or "nothing was said")


def _kind(code: int, message: str) -> str:
    """What kind of end it was."""
    kinds = {
        "out of memory": ("out of memory",),
        "no space": ("No space left", "Disk quota exceeded", "Read-only file system"),
        "not finite": ("loss is nan", "loss is inf", "loss is -inf", "norm is nan", "norm is inf"),
    }
    for kind, words in kinds.items():
        if any(word in message for word in words):
            return kind
    return "killed" if code < 0 else "an error"


def evaluated_tasks(run_dir: Path, limit: int | None) -> set[str]:
    """What `evaluation.json` has of the run's final adapter, on all rows or on so many as are asked for."""
    try:
        found = json.loads((run_dir / "evaluation.json").read_text(encoding="utf-8"))
        summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
        same = found["final"] is True and found["step"] == summary["adapter_step"]
        same = same and found["data_fingerprint"] == summary["data_fingerprint"] and found["limit"] in (None, limit)
        return set(found["tasks"]) if same else set()
    except (OSError, ValueError, LookupError, TypeError):
        return set()
