"""A tokenizer in GGUF's form: what llama.cpp needs to make the same tokens, or the reason why it would not.

llama.cpp does not read `tokenizer.json`. It has two algorithms that matter here, and a fixed list of ways to split a
text, each with a name (`tokenizer.ggml.pre`). What a tokenizer does is recognized by the steps in its `tokenizer.json`,
never by the name of a model.
"""

import heapq
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tokenizers.normalizers import NFC
from transformers import PreTrainedTokenizerBase

from medqa.data.tokens import prompt_of
from medqa.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's token types
WORD_START = "▁"
NO_SCORE = -1e9
ODD = "  two  spaces\n\n\t5 µg/ml € 漢字 🙂 naïve  "  # characters that few questions have

# ----------------------------------------------------------------------------------------------------
# How bytes with merges (GPT-2's BPE) are split into words before they are merged.

CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES
REST_WITH_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|" + SPACES
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
BEFORE_WORD = r"[^\r\n\p{L}\p{N}]?"
DIGIT = r"\p{N}"
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA_3 = rf"{CONTRACTION}|{BEFORE_WORD}\p{{L}}+|\p{{N}}{{1,3}}|{REST}"
QWEN_2 = rf"{CONTRACTION}|{BEFORE_WORD}\p{{L}}+|\p{{N}}|{REST}"
QWEN_3_5 = rf"{CONTRACTION}|{BEFORE_WORD}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{SPACES}"
CAMEL = (f"{BEFORE_WORD}{UPPER}*{LOWER}+", f"{BEFORE_WORD}{UPPER}+{LOWER}*")

# llama.cpp's name for the patterns that split a text one after the other, and for `ignore_merges` (a word that is a
# token is not built from merges). The patterns are those of `tokenizer.json`; llama.cpp has them in a form of its own.
NAMES: dict[tuple[tuple[str, ...], bool], str] = {
    ((GPT_2,), False): "gpt-2",
    ((DIGIT, GPT_2), False): "smollm",
    ((LLAMA_3,), True): "llama-bpe",
    ((LLAMA_3,), False): "smaug-bpe",
    ((QWEN_2,), False): "qwen2",
    ((QWEN_3_5,), False): "qwen35",
    ((rf"{CAMEL[0]}|{CAMEL[1]}|\p{{N}}|{REST_WITH_SLASH}",), True): "tekken",
    ((rf"{CAMEL[0]}{CONTRACTION}?|{CAMEL[1]}{CONTRACTION}?|\p{{N}}{{1,3}}|{REST_WITH_SLASH}",), False): "gpt-4o",
}


