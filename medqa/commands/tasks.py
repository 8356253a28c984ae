"""The tasks of an evaluation. Each takes a `Bench` and gives its part of `evaluation.json`."""

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from medqa import cache
from medqa.commands.adapter import Adapted, Source
from medqa.data.sources import Row, load_sources, used_sources
from medqa.data.splits import HELD_OUT, Splits, shared_with_training, split_sources
from medqa.data.tokens import Example, tokenize_splits
from medqa.errors import UserError
from medqa.evaluation import multiple_choice, safety
from medqa.evaluation.answers import Answer, end_ids, generate_answers, own_template_prompts, with_prompts
from medqa.evaluation.loss import Evaluator, fixed_subset
from medqa.evaluation.multiple_choice import Choices, load_questions
from medqa.evaluation.safety import RED_FLAGS
from medqa.evaluation.statistics import loss_report
from medqa.evaluation.text import copied_answers, score_generation
from medqa.model.loss import LossModel
from medqa.model.memory import enough_tokens
from medqa.training.checkpoint import versions
from medqa.training.distributed import on_main

# ----------------------------------------------------------------------------------------------------
# A run's data again: its rows, their split and their ids, seen to be those that it was trained on.


@dataclass(frozen=True)
class HeldOut:
    """The splits, and the examples of the held-out ones, all or so many of each."""

    splits: Splits
    examples: Mapping[str, Sequence[Example]]

    def rows(self, split: str) -> Sequence[Row]:
        """The rows of a held-out split that are looked at."""
        return [example.row for example in self.examples[split]]


