"""Writes one shard: a tar of `<key>.jpg` and `<key>.json`, equal bytes for equal input. Runs in worker processes."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
import orjson

from cigpose.files.archives import Extent, ExtentReader
from cigpose.files.errors import DataError
from cigpose.files.jpeg import check_jpeg, decode_strictly, is_jpeg
from cigpose.shard.intake import BadSamples
from cigpose.shard.persons import NO_FRAME
from cigpose.shard.pictures import Picture

_BUFFER = 1 << 20
"""Bytes gathered for one write: the library hands on 16 KiB at a time."""

Pictures = Callable[["ShardJob", ExtentReader], Iterator[tuple["Sample", "bytes | memoryview | DataError | None"]]]
"""Pictures of a job in order: JPEG bytes, why they cannot be had, or None where there is none by rule."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture and where its persons lie in the spill file."""

    picture: Picture
    persons: tuple[tuple[int, int], ...]
    """(offset, length) of each."""
    detections: tuple[bytes, ...] | None
    """JSON of each box; None if the dataset has no detection file."""


@dataclass(frozen=True, slots=True)
class ShardJob:
    """All that one shard needs; small, and picklable."""

    path: Path
    samples: tuple[Sample, ...]
    persons_file: Path
    jpeg_quality: int
    verify_images: bool
    shuffle: bool = False


@dataclass(slots=True)
class ShardStats:
    """What became of a shard."""

    name: str
    sha256: str = ""
    bytes: int = 0
    images: int = 0
    persons: int = 0
    detections: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    bad: BadSamples = field(default_factory=BadSamples)
    lost: list[int] = field(default_factory=list)
    """Ids of images left out, whether by rule or because they are unreadable."""


def write_shard(job: ShardJob, pictures: Pictures) -> ShardStats:
    """Write the shard at `job.path`: to a temporary name first, then renamed. The caller sees to it that it is synced.

    Samples whose picture is unreadable are left out and counted.
    """
    cv2.setNumThreads(0)
    stats = ShardStats(name=job.path.name)
    part = job.path.with_suffix(".tar.part")
    file = _DigestedFile(part)
    with ExtentReader() as reader, job.persons_file.open("rb") as persons, _tar_writer(file) as write:
        found = pictures(job, reader)
        for sample, data in _shuffled(found, job.path.name) if job.shuffle else found:
            lost = max(len(sample.persons), 1)
            if data is None:
                stats.dropped[NO_FRAME] = stats.dropped.get(NO_FRAME, 0) + len(sample.persons)
                stats.lost.append(sample.picture.image_id)
                continue
            try:
                if isinstance(data, DataError):
                    raise data
                data = _checked(data, sample.picture, job)
            except DataError as err:
                picture = sample.picture
                stats.bad.add(f"image {picture.image_id} ({picture.file_name}): {err}", lost)
                stats.lost.append(picture.image_id)
                continue
            if not sample.persons and not sample.detections:
                continue
            write({"__key__": sample.picture.key, "jpg": data, "json": _sample_json(sample, persons)})
            stats.images += 1
            stats.persons += len(sample.persons)
            stats.detections += len(sample.detections or ())
    stats.bytes, stats.sha256 = file.size, file.sha256
    part.rename(job.path)
    return stats


def _shuffled(
    found: Iterator[tuple[Sample, bytes | memoryview | DataError | None]], seed: str
) -> Iterator[tuple[Sample, bytes | memoryview | DataError | None]]:
    """All of them in another order. They are held in memory: frames come in the order of their video."""
    held = [(sample, bytes(data) if isinstance(data, memoryview) else data) for sample, data in found]
    for place in np.random.default_rng(zlib.crc32(seed.encode())).permutation(len(held)).tolist():
        sample, data = held[place]
        held[place] = (sample, None)
        yield sample, data


def read_photographs(
    job: ShardJob, reader: ExtentReader
) -> Iterator[tuple[Sample, bytes | memoryview | DataError | None]]:
    """Pictures that are files or members of an archive."""
    for sample in job.samples:
        source = sample.picture.source
        assert isinstance(source, Extent)
        try:
            yield sample, reader.read(source)
        except DataError as err:
            yield sample, err


def _checked(data: bytes | memoryview, picture: Picture, job: ShardJob) -> bytes | memoryview:
    """The JPEG as it goes into the shard; other formats are encoded.

    Raises:
        DataError: it cannot be read, is cut, or has another size than the annotations say.
    """
    if is_jpeg(data):
        size = check_jpeg(data)
        if job.verify_images:
            _decode(data)
    else:
        image = _decode(data)
        size = (image.shape[1], image.shape[0])
        data = encode_jpeg(image, job.jpeg_quality)
    if size != (picture.width, picture.height):
        raise DataError(
            f"the annotations say {picture.width}x{picture.height}, the picture is {size[0]}x{size[1]} (w x h); "
            "boxes would be clipped wrongly"
        )
    return data


def _decode(data: bytes | memoryview) -> np.ndarray:
    image = decode_strictly(data)
    if image is None:
        raise DataError(f"not a picture OpenCV can decode: {len(data)} bytes, starting with {bytes(data[:4])!r}")
    return image


def encode_jpeg(image: np.ndarray, quality: int) -> bytes:
    """JPEG bytes of a (H, W, 3) BGR uint8 picture."""
    done, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert done
    return data.tobytes()


def _sample_json(sample: Sample, persons: IO[bytes]) -> bytes:
    """Keys sorted, no blanks; persons and detections are JSON already."""
    picture = sample.picture
    parts: list[bytes] = []
    if sample.detections is not None:
        parts.append(b'"detections":[%b]' % b",".join(sample.detections))
    parts.append(b'"file_name":%b,"height":%d' % (orjson.dumps(picture.file_name), picture.height))
    parts.append(b'"image_id":%d' % picture.image_id)
    people = (os.pread(persons.fileno(), length, offset) for offset, length in sample.persons)
    parts.append(b'"persons":[%b]' % b",".join(people))
    parts.append(b'"width":%d' % picture.width)
    return b"{%b}" % b",".join(parts)


class _DigestedFile(io.RawIOBase):
    """A file being written that knows its size and sha256, and says how far it came when the disk is full."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digest = hashlib.sha256()
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        """Write some of `data`; how much. The buffer above asks again for the rest."""
        try:
            written = os.write(self._descriptor, data)
        except OSError as err:
            raise OSError(err.errno, f"{err.strerror} after {self.size} bytes", str(self._path)) from err
        self._digest.update(memoryview(data)[:written])
        self.size += written
        return written

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
            self._descriptor = -1
        super().close()

    @property
    def sha256(self) -> str:
        """Of what was written so far."""
        return self._digest.hexdigest()


@contextmanager
def _tar_writer(file: _DigestedFile) -> Iterator[Callable[[dict[str, Any]], int]]:
    """Writes samples to a tar whose headers hold nothing but name and size: equal bytes for equal samples."""
    from webdataset import TarWriter  # it brings torch, which those who only plan or look at shards need not wait for

    buffer = io.BufferedWriter(file, _BUFFER)
    try:
        with TarWriter(buffer, user="", group="", mode=0o644, mtime=0, encoder=False) as tar:
            yield tar.write
        buffer.flush()
    finally:
        file.close()  # and not the buffer: after an error it would try the rest again


def members(path: Path) -> Iterable[tuple[str, bytes]]:
    """Name and bytes of every member of a shard, in order."""
    with tarfile.open(path, "r:") as tar:
        for info in tar:
            file: Any = tar.extractfile(info) or io.BytesIO()
            yield info.name, file.read()
