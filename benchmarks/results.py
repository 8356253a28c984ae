"""The experiments with a real model and real data on this machine: `make results`.

Each experiment is trained by `train.py` and evaluated by `python -m medqa evaluate`, as processes of their own, in
`outputs/results/<setting>/`. Then its record goes into `results/<setting>.json`, and the README's table is built from
all files there. Started again it continues: what is finished is not repeated, what is not finished resumes. A run that
fails is recorded as failed, and the next experiment follows.

A setting is a base model (`--model`), a machine (its GPUs, or with `--cpu` its CPU) and a budget (`--examples`,
`--limit`). Within one budget all experiments train on equally many examples, with their warmup in proportion, without
padding, which changes no update. Anything else that is changed (`--tiny`, `--set`, other data) makes a trial: it needs
an `--out` of its own, and its records say so.

    make results RESULTS_ARGS="--experiments exp_002 exp_004"
    make results RESULTS_ARGS="--cpu --model HuggingFaceTB/SmolLM2-135M-Instruct --examples 800 --limit 200"
    python -m benchmarks.results --tiny --cpu --limit 8 --out trial
    python -m benchmarks.results --table        # the README's table alone
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.results_file import RECIPES, Failure, Machine, Setting, as_label, keep, machine_label, read_all, slug
from benchmarks.results_machine import ROOT, code_caveats, code_commit, this_machine
from benchmarks.results_process import Start, noted_commits, only_one, require_free, run_stage, start_process
from benchmarks.results_records import evaluated_tasks, make_record
from benchmarks.results_table import rebuild
from medqa.commands.evaluate import TASKS
from medqa.config import Experiment, flat, may_change_on_resume
from medqa.config_file import default_output_dir, load_experiment
from medqa.errors import UserError, exit_code, writing
from medqa.training.run_dir import finished
from medqa.training.wandb import shown_config

RESULTS, README = ROOT / "results", ROOT / "README.md"
QUIET = ("tracking.wandb=disabled",)  # nobody asked for a W&B run; no update depends on it
OPEN_COPY = "afrimedqa/afrimedqa_v2"  # of the gated dataset
DATA = ("data.medquad", "data.afrimedqa")
CURVE = 5  # evaluations during training within a budget


@dataclass(frozen=True)
class Job:
    """One experiment, its setting, where it is run, the words that `train.py` gets, and why it is a trial if it is."""

    name: str
    setting: Setting
    experiment: Experiment
    words: list[str]
    run_dir: Path
    caveats: list[str]


def main(argv: Sequence[str] | None = None, start: Start | None = None) -> int:
    """Run with these options; exit code 0 where all are complete, 1 where one has failed, else 2 or 128+n.

    Args:
        start: starts a process; another than the real one in the tests.
    """
    options = parse_options(argv)
    failed: list[str] = []
    code = exit_code(lambda: failed.extend(results(options, start or start_process)))
    return code or (1 if failed else 0)


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.results", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--experiments", nargs="+", choices=RECIPES, default=RECIPES, metavar="EXP", help="default: all")
    add("--model", metavar="ID_OR_DIR", help="another base model than that of the experiment file")
    add("--base-name", metavar="NAME", help="what the table calls the base model (a directory of `--model` needs it)")
    add("--examples", type=int, metavar="N", help="training examples of each experiment; default: as in its file")
    add("--limit", type=int, metavar="N", help="evaluate on N rows of each split, and N questions; default: all")
    add("--cpu", action="store_true", help="on the CPU")
    add("--processes", type=int, default=1, metavar="N", help="GPUs to share the work (default 1)")
    add("--medquad", metavar="SOURCE", help="a local copy")
    add("--afrimedqa", metavar="SOURCE", help=f"a local copy, or {OPEN_COPY}")
    add("--outputs", type=Path, default=Path("outputs/results"), metavar="DIR", help="of the runs: outputs/results")
    add("--out", type=Path, default=RESULTS, metavar="DIR", help="of the JSON files: results; a trial needs another")
    add("--readme", type=Path, metavar="FILE", help="whose table is rebuilt: README.md, or none with another --out")
    add("--table", action="store_true", help="rebuild the table alone")
    add("--tiny", action="store_true", help="a trial on the embedded model and data")
    add("--set", nargs="+", action="extend", default=[], metavar="section.key=value", help="a trial")
    return parser.parse_args(argv)


def results(options: argparse.Namespace, start: Start) -> list[str]:
    """Do what the options say; the experiments that failed.

    Raises:
        UserError: no GPU; an option, a file or the state of the code does not allow it. Nothing is changed then.
        Interrupted: by a signal, after the trainer has saved.
    """
    real = options.out.resolve() == RESULTS
    readme = options.readme or (README if real else None)
    trials = readme is not None and readme.resolve() != README  # whether its table takes them
    numbers = (options.processes, options.limit, options.examples)
    if any(number is not None and number < 1 for number in numbers):
        raise UserError("--processes, --limit, --examples: at least 1")
    if options.cpu and options.processes > 1:  # the name of a CPU's column does not say how many shared it
        raise UserError(f"--cpu --processes {options.processes}: one process runs on a CPU; leave --processes out")
    before = read_all(options.out)
    if options.table:
        if readme is None:
            raise UserError("--table: say whose, with --readme FILE")
        changed = rebuild(readme, before, trials)
        print(f"{readme}: {'table rebuilt' if changed else 'the table is as the files say'}")
        return []
    machine = this_machine(options.processes, options.cpu)
    jobs = [make_job(name, options, machine_label(machine)) for name in dict.fromkeys(options.experiments)]
    if real:
        require_no_trial(jobs)
    if readme is not None:
        rebuild(readme, before, trials)  # so that what is wrong with it shows now and not after hours
    failed = []
    with contextlib.ExitStack() as leaving:
        for job in jobs:
            leaving.enter_context(only_one(job.run_dir))
        for job in jobs:
            failure = work_on(job, options, start)
            if real:
                require_no_trial([job])  # the code may have been changed meanwhile
            record(job, machine, failure, options.out)
            if readme is not None:
                rebuild(readme, read_all(options.out), trials)
            failed += [job.name] if failure else []
    return failed


def require_no_trial(jobs: Sequence[Job]) -> None:
    """See that these are the experiments as their files have them, by code that others have.

    Raises:
        UserError: they are not.
    """
    if caveats := dict.fromkeys(caveat for job in jobs for caveat in caveats_of(job)):
        raise UserError(
            f"make results: a trial, no result: {'; '.join(caveats)}; leave that out (commit what is changed, remove "
            f"{jobs[0].run_dir.parent} if changed code made it), or give trials a place of their own: --out trial"
        )


def caveats_of(job: Job) -> list[str]:
    """Why it is a trial: by what was asked, and by the code that works, or has worked, on it."""
    return [*job.caveats, *code_caveats([code_commit(), *noted_commits(job.run_dir)])]


def make_job(name: str, options: argparse.Namespace, machine: str) -> Job:
    """One experiment with the options applied.

    Raises:
        UserError: a wrong key or value of `--set`, or a budget that the experiment cannot divide into updates.
    """
    locations = {"model.base": options.model, "data.medquad": options.medquad, "data.afrimedqa": options.afrimedqa}
    as_filed = load_experiment(name, tiny=options.tiny, locations=locations)
    budget = budget_of(name, as_filed, options)
    sets = [*QUIET, *budget, *options.set]
    experiment = load_experiment(name, tiny=options.tiny, locations=locations, sets=sets)
    expected = flat(load_experiment(name, tiny=options.tiny, locations=locations, sets=budget))
    asked, shown = flat(experiment), shown_config(experiment)
    as_published = flat(load_experiment(name))
    base = options.base_name or Path(experiment.model.base).name
    caveats = ["--tiny"] if options.tiny else []
    if options.model and not options.base_name and Path(options.model).exists():
        caveats.append("a base model in a directory, without --base-name")
    for key in DATA:
        same = asked[key] in (as_published[key], OPEN_COPY) or is_local_copy(asked[key])
        if not same and not options.tiny:
            caveats.append(f"{key}={shown['data'][key.partition('.')[2]]}")
    counted = ("training.max_steps", "training.micro_batch_tokens")  # may change on resume, and yet change the figures
    for key in asked:
        if asked[key] != expected[key] and (key in counted or not may_change_on_resume(key, experiment)):
            section, _, short = key.partition(".")
            caveats.append(f"{key}={shown[section][short]}")
    words = ["--exp", name, *(["--tiny"] if options.tiny else []), *(["--cpu"] if options.cpu else [])]
    for key, place in locations.items():
        words += [f"--{'model' if key == 'model.base' else key.split('.')[1]}", place] if place is not None else []
    setting = Setting(machine=machine, base=as_label(base), examples=options.examples, rows=options.limit)
    run_name = default_output_dir(name, options.tiny, options.set, experiment).name
    run_dir = options.outputs.absolute() / slug(setting.label) / run_name
    words += ["--output-dir", str(run_dir), "--set", *sets]
    return Job(name, setting, experiment, words, run_dir, caveats)


def budget_of(name: str, experiment: Experiment, options: argparse.Namespace) -> list[str]:
    """The values of `--set` that fit an experiment to the budget.

    Raises:
        UserError: the examples do not divide into updates.
    """
    sets = [f"evaluation.full_rows={options.limit}"] if options.limit is not None else []
    if options.examples is None:
        return sets
    updates, left = divmod(options.examples, experiment.training.global_batch_size)
    if left or not updates:
        size = experiment.training.global_batch_size
        raise UserError(f"--examples {options.examples}: {name} has {size} examples in an update; pass a multiple")
    planned = experiment.training.max_steps
    warmup = experiment.scheduler.warmup_steps
    if planned is not None:
        warmup = round(warmup * updates / planned)
    sets += [f"training.max_steps={updates}", "training.epochs=null", f"scheduler.warmup_steps={min(warmup, updates)}"]
    return [*sets, f"evaluation.steps={max(1, updates // CURVE)}", "training.padding_free=true"]


def is_local_copy(source: str) -> bool:
    """Whether a data source is a file or a directory here. Its content is known by the record's fingerprint."""
    return Path(source).exists()


