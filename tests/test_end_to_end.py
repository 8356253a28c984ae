"""The three recipes, one through `accelerate launch`, and an adapter where nothing is known of this project."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import LAUNCH, ROOT, Group, finish, metrics, output, start, summary
from safetensors import safe_open
from transformers import AutoTokenizer
from wandb_file import read_finished_run

from medqa.config import Data, Experiment
from medqa.config_file import load_experiment
from medqa.data.sources import load_sources
from medqa.data.tokens import prompt_ids, tokenize
from medqa.evaluation.loss import fixed_subset
from medqa.tiny import AFRIMEDQA_CSV, BASE_DIR, MEDQUAD_CSV

NAMES = ("exp_001", "exp_002", "exp_003")
QUICK = [name if name == "exp_002" else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
UPDATES = {"exp_001": 10, "exp_002": 20, "exp_003": 10}  # of the 40 that `--tiny` has: enough at a rate of 1e-2
SHARED = ROOT.parent / "shared"

# Plain transformers, PEFT and bitsandbytes: what a user of the adapter would write.
RELOAD = """
import json, sys, torch, bitsandbytes
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
base, adapter, rows = sys.argv[1:4]
four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=torch.float32)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=four_bit)
for module in model.modules():
    if isinstance(module, bitsandbytes.nn.Linear4bit):
        module.support_avx512bf16_for_cpu = False
model = PeftModel.from_pretrained(model, adapter).eval()
assert "medqa" not in sys.modules
total = count = 0
with torch.no_grad():
    for ids in json.load(open(rows)):
        ids = torch.tensor([ids])
        logits = model(input_ids=ids).logits[0, :-1].double()
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
print(json.dumps({"loss": total / count, "tokens": count}))
"""


class Runs(dict[str, Path]):
    """Runs of the three, started when first asked for; exp_002 as a user starts it."""

    def __init__(self, place: Path) -> None:
        super().__init__()
        self.place = place

    def __missing__(self, name: str) -> Path:
        directory = self.place / name
        words = ("--exp", name, "--tiny", "--set", f"training.max_steps={UPDATES[name]}")
        process = start(LAUNCH, directory, *words) if name == "exp_002" else Group(directory, *words)
        assert finish(process, directory) == 0, output(directory)
        return self.setdefault(name, directory)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("tiny"))


def experiment(name: str) -> Experiment:
    return load_experiment(name, tiny=True)


def validation_ids(run: Path, name: str) -> list[list[int]]:
    """The ids of the run's validation rows, by its own record of the split."""
    with (run / "splits.csv").open() as file:
        held_out = {line["id"] for line in csv.DictReader(file) if line["split"] == "validation"}
    rows = [
        row
        for source in load_sources(Data(medquad=str(MEDQUAD_CSV), afrimedqa=str(AFRIMEDQA_CSV)))
        for row in source.rows
    ]
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    chosen = [row for row in rows if row.id in held_out]
    return [example.input_ids.tolist() for example in tokenize(chosen, tokenizer, experiment(name).tokenization)]


@pytest.mark.parametrize("name", QUICK)
def test_it_learns(runs, name):
    told = summary(runs[name])
    assert told["baseline"]["perplexity"] <= 1024 / 4
    assert told["final"]["perplexity"] <= 0.7 * told["baseline"]["perplexity"]
    assert told["test"]["perplexity"] <= 0.7 * told["baseline"]["perplexity"]
    assert told["final"]["answer_perplexity"] < told["baseline"]["answer_perplexity"]
    assert "before and after" in output(runs[name])


