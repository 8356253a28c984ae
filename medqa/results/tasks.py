"""The tasks of an evaluation, each from a `Bench` to its part of `evaluation.json`."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from medqa.data.multiple_choice import load_questions
from medqa.data.sources import Row
from medqa.data.splits import HELD_OUT, shared_with_training
from medqa.data.tokens import Example
from medqa.evaluation import multiple_choice, probes
from medqa.evaluation.generation import score_generation
from medqa.evaluation.inference import Answer, generate_answers
from medqa.evaluation.loss import Evaluator, fixed_subset
from medqa.evaluation.loss_report import loss_report
from medqa.evaluation.multiple_choice import Choices
from medqa.evaluation.own_template import own_template_prompts, with_prompts
from medqa.evaluation.red_flags import RED_FLAGS
from medqa.evaluation.similar import copied_answers
from medqa.results.bench import Bench, digest, progress
from medqa.training.processes import on_main

ANSWERED = 256  # rows of the test split that are answered, where no limit is given: writing takes the longest
ANSWER_TOKENS = 256
AT_ONCE = 16


def measure_loss(bench: Bench) -> dict[str, Any]:
    """The loss and perplexity of each held-out split, untuned, untuned in the base's own chat template, and tuned."""
    evaluator = bench.evaluator(longest=0)
    shared = shared_with_training(bench.held_out.splits)
    questions = [example.row.question for split in HELD_OUT for example in bench.held_out.examples[split]]
    prompts = _own_prompts(bench, questions)
    report = {}
    for split in HELD_OUT:
        examples = bench.held_out.examples[split]
        losses = functools.partial(_row_losses, bench, evaluator, split)
        untuned = functools.partial(losses, examples, "untuned")
        tables = {"untuned": bench.reused(f"loss of {split}", _ids(examples), untuned)}
        if prompts is not None:
            others = with_prompts(examples, prompts)
            own = functools.partial(losses, others, "untuned, in the base's own chat template")
            tables["own_template"] = bench.reused(f"loss of {split}, own template", _ids(others), own)
        tables["tuned"] = losses(examples, "tuned")
        rows = [example.row for example in examples]
        report[split] = loss_report({name: np.array(t) for name, t in tables.items()}, rows, shared, bench.seed)
    return report


def measure_generation(bench: Bench) -> dict[str, Any]:
    """Answers to questions of the test split, by all systems."""
    rows = answered_rows(bench)
    systems = {"copied": copied_answers(bench.held_out.splits.train, [row.question for row in rows])}
    systems |= _answers(bench, own_template=True)
    return {"rows": len(rows), "tokens": ANSWER_TOKENS, **score_generation(rows, systems, bench.seed)}


def measure_choices(bench: Bench) -> dict[str, Any]:
    """AfriMed-QA's multiple-choice questions that training does not share."""
    adapted, data = bench.adapted, bench.adapted.source.experiment.data
    if data.afrimedqa == "none":
        return {"rows": 0, "dropped": {}}
    longest = getattr(adapted.model.config, "max_position_embeddings", None)
    found = load_questions(data.afrimedqa, bench.held_out.splits.train)
    found = multiple_choice.fitting(found, adapted.tokenizer, longest)
    questions = [found.questions[i] for i in fixed_subset(found.questions, bench.limit, bench.seed)]
    evaluator = bench.evaluator(longest or 0)

    def choices(of: str) -> dict[str, Any]:
        label = f"mcq: {len(questions)} questions, {of}"
        with progress(bench.console, label, 2 * len(questions)) as advance, bench.accelerator.autocast():
            made = multiple_choice.measure(
                evaluator, adapted.model, adapted.tokenizer, questions, batch_size=AT_ONCE, progress=advance
            )
        return {"log_likelihoods": _none_for_nan(made.log_likelihoods), "letters": made.letters.tolist()}

    asked = [[question.id, question.text, list(question.options.values())] for question in questions]
    results = {
        "untuned": bench.reused("mcq", asked, functools.partial(choices, "untuned")),
        "tuned": choices("tuned"),
    }
    made = {
        system: Choices(np.array(found["log_likelihoods"], dtype=float), np.array(found["letters"], dtype="U1"))
        for system, found in results.items()
    }
    return {**multiple_choice.score(questions, made, bench.seed), "dropped": found.dropped}


