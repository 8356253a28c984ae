"""`python -m medqa evaluate`: the loss of the run's summary, with intervals, however computed; what is refused."""

import errno
import gc
import json
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import wandb
from accelerate.state import AcceleratorState
from launching import Group, finish, output
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from wandb_file import read_finished_run

from medqa import cache
from medqa.__main__ import main
from medqa.commands import evaluate
from medqa.commands.adapter import find_adapter, load_adapted
from medqa.commands.evaluate import flat_figures, load_held_out, log_evaluation
from medqa.commands.evaluation_table import TOO_FEW, in_short, in_words, show_evaluation, shown
from medqa.config import Tracking
from medqa.data.batches import split_and_tokenize
from medqa.data.sources import Row, load_sources
from medqa.data.splits import split_sources
from medqa.evaluation.answers import own_template_prompts, with_prompts
from medqa.evaluation.statistics import difference_figure, loss_report, mean_figure
from medqa.model.base import load_tokenizer
from medqa.terminal import make_console
from medqa.tiny import BASE_DIR, MEDQUAD_CSV
from train import main as train

TOKENS = 12  # of an answer, at most
EVALUATE = f"""
import sys
from medqa.commands import evaluate as evaluate_module
evaluate_module.ANSWER_TOKENS = {TOKENS}
from medqa.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def apart(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def run(tiny_run, tmp_path) -> Path:
    shutil.copytree(tiny_run, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def evaluated(tiny_run, tmp_path_factory) -> Path:
    """The run with the loss evaluated."""
    directory = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(tiny_run, directory)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("WANDB_MODE", "disabled")
        assert main(["evaluate", str(directory), "--tasks", "loss", "--cpu"]) == 0
    return directory


def loss_of(run: Path) -> dict:
    return json.loads((run / "evaluation.json").read_text())["tasks"]["loss"]


def test_the_loss_is_that_of_the_summary(evaluated):
    told, found = json.loads((evaluated / "summary.json").read_text()), loss_of(evaluated)
    for split, system, part in (
        ("validation", "untuned", "baseline"),
        ("validation", "tuned", "final"),
        ("test", "tuned", "test"),
    ):
        for key, value in told[part].items():
            figure = found[split][system][key]
            assert figure["value"] == pytest.approx(value, rel=1e-6)
            assert figure["low"] < figure["value"] < figure["high"]
    assert found["test"]["untuned"]["loss"]["value"] > 1.02 * found["test"]["tuned"]["loss"]["value"]


def test_the_difference_is_tested_in_pairs(evaluated):
    for part in loss_of(evaluated).values():
        for base in ("untuned", "own_template"):
            difference = part["difference"][f"tuned - {base}"]["answer_loss"]
            tuned, untuned = (part[system]["answer_loss"]["value"] for system in ("tuned", base))
            assert difference["value"] == pytest.approx(tuned - untuned)
            assert 0 < difference["p_value"] <= 1
            assert difference["low"] < difference["value"] < difference["high"]
        assert set(part["difference"]["tuned - untuned"]) == {"loss", "answer_loss"}
        assert set(part["difference"]["tuned - own_template"]) == {"answer_loss"}


def test_sources_add_up(evaluated):
    part = loss_of(evaluated)["validation"]
    assert sum(source["rows"] for source in part["sources"].values()) == part["rows"]
    total = sum(s["tuned"]["answer_loss"]["value"] * s["answer_tokens"] for s in part["sources"].values())
    assert total / part["answer_tokens"] == pytest.approx(part["tuned"]["answer_loss"]["value"])


def test_what_the_base_gives_is_computed_once(evaluated, tiny_run, run, capsys):
    assert main(["evaluate", str(run), "--tasks", "loss", "--cpu"]) == 0
    told = capsys.readouterr().out
    assert told.count("baseline from the cache") == 8  # two splits, two prompts, 4-bit and unquantized weights
    assert told.count("rows of") == 4  # the tuned one alone, in 4 bits and on unquantized weights
    assert loss_of(run) == loss_of(evaluated)


def row_loss(model, example) -> float:
    """The mean loss over an example's tokens, by transformers alone."""
    ids = torch.tensor(example.input_ids.astype("int64"))[None]
    with torch.no_grad():
        return torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:]).item()


def test_what_4_bits_cost_is_measured_on_the_bases_own_weights(run):
    """Base and adapter as anybody loads them, with transformers and PEFT alone, on one row of each split."""
    assert main(["evaluate", str(run), "--tasks", "loss", "--limit", "1", "--cpu"]) == 0
    source = find_adapter(str(run))
    base = AutoModelForCausalLM.from_pretrained(BASE_DIR, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, str(run / "lora_adapters")).eval()
    for split, examples in load_held_out(source, load_tokenizer(str(BASE_DIR)), 1).examples.items():
        found = loss_of(run)[split]
        with tuned.disable_adapter():
            expected = row_loss(tuned, examples[0])
        assert found["untuned_unquantized"]["loss"]["value"] == pytest.approx(expected, rel=1e-5)
        assert found["untuned"]["loss"]["value"] != pytest.approx(expected, rel=1e-4)
        expected = row_loss(tuned, examples[0])
        assert found["tuned_unquantized"]["loss"]["value"] == pytest.approx(expected, rel=1e-5)
        assert found["tuned"]["loss"]["value"] != pytest.approx(expected, rel=1e-4)


