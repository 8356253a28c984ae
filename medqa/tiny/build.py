"""Rebuild the embedded base model: a Llama with 0.75 million parameters, trained only on `text.txt`.

    python -m medqa.tiny.build [--output DIR] [--steps N]

The tokenizer is trained on that text and on the words of the sample data, so that no medical word is split into bytes.
The model never sees the sample data or the prompt: fine-tuning has to learn those. It resembles TinyLlama-1.1B-Chat in
the details that matter to a fine-tuning loop: BOS but no EOS is added, `</s>` is the padding token, padding is on the
right, embeddings are untied, and the chat template belongs to another prompt.

One thread, one seed: two builds on one machine are bit-identical. Other kinds of CPU round differently.
"""

import argparse
import csv
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from medqa.tiny import AFRIMEDQA_CSV, BASE_DIR, MEDQUAD_CSV

TEXT = Path(__file__).parent / "text.txt"
VOCAB_SIZE = 1024
MAX_POSITIONS = 512
UNK, BOS, EOS = "<unk>", "<s>", "</s>"  # ids 0, 1, 2, as in Llama 2

SEED = 0
STEPS = 120  # from 150 on it memorizes the text, and its perplexity on the sample data rises again
LEARNING_RATE = 4e-3
WARMUP_STEPS = 20
BATCH_SIZE = 16
WINDOW = 192  # tokens; no row of the sample data is longer, prompt and answer together

# Deliberately not this project's prompt: a saved adapter must replace it, which tests check.
FOREIGN_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + eos_token + '\n' }}"
    "{% elif message['role'] == 'system' %}{{ '<|system|>\n' + message['content'] + eos_token + '\n' }}"
    "{% else %}{{ '<|assistant|>\n' + message['content'] + eos_token + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def sample_words() -> Iterator[str]:
    """The natural-language fields of the sample data."""
    fields = {
        MEDQUAD_CSV: ("question", "answer"),
        AFRIMEDQA_CSV: ("prompt", "question_clean", "answer_options", "answer_rationale"),
    }
    for path, columns in fields.items():
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                yield from (row[column] for column in columns)


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """A byte-level BPE tokenizer that adds BOS but not EOS, like Llama 2's."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in (UNK, BOS, EOS)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS}:1 $B:1",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return tokenizer


def token_stream(tokenizer: Tokenizer, text: str) -> torch.Tensor:
    """The ids of all documents (separated by two empty lines), each between BOS and EOS; shape (tokens,), int64."""
    eos = tokenizer.token_to_id(EOS)
    documents = [document.strip() for document in text.split("\n\n\n")]
    return torch.tensor([i for document in documents for i in (*tokenizer.encode(document).ids, eos)])


def base_config() -> LlamaConfig:
    """A small TinyLlama.

    At rank 8 the intermediate size gives some LoRA matrices 4,096 elements, below which bitsandbytes keeps optimizer
    states in float32. Sizes are multiples of 32, the block size of quantized exports.
    """
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """One thread, deterministic kernels and a seeded generator; the previous state is restored afterwards."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(deterministic)


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warmup, then a cosine decay to 0 after `steps` updates; `step` counts from 0."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def pretrain(tokenizer: Tokenizer, text: str, steps: int = STEPS, seed: int = SEED) -> LlamaForCausalLM:
    """A model trained from scratch on random windows of the text; float32, in evaluation mode.

    Args:
        tokenizer: of `train_tokenizer`.
        text: documents separated by two empty lines, `WINDOW` tokens or more.
        steps: updates of `BATCH_SIZE` windows.
        seed: of the initial weights and the windows.
    """
    with reproducible(seed):
        model = LlamaForCausalLM(base_config()).train()
        stream = token_stream(tokenizer, text)
        offsets = torch.arange(WINDOW)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
        for step in range(1, steps + 1):
            starts = torch.randint(len(stream) - WINDOW + 1, (BATCH_SIZE, 1))
            windows = stream[starts + offsets]
            loss = model(input_ids=windows, labels=windows).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if step % 20 == 0 or step in (1, steps):
                print(f"step {step:4d} of {steps}  loss {loss.item():.3f}", flush=True)
    return model.eval()


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, output: Path) -> None:
    """Write model and tokenizer for `from_pretrained`. The model itself is converted to bfloat16."""
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2)
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save(str(output / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": UNK,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "padding_side": "right",
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
        "chat_template": FOREIGN_CHAT_TEMPLATE,
    }
    (output / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Train tokenizer and model, and save both."""
    parser = argparse.ArgumentParser(description="Rebuild the embedded base model.")
    parser.add_argument("--output", type=Path, default=BASE_DIR, help="directory to write to (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="pre-training updates (default: %(default)s)")
    args = parser.parse_args(argv)
    text = TEXT.read_text(encoding="utf-8")
    tokenizer = train_tokenizer([text, *sample_words()])
    model = pretrain(tokenizer, text, args.steps)
    args.output.mkdir(parents=True, exist_ok=True)
    save(model, tokenizer, args.output)
    size = sum(path.stat().st_size for path in args.output.iterdir())
    print(f"saved {model.num_parameters():,} parameters, {size:,} bytes, to {args.output}")


if __name__ == "__main__":
    main()
