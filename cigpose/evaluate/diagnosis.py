"""What kind of mistakes a model makes, keypoint by keypoint, after Ronchi and Perona (ICCV 2017, arXiv 1707.05388).

P pairs of a predicted and a labelled person, K keypoints.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cigpose.evaluate.coco import ScoredPersons, run_part
from cigpose.evaluate.ground_truth import GroundTruth
from cigpose.keypoints import KeypointSet, parts_with_whole

KINDS = ("good", "jitter", "inversion", "swap", "miss")
"""See `diagnose`."""
PAIRED_FROM = 0.1
"""OKS from which a prediction is taken to mean a labelled person at all; the authors' value."""
NEAR, GOOD = 0.5, 0.85
"""Keypoint similarities: of a keypoint that is meant, and of one that people would not place better."""

_UNLABELLED = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class Diagnosis:
    """Predicted persons beside the labelled ones that they mean."""

    predicted: np.ndarray
    """(P,) rows in `ScoredPersons`."""
    labelled: np.ndarray
    """(P,) rows in `GroundTruth`."""
    oks: np.ndarray
    """(P,) over all labelled keypoints."""
    kind: np.ndarray
    """(P, K) position in `KINDS`; -1 where the keypoint is not labelled."""

    def shares(self, members: Sequence[int]) -> dict[str, float]:
        """Kind -> share of the labelled keypoints among `members`; empty if none is labelled."""
        kinds = self.kind[:, list(members)]
        counts = np.array([(kinds == number).sum() for number in range(len(KINDS))])
        return dict(zip(KINDS, (counts / counts.sum()).tolist(), strict=True)) if counts.sum() else {}

    def count(self, members: Sequence[int]) -> int:
        """Labelled keypoints among `members`."""
        return int((self.kind[:, list(members)] != _UNLABELLED).sum())


def diagnose(scored: ScoredPersons, truth: GroundTruth, keypoint_set: KeypointSet) -> Diagnosis:
    """Sort every labelled keypoint of every person that was found by what the model did with it.

    The similarity of a predicted to a labelled keypoint is `exp(-d^2 / (2 area (2 sigma)^2))`, that of COCO's OKS. It
    is taken to the keypoint meant, to its left or right counterpart, and to both of every other person of the image;
    the largest decides:

    - good: the keypoint meant, 0.85 or more; jitter: the same, 0.5 to 0.85;
    - inversion: the counterpart on the same person, 0.5 or more;
    - swap: either on another person, 0.5 or more;
    - miss: nothing is as near as 0.5.

    Args:
        scored: the predicted persons.
        truth: the labels.
        keypoint_set: sigmas, and flip pairs as counterparts.

    Returns: the persons that were found, at OKS 0.1 or more, and their keypoints. Persons nobody predicted are not
        among them: those are what recall measures.
    """
    everything = list(parts_with_whole(keypoint_set).values())[-1]
    matches = run_part(scored, truth, keypoint_set, everything, thresholds=(PAIRED_FROM,)).matches
    found = matches.hit[0]
    predicted, labelled = matches.person[found], matches.truth[0, found]
    order = np.lexsort((labelled, truth.image_id[labelled]))
    predicted, labelled = predicted[order], labelled[order]
    own = np.full((len(predicted), len(keypoint_set)), np.nan)
    kind = np.full(own.shape, _UNLABELLED, dtype=np.int8)
    for first, last in _runs(truth.image_id[labelled]):
        rows = labelled[first:last]
        people = np.flatnonzero((truth.image_id == truth.image_id[rows[0]]) & ~truth.is_crowd)
        similarity = _similarities(scored.detections[predicted[first:last], :, :2], truth, people, keypoint_set)
        own[first:last], kind[first:last] = _judge(similarity, np.searchsorted(people, rows))
    return Diagnosis(predicted=predicted, labelled=labelled, oks=np.nanmean(own, axis=1), kind=kind)


