"""Batches being filled, in memory that loader processes and their parent share.

The memory has no name (an anonymous mapping, inherited by fork): it is gone with the last process that has it, by
whatever death, and the size of /dev/shm does not bound it. Each batch of a training has its number; batch n is made in
place n modulo the number of places, once batch n - places was taken.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from cigpose.files.errors import DataError

KEY_BYTES = 256
Fields = Mapping[str, tuple[Any, tuple[int, ...]]]
"""Name -> (dtype, shape of one row)."""


class Ring:
    """Shared memory for some batches. One writer per loader process, one reader."""

    def __init__(self, places: int, rows: int, fields: Fields, writers: int) -> None:
        """Reserve the memory; it is taken as it is written to.

        Args:
            places: batches that are filled at a time.
            rows: persons of the largest batch.
            fields: of a batch.
            writers: loader processes.

        Raises:
            OSError: there is not so much memory.
        """
        self.places = places
        arrays: dict[str, tuple[Any, tuple[int, ...]]] = {
            name: (dtype, (places, rows, *shape)) for name, (dtype, shape) in fields.items()
        }
        arrays["keys"] = (f"S{KEY_BYTES}", (places, rows))
        arrays["counts"], arrays["state"] = (np.int64, (writers, places)), (np.int64, (5 + writers,))
        size = sum(_padded(np.dtype(dtype).itemsize * int(np.prod(shape))) for dtype, shape in arrays.values())
        try:
            self._memory = mmap.mmap(-1, size)
        except OSError as err:
            raise OSError(
                err.errno,
                f"train.loader: no {size / 1e9:.1f} GB of shared memory for the crops of {places} batches "
                f"({err.strerror}). Lower train.loader.shuffle_buffer or train.batch_total.",
            ) from err
        views, offset = {}, 0
        for name, (dtype, shape) in arrays.items():
            views[name] = np.ndarray(shape, dtype, self._memory, offset)
            offset += _padded(views[name].nbytes)
        self.keys, self._counts, self._state = (views.pop(name) for name in ("keys", "counts", "state"))
        self.fields = views
        self.size = size

    # Written by the reader: what writers may do.

    @property
    def progress(self) -> tuple[int, int]:
        """Batches that the reader has taken, and the last slot for which a picture may be decoded (`allow`)."""
        return int(self._state[0]), int(self._state[1])

    def allow(self, slot: int) -> None:
        """Let pictures up to a slot be decoded: so nobody is far ahead of what is needed."""
        self._state[1] = slot

    @property
    def is_over(self) -> bool:
        """Whether writers are to end."""
        return bool(self._state[2])

    def end(self) -> None:
        """Let the writers end."""
        self._state[2] = 1

    def wait_for(self, batch: int, size: int) -> None:
        """Say that the reader wants to be told when a batch has so many rows; 0: no more."""
        self._state[3:5] = batch, size

    @property
    def is_waited_for(self) -> bool:
        """Whether the reader waits for what is there."""
        batch, size = self._state[3:5].tolist()
        return size > 0 and self.num_rows(batch) >= size

    def set_asleep(self, writer: int, asleep: bool) -> None:
        """Say whether a writer wants to be told that something changed."""
        self._state[5 + writer] = asleep

    def sleepers(self) -> list[int]:
        """Writers that want to be told."""
        return list(np.flatnonzero(self._state[5:]))

    # Rows. Each writer counts its own, so that no two processes ever write to one number.

    def has_place(self, batch: int) -> bool:
        """Whether rows of a batch may be written already."""
        return bool(batch < self._state[0] + self.places)

    def put(self, writer: int, batch: int, row: int, key: str, values: Mapping[str, np.ndarray]) -> None:
        """Write a person of a batch.

        Raises:
            DataError: a key of more than `KEY_BYTES` bytes.
        """
        place, name = batch % self.places, os.fsencode(key)
        if len(name) > KEY_BYTES:
            raise DataError(
                f"{key[:60]}...: a key of {len(name)} bytes, expected at most {KEY_BYTES}. Shorten the name."
            )
        for field, value in values.items():
            self.fields[field][place, row] = value
        self.keys[place, row] = name
        self._counts[writer, place] += 1

    def num_rows(self, batch: int) -> int:
        """Persons of a batch that have been written."""
        return int(self._counts[:, batch % self.places].sum())

    def take(self, batch: int, size: int) -> tuple[dict[str, np.ndarray], list[str]]:
        """The rows of a batch, as views that hold until `free`, and their keys."""
        place = batch % self.places
        rows = {name: array[place, :size] for name, array in self.fields.items()}
        return rows, [os.fsdecode(key) for key in self.keys[place, :size].tolist()]

    def free(self, batch: int) -> None:
        """Give the place of the batch that was taken last to a later one."""
        self._counts[:, batch % self.places] = 0
        self._state[0] = batch + 1


def _padded(size: int) -> int:
    return -(-size // 64) * 64
