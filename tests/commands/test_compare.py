"""`python -m medqa compare`: what it reads, what it says and does not say, its commands, and its page."""

import ast
import dataclasses
import errno
import json
import math
import os
import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

import train
from medqa.__main__ import main
from medqa.commands.compare.conclusions import BASE_CONTENTS, CONTENTS, conclusion, one_changes, pairs, recipe, word
from medqa.commands.compare.page import OWN_MARK, plots, render
from medqa.commands.compare.read import read_runs
from medqa.commands.compare.tables import (
    Comparison,
    compare_runs,
    curve,
    evaluation_tables,
    main_tables,
    performance,
    perplexity,
    samples,
)
from medqa.commands.evaluation_table import TOO_FEW
from medqa.config import flat
from medqa.config_file import dump_yaml, load_experiment, parse_sets
from medqa.files import checksum
from medqa.options import parse_options

ROOT = Path(__file__).resolve().parents[2]
HOSTILE_NAME = "$x_<script>alert(1)</script> & 'co'"
HOSTILE_ANSWER = "</p></style><img src=http://evil.example/x onerror=alert(2)> {{ 7 * 7 }}"
RECIPES = ("exp_001", "exp_002", "exp_003")


def eval_record(step, loss, rows=28):
    return {"step": step, "split": "eval", "elapsed_s": step + 1.0, "loss": loss, "perplexity": math.exp(loss)} | {
        "answer_loss": loss + 0.5,
        "answer_perplexity": math.exp(loss + 0.5),
        "tokens": 2390,
        "rows": rows,
    }


def make_run(directory, exp, *sets, tiny=True, upto=None, every=1, fingerprint="f", evaluation=None, in_effect=None):
    """A run's files, as training writes them; unfinished where it only went `upto` an update."""
    directory.mkdir(parents=True)
    experiment = load_experiment(exp, tiny=tiny, sets=["training.max_steps=20", *sets] if tiny else sets)
    written = {**experiment.model_dump(), "gradient_accumulation_steps": 8, "in_effect": in_effect or {}}
    dump_yaml(written, directory / "config.yaml")
    last, batch = upto or experiment.training.max_steps, experiment.training.global_batch_size
    records = [eval_record(0, 4.0)]
    for step in range(every, last + 1, every):
        records.append(
            {"step": step, "split": "train", "elapsed_s": step + 0.5, "loss": 4 - step / last, "learning_rate": 1e-2}
            | {"tokens": 1000, "examples_seen": step * batch, "tokens_seen": 1000 * step, "update_s": 0.5}
            | {"tokens_per_s": 2000.0, "padding_share": 0.25, "peak_memory_bytes": 2**29, "overflows": 0}
        )
        if step % 10 == 0:
            records.append(eval_record(step, 4 - 0.8 * step / last))
    if upto is None:
        records.append({**eval_record(last, 3.2, 31), "split": "test"})
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (directory / "metrics.jsonl").write_text(lines)
    (directory / "data_report.json").write_text(json.dumps({"fingerprint": fingerprint, "padding_share": 0.2}))
    if upto is None:
        part = {"loss": 3.2, "perplexity": math.exp(3.2), "answer_loss": 3.7, "answer_perplexity": 40.4473}
        first = {key: eval_record(0, 4.0)[key] for key in part}
        summary = {"experiment": exp, "baseline": first, "final": part, "test": part, "updates": last, "processes": 1}
        summary |= {"wall_clock_s": 99.0, "peak_memory_bytes": 2**30, "memory_device": "cpu", "cpu_threads": 1}
        (directory / "summary.json").write_text(json.dumps(summary | {"data_fingerprint": fingerprint}))
    if evaluation is not None:
        (directory / "evaluation.json").write_text(json.dumps(evaluation))
    return directory


def evaluated(tuned="tuned", step=20, limit=None, value=41.25, rows=None):
    """An evaluation as `python -m medqa evaluate` writes it; without `rows`, as older ones are."""
    figure = {"value": value, "low": 38.5, "high": 44.0}
    answers = [
        {"id": "medquad:1", "question": "What <b>is</b> it?", "reference": "That.", "untuned": "?", "tuned": tuned}
    ]
    generation = {"rouge_l": {"tuned": {"value": 0.31, "p_value": 0.004}}, "samples": answers}
    both = {"untuned": {"answer_perplexity": {"value": 143.0}}, "tuned": {"answer_perplexity": figure}}
    if rows is not None:
        both["rows"], generation["rows"] = rows, rows
    return {"step": step, "limit": limit, "seed": 0, "tasks": {"loss": {"test": both}, "generation": generation}}


def reread(*paths):
    return read_runs([Path(path) for path in paths])


def compared(*paths) -> Comparison:
    return compare_runs([Path(path) for path in paths])


def said(comparison, *words):
    """The one warning with all these words."""
    found = [warning for warning in comparison.warnings if all(word in warning for word in words)]
    assert len(found) == 1, (words, comparison.warnings)
    return found[0]


