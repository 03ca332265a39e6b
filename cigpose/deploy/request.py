"""A request for poses, judged before anything is decoded or computed: what a server may be asked for, and how.

A row is a picture: `image` (bytes of a JPEG, PNG, WebP or BMP file, or their base64) and, by choice, `boxes`
([[x0, y0, x1, y1], ...] in image pixels, each with a score after it by choice; or that as JSON text).
"""

from __future__ import annotations

import base64
import binascii
import difflib
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from PIL import Image, UnidentifiedImageError

from cigpose.config import ServingConfig
from cigpose.deploy.predictor import check_boxes, read_image
from cigpose.files.errors import shown

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
"""Of pictures. Their size is read from the header by Pillow, their pixels by OpenCV."""
COLUMNS = ("image", "boxes")
BODIES = ("dataframe_records", "dataframe_split")
"""Keys of a request's JSON that hold rows."""

_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_OPENING, _CLOSING = [ord(letter) for letter in "[{"], [ord(letter) for letter in "]}"]
_BYTES_A_BOX = 256  # of JSON: five numbers of up to 25 digits, and some room
_SENTENCE_END = "Send less at once, or set another limit (registry.serving; model_config where a model is loaded)."


class RequestError(ValueError):
    """A request that is not answered: one sentence for whoever sent it."""


@dataclass(frozen=True)
class Row:
    """A picture of a request, with boxes that are numbers."""

    number: int
    content: bytes
    megapixels: float
    """By its header."""
    boxes: list[list[float]] | None

    def read(self) -> np.ndarray:
        """Its pixels, uint8 (H, W, 3) BGR, in which its boxes lie.

        Raises:
            RequestError: it cannot be decoded, or the boxes are not of it.
        """
        try:
            pixels = read_image(self.content)
            check_boxes(self.boxes, (pixels.shape[1], pixels.shape[0]))
        except ValueError as err:
            raise RequestError(f"row {self.number}: {err}") from err
        return pixels


def refuse_body(body: bytes, limits: ServingConfig) -> None:
    """See that a request's JSON is shallow, no larger than its pictures make it, and holds rows.

    Raises:
        RequestError: it is not so.
    """
    skeleton = np.frombuffer(_STRING.sub(b"", body), np.uint8)
    most = 4096 + 64 * limits.max_pictures + _BYTES_A_BOX * limits.max_boxes
    if len(skeleton) > most:
        raise RequestError(
            f"request: {len(skeleton)} bytes of JSON beside its texts, allowed are {most}. {_SENTENCE_END}"
        )
    steps = np.isin(skeleton, _OPENING).astype(np.int64) - np.isin(skeleton, _CLOSING)
    depth = int(steps.cumsum().max(initial=0))
    if depth > limits.max_json_depth:
        raise RequestError(f"request: JSON in {depth} levels, allowed are {limits.max_json_depth}. {_SENTENCE_END}")
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as err:
        raise RequestError(f"request: not valid JSON ({err}).") from err
    if not isinstance(content, dict) or len(content) != 1 or next(iter(content)) not in BODIES:
        found = f"keys {', '.join(map(shown, content))}" if isinstance(content, dict) else shown(content)
        raise RequestError(f"request: expected one key, {' or '.join(BODIES)}, got {found}; see the model card.")


