"""Frozen weights in pieces on several gloo processes: the same run as on one process, and as DDP.

What a CPU does not show: NCCL, whether communication and computation overlap, a GPU's memory and speed.
"""

import json
import os
from dataclasses import replace

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from launching import (
    FAULTY,
    PYTHON,
    ROOT,
    SECONDS,
    Group,
    finish,
    free_port,
    metrics,
    on_two_hosts,
    output,
    start,
    stop_after,
    summary,
)
from moved import assert_same_run

from harness.parts import build
from medqa.config_file import load_experiment
from medqa.errors import UserError
from medqa.model.base import load_base
from medqa.model.memory import footprint
from medqa.model.settings import SavedSettings, resolve_settings
from medqa.training.checkpoint import newest_valid
from medqa.training.distributed import FSDP_VALUES, shards_from_launcher
from medqa.variables import settle_variables

LAUNCH_FILES = ("one_gpu", "four_gpus", "two_nodes_of_eight", "fsdp2")
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
UPDATES = 2
PADDED = (
    "--exp", "exp_003", "--tiny", "--set", "model.quantization=none", f"training.max_steps={UPDATES}",
    "training.global_batch_size=16", "training.per_device_batch_size=4", "training.log_steps=1",
    "training.save_steps=100", "evaluation.steps=1", "evaluation.rows=7", "tracking.wandb=disabled",
    "tokenization.max_length=64", "training.process_timeout_s=120",
)  # fmt: skip
# How an update is cut, and its noise, follow from the number of processes that a run begins with.
UNPADDED = (
    *PADDED, "training.padding_free=true", "training.micro_batch_tokens=150", "lora.lora_dropout=0.0",
    "model.gradient_checkpointing=false",
)  # fmt: skip

