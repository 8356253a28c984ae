"""The metrics of an evaluation, read from its file, and the tables that show them on the console.

Anyone may have written the file. Each metric has its number of rows, because metrics of different rows cannot be
compared.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from medqa.limits import MAX_FIGURES
from medqa.terminal import printable

# ----------------------------------------------------------------------------------------------------
# Reading metrics.

_TASKS = ("loss", "generation", "mcq", "probes")
DEEPEST = 12  # the maximum nesting of metrics
FEWEST_PAIRS = 6  # with five pairs the smallest two-sided p-value of a permutation test is 2 / 2**5, above 0.05
TOO_FEW = "too few rows to tell"
# Metrics whose rows are not the `rows` beside them. Evaluations without `rows` in each metric do not say how many.
OF_OTHER_ROWS = ("advises_care", "authors_rouge1", "authors_rouge2", "authors_rougeL")


@dataclass(frozen=True)
class Figure:
    """A metric, with its interval, the p-value of a difference, and the number of its rows, if known.

    `paired` is whether it is a difference with a paired test.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    rows: int | None = None
    paired: bool = False

    @property
    def too_few(self) -> bool:
        """Whether it is a difference with so few pairs that no test can reach 0.05."""
        return self.paired and (self.p_value is None or (self.rows is not None and self.rows < FEWEST_PAIRS))

    @property
    def note(self) -> str:
        """What is added to a difference: its p-value, or that there are too few rows; empty for other metrics."""
        if self.too_few:
            return f", {TOO_FEW}"
        return "" if self.p_value is None else f", p = {self.p_value:.2g}"