@pytest.mark.parametrize("name", QUICK)
def test_the_recipe_really_ran(runs, name):
    told, recipe = summary(runs[name]), experiment(name)
    assert told["quantization"] == "4bit"
    assert told["gradient_accumulation_steps"] == 32 // recipe.training.per_device_batch_size
    assert told["updates"] == UPDATES[name]
    kept = sorted(path.name for path in runs[name].glob("checkpoint-*"))
    assert kept == [f"checkpoint-{step}" for step in range(10, UPDATES[name] + 1, 10)][-3:]
    state = torch.load(runs[name] / kept[-1] / "training_state.pt", weights_only=True)["optimizer"]["state"]
    parts = [part for values in state.values() for part in values.get("__bnb_optimizer_quant_state__", {}).values()]
    eight_bit = any(isinstance(part, torch.Tensor) and part.dtype == torch.uint8 for part in parts)
    assert eight_bit == (name == "exp_002")
    tokenizer = AutoTokenizer.from_pretrained(runs[name] / "lora_adapters")
    assert tokenizer.pad_token == ("[PAD]" if name == "exp_003" else "</s>")
    assert len(tokenizer) == (1025 if name == "exp_003" else 1024)
    rates = [record["learning_rate"] for record in metrics(runs[name]) if record["split"] == "train"]
    assert (rates[0], rates[-1] < 1e-3) == ((0.0, True) if name == "exp_002" else (1e-2, False))


