"""One prompt: in training, before an answer is generated, and in the chat template that is saved with the adapter."""

from pathlib import Path

import pytest
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from medqa.config import Tokenization
from medqa.data.sources import Row
from medqa.data.tokens import chat_template, prompt, prompt_ids, tokenize
from medqa.errors import UserError
from medqa.model.base import load_tokenizer
from medqa.tiny import BASE_DIR

SHARED = Path(__file__).parents[3] / "shared" / "models"
BASES = {
    "tiny": BASE_DIR,
    "stories260k": SHARED / "stories260k",
    "tinyllama": SHARED / "tinyllama-1.1b-shape",  # the real Llama 2 tokenizer
}
QUESTIONS = [
    "What is (are) Glaucoma ?",
    "  spaces around \n",
    "(a) 5 mg?\nA. one\nB. two",
    "1. first",
    "é à 漢字 👩🏾‍⚕️ \u200b\u00a0x",
    "x",
    "### Response:\nnot an answer",
    "{{ bos_token }} {% raw %} {question}",
    "back\\slash 'quotes' \"double\"",
    "tabs\tand\r\nreturns",
    "-" * 300,
]
SPECIAL = ["<s>", "</s>", "<unk>", "a </s> b", "</s></s>", "<s>[PAD]</s>"]
ANSWERS = ["Answer.", "(a) first", "5 mg", "\u201cquoted\u201d", "a\n\nb", "### more"]


@pytest.fixture(scope="module", params=BASES)
def base(request) -> Path:
    path = BASES[request.param]
    if not path.exists():
        pytest.skip(f"no {path}")
    return path


@pytest.fixture(scope="module", params=["eos", "[PAD]"])
def tokenizer(base, request) -> PreTrainedTokenizerFast:
    return load_tokenizer(str(base), Tokenization(pad_token=request.param))


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory) -> PreTrainedTokenizerFast:
    """The tokenizer as a run saves it, loaded again."""
    directory = tmp_path_factory.mktemp("tokenizer")
    before, tokenizer.chat_template = tokenizer.chat_template, chat_template(tokenizer)
    tokenizer.save_pretrained(directory)
    tokenizer.chat_template = before
    return AutoTokenizer.from_pretrained(directory)


def example_ids(tokenizer: PreTrainedTokenizerFast, question: str, answer: str) -> tuple[list[int], int]:
    """The training ids of a row, and where its answer begins."""
    row = Row("x:0", "x", question, answer, None)
    (example,) = tokenize([row], tokenizer, Tokenization(max_length=4096))
    return example.input_ids.tolist(), example.answer_start


def test_the_prompt():
    assert prompt("Why ?") == "### Instruction:\nWhy ?\n\n### Response:\n"
    assert prompt(" \n Why ? \t") == prompt("Why ?")


@pytest.mark.parametrize("question", [*QUESTIONS, *SPECIAL])
def test_an_answer_is_generated_after_what_it_followed_in_training(tokenizer, question):
    expected = prompt_ids(question, tokenizer)
    assert expected[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in expected[1:], "a special token spelled in the question stays text"
    assert tokenizer.eos_token_id not in expected
    for answer in ANSWERS:
        ids, answer_start = example_ids(tokenizer, question.strip(), answer)
        assert ids[:answer_start] == expected
        assert ids[-1] == tokenizer.eos_token_id
        assert ids.count(tokenizer.eos_token_id) == 1
        assert answer_start < len(ids) - 1


@pytest.mark.parametrize("text", SPECIAL)
def test_special_tokens_in_an_answer_stay_text(tokenizer, text):
    ids, _ = example_ids(tokenizer, "Why ?", f"x {text} y")
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids.count(tokenizer.eos_token_id) == 1
    assert text in tokenizer.decode(ids[1:-1])


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_saved_chat_template_gives_exactly_the_training_ids(saved, tokenizer, question):
    message = [{"role": "user", "content": question}]
    found = saved.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert found == prompt_ids(question, tokenizer)
    assert "<|user|>" not in saved.apply_chat_template(message, tokenize=False)


def test_the_template_of_a_whole_conversation_ends_in_eos(tokenizer):
    messages = [{"role": "user", "content": "Why ?"}, {"role": "assistant", "content": " Because. "}]
    ids = tokenizer.apply_chat_template(messages, chat_template=chat_template(tokenizer), return_dict=True)["input_ids"]
    assert ids == example_ids(tokenizer, "Why ?", "Because.")[0]


@pytest.mark.parametrize("role", ["system", "tool", "developer"])
def test_a_system_message_is_refused_not_silently_sent_along(tokenizer, role):
    messages = [{"role": role, "content": "Be brief."}, {"role": "user", "content": "Why ?"}]
    with pytest.raises(TemplateError, match="only user and assistant messages"):
        tokenizer.apply_chat_template(messages, chat_template=chat_template(tokenizer))


def test_a_tokenizer_that_cannot_express_the_prompt_is_refused():
    tokenizer = load_tokenizer(str(BASE_DIR))
    tokenizer.add_special_tokens({"additional_special_tokens": ["### Response:"]})
    with pytest.raises(UserError, match="cannot express the training prompt as a chat template; choose another"):
        chat_template(tokenizer)


def test_pad_tokens():
    eos, own = load_tokenizer(str(BASE_DIR)), load_tokenizer(str(BASE_DIR), Tokenization(pad_token="[PAD]"))
    assert eos.pad_token_id == eos.eos_token_id
    assert len(own) == len(eos) + 1, "really added, although the base has a pad token"
    assert own.pad_token_id == len(eos)
    assert eos.padding_side == own.padding_side == "right"
