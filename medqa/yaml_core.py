"""YAML by its 1.2 core schema: `5e-5` is a number, `no` is the word, only true and false are booleans.

Reading is ruamel.yaml's safe loader (nothing in a file can run; a repeated key is an error) with the resolvers of the
core schema alone: ruamel's own still reads dates and `1_000`. Source: https://yaml.org/spec/1.2.2/#103-core-schema
"""

import re
import reprlib
from pathlib import Path
from typing import Any

import yaml as pyyaml
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    CollectionStartEvent,
    Event,
    NodeEvent,
    ScalarEvent,
)
from ruamel.yaml.resolver import VersionedResolver

from medqa.errors import UserError
from medqa.files import Damaged, read_file, write_file
from medqa.limits import MAX_NUMBER_LENGTH, MAX_SHOWN, MAX_YAML_BYTES, MAX_YAML_DEPTH, YAML_BYTES_OF_A_VALUE

CORE_SCHEMA = (
    ("null", r"|~|null|Null|NULL", ["", "~", "n", "N"]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)


class CoreResolver(VersionedResolver):
    """Resolves plain scalars as the core schema says, and nothing else."""

    @property
    def versioned_resolver(self) -> dict[str, list[tuple[str, re.Pattern[str]]]]:
        """The candidates for a scalar by its first character."""
        return RESOLVERS


RESOLVERS: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
for name, pattern, first_characters in CORE_SCHEMA:
    for character in first_characters:
        RESOLVERS.setdefault(character, []).append((f"tag:yaml.org,2002:{name}", re.compile(f"^(?:{pattern})$")))


CORE_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}
NUMBER = re.compile("|".join(f"(?:{pattern})" for name, pattern, _ in CORE_SCHEMA if name in ("int", "float")))


def load_yaml(text: str, where: str) -> Any:
    """The value that a YAML text stands for, within the limits of `medqa/limits.py`.

    Raises:
        UserError: the text is not valid YAML or is beyond the limits; names `where` and the line.
    """
    try:
        _check_size(text)
        return _loader().load(text)
    # The last three: a tag such as `!!bool` on something else, which ruamel does not check.
    except (YAMLError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"{where}{line}: not valid YAML: {cut(problem)}") from error


def read_yaml(path: Path) -> Any:
    """The value of a YAML file that anyone may have written.

    Raises:
        UserError: the file cannot be read, is not a regular file, or is not YAML as `load_yaml` wants it.
    """
    try:
        text = read_file(path, MAX_YAML_BYTES).decode("utf-8-sig")
    except Damaged as error:
        raise UserError(f"{error} (cannot be read)") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read: not UTF-8 text (byte {error.start:,}); save it as UTF-8") from error
    return load_yaml(text, str(path))


def short(value: Any) -> str:
    """The `repr` of a value for a message, cut where it is long."""
    return cut(_SHORT.repr(value))


def cut(text: str) -> str:
    """A text for a message, cut where it is long."""
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict = 3, 12, 12
_SHORT.maxstring = _SHORT.maxother = MAX_SHOWN


def _loader() -> YAML:
    """The safe loader with the resolvers of the core schema; each is good for one text."""
    loader = YAML(typ="safe", pure=True)
    loader.Resolver = CoreResolver
    return loader


def _check_size(text: str) -> None:
    """See, before any value is made, that a text stays within the limits and has no tags but those of the core schema.

    An alias counts as much as what it repeats: a few lines of aliases can stand for more than any memory holds.

    Raises:
        ValueError: the text is too long.
        MarkedYAMLError: it stands for too much, is nested too deeply, repeats itself, or has another tag.
    """
    if len(text) > MAX_YAML_BYTES:
        raise ValueError(f"longer than {MAX_YAML_BYTES:,} bytes")
    of_anchor: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []  # anchor, and size of all before
    size = 0
    for event in _loader().parse(text):
        before, anchor = size, None
        if isinstance(event, NodeEvent) and len(open_nodes) >= MAX_YAML_DEPTH:
            raise _refused(event, "nested too deeply")
        if isinstance(event, ScalarEvent | CollectionStartEvent) and event.tag and event.tag not in CORE_TAGS:
            raise _refused(event, f"the tag {event.tag} is not one of YAML's core schema")
        if isinstance(event, ScalarEvent):
            may_be_number = event.implicit[0] or event.tag
            if may_be_number and len(event.value) > MAX_NUMBER_LENGTH and NUMBER.fullmatch(event.value):
                raise _refused(event, f"the number {event.value[:20]}... has {len(event.value):,} characters")
            size, anchor = size + YAML_BYTES_OF_A_VALUE + len(event.value), event.anchor
        elif isinstance(event, CollectionStartEvent):
            open_nodes.append((event.anchor, size))
            size += YAML_BYTES_OF_A_VALUE
        elif isinstance(event, CollectionEndEvent):
            anchor, before = open_nodes.pop()
        elif isinstance(event, AliasEvent):
            if event.anchor in (name for name, _ in open_nodes):
                raise _refused(event, f"the alias *{event.anchor} stands within what it repeats")
            size += of_anchor.get(event.anchor, 0)  # the loader refuses one that is not there
        if anchor is not None:
            of_anchor[anchor] = size - before
        if size > MAX_YAML_BYTES:
            raise _refused(event, f"stands for more than {MAX_YAML_BYTES:,} bytes")


def _refused(event: Event, problem: str) -> MarkedYAMLError:
    """The error that the loader would raise at this place."""
    return MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


class Dumper(pyyaml.SafeDumper):
    """Writes what YAML 1.1 and 1.2 readers see alike: PyYAML itself quotes 'no' and writes 5.0e-05."""


def _text(dumper: Dumper, text: str) -> pyyaml.ScalarNode:
    """Quoted if the core schema takes it for something else; PyYAML, of YAML 1.1, would write the word 5e-5 plainly."""
    plain = any(re.fullmatch(pattern, text) for _, pattern, _ in CORE_SCHEMA)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if plain else None)


Dumper.add_representer(str, _text)


def yaml_text(value: Any) -> str:
    """A value as a YAML text in which YAML 1.1 and 1.2 readers see the same."""
    return pyyaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def dump_yaml(value: Any, path: Path) -> None:
    """Write a value as a YAML file (`yaml_text`), durably and whole.

    Raises:
        OSError: the file cannot be written.
    """
    write_file(path, yaml_text(value))
