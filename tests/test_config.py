"""From YAML, options and `--set` words to an experiment, or to one message with every problem."""

import os
import re
from pathlib import Path

import pytest
import yaml as pyyaml
from ruamel.yaml import YAML

from medqa.config import Experiment, flat, may_change_on_resume
from medqa.config_file import (
    OTHER_TOOLS_NAMES,
    UNLIKE,
    default_output_dir,
    dump_yaml,
    load_experiment,
    load_yaml,
    parse_sets,
    read_yaml,
    short,
)
from medqa.errors import UserError
from medqa.options import parse_options
from medqa.tiny import BASE_DIR, MEDQUAD_CSV
from medqa.training.run_dir import write_config


def loaded(*sets: str, exp: str = "exp_001", **more) -> dict:
    return flat(load_experiment(exp, sets=sets, **more))


def refusal(*sets: str, exp: str = "exp_001", **more) -> str:
    with pytest.raises(UserError) as caught:
        load_experiment(exp, sets=sets, **more)
    return str(caught.value)


# --- YAML


@pytest.mark.parametrize(
    "text, value",
    [
        ("5e-5", 5e-5),
        ("1e-4", 1e-4),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("-3", -3),
        ("+3", 3),
        ("0x1F", 31),
        ("0o17", 15),
        ("010", 10),
        ("no", "no"),
        ("yes", "yes"),
        ("off", "off"),
        ("on", "on"),
        ("y", "y"),
        ("true", True),
        ("False", False),
        ("tRue", "tRue"),
        ("null", None),
        ("~", None),
        ("", None),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("0b11", "0b11"),
        ("e5", "e5"),
        ('"5"', "5"),
        (".inf", float("inf")),
        ("[PAD]", ["PAD"]),
        ("[0.8, 1e-1, 0]", [0.8, 0.1, 0]),
    ],
)
def test_scalars_by_the_core_schema(text, value):
    found = load_yaml(text, "here")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "text",
    ["a: 1\na: 2", "a: [1", "a: b: c", "\ta: 1", "- a\nb: 1", "!!bool maybe", "!!int ''", "!!python/object:os.system x",
     "*x", "%YAML 1.3\n--- a", "{{a: 1}: 2}", "\x00", "9" * 5000],
)  # fmt: skip
def test_what_is_no_yaml_is_refused_with_its_place(text):
    with pytest.raises(UserError, match=r"^here(, line \d+)?: not valid YAML: ."):
        load_yaml(text, "here")


@pytest.mark.parametrize(
    "text, said",
    [
        ("a:\n\tb: 1\n", "here, line 2: not valid YAML: a tab where YAML allows only spaces; use spaces"),
        ("m:\n  a: 1\n  b: 2\n  a: 3", "line 4: not valid YAML: the key a is repeated (lines 2 and 4); keep one"),
        ("m: {r: 1}\nm: {r: 2}", "here, line 2: not valid YAML: the key m is repeated (lines 1 and 2); keep one"),
        ("- b: 1\n- {a: 1, a: 2}", "here, line 2: not valid YAML: the key a is repeated; keep one"),
        ("a: 1\n---\nb: 2", "here, line 2: the text holds more than one YAML document; keep one"),
        ("%YAML 1.3\n--- a", "the %YAML line names a version other than 1.1 and 1.2; remove the line"),
        ("a: @x", "here, line 1: not valid YAML: a value cannot begin with @; put it in quotes"),
        ("a: 'x", "here, line 1: not valid YAML: a quote is opened and not closed; close it"),
        ("a: *b", "*b is an alias, but there is no &b; put a word that begins with * in quotes"),
    ],
)  # fmt: skip
def test_what_is_no_yaml_is_said_in_plain_words_with_what_to_do(text, said):
    with pytest.raises(UserError) as caught:
        load_yaml(text, "here")
    assert str(caught.value).startswith("here")
    assert str(caught.value).endswith(said)


@pytest.mark.parametrize(
    "word, wanted",
    [
        ("optimizer.betas=[0.9]", "expected a list of exactly 2 values, found 1"),
        ("optimizer.betas=[0.9, 0.9, 0.9]", "expected a list of exactly 2 values, found 3"),
        ("data.fractions=[]", "expected a list of exactly 3 values, found 0"),
        ("lora.target_modules=[]", "expected a list of at least 1 value, found 0"),
        (f"tracking.tags=[{'x, ' * 10_001}]", "expected a list of at most 10,000 values, found 10,001"),
    ],
)
def test_how_many_values_a_list_takes_is_said(word, wanted):
    assert refusal(word).endswith(f": {wanted}")


