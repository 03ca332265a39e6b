"""What a flow run shows in Prefect: figures, the registered version, how to take the outcome, the run in MLflow."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from cigpose.config import load_params
from pipelines.paths import METRICS, REGISTERED
from pipelines.retraining.overrides import Changes
from pipelines.retraining.workspace import Workspace


def publish(workspace: Workspace, experiment: str, changes: Changes) -> str:
    """Make the artifacts of the flow run at work.

    Returns: one line about the registered model.
    """
    from pipelines.registry.outcome import link  # MLflow and torch: not while the flow starts

    metrics, registered = _read(workspace.folder / METRICS), _read(workspace.folder / REGISTERED)
    table = metric_rows(metrics)
    if table:
        create_table_artifact(key="retrain-metrics", table=table, description="Evaluation of this run's model.")
    line = str(registered.get("decision_text") or "No model was registered.")
    text = [f"### {registered.get('model', 'No model')} {registered.get('version', '')}".rstrip(), "", line, ""]
    text += [f"`dvc exp apply {experiment}` takes params, data and model of this run into the workspace.", ""]
    if changes:
        text += ["| params.yaml | before | now |", "| --- | --- | --- |"]
        text += [f"| {key} | {old} | {new} |" for key, (old, new) in changes.items()]
    create_markdown_artifact(key="retrain-registered", markdown="\n".join(text), description="Registered model.")
    if page := link(registered, load_params(workspace.folder / "params.yaml")):
        create_link_artifact(key="retrain-mlflow", link=page, link_text="The run in MLflow")
    return line


def metric_rows(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Nested metrics (part -> figure -> value) as a table of one row a part; flat ones as rows of name and value."""
    rows = []
    for part, figures in metrics.items():
        if isinstance(figures, Mapping):
            numbers = {name: round(value, 4) for name, value in figures.items() if isinstance(value, (int, float))}
            rows.append({"part": part, **numbers})
        elif isinstance(figures, (int, float)):
            rows.append({"name": part, "value": round(figures, 4)})
    return rows


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
