"""The experiment: what a run computes, as frozen typed sections. It owns every number; options say where things are.

Reading it from a file, with `--tiny` and `--set` laid over it, is in `experiment_file.py`. Key names are PEFT's and
the field's. Every key has a default, so a file may be silent; `config.yaml` of a run has them all written out.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

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
Seed = Annotated[int, Field(ge=0, le=MAX_INTEGER)]  # what torch takes
Amount = Annotated[float, Field(gt=0, le=MAX_COUNT, allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]

PUBLIC = ("medquad", "afrimedqa")  # the two public datasets; every other source is data of one's own
OWN_NAME = re.compile(r"[A-Za-z0-9_-]{1,40}")
# Keys that stand beside the names of sources, or below them, where figures are; a source of that name would hide them.
TAKEN = {
    *PUBLIC, "none", "rows", "sources", "value", "low", "high", "p_value", "loss", "perplexity", "answer_loss",
    "answer_perplexity",
}  # fmt: skip


def _brackets(value: Any) -> Any:
    """On a command line `[PAD]` is a YAML list of one word; the token was meant."""
    return "[PAD]" if value == ["PAD"] else value


def _source(value: str) -> str:
    """A file or a hub id; `None` and `NONE` are `none`."""
    if len(value) > MAX_TEXT:
        raise ValueError(f"longer than {MAX_TEXT:,} characters, which no path or hub id is")
    return "none" if value.strip().lower() == "none" else value


def _own_sources(files: dict[str, str]) -> dict[str, str]:
    """Names can stand in row ids and in names of figures; what is `none` is left out."""
    size = sum(len(source.encode("utf-8", "backslashreplace")) for source in files.values())
    if len(files) > MAX_SOURCES or size > MAX_SOURCES_BYTES:
        raise ValueError(
            f"{len(files):,} sources of {size:,} bytes; at most {MAX_SOURCES:,} of {MAX_SOURCES_BYTES:,} bytes can be "
            "named: put files together, or give shorter paths"
        )
    wrong = [name[:60] for name in files if not OWN_NAME.fullmatch(name) or name.lower() in TAKEN]
    if wrong:
        raise ValueError(
            f"no name for a source: {', '.join(map(repr, wrong))}; a name has up to 40 letters, digits, _ and -, and "
            f"is none of {', '.join(sorted(TAKEN))}"
        )
    if empty := [name for name, source in files.items() if not source.strip()]:
        raise ValueError(f"no source for {', '.join(empty)}: a file or a hub id is wanted (`none` to leave it out)")
    return {name: source for name, source in files.items() if _source(source) != "none"}


def _constant(value: Any) -> Any:
    """`constant` is another name for no schedule."""
    return "none" if value == "constant" else value


class Section(BaseModel):
    """A frozen section that refuses unknown keys and converts no types (a whole number stands for a float)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class Model(Section):
    """The frozen base model. `dtype` is the type of its weights and the compute type of 4-bit weights."""

    base: Annotated[Text, Field(min_length=1)] = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
    quantization: Literal["none", "4bit"] = "none"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    dequantize: Literal["auto", "never"] = "auto"
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    gradient_checkpointing: bool = False


class Lora(Section):
    """The adapter, in PEFT's names. `init_from` is a saved adapter to start from."""

    r: Annotated[int, Field(ge=1, le=MAX_RANK)] = 8
    lora_alpha: Positive = 16
    lora_dropout: Fraction = 0.05
    target_modules: Annotated[list[Text], Field(min_length=1, max_length=MAX_NAMES)] = [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]
    bias: Literal["none"] = "none"
    init_from: Text | None = None


class Data(Section):
    """Sources (see `data/sources.py`) and the split into train, validation and test.

    `files` has data of one's own: a name to a file or a hub id.
    `mcq_answers: named` puts the right option before the rationale in the answer to a multiple-choice question.
    """

    medquad: Annotated[str, AfterValidator(_source)] = (
        "kaggle:pythonafroz/medquad-medical-question-answer-for-ai-research"
    )
    afrimedqa: Annotated[str, AfterValidator(_source)] = "intronhealth/afrimedqa_v2"
    files: Annotated[dict[str, str], AfterValidator(_own_sources)] = {}
    mcq_answers: Literal["rationale", "named"] = "rationale"
    split: Literal["grouped", "topic", "random"] = "grouped"
    split_seed: Seed = 42
    fractions: Annotated[list[Fraction], Field(min_length=3, max_length=3)] = [0.8, 0.1, 0.1]


