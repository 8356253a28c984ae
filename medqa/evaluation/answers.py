"""Greedy answers of base model and adapter, in batches, with the training prompt or the base's own chat template."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from medqa.data.sources import Row
from medqa.data.tokens import Example, prompt_ids, prompt_of
from medqa.errors import is_out_of_memory
from medqa.limited import Failed, limited
from medqa.limits import MAX_TEMPLATE_CHARACTERS
from medqa.model.base_files import location

SAMPLE_TOKENS = 128  # the maximum length of a sample answer


@dataclass(frozen=True)
class Answer:
    """An answer, and whether it ended with EOS or was cut off at the limit."""

    text: str
    stopped: bool


def generate_answers(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    prompts: Callable[[str], list[int]] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """The model's greedy answer to each question, in order. The model's train or eval mode is restored.

    Prompts of similar length are batched, the longest first. An answer does not depend on its batch (in float32; with
    less precision, rounding may decide between two tokens): its maximum length depends only on its own prompt, and a
    batch that runs out of memory is halved.

    Args:
        max_new_tokens: the maximum length of an answer; less where the model's context ends. If a prompt leaves no
            room, its answer is empty.
        prompts: from a question to the ids of its prompt; None: the training prompt.
        progress: called with the number of further questions that are answered.
    """
    asked = [prompts(question) if prompts else prompt_ids(question, tokenizer) for question in questions]
    longest = getattr(model.config, "max_position_embeddings", None)
    rooms = [max_new_tokens if longest is None else min(max_new_tokens, longest - len(ids)) for ids in asked]
    written: list[list[int]] = [[] for _ in asked]
    stopped = [False] * len(asked)
    waiting = sorted((i for i, room in enumerate(rooms) if room > 0), key=lambda i: len(asked[i]), reverse=True)
    batches = [waiting[start : start + batch_size] for start in range(0, len(waiting), batch_size)]
    if progress and len(waiting) < len(asked):
        progress(len(asked) - len(waiting))
    ends = end_ids(model, tokenizer)
    with plain_greedy(model):
        while batches:
            batch = batches.pop(0)
            room = min(rooms[i] - len(written[i]) for i in batch)
            try:
                found = _continue(model, tokenizer.pad_token_id, [asked[i] + written[i] for i in batch], room, ends)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(batch) == 1:
                    raise
                half = len(batch) // 2
                batches[:0] = [batch[:half], batch[half:]]
                continue
            for i, ids in zip(batch, found, strict=True):
                end = next((index for index, token in enumerate(ids) if token in ends), None)
                stopped[i] = end is not None
                written[i] += ids[:end]
            # The longest prompt may have reached the end of the context; the others are continued without it.
            unfinished = [i for i in batch if not stopped[i] and len(written[i]) < rooms[i]]
            batches[:0] = [unfinished] if unfinished else []
            if progress:
                progress(len(batch) - len(unfinished))
    texts = tokenizer.batch_decode(written, skip_special_tokens=True) if written else []
    return [Answer(text.strip(), end) for text, end in zip(texts, stopped, strict=True)]


def sample_answers(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], step: int
) -> list[list[str | int | bool]]:
    """Rows as (step, source, question, reference, baseline answer, fine-tuned answer, whether that ended by itself)."""
    questions, at_once = [row.question for row in rows], len(rows) or 1
    tuned = generate_answers(model, tokenizer, questions, max_new_tokens=SAMPLE_TOKENS, batch_size=at_once)
    with model.disable_adapter():
        base = generate_answers(model, tokenizer, questions, max_new_tokens=SAMPLE_TOKENS, batch_size=at_once)
    return [
        [step, row.source, row.question, row.answer, untuned.text, answer.text, answer.stopped]
        for row, untuned, answer in zip(rows, base, tuned, strict=True)
    ]


def end_ids(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids that end an answer: that of training, EOS, and the base model's other end-of-turn ids."""
    named = model.get_base_model().generation_config.eos_token_id
    return {
        prompt_of(tokenizer).end,
        tokenizer.eos_token_id,
        *([] if named is None else [named] if isinstance(named, int) else named),
    }


@contextlib.contextmanager
def plain_greedy(model: torch.nn.Module) -> Iterator[None]:
    """Generate greedily with default settings, in evaluation mode.

    Many base models come with a generation config, for example with a repetition penalty, which `generate` would use
    for every setting that is not passed.
    """
    base, was_training = model.get_base_model() if isinstance(model, PeftModel) else model, model.training
    own = base.generation_config
    model.eval()
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own
        model.train(was_training)


