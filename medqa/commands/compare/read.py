"""The files of runs, read for a comparison. A run may be active, killed, or edited by hand.

Not here: what several runs show together (`conclusions.py`), and how it is shown.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medqa.commands.figures import Figure, figures, number
from medqa.config import Experiment, flat, is_complete, planned_updates
from medqa.config_file import load_experiment, read_yaml
from medqa.errors import UserError, together
from medqa.files import Damaged, Missing, read_file, read_json
from medqa.limits import MAX_METRICS_BYTES
from medqa.terminal import printable

CONFIG, METRICS, SUMMARY = "config.yaml", "metrics.jsonl", "summary.json"
EVALUATION, DATA_REPORT = "evaluation.json", "data_report.json"

Json = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        label: how it is called here: the name of its directory, or all of its path where that is not unique.
        in_effect: `section.key` to what was used where that is not what the configuration asks for.
        train, validation, test: its records by update, figures that are not finite left out.
        summary, evaluation, data_report: empty where there is none.
        figures: of the evaluation, by path (`loss.test.tuned.answer_perplexity`).
        damage: what could not be read, in words.
    """

    label: str
    directory: Path
    experiment: Experiment
    in_effect: dict[str, Any]
    train: dict[int, Json] = field(default_factory=dict)
    validation: dict[int, Json] = field(default_factory=dict)
    test: dict[int, Json] = field(default_factory=dict)
    summary: Json = field(default_factory=dict)
    evaluation: Json = field(default_factory=dict)
    data_report: Json = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    damage: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """`section.key` to what was in effect."""
        asked = flat(self.experiment)
        return asked | {key: used for key, used in self.in_effect.items() if key in asked}

    @property
    def max_steps(self) -> int:
        """Updates that the run is to have; where epochs say it and the report does not fit them, those that it has."""
        rows = number(part(self.data_report, "splits", "train", "rows"))
        try:
            return planned_updates(self.experiment, int(rows or 0)) or self.updates
        except UserError:
            return self.updates

    @property
    def updates(self) -> int:
        """Updates that are recorded."""
        return max((*self.train, *self.validation, int(number(self.summary.get("updates")) or 0)))

    @property
    def adapter_step(self) -> int:
        """The update that the adapter is from: of a finished run the one that it has kept."""
        kept = number(self.summary.get("adapter_step"))
        return self.updates if kept is None or not self.finished else int(kept)

    @property
    def finished(self) -> bool:
        """Whether it went to its end, as `training/run_dir.py` has it."""
        return isinstance(self.summary.get("final"), dict) and is_complete(self.summary, self.experiment)

    @property
    def state(self) -> str:
        """Whether it is finished, in words."""
        if self.finished:
            early = self.summary.get("stopped_early") is True
            return f"finished early, after {self.updates:,} of {self.max_steps:,} updates" if early else "finished"
        return f"unfinished: {self.updates:,} of {self.max_steps:,} updates"

    @property
    def data_fingerprint(self) -> str | None:
        """Of rows and their splits; None where nothing says it."""
        found = self.data_report.get("fingerprint", self.summary.get("data_fingerprint"))
        return found if isinstance(found, str) else None

    @property
    def base_fingerprint(self) -> str | None:
        """Of the base model's configuration and weights; None where nothing says it."""
        found = self.summary.get("base_fingerprint")
        return found if isinstance(found, str) and found else None


