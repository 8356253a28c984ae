"""Reads the `.wandb` file of an offline run: a 7-byte header, then records in LevelDB's log format.

Source: https://github.com/google/leveldb/blob/main/doc/log_format.md; W&B has no public reader any more.
"""

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK = 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class OfflineRun:
    """What a run's file says."""

    id: str = ""
    project: str = ""
    name: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    history: dict[int, dict[str, Any]] = field(default_factory=dict)  # step -> values, all rows of a step together
    summary: dict[str, Any] = field(default_factory=dict)  # what was put there by hand
    artifacts: list[Any] = field(default_factory=list)
    metrics: list[Any] = field(default_factory=list)
    finished: bool = False


def read_finished_run(path: Path, seconds: float = 20.0) -> OfflineRun:
    """As `read_offline_run`, once its end is there: W&B's service may still be writing when `finish` has returned."""
    deadline = time.monotonic() + seconds
    while not (run := read_offline_run(path)).finished and time.monotonic() < deadline:
        time.sleep(0.05)
    return run


def read_offline_run(path: Path) -> OfflineRun:
    """The content of one `.wandb` file."""
    from wandb.proto import wandb_internal_pb2 as pb

    run = OfflineRun()
    for raw in records(path.read_bytes()):
        record = pb.Record()
        record.ParseFromString(raw)
        match record.WhichOneof("record_type"):
            case "run":
                run.id, run.project, run.name = record.run.run_id, record.run.project, record.run.display_name
                run.tags = list(record.run.tags)
                run.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            case "config":
                run.config |= {item.key: json.loads(item.value_json) for item in record.config.update}
            case "history":
                values = {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
                }
                run.history.setdefault(values["_step"], {}).update(values)
            case "summary":
                run.summary |= {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.summary.update
                }
            case "artifact":
                run.artifacts.append(record.artifact)
            case "metric":
                run.metrics.append(record.metric)
            case "request":
                if record.request.WhichOneof("request_type") == "log_artifact":
                    run.artifacts.append(record.request.log_artifact.artifact)
            case "exit":
                run.finished = True
    return run


def records(data: bytes) -> Iterator[bytes]:
    """The payloads, put together again where they were cut at block ends."""
    assert data[:4] == b":W&B"
    position, parts = 7, []
    while position + 7 <= len(data):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (FULL, LAST):
            yield b"".join(parts)
            parts = []