@pytest.mark.parametrize("name", QUICK)
def test_metrics_hold_together(runs, name):
    records, told, last = metrics(runs[name]), summary(runs[name]), UPDATES[name]
    places = [(record["step"], record["split"]) for record in records]
    assert len(places) == len(set(places)) == last + (1 + last // 10) + 2 + 1
    by_place = dict(zip(places, records, strict=True))
    for place, part in (((0, "eval_full"), "baseline"), ((last, "eval_full"), "final"), ((last, "test"), "test")):
        assert {key: by_place[place][key] for key in told[part]} == told[part]
        assert by_place[place]["perplexity"] == pytest.approx(math.exp(by_place[place]["loss"]))
    report = json.loads((runs[name] / "data_report.json").read_text())
    for step in (0, last):
        assert by_place[(step, "eval_full")]["rows"] == report["splits"]["validation"]["rows"]
    assert report["overlap"]["held_out"]["question_or_answer"]["rows"] == 0


@pytest.mark.parametrize("name", QUICK)
def test_the_adapter_alone_in_a_fresh_process_has_the_final_loss(runs, name, tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps(validation_ids(runs[name], name)))
    script = tmp_path / "reload.py"
    script.write_text(RELOAD)
    command = [sys.executable, str(script), str(BASE_DIR), str(runs[name] / "lora_adapters"), str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    last = next(r for r in metrics(runs[name]) if (r["step"], r["split"]) == (UPDATES[name], "eval_full"))
    assert found["tokens"] == last["tokens"]
    assert found["loss"] == pytest.approx(summary(runs[name])["final"]["loss"], rel=1e-5)


@pytest.mark.parametrize("name", QUICK)
def test_adapters_hold_nothing_of_the_base(runs, name):
    found = [*runs[name].glob("*/adapter_model.safetensors")]
    assert len(found) == min(3, UPDATES[name] // 10) + 1
    for path in found:
        with safe_open(path, "pt") as file:
            assert all(".lora_A." in key or ".lora_B." in key for key in file.keys())  # noqa: SIM118
        assert path.stat().st_size < 300_000
    assert not [path for path in runs[name].glob("checkpoint-*/*") if path.stat().st_size > 1_000_000]


@pytest.mark.parametrize("name", QUICK)
def test_the_saved_template_is_the_training_prompt(runs, name):
    tokenizer = AutoTokenizer.from_pretrained(runs[name] / "lora_adapters")
    question = "What are the symptoms of Malaria ?"
    ids = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    assert ids["input_ids"] == prompt_ids(question, tokenizer)


@pytest.mark.parametrize("name", QUICK)
def test_wandb_has_what_was_logged(runs, name):
    files = list(runs[name].glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 1
    run = read_finished_run(files[0])
    assert run.finished
    assert (run.project, run.name) == ("medqa", name)
    for record in metrics(runs[name]):
        step = run.history[record["step"]]
        assert step["train/global_step"] == record["step"]
        assert step[f"{record['split']}/loss"] == pytest.approx(record["loss"])
    assert any(key.startswith("samples") for values in run.history.values() for key in values)
    assert len(run.artifacts) >= 1


def test_samples_are_a_fixed_choice():
    assert fixed_subset(list(range(100)), 4, 42) == fixed_subset(list(range(100)), 4, 42)
    assert fixed_subset(list(range(3)), None, 42) == [0, 1, 2]


def head(path: Path, records: int, target: Path) -> None:
    """The first records of a CSV file, as a file of its own."""
    csv.field_size_limit(10**9)
    with path.open(newline="", encoding="utf-8") as source, target.open("w", newline="", encoding="utf-8") as copy:
        writer = csv.writer(copy)
        for number, record in enumerate(csv.reader(source)):
            if number > records:
                break
            writer.writerow(record)


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="needs the full datasets in ../shared")
@pytest.mark.slow
def test_real_data_on_a_real_small_model(tmp_path):
    medquad, afrimedqa = tmp_path / "medquad.csv", tmp_path / "afrimedqa.csv"
    head(SHARED / "data" / "medquad.csv", 200, medquad)
    head(SHARED / "data" / "afrimedqa_v2.csv", 200, afrimedqa)
    run = tmp_path / "run"
    words = ("--model", str(SHARED / "models" / "stories260k"), "--medquad", str(medquad))
    words += ("--afrimedqa", str(afrimedqa))
    sets = ("training.max_steps=6", "training.global_batch_size=16", "optimizer.learning_rate=5e-3")
    sets += ("training.log_steps=1", "tracking.wandb=disabled")
    process = start(LAUNCH, run, "--exp", "exp_001", *words, "--set", *sets)
    assert finish(process, run) == 0, output(run)
    told = summary(run)
    assert told["final"]["loss"] < 0.95 * told["baseline"]["loss"]
    report = json.loads((run / "data_report.json").read_text())
    assert report["sources"]["medquad"]["read"] == 200
    assert report["sources"]["afrimedqa"]["read"] == 200
    with (run / "splits.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == sum(split["rows"] for split in report["splits"].values())
    assert {line["id"].split(":")[0] for line in lines} == {"medquad", "afrimedqa"}


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="needs the full datasets in ../shared")
def test_the_whole_of_the_real_data(tmp_path):
    run, data = tmp_path / "run", SHARED / "data"
    words = ("--model", str(SHARED / "models" / "stories260k"), "--medquad", str(data / "medquad.csv"))
    words += ("--afrimedqa", str(data / "afrimedqa_v2.csv"), "--set", "training.max_steps=10")
    words += ("training.log_steps=1", "tracking.wandb=disabled", "scheduler.warmup_steps=2")
    process = start(LAUNCH, run, "--exp", "exp_002", *words)
    assert finish(process, run, 1200) == 0, output(run)
    report = json.loads((run / "data_report.json").read_text())
    sources = report["sources"]
    assert (sources["medquad"]["read"], sources["medquad"]["dropped"]["empty answer"]) == (16412, 5)
    assert sources["afrimedqa"]["read"] - sources["afrimedqa"]["dropped"]["empty answer"] == 1604
    assert sum(source["dropped"].get("duplicate", 0) for source in sources.values()) == 48
    assert report["overlap"]["held_out"]["question_or_answer"]["rows"] == 0
    assert summary(run)["final"]["loss"] < summary(run)["baseline"]["loss"]


@pytest.mark.slow
def test_gpu_check_itself_on_a_cpu(tmp_path):
    out = tmp_path / "gpu_check.json"
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--shape", "tiny", "--cpu", "--updates", "4"]
    command += ["--recipes", "exp_003", "--precisions", "bf16", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(out.read_text())["results"]
    assert len(result["losses"]) == 4
    assert result["difference_of_two_straight_runs"] == result["difference_of_continued_and_straight"] == 0.0
    assert 2 <= result["stopped_after"] < 4
