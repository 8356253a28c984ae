"""A recorded trajectory: 20 updates of exp_001's recipe at the embedded model's size, in float32, dropout and all.

A change that is not meant to change numbers leaves these losses as they are, so a reordered sum, another seed for the
noise or a row more in an update shows here, even where no other test thought of it. Record anew, with

    python -m tests.test_trajectory --record

only for a change that is meant to change them, and say so in its message. Losses are compared within 1e-4: another CPU
or another torch rounds differently, and 20 updates carry that on.
"""

import argparse
import json
import platform
import tempfile
from pathlib import Path

import accelerate
import peft
import torch
import transformers

from harness.hf_trainer import relative_differences
from harness.parts import build
from medqa.config_file import load_experiment

RECORDED = Path(__file__).parent / "data" / "trajectory.json"
UPDATES = 20
WITHIN = 1e-4  # relative


def trajectory() -> dict[str, list[float]]:
    """Loss and gradient norm of each update."""
    sets = ["model.quantization=none", f"training.max_steps={UPDATES}", "tracking.wandb=disabled"]
    parts = build(load_experiment("exp_001", tiny=True, sets=sets))
    assert parts.experiment.lora.lora_dropout == 0.05
    assert {p.dtype for p in parts.adapted.parameters()} == {torch.float32}
    results = [parts.step(parts.micro_batches(update)) for update in range(UPDATES)]
    return {"loss": [r.loss for r in results], "grad_norm": [r.grad_norm for r in results]}


def environment() -> dict[str, str]:
    """What rounding may depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "accelerate": accelerate.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def test_losses_and_norms_are_the_recorded_ones():
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    now = trajectory()
    for name, values in now.items():
        assert len(recorded[name]) == UPDATES
        differences = relative_differences(values, recorded[name])
        worst = max(range(UPDATES), key=differences.__getitem__)
        assert differences[worst] <= WITHIN, (
            f"{name} of update {worst + 1} is {values[worst]}, recorded {recorded[name][worst]}; "
            f"recorded under {recorded['environment']}, this is {environment()}"
        )


def test_the_record_is_of_a_training():
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    assert recorded["environment"].keys() == environment().keys()
    assert recorded["loss"][-1] < 0.8 * recorded["loss"][0]
    assert all(norm > 0 for norm in recorded["grad_norm"])


def record(path: Path) -> None:
    """Write the trajectory of this code on this machine."""
    content = {"environment": environment(), **trajectory()}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help=f"write {RECORDED.name} anew")
    target = RECORDED if parser.parse_args().record else Path(tempfile.mkdtemp()) / RECORDED.name
    record(target)
    print(target)