def _runs(values: np.ndarray) -> list[tuple[int, int]]:
    """Begin and end of every run of equal values."""
    starts = np.flatnonzero(np.diff(values)) + 1
    bounds = [0, *starts.tolist(), len(values)]
    return list(itertools.pairwise(bounds)) if len(values) else []


def _similarities(points: np.ndarray, truth: GroundTruth, people: np.ndarray, keypoint_set: KeypointSet) -> np.ndarray:
    """Of predicted points (P, K, 2) to those of labelled people and to their mirror images: (2, P, people, K).

    -1 where a label is missing; the mirror image of a keypoint without counterpart is no other place, so -1 too.
    """
    variance = (2 * np.asarray(keypoint_set.sigmas)) ** 2
    labels, area = truth.keypoints[people], truth.area[people]
    flip = keypoint_set.flip_index
    found = []
    for index in (np.arange(len(flip)), flip):
        distance2 = np.square(points[:, None] - labels[None, :, index, :2]).sum(axis=3)
        likeness = np.exp(-distance2 / (2 * variance * (area[:, None] + np.spacing(1))))
        exists = labels[:, index, 2] > 0
        if index is flip:
            exists = exists & (flip != np.arange(len(flip)))
        found.append(np.where(exists, likeness, -1.0))
    return np.stack(found)


def _judge(similarity: np.ndarray, own_column: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Similarity to the keypoint meant (P, K), nan where it is not labelled, and the kind of each."""
    straight, mirrored = similarity
    rows = np.arange(len(own_column))
    own, inverted = straight[rows, own_column], mirrored[rows, own_column]
    others = np.maximum(straight, mirrored)
    others[rows, own_column] = -1.0
    swapped = others.max(axis=1)
    best = np.maximum(np.maximum(own, inverted), swapped)
    kind = np.select(
        [own < 0, best < NEAR, own == best, inverted == best],
        [_UNLABELLED, KINDS.index("miss"), np.where(own >= GOOD, 0, 1), KINDS.index("inversion")],
        KINDS.index("swap"),
    )
    return np.where(own < 0, np.nan, own), kind


@dataclass(frozen=True, kw_only=True)
class SideConfusion:
    """How often a model takes left for right, for one pair of keypoints."""

    pair: str
    people: int
    """Persons on whom the two can be told apart."""
    one: float
    """Share of them on whom one of the two lies on the other's place."""
    both: float
    """Share on whom the two have changed places."""


def side_confusion(diagnosis: Diagnosis, truth: GroundTruth, keypoint_set: KeypointSet) -> list[SideConfusion]:
    """Left-right confusion of every flip pair with both keypoints labelled, and so far apart that it can be seen.

    Args:
        diagnosis: as `diagnose` gives it.
        truth: its labels.
        keypoint_set: its flip pairs.

    Returns: an entry for each pair that somebody shows, in the order of the set.
    """
    inverted = diagnosis.kind == KINDS.index("inversion")
    labels, area = truth.keypoints[diagnosis.labelled], truth.area[diagnosis.labelled]
    found = []
    for a, b in keypoint_set.flip_pairs:
        variance = (keypoint_set.sigmas[a] + keypoint_set.sigmas[b]) ** 2
        distance2 = np.square(labels[:, a, :2] - labels[:, b, :2]).sum(axis=1)
        apart = np.exp(-distance2 / (2 * variance * (area + np.spacing(1)))) < NEAR
        told = apart & (labels[:, [a, b], 2] > 0).all(axis=1)
        if told.any():
            wrong = inverted[told][:, [a, b]].sum(axis=1)
            name = f"{keypoint_set.names[a]} / {keypoint_set.names[b]}"
            found.append(
                SideConfusion(
                    pair=name, people=int(told.sum()), one=float((wrong == 1).mean()), both=float((wrong == 2).mean())
                )
            )
    return found
