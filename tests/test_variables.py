"""Environment variables of Accelerate, torch and launchers: none changes a number, and none ends in a traceback."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from accelerate.utils import DynamoBackend
from launching import LAUNCH, SECONDS, figures, finish, free_port, output, start

from harness.processes import Forked
from medqa.__main__ import main as command
from medqa.errors import UserError
from medqa.model.settings import usable_gpu
from medqa.terminal import make_console, print_error, printable
from medqa.training.checkpoint import Environment, changes, environment
from medqa.training.distributed import make_accelerator
from medqa.variables import (
    PARSED_AT_IMPORT,
    TABLE,
    Kind,
    prepare_imports,
    recorded_variables,
    rule_of,
    settle_variables,
)
from train import main

ROOT = Path(__file__).parents[1]
SETS = (
    "training.max_steps=3", "evaluation.steps=10", "evaluation.rows=4", "evaluation.samples=0",
    "tokenization.max_length=48", "model.quantization=none", "tracking.wandb=disabled",
)  # fmt: skip
SOURCE = Path(accelerate.__file__).parent


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in list(os.environ):
        if rule_of(name) or name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name)


@pytest.fixture
def new_accelerator(own_accelerator):
    AcceleratorState._reset_state(reset_partial_state=True)


def train(directory: Path) -> int:
    AcceleratorState._reset_state(reset_partial_state=True)
    return main(["--exp", "exp_001", "--tiny", "--cpu", "--output-dir", str(directory), "--set", *SETS])


def test_every_variable_that_accelerate_reads_is_in_the_table():
    """Apart from those of trackers and of devices that nothing here runs on."""
    text = "\n".join(
        path.read_text() for path in SOURCE.rglob("*.py") if not {"test_utils", "commands"} & set(path.parts)
    )
    names = set(re.findall(r"(?:environ(?:\.get)?[\[(]|getenv\(|_from_env\()\s*\[?\"([A-Z][A-Z0-9_]+)\"", text))
    prefixes = set(re.findall(r"prefix = \"([A-Z0-9_]+_)\"", text))
    assert len(names) > 50
    assert {"ACCELERATE_DYNAMO_", "ACCELERATE_FP8_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_"} <= prefixes
    ranks = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "NPROC"}
    mpi = {"PMI_SIZE", "PMI_RANK"}
    launching = {
        "FOO",
        "OMP_NUM_THREADS",
        "NCCL_P2P_DISABLE",
        "PYTORCH_ENABLE_MPS_FALLBACK",
        "USE_TORCH_XLA",
        "HF_HOME",
    }
    unused = re.compile(r"MLFLOW_|CLEARML_|XLA_|PT_HPU_|DEEPSPEED_|TPU_|PJRT_|AWS_|XDG_")
    assert {n for n in names - ranks - mpi - launching if rule_of(n) is None and not unused.match(n)} == set()
    assert {prefix for prefix in prefixes if rule_of(prefix + "X") is None} == set()


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8", "training.global_batch_size"),
        ("ACCELERATE_GRADIENT_CLIPPING", "0.5", "optimizer.max_grad_norm"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "not compiled"),
        ("ACCELERATE_SOMETHING_NEW", "1", "not known"),
    ],
)
def test_what_the_experiment_decides_is_removed_and_said(name, value, advice):
    found = {name: value, "HOME": "/root"}
    assert [text for label, text in settle_variables(found) if label == "no effect"] == [
        f"{name}={value}: {TABLE.get(name, TABLE['ACCELERATE_']).advice}"
    ]
    assert advice in rule_of(name).advice
    assert found == {"HOME": "/root"}


def test_what_a_launcher_always_sets_is_not_worth_a_word():
    found = {
        "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_DYNAMO_MODE": "default", "ACCELERATE_USE_CPU": "False",
        "ACCELERATE_DYNAMO_USE_DYNAMIC": "False", "ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "2",
        "ACCELERATE_USE_DEEPSPEED": "false", "ACCELERATE_USE_SAGEMAKER": "true",
        "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": "NO", "NVIDIA_TF32_OVERRIDE": "0",
    }  # fmt: skip
    assert settle_variables(found) == settle_variables({})
    assert found["ACCELERATE_MIXED_PRECISION"] == "no"
    assert found["NVIDIA_TF32_OVERRIDE"] == "0", "it forbids what nobody asks for"
    assert "ACCELERATE_USE_SAGEMAKER" not in found


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true"),
        ("ACCELERATE_USE_MEGATRON_LM", "true"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true"),
        ("ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE", "DATA_PARALLEL"),
        ("ACCELERATE_TORCH_DEVICE", "meta"),
        ("ACCELERATE_USE_CPU", "maybe"),
        ("ACCELERATE_USE_FSDP", "2"),
        ("ACCELERATE_DEBUG_MODE", "debug"),
        ("ACCELERATE_CPU_AFFINITY", "numa"),
        ("FORK_LAUNCHED", "perhaps"),
        ("ONEDNN_DEFAULT_FPMATH_MODE", "BF16"),
        ("LOCAL_RANK", "0"),
        ("LOCAL_RANK", "1"),
        ("LOCAL_RANK", "first"),
        ("RANK", "1"),
        ("WORLD_SIZE", "4"),
    ],
)
def test_what_is_not_done_here_is_refused_by_name(name, value, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(name, value)
    assert main(["--exp", "exp_001", "--tiny", "--cpu", "--output-dir", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert f"{name}={value}" in told
    assert f"`unset {name}`" in told
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv(name, value)
    assert command(["ask", str(tmp_path / "run"), "--cpu"]) == 2
    assert f"`unset {name}`" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["compare"], ["plan", "--exp", "exp_001", "--tiny", "--cpu"]], ids=lambda w: w[0])
def test_where_nothing_is_computed_nothing_is_refused(words, tiny_run, monkeypatch, tmp_path, capsys):
    refused = {
        "ACCELERATE_USE_DEEPSPEED": "true", "ONEDNN_DEFAULT_FPMATH_MODE": "BF16", "NVIDIA_TF32_OVERRIDE": "1",
        "ACCELERATE_USE_CPU": "maybe", "RANK": "2", "WORLD_SIZE": "1",
    }  # fmt: skip
    for name, value in refused.items():
        monkeypatch.setenv(name, value)
    if words == ["compare"]:
        words = [
            *words,
            str(tiny_run),
            shutil.copytree(tiny_run, tmp_path / "copy"),
            "--out",
            str(tmp_path / "page.html"),
        ]
    assert command(list(map(str, words))) == 0
    assert not {"RANK", "WORLD_SIZE"} & set(os.environ)


def test_what_lowers_the_precision_of_another_device_is_not_refused(monkeypatch, tmp_path, new_accelerator):
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    assert make_accelerator(True, "no", False, 60.0).device.type == "cpu"
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
    monkeypatch.setenv("DNNL_DEFAULT_FPMATH_MODE", "ANY")
    settle_variables(devices=["cuda"])
    with pytest.raises(UserError, match="DNNL_DEFAULT_FPMATH_MODE=ANY: it would compute float32 in a lower precision"):
        make_accelerator(True, "no", False, 60.0)


@pytest.mark.parametrize("value", ["", " "])
def test_ranks_that_are_empty_are_not_there(value):
    given = {"RANK": value, "LOCAL_RANK": value, "WORLD_SIZE": value}
    assert settle_variables(given) == settle_variables({})
    assert given == {}


def test_all_that_is_wrong_is_said_at_once():
    found = {"ACCELERATE_USE_DEEPSPEED": "true", "NVIDIA_TF32_OVERRIDE": "1", "RANK": "2", "LOCAL_RANK": "2"}
    with pytest.raises(UserError) as caught:
        settle_variables(found, devices=["cuda"])
    assert len(caught.value.args) == 3
    assert "without WORLD_SIZE, MASTER_ADDR, MASTER_PORT" in str(caught.value)


@pytest.mark.parametrize(
    "found",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "tcp://10.0.0.1:80"},  # as clusters say of a single process
        {"LOCAL_RANK": "-1"},
        {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
    ],
)
def test_what_launchers_say_is_left_alone(found):
    settle_variables(given := dict(found))
    assert given == {name: value for name, value in found.items() if value != "-1"}


def test_a_process_that_is_alone_waits_for_nobody(new_accelerator, monkeypatch):
    """At an address of yesterday's job it would, for as long as `training.process_timeout_s`."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "29500"}
    for name, value in alone.items():
        monkeypatch.setenv(name, value)
    assert make_accelerator(True, "no", False, 5.0).num_processes == 1


