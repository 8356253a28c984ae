"""Whether an export computes what the adapter computes, measured on held-out prompts; GGUF files run in llama.cpp."""

import contextlib
import http.client
import itertools
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from medqa.commands.adapter import Source
from medqa.commands.export.gguf_vocabulary import changed_by_normalizer
from medqa.config import Data
from medqa.data.batches import epoch_permutation
from medqa.data.sources import Row, load_sources
from medqa.data.splits import Splits, split_sources
from medqa.data.tokens import prompt_ids, prompt_of
from medqa.errors import UserError
from medqa.evaluation.answers import plain_greedy
from medqa.tiny import AFRIMEDQA_CSV, MEDQUAD_CSV

# Limits of the mean KL divergence in nats per token. In float32 only the order of summation differs; float16 stays far
# below its limit, bfloat16 with its seven bits not always; a merge into wrong weights is far above all limits.
KL_LIMITS = {"f32": 1e-6, "f16": 1e-3, "bf16": 1e-3, "q8_0": 1e-3}
# Where greedy answers diverge, by how many nats the adapter may prefer its own token to the other one. At a near tie,
# either token may win in 16 or 8 bits.
TIE_LIMITS = {"f32": 1e-4, "f16": 0.1, "bf16": 0.25, "q8_0": 0.25}
ANSWER_TOKENS = 48
SPEED_TOKENS = 32


@dataclass(frozen=True)
class Reference:
    """The adapter's greedy answer to each prompt, and the log-probabilities after every token of prompt and answer.

    `log_probs` are [prompt + answer, vocabulary], float32, on the CPU.
    """

    prompts: list[list[int]]
    answers: list[list[int]]
    log_probs: list[torch.Tensor]


@dataclass(frozen=True)
class Fidelity:
    """How close an export is to the adapter.

    Attributes:
        kl: mean KL divergence of the export from the adapter, in nats, over `positions`.
        equal: how many of the `answers` greedy answers are equal token for token.
        parted: where others diverge, the largest difference of the adapter's log-probabilities; 0 if none diverge.
    """

    kl: float
    positions: int
    answers: int
    equal: int
    parted: float

    def check(self, kind: str) -> None:
        """Refuse an export that is not the adapter's model.

        Raises:
            UserError: the divergence, or a difference between greedy answers, exceeds its limit.
        """
        advice = "the export is not kept" if kind == "f32" else "choose f16 or f32 with --outtype; it is not kept"
        advice = "choose f16 with --outtype; it is not kept" if kind == "q8_0" else advice
        if not self.kl <= KL_LIMITS[kind]:  # also true for NaN, when float16 overflows
            raise UserError(
                f"the export ({kind}) differs from the adapter: mean KL divergence {self.kl:.2e} nats, above the limit "
                f"of {KL_LIMITS[kind]:g}; {advice}"
            )
        if self.parted > TIE_LIMITS[kind]:
            raise UserError(
                f"the export ({kind}) answers differently from the adapter: {self.answers - self.equal} of "
                f"{self.answers} greedy answers, by more than a near tie ({self.parted:.3f} nats, the limit is "
                f"{TIE_LIMITS[kind]:g}); {advice}"
            )

    def answers_text(self) -> str:
        """The comparison of greedy answers in words."""
        text = f"greedy answers equal: {self.equal} of {self.answers}"
        near = f"where others diverge, the adapter prefers its token by at most {self.parted:.3f} nats"
        return text if self.equal == self.answers else f"{text} ({near})"

    def __str__(self) -> str:
        return f"mean KL divergence {self.kl:.1e} nats over {self.positions:,} tokens; {self.answers_text()}"


def observe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]) -> Reference:
    """The reference: what the adapter on its base computes for these prompts."""
    answers = greedy(model, tokenizer, prompts)
    log_probs = [_log_probs(model, ids + answer).cpu() for ids, answer in zip(prompts, answers, strict=True)]
    return Reference(prompts, answers, log_probs)