def part(record: Any, *keys: str) -> Any:
    """What lies at `keys` in nested objects, None where it does not."""
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in these directories.

    Raises:
        UserError: fewer than two, one of them twice, or directories of which nothing can be shown, in one message.
    """
    real = [os.path.realpath(path) for path in paths]
    twice = sorted({str(path) for i, path in enumerate(paths) if real[i] in real[:i]})
    if twice:
        raise UserError(f"{', '.join(twice)}: given twice; name each run once")
    if len(paths) < 2:
        raise UserError("compare: name two runs or more, outputs/exp_001 outputs/exp_002 say")
    names = [os.path.basename(path) for path in real]
    labels = [_one_line(name if names.count(name) == 1 else str(path)) for name, path in zip(names, paths, strict=True)]
    named = zip(paths, labels, strict=True)
    return together(*(lambda path=path, label=label: read_run(path, label) for path, label in named))


def read_run(directory: Path, label: str) -> Run:
    """The run in this directory.

    Raises:
        UserError: it holds no run, or its configuration cannot be read.
    """
    config = directory / CONFIG
    if not os.path.isfile(config):
        what = "holds no run (no config.yaml)" if os.path.isdir(directory) else "no such directory"
        raise UserError(f"{directory}: {what}; give the directory that train.py wrote, outputs/exp_002 say")
    experiment = load_experiment(str(config.absolute()))
    damage: list[str] = []
    records = _metrics(directory / METRICS, damage)
    evaluation, found = _evaluation(directory / EVALUATION, damage)
    return Run(
        label=label,
        directory=directory,
        experiment=experiment,
        in_effect=_in_effect(config),
        train=records["train"],
        validation=records["eval"],
        test=records["test"],
        summary=_object(directory / SUMMARY, damage),
        evaluation=evaluation,
        data_report=_object(directory / DATA_REPORT, damage),
        figures={_one_line(".".join(place)): figure for place, figure in found.items()},
        damage=tuple(damage),
    )


def _one_line(text: str) -> str:
    """A name as it can be shown; a file name may have line ends, and bytes that are no text."""
    return " ".join(printable(text).split())


def _in_effect(config: Path) -> dict[str, Any]:
    """What was used instead of what was asked for, by `section.key`."""
    said = part(read_yaml(config), "in_effect")
    changes = said if isinstance(said, dict) else {}
    return {key: used for key, change in changes.items() if isinstance(used := part(change, "used"), str | int | float)}


def _object(path: Path, damage: list[str]) -> Json:
    """A JSON file's object; empty where the file is absent, or damaged, which is noted."""
    try:
        found = read_json(path)
        if not isinstance(found, dict):
            raise Damaged("it holds no JSON object")
    except Missing:
        return {}
    except Damaged as error:
        _note(damage, path, error)
        return {}
    return found


def _note(damage: list[str], path: Path, error: Exception) -> None:
    """Add that a file is left out, and why."""
    damage.append(_one_line(f"{path.name} cannot be read and is left out: {str(error).removeprefix(f'{path}: ')}"))


def _evaluation(path: Path, damage: list[str]) -> tuple[Json, dict[tuple[str, ...], Figure]]:
    """An evaluation and its figures."""
    evaluation = _object(path, damage)
    try:
        return evaluation, figures(evaluation.get("tasks"))
    except ValueError as error:
        _note(damage, path, error)
        return {}, {}


def _metrics(path: Path, damage: list[str]) -> dict[str, dict[int, Json]]:
    """The records of `train`, `eval` and `test`, by update.

    A last line without its end is one that is being written, or that a kill cut short: a resume repeats it.
    """
    found: dict[str, dict[int, Json]] = {"train": {}, "eval": {}, "test": {}}
    try:
        lines = read_file(path, MAX_METRICS_BYTES).splitlines(keepends=True)
    except Missing:
        lines = []
    except Damaged as error:
        _note(damage, path, error)
        lines = []
    bad, not_finite = 0, 0
    for line in lines:
        if not line.endswith(b"\n"):
            continue
        try:
            record = json.loads(line)  # a figure that is not finite does not spoil the others of its line
        except (ValueError, RecursionError):
            record = None
        step, split = part(record, "step"), part(record, "split")
        if not isinstance(step, int) or number(step) is None or step < 0 or not isinstance(split, str):
            bad += 1
            continue
        told = {key: value for key, value in record.items() if isinstance(value, int | float)}
        kept = {key: value for key, said in told.items() if (value := number(said)) is not None}
        not_finite += len(told) - len(kept)
        found.setdefault(split, {})[step] = kept
    if bad:
        damage.append(f"{bad} damaged line(s) of {path.name} are left out")
    if not_finite:
        damage.append(f"{not_finite} figure(s) of {path.name} are not finite and left out")
    return found


ANSWER_PERPLEXITY = "loss.test.{}.answer_perplexity"  # of an evaluation; untuned or tuned