def measure_probes(bench: Bench) -> dict[str, Any]:
    """Red flags, and numbers that come from nowhere."""
    questions = [question for _, question in RED_FLAGS]
    written = functools.partial(_written, bench, "probes", questions)
    red_flags = {
        "untuned": _restored(bench.reused("probes", [ANSWER_TOKENS, questions], functools.partial(written, "untuned"))),
        "tuned": _restored(written("tuned")),
    }
    rows = answered_rows(bench)
    return {"rows": len(rows), **probes.score(red_flags, rows, _answers(bench, own_template=False), bench.seed)}


def answered_rows(bench: Bench) -> list[Row]:
    """The rows of the test split that are answered."""
    rows = bench.held_out.rows("test")
    return [rows[i] for i in fixed_subset(rows, bench.limit or ANSWERED, bench.seed)]


def _answers(bench: Bench, own_template: bool) -> dict[str, list[Answer]]:
    """The untuned and the tuned model's answers to `answered_rows`; written once for all tasks."""
    questions = [row.question for row in answered_rows(bench)]
    written = functools.partial(_written, bench, "generation", questions)
    prompts = _own_prompts(bench, questions) if own_template else None
    if "tuned" not in bench.written:
        bench.written["untuned"] = bench.reused(
            "generation", [ANSWER_TOKENS, questions], functools.partial(written, "untuned")
        )
        bench.written["tuned"] = written("tuned")
    if prompts is not None and "own_template" not in bench.written:
        own = functools.partial(written, "untuned, in the base's own chat template", prompts)
        bench.written["own_template"] = bench.reused(
            "generation, own template", [ANSWER_TOKENS, [prompts(question) for question in questions]], own
        )
    wanted = {system for system in bench.written if own_template or system != "own_template"}
    return {system: _restored(answers) for system, answers in bench.written.items() if system in wanted}


def _own_prompts(bench: Bench, questions: Sequence[str]) -> Callable[[str], list[int]] | None:
    """The prompts that the base's own chat template makes of these questions, None where it has none that works."""
    say = functools.partial(bench.console.print, soft_wrap=True)
    return own_template_prompts(bench.name, questions, say, functools.partial(on_main, bench.accelerator))


def _written(
    bench: Bench,
    task: str,
    questions: Sequence[str],
    of: str,
    prompts: Callable[[str], list[int]] | None = None,
) -> list[tuple[str, bool]]:
    """Answers as JSON: text, and whether it ended by itself."""

    def write(mine: Sequence[str], advance: Callable[[int], None]) -> list[tuple[str, bool]]:
        answers = generate_answers(
            bench.adapted.model,
            bench.adapted.tokenizer,
            mine,
            max_new_tokens=ANSWER_TOKENS,
            batch_size=AT_ONCE,
            progress=advance,
            prompts=prompts,
        )
        return [(answer.text, answer.stopped) for answer in answers]

    return bench.spread(f"{task}: {len(questions)} answers, {of}", questions, write)


def _restored(answers: Sequence[Sequence[Any]]) -> list[Answer]:
    """Answers from what `_written` made of them."""
    return [Answer(text, stopped) for text, stopped in answers]


def _ids(examples: Sequence[Example]) -> str:
    """What the losses of these examples follow from, beside the model."""
    return digest(*(b"%d " % example.answer_start + example.input_ids.tobytes() for example in examples))


def _row_losses(
    bench: Bench, evaluator: Evaluator, split: str, examples: Sequence[Example], of: str
) -> list[list[float]]:
    """`Evaluator.row_losses` as lists, and that they are computed."""
    bench.console.print(f"loss: {len(examples)} rows of {split}, {of}")
    return evaluator.row_losses(examples).tolist()


def _none_for_nan(table: np.ndarray) -> list[list[float | None]]:
    """A table as JSON."""
    return [[None if np.isnan(value) else value for value in row] for row in table.tolist()]
