"""`medqa dashboard` creates a W&B workspace with four sections for what runs log, with wandb-workspaces.

The metric names come from `training/recorder.py` and `training/wandb.py`, so that no panel shows a metric that no run
logs.
"""

import json
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from medqa.config import Tracking
from medqa.config_file import wanted
from medqa.data.sources import COLUMNS as SOURCES
from medqa.errors import UserError
from medqa.terminal import print_json
from medqa.training.wandb import (
    EVAL_NAMES,
    GLOBAL_STEP,
    MEMORY_NAMES,
    PERFORMANCE_NAMES,
    SAMPLES,
    failures,
    source_name,
    unreachable_reason,
)

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Section, Workspace

NAME = "medqa: loss, sources, speed, samples"
# The other training metrics only count (epoch, examples_seen, tokens_seen): they are x axes for panels, not curves.
TRAIN_CURVES = ("train/loss", "train/learning_rate", "train/grad_norm")
ANY_SOURCE = "^{}$".format(source_name("eval", ".+"))  # user data may have any name
PANELS_ABREAST = 3


def make_dashboard(
    project: str | None, entity: str | None, name: str | None, as_json: bool, say: Callable[[str], None]
) -> None:
    """Create the workspace and print its address; `as_json` prints what would be created, without a network.

    Args:
        project: None: that of `WANDB_PROJECT` or of the experiments' default.
        entity: None: that of `WANDB_ENTITY` or the account's own.
        name: the name of the workspace.

    Raises:
        UserError: wandb-workspaces is not installed; W&B cannot be reached, refuses, or does not know the entity.
    """
    defaults = Tracking()
    project = project or os.environ.get("WANDB_PROJECT") or defaults.project
    entity = entity or os.environ.get("WANDB_ENTITY") or defaults.entity
    try:
        Tracking(project=project)  # checks W&B's rules for a project's name
        workspace = build(project, entity or "", name or NAME)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"dashboard: {first['loc'][0]} {first['input']!r}: {wanted(str(first['loc'][0]), first)}"
        ) from error
    if as_json:
        print_json({"project": project, "entity": entity, "name": workspace.name, "spec": spec(workspace)})
        return
    if why := unreachable_reason():
        raise UserError(f"dashboard: W&B cannot be reached: {why}; with --json it is not needed")
    say(save(workspace))


def build(project: str, entity: str, name: str) -> "Workspace":
    """The workspace, which is not saved at W&B yet.

    Raises:
        UserError: wandb-workspaces is not installed.
    """
    try:
        from wandb_workspaces import workspaces as ws
    except ImportError as error:
        raise UserError(f"dashboard: {error}; pip install 'wandb-workspaces>=0.4.13,<0.5'") from error
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=sections(),
        settings=ws.WorkspaceSettings(x_axis=GLOBAL_STEP),
    )


def sections() -> list["Section"]:
    """The sections loss, loss by source, speed and memory, and samples; all against the update."""
    from wandb_workspaces.reports import v2 as wr

    def curve(*names: str, **more: Any) -> wr.LinePlot:
        return wr.LinePlot(title=more.pop("title", ", ".join(names)), x=GLOBAL_STEP, y=list(names), **more)

    def bars(*names: str) -> wr.BarPlot:
        return wr.BarPlot(title=", ".join(names), metrics=list(names))

    by_source = [source_name("eval", source) for source in SOURCES]
    return [
        _section(
            "Loss",
            [
                *(curve(f"eval/{name}") for name in EVAL_NAMES),
                *(curve(f"eval_full/{name}", title=f"{name}, before and after, all rows") for name in EVAL_NAMES),
                *map(curve, TRAIN_CURVES),
                bars("test/answer_loss"),
                bars("test/answer_perplexity"),
            ],
        ),
        _section(
            "By source",
            [
                curve(title="answer loss of every source", metric_regex=ANY_SOURCE),
                *map(curve, by_source),
                *(bars(source_name(split, source)) for split in ("eval_full", "test") for source in SOURCES),
            ],
        ),
        _section("Speed and memory", [*map(curve, PERFORMANCE_NAMES.values()), *map(curve, MEMORY_NAMES.values())]),
        _section(
            "Samples",
            [wr.WeavePanelSummaryTable(table_name=SAMPLES)],
            columns=1,  # the full width
        ),
    ]


def _section(name: str, panels: Sequence[Any], columns: int = PANELS_ABREAST) -> "Section":
    """An open section that shows all of its panels."""
    from wandb_workspaces import workspaces as ws

    return ws.Section(
        name=name,
        panels=list(panels),
        is_open=True,
        layout_settings=ws.SectionLayoutSettings(columns=columns, rows=-(-len(panels) // columns)),
        panel_settings=ws.SectionPanelSettings(x_axis=GLOBAL_STEP),
    )


def spec(workspace: "Workspace") -> dict[str, Any]:
    """The specification that `save` sends."""
    return json.loads(workspace._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))


def save(workspace: "Workspace") -> str:
    """Create the workspace at W&B, by default in the account's own entity, and return its address.

    Each call creates another workspace.

    Raises:
        UserError: W&B refuses, or fails.
    """
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    where = "/".join(filter(None, (workspace.entity, workspace.project)))
    try:
        workspace.entity = workspace.entity or wandb.Api().default_entity or ""
        if not workspace.entity:
            raise UserError("dashboard: W&B does not say which entity is yours; give it with --entity")
        return workspace.save().url
    except failures() as error:
        raise UserError(
            f"dashboard: W&B refuses it for {where}: {' '.join(str(error).split())[:300]}; check that the project "
            "exists (its first run creates it) and that your key may write to it; or use --project and --entity"
        ) from error
