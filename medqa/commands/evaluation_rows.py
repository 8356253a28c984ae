"""`evaluation.jsonl`: what an evaluation found of each row, and `medqa evaluate RUN --show`, which reads it.

One JSON object a line, for each evaluated row of a held-out split: `id`, `split`, `source`, `question`, `reference`;
then the measures of each system (`untuned`, `own_template`, `copied`, `tuned`), `<system>_<measure>`:

- of the task `loss`: `loss` and `answer_loss`, the mean over the row's tokens in nats, null if it has none, with
  `tokens` and `answer_tokens`;
- of the task `generation`, if the row's answer was generated: `answer`, the measures of `score_rows`, and
  `reference_words`.

The keys are flat, so that `pandas.read_json(path, lines=True)` gives a column for each. Multiple-choice questions and
red flags are not here, because they are not rows of a split.

`evaluation.json` has the SHA-256 of this file (`rows_file`). So a file that is of another evaluation, for example
because the machine failed between the two writes, is not read.
"""

import hashlib
import json
import math
import random
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.text import Text

from medqa.commands.evaluation_table import SYSTEMS, choose_baseline, count, number
from medqa.config import Experiment
from medqa.errors import UserError
from medqa.evaluation.statistics import BASELINES
from medqa.files import Damaged, Missing, parse_json, read_file, read_json, write_file
from medqa.terminal import printable

if TYPE_CHECKING:
    from medqa.data.sources import Row
    from medqa.evaluation.answers import Answer

EVALUATION, ROWS = "evaluation.json", "evaluation.jsonl"
Line = Mapping[str, Any]
MAX_ROWS_BYTES = 100_000_000  # in memory up to 24 times as much; a row with all answers has about 5 KB

# ----------------------------------------------------------------------------------------------------
# The lines, from what the tasks found.

NAMES = ("id", "split", "source", "question", "reference")  # keys of a line that are of no task
LOSSES = ("loss", "tokens", "answer_loss", "answer_tokens")  # as in the columns of `Evaluator.row_losses`
FLAGS = ("stops", "loops")


class Lines:
    """Collects what the tasks found of each row."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], dict[str, Any]] = {}

    def add_losses(self, split: str, rows: Sequence["Row"], tables: Mapping[str, np.ndarray]) -> None:
        """Add each system's losses of these rows; by system the table of `Evaluator.row_losses`."""
        for index, row in enumerate(rows):
            line = self._line(split, row)
            for system, table in tables.items():
                loss, tokens, answer_loss, answer_tokens = table[index].tolist()
                values = (_mean(loss, tokens), int(tokens), _mean(answer_loss, answer_tokens), int(answer_tokens))
                line.update({f"{system}_{name}": value for name, value in zip(LOSSES, values, strict=True)})

    def add_answers(
        self,
        split: str,
        rows: Sequence["Row"],
        answers: Mapping[str, Sequence["Answer"]],
        columns: Mapping[str, Mapping[str, np.ndarray]],
    ) -> None:
        """Add each system's answers to these rows, with their measures from `score_rows`."""
        for index, row in enumerate(rows):
            line = self._line(split, row)
            line["reference_words"] = len(row.answer.split())
            for system, given in answers.items():
                line[f"{system}_answer"] = given[index].text
                for name, values in columns[system].items():
                    value = float(values[index])
                    if math.isfinite(value):
                        whole = bool(value) if name in FLAGS else int(value) if name == "words" else value
                        line[f"{system}_{name}"] = whole

    def listed(self, experiment: Experiment) -> list[dict[str, Any]]:
        """All lines, without the texts that `tracking.log_samples` does not allow.

        A copied answer is that of a training row, which may be of the user's own data although the question is not.
        """
        tracking, copied = experiment.tracking, not experiment.data.files or experiment.tracking.log_samples is True
        return [
            {
                key: value
                for key, value in line.items()
                if not _is_text(key) or (tracking.shows_text_of(line["source"]) and (copied or key != "copied_answer"))
            }
            for line in self._found.values()
        ]

    def _line(self, split: str, row: "Row") -> dict[str, Any]:
        """The line of a row, which is added if it is not there."""
        first = {"id": row.id, "split": split, "source": row.source, "question": row.question, "reference": row.answer}
        return self._found.setdefault((split, row.id), first)


def _mean(total: float, tokens: float) -> float | None:
    """The mean loss over a row's tokens; None if there are none, or if it is not finite."""
    return total / tokens if tokens and math.isfinite(total) else None


def _is_text(key: str) -> bool:
    """Whether the value of a key is text of a row."""
    return key in ("question", "reference") or key.endswith("_answer")


def _task(key: str) -> str | None:
    """The task that a key of a line is of; None for those of `NAMES`."""
    if key in NAMES:
        return None
    return "loss" if key.endswith(("_loss", "_tokens")) else "generation"


# ----------------------------------------------------------------------------------------------------
# The file.


