"""`make results`: the records are the runs' own figures, what is finished is not done again, the table says what is."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from launching import QUIET, metrics, wait_until_gone

from benchmarks import results as command
from benchmarks import results_machine
from benchmarks.results_file import (
    FORMAT,
    RECIPES,
    Failure,
    Machine,
    Record,
    Results,
    Setting,
    as_label,
    keep,
    machine_label,
    read_all,
    slug,
)
from benchmarks.results_machine import NO_GPU, code_caveats, code_commit, this_machine
from benchmarks.results_process import beside, run_stage
from benchmarks.results_records import evaluated_tasks, make_record, what_failed
from benchmarks.results_table import BEGIN, END, NOT_YET, section
from harness.processes import TRAIN, Forked
from medqa.errors import Interrupted, UserError
from medqa.training.run_dir import RunLock

ROOT = Path(__file__).resolve().parents[2]
README = f"# A project\n\n{BEGIN}\nold\n{END}\n\nThe rest.\n"
T4 = Machine(gpus=["Tesla T4"], memory_bytes=15_828_320_256, driver="550.54.15", cuda="12.4")
ON_T4 = Setting(machine="Tesla T4", base="TinyLlama-1.1B-Chat-v1.0")
ON_TWO = ON_T4.model_copy(update={"machine": "2x Tesla T4"})
T4_FILE, TWO_FILE = "tinyllama-1-1b-chat-v1-0-tesla-t4", "tinyllama-1-1b-chat-v1-0-2x-tesla-t4"
SHORT = (
    "training.max_steps=4", "scheduler.warmup_steps=2", "training.global_batch_size=8", "tokenization.max_length=64",
)  # fmt: skip
EVALUATE = """
import sys
from medqa.commands import evaluate as evaluate_module
evaluate_module.ANSWER_TOKENS = 8
from medqa.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


class Child(Forked):
    """A forked process, with what `run_stage` uses."""

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def starter(directory: Path, started: list):
    """Starts the real processes, forked, and notes which."""
    script = directory / "evaluate.py"
    script.write_text(EVALUATE)

    def start(stage, words, processes, log):
        started.append((stage, words))
        log.unlink(missing_ok=True)
        if stage == "training":
            return Child(words, log, QUIET, TRAIN)
        return Child(["evaluate", *words], log, QUIET, script)

    return start


def options_for(directory: Path, *words: str) -> list[str]:
    places = ["--outputs", str(directory / "runs"), "--out", str(directory / "out")]
    return ["--tiny", "--cpu", *places, "--readme", str(directory / "README.md"), *words]


@pytest.fixture(scope="module")
def tried(tmp_path_factory) -> Path:
    """A trial of exp_002 and one of a rate that no run survives, in one directory. Not to be changed."""
    directory = tmp_path_factory.mktemp("tried")
    (directory / "README.md").write_text(README)
    started = []
    start = starter(directory, started)
    words = options_for(directory, "--experiments", "exp_002", "--limit", "2", "--set", *SHORT)
    assert command.main(words, start) == 0
    assert [stage for stage, _ in started] == ["training", "evaluation"]
    words = options_for(
        directory, "--experiments", "exp_003", "--limit", "2", "--set", *SHORT, "optimizer.learning_rate=1e9"
    )
    assert command.main(words, start) == 1
    assert [stage for stage, _ in started] == ["training", "evaluation", "training"]
    return directory


@pytest.fixture(scope="module")
def complete(tried) -> Record:
    """The record of exp_002, as if it were none of a trial."""
    record = only_file(tried / "out").records["exp_002"]
    return record.model_copy(update={"caveats": [], "machine": T4})


def only_file(directory: Path) -> Results:
    [found] = read_all(directory).values()
    return found


def run_of(directory: Path, experiment: str) -> Path:
    return next(path.parent for path in directory.glob(f"runs/*/{experiment}*/config.yaml"))


