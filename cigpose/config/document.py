"""The YAML of params.yaml, read strictly: what a person may have meant otherwise is refused with its lines."""

from __future__ import annotations

from typing import Any

import yaml

from cigpose.config.schema import ConfigError

MOST_VALUES = 100_000
"""Values of a document with its aliases written out; a params.yaml has a few hundred."""


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # libyaml's is ten times as fast
    """Plain YAML in which every key stands once, and aliases stay within reason."""

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None and _num_values(node, {}) > MOST_VALUES:
            raise ConfigError(f"it stands for more than {MOST_VALUES} values by its aliases (*name). Write them out.")
        return node


def _num_values(node: yaml.Node, known: dict[int, int]) -> int:
    """Values under a node, each alias counted as what it stands for."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = MOST_VALUES  # what a node that contains itself is found to have
        if isinstance(node, yaml.MappingNode):
            _refuse_repeated_keys(node)
        items = node.value if isinstance(node, yaml.SequenceNode) else [item for pair in node.value for item in pair]
        known[id(node)] = 1 + sum(_num_values(item, known) for item in items)
    return known[id(node)]


def _refuse_repeated_keys(node: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            line = key.start_mark.line + 1
            if key.value in lines:
                raise ConfigError(
                    f"{key.value!r} stands on line {lines[key.value]} and again on line {line}. Remove one of them."
                )
            lines[key.value] = line


def read_yaml(text: str) -> Any:
    """The plain values of a YAML document.

    Raises:
        ConfigError: it is not YAML, a key stands twice, aliases stand for too many values, or they are nested too deep.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError as err:
        raise ConfigError("its values are nested hundreds of levels deep, expected a handful.") from err
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError) as err:  # ValueError: a date or a number that is none
        raise ConfigError(f"not valid yaml: {err}") from err
