"""One table of limits for whatever is read from files that other people may have written.

A file within these limits is read; a file beyond them is refused with a message, never read in part. Every reader in
the package takes its limits from here, so that this table is the complete answer to "how large may it be?".
"""

# Bytes of a JSON file that a run or a checkpoint holds (manifest.json, summary.json, evaluation.json, ...).
MAX_JSON_BYTES = 16_000_000
# Nested lists and objects in a JSON document.
MAX_JSON_DEPTH = 64
# Integers in JSON stay within what a 64-bit signed integer holds, so that they always convert to float.
MAX_INTEGER = 2**63 - 1
# Figures in an evaluation.json. One of two splits and 500 sources has about 14,000.
MAX_FIGURES = 20_000
# Bytes of a metrics.jsonl. A run of a million updates that writes down each one has about 400 MB.
MAX_METRICS_BYTES = 500_000_000
