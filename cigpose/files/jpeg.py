"""What a JPEG says about itself, without decoding it: its size and whether it is whole.

OpenCV decodes a cut JPEG without complaint and paints the rest grey, so the end of the scan is looked for here. Whether
the scan is whole in front of an end marker only decoding tells; libjpeg then says so, but to the standard error alone.
"""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import suppress

import cv2
import numpy as np

from cigpose.files.errors import DataError

_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_STANDALONE = frozenset({0x01, *range(0xD0, 0xD8)})
_ROTATED = frozenset({5, 6, 7, 8})
_DAMAGE = (b"premature end", b"bad Huffman code", b"Premature end")
"""What libjpeg says where picture data are missing; a few bytes too many harm nothing."""


def is_jpeg(data: bytes | memoryview) -> bool:
    """Whether these bytes start as a JPEG does."""
    return bytes(data[:3]) == b"\xff\xd8\xff"


def jpeg_size(data: bytes | memoryview) -> tuple[int, int]:
    """(width, height) as decoders show the picture, that is, turned by its EXIF orientation.

    Args:
        data: the file, or enough of its beginning.

    Raises:
        DataError: no JPEG, or its header is damaged or not complete.
    """
    return _walk(data)[0]


def check_jpeg(data: bytes | memoryview) -> tuple[int, int]:
    """(width, height) of a whole JPEG, as `jpeg_size`.

    Raises:
        DataError: no JPEG, a damaged header, or the picture is cut: no end marker after the scan.
    """
    size, scan = _walk(data)
    if scan is None:
        raise DataError("the JPEG has a header but no picture data")
    whole = bytes(data[-2:]) == b"\xff\xd9" or bytes(data).find(b"\xff\xd9", scan) >= 0
    if not whole:
        raise DataError(f"the JPEG is cut: {len(data)} bytes without an end marker")
    return size


def decode_strictly(data: bytes | memoryview) -> np.ndarray | None:
    """The (H, W, 3) BGR uint8 picture, or None where OpenCV cannot decode it.

    The standard error of the process is a file meanwhile; what is not libjpeg's is passed on.

    Raises:
        DataError: the picture decodes, but a part of its data is missing or damaged.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as heard:
        stderr = os.dup(2)
        try:
            os.dup2(heard.fileno(), 2)
            with suppress(cv2.error):
                return _refuse_damage(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), heard.fileno())
            return None
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            heard.seek(0)
            for line in heard.read().splitlines(keepends=True):
                if b"JPEG" not in line:
                    os.write(2, line)


def _refuse_damage(image: np.ndarray | None, heard: int) -> np.ndarray | None:
    said = os.pread(heard, 1 << 16, 0)
    for line in said.splitlines():
        if b"JPEG" in line and any(word in line for word in _DAMAGE):
            raise DataError(
                f"the JPEG's picture data are not whole (libjpeg: {line.decode('ascii', 'replace').strip()})"
            )
    return image


def _walk(data: bytes | memoryview) -> tuple[tuple[int, int], int | None]:
    """Size, and where the first scan begins (None if `data` ends before)."""
    if not is_jpeg(data):
        raise DataError(f"not a JPEG: starts with {bytes(data[:4])!r}")
    size: tuple[int, int] | None = None
    rotated = False
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            raise DataError(f"the JPEG's header is damaged at byte {at}")
        marker = data[at + 1]
        if marker == 0xFF or marker in _STANDALONE:
            at += 1 if marker == 0xFF else 2
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xDA and size is not None:
            return _turned(size, rotated), at + 2 + length
        if marker in (0xDA, 0xD9) or length < 2:
            raise DataError(f"the JPEG's header is damaged at byte {at}")
        if marker == 0xE1:
            rotated = rotated or _exif_orientation(bytes(data[at + 4 : at + 2 + length])) in _ROTATED
        elif marker in _START_OF_FRAME and at + 9 <= len(data):
            size = int.from_bytes(data[at + 7 : at + 9], "big"), int.from_bytes(data[at + 5 : at + 7], "big")
        at += 2 + length
    if size is None:
        raise DataError(f"the JPEG's header is not complete in {len(data)} bytes")
    return _turned(size, rotated), None


def _turned(size: tuple[int, int], rotated: bool) -> tuple[int, int]:
    return (size[1], size[0]) if rotated else size


def _exif_orientation(payload: bytes) -> int:
    """Orientation tag of an APP1 segment; 1 (upright) where it has none."""
    if not payload.startswith(b"Exif\0\0"):
        return 1
    tiff = payload[6:]
    order = {b"II": "little", b"MM": "big"}.get(tiff[:2])
    if order is None:
        return 1

    def number(at: int, size: int) -> int:
        return int.from_bytes(tiff[at : at + size], "little" if order == "little" else "big")

    first = number(4, 4)
    for entry in range(first + 2, first + 2 + 12 * number(first, 2), 12):
        if number(entry, 2) == 0x0112:
            return number(entry + 8, 2)
        if entry >= len(tiff):
            break
    return 1