def _continue(
    model: PeftModel, pad_token_id: int, prompts: Sequence[list[int]], max_new_tokens: int, ends: set[int]
) -> list[list[int]]:
    """The ids after each prompt, up to `max_new_tokens`; after an id in `ends`, padding."""
    width = max(map(len, prompts))
    input_ids = torch.full((len(prompts), width), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):  # padding on the left, because an answer follows its prompt directly
        input_ids[row, width - len(ids) :] = torch.tensor(ids)
        attention_mask[row, width - len(ids) :] = 1
    with torch.no_grad():
        output = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=sorted(ends),
            pad_token_id=pad_token_id,
        )
    return output[:, width:].tolist()


# ----------------------------------------------------------------------------------------------------
# The base model's own chat template, which gives a second baseline.
#
# A template is a program by whoever made the base model. It may raise any exception, for some questions only, and may
# not terminate. So all questions are rendered in limited processes before anything is measured.


@dataclass(frozen=True)
class OwnTemplate:
    """The base model's own chat template: a function from a question to the ids of its prompt.

    Attributes:
        texts: each question's prompt as text. Other questions are not accepted.
        tokenizer: the base's own.
    """

    texts: Mapping[str, str]
    tokenizer: PreTrainedTokenizerBase

    def __call__(self, question: str) -> list[int]:
        """The ids of a question's prompt."""
        (ids,) = self.encode([self.texts[question]])
        return ids

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts in which the template has written special tokens, BOS included."""
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]


PROBE = "What is asthma ?"
TOGETHER = 256  # questions that are rendered in one limited process


def own_template_prompts(
    base: str,
    questions: Sequence[str],
    say: Callable[[str], None] = lambda text: None,
    once: Callable[[Callable[[], list[str] | None]], list[str] | None] = lambda render: render(),
    consequence: str = "; the baseline is measured without it",
) -> OwnTemplate | None:
    """The prompts of these questions in the base's own chat template; None if it has none.

    A template that cannot render every question as a single user message counts as missing.

    Args:
        base: a directory or a hub id. Its tokenizer is loaded again, because the loaded one has the training template.
        questions: the only questions that the result accepts.
        say: called with the reason if a template cannot be used.
        once: runs a function on one process and gives the result to all. If each process rendered, one could reach a
            limit and another not, and they would wait for each other for ever.
        consequence: added to the reason: what the caller does then.
    """
    tokenizer = AutoTokenizer.from_pretrained(location(base), trust_remote_code=False)
    if not tokenizer.chat_template:
        return None
    asked = list(dict.fromkeys([PROBE, *questions]))

    def render_all() -> list[str] | None:
        try:
            chunks = [asked[start : start + TOGETHER] for start in range(0, len(asked), TOGETHER)]
            return [text for chunk in chunks for text in _rendered(tokenizer, chunk)]
        except Failed as error:
            say(f"{base}: its own chat template cannot be used: {error}{consequence}")
            return None

    found = once(render_all)
    if found is None:
        return None
    return OwnTemplate(dict(zip(asked, found, strict=True)), tokenizer)


def _rendered(tokenizer: PreTrainedTokenizerBase, questions: Sequence[str]) -> list[str]:
    """Render each question with a tokenizer's chat template.

    Raises:
        Failed: the template raises an exception, takes too much time or memory, or does not render a prompt.
    """

    def render() -> list[str]:
        texts = []
        for question in questions:
            message = {"role": "user", "content": question}
            text = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
            text.encode()  # raises an exception for lone surrogates, which the tokenizer would not accept
            if len(text) > len(question) + MAX_TEMPLATE_CHARACTERS:
                raise ValueError(f"a prompt of {len(text):,} characters")
            texts.append(text)
        return texts

    return limited(render)


def with_prompts(examples: Sequence[Example], prompts: Callable[[str], list[int]]) -> list[Example]:
    """The examples with other prompts before the same answer tokens."""
    changed = []
    for example in examples:
        ids = np.array(prompts(example.row.question), dtype=example.input_ids.dtype)
        answer = example.input_ids[example.answer_start :]
        changed.append(replace(example, input_ids=np.concatenate([ids, answer]), answer_start=len(ids)))
    return changed
