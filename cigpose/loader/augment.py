"""From a person in a picture to a training crop: the original augmentations, as pure functions.

Frames: *image* is the decoded picture, mirrored if the person says so; *crop* is the network's input. Coordinates are
(x, y) with the centre of the first pixel at (0, 0); sizes are (width, height). K keypoints.

The order is the original's: flip, half body, random box, crop, HSV, blur, median blur, dropout. The first three only
change numbers, so a crop costs one resampling: mirroring happens inside it. Every random step is a draw from an
explicit generator plus a function of the drawn values.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import albumentations
import cv2
import numpy as np

from cigpose.config import AugmentationStage
from cigpose.crop import crop_matrix
from cigpose.keypoints import KeypointSet

MIN_VISIBLE_FOR_HALF_BODY = 9
"""With fewer visible keypoints the half-body step leaves a person alone."""
PREFER_UPPER_BODY = 0.7
HALF_BODY_PADDING = 1.5
BLUR_SIZES = (3, 7)
"""Smallest and largest (odd) kernel of both blurs."""

_NORMAL = NormalDist()
_NORMAL_CUT = _NORMAL.cdf(-1.0)


@dataclass(frozen=True, slots=True)
class PersonBox:
    """One person and the box to cut out, all in image pixels."""

    keypoints: np.ndarray
    """(K, 2)."""
    visible: np.ndarray
    """(K,), 0 or 1."""
    center: np.ndarray
    """(2,), of the crop."""
    scale: np.ndarray
    """(2,), width and height of the crop, padded, before it takes the network's aspect ratio."""
    image_size: tuple[int, int]
    """(width, height)."""
    rotation: float = 0.0
    """Degrees, clockwise as seen on the screen, by which the box is turned."""
    mirrored: bool = False
    """The coordinates are those of the mirrored picture."""


# Draws and what they do to a person


def flip(person: PersonBox, flip_index: np.ndarray) -> PersonBox:
    """The person in the mirrored picture: x becomes width - 1 - x, left and right change names."""
    last = person.image_size[0] - 1
    keypoints = person.keypoints[flip_index].copy()
    keypoints[:, 0] = last - keypoints[:, 0]
    center = person.center.copy()
    center[0] = last - center[0]
    return replace(
        person,
        keypoints=keypoints,
        visible=person.visible[flip_index],
        center=center,
        rotation=-person.rotation,
        mirrored=not person.mirrored,
    )


def half_body(person: PersonBox, prefer_upper: bool, keypoint_set: KeypointSet) -> PersonBox:
    """The box of the upper or the lower half of the body, by its visible keypoints.

    The half that has too few (2 above, 3 below) gives way to the other; with both too few nothing changes. The new box
    is centred on the mean of the keypoints, 1.5 times their extent, without further padding.
    """
    upper = [i for i in keypoint_set.upper_body if person.visible[i] > 0]
    lower = [i for i in keypoint_set.lower_body if person.visible[i] > 0]
    if len(upper) < 2 and len(lower) < 3:
        return person
    if len(lower) < 3:
        chosen = upper
    elif len(upper) < 2:
        chosen = lower
    else:
        chosen = upper if prefer_upper else lower
    points = person.keypoints[chosen]
    return replace(person, center=points.mean(axis=0), scale=np.ptp(points, axis=0) * HALF_BODY_PADDING)


def change_box(person: PersonBox, offset: np.ndarray, scale: float, rotation: float) -> PersonBox:
    """The box shifted by `offset` (2,) in box sizes, resized by `scale`, turned to `rotation` degrees."""
    return replace(
        person, center=person.center + offset * person.scale, scale=person.scale * scale, rotation=float(rotation)
    )


def truncated_normal(rng: np.random.Generator, size: int) -> np.ndarray:
    """(size,) standard normal values, restricted to [-1, 1]."""
    share = _NORMAL_CUT + rng.random(size) * (1 - 2 * _NORMAL_CUT)
    return np.array([_NORMAL.inv_cdf(p) for p in share.tolist()])


def draw_box_change(rng: np.random.Generator, stage: AugmentationStage) -> tuple[np.ndarray, float, float]:
    """Offset (2,), scale and rotation for `change_box`."""
    values = truncated_normal(rng, 4)
    chances = rng.random(3)
    shifted, scaled, rotated = chances < (stage.shift_prob, stage.scale_prob, stage.rotate_prob)
    low, high = stage.scale_range
    offset = values[:2] * stage.shift_factor if shifted else np.zeros(2)
    scale = values[2] * (high - low) / 2 + (high + low) / 2 if scaled else 1.0
    return offset, float(scale), float(values[3] * stage.rotate_degrees) if rotated else 0.0


def random_flip(
    person: PersonBox, rng: np.random.Generator, stage: AugmentationStage, keypoint_set: KeypointSet
) -> PersonBox:
    """`flip` with the stage's probability."""
    return flip(person, keypoint_set.flip_index) if rng.random() < stage.flip_prob else person


