"""The base model's own chat template: what its makers would have a question look like. A baseline of its own."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from jinja2 import TemplateError
from transformers import AutoTokenizer

from medqa.data.tokens import Example
from medqa.model.base_files import location


def own_template_prompts(base: str) -> Callable[[str], list[int]] | None:
    """From a question to the ids that the untuned base's own chat template makes of it; None where it has none.

    A template that cannot render a single user message counts as none.

    Args:
        base: a directory or a hub id. Its tokenizer is loaded anew: the one of training has training's template.
    """
    tokenizer = AutoTokenizer.from_pretrained(location(base), trust_remote_code=False)
    if not tokenizer.chat_template:
        return None

    def prompt(question: str) -> list[int]:
        message = {"role": "user", "content": question}
        return tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=True)["input_ids"]

    try:
        prompt("What is asthma ?")
    except TemplateError:
        return None
    return prompt


def with_prompts(examples: Sequence[Example], prompts: Callable[[str], list[int]]) -> list[Example]:
    """The examples with other prompts before the very same answer tokens."""
    changed = []
    for example in examples:
        ids = np.array(prompts(example.row.question), dtype=example.input_ids.dtype)
        answer = example.input_ids[example.answer_start :]
        changed.append(replace(example, input_ids=np.concatenate([ids, answer]), answer_start=len(ids)))
    return changed
