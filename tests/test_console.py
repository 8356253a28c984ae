"""What the terminal shows: plain lines where nothing can be redrawn, one voice, and the plan in full."""

import io
import math
import re

import pytest
from rich.console import Console

from medqa.config import Data
from medqa.config_file import load_experiment
from medqa.data.batches import Stream, TrainingData
from medqa.data.sources import load_sources
from medqa.data.splits import SPLITS, Splits
from medqa.data.tokens import tokenize
from medqa.evaluation.loss import SplitLoss
from medqa.model.base import load_tokenizer
from medqa.terminal import NOTEBOOK_VARIABLES, make_console
from medqa.tiny import BASE_DIR, MEDQUAD_CSV
from medqa.training import recorder as console_module
from medqa.training.plan import Plan, loss_segments
from medqa.training.recorder import (
    RECENT,
    ProgressLine,
    RemainingTime,
    duration,
    show_plan,
    show_result,
    validation_text,
)

SUMMARY = {
    "experiment": "exp [red]x[/red] [/b]",
    "baseline": {"loss": 2.5, "perplexity": 12.1825, "answer_loss": 2.25, "answer_perplexity": 9.4877},
    "final": {"loss": 1.5, "perplexity": 4.4817, "answer_loss": None, "answer_perplexity": None},
    "test": {"loss": 1.625, "perplexity": 5.0784, "answer_loss": 1.75, "answer_perplexity": 5.7546},
    "updates": 40,
    "wall_clock_s": 61.4,
    "peak_memory_bytes": 2**30,
    "memory_device": "cpu",
}
RECORD = {
    "loss": 1.25,
    "learning_rate": 1e-4,
    "tokens_per_s": 1234.5,
    "peak_memory_bytes": 2**31,
    "update_s": 2.0,
    "tokens": 600,
}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in (*NOTEBOOK_VARIABLES, "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


class Terminal(io.StringIO):
    """Text that claims to be a terminal's, as Colab's does."""

    def isatty(self) -> bool:
        return True


def spoken(monkeypatch, stream: io.StringIO, is_main: bool = True) -> Console:
    """The run's console, writing into `stream`."""
    monkeypatch.setattr("sys.stdout", stream)
    return make_console(is_main)


def show_everything(console: Console) -> None:
    plan = Plan(
        [("data", "train 3 [/b]"), ("learning rate", "1e-4")], [(False, "<s>"), (True, "### Instruction:\nWhy [x] ?")]
    )
    show_plan(console, "exp_001 in /tmp/[/b]/x", plan)
    with ProgressLine(console, 0, 20, 10) as progress:
        for step in range(1, 21):
            progress.update(RECORD | {"step": step})
    show_result(console, SUMMARY)


def split_loss(answer: float | None, rows: int = 16) -> SplitLoss:
    loss = 3.0
    perplexity = None if answer is None else math.exp(answer)
    return SplitLoss(loss, math.exp(loss), answer, perplexity, 100, rows, {})


def test_what_an_evaluation_says():
    before, after = split_loss(2.0), split_loss(1.5)
    assert validation_text(after, before, best=True) == (
        "validation answer perplexity 4.482 (-39.3% since the baseline), answer loss 1.5000, loss 3.0000, best so far"
    )
    assert validation_text(before, None, best=False) == (  # a run of an earlier version has no baseline of these rows
        "validation answer perplexity 7.389, answer loss 2.0000, loss 3.0000"
    )
    assert "validation perplexity 20.086 (+0.0%" in validation_text(split_loss(None), split_loss(None), best=False)


def test_the_remaining_time_follows_recent_updates_by_their_tokens_and_counts_evaluations():
    remaining = RemainingTime(updates=100, every=10, expected=(5.0, 30.0))
    assert remaining.seconds(0) == 0.0
    remaining.note(60.0, 200)  # the first update of a session is slow
    assert remaining.seconds(1) == pytest.approx(99 * 60.0 + 10 * 5.0 + 30.0)
    for tokens in (100, 300):  # 0.01 s for each token, 200 tokens on average
        remaining.note(tokens * 0.01, tokens)
    assert remaining.seconds(3) == pytest.approx(97 * 2.0 + 10 * 5.0 + 30.0)  # at 10, 20, ..., 100
    assert remaining.seconds(90) == pytest.approx(10 * 2.0 + 2 * 5.0 + 30.0)  # that of update 90 is still to come
    assert remaining.seconds(100) == pytest.approx(5.0 + 30.0)
    for _ in range(RECENT):  # the machine is slower now: the first updates no longer count for the speed
        remaining.note(4.0, 200)
    assert remaining.seconds(50) == pytest.approx(50 * 4.0 + 6 * 5.0 + 30.0)
    assert duration(119.4) == "119 s"
    assert duration(7199) == "120 min"
    assert duration(9000) == "2.5 h"


@pytest.mark.parametrize("notebook", [None, *NOTEBOOK_VARIABLES])
def test_plain_lines_where_it_is_no_terminal_or_a_notebook(notebook, monkeypatch):
    if notebook:
        monkeypatch.setenv(notebook, "release-colab_20260101")
    stream = Terminal() if notebook else io.StringIO()
    show_everything(spoken(monkeypatch, stream))
    text = stream.getvalue()
    assert "\x1b" not in text, "no control codes"
    assert "\r" not in text
    assert len([line for line in text.splitlines() if line.startswith("update ")]) == 2, "a line every 10 updates"
    assert "update 10/20  loss 1.2500  lr 1.00e-04  1,234 tokens/s  peak 2.0 GiB  about 20 s left" in text
    assert "/tmp/[/b]/x" in text
    assert "exp [red]x[/red] [/b]: before and after" in text


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_gets_a_display(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    stream = Terminal()
    console = spoken(monkeypatch, stream)
    show_everything(console)
    assert console.is_terminal
    assert "\x1b[" in stream.getvalue()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "20/20" in text
    assert "loss 1.2500  lr 1.00e-04  1,234 tokens/s  peak 2.0 GiB 0 s left" in text, "nothing is cut off"
    assert "Why [x] ?" in stream.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["pipe", "terminal"])
def test_other_processes_are_quiet(stream, monkeypatch):
    show_everything(spoken(monkeypatch, stream, is_main=False))
    assert not stream.getvalue()


def test_the_closing_table_has_baseline_final_and_test(monkeypatch):
    stream = io.StringIO()
    show_result(spoken(monkeypatch, stream), SUMMARY)
    rows = {
        cells[0].strip(): [cell.strip() for cell in cells[1:]]
        for line in stream.getvalue().splitlines()
        if len(cells := line.strip("│ ").split("│")) == 4
    }
    assert rows["loss"] == ["2.5000", "1.5000", "1.6250"]
    assert rows["perplexity"] == ["12.1825", "4.4817", "5.0784"]
    assert rows["answer loss"] == ["2.2500", "-", "1.7500"]
    assert "40 updates in 61 s, peak memory 1.00 GiB (cpu)" in stream.getvalue()


# --- the plan


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(BASE_DIR))


