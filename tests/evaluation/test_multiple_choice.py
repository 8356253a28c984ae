"""Multiple choice: which questions count, and log-likelihoods that are those of lm-evaluation-harness."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from medqa.config import Data, Tokenization
from medqa.data.sources import Row, load_sources
from medqa.data.splits import letters_and_digits, split_rows
from medqa.data.tokens import prompt, prompt_ids
from medqa.evaluation.answers import OwnTemplate, own_template_prompts
from medqa.evaluation.multiple_choice import (
    AT_ONCE,
    LETTER_TOKENS,
    Choices,
    Question,
    QuestionSet,
    fitting,
    load_questions,
    measure,
    named_letter,
    option_examples,
    score,
)
from medqa.model.base import load_tokenizer
from medqa.tiny import BASE_DIR
from tests.adapted import adapted_parts

SHARED = Path(__file__).parents[3] / "shared"
REAL = SHARED / "data" / "afrimedqa_v2.csv"
TINY = BASE_DIR.parent / "afrimedqa.csv"
COLUMNS = ("question_type", "question", "answer_options", "correct_answer", "answer_rationale", "specialty")
FOUR = json.dumps({f"option{number}": text for number, text in enumerate(("Rest", "Water", "", "Tea"), start=1)})


@pytest.fixture
def source(tmp_path):
    """A file of these records."""

    def write(*records: tuple[str, ...]) -> str:
        path = tmp_path / "afrimedqa.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *records])
        return str(path)

    return write


def row(question: str, source: str = "afrimedqa") -> Row:
    return Row(f"{source}:0", source, question, "an answer", None)


def test_a_question_as_it_is_read(source):
    location = source(("saq", "What ?", "", "", "text", ""), ("mcq", " Which ? ", FOUR, "option4", "", "Surgery"))
    found = load_questions(location, [])
    text = "Which ?\nA. Rest\nB. Water\nD. Tea"  # an empty option keeps its letter
    assert found.questions == (Question("afrimedqa:1", text, {"A": "Rest", "B": "Water", "D": "Tea"}, "D", "Surgery"),)
    assert found.dropped == {}
    assert load_sources(Data(medquad="none", afrimedqa=location))[0].rows[0].id == "afrimedqa:0"  # the same numbers


def test_what_cannot_be_measured_is_dropped_and_counted(source):
    found = load_questions(
        source(
            ("mcq", "a", FOUR, "option1,option2", "", ""),
            ("mcq", "b", FOUR, "option3", "", ""),  # which is empty
            ("mcq", "c", FOUR, "", "", ""),
            ("mcq", "d", "{broken", "option1", "", ""),
            ("mcq", "", FOUR, "option1", "", ""),
            ("mcq", "e", '["only one"]', "option1", "", ""),
            ("mcq", "f", "", "option1", "", ""),
            ("mcq", "g", '["same", "same", "other"]', "option1", "", ""),
            ("mcq", "h", FOUR, "option1", "", ""),
            ("mcq", "H !", FOUR, "option2", "", ""),
            ("consumer_queries", "i", "", "", "", ""),
        ),
        [],
    )
    assert [question.id for question in found.questions] == ["afrimedqa:8"]
    assert found.questions[0].specialty is None
    assert found.dropped == {
        "several right options": 1,
        "no right option": 2,
        "unreadable options": 1,
        "empty question": 1,
        "fewer than two options": 2,
        "options alike": 1,
        "duplicate": 1,
    }


def test_signs_tell_questions_apart(source):
    texts = [
        "Blood group A+ ?",
        "blood group A-?",
        "Blood group A+.",
        "Dose 1.5",
        "Dose < 5",
        "Dose > 5",
        "Na+",
        "Na\u207a !",
    ]
    found = load_questions(source(*(("mcq", text, FOUR, "option1", "", "") for text in texts)), [])
    assert [question.id for question in found.questions] == [f"afrimedqa:{n}" for n in (0, 1, 3, 4, 5, 6)]
    assert found.dropped == {"duplicate": 2}


@pytest.mark.parametrize(
    "trained, shared",
    [
        ("Which ?\nA. Rest\nB. Water\nD. Tea", True),
        ("WHICH\n a. rest b. water d. tea", True),  # by letters and digits
        ("WHICH ? (A) Rest\nB. Water\nD. Tea", True),
        ("Which ?\nA. Sleep\nB. Rest", True),  # the question, with other options
        ("which", True),
        ("Which ones ?\nA. Rest\nB. Water\nD. Tea", False),
    ],
)
def test_what_training_has_asked_is_not_asked_again(source, trained, shared):
    location = source(("mcq", "Which ?", FOUR, "option4", "", ""))
    for name in ("afrimedqa", "medquad"):
        found = load_questions(location, [row("Other ?"), row(trained, name)])
        assert found.dropped == ({"shared with training": 1} if shared else {})
        assert len(found.questions) == (not shared)


@pytest.mark.parametrize("location", [TINY, REAL], ids=["embedded", "real"])
def test_no_training_row_shares_a_question(location):
    if not location.exists():
        pytest.skip(f"no {location}")
    rows = load_sources(Data(medquad="none", afrimedqa=str(location)))[0].rows
    splits = split_rows(rows, "grouped", 42, (0.8, 0.1, 0.1))
    found, all_of_them = load_questions(str(location), splits.train), load_questions(str(location), [])
    trained = {letters_and_digits(row.question) for row in splits.train}
    assert not trained & {letters_and_digits(question.text) for question in found.questions}
    assert not {row.id for row in splits.train} & {question.id for question in found.questions}
    count = sum(found.dropped.values()) + len(found.questions)
    assert count == sum(all_of_them.dropped.values()) + len(all_of_them.questions)
    held_out = {row.id for row in splits.test if "\nA. " in row.question}
    if location == REAL:
        assert (count, len(all_of_them.questions)) == (3910, 3844)
    else:
        assert held_out <= {question.id for question in found.questions}
        assert found.dropped["shared with training"] > 5


@pytest.fixture(scope="module")
def parts(tiny):
    return adapted_parts(tiny)


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    odd = Question(
        "afrimedqa:900",
        "Größe </s> ?\nA. é 漢字\nB. 5 mg/kg</s>\nC. x",
        {"A": "é 漢字", "B": "5 mg/kg</s>", "C": "x"},
        "A",
        None,
    )
    return [*load_questions(str(TINY), []).questions[:23], odd]


@pytest.fixture(scope="module")
def tuned(parts, questions) -> Choices:
    return measure(parts.evaluator(), parts.adapted, parts.tokenizer, questions, batch_size=8)


def by_hand(parts, question: Question) -> list[float]:
    """Each option's log-likelihood from the logits of that text alone."""
    found = []
    tokenizer = parts.tokenizer
    for option in question.options.values():
        context = prompt_ids(question.text, tokenizer)[1:]  # ends with what is after the header: the line break's ids
        whole = tokenizer(prompt(question.text) + option, add_special_tokens=False, split_special_tokens=True).input_ids
        stripped = tokenizer(
            prompt(question.text).rstrip(), add_special_tokens=False, split_special_tokens=True
        ).input_ids
        assert whole[: len(stripped)] == stripped
        assert len(stripped) < len(context)
        ids = torch.tensor([[tokenizer.bos_token_id, *whole]])
        with torch.no_grad():
            logits = parts.adapted(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        each = logits.gather(-1, ids[0, 1:, None])[:, 0]
        found.append(each[len(stripped) :].sum().item())
    return found


def test_log_likelihoods_are_those_of_each_text_alone(parts, questions, tuned):
    assert tuned.log_likelihoods.shape == (24, max(len(question.options) for question in questions))
    for question, line in zip(questions, tuned.log_likelihoods, strict=True):
        count = len(question.options)
        assert line[:count] == pytest.approx(by_hand(parts, question), abs=1e-4)
        assert np.isnan(line[count:]).all()
    assert np.isnan(tuned.log_likelihoods).any()


@pytest.mark.parametrize("most_tokens, padding_free", [(1, True), (400, True), (400, False), (100_000, False)])
def test_a_batch_makes_no_difference(parts, questions, tuned, most_tokens, padding_free, monkeypatch):
    monkeypatch.setattr("medqa.evaluation.multiple_choice.AT_ONCE", 10)
    told = []
    evaluator = parts.evaluator(most_tokens, padding_free)
    found = measure(evaluator, parts.adapted, parts.tokenizer, questions, batch_size=3, progress=told.append)
    assert np.nanmax(abs(found.log_likelihoods - tuned.log_likelihoods)) < 1e-4
    assert found.letters.tolist() == tuned.letters.tolist()
    assert sum(told) == 2 * len(questions)


def test_without_the_adapter_it_is_the_base(parts, questions, tuned):
    with parts.adapted.disable_adapter():
        base = measure(parts.evaluator(), parts.adapted, parts.tokenizer, questions[:4], batch_size=4)
    assert abs(base.log_likelihoods - tuned.log_likelihoods[:4]).max() > 0.01
    assert AT_ONCE > 4


@pytest.mark.parametrize("name", ["tiny", "stories260k", "tinyllama-1.1b-shape"])
def test_an_option_follows_the_training_prompt(questions, name):
    path = BASE_DIR if name == "tiny" else SHARED / "models" / name
    if not path.exists():
        pytest.skip(f"no {path}")
    tokenizer = load_tokenizer(str(path), Tokenization(pad_token="[PAD]"))
    for question in questions:
        for option, example in zip(question.options.values(), option_examples(question, tokenizer), strict=True):
            ids, start = example.input_ids.tolist(), example.answer_start
            assert ids[0] == tokenizer.bos_token_id
            assert tokenizer.decode(ids[1:]).strip() == (prompt(question.text) + option).strip()
            assert tokenizer.decode(ids[start:]) == "\n" + option  # as the harness has it: the line break is scored too
            assert tokenizer.eos_token_id not in ids


@pytest.fixture(scope="module")
def template(questions):
    return own_template_prompts(str(BASE_DIR), [question.text for question in questions])


def test_the_base_is_asked_in_its_own_template(parts, questions, template):
    """The log-likelihood of an option after the rendered template, by a forward pass of transformers' own."""
    few = questions[:3]
    with parts.adapted.disable_adapter():
        found = measure(parts.evaluator(), parts.adapted, parts.tokenizer, few, batch_size=2, template=template)
        plain = measure(parts.evaluator(), parts.adapted, parts.tokenizer, few, batch_size=2)
        tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
        for number, question in enumerate(few):
            message = [{"role": "user", "content": question.text}]
            text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
            start = len(tokenizer(text.rstrip(), add_special_tokens=False)["input_ids"])
            for place, option in enumerate(question.options.values()):
                ids = torch.tensor([tokenizer(text + option, add_special_tokens=False)["input_ids"]])
                with torch.no_grad():
                    scores = parts.adapted(input_ids=ids).logits[0, :-1].log_softmax(-1)
                expected = scores.gather(1, ids[0, 1:, None])[start - 1 :].sum().item()
                assert found.log_likelihoods[number, place] == pytest.approx(expected, abs=1e-3)
    assert np.nanmax(abs(found.log_likelihoods - plain.log_likelihoods)) > 0.1


def test_a_question_has_to_fit_in_both_prompts(parts, questions, template):
    known = QuestionSet(tuple(questions), {})

    def longest_of(which) -> int:
        return max(len(e.input_ids) for q in questions for e in option_examples(q, parts.tokenizer, which))

    lengths = [longest_of(None), longest_of(template)]
    room = LETTER_TOKENS + max(lengths)
    assert fitting(known, parts.tokenizer, room, template) == fitting(known, parts.tokenizer, room) == known
    longer = OwnTemplate({text: "x " * 200 + shown for text, shown in template.texts.items()}, template.tokenizer)
    assert fitting(known, parts.tokenizer, room, longer).dropped == {"longer than the context": len(questions)}


def test_every_baseline_is_compared_with(questions):
    sums = np.zeros((len(questions), max(len(question.options) for question in questions)))
    choices = Choices(sums, np.array(["A"] * len(questions)))
    found = score(questions, {"untuned": choices, "own_template": choices, "tuned": choices}, 0)
    assert list(found["difference"]) == ["tuned - untuned", "tuned - own_template"]
    assert found["own_template"] == found["untuned"]


def test_what_does_not_fit_the_context_is_not_asked(parts, questions):
    tokenizer = parts.tokenizer
    needed = [
        max(
            *(len(example.input_ids) for example in option_examples(question, tokenizer)),
            len(prompt_ids(question.text, tokenizer)) + LETTER_TOKENS,
        )
        for question in questions
    ]
    longest = sorted(needed)[10]
    found = fitting(QuestionSet(tuple(questions), {"duplicate": 2}), tokenizer, longest)
    assert found.questions == tuple(q for q, need in zip(questions, needed, strict=True) if need <= longest)
    assert found.dropped == {"duplicate": 2, "longer than the context": len(questions) - len(found.questions)}
    assert fitting(found, tokenizer, None) == found
    assert fitting(found, tokenizer, 10_000) == found


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("B", "B"),
        ("B. Water", "B"),
        ("(b) Water", "B"),
        ("**C**: because", "C"),
        ("B\nA", "B"),
        ("The correct answer is D.", "D"),
        ("The answer is: C", "C"),
        ("Answer: option A, since", "A"),
        ("Option B is right", "B"),
        ("C is correct", "C"),
        ("A patient with fever needs water.", None),  # an article
        ("a child", None),
        ("The answer is a disease", None),
        ("Water", None),
        ("Because of vitamin B.", None),
        ("E. none", None),  # no option of this question
        ("The answer is E. Option D. is wrong", "D"),
        ("", None),
    ],
)
def test_the_letter_that_an_answer_names(answer, letter):
    assert named_letter(answer, dict.fromkeys("ABCD", "")) == letter


