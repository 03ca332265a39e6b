"""Records that outlive a kill: a JSON line each, on the disk before `append` returns."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import orjson

from cigpose.files.atomic import sync


class Journal:
    """The records of a file, by one of their entries; of records with the same one the last counts.

    One process at a time writes. A line that a kill cut short is taken off.

    Args:
        path: the file; it need not be there.
        key: the entry that tells records apart.

    Raises:
        ValueError: it holds a line that is no such record.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self._key = path, key
        self._extents: dict[Any, tuple[int, int]] = {}
        self._end = 0
        if path.exists():
            self._read()

    def _read(self) -> None:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    self._note(orjson.loads(line)[self._key], len(line))
                except (ValueError, KeyError, TypeError) as err:
                    raise ValueError(
                        f"{self.path}: line {number} is no record of `cigpose predict`. Remove the folder or give "
                        "another --out."
                    ) from err
        os.truncate(self.path, self._end)

    def _note(self, key: Any, length: int) -> None:
        self._extents[key] = self._end, length
        self._end += length

    def __contains__(self, key: object) -> bool:
        return key in self._extents

    def __len__(self) -> int:
        return len(self._extents)

    def __getitem__(self, key: Any) -> dict[str, Any]:
        start, length = self._extents[key]
        with self.path.open("rb") as file:
            file.seek(start)
            return orjson.loads(file.read(length))

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add records; they are on the disk when this returns."""
        lines = [(record[self._key], _line(record)) for record in records]
        if not lines:
            return
        is_new = not self.path.exists()
        with self.path.open("ab") as file:
            file.write(b"".join(line for _, line in lines))
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            sync(self.path.parent)
        for key, line in lines:
            self._note(key, len(line))


def _line(record: Mapping[str, Any]) -> bytes:
    return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)  # numbers are finite: the predictor saw to it
