"""Is a file what it should be: size, digests, and whether its archive or JSON is whole and harmless."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from cigpose.files.archives import ExtentReader, list_members, list_zip
from cigpose.files.errors import DataError
from cigpose.files.jsonstream import split_arrays

_CHUNK = 1 << 20
_ZIP_MEMBER = b"PK\x03\x04"
_LONGEST_TAR_END = 1 << 20
"""Bytes of zeros that any common tool writes behind the last member."""


class IntegrityError(ValueError):
    """A file that is not what it should be; says how it differs, not what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """What is known of a file before it is read. None: not known."""

    bytes: int | None = None
    sha256: str | None = None
    md5: str | None = None
    authority: str = "published"
    """Who says so, for messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Digests:
    """What a file is."""

    bytes: int
    sha256: str
    md5: str | None
    checked: str = ""
    """By what it is known to be whole, in words."""


def digest_file(path: Path, *, with_md5: bool = False, on_bytes: Callable[[int], None] | None = None) -> Digests:
    """Size and digests of a file, read once.

    Args:
        path: the file.
        with_md5: compute the md5 too, which costs more than the sha256.
        on_bytes: called with the number of bytes of each piece read.
    """
    sha256, size = hashlib.sha256(), 0
    md5 = hashlib.md5(usedforsecurity=False) if with_md5 else None
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            sha256.update(piece)
            if md5 is not None:
                md5.update(piece)
            size += len(piece)
            if on_bytes is not None:
                on_bytes(len(piece))
    return Digests(bytes=size, sha256=sha256.hexdigest(), md5=md5.hexdigest() if md5 else None)


def check_file(
    path: Path, expected: Expected, *others: Expected, on_bytes: Callable[[int], None] | None = None
) -> Digests:
    """The digests of a file, once it is known to be the expected one and whole.

    Args:
        path: the file; its suffix tells the format.
        expected: what must hold,
        *others: or one of these in its place, where it has a digest.
        on_bytes: called with the number of bytes of each piece read.

    Raises:
        IntegrityError: wrong size, wrong digest, a web page, a cut archive or JSON, or members that leave the folder.
    """
    candidates = [expected, *(other for other in others if other.sha256 or other.md5)]
    size = path.stat().st_size
    fitting = [candidate for candidate in candidates if candidate.bytes in (None, size)]
    if not fitting:
        raise IntegrityError(f"it has {size:,} bytes, {expected.authority}: {expected.bytes:,}")
    with_md5 = any(candidate.md5 and not candidate.sha256 for candidate in fitting)
    found = digest_file(path, with_md5=with_md5, on_bytes=on_bytes)
    wrong = [_difference(found, candidate) for candidate in fitting]
    if all(wrong):
        raise IntegrityError(str(wrong[0]))
    known = next(candidate for candidate, difference in zip(fitting, wrong, strict=True) if difference is None)
    if known.sha256 or known.md5:
        check_content(path)
        return replace(found, checked=f"verified ({'sha256' if known.sha256 else 'md5'} {known.authority})")
    return replace(found, checked=f"no digest is known: {check_content(path, to_the_end=True)}; its sha256 is recorded")


def _difference(found: Digests, expected: Expected) -> str | None:
    """How the digest differs; None if it does not."""
    for kind in ("sha256", "md5"):
        wanted = getattr(expected, kind)
        if wanted is not None:
            got = getattr(found, kind)
            return None if got == wanted else f"its {kind} is {got}, {expected.authority}: {wanted}"
    return None


def check_content(path: Path, *, to_the_end: bool = False) -> str:
    """Check that a file has the format its name promises, and is not cut.

    Args:
        path: the file.
        to_the_end: prove the end by the format's own structure, reading everything; for files without a digest.

    Returns: what was checked, in words.

    Raises:
        IntegrityError: it has not, or it is cut.
    """
    with path.open("rb") as file:
        head = file.read(1024).lstrip()
        file.seek(max(0, path.stat().st_size - 1024))
        tail = file.read().rstrip()
    if not head:
        raise IntegrityError("it is empty")
    if head[:15].lower().startswith((b"<!doctype html", b"<html")):
        raise IntegrityError("it is a web page saved under this name")
    if not (head + tail).strip(b"\0"):
        raise IntegrityError("it is nothing but zeros")
    suffix = path.suffix.lower()
    try:
        if suffix == ".json":
            return _check_json(path, head, tail, to_the_end)
        if suffix == ".zip" or (suffix == ".pth" and head.startswith(_ZIP_MEMBER)):
            return _check_zip(path, to_the_end)
        if suffix == ".tar":
            return _check_tar(path, tail)
    except DataError as err:
        # What to do depends on where the file came from, and is the caller's to say.
        raise IntegrityError(re.split(r"\. (?=[A-Z])", str(err).removeprefix(f"{path}: "))[0]) from err
    return "its format proves nothing about its end"


def _check_json(path: Path, head: bytes, tail: bytes, to_the_end: bool) -> str:
    if head[:1] not in (b"{", b"["):
        raise IntegrityError(f"it is not JSON: it begins with {head[:12]!r}")
    if tail[-1:] != {b"{": b"}", b"[": b"]"}[head[:1]]:
        raise IntegrityError("its JSON is cut: the closing bracket is missing")
    if to_the_end:
        with path.open("rb") as file:
            for _ in split_arrays(_WithoutZeros(file), str(path), ()):
                pass
    return "every bracket of its JSON is closed"


class _WithoutZeros:
    """A stream of text: a zero byte in it is a piece that never came."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int) -> bytes:
        piece = self._file.read(size)
        if b"\0" in piece:
            raise IntegrityError("its JSON has zero bytes, where a piece of the file is missing")
        return piece


def _check_zip(path: Path, to_the_end: bool) -> str:
    members = list_zip(path)
    if to_the_end:
        with ExtentReader() as reader:
            for extent in members.values():
                for _ in reader.chunks(extent):
                    pass
    return f"all {len(members)} CRC-32 of its members are right"


def _check_tar(path: Path, tail: bytes) -> str:
    members = list_members(path)
    if tail.strip(b"\0"):
        raise IntegrityError("the tar is cut: the two empty blocks at its end are missing")
    if not members:
        raise IntegrityError("the tar has no members")
    end = max(extent.offset + extent.size for extent in members.values())
    if path.stat().st_size - end > _LONGEST_TAR_END:
        raise IntegrityError(f"the tar is cut: behind its last member at byte {end} there are only zeros")
    return "its headers and its end are right (a tar has no checksums of contents)"