def test_what_4_bits_cost_is_paired_by_rows(evaluated):
    for part in loss_of(evaluated).values():
        assert {"untuned", "untuned_unquantized", "tuned", "tuned_unquantized"} <= part.keys()
        assert len(part["quantization"]) == 6
        for pair, figures in part["quantization"].items():
            ours, theirs = (part[system]["answer_loss"]["value"] for system in pair.split(" - "))
            figure = figures["answer_loss"]
            assert figure["value"] == pytest.approx(ours - theirs)
            assert figure["rows"] == part["rows"]
            assert 0 < figure["p_value"] <= 1
            own = part[pair.split(" - ")[0]]["answer_loss"]
            assert figure["high"] - figure["low"] < own["high"] - own["low"]  # because pairs vary less than rows
        sources = part["sources"].values()
        assert all({"untuned_unquantized", "tuned_unquantized"} <= source.keys() for source in sources)


def test_the_table_shows_all_four_and_the_summary_what_is_left(evaluated, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    show_evaluation(make_console(), json.loads((evaluated / "evaluation.json").read_text()))
    told = capsys.readouterr().out
    for name in ("baseline", "fine-tuned"):
        for weights in (", 4-bit ", ", unquantized "):
            assert f" {name}{weights}" in told
    for difference in ("fine-tuned (4-bit) - baseline (unquantized)", "fine-tuned - baseline, both 4-bit"):
        assert difference in told
    assert "answer loss on test with 4-bit and with unquantized weights: baseline " in told


def test_what_is_left_of_the_gain_is_said():
    """Figures of a real run: 0.378 in the table, 0.108 of it against the real base."""
    rows = np.arange(12) / 1000 - 0.0055
    losses = {"untuned": 2.632, "untuned_unquantized": 2.362, "tuned": 2.254, "tuned_unquantized": 2.191}
    tables = {
        system: np.array([[loss + noise, 1, loss + noise, 1] for noise in rows]) for system, loss in losses.items()
    }
    seen = {"question_or_answer": False, "topic": None, "13_grams": False}
    held_out = [Row(f"a:{i}", "a", "q", "x", None) for i in range(12)]
    report = loss_report(tables, held_out, {row.id: seen for row in held_out}, 0)
    _, four, left = in_short({"loss": {"test": report}})
    assert four == (
        "answer loss on test with 4-bit and with unquantized weights: baseline 2.6320 and 2.3620, fine-tuned 2.2540 "
        "and 2.1910"
    )
    assert left == (
        "gain in answer loss: 0.3780 with 4-bit weights; of it, 0.1080 (0.1080 to 0.1080) is left against the "
        "baseline, unquantized: fine-tuned is better; 0.1710 (0.1710 to 0.1710) with the adapter on unquantized weights"
        ": fine-tuned is better"
    )
    # In its own chat template the base is better than the fine-tuned model: the verdict is against that.
    tables["own_template"] = tables["untuned"]
    tables["own_template_unquantized"] = tables["tuned_unquantized"] - np.array([0, 0, 0.1, 0])
    report = loss_report(tables, held_out, {row.id: seen for row in held_out}, 0)
    assert "loss" not in report["own_template_unquantized"]
    *_, left = in_short({"loss": {"test": report}})
    assert (
        "of it, -0.1630 (-0.1630 to -0.1630) is left against the baseline in its own chat template, unquantized, the "
        "better of the two: fine-tuned is worse; -0.1000 (-0.1000 to -0.1000) with the adapter on unquantized weights: "
        "fine-tuned is worse"
    ) in left
    assert in_words("test.tuned_unquantized.loss") == "test.fine-tuned, unquantized.loss"


def test_only_one_model_is_in_memory_at_a_time(run, monkeypatch):
    alive = []

    def counting(*arguments, **options):
        gc.collect()
        alive.append(sum(isinstance(each, PeftModel) for each in gc.get_objects()))
        return load_adapted(*arguments, **options)

    gc.collect()
    before = sum(isinstance(each, PeftModel) for each in gc.get_objects())
    monkeypatch.setattr(evaluate, "load_adapted", counting)
    assert main(["evaluate", str(run), "--tasks", "loss", "--limit", "2", "--cpu"]) == 0
    assert alive == [before, before]


def test_unquantized_weights_without_room_are_left_out(run, monkeypatch, capsys):
    words = ["evaluate", str(run), "--tasks", "loss", "--limit", "6", "--cpu"]
    with monkeypatch.context() as patched:
        patched.setattr(evaluate, "available_memory", lambda *_: 2**20)
        assert main(words) == 0
    told = capsys.readouterr().out
    part = loss_of(run)["test"]
    why = part["unquantized_left_out"]
    assert re.fullmatch(r"they need about 0\.0[1-9] GiB, and 0\.00 GiB may be used", why)
    assert told.splitlines()[0] == f"unquantized weights: not measured: {why}"
    assert f"- on unquantized weights: not measured: {why}" in told.splitlines()
    assert "untuned_unquantized" not in part

    def full(*_):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with monkeypatch.context() as patched:
        patched.setattr(evaluate, "_unquantized_losses", full)
        assert main(words) == 0
    assert "unquantized weights: not measured: out of memory" in capsys.readouterr().out
    assert "tuned" in loss_of(run)["test"]


@pytest.mark.parametrize("damage", [b"", b"{", b'{"value": [[1]], "checksum": "0"}'], ids=["empty", "torn", "changed"])
def test_a_damaged_baseline_is_computed_again(damage, evaluated, run, monkeypatch, tmp_path, capsys):
    shutil.copytree(cache.baseline_folder(), tmp_path / "cache" / "baselines")
    monkeypatch.setenv("MEDQA_CACHE", str(tmp_path / "cache"))
    kept = list(cache.baseline_folder().glob("*.json"))
    assert len(kept) >= 4
    for path in kept:
        path.write_bytes(damage)
    assert main(["evaluate", str(run), "--tasks", "loss", "--cpu"]) == 0
    assert "from the cache" not in capsys.readouterr().out
    assert loss_of(run) == loss_of(evaluated)


@pytest.mark.slow
def test_neither_rows_at_once_nor_padding_matter(evaluated, run, monkeypatch):
    monkeypatch.setattr(cache, "find", lambda what: None)
    monkeypatch.setattr("medqa.commands.evaluate.enough_tokens", lambda *_: 1)  # one row at a time
    monkeypatch.setattr("medqa.model.attention.padding_needed", lambda *_: "to see")
    monkeypatch.setattr("medqa.model.memory.padding_needed", lambda *_: "to see")
    assert main(["evaluate", str(run), "--tasks", "loss", "--cpu"]) == 0
    for split, part in loss_of(run).items():
        for system in ("untuned", "untuned_unquantized", "own_template", "tuned", "tuned_unquantized"):
            for key, figure in part[system].items():
                expected = loss_of(evaluated)[split][system][key]
                assert figure == pytest.approx(expected, rel=1e-6), (split, system, key)


@pytest.fixture(scope="module")
def evaluated_in_full(tiny_run, tmp_path_factory) -> Path:
    """The run with all tasks evaluated, on a few rows."""
    directory = tmp_path_factory.mktemp("full") / "run"
    shutil.copytree(tiny_run, directory)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("WANDB_MODE", "disabled")
        patched.setattr("medqa.commands.evaluate.ANSWER_TOKENS", TOKENS)
        assert main(["evaluate", str(directory), "--limit", "6", "--cpu"]) == 0
    return directory


@pytest.fixture(scope="module")
def in_full(evaluated_in_full) -> dict:
    """What it found, by task."""
    return json.loads((evaluated_in_full / "evaluation.json").read_text())["tasks"]


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]


