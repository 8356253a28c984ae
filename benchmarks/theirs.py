"""The peers of `compare.py`: HF `Trainer`, plain and with its options, and TRL's `SFTTrainer`.

No module of this project that trains is imported, so that time and memory are theirs alone.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import Sampler
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler

from benchmarks.gate import Gate, Job

IGNORED = -100
MORE_ARGUMENTS = {
    "rebalance": {"train_sampling_strategy": "batch_rebalance"},
    "liger": {"use_liger_kernel": True},
    "compile": {"torch_compile": True},
    "packing": {"packing": True, "train_sampling_strategy": "random"},  # packed rows come sorted
}
OWN_PADDING = ("grouped", "rebalance", "trl", "packing")  # pad to the longest, which their gain is about


class InOrder(Trainer):
    """`Trainer` whose batch rebalancing takes the rows in their order: an update then has the same ones as others."""

    def _get_train_sampler(self, train_dataset: Sequence | None = None) -> Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, BatchRebalanceSampler):
            sampler.shuffle = False
        return sampler


class Hold(TrainerCallback):
    """Tells the gate of each update."""

    def __init__(self, gate: Gate, tokens: Sequence[int]) -> None:
        self._gate, self._tokens = gate, tokens

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Waits there."""
        self._gate.update_done(self._tokens[state.global_step - 1])


class Counted:
    """Useful tokens of the updates so far, where which rows an update takes is not known before."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._tokens = 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, torch.Tensor]) -> None:
        self._tokens += kwargs["input_ids"].numel()  # packed rows laid end to end hold no padding

    def __getitem__(self, update: int) -> int:
        tokens, self._tokens = self._tokens, 0
        return tokens


def run(job: Job, gate: Gate) -> None:
    """The arm's `trainer.train()`, held at the end of updates."""
    rows = chosen_rows(job)
    trainer = make_trainer(job, rows)
    size = job.rows_per_update
    lengths = [len(row) for row in rows]
    known = [sum(lengths[i : i + size]) for i in range(0, len(lengths), size)]
    known = [known[i % len(known)] for i in range(job.updates)]  # few rows come again, epoch after epoch
    trainer.add_callback(Hold(gate, Counted(trainer.model.get_base_model()) if job.arm == "packing" else known))
    trainer.train()


def chosen_rows(job: Job) -> list[np.ndarray]:
    """The rows of the arm's updates, in order: the same for all that do not choose by length.

    Length grouping sorts 50 updates of rows by length. As only a few are timed, they are taken at even distances from
    the sampler's order, or all would be long ones.
    """
    ids, order = job.ids()
    size = job.rows_per_update
    if job.arm == "packing":
        return ids
    if job.arm == "grouped":
        generator = torch.Generator().manual_seed(0)
        sampler = LengthGroupedSampler(size, lengths=[len(row) for row in ids], generator=generator)
        megabatch = list(sampler)[: min(len(ids) // (4 * size), 50) * size or size]
        updates = [megabatch[i : i + size] for i in range(0, len(megabatch), size)]
        spread = np.linspace(0, len(updates) - 1, job.updates).round().astype(int)
        spread = np.random.default_rng(0).permutation(spread)
        order = [i for update in spread for i in updates[update]]
    return [ids[i] for i in order[: job.updates * size]]


def make_model(job: Job) -> PeftModel:
    """The base and a fresh adapter, as PEFT's documentation has them made."""
    settings, dtype = job.settings, getattr(torch, job.dtype)
    four_bit = None
    if settings["model.quantization"] == "4bit":
        four_bit = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    base = AutoModelForCausalLM.from_pretrained(
        job.base,
        dtype=dtype,
        quantization_config=four_bit,
        device_map={"": 0 if job.device == "cuda" else "cpu"},
        attn_implementation="sdpa",
    )
    base.config.use_cache = False
    base.requires_grad_(False)
    torch.manual_seed(settings["training.seed"])
    names = ("r", "lora_alpha", "lora_dropout", "target_modules", "bias")
    lora = {name: settings[f"lora.{name}"] for name in names}
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **lora))


def make_trainer(job: Job, rows: Sequence[np.ndarray]) -> Trainer:
    """The arm's trainer over rows that it takes in their order."""
    tokenizer = AutoTokenizer.from_pretrained(job.base)
    arguments = {**job.arguments, **MORE_ARGUMENTS.get(job.arm, {})}
    if job.arm in ("trl", "packing"):
        return _sft_trainer(job, rows, arguments)
    to = None if job.arm in OWN_PADDING or job.settings["tokenization.padding"] == "longest" else "max_length"
    length = job.settings["tokenization.max_length"] if to else None
    return InOrder(
        model=make_model(job),
        args=TrainingArguments(**arguments),
        train_dataset=[{"input_ids": row.tolist()} for row in rows],
        data_collator=functools.partial(collate, pad_token_id=2, length=length),
        processing_class=tokenizer,
    )


def _sft_trainer(job: Job, rows: Sequence[np.ndarray], arguments: dict) -> Trainer:
    """TRL's, on rows that are tokenized already."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    max_length = job.settings["tokenization.max_length"]
    if job.arm == "packing":  # packed rows hold more tokens: so many that an update has about as many as the others'
        size, micro_batch = job.rows_per_update, arguments["per_device_train_batch_size"]
        tokens = size * np.mean([len(row) for row in rows])
        arguments["gradient_accumulation_steps"] = max(1, round(tokens / (max_length * micro_batch)))
    dataset = Dataset.from_dict({name: [row.tolist() for row in rows] for name in ("input_ids", "labels")})
    return SFTTrainer(
        model=make_model(job),
        args=SFTConfig(max_length=max_length, **arguments),
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(job.base),
    )


def collate(rows: Sequence[dict[str, list[int]]], pad_token_id: int, length: int | None) -> dict[str, torch.Tensor]:
    """Rows padded on the right, to the longest where there is no `length`; padding is no target."""
    ids = [row["input_ids"] for row in rows]
    length = length or max(map(len, ids))

    def padded(lists: Sequence[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([one + [value] * (length - len(one)) for one in lists])

    ones = [[1] * len(one) for one in ids]
    return {"input_ids": padded(ids, pad_token_id), "attention_mask": padded(ones, 0), "labels": padded(ids, IGNORED)}
