"""medqa: LoRA and QLoRA fine-tuning for healthcare question answering, with an explicit training loop.

Read `train.py` first: it is the run, from top to bottom. Then read `training/loop.py`: `train`, `robust_step` and
`train_step`. The other modules are in five folders. Each folder imports only from those above it and from this one:

    data/        from files and the Hub to rows, splits, token ids and the micro-batches of an update
    model/       tokenizer, base model, LoRA, precision, memory, and the token loss
    evaluation/  the loss of a split; generated answers, multiple choice, safety
    training/    the loop and what it needs: state, checkpoints, the run's directory, metrics, console
    commands/    plan, evaluate, ask, compare, dashboard, export, verify-resume

All of them use `config.py` (the experiment), `errors.py` (exit codes), `files.py` (durable files) and `variables.py`
(environment variables). Libraries that only some runs need (bitsandbytes, wandb, kagglehub) are imported where they
are used.
"""

import logging

from medqa.variables import prepare_imports

prepare_imports()
# On import, bitsandbytes warns about a kernel package that nothing here needs.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
