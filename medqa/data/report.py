"""`data_report.json`: rows read, dropped and kept, their lengths, and what held-out rows share with training."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medqa.config import Experiment, Tokenization
from medqa.data.batches import Stream, TrainingData
from medqa.data.splits import SPLITS, Splits, overlap_report, write_splits_csv
from medqa.data.tokens import Example
from medqa.files import write_json

BEYOND = "answer beyond max_length"  # the reason for rows that are dropped after tokenization
LARGE_SHARE = 0.25  # if a group has more than this share of all rows, the printed plan says so
QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


def write_reports(output_dir: Path, data: TrainingData, experiment: Experiment, padding_free: bool) -> None:
    """Write `data_report.json` and `splits.csv`."""
    write_json(data_report(data, experiment, padding_free), output_dir / "data_report.json")
    write_splits_csv(data.splits, output_dir / "splits.csv")


def data_report(data: TrainingData, experiment: Experiment, padding_free: bool) -> dict[str, Any]:
    """The content of `data_report.json`. Lengths are in tokens, with BOS and EOS, after truncation to `max_length`."""
    sources, splits, examples, stream = data.sources, data.splits, data.examples, data.stream
    everything = [example for name in SPLITS for example in examples[name]]
    beyond = Counter(row.source for row in splits.beyond)
    lengths = np.array([len(example.input_ids) for example in everything])
    return {
        "fingerprint": splits.fingerprint,
        "sources": {
            source.name: {
                "location": source.location,
                "read": source.read,
                "dropped": source.dropped | ({BEYOND: beyond[source.name]} if beyond[source.name] else {}),
                "kept": len(source.rows) - beyond[source.name],
            }
            for source in sources
        },
        "splits": {name: split_counts(examples[name]) for name in SPLITS},
        "token_lengths": {f"{q:g}": float(np.quantile(lengths, q)) for q in QUANTILES},
        "mean_token_length": float(lengths.mean()),
        "truncated_share": sum(example.truncated for example in everything) / len(everything),
        "padding_share": 0.0
        if padding_free
        else padding_share(stream, experiment.tokenization, experiment.training.per_device_batch_size),
        "overlap": overlap_report(splits),
    }


def about_rows(splits: Splits, examples: Mapping[str, Sequence[Example]], experiment: Experiment) -> list[str]:
    """Lines for the printed plan about rows that are truncated or dropped, and about very large groups."""
    lines, rows = [], sum(map(len, examples.values()))
    limit = f"tokenization.max_length = {experiment.tokenization.max_length}"
    if cut := sum(example.truncated for found in examples.values() for example in found):
        lines.append(f"{cut:,} of {rows:,} rows are longer than {limit}: their answers are truncated")
    if splits.beyond:
        lines.append(f"{len(splits.beyond):,} rows dropped: the question alone fills {limit}")
    group, size = Counter(splits.groups.values()).most_common(1)[0]
    if experiment.data.split != "random" and size > LARGE_SHARE * rows:
        where = next(name for name in SPLITS if any(splits.groups[row.id] == group for row in getattr(splits, name)))
        lines.append(
            f"{size:,} of {rows:,} rows are in one group, all of it in {where}: rows that share a question, an answer, "
            "a group or a topic stay in one split; --set data.split=random splits row by row, but held-out rows then "
            "repeat training rows"
        )
    return lines


def split_counts(examples: Sequence[Example]) -> dict[str, int]:
    """The number of rows of a split, in total and by source."""
    by_source: dict[str, int] = {}
    for example in examples:
        by_source[example.row.source] = by_source.get(example.row.source, 0) + 1
    return {"rows": len(examples), **dict(sorted(by_source.items()))}


def padding_share(stream: Stream, tokenization: Tokenization, per_device_batch_size: int) -> float:
    """The share of padding tokens in the first epoch, in the micro-batches of training."""
    lengths = [len(stream.at(position).input_ids) for position in range(len(stream.examples))]
    tokens = 0
    for start in range(0, len(lengths), per_device_batch_size):
        batch = lengths[start : start + per_device_batch_size]
        tokens += len(batch) * (tokenization.max_length if tokenization.padding == "max_length" else max(batch))
    return 1 - sum(lengths) / tokens