def keep_lines(run: Path, lines: Sequence[Line], before: Mapping[str, Any], tasks: Sequence[str]) -> Any:
    """Write the lines atomically, with what earlier evaluations of the same adapter found in other tasks.

    Without lines there is no file.

    Args:
        before: the content of `evaluation.json` whose other tasks are kept; empty if there is none.
        tasks: the tasks of `lines`.

    Returns:
        The value of `rows_file` in `evaluation.json`: `lines`, `sha256`; None if there is no file.

    Raises:
        OSError: it cannot be written.
    """
    try:
        earlier = read_lines(run, before) if before else []
    except Damaged:
        earlier = []
    merged: dict[tuple[str, str], dict[str, Any]] = {}
    for line in earlier:
        kept = {key: value for key, value in line.items() if _task(key) not in tasks}
        if kept.keys() - set(NAMES):
            merged[line["split"], line["id"]] = kept
    for new in lines:
        merged.setdefault((new["split"], new["id"]), {}).update(new)
    if not merged:
        (run / ROWS).unlink(missing_ok=True)
        return None
    written = [
        {name: merged[key][name] for name in sorted(merged[key], key=_column)} for key in sorted(merged, key=_place)
    ]
    # ASCII alone: some readers take other characters than a line feed for the end of a line.
    content = "".join(json.dumps(line, allow_nan=False) + "\n" for line in written).encode()
    write_file(run / ROWS, content)
    return {"lines": len(written), "sha256": hashlib.sha256(content).hexdigest()}


def _place(key: tuple[str, str]) -> tuple[bool, str, int, str]:
    """Where a line is in the file: validation before test, then by source, then in the order of the source."""
    split, row = key
    source, _, record = row.rpartition(":")
    return split != "validation", source, len(record), record


def _column(key: str) -> tuple[int, bool]:
    """Where a key is in a line: the row, then its losses, then its answers, each in the order in which it was found."""
    return NAMES.index(key) if key in NAMES else len(NAMES), _task(key) == "generation"


def read_evaluation(run: Path) -> dict[str, Any]:
    """Read a run's `evaluation.json`.

    Raises:
        Missing: the run has none.
        Damaged: it was not written by `write_evaluation`.
    """
    found = read_json(run / EVALUATION)
    if not isinstance(found, dict) or not isinstance(found.get("tasks"), dict):
        raise Damaged(f"{run / EVALUATION}: it has no evaluation")
    return found


