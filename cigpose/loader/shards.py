"""The shards of a dataset: local, streamed from an address, or from the cache of such.

A shard is checked while it is read (`OpenShard`): its size when it is opened, its sha256 when it has been read to its
end, which whoever reads it first in a process does. Nothing waits for a whole shard, and nothing is asked of the file
system about shards that are not read.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cigpose.files.addresses import is_remote, without_credentials
from cigpose.files.cache import ShardCache
from cigpose.files.errors import DataError
from cigpose.files.objects import LARGEST_TRUTH, local_path, read_object
from cigpose.shard.index import ShardEntry, ShardIndex, read_index

AGAIN = "Delete it and run `dvc repro shard`."
OTHER_VERSION = "The index and the shards there are of different versions: upload the dataset's folder again."
_PIECE = 1 << 18
_verified: set[tuple[str, str]] = set()
"""(place, sha256) of the shards that this process has compared with their index."""


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
        """The shards of `dataset`: the index is read, and no shard is looked at.

        Args:
            dataset: its name.
            root: folder of the shard folders.
            locations: dataset -> address in place of `<root>/<dataset>`.
            cache: for remote shards; None for the user's cache directory without a limit.
            verify: compare every tar's sha256 when a process reads it first.

        Raises:
            FileNotFoundError: the index is missing.
            DataError: the index cannot be used.
        """
        address = locations.get(dataset, str(root / dataset)).rstrip("/")
        cache = cache or ShardCache()
        if not is_remote(address):
            address = str(local_path(address))
        return cls(dataset, address, read_index(address), cache, verify)

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

    def counts(self, *, detections: bool = False) -> np.ndarray:
        """(N,) int64: persons (or detections) of every shard, for the plan."""
        return np.array([e.detections if detections else e.persons for e in self.index.shards], dtype=np.int64)

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

    def read(self, number: int) -> OpenShard:
        """A shard, opened at its beginning. Close it.

        Raises:
            FileNotFoundError: a local shard is missing.
            DataError: it has another size than the index says.
            OSError: it cannot be read; while reading also: it cannot be fetched.
        """
        entry = self.index.shards[number]
        place = f"{self.address}/{entry.name}"
        digest = self.verify and (place, entry.sha256) not in _verified
        if not is_remote(self.address):
            return OpenShard(place, entry, _open_local(Path(place), entry), digest)
        if (copy := self.cache.find(entry.sha256, entry.bytes)) is not None:
            return OpenShard(place, entry, copy.open("rb", buffering=0), digest)
        return OpenShard(place, entry, self.cache.fetch(place, entry.sha256, entry.bytes), digest)

    def confirm(self, number: int) -> None:
        """See whether a shard in which something is wrong is the one that the index lists at all.

        Raises:
            DataError: it is not.
            OSError: it cannot be read or fetched.
        """
        with closing(self.read(number)) as shard:
            shard.finish()


def _open_local(path: Path, entry: ShardEntry) -> io.FileIO:
    try:
        file = io.FileIO(path)
    except FileNotFoundError as err:
        raise FileNotFoundError(
            f"{path}: not found, but index.json lists it. Run `dvc checkout` or `dvc repro shard`."
        ) from err
    if (size := file.seek(0, io.SEEK_END)) != entry.bytes:
        file.close()
        raise DataError(f"{path}: {size} bytes, index.json says {entry.bytes}. {AGAIN}")
    file.seek(0)
    return file


class OpenShard:
    """A shard being read, as a tar reader wants it: `read`. From its beginning, or of a file from anywhere."""

    def __init__(self, place: str, entry: ShardEntry, source: io.FileIO | Iterator[bytes], digest: bool) -> None:
        """A shard at its beginning.

        Args:
            place: its path or address.
            entry: what the index says of it.
            source: the open file, or its bytes as they come.
            digest: take the sha256 of what is read, to be compared by `finish`.
        """
        self.place = without_credentials(place)
        self.entry = entry
        self.file = source if isinstance(source, io.FileIO) else None
        self._key = (place, entry.sha256)
        self._chunks = iter(lambda: source.read(_PIECE), b"") if isinstance(source, io.FileIO) else source
        self._digest = hashlib.sha256() if digest else None
        self._rest = memoryview(b"")
        self.failure: tuple[object, ...] | None = None
        """What the error said that ended the reading."""

    @property
    def is_checked(self) -> bool:
        """Whether what is read now is compared with the index in the end."""
        return self._digest is not None

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end."""
        if not self._rest:
            self._rest = memoryview(self._next())
        piece, self._rest = self._rest[:size], self._rest[size:]
        return bytes(piece)

    def _next(self) -> bytes:
        try:
            chunk = next(self._chunks, b"")
        except OSError as err:
            self.failure = err.args
            raise
        if self._digest is not None:
            self._digest.update(chunk)
        return chunk

    def go_to(self, offset: int) -> None:
        """Go on reading there; only in a file, and in place of a check."""
        assert self.file is not None and not self.is_checked
        self._rest = memoryview(b"")
        self.file.seek(offset)

    def finish(self) -> None:
        """Read what is left and compare the whole with the index, if that is to be done.

        Raises:
            DataError: it is another tar, or a damaged one.
            OSError: it cannot be read or fetched.
        """
        if self._digest is None:
            return
        while self._next():
            pass
        if (digest := self._digest.hexdigest()) != self.entry.sha256:
            raise DataError(
                f"{self.place}: sha256 is {digest[:12]}..., index.json says {self.entry.sha256[:12]}.... "
                + (AGAIN if self.file is not None else OTHER_VERSION)
            )
        _verified.add(self._key)

    def close(self) -> None:
        """Let go of the file or the connection."""
        if self.file is not None:
            self.file.close()
        else:
            self._chunks.close()  # type: ignore[attr-defined]


def open_address(address: str, *, cache: ShardCache | None = None) -> ShardSet:
    """The shards of one folder or address.

    Raises:
        DataError: the index cannot be used.
        FileNotFoundError: no index.
    """
    folder = Path(address)
    locations = {folder.name: address} if is_remote(address) else {}
    return ShardSet.open(folder.name, folder.parent, locations, cache=cache)
