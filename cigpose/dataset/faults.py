"""Kinds of faults of labels, and what is found: one finding per person, or picture, and kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

KINDS: Mapping[str, str] = {
    "swapped person": "left and right of the whole person are exchanged",
    "swapped limb": "left and right of a limb or of a pair of keypoints are exchanged",
    "shifted": "every keypoint has the place of its neighbour in the list",
    "misplaced": "a keypoint is where this pose, or the model, does not have it",
    "limb length": "a limb is longer than this person can have it",
    "same place": "two keypoints have the very same coordinates",
    "outside picture": "labelled keypoints lie outside the picture",
    "outside box": "labelled keypoints lie outside the person's box",
    "box": "the box has no area, or lies outside the picture",
    "visibility": "visibility flags contradict the coordinates, the count, or the format",
    "duplicate person": "the same person is labelled twice in a picture",
    "duplicate picture": "two pictures have the same bytes",
    "copied labels": "people of different pictures have exactly the same coordinates",
    "other picture": "the labels fit the neighbouring picture",
    "mirrored picture": "the labels fit the mirrored picture",
    "disagreement": "a model that is sure of itself sees the whole person elsewhere",
    "unlabelled person": "a detector finds a person without labels",
    "picture": "the picture is missing, cannot be read, or has another size than stated",
    "unreadable": "the entry cannot be used",
}
"""Kind -> what it means, in the order of the page."""
COUNTED = 0.5
"""A finding of this suspicion or more counts as a fault."""
SHOWN = 0.05
"""Less is left out altogether."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something suspicious about a person or a picture."""

    kind: str
    suspicion: float
    """0 to 1; comparable between kinds as far as that goes."""
    text: str
    annotation_id: int | None = None
    image_id: int | None = None
    keypoints: tuple[str, ...] = ()
    """Names of those it is about; none: the whole."""
    other: int | None = None
    """Id of the other annotation of a pair, or of the other picture where it is about pictures."""
    bbox_xywh: tuple[float, float, float, float] | None = None
    """Of a person who is not labelled."""

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it: without what is not known."""
        known = {name: value for name, value in asdict(self).items() if value not in (None, ())}
        return known | {"suspicion": round(self.suspicion, 4)}


def probability(log_ratio: np.ndarray, prior: float) -> np.ndarray:
    """How likely a fault is whose kind has this prior, after evidence of this log ratio of likelihoods."""
    odds = np.clip(log_ratio, -50, 50) + np.log(prior / (1 - prior))
    return np.asarray(1 / (1 + np.exp(-odds)))