def test_every_row_has_one_line_with_all_of_it(evaluated_in_full, in_full):
    lines = lines_of(evaluated_in_full)
    assert [line["split"] for line in lines] == ["validation"] * 6 + ["test"] * 6
    assert len({line["id"] for line in lines}) == 12
    for line in lines:
        assert line["source"] == line["id"].partition(":")[0]
        assert {"question", "reference"} <= line.keys()
        assert ("tuned_answer" in line) == (line["split"] == "test")
    of_test = lines[6:]
    systems = ("untuned", "own_template", "copied", "tuned")
    for system in systems:
        found = in_full["generation"][system]
        for name in ("rouge1", "rouge2", "rougeL", "stops", "loops"):
            mean = sum(line[f"{system}_{name}"] for line in of_test) / 6
            assert mean == pytest.approx(found[name]["value"], abs=1e-12), (system, name)
        authors = [line[f"{system}_authors_rougeL"] for line in of_test if f"{system}_authors_rougeL" in line]
        assert len(authors) == found["authors_rougeL"]["rows"] < 6
        assert sum(authors) / len(authors) == pytest.approx(found["authors_rougeL"]["value"])
        words, of_references = (sum(line[key] for line in of_test) for key in (f"{system}_words", "reference_words"))
        assert words / of_references == pytest.approx(found["length_ratio"]["value"])
    for split in ("validation", "test"):
        for system in ("untuned", "own_template", "tuned"):
            chosen = [line for line in lines if line["split"] == split]
            tokens = [line[f"{system}_answer_tokens"] for line in chosen]
            total = sum(line[f"{system}_answer_loss"] * n for line, n in zip(chosen, tokens, strict=True))
            expected = in_full["loss"][split][system]["answer_loss"]["value"]
            assert total / sum(tokens) == pytest.approx(expected), (split, system)
            assert all(line[f"{system}_tokens"] >= n for line, n in zip(chosen, tokens, strict=True))
    first = next(line for line in of_test if line["id"] == in_full["generation"]["samples"][0]["id"])
    sample = in_full["generation"]["samples"][0]
    assert {key: first[key] for key in ("question", "reference")} == {k: sample[k] for k in ("question", "reference")}
    assert {system: first[f"{system}_answer"] for system in systems} == {system: sample[system] for system in systems}


