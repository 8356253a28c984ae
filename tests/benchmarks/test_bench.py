"""`make bench`: its gradient check passes, and fails for updates that are wrong; its arithmetic; a small run."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import medqa.model.loss
from benchmarks.bench_table import HEADING, figures, section, write_section
from benchmarks.cases import ARMS, Case, absent
from benchmarks.compare import main
from benchmarks.flops import flops_per_token, no_bfloat16
from benchmarks.gradient_check import (
    GRADIENT_WITHIN,
    GradientsDiffer,
    Update,
    checked,
    compare,
    differences,
    gradients,
    our_update,
    trainable,
    trainer_update,
    wake,
    within,
)
from benchmarks.ours import build
from benchmarks.pool import Arm, ArmFailed
from benchmarks.standin import fold, make_model, useful_share
from benchmarks.theirs import chosen_rows
from medqa.model.loss import summed_loss, target_count

ROWS = 16
RECIPES = ("exp_001", "exp_002", "exp_003")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """`jobs("exp_001", "trainer", ...)`: what these arms do at the smallest size."""
    scratch = tmp_path_factory.mktemp("bench")
    base = make_model(scratch / "base", "tiny", "float32")

    def made(recipe: str, *arms: str, rounds: int = 0, dtype: str = "float32", quantization: str = "none"):
        case = Case(recipe, recipe, "tiny", dtype, ROWS, 1, arms, "cpu", quantization)
        experiment = case.experiment(base)
        rows = case.make_rows(experiment, None).save(scratch / "rows.npz")
        return case.jobs(experiment, base, rows, rounds, scratch)

    return made


@pytest.fixture(scope="module")
def reference(jobs) -> Update:
    return trainer_update(jobs("exp_001", "trainer")["trainer"])


SLOW = [pytest.param(recipe, marks=pytest.mark.slow) for recipe in RECIPES[1:]]


@pytest.mark.parametrize("recipe", [RECIPES[0], *SLOW])
def test_arms_of_the_same_update_have_trainers_gradients(recipe, jobs):
    found = compare(jobs(recipe, "trainer", "plain", "padding_free", "rebalance"))
    assert found.keys() == {"plain", "padding_free", "rebalance"}
    assert all(within(differences) for differences in found.values())


def test_segments_that_see_each_other_fail(jobs, monkeypatch):
    right = medqa.model.loss.segments_arguments

    def joined(segments, attention, device):
        return right((sum(segments),), attention, device)

    monkeypatch.setattr(medqa.model.loss, "segments_arguments", joined)
    with pytest.raises(GradientsDiffer, match=r"not Trainer's update.*padding_free"):
        compare(jobs("exp_001", "trainer", "padding_free"))


def test_a_mean_of_micro_batch_means_fails(jobs, reference):
    parts = build(checked(jobs("exp_001", "plain")["plain"]))
    wake(parts.adapted)
    adapter, loss = trainable(parts.adapted), 0.0
    micro_batches = parts.batches.next_update()
    for micro_batch in micro_batches:
        mean = summed_loss(parts.model, micro_batch, torch.device("cpu")) / target_count(micro_batch)
        (mean / len(micro_batches)).backward()
        loss += mean.item() / len(micro_batches)
    found = differences(Update(loss, gradients(parts.adapted), adapter), reference)
    assert not within(found)
    assert found["gradient"] > 1000 * GRADIENT_WITHIN


def test_noise_fails(jobs, reference, monkeypatch):
    import benchmarks.gradient_check as module

    def noisy(job):
        quiet = checked(job)
        return replace(quiet, settings={**quiet.settings, "lora.lora_dropout": 0.05})

    monkeypatch.setattr(module, "checked", noisy)
    assert not within(differences(our_update(jobs("exp_001", "plain")["plain"]), reference))


def test_what_says_nothing_fails(reference):
    """No gradient at all, as with B matrices of zeros: 0 / 0 is no agreement."""
    zeros = {name: torch.zeros_like(gradient) for name, gradient in reference.gradients.items()}
    silent = Update(reference.loss, zeros, reference.adapter)
    assert math.isnan(differences(silent, silent)["gradient"])
    assert not within(differences(silent, silent))


def test_another_adapter_is_no_comparison(reference):
    other = {name: tensor + 1 for name, tensor in reference.adapter.items()}
    with pytest.raises(GradientsDiffer, match="same adapter"):
        differences(Update(reference.loss, reference.gradients, other), reference)


def test_length_grouping_takes_rows_of_all_lengths(jobs):
    """The sampler's first updates are all of the longest rows; those timed are not."""
    job = jobs("exp_001", "grouped", rounds=9)["grouped"]
    ids, _ = job.ids()
    rows = chosen_rows(job)
    means = [np.mean([len(row) for row in rows[i : i + ROWS]]) for i in range(0, len(rows), ROWS)]
    assert len(means) == 10
    assert np.mean(means) == pytest.approx(np.mean([len(row) for row in ids]), rel=0.15)
    assert all(np.ptp([len(row) for row in rows[i : i + ROWS]]) < 40 for i in range(0, len(rows), ROWS))


