"""A tokenizer as GGUF has it: pieces with scores (SentencePiece's kind of BPE), or bytes with merges (GPT-2's kind).

llama.cpp knows neither the merges of the first kind nor its `tokenizer.json`: it joins the neighbours whose union has
the highest score. From the order of the merges follow scores that have it join the same ones, if every way to join
two pieces into a third is a merge. Whether that is so, `joined_by_score` tells on real prompts.
"""

import heapq
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from medqa.errors import UserError
from medqa.prompts import prompt

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's kinds of token
WORD_START = "▁"
NO_SCORE = -1e9
ODD = "  two  spaces\n\n\t5 µg/ml € 漢字 🙂 naïve  "  # what few questions have


@dataclass(frozen=True)
class Vocabulary:
    """What goes into the file.

    Attributes:
        model: `llama` (pieces with scores) or `gpt2` (bytes with merges).
        tokens: text of each id; `kinds` and `scores` go with it.
        merges: of `gpt2` only, in order.
        space_prefix: a space is put before text (of `llama` only).
    """

    model: str
    tokens: list[str]
    kinds: list[int]
    scores: list[float]
    merges: list[str] = field(default_factory=list)
    space_prefix: bool = False


def vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """The tokenizer's vocabulary, padded with unused tokens up to `size`, the model's.

    Raises:
        UserError: of a kind that GGUF has no word for; says which part of it.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise _cannot(tokenizer, f"its model is {model['type']}, not BPE")
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ", 1)) for pair in model["merges"]]
    tokens, kinds = _tokens_and_kinds(tokenizer, described, size)
    if _is_byte_level(described):
        return Vocabulary("gpt2", tokens, kinds, [], [f"{left} {right}" for left, right in merges])
    if not model["byte_fallback"] or not _marks_words(described):
        what = (described["pre_tokenizer"] or described["normalizer"] or {}).get("type", "nothing")
        raise _cannot(tokenizer, f"its text is prepared by {what}, in a way that llama.cpp is not known to have")
    rank: dict[str, int] = {}
    for left, right in merges:
        rank.setdefault(left + right, len(rank))
    kinds = [BYTE if _is_byte(text) and kind == NORMAL else kind for text, kind in zip(tokens, kinds, strict=True)]
    scores = [-float(rank[text]) if text in rank else NO_SCORE for text in tokens]
    scores = [score if kind == NORMAL else 0.0 for score, kind in zip(scores, kinds, strict=True)]
    start = tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).tokens[0]
    return Vocabulary("llama", tokens, kinds, scores, space_prefix=start.startswith(WORD_START))


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, found: Vocabulary, questions: list[str]) -> None:
    """Tokenize prompts by the written scores, as llama.cpp does, and compare.

    Raises:
        UserError: they give other ids than the tokenizer: the export would send prompts it was not trained on.
    """
    if found.model != "llama":
        return  # the merges themselves are in the file
    ids = {token: i for i, token in enumerate(found.tokens)}
    for question in (*questions, ODD):
        text = prompt(question)
        if (
            joined_by_score(found, text, ids)
            != tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        ):
            raise _cannot(tokenizer, f"its merges cannot be told by scores ({question[:60]!r} gives other tokens)")


def joined_by_score(found: Vocabulary, text: str, ids: Mapping[str, int]) -> list[int]:
    """The ids of a text, without BOS: neighbours joined by the best score, leftmost first; what is left, by bytes.

    Args:
        ids: of each of `found.tokens`.
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
            continue  # one of them has been joined to another since
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


def gguf_chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template for llama.cpp, which puts the space before a first word after a BOS written as text, too."""
    return tokenizer.chat_template.replace("{{ bos_token }} ", "{{ bos_token }}", 1)


def _tokens_and_kinds(
    tokenizer: PreTrainedTokenizerBase, described: dict[str, Any], size: int
) -> tuple[list[str], list[int]]:
    """Text and kind of every id."""
    known = {i: text for text, i in tokenizer.get_vocab().items()}
    tokens = [known.get(i, f"<unused{i}>") for i in range(size)]
    kinds = [NORMAL if i in known else UNUSED for i in range(size)]
    for added in described["added_tokens"]:
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if tokenizer.unk_token_id is not None:
        kinds[tokenizer.unk_token_id] = UNKNOWN
    return tokens, kinds


def _is_byte_level(described: dict[str, Any]) -> bool:
    """Whether text is split by GPT-2's pattern and no other, and then by bytes."""
    before = described["pre_tokenizer"] or {}
    plain = before.get("use_regex") and not before.get("add_prefix_space")
    return before.get("type") == "ByteLevel" and bool(plain) and described["normalizer"] is None


def _marks_words(described: dict[str, Any]) -> bool:
    """Whether all that is done to a text is a mark in place of each space, and perhaps one in front."""
    normalizer, before = described["normalizer"], described["pre_tokenizer"]
    if before is not None:
        metaspace = before.get("type") == "Metaspace" and before.get("replacement") == WORD_START
        return metaspace and not before.get("split") and normalizer is None
    steps = normalizer["normalizers"] if normalizer and normalizer.get("type") == "Sequence" else [normalizer]
    replacing = {"type": "Replace", "pattern": {"String": " "}, "content": WORD_START}
    return steps in ([replacing], [{"type": "Prepend", "prepend": WORD_START}, replacing])


def _is_byte(text: str) -> bool:
    """Whether it is a token for one byte, `<0x0A>` say."""
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _cannot(tokenizer: PreTrainedTokenizerBase, why: str) -> UserError:
    """What the user is told of a tokenizer that GGUF cannot express."""
    return UserError(
        f"model.base = {tokenizer.name_or_path}: its tokenizer cannot be written as GGUF: {why}; use --format merged"
    )
