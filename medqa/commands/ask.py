"""`medqa ask` answers questions with an adapter, one at a time, with the training prompt."""

import io
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from transformers import TextStreamer

from medqa.commands.adapter import Adapted
from medqa.data.tokens import prompt_ids, prompt_of
from medqa.errors import UserError
from medqa.evaluation.answers import end_ids, own_template_prompts, plain_greedy
from medqa.evaluation.safety import red_flag
from medqa.model.base import load_tokenizer
from medqa.terminal import nobody_reads, print_json, printable

ADVICE = (
    "This may be an emergency, or a question that no program must decide: call the emergency number, or ask a doctor, "
    "a pharmacist or a poison centre, before you read the answer below."
)
NOT_ADVICE = "Not medical advice: answers can be wrong, outdated or dangerous. Ask a professional."
NOT_UTF8 = re.compile("[\ud800-\udfff]")  # surrogates stand for undecodable bytes
OWN_TEMPLATE = "base, its own chat template"
ALONE = "Each question stands alone, as in training: earlier questions are not remembered. An empty line ends."


@dataclass(frozen=True)
class Answered:
    """One answer: its text, whether it ended with EOS, and its number of tokens."""

    text: str
    stopped: bool
    tokens: int


@dataclass(frozen=True)
class Decoding:
    """The decoding options of an answer.

    Attributes:
        temperature: the sampling temperature; 0: greedy decoding, as in every evaluation.
        repetition_penalty: as in transformers, also for tokens of the question; 1: no penalty.
        base_ids: gives the prompt ids of a question for the base model; None: those of training.
        own_template_ids: gives those in the base's own chat template, in which `--compare` asks the base once more;
            None: it is not asked again.
    """

    temperature: float = 0.0
    repetition_penalty: float = 1.0
    base_ids: Callable[[str], list[int]] | None = None
    own_template_ids: Callable[[str], list[int]] | None = None

    def arguments(self) -> dict[str, Any]:
        """The arguments for `generate`. `top_k=0` disables the default limit of transformers (50 candidates)."""
        chosen = {"do_sample": True, "temperature": self.temperature, "top_k": 0} if self.temperature else {}
        return {"do_sample": False, "repetition_penalty": self.repetition_penalty, **chosen}


GREEDY = Decoding()


def ids_for_base(adapted: Adapted, kind: str | None) -> Callable[[str], list[int]] | None:
    """A function that gives the prompt ids of a question for the base model.

    Args:
        kind: `instruction`: the project's own prompt; `chat`: the base's own chat template; None: the prompt of
            training.

    Returns:
        None if this is the prompt of training.

    Raises:
        UserError: the base has no usable chat template.
    """
    if kind in (None, prompt_of(adapted.tokenizer).kind):
        return None
    base = adapted.source.experiment.model.base
    if kind == "instruction":
        tokenizer = load_tokenizer(base)
        return lambda question: prompt_ids(question, tokenizer)

    def from_template(question: str) -> list[int]:
        told: list[str] = []
        found = own_template_prompts(base, [question.strip()], told.append, consequence="")
        if found is None:
            why = told[0] if told else f"{base}: it has no chat template"
            raise UserError(f"--prompt chat: {why}; leave --prompt out")
        return found(question.strip())

    from_template("What is asthma ?")
    return from_template


def ids_in_own_template(adapted: Adapted) -> Callable[[str], list[int]] | None:
    """`ids_for_base` with `chat`; None if the base has no usable chat template, or if it is the prompt of training."""
    try:
        return ids_for_base(adapted, "chat")
    except UserError:
        return None


