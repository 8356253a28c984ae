"""The training prompt, and the tokenization of rows into examples.

Special tokens are inserted by id, and the first token of an answer is found by its position.
"""

import bisect
import hashlib
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from medqa.cache import cached
from medqa.config import Tokenization
from medqa.data.sources import Row
from medqa.data.splits import SPLITS, Splits
from medqa.errors import UserError
from medqa.limited import Failed, limited
from medqa.limits import MAX_TEMPLATE_CHARACTERS

# ----------------------------------------------------------------------------------------------------
# The training prompt, which evaluation, `medqa ask`, exports and the saved chat template use too.

RESPONSE_HEADER = "### Response:\n"
BEFORE, AFTER = "### Instruction:\n", f"\n\n{RESPONSE_HEADER}"
SINGLE = "this model was trained on single questions: only user and assistant messages"
TEMPLATE_PROBES = ("What is asthma ?", "(a) 5 mg?\nA. one\nB. two")


@dataclass(frozen=True, eq=False)
class Prompt:
    """The prompt before an answer, and the token that ends the answer.

    The prompt is the project's own or the base's chat template. A special token of the template is inserted by its id.
    A special token that is spelled out in a question or an answer stays text.

    Attributes:
        kind: `instruction` or `chat`, as in `tokenization.prompt`.
        before: the text before the question.
        after: the text between the question and the answer.
        bos: the ids before that text: one BOS, or none. A chat template has its BOS in `before`.
        end: the id that ends an answer: EOS, or the end of turn of the chat template.
        end_text: the text of `end`.
    """

    kind: str
    before: str
    after: str
    bos: tuple[int, ...]
    end: int
    end_text: str
    _encoder: Tokenizer = field(repr=False)
    # The encoder has an alias for each special token of a chat template, which no text contains. `_aliases` maps the
    # text of a special token to its alias, and `_alias_ids` the id of an alias to the id of the special token.
    _aliases: Mapping[str, str] = field(default_factory=dict, repr=False)
    _alias_ids: Mapping[int, int] = field(default_factory=dict, repr=False)

    def text(self, question: str) -> str:
        """The text before the answer. Whitespace around the question is stripped."""
        return self.before + question.strip() + self.after

    def ids(self, question: str) -> list[int]:
        """The ids after which an answer is generated: exactly those of training, including BOS."""
        (ids,) = self.encode([self.aliased(question)])
        return [*self.bos, *ids]

    def aliased(self, question: str) -> str:
        """The text before the answer as `encode` takes it: aliases replace the special tokens of the template."""
        return self._with_aliases(self.before) + question.strip() + self._with_aliases(self.after)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids, without `bos`, of texts that begin with the result of `aliased`."""
        encoder = self.encoder()
        found = encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        if not self._alias_ids:
            return [each.ids for each in found]
        return [[self._alias_ids.get(token, token) for token in each.ids] for each in found]

    def encoder(self) -> Tokenizer:
        """The tokenizer for `aliased` texts, set so that a special token spelled out in a text stays text."""
        self._encoder.no_truncation()
        self._encoder.no_padding()
        self._encoder.encode_special_tokens = True
        return self._encoder

    def real_ids(self, ids: np.ndarray) -> np.ndarray:
        """The ids of `encoder`, with the ids of aliases replaced by those of the special tokens."""
        for alias, token in self._alias_ids.items():
            ids = np.where(ids == alias, np.int32(token), ids)
        return ids

    def _with_aliases(self, text: str) -> str:
        """A part of the template with aliases instead of special tokens."""
        return _any_of(self._aliases).sub(lambda found: self._aliases[found[0]], text) if self._aliases else text


def prompt(question: str) -> str:
    """The text of the project's own prompt (`tokenization.prompt: instruction`).

    Whitespace around the question is stripped.
    """
    return BEFORE + question.strip() + AFTER


def prompt_ids(question: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids after which an answer is generated, with the prompt of this tokenizer."""
    return prompt_of(tokenizer).ids(question)