class Page(HTMLParser):
    """What a page holds, as a browser reads it."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.titles, self.warnings, self.labels, self.rows = [], [], [], [], []
        self.commands, self.text, self._into = [], "", None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.tags.append((tag, named))
        where = {"figcaption": self.titles, "bdi": self.labels, "tr": self.rows}.get(tag)
        where = {"warning": self.warnings, "command": self.commands}.get(named.get("class"), where)
        if where is not None:
            where.append("")
            self._into = where

    handle_startendtag = handle_starttag

    def handle_endtag(self, tag):
        if tag in ("figcaption", "bdi", "tr", "li", "pre"):
            self._into = None

    def handle_data(self, data):
        self.text += data
        if self._into is not None:
            self._into[-1] += data


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """The three recipes: the first with an evaluation and a hostile name, the last at work right now."""
    root = tmp_path_factory.mktemp("runs")
    first = make_run(
        root / "a" / HOSTILE_NAME.replace("/", "\N{DIVISION SLASH}"), "exp_001", evaluation=evaluated(HOSTILE_ANSWER)
    )
    second = make_run(root / "exp_002-tiny", "exp_002")
    third = make_run(root / "exp_003-tiny", "exp_003", upto=12)
    with (third / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "split": "tr')
    return [first, second, third]


@pytest.fixture(scope="module")
def text(three):
    return render(compared(*three))


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_a_real_run_is_read(tmp_path, capsys):
    real, other = tmp_path / "real", make_run(tmp_path / "other", "exp_001", "lora.r=4")
    words = ["--exp", "exp_001", "--tiny", "--cpu", "--output-dir", str(real), "--set", "training.max_steps=2"]
    words += ["evaluation.samples=0", "tracking.wandb=disabled", "evaluation.rows=8", "evaluation.steps=1"]
    words += ["training.mixed_precision=fp16", "model.dtype=float16"]
    try:
        assert train.main(words) == 0
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    capsys.readouterr()
    assert main(["compare", str(real), str(other), "--out", str(tmp_path / "p.html"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    summary = json.loads((real / "summary.json").read_text())
    run = found["runs"][0]
    assert (run["run"], run["finished"], run["updates"], run["damage"]) == ("real", True, 2, [])
    assert run["answer_perplexity"]["validation"] == summary["final"]["answer_perplexity"]
    assert run["answer_perplexity"]["validation_untuned"] == summary["baseline"]["answer_perplexity"]
    assert run["answer_perplexity"]["test"]["value"] == summary["test"]["answer_perplexity"]
    assert run["performance"]["wall_clock_s"] == summary["wall_clock_s"]
    assert run["performance"]["memory_device"] == "cpu"
    records = [json.loads(line) for line in (real / "metrics.jsonl").read_text().splitlines()]
    updates = [record for record in records if record["split"] == "train"]
    assert run["performance"]["tokens_per_s"] == pytest.approx(updates[1]["tokens_per_s"])
    assert run["losses"]["train"]["loss"] == [record["loss"] for record in updates]
    assert run["losses"]["train"]["tokens"] == [record["tokens_seen"] for record in updates]
    assert run["losses"]["validation"]["updates"] == [0, 1, 2]
    assert run["losses"]["validation"]["examples"] == [0, 32, 64]
    assert found["differences"].keys() >= {"lora.r", "training.max_steps"}
    used = {"real": "fp16 (in effect: no)", "other": "no"}
    assert found["differences"]["training.mixed_precision"] == used
    assert not any("subset" in warning for warning in found["warnings"]), "one curve of one set of rows"
    assert [p["change"] for p in found["proposals"]][:1] == [{"lora.r": 4}]
    assert OWN_MARK in (tmp_path / "p.html").read_bytes()


def test_the_page_holds_every_run_plot_and_warning(page, three):
    comparison = compared(*three)
    for run in comparison.runs:
        assert run.label in page.labels
    titles = page.titles
    assert len(titles) == len(set(titles)) == 7
    for axis in ("updates", "examples seen", "target tokens seen"):
        assert sum(title.endswith(axis) for title in titles) == 2
    assert page.warnings == comparison.warnings
    assert len(page.warnings) >= 4
    assert [command.strip() for command in page.commands] == [p.command for p in comparison.proposals]
    svgs = [named for tag, named in page.tags if tag == "svg" and named.get("role") == "img"]
    assert [named["aria-label"] for named in svgs] == titles
    for table in (*main_tables(comparison), *evaluation_tables(comparison.runs)):
        for row in table.rows:
            assert "".join(row) in [shown.strip() for shown in page.rows]


def test_the_page_needs_nothing_else(page, text):
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "link", "iframe", "object", "embed", "base", "form", "video"}
    metas = [named for tag, named in page.tags if tag == "meta"]
    policy = next(named["content"] for named in metas if named.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert any(named.get("content") == "width=device-width, initial-scale=1" for named in metas)
    for tag, named in page.tags:
        assert not any(name.startswith("on") for name in named), tag
        for name, value in named.items():
            if name in ("src", "href", "xlink:href", "action"):
                assert value.startswith("#"), (tag, value)
            if "://" in (value or ""):
                assert name.startswith("xmlns"), (tag, name, value)
    assert text.count("@media (prefers-color-scheme: dark)") == 1
    ours = set(re.findall(r"var\((--[a-z0-9-]+)\)", text))
    assert len(ours) >= 10
    for name in ours:  # each colour twice: light, dark
        assert len(re.findall(rf"{name}: #[0-9a-f]{{6}}\b", text)) == 2, name
    assert "@import" not in text
    assert "url(http" not in text


def test_ids_of_the_plots_do_not_collide(page):
    ids = [named["id"] for _, named in page.tags if "id" in named]
    assert len(ids) > 300
    assert len(ids) == len(set(ids))
    wanted = [named["xlink:href"][1:] for _, named in page.tags if "xlink:href" in named]
    wanted += [v[5:-1] for _, named in page.tags for v in named.values() if (v or "").startswith("url(#")]
    assert len(wanted) > 100
    assert set(wanted) <= set(ids)


def test_what_comes_from_runs_is_text(page, text):
    assert HOSTILE_ANSWER in page.text
    assert "What <b>is</b> it?" in page.text
    assert "alert(1)" in page.text
    assert "<script" not in text
    assert "<img" not in text
    assert "<b>" not in text
    assert page.text.count("$x_<script") >= 5  # also in a plot, where it is no formula


def test_a_formula_in_a_name_is_no_formula(tmp_path):
    runs = reread(make_run(tmp_path / r"$\frac{1}{$", "exp_001"), make_run(tmp_path / "$x^2$", "exp_001"))
    drawn = plots(runs)[-1][0].svg
    assert r"$\frac{1}{$" in drawn
    assert "$x^2$" in drawn


def test_the_page_is_the_same_for_the_same_files(three, text):
    assert render(compared(*three)) == text


def test_an_unfinished_run_is_shown_as_such(page, three, tmp_path):
    run = reread(*three)[2]
    assert run.state == "unfinished: 12 of 20 updates"
    assert not run.damage  # a line that is being written is no damage
    assert page.text.count("unfinished: 12 of 20 updates") >= 3  # legend, warning, table
    assert "at update 10" in page.text
    found = perplexity(run)
    assert (found.update, found.test.value) == (10, None)
    assert performance(run).wall_clock_s == 12.5
    longer = shutil.copytree(three[1], tmp_path / "longer")  # it ended once, and goes on
    config = (longer / "config.yaml").read_text()
    (longer / "config.yaml").write_text(config.replace("max_steps: 20", "max_steps: 30"))
    assert reread(longer, three[1])[0].state == "unfinished: 20 of 30 updates"
    begun = make_run(tmp_path / "begun", "exp_001", upto=1)
    (begun / "metrics.jsonl").unlink()
    assert reread(begun, three[1])[0].state == "unfinished: 0 of 20 updates"
    text = render(compared(begun, make_run(tmp_path / "same", "exp_001", upto=5), make_run(tmp_path / "o", "exp_002")))
    assert "nothing yet; unfinished: begun, same" in text
    assert "which of them made the difference; unfinished: begun" in text
    assert "nothing recorded yet" in render(compared(begun, three[2]))


def full(tmp_path):
    """The three recipes as they are, on TinyLlama, as if they had run."""
    return [make_run(tmp_path / exp, exp, tiny=False, every=10) for exp in RECIPES]


def test_the_three_recipes_are_told_apart_by_name(tmp_path):
    comparison = compared(*full(tmp_path))
    for pair in comparison.pairs:
        one, two = (recipe(flat(load_experiment(run.label))) for run in (pair.first, pair.second))
        assert set(pair.keys) == {key for key in one if one[key] != two[key]}
        assert len(pair.keys) >= 5
        assert "does not show which of them" in conclusion(pair, comparison.pairs)
    warning = said(comparison, "several settings at once", *RECIPES)
    assert all(key in warning for pair in comparison.pairs for key in pair.keys)
    table = next(table for table in main_tables(comparison) if table.title.startswith("what differs"))
    assert ("optimizer.learning_rate", "5e-05", "0.0001", "0.0002") in table.rows


@pytest.mark.parametrize("tiny", [True, False])
def test_proposed_commands_run_as_they_stand(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    paths = [make_run(tmp_path / f"a b{exp}", exp, tiny=tiny, every=10) for exp in RECIPES]
    comparison = compared(*paths)
    base = comparison.runs[0]
    given = [recipe(flat(run.experiment)) for run in comparison.runs]
    changed, places = set(), set()
    assert len(comparison.proposals) >= 8
    for proposal in comparison.proposals:
        words = shlex.split(proposal.command)
        assert words[:3] == ["accelerate", "launch", "train.py"]
        options = parse_options(words[3:])
        experiment = load_experiment(options.exp, tiny=options.tiny, locations=options.locations, sets=options.set)
        asked, now = flat(base.experiment), flat(experiment)
        assert {key: now[key] for key in now if now[key] != asked[key]} == proposal.change
        assert {key: o.value for key, o in parse_sets(options.set)[0].items()} == proposal.change
        assert recipe(now) not in given
        assert len(proposal.change) == 1
        changed |= proposal.change.keys()
        places.add(options.output_dir)
    assert len(places) == len(comparison.proposals)
    assert changed == {key for pair in comparison.pairs for key in pair.keys} | {"training.seed"}


def test_how_often_is_evaluated_counts_where_it_decides_which_adapter_stays(tmp_path):
    for kept, keys in (("best", ("evaluation.steps",)), ("final", ())):
        words = (f"training.keep={kept}",)
        one = make_run(tmp_path / f"{kept}1", "exp_001", *words, "evaluation.steps=5")
        other = make_run(tmp_path / f"{kept}2", "exp_001", *words, "evaluation.steps=10")
        assert [pair.keys for pair in compared(one, other).pairs] == [keys]


def test_an_evaluation_is_of_the_adapter_that_was_kept(tmp_path):
    paths = [make_run(tmp_path / name, "exp_001", "training.keep=best", evaluation=evaluated(step=10)) for name in "ab"]
    asked = {"max_steps": 20, "epochs": None}
    told = json.loads((paths[0] / "summary.json").read_text()) | {"adapter_step": 10, "length": asked}
    (paths[0] / "summary.json").write_text(json.dumps(told))
    comparison = compared(*paths)
    assert "b" in said(comparison, "evaluation.json is of update 10, the run's adapter of 20")
    assert [perplexity(run).update for run in comparison.runs] == [10, 20]


def test_no_path_of_ones_own_data_is_in_a_proposed_directory(tmp_path):
    one = make_run(tmp_path / "one", "exp_001")
    other = make_run(
        tmp_path / "other", "exp_001", "data.files={notes: /home/somebody/n.csv}", "lora.r=4", fingerprint="g"
    )
    commands = [shlex.split(p.command) for p in compared(one, other).proposals if "data.files" in p.change]
    places = [words[words.index("--output-dir") + 1] for words in commands]
    assert "outputs/one,data.files=notes" in places
    assert "somebody" not in "".join(places)


def test_what_is_there_already_is_not_proposed(tmp_path):
    paths = full(tmp_path)
    before = [p.change for p in compared(*paths).proposals]
    done = make_run(tmp_path / "done", "exp_001", "optimizer.learning_rate=1e-4", tiny=False, every=10)
    seed = make_run(tmp_path / "seed", "exp_001", "training.seed=7", tiny=False, every=10)
    after = [p.change for p in compared(*paths, done, seed).proposals]
    assert [change for change in before if change not in after] == [
        {"optimizer.learning_rate": 1e-4},
        {"training.seed": 43},
    ]


def test_what_is_refused_alone_is_changed_together(tmp_path):
    one = make_run(tmp_path / "one", "exp_001", "training.max_steps=5")
    two = make_run(tmp_path / "two", "exp_002", "training.max_steps=40", "scheduler.warmup_steps=10")
    changes = [change for change, _ in one_changes(pairs(reread(one, two))[0])]
    assert {"scheduler.warmup_steps": 10, "training.max_steps": 40} in changes
    assert {"scheduler.warmup_steps": 10} not in changes
    assert {"training.max_steps": 40} in changes
    batches = make_run(
        tmp_path / "batches", "exp_001", "training.per_device_batch_size=5", "training.global_batch_size=20"
    )
    changes = [change for change, _ in one_changes(pairs(reread(one, batches))[0])]
    assert {"training.per_device_batch_size": 5} not in changes
    long = make_run(tmp_path / "long", "exp_001", "tokenization.max_length=1024", "lora.r=4")
    changes = [change for change, _ in one_changes(pairs(reread(one, long))[0])]
    assert not any("tokenization.max_length" in change for change in changes)  # the embedded base takes 512


@pytest.mark.parametrize(
    "value",
    [
        *("[PAD]", "none", "null", "5e-5", "a b", "x: y # z", "", "'", 'é\n\t"'),
        *(5e-5, 1e-08, 3, True, None),
        *(["q_proj", "a,b"], [0.9, 0.999], {"mine": "a b.csv"}, {}),
    ],
)
def test_values_come_back_as_they_were(value):
    (found,) = shlex.split(shlex.join([word("section.key", value)]))
    back = parse_sets([found])[0]["section.key"].value
    assert back == value
    assert type(back) is type(value)


def test_one_change_allows_a_conclusion_for_one_seed(tmp_path):
    one, rank = make_run(tmp_path / "one", "exp_001"), make_run(tmp_path / "rank", "exp_001", "lora.r=4")
    comparison = compared(one, rank)
    text = conclusion(comparison.pairs[0], comparison.pairs)
    assert text.startswith("isolates the effect of lora.r, for one seed only")
    said(comparison, "one seed each")
    assert [p.change for p in comparison.proposals] == [{"training.seed": 43}]
    seed = make_run(tmp_path / "seed", "exp_001", "training.seed=1")
    comparison = compared(one, rank, seed)
    text = conclusion(comparison.pairs[0], comparison.pairs)
    assert "isolates the effect of lora.r; the noise of a seed, one against seed (answer perplexity 40.45" in text
    assert not [w for w in comparison.warnings if "one seed each" in w]
    padded = make_run(tmp_path / "padded", "exp_001", "tokenization.padding=max_length")
    found = pairs(reread(one, padded))
    assert "the cost of tokenization.padding" in conclusion(found[0], found)
    longer = make_run(tmp_path / "longer", "exp_001", "tokenization.max_length=200")
    found = pairs(reread(one, longer))
    assert "not comparable" in conclusion(found[0], found)
    again = make_run(tmp_path / "again", "exp_001", "training.log_steps=5", "tracking.wandb=disabled")
    found = pairs(reread(one, again))
    assert found[0].keys == ()


def test_where_data_lie_is_told_apart(tmp_path):
    here = make_run(tmp_path / "here", "exp_001")
    there = make_run(tmp_path / "there", "exp_001", "data.medquad=/elsewhere/medquad.csv")
    comparison = compared(here, there)
    assert comparison.pairs[0].keys == ()
    tables = {table.title: table for table in main_tables(comparison)}
    assert tables["what differs between the configurations"].rows == []
    assert tables["location of data and base model"].rows[0][0] == "data.medquad"
    said(compared(there, here), "data.medquad", "does not exist", "--medquad")
    own = make_run(tmp_path / "own", "exp_001", "data.files={notes: /elsewhere/notes.csv}")
    said(compared(own, here), "data.files notes = /elsewhere/notes.csv does not exist", "--data notes=")
    edited = make_run(tmp_path / "edited", "exp_001", fingerprint="g")
    comparison = compared(here, edited)
    assert comparison.pairs[0].keys == (CONTENTS,)
    said(comparison, "not comparable", "other rows", "here / edited")
    moved = make_run(tmp_path / "moved", "exp_001", "data.medquad=/elsewhere/medquad.csv", fingerprint="g")
    assert pairs(reread(here, moved))[0].keys == ("data.medquad",)


def test_the_same_base_at_another_place_is_the_same(tmp_path):
    runs = [make_run(tmp_path / "a", "exp_001"), make_run(tmp_path / "b", "exp_001", "model.base=/elsewhere/base")]
    assert compared(*runs).pairs[0].keys == ("model.base",)
    for run, fingerprint in zip(runs, ("f", "g"), strict=True):
        path = run / "summary.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_fingerprint": fingerprint}))
    assert compared(*runs).pairs[0].keys == ("model.base",)
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_fingerprint": "f"}))
    comparison = compared(*runs)
    assert comparison.pairs[0].keys == ()
    assert not [warning for warning in comparison.warnings if "model.base" in warning]


def test_another_base_at_the_same_place_is_another(tmp_path):
    """The weights were changed between the two runs; nothing in their configurations says so."""
    runs = [make_run(tmp_path / name, "exp_001", evaluation=ALL) for name in ("a", "b")]
    for run, fingerprint in zip(runs, ("f", "g"), strict=True):
        path = run / "summary.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_fingerprint": fingerprint}))
    comparison = compared(*runs)
    assert comparison.pairs[0].keys == (BASE_CONTENTS,)
    assert "isolates the effect of the base model's contents" in conclusion(comparison.pairs[0], comparison.pairs)
    assert not [warning for warning in comparison.warnings if "another base model" in warning]
    path = runs[1] / "evaluation.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_fingerprint": "f"}))
    said(compared(*runs), "b: evaluation.json is of another base model than the run's")


def test_what_is_not_known_of_a_base_model_is_not_called_another_one(tmp_path):
    of_base = {**ALL, "base_fingerprint": "f"}
    one, two = (make_run(tmp_path / name, "exp_001", evaluation=of_base) for name in ("one", "two"))
    for content in ("", "{}", None):
        (one / "summary.json").unlink() if content is None else (one / "summary.json").write_text(content)
        comparison = compared(one, two)
        assert not [warning for warning in comparison.warnings if "another base model" in warning]
        assert len([warning for warning in comparison.warnings if "base model, which neither" in warning]) == 2
        what = "summary.json is missing, though all 20 updates" if content is None else "summary.json cannot be read"
        said(comparison, f"one: {what}")
        assert comparison.runs[0].state == "unfinished: 20 of 20 updates, without its final evaluation"
    remembered(one, base="f")
    assert not [warning for warning in compared(one, two).warnings if warning.startswith("one: whether")]
    for value in (None, "", 5):
        (one / "evaluation.json").write_text(json.dumps({**of_base, "base_fingerprint": value}))
        comparison = compared(one, two)
        said(comparison, "one: evaluation.json does not record its base model")
        assert not [warning for warning in comparison.warnings if "another base model" in warning]
    for content in ("", "{}"):
        (one / "evaluation.json").write_text(content)
        said(compared(one, two), "one: evaluation.json cannot be read and is ignored")
    shutil.rmtree(one / "checkpoint-20")
    remains = make_run(tmp_path / "remains", "exp_001", upto=12)
    assert not [run for run in reread(remains, two) if run.damage], "it has not come to its end"


def test_what_was_in_effect_counts(tmp_path):
    change = {"model.quantization": {"asked": "4bit", "used": "none", "reason": "cannot be had"}, "x": 3}
    asked, fell_back = make_run(tmp_path / "a", "exp_001"), make_run(tmp_path / "b", "exp_001", in_effect=change)
    comparison = compared(asked, fell_back)
    assert comparison.pairs[0].keys == ("model.quantization",)
    rows = [row for table in main_tables(comparison) for row in table.rows]
    assert ("model.quantization", "4bit", "4bit (in effect: none)") in rows


def test_an_automatic_quantization_is_compared_as_what_it_was(tmp_path):
    def run(name, asked, used):
        change = {"model.quantization": {"asked": asked, "used": used, "reason": "it fits"}} if asked != used else {}
        return make_run(tmp_path / name, "exp_001", f"model.quantization={asked}", in_effect=change)

    four_bit, chose_4 = run("four_bit", "4bit", "4bit"), run("chose_4", "auto", "4bit")
    comparison = compared(four_bit, chose_4)
    assert comparison.pairs[0].keys == ()
    rows = [row for table in main_tables(comparison) for row in table.rows]
    assert ("model.quantization", "4bit", "auto (in effect: 4bit)") in rows
    chose_none = run("chose_none", "auto", "none")
    (pair,) = pairs(reread(chose_4, chose_none))
    assert pair.keys == ("model.quantization",)
    assert [change for change, _ in one_changes(pair)] == [{"model.quantization": "none"}]  # auto could be 4bit again


def remembered(directory, **fingerprints):
    """The adapter's configuration and a checkpoint's manifest, as training leaves them beside `config.yaml`."""
    experiment = load_experiment(str(directory / "config.yaml"))
    place = directory / "checkpoint-20"
    said = {"peft_type": "LORA", **experiment.lora.model_dump(include={"r", "lora_alpha", "lora_dropout"})}
    said["target_modules"] = experiment.lora.target_modules[::-1]
    for folder in (directory / "lora_adapters", place):
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(said))
    body = {"format": 1, "step": 20, "experiment": flat(experiment), "fingerprints": fingerprints, "files": {}}
    (place / "manifest.json").write_text(json.dumps({**body, "checksum": checksum(body)}))
    return directory


@pytest.mark.parametrize(
    "before, after, said",
    [
        ("lora_alpha: 16", "lora_alpha: 160", "lora_alpha = 160 in config.yaml, 16 in lora_adapters/adapter_config"),
        ("learning_rate: 0.01", "learning_rate: 0.1", "checkpoint-20 was trained with: optimizer.learning_rate: 0.01"),
        ("max_steps: 20", "max_steps: 10", "checkpoint-20 was trained with: training.max_steps: 20 there, 10 now"),
    ],
)  # fmt: skip
def test_a_configuration_that_was_changed_after_training_is_not_believed(before, after, said, tmp_path):
    """`medqa evaluate` refuses the same directory."""
    one, edited = (remembered(make_run(tmp_path / name, "exp_001")) for name in ("one", "edited"))
    seed = make_run(tmp_path / "seed", "exp_001", "training.seed=1")
    assert not [run for run in reread(one, edited, seed) if run.doubts]
    text = (edited / "config.yaml").read_text()
    assert text.count(before) == 1
    (edited / "config.yaml").write_text(text.replace(before, after))
    comparison = compared(one, edited, seed)
    warning = comparison.warnings[0]
    assert warning.startswith("edited: it is not known how it was trained, and nothing is concluded from it")
    assert said in warning
    told = [conclusion(pair, comparison.pairs) for pair in comparison.pairs]
    nothing = "nothing: it is not known how edited was trained, see the warnings"
    assert [told[0], told[2]] == [nothing, nothing]
    assert told[1].startswith("only the seed differs")
    assert not [w for w in comparison.warnings if "several settings at once" in w]
    assert compared(edited, one).proposals == []
    for folder in (
        "lora_adapters",
        "checkpoint-20",
    ):  # and where nothing contradicts, as in a run of the first versions
        shutil.rmtree(edited / folder)
    assert not compared(one, edited).runs[1].doubts


def test_what_else_in_a_run_contradicts_its_configuration_is_told(tmp_path):
    one = remembered(make_run(tmp_path / "one", "exp_001"), data="g", base="b")
    other = make_run(tmp_path / "other", "exp_001", in_effect={"model.quantization": {"asked": "4bit", "used": "none"}})
    path = other / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization": "4bit", "base_fingerprint": "b"}))
    comparison = compared(one, other)
    said(comparison, "one: ", "the fingerprint of the data in checkpoint-20 differs from that in data_report.json")
    said(comparison, "other: ", "model.quantization = none in config.yaml, 4bit in summary.json")


def test_a_run_that_may_go_on_so_is_believed(tmp_path):
    """Its length, its recording and where its data lie may change; other updates are added under a constant rate."""
    one, two = (remembered(make_run(tmp_path / name, "exp_001")) for name in ("one", "two"))
    text = (two / "config.yaml").read_text()
    for before, after in (("max_steps: 20", "max_steps: 30"), ("log_steps: 1", "log_steps: 7")):
        text = text.replace(before, after)
    text = re.sub(r"medquad: .*", "medquad: /elsewhere/medquad.csv", text)
    (two / "config.yaml").write_text(text)
    (two / "checkpoint-30").mkdir()
    (two / "checkpoint-30" / "manifest.json").write_text("{")
    assert not [run for run in reread(one, two) if run.doubts]


def test_other_losses_are_drawn_apart(tmp_path):
    one = make_run(tmp_path / "one", "exp_001")
    answer = make_run(tmp_path / "answer", "exp_001", "tokenization.loss_on=answer")
    comparison = compared(one, answer)
    said(comparison, "the loss of answer is over the answer only", "that of one")
    drawn = plots(comparison.runs)
    rows = [[plot.title for plot in row] for row in drawn]
    assert [row[0].split(":")[0] for row in rows[:2]] == ["loss over prompt and answer", "loss over the answer"]
    assert [len(row) for row in rows] == [3, 3, 3, 1]
    for i, shown in enumerate([{"0"}, {"1"}, {"0", "1"}]):
        for plot in drawn[i]:
            assert set(re.findall(r"--plot-run-(\d)", plot.svg)) == shown


def test_rows_that_differ_are_told(tmp_path):
    one = make_run(tmp_path / "one", "exp_001")
    other = make_run(tmp_path / "other", "exp_001", "tokenization.max_length=100", fingerprint="g")
    warning = said(compared(one, other), "not comparable")
    assert "tokenization.max_length (one: 160; other: 100)" in warning
    assert "other rows, answers or splits (one / other)" in warning
    (other / "data_report.json").unlink()
    (other / "summary.json").unlink()
    assert "it is not known which rows other" in said(compared(one, other), "not comparable")
    leaks = {"fingerprint": "f", "overlap": {"held_out": {"question_or_answer": {"share": 0.2}}}}
    (one / "data_report.json").write_text(json.dumps(leaks))
    said(compared(one, other), "one: 20.0% of its held-out rows", "flatters")


def test_another_prompt_is_another_measure(tmp_path):
    one = make_run(tmp_path / "one", "exp_001")
    chat = make_run(tmp_path / "chat", "exp_001", "tokenization.prompt=chat")
    comparison = compared(one, chat)
    assert "tokenization.prompt (one: instruction; chat: chat)" in said(comparison, "not comparable")
    (pair,) = comparison.pairs
    assert conclusion(pair, comparison.pairs).startswith("only tokenization.prompt differs, but it changes the tokens")


def test_other_machines_are_told(tmp_path):
    one, two = make_run(tmp_path / "one", "exp_001"), make_run(tmp_path / "two", "exp_001", "lora.r=4")
    assert not [warning for warning in compared(one, two).warnings if "on different machines" in warning]
    summary = json.loads((two / "summary.json").read_text())
    (two / "summary.json").write_text(json.dumps(summary | {"memory_device": "Tesla T4"}))
    assert "memory_device (one: cpu; two: Tesla T4)" in said(compared(one, two), "on different machines")


def test_figures_of_an_evaluation_are_shown_with_intervals(page, three, tmp_path):
    run = reread(*three)[0]
    found = perplexity(run)
    assert (found.test.value, found.test.low, found.test.high) == (41.25, 38.5, 44.0)
    assert found.test_untuned.value == 143.0
    assert "41.25 (38.50 to 44)" in page.text
    rows = {row[0]: row for table in evaluation_tables([run]) for row in table.rows}
    assert rows["rouge_l.fine-tuned"][1] == "0.3100, p = 0.004"
    assert rows["test.fine-tuned.answer_perplexity"][1] == "41.25 (38.50 to 44)"
    warning = said(compared(*three), "no interval", "python -m medqa evaluate")
    assert warning.startswith("exp_002-tiny, exp_003-tiny:")
    part = make_run(tmp_path / "part", "exp_001", evaluation=evaluated(step=10, limit=5))
    comparison = compared(part, three[1])
    said(comparison, "part: evaluation.json is of update 10, the run's adapter of 20")
    said(comparison, "evaluated on a part of the rows (part: 5 rows)")


def test_samples_stand_side_by_side(tmp_path):
    one = make_run(tmp_path / "one", "exp_001", evaluation=evaluated("first"))
    two = make_run(tmp_path / "two", "exp_002", evaluation=evaluated("second"))
    (sample,) = samples(reread(one, two))
    assert sample["answers"] == [("baseline", "?"), ("one", "first"), ("two", "second")]


@pytest.mark.parametrize(
    "evaluation",
    [
        {"tasks": 3},
        {"tasks": {"loss": [1], "generation": {"samples": [3, {"id": []}, {"question": 5}]}}},
        {"tasks": {"loss": {"x": {"value": "many", "low": True, "high": 10**400}}}, "step": "x", "limit": []},
        {"tasks": json.loads('{"a":' * 300 + '{"value": 1}' + "}" * 300)},
    ],
)
def test_an_evaluation_of_another_shape_stops_nothing(evaluation, tmp_path):
    one, two = make_run(tmp_path / "one", "exp_001", evaluation=evaluation), make_run(tmp_path / "two", "exp_002")
    comparison = compared(one, two)
    assert len(main_tables(comparison)) >= 3
    evaluation_tables(comparison.runs)
    assert samples(comparison.runs) == []


def test_damaged_files_are_told_and_left_out(tmp_path):
    one, two = make_run(tmp_path / "one", "exp_001"), make_run(tmp_path / "two", "exp_002")
    lines = (one / "metrics.jsonl").read_text().splitlines()
    lines[3:3] = ["junk", "[1]", '{"step": "x", "split": "train"}', '{"step": true, "split": 3}', "\x00", "[" * 100_000]
    lines = [line for line in lines if not line.startswith(('{"step": 3, "split": "t', '{"step": 4, "split": "t'))]
    lines.append('{"step": 3, "split": "train", "loss": NaN, "tokens_seen": 3000, "padding_share": 1e999}')
    lines.append('{"step": 4, "split": "train", "loss": ' + "9" * 500 + ', "tokens_seen": 4000}')
    (one / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (one / "summary.json").write_text('{"updates": 20, "fin')
    (one / "evaluation.json").write_text("[]")
    comparison = compared(one, two)
    run = comparison.runs[0]
    assert not run.finished
    said(comparison, "one: 6 damaged line(s) of metrics.jsonl")
    said(comparison, "one: 3 value(s) of metrics.jsonl are not finite")
    said(comparison, "one: summary.json cannot be read")
    said(comparison, "one: evaluation.json cannot be read")
    assert 3 not in curve(run, run.train, "loss").x["updates"]
    assert len(run.train) == 20
    assert render(comparison)


def summary_of(run, **changes):
    """Write values into a run's summary."""
    path = run / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_no_run_writes_into_a_summary_is_named_and_left_out(tmp_path, capsys):
    one, two = make_run(tmp_path / "one", "exp_001"), make_run(tmp_path / "two", "exp_001")
    test = {**json.loads((one / "summary.json").read_text())["test"], "answer_loss": "low"}
    odd = {"wall_clock_s": 1e308, "versions": [], "processes": True, "test": test, "stopped_early": "yes"}
    summary_of(one, **odd, peak_memory_bytes=-1)
    comparison = compared(one, two)
    warning = said(comparison, "one: summary.json has invalid values, which are ignored: ")
    for words in ("wall_clock_s = 1e+308", "versions = []", "processes = true", "test.answer_loss = low"):
        assert words in warning
    assert "peak_memory_bytes = -1" in warning
    run = comparison.runs[0]
    assert run.finished
    assert (performance(run).wall_clock_s, performance(run).peak_memory_bytes) == (21, 2**29), "of metrics.jsonl"
    summary_of(one, updates=-5, final=None)
    comparison = compared(one, two)
    warning = said(comparison, "one: summary.json has invalid values")
    assert "final = null" in warning
    assert "updates = -5" in warning
    assert comparison.runs[0].state == "unfinished: 20 of 20 updates, without its final evaluation"
    (one / "summary.json").write_text('{"updates": 20, "final": {"loss": 3.2}}')
    warning = said(compared(one, two), "one: summary.json lacks values: experiment, baseline, ")
    assert "final.answer_loss" in warning
    summary_of(one, versions={str(i): i for i in range(10_000)})
    assert len(said(compared(one, two), "one: summary.json has invalid values")) < 1000
    assert main(["compare", str(one), str(two), "--json", "--out", str(tmp_path / "p.html")]) == 0
    json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


