"""Split rows into train, validation and test, and measure what the splits share.

Medical question-answer datasets repeat themselves: a random split puts the question or the answer of about a fifth of
the held-out rows into training as well, and so measures memorization. `grouped` prevents that; `topic` also separates
topics.
"""

import csv
import hashlib
import io
import json
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medqa.config import Data
from medqa.data.sources import Row, Source
from medqa.errors import UserError
from medqa.files import write_file

SPLITS = ("train", "validation", "test")
HELD_OUT = ("validation", "test")
NGRAM = 13  # words; the usual length in contamination studies since GPT-3's
POWERS = np.uint64(0x9E3779B97F4A7C15) ** np.arange(NGRAM, dtype=np.uint64)  # of an odd number, modulo 2^64

# Variation selectors only change how the character before them is drawn, so they are ignored in comparisons.
SELECTORS = frozenset(map(chr, (*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0))))

# A group with more than this share of a held-out split is assigned to train, so that no single templated answer
# dominates the split (377 rows of MedQuAD are connected by "inherited in an autosomal recessive manner"). If that share
# of a small split is less than GIANT_ROWS, groups of up to GIANT_ROWS rows may be held out. If a source has so few
# groups that a held-out split would be filled by less than LEAST_FILLED, larger groups may be held out too.
GIANT_SHARE = 0.05
GIANT_ROWS = 10
LEAST_FILLED = 0.5


@dataclass(frozen=True, slots=True)
class Splits:
    """The rows of each split, in the order of the sources."""

    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    test: tuple[Row, ...]
    groups: dict[str, str]  # row id -> id of the first row of its group, for all rows in order
    fingerprint: str  # SHA-256 of ids, questions, answers and splits
    beyond: tuple[Row, ...] = ()  # rows in no split, because no token of the answer is within `max_length`

    def without(self, left_out: Collection[str]) -> "Splits":
        """The same splits without the rows with these ids, which have no answer token within `max_length`.

        The fingerprint stays that of all rows, because the rows and the tokenizer determine which rows are dropped.
        """
        parts = {name: tuple(row for row in getattr(self, name) if row.id not in left_out) for name in SPLITS}
        beyond = tuple(row for name in SPLITS for row in getattr(self, name) if row.id in left_out)
        groups = {row: group for row, group in self.groups.items() if row not in left_out}
        return Splits(**parts, groups=groups, fingerprint=self.fingerprint, beyond=self.beyond + beyond)


def split_sources(sources: Sequence[Source], data: Data) -> Splits:
    """Split the rows of these sources as the experiment's `data` section says (`split_rows`)."""
    rows = [row for source in sources for row in source.rows]
    duplicates = [row for source in sources for row in source.duplicates]
    train, validation, test = data.fractions
    return split_rows(rows, data.split, data.split_seed, (train, validation, test), duplicates)


def split_rows(
    rows: Sequence[Row],
    method: str,
    seed: int,
    fractions: tuple[float, float, float],
    duplicates: Sequence[Row] = (),
) -> Splits:
    """Split `rows` into train, validation and test with the given shares, the same for each source.

    `grouped`: rows that share a question, an answer, or a group of one source (directly or through other rows; see
    `letters_and_digits`) are in the same split. `topic`: also rows that share a topic. `random`: each row by itself;
    `groups` is then that of `grouped`. The result depends only on the rows and the seed: rows are ordered by a hash of
    seed and id, so platform, library versions and unrelated sources have no influence.

    Args:
        duplicates: dropped rows that equal one of `rows`; that row also belongs to their groups and topics.

    Raises UserError if a split would be empty.
    """
    groups = _groups(rows, duplicates, topics=method == "topic")
    units = {row.id: row.id for row in rows} if method == "random" else groups
    members: dict[str, list[Row]] = {}
    for row in rows:
        members.setdefault(units[row.id], []).append(row)

    sizes: dict[str, dict[str, int]] = {}  # source -> unit -> rows
    for unit, found in members.items():
        sizes.setdefault(found[0].source, {})[unit] = len(found)
    split_of: dict[str, str] = {}  # unit -> split
    for of_source in sizes.values():
        split_of |= _assign(of_source, seed, fractions)
    parts = {name: tuple(row for row in rows if split_of[units[row.id]] == name) for name in SPLITS}
    _refuse_empty(parts, members, fractions)
    return Splits(**parts, groups=groups, fingerprint=_fingerprint(parts))