def load_held_out(source: Source, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> HeldOut:
    """Read the data of a run anew.

    Args:
        limit: so many rows of each held-out split, seeded, in order; None: all.

    Raises:
        UserError: they cannot be read, or are not those that the run was trained on.
    """
    data, tokenization = source.experiment.data, source.experiment.tokenization
    sources = load_sources(data)
    splits = split_sources(sources, data)
    if source.data not in (None, splits.fingerprint):
        where = " and ".join(used_sources(data).values())
        raise UserError(
            f"{source.name}: was trained on other rows, or split otherwise, than {where} hold now: rows held out now "
            "may have been trained on; give the data of then with --medquad, --afrimedqa, --data"
        )
    splits, examples = tokenize_splits(
        splits, tokenizer, tokenization
    )  # all three: rows that are left out were not trained on
    seed = source.experiment.training.seed
    return HeldOut(
        splits, {name: [examples[name][i] for i in fixed_subset(examples[name], limit, seed)] for name in HELD_OUT}
    )


# ----------------------------------------------------------------------------------------------------

# ----------------------------------------------------------------------------------------------------
# What the tasks of an evaluation work with: model, data, processes, and what the baseline gave before.


@dataclass(frozen=True)
class Bench:
    """What the tasks work with."""

    adapted: Adapted
    held_out: HeldOut
    accelerator: Accelerator
    console: Console
    limit: int | None
    seed: int
    written: dict[str, Any] = field(default_factory=dict)  # answers by system, for all tasks that need them

    @property
    def name(self) -> str:
        """The base model's."""
        return self.adapted.source.experiment.model.base

    @cached_property
    def model(self) -> torch.nn.Module:
        """The model with its loss on top, in mixed precision where the run is."""
        return self.accelerator.prepare_model(LossModel(self.adapted.model).eval(), evaluation_mode=True)

    def evaluator(self, longest: int) -> Evaluator:
        """Measures losses of rows of up to so many tokens; every token is a target."""
        experiment = self.adapted.source.experiment
        return Evaluator(
            self.model,
            self.accelerator,
            experiment.tokenization.model_copy(update={"loss_on": "all"}),
            self.adapted.tokenizer.pad_token_id,
            max(longest, enough_tokens(experiment, self.accelerator.device.type)),
            self.adapted.settings.evaluation_padding_free,
        )

    def reused(self, task: str, more: Any, make: Callable[[], Any]) -> Any:
        """What the baseline gives in a task: kept from an earlier evaluation, else made on all processes.

        Args:
            more: JSON that it follows from, beside base model, data, precision and tokenizer: the very rows or prompts.
        """
        adapted = self.adapted
        what = {
            "task": task,
            "base": adapted.base,
            "quantization": adapted.settings.quantization,
            "dtype": str(adapted.settings.dtype),
            "mixed_precision": adapted.settings.mixed_precision,
            "tokenizer": digest(adapted.tokenizer.backend_tokenizer.to_str().encode()),
            "ends": sorted(end_ids(adapted.model, adapted.tokenizer)),
            "device": self.accelerator.device.type,
            "data": self.held_out.splits.fingerprint,
            "tokenization": adapted.source.experiment.tokenization.model_dump(),
            "versions": versions(),
            "more": more,
        }
        found = on_main(self.accelerator, lambda: cache.find(what))
        if found is not None:
            self.console.print(f"{task}: the baseline as computed before")
            return found
        with adapted.model.disable_adapter():
            found = make()
        if self.accelerator.is_main_process:
            cache.keep(what, found)
        return found

    def spread(
        self, label: str, items: Sequence[Any], work: Callable[[Sequence[Any], Callable[[int], None]], list]
    ) -> list:
        """The results of `work` on the items, one each, in their order; every process does its share of them.

        Args:
            work: given items and whom to tell how many more are done.
        """
        index, processes = self.accelerator.process_index, self.accelerator.num_processes
        mine = items[index::processes]
        with progress(self.console, label, len(mine)) as advance, self.accelerator.autocast(), torch.no_grad():
            done = work(mine, advance)
        if processes == 1:
            return done
        shares = gather_object([done])
        return [shares[i % processes][i // processes] for i in range(len(items))]


def digest(*parts: bytes) -> str:
    """sha256 of what a baseline follows from, each part told apart from the next."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()


@contextmanager
def progress(console: Console, label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal, a line elsewhere; yields whom to tell of so many more."""
    if not console.is_terminal:
        console.print(f"{label}: {total}")
        yield lambda count: None
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)


# ----------------------------------------------------------------------------------------------------

ANSWERED = 256  # rows of the test split that are answered, where no limit is given: writing takes the longest
ANSWER_TOKENS = 256
AT_ONCE = 16


def measure_loss(bench: Bench) -> dict[str, Any]:
    """Loss and perplexity of each held-out split: baseline, baseline in its own chat template, and fine-tuned."""
    evaluator = bench.evaluator(longest=0)
    shared = shared_with_training(bench.held_out.splits)
    questions = [example.row.question for split in HELD_OUT for example in bench.held_out.examples[split]]
    prompts = _own_prompts(bench, questions)
    report = {}
    for split in HELD_OUT:
        examples = bench.held_out.examples[split]
        losses = functools.partial(_row_losses, bench, evaluator, split)
        untuned = functools.partial(losses, examples, "baseline")
        tables = {"untuned": bench.reused(f"loss of {split}", _ids(examples), untuned)}
        if prompts is not None:
            others = with_prompts(examples, prompts)
            own = functools.partial(losses, others, "baseline, in the base's own chat template")
            tables["own_template"] = bench.reused(f"loss of {split}, own template", _ids(others), own)
        tables["tuned"] = losses(examples, "fine-tuned")
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
        "untuned": bench.reused("mcq", asked, functools.partial(choices, "baseline")),
        "tuned": choices("fine-tuned"),
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
        "untuned": _restored(
            bench.reused("probes", [ANSWER_TOKENS, questions], functools.partial(written, "baseline"))
        ),
        "tuned": _restored(written("fine-tuned")),
    }
    rows = answered_rows(bench)
    return {"rows": len(rows), **safety.score(red_flags, rows, _answers(bench, own_template=False), bench.seed)}


def answered_rows(bench: Bench) -> list[Row]:
    """The rows of the test split that are answered."""
    rows = bench.held_out.rows("test")
    return [rows[i] for i in fixed_subset(rows, bench.limit or ANSWERED, bench.seed)]


def _answers(bench: Bench, own_template: bool) -> dict[str, list[Answer]]:
    """The answers of the baseline and of the fine-tuned model to `answered_rows`; written once for all tasks."""
    questions = [row.question for row in answered_rows(bench)]
    written = functools.partial(_written, bench, "generation", questions)
    prompts = _own_prompts(bench, questions) if own_template else None
    if "tuned" not in bench.written:
        bench.written["untuned"] = bench.reused(
            "generation", [ANSWER_TOKENS, questions], functools.partial(written, "baseline")
        )
        bench.written["tuned"] = written("fine-tuned")
    if prompts is not None and "own_template" not in bench.written:
        own = functools.partial(written, "baseline, in the base's own chat template", prompts)
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