def test_the_record_is_what_the_run_wrote(tried):
    record, run = only_file(tried / "out").records["exp_002"], run_of(tried, "exp_002")
    summary, evaluation = (json.loads((run / f"{name}.json").read_text()) for name in ("summary", "evaluation"))
    assert record.failure is None
    assert record.validation.before.answer_perplexity.value == pytest.approx(summary["baseline"]["answer_perplexity"])
    assert record.validation.after.perplexity.value == pytest.approx(summary["final"]["perplexity"])
    assert record.test.after.answer_perplexity.value == pytest.approx(summary["test"]["answer_perplexity"])
    assert (record.validation.rows, record.test.rows) == (2, 2)
    losses = evaluation["tasks"]["loss"]["test"]
    assert record.test.before.answer_perplexity.value == losses["untuned"]["answer_perplexity"]["value"]
    assert record.test.after.answer_perplexity.high == losses["tuned"]["answer_perplexity"]["high"]
    assert record.test.own_template.value == losses["own_template"]["answer_perplexity"]["value"]
    assert (record.training.updates, record.training.processes, record.training.resumes) == (4, 1, 0)
    assert record.training.peak_memory_bytes == summary["peak_memory_bytes"]
    assert record.training.wall_clock_s == summary["wall_clock_s"]
    speeds = sorted(r["tokens_per_s"] for r in metrics(run) if r["split"] == "train")
    assert record.training.tokens_per_s == pytest.approx((speeds[1] + speeds[2]) / 2)
    assert record.training.in_effect == {}
    assert record.training.mixed_precision == "no"
    tasks = evaluation["tasks"]
    for system in ("untuned", "copied", "tuned"):
        assert record.evaluation.generation.rouge_l[system].value == tasks["generation"][system]["rougeL"]["value"]
        assert record.evaluation.generation.stops[system].high == tasks["generation"][system]["stops"]["high"]
    assert record.evaluation.mcq.chance == tasks["mcq"]["chance"]
    assert record.evaluation.mcq.accuracy["tuned"].value == tasks["mcq"]["tuned"]["accuracy"]["value"]
    assert record.evaluation.limit == 2
    assert record.data.rows == {"train": 183, "validation": 25, "test": 24}  # whose answer begins within 64 tokens
    assert record.data.fingerprint == summary["data_fingerprint"]
    assert record.base.fingerprint == summary["base_fingerprint"]
    assert record.versions == summary["versions"]
    assert record.commits == [code_commit()]
    assert {"--tiny", "training.global_batch_size=8"} <= set(record.caveats)
    assert (record.machine.gpus, record.machine.threads) == ([], torch.get_num_threads())
    assert record.machine.cpu
    assert "/" not in record.data.medquad + record.base.name


def test_a_run_that_fails_is_recorded_as_failed(tried):
    found = only_file(tried / "out").records["exp_003"]
    assert found.failure.stage == "training"
    assert (found.failure.what, found.failure.exit_code) == ("not finite", 3)
    assert found.failure.message.startswith("training stopped: update ")
    assert found.training is found.test is found.evaluation is None
    table = (tried / "README.md").read_text()
    assert table.startswith("# A project\n\n<!--")
    assert table.endswith(f"{END}\n\nThe rest.\n")
    assert "old" not in table
    rows = dict(cells(table))
    assert list(rows) == ["recipe", "exp_002", "exp_003"]
    assert re.search(r", 2 rows, a trial \(--tiny, ", rows["recipe"])
    perplexity, rouge, choices, cost = rows["exp_002"].split("<br>")
    assert re.fullmatch(
        r"answer perplexity: \*\*[\d.,]+\*\* \(.* to .*\); "
        r"base [\d.,]+, in its own template [\d.,]+ \(2 rows of test\)",
        perplexity,
    )
    assert rouge.endswith("(2 answers)")
    assert choices.endswith("(2 questions)")
    assert re.fullmatch(r"\d\.\d GiB, \d+ s \(float32, 4-bit\)", cost)
    assert rows["exp_003"] == "failed: not finite"


