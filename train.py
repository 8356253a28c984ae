"""One run, `accelerate launch train.py --exp exp_002`, from top to bottom; its loop is `medqa/training/loop.py`."""

import argparse
import contextlib
import functools
import sys
import time
from collections.abc import Sequence

from medqa.config import planned_updates
from medqa.config_file import default_output_dir, find_experiment, load_experiment
from medqa.data.batches import Stream
from medqa.data.report import write_reports
from medqa.data.sources import load_sources
from medqa.data.splits import split_sources
from medqa.data.tokens import tokenize_splits
from medqa.errors import StoppedInTime, exit_code, saying_what_is_saved, together, writing
from medqa.evaluation.answers import sample_answers
from medqa.evaluation.loss import fixed_subset, summarize
from medqa.files import write_json
from medqa.model.base import check_model, load_model, load_tokenizer, tokens_without_weights
from medqa.model.device import available_memory, reset_peak, return_freed_memory
from medqa.model.loss import LossModel
from medqa.model.memory import fit_to_memory
from medqa.model.settings import resolve_settings
from medqa.options import parse_options
from medqa.terminal import make_console, protect
from medqa.training.batches import choose_micro_batch, make_evaluator
from medqa.training.before_after import adapter_sha256, close_run, make_summary, save_final_adapter
from medqa.training.checkpoint import Trained, save_checkpoint
from medqa.training.distributed import build_accelerator, choose_kernels, leave, on_main, prepared, take_shards
from medqa.training.identity import go_on, identify, told_of
from medqa.training.loop import train
from medqa.training.mirror import Copies, space_needed
from medqa.training.optimizer import build_optimizer, build_scheduler
from medqa.training.plan import accumulation_steps, make_plan
from medqa.training.recorder import (
    MetricsFile,
    Phases,
    ProgressLine,
    Tracker,
    quiet_libraries,
    show_plan,
    show_result,
    tell_trial,
)
from medqa.training.run_dir import (
    RunLock,
    check_run_dir,
    find_checkpoint,
    finished,
    left_alone,
    note_saved,
    start_run,
    what_is_saved,
    write_config,
)
from medqa.training.state import RunState
from medqa.training.stopping import Deadline, Interrupts, elapsed
from medqa.training.wandb import WandbFeed, log_adapter, log_samples, sampled_rows, start_wandb
from medqa.variables import settle_variables


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these options; the exit code says how it ended (`medqa/errors.py`), before a signal ends the process."""
    protect()
    with Interrupts() as interrupts:
        return exit_code(lambda: guarded(parse_options(argv), interrupts))


def guarded(options: argparse.Namespace, interrupts: Interrupts) -> None:
    """The run, with what must be let go of however it ends."""
    with interrupts.until_over(), contextlib.ExitStack() as leaving:
        run(options, interrupts, leaving)


def run(options: argparse.Namespace, interrupts: Interrupts, leaving: contextlib.ExitStack) -> None:
    """The run. Nothing is written until all is loaded, so a mistake changes nothing."""
    started, deadline, phases = time.perf_counter(), Deadline(options.stop_after), Phases()
    quiet_libraries()
    ignored = settle_variables()
    experiment = load_experiment(options.exp, tiny=options.tiny, locations=options.locations, sets=options.set)
    name = find_experiment(options.exp).stem
    output_dir = options.output_dir or default_output_dir(options.exp, options.tiny, options.set, experiment)
    seed, tokenization, training = experiment.training.seed, experiment.tokenization, experiment.training
    what = functools.partial(what_is_saved, output_dir, options.persist_to, options.fresh)
    leaving.enter_context(saying_what_is_saved(what))
    leaving.enter_context(writing(output_dir))
    lock = leaving.enter_context(RunLock(output_dir))
    copies = leaving.enter_context(Copies(options.persist_to, output_dir))
    check_run_dir(output_dir, experiment, options.fresh)
    lock.take_if_there()
    copies.check(experiment, options.fresh)
    found = None if options.fresh else find_checkpoint(output_dir, options.persist_to, experiment)
    saved = found.identity.environment.settings if found else None

    choose_kernels(training.deterministic)
    settings = resolve_settings(experiment, cpu=options.cpu, saved=saved, shards=take_shards(experiment))
    accelerator = build_accelerator(experiment, settings)
    console = make_console(accelerator.is_main_process)
    say = functools.partial(console.print, soft_wrap=True)
    say_once = functools.cache(say)
    accumulation = accumulation_steps(training, accelerator.num_processes)
    if not options.fresh and (summary := finished(output_dir, experiment)):
        console.print(f"{output_dir} is complete already")
        # What was not copied when it ended.
        on_main(accelerator, lambda: copies.start(training.keep_checkpoints, options.fresh, say))
        tell_trial(accelerator, experiment, output_dir, say)
        return show_result(console, summary)

    with accelerator.main_process_first():  # so that what is fetched is fetched once
        model_config, sources = together(
            lambda: check_model(experiment.model, tokenization.max_length),
            lambda: load_sources(experiment.data),
        )
    splits = split_sources(sources, experiment.data)
    phases.done("data")
    tokenizer = load_tokenizer(experiment.model.base, tokenization.pad_token)
    lacking = tokens_without_weights(tokenizer, model_config.vocab_size)
    splits, examples = tokenize_splits(splits, tokenizer, tokenization)
    stream = Stream(examples["train"], seed, training.global_batch_size)
    updates = planned_updates(experiment, len(stream.examples))
    phases.done("tokens")
    memory = available_memory(accelerator.device, accelerator.num_processes)
    settings = on_main(
        accelerator, lambda: fit_to_memory(settings, experiment, model_config, len(tokenizer), memory, saved)
    )
    if settings.return_memory and return_freed_memory():
        say("memory is short: freed memory goes back to the system at once, which is slower")
    with accelerator.main_process_first():
        adapted = load_model(experiment, settings, tokenizer, accelerator.device)
    bare_optimizer = build_optimizer(adapted, experiment.optimizer)
    scheduler = build_scheduler(bare_optimizer, experiment.scheduler, updates)
    model, optimizer = prepared(accelerator, LossModel(adapted), bare_optimizer, settings.shards)
    identity = identify(experiment, splits, examples, tokenizer, adapted, settings, accelerator)
    trained = Trained(adapted, optimizer, scheduler, accelerator.scaler)

    state = go_on(found, trained, identity) if found else RunState()
    leg = start_run(output_dir, options.fresh, found, state, lock, accelerator)  # from here on files are written
    tracker = Tracker(accelerator.is_main_process, MetricsFile(output_dir / "metrics.jsonl"), check=lock.check)
    spent = tracker.resume(state.step if state.baseline else -1, state.step if state.stopped_early else updates)
    state.peak_memory = max(state.peak_memory, spent.peak_memory)
    clock = functools.partial(elapsed, max(state.elapsed_s, spent.elapsed_s) - started)
    phases.done("model")
    if accelerator.is_main_process:
        write_config(output_dir, experiment, accumulation, settings.changes)
        write_reports(output_dir, sources, splits, examples, stream, experiment, settings.padding_free)
    on_main(accelerator, lambda: copies.start(training.keep_checkpoints, options.fresh, say))
    about = experiment, updates, stream, splits, examples
    plan = make_plan(*about, adapted, settings, accelerator, tokenizer.decode)
    plan.lines.extend([*lacking, *ignored, *told_of(found, state, spent.damaged), *left_alone(output_dir)])
    plan.lines.extend(space_needed(options.persist_to, experiment, adapted, state.step, updates))
    show_plan(console, f"{name} in {output_dir}", plan)
    say(start_wandb(accelerator, experiment, output_dir, leg.run_id, settings.changes))
    feed = WandbFeed(accelerator, say)
    tracker.begin_feed(feed)
    phases.done("start")

    choose_micro_batch(state, settings, model, stream, experiment, accelerator, say)
    phases.done("probe")
    evaluator = make_evaluator(state, settings, model, experiment, accelerator, tokenizer.pad_token_id)
    validation = examples["validation"]
    subset = fixed_subset(validation, experiment.evaluation.rows, seed)
    fixed_rows = [validation[i] for i in subset]
    if not state.baseline:
        began = clock()
        losses = evaluator.row_losses(validation)
        state.evaluation_s = clock() - began
        state.baseline = summarize(losses, validation)
        state.best_loss = summarize(losses[subset], fixed_rows).loss
        tracker.log({"step": 0, "split": "eval", "elapsed_s": clock(), **state.baseline.record()})
    reset_peak(accelerator.device)
    phases.done("evaluation")

    def save() -> None:
        tracker.flush()
        save_checkpoint(output_dir, trained, state, identity, accelerator, training.keep_checkpoints, say_once)
        if accelerator.is_main_process:
            note_saved(output_dir)
            copies.wake({state.step, state.best_step})

    with ProgressLine(console, state.step, updates, training.log_steps) as progress:
        train(
            accelerator,
            model,
            optimizer,
            scheduler,
            stream,
            experiment,
            tokenizer.pad_token_id,
            state,
            updates=updates,
            validate=functools.partial(evaluator.measure, fixed_rows),
            save=save,
            tracker=tracker,
            interrupts=interrupts,
            deadline=deadline,
            progress=phases.until_first_update(progress.update, say),
            say=say,
            clock=clock,
        )

    rounds = 4 if training.keep == "best" else 3  # of validation, of test, and a margin
    if on_main(accelerator, lambda: deadline.within(rounds * state.evaluation_s)):
        raise StoppedInTime(f"stopped in time after update {state.step}, the last, before the closing evaluation")
    ending = close_run(evaluator, examples, subset, adapted, state, experiment, copies.places, tracker, clock, say)
    if accelerator.is_main_process:
        summary = make_summary(name, experiment, state, ending, adapted, accelerator, leg, identity, phases, clock())
        adapter_dir = save_final_adapter(output_dir, adapted, tokenizer, summary, experiment)
        summary |= adapter_sha256(adapter_dir)
        if accelerator.trackers and settings.shards == 1 and (samples := sampled_rows(validation, experiment)):
            answers = sample_answers(adapted, tokenizer, samples, ending.adapter_step)
            feed.attempt(lambda: log_samples(accelerator, answers, feed.first), asks=True)
        feed.attempt(lambda: log_adapter(accelerator, experiment.tracking, adapter_dir, leg.run_id), asks=True)
        write_json(summary, output_dir / "summary.json")
        show_result(console, summary, adapter_dir)
    feed.finish()
    leave(accelerator)


if __name__ == "__main__":
    sys.exit(main())
