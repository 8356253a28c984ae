"""Greedy answers are the model's own, whatever they are batched with; how they are scored, by hand."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from medqa.data.sources import Row
from medqa.data.tokens import prompt_ids
from medqa.evaluation import answers as inference
from medqa.evaluation.answers import Answer, generate_answers, own_template_prompts, sample_answers
from medqa.evaluation.text import copied_answers, loops, score_generation
from medqa.model.base import load_tokenizer
from medqa.tiny import BASE_DIR
from tests.adapted import adapted_parts

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260k"
CONTEXT = 512  # of the embedded model
TOKENS = 24


@pytest.fixture(scope="module")
def parts(tiny):
    """Of a model that was hardly trained and would never end: it gets one more EOS, of half of its answers."""
    parts = adapted_parts(tiny)
    written = [step_by_step(parts, example.row.question)[0] for example in parts.examples["validation"][:14]]
    usual = sorted({token for ids in written for token in ids})
    often = min(usual, key=lambda token: abs(sum(token in ids[2:] for ids in written) - len(written) / 2))
    parts.adapted.get_base_model().generation_config.eos_token_id = [parts.tokenizer.eos_token_id, often]
    return parts


@pytest.fixture(scope="module")
def questions(parts) -> list[str]:
    """Of many lengths; the last ones' answers run into the end of the context, or have no room."""
    asked = [example.row.question for example in parts.examples["validation"][:14]]
    long = " ".join(example.row.question for example in parts.examples["train"][:30])
    for room in (TOKENS + 1, TOKENS - 1, 9, 1, 0):
        asked.append(with_room(parts.tokenizer, long, room))
    return asked


def with_room(tokenizer, text: str, room: int) -> str:
    """The text cut so that its prompt leaves this many tokens, or a few more."""
    words = text.split()
    while len(prompt_ids(" ".join(words), tokenizer)) > CONTEXT - room:
        words.pop()
    while len(prompt_ids(" ".join(words) + "x", tokenizer)) <= CONTEXT - room:
        words[-1] += "x"
    return " ".join(words)


def answers(parts, questions, batch_size: int, **options) -> list[Answer]:
    return generate_answers(
        parts.adapted, parts.tokenizer, questions, max_new_tokens=TOKENS, batch_size=batch_size, **options
    )


@pytest.fixture(scope="module")
def alone(parts, questions) -> list[Answer]:
    return answers(parts, questions, 1)


def step_by_step(parts, question: str) -> tuple[list[int], bool]:
    """Greedy ids without cache, padding or `generate`."""
    ids = prompt_ids(question, parts.tokenizer)
    start, ends = len(ids), parts.adapted.get_base_model().generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    with torch.no_grad():
        while len(ids) < min(start + TOKENS, CONTEXT):
            ids.append(parts.adapted(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
            if ids[-1] in ends:
                return ids[start:-1], True
    return ids[start:], False


def test_answers_are_what_the_model_finds_most_likely_step_by_step(parts, questions, alone):
    for question, answer in zip(questions, alone, strict=True):
        ids, stopped = step_by_step(parts, question)
        assert answer == Answer(parts.tokenizer.decode(ids, skip_special_tokens=True).strip(), stopped)
    assert {answer.stopped for answer in alone} == {True, False}
    assert len({answer.text for answer in alone}) > 10


@pytest.mark.parametrize("batch_size", [3, 16])
def test_a_batch_makes_no_difference(parts, questions, alone, batch_size):
    assert answers(parts, questions, batch_size) == alone
    assert answers(parts, questions[::-1], batch_size) == alone[::-1]


@pytest.mark.skipif(not STORIES.exists(), reason=f"no {STORIES}")
def test_a_batch_makes_no_difference_to_a_model_that_learnt_other_texts(tiny):
    parts = adapted_parts(tiny, f"model.base={STORIES}")
    questions = [example.row.question for example in parts.examples["validation"][:16]]
    assert answers(parts, questions, 16) == answers(parts, questions, 1)


def test_an_answer_ends_where_the_context_does(parts, questions, alone):
    lengths = [len(prompt_ids(question, parts.tokenizer)) for question in questions]
    assert min(lengths) < 60
    assert max(lengths) == CONTEXT
    assert alone[-1] == Answer("", False)
    assert not all(answer.stopped for answer in alone[-4:-1])
    for question, length in zip(questions[-4:-1], lengths[-4:-1], strict=True):
        assert len(step_by_step(parts, question)[0]) <= CONTEXT - length < TOKENS


def test_progress_is_told_of_each_question_once(parts, questions):
    told = []
    answers(parts, questions, 8, progress=told.append)
    assert sum(told) == len(questions)
    assert all(count >= 0 for count in told)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), MemoryError()], ids=repr)