def _pre_tokenizer(described: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for the way in which a byte-level tokenizer splits a text; None if it has none."""
    before = described["pre_tokenizer"] or {}
    steps = before["pretokenizers"] if before.get("type") == "Sequence" else [before]
    patterns = []
    for step in steps:
        kind, last = step.get("type"), step is steps[-1]
        if kind == "ByteLevel" and last and not step.get("add_prefix_space"):
            patterns += [GPT_2] if step.get("use_regex", True) else []
        elif kind == "Digits" and step.get("individual_digits") and not last:
            patterns.append(DIGIT)
        elif kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert") and not last:
            patterns.append(step["pattern"].get("Regex"))
        else:
            return None
    return NAMES.get((tuple(patterns), bool(described["model"].get("ignore_merges"))))


def _is_byte_level(described: Mapping[str, Any]) -> bool:
    """Whether the last step before the merges turns a text into bytes."""
    before = described["pre_tokenizer"] or {}
    steps = before["pretokenizers"] if before.get("type") == "Sequence" else [before]
    return bool(steps) and steps[-1].get("type") == "ByteLevel"


# ----------------------------------------------------------------------------------------------------
# The vocabulary.


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary in GGUF's form.

    Attributes:
        model: `llama` (pieces with scores: SentencePiece's BPE) or `gpt2` (bytes with merges).
        pre: llama.cpp's name for the way in which a text is split before that.
        tokens: the text of each id; `kinds` and `scores` belong to them.
        merges: only for `gpt2`, in order.
        space_prefix: whether a space is put before a text (only for `llama`).
    """

    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    scores: list[float]
    merges: list[str] = field(default_factory=list)
    space_prefix: bool = False


def vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """The tokenizer's vocabulary, padded with unused tokens to the model's `size`.

    Raises:
        UserError: llama.cpp has nothing that does what the tokenizer does; the message says which part.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise _cannot(tokenizer, f"its model is {model['type']}, not BPE")
    if odd := [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]:
        raise _cannot(tokenizer, f"its model has {', '.join(odd)}")
    _check_added(tokenizer, described)
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ", 1)) for pair in model["merges"]]
    tokens, kinds = _tokens_and_kinds(tokenizer, described, size)
    if _is_byte_level(described):
        pre = _pre_tokenizer(described)
        if pre is None or _type(described["normalizer"]) not in ("nothing", "NFC"):
            raise _unknown(tokenizer, described)
        return Vocabulary("gpt2", pre, tokens, kinds, [], [f"{left} {right}" for left, right in merges])
    if not _marks_words(described) or not model["byte_fallback"]:
        raise _unknown(tokenizer, described)
    if missing := [byte for byte in range(256) if f"<0x{byte:02X}>" not in model["vocab"]]:
        raise _cannot(tokenizer, f"it has no token for {len(missing)} of the 256 bytes")
    # llama.cpp uses no merges here: it joins the neighbours whose union has the highest score. Scores that follow the
    # order of the merges make it join the same pieces, if every way to join two pieces into a third is a merge.
    rank: dict[str, int] = {}
    for left, right in merges:
        rank.setdefault(left + right, len(rank))
    kinds = [BYTE if _is_byte(text) and kind == NORMAL else kind for text, kind in zip(tokens, kinds, strict=True)]
    joined = (NORMAL, USER_DEFINED)  # Gemma's tokens for several spaces are also results of merges
    scores = [
        -float(rank[text]) if text in rank and kind in joined else NO_SCORE
        for text, kind in zip(tokens, kinds, strict=True)
    ]
    start = tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).tokens[0]
    return Vocabulary("llama", "default", tokens, kinds, scores, space_prefix=start.startswith(WORD_START))


def fit_to_prompts(tokenizer: PreTrainedTokenizerBase, found: Vocabulary, questions: Sequence[str]) -> Vocabulary:
    """The vocabulary with which llama.cpp makes the ids of training from the prompts of these questions.

    After a special token that is written as text, as in a chat template, llama.cpp puts a space before a word or not
    as it does at the start of a text; some tokenizers do not. Both settings of `space_prefix` are tried. Only pieces
    with scores are tested: a file with merges has the merges themselves.

    Raises:
        UserError: neither gives the ids, so that prompts would differ from those in training.
    """
    if found.model != "llama":
        return found
    own = prompt_of(tokenizer)
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    # A special token spelled out in a question was text in training; with a chat template every server makes a token.
    asked = [question for question in questions if not special & set(tokenizer.tokenize(question))]
    ids = {token: i for i, token in enumerate(found.tokens)}
    wrong = []
    for prefix in (found.space_prefix, not found.space_prefix):
        fitted = replace(found, space_prefix=prefix)
        other = (
            question
            for question in (*asked, ODD)
            if own.ids(question) != [*own.bos, *ids_by_score(fitted, own.text(question), own.kind == "chat", ids)]
        )
        wrong.append(next(other, None))
        if wrong[-1] is None:
            return fitted
    raise _cannot(tokenizer, f"its merges cannot be expressed as scores ({str(wrong[0])[:60]!r} gives other tokens)")


def changed_by_normalizer(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether the tokenizer first brings a text into Unicode's NFC, which llama.cpp does not, and that changes it."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    return isinstance(normalizer, NFC) and not unicodedata.is_normalized("NFC", text)


def ids_by_score(found: Vocabulary, text: str, special: bool, ids: Mapping[str, int]) -> list[int]:
    """The ids of a text as llama.cpp makes them from pieces with scores, without BOS.

    Args:
        special: whether special tokens that are written in the text become tokens.
        ids: the id of each of `found.tokens`.
    """
    kinds = (USER_DEFINED, CONTROL, UNKNOWN) if special else (USER_DEFINED,)
    whole = [token for token, kind in zip(found.tokens, found.kinds, strict=True) if kind in kinds and token in text]
    result: list[int] = []
    for part in _parts(text, sorted(whole, key=len, reverse=True)):
        result += [ids[part]] if part in whole else joined_by_score(found, part, ids)
    return result


def _parts(text: str, whole: Sequence[str]) -> Iterator[str]:
    """The text cut before and after every token of `whole`, the first of them first, without empty parts."""
    if not whole:
        yield from [text] if text else []
        return
    for part in re.split(f"({re.escape(whole[0])})", text):
        yield from [part] if part == whole[0] else _parts(part, whole[1:])


def joined_by_score(found: Vocabulary, text: str, ids: Mapping[str, int]) -> list[int]:
    """The ids of a text, without BOS: neighbours are joined by the best score, leftmost first; the rest by bytes.

    Args:
        ids: the id of each of `found.tokens`.
    """
    symbols: list[str | None] = list((" " * found.space_prefix + text).replace(" ", WORD_START))
    before, after = list(range(-1, len(symbols) - 1)), [*range(1, len(symbols)), -1]
    waiting: list[tuple[float, int, int, str]] = []

    def offer(left: int, right: int) -> None:
        if left >= 0 and right >= 0 and (joined := f"{symbols[left]}{symbols[right]}") in ids:
            heapq.heappush(waiting, (-found.scores[ids[joined]], left, right, joined))

    for i in range(1, len(symbols)):
        offer(i - 1, i)
    while waiting:
        _, left, right, joined = heapq.heappop(waiting)
        if symbols[left] is None or symbols[right] is None or f"{symbols[left]}{symbols[right]}" != joined:
            continue  # one of them has been joined to another since then
        symbols[left], symbols[right] = joined, None
        after[left] = after[right]
        if after[left] >= 0:
            before[after[left]] = left
        offer(before[left], left)
        offer(left, after[left])
    result = []
    for symbol in filter(None, symbols):
        result += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return result


def _tokens_and_kinds(
    tokenizer: PreTrainedTokenizerBase, described: dict[str, Any], size: int
) -> tuple[list[str], list[int]]:
    """The text and type of every id. No two ids have the same text, because llama.cpp refuses that."""
    vocabulary = tokenizer.get_vocab()
    known = {i: text for text, i in vocabulary.items()}
    tokens = [known.get(i, f"<unused{i}>") for i in range(size)]
    tokens = [text if i in known or text not in vocabulary else f"<unused_{i}>" for i, text in enumerate(tokens)]
    kinds = [NORMAL if i in known else UNUSED for i in range(size)]
    for added in described["added_tokens"]:
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if tokenizer.unk_token_id is not None:
        kinds[tokenizer.unk_token_id] = UNKNOWN
    return tokens, kinds


def _check_added(tokenizer: PreTrainedTokenizerBase, described: Mapping[str, Any]) -> None:
    """Refuse added tokens of the prompts that take spaces around them, or are found in whole words only.

    Raises:
        UserError: llama.cpp has no such tokens.
    """
    own = prompt_of(tokenizer)
    for added in described["added_tokens"]:
        used = not added["special"] or added["content"] in own.before + own.after
        if used and (odd := [key for key in ("lstrip", "rstrip", "single_word") if added[key]]):
            raise _cannot(tokenizer, f"its token {added['content']!r} has {', '.join(odd)}")


def _marks_words(described: dict[str, Any]) -> bool:
    """Whether the only change to a text is a mark in place of each space, and perhaps one in front."""
    normalizer, before = described["normalizer"], described["pre_tokenizer"]
    if _type(before) == "Metaspace":
        return before.get("replacement") == WORD_START and not before.get("split") and normalizer is None
    # Gemma splits at spaces, of which the normalizer has left none.
    if before is not None and not (before.get("type") == "Split" and before["pattern"] == {"String": " "}):
        return False
    steps = normalizer["normalizers"] if normalizer and normalizer.get("type") == "Sequence" else [normalizer]
    replacing = {"type": "Replace", "pattern": {"String": " "}, "content": WORD_START}
    return steps in ([replacing], [{"type": "Prepend", "prepend": WORD_START}, replacing])


def _is_byte(text: str) -> bool:
    """Whether it is a token for one byte, for example `<0x0A>`."""
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _type(part: Mapping[str, Any] | None) -> str:
    """The type of a part of `tokenizer.json`."""
    return str(part.get("type")) if part else "nothing"


def _unknown(tokenizer: PreTrainedTokenizerBase, described: Mapping[str, Any]) -> UserError:
    """The error about a way to prepare a text that llama.cpp does not have."""
    before = described["pre_tokenizer"] or {}
    parts = [described["normalizer"], *(before["pretokenizers"] if before.get("type") == "Sequence" else [before])]
    steps = [
        f"{_type(part)} {part['pattern'].get('Regex', '')[:40]}".strip() if _type(part) == "Split" else _type(part)
        for part in parts
        if part
    ]
    return _cannot(tokenizer, f"llama.cpp has no way to prepare a text like {', '.join(steps) or 'nothing'}")


def _cannot(tokenizer: PreTrainedTokenizerBase, why: str) -> UserError:
    """The error about a tokenizer that GGUF cannot express."""
    return UserError(
        f"model.base = {tokenizer.name_or_path}: its tokenizer cannot be written as GGUF: {why}; use --format merged"
    )


# ----------------------------------------------------------------------------------------------------
# The prompt.


def gguf_chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template for llama.cpp, which itself puts the space before a first word after a BOS written as text."""
    template = tokenizer.get_chat_template()
    own = prompt_of(tokenizer).kind == "instruction"
    return template.replace("{{ bos_token }} ", "{{ bos_token }}", 1) if own else template


def bos_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of the BOS that the prompt begins with, which llama.cpp adds by itself; "" if the prompt has no BOS."""
    own, bos = prompt_of(tokenizer), tokenizer.bos_token or ""
    return bos if own.bos or (bos and own.before.startswith(bos)) else ""
