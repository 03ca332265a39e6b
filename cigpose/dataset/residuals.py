"""What a trained model says of labels: how far it is from them, and how far it is allowed to be.

Its usual error of every keypoint, and how often it is altogether wrong at scores like these, are measured on the set
itself; a model that does not know a keypoint or a kind of person has little to say there. N people, K keypoints.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cigpose.dataset.repairs import Repair

_ANYWHERE = 1 / (np.pi * 0.25)
"""Density of a place unrelated to the right one, per squared person's size."""
_RAYLEIGH = 1.1774  # median by sigma
_LEAST_SIGMA = 0.004
_FAR = 4.0  # sigmas from which on a prediction counts as altogether wrong
_SCORE_BINS = 6
_LEAST_WRONG = 0.003
_LEAST_OF_A_KEYPOINT = 20
_DEPENDENCE = 0.5  # keypoints of a person are wrong together: half of what they say together counts
_MOST_OF_A_PERSON = 60.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Residuals:
    """The model's poses of everybody beside the labels. Distances are shares of the person's size."""

    points: np.ndarray
    """(N, K, 2) as the model has them; NaN where it has no such keypoint, or the person was not predicted."""
    chances: np.ndarray
    """(N, K): that a keypoint of such a score is altogether wrong, on people who are not."""
    missed: float
    """Share of people of whom most keypoints are."""
    sigmas: np.ndarray
    """(K,) of the others; NaN where the model was not measured."""
    size: np.ndarray
    """(N,)."""
    keypoints: np.ndarray
    """(N, K, 3) the labels."""

    @classmethod
    def measure(cls, keypoints: np.ndarray, size: np.ndarray, points: np.ndarray, scores: np.ndarray) -> Residuals:
        """Compare.

        Args:
            keypoints: (N, K, 3) labels.
            size: (N,) of the people, in pixels.
            points: (N, K, 2) of the model, NaN where it has none.
            scores: (N, K) of the model.
        """
        apart = np.linalg.norm(points - keypoints[..., :2], axis=2) / size[:, None]
        apart = np.where(keypoints[..., 2] > 0, apart, np.nan)
        enough = np.isfinite(apart).sum(axis=0) >= _LEAST_OF_A_KEYPOINT
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            sigmas = np.where(enough, np.maximum(np.nanmedian(apart, axis=0) / _RAYLEIGH, _LEAST_SIGMA), np.nan)
        wrong, chances = apart > _FAR * sigmas, np.ones_like(apart)
        known = np.isfinite(apart) & np.isfinite(sigmas)
        off = (wrong & known).sum(axis=1) > 0.5 * known.sum(axis=1)  # whole people, who are another matter
        missed = float(off[known.any(axis=1)].mean()) if known.any() else 1.0
        known &= ~off[:, None]
        if known.any():
            edges = np.quantile(scores[known], np.linspace(0, 1, _SCORE_BINS + 1)[1:-1])
            places = np.searchsorted(edges, scores)
            for place in range(_SCORE_BINS):
                of = known & (places == place)
                chances[places == place] = max(float(wrong[of].mean()), _LEAST_WRONG) if of.any() else 1.0
        return cls(
            points=points,
            chances=np.minimum(chances, 0.99),
            missed=max(missed, _LEAST_WRONG),
            sigmas=sigmas,
            size=size,
            keypoints=keypoints,
        )

    def repairs(self, repairs: Sequence[Repair]) -> np.ndarray:
        """(N, R) log ratio of likelihoods that each repair is due; 0 where the model says nothing."""
        found = np.zeros((len(self.keypoints), len(repairs)))
        labelled, now = self.keypoints[..., 2] > 0, self._likelihood(self.points, self.keypoints)
        for column, repair in enumerate(repairs):
            moved = list(repair.keypoints)
            then = self._likelihood(self.points, self.keypoints[:, repair.order])
            both = labelled & labelled[:, repair.order]
            change = np.where(both, then - now, 0)[:, moved]
            found[:, column] = _together(change, _MOST_OF_A_PERSON)
        return found

    def without(self) -> np.ndarray:
        """(N, K) log ratio of likelihoods that a labelled keypoint is somewhere else."""
        now = self._likelihood(self.points, self.keypoints)
        return np.where(self.keypoints[..., 2] > 0, np.nan_to_num(np.log(_ANYWHERE) - now), 0.0)

    def whole(self) -> np.ndarray:
        """(N,) log ratio of likelihoods that the whole person is somewhere else, were the model never at fault."""
        return _together(self.without(), _MOST_OF_A_PERSON)

    def instead(self, rows: np.ndarray, points: np.ndarray) -> np.ndarray:
        """(M,) log ratio of likelihoods that the labels of some are those of another picture.

        Args:
            rows: (M,) of the people.
            points: (M, K, 2) that the model has there.
        """
        labels = self.keypoints[rows]
        change = self._likelihood(points, labels, rows) - self._likelihood(self.points[rows], labels, rows)
        return _together(np.where(labels[..., 2] > 0, change, 0), _MOST_OF_A_PERSON)

    def _likelihood(self, points: np.ndarray, labels: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """(N, K) log density of the labels around the model's points; NaN where it has none."""
        size, chances = (self.size, self.chances) if rows is None else (self.size[rows], self.chances[rows])
        apart = np.linalg.norm(points - labels[..., :2], axis=2) / size[:, None]
        near = np.exp(-0.5 * (apart / self.sigmas) ** 2) / (2 * np.pi * self.sigmas**2)
        return np.asarray(np.log((1 - chances) * near + chances * _ANYWHERE))


def _together(change: np.ndarray, most: float) -> np.ndarray:
    """(N,) of (N, K): a person's keypoints together, which do not speak independently."""
    return np.clip(_DEPENDENCE * np.nan_to_num(change).sum(axis=1), -most, most)
