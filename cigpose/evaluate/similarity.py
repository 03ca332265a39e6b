"""OKS of predicted to labelled persons, of all pictures at once and to the last bit as pycocotools has it.

N predicted persons, M labelled ones, K keypoints, P pairs of a predicted and a labelled person of one picture.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_CHUNK = 2**18  # numbers of an array at a time, so that they stay in the processor's cache


def pairs_of_pictures(predicted: np.ndarray, labelled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every predicted beside every labelled person of its picture.

    Args:
        predicted: (N,) picture of each predicted person.
        labelled: (M,) picture of each labelled person, ascending.

    Returns: (P,) predicted and (P,) labelled persons, by the predicted one, then by the labelled one.
    """
    first, last = np.searchsorted(labelled, predicted, "left"), np.searchsorted(labelled, predicted, "right")
    counts = last - first
    starts = np.cumsum(counts) - counts
    return np.repeat(np.arange(len(predicted)), counts), np.arange(counts.sum()) + np.repeat(first - starts, counts)


def pair_similarities(
    points: np.ndarray,
    labels: np.ndarray,
    area: np.ndarray,
    bbox_xywh: np.ndarray,
    sigmas: np.ndarray,
    pairs: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """Object keypoint similarity of each pair.

    Args:
        points: (N, K, 2) predicted.
        labels: (M, K, 3) x, y, v. A person without any labelled keypoint is one that is ignored: to it the distance is
            that to its box, doubled.
        area: (M,) square pixels.
        bbox_xywh: (M, 4).
        sigmas: (K,) float32, as pycocotools gets them.
        pairs: as `pairs_of_pictures` gives them.

    Returns: (P,) float64 in [0, 1].
    """
    predicted, truth = pairs
    shown = labels[..., 2] > 0
    counts = shown.sum(axis=1)
    places = np.argsort(~shown, axis=1, kind="stable")  # the labelled keypoints first, in their order
    variance = (sigmas * 2) ** 2
    found = np.empty(len(predicted))
    for count in np.unique(counts[truth]).tolist():  # equal lengths: a row is summed as pycocotools sums its list
        for rows in _chunks(np.flatnonzero(counts[truth] == count), count or len(sigmas)):
            i, j = predicted[rows], truth[rows, None]
            if count:
                index = places[truth[rows], :count]
                offset_x = points[i[:, None], index, 0] - labels[j, index, 0]
                offset_y = points[i[:, None], index, 1] - labels[j, index, 1]
                spread = variance[index]
            else:
                x, y, width, height = np.split(bbox_xywh[truth[rows]], 4, axis=1)
                offset_x = _beyond(points[i, :, 0], x - width, x + width * 2)
                offset_y = _beyond(points[i, :, 1], y - height, y + height * 2)
                spread = variance
            error = (offset_x**2 + offset_y**2) / spread / (area[j] + np.spacing(1)) / 2
            found[rows] = np.exp(-error).sum(axis=1) / error.shape[1]
    return found


def _beyond(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return np.maximum(0, low - values) + np.maximum(0, values - high)


def _chunks(rows: np.ndarray, width: int) -> Iterator[np.ndarray]:
    step = max(1, _CHUNK // width)
    return (rows[start : start + step] for start in range(0, len(rows), step))