def test_what_is_done_is_not_done_again(tried, tmp_path):
    shutil.copytree(tried, tmp_path / "again")
    again = tmp_path / "again"
    run = run_of(again, "exp_002")
    evaluation = json.loads((run / "evaluation.json").read_text())
    words = options_for(again, "--experiments", "exp_002", "--limit", "2", "--set", *SHORT)

    def nothing(*_):
        raise AssertionError("nothing was to be started")

    (again / "README.md").write_text(README)
    before = only_file(again / "out")
    assert command.main(words, nothing) == 0
    assert only_file(again / "out").records["exp_003"] == before.records["exp_003"]
    assert (again / "README.md").read_text() == (tried / "README.md").read_text()
    # Killed in the middle of its evaluation: the tasks that are missing are what is left to do.
    evaluation["tasks"] = {name: evaluation["tasks"][name] for name in ("loss", "mcq")}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    asked = []

    def note(stage, words, processes, log):
        asked.append((stage, words))
        raise UserError("enough")

    assert command.main(words, note) == 2
    assert asked == [("evaluation", [str(run), "--tasks", "generation,probes", "--cpu", "--limit", "2"])]
    assert evaluated_tasks(run, None) == set()  # all rows are asked for now
    (run / "summary.json").unlink()
    assert command.main(words, note) == 2
    assert asked[1][0] == "training"


@pytest.mark.parametrize("held", ["the run's directory", "ours beside it"])
def test_where_something_is_at_work_already_nothing_is_started_or_recorded(held, tried, tmp_path, capsys):
    """A trainer whose starter was killed alone, or another `make results`."""
    shutil.copytree(tried / "runs", tmp_path / "runs")
    run = run_of(tmp_path, "exp_002")
    (run / "summary.json").unlink()
    (tmp_path / "README.md").write_text(README)

    def nothing(*_):
        raise AssertionError("nothing was to be started")

    with RunLock(run if held == "the run's directory" else beside(run)) as lock:
        lock.acquire()
        words = options_for(tmp_path, "--experiments", "exp_002", "--limit", "2", "--set", *SHORT)
        assert command.main(words, nothing) == 2
    assert "another run is using it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_trial_has_no_place_among_the_results(capsys, tmp_path):
    before = (ROOT / "README.md").read_bytes()

    def nothing(*_):
        raise AssertionError("nothing was to be started")

    assert command.main(["--tiny", "--cpu", "--outputs", str(tmp_path)], nothing) == 2
    said = capsys.readouterr().err
    assert "a trial, no result: --tiny" in said
    assert "--out trial" in said
    assert (ROOT / "README.md").read_bytes() == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do(capsys):
    assert command.main([]) == 2
    said = capsys.readouterr().err
    assert "no GPU that torch can use" in said
    assert "--cpu --model HuggingFaceTB/SmolLM2-135M-Instruct --examples 800 --limit 200" in said


@pytest.mark.parametrize(
    "words, caveats",
    [
        ([], []),
        (["--cpu", "--examples", "3200", "--limit", "128"], []),
        (["--model", "x/y"], []),
        (["--model", "/usr", "--base-name", "A base"], []),
        (["--model", "/usr"], ["a base model in a directory, without --base-name"]),
        (["--afrimedqa", "afrimedqa/afrimedqa_v2"], []),
        (["--medquad", "README.md"], []),
        (["--medquad", "x/y"], ["data.medquad=x/y"]),
        (["--set", "training.log_steps=1", "training.save_steps=5"], []),
        (["--afrimedqa", "none"], ["data.afrimedqa=none"]),
        (["--set", "data.files={mine: /home/somebody/m.csv}"], ["data.files={'mine': 'a local file'}"]),
        (["--set", "training.max_steps=5"], ["training.max_steps=5"]),
        (["--examples", "3200", "--set", "training.max_steps=5"], ["training.max_steps=5"]),
        (["--set", "training.micro_batch_tokens=512"], ["training.micro_batch_tokens=512"]),
        (["--tiny", "--cpu"], ["--tiny"]),
    ],
)
def test_what_makes_it_a_trial(words, caveats, tmp_path):
    options = command.parse_options(["--outputs", str(tmp_path), *words])
    assert command.make_job("exp_001", options, "Tesla T4").caveats == caveats


