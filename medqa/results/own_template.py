"""The base model's own chat template: what its makers would have a question look like. A baseline of its own."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer

from medqa.data.tokens import Example
from medqa.model.base import location

Prompts = Callable[[str], list[int]]


def own_prompts(base: str) -> Prompts | None:
    """From a question to the ids of the base's own prompt for it; None where the base has no usable template."""
    tokenizer = AutoTokenizer.from_pretrained(location(base), trust_remote_code=False)
    if tokenizer.chat_template is None:
        return None

    def prompt(question: str) -> list[int]:
        messages = [{"role": "user", "content": question.strip()}]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]

    try:
        prompt("What is asthma ?")
    except (TemplateError, ValueError, TypeError):
        return None
    return prompt


def with_prompts(examples: Sequence[Example], prompts: Prompts) -> list[Example]:
    """The examples with other prompts before the very same answer tokens."""
    changed = []
    for example in examples:
        ids = np.array(prompts(example.row.question), dtype=example.input_ids.dtype)
        answer = example.input_ids[example.answer_start :]
        changed.append(replace(example, input_ids=np.concatenate([ids, answer]), answer_start=len(ids)))
    return changed
