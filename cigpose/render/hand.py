"""A hand with 21 keypoints: gestures, forward kinematics of the fingers, and how it is drawn.

Hand frame: axis 0 from the wrist to the fingers, axis 1 towards the thumb, axis 2 out of the palm. The unit is the
length from the wrist to the tip of the middle finger.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from cigpose.render.appearance import draw
from cigpose.render.paint import Canvas, Patch

KNUCKLES = np.array([[0.5, 0.17], [0.53, 0.045], [0.5, -0.08], [0.44, -0.195]])
PHALANGES = np.array([[0.24, 0.15, 0.11], [0.26, 0.17, 0.12], [0.24, 0.16, 0.12], [0.19, 0.12, 0.1]])
SPREAD = np.array([0.13, 0.02, -0.1, -0.24])
THUMB_BASE = np.array([0.15, 0.15, 0.04])
THUMB = np.array([0.2, 0.16, 0.13])
WIDTHS = np.array([0.125, 0.115, 0.12, 0.115, 0.1])
"""Thickness of thumb, fore, middle, ring finger and pinky."""
BONES = tuple((a, a + 1) for first in (1, 5, 9, 13, 17) for a in range(first, first + 3))
_FINGER = np.array([0] * 5 + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4)
"""(21,) finger of each keypoint; the root counts as the thumb's."""
_BONES = np.array(BONES)
_BONE_WIDTHS = WIDTHS[_FINGER[_BONES[:, 0]]]
_OTHER_FINGER = _FINGER[:, None] != _FINGER[_BONES[:, 0]]


@dataclass(frozen=True)
class Hand:
    """21 keypoints in the hand frame, (21, 3): root, then thumb, fore, middle, ring finger and pinky outwards."""

    points: np.ndarray


def sample_hand(rng: np.random.Generator) -> Hand:
    """A random gesture: open, relaxed, fist, pointing, victory, thumb up, or holding."""
    kind = draw(rng, (0.36, 0.32, 0.08, 0.08, 0.05, 0.04, 0.07))
    bend = np.full(4, (0.06, 0.38, 1.35, 1.35, 1.35, 1.4, 0.65)[kind])
    if kind == 1:
        bend += (0.0, 0.04, 0.09, 0.15)
    if kind in (3, 4):
        bend[0] = 0.03
    if kind == 4:
        bend[1] = 0.03
    bend += 0.07 * rng.standard_normal(4) + 0.06 * rng.standard_normal()
    bend = np.minimum(np.maximum(bend, -0.15), 1.5)
    wide = rng.uniform(0.5, 2.1) if kind == 0 else (1.6 if kind == 4 else rng.uniform(0.4, 1.1))
    thumb_out = rng.uniform(0.5, 0.95) if kind in (0, 1, 5, 6) else rng.uniform(0.15, 0.4)
    thumb_fold = (0.1, 0.25, 0.9, 0.9, 0.9, 0.0, 0.5)[kind] + rng.normal(0, 0.08)
    return Hand(_kinematics(bend, wide, float(thumb_out), float(thumb_fold)))


def _kinematics(bend: np.ndarray, wide: float, thumb_out: float, thumb_fold: float) -> np.ndarray:
    """Keypoints (21, 3) from the bend of each finger (4,), their spread and the thumb's two angles."""
    joints = np.stack([bend * 0.85, bend * 1.05, bend * 0.7], axis=1).cumsum(axis=1)
    heading = SPREAD * wide * np.cos(np.maximum(bend, 0))
    flat = np.stack([np.cos(heading), np.sin(heading), np.zeros(4)], axis=1)
    direction = np.cos(joints)[:, :, None] * flat[:, None] + np.sin(joints)[:, :, None] * np.array([0, 0, 1.0])
    chain = (direction * PHALANGES[:, :, None]).cumsum(axis=1)
    knuckles = np.concatenate([KNUCKLES, np.zeros((4, 1))], axis=1)
    fingers = np.concatenate([knuckles[:, None], knuckles[:, None] + chain], axis=1)
    out = thumb_out - np.array([0, 0.35, 0.55]) * (0.5 + thumb_fold)
    fold = 0.25 + thumb_fold * np.array([0.3, 0.6, 0.9])
    steps = np.stack([np.cos(out) * np.cos(fold), np.sin(out) * np.cos(fold), np.sin(fold)], axis=1) * THUMB[:, None]
    thumb = THUMB_BASE + np.concatenate([np.zeros((1, 3)), steps.cumsum(axis=0)])
    return np.concatenate([np.zeros((1, 3)), thumb, fingers.reshape(16, 3)])


