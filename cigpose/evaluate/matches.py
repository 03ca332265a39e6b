"""Which prediction is which labelled person, as pycocotools matched them, and what can be counted from that.

T thresholds of the object keypoint similarity (OKS), D predictions by falling score, I images, M labelled persons.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

_RECALLS = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True, kw_only=True, eq=False)
class Matches:
    """The matches of one part over all areas."""

    thresholds: np.ndarray
    """(T,) OKS."""
    image: np.ndarray
    """(D,) position of the image."""
    person: np.ndarray
    """(D,) row of the predicted person in `ScoredPersons`."""
    truth: np.ndarray
    """(T, D) row of the matched person in `GroundTruth`; -1 where there is none."""
    hit: np.ndarray
    """(T, D) bool."""
    counted: np.ndarray
    """(T, D) bool: not matched to an ignored person."""
    truth_image: np.ndarray
    """(M,) position of the image of each labelled person; -1 for those that do not count."""
    num_images: int

    @property
    def num_truths(self) -> np.ndarray:
        """(I,) labelled persons of each image that count."""
        return np.bincount(self.truth_image[self.truth_image >= 0], minlength=self.num_images)

    def precision(self, times: np.ndarray | None = None) -> np.ndarray:
        """(T, 101) precision at recall 0, 0.01 .. 1 as pycocotools has it; nan without a labelled person.

        Args:
            times: (I,) how often each image is taken; None: once.
        """
        times = np.ones(self.num_images, dtype=np.int64) if times is None else times
        total = int(self.num_truths @ times)
        if total == 0:
            return np.full((len(self.thresholds), len(_RECALLS)), np.nan)
        weight = times[self.image]
        hits = np.cumsum(self.hit * weight, axis=1)  # (T, D)
        shown = np.cumsum(self.counted * weight, axis=1)
        envelope = np.maximum.accumulate((hits / np.maximum(shown, 1))[:, ::-1], axis=1)[:, ::-1]
        recall = hits / total
        rows = []
        for row, steps in zip(envelope, recall, strict=True):
            at = np.searchsorted(steps, _RECALLS, side="left")
            rows.append(np.append(row, 0.0)[at])
        return np.array(rows)

    def average_precision(self, times: np.ndarray | None = None) -> float:
        """AP over all thresholds, see `precision`."""
        return float(self.precision(times).mean())

    def average_recall(self) -> float:
        """Share of the labelled persons that are found, mean over the thresholds; nan without a labelled person."""
        total = int(self.num_truths.sum())
        return float(self.hit.sum(axis=1).mean() / total) if total else float("nan")

    def interval(self, draws: np.ndarray) -> tuple[float, float]:
        """95 percent bootstrap interval of the AP.

        Args:
            draws: (S, I) how often each image is taken in each sample, see `resampled_images`.
        """
        low, high = np.nanquantile([self.average_precision(times) for times in draws], [0.025, 0.975])
        return float(low), float(high)

    def of_group(self, members: np.ndarray, nearest: np.ndarray) -> Matches:
        """The same matches where only some labelled persons count.

        A prediction matched to one outside the group is left out. One that is matched to nobody counts against the
        group of the person it lies on, and against every group if it lies on nobody.

        Args:
            members: (M,) bool.
            nearest: (N,) for every predicted person the row of the labelled one it lies on, or -1.
        """
        inside = np.append(members, False)
        lies_on = nearest[self.person]
        counted = self.counted & np.where(self.truth >= 0, inside[self.truth], inside[lies_on] | (lies_on < 0))
        return dataclasses.replace(
            self,
            hit=self.hit & inside[self.truth],
            counted=counted,
            truth_image=np.where(members, self.truth_image, -1),
        )


def resampled_images(num_images: int, samples: int, seed: int = 0) -> np.ndarray:
    """(samples, num_images) int64: how often each image is drawn, with replacement.

    Images, not persons, are drawn: the persons of an image are not independent.
    """
    return np.random.default_rng(seed).multinomial(num_images, np.full(num_images, 1 / num_images), size=samples)