def read_lines(run: Path, evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Read a run's `evaluation.jsonl`. Only `id`, `split` and `source` are known to be there, and to be text.

    Args:
        evaluation: the content of `evaluation.json`.

    Raises:
        Missing: the run has none.
        Damaged: it was not written with that `evaluation.json`, or a line is not an object with an id.
    """
    path, said = run / ROWS, evaluation.get("rows_file")
    content = read_file(path, MAX_ROWS_BYTES)
    expected = said.get("sha256") if isinstance(said, dict) else None
    if hashlib.sha256(content).hexdigest() != expected:
        raise Damaged(f"{path}: it was not written with {EVALUATION}, or was changed")
    lines = []
    for place, text in enumerate(content.splitlines(), start=1):
        try:
            line = parse_json(text)
        except ValueError as error:
            raise Damaged(f"{path}, line {place}: not valid JSON: {error}") from error
        if not isinstance(line, dict) or not all(isinstance(line.get(key), str) for key in NAMES[:3]):
            raise Damaged(f"{path}, line {place}: not an object with {', '.join(NAMES[:3])}")
        lines.append(line)
    return lines


# ----------------------------------------------------------------------------------------------------
# `--show`: some rows on the console.

HOW = ("worst", "best", "random")
DEFAULT_ROWS = 5
SEED = 0  # of `random`: the same rows each time
MAX_SHOWN_CHARACTERS = 1_500  # of one text; a reference of MedQuAD may have several pages


def chosen_rows(words: Sequence[str]) -> tuple[str, int]:
    """The words of `--show`: how rows are chosen, and their number.

    Raises:
        UserError: they are something else.
    """
    how, *rest = words
    rows = rest[0] if rest else str(DEFAULT_ROWS)
    if how not in HOW or len(rest) > 1 or not (rows.isascii() and rows.isdigit() and int(rows[:10]) > 0):
        raise UserError(
            f"--show {' '.join(words)}: write {', '.join(HOW[:-1])} or {HOW[-1]}, and then the number of rows (default "
            f"{DEFAULT_ROWS}), for example --show worst 10"
        )
    return how, int(rows[:10])


def show_rows(console: Console, run: Path, how: str, rows: int) -> None:
    """Print test rows with their answers and measures, chosen by the change from the better baseline.

    The change is that of ROUGE-L, over the rows whose answers were generated; without such rows, that of the answer
    loss. The better baseline is the one with the better value over all these rows, as in the verdict.

    Args:
        how: one of `HOW`.
        rows: their number, at most.

    Raises:
        UserError: the run has no evaluation with rows, or its files are damaged.
    """
    command = shlex.join(["medqa", "evaluate", str(run)])
    if not run.is_dir():
        raise UserError(f"{run}: no such directory; give the directory of a run, for example outputs/exp_002")
    try:
        evaluation = read_evaluation(run)
        lines = [line for line in read_lines(run, evaluation) if line["split"] == "test"]
    except Missing as error:
        raise UserError(f"{run}: it has no {ROWS}; run `{command}` first") from error
    except Damaged as error:
        raise UserError(f"{error}; run `{command}` again, which replaces it") from error
    unit, lower = "ROUGE-L", False
    changes, against = _changes(lines, "rougeL", lower)
    if not changes:
        unit, lower = "answer loss", True
        changes, against = _changes(lines, "answer_loss", lower)
    if not changes:
        raise UserError(f"{run / ROWS}: no row of test has a loss or an answer; run `{command}` first")
    order = sorted(changes, key=lambda index: changes[index], reverse=(how == "worst") is lower)
    if how == "random":
        order = random.Random(SEED).sample(sorted(changes), len(changes))
    shown = order[:rows]
    title = {
        "worst": f"{len(shown)} of them, the worst change first",
        "best": f"{len(shown)} of them, the best change first",
        "random": f"{len(shown)} of them, chosen at random with a fixed seed",
    }[how]
    limit, step = count(evaluation.get("limit")), count(evaluation.get("step"))
    console.print(
        f"{len(changes):,} rows of test{'' if limit is None else f' (--limit {limit:,})'}, the adapter of update "
        f"{'?' if step is None else f'{step:,}'}; change in {unit} {against}; {title}",
        soft_wrap=True,
    )
    for place, index in enumerate(shown, start=1):
        change = f"{unit} {changes[index]:+.4f}"
        console.print(f"\n{place}. {lines[index]['id']}: {change}", style="bold", soft_wrap=True)
        _show_row(console, lines[index])


def _changes(lines: Sequence[Line], name: str, lower: bool) -> tuple[dict[int, float], str]:
    """By index of a line, the fine-tuned model's change from the better baseline; and that baseline in words.

    Only lines that have the measure of the fine-tuned model and of every baseline count. Empty if there are none.
    """
    there = {key.removesuffix(f"_{name}") for line in lines for key in line if key.endswith(f"_{name}")}
    systems = [system for system in BASELINES if system in there]
    values: dict[int, list[float]] = {}
    for index, line in enumerate(lines):
        of_row = [number(line.get(f"{system}_{name}")) for system in ("tuned", *systems)]
        known = [value for value in of_row if value is not None]
        if len(known) == len(of_row):
            values[index] = known
    # A mean loss is over tokens; every row of ROUGE-L counts as one.
    weights = [count(lines[i].get("tuned_answer_tokens")) or 0 if name == "answer_loss" else 1 for i in values]
    totals = {
        system: sum(weight * of_row[place] for weight, of_row in zip(weights, values.values(), strict=True))
        for place, system in enumerate(systems, start=1)
    }
    chosen = choose_baseline(totals, lower) if values else None
    if chosen is None:
        return {}, ""
    place = 1 + systems.index(chosen[0])
    return {index: of_row[0] - of_row[place] for index, of_row in values.items()}, chosen[1]


def _show_row(console: Console, line: Line) -> None:
    """Print the texts and the measures of one row."""
    if not isinstance(line.get("question"), str):
        console.print("  its texts are not kept: tracking.log_samples of the run does not allow it", soft_wrap=True)
    for name in ("question", "reference"):
        if isinstance(line.get(name), str):
            console.print(f"  {name}:")
            _show_text(console, line[name])
    for system, label in SYSTEMS.items():
        measures = [
            f"{words} {value:.4f}"
            for name, words in (("answer_loss", "answer loss"), ("rougeL", "ROUGE-L"))
            if (value := number(line.get(f"{system}_{name}"))) is not None
        ]
        stops, loops = line.get(f"{system}_stops"), line.get(f"{system}_loops")
        if system == "copied" or not (measures or isinstance(line.get(f"{system}_answer"), str)):
            continue
        measures += ["stopped by itself" if stops else "cut off"] * isinstance(stops, bool)
        measures += ["repeats itself"] * (loops is True)
        console.print(f"  {label}: {', '.join(measures)}", soft_wrap=True)
        if isinstance(line.get(f"{system}_answer"), str):
            _show_text(console, line[f"{system}_answer"])


def _show_text(console: Console, text: str) -> None:
    """Print a text of unknown origin, indented, so that no line of it looks like a line of this program."""
    shown = printable(text[:MAX_SHOWN_CHARACTERS])
    if len(text) > MAX_SHOWN_CHARACTERS:
        shown += f" ... ({len(text):,} characters)"
    console.print(Text(textwrap.indent(shown, "    ", lambda _: True)), soft_wrap=True)