def random_half_body(
    person: PersonBox, rng: np.random.Generator, stage: AugmentationStage, keypoint_set: KeypointSet
) -> PersonBox:
    """`half_body` with the stage's probability, for a person with enough visible keypoints."""
    apply, prefer_upper = rng.random(2) < (stage.half_body_prob, PREFER_UPPER_BODY)
    if not apply or np.count_nonzero(person.visible) < MIN_VISIBLE_FOR_HALF_BODY:
        return person
    return half_body(person, bool(prefer_upper), keypoint_set)


def random_box(person: PersonBox, rng: np.random.Generator, stage: AugmentationStage) -> PersonBox:
    """`change_box` with drawn values."""
    return change_box(person, *draw_box_change(rng, stage))


def augment_person(
    person: PersonBox, rng: np.random.Generator, stage: AugmentationStage, keypoint_set: KeypointSet
) -> PersonBox:
    """Flip, half body and random box, in the original's order."""
    person = random_flip(person, rng, stage, keypoint_set)
    person = random_half_body(person, rng, stage, keypoint_set)
    return random_box(person, rng, stage)


# Pixels


def person_matrix(person: PersonBox, input_size: tuple[int, int]) -> np.ndarray:
    """(2, 3) float64, from image pixels (mirrored if the person is) to crop pixels."""
    width = max(person.scale[0], person.scale[1] * (input_size[0] / input_size[1]))  # as `fix_aspect_ratio`
    return crop_matrix(person.center, (width,), person.rotation, input_size)


def draw_hsv_gains(rng: np.random.Generator, stage: AugmentationStage) -> tuple[int, int, int]:
    """Whole-number changes of hue, saturation and value; each is left out with probability 1/2."""
    draws = rng.random(6).tolist()
    hue, saturation, value = (
        int((2 * size - 1) * delta) if kept < 0.5 else 0  # int: towards zero
        for size, kept, delta in zip(draws[:3], draws[3:], stage.hsv_delta, strict=True)
    )
    return hue, saturation, value


def change_hsv(crop: np.ndarray, gains: Sequence[int]) -> np.ndarray:
    """Hue turned (of 180), saturation and value shifted and clipped (of 255), in OpenCV's 8-bit HSV.

    Args:
        crop: (H, W, 3) uint8 RGB.
        gains: changes of hue, saturation and value.

    Returns: (H, W, 3) uint8 RGB. As in the original, the way to HSV and back changes pixels slightly, gains 0 or not.
    """
    hsv = cv2.cvtColor(crop, cv2.COLOR_RGB2HSV)
    if gains[0]:
        turned = ((np.arange(256) + gains[0]) % 180).astype(np.uint8)
        cv2.insertChannel(cv2.LUT(cv2.extractChannel(hsv, 0), turned), hsv, 0)
    flat = hsv.reshape(hsv.shape[0], -1)
    more, less = ([0, *(max(0, min(255, sign * gain)) for gain in gains[1:])] for sign in (1, -1))
    if any(more):  # uint8 addition that stops at 255
        row = np.array(more * hsv.shape[1], dtype=np.uint8)
        np.minimum(flat, 255 - row, out=flat)
        flat += row
    if any(less):
        row = np.array(less * hsv.shape[1], dtype=np.uint8)
        np.maximum(flat, row, out=flat)
        flat -= row
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB, dst=hsv)


class PixelAugmentation:
    """HSV, blur, median blur and dropout of one stage; albumentations is called only when a draw says so.

    Not for several threads at once: albumentations keeps the generator of a call in the transform.
    """

    def __init__(self, stage: AugmentationStage) -> None:
        self._stage = stage
        low, high = stage.dropout_size
        hole = {"num_holes_range": (1, 1), "hole_height_range": (low, high), "hole_width_range": (low, high)}
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a name albumentations does not know is only a warning there
            blur = albumentations.Blur(blur_limit=BLUR_SIZES, p=1.0)
            median_blur = albumentations.MedianBlur(blur_limit=BLUR_SIZES, p=1.0)
            self._dropout = albumentations.CoarseDropout(**hole, fill=0, p=1.0)
        self._steps: list[tuple[float, albumentations.ImageOnlyTransform]] = [
            (stage.blur_prob, blur),
            (stage.median_blur_prob, median_blur),
            (stage.dropout_prob, self._dropout),
        ]

    def __call__(self, crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The changed crop, (H, W, 3) uint8 RGB; the argument keeps its pixels."""
        crop = change_hsv(crop, draw_hsv_gains(rng, self._stage))
        for chance, (probability, transform) in zip(rng.random(len(self._steps)).tolist(), self._steps, strict=True):
            if chance >= probability:
                continue
            transform.set_random_state(rng, random.Random(int(rng.integers(1 << 63))))
            if transform is self._dropout:
                # Its `apply` would copy the crop and build a generator to fill with black.
                holes = transform.get_params_dependent_on_data({"shape": crop.shape}, {})["holes"]
                for left, top, right, bottom in holes:
                    crop[top:bottom, left:right] = 0
            else:
                crop = transform(image=crop)["image"]
        return crop
