"""What a registration reads and hands to MLflow: figures, report, the training's run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric

from cigpose.config import Config
from cigpose.shard.index import read_index
from pipelines.lineage import content_digest, project_root
from pipelines.paths import METRICS, MODEL, REPORT, RUNS
from pipelines.registry.package import shards_location
from pipelines.registry.versions import (
    Measurement,
    protocol_of,
)
from pipelines.tracking.sync import resolve_run_id

LARGEST_REPORT_FILE = 50_000_000
"""Bytes; larger files of the report (predictions, results of a big set) stay with DVC."""


class RegisterError(RuntimeError):
    """Why a model cannot be registered."""


def read_evaluation(config: Config, root: Path) -> Measurement:
    """What evaluate.json says, with the people and the protocol it was measured by.

    Raises:
        RegisterError: it lacks the metric that models are compared by.
    """
    metrics = flat_metrics(read_json(root / METRICS))
    wanted = config.evaluate.metric
    if not math.isfinite(metrics.get(wanted, math.nan)):
        known = ", ".join(sorted(metrics))
        raise RegisterError(f"{METRICS}: no {wanted} (evaluate.metric), by which models are compared. It has: {known}.")
    index = read_index(shards_location(config, config.data.val, root))
    return Measurement(metrics=metrics, data=content_digest(index), protocol=protocol_of(config))


def training_run(client: MlflowClient, config: Config, run_id: str, address: str) -> str:
    """MLflow's id of the run that made data/model, once all its history is delivered.

    Raises:
        RegisterError: MLflow has no such run.
    """
    found = resolve_run_id(client, config, run_id, project_root() / RUNS)
    if found is None:
        raise RegisterError(
            f"{MODEL}/run.json: MLflow at {address} has no run {run_id}, and no folder of .runs/ has its history. Is "
            "that the address of the training? `python -m pipelines.train --restart` trains and tracks anew."
        )
    return found


def log_results(client: MlflowClient, run_id: str, evaluation: Measurement, root: Path) -> None:
    """Metrics, pictures and report into the training's run, where they replace those of an earlier time."""
    log_figures(client, run_id, evaluation)
    for path in sorted((root / REPORT).iterdir()) if (root / REPORT).is_dir() else ():
        if path.is_dir():
            client.log_artifacts(run_id, str(path), f"evaluation/{path.name}")
        elif path.stat().st_size <= LARGEST_REPORT_FILE:
            client.log_artifact(run_id, str(path), "evaluation")


def log_figures(client: MlflowClient, run_id: str, evaluation: Measurement, model_id: str | None = None) -> None:
    """Metrics `evaluate/<part>/<figure>` of a run, or of its logged model. Logging them again changes nothing."""
    moment = client.get_run(run_id).info.start_time  # fixed, so that a second time is the same record
    metrics = [
        Metric(f"evaluate/{name}", value, moment, 0, model_id=model_id) for name, value in evaluation.metrics.items()
    ]
    client.log_batch(run_id, metrics=metrics)


def flat_metrics(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Metrics as `<part>/<figure>` -> number, from the nested form that `dvc metrics` shows."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flat_metrics(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            flat[prefix + name] = float(value)
    return flat


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that an earlier stage wrote.

    Raises:
        FileNotFoundError: it is not there.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise FileNotFoundError(f"{path}: not found. `dvc repro` makes it.") from err