def hidden_in_hand(points: np.ndarray, size: float, palm: np.ndarray) -> np.ndarray:
    """(21,) bool: keypoints behind another finger or behind the palm.

    Args:
        points: (21, 3) x, y, depth in pixels.
        size: length of the hand in pixels.
        palm: (N, 2) outline of the palm in pixels.
    """
    start, end = points[_BONES[:, 0]], points[_BONES[:, 1]]
    step = end - start
    along = ((points[:, None, :2] - start[None, :, :2]) * step[None, :, :2]).sum(-1) / (
        (step[:, :2] ** 2).sum(-1) + 1e-6
    )
    nearest = start + np.minimum(np.maximum(along, 0), 1)[..., None] * step
    gap = np.sqrt(((points[:, None, :2] - nearest[..., :2]) ** 2).sum(-1))
    width = _BONE_WIDTHS * (0.5 * size)
    hidden = (_OTHER_FINGER & (gap < width * 0.8) & (points[:, None, 2] - nearest[..., 2] > width)).any(axis=1)
    places = points.tolist()
    level = sum(places[i][2] for i in (0, 5, 9, 13, 17)) / 5 + 0.1 * size
    outline = palm.astype(np.float32).reshape(-1, 1, 2)
    for i in (3, 4, 6, 7, 8, 10, 11, 12, 14, 15, 16, 18, 19, 20):
        x, y, z = places[i]
        if z > level and cv2.pointPolygonTest(outline, (x, y), False) > 0:
            hidden[i] = True
    return hidden


def palm_outline(points: np.ndarray, size: float) -> np.ndarray:
    """(N, 2) convex outline of the palm in pixels, from the keypoints (21, 3) in pixels."""
    p = points[:, :2]
    sideways = p[5] - p[17]
    sideways = sideways / (np.sqrt(sideways @ sideways) + 1e-6)
    wrist = [p[0] + sideways * 0.13 * size, p[0] - sideways * 0.13 * size]
    knuckles = [p[5] + sideways * 0.05 * size, p[17] - sideways * 0.05 * size, p[9] + (p[9] - p[0]) * 0.06]
    corners = np.array([*wrist, *knuckles, p[1] + sideways * 0.03 * size, p[13] + (p[13] - p[0]) * 0.05])
    return cv2.convexHull(corners.astype(np.float32))[:, 0].astype(np.float64)


def paint_hand(canvas: Canvas, points: np.ndarray, size: float, skin: np.ndarray, palm_seen: bool) -> None:
    """Draw a hand from its keypoints.

    Args:
        canvas: where.
        points: (21, 3) x, y, depth in pixels.
        size: length of the hand in pixels.
        skin: (3,) colour.
        palm_seen: the palm, not the back, is turned to the camera.
    """
    patch = Patch(canvas, points[:, :2], 0.12 * size, skin, 100.0)
    if patch.box is None:
        return
    outline = palm_outline(points, size)
    tint = skin * (1.03, 0.96, 0.94) if palm_seen else skin
    depths = points[:, 2].tolist()
    parts = [((depths[0] + depths[5] + depths[17]) / 3, -1)]
    parts += [(sum(depths[f * 4 + 2 : f * 4 + 5]) / 3, f) for f in range(5)]
    edge = max(0.028 * size, 0.3)
    joints = patch.to_patch(points[:, :2])
    tones = (tint * 0.66, tint, tint * 1.07, tint * 1.12 + 10)
    for _, finger in sorted(parts, reverse=True):
        if finger < 0:
            center = outline.mean(axis=0)
            patch.polygon(center + (outline - center) * 1.05, skin * 0.7, solid=True, convex=True)
            patch.polygon(outline, tint * 0.96, solid=True, convex=True)
            patch.polygon(center + (outline - center) * 0.7, tint, convex=True)
            # The wrist runs on into the forearm without a rim.
            back = points[0, :2] - center
            back = back / (np.sqrt(back @ back) + 1e-6)
            patch.line(points[0, :2] + np.outer((-0.1 * size, 0.05 * size), back), tint * 0.96, 0.25 * size)
        else:
            _paint_finger(patch, joints[finger * 4 + 1 : finger * 4 + 5], WIDTHS[finger] * size, edge, tones, palm_seen)
    depth = sum(depths) / 21 - 0.25 * size
    patch.compose(canvas, depth, canvas.light.tone(np.array([0.0, 0.0, -1.0])))


def _paint_finger(
    patch: Patch, line: np.ndarray, width: float, edge: float, tones: Sequence[np.ndarray], palm_seen: bool
) -> None:
    """One finger from its four joints (4, 2) in patch coordinates: a dark rim, the finger, a lit ridge, the nail."""
    patch.line(line, tones[0], width + 2 * edge, solid=True)
    patch.line(line, tones[1], width)
    patch.line(line - np.int32(0.12 * width * patch.step), tones[2], 0.45 * width)
    if not palm_seen:
        patch.disc(line[3] - (line[3] - line[2]) // 10, 0.26 * width, tones[3])