def test_a_summary_that_contradicts_the_records_is_told(tmp_path):
    one, two = make_run(tmp_path / "one", "exp_001"), make_run(tmp_path / "two", "exp_001")
    assert not [run.damage for run in reread(one, two) if run.damage]
    figures = json.loads((one / "summary.json").read_text())["test"]
    summary_of(one, final={**figures, "answer_perplexity": 30.0}, test={**figures, "loss": 3.0})
    comparison = compared(one, two)
    said(comparison, "one: final.answer_perplexity = 30 in summary.json, 40.4473 in metrics.jsonl at update 20")
    said(comparison, "one: test.loss = 3 in summary.json, 3.2 in metrics.jsonl at update 20")
    summary_of(
        one, adapter_step=10, test=figures
    )  # the figures are those of a checkpoint, the record is of the last update
    assert not reread(one, two)[0].damage


def test_of_each_update_and_split_the_first_line_counts_and_none_beyond_the_run(tmp_path):
    one, two = make_run(tmp_path / "one", "exp_001"), make_run(tmp_path / "two", "exp_001")
    again = [{"step": 5, "split": "train", "loss": 99.0, "padding_share": 0.75}, eval_record(10, 1.0)]
    beyond = [{"step": 10**6, "split": "train", "loss": 1.0, "padding_share": 1.0, "tokens_seen": 10**9}]
    with (one / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in (*again, *beyond))
        file.write('{"step": 5, "split": "other"}\n')
    comparison = compared(one, two)
    said(comparison, "one: 2 line(s) of metrics.jsonl repeat an update and split, and are ignored")
    said(comparison, "one: 1 line(s) of metrics.jsonl are of updates beyond the 20 of the run and ignored")
    said(comparison, "one: 1 damaged line(s) of metrics.jsonl are ignored")
    run, same = comparison.runs
    assert (run.train, run.validation, run.test) == (same.train, same.validation, same.test)
    assert performance(run) == performance(same)
    assert (run.updates, run.state) == (20, "finished")
    going = make_run(tmp_path / "going", "exp_001", "training.max_steps=null", "training.epochs=2", upto=12)
    assert not reread(going, two)[0].damage, "how many updates it will have is not known"


