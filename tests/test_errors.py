"""Every mistake a user can make: exit code 2, one message that says what, where and what to do, and nothing changed."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from huggingface_hub import constants
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from medqa.errors import (
    LAUNCHER_DIED,
    Interrupted,
    NotWritten,
    StoppedInTime,
    TrainingStopped,
    UserError,
    exit_code,
    is_out_of_memory,
    writing,
)
from medqa.hub import hub_reachable
from medqa.tiny import AFRIMEDQA_CSV, BASE_DIR, MEDQUAD_CSV
from medqa.training.stopping import TOGETHER_S, Stopper
from train import main

ROOT = Path(__file__).parents[1]
HUGE = 4000  # characters: longer than the name of any file may be, and shorter than any location may be
FAST = ["training.max_steps=1", "evaluation.rows=4", "evaluation.samples=0", "model.quantization=none"]
FAST += ["tracking.wandb=disabled", "lora.r=2"]


@pytest.fixture(autouse=True)
def apart(monkeypatch, tmp_path) -> Iterator[None]:
    """Each case by itself: the accelerator's state and the answer about the hub are the process's otherwise."""
    monkeypatch.chdir(tmp_path)
    offline = constants.HF_HUB_OFFLINE
    hub_reachable.cache_clear()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    hub_reachable.cache_clear()
    constants.HF_HUB_OFFLINE = offline


def argv(*options: str, sets: tuple[str, ...] = (), tiny: bool = True, exp: str = "exp_001") -> list[str]:
    """A run that would take a second, but for what is wrong with `options` and `sets`."""
    return ["--exp", exp, *(["--tiny"] if tiny else []), "--cpu", *options, "--set", *FAST, *sets]


def snapshot(directory: Path) -> dict[str, bytes | None]:
    """Every file below a directory with its content."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }


def refused(capsys, directory: Path, *arguments: str) -> str:
    """Run, see that it ended as a user's mistake should, and give the message."""
    before = snapshot(directory)
    capsys.readouterr()
    code = main(list(arguments))
    said = capsys.readouterr()
    assert code == 2, said
    assert said.err.startswith("error: ")
    assert said.err.count("error: ") == 1
    assert "Traceback" not in said.err + said.out
    assert not said.out, "nothing else is said"
    assert snapshot(directory) == before
    return said.err


def model_dir(directory: Path) -> Path:
    """A copy of the tiny base model, to be damaged."""
    return Path(shutil.copytree(BASE_DIR, directory / "model"))


def edited_config(directory: Path, **changes: object) -> str:
    """A model directory whose config.json says something else."""
    path = model_dir(directory) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(path.parent)


