"""`python -m medqa ask`: the training prompt, the answer of the samples, streamed; lines of JSON; bad input."""

import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from documents import TEXTS, blocks
from transformers import AutoTokenizer

from medqa.__main__ import main
from medqa.commands import ask
from medqa.commands.adapter import Adapted, find_adapter, load_adapted
from medqa.config import Data
from medqa.data.sources import load_sources
from medqa.data.tokens import prompt, prompt_ids, tokenize
from medqa.errors import UserError
from medqa.evaluation.answers import generate_answers
from medqa.terminal import printable
from medqa.tiny import AFRIMEDQA_CSV, BASE_DIR, MEDQUAD_CSV

QUESTIONS = ["What is (are) Asthma ?", "How to prevent Malaria ?", "What are the symptoms of Scabies ?"]
HARMLESS, RED = "What is (are) Asthma ?", "I took too many paracetamol tablets, what should I do?"


@pytest.fixture(scope="module")
def adapted(tiny_run) -> Adapted:
    return load_adapted(find_adapter(str(tiny_run)), torch.device("cpu"))


@pytest.fixture
def loaded(adapted, monkeypatch) -> Adapted:
    """Loaded once for all commands of this file; each still finds the adapter itself."""
    monkeypatch.setattr("medqa.commands.adapter.load_adapted", lambda source, device: adapted)
    return adapted


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def piped(monkeypatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


def test_the_prompt_is_trainings_id_for_id(adapted, monkeypatch):
    rows = [
        row
        for source in load_sources(Data(medquad=str(MEDQUAD_CSV), afrimedqa=str(AFRIMEDQA_CSV)))
        for row in source.rows
    ][::40]
    asked, generate = [], adapted.model.generate
    monkeypatch.setattr(
        adapted.model, "generate", lambda **words: asked.append(words["input_ids"]) or generate(**words)
    )
    examples = tokenize(rows, adapted.tokenizer, adapted.source.experiment.tokenization)
    assert len(examples) >= 5
    for example in examples:
        ask.answer(adapted, f" {example.row.question}\n", 1)
        assert asked[-1][0].tolist() == example.input_ids[: example.answer_start].tolist()


def test_the_answer_is_that_of_the_batch(adapted):
    expected = generate_answers(adapted.model, adapted.tokenizer, QUESTIONS, max_new_tokens=24, batch_size=3)
    for question, other in zip(QUESTIONS, expected, strict=True):
        found = ask.answer(adapted, question, 24)
        assert (found.text, found.stopped) == (other.text, other.stopped)


def test_what_streams_is_the_answer(adapted):
    pieces = []
    found = ask.answer(adapted, HARMLESS, 24, pieces.append)
    assert len(pieces) >= 2
    assert "".join(pieces).strip() == found.text
    assert 1 <= found.tokens <= 24


def test_the_base_is_without_the_adapter(adapted):
    tuned, base = (ask.answer(adapted, HARMLESS, 24, base=base) for base in (False, True))
    with adapted.model.disable_adapter():
        (expected,) = generate_answers(adapted.model, adapted.tokenizer, [HARMLESS], max_new_tokens=24, batch_size=1)
    assert base.text == expected.text
    assert tuned.text != base.text


def test_one_question_on_the_command_line(loaded, tiny_run, capsys):
    assert main(["ask", str(tiny_run), HARMLESS, "--cpu", "--max-new-tokens", "12"]) == 0
    told = capsys.readouterr()
    assert ask.answer(loaded, HARMLESS, 12).text in told.out
    assert "(cut off after 12 tokens)" in told.out
    assert "Not medical advice" in told.err


def test_red_flags_are_answered_with_advice_first(loaded, tiny_run, capsys):
    assert main(["ask", str(tiny_run), RED, "--cpu", "--max-new-tokens", "8"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(ask.ADVICE)
    assert told.index(ask.ADVICE) < told.index(ask.answer(loaded, RED, 8).text)
    assert main(["ask", str(tiny_run), HARMLESS, "--cpu", "--max-new-tokens", "8"]) == 0
    assert ask.ADVICE not in capsys.readouterr().out


def test_both_answers_side_by_side(loaded, tiny_run, capsys):
    assert main(["ask", str(tiny_run), HARMLESS, "--cpu", "--compare", "--max-new-tokens", "8"]) == 0
    told = capsys.readouterr().out
    for name, base in (("base", True), ("tuned", False)):
        assert f"{name}: {ask.answer(loaded, HARMLESS, 8, base=base).text}" in told


def test_the_base_is_asked_in_both_prompts(loaded, tiny_run, capsys, monkeypatch):
    """Otherwise a base that answers well in its own chat template would look worse than it is."""
    words = ["ask", str(tiny_run), HARMLESS, "--cpu", "--compare", "--max-new-tokens", "8"]
    assert main([*words, "--json"]) == 0
    (record,) = lines(capsys.readouterr().out)
    own = ask.Decoding(base_ids=ask.ids_for_base(loaded, "chat"))
    expected = ask.answer(loaded, HARMLESS, 8, base=True, how=own).text
    assert record["base_answer"] == ask.answer(loaded, HARMLESS, 8, base=True).text
    assert record["base_answer_own_template"] == expected != record["base_answer"]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert f"base, its own chat template: {expected}" in told
    assert told.index("base: ") < told.index("base, its own chat template: ") < told.index("tuned: ")
    assert main([*words, "--json", "--prompt", "instruction"]) == 0
    assert "base_answer_own_template" not in lines(capsys.readouterr().out)[0]
    monkeypatch.setattr(ask, "own_template_prompts", lambda base, questions, *_, **__: None)
    assert main([*words, "--json"]) == 0
    assert "base_answer_own_template" not in lines(capsys.readouterr().out)[0]


def test_a_template_that_fails_for_a_question_does_not_hide_the_other_answers(adapted, capsys):
    from medqa.terminal import make_console

    def fails(question: str) -> list[int]:
        raise UserError("it fails")

    how = ask.Decoding(own_template_ids=fails)
    record = ask.as_record(adapted, HARMLESS, 8, True, how)
    assert record["base_answer_own_template"] is None
    assert record["answer"] == ask.answer(adapted, HARMLESS, 8).text
    ask.show_answer(adapted, HARMLESS, 8, True, make_console(True), how)
    told = capsys.readouterr().out
    assert "base, its own chat template: (it fails)" in told
    assert f"tuned: {record['answer']}" in told


def test_side_by_side_on_a_terminal(adapted):
    from rich.console import Console

    page = io.StringIO()
    ask.show_answer(adapted, HARMLESS, 8, True, Console(file=page, force_terminal=True, width=200))
    told = page.getvalue()
    for base in (True, False):
        first = ask.answer(adapted, HARMLESS, 8, base=base).text.split()[0]
        assert first in told


def test_it_says_which_checkpoint_answers(tiny_run, tmp_path, capsys):
    shutil.copytree(tiny_run / "lora_adapters", tmp_path / "adapter")
    words = [HARMLESS, "--cpu", "--max-new-tokens", "1"]
    for where, more, said in (
        (tiny_run, [], f"{tiny_run}: the final adapter of update 6\n"),
        (tiny_run, ["--checkpoint", "4"], f"{tiny_run}: the checkpoint of update 4\n"),
        (tmp_path / "adapter", [], f"{tmp_path / 'adapter'}: an adapter without its run\n"),
    ):
        assert main(["ask", str(where), *words, *more]) == 0
        assert said in capsys.readouterr().err


def test_a_temperature_samples_and_a_penalty_counts(adapted):
    greedy = ask.answer(adapted, HARMLESS, 24)
    assert ask.answer(adapted, HARMLESS, 24, how=ask.Decoding(0.0, 1.0)) == greedy
    found = set()
    for seed in range(4):
        torch.manual_seed(seed)
        found.add(ask.answer(adapted, HARMLESS, 24, how=ask.Decoding(temperature=1.5)).text)
    assert len(found) == 4
    torch.manual_seed(0)
    assert ask.answer(adapted, HARMLESS, 24, how=ask.Decoding(temperature=1e-4)) == greedy
    penalized = ask.answer(adapted, HARMLESS, 24, how=ask.Decoding(repetition_penalty=1.8))
    ids = torch.tensor([prompt_ids(HARMLESS, adapted.tokenizer)])
    expected = adapted.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, repetition_penalty=1.8
    )
    ours = adapted.tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert penalized.text == printable(ours) != greedy.text


def test_any_token_may_be_sampled(adapted, monkeypatch):
    """The default limit of transformers (50 candidates) does not apply."""
    given = {}
    generate = adapted.model.generate
    monkeypatch.setattr(adapted.model, "generate", lambda **words: given.update(words) or generate(**words))
    ask.answer(adapted, HARMLESS, 2, how=ask.Decoding(temperature=0.7, repetition_penalty=1.1))
    assert (given["do_sample"], given["temperature"], given["top_k"]) == (True, 0.7, 0)
    assert given["repetition_penalty"] == 1.1


def test_the_base_can_be_asked_with_its_own_template(loaded, tiny_run, capsys, monkeypatch):
    asked, generate = [], loaded.model.generate
    monkeypatch.setattr(loaded.model, "generate", lambda **words: asked.append(words["input_ids"]) or generate(**words))
    words = ["ask", str(tiny_run), f" {HARMLESS} ", "--cpu", "--json", "--compare", "--max-new-tokens", "8"]
    assert main([*words, "--prompt", "chat"]) == 0
    (record,) = lines(capsys.readouterr().out)
    base = AutoTokenizer.from_pretrained(BASE_DIR)
    message = [{"role": "user", "content": HARMLESS}]
    own = base.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert [ids[0].tolist() for ids in asked] == [prompt_ids(HARMLESS, loaded.tokenizer), own]
    assert record["base_answer"] != ask.answer(loaded, HARMLESS, 8, base=True).text
    assert main([*words, "--prompt", "instruction"]) == 0
    (record,) = lines(capsys.readouterr().out)
    assert record["base_answer"] == ask.answer(loaded, HARMLESS, 8, base=True).text


def test_a_base_without_a_template_cannot_be_asked_with_it(adapted, monkeypatch):
    monkeypatch.setattr(ask, "own_template_prompts", lambda base, questions, *_, **__: None)
    with pytest.raises(UserError, match=r"--prompt chat: .*: it has no chat template; leave --prompt out"):
        ask.ids_for_base(adapted, "chat")
    assert ask.ids_for_base(adapted, "instruction") is None, "it is the prompt of training"


def test_a_template_that_cannot_be_used_is_named_without_what_an_evaluation_does_then(adapted, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(BASE_DIR, base, ignore=shutil.ignore_patterns("*.safetensors"))
    said = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**said, "chat_template": "{% for %}"}))
    experiment = adapted.source.experiment
    model = experiment.model.model_copy(update={"base": str(base)})
    source = replace(adapted.source, experiment=experiment.model_copy(update={"model": model}))
    with pytest.raises(UserError, match=r"its own chat template cannot be used: .*; leave --prompt out") as error:
        ask.ids_for_base(replace(adapted, source=source), "chat")
    assert "measured without it" not in str(error.value)


