"""OKS sigmas of keypoints that nobody publishes: from people labelled twice, or from what a model misses.

COCO's sigma of a keypoint is the root of E[d^2 / s^2] over people, d how far a label lies from where it should be and
s^2 the person's area. Here the mean is taken through the median, d^2 / s^2 being exponential where labels scatter
normally, so that a few swapped or slipped labels do not decide.

N people, K keypoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cigpose.dataset.labels import OwnLabels
from cigpose.dataset.names import published_sigmas
from cigpose.keypoints import KeypointSet

LEAST_PEOPLE = 20
"""Of whom a keypoint is labelled, for an estimate of it."""
LEAST_ANCHORS = 3
"""Keypoints with published sigmas from which the share of a model's own error is judged."""
SAME_PERSON = 0.5
"""Intersection over union of boxes from which on two files mean one person."""


@dataclass(frozen=True, kw_only=True)
class SigmaEstimate:
    """Estimates, and how they were made."""

    values: np.ndarray
    """(K,) sigmas; nan where too few are labelled."""
    counts: np.ndarray
    """(K,) people each rests on."""
    method: str
    """In words, as it stands beside an AP."""
    limits: str
    """What they do not know."""


def sigmas_of_repeats(first: np.ndarray, second: np.ndarray, area: np.ndarray) -> SigmaEstimate:
    """From people who were labelled twice, by different annotators.

    Args:
        first: (N, K, 3) x, y, v of one label.
        second: (N, K, 3) of the other.
        area: (N,) square pixels.
    """
    squares, counts = _median_squares(first, second, area)
    return SigmaEstimate(
        values=np.sqrt(squares / 2),  # two labels, each with its own error
        counts=counts,
        method=f"estimated from {len(first)} people labelled twice",
        limits="They hold how far two annotators differ, not what all of them do wrong together; an annotator who "
        "labelled twice from memory, or corrected the other's labels, makes them too small.",
    )


def sigmas_of_residuals(
    predicted: np.ndarray, labels: np.ndarray, area: np.ndarray, keypoints: KeypointSet
) -> SigmaEstimate:
    """From how far a model's predictions lie from labels of people it was not trained on.

    A residual holds the model's error beside the label's. Where some keypoints have published sigmas, the median of
    published over found scales all, and takes the model's usual share out.

    Args:
        predicted: (N, K, 2) x, y.
        labels: (N, K, 3) x, y, v.
        area: (N,) square pixels.
        keypoints: names.
    """
    with_scores = np.concatenate([predicted, np.ones_like(predicted[..., :1])], axis=2)
    squares, counts = _median_squares(with_scores, labels, area)
    found = np.sqrt(squares)
    published = {name: sigma for name, (sigma, _) in published_sigmas(keypoints.names).items()}
    known = np.array([published.get(name, np.nan) for name in keypoints.names])
    ratios = (known / found)[np.isfinite(known / found)]
    method = f"estimated from residuals of a model on {len(predicted)} people"
    if len(ratios) < LEAST_ANCHORS:
        return SigmaEstimate(
            values=found,
            counts=counts,
            method=f"{method}, its own error in them",
            limits="The model's own error is in them, and too few keypoints have published sigmas to take it out: they "
            "are too large, and the AP too kind. Models compare by it with each other only. People labelled twice "
            "(--again) give better ones.",
        )
    return SigmaEstimate(
        values=found * float(np.median(ratios)),
        counts=counts,
        method=f"{method}, scaled at {len(ratios)} published ones",
        limits=f"Scaled by {np.median(ratios):.2f}, the middle of published over found at {len(ratios)} keypoints; a "
        "keypoint that is harder for the model than for people still gets too large a sigma. People labelled twice "
        "(--again) give better ones.",
    )


def _median_squares(first: np.ndarray, second: np.ndarray, area: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(K,) means of d^2 / s^2 by way of their medians, nan where too few; and (K,) people each rests on."""
    both = (first[..., 2] > 0) & (second[..., 2] > 0) & (area > 0)[:, None]
    squares = np.square(first[..., :2] - second[..., :2]).sum(axis=2) / np.where(area > 0, area, 1)[:, None]
    counts = both.sum(axis=0)
    means = np.full(first.shape[1], np.nan)
    for k in np.flatnonzero(counts >= LEAST_PEOPLE):
        means[k] = np.median(squares[both[:, k], k]) / math.log(2)
    return np.where(means > 0, means, np.nan), counts


def repeated_people(labels: OwnLabels, again: OwnLabels | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """People with two labels: those whose file has both, and those of two files in the same place of one picture.

    Args:
        labels: a file.
        again: another one of some of the same pictures, labelled anew.

    Returns: (N, K, 3) keypoints of the one, of the other, and (N,) areas.
    """
    people = {person["id"]: person for person in labels.people}
    pairs = [(people[other["repeats"]], other) for other in labels.repeats if other["repeats"] in people]
    if again is not None:
        pairs += _same_people(labels, again)
    count = labels.num_keypoints
    first, second = (
        np.array([pair[side]["keypoints"] for pair in pairs], dtype=np.float64).reshape(-1, count, 3) for side in (0, 1)
    )
    return first, second, np.array([one["area"] for one, _ in pairs], dtype=np.float64)


def _same_people(labels: OwnLabels, again: OwnLabels) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    names = [{image["id"]: image["file_name"] for image in side.images} for side in (labels, again)]
    by_picture: dict[str, list[dict[str, Any]]] = {}
    for person in again.people:
        by_picture.setdefault(names[1][person["image_id"]], []).append(person)
    pairs = []
    for person in labels.people:
        others = by_picture.get(names[0][person["image_id"]], [])
        best = max(others, key=lambda other: _overlap(person["bbox"], other["bbox"]), default=None)
        if best is not None and _overlap(person["bbox"], best["bbox"]) >= SAME_PERSON:
            others.remove(best)
            pairs.append((person, best))
    return pairs


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes x, y, width, height."""
    sides = [min(one[i] + one[i + 2], other[i] + other[i + 2]) - max(one[i], other[i]) for i in (0, 1)]
    shared = max(sides[0], 0.0) * max(sides[1], 0.0)
    total = one[2] * one[3] + other[2] * other[3] - shared
    return shared / total if total > 0 else 0.0


def chosen_values(estimate: SigmaEstimate, keypoints: KeypointSet, *, everyone: bool) -> dict[str, float]:
    """Keypoint -> estimate to measure with: of those nobody publishes, or of all; rounded as COCO's are."""
    published = published_sigmas(keypoints.names)
    return {
        name: max(0.001, round(float(value), 3))
        for name, value in zip(keypoints.names, estimate.values, strict=True)
        if math.isfinite(value) and (everyone or name not in published)
    }


def origin_of(keypoints: KeypointSet, values: Mapping[str, float], method: str) -> str:
    """A line on where the sigmas come from, once these are among them."""
    published = published_sigmas(keypoints.names)
    others: dict[str, int] = {}
    for name, sigma in zip(keypoints.names, keypoints.sigmas, strict=True):
        if name not in values:
            is_published = name in published and math.isclose(sigma, published[name][0])
            origin = f"published by {published[name][1]}" if is_published else "as in `keypoints`"
            others[origin] = others.get(origin, 0) + 1
    told = [f"{method} ({len(values)} of {len(keypoints)})", *(f"{text} ({count})" for text, count in others.items())]
    return ", ".join(told) if others else method
