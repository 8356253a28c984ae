"""The training prompt, and the tokenization of rows into examples.

Special tokens are inserted by id, and the first token of an answer is found by its position.
"""

import bisect
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
import tokenizers
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from medqa.cache import cached
from medqa.config import Tokenization
from medqa.data.sources import Row
from medqa.data.splits import SPLITS, Splits
from medqa.errors import UserError

# ----------------------------------------------------------------------------------------------------
# The training prompt, which evaluation, `medqa ask` and the saved chat template use too.

RESPONSE_HEADER = "### Response:\n"
TEMPLATE_PROBES = ("What is asthma ?", "(a) 5 mg?\nA. one\nB. two")


def prompt(question: str) -> str:
    """The text before the answer. Whitespace around the question is stripped."""
    return f"### Instruction:\n{question.strip()}\n\n{RESPONSE_HEADER}"


def prompt_ids(question: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids after which an answer is generated: the same as in training, BOS first.

    A special token that is spelled out in the question stays text.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return bos + tokenizer(prompt(question), add_special_tokens=False, split_special_tokens=True)["input_ids"]


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """A Jinja chat template that renders a single user message with exactly the ids of `prompt_ids`.

    After a BOS that is written as text, some tokenizers omit the space that they put before a first word (Llama's, in
    transformers 5), others do not. Both variants are tried.

    Raises:
        UserError: neither variant gives those ids.
    """
    for space in ("", " "):
        template = _template("{{ bos_token }}" + space if tokenizer.bos_token_id is not None else "")
        if all(_templated_ids(tokenizer, template, probe) == prompt_ids(probe, tokenizer) for probe in TEMPLATE_PROBES):
            return template
    raise UserError(
        f"model.base = {tokenizer.name_or_path}: its tokenizer cannot express the training prompt as a chat template; "
        "choose another --model"
    )


def _template(start: str) -> str:
    """The template. It refuses a system message, because the training prompt has none."""
    question, response = prompt("\0").split("\0")
    return (
        start
        + "{% for message in messages %}"
        + "{% if message['role'] == 'user' %}"
        + f"{{{{ {question!r} + message['content'] | trim + {response!r} }}}}"
        + "{% elif message['role'] == 'assistant' %}"
        + "{{ message['content'] | trim + eos_token }}"
        + "{% else %}"
        + "{{ raise_exception('this model was trained on single questions: only user and assistant messages') }}"
        + "{% endif %}{% endfor %}"
    )


def _templated_ids(tokenizer: PreTrainedTokenizerBase, template: str, question: str) -> list[int]:
    """The ids that a server gets from the template for one question."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        chat_template=template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )["input_ids"]


# ----------------------------------------------------------------------------------------------------
# Token ids.

CHUNK = 1000  # rows that are tokenized in one call
WORTH_KEEPING = 1000  # from so many rows on, the ids are cached on disk
PROBES = 16  # rows whose cached ids are verified


@dataclass(frozen=True, slots=True)
class Example:
    """A tokenized row: ids (int32) of BOS, prompt, answer, EOS. `answer_start`: index of the first answer token."""

    row: Row
    input_ids: np.ndarray
    answer_start: int
    truncated: bool


def tokenize(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, tokenization: Tokenization) -> list[Example]:
    """Tokenize the rows in order, without those that have no answer token within `max_length`.

    Those rows are dropped: a row without a target of its own teaches nothing about answers, and an update of such rows
    would move the weights by the optimizer's momentum alone. So every example has at least one answer token.

    BOS and EOS are inserted by id: a special token spelled out in the text (`</s>` on a web page) stays text, and EOS
    is never cut off by accident or repeated. A row that does not fit with its EOS is truncated and has no EOS.
    """
    texts = [(prompt(row.question), row.answer) for row in rows]
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # a "</s>" in a text stays text
    if len(rows) < WORTH_KEEPING:
        made = _tokenize(texts, backend)
    else:
        made = cached(
            _key(texts, backend), lambda: _tokenize(texts, backend), lambda found: _are_ids_of(texts, found, backend)
        )
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    eos = [tokenizer.eos_token_id] if tokenization.append_eos else []
    ends = made["lengths"].cumsum()
    examples = []
    for row, start, end, in_prompt in zip(rows, ends - made["lengths"], ends, made["in_prompt"].tolist(), strict=True):
        whole = np.concatenate([bos, made["ids"][start:end], eos]).astype(np.int32)
        fits = len(whole) <= tokenization.max_length
        cut = whole if fits else whole[: len(whole) - len(eos)][: tokenization.max_length]
        answer_start = len(bos) + in_prompt
        if answer_start < len(cut):
            examples.append(Example(row, cut, answer_start, not fits))
    return examples


def tokenize_splits(
    splits: Splits, tokenizer: PreTrainedTokenizerBase, tokenization: Tokenization
) -> tuple[Splits, dict[str, list[Example]]]:
    """Tokenize the splits; returns the splits without the dropped rows, and the examples of each.

    Raises:
        UserError: `max_length` leaves a split without rows.
    """
    examples = {name: tokenize(getattr(splits, name), tokenizer, tokenization) for name in SPLITS}
    if empty := [name for name in SPLITS if not examples[name]]:
        raise UserError(
            f"tokenization.max_length = {tokenization.max_length} leaves no row in {' and '.join(empty)}, because the "
            "questions alone are that long; set a larger value, or give data with shorter questions"
        )
    kept = {example.row.id for found in examples.values() for example in found}
    left_out = {row.id for name in SPLITS for row in getattr(splits, name)} - kept
    return splits.without(left_out), examples


def _tokenize(texts: Sequence[tuple[str, str]], backend: Tokenizer) -> dict[str, np.ndarray]:
    """`ids` of all texts concatenated, their `lengths`, and the number of prompt tokens (`in_prompt`); all int32."""
    ids, lengths, in_prompt = [], [], []
    for start in range(0, len(texts), CHUNK):
        chunk = texts[start : start + CHUNK]
        # Without offsets, which take as long as the ids. The ids of the prompt alone tell where the answer begins.
        encoded = [each.ids for each in backend.encode_batch_fast([p + a for p, a in chunk], add_special_tokens=False)]
        prompts = [each.ids for each in backend.encode_batch_fast([p for p, _ in chunk], add_special_tokens=False)]
        for text, whole, head in zip(chunk, encoded, prompts, strict=True):
            ids.append(np.array(whole, dtype=np.int32))
            lengths.append(len(whole))
            in_prompt.append(len(head) if whole[: len(head)] == head else _tokens_in_prompt(text, backend))
    return {
        "ids": np.concatenate(ids or [np.empty(0, dtype=np.int32)]),
        "lengths": np.array(lengths, dtype=np.int32),
        "in_prompt": np.array(in_prompt, dtype=np.int32),
    }


def _tokens_in_prompt(text: tuple[str, str], backend: Tokenizer) -> int:
    """The number of tokens that end within the prompt. A token that reaches into the answer counts as answer."""
    offsets = backend.encode("".join(text), add_special_tokens=False).offsets
    return bisect.bisect_right(offsets, len(text[0]), key=itemgetter(1))


def _are_ids_of(texts: Sequence[tuple[str, str]], found: Mapping[str, np.ndarray], backend: Tokenizer) -> bool:
    """Whether cached arrays can be the result of `_tokenize` for these texts; a few texts are tokenized to compare."""
    if found.keys() != {"ids", "lengths", "in_prompt"}:
        return False
    if any(array.dtype != np.int32 or array.ndim != 1 for array in found.values()):
        return False
    ids, lengths, in_prompt = found["ids"], found["lengths"], found["in_prompt"]
    if not len(texts) == len(lengths) == len(in_prompt) or (lengths < 0).any() or lengths.sum() != len(ids):
        return False
    if (in_prompt < 0).any() or (in_prompt > lengths).any():
        return False
    if len(ids) and not 0 <= ids.min() <= ids.max() <= max(backend.get_vocab().values()):
        return False
    chosen, ends = range(0, len(texts), -(-len(texts) // PROBES)), lengths.cumsum()
    probes = backend.encode_batch_fast(["".join(texts[i]) for i in chosen], add_special_tokens=False)
    return all(
        probe.ids == ids[ends[i] - lengths[i] : ends[i]].tolist() for i, probe in zip(chosen, probes, strict=True)
    )


def _key(texts: Sequence[tuple[str, str]], backend: Tokenizer) -> str:
    """SHA-256 of everything that determines the ids."""
    digest = hashlib.sha256(f"1 {tokenizers.__version__} {backend.to_str()}".encode())
    for text in texts:
        digest.update(repr(text).encode())
    return digest.hexdigest()


def ids_fingerprint(examples: Mapping[str, Sequence[Example]], tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the tokenized data: two tokenizers that give the same ids have the same fingerprint."""
    digest = hashlib.sha256(repr((len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)).encode())
    for name, split in sorted(examples.items()):
        for example in split:
            digest.update(f"{name} {example.answer_start} {len(example.input_ids)} ".encode())
            digest.update(example.input_ids.astype("<i4").tobytes())
    return digest.hexdigest()
