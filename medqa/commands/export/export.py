"""`medqa export`: base and adapter as one model, plain or GGUF, kept only if it agrees with the adapter.

The export is built in a directory beside the target, and renamed when it is complete and has passed.
"""

import contextlib
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from medqa.commands.adapter import Source, find_adapter, unchecked_base
from medqa.commands.export import fidelity
from medqa.commands.export.card import (
    GGUF_NAME,
    MODELFILE,
    Measured,
    card,
    licence,
    modelfile,
    ollama_commands,
    which_measures_better,
)
from medqa.commands.export.fidelity import has_llama_cpp, held_out_prompts, run_llama_cpp
from medqa.commands.export.gguf import check_expressible, context_length, load_gguf, write_gguf
from medqa.commands.export.gguf_vocabulary import bos_text, fit_to_prompts, vocabulary
from medqa.commands.export.merge import DTYPES, Exact, check_chat_template, load_stored, merge, prepare, save_merged
from medqa.data.tokens import prompt_of
from medqa.errors import UserError, refusal
from medqa.files import write_file
from medqa.hub import hub_reachable
from medqa.model.base import save_tokenizer
from medqa.model.settings import usable_gpu
from medqa.places import check_place, require_utf8
from medqa.terminal import printable
from medqa.training.before_after import public_name

OUTTYPES = {"merged": ("f32", "f16", "bf16"), "gguf": ("f16", "q8_0")}
BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}  # per weight; q8_0 has a float16 scale for 32 weights
BESIDE = 1.1  # times the size of the weights, to leave room for the tokenizer and other files
CARD = "README.md"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Wanted:
    """The options of the command; `outtype` None: float32 if the base's file is float32, else float16.

    `weights` is `trained` or `base`, as in `merge.prepare`.
    """

    run: str
    to: Path
    form: str = "merged"
    outtype: str | None = None
    checkpoint: str | None = None
    base: str | None = None
    cpu: bool = False
    push: str | None = None
    weights: str = "trained"


def export(wanted: Wanted, say: Say) -> None:
    """Create the export, print what was measured, and how to use it.

    Raises:
        UserError: an error that the user can fix; nothing is left then.
    """
    _check_words(wanted)
    _check_target(wanted.to)
    if wanted.push is not None:
        _check_push(wanted.push)
    source = find_adapter(wanted.run, wanted.checkpoint, wanted.base)
    exact = prepare(source, torch.device("cuda" if not wanted.cpu and usable_gpu() else "cpu"), wanted.weights)
    outtype = wanted.outtype or _default_outtype(wanted.form, exact.config)
    if wanted.form == "gguf":
        check_expressible(exact.config, source.experiment.model.base)
    if source.run is None:
        say(f"{wanted.run}: not a run's directory, so its base is assumed not to be quantized")
    if (unchecked := unchecked_base(source)) is not None:
        say(unchecked)
    with _beside(wanted.to) as directory:
        _check_space(directory, exact.weights, outtype)
        measured = _build(directory, exact, wanted, outtype, say)
        write_file(directory / CARD, card(source, _name(wanted), wanted.form, outtype, measured))
    say(
        f"{wanted.to}: {wanted.form}, {outtype}, {measured.bytes / 2**20:,.1f} MiB, "
        f"{measured.tokens_per_s:,.1f} tokens/s ({measured.engine})"
    )
    if wanted.push is not None:
        say(push(wanted.to, wanted.push))
    for line in (
        ollama_commands(wanted.to, outtype)
        if wanted.form == "gguf"
        else [f"transformers serve {shlex.quote(str(wanted.to))}  # after pip install 'transformers[serving]'"]
    ):
        say(line)


