"""The shards of a dataset, opened for reading at any place: local, or fetched whole into a cache.

A tar is scanned once per run for where its members lie, checked against the index while at it, and then read by offset.
Reading by offset instead of as a stream is what lets a rank begin inside a shard, a resumed epoch skip what was seen,
and any process decode any picture; the tars stay plain webdataset ones.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from cigpose.files.addresses import is_remote
from cigpose.files.archives import Extent, list_members
from cigpose.files.cache import ShardCache
from cigpose.files.digest import sha256_of
from cigpose.files.errors import DataError
from cigpose.files.objects import LARGEST_TRUTH, local_path, read_object
from cigpose.loader.plan import ShardCount
from cigpose.shard.index import ShardEntry, ShardIndex, read_index

AGAIN = "Delete it and run `dvc repro shard`."
MAX_OPEN = 64


@dataclass(frozen=True, slots=True, eq=False)
class ShardTable:
    """Where the members of one tar lie. N images."""

    path: Path
    keys: tuple[str, ...]
    """N keys, in the order of the file."""
    json_extents: np.ndarray
    """(N, 2) int64: offset and bytes of `<key>.json`."""
    jpeg_extents: np.ndarray
    """(N, 2) int64: offset and bytes of `<key>.jpg`."""
    persons: np.ndarray
    """(N,) int64: persons of each image."""
    detections: np.ndarray
    """(N,) int64: detections of each image."""


@dataclass(frozen=True, slots=True)
class ShardSet:
    """One dataset's index and the place of its shards."""

    dataset: str
    address: str
    """Folder, or s3:// or http(s):// address."""
    index: ShardIndex
    cache: ShardCache
    verify: bool

    @classmethod
    def open(
        cls,
        dataset: str,
        root: Path,
        locations: Mapping[str, str],
        *,
        cache: ShardCache | None = None,
        verify: bool = True,
    ) -> ShardSet:
        """The shards of `dataset`, checked as far as that is free: the index is read and local tars have their size.

        Args:
            dataset: its name.
            root: folder of the shard folders.
            locations: dataset -> address in place of `<root>/<dataset>`.
            cache: for remote shards; None for the user's cache directory without a limit.
            verify: compare every tar's sha256 when it is opened first in a run.

        Raises:
            FileNotFoundError: the index or a local shard is missing.
            DataError: the index cannot be used, or a local shard has another size.
        """
        address = locations.get(dataset, str(root / dataset)).rstrip("/")
        cache = cache or ShardCache()
        if is_remote(address):
            return cls(dataset, address, read_index(address), cache, verify)
        address = str(local_path(address))
        shards = cls(dataset, address, read_index(address), cache, verify)
        for entry in shards.index.shards:
            path = Path(address) / entry.name
            if not path.is_file():
                raise FileNotFoundError(
                    f"{path}: not found, but index.json lists it. Run `dvc checkout` or `dvc repro shard`."
                )
            if (size := path.stat().st_size) != entry.bytes:
                raise DataError(f"{path}: {size} bytes, index.json says {entry.bytes}. {AGAIN}")
        return shards

    def check_keypoints(self, name: str, num_keypoints: int) -> None:
        """Refuse shards of another keypoint set.

        Raises:
            DataError: the index says another set or number of keypoints.
        """
        if (self.index.keypoints, self.index.num_keypoints) != (name, num_keypoints):
            raise DataError(
                f"{self.address}: holds {self.index.num_keypoints} keypoints ({self.index.keypoints}), but params.yaml"
                f" asks for {num_keypoints} ({name}). Correct `keypoints`, or shard the data again."
            )

    def counts(self, *, detections: bool = False) -> list[ShardCount]:
        """Persons (or detections) of every shard, for the plan."""
        return [
            ShardCount(self.dataset, number, entry.detections if detections else entry.persons)
            for number, entry in enumerate(self.index.shards)
        ]

    def ground_truth(self) -> tuple[str, bytes] | None:
        """Where the labels of the whole split lie, and their text; None if the dataset has none.

        Always compared with the sha256 of the index: what a model is measured by is read once, and is small.

        Raises:
            FileNotFoundError: the index names a file that is not there.
            DataError: it is not the file that the index means.
            OSError: it cannot be fetched.
        """
        name, wanted = self.index.ground_truth, self.index.ground_truth_sha256
        if name is None:
            return None
        place = f"{self.address}/{name}"
        try:
            text = read_object(place, LARGEST_TRUTH)
        except FileNotFoundError as err:
            if is_remote(place):
                raise
            raise FileNotFoundError(f"{place}: not found, but index.json names it. {AGAIN}") from err
        if wanted is not None and (digest := hashlib.sha256(text).hexdigest()) != wanted:
            raise DataError(f"{place}: sha256 is {digest[:12]}..., index.json says {wanted[:12]}.... {AGAIN}")
        return place, text

    def table(self, number: int) -> ShardTable:
        """Where the members of a shard lie; fetched, verified and counted on first use in this process.

        Raises:
            DataError: the tar is not the one the index lists, or is damaged.
            OSError: it cannot be read or fetched.
        """
        return _table(self.fetch(number), self.index.shards[number])

    def fetch(self, number: int) -> Path:
        """A shard as a local file; fetched, or compared with its sha256, on first use in this process.

        Raises:
            DataError: the tar is not the one the index lists.
            OSError: it cannot be read or fetched.
        """
        entry = self.index.shards[number]
        if is_remote(self.address):
            return self.cache.shard(f"{self.address}/{entry.name}", entry.sha256, entry.bytes)
        path = Path(self.address) / entry.name
        if self.verify:
            _verify(path, entry.sha256)
        return path


