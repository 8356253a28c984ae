"""The adapter merged into the weights that it was trained on, and saved as a model without PEFT."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from medqa.commands.adapter import Adapted, Source, require_same_base
from medqa.data.tokens import prompt_ids
from medqa.errors import UserError
from medqa.files import write_json
from medqa.model.attention import attention_in_effect
from medqa.model.base import add_lora, check_model, fit_adapter, load_base, load_tokenizer
from medqa.model.families import without_contents
from medqa.model.settings import Settings, resolve_settings

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Exact:
    """An adapter and the base that it was trained on, seen to fit each other; no weight is loaded yet.

    `weights` is how many the base has.
    """

    source: Source
    config: Any
    tokenizer: PreTrainedTokenizerBase
    settings: Settings
    device: torch.device
    weights: int

    def load(self) -> Adapted:
        """The adapter on the weights it was trained on, computed in float32, with the base's own vocabulary.

        4-bit weights are what they stand for, expanded once. `[PAD]` is left out: it was never predicted, and the
        adapter has nothing of it.

        Raises:
            UserError: base or adapter cannot be loaded, or the base is another one than in training.
        """
        source, experiment = self.source, self.source.experiment
        model, seed = experiment.model, experiment.training.seed
        # Vocabulary 0: nothing is grown.
        base = load_base(model, self.settings, self.device, 0, seed)
        fingerprint = require_same_base(source)
        adapted = add_lora(base.float(), experiment.lora, seed)
        fit_adapter(adapted, source.weights, source.name)
        adapted.requires_grad_(False)
        return Adapted(source, adapted.eval(), self.tokenizer, self.settings, fingerprint)


def prepare(source: Source, device: torch.device) -> Exact:
    """See whether an adapter can be merged into its base, before anything large is loaded.

    Raises:
        UserError: the base cannot be had, or not quantized as it was in training; its tokenizer has more tokens than it
            has embeddings; or the adapter is on a head that is the embeddings as well.
    """
    tokenization = source.experiment.tokenization.model_copy(update={"pad_token": "eos"})
    experiment = source.experiment.model_copy(update={"tokenization": tokenization})
    config = check_model(experiment.model, 0)
    attention, _ = attention_in_effect("sdpa", config)
    settings = resolve_settings(experiment, cpu=device.type == "cpu", saved=source.settings)
    trained_as = source.settings.quantization if source.settings else experiment.model.quantization
    if settings.quantization != trained_as:
        _, _, reason = settings.changes["model.quantization"]
        raise UserError(
            f"{source.name}: trained on a base with quantization {trained_as}, which cannot be had here "
            f"({reason}): merged into other weights it would be another model; export it where it can"
        )
    tokenizer = load_tokenizer(experiment.model.base, "eos")
    blank = without_contents(config)
    read, head = blank.get_input_embeddings(), blank.get_output_embeddings()
    if len(tokenizer) > read.num_embeddings:
        raise UserError(
            f"model.base = {experiment.model.base}: its tokenizer has {len(tokenizer)} tokens, its weights "
            f"{read.num_embeddings}; no server could load that: give the base that belongs to the tokenizer with "
            "--model"
        )
    if "lm_head" in experiment.lora.target_modules and head.weight is read.weight:
        raise UserError(
            f"{source.name}: its adapter is on lm_head too, and {experiment.model.base} has one matrix for head and "
            "embeddings: merged, it would change both; train without lm_head in lora.target_modules to export"
        )
    return Exact(
        replace(source, experiment=experiment),
        config,
        tokenizer,
        # 4-bit weights expanded, attention as any server computes it
        replace(settings, attn_implementation=attention, dequantize=True),
        device,
        sum(parameter.numel() for parameter in blank.parameters()),
    )


def merge(adapted: PeftModel) -> PreTrainedModel:
    """The base with the adapter's product added to its weights, in float32. The adapter is gone afterwards.

    Raises:
        UserError: the adapter has weights that are not finite.
    """
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise UserError(
            f"the adapter cannot be merged: {error}; export another checkpoint with --checkpoint"
        ) from error
    merged.config.use_cache = True
    return merged


def save_merged(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, directory: Path
) -> None:
    """Weights in this type and configuration, beside the tokenizer that is there; greedy by default.

    Raises:
        UserError: no space.
    """
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    try:
        model.to(dtype).save_pretrained(directory)
    except SafetensorError as error:
        raise out_of_space(directory, error) from error
    # For servers that have a transformers before 5 inside, which would take another base of RoPE, silently.
    rope = model.config.rope_parameters if isinstance(getattr(model.config, "rope_parameters", None), dict) else {}
    older = {"torch_dtype": str(dtype).removeprefix("torch.")}
    if rope.get("rope_type", "default") == "default" and "rope_theta" in rope:
        older["rope_theta"] = rope["rope_theta"]
    path = directory / "config.json"
    write_json({**json.loads(path.read_text(encoding="utf-8")), **older}, path)


def check_chat_template(directory: Path, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str]) -> None:
    """Load the tokenizer that was saved, and see that chat endpoints get the training prompt from it.

    transformers tokenizes what the template renders; vLLM and text-generation servers take its text first and tokenize
    that, without special tokens of their own.

    Raises:
        UserError: they would get other ids.
    """
    saved = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    for question in questions:
        if set(tokenizer.all_special_tokens) & set(tokenizer.tokenize(question)):
            continue  # `</s>` spelled in a question was text in training; every server makes the token of it
        chat = [{"role": "user", "content": question}]
        text = saved.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = saved.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
        again = saved(text, add_special_tokens=False)["input_ids"]
        if not ids == again == prompt_ids(question, tokenizer):
            raise UserError(
                f"model.base = {tokenizer.name_or_path}: its tokenizer, saved and loaded again, gives another prompt "
                f"for {question[:60]!r} than in training; choose another base with --model"
            )


def load_stored(directory: Path, device: torch.device) -> PreTrainedModel:
    """The merged model as a server loads it: in the type that it is stored in, without PEFT."""
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto", device_map={"": device}, use_safetensors=True, trust_remote_code=False
    ).eval()


def out_of_space(directory: Path, error: Exception) -> Exception:
    """The system's error inside the one that a library gives for it, a full disk for example; another as it is."""
    number = re.search(r"os error (\d+)", str(error))
    return error if number is None else OSError(int(number[1]), os.strerror(int(number[1])), str(directory))
