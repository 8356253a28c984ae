"""Probes for what harms: danger not met with advice to seek care, and numbers that come from nowhere.

Rates over our own questions and over held-out ones; nothing here says that an answer is safe.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from medqa.data.sources import Row
from medqa.evaluation.generation import COMPARED, present
from medqa.evaluation.inference import Answer
from medqa.evaluation.intervals import difference_figure, mean_figure
from medqa.evaluation.quantities import quantities, unsupported
from medqa.evaluation.red_flags import RED_FLAGS, advises_care


def score(
    red_flags: Mapping[str, Sequence[Answer]],
    rows: Sequence[Row],
    answers: Mapping[str, Sequence[Answer]],
    seed: int,
) -> dict[str, Any]:
    """Rates by system, each a figure of intervals.py; what there are no answers for is absent.

    Args:
        red_flags: by system, its answers to `RED_FLAGS`.
        rows: held-out rows.
        answers: by system, its answers to them, as for `score_generation`.

    Returns:
        For each system `advises_care` (share of the red-flag questions answered with advice to seek care), `numbers`,
        `unsupported_numbers` and `unsupported_doses` (shares of the held-out answers that have a number at all, one
        that is in neither reference nor question, an amount of a drug that is in neither). `difference`: `tuned -
        untuned` and `tuned - copied`, with `p_value`. `categories`: by category of danger and system, how many
        answers advise care, of how many. `samples`: the questions with all answers. `examples`: of tuned answers, the
        first with an unsupported number.
    """
    columns: dict[str, dict[str, list[float]]] = {}
    for system, given in red_flags.items():
        columns.setdefault(system, {})["advises_care"] = [float(advises_care(answer.text)) for answer in given]
    for system, given in answers.items():
        columns.setdefault(system, {}).update(_number_columns(rows, given))
    result: dict[str, Any] = {
        system: present({name: mean_figure(values, None, seed) for name, values in found.items()})
        for system, found in columns.items()
    }
    result["difference"] = {
        f"{ours} - {theirs}": present(
            {
                name: difference_figure(values, columns[theirs][name], None, seed)
                for name, values in columns[ours].items()
                if name in columns[theirs]
            }
        )
        for ours, theirs in COMPARED
        if ours in columns and theirs in columns
    }
    result["categories"] = {
        category: {
            system: {
                "advise": int(sum(columns[system]["advises_care"][i] for i in chosen)),
                "of": len(chosen),
            }
            for system in red_flags
        }
        for category, chosen in _by_category().items()
    }
    result["samples"] = [
        {"category": category, "question": question} | {system: given[i].text for system, given in red_flags.items()}
        for i, (category, question) in enumerate(RED_FLAGS)
    ]
    result["examples"] = _examples(rows, answers.get("tuned", ()))
    return result


def _by_category() -> dict[str, list[int]]:
    """The places of each category's questions in `RED_FLAGS`."""
    places: dict[str, list[int]] = {}
    for place, (category, _) in enumerate(RED_FLAGS):
        places.setdefault(category, []).append(place)
    return places


def _number_columns(rows: Sequence[Row], answers: Sequence[Answer]) -> dict[str, list[float]]:
    """Whether each answer has numbers, and unsupported ones, as 0.0 and 1.0."""
    columns: dict[str, list[float]] = {"numbers": [], "unsupported_numbers": [], "unsupported_doses": []}
    for row, answer in zip(rows, answers, strict=True):
        found = unsupported(answer.text, row.answer, row.question)
        stated = [quantity for quantity in quantities(answer.text) if quantity.kind or not quantity.spelled]
        columns["numbers"].append(float(bool(stated)))
        columns["unsupported_numbers"].append(float(bool(found)))
        columns["unsupported_doses"].append(float(any(quantity.is_dose for quantity in found)))
    return columns


def _examples(rows: Sequence[Row], answers: Sequence[Answer], most: int = 5) -> list[dict[str, Any]]:
    """The first answers with an unsupported number: id, the numbers, the answer."""
    examples: list[dict[str, Any]] = []
    for row, answer in zip(rows, answers, strict=False):
        found = unsupported(answer.text, row.answer, row.question)
        if found and len(examples) < most:
            examples.append({"id": row.id, "numbers": [quantity.text for quantity in found], "answer": answer.text})
    return examples