def test_tokens_between_recorded_updates(tmp_path):
    one = make_run(tmp_path / "one", "exp_001", every=4)
    with (one / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(eval_record(step, 3.0)) + "\n" for step in (10, 30))
    (run, _) = reread(one, make_run(tmp_path / "two", "exp_001"))
    found = curve(run, run.validation, "loss")
    assert found.x == {"updates": [0, 10, 20], "examples": [0, 320, 640], "tokens": [0, 10_000, 20_000]}
    assert found.rows == [28, 28, 28]


def test_tokens_are_looked_up_once_for_each_point(tmp_path):
    """How often the recorded updates are walked through does not grow with the points of the curve."""

    class Counted(dict):
        walks = 0

        def items(self):
            Counted.walks += 1
            return super().items()

    (run, _) = reread(make_run(tmp_path / "one", "exp_001"), make_run(tmp_path / "two", "exp_001"))
    counted = dataclasses.replace(run, train=Counted(run.train))
    assert len(curve(counted, counted.train, "loss").y) == 20
    assert Counted.walks <= 3


FEW, ALL = evaluated(limit=8, value=12.5, rows=8), evaluated(value=41.25, rows=31)


def cells_of(comparison, title):
    """The lines of the one table of this title, by their first cell."""
    (table,) = [
        table for table in (*main_tables(comparison), *evaluation_tables(comparison.runs)) if table.title == title
    ]
    return {row[0]: dict(zip(table.head[1:], row[1:], strict=True)) for row in table.rows}


