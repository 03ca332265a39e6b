"""COCO-WholeBody annotations of drawn people."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from cigpose.keypoints import COCO, COCO_WHOLEBODY
from cigpose.render.figure import FACE, FOOT, LEFT_HAND, RIGHT_HAND, Labels

SMALLEST_FACE = 9.0
"""Height in pixels below which a face is not labelled."""
SMALLEST_HAND = 7.0
SMALLEST_STATURE = 60.0
"""Stature in pixels below which feet are not labelled."""

CATEGORY = {
    "id": 1,
    "name": "person",
    "supercategory": "person",
    "keypoints": list(COCO_WHOLEBODY.names[:17]),
    "skeleton": [[a + 1, b + 1] for a, b in COCO.skeleton or COCO.edges],
}

_PARTS = (("face", FACE), ("lefthand", LEFT_HAND), ("righthand", RIGHT_HAND), ("foot", FOOT))


def whole_visibility(labels: Labels, covered: np.ndarray, width: int, height: int) -> np.ndarray:
    """(133,) COCO visibility: 0 outside the picture, 1 hidden, 2 visible.

    Args:
        labels: of the person.
        covered: (133,) bool, hidden by something drawn later.
        width: of the picture.
        height: of the picture.
    """
    x, y = np.round(labels.points, 2).T
    inside = (x >= 0) & (y >= 0) & (x <= width - 1) & (y <= height - 1)
    value = np.where(labels.visible & ~covered, 2, 1)
    if labels.face_turned_away:
        value[0:3] = 0
    return np.where(inside, value, 0)


def annotate(
    labels: Labels, visibility: np.ndarray, judged: np.ndarray, silhouette: np.ndarray, stature: float
) -> dict[str, Any] | None:
    """One annotation without its ids, or None for a person who cannot be made out at all.

    Args:
        labels: of the person.
        visibility: (133,) as `whole_visibility` gives it.
        judged: the same, but without the board of `hide_arm`: what decides whether a part is labelled.
        silhouette: (H, W) bool, the person's whole outline in the picture.
        stature: pixels per stature.
    """
    rows, columns = np.flatnonzero(silhouette.any(axis=1)), np.flatnonzero(silhouette.any(axis=0))
    if len(rows) == 0 or not (visibility[:17] > 0).any() or not (visibility == 2).any():
        return None
    left, top = int(columns[0]), int(rows[0])
    right, bottom = int(columns[-1]) + 1, int(rows[-1]) + 1
    points = np.round(labels.points, 2)
    # Joints of thin parts may lie a pixel outside the outline; the box takes them in.
    low, high = points[visibility == 2].min(axis=0), points[visibility == 2].max(axis=0)
    left, top = min(left, int(low[0])), min(top, int(low[1]))
    right, bottom = max(right, int(np.ceil(high[0]))), max(bottom, int(np.ceil(high[1])))
    valid = {
        "face": not labels.face_turned_away and labels.head_size >= SMALLEST_FACE and _clear(judged[FACE], 0.2, 0.4),
        "lefthand": labels.hand_sizes[0] >= SMALLEST_HAND and _clear(judged[LEFT_HAND], 0.25, 0.6),
        "righthand": labels.hand_sizes[1] >= SMALLEST_HAND and _clear(judged[RIGHT_HAND], 0.25, 0.6),
        "foot": stature >= SMALLEST_STATURE and _clear(judged[FOOT], 0.15, 0.3),
    }
    labelled = visibility.copy()
    for part, span in _PARTS:
        if not valid[part]:
            labelled[span] = 0
    flat = _flat(points, labelled)
    result: dict[str, Any] = {
        "category_id": 1,
        "iscrowd": 0,
        "bbox": [float(left), float(top), float(right - left), float(bottom - top)],
        "area": float(np.count_nonzero(silhouette)),
        "segmentation": _polygons(silhouette),
        "num_keypoints": int((visibility[:17] > 0).sum()),
        "keypoints": flat[: 17 * 3],
    }
    for part, span in _PARTS:
        result[f"{part}_kpts"] = flat[span.start * 3 : span.stop * 3]
        result[f"{part}_valid"] = bool(valid[part])
        if part != "foot":
            result[f"{part}_box"] = _box(points[span], labelled[span])
    return result


def _clear(visibility: np.ndarray, seen: float, inside: float) -> bool:
    """Enough of a part is visible and within the picture to label it."""
    return bool((visibility == 2).mean() >= seen and (visibility > 0).mean() >= inside)


def _flat(points: np.ndarray, visibility: np.ndarray) -> list[float]:
    """x, y, v in a row; zeros where nothing is labelled."""
    table = np.concatenate([points, visibility[:, None]], axis=1) * (visibility > 0)[:, None]
    numbers = table.ravel().tolist()
    numbers[2::3] = [int(v) for v in numbers[2::3]]
    return numbers


def _box(points: np.ndarray, visibility: np.ndarray) -> list[float]:
    """[x, y, w, h] around the labelled points, zeros if there are none."""
    if not (visibility > 0).any():
        return [0.0, 0.0, 0.0, 0.0]
    low, high = points[visibility > 0].min(axis=0), points[visibility > 0].max(axis=0)
    return [round(float(v), 2) for v in (*low, *(high - low))]


def _polygons(silhouette: np.ndarray) -> list[list[float]]:
    """Outer contours of a mask as flat polygons."""
    contours, _ = cv2.findContours(silhouette.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    thin = (cv2.approxPolyDP(contour, 0.8, True).ravel() for contour in contours if len(contour) > 4)
    polygons = [[float(v) for v in polygon] for polygon in thin if len(polygon) >= 6]
    return polygons or [[float(v) for v in contours[0].repeat(3, axis=0).ravel()[:6]]]
