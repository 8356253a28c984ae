"""The base model's own chat template: what its makers would have a question look like. A baseline of its own.

A template is a program by whoever made the base. It may raise any exception, for some questions only, and it need not
end. So all questions are rendered in a process of its own, with limits, before anything is measured.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from medqa.data.tokens import Example
from medqa.limited import Failed, limited
from medqa.limits import MAX_TEMPLATE_CHARACTERS
from medqa.model.base_files import location

PROBE = "What is asthma ?"


def own_template_prompts(
    base: str,
    questions: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
    once: Callable[[Callable[[], list[str] | None]], list[str] | None] = lambda render: render(),
) -> Callable[[str], list[int]] | None:
    """From a question to the ids that the untuned base's own chat template makes of it; None where it has none.

    A template that cannot render every question as a single user message counts as none.

    Args:
        base: a directory or a hub id. Its tokenizer is loaded anew: the one of training has training's template.
        questions: those that will be asked for.
        say: is told why a template cannot be used.
        once: has one process render, and gives the result to all. They would wait for each other for ever if one ran
            into a limit and another did not.
    """
    tokenizer = AutoTokenizer.from_pretrained(location(base), trust_remote_code=False)
    if not tokenizer.chat_template:
        return None
    asked = list(dict.fromkeys([PROBE, *questions]))

    def render_all() -> list[str] | None:
        try:
            return _rendered(tokenizer, asked)
        except Failed as error:
            say(f"{base}: its own chat template cannot be used: {error}; measured without it")
            return None

    found = once(render_all)
    if found is None:
        return None
    texts = dict(zip(asked, found, strict=True))

    def prompt(question: str) -> list[int]:
        if question not in texts:
            (texts[question],) = _rendered(tokenizer, [question])
        return tokenizer(texts[question], add_special_tokens=False)["input_ids"]

    return prompt


def _rendered(tokenizer: PreTrainedTokenizerBase, questions: Sequence[str]) -> list[str]:
    """What a tokenizer's chat template makes of each question.

    Raises:
        Failed: it raises an exception, takes too long or too much memory, or makes something else than a prompt.
    """

    def render() -> list[str]:
        texts = []
        for question in questions:
            message = {"role": "user", "content": question}
            text = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
            text.encode()  # raises an exception for halves of characters, which the tokenizer would not take
            if len(text) > len(question) + MAX_TEMPLATE_CHARACTERS:
                raise ValueError(f"a prompt of {len(text):,} characters")
            texts.append(text)
        return texts

    return limited(render)


def with_prompts(examples: Sequence[Example], prompts: Callable[[str], list[int]]) -> list[Example]:
    """The examples with other prompts before the very same answer tokens."""
    changed = []
    for example in examples:
        ids = np.array(prompts(example.row.question), dtype=example.input_ids.dtype)
        answer = example.input_ids[example.answer_start :]
        changed.append(replace(example, input_ids=np.concatenate([ids, answer]), answer_start=len(ids)))
    return changed