def written(path: Path, content: str | bytes) -> str:
    """A file with this content."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


# --- options and experiment files: (what is wrong, what the message must say)


def linked(path: Path, target: str | Path) -> Path:
    """A link at this path."""
    path.symlink_to(target)
    return path


OPTIONS: dict[str, tuple[Callable[[Path], list[str]], list[str]]] = {
    "unknown experiment": (lambda d: argv(exp="exp_999"), ["exp_999", "exp_001, exp_002, exp_003"]),
    "experiment path missing": (lambda d: argv(exp="nowhere/x.yaml"), ["nowhere/x.yaml", "no such file", "exp_001"]),
    "experiment path too long": (lambda d: argv(exp="a/" + "x" * HUGE), ["no such file"]),
    "experiment of no user": (lambda d: argv(exp="~nosuchuser/x.yaml"), ["~nosuchuser/x.yaml", "no such file"]),
    "experiment is a directory": (lambda d: argv(exp=str(d)), ["no such file"]),
    "broken YAML": (
        lambda d: argv(exp=written(d / "x.yaml", "model:\n  base: [\nlora: 3")),
        ["x.yaml, line 3", "not valid YAML"],
    ),
    "not text": (lambda d: argv(exp=written(d / "x.yaml", b"\xff\xfe\x00")), ["x.yaml", "cannot be read"]),
    "empty file": (lambda d: argv(exp=written(d / "x.yaml", "")), ["x.yaml", "sections (model, lora"]),
    "repeated key": (
        lambda d: argv(exp=written(d / "x.yaml", "lora: {r: 1}\nlora: {r: 2}\n")),
        ["x.yaml, line 2", "the key lora is repeated (lines 1 and 2); keep one"],
    ),
    "unknown key": (lambda d: argv(sets=("lora.rr=3",)), ["lora.rr = 3", "did you mean lora.r?"]),
    "mistyped key": (lambda d: argv(sets=("optimizer.lerning_rate=3",)), ["did you mean optimizer.learning_rate?"]),
    "wrong type": (lambda d: argv(sets=("lora.r=four",)), ["lora.r = 'four'", "expected an integer"]),
    "odd tag": (lambda d: argv(sets=("lora.r=!!bool maybe",)), ["lora.r", "not valid YAML"]),
    "several at once": (
        lambda d: argv(sets=("lora.rr=3", "training.lr=1", "tokenization.padding=left", "nonsense")),
        ["lora.rr = 3", "optimizer.learning_rate", "'longest' or 'max_length'", "--set nonsense"],
    ),
    "no source": (lambda d: argv("--medquad", "none", "--afrimedqa", "none"), ["--medquad, --afrimedqa", "both none"]),
    "batch that does not divide": (
        lambda d: argv(sets=("training.global_batch_size=30",)),
        ["= 30", "per_device_batch_size = 4", "per_device_batch_size=1 or 2 or 3 or 5", "global_batch_size=28 or 32"],
    ),
    "batch smaller than a micro-batch": (
        lambda d: argv(sets=("training.global_batch_size=2",)),
        ["per_device_batch_size=1 or 2", "global_batch_size=4"],
    ),
    "beyond the model's length": (
        lambda d: argv(sets=("tokenization.max_length=513",)),
        ["max_length = 513", "at most 512", "--set tokenization.max_length=512"],
    ),
    "target module unknown": (
        lambda d: argv(sets=("lora.target_modules=[q_proj, c_attn]",)),
        ["'c_attn'", "it has down_proj, gate_proj, k_proj"],
    ),
    "target module that is no layer": (lambda d: argv(sets=("lora.target_modules=[mlp]",)), ["'mlp'", "down_proj"]),
    "init_from missing": (lambda d: argv(sets=("lora.init_from=nowhere",)), ["init_from = nowhere", "adapter_model"]),
    "seed out of range": (lambda d: argv(sets=(f"training.seed={2**64}",)), ["training.seed"]),
    "persist-to where nothing is mounted": (
        lambda d: argv("--persist-to", str(d / "drive" / "run")),
        ["--persist-to", "drive does not exist; mount or create it"],
    ),
    "persist-to the output directory": (
        lambda d: argv("--persist-to", str(d / "run"), "--output-dir", str(d / "run")),
        ["--persist-to", "this is the output directory"],
    ),
    "data": (lambda d: argv("--data", "mine=x.csv"), ["mine: x.csv: no such file", "--data mine=none"]),
    "data twice": (lambda d: argv("--data", "a=x.csv", "--data", "a=y.csv"), ["--data: a: given more than once"]),
    "micro-batch of no tokens": (
        lambda d: argv(sets=("training.micro_batch_tokens=0",)),
        ["training.micro_batch_tokens = 0", "greater than or equal to 1"],
    ),
    "output under a file": (
        lambda d: argv("--output-dir", written(d / "file", "mine") + "/out"),
        ["/file is not a directory", "choose another"],
    ),
    "output under a link to nowhere": (
        lambda d: argv("--output-dir", str(linked(d / "outputs", "/scratch/not/mounted") / "run")),
        ["/outputs is a link to /scratch/not/mounted, which does not exist", "choose another"],
    ),
    "output that links to itself": (
        lambda d: argv("--output-dir", str(linked(d / "run", d / "run"))),
        ["run is a link that leads to itself", "choose another"],
    ),
    "persist-to a link to nowhere": (
        lambda d: argv("--persist-to", str(linked(d / "drive", "/mnt/gone"))),
        ["--persist-to", "/drive is a link to /mnt/gone, which does not exist"],
    ),
    "lora_adapters is a file": (
        lambda d: argv("--output-dir", str(Path(written(d / "lora_adapters", "mine")).parent)),
        ["/lora_adapters is not a directory"],
    ),
    "output that is not UTF-8": (lambda d: argv("--output-dir", str(d / "caf\udce9")), ["the path is not UTF-8"]),
    "more updates than can be counted": (
        lambda d: argv(sets=(f"training.max_steps=1{'0' * 400}",)),
        ["--set: training.max_steps = 1000", "...", "less than or equal to"],
    ),
    "a rank of no memory": (lambda d: argv(sets=("lora.r=100000000",)), ["lora.r = 100000000", "equal to 65536"]),
    "a number of thousands of digits": (
        lambda d: argv(sets=(f"training.max_steps=0x1{'f' * 5_000}",)),
        ["--set training.max_steps=0x1fff", "has 5,003 characters"],
    ),
    "output is a file": (lambda d: argv("--output-dir", written(d / "file", "x")), ["not a directory"]),
    "output name too long": (lambda d: argv("--output-dir", "x" * 300), ["name too long", "choose another"]),
    "output holds files of our names": (
        lambda d: argv("--output-dir", str(Path(written(d / "metrics.jsonl", "mine")).parent)),
        ["metrics.jsonl", "choose another"],
    ),
    "fresh over a config.yaml of someone else's": (
        lambda d: argv("--fresh", "--output-dir", str(Path(written(d / "config.yaml", "a: 1")).parent)),
        ["config.yaml", "files that no run created"],
    ),
}

HEADER = "question,answer,source,focus_area\n"
PAIR = {"question": "What is flu ?", "answer": "An infection."}


def jsonl(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


DATA: dict[str, tuple[str, str | bytes, list[str]]] = {  # file name, content, what the message must say
    "wrong columns": ("x.csv", "q,a\nx,y\n", ["no column question and answer", "columns found: q, a"]),
    "broken CSV": ("x.csv", HEADER + 'a,"b,c,d\n', ["x.csv", "line 2", "broken CSV"]),
    "CSV with a short row": ("x.csv", HEADER + "a,b,c,d\na,b\n", ["x.csv, line 3", "2 fields where the header has 4"]),
    "not UTF-8": ("x.csv", HEADER.encode() + b"caf\xe9,b,c,d\n", ["x.csv, line 2", "UTF-8"]),
    "broken JSONL": ("x.jsonl", jsonl(PAIR) + '{"question": \n', ["x.jsonl, line 2", "broken JSON"]),
    "JSONL of arrays": ("x.jsonl", "[1]\n", ["x.jsonl, line 1", "one JSON object"]),
    "JSONL with a number for text": ("x.jsonl", jsonl(PAIR | {"answer": 3}), ["record 0", "'answer'", "not text"]),
    "broken parquet": ("x.parquet", b"PAR1" + b"\0" * 50, ["x.parquet", "broken parquet"]),
    "empty file": ("x.csv", "", ["x.csv", "empty"]),
    "only a header": ("x.csv", HEADER, ["no usable row among 0 records"]),
    "no usable row": ("x.jsonl", jsonl(PAIR | {"answer": " "}), ["no usable row among 1 records", "1 empty answer"]),
    "too few rows to split": ("x.jsonl", jsonl(PAIR), ["too few rows to split: 1 rows", "validation and test"]),
    "unknown type of file": ("x.txt", "hello", ["x.txt", ".csv, .jsonl, .parquet"]),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options(case, capsys, tmp_path):
    make, told = OPTIONS[case]
    message = refused(capsys, tmp_path, *make(tmp_path))
    for words in told:
        assert words in message


@pytest.mark.parametrize("case", DATA)
def test_data(case, capsys, tmp_path):
    name, content, told = DATA[case]
    path = written(tmp_path / name, content)
    message = refused(capsys, tmp_path, *argv("--medquad", path, "--afrimedqa", "none"))
    for words in told:
        assert words in message


@pytest.mark.parametrize(
    "location", ["nowhere.csv", "./nowhere", "/nowhere/x", "~nosuchuser/x.csv", "", "x" * HUGE + ".csv"]
)
def test_data_that_is_not_there(location, capsys, tmp_path):
    message = refused(capsys, tmp_path, *argv("--medquad", location))
    assert "medquad" in message
    assert "--medquad none" in message or "or none" in message


def test_both_sources_problems_in_one_message(capsys, tmp_path):
    message = refused(capsys, tmp_path, *argv("--medquad", "a.csv", "--afrimedqa", "b.csv"))
    assert "a.csv" in message
    assert "b.csv" in message


def test_broken_xml(capsys, tmp_path):
    directory = tmp_path / "xml"
    directory.mkdir()
    assert "no .xml file" in refused(capsys, tmp_path, *argv("--medquad", str(directory)))
    written(directory / "a.xml", "<Document><QAPairs>")
    message = refused(capsys, tmp_path, *argv("--medquad", str(directory)))
    assert "a.xml" in message
    assert "broken XML" in message


# --- models


def broken(directory: Path, kind: str) -> str:
    """A model directory that cannot be loaded, in one of many ways."""
    model = model_dir(directory)
    weights = model / "model.safetensors"
    match kind:
        case "no config":
            (model / "config.json").unlink()
        case "config is junk":
            (model / "config.json").write_text("{{")
        case "config is null":
            (model / "config.json").write_text("null")
        case "no weights":
            weights.unlink()
        case "truncated weights":
            weights.write_bytes(weights.read_bytes()[:-1000])
        case "weights are empty":
            weights.write_bytes(b"")
        case "a weight is missing":
            tensors = load_file(weights)
            del tensors["model.layers.0.mlp.down_proj.weight"]
            save_file(tensors, weights, metadata={"format": "pt"})
        case "a weight of another shape":
            tensors = load_file(BASE_DIR / "model.safetensors")
            tensors["model.norm.weight"] = torch.ones(3)
            save_file(tensors, weights, metadata={"format": "pt"})
        case "no tokenizer":
            (model / "tokenizer.json").unlink()
        case "tokenizer is junk":
            (model / "tokenizer.json").write_text("{")
        case "tokenizer of no model":
            (model / "tokenizer.json").write_text('{"added_tokens": []}')
        case "tokenizer without EOS":
            config = json.loads((model / "tokenizer_config.json").read_text())
            (model / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": None}))
        case "tokenizer with the prompt's words as special tokens":
            path = model / "tokenizer.json"
            content = json.loads(path.read_text())
            token = content["added_tokens"][-1] | {"id": len(content["model"]["vocab"]), "content": "### Response:"}
            content["added_tokens"].append(token | {"special": True})
            path.write_text(json.dumps(content))
    return str(model)


MODELS = {
    "no config": "model_type",
    "config is junk": "valid JSON",
    "config is null": "cannot be loaded",
    "no weights": "model.safetensors",
    "truncated weights": "not fully covered",
    "weights are empty": "cannot be loaded",
    "a weight is missing": "weights are missing: model.layers.0.mlp.down_proj.weight",
    "a weight of another shape": "cannot be loaded",
    "no tokenizer": "tokenizer",
    "tokenizer is junk": "tokenizer",
    "tokenizer of no model": "tokenizer",
    "tokenizer without EOS": "EOS",
    "tokenizer with the prompt's words as special tokens": "chat template",
}


@pytest.mark.parametrize("kind", MODELS)
def test_model_directories(kind, capsys, tmp_path):
    message = refused(capsys, tmp_path, *argv("--model", broken(tmp_path, kind)))
    assert f"model.base = {tmp_path / 'model'}: " in message
    assert MODELS[kind] in message
    assert "--model" in message, "what to do"


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": "abc"}, {"num_attention_heads": 0}, {"vocab_size": -5}, {"hidden_size": 129},
     {"num_hidden_layers": 2.5}, {"intermediate_size": 100}, {"model_type": "nope"}, {"max_position_embeddings": "x"}],
    ids=str,
)  # fmt: skip
def test_configs_that_make_no_model(changes, capsys, tmp_path):
    message = refused(capsys, tmp_path, *argv("--model", edited_config(tmp_path, **changes)))
    assert "cannot be loaded from this directory" in message


@pytest.mark.parametrize("base", ["/nowhere/model", "./nowhere", "~nosuchuser/model", "/" + "x" * HUGE, "a/b/c"])
def test_model_directory_missing(base, capsys, tmp_path):
    message = refused(capsys, tmp_path, *argv("--model", base))
    assert "no such directory" in message
    assert "--tiny" in message


def test_pickled_weights_are_never_loaded(capsys, tmp_path):
    model = model_dir(tmp_path)
    (model / "model.safetensors").unlink()
    mark = tmp_path / "pickle-was-loaded"

    class Payload:
        def __reduce__(self):
            return (open, (str(mark), "w"))

    torch.save({"model.norm.weight": Payload()}, model / "pytorch_model.bin")
    message = refused(capsys, tmp_path, *argv("--model", str(model)))
    assert "safetensors" in message
    assert not mark.exists()


@pytest.mark.parametrize("model_type", ["evil", "llama"])
def test_code_that_comes_with_a_model_never_runs(model_type, capsys, tmp_path):
    mark = tmp_path / "code-ran"
    classes = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
    model = Path(edited_config(tmp_path, model_type=model_type, auto_map=classes))
    (model / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass C: pass\nclass M: pass\nclass T: pass\n")
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"auto_map": classes}))
    code = main(argv("--model", str(model)))
    assert code == (2 if model_type == "evil" else 0), "a type that transformers has is loaded with its own code"
    assert not mark.exists()
    assert "Traceback" not in capsys.readouterr().err


# --- networks


@pytest.fixture
def silent_server() -> Iterator[str]:
    """The URL of a host that accepts connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(50)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def no_cache(monkeypatch, tmp_path) -> None:
    """No proxies, and empty caches."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "kaggle"))


@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize("silent", [False, True], ids=["refused", "silent"])
def test_hub_model_unreachable(silent, silent_server, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(constants, "ENDPOINT", silent_server if silent else "http://127.0.0.1:9")
    started = time.monotonic()
    message = refused(capsys, tmp_path, *argv("--model", "nobody/nothing"))
    assert time.monotonic() - started < 15
    assert "nobody/nothing" in message
    assert "Hub does not answer" in message
    assert "--model" in message
    assert "--tiny" in message


@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize("option", ["--medquad", "--afrimedqa"])
def test_hub_dataset_unreachable(option, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    started = time.monotonic()
    message = refused(capsys, tmp_path, *argv(option, "nobody/nothing"))
    assert time.monotonic() - started < 15
    assert "nobody/nothing" in message
    assert "cannot be reached" in message
    assert f"{option} PATH, or {option} none" in message
    assert "--tiny" in message


@pytest.mark.usefixtures("no_cache")
def test_kaggle_unreachable(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("medqa.data.readers.KAGGLE_HOST", "127.0.0.1:9")
    started = time.monotonic()
    message = refused(capsys, tmp_path, *argv("--medquad", "kaggle:nobody/nothing"))
    assert time.monotonic() - started < 15
    assert "kaggle:nobody/nothing" in message
    assert "--medquad none" in message
    assert "--tiny" in message


@pytest.mark.usefixtures("no_cache")
def test_the_data_is_asked_for_before_the_model_is_fetched(monkeypatch, capsys, tmp_path):
    loaded = []
    monkeypatch.setattr("train.load_model", lambda *a: loaded.append(a))
    refused(capsys, tmp_path, *argv("--medquad", "nowhere.csv"))
    assert not loaded


# --- directories of runs


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    """A complete run of one update."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    assert main(argv("--output-dir", str(directory))) == 0
    return directory


