"""medqa: LoRA and QLoRA fine-tuning for healthcare question answering, with a loop one can read.

Read `train.py` first: it is the run, from top to bottom. Then `training/loop.py`: `train`, then `train_step`. The rest
are the parts they use, in five wings, each of which may import only from those above it (and from this folder):

    data/        from files and hubs to rows, splits and an update's micro-batches
    model/       tokenizer, base model, LoRA, precision, and the token loss
    evaluation/  the loss of a split; answers to questions
    training/    the loop and what drives it: optimizer, scheduler, checkpoints, tracking, console
    results/     what is made of finished runs

Shared by all: `config.py` (the experiment), `prompts.py` (the one prompt), `errors.py`, `hub.py`, `variables.py`.
Libraries that only some runs need (bitsandbytes, wandb, kagglehub) are imported where they are used.
"""

import logging

from medqa.variables import prepare_imports

prepare_imports()
# At import it tells of a kernel package that nothing here needs.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
