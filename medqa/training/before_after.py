"""What comes before and after training: baseline, final evaluation, sample answers, adapter, model card, summary."""

import functools
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from medqa.config import Data, Experiment, Model, length
from medqa.config_file import yaml_text
from medqa.data.batches import TrainingData
from medqa.data.tokens import Example, Prompt, prompt, prompt_of
from medqa.errors import UserError
from medqa.evaluation.answers import sample_answers
from medqa.evaluation.loss import Evaluator, SplitLoss, fixed_subset, summarize
from medqa.files import UNFINISHED, Damaged, copy_file, read_json, write_json
from medqa.model.adapter_files import ADAPTER_FILES
from medqa.model.base import load_adapter_weights, save_tokenizer
from medqa.model.device import reset_peak
from medqa.model.memory import enough_tokens
from medqa.model.settings import Settings
from medqa.model.sharding import is_sharded
from medqa.terminal import printable
from medqa.tiny import BASE_DIR
from medqa.training.batches import Batches
from medqa.training.checkpoint import git_commit, measure, save_adapter, verify_checkpoint, versions
from medqa.training.distributed import on_main
from medqa.training.plan import accumulation_steps, parameter_counts
from medqa.training.recorder import Recorder
from medqa.training.reuse import Measured, adapter_digest, computed_by, measured
from medqa.training.run import Run
from medqa.training.run_dir import ADAPTER_DIR, SUMMARY
from medqa.training.state import Progress, TrainState
from medqa.training.stopping import Stopper
from medqa.training.wandb import EVAL_NAMES, log_adapter, log_samples, sampled_rows


@dataclass(frozen=True)
class FinalMetrics:
    """The metrics of the final adapter.

    Attributes:
        final: on the validation split.
        test: on the test split.
        adapter_step: the update that the adapter comes from.
    """

    final: SplitLoss
    test: SplitLoss
    adapter_step: int


AFTERWARDS_S = 120.0  # seconds that the final evaluation leaves for what follows it, at most