def test_json_of_one_question(loaded, tiny_run, capsys):
    assert main(["ask", str(tiny_run), RED, "--cpu", "--json", "--compare", "--max-new-tokens", "8"]) == 0
    (record,) = lines(capsys.readouterr().out)
    assert record["question"] == RED
    assert record["answer"] == ask.answer(loaded, RED, 8).text
    assert record["base_answer"] == ask.answer(loaded, RED, 8, base=True).text
    assert (record["stopped"], record["tokens"], record["step"]) == (False, 8, 6)
    assert record["red_flag"]
    assert record["advice"] == ask.ADVICE
    assert record["note"] == ask.NOT_ADVICE


def test_piped_questions_give_a_line_each(loaded, tiny_run, monkeypatch, capsys):
    too_long = "asthma " * 400
    piped(monkeypatch, f"\ufeff{QUESTIONS[0]}\n\n   \n{QUESTIONS[1]}\r\n{too_long}\n".encode() + b"\xff\xfe \x1b[2J?")
    assert main(["ask", str(tiny_run), "--cpu", "--max-new-tokens", "8"]) == 0
    found = lines(capsys.readouterr().out)
    assert [record["question"] for record in found][:2] == QUESTIONS[:2]
    assert len(found) == 4
    assert [record["answer"] for record in found[:2]] == [ask.answer(loaded, q, 8).text for q in QUESTIONS[:2]]
    assert "tokens, but the model's context is" in found[2]["error"]
    assert found[3]["question"] == "\ufffd\ufffd \x1b[2J?"
    assert found[3]["error"] == "the question is not UTF-8 text (byte 0xff after 0 characters); write it in UTF-8"
    assert "answer" not in found[3]


