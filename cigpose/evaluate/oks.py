"""Object keypoint similarity between predictions: the person score, and the suppression of duplicates.

Upstream's rules, told at each function and compared in tests/evaluate. N persons of one image, K keypoints;
coordinates are image pixels.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from cigpose.config import EvaluateConfig
from cigpose.evaluate.predictions import Predictions
from cigpose.keypoints import KeypointSet


def oks(keypoints: np.ndarray, area: float, others: np.ndarray, areas: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """Similarity of one predicted person to others; all keypoints count, their scores do not.

    Args:
        keypoints: (K, 2).
        area: of the person, square pixels.
        others: (N, K, 2).
        areas: (N,); each pair is measured by the mean of its two areas.
        sigmas: (K,).

    Returns: (N,) in [0, 1].
    """
    distance2 = np.square(others.astype(np.float64) - keypoints).sum(axis=2)  # (N, K)
    mean_area = (areas + area) / 2 + np.spacing(1)
    variance = np.square(2 * sigmas)
    return np.exp(-distance2 / variance / mean_area[:, None] / 2).mean(axis=1)


def oks_nms(
    keypoints: np.ndarray, scores: np.ndarray, areas: np.ndarray, sigmas: np.ndarray, threshold: float
) -> np.ndarray:
    """Persons that remain when each removes those too similar to it, best first.

    Args:
        keypoints: (N, K, 2).
        scores: (N,) person scores.
        areas: (N,).
        sigmas: (K,).
        threshold: a person is removed when its OKS with a kept one is above.

    Returns: kept rows in descending score, int64.
    """
    order = np.argsort(scores, kind="stable")[::-1]  # of equal scores the later row first, as upstream
    kept = []
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        similarity = oks(keypoints[best], areas[best], keypoints[order], areas[order], sigmas)
        order = order[similarity <= threshold]
    return np.array(kept, dtype=np.int64)


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
    starts = np.flatnonzero(np.diff(image_rank[rows], prepend=-1))
    kept = []
    for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True):
        one = slice(start, stop)
        kept.append(start + oks_nms(people.keypoints[one], scores[one], areas[one], sigmas, config.oks_nms_threshold))
    index = np.concatenate(kept)
    return people.select(index), scores[index]