class HeldOut:
    """Evaluates the held-out rows of a run before, during and after training.

    Each evaluation measures the fixed validation rows (`eval`), so that its losses are comparable over the whole run.
    Before and after training all validation rows are measured, or `evaluation.full_rows` of them (`eval_full`).
    The baseline is measured once for all runs, and what an
    interrupted evaluation has measured is kept (`medqa/training/reuse.py`).

    Attributes:
        validation: the examples of the validation split.
    """

    def __init__(
        self,
        state: TrainState,
        batches: Batches,
        data: TrainingData,
        experiment: Experiment,
        settings: Settings,
        run: Run,
        stopper: Stopper,
    ) -> None:
        self.validation, test = data.examples["validation"], data.examples["test"]
        self._experiment = experiment
        rows, full_rows, seed = experiment.evaluation.rows, experiment.evaluation.full_rows, experiment.training.seed
        self._test = [test[i] for i in fixed_subset(test, full_rows, seed)]
        accelerator, self._adapted = batches.accelerator, state.adapted
        self._late, self._run_id = stopper.within, run.session.run_id
        self._base = computed_by(state.adapted, run.identity.fingerprints.base, settings, accelerator)
        # No more tokens at a time than in training. As many as in `medqa evaluate`, which shares the results, if they
        # fit; with sharded weights, which are gathered for each batch, as many as fit.
        enough = enough_tokens(experiment, accelerator.device.type)
        most_tokens = batches.most_tokens if settings.shards > 1 else min(enough, batches.most_tokens)
        self._evaluator = Evaluator(
            state.model,
            accelerator,
            experiment.tokenization,
            batches.pad_token_id,
            most_tokens,
            settings.evaluation_padding_free,
        )
        fixed, full = fixed_subset(self.validation, rows, seed), fixed_subset(self.validation, full_rows, seed)
        self._fixed_rows = [self.validation[i] for i in fixed]
        # Both subsets at once, with where the rows of each stand among them. The smaller is a part of the larger.
        both = sorted({*fixed, *full})
        self._rows = [self.validation[i] for i in both]
        self._fixed, self._full = np.searchsorted(both, fixed), np.searchsorted(both, full)

    def fixed_loss(self) -> SplitLoss:
        """The loss of the fixed validation rows for the current weights."""
        return self._evaluator.measure(self._fixed_rows)

    def measure_baseline(self, progress: Progress, recorder: Recorder) -> None:
        """Evaluate the validation split before the first update, unless an earlier session has done so.

        Raises:
            StoppedInTime: the deadline is near. The rows measured so far are kept.
        """
        if progress.baseline is None:
            found = self._losses("baseline", self._rows, recorder)
            progress.fixed_baseline, progress.baseline = self._both(found)
            progress.evaluation_s = found.seconds
            if found.found:
                recorder.message(
                    f"baseline: the losses of {len(self._rows):,} rows are in the cache; another run or an evaluation "
                    "has measured them"
                )
            progress.best_loss = progress.fixed_baseline.loss
            recorder.log_split(0, "eval", progress.fixed_baseline)
            recorder.log_split(0, "eval_full", progress.baseline)
        reset_peak(self._evaluator.accelerator.device)  # from here on the peak memory is that of training
        recorder.startup.record("evaluation")

    def expected_seconds(self, progress: Progress) -> tuple[float, float]:
        """Estimates of the seconds of an evaluation during training, and of the final evaluation.

        The final one measures validation and test, and with `training.keep: best` validation once more.
        """
        splits = 3 if self._experiment.training.keep == "best" else 2
        return progress.evaluation_s * len(self._fixed_rows) / len(self._rows), splits * progress.evaluation_s

    def final_seconds(self, progress: Progress) -> float:
        """The seconds that the final evaluation must have before a deadline.

        It may stop in between and go on in another session, except with sharded weights: then an estimate and a margin.
        """
        if not is_sharded(self._evaluator.model):
            return 0.0
        return self.expected_seconds(progress)[1] + progress.evaluation_s

    def measure_final(self, state: TrainState, directories: Sequence[Path], recorder: Recorder) -> FinalMetrics:
        """The final evaluation. With `training.keep: best` the model has the best adapter afterwards.

        The validation split is logged with the adapter of the last update. The test split is evaluated once, with the
        adapter that the run keeps.

        Args:
            directories: where to look for the checkpoint with the best adapter.

        Raises:
            UserError: that checkpoint is missing or damaged.
            StoppedInTime: the deadline is near. The rows measured so far are kept.
        """
        progress, keep = state.progress, self._experiment.training.keep
        fixed, final = self._both(
            self._losses("final evaluation, validation", self._rows, recorder, progress.evaluation_s)
        )
        adapter_step = progress.step
        progress.note_best(progress.step, fixed.loss)
        recorder.log_evaluation(progress, fixed)
        recorder.log_split(progress.step, "eval_full", final)
        if keep == "best" and progress.best_step == 0:
            recorder.message(
                "training.keep=best: the baseline has the lowest loss on the fixed validation rows, so the adapter of "
                "the last update is kept"
            )
        elif keep == "best" and progress.best_step != progress.step:
            adapter_step = progress.best_step
            _load_best(state.adapted, self._evaluator.accelerator, directories, adapter_step)
            recorder.message(
                f"training.keep=best: the adapter of update {adapter_step} is kept; it has the lowest loss on the "
                "fixed validation rows"
            )
            full = [self._rows[i] for i in self._full]
            final = summarize(
                self._losses("best adapter, validation", full, recorder, progress.evaluation_s).table, full
            )
        losses = self._losses("final evaluation, test", self._test, recorder, progress.evaluation_s)
        test = summarize(losses.table, self._test)
        recorder.log_split(progress.step, "test", test)
        return FinalMetrics(final, test, adapter_step)

    def _losses(self, title: str, rows: Sequence[Example], recorder: Recorder, evaluation_s: float = 0.0) -> Measured:
        """The losses of rows with the current weights.

        Args:
            evaluation_s: the seconds of an evaluation before training, if sample answers and the adapter are still to
                be written afterwards: so much time, but at most `AFTERWARDS_S`, is left for them before a deadline.
        """
        adapter = adapter_digest(self._adapted)
        # Without an adapter every run begins with the same model. The digest knows only weights, not `lora_alpha`.
        model = {**self._base, "adapter": adapter, "run": None if adapter is None else self._run_id}
        afterwards = min(evaluation_s, AFTERWARDS_S)
        late = lambda seconds: self._late(seconds + afterwards)  # noqa: E731
        return measured(self._evaluator, rows, model, functools.partial(recorder.evaluating, title), late)

    def _both(self, losses: Measured) -> tuple[SplitLoss, SplitLoss]:
        """The losses of the fixed validation rows and of all, or `evaluation.full_rows`, validation rows."""
        full = [self._rows[i] for i in self._full]
        return (
            summarize(losses.table[self._fixed], self._fixed_rows),
            summarize(losses.table[self._full], full),
        )


