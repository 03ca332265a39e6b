"""Elements of the arrays of a very large JSON file, one by one, in bounded memory.

The 3 GB COCO-WholeBody file is one object with a few arrays of many small objects. NumPy finds where each of these
begins and ends; orjson parses it. That is about three times as fast as an event parser (ijson with its C backend),
keeps the original bytes at hand, and lets one damaged element be named (NaN is not JSON) instead of ending the file.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import orjson

from cigpose.files.errors import DataError

_CHUNK = 4 << 20
_LARGEST_ELEMENT = 256 << 20
_QUOTE = 2
_KIND = np.zeros(256, np.int8)
_KIND[[ord("{"), ord("[")]] = 1
_KIND[[ord("}"), ord("]")]] = -1
_KIND[ord('"')] = _QUOTE
_IS_MARK = (_KIND != 0).astype(np.uint8).tobytes()
LIST = ""
"""The key under which `split_arrays` yields the elements of a file that is a list."""


def parse_element(raw: bytes, where: str) -> dict[str, Any]:
    """One object as plain values; NaN and Infinity, which are not JSON, are let through for the caller to judge.

    Raises:
        DataError: not JSON, or something else than an object.
    """
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        try:
            value = json.loads(raw)
        except RecursionError as err:
            raise DataError(f"{where}: brackets nested too deep to be read. Mend the file.") from err
        except ValueError as err:
            raise DataError(f"{where}: {bytes(raw[:60])!r} is not JSON ({err}). Download the file again.") from err
    if not isinstance(value, dict):
        raise DataError(f"{where}: {bytes(raw[:60])!r}, expected an object. Mend the file.")
    return value


def split_arrays(stream: Any, where: str, wanted: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """Elements of the top-level arrays named `wanted`, in file order, as (key, bytes of one object).

    Args:
        stream: binary, read once from where it stands.
        where: the file's name, for messages.
        wanted: keys of the top-level object; `LIST` if the file itself is a list.

    Raises:
        DataError: the file is no JSON, is cut, or such an array holds something else than objects.
    """
    scanner = _Scanner(where, wanted)
    first = True
    while chunk := stream.read(_CHUNK):
        while chunk.endswith(b"\\") and (more := stream.read(1)):
            chunk += more  # never between a backslash and what it escapes
        if first:
            chunk = chunk.removeprefix(b"\xef\xbb\xbf")
            _check_opening(chunk, where)
            first = False
        yield from scanner.feed(chunk)
    scanner.finish()


def _check_opening(chunk: bytes, where: str) -> None:
    head = chunk.lstrip()[:1]
    if head == b"<":
        raise DataError(
            f"{where}: this is a web page, not JSON (a download that ended on a notice?). Download it again."
        )
    if head not in (b"{", b"["):
        raise DataError(f"{where}: starts with {chunk[:12]!r}, expected JSON. Download it again.")


class _Scanner:
    """Where brackets and strings stand at the end of each chunk, and what of the text is still needed."""

    def __init__(self, where: str, wanted: Collection[str]) -> None:
        self.where = where
        self.wanted = frozenset(wanted)
        self.text = b""
        self.depth = 0
        self.in_string = False
        self.array_depth = 0  # 1: the file is a list, 2: an object of lists
        self.key: str | None = None
        self.start = -1
        self.last = 0  # end of the last bracket looked at
        self.count = 0
        self.done = False

    def feed(self, chunk: bytes) -> Iterator[tuple[str, bytes]]:
        base = len(self.text)
        self.text += chunk
        positions, steps, depths = self._marks(chunk)
        if not self.array_depth:
            self.array_depth = 1 if self.text.lstrip().startswith(b"[") else 2
        level = self.array_depth
        near = np.flatnonzero(((steps > 0) & (depths <= level + 1)) | ((steps < 0) & (depths <= level)))
        for position, step, depth in zip(
            (positions[near] + base).tolist(), steps[near].tolist(), depths[near].tolist(), strict=True
        ):
            if self.done:
                raise DataError(f"{self.where}: goes on after the end of its JSON. Download it again.")
            if step > 0 and depth == level:
                self._open_array(position)
            elif step > 0 and depth == level + 1:
                self._between(position, b"," if self.count else b"")
                self.start = position
            elif step < 0 and depth == level:
                if self.key is not None:
                    yield self.key, self.text[self.start : position + 1]
                    self.count += 1
                self.start = -1
            elif step < 0 and depth == level - 1:
                self._between(position, b"")
                self.key = None
            self.done = depth <= 0
            self.last = position + 1
        keep = self.start if self.start >= 0 else self.last
        self.text = self.text[keep:]
        if len(self.text) > _LARGEST_ELEMENT:
            raise DataError(
                f"{self.where}: {len(self.text)} bytes without the end of an element after element {self.count}; no "
                "annotation is so long. Mend the file."
            )
        self.last -= keep
        self.start = 0 if self.start >= 0 else -1

    def finish(self) -> None:
        if not self.done or self.in_string:
            at = f" in {self.key!r} after {self.count} elements" if self.key else ""
            raise DataError(f"{self.where}: the JSON is cut: it ends{at} before its last bracket. Download it again.")
        if self.text.strip():
            raise DataError(f"{self.where}: goes on after the end of its JSON. Download it again.")

    def _marks(self, chunk: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions of quotes and brackets in the chunk, the depth step of each (0 in strings) and the depth after."""
        if b"\\" in chunk:
            chunk = chunk.replace(b"\\\\", b"__").replace(b'\\"', b"__")
        codes = np.frombuffer(chunk, np.uint8)
        positions = np.flatnonzero(np.frombuffer(chunk.translate(_IS_MARK), np.bool_))
        kinds = _KIND[codes[positions]]
        quotes = kinds == _QUOTE
        inside = (np.cumsum(quotes) + self.in_string) % 2 == 1
        steps = np.where(quotes | inside, 0, kinds).astype(np.int64)
        depths = self.depth + np.cumsum(steps)
        if len(positions):
            self.depth = int(depths[-1])
            self.in_string = bool(inside[-1])
        return positions, steps, depths

    def _open_array(self, position: int) -> None:
        name = LIST
        if self.array_depth == 2:
            before = self.text[self.last : position].rstrip().removesuffix(b":").rstrip()
            name = before[before[:-1].rfind(b'"') + 1 : -1].decode("utf-8", "replace")
        self.key = name if name in self.wanted and self.text[position : position + 1] == b"[" else None
        self.count = 0

    def _between(self, position: int, expected: bytes) -> None:
        if self.key is None:
            return
        found = self.text[self.last : position].strip()
        if found != expected:
            name = f"{self.key!r}" if self.key else "the list"
            raise DataError(
                f"{self.where}: {found[:40]!r} after element {self.count} of {name}, expected a list of objects "
                "divided by commas. Download it again, or mend the file."
            )