def test_ranks_that_do_not_fit_together_are_refused():
    ranks = {"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    with pytest.raises(UserError, match="are inconsistent"):
        settle_variables(ranks)


def test_the_accelerator_is_what_is_asked(new_accelerator, monkeypatch):
    for name, value in {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
        "ACCELERATE_DYNAMO_USE_FULLGRAPH": "perhaps", "ACCELERATE_MIXED_PRECISION": "fp8",
        "ACCELERATE_FP8_BACKEND": "nonsense", "ACCELERATE_INIT_INCLUDE_BUFFERS": "nonsense",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "three", "ACCELERATE_DEBUG_MODE": "",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    made = make_accelerator(True, "no", False, 60.0)
    assert made.gradient_accumulation_steps == 1
    assert made.state.dynamo_plugin.backend is DynamoBackend.NO
    assert (made.mixed_precision, made.device.type, made.num_processes) == ("no", "cpu", 1)


def test_an_accelerator_of_somebody_else_is_not_taken_for_ours(new_accelerator):
    """Accelerate keeps one state in a process: what a notebook made before decides for all that come."""
    accelerate.Accelerator(cpu=True, dynamo_backend="eager")
    with pytest.raises(UserError, match="has other settings than the experiment: dynamo is EAGER"):
        make_accelerator(True, "no", False, 60.0)


@pytest.mark.parametrize("given", [{"PMI_SIZE": "2"}, {"OMPI_COMM_WORLD_SIZE": "2"}])
def test_what_accelerate_cannot_start_with_is_said_with_the_variables(given, new_accelerator, monkeypatch):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # Accelerate sets them: taken back at the end
        monkeypatch.delenv(name)
    (name,) = given
    with pytest.raises(UserError, match=f"cannot be set up: .*{name}=2.*`unset .*{name}"):
        make_accelerator(True, "no", False, 5.0)


@pytest.mark.slow
def test_processes_that_mpi_has_started_are_known(tmp_path):
    script = tmp_path / "count.py"
    script.write_text(
        "from medqa.training.distributed import make_accelerator\n"
        "print('processes', make_accelerator(True, 'no', False, 60.0).num_processes)\n"
    )
    together = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMP_NUM_THREADS": "1"}
    together |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = []
    for rank in "01":
        ranked = {"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_LOCAL_RANK": rank}
        started.append(Forked([], tmp_path / "log", together | ranked, script))
    assert [process.wait(SECONDS) for process in started] == [0, 0], (tmp_path / "log").read_text()
    assert (tmp_path / "log").read_text().count("processes 2") == 2


def test_a_run_is_the_same_whatever_they_say(tmp_path, own_accelerator, monkeypatch, capsys):
    assert train(tmp_path / "plain") == 0
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    capsys.readouterr()
    assert train(tmp_path / "run") == 0
    told = capsys.readouterr().out
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=8: training.global_batch_size" in told
    assert "ACCELERATE_DYNAMO_BACKEND=INDUCTOR: models are not compiled" in told
    assert figures(tmp_path / "run") == figures(tmp_path / "plain")
    assert len(figures(tmp_path / "run")) == 8


@pytest.mark.slow
def test_a_configuration_file_of_the_launcher_decides_no_number(tmp_path, own_accelerator):
    config = {
        "compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "num_processes": 1, "num_machines": 1,
        "mixed_precision": "bf16", "use_cpu": True,
        "debug": True, "downcast_bf16": "yes", "enable_cpu_affinity": True,
        "dynamo_config": {"dynamo_backend": "INDUCTOR", "dynamo_mode": "max-autotune", "dynamo_use_fullgraph": True},
    }  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    launch = [str(path) if word == LAUNCH[-1] else word for word in LAUNCH]
    process = start(launch, tmp_path / "run", "--exp", "exp_001", "--tiny", "--set", *SETS)
    assert train(tmp_path / "plain") == 0
    assert finish(process, tmp_path / "run") == 0, output(tmp_path / "run")
    assert figures(tmp_path / "run") == figures(tmp_path / "plain")
    assert "ACCELERATE_DYNAMO_BACKEND=INDUCTOR: models are not compiled" in output(tmp_path / "run")
    assert "ACCELERATE_MIXED_PRECISION=bf16: training.mixed_precision decides" in output(tmp_path / "run")


def test_a_gpu_is_left_alone_where_the_launcher_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked for a GPU"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert usable_gpu() is False


def test_float32_is_float32(monkeypatch):
    torch.set_float32_matmul_precision("high")  # as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE of NVIDIA's containers
    settle_variables({})
    assert torch.get_float32_matmul_precision() == "highest"


def test_variables_that_choose_kernels_are_recorded_and_compared(monkeypatch):
    assert recorded_variables() == {}
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    monkeypatch.setenv("TORCH_LINEAR_FLATTEN_3D", "1")
    assert recorded_variables() == {"MKL_CBWR": "COMPATIBLE", "TORCH_LINEAR_FLATTEN_3D": "1"}
    settings = {
        "mixed_precision": "no", "dtype": "float32", "quantization": "none", "attn_implementation": "sdpa",
    }  # fmt: skip
    before = Environment(settings=settings, device="cpu", processes=1, cpu_threads=1, versions={}, variables={})
    now = before.model_copy(update={"variables": recorded_variables()})
    assert changes(before, now) == [
        "MKL_CBWR not set before, COMPATIBLE now",
        "TORCH_LINEAR_FLATTEN_3D not set before, 1 now",
    ]
    assert changes(before.model_copy(update={"variables": None}), now) == [], "a checkpoint that did not record them"
    assert "recorded_variables" in environment.__code__.co_names


def test_what_libraries_parse_at_import_ends_in_no_traceback(monkeypatch):
    for name in PARSED_AT_IMPORT:
        monkeypatch.setenv(name, "nonsense")
    monkeypatch.setattr("medqa.variables.PREPARED", said := [])
    prepare_imports()
    assert not set(PARSED_AT_IMPORT) & set(os.environ)
    assert said == [("no effect", f"{name}=nonsense: not a valid value") for name in PARSED_AT_IMPORT]
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "20")
    prepare_imports()
    assert os.environ["HF_HUB_ETAG_TIMEOUT"] == "20"


def test_imports_are_prepared_before_any_library():
    words = [sys.executable, "-c", "import medqa, sys; print(*sys.modules)"]
    found = set(subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())
    assert "medqa.variables" in found
    assert not {"torch", "accelerate", "transformers", "huggingface_hub", "datasets", "numpy"} & found


def test_without_a_home_caches_have_a_place_of_their_own(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("medqa.variables.PREPARED", said := [])
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as where no password entry is
    prepare_imports()
    home = tmp_path / f"medqa-home-{os.getuid()}"
    assert os.environ["HOME"] == str(home)
    assert home.stat().st_mode & 0o777 == 0o700
    assert said == [("no home", f"HOME is not set: caches are in {home}")]
    home.chmod(0o777)  # as somebody else may have made it
    prepare_imports()
    assert os.environ["HOME"] != str(home)
    assert Path(os.environ["HOME"]).parent == tmp_path


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:PASS@host:80/x does not answer", "http://host:80/x does not answer"),
        ("proxy socks5h://u@h and 'https://u:P@SS@h'", "proxy socks5h://h and 'https://h'"),
        ("https://huggingface.co/a/b@main?x=c@d", "https://huggingface.co/a/b@main?x=c@d"),
        ("https://user:pa/ss@host/x", "https://host/x"),
        ("http://u:p#w@h and http://u:p?w@h", "http://h and http://h"),
        ("'http://u:a/b@h','http://v:c/d@g'", "'http://h','http://g'"),
        ("http://host:80/a/b@main", "http://host:80/a/b@main"),
        ("write to me@example.org", "write to me@example.org"),
    ],
)
def test_addresses_are_shown_without_passwords(text, shown, capsys):
    assert printable(text) == shown
    print_error(text)
    make_console().print(text, soft_wrap=True)
    assert list(capsys.readouterr()) == [shown + "\n"] * 2


@pytest.mark.parametrize(
    "words",
    [
        ["--data", "https://user:PASS@host/x.csv"],
        ["--data", "x=https://user:PASS@host/x.csv"],
        ["--medquad", "https://user:PASS@host/x.csv"],
        ["--model", "https://user:PASS@host/model"],
        ["--set", "tracking.entity=https://user:PASS@host", "lora.r=https://user:PASS@host"],
        ["--no-such-option", "https://user:PASS@host"],
    ],
)
def test_nor_are_they_repeated_in_a_message_about_an_option(words, tmp_path, capsys):
    try:
        code = main(["--exp", "exp_001", "--tiny", "--cpu", "--output-dir", str(tmp_path / "run"), *words])
    except SystemExit as error:
        code = error.code
    told = capsys.readouterr()
    assert code == 2
    assert "host" in told.err
    assert "PASS" not in told.out + told.err


def test_every_kind_is_used():
    assert {rule.kind for rule in TABLE.values()} == set(Kind)