def test_a_budget_is_the_same_number_of_examples_for_all(tmp_path):
    """Warmup is in proportion: 50 of exp_004's 1,816 updates are 6 of 200; 20 of exp_002's 400 are 5 of 100."""
    options = command.parse_options(["--outputs", str(tmp_path), "--examples", "3200", "--limit", "128"])
    jobs = {name: command.make_job(name, options, "Tesla T4") for name in RECIPES}
    updates = {name: job.experiment.training.max_steps for name, job in jobs.items()}
    assert all(updates[name] * job.experiment.training.global_batch_size == 3200 for name, job in jobs.items())
    warmup = {name: job.experiment.scheduler.warmup_steps for name, job in jobs.items()}
    assert (warmup["exp_001"], warmup["exp_002"], warmup["exp_003"], warmup["exp_004"]) == (0, 5, 0, 6)
    assert all(job.experiment.training.padding_free for job in jobs.values())
    assert all(job.experiment.evaluation.full_rows == 128 for job in jobs.values())
    assert jobs["exp_005"].setting.base == "SmolLM2-135M-Instruct"
    label = "TinyLlama-1.1B-Chat-v1.0, Tesla T4, 3200 examples, 128 rows"
    assert jobs["exp_001"].setting.label == label
    assert jobs["exp_001"].run_dir.parent == tmp_path / slug(label)