@pytest.fixture
def run_copy(finished_run, tmp_path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def test_another_experiments_run(run_copy, capsys, tmp_path):
    message = refused(capsys, tmp_path, *argv("--output-dir", str(run_copy), sets=("lora.lora_alpha=4",)))
    assert "contains a run of another experiment" in message
    assert "lora.lora_alpha: 16 there, 4 now" in message
    assert "--fresh" in message
    assert "choose another --output-dir" in message


def test_other_data_under_the_same_name(run_copy, capsys, tmp_path):
    (run_copy / "summary.json").unlink()
    data = Path(shutil.copy(MEDQUAD_CSV, tmp_path / "medquad.csv"))
    data.write_text(data.read_text(encoding="utf-8").replace("fever", "Fever"), encoding="utf-8")
    message = refused(capsys, tmp_path, *argv("--output-dir", str(run_copy), "--medquad", str(data)))
    assert "other data" in message


DAMAGED = pytest.mark.parametrize("content", [b"", b"{{{", b"[1]", b"{}", b"\xff\xfe"], ids=repr)


@DAMAGED
@pytest.mark.parametrize("name", ["config.yaml", "run.json"])
def test_damaged_files_of_a_run_are_made_again_from_its_checkpoint(name, content, run_copy, finished_run, capsys):
    (run_copy / name).write_bytes(content)
    (run_copy / "summary.json").unlink()
    assert main(argv("--output-dir", str(run_copy))) == 0
    first, again = (json.loads((d / "run.json").read_text()) for d in (finished_run, run_copy))
    assert again == first | {"resumes": first["resumes"] + 1, "saved": True}
    assert (run_copy / "config.yaml").read_bytes() == (finished_run / "config.yaml").read_bytes()


@DAMAGED
@pytest.mark.parametrize("name", ["config.yaml", "run.json"])
def test_damaged_files_of_a_run_without_a_checkpoint(name, content, run_copy, capsys, tmp_path):
    (run_copy / "summary.json").unlink()
    shutil.rmtree(run_copy / "checkpoint-1")
    (run_copy / name).write_bytes(content)
    message = refused(capsys, tmp_path, *argv("--output-dir", str(run_copy)))
    assert name in message
    assert "--fresh" in message


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"updates": 1}'], ids=repr)
def test_a_damaged_summary_is_made_again(content, run_copy, finished_run, capsys):
    (run_copy / "summary.json").write_bytes(content)
    assert main(argv("--output-dir", str(run_copy))) == 0
    again, before = (json.loads((d / "summary.json").read_text()) for d in (run_copy, finished_run))
    assert again["final"] == before["final"]
    assert again["baseline"] == before["baseline"]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "training_state.pt", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_checkpoint(name, damage, run_copy, capsys, tmp_path):
    (run_copy / "summary.json").unlink()
    path = run_copy / "checkpoint-1" / name
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-100])
    message = refused(capsys, tmp_path, *argv("--output-dir", str(run_copy)))
    assert str(run_copy / "checkpoint-1") in message


