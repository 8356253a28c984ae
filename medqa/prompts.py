"""The one question-and-answer template: training, evaluation, inference and the saved chat template come from here."""

from transformers import PreTrainedTokenizerBase

from medqa.errors import UserError

RESPONSE_HEADER = "### Response:\n"
PROBES = ("What is asthma ?", "(a) 5 mg?\nA. one\nB. two")


def prompt(question: str) -> str:
    """What stands before the answer. Outer whitespace of the question does not count."""
    return f"### Instruction:\n{question.strip()}\n\n{RESPONSE_HEADER}"


def prompt_ids(question: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that an answer is generated after: exactly those it followed in training, BOS first.

    A special token spelled in the question stays text.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return bos + tokenizer(prompt(question), add_special_tokens=False, split_special_tokens=True)["input_ids"]


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """A Jinja chat template whose prompt for one user message has exactly the ids of `prompt_ids`.

    After a BOS written as text some tokenizers leave out the space that they put before a first word (Llama's, in
    transformers 5), others do not; which one this is, is found by trying.

    Raises:
        UserError: neither way gives those ids.
    """
    for space in ("", " "):
        template = _template("{{ bos_token }}" + space if tokenizer.bos_token_id is not None else "")
        if all(_templated_ids(tokenizer, template, probe) == prompt_ids(probe, tokenizer) for probe in PROBES):
            return template
    raise UserError(
        f"model.base = {tokenizer.name_or_path}: its tokenizer cannot express the training prompt as a chat template; "
        "choose another --model"
    )


def _template(start: str) -> str:
    """The template. A system message has no place in the training prompt: refused, not silently sent along."""
    question, response = prompt("\0").split("\0")
    return (
        start
        + "{% for message in messages %}"
        + "{% if message['role'] == 'user' %}"
        + f"{{{{ {question!r} + message['content'] | trim + {response!r} }}}}"
        + "{% elif message['role'] == 'assistant' %}"
        + "{{ message['content'] | trim + eos_token }}"
        + "{% else %}"
        + "{{ raise_exception('this model was trained on single questions: only user and assistant messages') }}"
        + "{% endif %}{% endfor %}"
    )


def _templated_ids(tokenizer: PreTrainedTokenizerBase, template: str, question: str) -> list[int]:
    """The ids that a server gets from the template for one question."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        chat_template=template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )["input_ids"]