def _assign(sizes: dict[str, int], seed: int, fractions: tuple[float, float, float]) -> dict[str, str]:
    """Assign a split to each unit of one source, given their numbers of rows: first the held-out splits, then train."""
    total = sum(sizes.values())
    wanted = {name: round(total * fraction) for name, fraction in zip(HELD_OUT, fractions[1:], strict=True)}
    giant = max(GIANT_SHARE * min(wanted.values()), GIANT_ROWS)
    order = sorted(sizes, key=lambda unit: hashlib.sha256(f"{seed}:{unit}".encode()).digest())
    while True:
        room, chosen = dict(wanted), {}
        for unit in order:
            fits = (name for name in HELD_OUT if sizes[unit] <= min(room[name], giant))
            chosen[unit] = next(fits, "train")
            if chosen[unit] != "train":
                room[chosen[unit]] -= sizes[unit]
        filled = all(room[name] <= (1 - LEAST_FILLED) * wanted[name] for name in HELD_OUT)
        if filled or giant >= max(wanted.values()):
            return chosen
        giant *= 2


def _groups(rows: Sequence[Row], duplicates: Sequence[Row], topics: bool) -> dict[str, str]:
    """Row id to the id of the first connected row: by question, answer, group and (with `topics`) topic."""
    from networkx.utils import UnionFind

    connected: UnionFind = UnionFind()
    questions = [("question", letters_and_digits(row.question)) for row in [*rows, *duplicates]]
    for row, question in zip([*rows, *duplicates], questions, strict=True):
        connected.union(question, ("answer", letters_and_digits(row.answer)))
        if row.group:
            connected.union(question, ("group", row.source, row.group))
        if topics and row.topic:
            connected.union(question, ("topic", letters_and_digits(row.topic)))
    first: dict[object, str] = {}
    return {
        row.id: first.setdefault(connected[question], row.id)
        for row, question in zip(rows, questions[: len(rows)], strict=True)
    }


def letters_and_digits(text: str) -> str:
    """`text` for comparisons: NFKC, lower case, only letters with their marks and digits; unchanged if none are left.

    Without the exception, all texts without letters and digits would be equal.
    """
    return "".join(_words(text)) or text


