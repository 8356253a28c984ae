"""Parts that the tests and the benchmarks share: a run in pieces, HF Trainer, processes, faults."""
