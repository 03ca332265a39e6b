"""The original's colours, blurs and dropout for whole batches, on the training's device, as loader processes drew them.

B crops of H x W, N of them to be changed by a step. What was drawn (`pixels.PixelDraw`) is on the host, which so knows
which crops each step has: nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cigpose.config import AugmentationConfig
from cigpose.loader.pixels import BLUR, GAINS, HOLE, IS_DRAWN, MEDIAN_BLUR

MOST_PIXELS = 3_500_000
"""That a step takes at a time: its memory is half a gigabyte at most."""
_TURNS = 5
"""Of hues that are looked up: gains are 255 at most, and a turn is 180."""
_SHIFT = 12
"""Bits behind the point in OpenCV's tables of 8-bit HSV."""

Step = Callable[[Tensor, Tensor], Tensor]
"""Crops (N, H, W, 3) uint8 and what was drawn for them (N, NUM_DRAWN) -> changed crops."""


def is_on_device(augmentation: AugmentationConfig, device: torch.device) -> bool:
    """Whether a training changes pixels on its device.

    Raises:
        ValueError: a GPU is asked for, and the training has none.
    """
    if augmentation.device == "gpu" and device.type != "cuda":
        raise ValueError(
            f"augmentation.device is gpu, but this training runs on a {device.type}. Write cpu, or auto, which takes "
            "the GPU where there is one."
        )
    return augmentation.device != "cpu" and device.type == "cuda"


def change_pixels(crops: Tensor, drawn: Tensor) -> None:
    """Make of crops, in place, what `pixels.PixelAugmentation` makes of them by the same draws, within one grey level.

    Args:
        crops: (B, H, W, 3) uint8 RGB, on any device.
        drawn: (B, NUM_DRAWN) int16, on the host; crops with rows of zeros stay as they are.
    """
    values = drawn.numpy()
    steps: list[tuple[Step, np.ndarray]] = [(_change_colours, np.flatnonzero(values[:, IS_DRAWN]))]
    for blur, column in ((_box_blur, BLUR), (_median_blur, MEDIAN_BLUR)):
        sizes = np.unique(values[:, column]).tolist()
        steps += [(partial(blur, size), np.flatnonzero(values[:, column] == size)) for size in sizes if size]
    steps.append((_drop, np.flatnonzero(values[:, HOLE].any(axis=1))))
    chosen = [rows for _, rows in steps]
    moved = _moved(np.concatenate([values.ravel(), *chosen]), crops.device)  # all in one copy
    lengths = [values.size, *map(len, chosen)]
    there, *rows = torch.split(moved, lengths)
    there = there.view(values.shape)
    most = max(MOST_PIXELS // (crops.shape[1] * crops.shape[2]), 1)
    for (step, _), mine in zip(steps, rows, strict=True):
        for part in mine.split(most):  # type: ignore[no-untyped-call]
            if len(part):
                changed = step(crops.index_select(0, part), there.index_select(0, part))
                crops.index_copy_(0, part, changed)


def _moved(values: np.ndarray, device: torch.device) -> Tensor:
    """Values on a device, for which nobody waits."""
    tensor = torch.from_numpy(values)
    return (tensor.pin_memory() if torch.cuda.is_available() else tensor).to(device, non_blocking=True)


@lru_cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What OpenCV looks up: 255 / i and 30 / i in fixed point, and the share of a colour that a hue takes from R, G, B.

    The last, (hues, 3), repeats itself: gains lead hues below 0 and beyond 180, and 0 is at `_TURNS` // 2 turns.
    """
    numbers = np.arange(1, 256)
    divisions = [np.concatenate([[0], np.rint((top << _SHIFT) / numbers)]).astype(np.int32) for top in (255, 30)]
    sixths = np.arange(180, dtype=np.float32) * np.float32(1 / 30)
    up = sixths - np.floor(sixths)
    down, one, none = 1 - up, np.ones_like(up), np.zeros_like(up)
    sides = [(none, down, one), (up, none, one), (one, none, down), (one, up, none), (down, one, none), (none, one, up)]
    taken = np.choose(sixths.astype(int)[:, None], [np.stack(channels, axis=1) for channels in sides])
    return _moved(divisions[0], device), _moved(divisions[1], device), _moved(np.tile(taken, (_TURNS, 1)), device)


def _change_colours(crops: Tensor, drawn: Tensor) -> Tensor:
    """As `pixels.change_hsv`. Hues are OpenCV's to the last bit: the next one is up to nine grey levels away."""
    of_saturation, of_hue, taken = _tables(crops.device)
    gains = drawn[:, GAINS].int()[:, :, None, None]
    half = 1 << (_SHIFT - 1)
    red, green, blue = crops.int().unbind(-1)
    value = torch.maximum(torch.maximum(red, green), blue)
    range_ = value - torch.minimum(torch.minimum(red, green), blue)
    saturation = (range_ * of_saturation[value] + half) >> _SHIFT
    hue = torch.where(value == green, blue - red + 2 * range_, red - green + 4 * range_)
    hue = torch.where(value == red, green - blue, hue)
    hue = (hue * of_hue[range_] + half) >> _SHIFT
    shares = taken[hue + (gains[:, 0] + _TURNS // 2 * 180)]
    saturation = (saturation + gains[:, 1]).clamp_(0, 255) * (1 / 255)
    value = (value + gains[:, 2]).clamp_(0, 255) * (1 / 255)
    return shares.mul_(-saturation[..., None]).add_(1).mul_(value[..., None]).mul_(255).to(torch.uint8)


def _box_blur(size: int, crops: Tensor, _drawn: Tensor) -> Tensor:
    """As `cv2.blur`."""
    planes = functional.pad(crops.movedim(-1, 1).float(), (size // 2,) * 4, mode="reflect")
    sums = functional.avg_pool2d(planes, size, stride=1, divisor_override=1)
    return sums.div_(size * size).round_().to(torch.uint8).movedim(1, -1)


def _median_blur(size: int, crops: Tensor, _drawn: Tensor) -> Tensor:
    """As `cv2.medianBlur`: the median is found bit by bit, as the largest number below or at most of its neighbours."""
    planes = functional.pad(crops.movedim(-1, 1).float(), (size // 2,) * 4, mode="replicate").to(torch.uint8)
    neighbours = planes.unfold(2, size, 1).unfold(3, size, 1)
    median = torch.zeros_like(crops.movedim(-1, 1))
    for bit in range(7, -1, -1):
        higher = median + (1 << bit)
        num_above = (neighbours >= higher[..., None, None]).sum((-2, -1), dtype=torch.int32)
        median = torch.where(2 * num_above > size * size, higher, median)
    return median.movedim(1, -1)


def _drop(crops: Tensor, drawn: Tensor) -> Tensor:
    """As `pixels.BlackDropout`."""
    height, width = crops.shape[1:3]
    x, y = (torch.arange(size, device=crops.device) for size in (width, height))
    left, top, right, bottom = drawn[:, HOLE, None].unbind(1)
    inside = ((y >= top) & (y < bottom))[:, :, None] & ((x >= left) & (x < right))[:, None, :]
    return crops.masked_fill(inside[..., None], 0)
