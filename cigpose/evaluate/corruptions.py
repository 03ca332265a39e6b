"""What happens to a picture while the person in it stays the same, in five severities.

What happens to a crop is a function of the corruption's name, its severity and the person's key alone, so that two
models see the same. Corruptions are made to crops, whose boxes stay as they are; a shifted crop is cut out anew
(`cigpose.loader.batches.eval_loader`), so that it shows what lies beside the box.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import cv2
import numpy as np
import torch

SEVERITIES = (1, 2, 3, 4, 5)
SHIFT_SHARES = (0.03, 0.06, 0.1, 0.15, 0.2)
"""Of the box's width and height by which a crop is shifted, by severity."""

_BLUR_WIDTHS = (192, 96, 64, 40, 24)  # of the crop in sigmas
_JPEG_QUALITIES = (30, 15, 8, 5, 3)
_LIGHT_SHARES = (0.6, 0.4, 0.25, 0.12, 0.06)
_NOISE_LEVELS = (8, 16, 30, 45, 65)  # of 256
_COVERED_SHARES = (0.03, 0.06, 0.1, 0.2, 0.3)
_PIECES = (2, 4, 6, 9, 12)
_PIECE_SHARE = 0.03

Corruption = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]
"""(H, W, 3) uint8 RGB crop, severity from 1 and its own generator -> the same shape."""


def blur(crop: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Gaussian blur; at severity 3 of sigma 3 where the crop is 192 pixels wide."""
    return cv2.GaussianBlur(crop, (0, 0), crop.shape[1] / _BLUR_WIDTHS[severity - 1])


def jpeg(crop: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """JPEG of quality 30 to 3."""
    quality = [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITIES[severity - 1]]
    decoded = cv2.imdecode(cv2.imencode(".jpg", crop[..., ::-1], quality)[1], cv2.IMREAD_COLOR)
    assert decoded is not None
    return decoded[..., ::-1]


def low_light(crop: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Little light, with the shot noise of so few photons and 8-bit steps."""
    dark = crop.astype(np.float32) * _LIGHT_SHARES[severity - 1]
    return _bytes(dark + rng.standard_normal(crop.shape, dtype=np.float32) * np.sqrt(dark + 1))


def noise(crop: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise of 8 to 65 grey levels."""
    level = _NOISE_LEVELS[severity - 1]
    return _bytes(crop.astype(np.float32) + rng.standard_normal(crop.shape, dtype=np.float32) * level)


def occlusion(crop: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """A rectangle of coarse noise before 3 to 30 percent of the crop, anywhere."""
    top, left, height, width = _place(crop, _COVERED_SHARES[severity - 1], rng)
    coarse = rng.integers(0, 256, (-(-height // 4), -(-width // 4), 3), dtype=np.uint8)
    covered = crop.copy()
    covered[top : top + height, left : left + width] = coarse.repeat(4, axis=0).repeat(4, axis=1)[:height, :width]
    return covered


def clutter(crop: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """2 to 12 pieces of the same crop, turned upside down, pasted elsewhere: limbs and edges where none belong."""
    pasted = crop.copy()
    for _ in range(_PIECES[severity - 1]):
        top, left, height, width = _place(crop, _PIECE_SHARE, rng)
        y, x = int(rng.integers(0, crop.shape[0] - height + 1)), int(rng.integers(0, crop.shape[1] - width + 1))
        pasted[top : top + height, left : left + width] = crop[y : y + height, x : x + width][::-1, ::-1]
    return pasted


CORRUPTIONS: dict[str, Corruption] = {
    "occlusion": occlusion,
    "clutter": clutter,
    "low_light": low_light,
    "blur": blur,
    "noise": noise,
    "jpeg": jpeg,
}
"""Those of crops; `crop_shift` is beside them."""


def corrupted(batch: Mapping[str, Any], name: str, severity: int) -> dict[str, Any]:
    """An evaluation batch with a corruption made to every crop.

    Args:
        batch: as `eval_loader` gives it.
        name: one of `CORRUPTIONS`.
        severity: 1 to 5.
    """
    changed = [
        CORRUPTIONS[name](crop, severity, np.random.default_rng(zlib.crc32(f"{name}/{severity}/{key}".encode())))
        for crop, key in zip(np.asarray(batch["crops"]), batch["keys"], strict=True)
    ]
    return {**batch, "crops": torch.from_numpy(np.stack(changed))}


def _place(crop: np.ndarray, share: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a rectangle over a share of the crop."""
    height, width = crop.shape[:2]
    aspect = rng.uniform(0.6, 1.6)
    h = min(height, max(1, round((share * height * width * aspect) ** 0.5)))
    w = min(width, max(1, round((share * height * width / aspect) ** 0.5)))
    return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
