"""The model card of an export: what it is, how far it is the adapter, figures, data and licences, limits."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medqa.files import Damaged, read_json
from medqa.prompts import prompt
from medqa.results.adapter import Source
from medqa.results.fidelity import KL_LIMITS, Fidelity
from medqa.training.artifacts import UNKNOWN, data_lines
from medqa.training.artifacts import licence as licence_of

# Of an evaluation, what the card leaves out: parts of the rows, differences, other baselines than the untuned base.
LEFT_OUT = {
    "sources", "unseen_topics", "few_shared_13_grams", "specialties", "difference", "own_template", "copied",
    "validation", "rouge1", "rouge2", "authors_rouge1", "authors_rouge2", "loss", "perplexity", "numbers",
}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """What was measured of an export on this machine. `bytes` are those of the weights' files."""

    fidelity: Fidelity
    prompts: str
    bytes: int
    tokens_per_s: float
    engine: str
    quantization: str


def licence(source: Source) -> tuple[str, str]:
    """The export's licence, as the hub names it and as a sentence."""
    if source.run is None:
        return UNKNOWN, "what it was trained on is not recorded: the licences of that data and of the base model apply"
    return licence_of(source.experiment.data, source.experiment.model.base)


def card(source: Source, name: str, form: str, outtype: str, measured: Measured) -> str:
    """The card's text, Markdown with the hub's header."""
    experiment = source.experiment
    short, sentence = licence(source)
    data = "Not recorded." if source.run is None else data_lines(experiment.data)
    weights = "the weights of its base" + (", 4-bit ones expanded" if measured.quantization == "4bit" else "")
    of_step = "" if source.step is None else f", update {source.step}"
    return f"""---
base_model: {json.dumps(experiment.model.base)}
base_model_relation: finetune
library_name: {"gguf" if form == "gguf" else "transformers"}
pipeline_tag: text-generation
language: en
license: {short}
tags: [medical, question-answering, {form}]
---

# {name}

`{experiment.model.base}` fine-tuned on medical questions and answers with medqa: the LoRA adapter
`{source.name}`{of_step}, merged into the weights it was trained on
({weights}), stored as {outtype}. Needs no PEFT.

**Not medical advice.** The answers can be wrong, outdated or dangerous. For research on question answering; not for
diagnosis, treatment or any decision about a person's health.

Licence: {sentence}.

## How far it is the adapter

On {measured.fidelity.answers} of {measured.prompts}: {measured.fidelity}.
An export above a mean of {KL_LIMITS[outtype]:g} nats is not made.

## Size and speed

{measured.bytes / 2**20:,.1f} MiB of weights; {measured.tokens_per_s:,.1f} tokens a second, one greedy answer at a time,
with {measured.engine} of the machine that made this export.

## Figures

{_figures(source)}

They are the adapter's, on held-out rows, and measure likeness to the reference answers, not whether one is right. The
interval, where there is one, is of the sample of rows, not of the training.

## Prompt

One BOS, then this, a question without outer whitespace; generation stops at EOS.
{_carried(form)}

```
{prompt("{question}")}```

Each question stands alone, as in training; there is no system message.

## Data

{data}

## Limits

English; short questions; a small model that answers fluently and wrongly. What follows EOS, and answers to other
prompts than the one above, it was never trained on. A special token spelled in a question (`</s>`) was text in
training; servers make a token of it. Decode greedily (temperature 0), as it was evaluated.
"""


def _carried(form: str) -> str:
    """Where the prompt is."""
    if form == "gguf":
        return "The file's chat template and the Modelfile carry it; Ollama does not trim a question."
    return "The tokenizer's chat template carries it, for chat endpoints too; it refuses a system message."


def _figures(source: Source) -> str:
    """A table of what the run was measured at: with intervals where `evaluate` has measured them."""
    if source.run is None or not source.final:
        return "Not measured for this adapter."
    evaluation = _read(source.run / "evaluation.json")
    whole = evaluation.get("step") == source.step and evaluation.get("limit") is None  # of this adapter, on all rows
    rows = list(_with_interval(evaluation)) if whole else []
    if rows:
        lines = [f"| {path} | {value:.4g} | {low:.4g} to {high:.4g} |" for path, value, low, high in rows]
        return "\n".join(["| | value | 95 % interval |", "|---|---|---|", *lines])
    summary = _read(source.run / "summary.json")
    lines = []
    for label, part in (("validation, untuned", "baseline"), ("validation, tuned", "final"), ("test, tuned", "test")):
        figures = summary.get(part)
        value = figures.get("answer_perplexity") if isinstance(figures, dict) else None
        if isinstance(value, int | float):
            lines.append(f"| answer perplexity, {label} | {value:.3f} |")
    return "\n".join(["| | value (without an interval) |", "|---|---|", *lines]) if lines else "Not recorded."


def _with_interval(found: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, float, float, float]]:
    """Every object that is a value with its interval, by its path; not those of some of the rows alone."""
    if not isinstance(found, Mapping):
        return
    three = [found.get(key) for key in ("value", "low", "high")]
    if all(isinstance(x, int | float) and math.isfinite(x) for x in three):
        yield " ".join(path).replace("_", " ").replace("|", " "), *three
        return
    for key, inside in found.items():
        if key in LEFT_OUT and not (key == "loss" and path == ()):  # the task of that name stays
            continue
        yield from _with_interval(inside, path if key == "tasks" else (*path, str(key)))


def _read(path: Path) -> dict[str, Any]:
    """A JSON object of the run; an empty one where it has none that can be read."""
    try:
        found = read_json(path)
    except Damaged:
        return {}
    return found if isinstance(found, dict) else {}
