"""What a registration came to, for data/registered.json and for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlflow import MlflowClient

from cigpose.config import Config
from cigpose.files.addresses import without_credentials
from pipelines.paths import REPORT
from pipelines.registry.package import figure_rows
from pipelines.registry.versions import (
    CHALLENGER,
    CHAMPION,
    Decision,
    Registry,
)
from pipelines.tracking.address import run_url, tracking_address


def outcome(
    client: MlflowClient, config: Config, run_id: str, version: int, decision: Decision, registry: Registry
) -> dict[str, Any]:
    """The content of data/registered.json."""
    address = tracking_address(config)
    champion = registry.by_alias(CHAMPION)
    return {
        "model": config.registry.model,
        "version": version,
        "alias": CHAMPION if champion and int(champion.version) == version else CHALLENGER,
        "metric": config.evaluate.metric,
        "value": decision.value,
        "margin": config.registry.margin,
        "decision": decision.verdict,
        "decision_text": f"{config.registry.model}: {decision.text}",
        "champion": {"version": decision.champion_version, "value": decision.champion_value},
        "run_id": run_id,
        "url": run_url(address, client.get_run(run_id).info.experiment_id, run_id),
        "tracking_address": without_credentials(address),
    }


def summary(registered: Mapping[str, Any], metrics: Mapping[str, float]) -> str:
    """The outcome in a few lines."""
    rows = figure_rows(metrics)
    width = max(len(row[0]) for row in rows)
    name, version, alias = registered["model"], registered["version"], registered["alias"]
    lines = ["", *(f"  {row[0]:<{width}}" + "".join(f"{cell:>8}" for cell in row[1:]) for row in rows), ""]
    lines += [f"Model     {name}, version {version}, alias {alias}: models:/{name}@{alias}"]
    lines += [f"Decision  {registered['decision_text']}"]
    lines += [f"Pictures  {REPORT / 'pictures'}, and with the run in MLflow"]
    if str(registered["tracking_address"]).startswith("http"):
        lines += [f"MLflow    {registered['url']}"]
    else:
        lines += [f"MLflow    make ui     then open {registered['url']}"]
    serve = f"mlflow models serve -m models:/{name}@{alias} --env-manager local -h 127.0.0.1 -p 5001"
    lines += [f"Serve     MLFLOW_TRACKING_URI={registered['tracking_address']} \\", f"          {serve}", ""]
    return "\n".join(lines)
