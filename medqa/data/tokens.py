"""The training prompt, and the step from rows to token ids.

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
# The one prompt. Training, evaluation, `medqa ask` and the saved chat template use it.

RESPONSE_HEADER = "### Response:\n"
TEMPLATE_PROBES = ("What is asthma ?", "(a) 5 mg?\nA. one\nB. two")


def prompt(question: str) -> str:
    """What stands before the answer. Outer whitespace of the question does not count."""
    return f"### Instruction:\n{question.strip()}\n\n{RESPONSE_HEADER}"


def prompt_ids(question: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that an answer is generated after: exactly those it followed in training, BOS first.

    A special token spelled in the question stays text.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return bos + tokenizer(prompt(question), add_special_tokens=False, split_special_tokens=True)["input_ids"]


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """A Jinja chat template whose prompt for one user message has exactly the ids of `prompt_ids`.

    After a BOS written as text some tokenizers leave out the space that they put before a first word (Llama's, in
    transformers 5), others do not; which one this is, is found by trying.

    Raises:
        UserError: neither way gives those ids.
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
    """The template. A system message has no place in the training prompt: refused, not silently sent along."""
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

CHUNK = 1000  # rows that one call of the tokenizer gets
WORTH_KEEPING = 1000  # rows whose ids are kept on disk
PROBES = 16  # rows whose ids are compared with those from the disk


@dataclass(frozen=True, slots=True)
class Example:
    """One row as ids (int32): BOS, prompt, answer, EOS. `answer_start` is the index of the answer's first token."""

    row: Row
    input_ids: np.ndarray
    answer_start: int
    truncated: bool


def tokenize(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, tokenization: Tokenization) -> list[Example]:
    """Each row as an `Example`, in the order given, but for the rows of whose answer nothing is within `max_length`.

    Those are left out: without a target of its own a row teaches nothing about answers, and an update of such rows
    would move the weights by the optimizer's momentum alone. So every example has at least one answer token.

    BOS and EOS are put in by id: a special token spelled in the text (`</s>` on a web page) stays text, and EOS is
    never cut off by accident nor there twice. A row that does not fit with its EOS is cut and has none.
    """
    texts = [(prompt(row.question), row.answer) for row in rows]
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # "</s>" in a text is text
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
    """The splits as examples, and the splits without the rows that `tokenize` leaves out.

    Raises:
        UserError: `max_length` leaves a split without rows.
    """
    examples = {name: tokenize(getattr(splits, name), tokenizer, tokenization) for name in SPLITS}
    if empty := [name for name in SPLITS if not examples[name]]:
        raise UserError(
            f"tokenization.max_length cuts off every answer of {' and '.join(empty)}: their questions alone are longer "
            f"than {tokenization.max_length} ids; raise it, or give data with shorter questions"
        )
    kept = {example.row.id for found in examples.values() for example in found}
    left_out = {row.id for name in SPLITS for row in getattr(splits, name)} - kept
    return splits.without(left_out), examples


def _tokenize(texts: Sequence[tuple[str, str]], backend: Tokenizer) -> dict[str, np.ndarray]:
    """`ids` of all texts end to end, their `lengths`, and of how many the prompt is made (`in_prompt`); all int32."""
    ids, lengths, in_prompt = [], [], []
    for start in range(0, len(texts), CHUNK):
        chunk = texts[start : start + CHUNK]
        # Without offsets, which take as long as the ids; a prompt's own ids say where the answer begins.
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
    """How many tokens end within the prompt. One that ends in the answer predicts answer text: it counts as answer."""
    offsets = backend.encode("".join(text), add_special_tokens=False).offsets
    return bisect.bisect_right(offsets, len(text[0]), key=itemgetter(1))


def _are_ids_of(texts: Sequence[tuple[str, str]], found: Mapping[str, np.ndarray], backend: Tokenizer) -> bool:
    """Whether arrays from a file can be what `_tokenize` makes of these texts; of some texts, whether they are."""
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
    """sha256 of all that the ids follow from."""
    digest = hashlib.sha256(f"1 {tokenizers.__version__} {backend.to_str()}".encode())
    for text in texts:
        digest.update(repr(text).encode())
    return digest.hexdigest()


def ids_fingerprint(examples: Mapping[str, Sequence[Example]], tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of all that a tokenizer makes of the data: two tokenizers that give the same ids are the same."""
    digest = hashlib.sha256(repr((len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)).encode())
    for name, split in sorted(examples.items()):
        for example in split:
            digest.update(f"{name} {example.answer_start} {len(example.input_ids)} ".encode())
            digest.update(example.input_ids.astype("<i4").tobytes())
    return digest.hexdigest()
