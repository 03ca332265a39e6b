"""Members of zips, tars and folders, read where they lie: nothing is unpacked.

A member is an `Extent`: a file and the byte range in it. Extents are found once, in the order of the archive, and can
be read in any order by any process. An archive with a member that points outside itself, or with a link, is refused.
"""

from __future__ import annotations

import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

from cigpose.files.errors import DataError

_COPY_CHUNK = 4 << 20
_LARGEST_PICTURE = 1 << 30
"""Bytes of a member that is read at once."""
_HARMLESS_SIZE = 64 << 20
_LARGEST_RATIO = 200
"""Bytes that one deflated byte may become; text of numbers becomes 3 to 20, a bomb 1000."""
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_HEADER_SLACK = 256


@dataclass(frozen=True, slots=True)
class Extent:
    """Where the bytes of one member lie."""

    path: str
    """The archive, or the file itself."""
    name: str
    """The member's name in the archive or folder."""
    offset: int
    """Of the data; for a zip, of the member's local header."""
    stored: int
    """Bytes in the archive."""
    size: int
    """Bytes when read."""
    crc: int | None = None
    """CRC-32 that a zip promises."""
    deflated: bool = False
    in_zip: bool = False

    @property
    def where(self) -> str:
        """The member as messages name it."""
        return f"{Path(self.path).name}:{self.name}" if self.in_zip or self.offset else self.path


