"""A run's directory: whose it is, what may change when a run goes on, and what starting over removes."""

import errno
import json
import os
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from rich.console import Console

from medqa.commands.evaluate import SAME_ADAPTER, write_evaluation
from medqa.config import flat
from medqa.config_file import load_experiment
from medqa.data.splits import Splits, write_splits_csv
from medqa.errors import UserError
from medqa.files import write_json
from medqa.places import check_place
from medqa.training.checkpoint import Found, checkpoints
from medqa.training.recorder import MetricsFile, show_result
from medqa.training.run_dir import (
    RunLock,
    Session,
    check_run_dir,
    clear,
    find_saved,
    finished,
    other_files,
    read_session,
    read_summary,
    start_run,
    this_process,
    write_config,
)
from medqa.training.state import Progress

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
        return start_run(directory, fresh, None, Progress(), lock, accelerator)


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


@pytest.mark.parametrize("option", ["--output-dir", "--persist-to"])
def test_the_named_directory_itself_may_be_a_link(option, accelerator, tmp_path):
    """docs/security.md says so."""
    run = run_dir(tmp_path / "run", accelerator)
    (tmp_path / "link").symlink_to(run)
    check_run_dir(tmp_path / "link", experiment(), False, option)
    (tmp_path / "above").symlink_to(tmp_path)
    check_run_dir(tmp_path / "above" / "run", experiment(), False, option)


@pytest.mark.parametrize(
    "change",
    ["lora.r=4", "training.seed=1", "optimizer.learning_rate=1e-3", "tokenization.padding=max_length",
     "data.split=random", "training.global_batch_size=16", "training.per_device_batch_size=2",
     "training.deterministic=false", "training.mixed_precision=fp16"],
)  # fmt: skip
def test_another_experiment_is_refused_with_the_difference(change, accelerator, tmp_path):
    run = run_dir(tmp_path / "run", accelerator)
    key = change.split("=")[0]
    with pytest.raises(UserError, match=rf"another experiment: {key}: .* there, .* now") as caught:
        check_run_dir(run, experiment(change), False)
    assert str(run) in str(caught.value)
    assert "--fresh" in str(caught.value)
    check_run_dir(run, experiment(change), True)


def test_what_the_place_of_the_copies_holds_is_answered_with_its_own_option(accelerator, tmp_path):
    """Another --output-dir would change nothing, and --fresh would remove the run in the output directory."""
    run = run_dir(tmp_path / "run", accelerator)

    def advice(fresh: bool = False) -> str:
        with pytest.raises(UserError) as caught:
            check_run_dir(run, experiment("lora.r=4"), fresh, "--persist-to")
        return str(caught.value)

    said = advice()
    assert said.startswith(f"--persist-to {run} contains a run of another experiment")
    assert said.endswith("\nchoose another --persist-to")
    (run / "checkpoint-2" / "notes.txt").write_text("mine")
    assert advice(fresh=True).endswith("or choose another --persist-to")
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    for content in ("a: [", "[]"):
        (run / "config.yaml").write_text(content)
        said = advice()
        assert said.endswith("; choose another --persist-to")
        assert "--output-dir" not in said


def test_a_copied_checkpoint_of_another_experiment_is_answered_with_the_option_of_the_copies(tmp_path, monkeypatch):
    for place, option in (("there", "--persist-to"), ("here", "--output-dir")):
        identity = SimpleNamespace(experiment=flat(experiment("lora.r=4")))
        found = Found(tmp_path / place / "checkpoint-2", identity, [])
        monkeypatch.setattr("medqa.training.run_dir.newest_valid", lambda places, found=found: found)
        with pytest.raises(
            UserError, match=rf"checkpoint-2 belongs to another experiment: lora.r: .*\nchoose another {option}"
        ):
            find_saved(tmp_path / "here", tmp_path / "there", experiment())


def test_what_fresh_cannot_remove_is_named_with_its_cause(accelerator, tmp_path, monkeypatch):
    run, unlink = run_dir(tmp_path / "run", accelerator), os.unlink

    def refuse(path, **more):
        if os.path.basename(path) == "README.md":
            raise OSError(errno.EPERM, os.strerror(errno.EPERM), str(path))
        unlink(path, **more)

    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(UserError, match=r"--fresh cannot remove .*/lora_adapters/README\.md: Operation not permitted"):
        clear(run)


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
    sessions = [begin(tmp_path / "run", accelerator) for _ in range(3)]
    assert [session.resumes for session in sessions] == [0, 1, 2]
    assert len({session.run_id for session in sessions}) == 1
    fresh = begin(tmp_path / "run", accelerator, fresh=True)
    assert fresh.run_id != sessions[0].run_id
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


