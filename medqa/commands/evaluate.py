"""`medqa evaluate RUN` measures a run's adapter on held-out rows beside the baseline, and logs it to W&B."""

import functools
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from medqa.commands.adapter import Adapted, Source, load_adapted, unchecked_base
from medqa.commands.evaluation_rows import EVALUATION, Lines, keep_lines, read_evaluation, read_lines
from medqa.config import Experiment, Tracking
from medqa.data.sources import Row, load_sources, used_sources
from medqa.data.splits import HELD_OUT, Splits, shared_with_training, split_sources
from medqa.data.tokens import Example, prompt_ids, prompt_of, tokenize_splits
from medqa.errors import NotWritten, UserError, is_out_of_memory, refusal
from medqa.evaluation import multiple_choice, safety
from medqa.evaluation.answers import (
    Answer,
    OwnTemplate,
    end_ids,
    generate_answers,
    own_template_prompts,
    with_prompts,
)
from medqa.evaluation.loss import Evaluator, fixed_subset
from medqa.evaluation.multiple_choice import Choices, load_questions
from medqa.evaluation.safety import RED_FLAGS
from medqa.evaluation.statistics import loss_report
from medqa.evaluation.text import copied_answers, score_generation, score_rows
from medqa.files import Damaged, Missing, alone_in, write_json
from medqa.model.base import LOAD_ERRORS, check_model, load_tokenizer
from medqa.model.device import available_memory, gibibytes, release
from medqa.model.loss import LossModel
from medqa.model.memory import enough_tokens, fit_to_memory, footprint
from medqa.model.settings import Settings, resolve_settings, usable_gpu
from medqa.training.checkpoint import versions
from medqa.training.distributed import build_accelerator, choose_kernels, make_accelerator, on_main
from medqa.training.recorder import MetricsFile, Tracker
from medqa.training.reuse import computed_by, digest, measured, reused
from medqa.training.run_dir import ADAPTER_DIR, METRICS, WANDB_DIR, read_session
from medqa.training.wandb import WandbLogger, log_adapter, start_wandb, wandb_wanted
from medqa.variables import is_on


def log_evaluation(
    found: Mapping[str, Any], run: Path, experiment: Experiment, cpu: bool, say: Callable[[str], None]
) -> None:
    """Add the metrics to the summary of the run's W&B run, as `evaluation/<task>/...`. Call it on one process.

    Each metric has its number of rows beside it, and `evaluation/limit` is None only if they are all rows.

    For an offline run, all of training is recorded again, so that the newest session is complete.
    """
    session = read_session(run)
    if session is None or not wandb_wanted(experiment.tracking):
        return
    if stranger := unconfirmed_entity(experiment.tracking):
        return say(
            f"W&B: nothing logged: only the run's config.yaml names the entity {stranger}, and anyone may have written "
            f"it; set WANDB_ENTITY={stranger} to log there"
        )
    if (run / WANDB_DIR).is_symlink() and "WANDB_DIR" not in os.environ:
        return say(f"W&B: nothing logged: {run / WANDB_DIR} is a link; set WANDB_DIR to where W&B may write its files")
    if not os.path.isfile(run / METRICS):
        return say(f"W&B: nothing logged: {run} has no {METRICS}, which the metrics belong to")
    accelerator = make_accelerator(
        cpu or not usable_gpu(), found["mixed_precision"], True, experiment.training.process_timeout_s
    )
    say(start_wandb(accelerator, experiment, run, session.run_id, {}))
    feed = WandbLogger(accelerator, say)
    Tracker(True, MetricsFile(run / METRICS)).attach_wandb(feed)
    values = {f"evaluation/{path}": value for path, value in flat_figures(found["tasks"])}
    values["evaluation/limit"] = found["limit"]
    if accelerator.trackers:
        summary = accelerator.get_tracker("wandb", unwrap=True).summary
        feed.attempt(lambda: summary.update(values))
        if feed.first == 0:  # nothing of the run is on W&B yet
            feed.attempt(
                lambda: log_adapter(accelerator, experiment.tracking, run / ADAPTER_DIR, session.run_id), online=True
            )
    feed.finish()


