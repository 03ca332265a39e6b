"""Pictures in whatever form they come: files, bytes, arrays, tensors, Pillow's."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, Union, cast

import cv2
import numpy as np
import torch

from cigpose.files.errors import DataError
from cigpose.files.jpeg import jpeg_size

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

Image: TypeAlias = Union[str, Path, bytes, np.ndarray, torch.Tensor, "PillowImage"]
"""A file; the bytes of one; uint8 (H, W, 3) **BGR**, as OpenCV reads; a tensor (3, H, W) **RGB**, as torchvision reads,
uint8 or floats from 0 to 1; or a picture of Pillow, whose mode says what it is."""

MAX_MEGAPIXELS = 200
"""Larger JPEGs and PNGs are refused before they are decoded (no camera gives them; 1 MB of PNG may unpack to 6 GB).
OpenCV itself refuses any format from 1,074 megapixels on."""


def read_image(image: object) -> np.ndarray:
    """Pixels of a picture; a file is turned as its EXIF says: uint8 (H, W, 3) BGR.

    Args:
        image: see `Image`. Arrays are given back as they are.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no picture OpenCV can decode, too large (`MAX_MEGAPIXELS`), or an array of another kind.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(f"picture: expected a uint8 (H, W, 3) BGR array, got {image.dtype} {image.shape}.")
        return image
    if isinstance(image, torch.Tensor):
        return _from_tensor(image)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _decode(bytes(image), "picture")
    if isinstance(image, (str, os.PathLike)):
        name = os.fsencode(image).decode("utf-8", "backslashreplace")
        if not Path(image).is_file():
            raise FileNotFoundError(f"{name}: no such picture.")
        return _decode(Path(image).read_bytes(), name)
    if hasattr(image, "convert") and hasattr(image, "getexif"):  # Pillow's, without importing it
        from PIL import ImageOps

        turned = ImageOps.exif_transpose(cast("PillowImage", image))
        return np.ascontiguousarray(np.asarray(turned.convert("RGB"))[..., ::-1])
    raise ValueError(
        f"picture: {type(image).__name__} is none; expected a path, the bytes of a file, a uint8 (H, W, 3) BGR array, "
        "an RGB tensor (3, H, W) or a picture of Pillow."
    )


def _from_tensor(image: torch.Tensor) -> np.ndarray:
    if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"picture: expected an RGB tensor (3, H, W), got {tuple(image.shape)}.")
    pixels = image.detach().cpu()
    if pixels.is_floating_point():
        low, high = (float(value) for value in pixels.aminmax())
        if not (low >= 0 and high <= 1):  # NaN too
            raise ValueError(f"picture: expected floats from 0 to 1, got {low:g} to {high:g}. Give uint8 or divide.")
        pixels = (pixels.float() * 255).round().to(torch.uint8)
    if pixels.dtype != torch.uint8:
        raise ValueError(f"picture: expected a tensor of uint8 or floats from 0 to 1, got {image.dtype}.")
    return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()[..., ::-1])


def _decode(content: bytes, name: str) -> np.ndarray:
    width, height = _declared_size(content)
    if width * height > MAX_MEGAPIXELS * 1e6:
        raise ValueError(f"{name}: {width} x {height} pixels, allowed are {MAX_MEGAPIXELS} million. Make it smaller.")
    try:
        pixels = cv2.imdecode(np.frombuffer(content, dtype=np.uint8), cv2.IMREAD_COLOR) if content else None
    except cv2.error as err:  # more pixels than OpenCV takes
        raise ValueError(f"{name}: OpenCV refuses to decode it ({err.err}). Give a smaller picture.") from err
    if pixels is None:
        raise ValueError(f"{name}: OpenCV cannot decode these {len(content)} bytes. Give a JPEG, PNG, WebP or BMP.")
    return pixels


def _declared_size(content: bytes) -> tuple[int, int]:
    """(width, height) that a JPEG or PNG says it has; (0, 0) if it says nothing, or is of another format."""
    if content.startswith(b"\x89PNG\r\n\x1a\n") and len(content) >= 24:
        return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")
    with contextlib.suppress(DataError):
        return jpeg_size(content)
    return 0, 0
