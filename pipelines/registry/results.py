"""What a registration reads and hands to MLflow: figures, report, the training's run."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric

from cigpose.config import Config
from pipelines.lineage import project_root
from pipelines.paths import MODEL, REPORT, RUNS
from pipelines.registry.measurement import MATCHES, MEASUREMENT, Estimate, Measurement, with_robustness
from pipelines.tracking.run import RECORD
from pipelines.tracking.sync import resolve_run_id

LARGEST_REPORT_FILE = 50_000_000
"""Bytes; larger files of the report (predictions, results of a big set) stay with DVC."""
SHOWN = ("AP", "AR")
"""Figures of every part that are metrics of the run and of the logged model; all of them are with the version."""
EVALUATION = "evaluation"
"""Folder of a run's artifacts."""


class RegisterError(RuntimeError):
    """Why a model cannot be registered."""


def read_evaluation(config: Config, root: Path) -> tuple[Measurement, dict[str, Any]]:
    """What the stage `evaluate` measured, and the dataset it did that on.

    Raises:
        RegisterError: it lacks the metric that models are compared by.
    """
    values = read_json(root / REPORT / MEASUREMENT)
    evaluation = Measurement.from_json(values)
    wanted = config.evaluate.metric
    if not math.isfinite(evaluation.metrics.get(wanted, math.nan)):
        known = ", ".join(sorted(evaluation.metrics))
        raise RegisterError(
            f"{REPORT / MEASUREMENT}: no {wanted} (evaluate.metric), by which models are compared. It has: {known}."
        )
    if (tables := root / REPORT / MATCHES).is_file():
        evaluation = replace(evaluation, matches=matches_name(tables))
    return with_robustness(evaluation, read_robustness(root)), values["dataset"]


def read_robustness(root: Path) -> dict[str, Estimate]:
    """Part -> share of its AP that is left on spoilt pictures, with its interval; empty where nobody measured it.

    The stage `robustness` leaves `{"retained": {part: [share, low, high]}}`.
    """
    if not (root / REPORT / "robustness.json").is_file():
        return {}
    retained = read_json(root / REPORT / "robustness.json").get("retained", {})
    return {part: (share, low, high) for part, (share, low, high) in retained.items()}


def training_run(client: MlflowClient, config: Config, run_id: str, root: Path, address: str) -> str:
    """MLflow's id of the run that made data/model, once all its history is delivered.

    Raises:
        RegisterError: MLflow has no such run, and nothing here has its history.
    """
    found = resolve_run_id(client, config, run_id, project_root() / RUNS, root / MODEL / RECORD)
    if found is None:
        raise RegisterError(
            f"{MODEL}/run.json: MLflow at {address} has no run {run_id}, and neither {MODEL / RECORD} nor a folder of "
            ".runs/ has its history. Is that the address of the training? `python -m pipelines.train` copies out again "
            "what is in .runs/; `--restart` trains anew."
        )
    return found


def log_results(client: MlflowClient, run_id: str, evaluation: Measurement, root: Path) -> None:
    """Pictures and report into the training's run, where they replace those of an earlier time."""
    for path in sorted((root / REPORT).iterdir()) if (root / REPORT).is_dir() else ():
        if path.is_dir():
            client.log_artifacts(run_id, str(path), f"{EVALUATION}/{path.name}")
        elif path.name == MATCHES:
            log_matches(client, run_id, path)
        elif path.stat().st_size <= LARGEST_REPORT_FILE:
            client.log_artifact(run_id, str(path), EVALUATION)


def matches_name(tables: Path) -> str:
    """The artifact that a file of matches becomes: named by its content, so that none is ever replaced."""
    return f"{EVALUATION}/matches-{hashlib.sha256(tables.read_bytes()).hexdigest()[:16]}.npz"


def log_matches(client: MlflowClient, run_id: str, tables: Path) -> str:
    """Keep a file of matches with a run.

    Returns: its place among the run's artifacts.
    """
    name = matches_name(tables)
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copyfile(tables, Path(folder) / Path(name).name)
        client.log_artifact(run_id, str(copy), EVALUATION)
    return name


def log_figures(client: MlflowClient, run_id: str, evaluation: Measurement, model_id: str) -> None:
    """AP and AR of every part as metrics of the logged model, and so of its run; what is there already is not repeated.

    Of a version that was measured again the latest figures are shown.
    """
    known: dict[str, Metric] = {}
    for metric in sorted(client.get_logged_model(model_id).metrics or (), key=lambda metric: metric.timestamp):
        known[metric.key] = metric
    shown = {
        f"version/{name.replace('/', '_')}": value  # the last section of charts in the UI
        for name, value in evaluation.metrics.items()
        if name.rpartition("/")[2] in SHOWN and math.isfinite(value)
    }
    changed = {name: value for name, value in shown.items() if name not in known or known[name].value != value}
    now = max([time.time_ns() // 1_000_000, *(metric.timestamp + 1 for metric in known.values())])
    metrics = [Metric(name, value, now, 0, model_id=model_id) for name, value in changed.items()]
    if metrics:
        client.log_batch(run_id, metrics=metrics)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that an earlier stage wrote.

    Raises:
        FileNotFoundError: it is not there.
    """
    try:
        values: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return dict(values)
    except FileNotFoundError as err:
        raise FileNotFoundError(f"{path}: not found. `dvc repro` makes it.") from err