def test_a_budget_that_does_not_divide_into_updates_is_refused(tmp_path, capsys):
    assert command.main(["--cpu", "--outputs", str(tmp_path), "--examples", "40"]) == 2
    assert "--examples 40: exp_001 has 32 examples in an update" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_one_process_on_a_cpu(tmp_path, capsys):
    """The name of a CPU's column does not say how many processes shared it."""
    words = options_for(tmp_path, "--processes", "2")
    assert command.main(words, lambda *_: pytest.fail("started")) == 2
    assert "--cpu --processes 2: one process runs on a CPU" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_changed_code_makes_it_a_trial(tmp_path, monkeypatch):
    monkeypatch.setattr(results_machine, "ROOT", tmp_path)
    assert code_commit() is None
    assert code_caveats([None]) == ["not a git checkout"]
    for name in ("README.md", "results/tesla-t4.json", "train.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "a"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    commit = code_commit()
    assert re.fullmatch("[0-9a-f]{40}", commit)
    for name in ("README.md", "results/tesla-t4.json"):
        (tmp_path / name).write_text("b")
    assert code_commit() == commit  # what a result changes is no change of the code
    assert code_caveats([commit]) == []
    (tmp_path / "train.py").write_text("b")
    assert code_commit() == f"{commit}-dirty"
    assert code_caveats([commit, f"{commit}-dirty"]) == ["uncommitted changes"]


def test_one_record_takes_its_own_place_alone(complete, tmp_path):
    other = complete.model_copy(update={"experiment": "exp_001"})
    assert keep(complete, ON_T4, tmp_path)
    assert keep(other, ON_T4, tmp_path)
    assert keep(complete, ON_TWO, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"{T4_FILE}.json", f"{TWO_FILE}.json"}
    mended = Failure(stage="training", what="an error", exit_code=2, message="error: no network")
    assert not keep(complete.model_copy(update={"failure": mended}), ON_T4, tmp_path)
    assert read_all(tmp_path)[T4_FILE].records == {"exp_001": other, "exp_002": complete}
    memory = Failure(stage="training", what="out of memory", exit_code=3, message="training stopped: out of memory")
    failed = complete.model_copy(update={"failure": memory, "training": None})
    assert keep(failed, ON_T4, tmp_path)
    assert read_all(tmp_path)[T4_FILE].records == {"exp_001": other, "exp_002": failed}
    assert read_all(tmp_path)[TWO_FILE].records == {"exp_002": complete}


def test_another_base_model_under_the_same_name_is_refused(complete, tmp_path):
    other = complete.model_copy(update={"base": complete.base.model_copy(update={"fingerprint": "b" * 64})})
    keep(complete, ON_T4, tmp_path)
    path = tmp_path / f"{T4_FILE}.json"
    before, ours = path.read_bytes(), complete.base.fingerprint[:12]
    with pytest.raises(UserError, match=rf"{T4_FILE}\.json: exp_002 .* {ours}, .* bbbbbbbbbbbb, .*another --base-name"):
        keep(other.model_copy(update={"experiment": "exp_001"}), ON_T4, tmp_path)
    assert path.read_bytes() == before
    memory = Failure(stage="training", what="out of memory", exit_code=3, message="training stopped: out of memory")
    failed = complete.model_copy(update={"experiment": "exp_003", "failure": memory, "base": None})
    assert keep(failed, ON_T4, tmp_path)
    assert keep(other, ON_T4, tmp_path), "its own earlier record is replaced, and one without a base is not compared"
    assert read_all(tmp_path)[T4_FILE].records == {"exp_002": other, "exp_003": failed}


def damaged(good: bytes) -> dict[str, bytes]:
    content = json.loads(good)
    del content["records"]["exp_002"]["test"]

    def with_(**changes) -> bytes:
        return json.dumps({**json.loads(good), **changes}).encode()

    return {
        "cut": good[: len(good) // 2],
        "empty": b"",
        "a list": b"[]",
        "no text": b"\xff\xfe",
        "another format": with_(format=FORMAT + 1),
        "a key more": with_(more=1),
        "another GPU's": with_(setting=ON_TWO.model_dump()),
        "a name that is markup": with_(setting={"machine": "Tesla | T4", "base": "x"}),
        "figures missing": json.dumps(content).encode(),
        "not finite": re.sub(rb'"wall_clock_s": [0-9.e-]+', b'"wall_clock_s": NaN', good),
        "under another name": good.replace(b'"exp_002": {', b'"exp_001": {'),
        "too long": good + b" " * 1_000_000,
    }


def test_a_damaged_or_foreign_file_is_refused_by_name(complete, tmp_path, capsys):
    keep(complete, ON_T4, tmp_path / "good")
    good = (tmp_path / "good" / f"{T4_FILE}.json").read_bytes()
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / f"{T4_FILE}.json"
    cases = damaged(good)
    assert len(cases) == 12
    for name, content in cases.items():
        assert content != good, name
        path.write_bytes(content)

        def nothing(*_):
            raise AssertionError("nothing was to be started")

        for more in (["--table"], ["--experiments", "exp_001"]):
            assert command.main(options_for(tmp_path, *more), nothing) == 2, name
            assert str(path) in capsys.readouterr().err, name
        with pytest.raises(UserError, match=r"tesla-t4\.json"):
            keep(complete, ON_T4, path.parent)
        assert path.read_bytes() == content
        assert (tmp_path / "README.md").read_text() == README
    path.write_bytes(good)
    assert command.main(options_for(tmp_path, "--table")) == 0


@pytest.mark.parametrize("text", ["", f"{BEGIN}\n", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{BEGIN}\n{END}\n"])
def test_a_readme_without_the_place_is_refused(text, tmp_path, capsys):
    (tmp_path / "README.md").write_text(text)
    assert command.main(options_for(tmp_path, "--table")) == 2
    assert "the table has no place" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == text


def test_the_readmes_table_is_what_the_files_say():
    table = section(read_all(ROOT / "results"), trials=False)
    assert f"{BEGIN}\n{table}{END}" in (ROOT / "README.md").read_text(encoding="utf-8")


def cells(table: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]


def test_without_files_there_is_a_sentence_and_no_table():
    text = section({}, trials=False)
    assert text.startswith("No experiment with a real model has been measured yet")
    assert "|" not in text


def made_up(complete: Record, experiment: str, **changes) -> Record:
    """A record with figures that are known."""
    content = complete.model_dump(mode="json") | {"experiment": experiment}
    figures = {"perplexity": {"value": 8.61}, "answer_perplexity": {"value": 12.3456, "low": 11.9, "high": 12.7}}
    after = {"perplexity": {"value": 6.0}, "answer_perplexity": {"value": 9.1, "low": 8.994, "high": 9.2049}}
    content["test"] = {"rows": 1796, "before": figures, "own_template": {"value": 11.0}, "after": after}
    content["training"] |= {"peak_memory_bytes": 7_086_696_038, "wall_clock_s": 5067.0, "mixed_precision": "fp16"}
    content["evaluation"]["generation"] |= {
        "rows": 256,
        "rouge_l": {"tuned": {"value": 0.21349}, "untuned": {"value": 0.16}, "copied": {"value": 0.1801}},
    }
    content["evaluation"]["mcq"] = {
        "rows": 2941, "chance": 0.24609, "accuracy": {"tuned": {"value": 0.3012}, "untuned": {"value": 0.25}},
    }  # fmt: skip
    return Record.model_validate_json(json.dumps(content | changes))


def test_the_table_of_several_settings(complete):
    memory = {"what": "out of memory", "exit_code": 3, "message": "training stopped: out of memory"}
    nothing = dict.fromkeys(("training", "validation", "test", "data", "base", "evaluation"))
    large = {"rows": 1796, "before": {"perplexity": {"value": 1.0}, "answer_perplexity": {"value": 123456.7}}}
    large["after"] = {"perplexity": {"value": 1.0}, "answer_perplexity": {"value": 456.78}}
    found = {
        T4_FILE: Results(
            format=FORMAT,
            setting=ON_T4,
            records={
                "exp_001": made_up(complete, "exp_001", failure={"stage": "training", **memory}, **nothing),
                "exp_002": made_up(complete, "exp_002"),
                "exp_003": made_up(complete, "exp_003", failure={"stage": "evaluation", **memory}, evaluation=None),
            },
        ),
        TWO_FILE: Results(format=FORMAT, setting=ON_TWO, records={"exp_004": made_up(complete, "exp_004", test=large)}),
    }
    table = section(found, trials=False)
    rows = {row[0]: row[1:] for row in cells(table)}
    assert rows["recipe"] == ["TinyLlama-1.1B-Chat-v1.0, Tesla T4", "TinyLlama-1.1B-Chat-v1.0, 2x Tesla T4"]
    assert list(rows) == ["recipe", "exp_001", "exp_002", "exp_003", "exp_004"]
    assert rows["exp_001"] == ["failed: out of memory", NOT_YET]
    perplexity = (
        "answer perplexity: **9.10** (8.99 to 9.20); base 12.35, in its own template 11.00 (1,796 rows of test)"
    )
    cost = "6.6 GiB, 1 h 24 min (fp16, 4-bit)"
    assert rows["exp_002"][0].split("<br>") == [
        perplexity,
        "ROUGE-L: **0.213**; base 0.160, a copied answer 0.180 (256 answers)",
        "multiple choice: **30.1%**; base 25.0%, chance 24.6% (2,941 questions)",
        cost,
    ]
    assert rows["exp_003"][0].split("<br>") == [perplexity, cost, "evaluation failed: out of memory"]
    assert rows["exp_004"][1].startswith("answer perplexity: **456.8**; base 123,457 (1,796 rows of test)<br>")
    assert "has been measured yet" not in table
    records = {"exp_002": made_up(complete, "exp_002", caveats=["data.medquad=a|b\n# c"])}
    trial = {T4_FILE: Results(format=FORMAT, setting=ON_T4, records=records)}
    with pytest.raises(UserError, match=rf"{T4_FILE}.json: exp_002 is a trial"):
        section(trial, trials=False)
    assert "Tesla T4, a trial (data.medquad=a b   c) |" in section(trial, trials=True)


def test_the_names_of_files():
    names = {"Tesla T4": 1, "NVIDIA H100 80GB HBM3": 4, "../x|<b>": 1}
    labels = [machine_label(T4.model_copy(update={"gpus": [name] * count})) for name, count in names.items()]
    assert labels == ["Tesla T4", "4x NVIDIA H100 80GB HBM3", "x--b-"]
    assert machine_label(T4.model_copy(update={"gpus": ["Tesla T4", "NVIDIA L4"]})) == "Tesla T4 + NVIDIA L4"
    cpu = NO_GPU.model_copy(update={"cpu": "Intel(R) Xeon(R) CPU @ 2.20GHz", "threads": 2})
    assert machine_label(cpu) == "Intel Xeon CPU - 2.20GHz (2 threads)"
    assert as_label("|") == "unknown"
    assert (
        slug("TinyLlama-1.1B-Chat-v1.0, 4x Tesla T4, 800 examples")
        == "tinyllama-1-1b-chat-v1-0-4x-tesla-t4-800-examples"
    )


@pytest.mark.parametrize(
    "code, log, what, said, message",
    [
        (1, "training stopped: CUDA out of memory. Tried to allocate 2 GiB; lower x\nTraceback\nsubprocess."
            "CalledProcessError: Command '['a']' returned non-zero exit status 3.\n",
            "out of memory", 3, "training stopped: CUDA out of memory. Tried"),
        (1, "error: /tmp/x/a: No space left on device; free space\n", "no space", 1, "error: a: No space left"),
        (1, "error: two things:\n  - one\n  - two\nmore\n  exitcode  : 2 (pid: 7)\n  exitcode  : 1\n", "an error", 2,
            "error: two things:\n  - one\n  - two"),
        (1, "subprocess.CalledProcessError: Command '['a']' died with <Signals.SIGKILL: 9>.\n", "killed", -9,
            "subprocess.CalledProcessError"),
        (-11, "", "killed", -11, "nothing was said"),
        (1, "Traceback\nKeyError: 'x'\n\n", "an error", 1, "KeyError: 'x'"),
    ],
)  # fmt: skip
def test_how_a_process_failed(code, log, what, said, message):
    found = what_failed("training", code, log, [Path("/tmp/x")])
    assert (found.what, found.exit_code) == (what, said)
    assert found.message.startswith(message)
    assert "more" not in found.message


def test_a_finished_run_whose_files_are_damaged_is_refused(tried, tmp_path):
    shutil.copytree(run_of(tried, "exp_002"), tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text("{}")
    with pytest.raises(UserError, match="not those of a finished run"):
        make_record("exp_002", tmp_path / "run", commits=[], caveats=[], machine=NO_GPU, failure=None)


def test_a_signal_is_handed_on(tmp_path):
    """What was started ends, and nothing is said to have failed."""
    waiting = "import os, signal, time\nos.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(20)\n"
    (tmp_path / "run.work").mkdir()
    started = []

    def start(stage, words, processes, log):
        log.write_text("")
        started.append(subprocess.Popen([sys.executable, "-c", waiting]))
        return started[0]

    with pytest.raises(Interrupted) as stopped:
        run_stage("evaluation", tmp_path / "run", [], 1, start)
    assert stopped.value.signum == signal.SIGTERM
    assert started[0].returncode == -signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def tasks_in(path: Path) -> set[str]:
    return set(json.loads(path.read_text())["tasks"]) if path.exists() else set()


@pytest.mark.slow
def test_killed_twice_it_goes_on(tmp_path):
    """By the real commands: in the middle of training, then of the evaluation."""
    (tmp_path / "README.md").write_text(README)
    words = options_for(tmp_path, "--experiments", "exp_002", "--limit", "4")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "ACCELERATE_"))}
    job = command.make_job("exp_002", command.parse_options(words), machine_label(this_machine(1, True)))
    run = job.run_dir

    def begin() -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "benchmarks.results", *words],
            cwd=ROOT, env=environment | QUIET, start_new_session=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip

    for there in (
        lambda: any(record["step"] >= 12 for record in metrics(run)),
        lambda: "loss" in tasks_in(run / "evaluation.json"),
    ):
        process = begin()
        wait_for(there, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        wait_until_gone(run)
        assert read_all(tmp_path / "out") == {}
    before = (run / "summary.json").read_bytes()
    assert begin().wait(600) == 0
    assert (run / "summary.json").read_bytes() == before
    record = only_file(tmp_path / "out").records["exp_002"]
    assert (record.training.updates, record.training.resumes, record.training.not_bitwise) == (40, 1, [])
    assert record.failure is None
    assert ", 4 rows, a trial (--tiny" in (tmp_path / "README.md").read_text()


@pytest.mark.slow
def test_what_the_launcher_says_of_a_failure(tmp_path):
    """Its own exit code is 1, whatever the trainer's was."""
    (tmp_path / "README.md").write_text(README)
    words = options_for(tmp_path, "--experiments", "exp_001", "--set", "optimizer.learning_rate=1e9")
    assert command.main(words) == 1
    failure = only_file(tmp_path / "out").records["exp_001"].failure
    assert (failure.what, failure.exit_code) == ("not finite", 3)
    assert failure.message.startswith("training stopped: update ")


@pytest.mark.slow
def test_all_recipes(tmp_path):
    (tmp_path / "README.md").write_text(README)
    assert command.main(options_for(tmp_path, "--limit", "2"), starter(tmp_path, [])) == 0
    found = only_file(tmp_path / "out").records
    assert list(found) == list(RECIPES)
    assert all(record.training.updates == 40 and record.failure is None for record in found.values())
    assert NOT_YET not in (tmp_path / "README.md").read_text()
