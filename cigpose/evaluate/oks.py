"""Object keypoint similarity between predictions: the person score, and the suppression of duplicates.

Upstream's rules, told at each function and compared in tests/evaluate. N persons of one image, K keypoints;
coordinates are image pixels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Literal

import numpy as np

from cigpose.config import EvaluateConfig
from cigpose.evaluate.predictions import Predictions
from cigpose.keypoints import KeypointSet

_PAIRS = 2**16  # compared at a time
_ROUNDING = 1e-6  # of a sum of similarities, more than enough


def oks(
    keypoints: np.ndarray, area: np.ndarray | float, others: np.ndarray, areas: np.ndarray, sigmas: np.ndarray
) -> np.ndarray:
    """Similarity of predicted persons to others; all keypoints count, their scores do not.

    Args:
        keypoints: (N, K, 2), or (K, 2) of one person.
        area: (N,) square pixels, or that of the one.
        others: (N, K, 2).
        areas: (N,); each pair is measured by the mean of its two areas.
        sigmas: (K,).

    Returns: (N,) in [0, 1].
    """
    return _keypoint_similarities(keypoints, area, others, areas, sigmas).mean(axis=1)


def _keypoint_similarities(
    keypoints: np.ndarray, area: np.ndarray | float, others: np.ndarray, areas: np.ndarray, sigmas: np.ndarray
) -> np.ndarray:
    distance2 = np.square(others.astype(np.float64) - keypoints).sum(axis=2)  # (N, K)
    mean_area = (areas + area) / 2 + np.spacing(1)
    variance = np.square(2 * sigmas)
    found: np.ndarray = np.exp(-distance2 / variance / mean_area[:, None] / 2)
    return found


def oks_nms(
    keypoints: np.ndarray,
    scores: np.ndarray,
    areas: np.ndarray,
    sigmas: np.ndarray,
    threshold: float,
    image: np.ndarray | None = None,
) -> np.ndarray:
    """Persons that remain when each removes those of its image that are too similar to it, best first.

    Args:
        keypoints: (N, K, 2).
        scores: (N,) person scores.
        areas: (N,).
        sigmas: (K,).
        threshold: a person is removed when its OKS with a kept one is above.
        image: (N,) ascending; None: all persons are of one image.

    Returns: kept rows, image by image in descending score, int64.
    """
    num = len(scores)
    image = np.zeros(num, dtype=np.int64) if image is None else image
    order = np.lexsort((-np.arange(num), -scores, image))  # of equal scores the later row first, as upstream
    last = np.searchsorted(image, image, "right")  # of an ascending array: in `order` the same
    kept = np.ones(num, dtype=bool)
    few = _telling_keypoints(len(sigmas), threshold)
    some = keypoints[:, few]
    for better, worse in _pair_blocks(last):
        one, other = order[better], order[worse]
        told = _keypoint_similarities(some[one], areas[one], some[other], areas[other], sigmas[few]).sum(axis=1)
        rows = np.flatnonzero(told + (len(sigmas) - len(few)) > threshold * len(sigmas) - _ROUNDING)
        one, other = one[rows], other[rows]
        rows = rows[oks(keypoints[one], areas[one], keypoints[other], areas[other], sigmas) > threshold]
        for i, j in zip(better[rows].tolist(), worse[rows].tolist(), strict=True):
            if kept[i]:
                kept[j] = False
    return order[kept]


def _telling_keypoints(num: int, threshold: float) -> np.ndarray:
    """So few that most persons are told apart by them, whatever all others say."""
    few = min(num, math.ceil((1 - threshold) * num) + 3)
    return np.linspace(0, num - 1, few).astype(np.int64)


def _pair_blocks(last: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All i and j with i < j < last[i], by i, then by j; some at a time."""
    counts = last - np.arange(len(last)) - 1
    block = (np.cumsum(counts) - counts) // _PAIRS  # in which the pairs of an i begin
    for first, stop in itertools.pairwise([*np.flatnonzero(np.diff(block, prepend=-1)).tolist(), len(last)]):
        some = counts[first:stop]
        i = np.repeat(np.arange(first, stop), some)
        yield i, i + 1 + np.arange(len(i)) - np.repeat(np.cumsum(some) - some, some)


def person_scores(
    box_score: np.ndarray,
    keypoint_scores: np.ndarray,
    threshold: float,
    rule: Literal["box_and_keypoints", "box", "keypoints"] = "box_and_keypoints",
) -> np.ndarray:
    """One score per person: its box score times the mean of its keypoint scores above a threshold.

    Args:
        box_score: (N,).
        keypoint_scores: (N, K), raw.
        threshold: keypoints at or below do not count; a person without any above scores 0.
        rule: `box` takes the box score alone, `keypoints` the mean over ALL keypoints, both as upstream's options do.

    Returns: (N,) float64.
    """
    scores = keypoint_scores.astype(np.float64)
    if rule == "box":
        return box_score.astype(np.float64)
    if rule == "keypoints":
        return scores.mean(axis=1)
    counted = scores > threshold
    mean = np.where(counted, scores, 0).sum(axis=1) / np.maximum(counted.sum(axis=1), 1)
    return box_score.astype(np.float64) * mean


def select_persons(
    predictions: Predictions, keypoint_set: KeypointSet, config: EvaluateConfig
) -> tuple[Predictions, np.ndarray]:
    """Drop repeated ids, score every person, remove duplicates by OKS.

    Args:
        predictions: of any number of images, in any order.
        keypoint_set: its sigmas.
        config: `keypoint_score_threshold`, `person_score`, `oks_nms_threshold`.

    Returns: the persons that remain, image by image in order of first appearance and best first, and their scores (M,).
    """
    if len(predictions) == 0:
        return predictions, np.zeros(0)
    images, first, inverse = np.unique(predictions.image_id, return_index=True, return_inverse=True)
    appearance = np.empty(len(images), dtype=np.int64)
    appearance[np.argsort(first)] = np.arange(len(images))
    image_rank = appearance[inverse]
    rows = np.lexsort((predictions.person_id, image_rank))  # stable: of repeated ids the first given stays
    repeated = np.zeros(len(rows), dtype=bool)
    repeated[1:] = (np.diff(image_rank[rows]) == 0) & (np.diff(predictions.person_id[rows]) == 0)
    rows = rows[~repeated]
    people = predictions.select(rows)
    scores = person_scores(
        people.box_score, people.keypoint_scores, config.keypoint_score_threshold, config.person_score
    )
    if config.oks_nms_threshold is None:
        return people, scores
    areas = people.scale.astype(np.float64).prod(axis=1)
    sigmas = np.asarray(keypoint_set.sigmas, dtype=np.float32)
    index = oks_nms(people.keypoints, scores, areas, sigmas, config.oks_nms_threshold, image_rank[rows])
    return people.select(index), scores[index]
