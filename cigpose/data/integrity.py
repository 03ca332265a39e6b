"""Is a file what it should be: size, digests, and whether its archive or JSON is whole and harmless."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cigpose.data.archives import DataError, list_members

_CHUNK = 1 << 20


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
    check_content(path)
    return found


def _difference(found: Digests, expected: Expected) -> str | None:
    """How the digest differs; None if it does not."""
    for kind in ("sha256", "md5"):
        wanted = getattr(expected, kind)
        if wanted is not None:
            got = getattr(found, kind)
            return None if got == wanted else f"its {kind} is {got}, {expected.authority}: {wanted}"
    return None


def check_content(path: Path) -> None:
    """Check that a file has the format its name promises, to its end, without reading all of it.

    Raises:
        IntegrityError: it has not.
    """
    with path.open("rb") as file:
        head = file.read(1024).lstrip()
        file.seek(max(0, path.stat().st_size - 1024))
        tail = file.read().rstrip()
    if not head:
        raise IntegrityError("it is empty")
    if head[:15].lower().startswith((b"<!doctype html", b"<html")):
        raise IntegrityError("it is a web page saved under this name")
    suffix = path.suffix.lower()
    if suffix == ".json":
        if head[:1] not in (b"{", b"["):
            raise IntegrityError(f"it is not JSON: it begins with {head[:12]!r}")
        if tail[-1:] != {b"{": b"}", b"[": b"]"}[head[:1]]:
            raise IntegrityError("its JSON is cut: the closing bracket is missing")
    elif suffix in (".zip", ".tar"):
        try:
            list_members(path)
        except DataError as err:
            # What to do depends on where the file came from, and is the caller's to say.
            raise IntegrityError(re.split(r"\. (?=[A-Z])", str(err).removeprefix(f"{path}: "))[0]) from err
    if suffix == ".tar" and tail.strip(b"\0"):
        raise IntegrityError("the tar is cut: the two empty blocks at its end are missing")
