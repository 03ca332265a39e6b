"""What has to be known of a network to use it, wherever it comes from."""

from __future__ import annotations

from dataclasses import dataclass

from cigpose.config import Config
from cigpose.keypoints import KeypointSet


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How crops are cut for a network, and what its answers are called."""

    name: str
    keypoint_set: KeypointSet
    input_size: tuple[int, int]
    """(width, height) of the crop."""
    box_padding: float
    """Crop size over box size."""
    batch: int
    """Crops per forward pass."""
    keypoint_score_threshold: float
    """Keypoints with raw scores at or below do not count in a person's score."""

    @classmethod
    def of(cls, config: Config) -> Recipe:
        """As an experiment was trained and evaluated."""
        return cls(
            name=config.name,
            keypoint_set=config.keypoint_set,
            input_size=config.model.input_size,
            box_padding=config.augmentation.box_padding,
            batch=config.evaluate.batch,
            keypoint_score_threshold=config.evaluate.keypoint_score_threshold,
        )