@pytest.mark.parametrize("words", [[], ["--compare"]])
def test_a_line_that_is_not_utf_8_is_refused_and_the_others_are_answered(words, loaded, tiny_run, monkeypatch, capsys):
    """With the bytes replaced it would be another question, and the answer to it would look like the answer to this."""
    piped(monkeypatch, "caf\u00e9 ?\n".encode("latin-1") + b"\xc3\n" + f"{HARMLESS}\n".encode())
    assert main(["ask", str(tiny_run), "--cpu", "--max-new-tokens", "4", *words]) == 0
    first, second, third = lines(capsys.readouterr().out)
    assert first["error"] == "the question is not UTF-8 text (byte 0xe9 after 3 characters); write it in UTF-8"
    assert "byte 0xc3 after 0 characters" in second["error"]
    assert third["answer"] == ask.answer(loaded, HARMLESS, 4).text


def test_a_question_at_the_terminal_that_is_not_utf_8_is_refused(adapted, monkeypatch, capsys):
    from medqa.terminal import make_console

    asked = iter(["caf\udce9 ?", ""])
    monkeypatch.setattr("builtins.input", lambda *_: next(asked))
    ask.conversation(adapted, 4, False, make_console(True))
    assert "error: the question is not UTF-8 text (byte 0xe9 after 3 characters)" in capsys.readouterr().out


