"""What is said of a wrong key or value of an experiment file: the key that was meant, the value that is wanted."""

import difflib
from collections.abc import Mapping
from typing import Any

from medqa.config import Experiment, flat

# What the same thing is called by Trainer, TRL, Axolotl, LLaMA-Factory, Unsloth, torchtune and LitGPT.
OTHER_TOOLS_NAMES = {
    "lr": "optimizer.learning_rate",
    "optim": "optimizer.name",
    "adam_beta1": "optimizer.betas",
    "adam_beta2": "optimizer.betas",
    "adam_epsilon": "optimizer.eps",
    "max_norm": "optimizer.max_grad_norm",
    "gradient_clipping": "optimizer.max_grad_norm",
    "lr_scheduler": "scheduler.name",
    "lr_scheduler_type": "scheduler.name",
    "warmup": "scheduler.warmup_steps",
    "num_warmup_steps": "scheduler.warmup_steps",
    "warmup_ratio": "scheduler.warmup_steps",
    "num_train_epochs": "training.epochs",
    "num_epochs": "training.epochs",
    "max_train_steps": "training.max_steps",
    "num_training_steps": "training.max_steps",
    "max_steps_per_epoch": "training.max_steps",
    "batch_size": "training.global_batch_size",
    "train_batch_size": "training.global_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size",
    "gradient_accumulation": "training.global_batch_size",
    "micro_batch_size": "training.per_device_batch_size",
    "per_device_train_batch_size": "training.per_device_batch_size",
    "bf16": "training.mixed_precision",
    "fp16": "training.mixed_precision",
    "precision": "training.mixed_precision",
    "random_seed": "training.seed",
    "packing": "training.padding_free",
    "sample_packing": "training.padding_free",
    "logging_steps": "training.log_steps",
    "checkpoint_steps": "training.save_steps",
    "save_total_limit": "training.keep_checkpoints",
    "eval_steps": "evaluation.steps",
    "load_in_4bit": "model.quantization",
    "quantization_bit": "model.quantization",
    "quantize": "model.quantization",
    "torch_dtype": "model.dtype",
    "base_model": "model.base",
    "model_name_or_path": "model.base",
    "model_id": "model.base",
    "activation_checkpointing": "model.gradient_checkpointing",
    "enable_activation_checkpointing": "model.gradient_checkpointing",
    "use_gradient_checkpointing": "model.gradient_checkpointing",
    "flash_attention": "model.attn_implementation",
    "flash_attn": "model.attn_implementation",
    "rank": "lora.r",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "alpha": "lora.lora_alpha",
    "dropout": "lora.lora_dropout",
    "lora_target": "lora.target_modules",
    "lora_target_modules": "lora.target_modules",
    "cutoff_len": "tokenization.max_length",
    "sequence_len": "tokenization.max_length",
    "max_seq_length": "tokenization.max_length",
    "max_seq_len": "tokenization.max_length",
    "train_on_inputs": "tokenization.loss_on",
    "train_on_prompt": "tokenization.loss_on",
    "completion_only_loss": "tokenization.loss_on",
    "assistant_only_loss": "tokenization.loss_on",
    "add_eos_token": "tokenization.append_eos",
    "report_to": "tracking.wandb",
    "wandb_project": "tracking.project",
    "run_name": "tracking.run_name",
    "patience": "training.early_stopping_patience",
    "load_best_model_at_end": "training.keep",
    "epoch": "training.epochs",
}


# Where the key that was probably meant is not quite the same thing.
UNLIKE = {
    "gradient_accumulation_steps": "it is batch size x accumulation x GPUs",
    "gradient_accumulation": "it is batch size x accumulation x GPUs",
    "batch_size": "it is batch size x accumulation x GPUs",
    "train_batch_size": "it is batch size x accumulation x GPUs",
    "packing": "it leaves padding out without changing which rows an update has",
    "sample_packing": "it leaves padding out without changing which rows an update has",
}


def meant(key: str) -> str:
    """`; did you mean section.key?` where there is a probable one."""
    known = list(flat(Experiment()))
    last = key.split(".")[-1]
    if last in OTHER_TOOLS_NAMES:
        unlike = f" ({UNLIKE[last]})" if last in UNLIKE else ""
        return f"; did you mean {OTHER_TOOLS_NAMES[last]}?{unlike}"
    same_name = [name for name in known if name.split(".")[1] == last]
    neighbours = [name for name in known if name.startswith(key.split(".")[0] + ".")]
    sections = [] if "." in key else difflib.get_close_matches(key, Experiment.model_fields, 1)
    close = same_name or sections or _close_by_last(last, neighbours) or _close_by_last(last, known)
    close = close or difflib.get_close_matches(key, known, 1)
    return f"; did you mean {close[0]}?" if close else ""


def _close_by_last(last: str, known: list[str]) -> list[str]:
    """The known keys whose own name, without the section, is like `last`."""
    names = {name.split(".")[1]: name for name in known}
    return [names[match] for match in difflib.get_close_matches(last, names, 1, cutoff=0.7)]


def wanted(key: str, detail: Mapping[str, Any]) -> str:
    """What pydantic found wrong, in this project's words."""
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    if key == "data.files":
        return "names with a file or a hub id each are wanted: {notes: notes.csv} (a number as a name: in quotes)"
    match detail["type"]:
        case "literal_error":
            return f"one of {detail['ctx']['expected']} is wanted"
        case "int_type":
            return "a whole number is wanted"
        case "float_type":
            return "a number is wanted"
        case "bool_type":
            return "true or false is wanted"
        case "string_type":
            return "a word is wanted" + (" (`none` to leave it out)" if key.startswith("data.") else "")
        case "list_type":
            return "a list is wanted"
        case "string_unicode":
            return "text is wanted, and this has bytes that are not UTF-8; rename what it names"
        case _:
            return detail["msg"][0].lower() + detail["msg"][1:]
