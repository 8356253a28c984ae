"""Data of one's own: what is read of it, its splits, its figures, and that none of its text leaves the machine."""

import csv
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
from accelerate.state import AcceleratorState
from pyarrow import parquet
from wandb_file import read_finished_run

from medqa.config import Data, Experiment, Model, flat
from medqa.config_file import default_output_dir, dump_yaml, load_experiment, load_yaml
from medqa.data.readers import Table
from medqa.data.sources import Row, is_hub_id, load_sources
from medqa.data.splits import SPLITS, overlap_report, split_rows, split_sources
from medqa.errors import UserError
from medqa.options import option_parser, parse_options, run_words
from medqa.tiny import BASE_DIR
from medqa.training.before_after import licence
from medqa.training.plan import by_source
from medqa.training.wandb import shown_config

NOTES = BASE_DIR.parent / "notes.csv"
FRACTIONS = (0.8, 0.1, 0.1)
TABLE = Table(("question", "answer", "answer_rationale"), [{"question": "Q", "answer": "A", "answer_rationale": "A"}])
CANARY = "zanzibarquokka"  # stands in every row of one's own


def own(**files: Path | str) -> Data:
    return Data(medquad="none", afrimedqa="none", files={name: str(place) for name, place in files.items()})


def rows_of(place: Path | str) -> list[Row]:
    (source,) = load_sources(own(notes=place))
    return list(source.rows)


def refusal(*words: str, exp: str = "exp_001", **more) -> str:
    with pytest.raises(UserError) as raised:
        load_experiment(exp, sets=list(words), **more)
    return str(raised.value)


# --- what is read