@pytest.fixture(scope="module")
def rows():
    (source,) = load_sources(Data(medquad=str(MEDQUAD_CSV), afrimedqa="none"))
    return source.rows[:40]


def plan_of(rows, tokenizer, *sets: str, exp: str = "exp_001") -> Plan:
    """The plan of a tiny run."""
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from medqa.model.base import check_model, load_model
    from medqa.model.memory import fit_to_memory
    from medqa.model.settings import resolve_settings
    from medqa.training.plan import make_plan

    experiment = load_experiment(exp, tiny=True, sets=sets)
    settings = resolve_settings(experiment, cpu=True)
    accelerator = Accelerator(cpu=True)
    device = torch.device("cpu")
    model_config = check_model(experiment.model, experiment.tokenization.max_length)
    settings = fit_to_memory(settings, experiment, model_config, len(tokenizer), 2**33)
    model = load_model(experiment, settings, tokenizer, device)
    examples = {name: tokenize(rows, tokenizer, experiment.tokenization) for name in ("train", "validation", "test")}
    stream = Stream(examples["train"], 42, experiment.training.global_batch_size)
    splits = Splits(**dict.fromkeys(SPLITS, tuple(rows)), groups={row.id: row.id for row in rows}, fingerprint="")
    data = TrainingData((), splits, examples, stream, experiment.training.max_steps)
    plan = make_plan(experiment, data, settings, model, accelerator, tokenizer)
    AcceleratorState._reset_state(reset_partial_state=True)
    return plan


def test_the_plan_says_what_a_run_will_be(rows, tokenizer):
    float16 = ("training.mixed_precision=fp16", "model.dtype=float16")
    lines = plan_of(rows, tokenizer, "training.max_steps=10", *float16).lines
    said = {}
    for label, text in lines:
        said.setdefault(label, []).append(text)
    assert said["data"] == ["train 40, validation 40, test 40 rows"]
    assert said["updates"][0].startswith("10 of 32 examples, about ")
    assert said["updates"][0].endswith("tokens: 8.00 epochs")
    assert said["micro-batches"] == ["4 examples on 1 process(es): gradient_accumulation_steps 8"]
    assert said["learning rate"] == ["0.01, constant"]
    assert said["trainable params"] == ["45,056 of 799,360 (5.64 %)"]
    assert said["device"][0].startswith("cpu, ")
    assert "training.mixed_precision: fp16 -> no (float16 is supported on GPUs only)" in said["changed"]
    assert "model.dtype: float16 -> float32 (float16 is supported on GPUs only)" in said["changed"]
    assert "non-commercial" in said["licence"][0]


def test_warmups_zero_rate_and_the_absent_source_are_said(rows, tokenizer):
    lines = plan_of(rows, tokenizer, "data.afrimedqa=none", exp="exp_002").lines
    rates = [text for label, text in lines if label == "learning rate"]
    assert rates == ["0.01, cosine, 4 updates of warmup (learning rate 0 at the first)"]
    assert not [text for label, text in lines if label == "licence"]


@pytest.mark.parametrize("loss_on", ["all", "answer"])
def test_the_example_shows_the_loss_mask(loss_on, rows, tokenizer):
    plan = plan_of(rows, tokenizer, f"tokenization.loss_on={loss_on}")
    assert [counts for counts, _ in plan.example] == [False, True]
    (_, outside), (_, inside) = plan.example
    if loss_on == "all":
        assert outside == "<s>", "the first token is predicted by nothing"
        assert inside.startswith("### Instruction:\n")
    else:
        assert outside.endswith("### Response:\n")
        assert "###" not in inside
    assert inside.endswith("</s>")


def test_the_mask_is_that_of_the_labels(rows, tokenizer):
    from medqa.data.batches import IGNORED, collate

    for loss_on in ("all", "answer"):
        tokenization = load_experiment("exp_001", tiny=True, sets=[f"tokenization.loss_on={loss_on}"]).tokenization
        for example in tokenize(rows[:10], tokenizer, tokenization):
            labels = collate([example], tokenization, tokenizer.pad_token_id).labels[0, 1:]
            counted = [int(label) for label in labels if label != IGNORED]
            shown = [text for counts, text in loss_segments(example, loss_on, tokenizer.decode) if counts]
            assert shown == [tokenizer.decode(counted)]


def test_long_examples_are_shortened_to_one_line():
    assert console_module._shortened("a\nb") == "a\\nb"
    assert len(console_module._shortened("x" * 5000)) < 700
