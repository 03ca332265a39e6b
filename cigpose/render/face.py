"""A face with the 68 landmarks of the iBUG scheme: its shape and its expression.

Head frame: x to the person's left, y down, z backwards, origin between the ears at the height of the eyes; the unit is
half the width of the face.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# The person's right half and the middle line; the left half is mirrored.
_JAW = ((-0.99, -0.04, 0.0), (-0.98, 0.24, -0.03), (-0.95, 0.5, -0.08), (-0.89, 0.76, -0.16), (-0.78, 0.99, -0.29),
        (-0.61, 1.19, -0.47), (-0.41, 1.34, -0.67), (-0.2, 1.43, -0.83), (0, 1.46, -0.9))  # fmt: skip
_BROW = (
    (-0.84, -0.31, -0.62),
    (-0.69, -0.44, -0.77),
    (-0.51, -0.47, -0.88),
    (-0.33, -0.43, -0.95),
    (-0.16, -0.34, -1.0),
)
_BRIDGE = ((0, -0.06, -0.97), (0, 0.17, -1.08), (0, 0.38, -1.19), (0, 0.58, -1.3))
_NOSTRILS = ((-0.25, 0.69, -1.0), (-0.125, 0.745, -1.09), (0, 0.775, -1.13))
_EYE = ((-0.66, 0.0, -0.72), (-0.545, -0.1, -0.83), (-0.365, -0.1, -0.87), (-0.24, 0.02, -0.85), (-0.365, 0.085, -0.86),
        (-0.545, 0.085, -0.82))  # fmt: skip
_OUTER = ((-0.38, 1.03, -0.88), (-0.24, 0.965, -0.99), (-0.085, 0.925, -1.05), (0, 0.945, -1.06))
_OUTER_LOW = ((0, 1.165, -1.03), (-0.1, 1.155, -1.02), (-0.24, 1.1, -0.97))
_INNER = ((-0.31, 1.03, -0.91), (-0.12, 1.015, -1.02), (0, 1.02, -1.03))
_INNER_LOW = ((0, 1.035, -1.03), (-0.12, 1.03, -1.02))

_BEHIND = ((0.0, 0.95, 0.1), (-0.6, 0.7, 0.35), (0.6, 0.7, 0.35), (0.0, 0.62, 0.72))
"""Underside of the skull, where the neck begins."""
_CHEEKS = (
    (-0.8, 0.2, -0.62),
    (-0.55, 0.55, -0.88),
    (-0.45, 0.95, -0.85),
    (0.0, -0.3, -1.02),
    (-0.5, -0.55, -0.9),
    (-0.08, 0.84, -1.0),
    (-0.1, 1.22, -0.98),
)
EYES = (slice(36, 42), slice(42, 48))
CRANIUM_CENTER = np.array([0, -0.24, 0.06])
CRANIUM_RADII = np.array([1.0, 1.09, 1.13])


def _mirror(points: np.ndarray) -> np.ndarray:
    return points * (-1, 1, 1)


def _template() -> np.ndarray:
    jaw, brow, eye = np.array(_JAW), np.array(_BROW), np.array(_EYE)
    nose, outer, low = np.array(_NOSTRILS), np.array(_OUTER), np.array(_OUTER_LOW)
    inner, inner_low = np.array(_INNER), np.array(_INNER_LOW)
    left_eye = _mirror(eye)[[3, 2, 1, 0, 5, 4]]
    parts = [
        jaw, _mirror(jaw[:-1])[::-1], brow, _mirror(brow)[::-1], np.array(_BRIDGE), nose, _mirror(nose[:-1])[::-1], eye,
        left_eye, outer, _mirror(outer[:-1])[::-1], _mirror(low[1:])[::-1], low, inner, _mirror(inner[:-1])[::-1],
        _mirror(inner_low[1:]), inner_low,
    ]  # fmt: skip
    return np.concatenate(parts)


TEMPLATE = _template()
"""(68, 3) neutral face."""
FIRM = np.concatenate([np.array(_BEHIND), np.array(_CHEEKS), _mirror(np.array(_CHEEKS))])
"""(18, 3) further points of the head's outline."""


@dataclass(frozen=True)
class Face:
    """One person's face at one moment, head frame."""

    landmarks: np.ndarray
    """(68, 3)"""
    shape: np.ndarray
    """(3,) stretch of the whole head."""
    gaze: tuple[float, float]
    """Offset of the irises, in eye widths and heights."""


def sample_face(rng: np.random.Generator) -> Face:
    """A random face: proportions, smile, open mouth, raised brows, lids, gaze."""
    points = TEMPLATE.copy()
    shape = np.array([rng.uniform(0.93, 1.05), rng.uniform(0.95, 1.06), 1.0])
    chin = rng.uniform(0.88, 1.06)
    jaw = points[1:16]
    jaw[:, 0] *= 1 + (chin - 1) * np.clip(jaw[:, 1:2] - 0.2, 0, 1).ravel()
    points[17:27, 1] += rng.normal(0, 0.035)
    frown = rng.normal(0, 0.03)
    points[[20, 21, 22, 23], 1] += frown
    lids = rng.uniform(0.75, 1.3)
    for eye in EYES:
        middle = points[eye, 1].mean()
        points[eye, 1] = middle + (points[eye, 1] - middle) * lids
        center = points[eye, 0].mean()
        points[eye, 0] = center + (points[eye, 0] - center) * 1.06
    points[27:36, 0] *= rng.uniform(0.85, 1.2)
    points[30:36, 2] += rng.uniform(-0.06, 0.06)
    smile, opening = rng.uniform(-0.25, 1.0), max(0.0, rng.normal(0.0, 0.13))
    for corner in ([48, 60], [54, 64]):
        points[corner, 1] -= 0.07 * smile
        points[corner, 0] *= 1 + 0.12 * smile
    lower = np.array([55, 56, 57, 58, 59, 65, 66, 67])
    points[lower, 1] += opening * np.array([0.6, 1, 1, 1, 0.6, 1, 1, 1])
    points[4:13, 1] += opening * 0.5 * np.array([0.2, 0.6, 0.9, 1, 1, 1, 0.9, 0.6, 0.2])
    fullness = rng.uniform(0.85, 1.3)
    points[[56, 57, 58], 1] += 0.03 * fullness
    points[[50, 51, 52], 1] -= 0.02 * fullness
    return Face(points * shape, shape, (float(rng.normal(0, 0.1)), float(rng.normal(0, 0.08))))


def landmark_visible(face: Face, frame: np.ndarray) -> np.ndarray:
    """(68,) bool: the landmark's side of the head looks at the camera; `frame` is the head's, (3, 3)."""
    outward = face.landmarks * (1.0, 0.12, 1.0) + (0, 0, 0.3)
    outward[27:36, 0] *= 1.6
    outward /= np.linalg.norm(outward, axis=1, keepdims=True)
    # The contour of the jaw is seen until it turns behind the cheek.
    limit = np.full(68, 0.08)
    limit[:17] = 0.3
    return (outward @ frame[2]) < limit


def ear_points(face: Face) -> np.ndarray:
    """(2, 3) left and right ear, head frame."""
    return np.array([[1.04, 0.14, 0.14], [-1.04, 0.14, 0.14]]) * face.shape


def eye_points(face: Face) -> np.ndarray:
    """(2, 3) left and right eye, head frame."""
    return np.stack([face.landmarks[42:48].mean(axis=0), face.landmarks[36:42].mean(axis=0)])