class Tokenization(Section):
    """From text to ids. A row whose ids and EOS exceed `max_length` is cut to it and has no EOS."""

    padding: Literal["longest", "max_length"] = "longest"
    pad_token: Annotated[Literal["eos", "[PAD]"], BeforeValidator(_brackets)] = "eos"
    max_length: Annotated[int, Field(ge=8, le=MAX_COUNT)] = 512
    append_eos: bool = True
    loss_on: Literal["all", "answer"] = "all"


class Optimizer(Section):
    """`max_grad_norm` bounds the norm of the whole gradient before each update."""

    name: Literal["adamw_torch", "paged_adamw_8bit"] = "adamw_torch"
    learning_rate: Amount = 5e-5
    weight_decay: Annotated[float, Field(ge=0, le=MAX_COUNT, allow_inf_nan=False)] = 0.0
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    eps: Amount = 1e-8
    max_grad_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0


class Scheduler(Section):
    """How the rate changes over the updates, after `warmup_steps` of linear warmup. `none` is constant."""

    name: Annotated[Literal["none", "linear", "cosine"], BeforeValidator(_constant)] = "none"
    warmup_steps: Count = 0


class Training(Section):
    """Updates, batches, precision. `global_batch_size` examples make an update, on however many processes.

    `early_stopping_patience` evaluations in a row without a lower loss on the fixed validation rows end the run.
    `keep` says which adapter it leaves: that of its last update, or that of the lowest such loss.
    """

    max_steps: Positive | None = None
    epochs: Annotated[float, Field(gt=0, le=MAX_EPOCHS, allow_inf_nan=False)] | None = None
    early_stopping_patience: Positive | None = None
    keep: Literal["final", "best"] = "final"
    global_batch_size: Positive = 32
    per_device_batch_size: Positive = 4
    mixed_precision: Literal["bf16", "fp16", "no"] = "bf16"
    seed: Seed = 42
    deterministic: bool = True
    padding_free: bool = True
    micro_batch_tokens: Positive | None = None
    log_steps: Positive = 10
    save_steps: Positive = 50
    save_minutes: Amount | None = None
    keep_checkpoints: Positive = 3
    process_timeout_s: Annotated[float, Field(ge=1, le=MAX_COUNT, allow_inf_nan=False)] = 600.0


class Evaluation(Section):
    """During training: every `steps` updates, on a fixed seeded subset of `rows` validation rows (null: all)."""

    steps: Positive = 100
    rows: Positive | None = 256
    samples: Count = 4


class Tracking(Section):
    """Weights & Biases; `metrics.jsonl` is written whatever stands here. `WANDB_*` variables win.

    `log_samples: null` logs sample answers of the two public datasets, not of data of one's own.
    """

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^/\\#?%:]+$")] = "medqa"
    entity: Text | None = None
    group: Text | None = None
    run_name: Text | None = None
    tags: Annotated[list[Annotated[str, Field(min_length=1, max_length=64)]], Field(max_length=MAX_NAMES)] = []
    log_samples: bool | None = None
    log_model: bool = True


LENGTH = ("training.max_steps", "training.epochs")  # how long a run is: one of the two


class Experiment(Section):
    """All that a run computes follows from this and the data."""

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
    """Whether evaluation has a say in when a run ends, or in which adapter it leaves."""
    return keep == "best" or early_stopping_patience is not None


def may_change_on_resume(key: str, experiment: Experiment) -> bool:
    """Whether a run may go on although this `section.key` changed: nothing computed before or after depends on it.

    (`training.micro_batch_tokens`: but for the last digits, and dropout's noise; the run says so.)
    `training.max_steps` or `epochs` may grow under a constant rate, where no update depends on how many follow. Where
    evaluation decides when the run ends, or with which adapter, what is evaluated stays.
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
    """The experiment as `section.key` to value."""
    return {
        f"{name}.{key}": value for name, section in experiment.model_dump().items() for key, value in section.items()
    }
