"""The new model beside the champion it was compared with: the same people, part by part, with intervals."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient

from cigpose.config import Config, load_params
from pipelines.paths import REPORT, SHARDS
from pipelines.tracking.address import be_impatient, connect, tracking_address

PREDICTIONS = "predictions.npz"
COMPARED = ("better", "not_better")
"""Verdicts of a version and a champion that were measured alike on the same people."""
Row = dict[str, Any]


class ComparisonError(RuntimeError):
    """Why there are no intervals."""


def compared_rows(folder: Path, root: Path, metrics: Mapping[str, Any], registered: Mapping[str, Any]) -> list[Row]:
    """A row per part: AP, AR, the champion's AP, the difference and its 95 % interval.

    Args:
        folder: the workspace, with data/report and data/shards.
        root: the project, where MLflow is.
        metrics: part -> figure -> value of the new model.
        registered: the decision.

    Raises:
        ComparisonError: the champion's predictions cannot be had; `metric_rows` has the figures alone.
    """
    rows = {row["part"]: row for row in metric_rows(metrics) if "part" in row}
    if registered.get("decision") not in COMPARED or not (folder / REPORT / PREDICTIONS).is_file():
        return list(rows.values())
    config = load_params(folder / "params.yaml")
    version = int(registered["champion"]["version"])
    try:
        with tempfile.TemporaryDirectory(prefix="cigpose-champion-") as place:
            theirs = _fetch_predictions(config, root, version, Path(place))
            differences = _paired(config, folder, theirs)
    except Exception as err:  # MLflow, its store, a file of another version: the figures are worth more than a reason
        reason = (str(err).splitlines() or [type(err).__name__])[0]
        raise ComparisonError(f"no intervals beside version {version}: {reason}") from err
    for each in differences:
        rows.setdefault(each.part, {"part": each.part}).update(
            {
                f"AP of version {version}": round(each.first, 4),
                "difference": round(each.difference, 4),
                "95 % interval": f"{each.low:+.4f} to {each.high:+.4f}",
            }
        )
    return list(rows.values())


def _fetch_predictions(config: Config, root: Path, version: int, place: Path) -> Path:
    be_impatient()
    address = tracking_address(config, root)
    client: MlflowClient = connect(address)
    run_id = client.get_model_version(config.registry.model, str(version)).run_id
    return Path(
        mlflow.artifacts.download_artifacts(
            run_id=run_id, artifact_path=f"evaluation/{PREDICTIONS}", dst_path=str(place), tracking_uri=address
        )
    )


def _paired(config: Config, folder: Path, theirs: Path) -> list[Any]:
    from cigpose.evaluate.labels import dataset_truth, open_shards  # late: torch and pycocotools
    from cigpose.evaluate.paired import compare_paired
    from cigpose.evaluate.predictions import Predictions

    truth = dataset_truth(open_shards(config, config.data.val, folder / SHARDS), config)
    first, second = Predictions.load(theirs), Predictions.load(folder / REPORT / PREDICTIONS)
    return compare_paired((first, truth), (second, truth), config.keypoint_set, config.evaluate)


def metric_rows(metrics: Mapping[str, Any]) -> list[Row]:
    """Nested metrics (part -> figure -> value) as a table of one row a part; flat ones as rows of name and value."""
    rows: list[Row] = []
    for part, figures in metrics.items():
        if isinstance(figures, Mapping):
            numbers = {name: round(value, 4) for name, value in figures.items() if isinstance(value, (int, float))}
            rows.append({"part": part, **numbers})
        elif isinstance(figures, (int, float)):
            rows.append({"name": part, "value": round(figures, 4)})
    return rows