# train.py, but for a note of what each process holds of the frozen weights once an update has been done.
NOTING = """
import json, os, pathlib, sys
import train
from medqa.model.sharding import frozen_bytes

run, held = train.train, pathlib.Path(sys.argv[1])

def noting(state, batches, experiment, accelerator, **more):
    run(state, batches, experiment, accelerator, **more)
    held.mkdir(exist_ok=True)
    (held / f"{accelerator.process_index}.json").write_text(json.dumps(frozen_bytes(state.model)))

train.train = noting
sys.exit(train.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sharding")
    (directory / "noting.py").write_text(NOTING)
    return directory


def run_of(directory, words, processes, fsdp=FSDP):
    """A run on so many processes, sharded unless `fsdp` is empty; what each holds lies in `<directory>.held`."""
    words = [f"{directory}.held", "--cpu", "--output-dir", str(directory), *words]
    return Group.of(directory, words, processes, directory.parent / "noting.py", **fsdp)


def finished(directory, words, processes, fsdp=FSDP):
    """Where such a run has ended well."""
    assert finish(run_of(directory, words, processes, fsdp), directory) == 0, output(directory)
    return directory


def held(directory, processes):
    """Bytes of frozen weights in each process, and of the whole base."""
    found = [
        json.loads((directory.with_name(f"{directory.name}.held") / f"{i}.json").read_text()) for i in range(processes)
    ]
    assert len({total for _, total in found}) == 1
    return [here for here, _ in found], found[0][1]


def assert_in_pieces(directory, processes):
    """Every process holds its share, and nobody more."""
    here, total = held(directory, processes)
    assert len(here) == processes
    assert total > 2**20
    assert max(here) < 1.02 * total / processes
    assert sum(here) >= total
    assert f" of {total / 2**20:,.1f} MiB of frozen weights in each process" in output(directory)


# --- the same run


def whole_and_in_pieces(place, words, processes):
    """The directories of a run on one process, and of the same run sharded on so many."""
    one, several = place / f"one-for-{processes}", place / f"sharded-{processes}"
    alone, together = run_of(one, words, 1, {}), run_of(several, words, processes)
    assert finish(alone, one) == 0, output(one)
    assert finish(together, several) == 0, output(several)
    assert_same_run(one, several, UPDATES)
    assert_in_pieces(several, processes)
    return one, several


def test_two_sharded_processes_compute_what_one_does(place):
    """With padding, gradient checkpointing and a grown vocabulary."""
    one, two = whole_and_in_pieces(place, PADDED, 2)
    assert held(one, 1)[0] == [held(two, 2)[1]]
    assert (summary(one)["sharded"], summary(two)["sharded"]) == (False, True)
    assert "evaluation.samples: 4 -> 0 (" in output(two)


@pytest.mark.slow
def test_four_sharded_processes_compute_what_one_does_without_padding(place):
    """Validation rows and pieces that four cannot share evenly: a process without one must still take part."""
    whole_and_in_pieces(place, UNPADDED, 4)


@pytest.mark.slow
@pytest.mark.parametrize("words", [PADDED, UNPADDED], ids=["padded", "unpadded"])
@pytest.mark.parametrize("processes", [2, 4])
def test_sharded_is_what_ddp_is(place, words, processes):
    kind = f"{'padded' if words is PADDED else 'unpadded'}-{processes}"
    ddp = finished(place / f"ddp-{kind}", words, processes, {})
    sharded = finished(place / f"sharded-{kind}", words, processes)
    assert_same_run(ddp, sharded, UPDATES)
    assert_in_pieces(sharded, processes)
    assert held(ddp, processes)[0] == [held(sharded, processes)[1]] * processes


@pytest.mark.slow
@pytest.mark.parametrize("words", [PADDED, UNPADDED], ids=["padded", "unpadded"])
def test_a_run_goes_on_sharded_or_not_on_any_number_of_processes(place, words):
    """Begun sharded on two, stopped, gone on with whole on one, stopped, ended sharded on four."""
    kind = "padded" if words is PADDED else "unpadded"
    words = (*words, "training.max_steps=12")
    straight, moved = finished(place / f"straight-{kind}", words, 1, {}), place / f"moved-{kind}"
    for update, processes, fsdp in ((3, 2, FSDP), (6, 1, {})):
        stop_after(run_of(moved, words, processes, fsdp), moved, update)
    finished(moved, words, 4)
    assert_same_run(straight, moved, updates=12)
    assert_in_pieces(moved, 4)
    whole = ["processes 2 before, 1 now", "sharded weights True before, False now"]
    pieces = ["processes 1 before, 4 now", "sharded weights False before, True now"]
    assert [change["changed"] for change in summary(moved)["not_bitwise"]] == [whole, pieces]


@pytest.mark.slow
def test_a_process_without_a_piece_of_an_update_takes_part(place):
    """Begun whole on one process with an update as one piece, ended sharded on two."""
    words = (*UNPADDED, "training.micro_batch_tokens=100000", "training.max_steps=8")
    straight, moved = finished(place / "straight-piece", words, 1, {}), place / "moved-piece"
    stop_after(run_of(moved, words, 1, {}), moved, 2)
    finished(moved, words, 2)
    assert_same_run(straight, moved, updates=8)


@pytest.mark.slow
def test_tied_embeddings_and_a_trial_that_cannot_be(place):
    """A base whose head is its embeddings, with `[PAD]` added; micro-batches as planned, since none can be tried."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny = load_experiment("exp_003", tiny=True).model.base
    base, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    base.config.tie_word_embeddings = True
    base.tie_weights()
    assert base.lm_head.weight is base.model.embed_tokens.weight
    base.save_pretrained(place / "tied-base")
    tokenizer.save_pretrained(place / "tied-base")
    words = [word for word in UNPADDED if "micro_batch_tokens" not in word]
    words[words.index("--set") : words.index("--set")] = ["--model", str(place / "tied-base")]
    one, two = finished(place / "one-tied", words, 1, {}), finished(place / "two-tied", words, 2)
    assert_same_run(one, two, UPDATES)
    assert_in_pieces(two, 2)
    assert held(two, 2)[1] == held(one, 1)[1]
    assert "the largest possible batch fits" in output(one)
    assert "tokens: estimated; sharded runs cannot probe memory" in output(two)


