"""The README's figure: our loss curve on top of HF `Trainer`'s, and the difference below (`make figure`).

exp_002's recipe on the embedded model (4-bit, paged 8-bit AdamW, cosine with warmup) without dropout, whose noise is
drawn differently by design. About a minute on one core. Writes docs/parity.png.
"""

import tempfile
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes

from harness.hf_trainer import FIGURES, Curve, relative_differences, train_ours, train_theirs
from medqa.config_file import load_experiment

FIGURE = Path(__file__).parents[1] / "docs" / "parity.png"
UPDATES = 60
SIZE = (1200, 700)  # pixels
DPI = 100
SMALLEST = 1e-9  # where a difference of exactly 0 would still not stand out on the axis
THEIR_COLOUR, OUR_COLOUR, NORM_COLOUR = "#f2a65a", "#1f4e79", "#b9c4d0"
TEXT, QUIET = "#1a1a1a", "#666666"
TOLERANCE = 1e-6  # what tests/training/test_parity.py asserts


def main() -> None:
    """Train twice, say how close the two are, and draw it."""
    experiment = load_experiment(
        "exp_002",
        tiny=True,
        sets=[
            "lora.lora_dropout=0.0",
            f"training.max_steps={UPDATES}",
            f"training.save_steps={UPDATES}",
            f"evaluation.steps={UPDATES}",
            "tracking.wandb=disabled",
        ],
    )
    with tempfile.TemporaryDirectory() as directory:
        ours = train_ours(experiment, Path(directory))
        theirs = train_theirs(experiment, Path(directory))
    for name in FIGURES:
        print(f"{name}: largest relative difference {max(differences(ours, theirs, name)):.3g}")
    weights = max((ours.weights[name] - theirs.weights[name]).abs().max().item() for name in theirs.weights)
    print(f"final LoRA weights: largest difference {weights:.3g}")
    FIGURE.parent.mkdir(exist_ok=True)
    draw(ours, theirs, FIGURE)
    print(FIGURE)


def differences(ours: Curve, theirs: Curve, name: str) -> list[float]:
    """Relative difference of a figure, by update."""
    return relative_differences(ours.figures[name], theirs.figures[name])


def draw(ours: Curve, theirs: Curve, path: Path) -> None:
    """Both loss curves above, their relative difference below."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 13, "text.color": TEXT, "axes.labelcolor": TEXT})
    figure, (above, below) = plt.subplots(
        2,
        1,
        sharex=True,
        figsize=(SIZE[0] / DPI, SIZE[1] / DPI),
        dpi=DPI,
        gridspec_kw={"height_ratios": [2.6, 1], "hspace": 0.22},
        facecolor="white",
    )
    updates = range(1, len(ours.figures["loss"]) + 1)
    _curves(above, updates, ours, theirs)
    _difference(below, updates, ours, theirs)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(QUIET)
        axes.tick_params(colors=QUIET)
        axes.grid(axis="y", color="#e6e6e6", linewidth=1)
        axes.set_axisbelow(True)
    below.set_xlabel("update")
    below.set_xlim(0, len(updates) + 1)
    figure.align_ylabels()
    figure.subplots_adjust(left=0.095, right=0.975, top=0.9, bottom=0.095)
    figure.savefig(path, dpi=DPI, facecolor="white")
    plt.close(figure)


def _curves(axes: Axes, updates: range, ours: Curve, theirs: Curve) -> None:
    """Trainer's as a broad band, ours as a thin line inside it."""
    axes.plot(
        updates, theirs.figures["loss"], color=THEIR_COLOUR, linewidth=9, solid_capstyle="round", label="HF Trainer"
    )
    axes.plot(
        updates, ours.figures["loss"], color=OUR_COLOUR, linewidth=2, marker="o", markersize=3.5, label="medqa's loop"
    )
    axes.set_ylabel("training loss (nats per token)")
    axes.set_title(
        "The same recipe twice: 4-bit, paged 8-bit AdamW, cosine with warmup (exp_002 --tiny, dropout 0)",
        loc="left",
        fontsize=14,
        pad=14,
    )
    axes.legend(frameon=False, loc="upper right")


def _difference(axes: Axes, updates: range, ours: Curve, theirs: Curve) -> None:
    """Relative differences on a scale that is linear up to `SMALLEST`, so that an exact 0 lies on the axis."""
    loss, norm = differences(ours, theirs, "loss"), differences(ours, theirs, "grad_norm")
    axes.set_yscale("symlog", linthresh=SMALLEST, linscale=0.5)
    axes.axhline(TOLERANCE, color=QUIET, linewidth=1.2, linestyle=(0, (5, 4)))
    below_the_line = {"xytext": (0, -5), "textcoords": "offset points", "ha": "right", "va": "top"}
    axes.annotate("what the test allows", (len(updates) + 0.6, TOLERANCE), color=QUIET, fontsize=11.5, **below_the_line)
    axes.plot(updates, norm, color=NORM_COLOUR, linestyle="none", marker="o", markersize=8, label="gradient norm")
    axes.plot(updates, loss, color=OUR_COLOUR, linestyle="none", marker="o", markersize=3.5, label="loss")
    axes.set_ylim(-SMALLEST / 3, 1e-5)
    axes.set_yticks([0, 1e-8, 1e-6], ["0", "1e-8", "1e-6"])
    axes.set_ylabel("relative\ndifference")
    axes.minorticks_off()
    if not any(loss) and not any(norm):
        verdict = "loss (dots) and gradient norm (rings): exactly 0 in every update"
        axes.annotate(verdict, (1, 0), xytext=(0, 12), textcoords="offset points", color=OUR_COLOUR)
    else:
        axes.legend(frameon=False, loc="upper left", ncols=2, fontsize=11.5)


if __name__ == "__main__":
    main()