FIGURES = {"loss": 4.5, "perplexity": 90.0, "answer_loss": 4.25, "answer_perplexity": None}
SUMMARY = {
    "experiment": "e", "baseline": FIGURES, "final": FIGURES, "test": FIGURES, "updates": 4, "best_step": 4,
    "wall_clock_s": 3.5, "peak_memory_bytes": 5, "memory_device": "cpu", "data_fingerprint": "ab",
}  # fmt: skip


def test_finished_only_with_a_whole_summary_of_as_many_updates(tmp_path):
    run = experiment("training.max_steps=4")
    assert finished(tmp_path, run) is None
    whole = SUMMARY | {"of a later version": [1]}
    for content, complete in [(whole, True), (whole | {"updates": 3}, False), ({"updates": 4}, False), ([], False)]:
        (tmp_path / "summary.json").write_text(json.dumps(content))
        assert (finished(tmp_path, run) is not None) == complete
    (tmp_path / "summary.json").write_text(json.dumps(whole)[:-5])
    assert finished(tmp_path, run) is None


@pytest.mark.parametrize(
    "change",
    [{"baseline": {}}, {"baseline": None}, {"final": {**FIGURES, "loss": "abc"}}, {"test": [1]}, {"experiment": [1]},
     {"wall_clock_s": "x"}, {"wall_clock_s": None}, {"peak_memory_bytes": None}, {"peak_memory_bytes": True},
     {"memory_device": 5}, {"final": {**FIGURES, "answer_loss": {}}}, {"final": {**FIGURES, "loss": None}},
     {"adapter_step": "4\n# x"}, {"adapter_step": {}}, {"best_step": -1}, {"data_fingerprint": {}},
     {"wall_clock_s": float("nan")}, {"final": {**FIGURES, "loss": float("inf")}}, {"peak_memory_bytes": 10**400},
     {"wall_clock_s": 10**400}],
)  # fmt: skip
def test_a_summary_with_a_part_of_another_kind_is_not_believed(change, tmp_path):
    run = experiment("training.max_steps=4")
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    show_result(Console(quiet=True), finished(tmp_path, run))
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY | change))
    assert finished(tmp_path, run) is None