def test_figures_of_some_rows_stand_apart_from_those_of_all(tmp_path, capsys):
    few, whole = make_run(tmp_path / "few", "exp_001", evaluation=FEW), make_run(tmp_path / "whole", "exp_002")
    (whole / "evaluation.json").write_text(json.dumps(ALL))
    comparison = compared(few, whole)
    ranked = cells_of(comparison, "answer perplexity")
    assert ranked["few"]["test, fine-tuned"] == "40.45", "that of the summary, of all rows"
    assert ranked["few"]["test, baseline"] == "-"
    assert ranked["whole"]["test, fine-tuned"] == "41.25 (38.50 to 44)"
    assert ranked["few"]["rows of validation and test"] == ranked["whole"]["rows of validation and test"] == "28 and 31"
    apart = cells_of(comparison, "answer perplexity on a part of the rows")
    assert apart == {
        "few": {
            "split": "test, at update 20",
            "rows": "8, chosen by seed 0",
            "baseline": "143",
            "fine-tuned": "12.50 (38.50 to 44)",
        }
    }
    titles = {table.title: table.head for table in evaluation_tables(comparison.runs)}
    assert titles["evaluation: loss"] == ("metric", "whole")
    assert titles["evaluation: loss, on 8 rows of each split, chosen by seed 0"] == ("metric", "few")
    said(comparison, "evaluated on a part of the rows", "few: 8 rows", "whole: all rows")
    assert "12.5" not in plots(comparison.runs)[-1][0].svg
    assert main(["compare", str(few), str(whole), "--json", "--out", str(tmp_path / "p.html")]) == 0
    found = [run["answer_perplexity"] for run in json.loads(capsys.readouterr().out)["runs"]]
    assert [perplexity["test"]["value"] for perplexity in found] == [40.4473, 41.25]
    assert [perplexity["test_rows"] for perplexity in found] == [31, 31]
    assert [[(part["tuned"]["value"], part["rows"]) for part in p["on_some_rows"]] for p in found] == [[(12.5, 8)], []]


