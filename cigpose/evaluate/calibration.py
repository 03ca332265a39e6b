"""How sure a keypoint score makes: raw SimCC maxima to probabilities, learnt from an evaluation.

A raw score is the height of a peak. It grows with the chance that the keypoint is right, but is not that chance, and
may exceed 1. Here, for each part (body, feet, face, hands), the labelled keypoints of the evaluated people are sorted
by raw score and cut into groups of equal size. The share of right ones in each group, made to rise with the score by
isotonic regression, is the probability at the group's mean score; between groups it is interpolated. *Right* means as
near to the label as an OKS of 0.5 allows: exp(-d^2 / (2 area (2 sigma)^2)) >= 0.5.

So a probability holds for a keypoint that an annotator would have labelled, in pictures like those of the evaluation,
by its protocol. What it is worth is measured too: fitted to every second person, the expected calibration error is that
on the others.

N persons, K keypoints.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression

from cigpose.evaluate.ground_truth import GroundTruth
from cigpose.evaluate.predictions import Predictions
from cigpose.files.atomic import write_json
from cigpose.keypoints import KeypointSet

FILE = "calibration.json"
LEAST_LABELS = 200
"""Parts with fewer labelled keypoints take the table of all keypoints; fewer of these give no calibration."""

_GROUPS = 48
_ENOUGH_IN_A_GROUP = 40
_RIGHT_OKS = 0.5
_LEAST_OVERLAP = 0.5  # of a detected box with the labelled one it is taken for
_ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Probabilities of raw scores, for the model files it was measured with."""

    tables: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    """Part, or `all` -> raw scores, rising, and the probability at each."""
    error: float
    """Expected calibration error of the same, fitted to every second person, on the others."""
    labels: int
    """Labelled keypoints it was fitted to."""
    models: tuple[str, ...] = ()
    """sha256 of the model files whose scores these are."""
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Data and protocol, for the reader."""

    def probabilities(self, raw: np.ndarray, keypoint_set: KeypointSet) -> np.ndarray:
        """Probabilities between 0 and 1 of raw scores (..., K), float32."""
        result = np.empty(raw.shape, dtype=np.float32)
        rest = np.ones(raw.shape[-1], dtype=bool)
        for part, members in keypoint_set.parts.items():
            if part in self.tables:
                result[..., list(members)] = np.interp(raw[..., list(members)], *self.tables[part])
                rest[list(members)] = False
        result[..., rest] = np.interp(raw[..., rest], *self.tables[_ALL])
        return result

    @property
    def digest(self) -> str:
        """Of its tables."""
        return hashlib.sha256(json.dumps(dict(self.tables), sort_keys=True).encode()).hexdigest()

    def write(self, folder: Path) -> Path:
        """Write it as `calibration.json`, where a `Predictor` finds it beside the model."""
        write_json(folder / FILE, {"format": 1, **dataclasses.asdict(self)})
        return folder / FILE

    @classmethod
    def read(cls, path: Path) -> Calibration:
        """What `write` wrote.

        Raises:
            ValueError: it is not such a file.
        """
        try:
            content = json.loads(path.read_bytes())
            tables = {part: (scores, shares) for part, (scores, shares) in content["tables"].items()}
            for scores, shares in tables.values():
                if len(scores) != len(shares) or not scores or np.any(np.diff(scores) < 0):
                    raise ValueError("a table whose scores do not rise")
            return cls(
                tables={_ALL: tables[_ALL], **tables},
                error=float(content["error"]),
                labels=int(content["labels"]),
                models=tuple(content["models"]),
                about=content["about"],
            )
        except (ValueError, KeyError, TypeError, AttributeError) as err:
            raise ValueError(f"{path}: not a calibration of ours ({err}). Delete it; `dvc repro` makes it.") from err


def fit_calibration(
    predictions: Predictions,
    truth: GroundTruth,
    keypoint_set: KeypointSet,
    *,
    models: Sequence[str] = (),
    about: Mapping[str, Any] | None = None,
) -> Calibration | None:
    """Learn what raw scores mean from an evaluation; None where too little is labelled.

    Args:
        predictions: of any boxes; those of detected boxes are compared with the labelled person they overlap most.
        truth: the labels.
        keypoint_set: parts and sigmas.
        models: sha256 of the model files.
        about: data and protocol.
    """
    raw, right, labelled = _judged(predictions, truth, keypoint_set)
    if labelled.sum() < LEAST_LABELS:
        return None
    half = np.arange(len(raw)) % 2 == 0
    fitted = Calibration(tables=_tables(raw[half], right[half], labelled[half], keypoint_set), error=0.0, labels=0)
    expected = fitted.probabilities(raw[~half], keypoint_set)[labelled[~half]]
    return Calibration(
        tables=_tables(raw, right, labelled, keypoint_set),
        error=round(expected_calibration_error(expected, right[~half][labelled[~half]]), 6),
        labels=int(labelled.sum()),
        models=tuple(models),
        about=about or {},
    )


def expected_calibration_error(probabilities: np.ndarray, right: np.ndarray, bins: int = 10) -> float:
    """Mean distance of what is promised from what holds, over equal ranges of the promise, weighed by their numbers.

    Args:
        probabilities: (M,) between 0 and 1.
        right: (M,) bool.
        bins: number of ranges.
    """
    if len(probabilities) == 0:
        return float("nan")
    index = np.minimum((probabilities * bins).astype(int), bins - 1)
    promised = np.bincount(index, weights=probabilities, minlength=bins)
    held = np.bincount(index, weights=right.astype(float), minlength=bins)
    return float(np.abs(promised - held).sum() / len(probabilities))


def _judged(
    predictions: Predictions, truth: GroundTruth, keypoint_set: KeypointSet
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Raw scores, whether right, whether labelled: (N, K) of the predicted persons that are a labelled one."""
    rows = _labelled_rows(predictions, truth)
    known = rows >= 0
    labels, area = truth.keypoints[rows[known]], truth.area[rows[known]]
    distance2 = np.square(predictions.keypoints[known] - labels[..., :2]).sum(axis=2)
    variance = np.square(2 * np.asarray(keypoint_set.sigmas))
    right = np.exp(-distance2 / (2 * variance * np.maximum(area, 1.0)[:, None])) >= _RIGHT_OKS
    return predictions.keypoint_scores[known].astype(np.float64), right, labels[..., 2] > 0