def _load_best(model: PeftModel, accelerator: Accelerator, directories: Sequence[Path], step: int) -> None:
    """Load the best adapter on every process. Only the main process reads files; it broadcasts the weights.

    Raises:
        UserError: as `_best_checkpoint`, on every process.
    """

    def read() -> None:
        load_adapter_weights(model, _best_checkpoint(directories, step), "checkpoint")

    on_main(accelerator, read)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(broadcast(parameter.data))


def _best_checkpoint(directories: Sequence[Path], step: int) -> Path:
    """The valid checkpoint of update `step` in the first of these directories that has it.

    Raises:
        UserError: none has it.
    """
    problems = []
    for path in (directory / f"checkpoint-{step}" for directory in directories):
        try:
            verify_checkpoint(path)
            return path
        except Damaged as error:
            problems.append(f"{path}: {error}")
    raise UserError(
        f"training.keep=best: the checkpoint of update {step} is missing or damaged ({'; '.join(problems)}). Restore "
        "it and start again, or export another: `medqa export DIR --checkpoint STEP`"
    )


# ----------------------------------------------------------------------------------------------------
# The results of a run: the adapter with tokenizer and model card, and `summary.json`.

LICENCES = {
    "medquad": "MedQuAD (Ben Abacha and Demner-Fushman, 2019): CC BY 4.0",
    "afrimedqa": "AfriMed-QA v2: CC BY-NC-SA 4.0, non-commercial use only",
}

NON_COMMERCIAL = "cc-by-nc-sa-4.0"
UNKNOWN = "other"
HUB_NAME = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*", re.ASCII)
NOT_IN_CODE = str.maketrans("`|", "' ")  # "|" ends the cell of a table even inside a code span
PERMISSIVE = (Model().base, str(BASE_DIR))  # Apache 2.0 and the embedded model: no terms beyond those of the data


def licence(data: Data | None, base: str) -> tuple[str, str]:
    """The licence of an adapter trained on these data from this base: the hub's name for it, and a sentence.

    Args:
        data: None if the training data are not recorded.
    """
    if data is None:
        return UNKNOWN, "the training data are not recorded; the licences of that data and of the base model apply"
    own = f"; the licences of {', '.join(f'`{name}`' for name in sorted(data.files))}, data of one's own, apply too"
    if data.afrimedqa != "none":
        why = "non-commercial use only, because AfriMed-QA v2 is CC BY-NC-SA 4.0"
        return NON_COMMERCIAL, why + (own if data.files else "")
    if data.files:
        return UNKNOWN, "it was trained on data of one's own: the licences of that data and of the base model apply"
    if base not in PERMISSIVE:
        return UNKNOWN, "CC BY 4.0 as far as MedQuAD goes; the base model's own licence and terms apply too"
    return "cc-by-4.0", "CC BY 4.0, as MedQuAD; the base model's own licence applies too"


def data_lines(data: Data) -> str:
    """The training data, one line for each source. The user's own data appear by name: a path may identify the user."""
    used = [text for name, text in LICENCES.items() if getattr(data, name) != "none"]
    return "\n".join(f"- {text}" for text in [*used, *(f"`{name}`: data of one's own" for name in sorted(data.files))])


def front_matter(values: Mapping[str, Any]) -> str:
    """The YAML header of a model card, as the Hugging Face Hub reads it."""
    return f"---\n{yaml_text(dict(values))}---\n"


def plain(text: Any) -> str:
    """Text on one line, escaped so that Markdown and HTML show it literally; for names that others chose."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return re.sub(r"([\\`*\[\]<>&|#~])", r"\\\1", line)


def code(text: Any) -> str:
    """Text on one line as a Markdown code span, without other markup in it."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return f"`{line.translate(NOT_IN_CODE)}`"


def prompt_block(own: Prompt | None = None) -> str:
    """A prompt as a code block of Markdown, in which nothing else is markup; None: the project's own."""
    text = own.text("{question}") if own else prompt("{question}")
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{printable(text).removesuffix(chr(10))}\n{fence}"


