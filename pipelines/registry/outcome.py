"""What a registration came to, for data/registered.json and for the terminal.

data/registered.json travels with the project, so it names no address: links are made where they are shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlflow import MlflowClient

from cigpose.config import Config
from cigpose.files.addresses import without_credentials
from pipelines.lineage import digest_of
from pipelines.paths import REPORT
from pipelines.registry.card import measured_rows
from pipelines.registry.gate import Decision, Rules
from pipelines.registry.measurement import Measurement
from pipelines.registry.versions import CHALLENGER, CHAMPION, Registry
from pipelines.tracking.address import run_url, tracking_address


def identity(config: Config, weights_sha256: str, evaluation: Measurement) -> dict[str, Any]:
    """What was registered, of which and under which rules: another of these is another registration."""
    measured = digest_of(evaluation.to_json())
    rules = Rules.of(config).to_json()
    return {"model": config.registry.model, "weights_sha256": weights_sha256, "measured": measured, "rules": rules}


def outcome(
    client: MlflowClient, about: Mapping[str, Any], run_id: str, version: int, decision: Decision, registry: Registry
) -> dict[str, Any]:
    """The content of data/registered.json; `about` is its `identity`."""
    champion = registry.by_alias(CHAMPION)
    return {
        **about,
        "version": version,
        "alias": CHAMPION if champion and int(champion.version) == version else CHALLENGER,
        "metric": decision.rules.metric,
        "value": decision.value,
        "decision": decision.verdict,
        "decision_text": f"{registry.model}: {decision.text}",
        "champion": {"version": decision.champion_version, "value": decision.champion_value},
        "changes": [change.to_json() for change in decision.changes],
        "run_id": run_id,
        "experiment_id": client.get_run(run_id).info.experiment_id,
    }


def champion_figures(registry: Registry) -> dict[str, Any]:
    """What the report of the next evaluation shows beside its own figures; empty without a champion."""
    champion = registry.by_alias(CHAMPION)
    if champion is None:
        return {}
    measured = Measurement.from_tags(champion.tags).to_json()
    name = f"{registry.model} {champion.version}"
    return {"name": name, "metrics": measured["metrics"], "intervals": measured["intervals"]}


def link(registered: Mapping[str, Any], config: Config) -> str | None:
    """The page of the training's run, as it is reached from here; None before a registration."""
    if not registered.get("run_id"):
        return None
    return run_url(tracking_address(config), str(registered["experiment_id"]), str(registered["run_id"]))


def text_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines for a terminal: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


def summary(registered: Mapping[str, Any], evaluation: Measurement, config: Config) -> str:
    """The outcome in a few lines."""
    name, version, alias = registered["model"], registered["version"], registered["alias"]
    address = without_credentials(tracking_address(config))
    lines = ["", *text_table(measured_rows(evaluation)), ""]
    lines += [f"Model     {name}, version {version}, alias {alias}: models:/{name}@{alias}"]
    lines += [f"Decision  {registered['decision_text']}"]
    lines += [f"Pictures  {REPORT / 'pictures'}, and with the run in MLflow"]
    first = "" if address.startswith("http") else "make ui     then open "
    lines += [f"MLflow    {first}{link(registered, config)}"]
    serve = f"mlflow models serve -m models:/{name}@{alias} --env-manager local -h 127.0.0.1 -p 5001"
    lines += [f"Serve     MLFLOW_TRACKING_URI={address} \\", f"          {serve}", ""]
    return "\n".join(lines)