def test_pandas_reads_the_lines(evaluated_in_full):
    import pandas

    table = pandas.read_json(evaluated_in_full / "evaluation.jsonl", lines=True)
    assert len(table) == 12
    change = table.tuned_answer_loss - table.untuned_answer_loss
    assert change.notna().all()
    assert table[table.split == "test"].tuned_rougeL.notna().all()


def test_the_lines_are_kept_and_replaced_as_the_figures_are(evaluated_in_full, run, capsys, monkeypatch):
    monkeypatch.setattr("medqa.commands.evaluate.ANSWER_TOKENS", TOKENS)
    for name in ("evaluation.json", "evaluation.jsonl"):
        shutil.copy(evaluated_in_full / name, run)
    before = (run / "evaluation.jsonl").read_bytes()
    words = ["evaluate", str(run), "--cpu", "--tasks"]
    assert main([*words, "loss", "--limit", "6"]) == 0
    assert (run / "evaluation.jsonl").read_bytes() == before, "the answers are those of the same adapter"
    assert main([*words, "loss", "--limit", "3"]) == 0
    assert len(lines_of(run)) == 6
    assert not any("tuned_answer" in line for line in lines_of(run)), "they were of another limit"
    (run / "evaluation.jsonl").write_bytes(before)
    capsys.readouterr()
    assert main(["evaluate", str(run), "--show", "worst"]) == 2
    assert "evaluation.jsonl: it was not written with evaluation.json, or was changed" in capsys.readouterr().err
    assert main([*words, "mcq", "--limit", "2"]) == 0
    assert not (run / "evaluation.jsonl").exists(), "no row was evaluated"
    assert "evaluation.jsonl: it was not written with" in capsys.readouterr().out


def test_rows_are_shown_without_a_model(evaluated_in_full, capsys):
    sample = json.loads((evaluated_in_full / "evaluation.json").read_text())["tasks"]["generation"]["samples"][0]
    (evaluated_in_full / "lora_adapters" / "adapter_config.json").rename(evaluated_in_full / "elsewhere")
    try:
        assert main(["evaluate", str(evaluated_in_full), "--show", "worst", "6"]) == 0
    finally:
        (evaluated_in_full / "elsewhere").rename(evaluated_in_full / "lora_adapters" / "adapter_config.json")
    told = capsys.readouterr().out
    assert told.startswith(
        "6 rows of test (--limit 6), the adapter of update 6; change in ROUGE-L against the baseline"
    )
    assert ", the better of the two; 6 of them, the worst change first\n" in told
    for text in (sample["question"], sample["untuned"], sample["own_template"], sample["tuned"]):
        assert text.splitlines()[0] in told


def test_every_task_has_its_figures(in_full):
    assert set(in_full) == {"loss", "generation", "mcq", "probes"}
    for system in ("untuned", "own_template", "copied", "tuned"):
        found = in_full["generation"][system]
        assert {"rouge1", "rouge2", "rougeL", "authors_rougeL", "stops", "loops", "length_ratio"} <= found.keys()
    pairs = {"tuned - untuned", "tuned - own_template", "tuned - copied"}
    assert set(in_full["generation"]["difference"]) == pairs
    for task in ("mcq", "probes"):
        assert set(in_full[task]["difference"]) == pairs - {"tuned - copied"}
    assert {"id", "question", "reference", "untuned", "tuned", "copied"} <= in_full["generation"]["samples"][0].keys()
    assert in_full["generation"]["rows"] == in_full["mcq"]["rows"] == in_full["probes"]["rows"] == 6
    for system in ("untuned", "own_template", "tuned"):
        assert set(in_full["mcq"][system]) == {"accuracy", "accuracy_per_byte", "letter", "no_letter"}
        assert {"advises_care", "unsupported_numbers", "unsupported_doses"} <= in_full["probes"][system].keys()
        assert all(system in counts for counts in in_full["probes"]["categories"].values())
    assert 0.2 <= in_full["mcq"]["chance"] <= 0.5
    assert in_full["mcq"]["dropped"]["shared with training"] > 0


@pytest.mark.slow
def test_two_processes_find_the_same(in_full, run, tmp_path):
    script = tmp_path / "evaluate.py"
    script.write_text(EVALUATE)
    words = ["evaluate", str(run), "--limit", "6", "--cpu"]
    both = Group.of(run, words, processes=2, script=script, MEDQA_CACHE=str(tmp_path / "own"), WANDB_MODE="disabled")
    assert finish(both, run) == 0, output(run)
    assert output(run).count("loss on validation, 95 %") == 1, "told by the main process alone"
    found = json.loads((run / "evaluation.json").read_text())["tasks"]
    numbers = dict(flat_figures(in_full))
    assert len(numbers) >= 150
    assert dict(flat_figures(found)) == pytest.approx(numbers, rel=1e-6, abs=1e-9)
    assert found["generation"]["samples"] == in_full["generation"]["samples"]
    assert found["probes"]["samples"] == in_full["probes"]["samples"]