def public_name(where: str) -> str | None:
    """The name of a model or an adapter on the Hugging Face Hub; None if unknown.

    A local path is not a name: it may identify the user, and means nothing to others. For a path in the hub's own cache
    the name is known, and for another directory if its config.json has kept the name (`_name_or_path`).
    """
    path = os.path.expanduser(where)
    cached = re.search(r"models--([\w.-]+?)/snapshots/[0-9a-f]{40}/?$", os.path.realpath(path))
    if cached is not None:
        return cached[1].replace("--", "/", 1)
    if not os.path.lexists(path):
        return where if HUB_NAME.fullmatch(where) else None
    try:
        said = read_json(Path(path) / "config.json")
    except Damaged:
        return None
    name = said.get("_name_or_path") if isinstance(said, dict) else None
    if not isinstance(name, str) or name.count("/") != 1 or os.path.lexists(os.path.expanduser(name)):
        return None
    return name if HUB_NAME.fullmatch(name) else None


def base_words(base: str) -> str:
    """A base model in a sentence of a model card: its name on the hub, or the last part of its directory's path."""
    if (name := public_name(base)) is not None:
        return code(name)
    if base == str(BASE_DIR):
        return "the embedded base model"
    return f"a base model in a local directory ({plain(os.path.basename(os.path.abspath(os.path.expanduser(base))))})"


def save_results(
    run: Run,
    state: TrainState,
    ending: FinalMetrics,
    tokenizer: PreTrainedTokenizerBase,
    validation: Sequence[Example],
    experiment: Experiment,
    recorder: Recorder,
) -> None:
    """Save the adapter and `summary.json`, log sample answers and the adapter to W&B, and print the result.

    Only the main process does this.

    Args:
        validation: the rows that sample answers are generated for.

    Raises:
        UserError: the name of the adapter's directory is taken by a file or a link that no run created.
    """
    accelerator, wandb_logger = recorder.accelerator, recorder.wandb_logger
    if not accelerator.is_main_process:
        return wandb_logger.finish()
    summary = make_summary(experiment, state, ending, run, recorder)
    directory = save_final_adapter(run.output_dir, state.adapted, tokenizer, summary, experiment)
    summary |= adapter_sha256(directory)
    samples = sampled_rows(validation, experiment)
    if accelerator.trackers and not run.identity.environment.sharded and samples:
        answers = sample_answers(state.adapted, tokenizer, samples, ending.adapter_step)
        wandb_logger.attempt(lambda: log_samples(accelerator, answers, wandb_logger.first), online=True)
    wandb_logger.attempt(
        lambda: log_adapter(accelerator, experiment.tracking, directory, run.session.run_id), online=True
    )
    write_json(summary, run.output_dir / SUMMARY)
    recorder.show_result(summary, directory)
    wandb_logger.finish()


def make_summary(
    experiment: Experiment, state: TrainState, ending: FinalMetrics, run: Run, recorder: Recorder
) -> dict[str, Any]:
    """The content of `summary.json`, except the checksum of the adapter."""
    progress, accelerator, identity = state.progress, recorder.accelerator, run.identity
    assert progress.baseline is not None  # it was measured before the first update
    trainable, total = parameter_counts(state.adapted)
    device = accelerator.device
    _, _, why_quantized = run.in_effect.get("model.quantization", (None, None, None))  # None: as requested
    return {
        "experiment": run.name,
        "baseline": _split_metrics(progress.baseline.record()),
        "final": _split_metrics(ending.final.record()),
        "test": _split_metrics(ending.test.record()),
        "best_step": progress.best_step,
        "wall_clock_s": recorder.clock(),
        "peak_memory_bytes": progress.peak_memory,
        "memory_device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "trainable_parameters": trainable,
        "total_parameters": total,
        "updates": progress.step,
        "length": length(experiment),
        "stopped_early": progress.stopped_early,
        "adapter_step": ending.adapter_step,
        "resumes": run.session.resumes,
        "processes": accelerator.num_processes,
        "sharded": identity.environment.sharded,
        "cpu_threads": torch.get_num_threads(),
        "gradient_accumulation_steps": accumulation_steps(experiment.training, accelerator.num_processes),
        "quantization": identity.environment.settings.quantization,
        "quantization_reason": why_quantized,
        "mixed_precision": accelerator.mixed_precision,
        "scaler_overflows": progress.overflows,
        "micro_batch_rows": progress.micro_batch_rows or experiment.training.per_device_batch_size,
        "micro_batch_tokens": progress.micro_batch_tokens,
        "start_s": dict(recorder.startup.seconds),
        "not_bitwise": [asdict(change) for change in progress.not_bitwise],
        "data_fingerprint": identity.fingerprints.data,
        "base_fingerprint": identity.fingerprints.base,
        "git_commit": git_commit(),
        "versions": versions(),
    }