def work_on(job: Job, options: argparse.Namespace, start: Start) -> Failure | None:
    """Train and evaluate, as far as that is not done; the failure if there is one.

    Raises:
        UserError: another run is on in the directory.
        Interrupted: by a signal.
    """
    print(f"{job.name}:", flush=True)
    require_free(job.run_dir)
    if finished(job.run_dir, job.experiment) is None:
        failure = run_stage("training", job.run_dir, job.words, options.processes, start)
        if failure is not None:
            return failure
    missing = [task for task in TASKS if task not in evaluated_tasks(job.run_dir, options.limit)]
    if not missing:
        return None
    words = [str(job.run_dir), "--tasks", ",".join(missing), *(["--cpu"] if options.cpu else [])]
    words += ["--limit", str(options.limit)] if options.limit else []
    return run_stage("evaluation", job.run_dir, words, options.processes, start)


def record(job: Job, machine: Machine, failure: Failure | None, out: Path) -> None:
    """Put the outcome into the file of this setting.

    Raises:
        UserError: a file of the run or of the results is damaged, or the latter cannot be written.
    """
    found = make_record(
        job.name,
        job.run_dir,
        commits=noted_commits(job.run_dir),
        caveats=caveats_of(job),
        machine=machine,
        failure=failure,
    )
    with writing(out):
        kept = keep(found, job.setting, out)
    said = f"failed: {failure.what} (exit code {failure.exit_code}): {failure.message}" if failure else "complete"
    where = "recorded in" if kept else "not recorded: the previous figures stay in"
    print(f"{job.name}: {said}\n{job.name}: {where} {out / slug(job.setting.label)}.json", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("WANDB_MODE", "disabled")
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # accelerate launch would set one
    sys.exit(main())