def test_what_was_written_once_is_not_written_again(in_full, run, monkeypatch, capsys):
    monkeypatch.setattr("medqa.commands.evaluate.ANSWER_TOKENS", TOKENS)
    assert main(["evaluate", str(run), "--limit", "6", "--cpu", "--tasks", "generation,probes"]) == 0
    told = capsys.readouterr().out
    assert told.count("baseline from the cache") == 4  # answers to rows and to red flags, in two prompts
    assert told.count("answers, fine-tuned") == 2
    tasks = json.loads((run / "evaluation.json").read_text())["tasks"]
    assert tasks == {task: in_full[task] for task in ("generation", "probes")}


def test_without_afrimedqa_there_is_nothing_to_choose(tmp_path, capsys):
    words = ["--exp", "exp_001", "--tiny", "--cpu", "--afrimedqa", "none", "--output-dir", str(tmp_path / "run")]
    sets = ["training.max_steps=1", "training.global_batch_size=4", "model.quantization=none", "evaluation.samples=0"]
    assert train(["--set", *sets, *words]) == 0
    assert main(["evaluate", str(tmp_path / "run"), "--tasks", "loss,mcq", "--limit", "2", "--cpu"]) == 0
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["tasks"]["mcq"] == {"rows": 0, "dropped": {}}
    assert "unquantized" not in str(loss_of(tmp_path / "run"))  # the run's weights were not quantized


def test_a_limit_takes_so_many_rows_of_all_sources(run):
    assert main(["evaluate", str(run), "--tasks", "loss", "--limit", "5", "--cpu"]) == 0
    assert {split: part["rows"] for split, part in loss_of(run).items()} == {"validation": 5, "test": 5}
    assert json.loads((run / "evaluation.json").read_text())["limit"] == 5
    assert set(loss_of(run)["test"]["sources"]) == {"medquad", "afrimedqa"}


def test_another_checkpoint_is_another_evaluation(evaluated, run):
    assert main(["evaluate", str(run), "--tasks", "loss", "--checkpoint", "2", "--cpu"]) == 0
    found = json.loads((run / "evaluation.json").read_text())
    assert (found["step"], found["final"]) == (2, False)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    then = next(line for line in lines if (line["step"], line["split"]) == (2, "eval"))
    assert then["rows"] == found["tasks"]["loss"]["validation"]["rows"]
    assert found["tasks"]["loss"]["validation"]["tuned"]["loss"]["value"] == pytest.approx(then["loss"], rel=1e-6)


def test_tasks_not_asked_for_are_kept_for_the_same_adapter(evaluated, run):
    found = json.loads((evaluated / "evaluation.json").read_text())
    loss = found["tasks"]["loss"]
    assert evaluate.write_evaluation(found, run)
    assert evaluate.write_evaluation({**found, "tasks": {"mcq": {"rows": 0}}}, run)
    assert json.loads((run / "evaluation.json").read_text())["tasks"] == {"loss": loss, "mcq": {"rows": 0}}
    for key, value in (("step", 2), ("dtype", "bfloat16"), ("base_fingerprint", "of another base")):
        assert evaluate.write_evaluation({**found, key: value, "tasks": {"mcq": {"rows": 1}}}, run)
        assert json.loads((run / "evaluation.json").read_text())["tasks"] == {"mcq": {"rows": 1}}
        assert evaluate.write_evaluation(found, run)
    (run / "evaluation.json").write_text("{")
    assert evaluate.write_evaluation(found, run)
    assert loss_of(run) == loss


def test_a_few_rows_never_take_the_place_of_all(evaluated, run, capsys):
    shutil.copy(evaluated / "evaluation.json", run)
    before = (run / "evaluation.json").read_bytes()
    assert main(["evaluate", str(run), "--tasks", "loss", "--limit", "3", "--cpu"]) == 0
    told = capsys.readouterr().out
    assert "--limit 3: metrics of so many rows of each split" in told
    assert "answer perplexity on test, 3 rows: " in told
    assert "; against the baseline" in told
    assert TOO_FEW in told
    assert "no difference" not in told
    assert f"not written: {run / 'evaluation.json'} has results on all rows" in told
    assert (run / "evaluation.json").read_bytes() == before