def test_fresh_deletes_nothing_that_it_did_not_write(run_copy, capsys, tmp_path):
    (run_copy / "checkpoint-1" / "notes.txt").write_text("mine")
    message = refused(capsys, tmp_path, *argv("--fresh", "--output-dir", str(run_copy)))
    assert "checkpoint-1/notes.txt" in message
    assert "move them away" in message


def test_fresh_leaves_other_files_alone(run_copy, capsys):
    mine = {"notes.txt": "mine", "model.safetensors": "mine too", "checkpoint-best/x": "not a step", "data/x.csv": "q"}
    for name, text in mine.items():
        (run_copy / name).parent.mkdir(exist_ok=True)
        (run_copy / name).write_text(text)
    run_id = json.loads((run_copy / "run.json").read_text())["run_id"]
    assert main(argv("--fresh", "--output-dir", str(run_copy))) == 0
    assert {name: (run_copy / name).read_text() for name in mine} == mine
    after = json.loads((run_copy / "run.json").read_text())
    assert after["run_id"] != run_id
    assert after["resumes"] == 0


def test_init_from(run_copy, capsys, tmp_path):
    adapter = run_copy / "lora_adapters"
    out = tmp_path / "second"
    assert main(argv("--output-dir", str(out), sets=(f"lora.init_from={adapter}",))) == 0
    first, second = (json.loads((d / "summary.json").read_text()) for d in (run_copy, out))
    assert second["baseline"]["loss"] == pytest.approx(first["final"]["loss"], rel=1e-6)
    AcceleratorState._reset_state(reset_partial_state=True)
    message = refused(capsys, tmp_path, *argv(sets=(f"lora.init_from={adapter}", "lora.r=4")))
    assert f"lora.init_from = {adapter}: this adapter does not fit" in message
    AcceleratorState._reset_state(reset_partial_state=True)
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    message = refused(capsys, tmp_path, *argv(sets=(f"lora.init_from={adapter}",)))
    assert f"lora.init_from = {adapter}: no readable adapter_model.safetensors" in message


