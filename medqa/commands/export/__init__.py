"""`medqa export`: merge the adapter into its base, write a model or a GGUF file, and compare it with the adapter."""