def _split_metrics(record: Mapping[str, Any]) -> dict[str, float | None]:
    """The four metrics of a split."""
    return {key: record[key] for key in EVAL_NAMES}


def save_final_adapter(
    output_dir: Path,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    summary: Mapping[str, Any],
    experiment: Experiment,
) -> Path:
    """Write adapter, tokenizer and model card to `lora_adapters/`, and return that directory.

    Raises:
        UserError: the name of the directory is taken by a file or a link that no run created.
    """
    directory = output_dir / ADAPTER_DIR
    # Written to a temporary directory first, so that each file is replaced atomically; on the same disk, because /tmp
    # may be small.
    beside = output_dir / (ADAPTER_DIR + UNFINISHED)
    shutil.rmtree(beside, ignore_errors=True)  # left by a killed process
    try:
        beside.mkdir()
        save_adapter(model, beside)
        save_tokenizer(tokenizer, beside)
        template = tokenizer.get_chat_template()
        (beside / "chat_template.jinja").write_text(template, encoding="utf-8")  # for servers
        card = model_card(summary, experiment, prompt_of(tokenizer))
        (beside / "README.md").write_text(card, encoding="utf-8")
        if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
            raise UserError(
                f"{directory}: a file or a link that no run created, where the adapter must be saved; move it away, "
                "then start again"
            )
        directory.mkdir(exist_ok=True)
        for path in sorted(beside.iterdir()):
            copy_file(path, directory / path.name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return directory


def adapter_sha256(directory: Path) -> dict[str, str]:
    """The entry of `summary.json` that identifies the weights of the adapter: their sha256."""
    return {"adapter_sha256": measure(directory / ADAPTER_FILES[0])["sha256"]}


def model_card(summary: Mapping[str, Any], experiment: Experiment, own: Prompt | None = None) -> str:
    """The adapter's README: data and licences, metrics, intended use.

    Args:
        own: the prompt of training; None: the project's own prompt.
    """
    short, sentence = licence(experiment.data, experiment.model.base)
    base = public_name(experiment.model.base)
    header: dict[str, Any] = {"base_model": base} if base else {}
    header |= {"library_name": "peft", "license": short, "tags": ["lora", "medical", "question-answering"]}
    table = "\n".join(
        f"| {label} | {part['loss']:.4f} | {part['perplexity']:.3f} | {_number(part['answer_loss'], 4)} | "
        f"{_number(part['answer_perplexity'], 3)} |"
        for label, part in (
            ("validation, baseline", summary["baseline"]),
            ("validation, fine-tuned", summary["final"]),
            ("test, fine-tuned", summary["test"]),
        )
    )
    kept = summary["adapter_step"]
    best = (
        f"\nIts weights are those after update {kept}: the lowest validation loss." if kept < summary["updates"] else ""
    )
    return f"""{front_matter(header)}
# {plain(summary["experiment"])}

A LoRA adapter for {base_words(experiment.model.base)}, trained on medical questions and answers with medqa:
{summary["updates"]} updates of {experiment.training.global_batch_size} examples, learning rate
{experiment.optimizer.learning_rate:g}, quantization {summary["quantization"]}, mixed precision
{summary["mixed_precision"]}.{best}

**Not medical advice.** The answers can be wrong, outdated or dangerous. For research on question answering; not for
diagnosis, treatment or any decision about a person's health.

## Metrics

Mean loss per token in nats and its exponential, on held-out rows. With a `grouped` or `topic` split no question or
answer of these rows is in the training data; here the split is `{experiment.data.split}`. The metrics measure
similarity to the reference answers, not whether an answer is right.

| | loss | perplexity | answer loss | answer perplexity |
|---|---|---|---|---|
{table}

## Prompt

{prompt_block(own)}

The tokenizer in this directory has it as its chat template. Each question stands alone, as in training.

## Data

{data_lines(experiment.data)}

Licence: {sentence}.
"""


def _number(value: float | None, digits: int) -> str:
    """A number for a table, or a dash."""
    return "-" if value is None else f"{value:.{digits}f}"