def test_same_rows_for_all_other_arms(jobs):
    made = jobs("exp_001", "trainer", "rebalance", "plain", rounds=2)
    rows = chosen_rows(made["trainer"])
    assert [row.tolist() for row in chosen_rows(made["rebalance"])] == [row.tolist() for row in rows]
    stream = build(made["plain"]).stream
    assert [stream.at(i).input_ids.tolist() for i in range(3 * ROWS)] == [row.tolist() for row in rows]


def test_folded_ids_keep_special_ones_apart():
    ids = np.arange(32000, dtype=np.int32)
    folded = fold(ids, 4000)
    assert folded[:3].tolist() == [0, 1, 2]
    assert folded[3:].min() == 3
    assert folded.max() == 3999


def test_useful_share():
    assert useful_share([1, 3, 2, 2], 2, None) == 8 / 10
    assert useful_share([1, 3, 2, 2], 2, 4) == 8 / 16


def test_flops_are_tinyllamas():
    """4 x 1.034e9 for the frozen weights, 6 x 6.31e6 for the adapter, 0.10e9 for attention at this length."""
    assert flops_per_token("tinyllama", [362] * 4, 8) == pytest.approx(4.27e9, rel=0.01)


def test_absent_arms_say_why(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = absent(list(ARMS), "cpu")
    assert found.keys() == {"trl", "packing", "liger", "compile"}
    assert found["trl"] == "trl is not installed"


def made_up_report() -> dict:
    """Two rounds: padding_free takes half of Trainer's time on the same tokens, and then a third."""

    def arm(*rounds: tuple[float, int]) -> dict:
        found = [{"cpu_s": s, "wall_s": 2 * s, "tokens": t, "updates": 1, "peak_bytes": 100} for s, t in rounds]
        return {"first_update": {"wall_s": 9.0}, "rounds": found}

    case = {
        "case": {"device": "cpu", "shape": "p", "dtype": "float32", "rows": 4, "quantization": "none"},
        "rows": "made up",
        "useful_share": 0.5,
        "flops_per_token": 1e6,
        "gemm_flops": [1e9],
        "gradients": {"padding_free": {"loss": 0.0, "gradient": 2e-6}},
        "failed": {},
        "arms": {
            "trainer": arm((10.0, 100), (12.0, 100)),
            "packing": arm((10.0, 200), (12.0, 200)),
            "padding_free": arm((5.0, 100), (4.0, 100)),
        },
    }
    machine = {"cpu": "a CPU", "capability": "AVX2", "cores": 2, "load_at_start": [0.1, 0, 0]}
    rest = {"date": "2026-01-01T00:00:00", "rounds": 2, "versions": {"torch": "2"}, "left_out": {}}
    return {"machine": machine, "load_at_end": [0.2, 0, 0], "cases": {"exp_003": case}, **rest}


def test_ratios_are_within_rounds_and_per_token():
    case = made_up_report()["cases"]["exp_003"]
    ours, packing = figures(case, "padding_free"), figures(case, "packing")
    assert (ours.speed.lowest, ours.speed.median, ours.speed.highest) == (2.0, 2.5, 3.0)
    assert packing.speed.median == 2.0
    assert ours.tokens_per_s == pytest.approx(22.5)
    assert ours.utilisation == pytest.approx(22.5e6 / 1e9)


def test_the_section_states_targets_and_replaces_itself_alone(tmp_path):
    text = section(made_up_report())
    assert ">= 3.3 MISSED" in text
    assert "<= 0.7 MISSED" in text
    path = tmp_path / "RESULTS.md"
    path.write_text(f"# Results\n\n{HEADING}\n\nold\n\n## After\n\nstays\n", encoding="utf-8")
    write_section(made_up_report(), path)
    write_section(made_up_report(), path)
    written = path.read_text(encoding="utf-8")
    assert written.count(HEADING) == 1
    assert "old" not in written
    assert written.endswith("## After\n\nstays\n")


def test_an_arm_that_cannot_run_says_why(jobs, tmp_path):
    job = replace(jobs("exp_001", "trainer")["trainer"], device="nowhere")
    with pytest.raises(ArmFailed, match=r"(?s)trainer: exit code 1.*nowhere"):
        Arm(job, tmp_path)


@pytest.mark.slow
def test_quick_runs_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--quick", "--recipes", "exp_002", "--no-host", "--arms", "trainer", "padding_free"]
    assert main([*words, "--plot", "plot.png"]) == 0
    report = json.loads(Path("bench.json").read_text(encoding="utf-8"))
    case = report["cases"]["exp_002"]
    assert {"cpu", "cores", "load_at_start"} <= report["machine"].keys()
    assert {"torch", "transformers"} <= report["versions"].keys()
    assert case["gradients"]["padding_free"]["gradient"] <= GRADIENT_WITHIN
    assert case["gemm_flops"][0] > 0
    for arm in ("trainer", "padding_free"):
        (found,) = case["arms"][arm]["rounds"]
        assert found["updates"] == 1
        assert found["cpu_s"] > 0
        assert found["peak_bytes"] > 1e8
        assert case["arms"][arm]["first_update"]["wall_s"] > 0
    assert case["arms"]["trainer"]["rounds"][0]["tokens"] == case["arms"]["padding_free"]["rounds"][0]["tokens"]
    assert Path("plot.png").stat().st_size > 0
    assert "ours, padding_free" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trl", "packing"])
def test_trls_arms_run(name, jobs, tmp_path):
    pytest.importorskip("trl")
    job = jobs("exp_003", name, rounds=1)[name]
    arm = Arm(job, tmp_path)
    found = arm.round(1)
    arm.stop()
    ids, _ = job.ids()
    usual = ROWS * np.mean([len(row) for row in ids])
    assert found["tokens"] == pytest.approx(usual, rel=0.6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trainer", "padding_free"])
@pytest.mark.parametrize("other", [{"dtype": "bfloat16"}, {"quantization": "4bit"}], ids=str)
def test_arms_run_in_other_types(name, other, jobs, tmp_path):
    """`--full` in bfloat16, whose speed some CPUs do not have, and `--quantization 4bit`."""
    arm = Arm(jobs("exp_002", name, rounds=1, **other)[name], tmp_path)
    assert arm.round(1)["tokens"] > 0
    arm.stop()


def test_a_cpu_that_emulates_bfloat16_is_told(monkeypatch):
    monkeypatch.setattr("benchmarks.flops.gemm_flops", lambda device, dtype, size: 1e9 if "bf" in dtype else 8e10)
    assert "1.0 GFLOP/s, against 80 in float32" in no_bfloat16()
    monkeypatch.setattr("benchmarks.flops.gemm_flops", lambda device, dtype, size: 4e11 if "bf" in dtype else 8e10)
    assert no_bfloat16() is None
