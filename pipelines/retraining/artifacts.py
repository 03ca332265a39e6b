"""What a flow run shows in Prefect: the decision, figures beside the champion's, pictures, data, links."""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
from prefect import get_run_logger
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)

from cigpose.config import load_params
from cigpose.shard.index import INDEX, ShardIndex, parse_index
from pipelines.lineage import shards_digest
from pipelines.paths import METRICS, REGISTERED, REPORT, SHARDS, VALIDATION_PLOT
from pipelines.retraining.comparison import ComparisonError, Row, compared_rows, metric_rows
from pipelines.retraining.notice import Ending
from pipelines.retraining.overrides import Changes
from pipelines.retraining.workspace import Workspace
from pipelines.tracking.address import mlflow_page, tracking_address

PROMOTED = ("first", "better")
STRIP_WIDTH, STRIP_HEIGHT = 960, 480
"""Pixels of the pictures on the run's page: the top of the first contact sheet."""
_QUALITY = 70  # some 100 KB, which Prefect keeps in its database


@dataclass(frozen=True, kw_only=True)
class Retrained:
    """What a retraining came to."""

    experiment: str | None
    """DVC's name of it; None where nothing was run."""
    metrics: dict[str, Any]
    registered: dict[str, Any]
    validation: list[tuple[float, float]]
    """Epoch and figure of each validation."""
    links: dict[str, str]
    """Words -> page of MLflow; the run's is the first."""

    @property
    def line(self) -> str:
        """About the registered model."""
        return str(self.registered.get("decision_text") or "No model was registered.")

    @property
    def ending(self) -> Ending:
        """Whether the model became champion."""
        return "promoted" if self.registered.get("decision") in PROMOTED else "not promoted"

    @property
    def link(self) -> str | None:
        """The page of the run."""
        return next(iter(self.links.values()), None)


def outcome_of(workspace: Workspace, experiment: str | None) -> Retrained:
    """What the stages left in a workspace."""
    folder = workspace.folder
    registered = _read(folder / REGISTERED)
    return Retrained(
        experiment=experiment,
        metrics=_read(folder / METRICS),
        registered=registered,
        validation=_validation(folder / VALIDATION_PLOT),
        links=links_of(registered, workspace.root),
    )


def publish(workspace: Workspace, outcome: Retrained, changes: Changes) -> None:
    """Make the artifacts of the flow run at work."""
    registered, remark = outcome.registered, ""
    try:
        table = compared_rows(workspace.folder, workspace.root, outcome.metrics, registered)
    except ComparisonError as err:
        table, remark = metric_rows(outcome.metrics), str(err)
        get_run_logger().warning("The artifact of the metrics has %s.", remark)
    data = data_rows(workspace.folder / SHARDS)
    text = [f"### {registered.get('model', 'No model')} {registered.get('version', '')}".rstrip(), "", outcome.line, ""]
    text += [*(f"- [{words}]({address})" for words, address in outcome.links.items()), ""]
    text += [f"`dvc exp apply {outcome.experiment}` takes params, data and model of this run into the workspace.", ""]
    text += [*_markdown(table), remark, "", *_markdown(data)]
    if changes:
        text += _markdown([{"params.yaml": key, "before": old, "now": new} for key, (old, new) in changes.items()])
    create_markdown_artifact(key="retrain-registered", markdown="\n".join(text), description="The decision.")
    if table:
        about = "Evaluation of this run's model, beside the champion it was compared with; intervals by bootstrap."
        create_table_artifact(key="retrain-metrics", table=table, description=about)
    if data:
        create_table_artifact(key="retrain-data", table=data, description="What was read.")
    if strip := picture_strip(workspace.folder / REPORT / "pictures"):
        create_image_artifact(key="retrain-pictures", image_url=strip, description="Predicted (left) and labelled.")
    if outcome.link:
        words = "The run in MLflow (`make ui` shows it)"
        create_link_artifact(key="retrain-mlflow", link=outcome.link, link_text=words)


def links_of(registered: Mapping[str, Any], root: Path) -> dict[str, str]:
    """Words -> address in MLflow of the run, its report and the version, at the port that `make ui` took last."""
    _, hash_mark, place = str(registered.get("url") or "").partition("/#")
    if not hash_mark:
        return {}
    base = f"{mlflow_page(tracking_address(load_params(root / 'params.yaml'), root))}/#"
    run, question, query = place.partition("?")
    links = {"The run in MLflow": f"{base}{place}"}
    if "/experiments/" in run:
        query = f"{question}{query}"
        links["The report"] = f"{base}{run}/artifacts/evaluation/report.html{query}"
        links["The version"] = f"{base}/models/{registered['model']}/versions/{registered['version']}{query}"
    return links


def data_rows(folder: Path) -> list[Row]:
    """Counts and digest of every set of shards in a folder, and of those elsewhere that it has the index of."""
    rows = []
    for path in sorted([*folder.glob(f"*/{INDEX}"), *folder.glob("*.json")]):
        index = parse_index(path.read_bytes(), str(path))
        rows.append(_data_row(index, path.stem if path.parent == folder else path.parent.name))
    return rows


def _data_row(index: ShardIndex, name: str) -> Row:
    counts = {"images": index.images, "persons": index.persons, "shards": len(index.shards)}
    return {"dataset": name, **counts, "left out": sum(index.dropped.values()), "digest": shards_digest(index)}


def picture_strip(folder: Path) -> str | None:
    """The first contact sheet as a `data:` address of a small JPEG; None where there is none."""
    page = next(iter(sorted(folder.glob("*.jpg"))), None)
    image = cv2.imread(str(page)) if page else None
    if image is None:
        return None
    height, width = image.shape[:2]
    if width > STRIP_WIDTH:
        size = (STRIP_WIDTH, max(1, round(height * STRIP_WIDTH / width)))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    _, encoded = cv2.imencode(".jpg", image[:STRIP_HEIGHT], [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
    return f"data:image/jpeg;base64,{base64.b64encode(encoded.tobytes()).decode()}"


def _markdown(rows: Sequence[Row]) -> list[str]:
    """Rows as a markdown table, a column for each name that one of them has."""
    if not rows:
        return []
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    return [*lines, *(f"| {' | '.join(str(row.get(name, '')) for name in names)} |" for row in rows), ""]


def _validation(path: Path) -> list[tuple[float, float]]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file, suppress(KeyError, ValueError):
        return [(float(row["epoch"]), float(row["AP"])) for row in csv.DictReader(file)]
    return []


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
