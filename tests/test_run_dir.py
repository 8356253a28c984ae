"""A run's directory: whose it is, what may change when a run goes on, and what starting over removes."""

import json
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from medqa.errors import UserError
from medqa.experiment_file import load_experiment
from medqa.training.checkpoint import RunState
from medqa.training.checkpoint_files import checkpoints
from medqa.training.lock import RunLock
from medqa.training.run_dir import check_run_dir, clear, finished, start_run, write_config

MARK = "a run's"


@pytest.fixture(scope="module")
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def experiment(*sets: str, exp: str = "exp_001"):
    return load_experiment(exp, tiny=True, sets=sets)


def begin(directory: Path, accelerator: Accelerator, fresh: bool = False):
    """As `train.py` does, and let go of the lock."""
    with RunLock(directory) as lock:
        return start_run(directory, fresh, None, RunState(), lock, accelerator)


def run_dir(directory: Path, accelerator: Accelerator, *sets: str, exp: str = "exp_001") -> Path:
    """A directory as a run leaves it, with small files."""
    begin(directory, accelerator)
    write_config(directory, experiment(*sets, exp=exp), 8, {})
    for name in ("data_report.json", "splits.csv", "metrics.jsonl", "summary.json"):
        (directory / name).write_text(MARK)
    for folder, names in {
        "checkpoint-2": ("adapter_model.safetensors", "adapter_config.json", "training_state.pt", "state.json"),
        "checkpoint-10": ("adapter_model.safetensors", "adapter_config.json", "training_state.pt", "state.json"),
        "checkpoint-12.tmp": ("adapter_model.safetensors",),
        "lora_adapters": (
            "adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json", "tokenizer_config.json",
            "chat_template.jinja",
        ),
    }.items():  # fmt: skip
        (directory / folder).mkdir()
        for name in names:
            (directory / folder / name).write_text(MARK)
    return directory


