"""Lists that lie on the disk: of each piece only its place, 8 bytes, is in memory."""

from __future__ import annotations

import dataclasses
import marshal
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cigpose.files.archives import Extent
from cigpose.shard.pictures import Frame, Picture


class Spill:
    """Pieces of bytes in a file, in their order."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b")
        self._ends = array("q", [0])
        self._is_flushed = True

    def __len__(self) -> int:
        return len(self._ends) - 1

    def append(self, piece: bytes) -> None:
        """Add a piece."""
        self._ends.append(self._ends[-1] + self._file.write(piece))
        self._is_flushed = False

    def __getitem__(self, number: int) -> bytes:
        if not self._is_flushed:
            self._file.flush()
            self._is_flushed = True
        begin, end = self._ends[number], self._ends[number + 1]
        return os.pread(self._file.fileno(), end - begin, begin)

    def __iter__(self) -> Iterator[bytes]:
        return map(self.__getitem__, range(len(self)))


class SpilledPictures:
    """Pictures in a file, in their order; the sizes, which each person is compared with, are in memory."""

    def __init__(self, path: Path) -> None:
        self._spill = Spill(path)
        self._sizes = array("i")

    def __len__(self) -> int:
        return len(self._spill)

    def append(self, picture: Picture) -> None:
        """Add a picture."""
        source = picture.source
        where: Any = None
        if isinstance(source, Frame):
            where = (_values(source.clip), source.index)
        elif source is not None:
            where = (_values(source),)
        values = (picture.key, picture.image_id, picture.file_name, picture.width, picture.height)
        self._spill.append(marshal.dumps((values, where)))
        self._sizes.extend((picture.width, picture.height))

    def size(self, place: int) -> tuple[int, int]:
        """(width, height) of the picture at a place."""
        return self._sizes[2 * place], self._sizes[2 * place + 1]

    def __getitem__(self, place: int) -> Picture:
        (key, image_id, file_name, width, height), where = marshal.loads(self._spill[place])
        source: Extent | Frame | None = None
        if where is not None:
            extent = Extent(*where[0])
            source = extent if len(where) == 1 else Frame(extent, where[1])
        return Picture(key=key, image_id=image_id, file_name=file_name, width=width, height=height, source=source)

    def __iter__(self) -> Iterator[Picture]:
        return map(self.__getitem__, range(len(self)))


_FIELDS = tuple(field.name for field in dataclasses.fields(Extent))


def _values(extent: Extent) -> tuple[Any, ...]:
    return tuple(getattr(extent, name) for name in _FIELDS)
