"""`evaluate`, `registry`, `notify` and `published` in params.yaml."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field
from typing import Literal

from cigpose.config.schema import ADDRESS, HOW, PRIVATE, ConfigError, affects, require, require_between
from cigpose.files.errors import shown
from cigpose.keypoints import KeypointSet, parts_with_whole

FIGURES = ("AP", "AP50", "AP75", "AP_M", "AP_L", "AR", "AR50", "AR75", "AR_M", "AR_L")
"""pycocotools' ten figures, in its order. -1 where there is nothing to measure."""

GUARDED_PARTS = ("whole", "body", "foot", "face", "left_hand", "right_hand")
"""What a model must not lose for a better figure of another part."""

CROWDING = {"AP_easy": (0.0, 0.2), "AP_medium": (0.2, 0.8), "AP_hard": (0.8, math.inf)}
"""Figures over images of a degree of crowding, which labels with a crowdIndex add."""


def metric_names(keypoint_set: KeypointSet, *, crowding: bool) -> list[str]:
    """What an evaluation of this set gives, `<part>/<figure>`.

    Args:
        keypoint_set: its parts.
        crowding: whether the labels' images have a crowdIndex.
    """
    figures = [*FIGURES, *(CROWDING if crowding else ())]
    names = [f"{part}/{figure}" for part in parts_with_whole(keypoint_set) for figure in figures]
    has_hands = {"left_hand", "right_hand"} <= keypoint_set.parts.keys()
    return names + (["hand/AP", "hand/AR"] if has_hands else [])