def compare(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, reference: Reference) -> Fidelity:
    """How close a model is to the reference."""
    total, positions = 0.0, 0
    for ids, answer, expected in zip(reference.prompts, reference.answers, reference.log_probs, strict=True):
        found = _log_probs(model, ids + answer).cpu().double()
        expected = expected.double()
        total += float((expected.exp() * (expected - found)).sum())
        positions += len(expected)
    found_answers = greedy(model, tokenizer, reference.prompts)
    return Fidelity(
        max(total / positions, 0.0) if math.isfinite(total) else math.nan, positions, *parting(reference, found_answers)
    )


def parting(reference: Reference, answers: Sequence[Sequence[int]]) -> tuple[int, int, float]:
    """Compare answers with the reference: how many, how many equal, and the largest difference where others diverge."""
    gaps = []
    for ids, expected, answer, log_probs in zip(
        reference.prompts, reference.answers, answers, reference.log_probs, strict=True
    ):
        if list(answer) == expected:
            continue
        first = next((i for i, (a, b) in enumerate(zip(expected, answer, strict=False)) if a != b), None)
        if first is None:  # one is a prefix of the other: an answer that was cut short, not a near tie
            gaps.append(math.inf)
            continue
        after = log_probs[len(ids) - 1 + first]
        gaps.append(abs(float(after[expected[first]] - after[answer[first]])))
    return len(answers), len(answers) - len(gaps), max(gaps, default=0.0)


def greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]) -> list[list[int]]:
    """The ids of each greedy answer, up to `ANSWER_TOKENS`, including the end token if it ends by itself."""
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
    output = _generate(model, tokenizer, batch["input_ids"], batch["attention_mask"], ANSWER_TOKENS)
    answers = output[:, batch["input_ids"].shape[1] :].tolist()
    end = prompt_of(tokenizer).end
    return [ids[: ids.index(end) + 1] if end in ids else ids for ids in answers]


def tokens_per_second(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int]) -> float:
    """Tokens per second of one greedy answer, including its prompt, after a warmup."""
    ids = torch.tensor([prompt], device=model.device)
    _generate(model, tokenizer, ids, torch.ones_like(ids), 4)
    start = time.perf_counter()
    _generate(model, tokenizer, ids, torch.ones_like(ids), SPEED_TOKENS, least=SPEED_TOKENS)
    return SPEED_TOKENS / (time.perf_counter() - start)


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    mask: torch.Tensor,
    most: int,
    least: int = 0,
) -> torch.Tensor:
    """Prompts with their greedy continuations, [rows, tokens]."""
    with torch.no_grad(), plain_greedy(model):
        return model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=most,
            min_new_tokens=least,
            do_sample=False,
            use_cache=True,
            eos_token_id=prompt_of(tokenizer).end,
            pad_token_id=tokenizer.pad_token_id,
        )