@pytest.mark.parametrize(
    "content", ['{"a":' * 5000 + "1" + "}" * 5000, "[" * 5000, "\x00", b"\xff\xfe", " " * 20_000_000]
)
def test_nor_is_one_that_is_too_deep_or_too_long(content, tmp_path):
    (tmp_path / "summary.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert read_summary(tmp_path) is None


@pytest.mark.parametrize(
    "content",
    ["[" * 5000, '{"run_id": "a", "resumes": 1e400, "saved": true}', '{"run_id": "a", "resumes": NaN, "saved": true}',
     '{"run_id": "../a", "resumes": 1, "saved": true}', '{"run_id": 5, "resumes": 1, "saved": true}',
     '{"run_id": "a\\n", "resumes": 1, "saved": true}', '{"run_id": "a", "resumes": -1, "saved": true}',
     '{"run_id": "a", "resumes": "1", "saved": true}', '{"run_id": "a", "resumes": 1, "saved": "no"}',
     '{"run_id": "a", "resumes": 1}', "[1]", "null", ""],
)  # fmt: skip
def test_a_damaged_run_file_does_not_start_the_run_over(content, tmp_path):
    (tmp_path / "run.json").write_text('{"run_id": "a", "resumes": 1, "saved": true, "later": 1}')
    assert read_session(tmp_path) == Session(run_id="a", resumes=1, saved=True)
    (tmp_path / "run.json").write_text(content)
    assert read_session(tmp_path) is None
    with pytest.raises(UserError, match="the checkpoints of this run are missing"):
        find_saved(tmp_path, None, experiment())


# --- what is no regular file, and links


def odd_file(path: Path, kind: str) -> None:
    """Something that no run writes, at this path."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's address has at most 107 bytes
        socket.socket(socket.AF_UNIX).bind(path.name)
        os.chdir(here)


NAMES = (
    "config.yaml",
    "data_report.json",
    "splits.csv",
    "metrics.jsonl",
    "evaluation.json",
    "evaluation.jsonl",
    "summary.json",
    "run.json",
)


@pytest.mark.parametrize("kind", ["pipe", "directory", "device", "socket"])
@pytest.mark.parametrize("name", [*NAMES, "run.lock", "lora_adapters/README.md"])
def test_what_is_no_regular_file_is_refused_by_name_at_the_start(name, kind, accelerator, tmp_path):
    run = run_dir(tmp_path / "run", accelerator)
    (run / name).unlink(missing_ok=True)
    odd_file(run / name, kind)
    with pytest.raises(UserError, match=rf"--output-dir .*{name}.*(not the kind of file|no run created)"):
        check_run_dir(run, experiment(), False)
    assert finished(run, experiment()) is None
    read_session(run)
    read_summary(run)


@pytest.mark.parametrize("name", [*NAMES, "lora_adapters/README.md"])
def test_a_directory_where_a_file_is_begun_is_refused_by_name_at_the_start(name, accelerator, tmp_path):
    run = run_dir(tmp_path / "run", accelerator)
    (run / f"{name}.tmp").mkdir()
    with pytest.raises(UserError, match=rf"--output-dir .*{name}.tmp"):
        check_run_dir(run, experiment(), False)


@pytest.mark.parametrize("kind", ["pipe", "directory", "device", "socket"])
def test_a_lock_file_that_is_none_is_refused(kind, tmp_path):
    odd_file(tmp_path / "run.lock", kind)
    for attempt in ("acquire_if_exists", "acquire"):
        with RunLock(tmp_path) as lock, pytest.raises(UserError, match=r"run.lock is not a regular file; remove it"):
            getattr(lock, attempt)()


@pytest.mark.parametrize("name", ["metrics.jsonl", "lora_adapters", "lora_adapters.tmp", "run.lock", "wandb"])
@pytest.mark.parametrize("fresh", [False, True])
def test_a_link_that_would_be_written_through_is_refused_at_the_start(name, fresh, accelerator, tmp_path):
    run = run_dir(tmp_path / "run", accelerator)
    if (run / name).exists():
        (run / name).rename(tmp_path / "victim")
    else:
        (tmp_path / "victim").mkdir()
    (run / name).symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match=rf"{name}.*a link"):
        check_run_dir(run, experiment(), fresh)


@pytest.mark.parametrize("kind", ["file", "dangling link", "link in a circle"])
@pytest.mark.parametrize("fresh", [False, True])
def test_lora_adapters_that_is_no_directory_is_found_at_the_start(kind, fresh, accelerator, tmp_path):
    run = run_dir(tmp_path / "run", accelerator)
    place = run / "lora_adapters"
    shutil.rmtree(place)
    if kind == "file":
        place.write_text("mine")
    else:
        place.symlink_to(place if kind == "link in a circle" else tmp_path / "nowhere")
    with pytest.raises(UserError, match="lora_adapters") as caught:
        check_run_dir(run, experiment(), fresh)
    assert (f"{place} is a link to {tmp_path}/nowhere, which does not exist" in str(caught.value)) == ("dang" in kind)


@pytest.mark.parametrize("suffix", ["", ".tmp"])
def test_what_links_lead_to_stays_as_it_is(suffix, accelerator, tmp_path):
    """All that a run writes whole, with a link at its name or at its temporary name."""
    run = run_dir(tmp_path / "run", accelerator)
    (run / "metrics.jsonl").write_text('{"step": 1, "split": "train"}\n')
    (run / "evaluation.json").write_text(MARK)
    (run / "evaluation.jsonl").write_text(MARK)
    victims = {}
    for name in NAMES if suffix else sorted({*NAMES} - {"metrics.jsonl"}):  # a link of that name is refused
        victims[name] = tmp_path / f"victim of {name}"
        victims[name].write_bytes((run / name).read_bytes())
        if not suffix:
            (run / name).unlink()
        (run / (name + suffix)).symlink_to(victims[name])
    before = {name: path.read_bytes() for name, path in victims.items()}
    check_run_dir(run, experiment(), False)
    begin(run, accelerator)
    write_config(run, experiment(), 8, {})
    MetricsFile(run / "metrics.jsonl").truncate_after(4, 8)
    for name in ("data_report.json", "summary.json"):
        write_json({}, run / name)
    write_evaluation({"limit": None, "tasks": {}} | dict.fromkeys(SAME_ADAPTER), run)
    write_splits_csv(Splits((), (), (), {}, ""), run / "splits.csv")
    assert {name: path.read_bytes() for name, path in victims.items()} == before
    assert not [name for name in victims if (run / name).is_symlink()]
    assert not list(run.glob("*.json.tmp"))


# --- places


@pytest.mark.parametrize(
    "place, problem",
    [
        ("gone", "is a link to /scratch/not/mounted, which does not exist"),
        ("gone/a/b", "gone is a link to /scratch/not/mounted, which does not exist"),
        ("circle", "is a link that leads to itself"),
        ("circle/a", "is a link that leads to itself"),
        ("file", "is not a directory"),
        ("file/a", "is not a directory"),
        ("linked file/a", "is not a directory"),
        ("x" * 256, "name too long"),
        ("a/" + "x" * 256 + "/b", "name too long"),
        ("/".join(["x" * 200] * 21), "name too long"),
    ],
)
def test_a_place_that_cannot_be_is_refused_before_anything_is_made(place, problem, tmp_path):
    (tmp_path / "gone").symlink_to("/scratch/not/mounted")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "linked file").symlink_to(tmp_path / "file")
    before = names(tmp_path)
    for option in ("--output-dir", "--persist-to", "--to"):
        with pytest.raises(UserError, match=rf"(?i)^{option} .*{problem}.*; choose "):
            check_place(tmp_path / place, option)
    with pytest.raises(UserError, match=rf"(?i)^--output-dir .*{problem}"):
        check_run_dir(tmp_path / place, experiment(), False)
    assert names(tmp_path) == before


def test_a_place_may_be_a_link_to_a_directory_and_have_any_name(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for place in ("link", "link/a/b", "caf\udce9/a", "é" * 100, "x" * 255, "a\nb"):
        check_place(tmp_path / place, "--output-dir")
    assert names(tmp_path) == {"real", "link"}


def test_a_path_that_is_not_utf_8_is_refused_where_libraries_would_fail_on_it(tmp_path):
    for option in ("--output-dir", "--persist-to"):
        with pytest.raises(UserError, match=rf"^{option} .*: the path is not UTF-8; choose another"):
            check_run_dir(tmp_path / "caf\udce9", experiment(), False, option)
    check_run_dir(tmp_path / "café \u2028", experiment(), False)


def test_what_is_no_runs_is_named_and_left_alone(accelerator, tmp_path):
    run = run_dir(tmp_path / "run", accelerator)
    (run / "wandb").mkdir()
    (run / "summary.json.tmp").write_text("a killed write")
    assert other_files(run) == []
    (run / "thesis.txt").write_text("mine")
    ((_, line),) = other_files(run)
    assert line.startswith("thesis.txt (not part of a run; ignored)")
    for name in ("b", "c", "a", "checkpoint-2.aside-00000000"):
        (run / name).write_text("mine")
    ((_, line),) = other_files(run)
    assert line.startswith("a, b, c and 2 more (not part of a run; ignored)")
    assert other_files(tmp_path / "another host's") == []


# --- the lock


def holders() -> dict[str, bytes]:
    """Lock files of nobody's."""
    mine = this_process()
    changes = {
        "pid null": {"pid": None}, "pid in a list": {"pid": [1]}, "pid of text": {"pid": "1"}, "pid 0": {"pid": 0},
        "pid below 0": {"pid": -5}, "pid true": {"pid": True}, "pid huge": {"pid": 2**62}, "host": {"host": {}},
        "boot": {"boot": None}, "started": {"started": "x"}, "started true": {"started": True},
    }  # fmt: skip
    texts = {"empty": "", "deep": "[" * 4000, "list": "[1]", "infinite": json.dumps({**mine, "started": float("inf")})}
    texts |= {"digits": json.dumps({**mine, "pid": 10**400}), "long": json.dumps({**mine, "more": "x" * 10_000})}
    return {name: text.encode() for name, text in texts.items()} | {
        name: json.dumps({**mine, **change}).encode() for name, change in changes.items()
    }


@pytest.mark.parametrize("name", holders())
@pytest.mark.parametrize("flock", [True, False])
def test_a_lock_file_that_names_nobody_holds_nobody_up(name, flock, tmp_path, monkeypatch):
    def no_locks(*_: int) -> None:
        raise OSError(errno.ENOSYS, "no locks")

    if not flock:
        monkeypatch.setattr("medqa.training.run_dir.fcntl.flock", no_locks)  # as some network mounts
    (tmp_path / "run.lock").write_bytes(holders()[name])
    with RunLock(tmp_path) as lock:
        lock.acquire_if_exists()
        lock.acquire()
        lock.check()
    assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
