"""`metrics.jsonl`, which is the truth; W&B, which has the same; and what a whole run leaves behind."""

import csv
import json
import math
import os
import re
import shutil
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import wandb
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from wandb_file import OfflineRun, read_finished_run
from wandb_server import WandbServer

from medqa.config import Experiment, flat
from medqa.config_file import load_experiment
from medqa.data.tokens import prompt_ids
from medqa.errors import UserError
from medqa.hub import connects
from medqa.tiny import BASE_DIR
from medqa.training.recorder import EarlierUsage, MetricsFile, Tracker, read_metrics
from medqa.training.wandb import (
    PRIVATE,
    SAMPLE_COLUMNS,
    failures,
    log_adapter,
    start_wandb,
    wandb_mode,
    wandb_names,
    wandb_wanted,
)
from train import main

FIGURES = {"loss", "perplexity", "answer_loss", "answer_perplexity"}
TRAIN_FIELDS = {
    "step", "split", "elapsed_s", "loss", "learning_rate", "grad_norm", "tokens", "examples_seen", "tokens_seen",
    "epoch", "update_s", "tokens_per_s", "padding_share", "peak_memory_bytes",
}  # fmt: skip
EVAL_FIELDS = {"step", "split", "elapsed_s", "tokens", "rows", "sources", *FIGURES}
SUMMARY_FIELDS = {
    "experiment", "baseline", "final", "test", "best_step", "wall_clock_s", "peak_memory_bytes", "memory_device",
    "trainable_parameters", "total_parameters", "updates", "resumes", "processes", "cpu_threads",
    "gradient_accumulation_steps", "quantization", "mixed_precision", "data_fingerprint", "git_commit", "versions",
}  # fmt: skip
SETS = [
    "training.max_steps=4", "training.save_steps=2", "evaluation.steps=2", "evaluation.rows=16", "evaluation.samples=2",
    "model.quantization=none", "training.mixed_precision=fp16", "model.dtype=float16",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def environment():
    """No W&B variables, no key, and none in a file; the accelerator's state is the process's otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        patch.setenv("NETRC", "/nonexistent")
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
            patch.delenv(name, raising=False)
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


def command(directory: Path, *more: str, sets: tuple[str, ...] = ()) -> list[str]:
    words = ["--exp", "exp_001", "--tiny", "--cpu", "--output-dir", str(directory), *more, "--set", *SETS, *sets]
    AcceleratorState._reset_state(reset_partial_state=True)
    return words


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A whole run of four updates, with W&B on its own initiative: no key, so offline."""
    directory = tmp_path_factory.mktemp("outputs") / "my run"
    assert main(command(directory)) == 0
    return directory


@pytest.fixture(scope="module")
def metrics(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def summary(run) -> dict:
    return json.loads((run / "summary.json").read_text())


def offline_run(directory: Path) -> OfflineRun:
    (file,) = directory.glob("wandb/offline-run-*/run-*.wandb")
    return read_finished_run(file)


@pytest.fixture(scope="module")
def on_wandb(run) -> OfflineRun:
    return offline_run(run)


# --- the file


def line(step: int, split: str, **more) -> dict:
    return {"step": step, "split": split, "elapsed_s": 1.0, **more}


def content(path: Path) -> list[tuple[int, str]]:
    return [(record["step"], record["split"]) for record in read_metrics(path)]


EVENTS = [
    (0, "eval"), (0, "eval_full"), (1, "train"), (2, "train"), (2, "eval"), (3, "train"), (4, "train"), (4, "eval"),
    (4, "eval_full"), (4, "test"),
]  # fmt: skip


@pytest.fixture
def file(tmp_path) -> MetricsFile:
    found = MetricsFile(tmp_path / "metrics.jsonl")
    found.truncate_after(-1, 4)
    for step, split in EVENTS:
        found.append(line(step, split))
    return found


@pytest.mark.parametrize(
    "step, max_steps, kept",
    [
        (-1, 4, []),
        (0, 4, EVENTS[:2]),
        (2, 4, EVENTS[:5]),
        (3, 4, EVENTS[:6]),
        (4, 4, EVENTS[:7]),  # the closing evaluation comes after the last checkpoint and is done again
        (4, 8, EVENTS),
    ],
)
def test_a_resume_keeps_what_came_before_its_checkpoint(step, max_steps, kept, file):
    file.truncate_after(step, max_steps)
    assert content(file.path) == kept
    for later in EVENTS[len(kept) :]:
        file.append(line(*later))
    assert content(file.path) == EVENTS
    assert len(set(content(file.path))) == len(EVENTS), "each pair once"


@pytest.mark.parametrize("torn", ['{"step": 5, "spl', '{"step": 5, "split": "train"}', "\x00\x00\x00", "5\n", "{}\n"])
def test_a_torn_last_line_is_dropped(torn, file):
    with file.path.open("a") as stream:
        stream.write(torn)
    file.truncate_after(4, 8)
    assert content(file.path) == EVENTS
    assert file.path.read_text().endswith("\n")
    assert torn not in file.path.read_text()


DAMAGED = [
    '{"step": 1, "split": "train", "loss": NaN}', '{"step": 1, "split": "train", "grad_norm": Infinity}',
    '{"step": 1, "split": "train", "loss": 1e400}', f'{{"step": 1, "split": "train", "elapsed_s": 1{"0" * 400}}}',
    f'{{"step": 1, "split": "train", "x": 1{"0" * 5000}}}', '{"step": true, "split": "train"}',
    '{"step": -5, "split": "train"}', '{"step": 1.0, "split": "train"}', '{"step": 1, "split": ["train"]}',
    '{"step": 1, "split": "train", "peak_memory_bytes": "x"}', '{"step": 1, "split": "train", "loss": {}}',
    '{"step": 1, "split": "train", "elapsed_s": true}', '{"step": 1, "split": "eval", "sources": "x"}',
    '{"step": 1, "split": "eval", "sources": {"a": {}}}', f'{{"step": 1, "a": {"[" * 5000}',
    "\x00" * 100, "5", "{}", "",
]  # fmt: skip


@pytest.mark.parametrize("damaged", DAMAGED)
def test_a_damaged_line_is_passed_over_and_counted(damaged, file):
    before = file.path.read_bytes()
    lines = before.splitlines(keepends=True)
    file.path.write_bytes(b"".join([*lines[:3], damaged.encode() + b"\n", *lines[3:]]))
    assert content(file.path) == EVENTS
    for record in read_metrics(file.path):
        wandb_names(record)
    spent = file.truncate_after(4, 8)
    assert spent.unreadable == 1
    assert file.path.read_bytes() == before
    assert file.truncate_after(4, 8).unreadable == 0


def test_a_pair_that_stands_twice_stands_once_after_a_resume(file):
    before = file.path.read_bytes()
    file.path.write_bytes(before + before.replace(b"1.0", b"2.0"))
    file.truncate_after(4, 8)
    assert file.path.read_bytes() == before


@pytest.mark.parametrize("value", [1e300, -1.0, None, 0])
def test_times_that_cannot_be_are_not_believed(value, file):
    file.append({"step": 5, "split": "train", "elapsed_s": value, "peak_memory_bytes": value})
    assert file.truncate_after(4, 8) == EarlierUsage(1.0, 0, 0)


@pytest.mark.parametrize("kind", ["pipe", "directory", "device", "nothing"])
def test_only_a_regular_file_is_read(kind, tmp_path):
    path = tmp_path / "metrics.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match=re.escape(str(path))):
        list(read_metrics(path))
    if kind != "nothing":
        with pytest.raises(UserError, match=re.escape(str(path))):
            MetricsFile(path).truncate_after(1, 4)


def test_a_line_is_not_added_through_a_link(file, tmp_path):
    victim = tmp_path / "victim"
    shutil.move(file.path, victim)
    file.path.symlink_to(victim)
    before = victim.read_bytes()
    for attempt in (lambda: file.append(line(5, "train")), lambda: file.amend_train(4, save_s=1.0)):
        with pytest.raises(OSError, match="symbolic links"):
            attempt()
    assert victim.read_bytes() == before


def test_a_resume_has_the_disk_hold_the_file_before_the_name_is_its(file, monkeypatch):
    """As a power cut shows it: what has not been flushed when the file takes its name may be lost."""
    flushed, held = [], {}
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        fsync(descriptor)
        flushed.append(os.fstat(descriptor).st_ino)

    def note_replace(source: Path, target: Path) -> None:
        held[Path(target).name] = os.stat(source).st_ino in flushed
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    file.truncate_after(2, 4)
    assert held == {"metrics.jsonl": True}
    assert os.stat(file.path.parent).st_ino in flushed, "the directory's entry too"


def test_a_file_that_is_not_there_is_begun(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.truncate_after(-1, 4)
    assert file.path.read_text() == ""


def test_the_save_time_goes_to_its_own_line(file):
    before = list(read_metrics(file.path))
    file.append(line(5, "train", loss=1.5))
    file.append(line(5, "eval", loss=2.5))
    assert file.amend_train(5, save_s=0.25)
    after = list(read_metrics(file.path))
    assert after == [*before, line(5, "train", loss=1.5, save_s=0.25), line(5, "eval", loss=2.5)]
    file.append(line(6, "train"))
    assert not file.amend_train(5, save_s=9.0), "only the newest"
    assert not file.amend_train(7, save_s=9.0)
    assert content(file.path)[-3:] == [(5, "train"), (5, "eval"), (6, "train")]
    assert sum("save_s" in record for record in read_metrics(file.path)) == 1


def test_what_is_no_number_is_not_written(file):
    with pytest.raises(ValueError, match="Out of range"):
        file.append(line(9, "train", loss=math.nan))


def test_names_on_wandb():
    train = line(
        3, "train", loss=1.0, learning_rate=2.0, grad_norm=3.0, tokens=4, examples_seen=5, tokens_seen=6, epoch=7.0,
        update_s=8.0, tokens_per_s=9.0, padding_share=0.5, save_s=10.0, peak_memory_bytes=2e9, peak_reserved_bytes=3e9,
    )  # fmt: skip
    assert wandb_names(train) == {
        "train/loss": 1.0, "train/learning_rate": 2.0, "train/grad_norm": 3.0, "train/epoch": 7.0,
        "train/examples_seen": 5, "train/tokens_seen": 6, "perf/tokens_per_second": 9.0, "perf/update_seconds": 8.0,
        "perf/padding_share": 0.5, "perf/save_seconds": 10.0, "perf/peak_allocated_gb": 2.0,
        "perf/peak_reserved_gb": 3.0, "train/global_step": 3,
    }  # fmt: skip
    for split in ("eval", "eval_full", "test"):
        record = line(
            4, split, loss=1.0, perplexity=2.0, answer_loss=3.0, answer_perplexity=None, tokens=5, rows=6,
            sources={"medquad": 7.0, "afrimedqa": 8.0},
        )  # fmt: skip
        assert wandb_names(record) == {
            f"{split}/loss": 1.0, f"{split}/perplexity": 2.0, f"{split}/answer_loss": 3.0,
            f"{split}/medquad/answer_loss": 7.0, f"{split}/afrimedqa/answer_loss": 8.0, "train/global_step": 4,
        }  # fmt: skip


# --- what a run leaves


def test_metrics_have_every_field_of_the_contract(metrics):
    assert [(r["step"], r["split"]) for r in metrics] == EVENTS
    for record in metrics:
        fields = TRAIN_FIELDS if record["split"] == "train" else EVAL_FIELDS
        assert fields <= record.keys()
    assert [r["step"] for r in metrics if "save_s" in r] == [2, 4]
    assert [r["elapsed_s"] for r in metrics] == sorted(r["elapsed_s"] for r in metrics)


def test_metrics_are_consistent(metrics):
    train = [r for r in metrics if r["split"] == "train"]
    assert [r["examples_seen"] for r in train] == [32, 64, 96, 128]
    assert [r["tokens_seen"] for r in train] == [sum(r["tokens"] for r in train[: n + 1]) for n in range(4)]
    for r in train:
        assert r["epoch"] == pytest.approx(r["examples_seen"] / 225)
        assert r["tokens_per_s"] == pytest.approx(r["tokens"] / r["update_s"])
        assert r["learning_rate"] == 1e-2
        assert 0 < r["padding_share"] < 1
        assert r["peak_memory_bytes"] > 50e6
        assert 0 < r["grad_norm"] < 100
    for r in metrics:
        if r["split"] != "train":
            assert r["perplexity"] == pytest.approx(math.exp(r["loss"]))
            assert r["answer_perplexity"] == pytest.approx(math.exp(r["answer_loss"]))
            assert r["sources"].keys() == {"medquad", "afrimedqa"}
    by_event = {(r["step"], r["split"]): r for r in metrics}
    assert {by_event[step, "eval"]["rows"] for step in (0, 2, 4)} == {16}, "the fixed rows, at every point"
    assert {by_event[step, "eval_full"]["rows"] for step in (0, 4)} == {28}, "all validation rows"
    assert by_event[4, "eval"]["loss"] < by_event[0, "eval"]["loss"]


def test_summary(summary, metrics):
    assert summary.keys() >= SUMMARY_FIELDS
    by_event = {(r["step"], r["split"]): r for r in metrics}
    for part, event in (("baseline", (0, "eval_full")), ("final", (4, "eval_full")), ("test", (4, "test"))):
        assert summary[part] == {key: by_event[event][key] for key in FIGURES}
    expected = {
        "experiment": "exp_001", "updates": 4, "resumes": 0, "processes": 1, "gradient_accumulation_steps": 8,
        "quantization": "none", "mixed_precision": "no", "memory_device": "cpu", "trainable_parameters": 45_056,
        "total_parameters": 799_360, "best_step": 4, "cpu_threads": torch.get_num_threads(),
    }  # fmt: skip
    assert {key: summary[key] for key in expected} == expected
    assert summary["wall_clock_s"] >= metrics[-1]["elapsed_s"]
    assert summary["peak_memory_bytes"] >= max(r.get("peak_memory_bytes", 0) for r in metrics)
    assert len(summary["data_fingerprint"]) == 64
    assert summary["versions"].keys() >= {"python", "torch", "transformers", "peft", "accelerate", "bitsandbytes"}


def test_config(run):
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert config["gradient_accumulation_steps"] == 8
    reason = "float16 is supported on GPUs only"
    assert config["in_effect"] == {
        "training.mixed_precision": {"asked": "fp16", "used": "no", "reason": reason},
        "model.dtype": {"asked": "float16", "used": "float32", "reason": reason},
    }
    written = {f"{s}.{k}" for s in Experiment.model_fields for k in config[s]}
    assert written == set(flat(Experiment()))
    assert load_experiment(str(run / "config.yaml")) == load_experiment("exp_001", tiny=True, sets=SETS)


def test_data_report_and_splits(run, summary):
    report = json.loads((run / "data_report.json").read_text())
    rows = list(csv.DictReader((run / "splits.csv").open(encoding="utf-8", newline="")))
    assert list(rows[0]) == ["id", "split", "group"]
    assert report["sources"].keys() == {"medquad", "afrimedqa"}
    for name, source in report["sources"].items():
        assert source["read"] == source["kept"] + sum(source["dropped"].values())
        assert source["kept"] == sum(row["id"].startswith(f"{name}:") for row in rows)
    assert {name: split["rows"] for name, split in report["splits"].items()} == {
        name: sum(row["split"] == name for row in rows) for name in ("train", "validation", "test")
    }
    assert report["fingerprint"] == summary["data_fingerprint"]
    assert report.keys() >= {"token_lengths", "truncated_share", "padding_share", "overlap"}
    groups = {}
    for row in rows:
        groups.setdefault(row["group"], set()).add(row["split"])
    assert all(len(splits) == 1 for splits in groups.values())
    assert len({row["id"] for row in rows}) == len(rows)


def test_checkpoints_hold_no_base_weights(run):
    for step in (2, 4):
        directory = run / f"checkpoint-{step}"
        with safe_open(directory / "adapter_model.safetensors", "pt") as file:
            assert file.keys()
            assert all("lora_" in name for name in file.keys())  # noqa: SIM118
        assert sum(path.stat().st_size for path in directory.iterdir()) < 1_000_000
        base = AutoModelForCausalLM.from_pretrained(BASE_DIR, dtype=torch.float32)
        PeftModel.from_pretrained(base, directory)


def test_the_final_adapter(run, summary):
    directory = run / "lora_adapters"
    assert {path.name for path in directory.iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja",
    }  # fmt: skip
    last = (run / "checkpoint-4" / "adapter_model.safetensors").read_bytes()
    assert (directory / "adapter_model.safetensors").read_bytes() == last
    tokenizer = AutoTokenizer.from_pretrained(directory)
    for question in ("What is (are) Scabies ?", "(a) 5 mg?\nA. one\nB. two"):
        ids = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
        assert list(ids["input_ids"]) == prompt_ids(question, tokenizer)
    card = (directory / "README.md").read_text(encoding="utf-8")
    for words in (
        "**Not medical advice.**", "MedQuAD", "CC BY 4.0", "AfriMed-QA", "CC BY-NC-SA 4.0, non-commercial use only",
        "license: cc-by-nc-sa-4.0", f"{summary['final']['loss']:.4f}", f"{summary['baseline']['perplexity']:.3f}",
        "### Instruction:\n{question}\n\n### Response:\n",
    ):  # fmt: skip
        assert words in card
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "peft"


# --- W&B has the same


def test_the_run_on_wandb(on_wandb, run):
    assert on_wandb.name == "my run"
    assert on_wandb.id == json.loads((run / "run.json").read_text())["run_id"]
    assert on_wandb.project == "medqa"
    assert on_wandb.tags == ["exp_001"]
    assert on_wandb.finished
    assert on_wandb.config["training"]["max_steps"] == 4
    assert on_wandb.config["in_effect"]["model.dtype"][1] == "float32"
    (glob,) = [metric for metric in on_wandb.metrics if metric.glob_name]
    assert (glob.glob_name, glob.step_metric) == ("*", "train/global_step")


def test_its_history_is_the_file(on_wandb, metrics):
    expected: dict[int, dict] = {}
    for record in metrics:
        step, split = record["step"], record["split"]
        values = expected.setdefault(step, {"train/global_step": step})
        if split == "train":
            for name in ("loss", "learning_rate", "grad_norm", "epoch", "examples_seen", "tokens_seen"):
                values[f"train/{name}"] = record[name]
            values["perf/tokens_per_second"] = record["tokens_per_s"]
            values["perf/update_seconds"] = record["update_s"]
            values["perf/padding_share"] = record["padding_share"]
            values["perf/peak_allocated_gb"] = record["peak_memory_bytes"] / 1e9
            if "save_s" in record:
                values["perf/save_seconds"] = record["save_s"]
        else:
            for name in FIGURES:
                values[f"{split}/{name}"] = record[name]
            for source, loss in record["sources"].items():
                values[f"{split}/{source}/answer_loss"] = loss
    found = {
        step: {k: v for k, v in values.items() if not k.startswith(("_", "samples"))}
        for step, values in on_wandb.history.items()
    }
    assert found == expected
    assert list(found) == sorted(found)


def test_the_samples_table(on_wandb, run):
    (path,) = run.glob("wandb/offline-run-*/files/media/table/*.table.json")
    table = json.loads(path.read_text())
    assert table["columns"] == SAMPLE_COLUMNS
    assert SAMPLE_COLUMNS == [
        "step", "source", "question", "reference", "base answer", "tuned answer", "stopped by itself",
    ]  # fmt: skip
    assert len(table["data"]) == 2
    for step, source, question, reference, _, _, stopped in table["data"]:
        assert step == 4
        assert source in ("medquad", "afrimedqa")
        assert question
        assert reference
        assert isinstance(stopped, bool)
    assert on_wandb.history[4]["samples/nrows"] == 2


def test_the_adapter_is_an_artifact(on_wandb):
    (artifact,) = [artifact for artifact in on_wandb.artifacts if artifact.type == "model"]
    assert {entry.path for entry in artifact.manifest.contents} >= {"adapter_model.safetensors", "README.md"}


# --- again, and anew


def test_again_is_complete_and_changes_nothing(run, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(command(run)) == 0
    said = capsys.readouterr()
    assert "the run is already complete" in said.out
    assert "before and after" in said.out
    assert not said.err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.fixture
def short(tmp_path) -> Path:
    """A run of its own, of two updates, without W&B."""
    directory = tmp_path / "short"
    assert main(command(directory, sets=("training.max_steps=2", "tracking.wandb=disabled"))) == 0
    return directory


def test_disabled_writes_nothing_and_a_run_may_grow_or_start_over(short, metrics):
    assert not (short / "wandb").exists()
    first = json.loads((short / "run.json").read_text())

    more = command(short, sets=("tracking.wandb=disabled",))
    assert main(more) == 0
    records = list(read_metrics(short / "metrics.jsonl"))
    assert len({(r["step"], r["split"]) for r in records}) == len(records)
    figures = ("loss", "grad_norm", "learning_rate", "tokens", "tokens_seen", "examples_seen")
    straight = [[r[key] for key in figures] for r in metrics if r["split"] == "train"]
    assert [[r[key] for key in figures] for r in records if r["split"] == "train"] == straight, "bit for bit"
    summary = json.loads((short / "summary.json").read_text())
    assert (summary["updates"], summary["resumes"]) == (4, 1)

    AcceleratorState._reset_state(reset_partial_state=True)
    assert main([*more[:2], "--fresh", *more[2:]]) == 0
    anew = json.loads((short / "run.json").read_text())
    assert anew["resumes"] == 0
    assert anew["run_id"] != first["run_id"]
    assert [(r["step"], r["split"]) for r in read_metrics(short / "metrics.jsonl")] == EVENTS


def test_saves_between_logged_updates_leave_file_and_wandb_alike(tmp_path):
    logged = []

    class Recorder:
        def log(self, values, step):
            logged.append((step, values))

    tracker = Tracker(True, MetricsFile(tmp_path / "metrics.jsonl"), Recorder())
    tracker.truncate_after(-1, 20)
    tracker.log(line(10, "train", loss=1.0))
    tracker.log_save(10, 0.5)
    tracker.log_save(15, 0.5)  # no line of its own
    assert [step for step, values in logged if "perf/save_seconds" in values] == [10]
    assert [r["save_s"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [0.5]


# --- where W&B goes


def tracking(*sets: str):
    return load_experiment("exp_001", tiny=True, sets=sets)


@pytest.fixture
def accelerator():
    wandb.teardown()  # it reads its variables once a process
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, log_with="wandb")
    AcceleratorState._reset_state(reset_partial_state=True)


def started(accelerator: Accelerator, directory: Path, *sets: str) -> str:
    """Start and end a W&B run; what the console is told."""
    directory.mkdir(exist_ok=True)
    told = start_wandb(accelerator, tracking(*sets), directory, "abcd1234", {})
    accelerator.end_training()
    return told


@pytest.mark.parametrize("asked", ["auto", "online"])
def test_without_a_key_it_is_offline_at_once_and_without_a_prompt(asked, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked"))
    monkeypatch.setattr("medqa.training.wandb.connects", lambda url: pytest.fail("no network is needed to know"))
    assert wandb_mode(tracking(f"tracking.wandb={asked}").tracking) == (
        "offline",
        " (no API key: run `wandb login` to log online)",
    )


@pytest.mark.parametrize("variable, mode", [("offline", "offline"), ("dryrun", "offline"), ("disabled", None)])
def test_wandb_mode_wins_over_the_file(variable, mode, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", variable)
    for asked in ("auto", "online", "offline", "disabled"):
        settings = tracking(f"tracking.wandb={asked}").tracking
        assert wandb_wanted(settings) == (mode is not None)
        assert mode is None or wandb_mode(settings) == (mode, "")


def test_a_key_in_the_netrc_file_counts(monkeypatch, tmp_path):
    path = tmp_path / "netrc"
    path.write_text(f"machine api.wandb.ai login user password {'0' * 40}\n")
    monkeypatch.setenv("NETRC", str(path))
    monkeypatch.setattr("medqa.training.wandb.connects", lambda url: url == "https://api.wandb.ai")
    assert wandb_mode(tracking().tracking) == ("online", "")
    path.write_text("machine elsewhere login user password x\n")
    assert wandb_mode(tracking().tracking)[0] == "offline"


@pytest.mark.parametrize("value", ["true", "1", "YES", "on"])
def test_wandb_disabled_means_what_it_does_to_transformers(value, monkeypatch):
    monkeypatch.setenv("WANDB_DISABLED", value)
    for asked in ("auto", "online", "offline"):
        assert not wandb_wanted(tracking(f"tracking.wandb={asked}").tracking)
    monkeypatch.setenv("WANDB_MODE", "online")
    assert not wandb_wanted(tracking().tracking)
    monkeypatch.setenv("WANDB_DISABLED", "false")
    assert wandb_wanted(tracking().tracking)


@pytest.fixture(params=["latin-1", "pipe", "directory", "no permission", "nonsense", "device"])
def odd_netrc(request, tmp_path, monkeypatch):
    """A netrc file that has the key, but cannot be read."""
    path = tmp_path / "netrc"
    key = f"machine api.wandb.ai login user password {'0' * 40}\n"
    match request.param:
        case "latin-1":
            path.write_bytes(f"# caf\xe9\n{key}".encode("latin-1"))
        case "pipe":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "no permission":
            path.write_text(key)
            path.chmod(0)
            if os.access(path, os.R_OK):
                pytest.skip("root may read all")
        case "nonsense":
            path.write_text("machine\n")
        case "device":
            path = Path("/dev/zero")
    monkeypatch.setenv("NETRC", str(path))
    return path


def test_a_netrc_file_that_cannot_be_read_is_said_and_keeps_nobody_waiting(odd_netrc, accelerator, tmp_path):
    told = started(accelerator, tmp_path / "run")
    assert told.startswith(f"W&B: offline ({odd_netrc} cannot be read: ")
    assert "correct the file, or set WANDB_API_KEY)" in told
    assert os.environ["NETRC"] == os.devnull
    assert offline_run(tmp_path / "run").finished


def test_a_key_of_the_environment_needs_no_netrc_file(odd_netrc, accelerator, monkeypatch, tmp_path):
    server = WandbServer()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    told = start_wandb(accelerator, tracking(), tmp_path / "run", "abcd1234", {})
    accelerator.end_training()
    server.stop_hanging.set()
    assert told.startswith("W&B: online, ")


def test_where_the_home_cannot_be_written_wandb_keeps_its_files_with_the_run(accelerator, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("HOME", "/dev/null")
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    adapter = tmp_path / "run" / "lora_adapters"
    adapter.mkdir(parents=True)
    (adapter / "README.md").write_text("an adapter")
    assert start_wandb(accelerator, tracking(), tmp_path / "run", "abcd1234", {}).startswith("W&B: offline")
    log_adapter(accelerator, tracking().tracking, adapter, "abcd1234")
    accelerator.end_training()
    (artifact,) = offline_run(tmp_path / "run").artifacts
    assert [entry.path for entry in artifact.manifest.contents] == ["README.md"]
    kept = [path.read_text() for path in (tmp_path / "run" / "wandb" / "data").rglob("*") if path.is_file()]
    assert kept == ["an adapter"]
    assert capfd.readouterr().err == "", "its service process has a log file of its own"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("WANDB_FINISH_TIMEOUT", "soon", "finish_timeout"),
        ("WANDB_MODE", "sometimes", "mode"),
    ],
)
def test_variables_that_mean_nothing_are_the_users_to_mend(name, value, said, accelerator, monkeypatch, tmp_path):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"(?i)W&B: .*{said}.*correct `tracking` or the WANDB_"):
        started(accelerator, tmp_path / "run")


@pytest.mark.parametrize("url", ["http://user:PASS@127.0.0.1:9", "http://user:PASS@[127", "http://user:P@SS@h:80/x"])
def test_no_password_of_an_address_is_shown(url, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", url)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    mode, why = wandb_mode(tracking().tracking)
    assert mode == "offline"
    assert "SS" not in why
    assert "user" not in why
    assert "127" in why or "h:80" in why


def test_an_address_with_a_password_is_still_asked(monkeypatch):
    server = WandbServer()
    scheme, host = server.environment["WANDB_BASE_URL"].split("://")
    assert connects(f"{scheme}://user:PASS@{host}")


def test_only_the_adapters_own_files_are_an_artifact(accelerator, tmp_path, monkeypatch):
    """Of a directory that somebody else has made, or put something into."""
    (tmp_path / "secret").write_text("secret")
    directory = tmp_path / "run" / "lora_adapters"
    directory.mkdir(parents=True)
    for name in ("adapter_model.safetensors", "README.md", "notes.txt", "id_rsa"):
        (directory / name).write_text(name)
    for name in ("adapter_config.json", "tokenizer.json", "more.txt"):
        (directory / name).symlink_to(tmp_path / "secret")
    (directory / "chat_template.jinja").mkdir()
    (directory / "chat_template.jinja" / "x").symlink_to(tmp_path / "secret")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    start_wandb(accelerator, tracking(), tmp_path / "run", "abcd1234", {})
    log_adapter(accelerator, tracking().tracking, directory, "abcd1234")
    (tmp_path / "link").symlink_to(directory)
    log_adapter(accelerator, tracking().tracking, tmp_path / "link", "efgh")
    accelerator.end_training()
    (artifact,) = offline_run(tmp_path / "run").artifacts
    assert {entry.path for entry in artifact.manifest.contents} == {"adapter_model.safetensors", "README.md"}
    staged = [path.read_text() for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert sorted(staged) == ["README.md", "adapter_model.safetensors"]


def test_an_exception_that_a_version_of_wandb_lacks_is_left_out(monkeypatch):
    known = failures()
    monkeypatch.setattr("medqa.training.wandb.PRIVATE", (*PRIVATE, "wandb.no.such:Error", "wandb.errors:NoSuch"))
    assert failures() == known
    assert len(known) == 3 + len(PRIVATE)


def test_project_name_and_tags_of_the_environment_win(accelerator, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setenv("WANDB_NAME", "called-so")
    monkeypatch.setenv("WANDB_TAGS", "a,b")
    monkeypatch.setenv("WANDB_MODE", "offline")
    started(accelerator, tmp_path / "run", "tracking.project=ours", "tracking.run_name=ours", "tracking.wandb=disabled")
    found = offline_run(tmp_path / "run")
    assert (found.project, found.name, sorted(found.tags), found.id) == ("theirs", "called-so", ["a", "b"], "abcd1234")


def test_project_and_name_of_the_file(accelerator, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    told = started(accelerator, Path(), "tracking.wandb=offline", "tracking.project=ours")
    found = offline_run(tmp_path)
    assert (found.project, found.name) == ("ours", tmp_path.name), "the directory's name, however it is written"
    assert told.startswith("W&B: offline in ")


def test_settings_that_wandb_refuses_are_the_users_to_mend(accelerator, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_PROJECT", "a/b")
    with pytest.raises(UserError, match=r"W&B: Invalid project name.*tracking.wandb=disabled"):
        started(accelerator, tmp_path / "run", "tracking.wandb=offline")


class HalfDead(BaseHTTPRequestHandler):
    """Answers the question whether it is there, and nothing after."""

    def do_HEAD(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        time.sleep(30)

    do_GET = do_POST

    def log_message(self, *arguments):
        pass


@pytest.fixture(params=["refused", "silent", "half dead"])
def unusable_url(request):
    """A W&B server that is not there, one that accepts connections and keeps silent, one that stops answering."""
    if request.param == "refused":
        yield "http://127.0.0.1:9"
    elif request.param == "silent":
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            server.listen(50)
            yield f"http://127.0.0.1:{server.getsockname()[1]}"
    else:
        server = ThreadingHTTPServer(("127.0.0.1", 0), HalfDead)
        server.daemon_threads = True
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_key_but_no_network_is_offline_within_15_seconds(unusable_url, accelerator, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", unusable_url)
    begun = time.monotonic()
    told = start_wandb(accelerator, tracking(), tmp_path, "abcd1234", {})
    assert time.monotonic() - begun < 15
    assert told.startswith("W&B: offline (")
    accelerator.log({"train/loss": 1.0}, step=3)
    accelerator.end_training()
    runs = [read_finished_run(path) for path in tmp_path.glob("wandb/offline-run-*/run-*.wandb")]
    (found,) = [run for run in runs if run.history]
    assert found.id == "abcd1234"
    assert found.history[3]["train/loss"] == 1.0


def test_a_complete_run_of_other_data_is_not_complete(run, capsys):
    before = (run / "summary.json").read_bytes()
    assert main(command(run, "--afrimedqa", "none")) == 2
    assert "trained with other data" in capsys.readouterr().err
    assert (run / "summary.json").read_bytes() == before
