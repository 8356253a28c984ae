"""`data_report.json`: what was read, dropped and kept, how long rows are, what held-out rows share with training."""

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

BEYOND = "answer beyond max_length"  # the reason why rows are dropped after they have been tokenized
LARGE_SHARE = 0.25  # of all rows in one group, beyond which the plan says so
QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


def write_reports(output_dir: Path, data: TrainingData, experiment: Experiment, padding_free: bool) -> None:
    """Write `data_report.json` and `splits.csv`."""
    write_json(data_report(data, experiment, padding_free), output_dir / "data_report.json")
    write_splits_csv(data.splits, output_dir / "splits.csv")


def data_report(data: TrainingData, experiment: Experiment, padding_free: bool) -> dict[str, Any]:
    """The report. Token lengths are in ids, BOS and EOS included, after cutting to `max_length`."""
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
    """What a user should know of the rows before training on them: how many are cut, left out, or hang together."""
    lines, rows = [], sum(map(len, examples.values()))
    limit = f"tokenization.max_length = {experiment.tokenization.max_length}"
    if cut := sum(example.truncated for found in examples.values() for example in found):
        lines.append(f"{cut:,} of {rows:,} rows are longer than {limit}: the ends of their answers are cut off")
    if splits.beyond:
        lines.append(f"{len(splits.beyond):,} rows are left out: {BEYOND} (nothing of it is left at {limit})")
    group, size = Counter(splits.groups.values()).most_common(1)[0]
    if experiment.data.split != "random" and size > LARGE_SHARE * rows:
        where = next(name for name in SPLITS if any(splits.groups[row.id] == group for row in getattr(splits, name)))
        lines.append(
            f"{size:,} of {rows:,} rows are all in {where}: rows whose questions or answers repeat (or of one group or "
            "topic) stay together, so that the other splits have none of them; --set data.split=random splits row by "
            "row, and held-out rows then repeat what is trained on"
        )
    return lines


def split_counts(examples: Sequence[Example]) -> dict[str, int]:
    """Rows of a split, all and by source."""
    by_source: dict[str, int] = {}
    for example in examples:
        by_source[example.row.source] = by_source.get(example.row.source, 0) + 1
    return {"rows": len(examples), **dict(sorted(by_source.items()))}


def padding_share(stream: Stream, tokenization: Tokenization, per_device_batch_size: int) -> float:
    """Share of the first epoch's places that are padding, in the micro-batches as they will be."""
    lengths = [len(stream.at(position).input_ids) for position in range(len(stream.examples))]
    places = 0
    for start in range(0, len(lengths), per_device_batch_size):
        batch = lengths[start : start + per_device_batch_size]
        places += len(batch) * (tokenization.max_length if tokenization.padding == "max_length" else max(batch))
    return 1 - sum(lengths) / places