def bomb(levels: int) -> str:
    """Lists of ten aliases each, so many levels deep: as many values as ten to that power."""
    text = "&a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]"
    for level in range(1, levels):
        text = f"&a{level} [{text}{f', *a{level - 1}' * 9}]"
    return text


@pytest.mark.parametrize(
    "text, problem",
    [
        (bomb(8), "expands to more than 2,000,000 bytes"),
        (f"[&a {'x' * 300_000}{', *a' * 9}]", "expands to more than 2,000,000 bytes"),
        ("x" * 2_000_001, "longer than 2,000,000 bytes"),
        (f"[{'1, ' * 20_000}]", "expands to more than 2,000,000 bytes"),
        ("[" * 20_000 + "]" * 20_000, "nested too deeply"),
        ("- " * 1_000, "nested too deeply"),
        ("&a [*a]", "is inside the value that it repeats"),
        ("&a {b: {c: *a}}", "is inside the value that it repeats"),
        ("0x1" + "f" * 5_000, "has 5,003 characters"),
        ("!!int 0x1" + "f" * 5_000, "has 5,003 characters"),
        ("1" * 5_000 + ".5", "has 5,002 characters"),
        ("{!!merge <<: {a: 1}, b: 2}", "the tag .*merge is not one of"),
        ("!!set {a, b}", "the tag .*set is not one of"),
    ],
)
def test_what_stands_for_too_much_is_refused_before_it_is_made(text, problem):
    with pytest.raises(UserError, match=rf"^here(, line 1)?: not valid YAML: .*{problem}") as caught:
        load_yaml(text, "here")
    assert len(str(caught.value)) < 500


def test_aliases_within_reason_are_read():
    assert load_yaml("{a: &x [1, &y two], b: *x, c: *y}", "here") == {"a": [1, "two"], "b": [1, "two"], "c": "two"}
    assert len(load_yaml(bomb(3), "here")[0][0]) == 10
    assert load_yaml("'" + "1" * 5_000 + "'", "here") == "1" * 5_000, "text, not a number"


@pytest.mark.parametrize("kind", ["pipe", "directory", "device", "nothing", "latin-1"])
def test_only_a_regular_file_of_text_is_read(kind, tmp_path):
    path = tmp_path / "mine.yaml"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "latin-1":
        path.write_bytes(b"caf\xe9: 1")
    with pytest.raises(UserError, match=re.escape(str(path))):
        read_yaml(path)


@pytest.mark.parametrize("value", [{"a": [1.5, None, True]}, "x" * 200, [["a"]], 10**18])
def test_a_short_value_is_shown_whole(value):
    assert short(value) == repr(value)


@pytest.mark.parametrize(
    "value", ["x" * 10_000, list(range(10_000)), {str(i): i for i in range(10_000)}, [["x" * 99]] * 99]
)
def test_a_long_value_is_cut(value):
    assert "..." in short(value)
    assert len(short(value)) <= 300


def test_a_dump_reads_alike_in_yaml_1_1_and_1_2(tmp_path):
    path = tmp_path / "config.yaml"
    value = {"a": {"no": "no", "yes": "on", "rate": 5e-5, "big": 1e16, "small": 1e-8, "null": None, "true": True}}
    value["a"] |= {"text": "1:30", "number": "5e-5", "underscore": "1_000", "date": "2024-01-01", "octal": "010"}
    value["a"] |= {"list": [0.8, 0.1], "words": ["null", "~", ""], "odd": "é: #\n\t'\"", "long": "x " * 200}
    value["a"] |= {"float": 600.0, "empty": [], "mapping": {}, "hex": "0x1F", "o": "0o17", "exp": "1e5", "inf": ".inf"}
    dump_yaml(value, path)
    text = path.read_text(encoding="utf-8")
    assert load_yaml(text, "here") == value
    assert pyyaml.safe_load(text) == value
    assert YAML(typ="safe", pure=True).load(text) == value


# --- order and parsing


def test_set_values_are_yaml_and_validated():
    values = loaded("optimizer.learning_rate=5e-5", "training.mixed_precision=no", "lora.r=4", "evaluation.rows=null")
    assert values["optimizer.learning_rate"] == 5e-5
    assert values["training.mixed_precision"] == "no"
    assert values["lora.r"] == 4
    assert values["evaluation.rows"] is None
    assert loaded("optimizer.max_grad_norm=2")["optimizer.max_grad_norm"] == 2
    assert loaded("tracking.run_name=a=b")["tracking.run_name"] == "a=b"
    assert loaded("data.medquad=None")["data.medquad"] == "none"


