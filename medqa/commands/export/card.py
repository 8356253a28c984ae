"""The model card of an export, and Ollama's Modelfile."""

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medqa.commands.adapter import Source
from medqa.commands.evaluation_table import TOO_FEW, Figure, count, figures, in_words, number
from medqa.commands.export.fidelity import KL_LIMITS, Fidelity
from medqa.commands.export.merge import MergedInto
from medqa.data.tokens import Prompt
from medqa.errors import UserError
from medqa.files import Damaged, read_json
from medqa.training.before_after import base_words, code, data_lines, front_matter, plain, prompt_block, public_name
from medqa.training.before_after import licence as licence_of

# Parts of an evaluation that the card omits: parts of the rows, differences, and copied answers.
LEFT_OUT = {
    "sources", "unseen_topics", "few_shared_13_grams", "specialties", "difference", "copied", "quantization",
    "validation", "rouge1", "rouge2", "authors_rouge1", "authors_rouge2", "loss", "perplexity", "numbers",
}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """Measurements of an export on this machine. `bytes` is the size of the weight files."""

    fidelity: Fidelity
    prompts: str
    bytes: int
    tokens_per_s: float
    engine: str
    merged_into: MergedInto
    prompt: Prompt


def licence(source: Source) -> tuple[str, str]:
    """The export's licence: its identifier on the hub, and a sentence."""
    return licence_of(None if source.run is None else source.experiment.data, source.experiment.model.base)


def card(source: Source, name: str, form: str, outtype: str, measured: Measured) -> str:
    """The text of the model card, in Markdown with the hub's header."""
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
    known = None if source.run is not None else public_name(source.name)
    adapter = "the LoRA adapter" + (f" {code(known)}" if known else "")
    of_step = "" if count(source.step) is None else f", update {count(source.step)}"
    words = base_words(experiment.model.base)
    return f"""{front_matter(header)}
# {plain(name)}

{words[0].upper()}{words[1:]}, fine-tuned on medical questions and answers with medqa: {adapter}{of_step}, merged into
{measured.merged_into}, stored as {outtype}. Needs no PEFT.

**Not medical advice.** The answers can be wrong, outdated or dangerous. For research on question answering; not for
diagnosis, treatment or any decision about a person's health.

Licence: {sentence}.

## How close it is to the adapter

On {measured.fidelity.answers} of {measured.prompts}: {measured.fidelity}.
{_compared_with(measured.merged_into)}Exports with a mean above {KL_LIMITS[outtype]:g} nats are refused.

## Size and speed

{measured.bytes / 2**20:,.1f} MiB of weights; {measured.tokens_per_s:,.1f} tokens per second, one greedy answer at a
time, with {measured.engine} of the machine that made this export.

## Metrics

{_figures(source)}

They are the adapter's, on held-out rows, and measure similarity to the reference answers, not whether one is right.
The intervals, where given, are over the sample of rows, not over training runs.{_on_which_weights(source, measured)}

## Prompt

{_prompt_words(measured.prompt)}
{_carried(form, measured.prompt)}

{prompt_block(measured.prompt)}

Each question stands alone, as in training{_no_system(measured.prompt)}.

## Data

{data}

## Limits

English; short questions; a small model that answers fluently and wrongly. It was not trained on text after EOS, or on
other prompts than the one above. A special token that is spelled out in a question (`</s>`) was text in training, but
servers make a token of it. Use greedy decoding (temperature 0), as in the evaluation.
"""


def which_measures_better(source: Source) -> str | None:
    """The adapter's answer losses on 4-bit and on unquantized weights, compared in words; None if not measured.

    An evaluation with a limit counts too, because both losses are of the same rows, and their number is said.
    """
    found = _evaluated(source, limited=True)
    four_bit, unquantized, difference = (
        found.get(("loss", "test", *path), Figure(None))
        for path in (
            ("tuned", "answer_loss"),
            ("tuned_unquantized", "answer_loss"),
            ("quantization", "tuned - tuned_unquantized", "answer_loss"),
        )
    )
    if four_bit.value is None or unquantized.value is None or difference.value is None:
        return None
    if difference.p_value is None or difference.too_few:
        verdict = TOO_FEW
    elif difference.p_value >= 0.05:
        verdict = "no significant difference"
    else:
        verdict = f"{'unquantized' if difference.value > 0 else '4-bit'} weights measure better"
    rows = "" if difference.rows is None else f", {difference.rows:,} rows"
    return (
        f"answer loss on test{rows}: {four_bit.value:.4f} with 4-bit weights, {unquantized.value:.4f} with unquantized "
        f"weights: {verdict}"
    )


def _compared_with(merged_into: MergedInto) -> str:
    """Which model the export was compared with, if that is not the one of training."""
    return "The adapter was on the unquantized weights for this comparison.\n" if merged_into.own else ""


