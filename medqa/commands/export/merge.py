"""Merge the adapter into the weights that it was trained on, and save the result as a model without PEFT."""

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
from medqa.data.tokens import prompt_ids, prompt_of
from medqa.errors import UserError
from medqa.files import write_json
from medqa.limited import Failed, limited
from medqa.model.attention import attention_in_effect
from medqa.model.base import add_lora, check_model, fit_adapter, load_base, load_tokenizer
from medqa.model.families import without_contents
from medqa.model.settings import Settings, resolve_settings

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class MergedInto:
    """Which weights an adapter is merged into.

    Attributes:
        quantized: training computed with 4-bit weights.
        own: it is merged into the unquantized weights of the base instead of those of training.
    """

    quantized: bool
    own: bool = False

    def __str__(self) -> str:
        if self.own:
            return "the unquantized weights of its base, and not the 4-bit weights that it was trained on"
        dequantized = ", dequantized from 4 bits" if self.quantized else ""
        return f"the weights it was trained on (the weights of its base{dequantized})"


@dataclass(frozen=True)
class Exact:
    """An adapter and the base that it was trained on, checked to fit each other; no weight is loaded yet.

    `weights` is the number of weights of the base, and `merged_into` says which of them the adapter is merged into.
    """

    source: Source
    config: Any
    tokenizer: PreTrainedTokenizerBase
    settings: Settings
    device: torch.device
    weights: int
    merged_into: MergedInto

    def load(self) -> Adapted:
        """Load the adapter on the weights that it is merged into, in float32, with the base's own vocabulary.

        4-bit weights are dequantized once. `[PAD]` is left out: it is never predicted, and the adapter has no weights
        for it.

        Raises:
            UserError: base or adapter cannot be loaded, or the base is another one than in training.
        """
        source, experiment = self.source, self.source.experiment
        model, seed = experiment.model, experiment.training.seed
        # Vocabulary 0: the embeddings are not resized.
        base = load_base(model, self.settings, self.device, 0, seed)
        fingerprint = require_same_base(source)
        adapted = add_lora(base.float(), experiment.lora, seed)
        fit_adapter(adapted, source.weights, source.name)
        adapted.requires_grad_(False)
        return Adapted(source, adapted.eval(), self.tokenizer, self.settings, fingerprint)


def prepare(source: Source, device: torch.device, weights: str = "trained") -> Exact:
    """Check whether an adapter can be merged into its base, before anything large is loaded.

    Args:
        weights: `trained`: merge into the weights that training computed with, which are dequantized if they have 4
            bits; `base`: into the unquantized weights of the base, in the type of its file.

    Raises:
        UserError: the base, or the quantization of training, is not available; the tokenizer has more tokens than the
            base has embeddings; the adapter is on a head that is tied to the embeddings; or `weights` is `base` and
            training computed with them already.
    """
    tokenization = source.experiment.tokenization.model_copy(update={"pad_token": "eos"})
    experiment = source.experiment.model_copy(update={"tokenization": tokenization})
    config = check_model(experiment.model, 0)
    attention, _ = attention_in_effect("sdpa", config)
    settings = resolve_settings(experiment, cpu=device.type == "cpu", saved=source.settings)
    trained_as = source.settings.quantization if source.settings else experiment.model.quantization
    merged_into = MergedInto(quantized=trained_as == "4bit", own=weights == "base")
    if merged_into.own:
        if not merged_into.quantized:
            why = "an adapter without its run is" if source.run is None else "its weights were not quantized, so it is"
            raise UserError(f"--weights base: {source.name}: {why} merged into them anyway; leave --weights out")
        settings = replace(settings, quantization="none", dtype=torch.float32)  # float32 has every value of any file
    elif settings.quantization != trained_as:
        _, _, reason = settings.changes["model.quantization"]
        raise UserError(
            f"{source.name}: trained on a base with quantization {trained_as}, which is not available here "
            f"({reason}): merged into other weights it would be another model; export it on a machine that has it, or "
            "merge it into the unquantized weights with --weights base"
        )
    tokenizer = load_tokenizer(experiment.model.base, tokenization, source.bos)
    blank = without_contents(config)
    read, head = blank.get_input_embeddings(), blank.get_output_embeddings()
    if len(tokenizer) > read.num_embeddings:
        raise UserError(
            f"model.base = {experiment.model.base}: its tokenizer has {len(tokenizer)} tokens, but its weights have "
            f"{read.num_embeddings}; no server could load that: give the base that belongs to the tokenizer with "
            "--model"
        )
    if "lm_head" in experiment.lora.target_modules and head.weight is read.weight:
        raise UserError(
            f"{source.name}: its adapter is also on lm_head, and {experiment.model.base} has tied embeddings: "
            "merging would change both; to export, train without lm_head in lora.target_modules"
        )
    return Exact(
        replace(source, experiment=experiment),
        config,
        tokenizer,
        # 4-bit weights are dequantized, attention is computed as on any server
        replace(settings, attn_implementation=attention, dequantize=True),
        device,
        sum(parameter.numel() for parameter in blank.parameters()),
        merged_into,
    )


