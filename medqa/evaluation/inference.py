"""Base and adapter to answers: greedy, batched, left-padded. The prompt is training's own, id for id."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from medqa.data.sources import Row
from medqa.prompts import prompt_ids

SAMPLE_TOKENS = 128  # where a sample answer is cut


@dataclass(frozen=True)
class Answer:
    """An answer, and whether it ended by itself (with EOS) or at the limit."""

    text: str
    stopped: bool


def generate_answers(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> list[Answer]:
    """The model's greedy answer to each question. The model's mode is left as it was.

    Args:
        max_new_tokens: where an answer is cut; lower where the model's context ends before.
    """
    prompts = [prompt_ids(question, tokenizer) for question in questions]
    longest = getattr(model.config, "max_position_embeddings", None)
    was_training = model.training
    model.eval()
    answers = []
    for start in range(0, len(prompts), batch_size):
        chosen = prompts[start : start + batch_size]
        width = max(map(len, chosen))
        room = max_new_tokens if longest is None else min(max_new_tokens, longest - width)
        answers += _batch(model, tokenizer, chosen, room) if room > 0 else [Answer("", False)] * len(chosen)
    model.train(was_training)
    return answers


def sample_answers(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], step: int
) -> list[list[str | int | bool]]:
    """Each row as (step, source, question, reference, base answer, tuned answer, whether that one ended by itself)."""
    questions, at_once = [row.question for row in rows], len(rows) or 1
    tuned = generate_answers(model, tokenizer, questions, max_new_tokens=SAMPLE_TOKENS, batch_size=at_once)
    with model.disable_adapter():
        base = generate_answers(model, tokenizer, questions, max_new_tokens=SAMPLE_TOKENS, batch_size=at_once)
    return [
        [step, row.source, row.question, row.answer, untuned.text, answer.text, answer.stopped]
        for row, untuned, answer in zip(rows, base, tuned, strict=True)
    ]


def _batch(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], max_new_tokens: int
) -> list[Answer]:
    """The answers of one batch."""
    batch = tokenizer.pad({"input_ids": list(prompts)}, padding_side="left", return_tensors="pt")
    with torch.no_grad():
        output = model.generate(
            input_ids=batch["input_ids"].to(model.device),
            attention_mask=batch["attention_mask"].to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    answers = []
    for ids in output[:, batch["input_ids"].shape[1] :].tolist():
        stopped = tokenizer.eos_token_id in ids
        ids = ids[: ids.index(tokenizer.eos_token_id)] if stopped else ids
        answers.append(Answer(tokenizer.decode(ids, skip_special_tokens=True).strip(), stopped))
    return answers