@pytest.mark.slow
def test_paged_optimizer_in_8_bits(place):
    words = (*PADDED, "optimizer.name=paged_adamw_8bit")
    one, two = finished(place / "one-8bit", words, 1, {}), finished(place / "two-8bit", words, 2)
    assert_same_run(one, two, UPDATES)


# --- faults


@pytest.mark.slow
def test_when_one_process_fails_all_stop_in_time_and_the_checkpoint_is_whole(tmp_path):
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY)
    runs = {}
    for fault in ("dead", "hangs", "bad"):
        more = (
            "training.max_steps=6",
            "training.save_steps=1",
            "training.process_timeout_s=30",  # a busy machine may take 10 to load the model
            "evaluation.steps=100",
        )
        words = [fault, "--cpu", "--output-dir", str(tmp_path / fault), *UNPADDED, *more]
        runs[fault] = Group.of(tmp_path / fault, words, 2, script, **FSDP)
    for fault, run in runs.items():
        alive, other = run.processes
        assert alive.wait(SECONDS) == 3, output(tmp_path / fault)
        other.kill()
        assert newest_valid([tmp_path / fault]).path.name == "checkpoint-2", fault
        assert {record["step"] for record in metrics(tmp_path / fault)} == {0, 1, 2}
    for fault in ("dead", "hangs"):
        assert "another process of this run has died or has not answered" in output(tmp_path / fault)
    assert "update 3: the loss is nan in micro-batch 2" in output(tmp_path / "bad")


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("FSDP_VERSION", "1", "fsdp_version = 1: only version 2"),
        ("FSDP_RESHARD_AFTER_FORWARD", "false", "fsdp_reshard_after_forward = false"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params = true"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "false", "fsdp_cpu_ram_efficient_loading = false"),
        ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP", "fsdp_auto_wrap_policy = SIZE_BASED_WRAP"),
        ("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaDecoderLayer", "each decoder layer is a unit"),
        ("FSDP_IGNORED_MODULES", ".*norm", "exactly the frozen weights are sharded"),
        ("FSDP_SHARDING_STRATEGY", "HYBRID_SHARD", "fsdp_sharding_strategy = HYBRID_SHARD"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "model.gradient_checkpointing"),
        ("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", "true", "fsdp_activation_checkpointing_offload = true"),
    ],
)
def test_what_is_not_done_is_refused_by_name(tiny, monkeypatch, name, value, told):
    for variable, one in {**FSDP, name: value, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(variable, one)
    with pytest.raises(UserError, match=told):
        shards_from_launcher(tiny("exp_003", "model.quantization=none"))


def test_every_value_that_is_refused_is_tried():
    marks = test_what_is_not_done_is_refused_by_name.pytestmark
    tried = {case[0] for mark in marks if mark.name == "parametrize" for case in mark.args[1]}
    assert tried == set(FSDP_VALUES)


def test_four_bit_weights_are_refused_and_without_a_version_it_is_1(tiny, monkeypatch):
    for variable, value in {"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(UserError) as refused:
        shards_from_launcher(tiny("exp_003"))
    assert "fsdp_version = 1" in str(refused.value)
    assert "model.quantization = 4bit: 4-bit weights cannot be sharded; use --set model.quantization=none" in str(
        refused.value
    )


def test_auto_is_unquantized_where_weights_are_sharded(tiny, monkeypatch):
    for variable, value in {**FSDP, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(variable, value)
    experiment = tiny("exp_003", "model.quantization=auto")
    assert shards_from_launcher(experiment) == 2
    settings = resolve_settings(experiment, cpu=True, shards=2)
    assert settings.changes["model.quantization"] == ("auto", "none", "4-bit weights cannot be sharded")
    saved = SavedSettings(mixed_precision="no", dtype="float32", quantization="4bit", attn_implementation="sdpa")
    with pytest.raises(UserError, match="the run started with 4-bit weights, which cannot be sharded: launch it with"):
        resolve_settings(experiment, cpu=True, shards=2, saved=saved)


def test_a_refusal_ends_every_process_with_2_and_leaves_nothing(tmp_path):
    directory = tmp_path / "run"
    words = ["--exp", "exp_003", "--tiny", "--cpu", "--output-dir", str(directory)]
    assert finish(Group.of(directory, words, 2, ROOT / "train.py", **FSDP), directory) == 2
    assert output(directory).count("4-bit weights cannot be sharded") == 1
    assert not directory.exists()


# --- the launcher


def launched(name, *options):
    """The launcher's options for a file of ours, and the environment that it would give each process."""
    path = str(ROOT / "launch" / f"{name}.yaml")
    arguments = launch_command_parser().parse_args(["--config_file", path, *options, "train.py", "--exp", "exp_002"])
    arguments, _, precision_of_file = _validate_launch_command(arguments)
    assert precision_of_file
    return arguments, prepare_multi_gpu_env(arguments)


def test_accelerate_reads_the_launch_files():
    assert sorted(path.stem for path in (ROOT / "launch").glob("*.yaml")) == sorted(LAUNCH_FILES)
    shape = {}
    for name in LAUNCH_FILES:
        path = ROOT / "launch" / f"{name}.yaml"
        config = load_config_from_file(str(path))
        assert set(yaml.safe_load(path.read_text())) <= set(vars(config))  # it drops no key of ours
        assert (config.mixed_precision, config.use_cpu) == ("no", False)
        shape[name] = (config.distributed_type.value, config.num_machines, config.num_processes)
        assert f"accelerate launch --config_file launch/{name}.yaml" in path.read_text()
        assert path.read_text().startswith("#")
    assert shape == {
        "one_gpu": ("NO", 1, 1),
        "four_gpus": ("MULTI_GPU", 1, 4),
        "two_nodes_of_eight": ("MULTI_GPU", 2, 16),
        "fsdp2": ("FSDP", 1, 4),
    }


def test_the_launcher_makes_of_them_what_we_mean(tiny, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        monkeypatch.delenv(name)
    one, _ = launched("one_gpu")
    assert (one.multi_gpu, one.use_fsdp, one.num_processes) == (False, False, 1)
    four, environment = launched("four_gpus")
    assert (four.multi_gpu, four.use_fsdp, four.nproc_per_node) == (True, False, "4")
    assert "ACCELERATE_USE_FSDP" not in environment
    nodes, environment = launched(
        "two_nodes_of_eight", "--machine_rank", "1", "--main_process_ip", "first", "--main_process_port", "29500"
    )
    assert (nodes.multi_gpu, nodes.nnodes, nodes.nproc_per_node, nodes.node_rank) == (True, "2", "8", 1)
    assert (nodes.rdzv_backend, nodes.rdzv_endpoint) == ("static", "first:29500")
    fsdp, environment = launched("fsdp2", "--num_processes", "2")
    assert (fsdp.multi_gpu, fsdp.use_fsdp, fsdp.nproc_per_node) == (False, True, "2")
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    assert settle_variables(dict(environment)) == settle_variables({})  # nothing to tell of our own files
    given = {name: value for name, value in environment.items() if name.startswith(("FSDP_", "ACCELERATE_USE"))}
    for name, value in {**given, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert shards_from_launcher(tiny("exp_003", "model.quantization=none")) == 2
    assert not [name for name in os.environ if name in given]  # out of Accelerate's sight
    assert shards_from_launcher(tiny("exp_003")) == 1


@pytest.mark.slow
def test_launched_by_accelerate_with_our_files(place):
    """`launch/fsdp2.yaml`, and `launch/two_nodes_of_eight.yaml` as two machines of two, here with gloo."""
    launch = [*PYTHON, "-m", "accelerate.commands.launch", "--config_file"]
    fsdp, nodes = place / "launched-fsdp2", place / "launched-nodes"
    one = finished(place / "one-launched", PADDED, 1, {})
    port = ["--main_process_port", str(free_port())]
    process = start([*launch, "launch/fsdp2.yaml", "--num_processes", "2", *port], fsdp, *PADDED)
    assert finish(process, fsdp) == 0, output(fsdp)
    assert_same_run(one, fsdp, UPDATES)
    assert " MiB of frozen weights in each process" in output(fsdp)
    address = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port()), "--num_processes", "4"]
    both = [
        start([*launch, "launch/two_nodes_of_eight.yaml", "--machine_rank", rank, *address], nodes, *PADDED)
        for rank in ("0", "1")
    ]
    assert [finish(process, nodes) for process in both] == [0, 0], output(nodes)
    assert_same_run(one, nodes, UPDATES)
    assert summary(nodes)["processes"] == 4


@pytest.mark.slow
def test_machines_that_do_not_share_the_directory_are_refused(place):
    """Each would go on from what it finds: one from a checkpoint, the other from the start."""
    here, there = place / "here", place / "there"
    finished(here, PADDED, 1, {})
    words = (*PADDED, "training.max_steps=4")
    assert on_two_hosts((here, words), (there, words)) == [2, 2], output(here)
    assert "processes see different checkpoints there (of updates 0, 2)" in output(here)
    assert not there.exists()


# --- the host's memory, and the plan


def test_only_the_first_process_has_the_base_in_memory(tiny, monkeypatch):
    """What the others load has its names, shapes, types and buffers, a grown vocabulary included, and no contents."""
    experiment = tiny("exp_003", "model.quantization=none")
    settings, vocabulary = resolve_settings(experiment, cpu=True, shards=2), 1030
    found = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        found.append(load_base(experiment.model, settings, torch.device("cpu"), vocabulary, 0))
    first, other = found
    shapes = [{name: (p.shape, p.dtype, p.device) for name, p in model.named_parameters()} for model in found]
    assert shapes[0] == shapes[1]
    assert shapes[0]["lm_head.bias"][0] == (vocabulary,)
    for (name, ours), (same_name, theirs) in zip(first.named_buffers(), other.named_buffers(), strict=True):
        assert name == same_name
        assert torch.equal(ours, theirs)
    in_memory = [sum(p.untyped_storage().nbytes() for p in model.parameters()) for model in found]
    assert in_memory[0] > 2**20
    assert in_memory[1] == 4 * len(shapes[1])  # one number each
    assert not any(p.requires_grad for p in other.parameters())


def test_the_plan_counts_a_share_of_the_base(tiny):
    from medqa.model.base import check_model

    experiment = tiny("exp_003", "model.quantization=none")
    config = check_model(experiment.model, 64)
    config.num_hidden_layers, config.layer_types = 10, None
    whole, four = (
        footprint(
            experiment, config, replace(resolve_settings(experiment, cpu=True, shards=shards), padding_free=True)
        ).base
        for shards in (1, 4)
    )
    # Query and output, key and value, the three of the MLP, two norms; then embeddings, head, norm, and 16 frequencies.
    layer = 4 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 512 + 2 * 128)
    rest = 4 * (2 * 1024 * 128 + 128)
    assert whole == pytest.approx(10 * layer + rest, abs=200)
    assert four == pytest.approx(whole / 4 + 3 * layer + rest, abs=200)


def test_all_processes_have_as_many_pieces_of_an_update(tiny):
    """Else one would wait for the pieces of a layer that another, which is through with its update, holds."""
    parts = build(tiny("exp_003", "model.quantization=none", "training.global_batch_size=20"))
    stream, found = parts.stream, set()
    for tokens in (60, 150, 400, 10**6):
        whole = stream.packed(1, "all", tokens)
        for processes in (2, 3, 4):
            shares = [stream.packed(1, "all", tokens, 1, i, processes) for i in range(processes)]
            assert len({len(share) for share in shares}) == 1
            rows = sorted(row for share in shares for piece in share for row in piece.row_ids)
            assert rows == sorted(row for piece in whole for row in piece.row_ids)
            found.add(sum(map(len, shares)) - len(whole))
    assert len(found) > 2
