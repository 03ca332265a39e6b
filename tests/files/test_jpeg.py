from __future__ import annotations

import os

import cv2
import numpy as np
import pytest

from cigpose.files.errors import DataError
from cigpose.files.jpeg import check_jpeg, decode_strictly, is_jpeg, jpeg_size


def picture(*options: int) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (40, 56, 3), np.uint8)
    done, data = cv2.imencode(".jpg", noise, list(options))
    assert done
    return data.tobytes()


def with_segment(jpeg: bytes, marker: int, payload: bytes) -> bytes:
    return jpeg[:2] + bytes([0xFF, marker]) + (len(payload) + 2).to_bytes(2, "big") + payload + jpeg[2:]


def exif(orientation: int, order: str) -> bytes:
    def number(value: int, size: int) -> bytes:
        return value.to_bytes(size, "little" if order == "II" else "big")

    entries = [(0x010F, 2, 1, b"abc\0"), (0x0112, 3, 1, number(orientation, 2) + b"\0\0")]
    body = b"".join(number(tag, 2) + number(kind, 2) + number(n, 4) + value for tag, kind, n, value in entries)
    tiff = order.encode() + number(42, 2) + number(8, 4) + number(len(entries), 2) + body + number(0, 4)
    return b"Exif\0\0" + tiff


PROGRESSIVE = (cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
RESTARTS = (cv2.IMWRITE_JPEG_RST_INTERVAL, 1)


@pytest.mark.parametrize("options", [(), PROGRESSIVE, RESTARTS], ids=["baseline", "progressive", "restarts"])
def test_a_whole_picture_passes_and_tells_its_size(options: tuple[int, ...]) -> None:
    assert check_jpeg(picture(*options)) == (56, 40)
    assert check_jpeg(memoryview(bytearray(picture(*options)))) == (56, 40)


@pytest.mark.parametrize("options", [(), PROGRESSIVE, RESTARTS], ids=["baseline", "progressive", "restarts"])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.4, 0.9, 0.999])
def test_a_cut_picture_is_refused_wherever_it_is_cut(options: tuple[int, ...], share: float) -> None:
    data = with_segment(picture(*options), 0xE1, b"thumbnail " + picture())
    with pytest.raises(DataError, match=r"JPEG"):
        check_jpeg(data[: int(len(data) * share)])


def test_bytes_behind_the_end_of_the_picture_do_no_harm() -> None:
    assert check_jpeg(picture() + bytes(1000)) == (56, 40)


@pytest.mark.parametrize("options", [(), PROGRESSIVE, RESTARTS], ids=["baseline", "progressive", "restarts"])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_a_picture_cut_and_closed_with_an_end_marker_is_refused_where_it_is_decoded(
    options: tuple[int, ...], share: float, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = picture(*options)
    cut = whole[: int(len(whole) * share)] + b"\xff\xd9"
    check_jpeg(cut)
    with pytest.raises(DataError, match=r"the JPEG's picture data are not whole \(libjpeg: .*remature end"):
        decode_strictly(cut)
    image = decode_strictly(whole)
    assert image is not None and image.ndim == 3
    assert capfd.readouterr().err == ""


def test_what_others_say_while_a_picture_is_decoded_is_passed_on(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = cv2.imdecode
    monkeypatch.setattr(cv2, "imdecode", lambda *rest: os.write(2, b"a driver's warning\n") and decode(*rest))
    assert decode_strictly(picture()) is not None
    assert decode_strictly(b"no picture") is None
    assert capfd.readouterr().err == "a driver's warning\n" * 2


@pytest.mark.parametrize("order", ["II", "MM"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_is_that_of_the_decoded_picture(orientation: int, order: str) -> None:
    data = with_segment(picture(), 0xE1, exif(orientation, order))
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert check_jpeg(data) == jpeg_size(data) == (decoded.shape[1], decoded.shape[0])


def test_the_beginning_is_enough_for_the_size() -> None:
    assert jpeg_size(picture()[:700]) == (56, 40)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", r"not a JPEG: starts with b''"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), r"not a JPEG"),
        (b"\xff\xd8\xff", r"header is not complete in 3 bytes"),
        (b"\xff\xd8\xff\xe0\x00\x00" + bytes(99), r"header is damaged at byte 2"),
        (b"\xff\xd8\xff\xe0\x00\x04ab" + bytes(99), r"header is damaged at byte 8"),
        (b"\xff\xd8\xff\xd9" + bytes(99), r"header is damaged at byte 2"),
    ],
)
def test_what_is_no_picture_is_refused(data: bytes, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        check_jpeg(data)


def test_a_png_is_no_jpeg() -> None:
    assert is_jpeg(picture())
    assert not is_jpeg(cv2.imencode(".png", np.zeros((4, 4, 3), np.uint8))[1].tobytes())