def ask(number: int, right: str, *options: str, specialty: str | None = None) -> Question:
    return Question(f"afrimedqa:{number}", "?", dict(zip("ABCDE", options, strict=False)), right, specialty)


def test_scores_by_hand():
    asked = [
        ask(0, "A", "no", "a long option", specialty="Surgery"),
        ask(1, "B", "yes", "perhaps so", "é", "it is", specialty="Surgery"),
        ask(2, "C", "abcd", "efgh", "éé"),  # as many bytes each, though fewer characters
        ask(3, "A", "x", "y", specialty="Eye"),
    ]
    nan = np.nan
    tuned = Choices(
        np.array([[-3, -4, nan, nan], [-4, -5, -6, -7], [-4, -4.4, -3.9, nan], [-1, -1, nan, nan]]),
        np.array(["A", "B", "", "B"]),
    )
    untuned = Choices(
        np.array([[-9, -4, nan, nan], [-4, -5, -6, -7], [-4, -4.4, -4.1, nan], [-2, -1, nan, nan]]),
        np.array(["", "", "C", "A"]),
    )
    result = score(asked, {"untuned": untuned, "tuned": tuned}, 0)
    value = {name: {key: figure["value"] for key, figure in result[name].items()} for name in ("tuned", "untuned")}
    # Per byte a long option wins where sums do not let it; of equal ones the first is chosen.
    assert value["tuned"] == {"accuracy": 3 / 4, "accuracy_per_byte": 3 / 4, "letter": 2 / 4, "no_letter": 1 / 4}
    assert value["untuned"] == {"accuracy": 0, "accuracy_per_byte": 1 / 4, "letter": 2 / 4, "no_letter": 2 / 4}
    assert result["rows"] == 4
    assert result["chance"] == pytest.approx((1 / 2 + 1 / 4 + 1 / 3 + 1 / 2) / 4)
    assert result["difference"]["tuned - untuned"]["accuracy"]["value"] == 3 / 4
    assert 0 < result["difference"]["tuned - untuned"]["letter"]["p_value"] <= 1
    assert list(result["specialties"]) == ["Eye", "Surgery"]
    surgery = result["specialties"]["Surgery"]
    assert (surgery["rows"], surgery["chance"]) == (2, 3 / 8)
    assert surgery["tuned"]["accuracy"]["value"] == 1 / 2
    json.dumps(result, allow_nan=False)
    assert score([], {"tuned": tuned}, 0) == {"rows": 0}
    assert "difference" not in score(asked, {"tuned": tuned}, 0)