@pytest.mark.slow
def test_other_rows_or_another_template_are_another_baseline(run, tmp_path, monkeypatch, capsys):
    """The seed chooses the rows of a limit; a base's own template is no part of its weights."""
    monkeypatch.setenv("MEDQA_CACHE", str(tmp_path / "cache"))
    config = (run / "config.yaml").read_text()
    words = ["evaluate", str(run), "--tasks", "loss", "--limit", "6", "--cpu"]
    assert main(words) == 0
    first = loss_of(run)["test"]["untuned"]["answer_loss"]["value"]
    (run / "config.yaml").write_text(config.replace("  seed: 42", "  seed: 43"))
    capsys.readouterr()
    assert main(words) == 0
    assert "from the cache" not in capsys.readouterr().out
    assert loss_of(run)["test"]["untuned"]["answer_loss"]["value"] != first
    shutil.copytree(BASE_DIR, tmp_path / "base")
    template = tmp_path / "base" / "chat_template.jinja"
    if template.exists():
        template.write_text("Q: {{ messages[0]['content'] }}")
    else:
        path = tmp_path / "base" / "tokenizer_config.json"
        path.write_text(
            json.dumps({**json.loads(path.read_text()), "chat_template": "Q: {{ messages[0]['content'] }}"})
        )
    assert main([*words, "--model", str(tmp_path / "base")]) == 0
    told = capsys.readouterr().out
    assert told.count("from the cache") == 4, "the untuned base with this prompt, on two splits, and unquantized"


def test_what_is_done_is_kept_though_a_later_task_fails(run, monkeypatch):
    def fails(bench) -> dict:
        raise KeyboardInterrupt

    monkeypatch.setitem(evaluate.MEASURES, "mcq", fails)
    assert main(["evaluate", str(run), "--tasks", "loss,mcq", "--limit", "3", "--cpu"]) == 130
    assert loss_of(run)["test"]["rows"] == 3


