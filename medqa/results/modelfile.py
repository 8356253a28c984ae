"""Ollama's Modelfile, and the commands that make a model of it."""

import re
import shlex
from pathlib import Path

from medqa.errors import UserError
from medqa.prompts import prompt

GGUF_NAME = "model.gguf"
MODELFILE = "Modelfile"
NOT_QUOTED = ('"', "\\", "{{", "}}")
MOST_TOKENS = 512  # of an answer: Ollama's own default is no limit at all


def modelfile(eos: str, context: int, licence: str) -> str:
    """The training prompt in Go's template language, without BOS (llama.cpp puts it in front), greedy as evaluated.

    Each `{{ .Response }}` is followed by EOS where the conversation goes on; of the last one Ollama leaves out what
    follows. A system message has no place in the training prompt and none here.

    Raises:
        UserError: an EOS that the format cannot quote, or that the template language would take for its own.
    """
    if not eos.isprintable() or any(mark in eos for mark in NOT_QUOTED):
        raise UserError(f"EOS {eos!r}: a Modelfile cannot quote it; use --format merged")
    question, response = prompt("\0").split("\0")
    template = f"{question}{{{{ .Prompt }}}}{response}{{{{ .Response }}}}{eos}"
    return f'''FROM ./{GGUF_NAME}
TEMPLATE """{template}"""
PARAMETER stop "{eos}"
PARAMETER num_ctx {context}
PARAMETER num_predict {min(MOST_TOKENS, context // 2)}
PARAMETER temperature 0
PARAMETER repeat_penalty 1
LICENSE """{licence}"""
'''


def ollama_commands(directory: Path, outtype: str) -> list[str]:
    """What to type. Ollama quantizes 16-bit files only."""
    name = re.sub(r"[^a-z0-9_-]+", "-", directory.absolute().name.lower()).strip("-_") or "medqa"
    file = shlex.quote(str(directory / MODELFILE))
    create = [f"ollama create {name} -f {file}"]
    if outtype == "f16":
        create.append(f"ollama create {name}-q4_k_m --quantize q4_K_M -f {file}  # smaller; not measured")
    return [*create, f"ollama run {name}"]