def list_members(path: Path) -> dict[str, Extent]:
    """Files of a zip, an uncompressed tar or a folder, by name, in their order there (a folder's: sorted).

    Raises:
        FileNotFoundError: there is no such path.
        DataError: not an archive that can be read, or a member that is a link or points outside.
    """
    if path.is_dir():
        return _list_folder(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found. Download it, or correct the path in params.yaml.")
    if path.name.lower().endswith((".tar", ".tar.gz", ".tgz")):
        return _list_tar(path)
    return list_zip(path)


def _list_folder(path: Path) -> dict[str, Extent]:
    members = {}
    for folder, subfolders, files in os.walk(path):
        subfolders.sort()
        for file in sorted(files):
            full = os.path.join(folder, file)
            if not os.path.isfile(full):
                raise DataError(f"{full}: not a file (a pipe, a device, or a link to nothing). Move it away.")
            name = PurePosixPath(os.path.relpath(full, path)).as_posix()
            size = os.path.getsize(full)
            members[name] = Extent(path=full, name=name, offset=0, stored=size, size=size)
    return members


def list_zip(path: Path) -> dict[str, Extent]:
    """As `list_members`, of a zip whatever its name.

    Raises:
        DataError: no zip that can be read, or a member that is a link, points outside or unpacks without measure.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, OSError, struct.error) as err:
        raise DataError(f"{path}: not a whole zip ({_opening(path)}; {err}). Delete it and download it again.") from err
    del archive
    infos.reverse()
    members: dict[str, Extent] = {}
    while infos:  # each of them is larger than what is kept of it
        info = infos.pop()
        mode = info.external_attr >> 16
        _refuse_unsafe(path, info.filename, is_link=stat.S_ISLNK(mode))
        if info.is_dir():
            continue
        if info.flag_bits & 1:
            raise DataError(f"{path}: member {info.filename} is encrypted. Give an archive without a password.")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(
                f"{path}: member {info.filename} uses compression method {info.compress_type}, expected stored or "
                "deflated. Pack the zip again with a common tool."
            )
        if info.filename in members:
            raise DataError(f"{path}: member {info.filename} is there twice. Pack the zip again.")
        if info.file_size > max(_HARMLESS_SIZE, _LARGEST_RATIO * info.compress_size):
            raise DataError(
                f"{path}: member {info.filename} would unpack {info.compress_size} bytes to {info.file_size}; this "
                "archive is refused. Get it from its original source."
            )
        members[info.filename] = Extent(
            path=str(path),
            name=info.filename,
            offset=info.header_offset,
            stored=info.compress_size,
            size=info.file_size,
            crc=info.CRC,
            deflated=info.compress_type == zipfile.ZIP_DEFLATED,
            in_zip=True,
        )
    return members


def _list_tar(path: Path) -> dict[str, Extent]:
    members: dict[str, Extent] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for info in archive:
                _refuse_unsafe(path, info.name, is_link=info.issym() or info.islnk())
                if info.isfile():
                    members[info.name] = Extent(
                        path=str(path), name=info.name, offset=info.offset_data, stored=info.size, size=info.size
                    )
            complete = path.stat().st_size >= archive.offset
    except (tarfile.TarError, EOFError) as err:
        raise DataError(
            f"{path}: not a whole uncompressed tar ({_opening(path)}; {err}). Download it again, or unpack a .tar.gz "
            "into a folder first."
        ) from err
    if not complete:
        raise DataError(f"{path}: the tar ends inside its last member. Delete it and download it again.")
    return members


def _refuse_unsafe(path: Path, name: str, *, is_link: bool) -> None:
    if is_link:
        raise DataError(f"{path}: member {name!r} is a link; this archive is refused. Get it from its original source.")
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or name.startswith(("/", "\\")) or (len(name) > 1 and name[1] == ":"):
        raise DataError(
            f"{path}: member {name!r} points outside the archive; this archive is refused. Get it from its original "
            "source."
        )


def _opening(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(16)
    if head.lstrip().startswith((b"<", b"\xef\xbb\xbf<")):
        return "it is a web page"
    return f"{path.stat().st_size} bytes, starting with {head[:4]!r}"


class ExtentReader:
    """Reads extents; keeps its archives open until `close`. One per process.

    What `read` returns lies in a buffer that the next call fills anew: fresh memory for each picture would cost more
    than its checksum.
    """

    def __init__(self) -> None:
        self._archives: dict[str, int] = {}
        self._buffer = bytearray(1 << 20)

    def __enter__(self) -> ExtentReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every archive."""
        while self._archives:
            os.close(self._archives.popitem()[1])

    def read(self, extent: Extent) -> memoryview:
        """All bytes of a member, checked against the zip's CRC-32; valid until the next call.

        Raises:
            DataError: bytes are missing, or do not match size or CRC-32.
        """
        if max(extent.size, extent.stored) > _LARGEST_PICTURE:
            raise DataError(f"{extent.where}: {extent.size} bytes, more than any picture has. Download it again.")
        raw = self._stored(extent, extent.stored)
        if extent.deflated:
            try:
                # One byte more than promised is enough to tell.
                raw = memoryview(zlib.decompressobj(-15).decompress(raw, extent.size + 1))
            except zlib.error as err:
                raise DataError(f"{extent.where}: damaged inside the archive ({err}). Download it again.") from err
        if len(raw) != extent.size:
            raise DataError(f"{extent.where}: {len(raw)} bytes, expected {extent.size}. Download it again.")
        if extent.crc is not None and zlib.crc32(raw) != extent.crc:
            raise DataError(
                f"{extent.where}: CRC-32 is {zlib.crc32(raw):08x}, the zip says {extent.crc:08x}. Download it again."
            )
        return raw

    def head(self, extent: Extent, limit: int) -> bytes:
        """The first bytes of a member, at most `limit`, unchecked."""
        raw = self._stored(extent, min(limit, extent.stored))
        return zlib.decompressobj(-15).decompress(raw, limit) if extent.deflated else bytes(raw)

    def chunks(self, extent: Extent) -> Iterator[bytes]:
        """A member piece by piece, for large ones, checked at the end.

        Raises:
            DataError: as `read`.
        """
        offset, left = self._data_offset(extent), extent.stored
        inflate = zlib.decompressobj(-15) if extent.deflated else None
        size = crc = 0
        while left:
            raw = os.pread(self._descriptor(extent), min(left, _COPY_CHUNK), offset)
            if not raw:
                break
            offset, left = offset + len(raw), left - len(raw)
            for piece in _inflated(inflate, raw, extent) if inflate else (raw,):
                size, crc = size + len(piece), zlib.crc32(piece, crc) if extent.crc is not None else 0
                if size > extent.size:
                    raise DataError(f"{extent.where}: more than the {extent.size} bytes promised. Download it again.")
                yield piece
        if size != extent.size:
            raise DataError(f"{extent.where}: {size} bytes, expected {extent.size}. Download it again.")
        if extent.crc is not None and crc != extent.crc:
            raise DataError(f"{extent.where}: CRC-32 is {crc:08x}, the zip says {extent.crc:08x}. Download it again.")

    def _descriptor(self, extent: Extent) -> int:
        if extent.path not in self._archives:
            if not extent.in_zip and not extent.offset:
                self.close()  # a file of a folder: it will not be asked for again
            self._archives[extent.path] = os.open(extent.path, os.O_RDONLY)
        return self._archives[extent.path]

    def _stored(self, extent: Extent, length: int) -> memoryview:
        if not extent.in_zip:
            return self._pread(extent, extent.offset, length)
        # Header and data in one read: the length of the local header is known only from itself.
        raw = self._pread(extent, extent.offset, length + len(extent.name) + _HEADER_SLACK)
        start = self._header_length(extent, raw)
        if start + length <= len(raw):
            return raw[start : start + length]
        return self._pread(extent, extent.offset + start, length)

    def _pread(self, extent: Extent, offset: int, length: int) -> memoryview:
        if length > len(self._buffer):
            self._buffer = bytearray(2 * length)
        view = memoryview(self._buffer)[:length]
        got = os.preadv(self._descriptor(extent), [view], offset)
        while 0 < got < length and (more := os.preadv(self._descriptor(extent), [view[got:]], offset + got)):
            got += more  # a network file system may give less than asked for
        return view[:got]

    def _header_length(self, extent: Extent, raw: memoryview) -> int:
        if len(raw) < 30 or bytes(raw[:4]) != b"PK\x03\x04":
            raise DataError(f"{extent.where}: no zip member at byte {extent.offset}. Download the archive again.")
        _, name_length, extra_length = _LOCAL_HEADER.unpack_from(raw)
        return int(30 + name_length + extra_length)

    def _data_offset(self, extent: Extent) -> int:
        if not extent.in_zip:
            return extent.offset
        raw = memoryview(os.pread(self._descriptor(extent), 30, extent.offset))
        return extent.offset + self._header_length(extent, raw)


def _inflated(inflate: Any, raw: bytes, extent: Extent) -> Iterator[bytes]:
    """What deflated bytes become, in pieces of bounded size."""
    while True:
        try:
            piece = inflate.decompress(raw, _COPY_CHUNK)
        except zlib.error as err:
            raise DataError(f"{extent.where}: damaged inside the archive ({err}). Download it again.") from err
        if piece:
            yield piece
        raw = inflate.unconsumed_tail
        if not raw and len(piece) < _COPY_CHUNK:
            return


class _ChunkStream:
    """File-like view of an iterator of chunks: what JSON readers and numpy need."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = b""

    def read(self, size: int = -1) -> bytes:
        parts = [self._rest]
        have = len(self._rest)
        while size < 0 or have < size:
            piece = next(self._chunks, None)
            if piece is None:
                break
            parts.append(piece)
            have += len(piece)
        data = b"".join(parts)
        self._rest = data[size:] if size >= 0 else b""
        return data[:size] if size >= 0 else data


def split_spec(spec: str) -> tuple[str, str | None]:
    """`archive.zip:member` -> (archive, member); a plain path -> (path, None)."""
    for ending in (".zip:", ".tar:"):
        at = spec.lower().find(ending)
        if at >= 0:
            return spec[: at + 4], spec[at + 5 :]
    return spec, None


@contextmanager
def open_spec(folder: Path, spec: str) -> Iterator[Any]:
    """A readable binary stream of `path`, `archive.zip:member` or `archive.tar:member`, relative to `folder`.

    Raises:
        FileNotFoundError: the file or the member is not there.
        DataError: the archive is damaged or unsafe.
    """
    archive, member = split_spec(spec)
    path = folder / archive
    if member is None:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not found. Download it, or correct the path in params.yaml.")
        with path.open("rb") as file:
            yield file
        return
    with ExtentReader() as reader:
        yield _ChunkStream(reader.chunks(find_member(list_members(path), member, path)))


def find_member(members: Mapping[str, Extent], name: str, path: Path) -> Extent:
    """The member of that exact name.

    Raises:
        FileNotFoundError: there is none; the message lists some that there are.
    """
    if name not in members:
        some = ", ".join(list(members)[:5])
        raise FileNotFoundError(f"{path}: has no member {name!r}. It has {len(members)}: {some}, ...")
    return members[name]


class MemberLookup:
    """Finds pictures by the name that annotations use.

    Archives often put a folder in front (`train2017/000000000785.jpg` for `000000000785.jpg`), annotations sometimes a
    slash. Tried in order: the whole name, the name behind the archive's first folder, the end of the path.
    """

    def __init__(self, members: Mapping[str, Extent]) -> None:
        self._members = members
        self._shorter: dict[str, str | None] = {}
        for name in members:
            parts = name.split("/")
            for i in range(1, len(parts)):
                tail = "/".join(parts[i:])
                # None: two members end so, and neither can be meant.
                self._shorter[tail] = None if tail in self._shorter else name

    def __len__(self) -> int:
        return len(self._members)

    def find(self, file_name: str) -> Extent | None:
        """The member meant by `file_name`, or None."""
        name = file_name.lstrip("/")
        while name.startswith("./"):
            name = name[2:]
        if name in self._members:
            return self._members[name]
        full = self._shorter.get(name)
        return self._members[full] if full else None