class _Stream(TextStreamer):
    """Passes text on as soon as it is final, instead of printing it."""

    def __init__(self, tokenizer: Any, told: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._told = told

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers with each piece of text."""
        if text:
            self._told(printable(text))


def answer(
    adapted: Adapted,
    question: str,
    most_tokens: int,
    told: Callable[[str], None] | None = None,
    base: bool = False,
    how: Decoding = GREEDY,
) -> Answered:
    """The answer to a question.

    Args:
        most_tokens: the maximum length; less where the model's context ends.
        told: called with each piece of the text as it is generated.
        base: use the base model without the adapter.
        how: the decoding options.

    Raises:
        UserError: the question is empty, is not UTF-8, or is so long that there is no room for an answer.
    """
    if bad := NOT_UTF8.search(question):
        raise UserError(
            f"the question is not UTF-8 text (byte 0x{ord(bad[0]) & 0xFF:02x} after {bad.start():,} characters); write "
            "it in UTF-8"
        )
    if not question.strip():
        raise UserError("the question is empty; ask something")
    model, tokenizer = adapted.model, adapted.tokenizer
    prompt = how.base_ids(question) if base and how.base_ids else prompt_ids(question, tokenizer)
    context = getattr(model.config, "max_position_embeddings", None)
    room = most_tokens if context is None else min(most_tokens, context - len(prompt))
    if room < 1:
        raise UserError(f"the question has {len(prompt):,} tokens, but the model's context is {context:,}; shorten it")
    ids = torch.tensor([prompt], device=model.device)
    ends = end_ids(model, tokenizer)
    with torch.no_grad(), plain_greedy(model), model.disable_adapter() if base else nullcontext():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=room,
            **how.arguments(),
            use_cache=True,
            eos_token_id=sorted(ends),
            pad_token_id=tokenizer.pad_token_id,
            streamer=_Stream(tokenizer, told) if told else None,
        )
    new = output[0, len(prompt) :].tolist()
    end = next((index for index, token in enumerate(new) if token in ends), None)
    text = tokenizer.decode(new[:end], skip_special_tokens=True).strip()
    return Answered(printable(text), end is not None, len(new[:end]))


def as_record(
    adapted: Adapted, question: str, most_tokens: int, compare: bool, how: Decoding = GREEDY
) -> dict[str, Any]:
    """One question as a line of `--json`; a question that cannot be answered has `error` instead of `answer`."""
    shown = NOT_UTF8.sub("\N{REPLACEMENT CHARACTER}", question)  # not all JSON readers accept lone surrogates
    record: dict[str, Any] = {"question": shown, "red_flag": red_flag(question), "note": NOT_ADVICE}
    if record["red_flag"] is not None:
        record["advice"] = ADVICE
    try:
        found = answer(adapted, question, most_tokens, how=how)
    except UserError as error:
        return record | {"error": str(error)}
    record |= {"answer": found.text, "stopped": found.stopped, "tokens": found.tokens}
    if compare:
        record["base_answer"] = answer(adapted, question, most_tokens, base=True, how=how).text
    if compare and how.own_template_ids is not None:
        try:
            found = answer(adapted, question, most_tokens, base=True, how=_in_own_template(how))
            record["base_answer_own_template"] = found.text
        except UserError:  # only in this prompt the question is too long, or the template fails
            record["base_answer_own_template"] = None
    return record | {"adapter": adapted.source.name, "step": adapted.source.step}


def _in_own_template(how: Decoding) -> Decoding:
    """The options with which the base is asked in its own chat template."""
    return replace(how, base_ids=how.own_template_ids)


def show_answer(
    adapted: Adapted, question: str, most_tokens: int, compare: bool, console: Console, how: Decoding = GREEDY
) -> None:
    """Print one answer while it is generated; with `compare`, also those of the baseline.

    Raises:
        UserError: as in `answer`.
    """
    flag = red_flag(question)
    if flag is not None:
        console.print(Text(ADVICE, style="bold red"), soft_wrap=True)
    if compare:
        return _side_by_side(adapted, question, most_tokens, console, how)

    def show(text: str) -> None:
        console.print(Text(text), end="", soft_wrap=True)

    found = answer(adapted, question, most_tokens, show, how=how)
    console.print()
    if not found.stopped:
        console.print(Text(f"(cut off after {found.tokens} tokens)", style="dim"))


def _side_by_side(adapted: Adapted, question: str, most_tokens: int, console: Console, how: Decoding) -> None:
    """Baselines and fine-tuned model in columns, or one after the other if the console cannot redraw."""
    systems = {"base": how, OWN_TEMPLATE: _in_own_template(how), "tuned": how}
    if how.own_template_ids is None:
        del systems[OWN_TEMPLATE]
    texts = dict.fromkeys(systems, "")

    def written(name: str, told: Callable[[str], None] | None = None) -> str:
        """One system's answer as it is shown."""
        try:
            found = answer(adapted, question, most_tokens, told, base=name != "tuned", how=systems[name])
        except UserError as error:
            if name != OWN_TEMPLATE:
                raise
            return f"({printable(str(error))})"  # only in this prompt the question is too long, or the template fails
        return found.text + ("" if found.stopped else " (cut)")

    if not console.is_terminal:
        for name in texts:
            console.print(Text(f"{name}: {written(name)}"), soft_wrap=True)
        return

    def drawn() -> Table:
        table = Table(expand=True)
        for name in texts:
            table.add_column(name, ratio=1)
        table.add_row(*(Text(text) for text in texts.values()))
        return table

    with Live(drawn(), console=console, vertical_overflow="visible") as live:
        for name in texts:

            def told(text: str, name: str = name) -> None:
                texts[name] += text
                live.update(drawn())

            texts[name] = written(name, told)
            live.update(drawn())


def conversation(adapted: Adapted, most_tokens: int, compare: bool, console: Console, how: Decoding = GREEDY) -> None:
    """Ask for questions at the terminal until an empty line or the end of input; Ctrl-C ends an answer."""
    console.print(ALONE, style="dim", soft_wrap=True)
    _read_anything(sys.stdin)
    while True:
        try:
            question = console.input("\nquestion: ")
        except (EOFError, KeyboardInterrupt, OSError):  # OSError: the terminal was closed
            return console.print()
        if not question.strip():
            return None
        try:
            show_answer(adapted, question, most_tokens, compare, console, how)
        except KeyboardInterrupt:
            console.print("\n(stopped)", style="dim")
        except UserError as error:
            console.print(Text(f"error: {error}"), soft_wrap=True)


def piped_questions(stream: TextIO) -> Iterator[str]:
    """The non-blank lines of a stream, without a byte order mark; for undecodable bytes see `_read_anything`."""
    _read_anything(stream, encoding="utf-8-sig")
    yield from (line.strip() for line in stream if line.strip())


def _read_anything(stream: TextIO, **options: Any) -> None:
    """Make a stream pass on undecodable bytes instead of raising; `answer` refuses them."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="surrogateescape", **options)


def answer_lines(
    adapted: Adapted, questions: Iterator[str] | list[str], most_tokens: int, compare: bool, how: Decoding = GREEDY
) -> None:
    """Print one JSON line for each question as soon as it is answered."""
    for question in questions:
        print_json(as_record(adapted, question, most_tokens, compare, how))
        if nobody_reads():  # the reader has closed the pipe, for example `head`
            return
