"""Which experiment a retraining is asked for: a preset or params.yaml, and values in place of some of it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cigpose.config import Config, config_from_mapping, load_params, load_preset, public_params
from cigpose.config.schema import ConfigError

Changes = dict[str, tuple[Any, Any]]
"""Key -> value before, value now; as they may be shown."""


def asked_config(path: Path, preset: str | None, overrides: Mapping[str, Any]) -> tuple[Config, Changes]:
    """The experiment asked for; nothing is written.

    Args:
        path: params.yaml.
        preset: a preset to take in its place.
        overrides: `train.epochs` -> value, of keys that it has; a table (`data.locations`) is given whole.

    Returns: the experiment, and what the overrides changed in it.

    Raises:
        ConfigError: a preset or key that does not exist, or a value that does not fit.
    """
    before = (load_preset(preset) if preset else load_params(path)).to_mapping()
    values = json.loads(json.dumps(before))
    for key, value in overrides.items():
        *sections, name = key.split(".")
        section = values
        for part in sections:
            section = section.get(part) if isinstance(section, dict) else None
        if not isinstance(section, dict) or name not in section:
            raise ConfigError(f"overrides: {key}: unknown key. {_advice(key, values)}")
        section[name] = value
    config = config_from_mapping(values)
    after = config.to_mapping()
    changes = {key: (_look_up(before, key), _look_up(after, key)) for key in overrides}
    return config, {
        key: (public_params(old, key), public_params(new, key)) for key, (old, new) in changes.items() if old != new
    }


def _advice(key: str, values: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(key, _keys(values), n=1, cutoff=0.75)
    return f"Did you mean {near[0]!r}?" if near else "Add it to params.yaml by hand, or give the whole table."


def _keys(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name, value in values.items():
        found.append(f"{prefix}{name}")
        if isinstance(value, Mapping):
            found += _keys(value, f"{prefix}{name}.")
    return found


def _look_up(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values