@pytest.mark.parametrize("word", ["[PAD]", '"[PAD]"', "'[PAD]'"])
def test_pad_token_as_a_shell_would_pass_it(word):
    assert loaded(f"tokenization.pad_token={word}")["tokenization.pad_token"] == "[PAD]"


def test_constant_is_none():
    assert loaded("scheduler.name=constant")["scheduler.name"] == "none"


def test_several_after_one_set_and_repeated():
    options = parse_options(
        ["--exp", "exp_001", "--set", "lora.r=4", "lora.lora_alpha=8", "--tiny", "--set", "lora.r=2"]
    )
    values = loaded(*options.set)
    assert (values["lora.r"], values["lora.lora_alpha"]) == (2, 8), "the last one counts"


def test_the_order_is_file_tiny_options_set(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("model: {base: from-file}\ntraining: {max_steps: 7, seed: 5}\ndata: {medquad: file.csv}\n")
    assert loaded(exp=str(file))["model.base"] == "from-file"
    tiny = loaded(exp=str(file), tiny=True)
    assert tiny["model.base"] == str(BASE_DIR)
    assert tiny["data.medquad"] == str(MEDQUAD_CSV)
    assert tiny["training.seed"] == 5, "what --tiny does not set stays the file's"
    locations = {"model.base": "from-option", "data.medquad": "option.csv", "data.afrimedqa": None}
    option = loaded(exp=str(file), tiny=True, locations=locations)
    assert (option["model.base"], option["data.medquad"]) == ("from-option", "option.csv")
    last = loaded("model.base=from-set", exp=str(file), tiny=True, locations=locations)
    assert (last["model.base"], last["data.medquad"]) == ("from-set", "option.csv")


def test_options_become_locations():
    options = parse_options(["--exp", "x", "--model", "m", "--medquad", "a", "--afrimedqa", "none"])
    given = {"model.base": "m", "data.medquad": "a", "data.afrimedqa": "none"}
    assert options.locations == {**given, "data.files": None}
    options = parse_options(["--exp", "x", "--data", "notes=a=b.csv", "--data", "more=c/d"])
    assert options.locations == dict.fromkeys(given) | {"data.files": {"notes": "a=b.csv", "more": "c/d"}}


def test_tiny_keeps_the_recipe():
    for name in ("exp_001", "exp_002", "exp_003"):
        full, tiny = loaded(exp=name), loaded(exp=name, tiny=True)
        changed = {key for key in full if full[key] != tiny[key]}
        assert changed <= {
            "model.base", "data.medquad", "data.afrimedqa", "optimizer.learning_rate", "scheduler.warmup_steps",
            "tokenization.max_length", "training.max_steps", "training.log_steps", "training.save_steps",
            "evaluation.steps", "model.dtype", "training.mixed_precision",
        }  # fmt: skip
        assert bool(full["scheduler.warmup_steps"]) == bool(tiny["scheduler.warmup_steps"])


def test_defaults_where_a_file_is_silent(tmp_path):
    file = tmp_path / "short.yaml"
    file.write_text("training: {max_steps: 3}\n")
    values = loaded(exp=str(file))
    assert [values[key] for key in ("training.log_steps", "evaluation.steps", "training.save_steps")] == [10, 100, 50]
    assert values["training.keep_checkpoints"] == 3


# --- problems


def test_all_problems_stand_in_one_message_with_file_key_value_and_suggestion(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "model: {bse: x, quantization: 8bit, dtype: float16}\n"
        "lora: 5\n"
        "optimiser: {lr: 1}\n"
        "optimizer: {learning_rate: fast, betas: [0.9]}\n"
        "training: {max_steps: 10, epochs: 3, global_batch_size: 1.5, mixed_precision: bf16}\n"
        "scheduler: {warmup_steps: 11}\n"
        "data: {fractions: [0.5, 0.2, 0.2]}\n"
    )
    message = refusal("lora.rank=3", "nonsense", "a.b=[", exp=str(file))
    lines = message.strip("\n").splitlines()
    assert all(line.startswith("  - ") for line in lines)

    def line(start: str) -> str:
        found = [line for line in lines if start in line]
        assert len(found) == 1, (start, message)
        return found[0]

    assert f"{file}: model.bse = 'x': no such key; did you mean model.base?" in line("bse")
    assert "one of 'none', '4bit' or 'auto'" in line("'8bit'")
    assert f"{file}: lora = 5" in line("lora = 5")
    assert "optimiser: no such section; did you mean optimizer?" in line("optimiser")
    assert "optimizer.learning_rate = 'fast': expected a number" in line("learning_rate")
    assert "expected a list of exactly 2 values" in line("optimizer.betas")
    assert "training.global_batch_size = 1.5" in line("global_batch_size")
    assert "set only one" in line("set only one")
    assert "warmup_steps = 11 is more than training.max_steps = 10" in line("warmup")
    assert "sum 1" in line("data.fractions")
    assert "not compatible" in line("mixed_precision")
    assert "--set: lora.rank = 3: no such key; did you mean lora.r?" in line("lora.rank")
    assert "--set nonsense: write section.key=value" in line("nonsense")
    assert "--set a.b=[, line 1: not valid YAML" in line("a.b")
    assert len(lines) == 14


@pytest.mark.parametrize(
    "word, said",
    [
        ("=5", "--set =5: write section.key=value"),
        ("==", "--set ==: write section.key=value"),
        (" =5", "--set  =5: write section.key=value"),
        ("lora=5", "--set lora=5: lora is a section; write lora.key=value"),
    ],
)
def test_a_word_without_a_key_is_named(word, said):
    assert refusal(word) == said


@pytest.mark.parametrize(
    "name, meant",
    [
        ("lr", "optimizer.learning_rate"),
        ("optim", "optimizer.name"),
        ("num_train_epochs", "training.epochs"),
        ("num_epochs", "training.epochs"),
        ("load_in_4bit", "model.quantization"),
        ("quantization_bit", "model.quantization"),
        ("cutoff_len", "tokenization.max_length"),
        ("sequence_len", "tokenization.max_length"),
        ("max_seq_length", "tokenization.max_length"),
        ("lr_scheduler_type", "scheduler.name"),
        ("warmup_ratio", "scheduler.warmup_steps"),
        ("per_device_train_batch_size", "training.per_device_batch_size"),
        ("micro_batch_size", "training.per_device_batch_size"),
        ("gradient_accumulation_steps", "training.global_batch_size"),
        ("bf16", "training.mixed_precision"),
        ("logging_steps", "training.log_steps"),
        ("save_total_limit", "training.keep_checkpoints"),
        ("eval_steps", "evaluation.steps"),
        ("model_name_or_path", "model.base"),
        ("base_model", "model.base"),
        ("torch_dtype", "model.dtype"),
        ("lora_rank", "lora.r"),
        ("lora_target", "lora.target_modules"),
        ("lora_target_modules", "lora.target_modules"),
        ("train_on_inputs", "tokenization.loss_on"),
        ("sample_packing", "training.padding_free"),
        ("report_to", "tracking.wandb"),
        ("gradient_checkpointing", "model.gradient_checkpointing"),
        ("max_grad_norm", "optimizer.max_grad_norm"),
        ("seed", "training.seed"),
        ("learning_rte", "optimizer.learning_rate"),
    ],
)
def test_other_tools_names_suggest_the_key(name, meant, tmp_path):
    if f"training.{name}" not in flat(Experiment()):
        assert f"{name} = 1: no such key; did you mean {meant}?" in refusal(f"training.{name}=1")
    assert f"did you mean {meant}?" in refusal(f"{name}=1")
    file = tmp_path / "flat.yaml"  # as those tools write it, without sections
    file.write_text(f"{name}: 1\ntraining: {{max_steps: 3}}\n")
    assert f"{file}: {name}: no such section; did you mean {meant}?" in refusal(exp=str(file))


def test_what_is_not_quite_the_same_is_said():
    assert "did you mean training.padding_free? (it removes padding without" in refusal("training.packing=true")
    told = refusal("training.gradient_accumulation_steps=8")
    assert "did you mean training.global_batch_size? (it is batch size x accumulation x GPUs)" in told
    assert set(UNLIKE) <= set(OTHER_TOOLS_NAMES)


def test_every_suggestion_is_a_key():
    assert len(OTHER_TOOLS_NAMES) >= 60
    assert set(OTHER_TOOLS_NAMES.values()) <= set(flat(Experiment()))


@pytest.mark.parametrize(
    "word",
    [
        "optimizer.learning_rate=true", "optimizer.learning_rate='1e-4'", "optimizer.learning_rate=-1",
        "optimizer.learning_rate=.inf", "optimizer.eps=.nan", "training.max_steps=0", "training.max_steps=2.0",
        "training.max_steps=yes", "model.gradient_checkpointing=yes", "model.gradient_checkpointing=1",
        "lora.target_modules=q_proj", "lora.target_modules=[]", "lora.target_modules=[1]", "lora.lora_dropout=1",
        "tokenization.max_length=7", "training.seed=-1", "training.seed=99999999999999999999", "data.medquad=null",
        "training.process_timeout_s=1e300", "tracking.tags=['']", "tracking.project=a/b", "model.base=''",
    ],
)  # fmt: skip
def test_wrong_values_are_refused_with_key_and_value(word):
    key, _, text = word.partition("=")
    message = refusal(word)
    assert message.startswith(f"--set: {key} = {load_yaml(text, '')!r}: ")
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    "key, text",
    [
        ("training.max_steps", "1" + "0" * 400), ("training.global_batch_size", "1" + "0" * 400),
        ("training.epochs", "1e400"), ("training.epochs", "1" + "0" * 400), ("lora.r", "100000000"),
        ("lora.r", "1" + "0" * 20), ("lora.lora_alpha", "1" + "0" * 400), ("optimizer.learning_rate", "1" + "0" * 400),
        ("optimizer.eps", "1e300"), ("training.save_minutes", "1e300"), ("tokenization.max_length", "1" + "0" * 30),
        ("data.medquad", "x" * 5_000), ("tracking.group", "x" * 5_000), ("tracking.run_name", f"[{'x, ' * 5_000}]"),
        ("data.files", "{" + ", ".join(f"n{i}: x" for i in range(2_001)) + "}"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["file", "--set"])
def test_a_value_beyond_every_bound_is_refused_with_file_key_and_the_value_cut(key, text, place, tmp_path):
    file = tmp_path / "mine.yaml"
    section, name = key.split(".")
    file.write_text(f"{section}: {{{name}: {text}}}\n" if place == "file" else "training: {max_steps: 3}\n")
    message = refusal(*([] if place == "file" else [f"{key}={text}"]), exp=str(file))
    ours = [line for line in message.splitlines() if key in line]
    assert len(ours) == 1, message
    assert f"{file if place == 'file' else '--set'}: {key} = " in ours[0]
    assert len(ours[0]) < 700


def test_every_number_of_an_experiment_has_an_upper_bound():
    numbers = [key for key, value in flat(Experiment()).items() if type(value) in (int, float)]
    numbers += ["training.max_steps", "training.epochs", "training.save_minutes", "training.micro_batch_tokens"]
    assert len(numbers) >= 24
    for key in numbers:
        assert f"--set: {key} = 1" in refusal(f"{key}=1{'0' * 400}"), key


def test_a_number_of_thousands_of_digits_is_refused_by_its_place(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(f"training:\n  max_steps: 0x1{'f' * 5_000}\n")
    assert f"{file}, line 2: not valid YAML: the number 0x1fffffffffffffffff... has" in refusal(exp=str(file))
    message = refusal(f"training.max_steps=0x1{'f' * 5_000}")
    assert message.startswith("--set training.max_steps=0x1fff")
    assert len(message) < 700


def test_an_alias_bomb_in_a_file_is_one_short_message(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(f"training: {{max_steps: 3}}\ntracking: {{group: {bomb(8)}}}\n")
    assert f"{file}, line 2: not valid YAML: expands to more than" in refusal(exp=str(file))


def test_of_many_problems_the_first_are_listed(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("".join(f"k{i}: 1\n" for i in range(500)))
    lines = refusal(exp=str(file)).strip("\n").splitlines()
    assert len(lines) == 41
    assert "and 461 more problems" in lines[-1]


@pytest.mark.parametrize(
    "words, told",
    [
        (["model.dtype=float16"], "not compatible"),
        (["training.mixed_precision=fp16"], "not compatible"),
        (["data.medquad=none", "data.afrimedqa=NONE"], "no data"),
        (["data.fractions=[1, 0, 0]"], "data.fractions"),
        (["training.max_steps=null"], "training.max_steps or training.epochs is missing"),
        (["scheduler.warmup_steps=909"], "scheduler.warmup_steps = 909 is more than training.max_steps = 908"),
        (["lora.target_modules=[q_proj, lm_head]", "tokenization.pad_token=[PAD]"], "remove lm_head"),
    ],
)
def test_impossible(words, told):
    assert told in refusal(*words)


# --- names and files of runs


@pytest.mark.parametrize(
    "sets, tiny, name",
    [
        ([], False, "exp_001"),
        ([], True, "exp_001-tiny"),
        (["optimizer.learning_rate=1e-4"], False, "exp_001,optimizer.learning_rate=1e-4"),
        (["optimizer.learning_rate=1e-4"], True, "exp_001-tiny,optimizer.learning_rate=1e-4"),
        (["optimizer.eps=1e-6", "lora.r=4"], False, "exp_001,lora.r=4,optimizer.eps=1e-6"),
        (["lora.r=4", "optimizer.eps=1e-6"], False, "exp_001,lora.r=4,optimizer.eps=1e-6"),
        (["tokenization.pad_token=[PAD]"], False, "exp_001,tokenization.pad_token=-PAD-"),
        (["lora.r=4", "lora.r=2"], False, "exp_001,lora.r=2"),
        (["training.max_steps=5", "training.save_steps=3", "tracking.wandb=disabled"], False, "exp_001"),
        (["training.max_steps=5", "scheduler.name=linear"],
         False,
         "exp_001,scheduler.name=linear,training.max_steps=5"),
    ],
)  # fmt: skip
def test_default_output_dir(sets, tiny, name):
    assert default_output_dir("exp_001", tiny, sets, load_experiment("exp_001", tiny=tiny, sets=sets)) == Path(
        "outputs", name
    )


def test_a_long_name_gets_a_hash_that_still_tells_runs_apart():
    names = []
    for r in (3, 4):
        sets = ["lora.target_modules=[q_proj, k_proj, v_proj, o_proj]", f"lora.r={r}", "optimizer.weight_decay=0.01"]
        assert len(",".join(sets)) > 80
        names.append(default_output_dir("exp_001", False, sets, load_experiment("exp_001", sets=sets)).name)
        assert names[-1] == default_output_dir("exp_001", False, sets[::-1], load_experiment("exp_001", sets=sets)).name
        assert re.fullmatch(r"exp_001,[0-9a-f]{16}", names[-1])
    assert names[0] != names[1]


def test_the_experiment_at_a_path_gives_its_own_name(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("training: {max_steps: 3}\n")
    assert default_output_dir(str(file), False, [], load_experiment(str(file))) == Path("outputs/mine")


@pytest.mark.parametrize("name", ["...yaml", "..yaml", "x" * 245 + ".yaml", "é" * 120 + ".yaml"])
def test_a_name_that_no_directory_can_have_is_refused(name, tmp_path):
    file = tmp_path / name
    file.write_text("training: {max_steps: 3}\n")
    with pytest.raises(
        UserError, match=r"--exp .*no directory can have this name; rename the file, or give --output-dir"
    ):
        default_output_dir(str(file), False, [], load_experiment(str(file)))


def test_what_may_change_on_resume():
    constant, cosine = load_experiment("exp_001"), load_experiment("exp_002")
    assert may_change_on_resume("training.max_steps", constant)
    assert not may_change_on_resume("training.max_steps", cosine)
    free = {key for key in flat(cosine) if may_change_on_resume(key, cosine)}
    assert {key for key in free if not key.startswith("tracking.")} == {
        "training.log_steps", "training.save_steps", "training.save_minutes", "training.keep_checkpoints",
        "training.process_timeout_s", "training.micro_batch_tokens", "evaluation.steps",
        "evaluation.rows", "evaluation.samples",
    }  # fmt: skip
    assert free >= {key for key in flat(cosine) if key.startswith("tracking.")}


@pytest.mark.parametrize("name", ["exp_001", "exp_002", "exp_003"])
def test_a_runs_config_is_an_experiment_file(name, tmp_path):
    experiment = load_experiment(name, tiny=True, sets=["lora.r=4"])
    write_config(tmp_path, experiment, 8, {"model.dtype": ("bfloat16", "float32", "on a CPU")})
    again = load_experiment(str(tmp_path / "config.yaml"))
    assert again == experiment
    written = pyyaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
    assert written["gradient_accumulation_steps"] == 8
    assert written["in_effect"] == {"model.dtype": {"asked": "bfloat16", "used": "float32", "reason": "on a CPU"}}
    assert written["optimizer"]["learning_rate"] == 1e-2
    assert written["training"]["mixed_precision"] == "no"


def test_parse_sets_reports_each_bad_word():
    overrides, problems = parse_sets(["a", "b.c=1", "d.e=["])
    assert list(overrides) == ["b.c"]
    assert len(problems) == 2
