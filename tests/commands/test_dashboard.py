"""`python -m medqa dashboard`: panels of all that runs log and of nothing else; a real wandb-workspaces saves them."""

import json
import re
import sys
from pathlib import Path

import pytest
from wandb_server import WandbServer

from medqa.__main__ import main
from medqa.commands import dashboard
from medqa.training.recorder import read_metrics
from medqa.training.wandb import GLOBAL_STEP, SAMPLES, wandb_names

COUNTERS = {"train/epoch", "train/examples_seen", "train/tokens_seen", GLOBAL_STEP}
IN_TESTS = {f"test/{name}" for name in ("loss", "perplexity")}  # beside those of the answer


@pytest.fixture
def server(monkeypatch, tmp_path):
    """W&B, as far as it is needed, with nothing of the user's own account."""
    import wandb

    server = WandbServer()
    for name in ("WANDB_PROJECT", "WANDB_ENTITY", "WANDB_MODE", "WANDB_SILENT", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.setenv(name, "x")  # so that they are put back
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    yield server
    wandb.teardown()


def spec(capsys, *words: str) -> dict:
    """What would be created."""
    assert main(["dashboard", "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def panels(found: dict) -> dict[str, list[dict]]:
    """Section to its panels."""
    return {part["name"]: part["panels"] for part in found["section"]["panelBankConfig"]["sections"]}


def test_panels_are_of_what_a_run_logs(capsys, tiny_run):
    found = panels(spec(capsys)["spec"])
    assert list(found) == ["Loss", "By source", "Speed and memory", "Samples"]
    shown = {name: {metric for panel in found[name] for metric in panel["config"].get("metrics", [])} for name in found}
    assert {"train/loss", "eval/loss", "eval/answer_loss", "train/learning_rate", "train/grad_norm"} <= shown["Loss"]
    assert {"eval/perplexity", "eval/answer_perplexity"} <= shown["Loss"]
    assert {name.split("/")[0] for name in shown["Speed and memory"]} == {"perf"}
    logged = {name for record in read_metrics(tiny_run / "metrics.jsonl") for name in wandb_names(record)}
    only_on_gpu = {"perf/peak_reserved_gb"}
    assert {"eval/medquad/answer_loss", "perf/save_seconds"} <= logged
    assert logged - set().union(*shown.values()) == COUNTERS | IN_TESTS
    assert set().union(*shown.values()) - logged <= only_on_gpu


def test_every_source_has_a_line_whatever_its_name(capsys):
    by_source = panels(spec(capsys)["spec"])["By source"]
    (pattern,) = [panel["config"]["metricRegex"] for panel in by_source if panel["config"].get("useMetricRegex")]
    record = {"step": 1, "split": "eval", "loss": 1.0, "answer_loss": 1.0, "sources": {"my notes": 1.0, "a/b": 2.0}}
    names = [name for name in wandb_names(record) if re.search(pattern, name)]
    assert names == ["eval/my notes/answer_loss", "eval/a/b/answer_loss"]


def test_all_is_drawn_against_the_update(capsys):
    found = spec(capsys)["spec"]["section"]
    parts = found["panelBankConfig"]["sections"]
    axes = {panel["config"]["xAxis"] for part in parts for panel in part["panels"] if "Line" in panel["viewType"]}
    assert axes | {part["localPanelSettings"]["xAxis"] for part in parts} | {found["settings"]["xAxis"]} == {
        GLOBAL_STEP
    }
    assert all(part["isOpen"] for part in parts)
    table = json.dumps(panels({"section": found})["Samples"])
    assert f'"val": "{SAMPLES}"' in table


def test_the_real_library_saves_it(server, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    assert main(["dashboard", "--name", "own"]) == 0
    assert main(["dashboard", "--entity", "team", "--project", "other"]) == 0
    lines = capsys.readouterr().out.splitlines()
    own, others = server.views
    assert [(v["entityName"], v["projectName"], v["displayName"]) for v in server.views] == [
        ("me", "mine", "own"),
        ("team", "other", dashboard.NAME),
    ]
    assert [line.split("?nw=")[0] for line in lines] == [
        f"{server.environment['WANDB_BASE_URL']}/me/mine",
        f"{server.environment['WANDB_BASE_URL']}/team/other",
    ]
    assert own["name"] == f"nw-{lines[0].split('?nw=')[1]}-v"
    assert own["type"] == "project-view"

    def unnamed(spec: dict) -> dict:
        return json.loads(re.sub(r'"__id__": "\w+"', '"__id__": ""', json.dumps(spec)))

    saved, shown = json.loads(others["spec"]), spec(capsys)
    assert unnamed(panels(saved)) == unnamed(panels(shown["spec"]))
    assert (shown["project"], shown["entity"], shown["name"]) == ("mine", None, dashboard.NAME)


@pytest.mark.parametrize("mode, said", [("forbid", "mine: permission denied; check"), ("deny", "mine: .*403.*; check")])
def test_a_refusal_is_the_users_to_mend(server, mode, said, capsys):
    server.mode = mode
    assert main(["dashboard", "--project", "mine"]) == 2
    message = capsys.readouterr().err
    assert re.search(said, message)
    assert "that your key may write to it; or use --project and --entity" in message
    assert len(message.splitlines()) == 1
    assert server.views == []


@pytest.mark.parametrize(
    "words, said",
    [
        ([], r"no API key: run `wandb login`.*with --json it is not needed"),
        (["--project", "a/b"], r"project 'a/b': string should match pattern"),
        (["--name", "\N{GRINNING FACE}"], "name .*: Emojis are not allowed"),
    ],
)
def test_what_is_refused_before_anything_is_sent(server, words, said, monkeypatch, capsys):
    monkeypatch.delenv("WANDB_API_KEY")
    assert main(["dashboard", *words]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_no_network_is_said(server, capsys):
    server.fail("refuse")
    assert main(["dashboard"]) == 2
    assert re.search("http://127.0.0.1:[0-9]+ does not answer; with --json it is not needed", capsys.readouterr().err)


def test_without_the_library(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.delitem(sys.modules, "wandb_workspaces.workspaces", raising=False)
    assert main(["dashboard", "--json"]) == 2
    assert re.search(r"pip install 'wandb-workspaces>=0\.4\.13,<0\.5'", capsys.readouterr().err)
    said = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert '"wandb-workspaces>=0.4.13,<0.5"' in said
