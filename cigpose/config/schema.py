"""Plain mappings (yaml, json) to typed dataclasses and back, strictly.

An unknown or missing key, or a value of another type, is an error that names its path and the nearest known key.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import re
import sys
import types
import typing
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar

from cigpose.files.addresses import without_credentials
from cigpose.files.errors import shown

T = TypeVar("T")

PRIVATE = {"public": "empty"}
"""Metadata of a field that is nobody else's business: what is published has its place empty."""
ADDRESS = {"public": "without credentials"}
"""Metadata of a field with one or more addresses: what is published has them without credentials."""

HOW: dict[str, tuple[str, ...]] = {"stages": ()}
"""Metadata of a field that changes how, where or how visibly results are made, and no result by more than rounding."""


def affects(*stages: str) -> dict[str, tuple[str, ...]]:
    """Metadata of a field on which the results of these stages of dvc.yaml depend.

    It holds for all of a section, but for those of its fields that have a mark of their own.
    """
    return {"stages": stages}


LARGEST = 2**63 - 1
"""Largest whole number of params.yaml."""


class ConfigError(ValueError):
    """A parameter that cannot be used, with its path in params.yaml."""


def require(condition: bool, message: str) -> None:
    """Raise ValueError with `message` unless `condition` holds; for `__post_init__` of a section."""
    if not condition:
        raise ValueError(message)


_NAMES = {
    "key": (re.compile(r"[A-Za-z0-9_-]+"), "letters, digits, `_` and `-` only"),
    "name": (re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*"), "letters, digits, `_`, `-` and, not first, `.` only"),
    "path": (re.compile(r"[^/\x00-\x1f\x7f][^\x00-\x1f\x7f]*"), "a relative path without `..` and line breaks"),
}


def require_name(text: str, where: str, kind: Literal["key", "name", "path"] = "key") -> None:
    """Refuse text that must not become part of a path or of a command.

    Args:
        text: what the user wrote.
        where: its place in the section, for the message.
        kind: `key` names a table of params.yaml, its stage and folder; `name` one folder; `path` what lies below a
            known folder, a member of an archive perhaps (`a.zip:b/c.json`).

    Raises:
        ValueError: it is none.
    """
    pattern, expected = _NAMES[kind]
    require(
        pattern.fullmatch(text) is not None and ".." not in re.split("[/:]", text),
        f"{where}: {text!r} cannot be used as a {kind}. Expected {expected}.",
    )


def require_between(section: object, least: float, most: float, *names: str, positive: bool = False) -> None:
    """Raise ValueError unless these fields of a section, and all items of those that are tuples, are in a range.

    Args:
        section: the dataclass; a field that is None is not looked at.
        least: first value of the range.
        most: its last value.
        names: the fields.
        positive: leave `least` itself out.
    """
    for name in names:
        value = getattr(section, name)
        for item in value if isinstance(value, tuple) else (value,):
            if item is not None and not (least <= item <= most and not (positive and item == least)):
                expected = f"more than {least} and at most {most}" if positive else f"between {least} and {most}"
                raise ValueError(f"{name} must be {expected}, got {shown(value)}.")


@functools.cache
def _type_hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def from_mapping(cls: type[T], values: Any, path: str = "") -> T:
    """Build dataclass `cls` from plain values.

    Args:
        cls: a keyword-only dataclass; fields may be dataclasses, scalars, `Literal`, `X | None`, tuples and dicts.
        values: what yaml or json gave. Lists become tuples, ints become floats where a float is expected.
        path: where `values` stands in the whole, for messages.

    Raises:
        ConfigError: an unknown or missing key, a wrong type, or a value its dataclass refuses.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path or 'params'}: expected a mapping, got {values!r}.")
    hints = _type_hints(cls)  # type: ignore[arg-type]  # mypy takes the class for its instances
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known keys: {', '.join(fields)}."
            raise ConfigError(f"{_join(path, key)}: unknown key. {hint}")
    arguments = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = _convert(hints[name], values[name], _join(path, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{_join(path, name)}: missing. `cigpose presets NAME` prints a complete example.")
    try:
        return cls(**arguments)
    except ConfigError:
        raise
    except ValueError as err:
        raise ConfigError(f"{path}.{err}" if path else str(err)) from err


def to_mapping(value: Any) -> Any:
    """The plain values of a dataclass: mappings, lists and scalars, ready for yaml and json."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_mapping(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_mapping(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_mapping(item) for item in value]
    return value


def field_marks(cls: type, kind: Literal["public", "stages"], path: str = "") -> dict[str, Any]:
    """Path -> mark of every field of `cls`, and of the dataclasses in it, that has one of this kind.

    Args:
        cls: the dataclass.
        kind: `public` of `PRIVATE` and `ADDRESS`, `stages` of `HOW` and `affects`.
        path: where `cls` stands in the whole. A key of a dict of dataclasses stands as `*`.
    """
    hints = _type_hints(cls)
    marks: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        here = _join(path, field.name)
        if kind in field.metadata:
            marks[here] = field.metadata[kind]
        for hint, place in _nested(hints[field.name], here):
            marks |= field_marks(hint, kind, place)
    return marks


def nearest_mark(path: str, marks: Mapping[str, Any]) -> Any:
    """The mark of the field at `path`, else of the innermost section around it that has one; None where none has.

    Args:
        path: dots between its levels.
        marks: of `field_marks`.
    """
    levels = path.split(".")
    for i in range(len(levels), 0, -1):
        name = ".".join(levels[:i])
        for place, mark in marks.items():
            if fnmatchcase(name, place):
                return mark
    return None


def leaves(values: Any, path: str = "") -> dict[str, Any]:
    """Path -> value of what is no mapping, or an empty one, in plain values."""
    if not isinstance(values, Mapping) or (path and not values):
        return {path: values}
    return {name: leaf for key, item in values.items() for name, leaf in leaves(item, _join(path, key)).items()}


def _nested(hint: Any, path: str) -> list[tuple[type, str]]:
    if dataclasses.is_dataclass(hint):
        return [(typing.cast(type, hint), path)]
    path = f"{path}.*" if typing.get_origin(hint) in (dict, Mapping) else path
    return [found for argument in typing.get_args(hint) for found in _nested(argument, path)]


def public_values(values: Any, marks: Mapping[str, str], path: str = "") -> Any:
    """Plain values as they may be published: private ones emptied, addresses without credentials.

    Args:
        values: a mapping as `to_mapping` gives it, or the part of it at `path`.
        marks: of `field_marks`.
        path: where `values` stands in the whole.
    """
    mark = nearest_mark(path, marks)
    if mark is not None:
        return _published(values, mark)
    if isinstance(values, Mapping):
        return {key: public_values(item, marks, _join(path, key)) for key, item in values.items()}
    return values


def _published(value: Any, mark: str) -> Any:
    if mark == PRIVATE["public"]:
        return {} if isinstance(value, Mapping) else [] if isinstance(value, (list, tuple)) else None
    if isinstance(value, Mapping):
        return {key: _published(item, mark) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_published(item, mark) for item in value]
    return without_credentials(value) if isinstance(value, str) else value


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        return _convert_union(arguments, value, path)
    if origin is typing.Literal:
        if not any(value == option and type(value) is type(option) for option in arguments):
            raise ConfigError(f"{path}: {shown(value)} is not one of {', '.join(map(repr, arguments))}.")
        return value
    if origin is tuple:
        return _convert_tuple(arguments, value, path)
    if origin in (dict, Mapping) or hint is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}: expected a mapping, got {shown(value)}.")
        item = arguments[1] if arguments else Any
        return {str(key): _convert(item, element, _join(path, key)) for key, element in value.items()}
    if dataclasses.is_dataclass(hint):
        return from_mapping(typing.cast(type, hint), value, path)
    return _convert_scalar(hint, value, path)