def refuse_unknown_metric(name: str, keypoint_set: KeypointSet, *, crowding: bool, where: str) -> None:
    """See that an evaluation gives the figure `name`, which stands at `where` (other arguments: see `metric_names`).

    Raises:
        ConfigError: it does not.
    """
    known = metric_names(keypoint_set, crowding=crowding)
    if name not in known:
        spellings = {figure.lower(): figure for figure in known}
        near = difflib.get_close_matches(name.lower(), spellings, n=1)
        hint = f"Did you mean {spellings[near[0]]!r}?" if near else "Choose one of these."
        raise ConfigError(
            f"{where}: {name!r} is not among what the evaluation of {keypoint_set.name!r} gives: "
            f"{', '.join(known)}. {hint}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ProtocolConfig:
    """How a model is measured (defaults are upstream's)."""

    boxes: Literal["ground_truth", "detections"] = "ground_truth"
    flip_test: bool = True
    keypoint_score_threshold: float = 0.2
    """Keypoints below do not count in a person's score."""
    person_score: Literal["box_and_keypoints", "box", "keypoints"] = "box_and_keypoints"
    """Box score times the mean of its keypoints' scores, or one of the two alone."""
    oks_nms_threshold: float | None = 0.9
    """Of two persons more alike than this the worse one is dropped; null keeps all."""
    area: Literal["annotation", "box"] = "annotation"
    """`box` takes 0.53 x box area, as CrowdPose does."""
    metric: str = "whole/AP"
    """The one number by which epochs (in `train.validation`) or models (in `evaluate`) are compared."""

    def __post_init__(self) -> None:
        require_between(self, 0, 1000, "keypoint_score_threshold")
        require_between(self, 0, 1, "oks_nms_threshold")


@dataclass(frozen=True, kw_only=True, slots=True)
class SigmasConfig:
    """OKS sigmas in place of those of `keypoints`."""

    origin: str
    """Where they come from; stands beside each AP."""
    values: dict[str, float]
    """Keypoint -> sigma; keypoints that are not here keep theirs."""

    def __post_init__(self) -> None:
        for name, sigma in self.values.items():
            require(0 < sigma <= 10, f"values.{name} must be more than 0 and at most 10, got {sigma}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig(ProtocolConfig):
    """How the finished model is measured."""

    batch: int = field(default=32, metadata=HOW)
    """Persons per forward pass; in validation at least a training worker's share."""
    sigmas: SigmasConfig | None = None
    """OKS sigmas in place of those of `keypoints`, which retrain nothing (`cigpose dataset sigmas`)."""

    def __post_init__(self) -> None:
        ProtocolConfig.__post_init__(self)
        require_between(self, 1, 100_000, "batch")


CROP_SHIFT = "crop_shift"
CORRUPTION_NAMES = ("occlusion", "clutter", "low_light", "blur", "noise", "jpeg", CROP_SHIFT)
"""What `robustness.corruptions` may name; see `cigpose.evaluate.corruptions`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RobustnessConfig:
    """The stage `robustness`: the same people in changed pictures."""

    enabled: bool = False
    """Measure it; else the stage leaves an empty result. A thousand people are predicted 36 times."""
    persons: int | None = 1000
    """About so many, all of a picture or none, the same for every model; null: everybody."""
    corruptions: tuple[str, ...] = CORRUPTION_NAMES
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Of each corruption, 1 to 5."""
    samples: int = 200
    """Of the bootstrap over pictures."""
    reversed_context: str | None = None
    """Dataset with the pictures of `data.val` but the spurious context reversed, as rendered people can have it."""

    def __post_init__(self) -> None:
        require_between(self, 1, 1_000_000_000, "persons")
        require_between(self, 1, 5, "severities")
        require_between(self, 10, 100_000, "samples")
        for name in self.corruptions:
            require(
                name in CORRUPTION_NAMES,
                f"corruptions: {name!r} is not known, expected some of {', '.join(CORRUPTION_NAMES)}.",
            )
        for field_name in ("corruptions", "severities"):
            values = getattr(self, field_name)
            require(bool(values) and len(set(values)) == len(values), f"{field_name}: name one or more, each once.")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingConfig:
    """What one request to a served model may ask for; recorded with each version as it is registered."""

    max_request_mb: float = 64.0
    """Megabytes of a request; a picture is a third larger in it than its file."""
    max_json_depth: int = 8
    """Levels of lists and mappings in its JSON."""
    max_pictures: int = 32
    """Rows of a request."""
    max_boxes: int = 200
    """Persons of a request, all its pictures together."""
    max_megapixels: float = 50.0
    """Millions of pixels of a picture, by its header; larger ones are not decoded."""

    def __post_init__(self) -> None:
        require_between(self, 0, 2000, "max_request_mb", positive=True)
        require_between(self, 4, 500, "max_json_depth")
        require_between(self, 1, 1_000_000, "max_pictures", "max_boxes")
        require_between(self, 0, 200, "max_megapixels", positive=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class RegistryConfig:
    """The MLflow registry."""

    model: str
    """Registered model's name."""
    experiment: str
    margin: float = 0.0
    """A challenger becomes champion when its metric is better by more than this."""
    max_loss: dict[str, float] = field(default_factory=lambda: dict.fromkeys(GUARDED_PARTS, 0.02))
    """AP that it may lose on a part all the same; a loss that chance explains does not count. Others: any."""
    max_robustness_loss: float = 0.05
    """Of the share of a part's AP that is left on spoilt pictures: what it may lose, where both have it."""
    tracking_uri: str | None = field(default=None, metadata=ADDRESS)
    """MLflow address; null: MLFLOW_TRACKING_URI, else mlflow.db beside params.yaml."""
    pictures: int = field(default=16, metadata=affects("evaluate", "register"))
    """Sample predictions logged with the model."""
    measure_onnx: bool = field(default=False, metadata=affects("evaluate", "register"))
    """Measure the exported file too, on the CPU; its figures stand beside torch's as `whole_onnx`."""
    detector: str | None = None
    """ONNX file of a person detector, kept with each version so that the served model finds people itself."""
    serving: ServingConfig = field(default_factory=ServingConfig)
    """What one request to the served model may ask for."""

    def __post_init__(self) -> None:
        require_between(self, 0, 1, "margin", "max_robustness_loss")
        for part, loss in self.max_loss.items():
            require(0 <= loss <= 1, f"max_loss.{part} must be between 0 and 1, got {shown(loss)}.")
        require_between(self, 1, 10_000, "pictures")


@dataclass(frozen=True, kw_only=True, slots=True)
class NotifyConfig:
    """Who is told how a retraining ended."""

    webhook: str | None = field(default=None, metadata=PRIVATE)
    """Address that takes Slack's JSON: told of failures, and whether a model became champion; null: nobody."""
    timeout_s: float = 10.0
    """Seconds that telling may take in all."""

    def __post_init__(self) -> None:
        is_web = self.webhook is None or self.webhook.startswith(("http://", "https://"))
        require(is_web, "webhook must be an http or https address, or null.")
        require_between(self, 0, 600, "timeout_s", positive=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedConfig:
    """What others reported for this experiment; nothing here is used in a computation."""

    ap: float
    """Average precision, percent."""
    source: str
    """Where the figure stands."""
    gflops: float | None = None
    """Multiply-adds of one forward pass, in billions."""

    def __post_init__(self) -> None:
        require_between(self, 0, 100, "ap")
        require_between(self, 0, 1_000_000, "gflops", positive=True)
