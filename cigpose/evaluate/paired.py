"""Two models on the same people: paired differences with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cigpose.config import EvaluateConfig
from cigpose.evaluate.coco import ScoredPersons, run_part, score_persons
from cigpose.evaluate.diagnosis import diagnose
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
    return _differences(scored, (first[1], second[1]), keypoint_set, shared, draws)


def _differences(
    scored: Sequence[ScoredPersons],
    truths: Sequence[GroundTruth],
    keypoint_set: KeypointSet,
    shared: Sequence[int],
    draws: np.ndarray,
) -> list[PairedDifference]:
    found = []
    for part, members in parts_with_whole(keypoint_set).items():
        tables = [
            run_part(people, truth, keypoint_set, members, shared).matches
            for people, truth in zip(scored, truths, strict=True)
        ]
        if min(table.num_truths.sum() for table in tables) == 0:
            continue
        differences = np.array([tables[1].average_precision(d) - tables[0].average_precision(d) for d in draws])
        low, high = np.nanquantile(differences, [0.025, 0.975])
        before, after = (table.average_precision() for table in tables)
        found.append(
            PairedDifference(
                part=part, first=before, second=after, low=float(low), high=float(high), scenes=len(shared)
            )
        )
    return found


@dataclass(frozen=True, kw_only=True)
class PersonComparison:
    """Two models on the same labelled persons."""

    parts: list[PairedDifference]
    people: int
    """Labelled persons that either of the two found, at OKS 0.1 or more; who was not found has OKS 0."""
    better: int
    """Persons on whom the second is better, by OKS over all labelled keypoints."""
    worse: int
    difference: float
    """Of the OKS, mean over persons: second - first."""
    low: float
    """2.5 percent quantile over resampled pictures."""
    high: float
    """97.5 percent quantile."""

    def to_markdown(self, names: tuple[str, str]) -> str:
        """The parts as a table, and the persons as a sentence."""
        people = (
            f"Person by person: {names[1]} is better on {self.better}, worse on {self.worse} of {self.people}; OKS "
            f"{self.difference:+.4f} ({self.low:+.4f} to {self.high:+.4f}).\n"
        )
        return paired_table(self.parts, names) + "\n" + people


def compare_models(
    first: ScoredPersons,
    second: ScoredPersons,
    truth: GroundTruth,
    keypoint_set: KeypointSet,
    *,
    samples: int = 500,
    seed: int = 0,
) -> PersonComparison:
    """Two models on the same labels: AP per part, and OKS person by person, with paired intervals over pictures."""
    images = np.array(sorted(truth.images), dtype=np.int64)
    draws = resampled_images(len(images), samples, seed)
    parts = _differences((first, second), (truth, truth), keypoint_set, images.tolist(), draws)
    oks = np.zeros((2, len(truth)))
    for row, scored in zip(oks, (first, second), strict=True):
        diagnosis = diagnose(scored, truth, keypoint_set)
        row[diagnosis.labelled] = diagnosis.oks
    people = np.flatnonzero(oks.any(axis=0))
    difference = oks[1, people] - oks[0, people]
    at = np.searchsorted(images, truth.image_id[people])
    sums, counts = (np.bincount(at, weights, minlength=len(images)) for weights in (difference, None))
    drawn = (draws @ sums) / np.maximum(draws @ counts, 1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return PersonComparison(
        parts=parts,
        people=len(people),
        better=int((difference > 0).sum()),
        worse=int((difference < 0).sum()),
        difference=float(difference.mean()) if len(people) else 0.0,
        low=float(low),
        high=float(high),
    )


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
