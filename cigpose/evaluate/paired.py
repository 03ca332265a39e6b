"""Two models on the same people: paired differences with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cigpose.config import EvaluateConfig
from cigpose.evaluate.coco import run_part, score_persons
from cigpose.evaluate.ground_truth import GroundTruth
from cigpose.evaluate.matches import resampled_images
from cigpose.evaluate.predictions import Predictions
from cigpose.keypoints import KeypointSet, parts_with_whole


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
    draws = resampled_images(len(shared), samples, seed)
    scored = [score_persons(predictions, truth, keypoint_set, config) for predictions, truth in (first, second)]
    found = []
    for part, members in parts_with_whole(keypoint_set).items():
        tables = [
            run_part(people, truth, keypoint_set, members, shared).matches
            for people, (_, truth) in zip(scored, (first, second), strict=True)
        ]
        if min(table.num_truths.sum() for table in tables) == 0:
            continue
        differences = np.array([tables[1].average_precision(d) - tables[0].average_precision(d) for d in draws])
        low, high = np.nanquantile(differences, [0.025, 0.975])
        before, after = (table.average_precision() for table in tables)
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