def test_without_memory_a_batch_is_halved(error, parts, questions, alone, monkeypatch):
    real = inference._continue

    def little_memory(model, pad, prompts, *rest):
        if len(prompts) > 3:
            raise error
        return real(model, pad, prompts, *rest)

    monkeypatch.setattr(inference, "_continue", little_memory)
    assert answers(parts, questions, 16) == alone


def test_the_bases_generation_config_has_no_say(parts, questions, alone):
    base = parts.adapted.get_base_model()
    own = base.generation_config
    odd = type(own)(**own.to_diff_dict() | {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "max_length": 20})
    base.generation_config = odd
    assert answers(parts, questions[:4], 4) == alone[:4]
    assert parts.adapted.get_base_model().generation_config is odd
    base.generation_config = own


def test_any_eos_of_the_base_ends_an_answer(parts, questions, alone):
    base = parts.adapted.get_base_model()
    own = base.generation_config
    place = next(i for i, answer in enumerate(alone) if not answer.stopped and len(answer.text) > 20)
    third = step_by_step(parts, questions[place])[0][2]
    base.generation_config = type(own)(eos_token_id=third)
    found = answers(parts, [questions[place]], 1)[0]
    base.generation_config = own
    assert found.stopped
    assert len(found.text) < len(alone[place].text)


def test_without_the_adapter_the_base_answers(parts, questions, alone):
    parts.adapted.train()
    with parts.adapted.disable_adapter():
        base = answers(parts, questions[:8], 8)
    assert parts.adapted.training
    parts.adapted.eval()
    assert base != alone[:8]
    rows = [example.row for example in parts.examples["validation"][:2]]
    samples = sample_answers(parts.adapted, parts.tokenizer, rows, 7)
    assert [line[:4] for line in samples] == [[7, row.source, row.question, row.answer] for row in rows]
    assert [line[4][:10] for line in samples] == [answer.text[:10] for answer in base[:2]]


def test_the_untuned_bases_own_template(parts, tmp_path):
    prompts = own_template_prompts(str(BASE_DIR), ["What is asthma ?"])
    text = AutoTokenizer.from_pretrained(BASE_DIR).decode(prompts("What is asthma ?"))
    assert "<|user|>\nWhat is asthma ?" in text
    assert text.endswith("<|assistant|>\n")
    assert load_tokenizer(str(BASE_DIR)).chat_template  # the template of training is another one
    assert prompts("What is asthma ?") != prompt_ids("What is asthma ?", parts.tokenizer)
    by_own = answers(parts, ["What is asthma ?"], 1, prompts=prompts)
    assert by_own != answers(parts, ["What is asthma ?"], 1)


