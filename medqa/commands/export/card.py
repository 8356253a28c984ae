"""The model card of an export, and Ollama's Modelfile."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medqa.commands.adapter import Source
from medqa.commands.evaluation_table import count, figures, number
from medqa.commands.export.fidelity import KL_LIMITS, Fidelity
from medqa.data.tokens import prompt
from medqa.errors import UserError
from medqa.files import Damaged, read_json
from medqa.training.before_after import UNKNOWN, base_words, code, data_lines, front_matter, plain, public_name
from medqa.training.before_after import licence as licence_of

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
    base = public_name(experiment.model.base)
    short, sentence = licence(source)
    header: dict[str, Any] = {"base_model": base, "base_model_relation": "finetune"} if base else {}
    header |= {
        "library_name": "gguf" if form == "gguf" else "transformers",
        "pipeline_tag": "text-generation",
        "language": "en",
        "license": short,
        "tags": ["medical", "question-answering", form],
    }
    data = "Not recorded." if source.run is None else data_lines(experiment.data)
    weights = "the weights of its base" + (", 4-bit ones expanded" if measured.quantization == "4bit" else "")
    known = None if source.run is not None else public_name(source.name)
    adapter = "the LoRA adapter" + (f" {code(known)}" if known else "")
    of_step = "" if count(source.step) is None else f", update {count(source.step)}"
    words = base_words(experiment.model.base)
    return f"""{front_matter(header)}
# {plain(name)}

{words[0].upper()}{words[1:]}, fine-tuned on medical questions and answers with medqa: {adapter}{of_step}, merged into
the weights it was trained on ({weights}), stored as {outtype}. Needs no PEFT.

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
    lines = list(_with_interval(evaluation)) if whole else []
    if lines:
        return "\n".join(["| | value | 95 % interval | rows |", "|---|---|---|---|", *lines])
    summary = _read(source.run / "summary.json")
    for label, part in (
        ("validation, baseline", "baseline"),
        ("validation, fine-tuned", "final"),
        ("test, fine-tuned", "test"),
    ):
        figures_of = summary.get(part)
        value = number(figures_of.get("answer_perplexity")) if isinstance(figures_of, dict) else None
        if value is not None:
            lines.append(f"| answer perplexity, {label} | {value:.3f} |")
    return "\n".join(["| | value (without an interval) |", "|---|---|", *lines]) if lines else "Not recorded."


def _with_interval(evaluation: dict[str, Any]) -> Iterator[str]:
    """A line of the table for each figure that has an interval; not for those of some of the rows alone."""
    try:
        found = figures(evaluation.get("tasks"))
    except ValueError:  # more than an evaluation has
        return
    for path, figure in found.items():
        if LEFT_OUT & set(path[1:]) or None in (figure.value, figure.low, figure.high):  # the task "loss" stays
            continue
        name = plain(" ".join(path).replace("_", " "))
        rows = "" if figure.rows is None else f"{figure.rows:,}"
        yield f"| {name} | {figure.value:.4g} | {figure.low:.4g} to {figure.high:.4g} | {rows} |"


def _read(path: Path) -> dict[str, Any]:
    """A JSON object of the run; an empty one where it has none that can be read."""
    try:
        found = read_json(path)
    except Damaged:
        return {}
    return found if isinstance(found, dict) else {}


# ----------------------------------------------------------------------------------------------------
# Ollama's Modelfile, and the commands that make a model of it.

GGUF_NAME = "model.gguf"
MODELFILE = "Modelfile"
NOT_QUOTED = ('"', "\\", "{{", "}}")
MOST_TOKENS = 512  # of an answer: Ollama's own default is no limit at all


def modelfile(eos: str, context: int, licence: str) -> str:
    """The training prompt in Go's template language, without BOS (llama.cpp puts it in front), greedy as evaluated.

    Each `{{ .Response }}` is followed by EOS where the conversation goes on; of the last one Ollama leaves out what
    follows. A system message has no place in the training prompt and none here.

    Raises:
        UserError: an EOS that the format cannot quote, or that the template language would take for its own.
    """
    if not eos.isprintable() or any(mark in eos for mark in NOT_QUOTED):
        raise UserError(f"EOS {eos!r}: a Modelfile cannot quote it; use --format merged")
    question, response = prompt("\0").split("\0")
    template = f"{question}{{{{ .Prompt }}}}{response}{{{{ .Response }}}}{eos}"
    return f'''FROM ./{GGUF_NAME}
TEMPLATE """{template}"""
PARAMETER stop "{eos}"
PARAMETER num_ctx {context}
PARAMETER num_predict {min(MOST_TOKENS, context // 2)}
PARAMETER temperature 0
PARAMETER repeat_penalty 1
LICENSE """{licence}"""
'''


def ollama_commands(directory: Path, outtype: str) -> list[str]:
    """What to type. Ollama quantizes 16-bit files only."""
    name = re.sub(r"[^a-z0-9_-]+", "-", directory.absolute().name.lower()).strip("-_") or "medqa"
    file = shlex.quote(str(directory / MODELFILE))
    create = [f"ollama create {name} -f {file}"]
    if outtype == "f16":
        create.append(f"ollama create {name}-q4_k_m --quantize q4_K_M -f {file}  # smaller; not measured")
    return [*create, f"ollama run {name}"]
