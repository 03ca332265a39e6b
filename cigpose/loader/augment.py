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
from cigpose.keypoints import KeypointSet

MIN_VISIBLE_FOR_HALF_BODY = 9
"""With fewer visible keypoints the half-body step leaves a person alone."""
PREFER_UPPER_BODY = 0.7
HALF_BODY_PADDING = 1.5
BLUR_SIZES = (3, 7)
"""Smallest and largest (odd) kernel of both blurs."""

_FRACTION_BITS = 5
_FRACTION_MASK = (1 << _FRACTION_BITS) - 1
_MATRIX_BITS = 10
_INT16 = np.iinfo(np.int16)
_NORMAL = NormalDist()
_NORMAL_CUT = _NORMAL.cdf(-1.0)


@dataclass(frozen=True, slots=True)
class Person:
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


def box_to_center_scale(bbox_xyxy: np.ndarray, padding: float) -> tuple[np.ndarray, np.ndarray]:
    """Center and padded size of boxes.

    Args:
        bbox_xyxy: (..., 4) in image pixels.
        padding: crop size over box size.

    Returns: center and scale, both (..., 2) float32.
    """
    box = np.asarray(bbox_xyxy, dtype=np.float32)
    return (box[..., :2] + box[..., 2:]) * np.float32(0.5), (box[..., 2:] - box[..., :2]) * np.float32(padding)


def fix_aspect_ratio(scale: np.ndarray, input_size: tuple[int, int]) -> np.ndarray:
    """Boxes enlarged to the aspect ratio of the crop.

    Args:
        scale: (..., 2) width and height.
        input_size: (width, height) of the crop.

    Returns: (..., 2), dtype of `scale`.
    """
    aspect = input_size[0] / input_size[1]
    width, height = scale[..., 0], scale[..., 1]
    wide = width > height * aspect
    return np.stack([np.where(wide, width, height * aspect), np.where(wide, width / aspect, height)], axis=-1)


def crop_matrix(
    center: np.ndarray, scale: np.ndarray | tuple[float], rotation: float, input_size: tuple[int, int] | np.ndarray
) -> np.ndarray:
    """Affine map from image to crop pixels.

    The middle of the box goes to (width / 2, height / 2) and the middle of its left edge to (0, height / 2); the map is
    a similarity. The points are rounded to float32 first, as the original does.

    Args:
        center: (2,) in image pixels.
        scale: (2,) width and height in image pixels, of the crop's aspect ratio. The height is not looked at.
        rotation: degrees; the left edge's middle lies at center + R (-width / 2, 0), R = [[cos, -sin], [sin, cos]].
        input_size: (width, height) of the crop.

    Returns: (2, 3) float64.
    """
    angle = np.deg2rad(rotation)
    half_width = 0.5 * float(scale[0])
    x, y = float(center[0]), float(center[1])
    source = np.array(
        [[x, y], [x - np.cos(angle) * half_width, y - np.sin(angle) * half_width], [0, 0]], dtype=np.float32
    )
    width, height = float(input_size[0]), float(input_size[1])
    target = np.array([[width * 0.5, height * 0.5], [0, height * 0.5], [0, 0]], dtype=np.float32)
    for points in (source, target):  # third point: a right angle at the second
        along = points[0] - points[1]
        points[2, 0], points[2, 1] = points[1, 0] - along[1], points[1, 1] + along[0]
    return cv2.getAffineTransform(source, target)


