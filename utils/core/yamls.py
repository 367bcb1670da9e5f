"""Strict YAML: plain values only, duplicate keys refused, errors in one line with file and line number."""

from pathlib import Path
from typing import Any

import yaml

from utils.core.errors import UserError
from utils.core.files import atomic_write


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice in one mapping."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    loader.flatten_mapping(node)
    seen: dict = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, (dict, list)):
            raise UserError(f"line {key_node.start_mark.line + 1}: a mapping key must be a plain value")
        if key in seen:
            raise UserError(f"line {key_node.start_mark.line + 1}: key '{key}' is given twice")
        seen[key] = loader.construct_object(value_node, deep=True)
    return seen


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse_yaml(text: str, source: str | Path = "YAML") -> dict[str, Any]:
    """Parse YAML text whose top level is a mapping."""
    try:
        data = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise UserError(f"{source}: expected `key: value` lines at the top level, found a {type(data).__name__}")
    return data


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"YAML file '{path}' not found (working directory: {Path.cwd()})") from None
    except (IsADirectoryError, PermissionError, UnicodeDecodeError) as error:
        raise UserError(f"YAML file '{path}' cannot be read: {error}") from error
    return parse_yaml(text, path)


def dump_yaml(path: str | Path, data: dict[str, Any]) -> None:
    """Write plain values as YAML, atomically, keys in the order given."""
    with atomic_write(path, "w") as file:
        yaml.safe_dump(data, file, sort_keys=False, allow_unicode=True, width=120)
