"""params.yaml as people read it: every number of an experiment, each with what it means."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
import typing
from pathlib import Path
from typing import Any

import yaml

from cigpose.config import Config, load_preset, presets
from cigpose.config.schema import to_mapping
from cigpose.files.atomic import claimed, write_bytes, write_text

WIDTH = 120
COMMENT_COLUMN = 52


def params_text(config: Config) -> str:
    """The complete params.yaml of an experiment, defaults written out, meanings as comments."""
    header = (
        f"# {config.name}: every number of this experiment, written by `cigpose use`.\n"
        "# Edit it, or override one run with `dvc exp run -S train.epochs=10`.\n"
    )
    return header + "\n".join(_section(config, 0)) + "\n"


def write_params(config: Config, path: Path) -> None:
    """Write params.yaml whole or not at all."""
    write_text(path, params_text(config))


def is_preset(path: Path) -> bool:
    """Whether a params.yaml is as `cigpose use` writes it: nothing in it is the user's."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return any(text == params_text(load_preset(name)) for name in presets())


def replace_params(config: Config, path: Path) -> Path | None:
    """Write params.yaml in place of what is there; returns the copy that was kept if that was the user's."""
    kept = None
    with claimed(path.with_name(f".{path.name}.lock"), f"replacing {path}", wait=True):  # or two keep one copy
        if path.exists() and not is_preset(path):
            names = (path.with_name(f"{path.stem}-before-{number}.yaml") for number in itertools.count(1))
            kept = next(name for name in names if not name.exists())
            write_bytes(kept, path.read_bytes())
        write_params(config, path)
    return kept


def _section(section: Any, depth: int) -> list[str]:
    indent = "  " * depth
    meanings = field_meanings(type(section))
    lines = []
    for field in dataclasses.fields(section):
        value, meaning = getattr(section, field.name), meanings.get(field.name, "")
        lines += _entry(f"{indent}{field.name}:", value, meaning, depth)
    return lines


def _entry(key: str, value: Any, meaning: str, depth: int) -> list[str]:
    indent = "  " * depth
    if dataclasses.is_dataclass(value):
        if depth > 0 and len(line := f"{key} {_flow(to_mapping(value))}") <= WIDTH and not field_meanings(type(value)):
            return [line]
        return [*([""] if depth == 0 else _comment(key, meaning, indent)[:-1]), key, *_section(value, depth + 1)]
    if isinstance(value, dict) and value and all(dataclasses.is_dataclass(item) for item in value.values()):
        lines = _comment(key, meaning, indent)
        for name, item in value.items():
            lines.append(f"{indent}  {name}:")
            for field_name, field_value in to_mapping(item).items():
                lines += _wrapped(f"{indent}    {field_name}:", field_value)
        return lines
    if isinstance(value, dict) and value:
        lines = _comment(key, meaning, indent)
        for name, item in to_mapping(value).items():
            lines += _wrapped(f"{indent}  {name}:", item)
        return lines
    *head, last = _wrapped(key, to_mapping(value))
    return [*head, last] if head else _comment(last, meaning, indent)


def _comment(line: str, meaning: str, indent: str) -> list[str]:
    """The line with its meaning behind it, or above it where there is no room."""
    if not meaning:
        return [line]
    padded = line.ljust(COMMENT_COLUMN)
    if len(padded) + len(meaning) + 4 <= WIDTH:
        return [f"{padded}  # {meaning}"]
    return [*textwrap.wrap(meaning, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "), line]


def _wrapped(key: str, value: Any) -> list[str]:
    """`key: value`, broken between the value's items where it is longer than the page."""
    if len(line := f"{key} {_flow(value)}") <= WIDTH or not isinstance(value, list):
        return [line]
    indent = " " * (len(key) - len(key.lstrip()) + 2)
    return [key, *(f"{indent}- {_flow(item)}" for item in value)]


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def field_meanings(cls: type) -> dict[str, str]:
    """First line of the text under each field of a configuration dataclass."""
    if cls not in _MEANINGS:
        _MEANINGS[cls] = _read_meanings(cls)
    return _MEANINGS[cls]


_MEANINGS: dict[type, dict[str, str]] = {}


def _read_meanings(cls: type) -> dict[str, str]:
    body = typing.cast(ast.ClassDef, ast.parse(inspect.getsource(cls)).body[0]).body
    meanings = {
        name: text for base in cls.__bases__ if base is not object for name, text in field_meanings(base).items()
    }
    for statement, following in itertools.pairwise(body):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            meanings[statement.target.id] = inspect.cleandoc(str(following.value.value)).split("\n")[0]
    return meanings
