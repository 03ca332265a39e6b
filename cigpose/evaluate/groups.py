"""Figures of groups of people: by size, truncation, occlusion and crowding. M labelled persons, N predicted ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cigpose.config.outcome import CROWDING
from cigpose.evaluate.coco import ScoredPersons
from cigpose.evaluate.ground_truth import GroundTruth
from cigpose.evaluate.matches import Matches
from cigpose.keypoints import KeypointSet

BORDER_SHARE = 0.005
"""A box that comes so near to the border of the picture, in its larger side, is taken to be cut."""
LIES_ON_FROM = 0.1
"""Overlap (IoU) from which a predicted box lies on a labelled one."""
_SIDE = 96**2  # square pixels between COCO's medium and large


@dataclass(frozen=True, kw_only=True)
class Group:
    """Figures of some of the people."""

    aspect: str
    """What divides the people: size, ..."""
    name: str
    people: int
    ap: float
    ar: float


def measure_groups(
    matches: Matches, scored: ScoredPersons, truth: GroundTruth, keypoint_set: KeypointSet
) -> list[Group]:
    """AP and AR within groups of people, for what the labels tell; see `Matches.of_group` for what counts where.

    Args:
        matches: of one part.
        scored: the predicted persons of it.
        truth: the labels.
        keypoint_set: its first part is the body, whose labels tell occlusion.

    Returns: aspect by aspect; an aspect that does not divide these people is left out.
    """
    nearest = _nearest(scored, truth)
    counted = matches.truth_image >= 0
    found = []
    for aspect, groups in _aspects(truth, keypoint_set).items():
        groups = {name: members & counted for name, members in groups.items()}
        groups = {name: members for name, members in groups.items() if members.any()}
        if len(groups) < 2:
            continue
        for name, members in groups.items():
            group = matches.of_group(members, nearest)
            found.append(
                Group(
                    aspect=aspect,
                    name=name,
                    people=int(members.sum()),
                    ap=group.average_precision(),
                    ar=group.average_recall(),
                )
            )
    return found


def _aspects(truth: GroundTruth, keypoint_set: KeypointSet) -> dict[str, dict[str, np.ndarray]]:
    """Aspect -> group -> (M,) bool."""
    aspects = {"size": {"medium, up to 96 x 96 pixels": truth.area <= _SIDE, "large": truth.area > _SIDE}}
    if (cut := _truncated(truth)) is not None:
        aspects["truncation"] = {"inside the picture": ~cut, "cut by its border": cut}
    body = truth.keypoints[:, list(next(iter(keypoint_set.parts.values()))), 2]
    hidden = (body == 1).sum(axis=1) / np.maximum((body > 0).sum(axis=1), 1)
    if (body == 1).any() and (body == 2).any():  # not every data set tells them apart
        aspects["occlusion"] = {
            "all labels visible": hidden == 0,
            "up to a quarter hidden": (hidden > 0) & (hidden <= 0.25),
            "more hidden": hidden > 0.25,
        }
    aspects["crowding"] = _crowding(truth)
    return aspects


def _truncated(truth: GroundTruth) -> np.ndarray | None:
    """(M,) bool; None where the file does not state the size of every picture."""
    sizes = [(truth.images[i].get("width"), truth.images[i].get("height")) for i in truth.image_id.tolist()]
    if any(width is None or height is None for width, height in sizes):
        return None
    size = np.array(sizes, dtype=np.float64).reshape(-1, 2)
    low, high = truth.bbox_xywh[:, :2], truth.bbox_xywh[:, :2] + truth.bbox_xywh[:, 2:]
    margin = BORDER_SHARE * size.max(axis=1, keepdims=True)
    return ((low <= margin) | (high >= size - margin)).any(axis=1)


def _crowding(truth: GroundTruth) -> dict[str, np.ndarray]:
    """By the file's own crowd index, else by how much of a box another labelled person's box covers."""
    if (index := truth.crowd_index) is not None:
        values = np.array([index[i] for i in truth.image_id.tolist()])
        return {name.removeprefix("AP_"): (values >= low) & (values < high) for name, (low, high) in CROWDING.items()}
    overlap = np.zeros(len(truth))
    for rows in _rows_by_image(truth.image_id, np.ones(len(truth), dtype=bool)).values():
        shared = _ious(_corners(truth.bbox_xywh[rows]), _corners(truth.bbox_xywh[rows]))
        np.fill_diagonal(shared, 0)
        overlap[rows] = shared.max(axis=1, initial=0)
    return {
        "overlaps nobody": overlap == 0,
        "overlap (IoU) up to 0.2": (overlap > 0) & (overlap <= 0.2),
        "more overlap": overlap > 0.2,
    }


def _nearest(scored: ScoredPersons, truth: GroundTruth) -> np.ndarray:
    """(N,) for every predicted person the row of the labelled one its box lies on, or -1."""
    nearest = np.full(len(scored.people), -1)
    labelled = _rows_by_image(truth.image_id, ~truth.is_crowd)
    for image_id, rows in _rows_by_image(scored.people.image_id, np.ones(len(scored.people), dtype=bool)).items():
        if (people := labelled.get(image_id)) is None:
            continue
        shared = _ious(scored.people.bbox_xyxy[rows].astype(np.float64), _corners(truth.bbox_xywh[people]))
        nearest[rows] = np.where(shared.max(axis=1) >= LIES_ON_FROM, people[shared.argmax(axis=1)], -1)
    return nearest


def _rows_by_image(image_id: np.ndarray, wanted: np.ndarray) -> Mapping[int, np.ndarray]:
    rows = np.flatnonzero(wanted)
    rows = rows[np.argsort(image_id[rows], kind="stable")]
    ids, starts = np.unique(image_id[rows], return_index=True)
    return dict(zip(ids.tolist(), np.split(rows, starts[1:]), strict=True)) if len(rows) else {}


def _corners(boxes_xywh: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], axis=1)


def _ious(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes x0, y0, x1, y1: (n, 4), (m, 4) -> (n, m)."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = np.maximum(high - low, 0).prod(axis=2)
    areas = [np.maximum(b[:, 2:] - b[:, :2], 0).prod(axis=1) for b in (boxes, others)]
    return shared / np.maximum(areas[0][:, None] + areas[1][None] - shared, np.spacing(1))