def _labelled_rows(predictions: Predictions, truth: GroundTruth) -> np.ndarray:
    """(N,) row of the labelled person in `truth` that each predicted one is, or -1."""
    rows = np.full(len(predictions), -1)
    ids = {int(annotation): row for row, annotation in enumerate(truth.annotation_id)}
    by_image: dict[int, list[int]] = {}
    for row, image in enumerate(truth.image_id.tolist()):
        if not truth.is_crowd[row]:
            by_image.setdefault(image, []).append(row)
    corners = np.concatenate([truth.bbox_xywh[:, :2], truth.bbox_xywh[:, :2] + truth.bbox_xywh[:, 2:]], axis=1)
    for number, (image, person) in enumerate(zip(predictions.image_id, predictions.person_id, strict=True)):
        here = by_image.get(int(image), [])
        overlap = box_overlaps(predictions.bbox_xyxy[number], corners[here]) if here else np.zeros(0)
        own = ids.get(int(person))
        if own in here and overlap[here.index(own)] > 0.99:  # the box of the label itself
            rows[number] = own
        elif len(here) and overlap.max() >= _LEAST_OVERLAP:
            rows[number] = here[int(overlap.argmax())]
    return rows


def box_overlaps(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(M,) intersection over union of a box with others, x0, y0, x1, y1 each."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    shared = np.maximum(high - low, 0).prod(axis=1)
    areas = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(axis=1) - shared
    return shared / np.maximum(areas, 1e-9)


def _tables(
    raw: np.ndarray, right: np.ndarray, labelled: np.ndarray, keypoint_set: KeypointSet
) -> dict[str, tuple[list[float], list[float]]]:
    members = {_ALL: tuple(range(len(keypoint_set))), **keypoint_set.parts}
    tables = {}
    for part, index in members.items():
        counted = labelled[:, list(index)]
        if part == _ALL or counted.sum() >= LEAST_LABELS:
            tables[part] = _table(raw[:, list(index)][counted], right[:, list(index)][counted])
    return tables


def _table(raw: np.ndarray, right: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean score and share of right ones of groups of equal size, made to rise."""
    order = np.argsort(raw, kind="stable")
    groups = np.array_split(order, max(1, min(_GROUPS, len(order) // _ENOUGH_IN_A_GROUP)))
    sizes = np.array([len(group) for group in groups])
    scores = np.array([raw[group].mean() for group in groups])
    shares = np.array([(right[group].sum() + 0.5) / (len(group) + 1) for group in groups])  # never quite 0 or 1
    rising = isotonic_regression(shares, weights=sizes).x
    return np.round(scores, 6).tolist(), np.round(rising, 6).tolist()
