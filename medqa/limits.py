"""The limits for all files that other people may have written, in one table.

A file within these limits is read; a file beyond them is refused with a message, and never read in part. Every reader
takes its limits from here.
"""

# Bytes of a JSON file that a run or a checkpoint holds (manifest.json, summary.json, evaluation.json, ...).
MAX_JSON_BYTES = 16_000_000
# Bytes of a file of questions and answers, and of the text that a compressed one holds.
MAX_DATA_BYTES = 2**31
# Records of a source: a million of them take about a gigabyte of memory.
MAX_RECORDS = 2_000_000
# Nested lists and objects in a JSON document.
MAX_JSON_DEPTH = 64
# Integers in JSON stay within what a 64-bit signed integer holds, so that they always convert to float.
MAX_INTEGER = 2**63 - 1
# Values with intervals in an evaluation.json. One of two splits and 500 sources has about 14,000.
MAX_FIGURES = 20_000
# Bytes of a metrics.jsonl. A run that logs each of a million updates has about 400 MB.
MAX_METRICS_BYTES = 500_000_000

# Bytes of a YAML text, both as written and after each alias is replaced by what it repeats. Reading one value takes as
# long as reading so many bytes, so each value counts as that many more.
MAX_YAML_BYTES = 2_000_000
YAML_BYTES_OF_A_VALUE = 100
MAX_YAML_DEPTH = 32
# Characters of one number in a YAML text. The limits of the keys are far narrower; their messages name the key.
MAX_NUMBER_LENGTH = 1_000
# Characters of a value in a message.
MAX_SHOWN = 300
# Problems of one experiment file that a message lists.
MAX_PROBLEMS = 40
# Bytes of the name of a directory that is named after an experiment. File systems allow 255; overrides are appended.
MAX_NAME_BYTES = 160

# Values of an experiment. Each limit is far above any real use, and below what a machine cannot count or allocate.
MAX_COUNT = 10**9  # updates, examples, rows, checkpoints, tokens, seconds, minutes
MAX_RANK = 65_536
MAX_EPOCHS = 1e6
MAX_SOURCES = 2_000
MAX_SOURCES_BYTES = 1_200_000  # of all their locations together, so that a run's config.yaml can be read again
MAX_NAMES = 10_000  # target modules, tags
MAX_TEXT = 4_096  # characters of a path, a hub id or a name
# Bytes of one file of a checkpoint. The largest adapters are smaller; a sparse file can claim any size.
MAX_CHECKPOINT_FILE_BYTES = 64 * 2**30

# A base model's own files are tried out in a forked process (`medqa/limited.py`) with these limits before they are
# used: its layers are built on the meta device, its tokenizer gets a test text, and its chat template is rendered.
WORK_SECONDS = 20  # CPU time
WORK_BYTES = 2 << 30  # memory beyond what the process has already
WORK_WAIT_SECONDS = 200  # wall-clock time, for a machine that is busy

# A base model's tokenizer.json, or another file of its vocabulary. The largest in use have about 35 MB.
MAX_TOKENIZER_BYTES = 100_000_000
# Layers of a base model, of any kind. The largest models have fewer than 200.
MAX_LAYERS = 1_000
# Tokens that a tokenizer may produce for each byte of a text. Byte-level tokenizers make one; some add a prefix to
# words.
MAX_TOKENS_PER_BYTE = 4
# Characters that a base model's own chat template may put around a question.
MAX_TEMPLATE_CHARACTERS = 20_000
# Bytes of the cached losses or answers of one evaluation.
MAX_BASELINE_BYTES = 500_000_000
# Bytes of a netrc file, which may contain W&B's API key.
MAX_NETRC_BYTES = 1_000_000
