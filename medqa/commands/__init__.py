"""The commands of `medqa`: what is done before a run (plan) and after it (evaluate, ask, compare, export)."""