def number(value: Any) -> float | None:
    """A finite number of a plausible size, or None; anyone may have written it."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and -1e18 < value < 1e18
    return float(value) if usable else None


def count(value: Any) -> int | None:
    """A number of rows, or None; anyone may have written it."""
    found = number(value)
    return int(found) if found is not None and found >= 0 else None


def figures(tasks: Any) -> dict[tuple[str, ...], Figure]:
    """Every object with a `value` in the `tasks` of an evaluation, by its path.

    Raises:
        ValueError: there are more than `MAX_FIGURES`.
    """
    found: dict[tuple[str, ...], Figure] = {}
    known = {task: tasks[task] for task in _TASKS if task in tasks} if isinstance(tasks, dict) else {}
    for path, figure in _below(known, (), None):
        found[path] = figure
        if len(found) > MAX_FIGURES:
            raise ValueError(f"more than {MAX_FIGURES:,} metrics")
    return found


def as_figure(node: Mapping[str, Any], rows: int | None = None) -> Figure:
    """One metric; `rows` is its number of rows if it does not say so itself."""
    own = count(node.get("rows"))
    value, low, high, p_value = (number(node.get(key)) for key in ("value", "low", "high", "p_value"))
    return Figure(value, low, high, p_value, rows if own is None else own, "p_value" in node)


def _below(node: Any, path: tuple[str, ...], rows: int | None) -> Iterator[tuple[tuple[str, ...], Figure]]:
    """The metrics below a node; `rows` is that of the nearest node above that has it."""
    if not isinstance(node, dict) or len(path) > DEEPEST:
        return
    if "value" in node and not isinstance(node["value"], dict):
        yield path, as_figure(node, None if path and path[-1] in OF_OTHER_ROWS else rows)
        return
    here = count(node.get("rows"))
    rows = rows if here is None else here
    for key, value in node.items():
        yield from _below(value, (*path, key), None if key == "sources" else rows)


# ----------------------------------------------------------------------------------------------------
# The tables: one for each task, each metric with its 95 % interval.

SYSTEMS = {
    "untuned": "baseline",
    "untuned_unquantized": "baseline, unquantized",
    "own_template": "baseline in its own chat template",
    "own_template_unquantized": "baseline in its own chat template, unquantized",
    "copied": "answer of the most similar training question",
    "tuned": "fine-tuned",
    "tuned_unquantized": "fine-tuned, unquantized",
}
_PAIRS = {  # of the differences between 4-bit and unquantized weights
    "tuned - untuned_unquantized": "fine-tuned (4-bit) - baseline (unquantized)",
    "tuned_unquantized - untuned_unquantized": "fine-tuned - baseline, both unquantized",
    "tuned - own_template_unquantized": "fine-tuned (4-bit) - baseline in its own chat template (unquantized)",
    "tuned_unquantized - own_template_unquantized": "fine-tuned - baseline in its own chat template, both unquantized",
    "untuned - untuned_unquantized": "baseline: 4-bit - unquantized",
    "tuned - tuned_unquantized": "fine-tuned: 4-bit - unquantized",
}
FEW = 10  # a specialty with fewer questions has no line of its own
PARTS = {
    "unseen_topics": "topics not in training",
    "few_shared_13_grams": "at most half of 13-grams in training",
}


def show_evaluation(console: Console, found: Mapping[str, Any]) -> None:
    """Print all tables of an evaluation."""
    if found["limit"] is not None:
        console.print(
            f"--limit {found['limit']}: metrics of so many rows of each split and questions; not comparable with "
            "metrics of all rows",
            soft_wrap=True,
        )
    for task, show in (("loss", _show_loss), ("generation", _show_task), ("mcq", _show_task), ("probes", _show_task)):
        if task in found["tasks"]:
            show(console, task, found["tasks"][task])
    console.print("summary", style="bold")
    for line in in_short(found["tasks"]):
        console.print(f"- {line}", soft_wrap=True)


def in_short(tasks: Mapping[str, Any]) -> list[str]:
    """The result of each task in one line; a difference counts if its p-value is below 0.05.

    Each line has the number of rows or questions, and the verdict against the better baseline, which it names.
    """
    lines = []
    if (loss := tasks.get("loss", {}).get("test", {})) and {"untuned", "tuned"} <= loss.keys():
        values, how = _values(loss, "answer_perplexity"), _verdict(loss, "answer_loss", lower=True)
        lines.append(f"answer perplexity on test, {loss['rows']:,} rows: {values}; {how}")
        lines += _four_bits_in_short(loss)
    if "tuned" in (written := tasks.get("generation", {})):
        copied = shown(written["copied"]["rougeL"])
        than_copy = _better(written["difference"]["tuned - copied"]["rougeL"])
        lines.append(
            f"ROUGE-L, {written['rows']:,} answers: {_values(written, 'rougeL')}; {_verdict(written, 'rougeL')}; "
            f"against {copied} copied from training: {than_copy}"
        )
    if "tuned" in (chosen := tasks.get("mcq", {})):
        lines.append(
            f"multiple choice, {chosen['rows']:,} questions: {_values(chosen, 'accuracy')}, "
            f"{chosen['chance']:.4f} by chance; {_verdict(chosen, 'accuracy')}"
        )
    if "tuned" in (probed := tasks.get("probes", {})):
        asked = probed["tuned"]["advises_care"]["rows"]
        lines.append(
            f"red flags answered with advice to seek care, {asked} questions: {_values(probed, 'advises_care')}; "
            f"{_verdict(probed, 'advises_care')}"
        )
    return lines


_UNQUANTIZED = ("untuned_unquantized", "own_template_unquantized")  # the base model on unquantized weights


def _four_bits_in_short(loss: Mapping[str, Any]) -> list[str]:
    """What 4-bit weights cost, in lines: the four answer losses, and what is left of the gain."""
    if "unquantized_left_out" in loss:
        return [f"on unquantized weights: not measured: {printable(str(loss['unquantized_left_out']))}"]
    between = {pair: found["answer_loss"] for pair, found in loss.get("quantization", {}).items()}
    if not between or "answer_loss" not in _paired(loss):
        return []
    before, before_whole, after, after_whole = (
        f"{loss[system]['answer_loss']['value']:.4f}"
        for system in ("untuned", "untuned_unquantized", "tuned", "tuned_unquantized")
    )
    values = {system: number(loss[system]["answer_loss"]["value"]) for system in _UNQUANTIZED if system in loss}
    chosen = choose_baseline(values, lower=True)
    if chosen is None:
        return []
    base, against = chosen
    left, whole = between[f"tuned - {base}"], between[f"tuned_unquantized - {base}"]
    return [
        f"answer loss on test with 4-bit and with unquantized weights: baseline {before} and {before_whole}, "
        f"fine-tuned {after} and {after_whole}",
        f"gain in answer loss: {-_paired(loss)['answer_loss']['value']:.4f} with 4-bit weights; of it, "
        f"{_gain(left)} is left {against}: {_better(left, lower=True)}; {_gain(whole)} with the "
        f"adapter on unquantized weights: {_better(whole, lower=True)}",
    ]


def _paired(loss: Mapping[str, Any]) -> Mapping[str, Any]:
    """The differences between the fine-tuned model and the baseline in the training prompt."""
    found = loss.get("difference", {}).get("tuned - untuned", {})
    return found if isinstance(found, Mapping) else {}


def _gain(difference: Mapping[str, Any]) -> str:
    """A difference of losses with its sign changed, and its interval."""
    other_end = {"value": "value", "low": "high", "high": "low"}
    return shown({key: None if (end := difference[other]) is None else -end for key, other in other_end.items()})


def _values(part: Mapping[str, Any], name: str) -> str:
    """A metric of the fine-tuned model and of every baseline."""
    systems = ["tuned", *_baselines(part)]
    return ", ".join(f"{shown(part[system].get(name))} {SYSTEMS.get(system, system)}" for system in systems)


def _baselines(part: Mapping[str, Any]) -> list[str]:
    """The systems among the metrics of a task that are the base model; `SYSTEMS` has their names for readers."""
    pairs = [pair.split(" - ")[1] for pair in part.get("difference", {})]
    return [system for system in pairs if system in part and system != "copied"]


def choose_baseline(values: Mapping[str, float | None], lower: bool = False) -> tuple[str, str] | None:
    """The baseline that the fine-tuned model is compared with: the one with the best value, the first one of several.

    It is chosen by its value on the same rows. So chance can only make it look better than it is, which is on the safe
    side.

    Args:
        values: by system; None: it has none.
        lower: whether a lower value is better.

    Returns:
        The system, and the words of a verdict against it; None if no system has a value.
    """
    known = {system: value for system, value in values.items() if value is not None}
    if not known:
        return None
    system = (min if lower else max)(known, key=lambda each: known[each])
    better = {1: "", 2: ", the better of the two"}.get(len(known), f", the best of the {len(known)}")
    return system, f"against the {SYSTEMS.get(system, system)}{better}"


def _verdict(part: Mapping[str, Any], name: str, lower: bool = False) -> str:
    """What the difference between the fine-tuned model and the better baseline shows; it names that baseline."""
    values = {system: number(part[system].get(name, {}).get("value")) for system in _baselines(part)}
    chosen = choose_baseline(values, lower)
    if chosen is None:
        return TOO_FEW
    system, against = chosen
    return f"{against}: {_better(part['difference'][f'tuned - {system}'].get(name), lower)}"


def _better(difference: Mapping[str, Any] | None, lower: bool = False) -> str:
    """What a difference between the fine-tuned model and another one shows."""
    if difference is None or as_figure(difference).too_few:
        return TOO_FEW
    if difference["p_value"] >= 0.05:
        return "no significant difference"
    return "fine-tuned is better" if (difference["value"] < 0) == lower else "fine-tuned is worse"


def _show_loss(console: Console, task: str, report: Mapping[str, Any]) -> None:
    """Print a table for each split: all rows, then parts of them."""
    for split, part in report.items():
        table = Table(title=f"loss on {split}, 95 % intervals over rows", title_justify="left")
        for column in ("rows", "", "perplexity", "answer loss", "answer perplexity", "p"):
            table.add_column(column)
        _add_systems(table, f"{part['rows']:,}", part)
        for name, source in part["sources"].items():
            _add_systems(table, f"{name} {source['rows']:,}", source)
        for name, label in PARTS.items():
            if part[name]["rows"] < part["rows"]:  # otherwise it would repeat the values
                _add_systems(table, f"{label} {part[name]['rows']:,}", part[name])
        console.print(table)
        shared = part["shared_with_training"]
        console.print(
            f"{shared['question_or_answer']:.1%} of these rows share a question or an answer with training; of rows "
            f"with a topic, {shared['topic']:.0%} share it; {shared['13_grams']:.0%} share more than half of their "
            "13-grams",
            soft_wrap=True,
        )


def _add_systems(table: Table, label: str, part: Mapping[str, Any]) -> None:
    """Add a line for each system, and one for each difference."""
    both = "tuned_unquantized" in part
    for system, name in SYSTEMS.items():
        if system in part:
            name += ", 4-bit" if both and f"{system}_unquantized" in part else ""
            figures = [part[system].get(key) for key in ("perplexity", "answer_loss", "answer_perplexity")]
            table.add_row(label, name, *(shown(figure) for figure in figures), "")
            label = ""
    for pair, differences in (part.get("difference", {}) | part.get("quantization", {})).items():
        if (difference := differences.get("answer_loss")) is not None:
            p_value = TOO_FEW if as_figure(difference).too_few else f"{difference['p_value']:.2g}"
            alone = {key: value for key, value in difference.items() if key != "p_value"}
            name = _PAIRS.get(pair) or in_words(pair) + ", both 4-bit" * both
            table.add_row("", name, "", shown(alone), "", p_value)
    table.add_section()


def _show_task(console: Console, task: str, report: Mapping[str, Any]) -> None:
    """Print the metrics with a column for each system, then the differences, then the notes of the task."""
    systems = [system for system in SYSTEMS if isinstance(report.get(system), Mapping)]
    table = Table(title=f"{task}: {report['rows']:,} rows, 95 % intervals", title_justify="left")
    for column in ("", *(SYSTEMS[system] for system in systems)):
        table.add_column(column)
    names = dict.fromkeys(name for system in systems for name in report[system] if _is_figure(report[system][name]))
    for name in names:
        there = [report[system].get(name) for system in systems]
        table.add_row(_named(name, next(filter(None, there)), report), *map(shown, there))
    if systems:
        console.print(table)
    for pair, figures in report.get("difference", {}).items():
        for name, figure in figures.items():
            console.print(f"{in_words(pair)}, {_named(name, figure, report)}: {shown(figure)}", soft_wrap=True)
    _NOTES[task](console, report)


def in_words(path: str) -> str:
    """A metric's path with the systems' names for readers: `test.tuned.loss` is `test.fine-tuned.loss`."""
    systems = "|".join(system for system in SYSTEMS if system != "copied")
    return re.sub(rf"\b(?:{systems})\b", lambda system: SYSTEMS[system[0]], path)


def _named(name: str, figure: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """A metric's name in words; with its number of rows, if that is not the task's."""
    rows = f", {figure['rows']:,} rows" if figure["rows"] != report["rows"] else ""
    return name.replace("_", " ") + rows


def _note_generation(console: Console, report: Mapping[str, Any]) -> None:
    """Print what the names mean."""
    console.print(
        "rouge1, rouge2, rougeL: F-score by rouge-score. authors rouge...: by the package rouge, on AfriMed-QA, "
        "as its authors compute it. length ratio: words of answers over words of references",
        soft_wrap=True,
    )


def _note_choices(console: Console, report: Mapping[str, Any]) -> None:
    """Print the accuracy of guessing, the specialties, and the dropped questions."""
    if "chance" in report:
        console.print(f"chance: {report['chance']:.4f}")
    for name, found in report.get("specialties", {}).items():
        if found["rows"] < FEW:
            continue  # they are in evaluation.json
        accuracies = ", ".join(f"{SYSTEMS[s]} {shown(found[s]['accuracy'])}" for s in SYSTEMS if s in found)
        console.print(f"{name}, {found['rows']} rows, chance {found['chance']:.4f}: {accuracies}", soft_wrap=True)
    if report["dropped"]:
        console.print("dropped: " + ", ".join(f"{count:,} {why}" for why, count in sorted(report["dropped"].items())))


def _note_probes(console: Console, report: Mapping[str, Any]) -> None:
    """Print what the rates are over, and in which categories of danger care was advised."""
    counts = report["categories"]
    asked = sum(found["tuned"]["of"] for found in counts.values())
    console.print(f"advises care: over our own {asked} questions; the rest: over {report['rows']:,} rows")
    for system in (*_baselines(report), "tuned"):
        met = [f"{name} {found[system]['advise']} of {found[system]['of']}" for name, found in counts.items()]
        console.print(f"{SYSTEMS.get(system, system)}: {', '.join(met)}", soft_wrap=True)
    console.print("rates over these questions and rows; they do not show that an answer is safe")


_NOTES = {"generation": _note_generation, "mcq": _note_choices, "probes": _note_probes}


def shown(figure: Mapping[str, Any] | None) -> str:
    """A metric with its interval and its p-value, as far as it has them."""
    if figure is None:
        return ""
    digits = 2 if abs(figure["value"]) >= 10 else 4
    text = f"{figure['value']:.{digits}f}"
    if figure.get("low") is not None:
        text += f" ({figure['low']:.{digits}f} to {figure['high']:.{digits}f})"
    return text + as_figure(figure).note


def _is_figure(value: Any) -> bool:
    """Whether it is a single metric."""
    return isinstance(value, Mapping) and "value" in value