def test_an_evaluation_of_another_update_does_not_rank_the_run(tmp_path):
    other = make_run(tmp_path / "other", "exp_001", evaluation=evaluated(step=10, value=12.5, rows=31))
    comparison = compared(other, make_run(tmp_path / "same", "exp_001"))
    assert cells_of(comparison, "answer perplexity")["other"]["test, fine-tuned"] == "40.45"
    assert cells_of(comparison, "answer perplexity on a part of the rows")["other"]["split"] == "test, at update 10"


def test_validation_rows_of_an_unfinished_run_stand_apart(tmp_path):
    going = make_run(tmp_path / "going", "exp_001", upto=12)
    text = (going / "metrics.jsonl").read_text().splitlines()
    text = [line if '"step": 10, "split": "eval"' not in line else json.dumps(eval_record(10, 3.0, 8)) for line in text]
    (going / "metrics.jsonl").write_text("\n".join(text) + "\n")
    comparison = compared(going, make_run(tmp_path / "done", "exp_001"))
    assert cells_of(comparison, "answer perplexity")["going"]["validation, fine-tuned"] == "-"
    apart = cells_of(comparison, "answer perplexity on a part of the rows")["going"]
    assert (apart["split"], apart["rows"], apart["fine-tuned"]) == ("validation, at update 10", "8", "33.12")
    titles = [plot.title for row in plots(comparison.runs) for plot in row]
    assert sum("hollow" in title for title in titles) == 3
    done = reread(going, tmp_path / "done")[1]
    assert curve(done, done.validation, "loss").on_the_usual_rows() == [True, True, True]


def with_fixed_rows(run: Path, of_both_kinds: bool) -> Path:
    """The run with 8 fixed rows in its validation: at every point, and all rows apart; or between the ends alone."""
    lines = []
    for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        step, ends = record["step"], record["split"] == "eval" and record["step"] in (0, 20)
        if record["split"] == "eval" and (of_both_kinds or not ends):
            lines.append(eval_record(step, record["loss"] + 0.1, 8))
        else:
            lines.append(record)
        if ends and of_both_kinds:
            lines.append({**record, "split": "eval_full"})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_all_validation_rows_are_apart_from_the_fixed_ones(tmp_path):
    """Runs of version 0.1 measured all rows before and after, and the fixed ones between, under one name."""
    new = with_fixed_rows(make_run(tmp_path / "new", "exp_001"), of_both_kinds=True)
    old = with_fixed_rows(make_run(tmp_path / "old", "exp_001"), of_both_kinds=False)
    comparison = compared(new, old)
    said(comparison, "old: validation during training is on a fixed subset of 8 of 28 rows")
    assert not comparison.runs[0].damage
    usual = [curve(run, run.validation, "loss").on_the_usual_rows() for run in comparison.runs]
    assert all(usual[0])
    assert not all(usual[1])
    cells = cells_of(comparison, "answer perplexity")
    assert cells["new"] == cells["old"]
    assert cells["new"]["rows of validation and test"].startswith("28")


def test_runs_that_measured_a_part_of_the_rows_are_not_ranked(tmp_path):
    """`evaluation.full_rows` changes no update; its results stand apart, until `medqa evaluate` measures all rows."""
    whole = make_run(tmp_path / "whole", "exp_001")
    some = make_run(tmp_path / "some", "exp_001", "evaluation.full_rows=5", "lora.r=4")
    both = make_run(tmp_path / "both", "exp_001", "evaluation.full_rows=5", evaluation=evaluated(rows=31))
    comparison = compared(whole, some, both)
    cells = cells_of(comparison, "answer perplexity")
    names = ("rows of validation and test", "validation, baseline", "validation, fine-tuned", "test, fine-tuned")
    assert [cells["some"][name] for name in names] == ["- and -", "-", "-", "-"]
    assert cells["both"]["rows of validation and test"] == "- and 31"
    assert cells["both"]["test, fine-tuned"].startswith("41.25")
    (apart,) = [table for table in main_tables(comparison) if table.title == "answer perplexity on a part of the rows"]
    assert len([row for row in apart.rows if row[0] == "some"]) == 2
    differ = {(pair.first.label, pair.second.label): pair.keys for pair in comparison.pairs}
    assert differ["whole", "some"] == ("lora.r",)