ADAPTERS: dict[str, Callable[[Path], object]] = {
    "empty directory": lambda d: [path.unlink() for path in d.iterdir()],
    "no weights": lambda d: (d / "adapter_model.safetensors").unlink(),
    "weights that are a directory": lambda d: replaced(d / "adapter_model.safetensors", Path.mkdir),
    "weights that are a pipe": lambda d: replaced(d / "adapter_model.safetensors", os.mkfifo),
    "empty weights": lambda d: os.truncate(d / "adapter_model.safetensors", 0),
    "cut weights": lambda d: os.truncate(d / "adapter_model.safetensors", 5_000),
    "cut in the header": lambda d: os.truncate(d / "adapter_model.safetensors", 100),
    "a header beyond the file": lambda d: (d / "adapter_model.safetensors").write_bytes(b"\xff" * 7 + b"\0" + b"{}"),
    "no safetensors": lambda d: (d / "adapter_model.safetensors").write_bytes(b"x" * 5_000),
    "another rank": lambda d: reshaped(d, lambda name, t: torch.zeros(t.shape[0] + 1, *t.shape[1:])),
    "other names": lambda d: reshaped(d, lambda name, t: t, lambda name: f"other.{name}"),
    "one matrix less": lambda d: reshaped(d, lambda name, t: None if "0.mlp.up_proj.lora_A" in name else t),
    "one matrix more": lambda d: reshaped(d, lambda name, t: t, lambda name: name, {"x": torch.zeros(3)}),
    "a whole model": lambda d: shutil.copy(BASE_DIR / "model.safetensors", d / "adapter_model.safetensors"),
    "pickled weights alone": lambda d: (
        torch.save({"x": torch.zeros(3)}, d / "adapter_model.bin"), (d / "adapter_model.safetensors").unlink()
    ),
}  # fmt: skip


