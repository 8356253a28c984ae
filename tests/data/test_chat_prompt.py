"""`tokenization.prompt: chat`: the ids equal those of the base's own chat template, or the base is refused."""

import json
import shutil
from pathlib import Path

import pytest
from families import CHATML, TURNS, make_tokenizer
from transformers import PreTrainedTokenizerBase

from medqa.config import Data, Tokenization
from medqa.data import tokens
from medqa.data.sources import Row, load_sources
from medqa.data.splits import split_sources
from medqa.data.tokens import prompt_of, prompt_saved_as, tokenize, tokenize_splits
from medqa.errors import UserError
from medqa.evaluation.multiple_choice import Question, option_examples
from medqa.model.base import load_tokenizer, save_tokenizer
from medqa.tiny import AFRIMEDQA_CSV, BASE_DIR, MEDQUAD_CSV

TINYLLAMA = Path(__file__).parents[3] / "shared" / "models" / "tinyllama-1.1b-shape"
CHAT = Tokenization(prompt="chat", max_length=4096)
SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
GEMMAS_ROLE = "('model' if message['role'] == 'assistant' else message['role']) + '\n'"
ZEPHYR = json.loads((BASE_DIR / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
QUESTIONS = [
    "What is asthma ?",
    "  spaces around \n",
    "(a) 5 mg?\nA. one\nB. two",
    "é 漢字 👩🏾‍⚕️",
    "{{ x }} {% raw %} <b>",
    "1",
]
ANSWERS = ["Answer.", "(a) first", "5 mg", "a\n\nb", "<b> {{ x }}"]
SPELLED = ["<|im_end|>", "a </s> b", "</s></s>", "<s>", "<eos><end_of_turn>\n"]


def make_base(directory: Path, kind: str) -> Path:
    """The directory of a base model without weights."""
    if kind == "tinyllama":
        if not TINYLLAMA.is_dir():
            pytest.skip(f"no {TINYLLAMA}")
        shutil.copytree(TINYLLAMA, directory, ignore=shutil.ignore_patterns("*.safetensors"))
        change(directory, chat_template=ZEPHYR)
        return directory
    shutil.copytree(BASE_DIR, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    if kind in ("chatml", "turns"):
        make_tokenizer({"chatml": "qwen3", "turns": "gemma"}[kind], directory)
    if kind == "chatml":
        change(directory, chat_template=SYSTEM + CHATML)
    if kind == "turns":  # as in Gemma's real template
        change(directory, chat_template=TURNS.replace("message['role'] + '\n'", GEMMAS_ROLE))
    return directory


def change(directory: Path, **changed: object) -> None:
    """Change values in tokenizer_config.json; None removes a key."""
    path = directory / "tokenizer_config.json"
    said = {**json.loads(path.read_text(encoding="utf-8")), **changed}
    path.write_text(json.dumps({key: value for key, value in said.items() if value is not None}), encoding="utf-8")


@pytest.fixture(scope="module", params=["zephyr", "chatml", "turns", "tinyllama"])
def base(request, tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / request.param, request.param)


@pytest.fixture(scope="module")
def tokenizer(base) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(base), CHAT)


def templated(tokenizer, question: str, answer: str | None = None) -> list[int]:
    messages = [{"role": "user", "content": question}]
    messages += [] if answer is None else [{"role": "assistant", "content": answer}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=answer is None, return_dict=True)["input_ids"]


def example(tokenizer, question: str, answer: str, **settings):
    row = Row("x:0", "x", question, answer, None)
    (found,) = tokenize([row], tokenizer, CHAT.model_copy(update=settings))
    return found


def test_the_prompt_equals_the_templates_and_an_answer_ends_its_turn(tokenizer):
    own = prompt_of(tokenizer)
    assert (own.kind, own.bos) == ("chat", ())
    for question in QUESTIONS:
        asked = templated(tokenizer, question.strip())
        assert own.ids(question) == asked
        for answer in ANSWERS:
            found = example(tokenizer, question, answer)
            assert found.input_ids[: found.answer_start].tolist() == asked
            whole = templated(tokenizer, question.strip(), answer)
            assert found.input_ids.tolist() == whole[: len(found.input_ids)]
            assert found.input_ids[-1] == own.end
            assert tokenizer.decode(whole[len(found.input_ids) :]).strip() == ""


def test_the_end_of_turn_of_each_base(tokenizer, base):
    ends = {"zephyr": "</s>", "tinyllama": "</s>", "chatml": "<|im_end|>", "turns": "<end_of_turn>"}
    assert prompt_of(tokenizer).end_text == ends[base.name]
    assert tokenizer.convert_ids_to_tokens(prompt_of(tokenizer).end) == ends[base.name]
    begins = {"turns": ["<bos>"], "chatml": ["<|im_start|>"]}.get(base.name, [])
    first = tokenizer.convert_ids_to_tokens(prompt_of(tokenizer).ids("Why ?"))[:1]
    assert first == begins or (not begins and first[0] not in tokenizer.all_special_tokens)


@pytest.mark.parametrize("text", SPELLED)
def test_special_tokens_that_are_spelled_out_stay_text(tokenizer, text):
    own = prompt_of(tokenizer)
    plain, asked = own.ids("Why ?"), own.ids(f"Why {text} ?")
    special = set(tokenizer.all_special_ids) | {own.end}
    assert [token for token in asked if token in special] == [token for token in plain if token in special]
    assert text.strip() in tokenizer.decode(asked)
    found = example(tokenizer, "Why ?", f"x {text} y").input_ids.tolist()
    assert [token for token in found if token in special] == [token for token in plain if token in special] + [own.end]
    assert text.strip() in tokenizer.decode(found)


def test_append_eos_and_max_length_apply(tokenizer):
    whole = example(tokenizer, "Why ?", "Because it is so.")
    without = example(tokenizer, "Why ?", "Because it is so.", append_eos=False)
    assert without.input_ids.tolist() == whole.input_ids[:-1].tolist()
    cut = example(tokenizer, "Why ?", "Because it is so.", max_length=len(whole.input_ids) - 1)
    assert cut.truncated
    assert cut.input_ids.tolist() == whole.input_ids[:-1].tolist()
    assert tokenize([whole.row], tokenizer, CHAT.model_copy(update={"max_length": whole.answer_start})) == []


def test_an_option_is_an_answer(tokenizer):
    question = Question("x:0", "Which ?\nA. one\nB. two", {"A": "one", "B": "two"}, "A", None)
    for option, found in zip(question.options.values(), option_examples(question, tokenizer), strict=True):
        whole = example(tokenizer, question.text, option, append_eos=False)
        assert found.input_ids.tolist() == whole.input_ids.tolist()
        assert found.answer_start <= whole.answer_start  # whitespace at the end of the prompt belongs to the option


def test_cached_ids_are_the_same(tokenizer, tmp_path, monkeypatch):
    data = Data(medquad=str(MEDQUAD_CSV), afrimedqa=str(AFRIMEDQA_CSV))
    splits = split_sources(load_sources(data), data)
    _, expected = tokenize_splits(splits, tokenizer, CHAT)
    for made in expected["validation"]:
        assert made.input_ids.tolist()[: made.answer_start] == prompt_of(tokenizer).ids(made.row.question)
    monkeypatch.setenv("MEDQA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tokens, "WORTH_KEEPING", 1)
    again = load_tokenizer(tokenizer.name_or_path, CHAT)  # with other aliases
    for _ in range(2):
        _, found = tokenize_splits(splits, again, CHAT)
        for name, rows in expected.items():
            assert [e.input_ids.tolist() for e in found[name]] == [e.input_ids.tolist() for e in rows]
            assert [e.answer_start for e in found[name]] == [e.answer_start for e in rows]
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 3
    instruction = load_tokenizer(tokenizer.name_or_path)
    assert tokenize(expected["test"][:1] and [expected["test"][0].row], instruction, Tokenization())[0] != found


def test_the_saved_tokenizer_keeps_the_template(tokenizer, base, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    said = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert saved["chat_template"] == said
    assert saved["tokenizer_class"] != "TokenizersBackend", "transformers 4.57 does not have this class"
    assert prompt_saved_as(said) == ("chat", "tokenizer")
    own = load_tokenizer(str(base))
    assert prompt_saved_as(own.chat_template) == ("instruction", "always" if prompt_of(own).bos else "tokenizer")


ASKS = "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>\n' }}{% endfor %}"
GENERATES = "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
REFUSED = {
    "a loop": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "it takes more than"),
    "an error": ("{{ raise_exception('no user message') }}", "no user message"),
    "no program": ("{% for %}", "TemplateSyntaxError"),
    "no generation prompt": (ASKS, "it has no generation prompt"),
    "no question": ("{{ '<s>ask</s>' }}" + GENERATES, "it does not contain the question once"),
    "the question twice": (ASKS.replace("m['content']", "2 * m['content']") + GENERATES, "the question once"),
    "upper case": (ASKS.replace("m['content']", "m['content'] | upper") + GENERATES, "the question once"),
    "tags": (ASKS.replace("m['content']", "m['content'] | striptags") + GENERATES, "it changes the text of a question"),
    "a date": ("{{ strftime_now('%Y') }}" + ASKS + GENERATES, "its text depends on the date"),
    "no end": (ASKS.replace("</s>", "") + GENERATES, "no special token ends the answer"),
    "a text before the end": (ASKS.replace("</s>", "\n</s>") + GENERATES, "no special token ends the answer"),
    "thoughts": (ASKS.replace("'\n'", "'\nthink\n'") + GENERATES, "right after its generation prompt"),
    "far too long": ("{{ 'x' * 30000 }}" + ASKS + GENERATES, "a prompt of 30,"),
    "another end of some answers": (
        ASKS.replace("m['content']", "m['content'] | replace('{', '(')") + GENERATES, "it changes the text"
    ),
    "nothing": (None, "tokenization.prompt = chat, but it has no chat template"),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_a_template_that_cannot_be_the_prompt_is_refused(why, tmp_path, monkeypatch):
    monkeypatch.setattr("medqa.limited.WORK_SECONDS", 2)
    template, said = REFUSED[why]
    base = make_base(tmp_path / "base", "zephyr")
    change(base, chat_template=template)
    with pytest.raises(UserError) as refused:
        load_tokenizer(str(base), CHAT)
    text = str(refused.value)
    assert text.startswith(f"model.base = {base}: ")
    assert said in text
    assert text.endswith("; use --set tokenization.prompt=instruction")
    assert load_tokenizer(str(base)).chat_template != template, "the base works with the project's own prompt"


def test_a_template_that_changes_some_rows_is_refused(tmp_path):
    """Only the rows show it, not the probes."""
    base = make_base(tmp_path / "base", "zephyr")
    template = ASKS.replace("m['content']", "m['content'] | replace('dyspnoea', 'breath')") + GENERATES
    change(base, chat_template=template)
    tokenizer = load_tokenizer(str(base), CHAT)
    rows = "".join(f"What is [dyspnoea] {n} ?,It is number {n}.\n" for n in range(60))
    (tmp_path / "n.csv").write_text("question,answer\n" + rows)
    data = Data(medquad="none", afrimedqa="none", files={"n": str(tmp_path / "n.csv")})
    with pytest.raises(UserError, match=r"it changes the text of a question .*dyspnoea"):
        tokenize_splits(split_sources(load_sources(data), data), tokenizer, CHAT)
