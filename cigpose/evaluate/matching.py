"""One evaluation as pycocotools has it, fed with similarities that are already known.

Its accumulation and its summary are called; its matching, which is most of its time, is done here for all images at
once, and tests compare every figure with pycocotools' own to the last bit.

D predicted persons that are looked at, M labelled ones, I images, T thresholds, A ranges of area.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval

from cigpose.evaluate.matches import Matches

MAX_PERSONS_PER_IMAGE = 20
_PERSON = 1  # the one category
_SURE = 1 - 1e-10  # a similarity that matches at any threshold, as pycocotools has it


@dataclass(frozen=True, kw_only=True, eq=False)
class PeopleOfPart:
    """Whom an evaluation is about, and who is like whom."""

    num_images: int
    num_truths: int
    """Of `GroundTruth`."""
    thresholds: np.ndarray | None
    """(T,) OKS; None: COCO's ten."""
    image: np.ndarray
    """(D,) position of the image, ascending, and within an image by falling score."""
    person: np.ndarray
    """(D,) row of the predicted person in `ScoredPersons`."""
    score: np.ndarray
    """(D,)."""
    area: np.ndarray
    """(D,) square pixels."""
    truth_image: np.ndarray
    """(M,) position of the image, ascending."""
    truth: np.ndarray
    """(M,) row of the labelled person in `GroundTruth`."""
    truth_area: np.ndarray
    """(M,) square pixels."""
    is_crowd: np.ndarray
    """(M,) bool."""
    is_ignored: np.ndarray
    """(M,) bool: a crowd, or without a labelled keypoint here."""
    pairs: tuple[np.ndarray, np.ndarray]
    """(P,) predicted and (P,) labelled persons of one image that are alike enough for the lowest threshold."""
    similarity: np.ndarray
    """(P,) of the pairs."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PartRun:
    """What pycocotools found."""

    stats: tuple[float, ...]
    """Its ten figures (`cigpose.config.outcome.FIGURES`)."""
    precision: np.ndarray
    """(T, 101) over all areas, -1 where there is nobody."""
    matches: Matches


def lowest_similarity(thresholds: np.ndarray | None) -> float:
    """What pycocotools takes for a match at the lowest of some thresholds (None: COCO's)."""
    if thresholds is None:
        thresholds = COCOeval(iouType="keypoints").params.iouThrs
    return min(float(np.min(thresholds)), _SURE)


def match_part(people: PeopleOfPart) -> PartRun:
    """Match, accumulate and sum up; prints nothing."""
    run = COCOeval(iouType="keypoints")
    params = run.params
    params.imgIds, params.catIds = list(range(people.num_images)), [_PERSON]
    params.maxDets = [MAX_PERSONS_PER_IMAGE]
    if people.thresholds is not None:
        params.iouThrs = np.asarray(people.thresholds)
    low, high = np.array(params.areaRng).T[..., None]  # (A, 1)
    truth_ignored = people.is_ignored | (people.truth_area < low) | (people.truth_area > high)  # (A, M)
    matched = match_persons(people, np.asarray(params.iouThrs), truth_ignored)  # (A, T, D)
    outside = (people.area < low) | (people.area > high)  # (A, D)
    of_matched = np.take_along_axis(truth_ignored[:, None], np.maximum(matched, 0), axis=2) if len(people.truth) else 0
    ignored = np.where(matched >= 0, of_matched, outside[:, None])
    run.evalImgs = [entry for tables in zip(matched + 1, ignored, truth_ignored, strict=True)
                    for entry in _entries(people, *tables)]  # fmt: skip
    run._paramsEval = copy.deepcopy(params)
    with contextlib.redirect_stdout(io.StringIO()):
        run.accumulate()
        run.summarize()
    return PartRun(
        stats=tuple(float(value) for value in run.stats),
        precision=run.eval["precision"][:, :, 0, 0, 0],
        matches=_matches(people, np.asarray(params.iouThrs), matched[0], ignored[0], truth_ignored[0]),
    )


def match_persons(people: PeopleOfPart, thresholds: np.ndarray, truth_ignored: np.ndarray) -> np.ndarray:
    """Pycocotools' matches, of all images, thresholds and ranges of area at once.

    In every image the predicted persons choose by turns, best first: the most alike of those who are not ignored, else
    of those who are; of equals the last. Whom somebody has chosen is gone, but for crowds.

    Args:
        people: the pairs to choose from.
        thresholds: (T,).
        truth_ignored: (A, M) bool.

    Returns: (A, T, D) position of the labelled person, -1 for nobody.
    """
    shape = len(truth_ignored), len(thresholds)
    found = np.full((*shape, len(people.person)), -1)
    taken = np.zeros((*shape, len(people.truth)), dtype=bool)
    predicted, labelled = people.pairs
    choosing, first = np.unique(predicted, return_index=True)
    image = people.image[choosing]
    turn = np.repeat(np.arange(len(choosing)) - np.searchsorted(image, image), np.diff([*first, len(predicted)]))
    order = np.lexsort((labelled, people.similarity, predicted, turn))  # who stands last among equals is chosen
    limits = np.minimum(thresholds, _SURE)[:, None]
    for start, stop in itertools.pairwise(np.searchsorted(turn[order], np.arange(turn.max(initial=-1) + 2))):
        pairs = order[start:stop]
        who, whom = predicted[pairs], labelled[pairs]
        free = (people.similarity[pairs] >= limits) & (~taken[..., whom] | people.is_crowd[whom])  # (A, T, pairs)
        worth = np.where(truth_ignored[:, None, whom], 0, len(pairs)) + np.arange(1, len(pairs) + 1)
        starts = np.flatnonzero(np.diff(who, prepend=-1))
        best = np.maximum.reduceat(np.where(free, worth, 0), starts, axis=2)
        area, threshold, place = np.nonzero(best)
        chosen = whom[(best[area, threshold, place] - 1) % len(pairs)]
        found[area, threshold, who[starts[place]]] = chosen
        taken[area, threshold, chosen] = True
    return found


def _entries(
    people: PeopleOfPart, matched: np.ndarray, ignored: np.ndarray, truth_ignored: np.ndarray
) -> list[dict[str, Any] | None]:
    """What pycocotools' accumulation reads of every image; None where there is nobody at all."""
    bounds = np.arange(people.num_images + 1)
    ends = np.searchsorted(people.image, bounds).tolist()
    truth_ends = np.searchsorted(people.truth_image, bounds).tolist()
    return [
        {
            "dtScores": people.score[first:last],
            "dtMatches": matched[:, first:last],
            "dtIgnore": ignored[:, first:last],
            "gtIgnore": truth_ignored[low:high],
        }
        if first < last or low < high
        else None
        for first, last, low, high in zip(ends[:-1], ends[1:], truth_ends[:-1], truth_ends[1:], strict=True)
    ]


def _matches(
    people: PeopleOfPart, thresholds: np.ndarray, matched: np.ndarray, ignored: np.ndarray, truth_ignored: np.ndarray
) -> Matches:
    order = np.argsort(-people.score, kind="mergesort")
    truth = np.append(people.truth, -1)[matched[:, order]]
    counted = ~ignored[:, order]
    truth_image = np.full(people.num_truths, -1)
    truth_image[people.truth[~truth_ignored]] = people.truth_image[~truth_ignored]
    return Matches(
        thresholds=thresholds,
        image=people.image[order],
        person=people.person[order],
        truth=truth,
        hit=(truth >= 0) & counted,
        counted=counted,
        truth_image=truth_image,
        num_images=people.num_images,
    )
