"""One fine-tuning run, from top to bottom: `accelerate launch train.py --exp exp_002`. Next: medqa/training/loop.py."""

import argparse
import sys
from collections.abc import Sequence

from medqa.config_file import load_experiment
from medqa.data.batches import split_and_tokenize
from medqa.data.sources import load_sources
from medqa.errors import exit_code, together
from medqa.model.base import check_model, load_model, load_tokenizer, tokens_without_weights
from medqa.model.device import available_memory
from medqa.model.memory import fit_to_memory
from medqa.model.settings import resolve_settings
from medqa.options import parse_options
from medqa.terminal import protect
from medqa.training.batches import Batches
from medqa.training.before_after import HeldOut, save_results
from medqa.training.distributed import build_accelerator, choose_kernels, on_main, shards_from_launcher, shut_down
from medqa.training.loop import train
from medqa.training.plan import check_global_batch, make_plan
from medqa.training.recorder import Recorder
from medqa.training.run import Run
from medqa.training.state import build_state
from medqa.training.stopping import Stopper
from medqa.variables import settle_variables


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these options. The returned exit code says how the run ended (`medqa/errors.py`)."""
    protect()
    with Stopper() as stopper:  # signals are handled from here on
        return exit_code(lambda: fine_tune(parse_options(argv), stopper))


def fine_tune(options: argparse.Namespace, stopper: Stopper) -> None:
    """Load and check settings, data and model. Only then write files: resume or start, train, evaluate, save."""
    ignored = settle_variables()  # removes or refuses variables that would change results, returns those without effect
    experiment = load_experiment(options.exp, tiny=options.tiny, locations=options.locations, sets=options.set)
    stopper.set_deadline(options.stop_after)

    # `Run` checks the output directory, and finds the newest valid checkpoint there or in the mirror (--persist-to).
    with stopper.ignore_signals_afterwards(), Run(experiment, options) as run:
        # Settings: precision, quantization, attention and sharding, as far as this hardware supports the requested ones
        choose_kernels(experiment.training.deterministic)
        saved = run.saved_settings
        settings = resolve_settings(
            experiment, cpu=options.cpu, saved=saved, keep_bf16=run.was_on_cpu, shards=shards_from_launcher(experiment)
        )
        accelerator = build_accelerator(experiment, settings)
        check_global_batch(experiment.training, accelerator.num_processes)
        recorder = Recorder(experiment, accelerator, run.output_dir, run.startup, run.check_ownership)
        if run.summary is not None:  # the run is already complete
            return run.show_complete(recorder)

        # Data: rows, splits without leaks, token ids
        with accelerator.main_process_first():  # downloads happen once
            base, sources = together(
                lambda: check_model(experiment.model, experiment.tokenization.max_length),
                lambda: load_sources(experiment.data),
            )
        tokenizer = load_tokenizer(experiment.model.base, experiment.tokenization, settings.bos)
        data = split_and_tokenize(sources, tokenizer, experiment)
        run.startup.record("data")

        # Model: frozen base, LoRA adapter, optimizer, schedule. First, the settings are fitted to the free memory.
        free = available_memory(accelerator.device, accelerator.num_processes)
        settings = on_main(accelerator, lambda: fit_to_memory(settings, experiment, base, len(tokenizer), free, saved))
        with accelerator.main_process_first():
            adapted = load_model(experiment, settings, tokenizer, accelerator.device)
        state = build_state(adapted, experiment, data.updates, settings.shards, accelerator)

        # Resume or start: load the checkpoint if there is one, then write the first files
        notes = [*tokens_without_weights(tokenizer, base.vocab_size), *ignored]
        notes += run.resume_or_start(state, data, tokenizer, settings, recorder)
        recorder.show_plan(run.name, make_plan(experiment, data, settings, adapted, accelerator, tokenizer, notes))
        recorder.start_wandb(run.session.run_id, run.in_effect)

        # Before training: the largest micro-batch that fits, and the baseline
        batches = Batches(data.stream, experiment, tokenizer.pad_token_id, state.progress, accelerator)
        batches.probe(state.model, settings, recorder)
        held_out = HeldOut(state, batches, data, experiment, settings, run, stopper)
        held_out.measure_baseline(state.progress, recorder)

        # Training
        with recorder.training(state.progress, data.stream, data.updates, held_out.expected_seconds(state.progress)):
            train(
                state, batches, experiment, accelerator, updates=data.updates, recorder=recorder, stopper=stopper,
                save=lambda: run.save(state, recorder), evaluate=held_out.fixed_loss,  # on the fixed validation rows
            )  # fmt: skip

        # After training: final evaluation, adapter, summary. Without time for them, `--stop-after` ends the run here.
        stopper.require_time(accelerator, held_out.final_seconds(state.progress), state.progress.step)
        ending = held_out.measure_final(state, run.directories, recorder)
        save_results(run, state, ending, tokenizer, held_out.validation, experiment, recorder)
        shut_down(accelerator)


if __name__ == "__main__":
    sys.exit(main())
