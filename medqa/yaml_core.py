"""YAML by its 1.2 core schema: `5e-5` is a number, `no` is the word, only true and false are booleans.

Reading is ruamel.yaml's safe loader (nothing in a file can run; a repeated key is an error) with the resolvers of the
core schema alone: ruamel's own still reads dates and `1_000`. Source: https://yaml.org/spec/1.2.2/#103-core-schema
"""

import re
from pathlib import Path
from typing import Any

import yaml as pyyaml
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.resolver import VersionedResolver

from medqa.errors import UserError
from medqa.files import write_file

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


def load_yaml(text: str, where: str) -> Any:
    """The value that a YAML text stands for.

    Raises:
        UserError: not valid YAML; names `where` and the line.
    """
    loader = YAML(typ="safe", pure=True)
    loader.Resolver = CoreResolver
    try:
        return loader.load(text)
    # The last three: a tag such as `!!bool` on something else, which ruamel does not check.
    except (YAMLError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"{where}{line}: not valid YAML: {problem}") from error


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