def test_every_format_gives_the_same_rows(tmp_path):
    columns = {"Question": ["Q0 ?", " Q1 ?", "", "Q3 ?"], "ANSWER": ["A0", "A1", "x", None]}
    columns |= {"group": ["1", " b ", "c", None], "Topic": ["Flu", None, "", ""], "more": ["x"] * 4}
    records = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    with (tmp_path / "n.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows(records)
    (tmp_path / "n.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    parquet.write_table(pa.table(columns), tmp_path / "n.parquet")
    for suffix in (".csv", ".jsonl", ".parquet"):
        (source,) = load_sources(own(notes=tmp_path / f"n{suffix}"))
        assert source.rows == (
            Row("notes:0", "notes", "Q0 ?", "A0", "Flu", "1"), Row("notes:1", "notes", "Q1 ?", "A1", None, "b")
        )  # fmt: skip
        assert (source.read, source.dropped) == (4, {"empty question": 1, "empty answer": 1})


def test_a_group_is_text_or_a_whole_number(tmp_path):
    groups = ["a-1", 7, 7.0, "7", -0.0, float("nan"), None, "", "NA", 10**30]
    lines = [json.dumps({"question": f"Q{n}", "answer": "A", "group": group}) for n, group in enumerate(groups)]
    (tmp_path / "n.jsonl").write_text("\n".join(lines))
    found = ["a-1", "7", "7", "7", "0", None, None, None, "NA", "1" + "0" * 30]
    assert [row.group for row in rows_of(tmp_path / "n.jsonl")] == found
    parquet.write_table(  # as pandas writes whole numbers of which one is missing
        pa.table({"question": ["a", "b"], "answer": ["x", "y"], "group": [3.0, None]}), tmp_path / "n.parquet"
    )
    assert [row.group for row in rows_of(tmp_path / "n.parquet")] == ["3", None]


@pytest.mark.parametrize("group", [1.5, True, ["a"], {"a": 1}, float("inf")])
def test_other_groups_are_refused_with_their_record(tmp_path, group):
    (tmp_path / "n.jsonl").write_text(json.dumps({"question": "Q", "answer": "A", "group": group}))
    with pytest.raises(UserError, match=r"n\.jsonl, record 0 .*column 'group': .* is neither text nor an integer"):
        rows_of(tmp_path / "n.jsonl")


GOOD = "question,answer\nQ ?,A.\n"
BROKEN = {
    "no answer.csv": (b"Question,reply,group\nx,y,z\n", "no column answer; columns found: Question, reply, group."),
    "empty.csv": (b"", "the file is empty"),
    "header.csv": (b"question,answer\n", "no usable row among 0 records"),
    "twice.csv": (b"question,answer,group,Group\nx,y,z,w\n", "two columns are named 'group'"),
    "quote.csv": (GOOD.encode() + b'Q ?,"A.\n', "broken CSV"),
    "half.jsonl": (b'{"question": "Q", "answer": "A\\ud800"}', "a lone surrogate"),
    "half group.jsonl": (b'{"question": "Q", "answer": "A", "group": "\\udfff"}', "a lone surrogate"),
    "nested.jsonl": (b'{"question": "Q", "answer": {"text": "A"}}', "{'text': 'A'} is not text"),
    "topics.jsonl": (b'{"question": "Q", "answer": "A", "topic": ["x"]}', "correct the record, or rename the column"),
    "table.xlsx": (b"PK", "unknown type of file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named(tmp_path, name):
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as raised:
        rows_of(tmp_path / name)
    assert name in str(raised.value)
    assert message in str(raised.value)


@pytest.mark.slow
def test_wrong_places_are_refused_together(tmp_path, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nothing listens there
    (tmp_path / "n.csv").mkdir()
    places = {"a": tmp_path / "no.csv", "b": tmp_path / "n.csv", "c": "kaggle:x/y", "d": "word", "e": "no/such"}
    with pytest.raises(UserError) as raised:
        load_sources(own(**places))
    for part in (
        "no.csv: no such file or directory; correct --data a, or give --data a=none", "is a directory; give --data b a",
        "kaggle:x/y: only MedQuAD is read from Kaggle; give --data c", "'word' is neither an existing path nor",
        "hub dataset no/such", "--data e=PATH, or --data e=none",
    ):  # fmt: skip
        assert part in str(raised.value)


def test_the_order_of_names_is_none_and_duplicates_go_over_all_sources(tmp_path):
    for name in ("b", "a", "m"):
        (tmp_path / f"{name}.csv").write_text(f"question,answer\nQ ?,A.\nof {name},A.\n")
    files = {"b": str(tmp_path / "b.csv"), "a": str(tmp_path / "a.csv")}
    for given in (files, dict(reversed(files.items()))):
        sources = load_sources(Data(medquad=str(tmp_path / "m.csv"), afrimedqa="none", files=given))
        assert [row.id for source in sources for row in source.rows] == ["medquad:0", "medquad:1", "a:1", "b:1"]
        assert [source.dropped for source in sources] == [{}, {"duplicate": 1}, {"duplicate": 1}]


# --- the split


def own_rows(source: str, groups: int, size: int, topic: bool = False) -> list[Row]:
    return [
        Row(
            f"{source}:{n}", source, f"{source} q{n}", f"{source} a{n}",
            f"T{n % 50}" if topic else None, f"{n // size}",
        )
        for n in range(groups * size)
    ]  # fmt: skip


def places(rows: list[Row], method: str, key) -> dict[object, set[str]]:
    """In which splits the rows of each key stand."""
    splits = split_rows(rows, method, 42, FRACTIONS)
    found: dict[object, set[str]] = {}
    for name in SPLITS:
        for row in getattr(splits, name):
            found.setdefault(key(row), set()).add(name)
    return found


@pytest.mark.parametrize("method", ["grouped", "topic"])
def test_a_group_stands_in_one_split(method):
    rows = own_rows("a", 100, 4) + own_rows("b", 100, 3)
    found = places(rows, method, lambda row: (row.source, row.group))
    assert all(len(where) == 1 for where in found.values())
    # Equal words of two sources are two groups: were they one, no word's rows would stand in two splits.
    assert any(len(where) > 1 for where in places(rows, method, lambda row: row.group).values())
    splits = split_rows(rows, method, 42, FRACTIONS)
    assert [len(getattr(splits, name)) for name in SPLITS] == [560, 70, 70]
    assert splits.groups["a:7"] == "a:4"
    assert {name: sum(row.source == "a" for row in getattr(splits, name)) for name in SPLITS}["test"] == 40


@pytest.mark.parametrize(("method", "column"), [("grouped", "group"), ("topic", "topic")])
def test_a_row_that_is_dropped_still_holds_together_what_it_belongs_to(method, column, tmp_path):
    """40 documents of 4 rows, the first row of each being the last of the one before: all hang together in pairs."""
    records = [(f"q{d} {n}", f"a{d} {n}", f"{column}{d}") for d in range(40) for n in range(4)]
    for d in range(1, 40, 2):
        records[4 * d] = (*records[4 * d - 1][:2], f"{column}{d}")
    (tmp_path / "n.csv").write_text(f"question,answer,{column}\n" + "".join(",".join(r) + "\n" for r in records))
    data = own(n=tmp_path / "n.csv").model_copy(update={"split": method})
    sources = load_sources(data)
    assert sources[0].dropped == {"duplicate": 20}
    splits = split_sources(sources, data)
    pairs: dict[int, set[str]] = {}
    for name in SPLITS:
        for row in getattr(splits, name):
            pairs.setdefault(int(getattr(row, column).removeprefix(column)) // 2, set()).add(name)
    assert len(pairs) == 20
    assert all(len(where) == 1 for where in pairs.values())


def test_at_random_a_group_does_not_count_and_the_report_says_so():
    rows = own_rows("a", 100, 4)
    assert overlap_report(split_rows(rows, "random", 42, FRACTIONS))["held_out"]["group"]["share"] > 0.5
    shared = overlap_report(split_rows(rows, "grouped", 42, FRACTIONS))["held_out"]["group"]
    assert shared == {"rows": 0, "of": 80, "share": 0.0}
    assert any(len(where) > 1 for where in places(rows, "random", lambda row: row.group).values())
    without = [Row(row.id, row.source, row.question, row.answer, None) for row in rows]
    assert (
        split_rows(rows, "random", 42, FRACTIONS).test[0].id == split_rows(without, "random", 42, FRACTIONS).test[0].id
    )


def test_topics_count_by_topic_alone_and_over_sources():
    rows = own_rows("a", 500, 1, topic=True) + own_rows("b", 500, 1, topic=True)
    assert any(len(where) > 1 for where in places(rows, "grouped", lambda row: row.topic).values())
    assert all(len(where) == 1 for where in places(rows, "topic", lambda row: row.topic).values())
    splits = split_rows(rows, "topic", 42, FRACTIONS)
    assert {splits.groups[row.id] for row in rows if row.topic == "T7"} == {"a:7"}


@pytest.mark.parametrize(("groups", "size"), [(10, 50), (12, 40), (30, 20)])
def test_a_few_large_groups_are_held_out_all_the_same(groups, size):
    found = places(own_rows("a", groups, size), "grouped", lambda row: row.group)
    assert all(len(where) == 1 for where in found.values())
    counts = [sum(where == {name} for where in found.values()) for name in SPLITS]
    assert counts[1] == counts[2] == max(1, round(groups / 10))


def test_groups_too_large_to_hold_out_are_refused():
    with pytest.raises(UserError, match=r"100 rows in 4 separable groups \(up to 25 rows stay together"):
        split_rows(own_rows("a", 4, 25), "grouped", 42, FRACTIONS)


# --- options and file


def test_names_are_refused_with_the_other_problems(tmp_path):
    file = tmp_path / "mine.yaml"
    names = "{medquad: a.csv, Rows: b.csv, a b: c.csv, é: d.csv, fine: e.csv}"
    file.write_text(f"data: {{files: {names}, splitt: topic}}\ntraining: {{max_steps: 3}}\n")
    message = refusal("lora.r=x", exp=str(file))
    assert "invalid name of a source: 'medquad', 'Rows', 'a b', 'é'; a name has up to 40 letters" in message
    assert "did you mean data.split?" in message
    assert "lora.r = 'x'" in message
    for text, said in (
        ("[a.csv]", "expected names with a file or a hub id each"), ("{a: null}", "names with a file or a hub id"),
        ("{1: a.csv}", "quote a name that is a number"), (f"{{{'x' * 41}: a.csv}}", "invalid name of a source"),
        ("{value: a.csv}", "invalid name of a source"), ("{a: ' '}", "no location"), ("null", "names with a file"),
    ):  # fmt: skip
        assert said in refusal(f"data.files={text}"), text


def test_data_is_laid_over_the_file_by_name(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("data: {files: {a: a.csv, b: b.csv}, split: topic}\ntraining: {max_steps: 100}\n")

    def files(*words: str, tiny: bool = False) -> dict[str, str]:
        options = parse_options(["--exp", str(file), *words])
        found = load_experiment(str(file), tiny=tiny, locations=options.locations, sets=options.set)
        return found.data.files

    assert files() == {"a": "a.csv", "b": "b.csv"}
    assert files("--data", "b=x.csv", "--data", "c=y=z.csv") == {"a": "a.csv", "b": "x.csv", "c": "y=z.csv"}
    assert files("--data", "b=None") == {"a": "a.csv"}
    assert files(tiny=True) == {}
    assert files("--data", "c=c.csv", tiny=True) == {"c": "c.csv"}
    assert files("--data", "c=c.csv", "--set", "data.files={d: d.csv}") == {"d": "d.csv"}
    assert "invalid name of a source: 'rows'" in refusal(exp=str(file), locations={"data.files": {"rows": "x.csv"}})


@pytest.mark.parametrize("word", ["notes", "=x.csv", "notes=", " = ", "https://me:S3CRET@x.org/n.csv"])
def test_a_malformed_word_is_refused(word, capsys):
    with pytest.raises(SystemExit) as raised:
        parse_options(["--exp", "exp_001", "--data", word])
    said = capsys.readouterr().err
    assert raised.value.code == 2
    assert "write NAME=SOURCE" in said
    assert "S3CRET" not in said


@pytest.mark.parametrize("word", ["n=https://me:S3CRET@x.org/n.csv", "https://me:S3CRET@x.org/n.csv?x=1"])
def test_a_password_in_an_address_is_not_repeated(word, capsys):
    from train import main

    assert (
        main(["--exp", "exp_001", "--tiny", "--cpu", "--medquad", "none", "--afrimedqa", "none", "--data", word]) == 2
    )
    said = capsys.readouterr().err
    assert "x.org/n.csv" in said
    assert "S3CRET" not in said


def test_control_characters_of_a_header_do_not_reach_the_terminal(tmp_path, capsys):
    from train import main

    (tmp_path / "n.csv").write_text("\x1b[31mquestion\x1b]0;x\x07,answer\nQ,A\n")
    words = ["--medquad", "none", "--afrimedqa", "none", "--data", f"n={tmp_path / 'n.csv'}"]
    assert main(["--exp", "exp_001", "--tiny", "--cpu", *words]) == 2
    said = capsys.readouterr().err
    assert "no column question" in said
    assert "\x1b" not in said
    assert "\\x1b[31mquestion" in said


def test_one_name_twice_is_refused():
    with pytest.raises(UserError, match="--data: a: given more than once"):
        parse_options(["--exp", "exp_001", "--data", "a=x.csv", "--data", "b=x.csv", "--data", "a=y.csv"])


def test_the_words_of_a_run_are_its_options_again():
    words = ["--exp", "exp_001", "--tiny", "--data", "a=x.csv", "--data", "b=y=z.csv", "--set", "lora.r=4"]
    assert run_words(option_parser().parse_args(words)) == words


def test_names_that_look_like_numbers_survive_the_file(tmp_path):
    files = dict.fromkeys(("1", "1e5", "0x1F", "true", "null", "-", "_a", "NaN"), "x.csv")
    dump_yaml(Experiment(data=own(**files)).model_dump(), tmp_path / "config.yaml")
    saved = load_yaml((tmp_path / "config.yaml").read_text(), "x")
    assert Data.model_validate(saved["data"]).files == files


def test_no_path_is_in_the_name_of_the_directory():
    sets = ["data.files={notes: /home/somebody/n.csv, more: x/y}"]
    assert str(default_output_dir("exp_001", False, sets, load_experiment("exp_001", sets=sets))) == (
        "outputs/exp_001,data.files=more+notes"
    )
    given = {"data.files": {"notes": "/home/somebody/n.csv"}}
    plain = load_experiment("exp_002", tiny=True, locations=given)
    assert default_output_dir("exp_002", True, [], plain).name == "exp_002-tiny,data.files=notes"
    places = (
        "x/y",
        "x/y:z",
        "x/y-v1.5:pqa_labeled",
        "x/y.csv",
        "x/y.json",
        "/x/y",
        "./y",
        "~/y",
        "y",
        "x/y/z",
        "a:b/c/d",
    )
    assert [is_hub_id(place) for place in places] == [True] * 3 + [False] * 8


def test_w_and_b_is_told_no_place_on_this_machine(tmp_path):
    (tmp_path / "base").mkdir()
    sets = [f"model.base={tmp_path}/base", "lora.init_from=/home/somebody/old", "data.medquad=/home/somebody/m.csv"]
    experiment = load_experiment("exp_001", sets=[*sets, "data.files={notes: /home/somebody/n.csv, more: x/y}"])
    shown = shown_config(experiment)
    assert not {"somebody", str(tmp_path)} & set(re.split(r"[/' ]", str(shown)))
    assert str(tmp_path) not in str(shown)
    assert (shown["model"]["base"], shown["lora"]["init_from"], shown["data"]["medquad"]) == ("base", "old", "m.csv")
    assert shown["data"]["afrimedqa"] == "intronhealth/afrimedqa_v2"
    assert shown_config(load_experiment("exp_001"))["model"]["base"] == "TinyLlama/TinyLlama-1.1B-Chat-v1.0"


def test_a_source_without_held_out_rows_is_named():
    rows = own_rows("notes", 4, 25) + [Row(f"medquad:{n}", "medquad", f"q{n}", f"a{n}", None) for n in range(400)]
    splits = split_rows(rows, "grouped", 42, FRACTIONS)
    examples = {name: [SimpleNamespace(row=row) for row in getattr(splits, name)] for name in SPLITS}
    of_notes = dict(
        line.split(": ", 1) for _, line in by_source(examples, Data(afrimedqa="none", files={"notes": "n"}))
    )
    assert of_notes["notes"].endswith("so its loss cannot be reported there")
    assert "cannot be reported" not in of_notes["medquad"]


def test_a_plan_names_so_many_sources_and_counts_the_others():
    names = [f"s{n}" for n in range(100)]
    rows = [row for name in names for row in own_rows(name, 20, 1)]
    splits = split_rows(rows, "grouped", 42, FRACTIONS)
    examples = {name: [SimpleNamespace(row=row) for row in getattr(splits, name)] for name in SPLITS}
    lines = by_source(examples, own(**dict.fromkeys(names, "n.csv")))
    assert [text for _, text in lines[:1] + lines[-1:]] == [
        "s0: train 16, validation 2, test 2", "and 60 more sources; data_report.json has them all",
    ]  # fmt: skip
    assert len(lines) == 41


@pytest.mark.parametrize("option", ["medquad", "afrimedqa", "data", "file"])
def test_a_configuration_is_named_like_any_place(option, tmp_path, monkeypatch):
    """On the command line and in the experiment file; in the run's directory's name, report and records on W&B."""
    asked = []
    monkeypatch.setattr("medqa.data.sources.read_hub", lambda location, *_: asked.append(location) or TABLE)
    words = {"medquad": "none", "afrimedqa": "none"} | (
        {option: "x/y:hard"} if option in ("medquad", "afrimedqa") else {}
    )
    command = ["--exp", "exp_001", *(word for name, place in words.items() for word in (f"--{name}", place))]
    if option == "data":
        command += ["--data", "n=x/y:hard"]
    if option == "file":
        (tmp_path / "mine.yaml").write_text("data: {files: {n: 'x/y:hard'}}\ntraining: {max_steps: 1}\n")
        command[1] = str(tmp_path / "mine.yaml")
    options = parse_options(command)
    experiment = load_experiment(options.exp, locations=options.locations)
    (source,) = load_sources(experiment.data)
    assert asked == [source.location] == ["x/y:hard"]
    assert "x/y:hard" in str(shown_config(experiment)["data"])
    dump_yaml(experiment.model_dump(), tmp_path / "config.yaml")
    saved = load_yaml((tmp_path / "config.yaml").read_text(), "x")
    assert Data.model_validate(saved["data"]) == experiment.data
    named = default_output_dir("exp_001", False, ["data.medquad=x/y:hard"], experiment)
    assert ":" not in named.name


def test_the_base_has_a_say_in_the_licence():
    alone = Data(afrimedqa="none")
    assert licence(alone, Model().base)[0] == licence(alone, str(BASE_DIR))[0] == "cc-by-4.0"
    assert licence(alone, "google/gemma-3-1b-it")[0] == "other"
    assert licence(Data(), "google/gemma-3-1b-it")[0] == "cc-by-nc-sa-4.0"


# --- runs


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory that says who one is, with one's rows in three formats, one of them in a repository and changed."""
    directory = tmp_path_factory.mktemp("home") / "somebodys-secret-place"
    directory.mkdir()
    with NOTES.open(newline="") as file:
        records = [
            {**record, "question": f"{CANARY} {record['question']}", "answer": f"{record['answer']} {CANARY}"}
            for record in csv.DictReader(file)
        ]

    def some(name: str) -> list[dict]:
        return [{**record, "question": f"{record['question']} {name}"} for record in records]

    git = ["git", "-C", str(directory), "-c", "user.name=x", "-c", "user.email=x@y"]
    (directory / "one.csv").write_text("question,answer,group\n")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    with (directory / "one.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(some("one"))
    (directory / "two.jsonl").write_text("\n".join(json.dumps(record) for record in some("two")))
    parquet.write_table(pa.Table.from_pylist(some("three")), directory / "three.parquet")
    return directory


def train_on(place: Path, run: Path, *words: str, sets: tuple[str, ...] = ()) -> list[str]:
    from train import main

    command = ["--exp", "exp_001", "--tiny", "--cpu", "--output-dir", str(run)]
    for name in ("one.csv", "two.jsonl", "three.parquet"):
        command += ["--data", f"{name.split('.')[0]}={place / name}"]
    command += [*words, "--set", "training.max_steps=1", "training.global_batch_size=4", "evaluation.samples=200"]
    command += ["model.quantization=none", *sets]
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)  # in the repository with rows that are not committed
        patch.setattr("sys.argv", ["train.py", *command])
        patch.setattr("medqa.evaluation.answers.SAMPLE_TOKENS", 2)
        for name, value in {"WANDB_MODE": "offline", "WANDB_SAVE_CODE": "true", "OMP_NUM_THREADS": "1"}.items():
            patch.setenv(name, value)
        assert main(command) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return command


@pytest.fixture(scope="module")
def beside(place, tmp_path_factory) -> Path:
    """A run beside the two datasets, which does not say whether samples are logged."""
    run = tmp_path_factory.mktemp("outputs") / "beside"
    train_on(place, run)
    return run


@pytest.fixture(scope="module")
def alone(place, tmp_path_factory) -> Path:
    """A run on data of one's own alone, whose samples are asked for."""
    run = tmp_path_factory.mktemp("outputs") / "alone"
    train_on(place, run, "--medquad", "none", "--afrimedqa", "none", sets=("tracking.log_samples=true",))
    return run


def holding(directory: Path, word: str) -> list[str]:
    """The files below a directory that have the word in their bytes."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert files
    return [str(path.relative_to(directory)) for path in files if word.encode() in path.read_bytes()]


def samples(run: Path) -> list[list]:
    (path,) = run.glob("wandb/offline-run-*/files/media/table/*.table.json")
    return json.loads(path.read_text())["data"]


def test_no_row_of_ones_own_leaves_the_machine_unasked(beside, place):
    assert {row[1] for row in samples(beside)} == {"medquad", "afrimedqa"}
    for folder in ("wandb", "lora_adapters"):
        assert holding(beside / folder, CANARY) == []
        assert holding(beside / folder, place.name) == []
    assert holding(beside, place.name), "the run itself knows where they are"


def test_nor_with_an_evaluation_or_an_export(alone, place, tmp_path):
    from medqa.__main__ import main

    run = tmp_path / "alone"
    shutil.copytree(alone, run, ignore=shutil.ignore_patterns("wandb"))  # there samples were asked for
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SAVE_CODE", "true")
        patch.setattr("medqa.commands.evaluate.ANSWER_TOKENS", 2)
        # Where the data were given again, the command line has their places.
        command = ["evaluate", str(run), "--cpu", "--tasks", "loss,generation", "--data", f"one={place / 'one.csv'}"]
        patch.setattr("sys.argv", ["medqa", *command])
        AcceleratorState._reset_state(reset_partial_state=True)
        assert main(command) == 0
        AcceleratorState._reset_state(reset_partial_state=True)
        assert main(["export", str(run), "--to", str(tmp_path / "export"), "--cpu"]) == 0
    found = json.loads((run / "evaluation.json").read_text())["tasks"]
    assert set(found["loss"]["test"]["sources"]) == {"one", "two", "three"}
    assert CANARY in (run / "evaluation.json").read_text(), "which stays here"
    assert CANARY in (run / "evaluation.jsonl").read_text(), "its samples were asked for"
    for folder in (run / "wandb", tmp_path / "export"):
        assert holding(folder, CANARY) == holding(folder, place.name) == []
    (path,) = run.glob("wandb/offline-run-*/*.wandb")
    assert any("/sources/two/" in name for name in read_finished_run(path).summary)
    card = (tmp_path / "export" / "README.md").read_text()
    assert "license: other" in card
    assert "`two`: data of one's own" in card


def test_samples_that_are_asked_for_are_logged(alone, place):
    assert {row[1] for row in samples(alone)} == {"one", "two", "three"}
    assert all(CANARY in row[2] for row in samples(alone))
    assert holding(alone / "lora_adapters", CANARY) == holding(alone / "wandb", place.name) == []
    assert not list(alone.rglob("*.patch"))


def test_figures_follow_by_source(beside, alone):
    for run, sources in ((alone, {"one", "two", "three"}), (beside, {"one", "two", "three", "medquad", "afrimedqa"})):
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [set(r["sources"]) for r in records if r["split"] in ("eval_full", "test")] == [sources] * 3
        assert all(set(r["sources"]) <= sources for r in records if r["split"] == "eval")  # the fixed rows alone
        assert sum(r["split"] == "eval" for r in records) == 2
        report = json.loads((run / "data_report.json").read_text())
        assert set(report["sources"]) == sources
        assert [report["sources"][name]["kept"] for name in ("one", "two", "three")] == [40] * 3
        assert all(report["splits"][split].keys() == {"rows", *sources} for split in SPLITS)
        with (run / "splits.csv").open() as file:
            lines = list(csv.DictReader(file))
        assert {line["id"].split(":")[0] for line in lines} == sources
        by_group: dict[str, set[str]] = {}
        for line in lines:
            by_group.setdefault(line["group"], set()).add(line["split"])
        assert all(len(found) == 1 for found in by_group.values())
        (path,) = run.glob("wandb/offline-run-*/*.wandb")
        logged = read_finished_run(path)
        assert {f"eval_full/{name}/answer_loss" for name in sources} <= logged.history[0].keys()
        assert {f"eval/{name}/answer_loss" for name in records[0]["sources"]} <= logged.history[0].keys()
        assert {f"test/{name}/answer_loss" for name in sources} <= logged.history[1].keys()
        assert logged.config["data"]["files"] == dict.fromkeys(["one", "two", "three"], "a local file")


def test_the_card_names_them_and_no_place(alone, beside):
    cards = [(run / "lora_adapters" / "README.md").read_text() for run in (alone, beside)]
    assert "license: other" in cards[0]
    assert "license: cc-by-nc-sa-4.0" in cards[1], "AfriMed-QA's stays"
    for card in cards:
        assert "- `one`: data of one's own" in card
    assert "MedQuAD" not in cards[0]
    assert "MedQuAD" in cards[1]


def test_a_run_goes_on_from_another_place_but_not_by_another_name(alone, place, tmp_path, capsys):
    from train import main

    run = tmp_path / "alone"
    shutil.copytree(alone, run)
    for path in ("one.csv", "two.jsonl", "three.parquet"):
        shutil.copy(place / path, tmp_path / path)

    def again(*names: str) -> tuple[int, str]:
        words = ["--exp", "exp_001", "--tiny", "--cpu", "--output-dir", str(run), "--medquad", "none"]
        words += ["--afrimedqa", "none"]
        for name, path in zip(names, ("one.csv", "two.jsonl", "three.parquet"), strict=True):
            words += ["--data", f"{name}={tmp_path / path}"]
        sets = ["training.max_steps=2", "training.global_batch_size=4", "model.quantization=none"]
        AcceleratorState._reset_state(reset_partial_state=True)
        code = main([*words, "--set", *sets, "tracking.wandb=disabled", "evaluation.samples=0"])
        said = capsys.readouterr()
        return code, said.out + said.err

    code, said = again("one", "two", "four")
    assert (code, "data.files: one, three, two there, four, one, two now" in said) == (2, True)
    before = (tmp_path / "one.csv").read_text()
    (tmp_path / "one.csv").write_text(before.replace("noon", "Noon"))
    code, said = again("one", "two", "three")
    assert (code, "was trained with other data" in said) == (2, True)
    (tmp_path / "one.csv").write_text(before)
    code, said = again("one", "two", "three")
    assert code == 0
    assert "resumed          after update 1" in said
    AcceleratorState._reset_state(reset_partial_state=True)


def test_runs_from_before_there_was_the_key_go_on(alone, tmp_path):
    from medqa.recorded import differences
    from medqa.training.run_dir import check_run_dir, finished

    experiment = load_experiment("exp_001", tiny=True)
    old = {key: value for key, value in flat(experiment).items() if key != "data.files"}
    assert differences(old, experiment) == []
    old_summary = json.loads((alone / "summary.json").read_text()) | {"updates": 40}
    del old_summary["length"]  # not in the summaries of the first versions either
    (tmp_path / "summary.json").write_text(json.dumps(old_summary))
    sections = experiment.model_dump()
    del sections["data"]["files"]
    dump_yaml(sections, tmp_path / "config.yaml")
    (tmp_path / "run.json").write_text("{}")
    check_run_dir(tmp_path, experiment, False)
    assert finished(tmp_path, experiment) is not None
    elsewhere = experiment.model_copy(update={"data": experiment.data.model_copy(update={"files": {"a": "a.csv"}})})
    assert finished(tmp_path, elsewhere) is None, "it is read from another place: it may be other data"