def names(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


def test_a_new_directory_and_the_same_experiment_are_fine(accelerator, tmp_path):
    check_run_dir(tmp_path / "new" / "deep", experiment(), False)
    assert not (tmp_path / "new").exists(), "seeing whether changes nothing"
    run = run_dir(tmp_path / "run", accelerator)
    before = names(run)
    check_run_dir(run, experiment(), False)
    check_run_dir(run, experiment(), True)
    assert names(run) == before


@pytest.mark.parametrize(
    "change",
    ["lora.r=4", "training.seed=1", "optimizer.learning_rate=1e-3", "tokenization.padding=max_length",
     "data.split=random", "training.global_batch_size=16", "training.per_device_batch_size=2",
     "training.deterministic=false", "training.mixed_precision=no"],
)  # fmt: skip
def test_another_experiment_is_refused_with_the_difference(change, accelerator, tmp_path):
    run = run_dir(tmp_path / "run", accelerator)
    key = change.split("=")[0]
    with pytest.raises(UserError, match=rf"another experiment: {key}: .* there, .* now") as caught:
        check_run_dir(run, experiment(change), False)
    assert str(run) in str(caught.value)
    assert "--fresh" in str(caught.value)
    check_run_dir(run, experiment(change), True)


def test_all_differences_are_listed(accelerator, tmp_path):
    run = run_dir(tmp_path / "run", accelerator)
    with pytest.raises(UserError) as caught:
        check_run_dir(run, experiment("lora.r=4", "training.seed=1"), False)
    assert "lora.r: 8 there, 4 now" in str(caught.value)
    assert "training.seed: 42 there, 1 now" in str(caught.value)


@pytest.mark.parametrize(
    "change",
    ["training.save_steps=7", "training.log_steps=3", "training.keep_checkpoints=9", "training.save_minutes=2",
     "evaluation.steps=3", "evaluation.rows=null", "evaluation.samples=0", "tracking.wandb=disabled",
     "tracking.tags=[x]", "training.process_timeout_s=5", "data.medquad=elsewhere.csv", "data.afrimedqa=a/b"],
)  # fmt: skip
def test_what_moves_no_number_may_change(change, accelerator, tmp_path):
    check_run_dir(run_dir(tmp_path / "run", accelerator), experiment(change), False)


def test_updates_may_be_added_under_a_constant_rate_and_never_taken_back(accelerator, tmp_path):
    run = run_dir(tmp_path / "run", accelerator, "training.max_steps=10")
    check_run_dir(run, experiment("training.max_steps=11"), False)
    check_run_dir(run, experiment("training.max_steps=10"), False)
    with pytest.raises(UserError, match=r"training.max_steps: 10 there, 9 now"):
        check_run_dir(run, experiment("training.max_steps=9"), False)


@pytest.mark.parametrize("steps", [9, 11])
def test_under_a_cosine_the_number_of_updates_stays(steps, accelerator, tmp_path):
    run = run_dir(tmp_path / "run", accelerator, "training.max_steps=10", exp="exp_002")
    check_run_dir(run, experiment("training.max_steps=10", exp="exp_002"), False)
    with pytest.raises(UserError, match=rf"training.max_steps: 10 there, {steps} now"):
        check_run_dir(run, experiment(f"training.max_steps={steps}", exp="exp_002"), False)


def test_legs_keep_the_id_and_are_counted(accelerator, tmp_path):
    legs = [begin(tmp_path / "run", accelerator) for _ in range(3)]
    assert [leg.resumes for leg in legs] == [0, 1, 2]
    assert len({leg.run_id for leg in legs}) == 1
    fresh = begin(tmp_path / "run", accelerator, fresh=True)
    assert fresh.run_id != legs[0].run_id
    assert fresh.resumes == 0


def test_clear_removes_what_runs_write_and_nothing_else(accelerator, tmp_path):
    run = run_dir(tmp_path / "run", accelerator)
    kept = {"run.lock", "notes.txt", "wandb", "wandb/x", "checkpoint-best", "checkpoint-best/x", "checkpoint-3.bak"}
    for name in sorted(kept):
        if name in ("wandb", "checkpoint-best"):
            (run / name).mkdir()
        else:
            (run / name).write_text("mine")
    clear(run)
    assert names(run) == kept


@pytest.mark.parametrize(
    "foreign",
    ["checkpoint-2/notes.txt", "checkpoint-12.tmp/x", "lora_adapters/mine.bin", "checkpoint-10/optimizer.pt"],
)
def test_a_foreign_file_in_a_runs_folder_stops_fresh_before_anything_is_removed(foreign, accelerator, tmp_path):
    run = run_dir(tmp_path / "run", accelerator)
    (run / foreign).write_text("mine")
    before = names(run)
    for attempt in (lambda: check_run_dir(run, experiment(), True), lambda: clear(run)):
        with pytest.raises(UserError, match=foreign):
            attempt()
    assert names(run) == before


@pytest.mark.parametrize("name", ["checkpoint-2", "lora_adapters", "metrics.jsonl"])
def test_links_are_not_followed(name, accelerator, tmp_path):
    run = run_dir(tmp_path / "run", accelerator)
    (run / name).rename(tmp_path / "elsewhere")
    (run / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=name):
        clear(run)
    assert (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "summary.json", "splits.csv", "data_report.json"])
@pytest.mark.parametrize("fresh", [False, True])
def test_files_of_our_names_where_no_run_began_are_someone_elses(name, fresh, tmp_path):
    (tmp_path / name).write_text("mine: 1\n")
    with pytest.raises(UserError, match=name):
        check_run_dir(tmp_path, experiment(), fresh)
    assert (tmp_path / name).read_text() == "mine: 1\n"


@pytest.mark.parametrize("folder", ["checkpoint-5", "lora_adapters"])
def test_so_are_folders(folder, tmp_path):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "adapter_model.safetensors").write_text("mine")
    with pytest.raises(UserError, match=folder):
        check_run_dir(tmp_path, experiment(), True)


def test_other_files_are_no_hindrance(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    check_run_dir(tmp_path, experiment(), False)
    check_run_dir(tmp_path, experiment(), True)


def test_checkpoints_are_in_numeric_order(tmp_path):
    for name in ("checkpoint-50", "checkpoint-1000", "checkpoint-900", "checkpoint-100.tmp", "checkpoint-x"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-2000").write_text("a file")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-50", "checkpoint-900", "checkpoint-1000"]


def test_finished_only_with_a_whole_summary_of_as_many_updates(tmp_path):
    run = experiment("training.max_steps=4")
    assert finished(tmp_path, run) is None
    summary = {"experiment": "e", "baseline": {}, "final": {}, "test": {}, "updates": 4}
    for content, complete in [(summary, True), (summary | {"updates": 3}, False), ({"updates": 4}, False), ([], False)]:
        (tmp_path / "summary.json").write_text(json.dumps(content))
        assert (finished(tmp_path, run) is not None) == complete
    (tmp_path / "summary.json").write_text(json.dumps(summary)[:-5])
    assert finished(tmp_path, run) is None