def transform_points(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (..., 2) through an affine matrix (2, 3)."""
    return points @ matrix[:, :2].T + matrix[:, 2]


def crop_to_image(
    keypoints: np.ndarray, center: np.ndarray, scale: np.ndarray, input_size: tuple[int, int]
) -> np.ndarray:
    """Keypoints of unrotated crops, back in image pixels.

    Args:
        keypoints: (N, K, 2) in crop pixels, or (K, 2) of one person.
        center: (N, 2) or (2,), of the crop in image pixels.
        scale: (N, 2) or (2,), width and height of the crop in image pixels after the aspect fix.
        input_size: (width, height) of the crop.

    Returns: the shape of `keypoints`, keypoints / input_size * scale + center - scale / 2.
    """
    center, scale = np.asarray(center)[..., None, :], np.asarray(scale)[..., None, :]
    return keypoints / np.asarray(input_size, dtype=keypoints.dtype) * scale + center - 0.5 * scale


# Draws and what they do to a person


def flip(person: Person, flip_index: np.ndarray) -> Person:
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


def half_body(person: Person, prefer_upper: bool, keypoint_set: KeypointSet) -> Person:
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


def change_box(person: Person, offset: np.ndarray, scale: float, rotation: float) -> Person:
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
    person: Person, rng: np.random.Generator, stage: AugmentationStage, keypoint_set: KeypointSet
) -> Person:
    """`flip` with the stage's probability."""
    return flip(person, keypoint_set.flip_index) if rng.random() < stage.flip_prob else person


def random_half_body(
    person: Person, rng: np.random.Generator, stage: AugmentationStage, keypoint_set: KeypointSet
) -> Person:
    """`half_body` with the stage's probability, for a person with enough visible keypoints."""
    apply, prefer_upper = rng.random(2) < (stage.half_body_prob, PREFER_UPPER_BODY)
    if not apply or np.count_nonzero(person.visible) < MIN_VISIBLE_FOR_HALF_BODY:
        return person
    return half_body(person, bool(prefer_upper), keypoint_set)


def random_box(person: Person, rng: np.random.Generator, stage: AugmentationStage) -> Person:
    """`change_box` with drawn values."""
    return change_box(person, *draw_box_change(rng, stage))


def augment_person(
    person: Person, rng: np.random.Generator, stage: AugmentationStage, keypoint_set: KeypointSet
) -> Person:
    """Flip, half body and random box, in the original's order."""
    person = random_flip(person, rng, stage, keypoint_set)
    person = random_half_body(person, rng, stage, keypoint_set)
    return random_box(person, rng, stage)


# Pixels


def person_matrix(person: Person, input_size: tuple[int, int]) -> np.ndarray:
    """(2, 3) float64, from image pixels (mirrored if the person is) to crop pixels."""
    width = max(person.scale[0], person.scale[1] * (input_size[0] / input_size[1]))  # as `fix_aspect_ratio`
    return crop_matrix(person.center, (width,), person.rotation, input_size)


def crop_image(
    image: np.ndarray,
    matrix: np.ndarray,
    input_size: tuple[int, int],
    mirrored: bool = False,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Bilinear crop with black outside the picture.

    Positions are rounded to 1/32 pixel in integer arithmetic, as `cv2.warpAffine` did up to OpenCV 4.10 (newer ones do
    not round, and differ by up to 4 grey levels from the crops the published models were trained on). That also makes
    the crop of a mirrored picture exact without mirroring it: the integer positions are mirrored.

    Args:
        image: (H, W, C) uint8, never mirrored.
        matrix: (2, 3), from image pixels to crop pixels; from pixels of the mirrored image if `mirrored`.
        input_size: (width, height) of the crop.
        mirrored: cut from the mirrored picture.
        out: (height, width, C) uint8 to write into, by choice.

    Returns: (height, width, C) uint8.
    """
    whole, fraction = _source_positions(matrix, input_size, image.shape[1] if mirrored else None)
    return cv2.remap(image, whole, fraction, cv2.INTER_LINEAR, dst=out, borderMode=cv2.BORDER_CONSTANT)


def _source_positions(
    matrix: np.ndarray, input_size: tuple[int, int], mirror_width: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Where each crop pixel is read, as `cv2.remap` wants it.

    Returns: whole pixels (height, width, 2) int16, and (height, width) uint16 with the 1/32 pixels of x in the low five
        bits and of y in the next five.
    """
    width, height = input_size
    inverse = cv2.invertAffineTransform(matrix) * (1 << _MATRIX_BITS)
    along = np.rint(inverse[:, :1] * np.arange(width)).astype(np.int32)
    start = np.rint(inverse[:, 1:2] * np.arange(height) + inverse[:, 2:]).astype(np.int32)
    start += 1 << (_MATRIX_BITS - _FRACTION_BITS - 1)
    position = (
        start[:, :, None] + along[:, None, :]
    )  # (2, height, width) 1/1024 pixels; the last five bits do not count
    if mirror_width is not None:
        np.bitwise_and(position[0], -(1 << (_MATRIX_BITS - _FRACTION_BITS)), out=position[0])
        np.subtract((mirror_width - 1) << _MATRIX_BITS, position[0], out=position[0])
    corners = position[:, [0, 0, -1, -1], [0, -1, 0, -1]] >> _MATRIX_BITS
    if corners.min() < _INT16.min or corners.max() > _INT16.max:
        np.clip(position, _INT16.min << _MATRIX_BITS, _INT16.max << _MATRIX_BITS, out=position)
    fraction_x, fraction_y = position.astype(np.uint16)
    fraction_x >>= np.uint16(_MATRIX_BITS - _FRACTION_BITS)
    fraction_x &= np.uint16(_FRACTION_MASK)
    fraction_y &= np.uint16(_FRACTION_MASK << _FRACTION_BITS)
    fraction_y |= fraction_x
    position >>= _MATRIX_BITS
    whole = cv2.merge(list(position.astype(np.int16)))
    return whole, fraction_y


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
