"""What of an evaluation is enough to compare its AP with another's, picture by picture, years later and elsewhere.

No label, no prediction and no picture is needed again: which prediction counts and which is right, at every threshold.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cigpose.evaluate.coco import run_parts, score_persons
from cigpose.evaluate.matches import Matches, resampled_images
from cigpose.files.atomic import written_file

if TYPE_CHECKING:  # torch
    from cigpose.evaluate.checkpoint import Evaluation

SAMPLES = 500
"""Of the bootstrap."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MatchTables:
    """The matches of every part."""

    images: np.ndarray
    """(I,) int64 ids of the pictures, in the order that `Matches.image` counts in."""
    parts: Mapping[str, Matches]

    @classmethod
    def of(cls, evaluation: Evaluation) -> MatchTables:
        """Of a finished evaluation."""
        keypoints, truth = evaluation.config.keypoint_set, evaluation.truth
        scored = score_persons(evaluation.predictions, truth, keypoints, evaluation.config.evaluate)
        parts = {part: run.matches for part, run in run_parts(scored, truth, keypoints).items()}
        return cls(images=np.array(sorted(truth.images)), parts=parts)

    def measured(self) -> list[str]:
        """The parts that somebody has."""
        return [part for part, matches in self.parts.items() if matches.num_truths.any()]

    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 percent bootstrap interval of the AP of every part that somebody has; pictures are resampled."""
        draws = resampled_images(len(self.images), SAMPLES)
        return {part: self.parts[part].interval(draws) for part in self.measured()}

    def save(self, path: Path) -> Path:
        """Write a compressed .npz; equal contents give equal bytes."""
        columns: dict[str, np.ndarray] = {"images": self.images}
        for part, matches in self.parts.items():
            columns |= {
                f"{part}/thresholds": matches.thresholds,
                f"{part}/image": matches.image.astype(np.int32),
                f"{part}/hit": np.packbits(matches.hit, axis=1),
                f"{part}/counted": np.packbits(matches.counted, axis=1),
                f"{part}/num_truths": matches.num_truths.astype(np.int32),
            }
        with written_file(path) as made, made.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **columns)
        return path

    @classmethod
    def load(cls, path: Path) -> MatchTables:
        """What `save` wrote; who was matched to whom is not in it.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is none.
        """
        try:
            with np.load(path, allow_pickle=False) as archive:
                names = [name.removesuffix("/image") for name in archive.files if name.endswith("/image")]
                images = archive["images"]
                parts = {name: _matches(archive, name, len(images)) for name in names}
        except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as err:
            raise ValueError(f"{path}: not a file of matches ({err}). Evaluate again.") from err
        return cls(images=images, parts=parts)


def _matches(archive: Mapping[str, np.ndarray], part: str, num_images: int) -> Matches:
    image = archive[f"{part}/image"].astype(np.int64)
    hit, counted = (
        np.unpackbits(archive[f"{part}/{name}"], axis=1, count=len(image)).astype(bool) for name in ("hit", "counted")
    )
    return Matches(
        thresholds=archive[f"{part}/thresholds"],
        image=image,
        person=np.full(len(image), -1),
        truth=np.full(hit.shape, -1),
        hit=hit,
        counted=counted,
        truth_image=np.repeat(np.arange(num_images), archive[f"{part}/num_truths"]),
        num_images=num_images,
    )


def paired_intervals(first: MatchTables, second: MatchTables) -> dict[str, tuple[float, float]]:
    """95 percent bootstrap interval of `second - first` in AP, of every part that both have.

    Both are measured on the same resampled pictures: what makes a picture hard makes it hard for both.

    Raises:
        ValueError: they are of different pictures.
    """
    if not np.array_equal(first.images, second.images):
        raise ValueError(f"{len(first.images)} and {len(second.images)} pictures that are not the same.")
    draws = resampled_images(len(first.images), SAMPLES)
    found = {}
    for part in first.measured():
        if part in second.parts:
            one, other = first.parts[part], second.parts[part]
            differences = [other.average_precision(times) - one.average_precision(times) for times in draws]
            low, high = np.nanquantile(differences, [0.025, 0.975])
            found[part] = (float(low), float(high))
    return found
