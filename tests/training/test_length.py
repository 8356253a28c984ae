"""How long a run is: updates or epochs, stopping early, and which adapter it leaves. Real runs, in this process."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from medqa.config import flat, is_complete, length, may_change_on_resume, planned_updates
from medqa.config_file import default_output_dir, load_experiment
from medqa.errors import UserError
from medqa.training.state import Progress
from tests.launching import figures, metrics, summary

FAST = (
    "tracking.wandb=disabled", "evaluation.samples=0", "training.global_batch_size=8", "training.log_steps=50",
    "model.quantization=none",
)  # fmt: skip
# So high a rate that an early update is the best one; all validation rows, so that every line measures the same.
EARLY = (*FAST, "optimizer.learning_rate=0.02", "evaluation.steps=1", "evaluation.rows=null", "training.save_steps=1")
PATIENT = (*EARLY, "training.early_stopping_patience=2", "training.keep_checkpoints=9")


def run(directory: Path, *sets: str, words: tuple[str, ...] = ()) -> int:
    """exp_001 --tiny with these settings; the exit code."""
    from accelerate.state import AcceleratorState

    from train import main

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        return main(
            ["--exp", "exp_001", "--tiny", "--cpu", "--output-dir", str(directory), *words, "--set", *FAST, *sets]
        )
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def adapter(directory: Path) -> bytes:
    return (directory / "adapter_model.safetensors").read_bytes()


def validation(directory: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in metrics(directory) if record["split"] == "eval"}


@pytest.fixture(scope="module")
def early(tmp_path_factory) -> Path:
    """A run that stopped early and kept the best. Not to be changed: copy it."""
    directory = tmp_path_factory.mktemp("early") / "run"
    assert run(directory, *PATIENT, "training.keep=best") == 0
    return directory


def with_epochs(epochs: float, batch: int = 8, warmup: int = 0):
    sets = [f"training.epochs={epochs}", f"training.global_batch_size={batch}", f"scheduler.warmup_steps={warmup}"]
    return load_experiment("exp_001", sets=[*sets, "training.per_device_batch_size=1"])


@pytest.mark.parametrize(
    "epochs,rows,batch,updates",
    [
        (1, 80, 8, 10),
        (1, 81, 8, 11),
        (3, 81, 8, 31),
        (1.1, 50, 1, 55),
        (0.7, 10, 1, 7),
        (1.5, 7, 2, 6),
        (1e-6, 5, 8, 1),
    ],
)
def test_epochs_are_whole_updates_of_the_whole_stream(epochs, rows, batch, updates):
    """Across epoch ends: 3 epochs of 81 rows are 31 updates of 8, not 3 times 11; and 1.1 of 50 are 55, not 56."""
    assert planned_updates(with_epochs(epochs, batch), rows) == updates


def test_warmup_longer_than_the_epochs_is_refused():
    with pytest.raises(UserError, match=r"warmup_steps = 11 is more than the 10 updates"):
        planned_updates(with_epochs(1, warmup=11), 80)
    assert planned_updates(with_epochs(1, warmup=10), 80) == 10


def test_epochs_beside_updates_have_a_directory_of_their_own():
    def named(*sets: str) -> str:
        return default_output_dir("exp_001", True, sets, load_experiment("exp_001", tiny=True, sets=sets)).name

    assert named("training.epochs=3") == "exp_001-tiny,training.epochs=3"
    assert named("training.max_steps=50") == "exp_001-tiny"


def test_one_length_takes_the_place_of_the_other(tmp_path):
    training = load_experiment("exp_001", sets=["training.epochs=2"]).training
    assert (training.max_steps, training.epochs) == (None, 2)
    own = tmp_path / "own.yaml"
    own.write_text("training: {epochs: 3}\n")
    assert load_experiment(str(own)).training.epochs == 3
    for words in ({"sets": ["training.max_steps=7"]}, {"tiny": True}):
        training = load_experiment(str(own), **words).training
        assert (training.max_steps in (7, 40), training.epochs) == (True, None)
    for sets in (["training.epochs=2", "training.max_steps=5"], ["training.epochs=null"]):
        with pytest.raises(UserError, match=r"training\.max_steps"):
            load_experiment("exp_001", sets=sets)


def test_complete_is_as_long_as_asked_for():
    experiment = load_experiment("exp_001", sets=["training.epochs=2"])
    whole = {"experiment": "e", "baseline": {}, "final": {}, "test": {}, "updates": 3, "length": length(experiment)}
    assert is_complete(whole, experiment)
    assert not is_complete(whole, load_experiment("exp_001", sets=["training.epochs=3"]))
    assert not is_complete(whole, load_experiment("exp_001", sets=["training.max_steps=3"]))
    assert not is_complete({key: value for key, value in whole.items() if key != "test"}, experiment)


def test_what_evaluation_decides_holds_evaluation_fast():
    """Where it decides nothing it may change on resume; else another interval would be another run."""
    plain = load_experiment("exp_001")
    for sets in (["training.keep=best"], ["training.early_stopping_patience=3"]):
        deciding = load_experiment("exp_001", sets=sets)
        now = {key for key in flat(plain) if may_change_on_resume(key, plain)}
        assert now - {key for key in flat(plain) if may_change_on_resume(key, deciding)} == {
            "evaluation.steps",
            "evaluation.rows",
        }


def test_patience_counts_evaluations_since_the_best():
    state = Progress(best_loss=5.0)
    counts = []
    for step, loss in enumerate((4.0, 4.5, 3.9, 3.9, 4.0), start=1):
        state.note_best(step, loss)
        counts.append((state.best_step, state.evaluations_since_best))
    assert counts == [(1, 0), (1, 1), (3, 0), (3, 1), (3, 2)]


@pytest.mark.slow
def test_epochs_are_the_run_of_as_many_updates_and_may_grow(tmp_path, capfd):
    """Under a constant rate: half an epoch, continued to a whole one, is the whole one, bit for bit."""
    sets = ("training.global_batch_size=32", "evaluation.steps=100")
    straight, epochs, updates = (tmp_path / name for name in ("straight", "epochs", "updates"))
    assert run(epochs, *sets, "training.epochs=0.25") == 0
    rows = json.loads((epochs / "data_report.json").read_text())["splits"]["train"]["rows"]
    n = -(-rows // 4 // 32)
    assert summary(epochs)["updates"] == n
    assert summary(epochs)["length"] == {"max_steps": None, "epochs": 0.25}
    assert run(updates, *sets, f"training.max_steps={n}") == 0
    assert figures(epochs) == figures(updates)
    assert adapter(epochs / "lora_adapters") == adapter(updates / "lora_adapters")
    assert run(epochs, *sets, "training.epochs=0.25") == 0
    assert "the run is already complete" in capfd.readouterr().out
    assert summary(epochs)["resumes"] == 0

    assert run(epochs, *sets, "training.epochs=0.2") == 2
    assert "training.epochs: 0.25 there, 0.2 now" in capfd.readouterr().err.replace("\n", " ")
    assert run(straight, *sets, "training.epochs=0.5") == 0
    assert run(epochs, *sets, "training.epochs=0.5") == 0
    assert summary(epochs)["updates"] == summary(straight)["updates"] == -(-rows // 2 // 32) > n
    assert adapter(epochs / "lora_adapters") == adapter(straight / "lora_adapters")


def test_it_stops_when_patience_ends_and_keeps_the_best(early):
    losses, told = validation(early), summary(early)
    best, waited = 0, 0
    for step in sorted(losses)[1:]:
        assert waited < 2, f"it went on after update {step - 1}"
        best, waited = (step, 0) if losses[step] < losses[best] else (best, waited + 1)
    assert waited == 2
    assert 0 < best < max(losses) < 40
    assert (told["best_step"], told["adapter_step"], told["updates"]) == (best, best, max(losses))
    assert told["stopped_early"] is True
    kept = adapter(early / "lora_adapters")
    assert kept == adapter(early / f"checkpoint-{best}")
    assert kept != adapter(early / f"checkpoint-{max(losses)}")
    card = (early / "lora_adapters" / "README.md").read_text()
    assert f"{max(losses)} updates" in card
    assert f"those after update {best}:" in card
    assert told["final"]["loss"] == losses[best]  # the figures are those of the adapter that is kept

    lines = Counter((record["step"], record["split"]) for record in metrics(early))
    assert set(lines.values()) == {1}
    assert {(max(losses), "train"), (max(losses), "eval"), (max(losses), "test")} <= lines.keys()
    assert told["test"]["loss"] != told["final"]["loss"], "the splits have as many rows, and not the same"


def test_the_test_split_is_measured_with_what_is_kept(early, tmp_path):
    """The same run without keeping the best has another adapter and other figures, and is otherwise the same."""
    assert run(tmp_path / "run", *PATIENT) == 0
    final, best = summary(tmp_path / "run"), summary(early)
    assert final["adapter_step"] == final["updates"] == best["updates"]
    assert validation(tmp_path / "run") == validation(early)
    assert final["final"]["loss"] == validation(early)[final["updates"]]
    assert final["test"]["loss"] != best["test"]["loss"]
    assert adapter(tmp_path / "run" / "lora_adapters") == adapter(early / f"checkpoint-{final['updates']}")


def test_the_adapter_is_found_under_its_own_update(early):
    from medqa.commands.adapter import find_adapter

    found = find_adapter(str(early))
    assert (found.step, found.final) == (summary(early)["adapter_step"], True)


@pytest.mark.parametrize("back", [0, 1], ids=["before the closing evaluation", "an evaluation before"])
def test_a_run_killed_near_its_early_end_ends_the_same(early, tmp_path, back):
    """With the newest checkpoint of a run that was killed there: patience is not counted anew."""
    run_dir = shutil.copytree(early, tmp_path / "run")
    (run_dir / "summary.json").unlink()
    shutil.rmtree(run_dir / "lora_adapters")
    last = summary(early)["updates"]
    for step in range(last, last - back, -1):
        shutil.rmtree(run_dir / f"checkpoint-{step}")
    assert run(run_dir, *PATIENT, "training.keep=best") == 0
    assert sorted(map(str, figures(run_dir))) == sorted(map(str, figures(early)))
    assert adapter(run_dir / "lora_adapters") == adapter(early / "lora_adapters")
    assert summary(run_dir)["test"] == summary(early)["test"]


def test_a_best_checkpoint_that_has_gone_is_fetched_or_named(early, tmp_path, capfd):
    run_dir = shutil.copytree(early, tmp_path / "run")
    (run_dir / "summary.json").unlink()
    best = run_dir / f"checkpoint-{summary(early)['best_step']}"
    away = tmp_path / "away"
    shutil.copytree(early, away)
    (away / "summary.json").unlink()
    shutil.rmtree(best)
    assert run(run_dir, *PATIENT, "training.keep=best") == 2
    told = capfd.readouterr().err.replace("\n", " ")
    assert "training.keep=best" in told
    assert str(best) in told
    assert "Traceback" not in told
    assert not (run_dir / "summary.json").exists()
    assert run(run_dir, *PATIENT, "training.keep=best", words=("--persist-to", str(away))) == 0
    assert adapter(run_dir / "lora_adapters") == adapter(early / "lora_adapters")


def test_where_nothing_beats_the_untuned_base_it_says_so(tmp_path, capfd):
    sets = (*EARLY, "optimizer.learning_rate=1.0", "training.early_stopping_patience=1", "training.keep=best")
    assert run(tmp_path / "run", *sets) == 0
    told = summary(tmp_path / "run")
    assert (told["best_step"], told["adapter_step"], told["updates"]) == (0, 1, 1)
    assert "the baseline has the lowest loss" in capfd.readouterr().out.replace("\n", " ")


def test_the_rows_before_and_after_can_be_bounded(tmp_path, capfd):
    """The fixed rows may be fewer or more than those before and after; each stands at every point of its own."""
    for rows, full_rows in ((6, 10), (10, 6)):
        place = tmp_path / f"{rows}-{full_rows}"
        sets = ("training.max_steps=2", "evaluation.steps=1", f"evaluation.rows={rows}")
        assert run(place, "--set", *sets, f"evaluation.full_rows={full_rows}") == 0
        lines = [(r["step"], r["split"], r["rows"]) for r in metrics(place) if r["split"] != "train"]
        assert lines == [
            (0, "eval", rows), (0, "eval_full", full_rows), (1, "eval", rows), (2, "eval", rows),
            (2, "eval_full", full_rows), (2, "test", full_rows),
        ]  # fmt: skip
        by_line = {(r["step"], r["split"]): r for r in metrics(place)}
        told = summary(place)
        assert told["baseline"]["loss"] == by_line[0, "eval_full"]["loss"]
        assert told["final"]["loss"] == by_line[2, "eval_full"]["loss"]
        said = capfd.readouterr().out
        assert said.count("% since the baseline)") == 2
        assert f"update 2: validation answer perplexity {by_line[2, 'eval']['answer_perplexity']:.3f} (" in said
    one, other = (metrics(tmp_path / name) for name in ("6-10", "10-6"))
    losses = [{r["rows"]: r["loss"] for r in records if (r["step"], r["split"]) in ((0, "eval"), (0, "eval_full"))}
              for records in (one, other)]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # the six rows are the first six of the same permutation


def test_no_change_is_shown_since_a_baseline_of_other_rows(tmp_path, capfd):
    sets = ("evaluation.steps=1", "training.save_steps=1", "evaluation.rows=6")
    assert run(tmp_path / "run", "--set", *sets, "training.max_steps=1") == 0
    assert "since the baseline" in capfd.readouterr().out
    assert run(tmp_path / "run", "--set", *sets[:2], "evaluation.rows=8", "training.max_steps=2") == 0
    said = capfd.readouterr().out
    assert "update 2: validation answer perplexity" in said
    assert "since the baseline" not in said


def test_a_new_best_is_saved_between_the_saves(tmp_path):
    sets = (*EARLY, "training.save_steps=50", "training.max_steps=3", "training.keep=best")
    assert run(tmp_path / "run", *sets) == 0
    best = summary(tmp_path / "run")["best_step"]
    assert 0 < best < 3
    assert adapter(tmp_path / "run" / "lora_adapters") == adapter(tmp_path / "run" / f"checkpoint-{best}")


@pytest.mark.slow
def test_a_longer_run_knows_all_that_the_shorter_one_has_seen(tmp_path):
    """The best of a run that was made longer is that of the run that was as long from the beginning."""
    words = (*EARLY, "training.keep=best", "training.keep_checkpoints=1")
    assert run(tmp_path / "straight", *words, "training.max_steps=4") == 0
    for updates in (1, 4):
        assert run(tmp_path / "longer", *words, f"training.max_steps={updates}") == 0
    straight, longer = summary(tmp_path / "straight"), summary(tmp_path / "longer")
    assert straight["adapter_step"] == 1, "else the first run's last update says nothing"
    for key in ("best_step", "adapter_step", "final", "test"):
        assert longer[key] == straight[key]
    assert adapter(tmp_path / "longer" / "lora_adapters") == adapter(tmp_path / "straight" / "lora_adapters")