@pytest.mark.parametrize("base", ["tiny", "stories260k"])
def test_the_harness_gives_the_same_numbers(tiny, parts, questions, tuned, base):
    """lm-evaluation-harness: its tokenization, log-likelihoods and metrics on a task of our own, its data in memory."""
    import datasets
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate

    asked = questions[:-1]  # the last has "</s>" in its text, which the harness takes for EOS
    if base != "tiny":
        if not (SHARED / "models" / base).exists():
            pytest.skip(f"no {SHARED / 'models' / base}")
        parts = adapted_parts(tiny, f"model.base={SHARED / 'models' / base}")
        tuned = measure(parts.evaluator(), parts.adapted, parts.tokenizer, asked, batch_size=8)
    docs = [
        {"prompt": prompt(q.text), "options": list(q.options.values()), "right": list(q.options).index(q.right)}
        for q in asked
    ]
    task = ConfigurableTask(
        config={
            "task": "medqa",
            "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(docs)},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": lambda doc: doc["prompt"],
            "doc_to_choice": lambda doc: doc["options"],
            "doc_to_target": lambda doc: doc["right"],
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_bytes"}],
        }
    )
    found = evaluate(harness(parts, parts.tokenizer), {"medqa": task}, bootstrap_iters=0, log_samples=True)
    samples = found["samples"]["medqa"]
    assert sorted(sample["doc_id"] for sample in samples) == list(range(23))
    for sample in samples:
        theirs = [response[0][0] for response in sample["resps"]]
        assert tuned.log_likelihoods[sample["doc_id"]][: len(theirs)] == pytest.approx(theirs, abs=1e-4)
    ours, theirs = score(asked, {"tuned": tuned}, 0)["tuned"], found["results"]["medqa"]
    assert ours["accuracy"]["value"] == pytest.approx(theirs["acc,none"])
    assert ours["accuracy_per_byte"]["value"] == pytest.approx(theirs["acc_bytes,none"])


@pytest.mark.parametrize("name", ["tiny", "stories260k", "tinyllama-1.1b-shape"])
def test_the_harness_gives_the_same_ids(parts, questions, name):
    path = BASE_DIR if name == "tiny" else SHARED / "models" / name
    if not path.exists():
        pytest.skip(f"no {path}")
    tokenizer = load_tokenizer(str(path))
    model = harness(parts, tokenizer)
    for question in questions[:-1]:
        for option, example in zip(question.options.values(), option_examples(question, tokenizer), strict=True):
            context, continuation = model._encode_pair(prompt(question.text), option)
            assert example.input_ids.tolist() == context + continuation
            assert example.answer_start == len(context)


def harness(parts, tokenizer):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=parts.adapted, tokenizer=tokenizer, batch_size=4, add_bos_token=True, device="cpu")