def _log_probs(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """Log-probabilities after each token, [tokens, vocabulary], float32."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0]
    return torch.log_softmax(logits.float(), dim=-1)


# ----------------------------------------------------------------------------------------------------
# Prompts that a run was not trained on, to measure an export with.

PROMPTS = 16
LONGEST = 256  # tokens of a prompt, because longer ones take more time but show no more about the weights


@dataclass(frozen=True)
class HeldOutPrompts:
    """Questions, the ids of their prompts, and where they come from."""

    questions: list[str]
    ids: list[list[int]]
    where_from: str


def held_out_prompts(source: Source, tokenizer: PreTrainedTokenizerBase, room: int) -> HeldOutPrompts:
    """Some test questions of the run.

    If its data are not available or have changed, and for an adapter without a run, they come from the embedded sample,
    because of other data it is not known which rows were trained on.

    Args:
        room: the maximum number of tokens of a prompt.

    Raises:
        UserError: the base's context is too short for any question.
    """
    why = ""
    if source.run is not None:
        why = " (the run's data are not available, or have changed)"
        with contextlib.suppress(UserError):
            splits = _splits(source.experiment.data)
            if source.data in (None, splits.fingerprint) and (found := _chosen(splits.test, tokenizer, room)):
                return HeldOutPrompts(*found, "the run's test questions")
    sample = Data(medquad=str(MEDQUAD_CSV), afrimedqa=str(AFRIMEDQA_CSV))
    if found := _chosen(_splits(sample).test, tokenizer, room):
        return HeldOutPrompts(*found, f"the embedded sample's test questions{why}")
    raise UserError(f"{source.name}: its base has room for {room} tokens beside an answer: too few for any question")


def _splits(data: Data) -> Splits:
    """The rows of these sources, split."""
    return split_sources(load_sources(data), data)


def _chosen(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, room: int
) -> tuple[list[str], list[list[int]]] | None:
    """Questions and prompts of a seeded choice of rows; None if none fits."""
    questions = (rows[i].question for i in epoch_permutation(0, 0, len(rows)))
    pairs = ((question, prompt_ids(question, tokenizer)) for question in questions)
    found = list(itertools.islice((pair for pair in pairs if len(pair[1]) <= min(room, LONGEST)), PROMPTS))
    return ([question for question, _ in found], [ids for _, ids in found]) if found else None


# ----------------------------------------------------------------------------------------------------
# A GGUF file in llama.cpp itself, if xllamacpp is installed: its tokens and its answers.


@dataclass(frozen=True)
class Ran:
    """Greedy answers as ids, including their end tokens, and their tokens per second, including prompts."""

    answers: list[list[int]]
    tokens_per_s: float


def has_llama_cpp() -> bool:
    """Whether xllamacpp is installed and works on this machine."""
    try:
        import xllamacpp  # noqa: F401
    except (ImportError, OSError, RuntimeError):  # the last two: a library that does not fit the machine
        return False
    return True


class LlamaCpp:
    """llama.cpp's server with one GGUF file, in this process; it listens on a free port of the loopback interface."""

    def __init__(self, path: Path, context: int) -> None:
        """Load the file.

        Raises:
            UserError: llama.cpp does not load it.
        """
        import xllamacpp

        asked = xllamacpp.CommonParams()
        asked.model.path = str(path)
        asked.n_ctx, asked.n_parallel, asked.n_gpu_layers = context, 1, 0
        asked.warmup, asked.verbosity = False, -1
        asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = torch.get_num_threads()
        try:
            self._server = xllamacpp.Server(asked)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"llama.cpp does not load the file: {error}; use --format merged") from error
        self.address: str = self._server.listening_address

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The server's answer to a request.

        Raises:
            RuntimeError: it refuses the request.
        """
        connection = http.client.HTTPConnection(self.address.removeprefix("http://"))
        with contextlib.closing(connection):
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            said = response.read()
        if response.status != 200:
            raise RuntimeError(f"llama.cpp, {path}: {said[:300]!r}")
        return json.loads(said)

    def tokens(self, text: str, bos: bool, special: bool) -> list[int]:
        """The ids of a text.

        Args:
            bos: whether BOS is put in front, if the file says so.
            special: whether special tokens that are written in the text become tokens.
        """
        body = {"content": text, "add_special": bos, "parse_special": special}
        return list(self.post("/tokenize", body)["tokens"])

    def answer(self, ids: list[int], most: int) -> list[int]:
        """The greedy continuation, including the end token."""
        body = {"prompt": ids, "n_predict": most, "temperature": 0, "return_tokens": True, "cache_prompt": False}
        return list(self.post("/completion", body)["tokens"])


def run_llama_cpp(path: Path, held_out: HeldOutPrompts, tokenizer: PreTrainedTokenizerBase) -> Ran:
    """llama.cpp's greedy answers to the prompts.

    Raises:
        UserError: it does not load the file, or tokenizes a prompt differently.
    """
    own = prompt_of(tokenizer)
    server = LlamaCpp(path, max(map(len, held_out.ids)) + ANSWER_TOKENS + 1)
    chat = own.kind == "chat"  # parse the special tokens (and BOS) of its text; those in a question become tokens too
    for question, ids in zip(held_out.questions, held_out.ids, strict=True):
        text = own.text(question)
        if changed_by_normalizer(tokenizer, text):
            continue
        if (found := server.tokens(text, bool(own.bos), chat)) != ids:
            raise UserError(
                f"llama.cpp tokenizes the prompt for {question[:60]!r} as {found[:8]}..., training as {ids[:8]}...; "
                "use --format merged"
            )
    start = time.perf_counter()
    answers = [server.answer(ids, ANSWER_TOKENS) for ids in held_out.ids]
    seconds = time.perf_counter() - start
    return Ran(answers, sum(map(len, answers)) / seconds)