def replaced(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def reshaped(directory: Path, change, rename=lambda name: name, more=None) -> None:
    path = directory / "adapter_model.safetensors"
    changed = {rename(name): change(name, tensor) for name, tensor in load_file(path).items()}
    save_file({name: tensor.clone() for name, tensor in (changed | (more or {})).items() if tensor is not None}, path)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapter_directories(kind, run_copy, capsys, tmp_path):
    adapter = run_copy.relative_to(tmp_path) / "lora_adapters"  # the same words for all, whose memory is planned once
    ADAPTERS[kind](adapter)
    arguments = argv(sets=(f"lora.init_from={adapter}",))
    if kind == "weights that are a pipe":
        assert main(arguments) == 2  # a snapshot would read it
        message = capsys.readouterr().err
    else:
        message = refused(capsys, tmp_path, *arguments)
    assert f"lora.init_from = {adapter}" in message


def test_an_adapter_that_is_no_number_is_noticed_before_training(run_copy, capsys):
    adapter = run_copy / "lora_adapters"
    reshaped(adapter, lambda name, tensor: tensor * torch.nan)
    assert main(argv(sets=(f"lora.init_from={adapter}",))) == 3
    assert "not finite" in capsys.readouterr().err


def test_names_from_outside_lead_nowhere(tmp_path, capsys):
    """Names that look like paths, in the data, the settings and the experiment: all stays in the output directory."""
    data = tmp_path / "medquad.csv"
    rows = [f'"../../{i} what is /etc/passwd?","../../../answer {i}","../../x","../../y"' for i in range(60)]
    data.write_text("question,answer,source,focus_area\n" + "\n".join(rows))
    before = set(tmp_path.rglob("*"))
    sets = ("tracking.run_name=../../evil", "tracking.group=../..", "tracking.wandb=offline", "tracking.log_model=true")
    out = tmp_path / "deep" / "down" / "run"
    code = main(argv("--output-dir", str(out), "--medquad", str(data), "--afrimedqa", "none", sets=sets))
    assert code == 0, capsys.readouterr().err
    made = set(tmp_path.rglob("*")) - before
    assert {path for path in made if not path.is_relative_to(out)} == {out.parent, out.parent.parent}
    assert not list(tmp_path.parent.glob("*evil*"))


def test_an_answer_that_never_fits_is_the_users_to_mend(capsys):
    code = main(argv(sets=("tokenization.max_length=8", "tokenization.loss_on=answer")))
    assert code == 2
    assert "leaves no row in train and validation and test" in capsys.readouterr().err


# --- the exit code itself


@pytest.mark.parametrize(
    "error, code, said",
    [
        (UserError("a, b, c"), 2, "error: a, b, c"),
        (TrainingStopped("no"), 3, "training stopped: no"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), 3, "CUDA out of memory. Tried; lower"),
        (MemoryError(), 3, "training stopped: out of memory; lower"),
        (
            OSError(12, "Cannot allocate memory", "/x/y"),
            3,
            "training stopped: [Errno 12] Cannot allocate memory: '/x/y';",
        ),
        (
            RuntimeError("unable to mmap 8 bytes from file <x>: Cannot allocate memory (12)"),
            3,
            "stopped: unable to mmap",
        ),
        (OSError(28, "No space left on device", "/x/metrics.jsonl"), 2, "/x/metrics.jsonl: No space left on device"),
        (Interrupted(signal.SIGTERM), 143, "SIGTERM"),
        (Interrupted(signal.SIGINT), 130, "stopped by SIGINT"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_exit_codes(error, code, said, capsys):
    def body() -> None:
        raise error

    assert exit_code(body) == code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory",
        "CUDA driver error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory",
    ],
)
def test_messages_that_mean_out_of_memory(message):
    assert is_out_of_memory(RuntimeError(message))
    assert not is_out_of_memory(ValueError(message))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_a_cpu_without_memory_is_no_defect(capsys):
    assert exit_code(lambda: torch.empty(10**15)) == 3
    assert "DefaultCPUAllocator: can't allocate memory" in (said := capsys.readouterr().err)
    assert "; lower training.per_device_batch_size" in said


def test_no_memory_while_a_file_is_written_is_not_said_of_the_disk(tmp_path, capsys):
    def body() -> None:
        with writing(tmp_path):
            raise OSError(12, "Cannot allocate memory", str(tmp_path / "metrics.jsonl"))

    assert exit_code(body) == 3
    assert "Cannot allocate memory" in capsys.readouterr().err


def test_only_a_directory_that_was_there_is_said_to_have_gone(tmp_path):
    def fail(directory: Path, error: OSError) -> None:
        with writing(directory):
            if directory.exists():
                directory.rmdir()
            raise error

    def why(directory: Path, error: OSError) -> str:
        with pytest.raises(NotWritten) as caught:
            fail(directory, error)
        return str(caught.value)

    (tmp_path / "there").mkdir()
    gone = why(tmp_path / "there", OSError(5, "Input/output error"))
    assert gone.startswith(f"{tmp_path / 'there'}: has been removed, or is no longer mounted")
    for error in (OSError(24, "Too many open files"), OSError(30, "Read-only file system", str(tmp_path / "never"))):
        message = why(tmp_path / "never", error)
        assert error.strerror in message
        assert "removed" not in message
    made_and_removed = why(tmp_path / "never", FileNotFoundError(2, "No such file", str(tmp_path / "never" / "x")))
    assert "has been removed" in made_and_removed


@pytest.mark.parametrize("error", [ValueError("ours"), OSError(2, "No such file"), RuntimeError("ours")])
def test_a_defect_keeps_its_traceback(error):
    def body() -> None:
        raise error

    with pytest.raises(type(error)):
        exit_code(body)


def test_only_the_first_process_of_each_host_speaks(capsys, monkeypatch):
    def body() -> None:
        raise UserError("once")

    for rank, local_rank, said in (("1", "1", ""), ("8", "0", "error: once\n")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert exit_code(body) == 2
        assert capsys.readouterr().err == said


def test_a_signal_outside_training_ends_the_run_at_once():
    with Stopper(), pytest.raises(Interrupted) as caught:
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.signum == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_in_training_is_noted_and_a_second_one_ends_it():
    with Stopper() as interrupts:
        interrupts.finish_update = True
        signal.raise_signal(signal.SIGINT)
        assert interrupts.received == signal.SIGINT
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGINT)


TERM, INT, HUP, CONT = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCONT


@pytest.mark.parametrize(
    "group",
    [
        (TERM, HUP),
        (HUP, TERM),
        (TERM, CONT, HUP),
        (HUP, CONT, HUP, CONT, TERM),  # a lost ssh connection: from the shell and from the kernel
        (TERM, TERM, CONT, CONT),  # `timeout`: to its child, then to its group
        (INT, TERM),
        (INT, HUP),
        (HUP, INT),
        (INT, LAUNCHER_DIED, LAUNCHER_DIED),
    ],
    ids=lambda group: "+".join(number.name.removeprefix("SIG") for number in group),
)
def test_signals_that_come_together_are_one_request(group):
    with Stopper() as interrupts:
        interrupts.finish_update = True
        for number in group:
            signal.raise_signal(number)
        assert interrupts.received == group[0]


@pytest.mark.parametrize("first", [TERM, HUP, INT])
@pytest.mark.parametrize("second", [TERM, INT])
def test_a_signal_that_comes_later_is_impatience(first, second, monkeypatch):
    with Stopper() as interrupts:
        interrupts.finish_update = True
        signal.raise_signal(first)
        now = time.monotonic() + 2 * TOGETHER_S
        monkeypatch.setattr(time, "monotonic", lambda: now)
        signal.raise_signal(HUP)  # that a terminal has gone says nothing of anybody's patience
        with pytest.raises(Interrupted) as caught:
            signal.raise_signal(second)
        assert caught.value.signum == second


def test_an_echo_does_not_disturb_a_run_that_is_ending():
    """Outside training the first signal raises; its echo must not cut off what is cleaned up on the way out."""
    cleaned = []
    with Stopper():
        try:
            signal.raise_signal(TERM)
        except Interrupted:
            signal.raise_signal(HUP)
            cleaned.append(True)
    assert cleaned


def test_a_signal_in_the_last_update_is_not_lost():
    with Stopper() as stopper, pytest.raises(Interrupted), stopper.finishing_updates(None):
        signal.raise_signal(TERM)


@pytest.mark.parametrize("error", [StoppedInTime("in time"), TrainingStopped("no"), NotWritten("full")])
def test_after_training_was_ended_by_an_error_a_signal_ends_the_run_at_once(error):
    """As while the last copies are waited for."""
    with Stopper() as stopper:
        with pytest.raises(type(error)), stopper.finishing_updates(None):
            raise error
        with pytest.raises(Interrupted):
            signal.raise_signal(TERM)


def test_nohup_is_respected():
    before = signal.signal(HUP, signal.SIG_IGN)
    try:
        with Stopper() as interrupts:
            signal.raise_signal(HUP)
            assert interrupts.received is None
        assert signal.getsignal(HUP) == signal.SIG_IGN
    finally:
        signal.signal(HUP, before)


def test_a_signal_does_not_end_a_run_that_has_ended_before_it_has_said_how(capsys, monkeypatch, tmp_path):
    """As of a launcher that stops all processes because one has died."""

    class Late(RuntimeError):
        def __str__(self) -> str:  # asked while the message is made
            signal.raise_signal(signal.SIGTERM)
            return "[gloo/pair.cc] Connection closed by peer"

    def lost(*_: object) -> None:
        raise Late

    for name, value in (
        ("WORLD_SIZE", "2"),
        ("RANK", "0"),
        ("LOCAL_RANK", "0"),
        ("MASTER_ADDR", "::1"),
        ("MASTER_PORT", "1"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("medqa.training.run.find_experiment", lost)
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("the process has ended without a word"))
    try:
        assert main(argv("--output-dir", str(tmp_path / "run"))) == 3
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "process 0: another process of this run has died or has not answered" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--nope"], [], ["--exp"], ["--exp", "exp_001", "--set"], ["--exp", "exp_001", "--tin"]]
)
def test_wrong_options_exit_2_and_name_themselves(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err


# --- as a process


def process(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *words],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_two_mistakes_as_processes(tmp_path):
    results = {}

    def go(name: str, *words: str) -> None:
        results[name] = process(*words, cwd=tmp_path)

    cases = {"key": ["--exp", "exp_001", "--set", "lora.rr=1"], "data": argv("--medquad", "nowhere.csv")}
    threads = [threading.Thread(target=go, args=(name, *words)) for name, words in cases.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results.values():
        assert result.returncode == 2
        assert "Traceback" not in result.stderr
        assert result.stderr.startswith("error: ")
        assert not result.stdout
    assert "did you mean lora.r?" in results["key"].stderr
    assert "nowhere.csv" in results["data"].stderr
    assert not list(tmp_path.iterdir()), "nothing was written"


def test_no_space(tmp_path, capsys):
    # A limit on the size of files is what an unprivileged process can have in place of a full disk.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        code = main(argv("--output-dir", "out", sets=("lora.r=8",)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err
    assert code == 2, said
    assert "Traceback" not in said
    assert re.search(r"out/checkpoint-1: cannot be written: .*; free space and start again", said)
    assert not (tmp_path / "out" / "checkpoint-1").exists()


def test_the_adapter_of_a_run_loads_on_the_untouched_base(finished_run):
    base = AutoModelForCausalLM.from_pretrained(BASE_DIR, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, finished_run / "lora_adapters")
    assert sum("lora_B" in name and bool(p.any()) for name, p in adapted.named_parameters()) == 14
    assert AFRIMEDQA_CSV.exists()
