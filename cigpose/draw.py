"""Poses drawn into pictures: limbs coloured by part and side, doubtful keypoints fainter.

Used by the contact sheets of evaluation and by the predictor. Coordinates are pixels of the picture given.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence

import cv2
import numpy as np

from cigpose.keypoints import KeypointSet

Color = tuple[int, int, int]

# BGR. Left and right are the person's.
LEFT: Color = (92, 200, 80)
RIGHT: Color = (58, 130, 250)
MIDDLE: Color = (250, 190, 70)
FACE: Color = (255, 235, 215)
OUTLINE: Color = (30, 30, 30)

_SHIFT = 4  # cv2 draws at 1/16 pixel
_FAINT = 0.45  # opacity of doubtful limbs
_FAR = 1e6  # pixels; anything beyond cannot be meant
_PAPER = (cv2.BORDER_CONSTANT, None, (255, 255, 255))
_LEAST_SCALE = 0.7  # of a row of a packed page


def keypoint_colors(keypoint_set: KeypointSet) -> list[Color]:
    """A BGR colour per keypoint: by the person's side, faces pale, a hue per finger."""
    colors = [LEFT if n.startswith("left") else RIGHT if n.startswith("right") else MIDDLE for n in keypoint_set.names]
    for part, members in keypoint_set.parts.items():
        for position, k in enumerate(members):
            if part == "face":
                colors[k] = FACE
            elif part == "foot":
                colors[k] = _lighter(colors[k])
            elif "hand" in part:
                colors[k] = _finger_color(position, len(members), left=part.startswith("left"))
    return colors


def draw_poses(
    image: np.ndarray,
    keypoints: np.ndarray,
    scores: np.ndarray,
    keypoint_set: KeypointSet,
    *,
    min_score: float = 0.3,
    sure_score: float = 0.5,
    boxes_xyxy: np.ndarray | None = None,
) -> np.ndarray:
    """The picture with every person's skeleton on it.

    Line width follows the person's size. Limbs of a keypoint below `sure_score` are translucent, below `min_score`
    they are left out; the same for points.

    Args:
        image: uint8 (H, W, 3) BGR; not changed.
        keypoints: (N, K, 2) x, y in image pixels. N may be 0.
        scores: (N, K); for ground truth pass `visible`.
        keypoint_set: names, parts and lines.
        min_score: keypoints below are not drawn.
        sure_score: keypoints from here on are drawn opaque.
        boxes_xyxy: (N, 4) boxes to draw as thin frames.

    Returns: uint8 (H, W, 3) BGR, a new array.

    Raises:
        ValueError: shapes that do not fit each other or the set.
    """
    keypoints, scores = np.asarray(keypoints, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    _check(image, keypoints, scores, keypoint_set)
    canvas = image.copy()
    if len(keypoints) == 0:
        return canvas
    scores = np.where((np.abs(keypoints) < _FAR).all(axis=2), scores, -np.inf)  # NaN is not drawn either
    if boxes_xyxy is not None:
        for box in np.asarray(boxes_xyxy, dtype=np.float64):
            x0, y0, x1, y1 = (_fixed(value) for value in box)
            cv2.rectangle(canvas, (x0, y0), (x1, y1), (200, 200, 200), 1, cv2.LINE_AA, _SHIFT)
    colors = keypoint_colors(keypoint_set)
    fine = _fine_keypoints(keypoint_set)
    if ((scores >= min_score) & (scores < sure_score)).any():
        layer = canvas.copy()
        for person, score in zip(keypoints, scores, strict=True):
            _draw_person(layer, person, score, keypoint_set.lines, colors, fine, min_score)
        canvas = cv2.addWeighted(layer, _FAINT, canvas, 1 - _FAINT, 0)
    for person, score in zip(keypoints, scores, strict=True):
        _draw_person(canvas, person, score, keypoint_set.lines, colors, fine, max(sure_score, min_score))
    return canvas


def label_picture(image: np.ndarray, text: str) -> np.ndarray:
    """The picture with a line of text in its upper left corner, on a dark strip; a new array."""
    canvas = image.copy()
    scale = max(0.4, min(image.shape[0], image.shape[1]) / 800)
    (width, height), base = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
    strip = canvas[: height + base + 6, : width + 10]
    strip[:] = strip // 3
    cv2.putText(canvas, text, (5, height + 3), cv2.FONT_HERSHEY_SIMPLEX, scale, (255, 255, 255), 1, cv2.LINE_AA)
    return canvas


def pack_pictures(pictures: Sequence[np.ndarray], *, aspect: float = 1.4, margin: int = 6) -> np.ndarray:
    """Pictures of one height and any width on white paper, row by row in their order, packed closely.

    Rows are broken so that they come out nearly equally wide; wider ones are made smaller, to no less than 0.7.

    Args:
        pictures: uint8 (H, W_i, 3), at least one.
        aspect: width by height that the page should roughly have.
        margin: white pixels around each picture.

    Returns: uint8 (H', W', 3).
    """
    widths = [picture.shape[1] + margin for picture in pictures]
    height = pictures[0].shape[0] + margin
    most = 2 * math.ceil(math.sqrt(sum(widths) / height / aspect)) + 1
    plans = [_plan(rows, widths, height, aspect) for rows in _row_breaks(widths, min(most, len(widths)))]
    _, rows, page_width = min(plans, key=lambda plan: plan[0])
    strips = []
    for row in rows:
        strip = np.hstack([cv2.copyMakeBorder(pictures[i], 0, margin, 0, margin, *_PAPER) for i in row])
        if (scale := page_width / strip.shape[1]) < 1:
            strip = cv2.resize(strip, (page_width, round(strip.shape[0] * scale)), interpolation=cv2.INTER_AREA)
        strips.append(cv2.copyMakeBorder(strip, 0, 0, margin, page_width - strip.shape[1], *_PAPER))
    return cv2.copyMakeBorder(np.vstack(strips), margin, 0, 0, 0, *_PAPER)


def _plan(
    rows: list[list[int]], widths: Sequence[int], height: int, aspect: float
) -> tuple[float, list[list[int]], int]:
    """How bad a page of these rows would be, the rows, and the width of the page."""
    lengths = [sum(widths[i] for i in row) for row in rows]
    page_width = max(min(lengths), math.ceil(_LEAST_SCALE * max(lengths)))
    heights = [height * min(1.0, page_width / length) for length in lengths]
    used = sum(min(length, page_width) * h for length, h in zip(lengths, heights, strict=True))
    shape = page_width / sum(heights)
    empty = 1 - used / (page_width * sum(heights))
    return empty + 0.25 * abs(math.log(shape / aspect)) + 0.25 * (max(lengths) / page_width - 1), rows, page_width


def _row_breaks(widths: Sequence[int], most: int) -> list[list[list[int]]]:
    """For 1 to `most` rows the consecutive ones of most even length (least sum of squares)."""
    ends = np.concatenate([[0], np.cumsum(widths)]).astype(np.float64)
    count = len(widths)
    square = np.where(np.tri(count + 1, k=-1, dtype=bool), (ends[:, None] - ends[None]) ** 2, np.inf)  # end, begin
    cost = np.where(np.arange(count + 1) == 0, 0.0, np.inf)
    begins: list[np.ndarray] = []
    found = []
    for _ in range(most):
        table = square + cost[None]
        begins.append(table.argmin(axis=1))
        cost = table.min(axis=1)
        rows, end = [], count
        for begin in reversed(begins):
            rows.append(list(range(int(begin[end]), end)))
            end = int(begin[end])
        found.append(rows[::-1])
    return found


def _check(image: np.ndarray, keypoints: np.ndarray, scores: np.ndarray, keypoint_set: KeypointSet) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"draw_poses: expected a uint8 (H, W, 3) picture, got {image.dtype} {image.shape}.")
    if keypoints.ndim != 3 or keypoints.shape[1:] != (len(keypoint_set), 2) or scores.shape != keypoints.shape[:2]:
        raise ValueError(
            f"draw_poses: expected keypoints (N, {len(keypoint_set)}, 2) and scores (N, {len(keypoint_set)}) of set "
            f"{keypoint_set.name!r}, got {keypoints.shape} and {scores.shape}."
        )