def _on_which_weights(source: Source, measured: Measured) -> str:
    """What the metrics of a run with 4-bit weights say about this export."""
    if not measured.merged_into.quantized:
        return ""
    not_these = ", which this export does not have" if measured.merged_into.own else ", as this export has them"
    better = which_measures_better(source) or "which weights are better has not been measured"
    return f"""

Metrics without the word "unquantized" are of 4-bit weights{not_these}. {better[0].upper()}{better[1:]}."""


def _prompt_words(own: Prompt) -> str:
    """A sentence that describes the prompt."""
    if own.kind == "chat":
        return (
            "The base's own chat template with one user message: the question stripped of outer whitespace; generation "
            f"stops at {code(own.end_text)}."
        )
    first = "One BOS, then this text," if own.bos else "This text without a BOS,"
    return f"{first} with the question stripped of outer whitespace; generation stops at EOS."


def _carried(form: str, own: Prompt) -> str:
    """Where the prompt is stored."""
    if form == "gguf":
        return "The file's chat template and the Modelfile have it; Ollama does not strip whitespace around a question."
    refuses = "" if own.kind == "chat" else "; it refuses a system message"
    return f"The tokenizer's chat template has it, also for chat endpoints{refuses}."


def _no_system(own: Prompt) -> str:
    """What the card says about system messages."""
    return "" if own.kind == "chat" else "; there is no system message"


def _figures(source: Source) -> str:
    """A table of the run's metrics, with intervals if `medqa evaluate` measured them."""
    if source.run is None or not source.final:
        return "Not measured for this adapter."
    lines = list(_with_interval(_evaluated(source)))
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


def _evaluated(source: Source, limited: bool = False) -> dict[tuple[str, ...], Figure]:
    """The metrics of this adapter by path; empty if `medqa evaluate` has not measured them.

    Args:
        limited: also those of a limited number of rows.
    """
    if source.run is None or not source.final:
        return {}
    evaluation = _read(source.run / "evaluation.json")
    if evaluation.get("step") != source.step or not (limited or evaluation.get("limit") is None):
        return {}
    try:
        return figures(evaluation.get("tasks"))
    except ValueError:  # more metrics than any evaluation has
        return {}


def _with_interval(found: Mapping[tuple[str, ...], Figure]) -> Iterator[str]:
    """A line of the table for each metric with an interval; not for metrics of parts of the rows."""
    for path, figure in found.items():
        if LEFT_OUT & set(path[1:]) or None in (figure.value, figure.low, figure.high):  # the task "loss" stays
            continue
        name = plain(in_words(" ".join(path)).replace("_", " "))
        rows = "" if figure.rows is None else f"{figure.rows:,}"
        yield f"| {name} | {figure.value:.4g} | {figure.low:.4g} to {figure.high:.4g} | {rows} |"


def _read(path: Path) -> dict[str, Any]:
    """A JSON object of the run; an empty one if it is missing or cannot be read."""
    try:
        found = read_json(path)
    except Damaged:
        return {}
    return found if isinstance(found, dict) else {}


# ----------------------------------------------------------------------------------------------------
# Ollama's Modelfile, and the commands that create a model from it.

GGUF_NAME = "model.gguf"
MODELFILE = "Modelfile"
NOT_QUOTED = ('"', "\\", "{{", "}}")
NOT_IN_TEMPLATE = ('"""', "\\", "{{", "}}", "\r", "\0")
MOST_TOKENS = 512  # of an answer; Ollama has no limit by default


def modelfile(own: Prompt, bos: str, context: int, licence: str) -> str:
    """The training prompt in Go's template language, without BOS (llama.cpp adds it), with greedy decoding.

    Each `{{ .Response }}` is followed by the end of the answer where the conversation continues; for the last one,
    Ollama drops what follows. The template has no place for a system message of the user.

    Args:
        bos: the text of the BOS that the prompt begins with; "" if llama.cpp adds no BOS.

    Raises:
        UserError: the format cannot quote the prompt or its end token, or the template language would interpret them.
    """
    eos, before, after = own.end_text, own.before.removeprefix(bos), own.after
    if not eos.isprintable() or any(mark in eos for mark in NOT_QUOTED):
        raise UserError(f"EOS {eos!r}: a Modelfile cannot quote it; use --format merged")
    if any(mark in part for mark in NOT_IN_TEMPLATE for part in (before, after)):
        raise UserError(f"the prompt {(before + after)[:60]!r}: a Modelfile cannot quote it; use --format merged")
    template = f"{before}{{{{ .Prompt }}}}{after}{{{{ .Response }}}}{eos}"
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
    """The commands to type. Ollama quantizes only 16-bit files."""
    name = re.sub(r"[^a-z0-9_-]+", "-", directory.absolute().name.lower()).strip("-_") or "medqa"
    file = shlex.quote(str(directory / MODELFILE))
    create = [f"ollama create {name} -f {file}"]
    if outtype == "f16":
        create.append(f"ollama create {name}-q4_k_m --quantize q4_K_M -f {file}  # smaller; not measured")
    return [*create, f"ollama run {name}"]
