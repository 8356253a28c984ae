"""`medqa export`: the adapter is merged into its base, written as a model or a GGUF file, and measured."""