def prompt_of(tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """The prompt that `set_prompt` gave to a tokenizer; the project's own prompt if there is none."""
    found = vars(tokenizer).get("medqa_prompt")
    return found if isinstance(found, Prompt) else _instruction_prompt(tokenizer, "tokenizer")


def set_prompt(tokenizer: PreTrainedTokenizerBase, kind: str = "instruction", bos: str = "tokenizer") -> None:
    """Give a tokenizer its prompt and the chat template of that prompt. No other change to the tokenizer may follow.

    With `instruction` the chat template renders the project's own prompt. With the base's own template (TinyLlama's
    says `<|user|>`) servers would send a prompt that was not trained. With `chat` the base's own template stays.

    Args:
        kind: as in `tokenization.prompt`.
        bos: `tokenizer`: the prompt has a BOS if the base's tokenizer adds one to a text. `always`: the prompt has a
            BOS if the tokenizer has a BOS token; this was the rule before `tokenization.prompt` existed.

    Raises:
        UserError: the prompt cannot be expressed as a chat template, or the base's template cannot be used.
    """
    if kind == "chat":
        vars(tokenizer)["medqa_prompt"] = _chat_prompt(tokenizer)
    else:
        vars(tokenizer)["medqa_prompt"] = _instruction_prompt(tokenizer, bos)
        tokenizer.chat_template = chat_template(tokenizer)


def _instruction_prompt(tokenizer: PreTrainedTokenizerBase, rule: str) -> Prompt:
    """The project's own prompt, with a BOS by this rule of `set_prompt`."""
    bos = tokenizer.bos_token_id
    has_bos = bos is not None and (rule == "always" or tokenizer("x")["input_ids"][:1] == [bos])
    return Prompt(
        "instruction",
        BEFORE,
        AFTER,
        (bos,) if has_bos else (),
        tokenizer.eos_token_id,
        tokenizer.eos_token,
        tokenizer.backend_tokenizer,
    )


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """A Jinja chat template that renders a single user message with exactly the ids of the project's own prompt.

    After a BOS that is written as text, some tokenizers omit the space that they put before a first word (Llama's, in
    transformers 5), others do not. Both variants are tried.

    Raises:
        UserError: neither variant gives those ids.
    """
    own = prompt_of(tokenizer)
    for space in ("", " "):
        template = _template("{{ bos_token }}" + space if own.bos else "")
        if all(_templated_ids(tokenizer, template, probe) == own.ids(probe) for probe in TEMPLATE_PROBES):
            return template
    raise UserError(
        f"model.base = {tokenizer.name_or_path}: its tokenizer cannot express the training prompt as a chat template; "
        "choose another --model"
    )


def _template(start: str) -> str:
    """The template. It refuses a system message, because the training prompt has none."""
    return (
        start
        + "{% for message in messages %}"
        + "{% if message['role'] == 'user' %}"
        + f"{{{{ {BEFORE!r} + message['content'] | trim + {AFTER!r} }}}}"
        + "{% elif message['role'] == 'assistant' %}"
        + "{{ message['content'] | trim + eos_token }}"
        + "{% else %}"
        + f"{{{{ raise_exception({SINGLE!r}) }}}}"
        + "{% endif %}{% endfor %}"
    )


def prompt_saved_as(template: str) -> tuple[str, str]:
    """The arguments of `set_prompt` for a saved adapter, from the chat template that was saved with it."""
    if SINGLE not in template:
        return "chat", "tokenizer"
    return "instruction", "always" if "bos_token" in template else "tokenizer"


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
# The base's own chat template as the prompt.
#
# A template is a program by the makers of the base model. It runs a few times, in a limited process: on probes, to find
# the text around a question, and on some rows of the data, to compare the ids of training with the template's.

CHAT_PROBES = (
    ("Qx7vZk", "Wy4nJp."),  # words that no template contains, so the text around them is the prompt
    ("What is asthma ?", "A disease of the airways."),
    ("(a) 5 mg?\n\nA. one  two\n\tB. <b>&amp;</b> 'x' \"y\" \\", "(b) {{ 5 }} {% raw %} [x] | 3\n\n- \\n 'a' &lt;"),
    ("é à 漢字 👩🏾\u200d⚕️", "€ naïve 漢字 🙂"),
    ("1", "2"),
    ("system: ignore {question} {{ messages }}", "user: assistant"),
)
INSTEAD = "use --set tokenization.prompt=instruction"
VERIFIED = 16  # the number of rows whose ids are compared with the template's
ODD_CHARACTERS = re.compile(r"[<>{}\[\]|]")  # characters that templates may look for in a message


class _Unusable(Exception):
    """The reason why a chat template cannot be the training prompt."""


@dataclass(frozen=True)
class _Turn:
    """The texts and ids of a chat template for a question, and for the question with its answer.

    `bare` is the text of the question without the generation prompt.
    """

    asked: str
    bare: str
    answered: str
    asked_ids: list[int]
    answered_ids: list[int]


def _chat_prompt(tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Find the prompt of the tokenizer's own chat template.

    Raises:
        UserError: the tokenizer has no chat template, or its template cannot be the training prompt.
    """
    base = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise UserError(f"model.base = {base}: tokenization.prompt = chat, but it has no chat template; {INSTEAD}")
    try:
        turns = _turns(tokenizer, CHAT_PROBES)
        found = _prompt_around(tokenizer, turns[0])
        for probe, turn in zip(CHAT_PROBES, turns, strict=True):
            _check_turn(found, turn, *probe)
    except (Failed, _Unusable) as error:
        raise _cannot_be_prompt(base, error) from error
    return found


def _cannot_be_prompt(base: str, why: Exception) -> UserError:
    """The error message for a chat template that cannot be the training prompt."""
    return UserError(f"model.base = {base}: its chat template cannot be the training prompt: {why}; {INSTEAD}")


def _turns(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]) -> list[_Turn]:
    """Apply the tokenizer's chat template to questions and their answers, in a limited process.

    Raises:
        Failed: the template raises an exception, takes too long or too much memory, or does not give a prompt.
    """
    if "strftime_now" in str(tokenizer.chat_template):
        raise Failed("its text depends on the date")

    def work() -> list[list[Any]]:
        return [_one_turn(tokenizer, question, answer) for question, answer in pairs]

    return [_Turn(*turn) for turn in limited(work)]


def _one_turn(tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> list[Any]:
    """The fields of a `_Turn`."""
    asked = [{"role": "user", "content": question}]
    answered = [*asked, {"role": "assistant", "content": answer}]
    texts = [
        tokenizer.apply_chat_template(messages, add_generation_prompt=generation, tokenize=False)
        for messages, generation in ((asked, True), (asked, False), (answered, False))
    ]
    for text in texts:
        text.encode()  # raises an exception for lone surrogates, which the tokenizer does not accept
        if len(text) > len(question) + len(answer) + MAX_TEMPLATE_CHARACTERS:
            raise ValueError(f"a prompt of {len(text):,} characters")
    ids = [
        tokenizer.apply_chat_template(messages, add_generation_prompt=generation, tokenize=True, return_dict=True)
        for messages, generation in ((asked, True), (answered, False))
    ]
    return [*texts, *(list(each["input_ids"]) for each in ids)]


def _prompt_around(tokenizer: PreTrainedTokenizerBase, turn: _Turn) -> Prompt:
    """Find the prompt from the template's result for the first probe.

    Raises:
        _Unusable: the result does not consist of a prompt, the answer and an end of turn.
    """
    question, answer = CHAT_PROBES[0]
    before, found, after = turn.asked.partition(question)
    if not found or question in after:
        raise _Unusable("it does not contain the question once")
    if turn.asked == turn.bare:
        raise _Unusable("it has no generation prompt")
    if not turn.answered.startswith(turn.asked + answer):
        raise _Unusable("it does not put the unchanged answer right after its generation prompt")
    special = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    rest = turn.answered[len(turn.asked) + len(answer) :]
    end = _any_of(special).match(rest) if special else None
    if end is None:
        raise _Unusable("no special token ends the answer")
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    largest, nonce = max(encoder.get_vocab().values()), secrets.token_hex(8)
    aliases: dict[str, str] = {}
    for number, token in enumerate(dict.fromkeys(_any_of(special).findall(before + after))):
        aliases[token] = f"x{nonce}{number:04}"
        like = tokenizer.added_tokens_decoder[special[token]]
        flags = {name: getattr(like, name) for name in ("single_word", "lstrip", "rstrip", "normalized")}
        encoder.add_tokens([AddedToken(aliases[token], special=False, **flags)])
    vocabulary = encoder.get_vocab()
    alias_ids = {vocabulary[alias]: special[token] for token, alias in aliases.items()}
    if alias_ids and min(alias_ids) <= largest:
        raise _Unusable("no tokens can be added to its tokenizer")
    return Prompt("chat", before, after, (), special[end[0]], end[0], encoder, aliases, alias_ids)


def _check_turn(found: Prompt, turn: _Turn, question: str, answer: str) -> None:
    """Compare the template's result for a question and its answer with the prompt.

    Args:
        question: without outer whitespace.
        answer: without outer whitespace.

    Raises:
        _Unusable: they differ.
    """
    shown = repr(question[:60])
    if turn.asked != found.text(question):
        raise _Unusable(f"it changes the text of a question ({shown})")
    if turn.asked == turn.bare:
        raise _Unusable(f"it has no generation prompt ({shown})")
    if not turn.answered.startswith(found.text(question) + answer + found.end_text):
        raise _Unusable(f"it changes the text of an answer ({answer[:60]!r})")
    asked, whole = found.encode([found.aliased(question), found.aliased(question) + answer])
    if turn.asked_ids != asked or turn.answered_ids[: len(whole) + 1] != [*whole, found.end]:
        raise _Unusable(f"its token ids differ from those of its parts ({shown})")


def _check_rows(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> None:
    """Compare the ids of some rows in training with those of the base's chat template.

    Half of them are rows with characters that templates may look for, if there are any. Rows that spell out a special
    token are not compared, because it is text in training and a token in the template.

    Raises:
        UserError: the ids differ.
    """
    found = prompt_of(tokenizer)
    spelled = _any_of([str(token) for token in tokenizer.added_tokens_decoder.values() if token.special])
    pairs = [(row.question.strip(), row.answer.strip()) for row in rows]
    pairs = [(question, answer) for question, answer in pairs if answer and not spelled.search(question + answer)]
    odd = [pair for pair in pairs if ODD_CHARACTERS.search("".join(pair))]
    chosen = [each for some in (odd, pairs) for each in some[:: -(-len(some) // (VERIFIED // 2)) or 1]]
    try:
        for pair, turn in zip(chosen, _turns(tokenizer, chosen) if chosen else [], strict=True):
            _check_turn(found, turn, *pair)
    except (Failed, _Unusable) as error:
        raise _cannot_be_prompt(tokenizer.name_or_path, error) from error


def _any_of(words: Mapping[str, Any] | Sequence[str]) -> re.Pattern[str]:
    """A pattern that matches any of these words, the longest one first."""
    return re.compile("|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)))


# ----------------------------------------------------------------------------------------------------
# Token ids.

CHUNK = 1000  # rows that are tokenized in one call
WORTH_KEEPING = 1000  # from so many rows on, the ids are cached on disk
PROBES = 16  # rows whose cached ids are verified


@dataclass(frozen=True, slots=True)
class Example:
    """A tokenized row: the ids (int32) of BOS, prompt, answer, and EOS or the end of turn.

    `answer_start` is the index of the first answer token.
    """

    row: Row
    input_ids: np.ndarray
    answer_start: int
    truncated: bool


def tokenize(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, tokenization: Tokenization) -> list[Example]:
    """Tokenize the rows in order, without those that have no answer token within `max_length`.

    Those rows are dropped: a row without a target of its own teaches nothing about answers, and an update of such rows
    would move the weights by the optimizer's momentum alone. So every example has at least one answer token.

    BOS and EOS (the end of turn with `tokenization.prompt: chat`) are inserted by id: a special token spelled out in
    the text (`</s>` on a web page) stays text, and EOS is never cut off by accident or repeated. A row that does not
    fit with its EOS is truncated and has no EOS.
    """
    own = prompt_of(tokenizer)
    texts = [(own.aliased(row.question), row.answer) for row in rows]
    encoder = own.encoder()
    if len(rows) < WORTH_KEEPING:
        made = _tokenize(texts, encoder)
    else:
        key = _key(own, [(row.question, row.answer) for row in rows], tokenizer.backend_tokenizer)
        made = cached(key, lambda: _tokenize(texts, encoder), lambda found: _are_ids_of(texts, found, encoder))
    bos, eos = list(own.bos), [own.end] if tokenization.append_eos else []
    ids, ends = own.real_ids(made["ids"]), made["lengths"].cumsum()
    examples = []
    for row, start, end, in_prompt in zip(rows, ends - made["lengths"], ends, made["in_prompt"].tolist(), strict=True):
        whole = np.concatenate([bos, ids[start:end], eos]).astype(np.int32)
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
        UserError: `max_length` leaves a split without rows, or the base's chat template gives other ids.
    """
    if prompt_of(tokenizer).kind == "chat":
        _check_rows([row for name in SPLITS for row in getattr(splits, name)], tokenizer)
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


def _key(own: Prompt, texts: Sequence[tuple[str, str]], backend: Tokenizer) -> str:
    """SHA-256 of everything that determines the ids."""
    digest = hashlib.sha256(f"2 {tokenizers.__version__} {backend.to_str()}".encode())
    digest.update(repr((own.kind, own.before, own.after)).encode())
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
