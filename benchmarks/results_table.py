"""The README's table of results, built from the files in `results/` and from nothing else."""

from collections.abc import Mapping
from pathlib import Path

from benchmarks.results_file import RECIPES, Figure, Record, Results
from medqa.errors import UserError
from medqa.files import write_file

BEGIN, END = "<!-- results: `make results` writes what stands between these two lines -->", "<!-- /results -->"
NOT_YET = "not yet run"
NOTHING = """No experiment with a real model has been measured yet: `make results` does it."""
ABOUT = """From the files in [results](results), which `make results` writes ([how](docs/benchmarks.md#results)); 95 %
intervals over rows in brackets. exp_001 to exp_003 read shorter rows: their perplexities are over other tokens."""
BREAK = "<br>"


def rebuild(readme: Path, results: Mapping[str, Results], trials: bool) -> bool:
    """Put the table into a README, between its two comments; says whether it changed.

    Args:
        trials: whether records with caveats may stand in it, labelled as such.

    Raises:
        UserError: it cannot be read, or the comments are not there once each and in order; or a trial is in the way.
        OSError: it cannot be written.
    """
    try:
        text = readme.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{readme}: cannot be read: {error}") from error
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(f"{readme}: the table has no place: put the lines {BEGIN} and {END} where it is to be, once")
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    new = f"{before}\n{section(results, trials)}{after}"
    if new == text:
        return False
    write_file(readme, new)
    return True


def section(results: Mapping[str, Results], trials: bool) -> str:
    """The table with a line below it, as Markdown; without results, one sentence.

    Raises:
        UserError: a record with caveats, unless `trials`.
    """
    for name, found in results.items():
        for record in found.records.values():
            if record.caveats and not trials:
                raise UserError(
                    f"{name}.json: {record.experiment} is a trial, no result ({', '.join(record.caveats)}); remove it"
                )
    if not results:
        return f"{NOTHING}\n"
    shown = [name for name in RECIPES if any(name in found.records for found in results.values())]
    lines = [_line(["recipe", *(_heading(found) for found in results.values())]), _line(["---"] * (1 + len(results)))]
    for name in shown:
        lines.append(_line([name, *(_cell(found.records.get(name)) for found in results.values())]))
    return "\n".join([*lines, "", ABOUT, ""])


def _heading(found: Results) -> str:
    """The setting of a column, and why it is a trial if it is one."""
    caveats = dict.fromkeys(caveat for record in found.records.values() for caveat in record.caveats)
    label = found.setting.label
    return f"{label}, a trial ({', '.join(map(_plain, caveats))})" if caveats else label


def _cell(record: Record | None) -> str:
    """What an experiment gave in a setting. A failure is said where its figures would be."""
    if record is None:
        return NOT_YET
    if record.failure is not None and record.failure.stage == "training":
        return f"failed: {record.failure.what}"
    if record.failure is not None:
        return BREAK.join([_perplexity(record), _cost(record), f"evaluation failed: {record.failure.what}"])
    return BREAK.join(show(record) for show in (_perplexity, _answers, _choices, _cost))


def _perplexity(record: Record) -> str:
    """Answer perplexity of baseline and adapter: on test, or, if the evaluation failed, on validation."""
    losses, split = (record.test, "test") if record.test.before else (record.validation, "validation")
    before, after = losses.before.answer_perplexity, losses.after.answer_perplexity
    if before is None or after is None:
        return f"answer perplexity: no answer tokens in {split}"
    own = losses.own_template
    base = f"base {_number(before.value)}" + (f", in its own template {_number(own.value)}" if own else "")
    return f"answer perplexity: **{_number(after.value)}**{_interval(after)}; {base} ({losses.rows:,} rows of {split})"


def _cost(record: Record) -> str:
    """Memory and time, and the precision that decides them."""
    training = record.training
    weights = ", 4-bit" if training.quantization == "4bit" else ""
    precision = "float32" if training.mixed_precision == "no" else training.mixed_precision
    return f"{training.peak_memory_bytes / 2**30:.1f} GiB, {_time(training.wall_clock_s)} ({precision}{weights})"


def _answers(record: Record) -> str:
    """ROUGE-L beside that of a copied training answer."""
    found = record.evaluation.generation.rouge_l
    own = f", in its own template {found['own_template'].value:.3f}" if "own_template" in found else ""
    others = f"base {found['untuned'].value:.3f}{own}, a copied answer {found['copied'].value:.3f}"
    tuned = f"ROUGE-L: **{found['tuned'].value:.3f}**{_interval(found['tuned'], '.3f')}"
    return f"{tuned}; {others} ({record.evaluation.generation.rows:,} answers)"


def _choices(record: Record) -> str:
    """Multiple choice beside chance."""
    found = record.evaluation.mcq
    if found is None:
        return "multiple choice: no questions"
    tuned, untuned = (found.accuracy[system] for system in ("tuned", "untuned"))
    shown = f"**{tuned.value:.1%}**{_interval(tuned, '.1%')}; base {untuned.value:.1%}, chance {found.chance:.1%}"
    return f"multiple choice: {shown} ({found.rows:,} questions)"


def _line(cells: list[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |" if set(cells) != {"---"} else f"|{'---|' * len(cells)}"


def _plain(text: str) -> str:
    """Text that ends no cell and no line, and is no markup."""
    return "".join(c if c.isalnum() or c in " ._=,-:/%[]" else " " for c in text)[:80].strip()


def _number(value: float) -> str:
    """Two digits after the point, fewer of what is large."""
    return f"{value:,.{2 if value < 100 else 1 if value < 1000 else 0}f}"


def _interval(figure: Figure, digits: str | None = None) -> str:
    """The ends of a figure's interval in brackets; nothing if it has none."""
    if figure.low is None or figure.high is None:
        return ""
    low, high = (_number(end) if digits is None else format(end, digits) for end in (figure.low, figure.high))
    return f" ({low} to {high})"


def _time(seconds: float) -> str:
    """`1 h 24 min`, `12 min`, `45 s`."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