def _draw_person(
    canvas: np.ndarray,
    keypoints: np.ndarray,
    scores: np.ndarray,
    lines: tuple[tuple[int, int], ...],
    colors: list[Color],
    fine: np.ndarray,
    min_score: float,
) -> None:
    shown = scores >= min_score
    if not shown.any():
        return
    extent = np.ptp(keypoints[shown], axis=0)
    width = float(np.clip(np.hypot(*extent) / 110, 1.0, 7.0))
    points = {int(k): (_fixed(keypoints[k, 0]), _fixed(keypoints[k, 1])) for k in np.flatnonzero(shown)}
    widths = [max(1, round(width * (0.4 if is_fine else 1.0))) for is_fine in fine]
    limbs = [(a, b, min(widths[a], widths[b])) for a, b in lines if a in points and b in points]
    for a, b, thickness in limbs:
        if thickness > 1:
            cv2.line(canvas, points[a], points[b], OUTLINE, thickness + 2, cv2.LINE_AA, _SHIFT)
    for a, b, thickness in limbs:
        cv2.line(canvas, points[a], points[b], _limb_color(colors[a], colors[b]), thickness, cv2.LINE_AA, _SHIFT)
    for k, point in points.items():
        if not fine[k]:
            radius = _fixed(width + 0.4)
            cv2.circle(canvas, point, radius + 12, OUTLINE, cv2.FILLED, cv2.LINE_AA, _SHIFT)
            cv2.circle(canvas, point, radius, colors[k], cv2.FILLED, cv2.LINE_AA, _SHIFT)
        elif width > 2.0:  # on smaller people the points of a face would hide it
            cv2.circle(canvas, point, _fixed(width * 0.45), colors[k], cv2.FILLED, cv2.LINE_AA, _SHIFT)


def _fine_keypoints(keypoint_set: KeypointSet) -> np.ndarray:
    """(K,) bool: keypoints of faces and hands, drawn thinner."""
    fine = np.zeros(len(keypoint_set), dtype=bool)
    for part, members in keypoint_set.parts.items():
        if part == "face" or "hand" in part:
            fine[list(members)] = True
    return fine


def _limb_color(a: Color, b: Color) -> Color:
    """Of a limb between two keypoints: the side's, or the middle's where it joins both sides."""
    if a == MIDDLE:
        return b
    return MIDDLE if {a, b} == {LEFT, RIGHT} else a


def _lighter(color: Color) -> Color:
    blue, green, red = color
    return (blue + 255) // 2, (green + 255) // 2, (red + 255) // 2


def _finger_color(position: int, count: int, *, left: bool) -> Color:
    finger = max(0, position - 1) * 5 // max(count - 1, 1)
    rgb = colorsys.hsv_to_rgb(0.02 + 0.17 * finger, 0.55 if left else 0.85, 1.0)
    return round(rgb[2] * 255), round(rgb[1] * 255), round(rgb[0] * 255)


def _fixed(value: float) -> int:
    return round(float(value) * (1 << _SHIFT))