def test_other_seeds_and_other_data_are_other_rows(tmp_path):
    one = make_run(tmp_path / "one", "exp_001", evaluation=FEW)
    two = make_run(tmp_path / "two", "exp_001", evaluation={**FEW, "seed": 1})
    far = make_run(tmp_path / "far", "exp_001", evaluation=ALL, fingerprint="g")
    comparison = compared(one, two, far)
    heads = {table.title: table.head[1:] for table in evaluation_tables(comparison.runs)}
    for title, runs in heads.items():
        assert len(runs) == 1, title
    assert "evaluation: loss, on 8 rows of each split, chosen by seed 1, rows A" in heads
    assert "evaluation: loss, rows B" in heads
    ranked = cells_of(comparison, "answer perplexity")
    assert [ranked[run]["rows of validation and test"][-6:] for run in ("one", "two", "far")] == ["rows A"] * 2 + [
        "rows B"
    ]


def test_answers_to_some_of_the_test_rows_are_those_of_their_seed(tmp_path):
    """Without a limit 256 rows of test are answered, chosen by the seed; questions of our own are the same always."""
    runs = []
    for seed in (0, 1):
        found = evaluated(rows=300)
        found["seed"] = seed
        found["tasks"]["generation"]["rows"] = 256
        found["tasks"]["probes"] = {"rows": 256, "tuned": {"advises_care": {"value": 0.5}, "numbers": {"value": 0.25}}}
        runs.append(make_run(tmp_path / str(seed), "exp_001", evaluation=found))
    heads = {table.title: table.head[1:] for table in evaluation_tables(reread(*runs))}
    assert heads["evaluation: loss"] == heads["evaluation: probes"] == ("0", "1")
    for seed in ("0", "1"):
        for task in ("generation", "probes"):
            assert heads[f"evaluation: {task}, on 256 rows of test, chosen by seed {seed}"] == (seed,)


@pytest.mark.parametrize(
    "rows, p_value, verdict",
    [(1, None, TOO_FEW), (5, 0.0625, TOO_FEW), (5, 0.5, TOO_FEW), (6, 0.03125, "p = 0.031"), (6, 0.5, "p = 0.5")],
)
def test_a_handful_of_pairs_tells_nothing(rows, p_value, verdict, tmp_path):
    found = evaluated(limit=rows, rows=rows)
    difference = {"value": -0.25, "low": None, "high": None, "p_value": p_value}
    found["tasks"]["loss"]["test"]["difference"] = {"answer_loss": difference}
    runs = reread(make_run(tmp_path / "a", "exp_001", evaluation=found), make_run(tmp_path / "b", "exp_002"))
    lines = {row[0]: row[1] for table in evaluation_tables(runs) for row in table.rows}
    assert lines["test.difference.answer_loss"] == f"-0.2500, {verdict}"


