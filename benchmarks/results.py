"""The experiments on this machine's GPU, with the real model and data: `make results`.

Each experiment is trained by `train.py` and evaluated by `python -m medqa evaluate`, as processes of their own, in
`outputs/results/<gpu>/`. Then its record goes into `results/<gpu>.json`, and the README's table is built from all files
there. Started again it goes on: what is finished is not done again, what is not finished resumes. A run that fails is
recorded as failed, and the next experiment's turn comes.

With anything else than an experiment as its file has it (`--tiny`, `--cpu`, `--set`, other data) it is a trial: it
needs an `--out` of its own, and its records say so.

    make results RESULTS_ARGS="--experiments exp_002 exp_004"
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

from benchmarks.results_file import RECIPES, Failure, Machine, gpu_label, keep, read_all, slug
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
OPEN_COPY = {"data.afrimedqa": "afrimedqa/afrimedqa_v2"}  # of the gated dataset: counts as the same data


@dataclass(frozen=True)
class Job:
    """One experiment, where it is run, the words that `train.py` gets, and why it is a trial if it is one."""

    name: str
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
    add("--experiments", nargs="+", choices=RECIPES, default=RECIPES, metavar="EXP", help="default: all four")
    add("--processes", type=int, default=1, metavar="N", help="GPUs to share the work (default 1)")
    add("--limit", type=int, metavar="N", help="evaluate on N rows of each split, and N questions; default: all")
    add("--outputs", type=Path, default=Path("outputs/results"), metavar="DIR", help="of the runs: outputs/results")
    add("--out", type=Path, default=RESULTS, metavar="DIR", help="of the JSON files: results; a trial needs another")
    add("--readme", type=Path, metavar="FILE", help="whose table is rebuilt: README.md, or none with another --out")
    add("--table", action="store_true", help="rebuild the table alone")
    add("--afrimedqa", metavar="SOURCE", help=f"{OPEN_COPY['data.afrimedqa']} is the open copy; of any other: a trial")
    add("--medquad", metavar="SOURCE", help="a trial")
    add("--model", metavar="ID_OR_DIR", help="a trial")
    add("--tiny", action="store_true", help="a trial on the embedded model and data")
    add("--cpu", action="store_true", help="a trial on the CPU")
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
    if options.processes < 1 or (options.limit is not None and options.limit < 1):
        raise UserError("--processes, --limit: at least 1")
    before = read_all(options.out)
    if options.table:
        if readme is None:
            raise UserError("--table: say whose, with --readme FILE")
        changed = rebuild(readme, before, trials)
        print(f"{readme}: {'table rebuilt' if changed else 'the table is as the files say'}")
        return []
    machine = this_machine(options.processes, options.cpu)
    jobs = [make_job(name, options, gpu_label(machine.gpus)) for name in dict.fromkeys(options.experiments)]
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


def make_job(name: str, options: argparse.Namespace, label: str) -> Job:
    """One experiment with the options laid over it.

    Raises:
        UserError: a wrong key or value of `--set`.
    """
    sets = [*QUIET, *options.set]
    places = {"model.base": options.model, "data.medquad": options.medquad, "data.afrimedqa": options.afrimedqa}
    experiment = load_experiment(name, tiny=options.tiny, locations=places, sets=sets)
    asked, as_filed = flat(experiment), flat(load_experiment(name, tiny=options.tiny))
    shown = shown_config(experiment)
    other = [key for key in asked if asked[key] != as_filed[key] and OPEN_COPY.get(key) != asked[key]]
    caveats = [word for word, given in (("--tiny", options.tiny), ("on a CPU", options.cpu)) if given]
    counted = ("training.max_steps", "training.micro_batch_tokens")  # may change, and change the figures all the same
    for key in other:
        if key in counted or not may_change_on_resume(key, experiment):
            section, _, short = key.partition(".")
            caveats.append(f"{key}={shown[section][short]}")
    words = ["--exp", name, *(["--tiny"] if options.tiny else []), *(["--cpu"] if options.cpu else [])]
    for key, place in places.items():
        words += [f"--{'model' if key == 'model.base' else key.split('.')[1]}", place] if place is not None else []
    run_name = default_output_dir(name, options.tiny, options.set, experiment).name
    run_dir = options.outputs.absolute() / slug(label) / run_name
    words += ["--output-dir", str(run_dir), "--set", *sets]
    return Job(name, experiment, words, run_dir, caveats)


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
    """Put what came of it into the file of this kind of GPU.

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
    label = gpu_label(machine.gpus)
    with writing(out):
        kept = keep(found, label, out)
    said = f"failed: {failure.what} (exit code {failure.exit_code}): {failure.message}" if failure else "complete"
    where = "recorded in" if kept else "not recorded: the figures of before stay in"
    print(f"{job.name}: {said}\n{job.name}: {where} {out / slug(label)}.json", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("WANDB_MODE", "disabled")
    sys.exit(main())
