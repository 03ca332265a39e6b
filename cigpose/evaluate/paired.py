"""Two models on the same people: paired differences with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cigpose.config import EvaluateConfig
from cigpose.evaluate.coco import run_part, score_persons
from cigpose.evaluate.ground_truth import GroundTruth
from cigpose.evaluate.predictions import Predictions
from cigpose.keypoints import KeypointSet, parts_with_whole

_RECALLS = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """AP of one part on two versions of the same scenes."""

    part: str
    first: float
    second: float
    low: float
    """2.5 percent quantile of `second - first` over resampled scenes."""
    high: float
    """97.5 percent quantile."""
    scenes: int

    @property
    def difference(self) -> float:
        """`second - first`."""
        return self.second - self.first


def compare_paired(
    first: tuple[Predictions, GroundTruth],
    second: tuple[Predictions, GroundTruth],
    keypoint_set: KeypointSet,
    config: EvaluateConfig,
    *,
    samples: int = 500,
    seed: int = 0,
) -> list[PairedDifference]:
    """AP on two datasets of the same scenes, and how sure the difference is.

    Scenes, not persons, are resampled, and both datasets with the same ones: persons of a scene are not independent,
    and what makes a scene hard makes it hard in both.

    Args:
        first: predictions and labels of one dataset.
        second: of the other; scenes are paired by image id, those in one only are left out.
        keypoint_set: its parts.
        config: the protocol.
        samples: bootstrap samples.
        seed: of the resampling.

    Returns: one entry per part that has a labelled person in both.

    Raises:
        ValueError: no image id is in both datasets.
    """
    shared = sorted(first[1].images.keys() & second[1].images.keys())
    if not shared:
        raise ValueError("paired comparison: the two datasets have no image id in common. Render both with one seed.")
    draws = np.random.default_rng(seed).multinomial(len(shared), np.full(len(shared), 1 / len(shared)), size=samples)
    scored = [score_persons(predictions, truth, keypoint_set, config) for predictions, truth in (first, second)]
    found = []
    for part, members in parts_with_whole(keypoint_set).items():
        tables = [
            _Matches.of(run_part(people, truth, keypoint_set, members, shared))
            for people, (_, truth) in zip(scored, (first, second), strict=True)
        ]
        if min(table.num_truths.sum() for table in tables) == 0:
            continue
        once = np.ones(len(shared), dtype=np.int64)
        differences = np.array([tables[1].average_precision(d) - tables[0].average_precision(d) for d in draws])
        low, high = np.nanquantile(differences, [0.025, 0.975])
        before, after = (table.average_precision(once) for table in tables)
        found.append(PairedDifference(part=part, first=before, second=after, low=low, high=high, scenes=len(shared)))
    return found


def paired_table(differences: Sequence[PairedDifference], names: tuple[str, str]) -> str:
    """A markdown table of paired differences.

    Args:
        differences: as `compare_paired` gives them.
        names: of the two datasets.
    """
    lines = [f"| part | {names[0]} | {names[1]} | difference | 95 % interval |", "| --- | ---: | ---: | ---: | ---: |"]
    for row in differences:
        interval = f"{row.low:+.3f} to {row.high:+.3f}"
        lines.append(f"| {row.part} | {row.first:.3f} | {row.second:.3f} | {row.difference:+.3f} | {interval} |")
    scenes = differences[0].scenes if differences else 0
    return "\n".join(lines) + f"\n\nAP over {scenes} scenes; bootstrap over scenes, paired.\n"


@dataclass(frozen=True, kw_only=True, eq=False)
class _Matches:
    """pycocotools' matches of one part, sorted by score: D predictions, T thresholds, I images."""

    image: np.ndarray
    """(D,) position of the image."""
    hit: np.ndarray
    """(T, D) bool."""
    counted: np.ndarray
    """(T, D) bool: not matched to an ignored person."""
    num_truths: np.ndarray
    """(I,)."""

    @classmethod
    def of(cls, run: Any) -> _Matches:
        """From a finished evaluation; all areas."""
        images = run.evalImgs[: len(run.params.imgIds)]
        thresholds = len(run.params.iouThrs)
        filled = [(i, entry) for i, entry in enumerate(images) if entry is not None]
        empty = [np.zeros((thresholds, 0))]
        scores = np.concatenate([np.zeros(0), *(entry["dtScores"] for _, entry in filled)])
        order = np.argsort(-scores, kind="mergesort")
        matched = np.concatenate(empty + [entry["dtMatches"] for _, entry in filled], axis=1)[:, order] > 0
        ignored = np.concatenate(empty + [entry["dtIgnore"] for _, entry in filled], axis=1)[:, order] > 0
        positions = np.concatenate([np.full(len(entry["dtScores"]), i) for i, entry in filled] or [np.zeros(0)])
        num_truths = np.zeros(len(images), dtype=np.int64)
        for i, entry in filled:
            num_truths[i] = np.count_nonzero(np.asarray(entry["gtIgnore"]) == 0)
        return cls(
            image=positions[order].astype(np.int64), hit=matched & ~ignored, counted=~ignored, num_truths=num_truths
        )

    def average_precision(self, times: np.ndarray) -> float:
        """AP as pycocotools has it, each image taken so many times, (I,); nan without a labelled person."""
        total = int(self.num_truths @ times)
        if total == 0:
            return float("nan")
        weight = times[self.image]
        hits = np.cumsum(self.hit * weight, axis=1)  # (T, D)
        shown = np.cumsum(self.counted * weight, axis=1)
        precision = hits / np.maximum(shown, 1)
        envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        recall = hits / total
        values = []
        for row, steps in zip(envelope, recall, strict=True):
            at = np.searchsorted(steps, _RECALLS, side="left")
            values.append(np.append(row, 0.0)[at])
        return float(np.mean(values))
