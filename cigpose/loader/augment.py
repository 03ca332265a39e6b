"""From a person in a picture to a training crop: the original augmentations, as pure functions.

Frames: *image* is the decoded picture, mirrored if the person says so; *crop* is the network's input. Coordinates are
(x, y) with the centre of the first pixel at (0, 0); sizes are (width, height). K keypoints.

The order is the original's: flip, half body, random box, crop, and then what `pixels` does. The first three only change
numbers, so a crop costs one resampling: mirroring happens inside it. Every random step is a draw from an explicit
generator plus a function of the drawn values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from cigpose.config import AugmentationStage
from cigpose.crop import crop_matrix
from cigpose.keypoints import KeypointSet

MIN_VISIBLE_FOR_HALF_BODY = 9
"""With fewer visible keypoints the half-body step leaves a person alone."""
PREFER_UPPER_BODY = 0.7
HALF_BODY_PADDING = 1.5

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


def person_matrix(person: PersonBox, input_size: tuple[int, int]) -> np.ndarray:
    """(2, 3) float64, from image pixels (mirrored if the person is) to crop pixels."""
    width = max(person.scale[0], person.scale[1] * (input_size[0] / input_size[1]))  # as `fix_aspect_ratio`
    return crop_matrix(person.center, (width,), person.rotation, input_size)