def test_a_run_that_cannot_be_written_is_evaluated_and_its_figures_are_shown(run, tmp_path, monkeypatch, capsys):
    """As root may write anywhere, the run is on a disk that is mounted read-only."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("no permission to mount a disk")
    try:
        shutil.copytree(run, place / "run")
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        monkeypatch.setenv("COLUMNS", "200")
        assert main(["evaluate", str(place / "run"), "--tasks", "loss", "--limit", "3", "--cpu"]) == 0
    finally:
        subprocess.run(["umount", str(place)], check=True)
    told = capsys.readouterr()
    said = told.out.splitlines()
    first = f"{place / 'run'} is not writable (Read-only file system): the results are printed at the end, but not kept"
    assert said[0] == first
    assert said[-1] == f"not kept: {place / 'run'} is not writable"
    assert any("answer perplexity on test" in line for line in said)
    assert told.err == ""


def test_figures_are_shown_though_the_disk_fills_up(run, monkeypatch, capsys):
    """And the exit code says that they are not kept, because there was a place for them at the start."""

    def full(found, run, lines) -> bool:
        raise OSError(errno.ENOSPC, "No space left on device", str(run / "evaluation.json.tmp"))

    monkeypatch.setattr(evaluate, "write_evaluation", full)
    assert main(["evaluate", str(run), "--tasks", "loss", "--limit", "3", "--cpu"]) == 2
    told = capsys.readouterr()
    why = f"{run / 'evaluation.json.tmp'}: No space left on device; free space there, then start again"
    assert told.out.count(f"{why}: the results are printed at the end, but not kept") == 1
    assert "answer perplexity on test" in told.out
    assert told.err == f"error: {why}\n"


def test_two_at_once_lose_nothing(evaluated, run):
    found = json.loads((evaluated / "evaluation.json").read_text())
    tasks = [f"task {number}" for number in range(24)]
    with ThreadPoolExecutor(8) as pool:
        written = pool.map(lambda task: evaluate.write_evaluation({**found, "tasks": {task: 1}}, run), tasks)
        assert all(written)
    assert set(json.loads((run / "evaluation.json").read_text())["tasks"]) == set(tasks)


def test_weights_that_are_not_finite_are_refused(run, capsys):
    path = run / "lora_adapters" / "adapter_model.safetensors"
    weights = load_file(path)
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    assert main(["evaluate", str(run), "--tasks", "loss", "--cpu"]) == 2
    assert "weights of the adapter are not finite" in capsys.readouterr().err


def test_wandb_has_the_figures(run, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert main(["evaluate", str(run), "--tasks", "loss", "--limit", "4", "--cpu"]) == 0
    (path,) = run.glob("wandb/offline-run-*/*.wandb")
    told = read_finished_run(path)
    assert told.id == json.loads((run / "run.json").read_text())["run_id"]
    figure = loss_of(run)["test"]["tuned"]["answer_perplexity"]
    for name, key in (("", "value"), ("/low", "low"), ("/high", "high")):
        place = f"evaluation/loss/test/tuned/answer_perplexity{name}"
        assert told.summary[place] == pytest.approx(figure[key])
    assert set(told.history) == set(range(7)), "all of training too: what is sent last is the whole run"


def test_a_directory_of_somebody_else_sends_nothing_to_its_own_entity(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "secret").write_text("secret")
    (run / "lora_adapters" / "notes.txt").symlink_to(tmp_path / "secret")
    config = (run / "config.yaml").read_text()
    assert "entity: null" in config
    (run / "config.yaml").write_text(config.replace("entity: null", "entity: their-team"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    words = ["evaluate", str(run), "--tasks", "loss", "--limit", "4", "--cpu"]
    assert main(words) == 0
    assert "W&B: nothing logged: only the run's config.yaml names the entity their-team" in capsys.readouterr().out
    assert not list(run.glob("wandb/*"))
    assert not (tmp_path / "data").exists()
    monkeypatch.setenv("WANDB_ENTITY", "our-team")
    wandb.teardown()  # it reads its variables once a process
    assert main(words) == 0
    assert "W&B: offline" in capsys.readouterr().out
    (path,) = run.glob("wandb/offline-run-*/*.wandb")
    read_finished_run(path)
    assert b"our-team" in path.read_bytes()
    assert b"notes.txt" not in path.read_bytes()
    assert "secret" not in [
        path.read_text(errors="replace") for path in (tmp_path / "data").rglob("*") if path.is_file()
    ]


def test_nothing_of_wandb_is_written_through_a_link(run, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (run / "wandb").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setenv("WANDB_MODE", "offline")
    found, said = {"tasks": {}, "limit": None, "mixed_precision": "no"}, []
    experiment = find_adapter(str(run)).experiment
    experiment = experiment.model_copy(update={"tracking": Tracking(wandb="offline")})
    log_evaluation(found, run, experiment, True, said.append)
    assert said == [f"W&B: nothing logged: {run / 'wandb'} is a link; set WANDB_DIR to where W&B may write its files"]
    assert not list((tmp_path / "elsewhere").iterdir())


def test_rows_apart_from_training():
    rows = [
        Row("a:0", "a", "q", "x", "Asthma"),
        Row("a:1", "a", "q", "x", "Malaria"),
        Row("b:0", "b", "q", "x", None),
    ]
    seen = {"question_or_answer": False}
    shared = {
        "a:0": seen | {"topic": True, "13_grams": True},
        "a:1": seen | {"topic": False, "13_grams": False},
        "b:0": seen | {"topic": None, "13_grams": None},
    }
    tuned = np.array([[2.0, 2, 1, 1], [9.0, 3, 3, 1], [4.0, 4, 0, 0]])
    found = loss_report({"untuned": tuned + np.array([1, 0, 1, 0]), "tuned": tuned}, rows, shared, 0)
    assert found["tuned"]["loss"]["value"] == pytest.approx(15 / 9)
    assert found["unseen_topics"]["rows"] == found["few_shared_13_grams"]["rows"] == 1
    assert found["unseen_topics"]["tuned"]["loss"]["value"] == 3.0
    assert found["sources"]["b"]["rows"] == 1
    assert "answer_loss" not in found["sources"]["b"]["tuned"]  # all of its answer was cut off
    assert found["shared_with_training"] == {"question_or_answer": 0.0, "topic": 0.5, "13_grams": 0.5}


def test_rows_that_were_not_trained_on_do_not_count_as_shared(tiny_run):
    """Those of whose answer `max_length` left nothing: as in `data_report.json`."""
    source = find_adapter(str(tiny_run))
    short = source.experiment.tokenization.model_copy(update={"max_length": 60})
    experiment = source.experiment.model_copy(update={"tokenization": short})
    tokenizer = load_tokenizer(experiment.model.base)
    data = split_and_tokenize(load_sources(experiment.data), tokenizer, experiment)
    assert set(data.splits.beyond) & set(split_sources(data.sources, experiment.data).train)
    held_out = load_held_out(replace(source, experiment=experiment), tokenizer, None)
    assert held_out.splits == data.splits
    assert set(held_out.examples) == {"validation", "test"}


def test_the_bases_own_template_stands_before_the_same_answers(tiny_run):
    source = find_adapter(str(tiny_run))
    tokenizer = load_tokenizer(source.experiment.model.base)
    examples = load_held_out(source, tokenizer, 6).examples["test"]
    prompts = own_template_prompts(str(BASE_DIR), [example.row.question for example in examples])
    for before, now in zip(examples, with_prompts(examples, prompts), strict=True):
        assert now.input_ids[: now.answer_start].tolist() == prompts(before.row.question)
        assert now.input_ids[: now.answer_start].tolist() != before.input_ids[: before.answer_start].tolist()
        assert np.array_equal(now.input_ids[now.answer_start :], before.input_ids[before.answer_start :])


def test_a_base_without_a_template_has_none(tmp_path):
    shutil.copytree(BASE_DIR, tmp_path / "base")
    for path in (tmp_path / "base" / "chat_template.jinja", tmp_path / "base" / "tokenizer_config.json"):
        if path.suffix == ".json":
            path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}))
        else:
            path.unlink(missing_ok=True)
    assert own_template_prompts(str(tmp_path / "base"), []) is None


def two_baselines(name: str, own: float, untuned: float, rows: int = 40) -> dict:
    """Metrics of a task in which the fine-tuned model has 0.5 on each row, and the baselines about what is given."""
    noise = np.linspace(-0.2, 0.2, rows)
    columns = {"untuned": untuned + noise, "own_template": own - noise, "tuned": np.full(rows, 0.5)}
    return {
        "rows": rows,
        **{system: {name: mean_figure(values)} for system, values in columns.items()},
        "difference": {
            f"tuned - {system}": {name: difference_figure(columns["tuned"], columns[system])}
            for system in ("untuned", "own_template")
        },
    }


@pytest.mark.parametrize(
    "own, untuned, verdict",
    [
        (0.49, 0.1, "baseline in its own chat template, the better of the two: no significant difference"),
        (0.1, 0.3, "baseline, the better of the two: fine-tuned is better"),
        (0.9, 0.3, "baseline in its own chat template, the better of the two: fine-tuned is worse"),
    ],
)
def test_the_verdict_is_against_the_better_baseline(own, untuned, verdict):
    """The first case is the reason: against the worse prompt alone, fine-tuning would seem to help."""
    found = two_baselines("accuracy", own, untuned) | {"chance": 0.25}
    (line,) = in_short({"mcq": found})
    assert line.endswith(f"; against the {verdict}")
    assert "baseline in its own chat template, 0.2500 by chance" in line
    probes = two_baselines("advises_care", own, untuned)
    (line,) = in_short({"probes": probes})
    assert line.endswith(f"; against the {verdict}")
    loss = two_baselines("answer_loss", 1 - own, 1 - untuned)  # lower is better
    (line,) = in_short({"loss": {"test": loss}})
    assert line.endswith(f"; against the {verdict}")
    written = two_baselines("rougeL", own, untuned)
    written["copied"] = {"rougeL": mean_figure([0.1, 0.2])}
    written["difference"]["tuned - copied"] = {"rougeL": difference_figure([1.0] * 9, [0.5] * 9)}
    (line,) = in_short({"generation": written})
    assert f"; against the {verdict}; against 0.1500" in line
    assert line.endswith(" copied from training: fine-tuned is better")


@pytest.mark.parametrize("rows, verdict", [(5, TOO_FEW), (6, "no significant difference")])
def test_a_verdict_needs_a_handful_of_rows(rows, verdict):
    """Five pairs cannot give a p-value below 0.05, whatever their differences are; six can."""
    alike = [0.5, -0.5, 0.25, -0.25, 0.125, -0.125][:rows]
    difference = difference_figure(alike, [0.0] * rows)
    figure = mean_figure(alike)
    loss = {system: {"answer_perplexity": figure, "answer_loss": figure} for system in ("untuned", "tuned")}

    def with_difference(found) -> dict:
        return {"loss": {"test": {**loss, "rows": rows, "difference": {"tuned - untuned": {"answer_loss": found}}}}}

    (line,) = in_short(with_difference(difference))
    assert line.startswith(f"answer perplexity on test, {rows} rows: ")
    assert line.endswith(f": {verdict}")
    assert shown(difference).endswith(TOO_FEW) == (rows < 6)
    better = difference_figure(alike, [1.0] * rows)
    (line,) = in_short(with_difference(better))
    assert line.endswith(": fine-tuned is better" if rows == 6 else f": {TOO_FEW}")


@pytest.mark.parametrize(
    "words, said",
    [
        (["--tasks", "loss,speed"], "no such task: speed; the tasks are loss,generation,mcq,probes"),
        (["--tasks", ","], "no such task"),
        (["--limit", "0"], "--limit 0: at least 1"),
        (["--checkpoint", "7"], "--checkpoint 7: no such checkpoint"),
        (["--model", "/nonexistent"], "/nonexistent: no such directory"),
        (["--medquad", "none"], "have changed since training"),
        (["--medquad", "/nonexistent.csv"], "no such file or directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_refused(words, said, evaluated, run, capsys):
    shutil.copy(evaluated / "evaluation.json", run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["evaluate", str(run), "--cpu", *words]) == 2
    assert said in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_an_adapter_alone_is_refused(tiny_run, capsys):
    assert main(["evaluate", str(tiny_run / "lora_adapters")]) == 2
    assert "an adapter alone does not say which rows it was not trained on" in capsys.readouterr().err


def test_other_rows_under_the_same_name_are_refused(run, tmp_path, capsys):
    changed = tmp_path / "medquad.csv"
    changed.write_text(MEDQUAD_CSV.read_text().replace("mites", "ticks"))
    assert main(["evaluate", str(run), "--cpu", "--medquad", str(changed)]) == 2
    assert "have changed since training" in capsys.readouterr().err
    shutil.copy(MEDQUAD_CSV, changed)
    assert main(["evaluate", str(run), "--cpu", "--tasks", "loss", "--medquad", str(changed), "--limit", "2"]) == 0


def test_the_untuned_model_is_the_base_itself(run):
    """Not the adapter at work in part: the loss of the base, loaded by transformers alone, on the first test row."""
    source = find_adapter(str(run))
    tokenizer = load_tokenizer(source.experiment.model.base)
    example = load_held_out(source, tokenizer, 1).examples["test"][0]
    base = AutoModelForCausalLM.from_pretrained(BASE_DIR, dtype=torch.float32)
    expected = row_loss(base, example)
    # 4-bit weights are near those of the file; a tuned model is not.
    assert main(["evaluate", str(run), "--tasks", "loss", "--limit", "1", "--cpu"]) == 0
    assert loss_of(run)["test"]["untuned"]["loss"]["value"] == pytest.approx(expected, rel=0.02)
