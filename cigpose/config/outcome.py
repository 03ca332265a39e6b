"""`evaluate`, `registry` and `published` in params.yaml."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cigpose.schema import ADDRESS


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """The evaluation protocol (defaults are upstream's)."""

    boxes: Literal["ground_truth", "detections"] = "ground_truth"
    flip_test: bool = True
    batch: int = 32
    keypoint_score_threshold: float = 0.2
    """Keypoints below do not count in a person's score."""
    person_score: Literal["box_and_keypoints", "box", "keypoints"] = "box_and_keypoints"
    """Box score times the mean of its keypoints' scores, or one of the two alone."""
    oks_nms_threshold: float | None = 0.9
    """Of two persons more alike than this the worse one is dropped; null keeps all."""
    area: Literal["annotation", "box"] = "annotation"
    """`box` takes 0.53 x box area, as CrowdPose does."""
    metric: str = "whole/AP"
    """The one number by which checkpoints and models are compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RegistryConfig:
    """The MLflow registry."""

    model: str
    """Registered model's name."""
    experiment: str
    margin: float = 0.0
    """A challenger becomes champion when its metric is better by more than this."""
    tracking_uri: str | None = field(default=None, metadata=ADDRESS)
    """MLflow address; null: MLFLOW_TRACKING_URI, else mlflow.db beside params.yaml."""
    pictures: int = 16
    """Sample predictions logged with the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedConfig:
    """What others reported for this experiment; nothing here is used in a computation."""

    ap: float
    """Average precision, percent."""
    source: str
    """Where the figure stands."""
    gflops: float | None = None
    """Multiply-adds of one forward pass, in billions."""