def _words(text: str) -> list[str]:
    """The runs of letters, their marks, and digits in a text, after NFKC and in lower case.

    Marks belong to words: without vowel signs, for example, many Hindi words are the same.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    return "".join(c if c.isalnum() or (c > "\u02ff" and _is_mark(c)) else " " for c in text).split()


def _is_mark(character: str) -> bool:
    return unicodedata.category(character)[0] == "M" and character not in SELECTORS


def _refuse_empty(
    parts: dict[str, tuple[Row, ...]], members: dict[str, list[Row]], fractions: tuple[float, float, float]
) -> None:
    empty = [name for name in SPLITS if not parts[name]]
    if empty:
        rows = sum(map(len, parts.values()))
        largest = max(map(len, members.values()), default=0)
        together, advice = "", ""
        if largest > 1:
            together = f" (up to {largest} rows stay together because they share a question, an answer or a group)"
            advice = ", or split row by row with --set data.split=random"
        raise UserError(
            f"too few rows to split: {rows} rows in {len(members)} separable groups{together} leave no row "
            f"for {' and '.join(empty)} with data.fractions {list(fractions)}; give more data, other fractions{advice}"
        )


def _fingerprint(parts: dict[str, tuple[Row, ...]]) -> str:
    digest = hashlib.sha256()
    for name, rows in parts.items():
        for row in rows:  # as JSON, which is unambiguous
            digest.update(json.dumps([name, row.id, row.question, row.answer]).encode())
    return digest.hexdigest()


def write_splits_csv(splits: Splits, path: Path) -> None:
    """Write `id,split,group` for every row, in the order of the sources, atomically.

    Raises UserError if it cannot be written.
    """
    split_of = {row.id: name for name in SPLITS for row in getattr(splits, name)}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("id", "split", "group"))
    writer.writerows((row, split_of[row], group) for row, group in splits.groups.items())
    try:
        write_file(path, text.getvalue())
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be written ({reason}); free space or choose another directory") from error


def overlap_report(splits: Splits) -> dict[str, dict[str, object]]:
    """Count, for "validation", "test" and both together ("held_out"), the rows that share something with training.

    Each value is `{"rows": n, <what>: {"rows": rows that share it, "of": rows that have it, "share": the ratio}, ...}`
    with `question`, `answer`, `question_or_answer`, `topic` (equal by `letters_and_digits`; of rows with a topic),
    `group` (of rows with one), and `13_grams`: more than half of the answer's runs of 13 words are in some training
    answer (of rows whose answer has 13 words). Only the answer, because the question is counted separately. Words are
    runs of letters and digits in lower case. "share" is 0.0 if no row has it.
    """
    shared = shared_with_training(splits)
    rows = {"validation": splits.validation, "test": splits.test, "held_out": splits.validation + splits.test}
    return {name: _summary([shared[row.id] for row in part]) for name, part in rows.items()}


def _summary(rows: list[dict[str, bool | None]]) -> dict[str, object]:
    """The counts of one split, from what each of its rows shares."""
    report: dict[str, object] = {"rows": len(rows)}
    for what in rows[0]:
        answers = [answer for row in rows if (answer := row[what]) is not None]
        report[what] = {"rows": sum(answers), "of": len(answers), "share": sum(answers) / max(len(answers), 1)}
    return report


def shared_with_training(splits: Splits) -> dict[str, dict[str, bool | None]]:
    """Held-out row id to what it shares with training; None where the row does not have it."""
    questions = {letters_and_digits(row.question) for row in splits.train}
    answers = {letters_and_digits(row.answer) for row in splits.train}
    topics = {letters_and_digits(row.topic) for row in splits.train if row.topic}
    grouped = {(row.source, row.group) for row in splits.train}
    runs = _runs_in_training(splits)
    shared: dict[str, dict[str, bool | None]] = {}
    for row in splits.validation + splits.test:
        question, answer = letters_and_digits(row.question) in questions, letters_and_digits(row.answer) in answers
        shared[row.id] = {
            "question": question,
            "answer": answer,
            "question_or_answer": question or answer,
            "topic": letters_and_digits(row.topic) in topics if row.topic else None,
            "group": (row.source, row.group) in grouped if row.group else None,
            f"{NGRAM}_grams": runs[row.id],
        }
    return shared


def _runs_in_training(splits: Splits) -> dict[str, bool | None]:
    """Held-out row id to whether more than half of its 13-grams are in training; None if it has none."""
    training = np.sort(np.concatenate([_ngrams(row.answer) for row in splits.train]))
    held_out = [np.unique(_ngrams(row.answer)) for row in splits.validation + splits.test]
    wanted = np.concatenate(held_out)  # one search for all rows is three times as fast as np.isin
    found = np.searchsorted(training, wanted, "right") > np.searchsorted(training, wanted, "left")
    per_row = np.split(found, np.cumsum([len(ngrams) for ngrams in held_out])[:-1])
    rows = zip(splits.validation + splits.test, per_row, strict=True)
    return {row.id: bool(2 * hits.sum() > len(hits)) if len(hits) else None for row, hits in rows}


def _ngrams(text: str) -> np.ndarray:
    """A 64-bit hash of each run of 13 words, [runs] uint64. A collision among a few million has probability 1e-6."""
    words = _words(text)
    if len(words) < NGRAM:
        return np.empty(0, np.uint64)
    hashes = np.fromiter(map(hash, words), np.int64, len(words)).astype(np.uint64)
    return np.convolve(hashes, POWERS, mode="valid")  # a polynomial in each window of 13 words, modulo 2^64
