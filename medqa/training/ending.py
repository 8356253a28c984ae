"""What a run ends with: the closing evaluation, and the adapter that it leaves."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast
from peft import PeftModel

from medqa.config import Experiment
from medqa.data.tokens import Example
from medqa.errors import UserError
from medqa.evaluation.loss import Evaluator, SplitLoss, summarize
from medqa.files import Damaged
from medqa.model.base import load_adapter_weights
from medqa.training.checkpoint import RunState
from medqa.training.checkpoint_files import verify_checkpoint
from medqa.training.processes import on_main
from medqa.training.tracking import Tracker


@dataclass(frozen=True)
class Ending:
    """What a run ends with: the figures of the adapter that it leaves, and the update that the adapter is from."""

    final: SplitLoss
    test: SplitLoss
    adapter_step: int


def close_run(
    evaluator: Evaluator,
    examples: Mapping[str, Sequence[Example]],
    subset: Sequence[int],
    model: PeftModel,
    state: RunState,
    experiment: Experiment,
    places: Sequence[Path],
    tracker: Tracker,
    clock: Callable[[], float],
    say: Callable[[str], None],
) -> Ending:
    """The closing evaluation, on all rows; with `training.keep: best` the model then has the best adapter.

    Validation is recorded as it is after the last update; the test split is measured once, with the adapter that stays.

    Args:
        subset: indices of the fixed validation rows, by which the best is chosen.
        places: directories that may have the best checkpoint.

    Raises:
        UserError: the best checkpoint has gone, or is damaged.
    """
    validation, step = examples["validation"], state.step
    losses = evaluator.row_losses(validation)
    final = summarize(losses, validation)
    state.note_best(step, summarize(losses[list(subset)], [validation[i] for i in subset]).loss)
    tracker.log({"step": step, "split": "eval", "elapsed_s": clock(), **final.record()})
    adapter_step = step
    if experiment.training.keep == "best" and state.best_step == 0:
        say("the untuned base was best on the fixed validation rows: the adapter kept is that of the last update")
    elif experiment.training.keep == "best" and state.best_step != step:
        adapter_step = state.best_step
        _take_best(model, evaluator.accelerator, places, adapter_step)
        say(f"the adapter kept is that of update {adapter_step}, the best on the fixed validation rows")
        final = evaluator.measure(validation)
    test = evaluator.measure(examples["test"])
    tracker.log({"step": step, "split": "test", "elapsed_s": clock(), **test.record()})
    return Ending(final, test, adapter_step)


def _take_best(model: PeftModel, accelerator: Accelerator, places: Sequence[Path], step: int) -> None:
    """The best adapter on every process. The first one reads it and hands it on: only it need see the directories.

    Raises:
        UserError: as `_best_checkpoint`, on every process.
    """

    def read() -> None:
        load_adapter_weights(model, _best_checkpoint(places, step), "checkpoint")

    on_main(accelerator, read)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(broadcast(parameter.data))


def _best_checkpoint(places: Sequence[Path], step: int) -> Path:
    """The whole checkpoint of an update, in the first of these directories that has it.

    Raises:
        UserError: none has.
    """
    problems = []
    for path in (place / f"checkpoint-{step}" for place in places):
        try:
            verify_checkpoint(path)
            return path
        except Damaged as error:
            problems.append(f"{path}: {error}")
    raise UserError(
        f"training.keep = best, and of update {step}, the best, no whole checkpoint is left: {'; '.join(problems)}; "
        "put it back and start again, or take the newest as it is: python -m medqa export DIR --checkpoint STEP"
    )
