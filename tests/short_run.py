"""A run of a second, for what is done to runs: six updates of exp_001 on few rows, saved every second one."""

from pathlib import Path

UPDATES = 6
SETS = (
    f"training.max_steps={UPDATES}", "training.save_steps=2", "training.global_batch_size=8", "evaluation.steps=4",
    "evaluation.rows=4", "evaluation.samples=0", "tokenization.max_length=48", "model.quantization=none", "lora.r=2",
    "tracking.wandb=disabled",
)  # fmt: skip


def words(directory: Path, *sets: str, options: tuple[str, ...] = ()) -> list[str]:
    """The words of `train.py`; later settings win."""
    return ["--exp", "exp_001", "--tiny", "--cpu", "--output-dir", str(directory), *options, "--set", *SETS, *sets]