def push(directory: Path, repo: str) -> str:
    """Upload the directory to the hub, as a private repository; returns a line with its address.

    Raises:
        UserError: the hub refuses or does not answer. The directory is kept.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        url = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=directory, commit_message="Exported with medqa")
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"--push {repo}: upload failed: {reason}; the export is complete in {directory}: run "
            f"`hf auth login` if needed, then `hf upload {repo} {directory}`"
        ) from error
    return f"pushed to {url} (private, unless it existed as a public repository)"


def _build(directory: Path, exact: Exact, wanted: Wanted, outtype: str, say: Say) -> Measured:
    """Write the export into the directory, load it as its users will, and compare it with the adapter.

    Everything that can be checked without weights is checked before weights are loaded.

    Raises:
        UserError: it differs by more than the limits, or the format cannot express it.
    """
    source, tokenizer, config, device = exact.source, exact.tokenizer, exact.config, exact.device
    longest = getattr(config, "max_position_embeddings", None) or source.experiment.tokenization.max_length
    words = None
    if wanted.form == "gguf":  # before the data are read
        longest = context_length(config)
        words = vocabulary(tokenizer, config.vocab_size)
        text = modelfile(prompt_of(tokenizer), bos_text(tokenizer), longest, ": ".join(licence(source)))
        write_file(directory / MODELFILE, text)
    held_out = held_out_prompts(source, tokenizer, longest - fidelity.ANSWER_TOKENS)
    if words is None:
        save_tokenizer(tokenizer, directory)
        check_chat_template(directory, tokenizer, held_out.questions)
    else:
        words = fit_to_prompts(tokenizer, words, held_out.questions)
        if not has_llama_cpp():
            say("llama.cpp: not tested, because xllamacpp is not installed (requirements-llama.txt)")
    adapted = exact.load()
    merged_into = exact.merged_into
    if merged_into.quantized:
        say(f"merged into {merged_into}")
        if (better := which_measures_better(source)) is not None:
            say(better)
    say(f"measuring on {len(held_out.ids)} of {held_out.where_from}")
    reference = fidelity.observe(adapted.model, tokenizer, held_out.ids)
    merged = merge(adapted.model)
    del adapted  # before the export is loaded, so that only one model is in memory
    if words is None:
        save_merged(merged, tokenizer, DTYPES[outtype], directory)
        del merged
        stored, files = load_stored(directory, device), sorted(directory.glob("*.safetensors"))
    else:
        files = [directory / GGUF_NAME]
        write_gguf(files[0], merged, tokenizer, words, outtype, _about(source, wanted))
        del merged
        stored = load_gguf(files[0], config, device)
    found = fidelity.compare(stored, tokenizer, reference)
    say(f"{outtype}: {found}")
    found.check(outtype)
    engine = f"transformers on {torch.cuda.get_device_name() if device.type == 'cuda' else 'the CPU'}"
    speed = fidelity.tokens_per_second(stored, tokenizer, held_out.ids[0])
    del stored
    if words is not None and has_llama_cpp():
        ran = run_llama_cpp(files[0], held_out, tokenizer)
        in_llama_cpp = fidelity.Fidelity(found.kl, found.positions, *fidelity.parting(reference, ran.answers))
        say(f"llama.cpp: the same tokens of each prompt; {in_llama_cpp.answers_text()}")
        in_llama_cpp.check(outtype)
        engine, speed = "llama.cpp on the CPU", ran.tokens_per_s
    size = sum(file.stat().st_size for file in files)
    return Measured(found, held_out.where_from, size, speed, engine, merged_into, prompt_of(tokenizer))


def _about(source: Source, wanted: Wanted) -> dict[str, str]:
    """The description in a GGUF file."""
    base = public_name(source.experiment.model.base) or "a model"
    return {
        "name": printable(_name(wanted)),
        "license": licence(source)[0],
        "description": f"{base}, fine-tuned on medical questions",
    }


def _name(wanted: Wanted) -> str:
    """The name of the export: that of its directory."""
    return wanted.to.absolute().name


def _default_outtype(form: str, config: Any) -> str:
    """16 bits, which every server supports; float32 if the base's own file has it."""
    return "f32" if form == "merged" and getattr(config, "dtype", None) == torch.float32 else "f16"


def _check_words(wanted: Wanted) -> None:
    """Refuse a type that the format does not have.

    Raises:
        UserError: the format has other types.
    """
    known = OUTTYPES[wanted.form]
    if wanted.outtype is not None and wanted.outtype not in known:
        raise UserError(f"--outtype {wanted.outtype}: --format {wanted.form} has {', '.join(known)}")


def _check_target(to: Path) -> None:
    """Refuse a target that is in use.

    Raises:
        UserError: it exists and is not an empty directory, or cannot be created.
    """
    if os.path.lexists(to) and not (os.path.isdir(to) and not os.path.islink(to)):
        raise UserError(f"--to {to}: exists and is not a directory; give another one")
    require_utf8(to, "--to")
    check_place(to, "--to")
    if os.path.ismount(to) or os.path.realpath(to) == os.path.realpath("."):
        raise UserError(f"--to {to}: cannot be replaced by the finished export; give a directory inside it")
    if os.path.isdir(to) and any(os.scandir(to)):
        raise UserError(f"--to {to}: is not empty; give a directory that does not exist yet, or remove its content")


def _check_push(repo: str) -> None:
    """Check before the work whether the upload will be possible.

    Raises:
        UserError: an invalid name of a repository, no login, or the hub does not answer.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push {repo}: invalid name of a repository: {error}; give NAME or OWNER/NAME") from error
    if get_token() is None:
        raise UserError(f"--push {repo}: not logged in to the hub; run `hf auth login`, or leave --push out")
    if not hub_reachable():
        raise UserError(f"--push {repo}: the hub does not answer; leave --push out, and run `hf upload` later")


def _check_space(directory: Path, weights: int, outtype: str) -> None:
    """Check before writing whether there is enough free space.

    Raises:
        UserError: there is not.
    """
    needed, free = int(BESIDE * weights * BYTES[outtype]), shutil.disk_usage(directory).free
    if free < needed:
        raise UserError(
            f"{directory.parent}: {needed / 2**20:,.0f} MiB are needed, {free / 2**20:,.0f} are free; free space, or "
            "give another --to"
        )


@contextlib.contextmanager
def _beside(to: Path) -> Iterator[Path]:
    """A new directory beside `to`, which is renamed to it at the end; on an error, all created directories are removed.

    Raises:
        UserError: there is no space, or no permission.
    """
    made, directory, kept = [], None, False
    try:
        for parent in reversed(to.absolute().parents):
            if not parent.exists():
                parent.mkdir()
                made.append(parent)
        directory = Path(tempfile.mkdtemp(prefix=f".{to.name}-", dir=to.absolute().parent))
        directory.chmod(0o755)  # a temporary directory is private to its owner
        yield directory
        for path in directory.iterdir():
            path.chmod(0o644)  # also the files of safetensors
        os.rename(directory, to)
        kept = True
    except OSError as error:
        if (why := refusal(error, to.parent)) is None:
            raise
        raise UserError(f"--to {to}: cannot be written: {why}, or give another --to") from error
    finally:
        if directory is not None and not kept:
            shutil.rmtree(directory, ignore_errors=True)
        for parent in [] if kept else reversed(made):
            with contextlib.suppress(OSError):
                parent.rmdir()
