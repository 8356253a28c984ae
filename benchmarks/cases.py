"""What `compare.py` runs: recipes at a size, each with its arms, and the targets beside the figures."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.gate import Job
from benchmarks.standin import STANDIN_SHAPES, Rows, even_rows, make_rows, shape_of
from harness.hf_trainer import TRAINER_NAMES
from medqa.config import Experiment, flat
from medqa.config_file import load_experiment

RECIPES = ("exp_001", "exp_002", "exp_003")
CORPUS = 4096  # rows that an arm may choose from
FULL, HOST = "exp_002 at TinyLlama's shape, bf16", "host"
REAL = "{} on a real model, bf16"
HOST_LENGTH, HOST_ROWS, HOST_MICRO_BATCH, HOST_UPDATES = 16, 32, 4, 20
NEVER = 10**6

ARMS = {
    "trainer": "HF Trainer",
    "trainer_again": "HF Trainer again (A/A)",
    "grouped": "Trainer, length grouping (other rows an update)",
    "rebalance": "Trainer, batch rebalancing",
    "trl": "TRL SFTTrainer",
    "packing": "TRL packing (other rows an update)",
    "liger": "Trainer, Liger kernels",
    "compile": "Trainer, torch.compile",
    "plain": "ours, plain",
    "padding_free": "ours, padding_free",
    "padding_free_fp32": "ours, padding_free in float32",
}
GPU_ONLY = ("liger", "compile")
NEEDS = {"trl": "trl", "packing": "trl", "liger": "liger_kernel"}  # arm to module
QUICK_ARMS = ("trainer", "plain", "padding_free")
FULL_ARMS = ("trainer", "trainer_again", "plain", "padding_free")
REAL_ARMS = ("trainer", "trl", "plain", "padding_free", "padding_free_fp32")
HOST_ARMS = ("trainer", "trl", "plain", "padding_free")

# On a CPU: at least so many times Trainer's speed, at most such a share of its peak memory.
SPEED_TARGETS = {
    **{(recipe, "plain"): 1.0 for recipe in RECIPES},
    ("exp_001", "padding_free"): 1.7,
    ("exp_002", "padding_free"): 2.2,
    ("exp_003", "padding_free"): 3.3,
    (FULL, "padding_free"): 1.9,
    (REAL.format("exp_001"), "padding_free"): 2.0,
    (REAL.format("exp_002"), "padding_free"): 2.4,
    (REAL.format("exp_003"), "padding_free"): 3.3,
}
MEMORY_TARGETS = {(recipe, arm): most for recipe in RECIPES for arm, most in (("plain", 1.0), ("padding_free", 0.7))}
MEMORY_TARGETS |= {(REAL.format(recipe), "padding_free"): 0.6 for recipe in RECIPES}


@dataclass(frozen=True)
class Case:
    """A recipe at a size: `updates` of `rows` rows a round. `shape` is a stand-in's name or a model's directory."""

    name: str
    recipe: str
    shape: str
    dtype: str
    rows: int
    updates: int
    arms: tuple[str, ...]
    device: str
    quantization: str

    def experiment(self, base: Path) -> Experiment:
        """The recipe, with what the stand-in and the comparison need different."""
        micro_batch = HOST_MICRO_BATCH if self.name == HOST else None
        asked = load_experiment(self.recipe).training.per_device_batch_size
        sets = {
            "model.base": base,
            "model.quantization": self.quantization,
            "model.dtype": self.dtype,
            "training.mixed_precision": "bf16" if self.dtype == "bfloat16" else "no",
            "training.global_batch_size": self.rows,
            "training.per_device_batch_size": micro_batch or min(asked, self.rows),
            "training.save_steps": NEVER,
            "evaluation.steps": NEVER,
            "tracking.wandb": "disabled",
            "tokenization.pad_token": "eos",
        }
        longest = shape_of(self.shape)["max_position_embeddings"]
        if self.name == HOST:
            sets |= {"tokenization.max_length": HOST_LENGTH}
        elif longest < 512:
            sets |= {"tokenization.max_length": 128}
        return load_experiment(self.recipe, sets=[f"{key}={value}" for key, value in sets.items()])

    def make_rows(self, experiment: Experiment, medquad: Path | None) -> Rows:
        """The rows of all its arms."""
        vocabulary = shape_of(self.shape)["vocab_size"]
        if self.name == HOST:
            return even_rows(HOST_ROWS * 8, HOST_LENGTH, vocabulary)
        seed, max_length = experiment.training.seed, experiment.tokenization.max_length
        return make_rows(CORPUS, max_length, vocabulary, seed, medquad, self.model)

    @property
    def model(self) -> Path | None:
        """The directory of a real model; None for a stand-in."""
        return None if self.shape in STANDIN_SHAPES else Path(self.shape)

    def jobs(self, experiment: Experiment, base: Path, rows: Path, rounds: int, scratch: Path) -> dict[str, Job]:
        """What each arm is to do: a first update, then the rounds."""
        updates, settings = 1 + rounds * self.updates, flat(experiment)
        arguments = trainer_arguments(experiment, updates, self.dtype, self.device, scratch)
        jobs = {
            arm: Job(arm, settings, arguments, str(base), str(rows), updates, self.dtype, self.device)
            for arm in self.arms
        }
        if "padding_free_fp32" in jobs:
            in_float32 = settings | {"model.dtype": "float32", "training.mixed_precision": "no"}
            jobs["padding_free_fp32"] = replace(jobs["padding_free_fp32"], settings=in_float32, dtype="float32")
        return jobs


def trainer_arguments(
    experiment: Experiment, updates: int, dtype: str, device: str, scratch: Path
) -> dict[str, str | float | bool | dict | None]:
    """The recipe in `TrainingArguments`' words. `SFTConfig` has other defaults, so they are all given."""
    training, optimizer = experiment.training, experiment.optimizer
    return {
        "output_dir": str(scratch / "trainer"),
        "use_cpu": device == "cpu",
        "seed": training.seed,
        "max_steps": updates + 1,  # it is stopped before the last
        "per_device_train_batch_size": training.per_device_batch_size,
        "gradient_accumulation_steps": training.global_batch_size // training.per_device_batch_size,
        "train_sampling_strategy": "sequential",
        "optim": TRAINER_NAMES[optimizer.name],
        "learning_rate": optimizer.learning_rate,
        "weight_decay": optimizer.weight_decay,
        "adam_beta1": optimizer.betas[0],
        "adam_beta2": optimizer.betas[1],
        "adam_epsilon": optimizer.eps,
        "max_grad_norm": optimizer.max_grad_norm,
        "lr_scheduler_type": TRAINER_NAMES[experiment.scheduler.name],
        "warmup_steps": experiment.scheduler.warmup_steps,
        "gradient_checkpointing": experiment.model.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "bf16": dtype == "bfloat16",
        "logging_steps": training.log_steps,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def make_cases(
    recipes: Sequence[str],
    arms: Sequence[str],
    rows: int,
    device: str,
    *,
    quick: bool,
    full: bool,
    full_rows: int,
    host: bool,
    quantization: str,
    model: Path | None = None,
    bfloat16: bool = True,
) -> list[Case]:
    """In the order in which they run. On a GPU everything is at TinyLlama's size, in bf16.

    Args:
        model: the directory of a real model. If it is given, the only cases are those of this model.
        bfloat16: whether the arms of this model use bfloat16, with one arm in float32; otherwise all use float32.
    """
    on_gpu = device == "cuda"
    if model is not None:
        chosen = tuple(arm for arm in REAL_ARMS if arm in arms and (bfloat16 or arm != "padding_free_fp32"))
        dtype = "bfloat16" if bfloat16 else "float32"
        called = REAL if bfloat16 else REAL.replace("bf16", "float32")
        return [
            Case(called.format(name), name, str(model), dtype, rows, 1, chosen, device, quantization)
            for name in recipes
        ]
    shape, dtype = ("tinyllama", "bfloat16") if on_gpu else ("tiny" if quick else "p", "float32")
    arms = [arm for arm in arms if arm != "padding_free_fp32"]  # in float32 it equals padding_free
    cases = [Case(name, name, shape, dtype, rows, 1, tuple(arms), device, quantization) for name in recipes]
    if full and not on_gpu:
        chosen = tuple(arm for arm in FULL_ARMS if arm in arms)
        cases.append(Case(FULL, "exp_002", "tinyllama", "bfloat16", full_rows, 1, chosen, device, quantization))
    if host:
        chosen = tuple(arm for arm in HOST_ARMS if arm in arms)
        updates = 4 if quick else HOST_UPDATES
        cases.append(Case(HOST, "exp_001", "tiny", dtype, HOST_ROWS, updates, chosen, device, "none"))
    return cases


def absent(arms: Sequence[str], device: str) -> Mapping[str, str]:
    """Of these arms, those that cannot run here, and why."""
    why = {arm: f"{module} is not installed" for arm, module in NEEDS.items() if not importlib.util.find_spec(module)}
    if device == "cpu":
        why |= dict.fromkeys(GPU_ONLY, "for a GPU only")
    return {arm: why[arm] for arm in arms if arm in why}