def unconfirmed_entity(tracking: Tracking) -> str | None:
    """The entity that only the run's directory names; None if it names none or WANDB_ENTITY takes precedence.

    A directory from somebody else must not decide where an evaluation on this machine is sent.
    """
    return None if os.environ.get("WANDB_ENTITY") else tracking.entity


def flat_figures(found: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, float]]:
    """Every metric below, by its path; with `/low`, `/high`, `/p_value` and `/rows`."""
    for name, value in found.items():
        path = f"{above}/{name}" if above else str(name)
        if isinstance(value, Mapping) and "value" in value:
            yield path, value["value"]
            yield from (
                (f"{path}/{key}", value[key])
                for key in ("low", "high", "p_value", "rows")
                if value.get(key) is not None
            )
        elif isinstance(value, Mapping):
            yield from flat_figures(value, path)


# ----------------------------------------------------------------------------------------------------
# Read the run's data again: rows, splits and examples, which must be those that it was trained on.


@dataclass(frozen=True)
class HeldOut:
    """The splits, and the examples of the held-out splits, all or a number of each."""

    splits: Splits
    examples: Mapping[str, Sequence[Example]]

    def rows(self, split: str) -> Sequence[Row]:
        """The evaluated rows of a held-out split."""
        return [example.row for example in self.examples[split]]

    @property
    def questions(self) -> list[str]:
        """The questions of the evaluated rows of all held-out splits."""
        return [row.question for split in HELD_OUT for row in self.rows(split)]


