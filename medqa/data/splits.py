"""Rows are split into training, validation and test here, and the overlap between the splits is measured.

Medical question-answer sets repeat themselves: a random split puts about a fifth of the held-out rows' questions or
answers into training as well, and then measures memory. `grouped` never does; `topic` keeps topics apart too.
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
NGRAM = 13  # words; the length that is customary for this question since GPT-3's contamination study
POWERS = np.uint64(0x9E3779B97F4A7C15) ** np.arange(NGRAM, dtype=np.uint64)  # of an odd number, modulo 2^64

# Marks that select the drawing of the character before them: they tell no two texts apart.
SELECTORS = frozenset(map(chr, (*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0))))

# A group that would make up more than this share of a held-out split stays in training: the split would measure little
# but one templated answer (377 rows of MedQuAD hang together by "inherited in an autosomal recessive manner"). Where a
# split is so small that the share is less than GIANT_ROWS, a group of that many may still be held out if it fits. Where
# a source has so few groups that a held-out split would stay emptier than LEAST_FILLED, larger ones may be, too.
GIANT_SHARE = 0.05
GIANT_ROWS = 10
LEAST_FILLED = 0.5


@dataclass(frozen=True, slots=True)
class Splits:
    """The rows of each split, in the order in which they were given."""

    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    test: tuple[Row, ...]
    groups: dict[str, str]  # row id -> id of the first row of its group, all rows in the order given
    fingerprint: str  # SHA-256 of ids, questions, answers and splits: the same data, split the same way
    beyond: tuple[Row, ...] = ()  # rows in no split, because nothing of their answers is within `max_length`

    def without(self, left_out: Collection[str]) -> "Splits":
        """The same splits without the rows of these ids, which were found to have no answer within `max_length`.

        The fingerprint stays that of all rows: which rows are left out follows from them and the tokenizer.
        """
        parts = {name: tuple(row for row in getattr(self, name) if row.id not in left_out) for name in SPLITS}
        beyond = tuple(row for name in SPLITS for row in getattr(self, name) if row.id in left_out)
        groups = {row: group for row, group in self.groups.items() if row not in left_out}
        return Splits(**parts, groups=groups, fingerprint=self.fingerprint, beyond=self.beyond + beyond)


def split_sources(sources: Sequence[Source], data: Data) -> Splits:
    """The rows of these sources, split as an experiment says (`split_rows`)."""
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
    """Split `rows` into training, validation and test with the given shares, each source in proportion.

    `grouped`: rows that share a question, an answer, or a group of one source (directly or over other rows; see
    `letters_and_digits`) never stand in two splits. `topic`: nor do rows that share a topic. `random`: every row for
    itself; `groups` is then that of `grouped`. The result follows from the rows and the seed alone: rows are ordered by
    a hash of seed and id, so neither platform nor library versions nor sources that share nothing have a say.

    Args:
        duplicates: rows that were dropped, being equal to one of `rows`, which belongs to their groups and topics too.

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
    """A split for each unit of one source, given its number of rows: held-out splits are filled, the rest trains."""
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
    """Row id to the id of the first row that it is connected with: by question, answer, group and, if asked, topic."""
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
    """`text` as it is compared: NFKC, lower case, letters with their marks and digits alone; as it is if none are left.

    Without the last rule all texts of mere signs would be equal.
    """
    return "".join(_words(text)) or text


def _words(text: str) -> list[str]:
    """The runs of letters, their marks, and digits in a text, in NFKC and lower case.

    Marks belong to words: without Hindi's vowel signs, for example, many words are the same.
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
            together = f" (up to {largest} rows stay together, by equal questions or answers, or by group)"
            advice = ", or split row by row with --set data.split=random"
        raise UserError(
            f"too few rows to split: {rows} rows, {len(members)} of which can be told apart{together}, leave nothing "
            f"for {' and '.join(empty)} at data.fractions {list(fractions)}; give more data or other fractions{advice}"
        )


def _fingerprint(parts: dict[str, tuple[Row, ...]]) -> str:
    digest = hashlib.sha256()
    for name, rows in parts.items():
        for row in rows:  # as JSON, so that no text can pass for two
            digest.update(json.dumps([name, row.id, row.question, row.answer]).encode())
    return digest.hexdigest()


def write_splits_csv(splits: Splits, path: Path) -> None:
    """Write `id,split,group` for every row, in the order the rows were given; the file appears whole or not at all.

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
        raise UserError(f"{path}: cannot be written ({reason}); free space or choose another place") from error


def overlap_report(splits: Splits) -> dict[str, dict[str, object]]:
    """For "validation", "test" and both together ("held_out"): how many rows share something with training.

    Each is `{"rows": n, <what>: {"rows": those that share it, "of": those that could, "share": the ratio}, ...}` with
    `question`, `answer`, `question_or_answer`, `topic` (equal by `letters_and_digits`; of the rows that have a topic),
    `group` (of the rows that have one), and `13_grams`: more than half of the answer's runs of 13 words stand in some
    training answer (of the rows whose answer has 13 words). The answer alone, because the question has its own line.
    Words are runs of letters and digits in lower case. "share" is 0.0 where no row could.
    """
    shared = shared_with_training(splits)
    rows = {"validation": splits.validation, "test": splits.test, "held_out": splits.validation + splits.test}
    return {name: _summary([shared[row.id] for row in part]) for name, part in rows.items()}


def _summary(rows: list[dict[str, bool | None]]) -> dict[str, object]:
    """Counts of one split, from what each of its rows shares."""
    report: dict[str, object] = {"rows": len(rows)}
    for what in rows[0]:
        answers = [answer for row in rows if (answer := row[what]) is not None]
        report[what] = {"rows": sum(answers), "of": len(answers), "share": sum(answers) / max(len(answers), 1)}
    return report


def shared_with_training(splits: Splits) -> dict[str, dict[str, bool | None]]:
    """Held-out row id to what it shares with training; None where it has nothing to share."""
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
    """Held-out row id to whether more than half of its 13-grams stand in training; None if it has none."""
    training = np.sort(np.concatenate([_ngrams(row.answer) for row in splits.train]))
    held_out = [np.unique(_ngrams(row.answer)) for row in splits.validation + splits.test]
    wanted = np.concatenate(held_out)  # one search for all rows, three times as fast as np.isin
    found = np.searchsorted(training, wanted, "right") > np.searchsorted(training, wanted, "left")
    per_row = np.split(found, np.cumsum([len(ngrams) for ngrams in held_out])[:-1])
    rows = zip(splits.validation + splits.test, per_row, strict=True)
    return {row.id: bool(2 * hits.sum() > len(hits)) if len(hits) else None for row, hits in rows}


def _ngrams(text: str) -> np.ndarray:
    """A 64-bit hash of each run of 13 words, [runs] uint64: a collision among a few million has odds of 10^-6."""
    words = _words(text)
    if len(words) < NGRAM:
        return np.empty(0, np.uint64)
    hashes = np.fromiter(map(hash, words), np.int64, len(words)).astype(np.uint64)
    return np.convolve(hashes, POWERS, mode="valid")  # a polynomial in each window of 13, modulo 2^64