def test_numbers_of_no_size_that_occurs_stop_nothing(tmp_path, capsys):
    one, two = make_run(tmp_path / "one", "exp_001"), make_run(tmp_path / "two", "exp_002")
    text = (one / "metrics.jsonl").read_text().replace('"update_s": 0.5', '"update_s": 5e-324')
    (one / "metrics.jsonl").write_text(text)
    assert main(["compare", str(one), str(two), "--json", "--out", str(tmp_path / "p.html")]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["runs"][0]["performance"]["examples_per_s"] is None


def test_only_regular_files_are_read(tmp_path):
    one, two = make_run(tmp_path / "one", "exp_001", evaluation=ALL), make_run(tmp_path / "two", "exp_002")
    for name in ("metrics.jsonl", "summary.json"):
        (one / name).unlink()
        os.mkfifo(one / name)
    for name in ("evaluation.json", "data_report.json"):
        (one / name).unlink()
        (one / name).symlink_to("/dev/zero")
    comparison = compared(one, two)
    for name in ("metrics.jsonl", "summary.json", "evaluation.json", "data_report.json"):
        said(comparison, f"one: {name} cannot be read and is ignored", "not a regular file")
    assert render(comparison)


def test_more_figures_than_an_evaluation_has_are_refused(tmp_path, monkeypatch):
    figure = {"value": 1.0}
    odd = {"step": 20, "limit": None, "tasks": {"loss": {str(i): figure for i in range(30)}}}
    one, two = make_run(tmp_path / "one", "exp_001", evaluation=odd), make_run(tmp_path / "two", "exp_002")
    assert len(evaluation_tables(compared(one, two).runs)[0].rows) == 30
    monkeypatch.setattr("medqa.commands.evaluation_table.MAX_FIGURES", 29)
    comparison = compared(one, two)
    said(comparison, "one: evaluation.json cannot be read and is ignored: more than 29 metrics")
    assert evaluation_tables(comparison.runs) == []


def refused(capsys, tmp_path, *words):
    before = sorted(tmp_path.rglob("*"))
    assert main(["compare", *map(str, words)]) == 2
    found = capsys.readouterr()
    assert not found.out
    assert sorted(tmp_path.rglob("*")) == before
    return found.err


def test_bad_input_is_refused_and_nothing_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, two = make_run(tmp_path / "one", "exp_001"), make_run(tmp_path / "two", "exp_002")
    assert "name two or more runs" in refused(capsys, tmp_path, one)
    assert "one/../one: given twice" in refused(capsys, tmp_path, one, two, "one/../one")
    (tmp_path / "empty").mkdir()
    message = refused(capsys, tmp_path, one, "none", "empty", one / "config.yaml")
    assert "none: no such directory" in message
    assert "empty: not a run (no config.yaml)" in message
    assert "config.yaml: no such directory" in message
    bad = shutil.copytree(two, tmp_path / "bad")
    (bad / "config.yaml").write_text("lora: {r: many, alpha: 3}\n")
    assert "lora.r = 'many'" in refused(capsys, tmp_path, one, bad)
    (bad / "config.yaml").write_bytes(b"\xff\xfe\x00")
    assert "config.yaml" in refused(capsys, tmp_path, one, bad)
    (tmp_path / "notes.html").write_text("<p>mine")
    assert "not a page of this command" in refused(capsys, tmp_path, one, two, "--out", "notes.html")
    assert (tmp_path / "notes.html").read_text() == "<p>mine"
    assert "no directory" in refused(capsys, tmp_path, one, two, "--out", "nowhere/p.html")
    assert "is not a regular file" in refused(capsys, tmp_path, one, two, "--out", "empty")
    with monkeypatch.context() as patched:
        patched.setattr(
            "medqa.commands.compare.show.compare_runs", lambda paths: pytest.fail("work before the refusal")
        )
        assert "cannot be written: File name too long" in refused(capsys, tmp_path, one, two, "--out", "x" * 300)
    (tmp_path / "link").symlink_to("/scratch/not/mounted")
    said = refused(capsys, tmp_path, one, two, "--out", "link/p.html")
    assert "link is a link to /scratch/not/mounted, which does not exist" in said


@pytest.mark.parametrize("name", ["page.html", "x" * 252])
def test_a_file_of_the_users_beside_the_page_stays(name, tmp_path, capsys):
    one, two = make_run(tmp_path / "one", "exp_001"), make_run(tmp_path / "two", "exp_002")
    mine = tmp_path / "page.html.tmp"
    mine.write_text("mine")
    assert main(["compare", str(one), str(two), "--out", str(tmp_path / name)]) == 0
    assert mine.read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two", "page.html.tmp", name}


def test_the_page_is_whole_or_absent(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, two = make_run(tmp_path / "one", "exp_001"), make_run(tmp_path / "two", "exp_002")
    mine = tmp_path / "notes.html"
    mine.write_text("<p>mine")
    assert main(["compare", str(one), str(two), "--force", "--out", "notes.html"]) == 0
    assert OWN_MARK in mine.read_bytes()
    before = mine.read_bytes()

    def full_disk(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    (two / "summary.json").unlink()
    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full_disk)
        assert "No space left" in refused(capsys, tmp_path, one, two, "--out", "notes.html")
    assert mine.read_bytes() == before
    assert main(["compare", str(one), str(two), "--out", "notes.html"]) == 0  # its own page needs no --force
    assert mine.read_bytes() != before
    shown = capsys.readouterr().out
    for text in ("unfinished: 20 of 20 updates", "several settings at once", "accelerate launch", "notes.html"):
        assert text in shown


def test_names_steer_no_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil = make_run(
        tmp_path / "\x1b[31mred\n[bold]x :smile: \u202e", "exp_001", evaluation=evaluated("\x1b]0;x\x07 fine")
    )
    same = [make_run(tmp_path / parent / "same", "exp_002") for parent in ("p", "q")]
    odd = Path(shutil.copytree(same[0], os.fsdecode(bytes(tmp_path) + b"/\xff")))
    assert main(["compare", str(evil), *map(str, same), str(odd)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert "[bold]x :smile:" in shown
    text = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "\x1b" not in text
    labels = [run.label for run in reread(*same)]
    assert labels == [str(path) for path in same]
    assert main(["compare", str(evil), *map(str, same), str(odd), "--json"]) == 0
    json.loads(capsys.readouterr().out)


def test_no_model_is_loaded():
    files = [ROOT / "medqa" / "recorded.py", *(ROOT / "medqa" / "commands" / "compare").glob("*.py")]
    assert len(files) >= 7
    heavy = ("torch", "transformers", "peft", "medqa.model", "medqa.training", "medqa.evaluation", "medqa.data")
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.startswith(heavy)], path.name


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)


@pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is installed")
@pytest.mark.parametrize("size", ["390,844", "1440,900"])
def test_a_browser_finds_every_run_plot_and_warning(size, three, tmp_path):
    comparison = compared(*three)
    (tmp_path / "page.html").write_text(render(comparison), encoding="utf-8")
    address = (tmp_path / "page.html").as_uri()
    start = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    start.append(f"--window-size={size}")
    done = subprocess.run([*start, "--dump-dom", address], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = Page(done.stdout)
    assert {run.label for run in comparison.runs} <= set(found.labels)
    assert found.titles == [plot.title for row in plots(comparison.runs) for plot in row]
    assert found.warnings == comparison.warnings
    picture = tmp_path / "page.png"
    done = subprocess.run([*start, f"--screenshot={picture}", address], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert picture.stat().st_size > 5_000  # a blank one is smaller


# ----------------------------------------------------------------------------------------------------
# Many runs: a sweep.


def make_trial(directory, validation, *sets, **words):
    """A run with this answer perplexity on validation."""
    run = make_run(directory, "exp_001", *sets, **words)
    values = {"answer_perplexity": validation, "answer_loss": math.log(validation)}
    if (run / "summary.json").exists():
        summary = json.loads((run / "summary.json").read_text())
        summary["final"].update(values)
        (run / "summary.json").write_text(json.dumps(summary))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = max(record["step"] for record in records if record["split"] == "eval")
    for record in records:
        if (record["split"], record["step"]) == ("eval", last):
            record.update(values)
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Trials of two settings, in the order of their names."""
    root = tmp_path_factory.mktemp("sweep")
    rates = {"b": 2e-3, "c": 3e-3, "d": 4e-3, "e": 5e-3, "f": 6e-3}
    values = {"b": 44.0, "c": 41.0, "d": 47.0, "e": 43.0, "f": 42.0}
    runs = [make_trial(root / "a", 30.0, upto=10)]
    for name, rate in rates.items():
        more = {"evaluation": evaluated(value=values[name] + 1)} if name == "c" else {}
        runs.append(make_trial(root / name, values[name], f"optimizer.learning_rate={rate}", "lora.r=4", **more))
    runs.append(make_trial(root / "g", 20.0, "evaluation.full_rows=3"))
    return runs


def test_many_trials_are_ranked_and_not_paired(sweep, tmp_path, capsys):
    comparison = compared(*sweep)
    tables = main_tables(comparison)
    assert [row[0] for row in tables[0].rows] == ["c", "f", "e", "b", "d", "a", "g"]
    assert [run.label for run in comparison.runs] == ["c", "f", "e", "b", "d", "a", "g"]
    head, first = tables[0].head, tables[0].rows[0]
    assert dict(zip(head, first, strict=True)) == {
        "run": "c",
        "state": "finished",
        "validation, fine-tuned": "41",
        "settings that differ": "lora.r=4, optimizer.learning_rate=0.003",
        "test, baseline": "143",
        "test, fine-tuned": "42 (38.50 to 44)",
        "rows of validation and test": "28 and 31",
    }
    assert "sorted by validation; the first of 7 is chosen by these rows" in tables[0].note
    assert not [table.title for table in tables if "pair" in table.title or "what differs" in table.title]
    assert [(each.base.label, each.change) for each in comparison.proposals] == [("c", {"training.seed": 43})]
    assert main(["compare", *map(str, sweep), "--out", str(tmp_path / "p.html")]) == 0
    told = capsys.readouterr().out
    assert "what each pair of runs shows" not in told
    assert "the other metrics of the evaluations are on the page" in told
    assert "evaluation: generation" in Page((tmp_path / "p.html").read_text()).text
    assert "f, e, b, d, a, g: no interval of the perplexity and no sample answers; run python -m medqa" in told
    assert " and 1 more differ in several settings at once, 2 in all: " in told
    assert main(["compare", *map(str, sweep), "--out", str(tmp_path / "p.html"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["run"] for run in found["runs"]] == ["c", "f", "e", "b", "d", "a", "g"]
    assert found["pairs"] == []


def test_trials_over_other_tokens_are_not_ranked_among_the_rest(sweep, tmp_path):
    other = make_trial(tmp_path / "other", 10.0, "tokenization.max_length=100")
    unknown = make_trial(tmp_path / "rows", 11.0, fingerprint="g")
    chat = make_trial(tmp_path / "chat", 9.0, "tokenization.prompt=chat")
    labels = [run.label for run in compared(*sweep, other, unknown, chat).runs]
    assert labels == ["c", "f", "e", "b", "d", "a", "g", "other", "rows", "chat"]
    assert compared(other, *sweep).runs[0].label == "other"


def test_up_to_six_runs_are_compared_in_pairs(sweep):
    tables = main_tables(compared(*sweep[:6]))
    (pairs_table,) = [table for table in tables if table.title == "what each pair of runs shows"]
    assert len(pairs_table.rows) == 15
    assert [row[0] for row in tables[0].rows] == ["a", "b", "c", "d", "e", "f"], "in the given order"


def test_the_baseline_in_its_own_template_is_shown_where_it_is_better(tmp_path):
    one, two = evaluated(rows=31), evaluated(rows=31)
    for found, value in ((one, 99.5), (two, 150.0)):
        found["tasks"]["loss"]["test"]["own_template"] = {"answer_perplexity": {"value": value}}
        found["tasks"]["generation"]["samples"][0]["own_template"] = "Its own words."
    runs = [
        make_run(tmp_path / "one", "exp_001", evaluation=one),
        make_run(tmp_path / "two", "exp_002", evaluation=two),
    ]
    comparison = compared(*runs)
    column = main_tables(comparison)[0].head.index("test, baseline")
    cells = [row[column] for row in main_tables(comparison)[0].rows]
    assert cells == ["99.50, in its own chat template", "143"]
    (sample,) = samples(comparison.runs)
    assert sample["answers"][:2] == [("baseline", "?"), ("baseline in its own chat template", "Its own words.")]
    assert len(sample["answers"]) == 4
