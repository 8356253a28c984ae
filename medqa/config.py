"""The experiment: frozen, typed sections with everything that a run computes. Options say where data and results are.

`config_file.py` reads an experiment from a file and applies `--tiny` and `--set`. Keys have the names that PEFT,
transformers and PyTorch use. Every key has a default, so a file may leave it out; the `config.yaml` of a run has every
key.
"""

import fractions
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from medqa.errors import UserError
from medqa.limits import (
    MAX_COUNT,
    MAX_EPOCHS,
    MAX_INTEGER,
    MAX_NAMES,
    MAX_RANK,
    MAX_SOURCES,
    MAX_SOURCES_BYTES,
    MAX_TEXT,
)

Positive = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Seed = Annotated[int, Field(ge=0, le=MAX_INTEGER)]  # the range that torch accepts
Amount = Annotated[float, Field(gt=0, le=MAX_COUNT, allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]

PUBLIC = ("medquad", "afrimedqa")  # the two public datasets; every other source is user data
OWN_NAME = re.compile(r"[A-Za-z0-9_-]{1,40}")
# Keys of result files that stand beside source names or below them. A source of such a name would hide the key.
TAKEN = {
    *PUBLIC, "none", "rows", "sources", "value", "low", "high", "p_value", "loss", "perplexity", "answer_loss",
    "answer_perplexity",
}  # fmt: skip


def _brackets(value: Any) -> Any:
    """Accept `[PAD]` from the command line, where YAML reads it as a list of one string."""
    return "[PAD]" if value == ["PAD"] else value


def _source(value: str) -> str:
    """Return the location of a source: a path, a hub id, or `none` (in any capitalization)."""
    if len(value) > MAX_TEXT:
        raise ValueError(f"longer than {MAX_TEXT:,} characters, the limit for a path or a hub id")
    return "none" if value.strip().lower() == "none" else value


def _own_sources(files: dict[str, str]) -> dict[str, str]:
    """Check that the names can be part of row ids and metric names; leave out sources that are `none`."""
    size = sum(len(source.encode("utf-8", "backslashreplace")) for source in files.values())
    if len(files) > MAX_SOURCES or size > MAX_SOURCES_BYTES:
        raise ValueError(
            f"{len(files):,} sources whose locations have {size:,} bytes; at most {MAX_SOURCES:,} sources and "
            f"{MAX_SOURCES_BYTES:,} bytes are allowed: merge files, or give shorter paths"
        )
    wrong = [name[:60] for name in files if not OWN_NAME.fullmatch(name) or name.lower() in TAKEN]
    if wrong:
        raise ValueError(
            f"invalid name of a source: {', '.join(map(repr, wrong))}; a name has up to 40 letters, digits, _ and -, "
            f"and is none of {', '.join(sorted(TAKEN))}"
        )
    if empty := [name for name, source in files.items() if not source.strip()]:
        raise ValueError(f"no location for {', '.join(empty)}: give a file or a hub id (`none` leaves the source out)")
    return {name: source for name, source in files.items() if _source(source) != "none"}


def _constant(value: Any) -> Any:
    """Accept `constant` as another name for no schedule."""
    return "none" if value == "constant" else value


class Section(BaseModel):
    """A frozen section that refuses unknown keys and converts no types (an integer is accepted as a float)."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, protected_namespaces=(), use_attribute_docstrings=True
    )


class Model(Section):
    """The frozen base model."""

    base: Annotated[Text, Field(min_length=1)] = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
    """The base model: an id on the Hugging Face Hub, or a local directory."""

    quantization: Literal["none", "4bit", "auto"] = "none"
    """`4bit` loads the weights as NF4 with double quantization (QLoRA). Where bitsandbytes cannot do that, the
    weights are loaded in `dtype`, and the run says so. `auto` chooses `4bit` only where the memory estimate says that
    the run does not fit with `none`; a resumed run keeps the choice."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """The data type of the frozen weights, and the compute type of 4-bit weights. Changes with the hardware, together
    with `training.mixed_precision`."""

    dequantize: Literal["auto", "never"] = "auto"
    """Whether 4-bit weights are expanded once, with the same values, where memory allows. Only in training without
    padding."""

    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """The attention kernel, as in transformers."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, to save memory. Without padding, the run enables it only where it
    would not fit otherwise."""


class Lora(Section):
    """The adapter, in PEFT's names."""

    r: Annotated[int, Field(ge=1, le=MAX_RANK)] = 8
    """The rank of the LoRA matrices."""

    lora_alpha: Positive = 16
    """The scale of the adapter: its product is multiplied by `lora_alpha / r` (see also `use_rslora`)."""

    lora_dropout: Fraction = 0.05
    """The dropout probability on the adapter's input."""

    target_modules: Annotated[list[Text], Field(min_length=1, max_length=MAX_NAMES)] = [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]
    """The linear layers that get an adapter, by the last part of their names."""

    use_rslora: bool = False
    """Rank-stabilized LoRA: the scale is `lora_alpha / sqrt(r)` instead of `lora_alpha / r`."""

    use_dora: bool = False
    """DoRA (weight-decomposed LoRA): also train the magnitude of each output of a layer. Slower; not with sharded
    weights."""

    bias: Literal["none"] = "none"
    """Biases are not trained."""

    init_from: Text | None = None
    """A saved adapter to start from: `lora_adapters/` or a checkpoint of a run. `null`: a new adapter."""


class Data(Section):
    """Sources, and the split into train, validation and test."""

    medquad: Annotated[str, AfterValidator(_source)] = (
        "kaggle:pythonafroz/medquad-medical-question-answer-for-ai-research"
    )
    """MedQuAD: a file, the directory of its XML files, a Hub dataset id, `kaggle:OWNER/NAME`, or `none`."""

    afrimedqa: Annotated[str, AfterValidator(_source)] = "intronhealth/afrimedqa_v2"
    """AfriMed-QA: a file, a Hub dataset id, or `none`."""

    files: Annotated[dict[str, str], AfterValidator(_own_sources)] = {}
    """Your own data: a name for each file or Hub dataset id."""

    mcq_answers: Literal["rationale", "named"] = "rationale"
    """What answers to multiple-choice questions contain: the rationale alone, or the correct option before it."""

    split: Literal["grouped", "topic", "random"] = "grouped"
    """Which rows stay together in one split: `grouped` by question and answer, also by `topic`, or none (`random`)."""

    split_seed: Seed = 42
    """The seed of the split."""

    fractions: Annotated[list[Fraction], Field(min_length=3, max_length=3)] = [0.8, 0.1, 0.1]
    """The shares of train, validation and test. Their sum is 1."""


class Tokenization(Section):
    """From text to token ids."""

    prompt: Literal["instruction", "chat"] = "instruction"
    """The prompt before an answer: `instruction`, the project's own prompt, or `chat`, the base model's own chat
    template with its end of turn. Both compute the loss of the answer in the same way."""

    padding: Literal["longest", "max_length"] = "longest"
    """Where examples are padded: to the longest one in the micro-batch, or to `max_length`. Has no effect without
    padding."""

    pad_token: Annotated[Literal["eos", "[PAD]"], BeforeValidator(_brackets)] = "eos"
    """The padding token: EOS, masked by position, or `[PAD]`, added to the tokenizer if it is missing."""

    max_length: Annotated[int, Field(ge=8, le=MAX_COUNT)] = 512
    """The maximum number of tokens. A longer row is truncated and has no EOS."""

    append_eos: bool = True
    """Whether the end-of-sequence token is appended, so that the model learns to stop."""

    loss_on: Literal["all", "answer"] = "all"
    """The tokens that count in the loss: prompt and answer, or the answer alone."""


class Optimizer(Section):
    """AdamW."""

    name: Literal["adamw_torch", "paged_adamw_8bit"] = "adamw_torch"
    """PyTorch's AdamW, or the paged 8-bit AdamW of bitsandbytes."""

    learning_rate: Amount = 5e-5
    """The learning rate after warmup."""

    weight_decay: Annotated[float, Field(ge=0, le=MAX_COUNT, allow_inf_nan=False)] = 0.0
    """The weight decay."""

    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    """The decay rates of Adam's two moments."""

    eps: Amount = 1e-8
    """Adam's epsilon."""

    max_grad_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """The norm to which the gradient of an update is clipped."""


class Scheduler(Section):
    """The learning rate over the updates."""

    name: Annotated[Literal["none", "linear", "cosine"], BeforeValidator(_constant)] = "none"
    """The schedule after warmup: constant (`none`), or a linear or cosine decay to 0 at the last update."""

    warmup_steps: Count = 0
    """The number of updates of linear warmup from 0."""


class Training(Section):
    """Updates, batches, precision, checkpoints."""

    max_steps: Positive | None = None
    """The number of updates. Give either this or `epochs`."""

    epochs: Annotated[float, Field(gt=0, le=MAX_EPOCHS, allow_inf_nan=False)] | None = None
    """The number of epochs of the training rows; an update may span the end of an epoch."""

    early_stopping_patience: Positive | None = None
    """End the run after so many evaluations in a row without a lower loss on the fixed validation rows. `null`: the
    run does not stop early."""

    keep: Literal["final", "best"] = "final"
    """Which adapter the run ends with: that of the last update, or that with the lowest loss on the fixed validation
    rows."""

    global_batch_size: Positive = 32
    """The number of examples in one update, on any number of processes. It must be divisible by `per_device_batch_size`
    times the number of processes, also without padding. Gradient accumulation steps follow from it."""

    per_device_batch_size: Positive = 4
    """The number of examples in a micro-batch with padding, on each process. Without padding, only the divisibility of
    `global_batch_size` depends on it."""

    mixed_precision: Literal["bf16", "fp16", "no"] = "bf16"
    """Mixed precision. Changes with the hardware: fp16 with a gradient scaler on GPUs without bfloat16, none on CPUs
    without native bfloat16."""

    seed: Seed = 42
    """The seed of the data order, the initial adapter and dropout."""

    deterministic: bool = True
    """Select deterministic kernels."""

    padding_free: bool = True
    """Train without padding, with the same gradients, where the model family is supported."""

    micro_batch_tokens: Positive | None = None
    """The number of tokens in a micro-batch without padding. `null`: a trial before the first update finds the
    largest that fits."""

    log_steps: Positive = 10
    """Record training metrics every so many updates."""

    save_steps: Positive = 50
    """Save a checkpoint every so many updates."""

    save_minutes: Amount | None = None
    """Also save a checkpoint after so many minutes. `null`: only every `save_steps` updates."""

    keep_checkpoints: Positive = 3
    """The number of checkpoints to keep; the best one is kept in addition."""

    process_timeout_s: Annotated[float, Field(ge=1, le=MAX_COUNT, allow_inf_nan=False)] = 600.0
    """Seconds after which a process gives up waiting for another one."""


class Evaluation(Section):
    """Evaluation before, during and after training."""

    steps: Positive = 100
    """Evaluate every so many updates."""

    rows: Positive | None = 256
    """The size of the fixed, seeded subset of the validation rows that every evaluation measures (`eval`): before
    training, every `steps` updates, and after training. `null`: all."""

    full_rows: Positive | None = None
    """The number of validation rows, and of test rows, that are measured before and after training (`eval_full`,
    `test`). A number chooses a fixed, seeded subset. `null`: all."""

    samples: Count = 4
    """The number of sample answers in the W&B table."""


class Tracking(Section):
    """Weights & Biases. `metrics.jsonl` is always written. `WANDB_*` variables take precedence."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Where W&B records the run. `auto` is online with an API key and a network, else offline."""

    project: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^/\\#?%:]+$")] = "medqa"
    """The W&B project."""

    entity: Text | None = None
    """The W&B user or team. `null`: the default of the account."""

    group: Text | None = None
    """The W&B group."""

    run_name: Text | None = None
    """The name of the W&B run. `null`: the name of the output directory."""

    tags: Annotated[list[Annotated[str, Field(min_length=1, max_length=64)]], Field(max_length=MAX_NAMES)] = []
    """The W&B tags."""

    log_samples: bool | None = None
    """Log sample answers to W&B, and keep texts in `evaluation.jsonl`. `null`: only of the two public datasets, not of
    your own data."""

    log_model: bool = True
    """Upload the final adapter to W&B as an artifact."""

    def shows_text_of(self, source: str) -> bool:
        """Whether questions and answers of this source may be shown: in W&B, and in `evaluation.jsonl`."""
        return source in PUBLIC if self.log_samples is None else self.log_samples


LENGTH = ("training.max_steps", "training.epochs")  # the two keys for the length of a run; one of them is given


class Experiment(Section):
    """Everything that determines what a run computes, apart from the contents of data and base model."""

    model: Model = Model()
    lora: Lora = Lora()
    data: Data = Data()
    tokenization: Tokenization = Tokenization()
    optimizer: Optimizer = Optimizer()
    scheduler: Scheduler = Scheduler()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    tracking: Tracking = Tracking()


def evaluation_decides(keep: str, early_stopping_patience: int | None) -> bool:
    """Whether the evaluations decide when a run ends, or which adapter it keeps."""
    return keep == "best" or early_stopping_patience is not None


def may_change_on_resume(key: str, experiment: Experiment) -> bool:
    """Whether a run may be resumed after this `section.key` has changed: no computed value depends on it.

    A change of `training.micro_batch_tokens` may change the last digits and the dropout masks; the run reports it.
    `training.max_steps` or `training.epochs` may grow if the learning rate is constant, because no update then depends
    on how many follow. `evaluation.steps` and `evaluation.rows` must stay where they decide when the run ends or which
    adapter it keeps; `evaluation.full_rows` must stay, because it chooses the rows of the results.
    """
    if key in LENGTH:
        return experiment.scheduler.name == "none"
    if key in ("evaluation.steps", "evaluation.rows"):
        return not evaluation_decides(experiment.training.keep, experiment.training.early_stopping_patience)
    return key.startswith("tracking.") or key in {
        "training.log_steps",
        "training.save_steps",
        "training.save_minutes",
        "training.keep_checkpoints",
        "training.process_timeout_s",
        "training.micro_batch_tokens",
        "evaluation.samples",
    }


def flat(experiment: Experiment) -> dict[str, Any]:
    """The experiment as a dict from `section.key` to value."""
    return {
        f"{name}.{key}": value for name, section in experiment.model_dump().items() for key, value in section.items()
    }


# ----------------------------------------------------------------------------------------------------
# The length of a run in updates or epochs, and whether a finished run is complete.


def planned_updates(experiment: Experiment, rows: int) -> int:
    """The number of updates of a run that is not stopped early, from `training.max_steps` or `training.epochs`.

    An update may span the end of an epoch, so only the last epoch is rounded up to full updates.

    Args:
        rows: the number of training examples.

    Raises:
        UserError: warmup would take longer than the run.
    """
    training, warmup = experiment.training, experiment.scheduler.warmup_steps
    if training.max_steps is not None:
        return training.max_steps
    # Exact decimal fractions: 1.1 epochs of 50 rows are 55 examples, but a float product is slightly larger.
    updates = math.ceil(fractions.Fraction(str(training.epochs)) * rows / training.global_batch_size)
    if warmup > updates:
        raise UserError(
            f"scheduler.warmup_steps = {warmup} is more than the {updates} updates of this run (training.epochs = "
            f"{training.epochs:g}, {rows:,} training rows); set fewer warmup steps, or more epochs"
        )
    return updates


def length(experiment: Experiment) -> dict[str, int | float | None]:
    """The requested length of a run, in the form of `summary.json`."""
    return {"max_steps": experiment.training.max_steps, "epochs": experiment.training.epochs}


def is_complete(summary: Mapping[str, Any], experiment: Experiment) -> bool:
    """Whether the run with this summary is complete: it has the requested length, or it was stopped early."""
    whole = {"experiment", "baseline", "final", "test"} <= summary.keys()
    first_versions = {"max_steps": summary.get("updates"), "epochs": None}
    return whole and summary.get("length", first_versions) == length(experiment)
