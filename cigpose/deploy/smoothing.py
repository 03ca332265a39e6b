"""Keypoints of a video without their trembling: the One-Euro filter (Casiez, Roussel, Vogel: CHI 2012).

A low-pass whose cutoff rises with the speed: still keypoints stop trembling, fast ones do not lag. Speeds are measured
in heights of the person per second, so that one setting fits near and far.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

MIN_CUTOFF_HZ = 1.5
"""Of a keypoint that does not move: lower is smoother."""
SPEED_FACTOR = 6.0
"""By how many Hz the cutoff rises for each body height a second: higher lags less."""
_SPEED_CUTOFF_HZ = 1.0


class OneEuro:
    """One person's keypoints.

    Args:
        rate: frames a second.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._last: np.ndarray | None = None
        self._speed = np.zeros(())

    def __call__(self, keypoints: np.ndarray, height: float) -> np.ndarray:
        """The next frame's keypoints (K, 2), smoothed; `height` of the person in the same unit."""
        if self._last is None:
            self._last, self._speed = keypoints, np.zeros_like(keypoints)
            return keypoints
        speed = (keypoints - self._last) * self._rate
        self._speed = self._speed + _weight(np.array(_SPEED_CUTOFF_HZ), self._rate) * (speed - self._speed)
        relative = np.linalg.norm(self._speed, axis=1, keepdims=True) / max(height, 1.0)
        weight = _weight(MIN_CUTOFF_HZ + SPEED_FACTOR * relative, self._rate)
        self._last = self._last + weight * (keypoints - self._last)
        return self._last


def _weight(cutoff_hz: np.ndarray, rate: float) -> np.ndarray:
    ratio = 2 * np.pi * cutoff_hz / rate
    return ratio / (ratio + 1)


class Smoother:
    """Records of successive frames (`cigpose.deploy.video`) with smoothed keypoints; who was away begins anew.

    Args:
        rate: frames a second.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._filters: dict[int, OneEuro] = {}

    def __call__(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The next frame's record, smoothed; the one given is left as it is."""
        filters, persons = {}, []
        for person in record["persons"]:
            points = np.array(person["keypoints"], dtype=np.float64)
            x0, y0, x1, y1 = person["bbox_xyxy"]
            kept = self._filters.get(person["id"]) or OneEuro(self._rate)
            points[:, :2] = np.round(kept(points[:, :2], max(x1 - x0, y1 - y0)), 2)
            filters[person["id"]] = kept
            persons.append({**person, "keypoints": points.tolist()})
        self._filters = filters
        return {**record, "persons": persons}