@pytest.mark.slow
def test_the_limits_on_a_template_are_not_for_all_questions_together(tmp_path, monkeypatch):
    monkeypatch.setattr("medqa.limited.WORK_SECONDS", 1)
    monkeypatch.setattr("medqa.evaluation.answers.TOGETHER", 1)
    directory = tmp_path / "base"
    shutil.copytree(BASE_DIR, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    said = json.loads((directory / "tokenizer_config.json").read_text())
    slow = "{% for i in range(4000) %}{% for j in range(1000) %}{% endfor %}{% endfor %}{{ messages[0]['content'] }}"
    (directory / "tokenizer_config.json").write_text(json.dumps({**said, "chat_template": slow}))
    questions = [f"What is disease {i} ?" for i in range(30)]
    prompts = own_template_prompts(str(directory), questions, pytest.fail)
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    assert [tokenizer.decode(prompts(question)) for question in questions] == questions


# What a base's template may do in place of rendering a question, and what is said of it.
TEMPLATES = {
    "none": (None, None),
    "empty": ("", None),
    "refuses": ("{{ raise_exception('a system message comes first') }}", "TemplateError: a system message comes first"),
    "refuses some": (
        "{% if 'asthma' in messages[0]['content'] %}x{% else %}{{ raise_exception('no') }}{% endif %}",
        "TemplateError: no",
    ),
    "divides by zero": ("{{ 1 / 0 }}", "ZeroDivisionError"),
    "adds what cannot be": ("{{ messages[0]['content'] + 1 }}", "TypeError"),
    "overflows": ("{% for i in range(1000000) %}x{% endfor %}", "OverflowError"),
    "recurs": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "is no Jinja": ("{% for %}", "TemplateSyntaxError"),
    "looks for what is not there": ("{{ messages[7]['content'] }}", "UndefinedError"),
    "has no default among names": ([{"name": "tool_use", "template": "a"}], "ValueError"),
    "is no text": ({"default": 1}, "Error"),
    "is half of a character": ("{{ '\\ud800' }}", "UnicodeEncodeError"),
    "is long": ("{{ 'word ' * 10000 }}", "a prompt of 50,000 characters"),
    "fills the memory": ("{{ 'x' * 8000000000 }}", "it takes more than 2,048 MiB of memory"),
    "never ends": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x", "it takes more than 1 s"
    ),
    "never ends, in C": ("{{ 9 ** (9 ** 9) }}", "it takes more than 1 s"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_template_that_does_not_work_counts_as_none(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("medqa.limited.WORK_SECONDS", 1)
    template, expected = TEMPLATES[kind]
    directory = tmp_path / "base"
    shutil.copytree(BASE_DIR, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    said = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**said, "chat_template": template}))
    told: list[str] = []
    assert own_template_prompts(str(directory), ["What is asthma ?", "Why ?"], told.append) is None
    assert len(told) == (expected is not None)
    if expected is not None:
        assert told[0].startswith(f"{directory}: its own chat template cannot be used: ")
        assert expected in told[0]
        assert told[0].endswith("; the baseline is measured without it")


ROUND = "take it with food "


@pytest.mark.parametrize(
    "text, looping",
    [
        ("", False),
        (ROUND * 2, False),
        (ROUND * 3, True),
        ("First. " + ROUND + "Take IT with food " + ROUND + "then stop", True),
        (ROUND + "or " + ROUND + "or " + ROUND, False),  # "take it with food or" twice, and a beginning
        ((ROUND + "or ") * 3, True),
        ("pain " * 11, False),
        ("pain " * 12, True),
        ("no pain " * 5, False),
        ("no pain " * 6, True),
        (ROUND + "a b c d " + ROUND + "e f g h " + ROUND, False),
        (" ".join(f"{number}. It is a sign of illness" for number in range(9)), False),
        (" ".join(map(str, range(50))) + " " + " ".join(map(str, range(100, 120))) * 3, False),
        (" ".join(map(str, range(50))) + (" " + " ".join(map(str, range(100, 120)))) * 3, True),
    ],
)
def test_what_loops(text, looping):
    assert loops(text) is looping


def row(number: int, source: str, question: str, answer: str) -> Row:
    return Row(f"{source}:{number}", source, question, answer, None)


ROWS = [
    row(0, "medquad", "What is fever ?", "the fever was very high"),
    row(1, "medquad", "What is pain ?", "pain"),
    row(0, "afrimedqa", "Which ?\nA. x\nB. y", "Drink water"),
]


def test_scores_by_hand():
    given = {
        "untuned": [Answer("", False), Answer(ROUND * 3, False), Answer("drink water", True)],
        "tuned": [Answer("the fever is high", True), Answer("pain", True), Answer("Drink water", False)],
        "copied": [Answer("x", True), Answer("y", True), Answer("z", True)],
    }
    result = score_generation(ROWS, given, 0)
    value = {name: {key: figure["value"] for key, figure in result[name].items()} for name in given}
    assert value["tuned"] == pytest.approx(
        {
            "rouge1": (2 / 3 + 1 + 1) / 3,
            "rouge2": (2 / 7 + 0 + 1) / 3,
            "rougeL": (2 / 3 + 1 + 1) / 3,
            "authors_rouge1": 1,  # of the one row of AfriMed-QA
            "authors_rouge2": 1,
            "authors_rougeL": 1,
            "stops": 2 / 3,
            "loops": 0,
            "length_ratio": 7 / 8,
        },
        abs=1e-7,
    )
    assert value["untuned"]["rouge1"] == pytest.approx(1 / 3)
    assert value["untuned"]["authors_rouge1"] == pytest.approx(1 / 2)  # tells "drink" from "Drink"
    assert (value["untuned"]["loops"], value["untuned"]["stops"]) == pytest.approx((1 / 3, 1 / 3))
    assert value["untuned"]["length_ratio"] == 14 / 8
    difference = result["difference"]
    assert difference["tuned - untuned"]["stops"]["value"] == pytest.approx(1 / 3)
    assert difference["tuned - copied"]["rougeL"]["value"] == pytest.approx((2 / 3 + 1 + 1) / 3)
    assert 0 < difference["tuned - untuned"]["rougeL"]["p_value"] <= 1
    assert result["sources"]["medquad"]["tuned"]["value"] == pytest.approx((2 / 3 + 1) / 2)
    assert result["sources"]["afrimedqa"]["untuned"]["value"] == pytest.approx(1)
    assert result["samples"][2] == {
        "id": "afrimedqa:0",
        "source": "afrimedqa",
        "question": "Which ?\nA. x\nB. y",
        "reference": "Drink water",
        "untuned": "drink water",
        "copied": "z",
        "tuned": "Drink water",
    }
    assert result == score_generation(ROWS, given, 0)
    json.dumps(result, allow_nan=False)


def test_what_is_not_there_is_absent():
    result = score_generation(ROWS[:2], {"untuned": [Answer("a", True), Answer("b", True)]}, 0)
    assert set(result) == {"untuned", "difference", "sources", "samples"}
    assert result["difference"] == {}
    assert "authors_rouge1" not in result["untuned"]
    assert score_generation([], {"tuned": []}, 0)["tuned"] == {}


def test_the_most_similar_questions_answer_is_copied(monkeypatch):
    train = [
        row(0, "medquad", "What is (are) Asthma ?", "first"),
        row(1, "medquad", "What are the symptoms of Malaria ?", "second"),
        row(2, "medquad", "What are the symptoms of malaria", "third"),
        row(3, "medquad", "What are the symptoms of Asthma ?", "fourth"),
    ]
    asked = ["symptoms of malaria in children ?", "the symptoms of ASTHMA", "what is asthma", "漢字"]
    found = copied_answers(train, asked)
    # Of equals the first; where no word is known, the first of all.
    assert found == [Answer(text, True) for text in ("second", "fourth", "first", "first")]
    monkeypatch.setattr("medqa.evaluation.text.CHUNK", 3)
    assert copied_answers(train, asked) == found
    assert copied_answers(train, []) == []
    assert copied_answers([dataclasses.replace(train[3], answer=" as it stands ")], ["x"])[0].text == " as it stands "


def test_training_questions_without_a_word_are_copied_from_all_the_same():
    rows = [Row("x:0", "x", "?", "first", None), Row("x:1", "x", "! 1", "second", None)]
    assert [answer.text for answer in copied_answers(rows, ["What is asthma ?", "a"])] == ["first", "first"]