def _convert_union(options: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and type(None) in options:
        return None
    options = tuple(option for option in options if option is not type(None))
    errors = []
    for option in options:
        try:
            return _convert(option, value, path)
        except ConfigError as err:
            errors.append(err)
    raise errors[-1]


def _convert_tuple(arguments: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{path}: expected a list, got {shown(value)}.")
    if arguments[-1] is Ellipsis:
        hints = [arguments[0]] * len(value)
    elif len(arguments) == len(value):
        hints = list(arguments)
    else:
        raise ConfigError(f"{path}: expected {len(arguments)} values, got {len(value)}: {shown(list(value))}.")
    return tuple(_convert(hint, item, f"{path}[{i}]") for i, (hint, item) in enumerate(zip(hints, value, strict=True)))


def _convert_scalar(hint: Any, value: Any, path: str) -> Any:
    if hint is float and isinstance(value, (str, int)) and not isinstance(value, bool):
        # YAML 1.1 reads 1e-5 as text; every user means the number.
        with contextlib.suppress(ValueError, OverflowError):
            value = float(value)
    most = LARGEST if hint is int else sys.float_info.max
    if hint in (int, float) and isinstance(value, (int, float)) and not abs(value) <= most:  # NaN is not either
        raise ConfigError(f"{path}: expected a finite number of usual size, got {shown(value)}.")
    if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise ConfigError(f"{path}: expected {hint.__name__}, got {shown(value)}.")
