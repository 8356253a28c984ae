"""Tokenizer, base model, LoRA, precision, and the token loss."""
