"""The README's table of results, built from the files in `results/` and from nothing else."""

from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.results_file import RECIPES, Figure, Record, Results
from medqa.errors import UserError
from medqa.files import write_file

BEGIN, END = "<!-- results: `make results` writes what stands between these two lines -->", "<!-- /results -->"
NOT_YET = "not yet run"
NOTHING = """No run on a GPU has been measured yet. What this documentation says about GPUs follows from the source code
of the libraries."""
ABOUT = """From the files in [results](results), which `make results` writes; in brackets 95 % intervals over rows. Each
experiment is measured on the rows as it reads them: exp_004's perplexities (longer rows, named options) are not to be
compared with those of the others."""


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
    lines = [_line(["TinyLlama-1.1B", *RECIPES]), _line(["---"] * (1 + len(RECIPES)))]
    for found in results.values():
        lines += _block(found.gpu, found.records)
    return "\n".join([*lines, "", ABOUT, ""])


def _block(gpu: str, records: Mapping[str, Record]) -> list[str]:
    """The rows of one GPU."""
    caveats = dict.fromkeys(caveat for record in records.values() for caveat in record.caveats)
    label = f"{gpu}, a trial ({', '.join(map(_plain, caveats))})" if caveats else gpu
    return [
        _line([f"{label}: {what}", *(_cell(records.get(experiment), show) for experiment in RECIPES)])
        for what, show in ROWS.items()
    ]


def _cell(record: Record | None, show: Callable[[Record], str]) -> str:
    """One cell. A run that failed says so in each; one whose evaluation failed, where that would have been."""
    if record is None:
        return NOT_YET
    if record.failure is None or (record.failure.stage == "evaluation" and show is _cost):
        return show(record)
    return f"{'' if record.failure.stage == 'training' else 'evaluation '}failed: {record.failure.what}"


def _perplexity(record: Record) -> str:
    """Of the answers: on test with its interval, or, where not all rows were evaluated, as the run measured it."""
    losses, split = (record.test, "") if record.test.before else (record.validation, ", on validation")
    before, after = losses.before.answer_perplexity, losses.after.answer_perplexity
    if before is None or after is None:
        return "no answer tokens"
    return f"{_number(before.value)} → {_with_interval(after)}{split}"


def _cost(record: Record) -> str:
    """Memory and time, and the precision that decides them."""
    training = record.training
    weights = "4-bit" if training.quantization == "4bit" else "no 4-bit"
    precision = "float32" if training.mixed_precision == "no" else training.mixed_precision
    return f"{training.peak_memory_bytes / 2**30:.1f} GiB, {_time(training.wall_clock_s)} ({weights}, {precision})"


def _answers(record: Record) -> str:
    """ROUGE-L beside that of a copied training answer."""
    found, rows = record.evaluation.generation.rouge_l, record.evaluation.generation.rows
    return f"{found['tuned'].value:.3f}, {found['untuned'].value:.3f}, {found['copied'].value:.3f} ({rows} answers)"


def _choices(record: Record) -> str:
    """Multiple choice beside chance."""
    found = record.evaluation.mcq
    if found is None:
        return "no questions"
    tuned, untuned = (found.accuracy[system].value for system in ("tuned", "untuned"))
    return f"{tuned:.1%}, {untuned:.1%}, {found.chance:.1%} ({found.rows:,} questions)"


ROWS: dict[str, Callable[[Record], str]] = {
    "answer perplexity on test, before → after": _perplexity,
    "peak memory, time": _cost,
    "ROUGE-L tuned, untuned, of a copied answer": _answers,
    "multiple choice tuned, untuned, by chance": _choices,
}


def _line(cells: list[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |" if set(cells) != {"---"} else f"|{'---|' * len(cells)}"


def _plain(text: str) -> str:
    """Text that ends no cell and no line, and is no markup."""
    return "".join(c if c.isalnum() or c in " ._=,-:/%[]" else " " for c in text)[:80].strip()


def _number(value: float) -> str:
    """Two digits after the point, fewer of what is large."""
    return f"{value:,.{2 if value < 100 else 1 if value < 1000 else 0}f}"


def _with_interval(figure: Figure) -> str:
    """A figure, and the ends of its interval."""
    if figure.low is None or figure.high is None:
        return _number(figure.value)
    return f"{_number(figure.value)} ({_number(figure.low)} to {_number(figure.high)})"


def _time(seconds: float) -> str:
    """`1 h 24 min`, `12 min`, `45 s`."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
