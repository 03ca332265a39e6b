"""Changes of nested tables."""

from __future__ import annotations

from typing import Any


def change(values: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Set keys of nested `values` in place, dots of their paths written as double underscores (`train__epochs=3`)."""
    for path, value in changes.items():
        *parents, last = path.split("__")
        section = values
        for key in parents:
            section = section[key]
        section[last] = value
    return values
