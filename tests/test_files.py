"""Files are written whole by one writer, and JSON of unknown origin is read by one reader, all over the package."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "medqa"

# Modules that write in another way than `medqa/files.py`, and why that is right.
WRITERS = {
    "__main__": "a log that the processes of verify-resume write to",
    "cache": "may be lost; each file is moved into place from a new directory",
    "commands/evaluate": "a temporary file that shows whether a run can be written to",
    "commands/export/export": "a new directory that takes its name when all of it is there",
    "errors": "words that are added to the file that the user names",
    "files": "the writer itself, and a lock, which has no content",
    "limited": "pipes to another process",
    "model/base": "a tokenizer's files, in a new directory",
    "model/device": "a file of the kernel's",
    "terminal": "the null device",
    "tiny/build": "the embedded base, which is made once, for the repository",
    "training/before_after": "a directory beside the adapter's, from which each file is copied whole",
    "training/checkpoint": "a new directory that is flushed, and takes its name when all of it is there",
    "training/mirror": "claims a new directory by making the first file in it",
    "training/run_dir": "the lock of a run, which is written in place",
    "training/wandb": "moves W&B's own directories",
}
# Modules that call `json.loads` themselves.
READERS = {
    "commands/compare/read": "lines in which a figure that is not finite does not spoil the others",
    "commands/dashboard": "what a library has just made",
    "commands/export/fidelity": "what llama.cpp in this process answers",
    "commands/export/gguf_vocabulary": "what a library has just made",
    "commands/export/merge": "what a library has just written",
    "files": "the reader itself",
    "limited": "what the package's own process answers",
    "model/base": "what a library has just written, and strings within a file that has been read",
}
WRITING = {
    "os.replace", "os.rename", "os.renames", "os.fsync", "os.fdatasync", "os.link", "os.symlink", "os.truncate",
    "shutil.copyfile", "shutil.copy", "shutil.copy2", "shutil.copytree", "shutil.move",
    "tempfile.NamedTemporaryFile", "tempfile.TemporaryFile", "tempfile.mkstemp",
}  # fmt: skip
WRITING_METHODS = {"write_text", "write_bytes", "rename", "symlink_to", "hardlink_to", "touch"}
FLAGS = ("O_WRONLY", "O_RDWR", "O_CREAT", "flags")


def writes(call: ast.Call) -> bool:
    """Whether a call makes, changes, moves or flushes a file."""
    name = ast.unparse(call.func)
    method = call.func.attr if isinstance(call.func, ast.Attribute) else name
    if name == "os.open":
        return any(flag in ast.unparse(call) for flag in FLAGS)
    if method in ("open", "fdopen"):
        words = [*call.args, *(word.value for word in call.keywords if word.arg == "mode")]
        modes = [word.value for word in words if isinstance(word, ast.Constant) and isinstance(word.value, str)]
        return any(set(mode) <= set("rwaxbt+") and set(mode) & set("wax+") for mode in modes)
    return name in WRITING or method in WRITING_METHODS


def trees() -> dict[str, ast.Module]:
    return {
        path.relative_to(PACKAGE).with_suffix("").as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def test_every_whole_file_is_written_by_one_writer():
    calls = {module: [n for n in ast.walk(tree) if isinstance(n, ast.Call)] for module, tree in trees().items()}
    found = {module for module, those in calls.items() if any(map(writes, those))}
    assert found == WRITERS.keys()


def test_json_of_unknown_origin_is_read_by_one_reader():
    names = {"json.loads", "json.load"}
    found = {
        module
        for module, tree in trees().items()
        if names & {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    }
    assert found == READERS.keys()


def test_what_writes_is_recognized():
    for code in [
        "os.replace(a, b)", "path.open('w')", "open(path, mode='ab')", "io.open(path, 'r+b')", "os.fdopen(x, 'wb')",
        "path.write_text(text)", "os.open(path, os.O_RDWR)", "shutil.copyfile(a, b)", "path.rename(other)",
        "os.fsync(descriptor)",
    ]:  # fmt: skip
        assert writes(ast.parse(code, mode="eval").body), code
    for code in [
        "open(path)",
        "path.open('rb')",
        "os.open(path, os.O_RDONLY)",
        "text.replace('a', 'b')",
        "open('x.py')",
    ]:
        assert not writes(ast.parse(code, mode="eval").body), code