def open_address(address: str, *, cache: ShardCache | None = None) -> ShardSet:
    """The shards of one folder or address.

    Raises:
        DataError: the index cannot be used.
        FileNotFoundError: no index or a shard is missing.
    """
    folder = Path(address)
    locations = {folder.name: address} if is_remote(address) else {}
    return ShardSet.open(folder.name, folder.parent, locations, cache=cache)


@functools.cache
def _verify(path: Path, sha256: str) -> None:
    if (digest := sha256_of(path)) != sha256:
        raise DataError(f"{path}: sha256 is {digest[:12]}..., index.json says {sha256[:12]}.... {AGAIN}")


@functools.cache
def _table(path: Path, entry: ShardEntry) -> ShardTable:
    return scan_shard(path, entry)


def scan_shard(path: Path, entry: ShardEntry) -> ShardTable:
    """Find the members of a tar and check their number.

    A tar reader takes a damaged header for the end of the archive, without a word; the counts of the index tell.

    Raises:
        DataError: no tar, a sample without its other half, or other counts than the index says.
    """
    try:
        members = list_members(path)
    except DataError as err:
        raise DataError(f"{path}: cannot be read as a tar: {err.__cause__ or err} {AGAIN}") from err
    keys = [name.removesuffix(".jpg") for name in members if name.endswith(".jpg")]
    jsons = {name.removesuffix(".json"): extent for name, extent in members.items() if name.endswith(".json")}
    if odd := sorted(jsons.keys() ^ set(keys)):
        raise DataError(f"{path}: {odd[0]} has no {'.json' if odd[0] in keys else '.jpg'} beside it. {AGAIN}")
    persons, detections = _count(path, [jsons[key] for key in keys])
    check_counts(path, entry, images=len(keys), persons=int(persons.sum()), detections=int(detections.sum()))
    return ShardTable(
        path=path,
        keys=tuple(keys),
        json_extents=_extents([jsons[key] for key in keys]),
        jpeg_extents=_extents([members[f"{key}.jpg"] for key in keys]),
        persons=persons,
        detections=detections,
    )


def check_counts(path: Path, entry: ShardEntry, **found: int) -> None:
    """Compare what a tar holds with its index.

    Raises:
        DataError: another number of `images`, `persons` or `detections`.
    """
    for what, number in found.items():
        if number != getattr(entry, what):
            raise DataError(
                f"{path}: {number} {what} found, index.json says {getattr(entry, what)}; the tar is damaged. {AGAIN}"
            )


def _extents(members: list[Extent]) -> np.ndarray:
    return np.array([(extent.offset, extent.size) for extent in members], dtype=np.int64).reshape(-1, 2)


def _count(path: Path, members: list[Extent]) -> tuple[np.ndarray, np.ndarray]:
    with path.open("rb") as file:
        counts = [count_people(os.pread(file.fileno(), extent.size, extent.offset)) for extent in members]
    persons, detections = np.array(counts, dtype=np.int64).reshape(-1, 2).T
    return persons, detections


def count_people(record: bytes) -> tuple[int, int]:
    """Persons and detections of a sample's JSON, by their fields; parsing would take ten times as long.

    No text of a record can look like a field: quotes inside text are escaped.
    """
    persons = record.count(b'"keypoints":')
    return persons, record.count(b'"bbox_xyxy":') - persons


class ShardFiles:
    """Tars opened for reading by offset, at most `MAX_OPEN` at a time. Works after a fork and may be pickled."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_descriptors": {}}

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def read(self, path: Path, extent: Sequence[int]) -> bytes:
        """The bytes of a member, by its offset and size.

        Raises:
            DataError: the file ends before.
        """
        offset, size = extent
        raw = os.pread(self._descriptor(path), size, offset)
        if len(raw) != size:
            raise DataError(f"{path}: ends inside a member at byte {offset}; it changed while it was read. {AGAIN}")
        return raw

    def record(self, path: Path, extent: Sequence[int]) -> dict[str, Any]:
        """The JSON of one image, by its offset and size.

        Raises:
            DataError: it is not JSON, or the file ends before.
        """
        try:
            record: dict[str, Any] = orjson.loads(self.read(path, extent))
        except orjson.JSONDecodeError as err:
            raise DataError(f"{path}: the record at byte {extent[0]} is not JSON ({err}). {AGAIN}") from err
        return record

    def _descriptor(self, path: Path) -> int:
        descriptor = self._descriptors.get(path)
        if descriptor is None:
            if len(self._descriptors) >= MAX_OPEN:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            descriptor = self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return descriptor
