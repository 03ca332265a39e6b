"""What a model was measured to do, and how: as the stage `evaluate` leaves it, and as a version keeps it.

    data/report/measurement.json    figures, their intervals, people and protocol
    data/report/matches.npz         what a comparison picture by picture needs (`cigpose.evaluate.tables`)

Both are made where the people are, so that a model can be registered where they are not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cigpose.config import Config
from cigpose.evaluate.report import nested
from cigpose.evaluate.tables import MatchTables
from cigpose.files.atomic import write_json
from pipelines.lineage import dataset_facts, digest_of

if TYPE_CHECKING:  # torch
    from cigpose.evaluate.checkpoint import Evaluation

MEASUREMENT, MATCHES = "measurement.json", "matches.npz"
EVALUATION_TAG = "values.evaluation"
"""Of a version: its `Measurement` as JSON, in one tag, so that figures and protocol change together."""
DECIMALS = 6

Estimate = tuple[float, float | None, float | None]
"""A figure, and the ends of its 95 percent interval if that is known."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a version was measured to do, and how."""

    metrics: Mapping[str, float]
    """`<part>/<figure>` -> value."""
    data: str
    """Digest of the people it was measured on."""
    protocol: str
    """JSON of all that decides a figure besides the people."""
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Part -> 95 percent interval of its AP."""
    robustness: Mapping[str, Estimate] = field(default_factory=dict)
    """Part -> share of its AP that is left on spoilt pictures."""
    matches: str | None = None
    """Where among the artifacts of the version's run its `MatchTables` are."""
    sigmas: str = ""
    """Where the sigmas of its AP come from; empty for versions of before that was kept."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        rounded = {name: round(value, DECIMALS) for name, value in self.metrics.items()}
        return {
            "data": self.data,
            "protocol": json.loads(self.protocol or "{}"),
            "metrics": nested(rounded),
            "intervals": {part: [round(end, DECIMALS) for end in ends] for part, ends in self.intervals.items()},
            "robustness": {part: list(estimate) for part, estimate in self.robustness.items()},
            "matches": self.matches,
            **({"sigmas": self.sigmas} if self.sigmas else {}),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Measurement:
        """What `to_json` gave."""
        return cls(
            metrics=flat_metrics(values.get("metrics", {})),
            data=str(values.get("data", "")),
            protocol=json.dumps(values.get("protocol", {}), sort_keys=True),
            intervals={part: (low, high) for part, (low, high) in values.get("intervals", {}).items()},
            robustness={part: (value, low, high) for part, (value, low, high) in values.get("robustness", {}).items()},
            matches=values.get("matches"),
            sigmas=str(values.get("sigmas", "")),
        )

    def tags(self) -> dict[str, str]:
        """As a version keeps it."""
        return {EVALUATION_TAG: json.dumps(self.to_json())}

    @classmethod
    def from_tags(cls, tags: Mapping[str, str]) -> Measurement:
        """The evaluation that a version keeps; one without figures if it keeps none."""
        return cls.from_json(json.loads(tags.get(EVALUATION_TAG) or "{}"))


def protocol_of(config: Config) -> str:
    """The evaluation protocol as JSON: settings that change figures, not those that change speed."""
    evaluate = config.to_mapping()["evaluate"]
    settings = {name: value for name, value in evaluate.items() if name not in ("batch", "metric", "sigmas")}
    keypoints = config.keypoint_set
    table = [keypoints.names, keypoints.sigmas, {part: list(index) for part, index in keypoints.parts.items()}]
    return json.dumps(settings | {"keypoints": keypoints.name, "keypoint_table": digest_of(table)}, sort_keys=True)


def write_measurement(evaluation: Evaluation, metrics: Mapping[str, float], folder: Path, shards: Path) -> Measurement:
    """Leave an evaluation beside its report, as a registration anywhere needs it.

    Args:
        evaluation: finished.
        metrics: its figures, and those of the exported file where it was measured too.
        folder: gets measurement.json and matches.npz.
        shards: folder of the shard folders.
    """
    config = evaluation.config
    facts = dataset_facts(config, config.data.val, shards)
    tables = MatchTables.of(evaluation)
    tables.save(folder / MATCHES)
    measurement = Measurement(
        metrics=metrics,
        data=facts["content"],
        protocol=protocol_of(config),
        intervals=tables.intervals(),
        sigmas=config.keypoint_set.sigmas_origin,
    )
    dataset = {"name": config.data.val, **facts}
    write_json(folder / MEASUREMENT, {"dataset": dataset, **measurement.to_json()})
    return measurement


def is_measured(value: float) -> bool:
    """Whether a figure says that a model can do something; pycocotools gives -1 where nothing is labelled."""
    return math.isfinite(value) and value > 0


def flat_metrics(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Metrics as `<part>/<figure>` -> number, from the nested form that `dvc metrics` shows."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flat_metrics(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            flat[prefix + name] = float(value)
    return flat


def with_robustness(measurement: Measurement, retained: Mapping[str, Estimate]) -> Measurement:
    """The same, and what is left of every part on spoilt pictures."""
    return replace(measurement, robustness=dict(retained))
