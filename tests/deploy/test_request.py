from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from typing import Any

import cv2
import numpy as np
import pytest

from cigpose.config import ServingConfig
from cigpose.deploy.request import RequestError, grouped, read_rows, refuse_body

LIMITS = ServingConfig(max_pictures=3, max_boxes=5, max_megapixels=1.0, max_json_depth=6)
BOX = [10.0, 20.0, 200.0, 220.0]
PICTURE = cv2.imencode(".png", np.full((240, 320, 3), 90, np.uint8))[1].tobytes()


def png_of_zeros(width: int, height: int) -> bytes:
    """A PNG whose pixels take a thousandth of their size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer, packed = zlib.compressobj(9), io.BytesIO()
    for _ in range(height):
        packed.write(packer.compress(bytes(3 * width + 1)))
    packed.write(packer.flush())
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed.getvalue()) + chunk(b"IEND", b"")


def webp_of_zeros(width: int, height: int) -> bytes:
    return cv2.imencode(".webp", np.zeros((height, width, 3), np.uint8))[1].tobytes()


@pytest.mark.parametrize(
    ("boxes", "expected"),
    [
        (None, None),
        ("", None),
        (float("nan"), None),
        ("[[1, 2, 3, 4]]", [[1, 2, 3, 4]]),
        ([[1, 2, 3, 4, 0.5]], [[1, 2, 3, 4, 0.5]]),
        (np.array([[1.0, 2, 3, 4]]), [[1, 2, 3, 4]]),
        ([], []),
    ],
    ids=["none", "empty", "NaN", "text", "lists", "array", "nobody"],
)
def test_boxes_of_a_row(boxes: Any, expected: Any) -> None:
    [row] = read_rows({"image": [PICTURE], "boxes": [boxes]}, LIMITS)
    assert row.boxes == expected


def test_a_picture_is_bytes_or_base64() -> None:
    rows = read_rows({"image": [PICTURE, base64.b64encode(PICTURE).decode()]}, LIMITS)
    assert [row.content for row in rows] == [PICTURE, PICTURE]
    assert rows[0].read().shape == (240, 320, 3)


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"image": [PICTURE], "boxs": ["[]"]}, r"column 'boxs': unknown\. Did you mean 'boxes'\?"),
        ({"image": [PICTURE], "people": ["[]"]}, r"column 'people': unknown\. Known are image and boxes\."),
        ({"boxes": ["[]"]}, r"column 'image': missing"),
        ({"image": [PICTURE] * 4}, r"4 pictures, allowed are 3"),
        ({"image": [PICTURE], "boxes": [[BOX] * 6]}, r"row 0: boxes: 6 of them, allowed are 5"),
        (
            {"image": [PICTURE], "boxes": [json.dumps([BOX] * 500)]},
            r"boxes: \d+ letters, more than 5 boxes need",
        ),
        ({"image": [PICTURE] * 2, "boxes": [[BOX] * 3] * 2}, r"6 boxes, allowed are 5"),
        ({"image": [PICTURE], "boxes": ["1, 2, 3"]}, r"row 0: boxes: '1, 2, 3' is not JSON; expected"),
        ({"image": [PICTURE], "boxes": ["[[NaN, 2, 3, 4]]"]}, r"is not JSON"),
        ({"image": [PICTURE], "boxes": ["[" * 1200]}, r"is not JSON"),
        ({"image": [PICTURE], "boxes": [[[BOX]]]}, r"row 0: boxes: 0: .* is no box"),
        ({"image": [PICTURE], "boxes": [BOX]}, r"row 0: boxes: 0: 10\.0 is no box"),
        ({"image": [PICTURE], "boxes": [[["1", 2, 3, 4]]]}, r"is no box"),
        ({"image": [PICTURE], "boxes": [[[1, 2, 3, 10**400]]]}, r"is no box"),
        ({"image": [PICTURE], "boxes": [{"x": 1}]}, r"is no list"),
        ({"image": [PICTURE], "boxes": [[[*BOX, 1e300]]]}, r"its score is 1e\+300; expected a number between 0 and 1"),
        ({"image": [7]}, r"row 0: image: 7 is no picture"),
        ({"image": ["no base64"]}, r"row 0: image: 'no base64' is not base64"),
        ({"image": [b"no picture"]}, r"row 0: image: these 10 bytes are no picture; give JPEG, PNG, WEBP, BMP"),
        ({"image": [b""]}, r"these 0 bytes are no picture"),
        ({"image": [PICTURE[:20]]}, r"are no picture"),
        ({"image": [png_of_zeros(1200, 900)]}, r"image: 1200 x 900 pixels, allowed are 1 million"),
        ({"image": [webp_of_zeros(1200, 900)]}, r"1200 x 900 pixels"),
    ],
)
def test_rows_that_are_refused_before_a_pixel_is_decoded(
    columns: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(RequestError, match=sentence) as caught:
        read_rows(columns, LIMITS)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("box", "sentence"),
    [
        ([0, 0, 1e300, 1e300], r"row 0: boxes: .* is beside the picture"),
        ([5, 5, 5, 9], r"row 0: boxes: .* is not a box"),
        ([float("nan"), 0, 5, 5], r"is no box|is not a box"),
    ],
)
def test_boxes_that_are_not_of_the_picture_are_refused_with_their_row(box: list[float], sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        [row.read() for row in read_rows({"image": [PICTURE], "boxes": [[box]]}, LIMITS)]


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"[" * 10_000, r"10000 bytes of JSON|10000 levels, allowed are 6"),
        (b'{"dataframe_records": ' + b"[" * 7 + b"]" * 7 + b"}", r"JSON in 8 levels, allowed are 6"),
        (b"[0," * 20_000, r"60000 bytes of JSON beside its texts"),
        (b'{"dataframe_records": [', r"not valid JSON"),
        (b'{"dataframe_records": [{"image": NaN}]}', r"not valid JSON"),
        (b'{"inputs": []}', r"expected one key, dataframe_records or dataframe_split, got keys 'inputs'"),
        (b"[1]", r"expected one key, .* got \[1\]"),
    ],
)
def test_bodies_that_are_refused(body: bytes, sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        refuse_body(body, LIMITS)


def test_brackets_and_quotes_within_texts_are_no_levels() -> None:
    text = base64.b64encode(bytes(3000)).decode() + '[[[[[[[[[ \\" {{{{'
    refuse_body(json.dumps({"dataframe_records": [{"image": text, "boxes": "[[1, 2, 3, 4]]"}]}).encode(), LIMITS)


def test_pictures_are_in_memory_together_up_to_the_size_of_one() -> None:
    rows = read_rows({"image": [png_of_zeros(900, 900), PICTURE, PICTURE]}, LIMITS)
    assert [[row.number for row in group] for group in grouped(rows, LIMITS.max_megapixels)] == [[0, 1, 2]]
    assert [[row.number for row in group] for group in grouped(rows, 0.82)] == [[0], [1, 2]]
    assert list(grouped([], 1.0)) == []