def test_other_encodings_than_utf_8(loaded, tiny_run, monkeypatch):
    page = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(page, encoding="ascii"))
    assert main(["ask", str(tiny_run), "caf\udcff \u00e9?", "--cpu", "--json", "--max-new-tokens", "4"]) == 0
    found = json.loads(page.getvalue())
    assert found["question"] == "caf\ufffd \u00e9?"
    assert "not UTF-8 text (byte 0xff" in found["error"]


def test_nothing_piped_gives_nothing(loaded, tiny_run, monkeypatch, capsys):
    piped(monkeypatch, b"\n")
    assert main(["ask", str(tiny_run), "--cpu"]) == 0
    assert capsys.readouterr().out == ""


def test_question_after_question_each_alone(adapted, monkeypatch, capsys):
    from medqa.terminal import make_console

    asked = iter([QUESTIONS[0], QUESTIONS[1], "asthma " * 400, QUESTIONS[0], ""])
    monkeypatch.setattr("builtins.input", lambda *_: next(asked))
    ask.conversation(adapted, 8, False, make_console(True))
    told = capsys.readouterr().out
    assert told.startswith(ask.ALONE)
    first, second = (ask.answer(adapted, question, 8).text for question in QUESTIONS[:2])
    assert told.count(first) >= 2, "the same question gets the same answer, whatever came before"
    assert second in told
    assert "error: the question has" in told
    for end in (EOFError, KeyboardInterrupt):
        monkeypatch.setattr("builtins.input", lambda *_, end=end: (_ for _ in ()).throw(end))
        ask.conversation(adapted, 8, False, make_console(True))


def test_another_checkpoint_answers(tiny_run, capsys):
    for step in ("2", "best"):
        assert main(["ask", str(tiny_run), HARMLESS, "--cpu", "--json", "--checkpoint", step]) == 0
    steps = [record["step"] for record in lines(capsys.readouterr().out)]
    assert steps == [2, json.loads((tiny_run / "summary.json").read_text())["best_step"]]


def test_an_adapter_without_its_run_answers(tiny_run, tmp_path, capsys):
    shutil.copytree(tiny_run / "lora_adapters", tmp_path / "adapter")
    assert main(["ask", str(tmp_path / "adapter"), HARMLESS, "--cpu", "--json", "--max-new-tokens", "8"]) == 0
    (record,) = lines(capsys.readouterr().out)
    assert record["adapter"] == str(tmp_path / "adapter")
    assert record["answer"]


@pytest.mark.parametrize(
    "words, said",
    [
        ([""], "the question is empty"),
        (["  \n"], "the question is empty"),
        (["asthma " * 400], "the model's context is"),
        (["caf\udce9 ?"], "not UTF-8 text (byte 0xe9 after 3 characters); write it in UTF-8"),
        (["x", "--max-new-tokens", "0"], "--max-new-tokens 0: at least 1"),
        (["x", "--checkpoint", "3"], "no such checkpoint"),
        (["x", "--temperature", "-1"], "--temperature -1: expected a number of at least 0 (0 decodes greedily)"),
        (["x", "--temperature", "nan"], "--temperature nan: expected a number of at least 0 (0 decodes greedily)"),
        (["x", "--repetition-penalty", "0"], "--repetition-penalty 0: expected a number above 0 (1 is no penalty)"),
        (["x", "--prompt", "chat"], "add --compare"),
    ],
)
def test_what_is_refused(words, said, loaded, tiny_run, capsys):
    assert main(["ask", str(tiny_run), "--cpu", *words]) == 2
    assert said in capsys.readouterr().err


def test_no_run_and_no_adapter(tmp_path: Path, capsys):
    assert main(["ask", str(tmp_path), "x"]) == 2
    assert "neither a run's directory" in capsys.readouterr().err


def test_answers_command_no_terminal():
    assert printable("a\x1b[2Jb\x07\x9b31m\u202ec\n\td") == "a\\x1b[2Jb\\x07\\x9b31m\\u202ec\n\td"


def test_a_question_that_is_too_long_is_named(adapted):
    with pytest.raises(
        UserError, match=r"the question has [\d,]+ tokens, but the model's context is [\d,]+; shorten it"
    ):
        ask.answer(adapted, "asthma " * 5000, 8)


def test_the_documented_code_asks_an_adapter_without_this_project(tiny_run, capsys):
    (code,) = (block for kind, block in blocks(TEXTS["docs/evaluation.md"]) if kind == "python")
    assert '"outputs/exp_002-tiny/lora_adapters"' in code
    assert "medqa" not in code
    exec(code.replace("outputs/exp_002-tiny", str(tiny_run)), {})
    said = capsys.readouterr().out
    assert prompt("What are the symptoms of Malaria ?") in said
    assert len(said) > len(prompt("What are the symptoms of Malaria ?")) + 20