def read_rows(columns: Mapping[str, Sequence[Any]], limits: ServingConfig) -> list[Row]:
    """Rows of a request, none of them decoded yet.

    Args:
        columns: equally many values each, by name.
        limits: what may be asked for at once.

    Raises:
        RequestError: an unknown column, too many pictures, persons or pixels, or a value of another kind.
    """
    for name in columns:
        if name not in COLUMNS:
            near = difflib.get_close_matches(str(name), COLUMNS, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known are {' and '.join(COLUMNS)}."
            raise RequestError(f"column {shown(name)}: unknown. {hint}")
    if "image" not in columns:
        raise RequestError("column 'image': missing. It holds the bytes of a picture file, in JSON as base64.")
    images = list(columns["image"])
    if len(images) > limits.max_pictures:
        raise RequestError(f"request: {len(images)} pictures, allowed are {limits.max_pictures}. {_SENTENCE_END}")
    texts = columns.get("boxes", [None] * len(images))
    boxes = [read_boxes(text, f"row {row}: boxes", limits.max_boxes) for row, text in enumerate(texts)]
    people = sum(1 if some is None else len(some) for some in boxes)
    if people > limits.max_boxes:
        raise RequestError(f"request: {people} boxes, allowed are {limits.max_boxes}. {_SENTENCE_END}")
    rows = []
    for number, (image, some) in enumerate(zip(images, boxes, strict=True)):
        content = _content(image, f"row {number}: image")
        megapixels = read_size(content, f"row {number}: image", limits.max_megapixels)
        rows.append(Row(number, content, megapixels, some))
    return rows


def grouped(rows: Iterable[Row], max_megapixels: float) -> Iterator[list[Row]]:
    """Rows whose pictures may be in memory together: as many pixels as the largest that is allowed."""
    group: list[Row] = []
    for row in rows:
        if group and sum(one.megapixels for one in group) + row.megapixels > max_megapixels:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def read_boxes(value: Any, where: str, most: int) -> list[list[float]] | None:
    """Boxes of a row as lists of four or five numbers; None where it has none.

    Args:
        value: lists, arrays, JSON text of them; nothing, empty text and NaN (pandas' nothing) are no boxes.
        where: place, for messages.
        most: how many are allowed.

    Raises:
        RequestError: they are something else.
    """
    if (
        value is None
        or (isinstance(value, str) and not value.strip())
        or (isinstance(value, float) and math.isnan(value))
    ):
        return None
    if isinstance(value, str):
        if len(value) > _BYTES_A_BOX * (most + 1):
            raise RequestError(f"{where}: {len(value)} letters, more than {most} boxes need. {_SENTENCE_END}")
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError as err:
            raise RequestError(f"{where}: {shown(value)} is not JSON; expected [[x0, y0, x1, y1], ...].") from err
    value = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(value, list | tuple):
        raise RequestError(f"{where}: {shown(value)} is no list; expected [[x0, y0, x1, y1], ...].")
    if len(value) > most:
        raise RequestError(f"{where}: {len(value)} of them, allowed are {most} in a request. {_SENTENCE_END}")
    return [_box(box, f"{where}: {number}") for number, box in enumerate(value)]


def _box(value: Any, where: str) -> list[float]:
    value = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(value, list | tuple) or len(value) not in (4, 5) or not all(map(_is_number, value)):
        raise RequestError(f"{where}: {shown(value)} is no box; expected [x0, y0, x1, y1], or a score after them.")
    box = [float(number) for number in value]
    if len(box) == 5 and not 0 <= box[4] <= 1:
        raise RequestError(f"{where}: its score is {shown(value[4])}; expected a number between 0 and 1.")
    return box


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e308


def _content(value: Any, where: str) -> bytes:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if not isinstance(value, str):
        raise RequestError(f"{where}: {shown(value)} is no picture; expected the bytes of a file, or their base64.")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as err:
        raise RequestError(f"{where}: {shown(value)} is not base64 ({err}).") from err


def read_size(content: bytes, where: str, max_megapixels: float) -> float:
    """Megapixels of a picture by its header.

    Args:
        content: the bytes of its file.
        where: its place, for messages.
        max_megapixels: what one can afford to decode.

    Raises:
        RequestError: it has more, or is no picture.
    """
    expected = f"allowed are {max_megapixels:g} million. Make it smaller."
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            width, height = picture.size
    except Image.DecompressionBombError as err:
        raise RequestError(f"{where}: more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels, {expected}") from err
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, OverflowError) as err:
        raise RequestError(f"{where}: these {len(content)} bytes are no picture; give {', '.join(FORMATS)}.") from err
    if width * height > max_megapixels * 1e6:
        raise RequestError(f"{where}: {width} x {height} pixels, {expected}")
    return width * height / 1e6