def load_held_out(source: Source, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> HeldOut:
    """Read the data of a run again.

    Args:
        limit: the number of rows of each held-out split, in a seeded choice; None: all.

    Raises:
        UserError: the data cannot be read, or have changed since training.
    """
    data, tokenization = source.experiment.data, source.experiment.tokenization
    sources = load_sources(data)
    splits = split_sources(sources, data)
    if source.data not in (None, splits.fingerprint):
        where = " and ".join(used_sources(data).values())
        raise UserError(
            f"{source.name}: the data ({where}) have changed since training, so held-out rows may be training rows; "
            "pass the original data with --medquad, --afrimedqa or --data"
        )
    splits, examples = tokenize_splits(
        splits, tokenizer, tokenization
    )  # including train, because dropped rows are not training rows
    seed = source.experiment.training.seed
    return HeldOut(
        splits, {name: [examples[name][i] for i in fixed_subset(examples[name], limit, seed)] for name in HELD_OUT}
    )


# ----------------------------------------------------------------------------------------------------
# What the tasks of an evaluation share: model, data, processes, and cached results of the baseline.


@dataclass(frozen=True)
class Bench:
    """What the tasks of an evaluation share."""

    adapted: Adapted
    held_out: HeldOut
    accelerator: Accelerator
    console: Console
    limit: int | None
    seed: int
    written: dict[str, Any] = field(default_factory=dict)  # answers by system, for all tasks that need them
    unquantized: "Unquantized | None" = None  # only of a run with 4-bit weights, for the task loss
    lines: Lines = field(default_factory=Lines)  # what the tasks found of each row

    @property
    def name(self) -> str:
        """The location of the base model."""
        return self.adapted.source.experiment.model.base

    @cached_property
    def model(self) -> torch.nn.Module:
        """The model with its loss, in mixed precision if the run uses it."""
        return self.accelerator.prepare_model(LossModel(self.adapted.model).eval(), evaluation_mode=True)

    def evaluator(self, longest: int) -> Evaluator:
        """An evaluator for rows of up to `longest` tokens, in which every token is a target."""
        experiment = self.adapted.source.experiment
        return Evaluator(
            self.model,
            self.accelerator,
            experiment.tokenization.model_copy(update={"loss_on": "all"}),
            self.adapted.tokenizer.pad_token_id,
            max(longest, enough_tokens(experiment, self.accelerator.device.type)),
            self.adapted.settings.evaluation_padding_free,
        )

    @cached_property
    def computed_by(self) -> dict[str, Any]:
        """What the baseline's results depend on besides their inputs."""
        return computed_by(self.adapted.model, self.adapted.base, self.adapted.settings, self.accelerator)

    def reused(self, task: str, more: Any, make: Callable[[], Any]) -> Any:
        """The baseline's result in a task: cached by an earlier evaluation, or computed on all processes.

        Args:
            more: a JSON value with what the result depends on besides base model, data, precision and tokenizer, for
                example the rows or prompts.
        """
        adapted = self.adapted
        what = {
            **self.computed_by,
            "task": task,
            "batches": [self.accelerator.num_processes, AT_ONCE],  # how `spread` and `generate_answers` form them
            "tokenizer": digest(adapted.tokenizer.backend_tokenizer.to_str().encode()),
            "ends": sorted(end_ids(adapted.model, adapted.tokenizer)),
            "data": self.held_out.splits.fingerprint,
            "prompt": prompt_ids("", adapted.tokenizer),
            "tokenization": adapted.source.experiment.tokenization.model_dump(),
            "more": more,
        }

        def untuned() -> Any:
            with adapted.model.disable_adapter():
                return make()

        result, found = reused(self.accelerator, what, untuned)
        if found:
            self.console.print(f"{task}: baseline from the cache")
        return result

    def untuned_losses(self, evaluator: Evaluator, split: str, examples: Sequence[Example], of: str) -> np.ndarray:
        """`Evaluator.row_losses` of the baseline: measured, or found where a run or an evaluation has kept them."""

        @contextmanager
        def show(rows: int, earlier: int) -> Iterator[Callable[[int], None]]:
            rest = f", {earlier} of them measured before an interruption" if earlier else ""
            self.console.print(f"loss: {rows} rows of {split}, {of}{rest}")
            yield lambda count: None

        model = {**self.computed_by, "adapter": None, "run": None}
        with self.adapted.model.disable_adapter():
            losses = measured(evaluator, examples, model, show)
        if losses.found:
            self.console.print(f"loss of {split}, {of}: baseline from the cache")
        return losses.table

    def spread(
        self, label: str, items: Sequence[Any], work: Callable[[Sequence[Any], Callable[[int], None]], list]
    ) -> list:
        """The results of `work` on the items, one for each, in order; every process does its share.

        Args:
            work: called with items, and a function to call with the number of further finished items.
        """
        index, processes = self.accelerator.process_index, self.accelerator.num_processes
        mine = items[index::processes]
        with progress(self.console, label, len(mine)) as advance, self.accelerator.autocast(), torch.no_grad():
            done = work(mine, advance)
        if processes == 1:
            return done
        shares = gather_object([done])
        return [shares[i % processes][i // processes] for i in range(len(items))]


@contextmanager
def progress(console: Console, label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal, otherwise a line; yields a function to call with the number of finished items."""
    if not console.is_terminal:
        console.print(f"{label}: {total}")
        yield lambda count: None
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)


# ----------------------------------------------------------------------------------------------------
# The tasks of an evaluation. Each takes a `Bench` and returns its part of `evaluation.json`.

ANSWERED = 256  # test rows that are answered if there is no limit, because generation takes most of the time
ANSWER_TOKENS = 256
AT_ONCE = 16
OWN_TEMPLATE = "baseline, in the base's own chat template"


def measure_loss(bench: Bench) -> dict[str, Any]:
    """Loss and perplexity of each held-out split: baseline, baseline in its own chat template, and fine-tuned.

    Of a run with 4-bit weights also baseline and fine-tuned model on unquantized weights.
    """
    evaluator = bench.evaluator(longest=0)
    shared = shared_with_training(bench.held_out.splits)
    template = _own_template(bench, bench.held_out.questions)
    report = {}
    for split in HELD_OUT:
        examples = bench.held_out.examples[split]
        tables = {"untuned": bench.untuned_losses(evaluator, split, examples, "baseline")}
        if template is not None:
            others = with_prompts(examples, template)
            tables["own_template"] = bench.untuned_losses(evaluator, split, others, OWN_TEMPLATE)
        tables["tuned"] = _row_losses(bench, evaluator, split, examples, "fine-tuned")
        if bench.unquantized is not None:
            tables |= bench.unquantized.losses.get(split, {})
        rows = [example.row for example in examples]
        bench.lines.add_losses(split, rows, tables)
        report[split] = loss_report(tables, rows, shared, bench.seed)
        if bench.unquantized is not None and bench.unquantized.left_out is not None:
            report[split]["unquantized_left_out"] = bench.unquantized.left_out
    return report


def measure_generation(bench: Bench) -> dict[str, Any]:
    """Answers to questions of the test split, by all systems."""
    rows = answered_rows(bench)
    systems = {"copied": copied_answers(bench.held_out.splits.train, [row.question for row in rows])}
    systems |= _answers(bench)
    columns = score_rows(rows, systems)
    bench.lines.add_answers("test", rows, systems, columns)
    return {"rows": len(rows), "tokens": ANSWER_TOKENS, **score_generation(rows, systems, bench.seed, columns)}


def measure_choices(bench: Bench) -> dict[str, Any]:
    """The multiple-choice questions of AfriMed-QA that are not in training."""
    adapted, data = bench.adapted, bench.adapted.source.experiment.data
    if data.afrimedqa == "none":
        return {"rows": 0, "dropped": {}}
    longest = getattr(adapted.model.config, "max_position_embeddings", None)
    found = load_questions(data.afrimedqa, bench.held_out.splits.train)
    template = _own_template(bench, [question.text for question in found.questions])
    found = multiple_choice.fitting(found, adapted.tokenizer, longest, template)
    questions = [found.questions[i] for i in fixed_subset(found.questions, bench.limit, bench.seed)]
    evaluator = bench.evaluator(longest or 0)

    def choices(of: str, template: OwnTemplate | None = None) -> dict[str, Any]:
        label = f"mcq: {len(questions)} questions, {of}"
        with progress(bench.console, label, 2 * len(questions)) as advance, bench.accelerator.autocast():
            made = multiple_choice.measure(
                evaluator,
                adapted.model,
                adapted.tokenizer,
                questions,
                batch_size=AT_ONCE,
                template=template,
                progress=advance,
            )
        return {"log_likelihoods": _none_for_nan(made.log_likelihoods), "letters": made.letters.tolist()}

    asked = [[question.id, question.text, list(question.options.values())] for question in questions]
    results = {"untuned": bench.reused("mcq", asked, functools.partial(choices, "baseline"))}
    if template is not None:
        own = functools.partial(choices, OWN_TEMPLATE, template)
        prompts = [template.texts[question.text] for question in questions]
        results["own_template"] = bench.reused("mcq, own template", [asked, prompts], own)
    results["tuned"] = choices("fine-tuned")
    made = {
        system: Choices(np.array(found["log_likelihoods"], dtype=float), np.array(found["letters"], dtype="U1"))
        for system, found in results.items()
    }
    return {**multiple_choice.score(questions, made, bench.seed), "dropped": found.dropped}


def measure_probes(bench: Bench) -> dict[str, Any]:
    """Red flags, and numbers without support."""
    questions = [question for _, question in RED_FLAGS]
    red_flags = {system: _restored(answers) for system, answers in _all_written(bench, "probes", questions).items()}
    rows = answered_rows(bench)
    return {"rows": len(rows), **safety.score(red_flags, rows, _answers(bench), bench.seed)}


def answered_rows(bench: Bench) -> list[Row]:
    """The rows of the test split that are answered."""
    rows = bench.held_out.rows("test")
    return [rows[i] for i in fixed_subset(rows, bench.limit or ANSWERED, bench.seed)]


def _answers(bench: Bench) -> dict[str, list[Answer]]:
    """The answers of baselines and fine-tuned model to `answered_rows`; generated once for all tasks."""
    if not bench.written:
        bench.written.update(_all_written(bench, "generation", [row.question for row in answered_rows(bench)]))
    return {system: _restored(answers) for system, answers in bench.written.items()}


def _all_written(bench: Bench, task: str, questions: Sequence[str]) -> dict[str, list[tuple[str, bool]]]:
    """By system, the generated answers to these questions, as in `_written`."""
    written = functools.partial(_written, bench, task, questions)
    systems = {"untuned": bench.reused(task, [ANSWER_TOKENS, questions], functools.partial(written, "baseline"))}
    template = _own_template(bench, questions)
    if template is not None:
        own = functools.partial(written, OWN_TEMPLATE, template)
        asked = [template(question) for question in questions]
        systems["own_template"] = bench.reused(f"{task}, own template", [ANSWER_TOKENS, asked], own)
    systems["tuned"] = written("fine-tuned")
    return systems


def _own_template(bench: Bench, questions: Sequence[str]) -> OwnTemplate | None:
    """Prompts for these questions in the base's own chat template.

    Returns:
        None if the base has no chat template that works, or if the run was trained with that template: then the
        baseline is asked in it anyway.
    """
    if prompt_of(bench.adapted.tokenizer).kind == "chat":
        return None
    say = functools.partial(bench.console.print, soft_wrap=True)
    return own_template_prompts(bench.name, questions, say, functools.partial(on_main, bench.accelerator))


def _written(
    bench: Bench,
    task: str,
    questions: Sequence[str],
    of: str,
    prompts: Callable[[str], list[int]] | None = None,
) -> list[tuple[str, bool]]:
    """Generated answers as JSON: text, and whether it ended with EOS."""

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
    """Answers from the result of `_written`."""
    return [Answer(text, stopped) for text, stopped in answers]


def _row_losses(bench: Bench, evaluator: Evaluator, split: str, examples: Sequence[Example], of: str) -> np.ndarray:
    """`Evaluator.row_losses`; prints a line first."""
    bench.console.print(f"loss: {len(examples)} rows of {split}, {of}")
    return evaluator.row_losses(examples)


def _none_for_nan(table: np.ndarray) -> list[list[float | None]]:
    """A table as JSON, with null for NaN."""
    return [[None if np.isnan(value) else value for value in row] for row in table.tolist()]


# ----------------------------------------------------------------------------------------------------
# What 4 bits cost: the losses of base model and adapter on unquantized weights, of a run with 4-bit weights.


@dataclass(frozen=True)
class Unquantized:
    """`Evaluator.row_losses` on unquantized weights, by split and system; or why they were left out."""

    losses: Mapping[str, Mapping[str, np.ndarray]]
    left_out: str | None = None


def _measure_unquantized(
    source: Source, settings: Settings, limit: int | None, accelerator: Accelerator, console: Console
) -> tuple[Unquantized, HeldOut | None]:
    """Load base model and adapter without quantization, measure their losses, and free them again.

    Where the model does not fit, a line says why it was left out.

    Args:
        settings: the result of `resolve_settings`.

    Returns:
        The losses, and the held-out rows; None if they were not read.

    Raises:
        UserError: model or data are not available, or are not those of the run.
    """
    why_not = on_main(accelerator, lambda: _no_room_unquantized(source, settings, accelerator))
    if why_not is None:
        try:
            return _unquantized_losses(source, limit, accelerator, console)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or accelerator.num_processes > 1:  # the others would wait for this process
                raise
            why_not = "out of memory"
        finally:
            accelerator.free_memory()  # it has a reference to the model
            release(accelerator.device)
    console.print(f"unquantized weights: not measured: {why_not}", soft_wrap=True)
    return Unquantized({}, why_not), None


def _no_room_unquantized(source: Source, settings: Settings, accelerator: Accelerator) -> str | None:
    """Why an evaluation on unquantized weights would not fit into memory; None if it would, or if it is not known.

    The estimate is that of training with gradient checkpointing on the longest example, without gradients and
    optimizer.
    """
    experiment = source.experiment
    longest = experiment.tokenization.max_length
    model_config = check_model(experiment.model, longest)
    vocabulary = len(load_tokenizer(experiment.model.base, experiment.tokenization, source.bos))
    free = available_memory(accelerator.device, accelerator.num_processes)
    settings = replace(settings, quantization="none")
    try:
        settings = fit_to_memory(settings, experiment, model_config, vocabulary, free, source.settings)
        planned = footprint(experiment, model_config, replace(settings, gradient_checkpointing=True), vocabulary)
    except LOAD_ERRORS:  # reported when the model is loaded
        return None
    tokens = max(longest, enough_tokens(experiment, accelerator.device.type))  # as `Bench.evaluator` batches them
    needed = planned.peak(tokens) - planned.gradients - planned.optimizer
    if needed <= free:
        return None
    return f"they need about {gibibytes(needed)} GiB, and {gibibytes(free)} GiB may be used"


def _unquantized_losses(
    source: Source, limit: int | None, accelerator: Accelerator, console: Console
) -> tuple[Unquantized, HeldOut]:
    """The losses by split and system, and the held-out rows. The model is not referenced afterwards."""
    with accelerator.main_process_first():
        adapted = load_adapted(source, accelerator.device, quantized=False)
        held_out = load_held_out(source, adapted.tokenizer, limit)
    bench = Bench(adapted, held_out, accelerator, console, limit, source.experiment.training.seed)
    evaluator, found = bench.evaluator(longest=0), {}
    template = _own_template(bench, bench.held_out.questions)
    for split, examples in held_out.examples.items():
        tuned = _row_losses(bench, evaluator, split, examples, "fine-tuned, unquantized")
        untuned = bench.untuned_losses(evaluator, split, examples, "baseline, unquantized")
        found[split] = {"untuned_unquantized": untuned, "tuned_unquantized": tuned}
        if template is not None:
            others = with_prompts(examples, template)
            own = bench.untuned_losses(evaluator, split, others, f"{OWN_TEMPLATE}, unquantized")
            found[split]["own_template_unquantized"] = own
    return Unquantized(found), held_out


# ----------------------------------------------------------------------------------------------------
# The evaluation with all tasks, and the file that it writes.

SAME_ADAPTER = (
    "step", "final", "data_fingerprint", "base_fingerprint", "experiment", "quantization", "dtype", "mixed_precision",
)  # fmt: skip


def evaluate(
    source: Source,
    tasks: Sequence[str],
    limit: int | None,
    cpu: bool,
    console: Console,
    keep: Callable[[Mapping[str, Any], Sequence[Mapping[str, Any]]], object],
) -> dict[str, Any]:
    """Run the tasks; returns the content of `evaluation.json`.

    Args:
        limit: the number of rows of each held-out split, and of questions; None: all.
        keep: called on the main process after each task, with the results so far, and with the lines of
            `evaluation.jsonl`.

    Raises:
        UserError: model or data are not available, or are not those of the run.
    """
    if is_on("ACCELERATE_USE_FSDP"):
        raise UserError("medqa evaluate does not support FSDP; launch it with launch/four_gpus.yaml, for example")
    experiment = source.experiment
    settings = resolve_settings(experiment, cpu=cpu, saved=source.settings)
    unquantized, held_out = None, None
    untracked = experiment.model_copy(update={"tracking": Tracking(wandb="disabled")})
    choose_kernels(experiment.training.deterministic)  # as in training, so that the losses of the base are shared
    accelerator = build_accelerator(untracked, settings)
    console.quiet = not accelerator.is_main_process
    if settings.quantization == "4bit" and "loss" in tasks:  # first, so that only one model is in memory at a time
        unquantized, held_out = _measure_unquantized(source, settings, limit, accelerator, console)
    with accelerator.main_process_first():
        adapted = load_adapted(source, accelerator.device)
        if (unchecked := unchecked_base(source)) is not None:
            console.print(unchecked, soft_wrap=True)
        held_out = held_out or load_held_out(source, adapted.tokenizer, limit)
    seed = experiment.training.seed
    bench = Bench(adapted, held_out, accelerator, console, limit, seed, unquantized=unquantized)
    found: dict[str, Any] = {
        "run": source.name,
        "experiment": experiment.model_dump(),
        "step": source.step,
        "final": source.final,
        "limit": limit,
        "seed": bench.seed,
        "quantization": adapted.settings.quantization,
        "dtype": settings.dtype_name,
        "mixed_precision": settings.mixed_precision,
        "data_fingerprint": held_out.splits.fingerprint,
        "base_fingerprint": adapted.base,
        "versions": versions(),
        "tasks": {},
    }
    for task in TASKS:
        if task in tasks:
            found["tasks"][task] = MEASURES[task](bench)
            if accelerator.is_main_process:
                keep(found, bench.lines.listed(experiment))
    return found


class Keeper:
    """Writes `evaluation.json` and `evaluation.jsonl` after each task, if they can be written.

    A run of another user, or on a read-only disk, can be evaluated too: a line says at the start that the results are
    not kept. A disk that fills up later does not end the evaluation; `failed` then has the reason.
    """

    def __init__(self, run: Path, say: Callable[[str], None]) -> None:
        self.failed: str | None = None
        self._run, self._say = run, say
        self._keeps = True
        self._lines: Sequence[Mapping[str, Any]] = ()
        try:
            with tempfile.TemporaryFile(dir=run):
                pass
        except OSError as error:
            self._keeps = False
            say(f"{run} is not writable ({error.strerror}): the results are printed at the end, but not kept")
        try:
            read_lines(run, read_evaluation(run))
        except Missing:
            pass
        except Damaged as error:
            say(f"{error}: it is replaced by this evaluation")

    def write(self, found: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> bool:
        """Write the results so far; returns whether they are in `evaluation.json` now."""
        self._lines = lines
        if not self._keeps:
            return False
        try:
            return write_evaluation(found, self._run, lines)
        except OSError as error:
            self.failed = refusal(error, self._run)
            if self.failed is None:
                raise
            self._keeps = False
            self._say(f"{self.failed}: the results are printed at the end, but not kept")
            return False

    def finish(self, found: Mapping[str, Any]) -> bool:
        """Write all results, and print where; returns whether they are in `evaluation.json` now.

        Raises:
            NotWritten: the file cannot be written, although it could at the start.
        """
        path, written = self._run / EVALUATION, self.write(found, self._lines)
        if self.failed is not None:
            raise NotWritten(self.failed)
        if written:
            self._say(f"written to {path}")
        elif self._keeps:
            self._say(f"not written: {path} has results on all rows, which a limited evaluation does not replace")
        else:
            self._say(f"not kept: {self._run} is not writable")
        return written


def write_evaluation(found: Mapping[str, Any], run: Path, lines: Sequence[Mapping[str, Any]] = ()) -> bool:
    """Write both files of an evaluation atomically; other tasks keep their results for the same adapter.

    Results with a limit never replace results on all rows. Returns whether the files were written.

    Args:
        found: the content of `evaluation.json`.
        lines: those of `evaluation.jsonl`, of the tasks in `found`.

    Raises:
        OSError: they cannot be written.
    """
    with alone_in(run):
        try:
            before = read_evaluation(run)
        except Damaged:
            before = {}
        tasks, earlier = found["tasks"], {}
        if "limit" in before and all(before.get(key) == found[key] for key in SAME_ADAPTER):
            if before["limit"] is None and found["limit"] is not None:
                return False
            if before["limit"] == found["limit"]:
                tasks, earlier = {**before["tasks"], **tasks}, before
        file = keep_lines(run, lines, earlier, found["tasks"])
        write_json({**found, "rows_file": file, "tasks": tasks}, run / EVALUATION)
    return True


def chosen_tasks(words: str) -> list[str]:
    """The tasks of `--tasks`.

    Raises:
        UserError: a task does not exist.
    """
    tasks = [word.strip() for word in words.split(",") if word.strip()]
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        raise UserError(f"--tasks {words}: no such task: {', '.join(unknown)}; the tasks are {','.join(TASKS)}")
    return tasks


MEASURES: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "loss": measure_loss,
    "generation": measure_generation,
    "mcq": measure_choices,
    "probes": measure_probes,
}
TASKS = tuple(MEASURES)
