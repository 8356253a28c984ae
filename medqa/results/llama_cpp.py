"""A GGUF file in llama.cpp itself, where llama-cpp-python is installed: the same tokens, and what it answers."""

import time
from dataclasses import dataclass
from pathlib import Path

from medqa.errors import UserError
from medqa.prompts import prompt
from medqa.results.export_prompts import HeldOutPrompts
from medqa.results.fidelity import ANSWER_TOKENS


@dataclass(frozen=True)
class Ran:
    """Greedy answers as ids, EOS included, and how fast they came, prompts included."""

    answers: list[list[int]]
    tokens_per_s: float


def has_llama_cpp() -> bool:
    """Whether llama-cpp-python is installed and fits the machine."""
    try:
        import llama_cpp  # noqa: F401
    except (ImportError, OSError, RuntimeError):  # the last two: a library that does not fit the machine
        return False
    return True


def run_llama_cpp(path: Path, held_out: HeldOutPrompts, eos: int) -> Ran:
    """llama.cpp's greedy answers to the prompts.

    Raises:
        UserError: it does not load the file, or makes other tokens of a prompt.
    """
    import llama_cpp

    room = max(map(len, held_out.ids)) + ANSWER_TOKENS + 1
    try:
        model = llama_cpp.Llama(str(path), n_ctx=room, n_gpu_layers=0, verbose=False)
    except ValueError as error:
        raise UserError(f"llama.cpp does not load the file: {error}; use --format merged") from error
    for question, ids in zip(held_out.questions, held_out.ids, strict=True):
        if (found := model.tokenize(prompt(question).encode(), add_bos=True, special=False)) != ids:
            raise UserError(
                f"llama.cpp makes {found[:8]}... of the prompt for {question[:60]!r}, not {ids[:8]}... as in training; "
                "use --format merged"
            )
    answers, start = [], time.perf_counter()
    for ids in held_out.ids:
        answer: list[int] = []
        for token in model.generate(ids, temp=0.0, repeat_penalty=1.0):
            answer.append(token)
            if token == eos or len(answer) == ANSWER_TOKENS:
                break
        answers.append(answer)
    seconds = time.perf_counter() - start
    model.close()
    return Ran(answers, sum(map(len, answers)) / seconds)