def merge(adapted: PeftModel) -> PreTrainedModel:
    """Add the adapter's product to the weights of the base, in float32. The adapter is removed.

    Raises:
        UserError: weights of the adapter are not finite.
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
    """Save weights in this type and configuration, beside the tokenizer; greedy by default.

    Raises:
        UserError: there is no space.
    """
    end, eos = prompt_of(tokenizer).end, tokenizer.eos_token_id
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=eos if end == eos else [end, eos],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    try:
        model.to(dtype).save_pretrained(directory)
    except SafetensorError as error:
        raise out_of_space(directory, error) from error
    # For servers with a transformers version before 5, which would silently use another base of RoPE.
    rope = model.config.rope_parameters if isinstance(getattr(model.config, "rope_parameters", None), dict) else {}
    older = {"torch_dtype": str(dtype).removeprefix("torch.")}
    if rope.get("rope_type", "default") == "default" and "rope_theta" in rope:
        older["rope_theta"] = rope["rope_theta"]
    path = directory / "config.json"
    write_json({**json.loads(path.read_text(encoding="utf-8")), **older}, path)


def check_chat_template(directory: Path, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str]) -> None:
    """Load the saved tokenizer, and check that chat endpoints get the training prompt from it.

    transformers tokenizes what the template renders; vLLM and text-generation servers first render the text and then
    tokenize it without adding special tokens.

    Raises:
        UserError: they would get other ids.
    """
    saved = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    # A special token spelled out in a question (`</s>`) was text in training; every server makes a token of it.
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    asked = [question for question in questions if not special & set(tokenizer.tokenize(question))]

    def served() -> list[list[list[int]]]:
        found = []
        for question in asked:
            chat = [{"role": "user", "content": question.strip()}]
            text = saved.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            ids = saved.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
            found.append([list(ids["input_ids"]), saved(text, add_special_tokens=False)["input_ids"]])
        return found

    where = f"model.base = {tokenizer.name_or_path}: its tokenizer, after saving and loading,"
    try:
        found = limited(served)
    except Failed as error:
        raise UserError(f"{where} gives no prompt: {error}; choose another base with --model") from error
    for question, (ids, again) in zip(asked, found, strict=True):
        if not ids == again == prompt_ids(question, tokenizer):
            raise UserError(
                f"{where} gives another prompt for {question[:60]!r} than in training; choose another base with --model"
            )


def load_stored(directory: Path, device: torch.device) -> PreTrainedModel:
    """Load the merged model as a server does: in its stored type, without PEFT."""
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto", device_map={"": device}, use_safetensors=True, trust_remote_code=False
    ).eval()


def out_of_space(directory: Path, error: Exception) -> Exception:
    """The system's error inside a library's error, for example about a full disk; other errors unchanged."""
    number = re.search(r"os error (\d+)", str(error))
    return error if number is None else OSError(int(number[1]), os.strerror(int(number[1])), str(directory))
