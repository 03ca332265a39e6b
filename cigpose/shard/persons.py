"""From one annotation to one top-down training sample: the rule of which persons count.

Frames and order: boxes and keypoints in image pixels, x before y. The rule is that of MMPose's top-down datasets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from cigpose.files.errors import DataError, shown
from cigpose.keypoints import KeypointSet

CROWD = "crowd"
NO_FIELDS = "no_box_or_keypoints"
NO_KEYPOINTS = "no_body_keypoints"
EMPTY_BOX = "empty_box"
NOT_IN_PICTURE = "no_positive_coordinate"
NO_FRAME = "no_frame"
NOT_FIRST = "not_first_person"
OTHER_CATEGORY = "detection_of_other_category"
OTHER_PERSON_CATEGORY = "other_category"

PERSON_CATEGORY = 1


def person_categories(categories: Sequence[Any]) -> frozenset[int]:
    """Ids of the categories whose annotations are persons; the rule by which evaluation finds them in the ground truth.

    That is the category named person, or the only one. Several without that name are all taken: they can be trained
    on, and evaluation refuses them.

    Args:
        categories: as listed by the file; without any, the id is the one COCO gives to persons.
    """
    entries = [entry for entry in categories if isinstance(entry, Mapping) and is_id(entry.get("id"))]
    people = [entry for entry in entries if entry.get("name") == "person"] or entries
    return frozenset(entry["id"] for entry in people) or frozenset({PERSON_CATEGORY})


def is_id(value: Any) -> TypeGuard[int]:
    """Whether a value from a file can be an id: a whole number from 0 that 64 bits hold."""
    return type(value) is int and 0 <= value < 1 << 63


@dataclass(frozen=True, slots=True)
class Dropped:
    """A person who is not a training sample by the rule."""

    reason: str


def person_record(
    annotation: Mapping[str, Any], keypoints: KeypointSet, size: tuple[int, int]
) -> dict[str, Any] | Dropped:
    """A person as the shards hold it, or why the person does not count.

    The box is clipped to the picture. `area` is the annotation's; without one, 0.53 x the clipped box, at least 1.
    Visibilities stay as they are, fractions included; a keypoint is labelled when its own is above 0.

    Args:
        annotation: as parsed from COCO-like JSON.
        keypoints: K keypoints; its annotation fields are concatenated in order.
        size: (width, height) of the picture.

    Returns: `id`, `bbox_xyxy` (4), `area`, `keypoints` (K triples x, y, v).

    Raises:
        DataError: a box or keypoints that cannot be read: wrong count, not finite, not numbers.
    """
    is_crowd = annotation.get("iscrowd")
    if type(is_crowd) not in (int, bool, type(None)) or is_crowd not in (0, 1, None):
        raise DataError(f"iscrowd is {shown(is_crowd)}, expected 0 or 1")
    if is_crowd:
        return Dropped(CROWD)
    body = next(iter(keypoints.annotation_fields))
    if annotation.get("bbox") is None or annotation.get(body) is None:
        return Dropped(NO_FIELDS)
    labelled = annotation.get("num_keypoints", 1)
    if type(labelled) not in (int, float) or not _finite([labelled]) or labelled < 0:
        raise DataError(f"num_keypoints is {shown(labelled)}, expected a whole number from 0")
    if labelled == 0:
        return Dropped(NO_KEYPOINTS)
    points = _points(annotation, keypoints)
    if "num_keypoints" not in annotation and not any(v > 0 for v in annotation[body][2::3]):
        return Dropped(NO_KEYPOINTS)
    box = clipped_box(_numbers(annotation["bbox"], 4, "bbox"), size)
    width, height = box[2] - box[0], box[3] - box[1]
    if width <= 0 or height <= 0:
        return Dropped(EMPTY_BOX)
    if max(points[0::3]) <= 0 and max(points[1::3]) <= 0:
        return Dropped(NOT_IN_PICTURE)
    area = annotation.get("area")
    if area is None:
        area = max(0.53 * width * height, 1.0)
    elif type(area) not in (int, float) or not _finite([area]) or area < 0:
        raise DataError(f"area is {shown(area)}, expected a number from 0")
    values = iter(points)
    triples = list(zip(values, values, values, strict=True))
    return {"area": area, "bbox_xyxy": box, "id": annotation["id"], "keypoints": triples}


def clipped_box(bbox_xywh: Sequence[float], size: tuple[int, int]) -> list[float]:
    """x1, y1, x2, y2 of the box's corners, each clipped to the picture's first and last pixel."""
    x, y, w, h = bbox_xywh
    right, bottom = size[0] - 1, size[1] - 1
    corners = ((x, right), (y, bottom), (x + w, right), (y + h, bottom))
    return [min(max(value, 0), limit) for value, limit in corners]


def detection_record(detection: Mapping[str, Any]) -> dict[str, Any] | Dropped:
    """A detected box as the shards hold it: `bbox_xyxy` (4), not clipped, and `score`.

    Raises:
        DataError: box or score cannot be read.
    """
    if detection.get("category_id", PERSON_CATEGORY) != PERSON_CATEGORY:
        return Dropped(OTHER_CATEGORY)
    x, y, w, h = _numbers(detection.get("bbox"), 4, "bbox")
    score = _numbers([detection.get("score")], 1, "score")[0]
    if w <= 0 or h <= 0:
        return Dropped(EMPTY_BOX)
    return {"bbox_xyxy": [x, y, x + w, y + h], "score": score}


def _points(annotation: Mapping[str, Any], keypoints: KeypointSet) -> list[float]:
    points: list[float] = []
    for name, count in keypoints.annotation_fields.items():
        values = annotation.get(name)
        if values is None:
            raise DataError(
                f"{name} is missing, expected {3 * count} numbers ({count} keypoints x 3). "
                f"Does the file have the keypoints of {keypoints.name!r} (`keypoints` in params.yaml)?"
            )
        if type(values) is not list or len(values) != 3 * count:
            _numbers(values, 3 * count, name, f" ({count} keypoints x 3)")
        points += values
    if not _finite(points):
        for name, count in keypoints.annotation_fields.items():
            _numbers(annotation[name], 3 * count, name)
    return points


def _numbers(values: Any, count: int, name: str, note: str = "") -> list[float]:
    if not isinstance(values, list) or len(values) != count:
        found = f"has {len(values)} numbers" if isinstance(values, list) else f"is {shown(values)}"
        raise DataError(f"{name} {found}, expected {count}{note}")
    if not _finite(values):
        raise DataError(f"{name} holds NaN, infinite values, or something that is no number")
    return values


def _finite(values: list[Any]) -> bool:
    try:
        # The sum is finite only if every number is; one pass in C instead of a call for each.
        return math.isfinite(sum(values))
    except (TypeError, OverflowError):
        return False
