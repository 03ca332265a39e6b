"""DVC stage `register`: the trained and evaluated model becomes a version in the MLflow registry.

    reads   data/model/  data/report/  data/metrics/evaluate.json  params.yaml  the index.json of the shards
    writes  data/registered.json, results into the training's MLflow run, a registered version

Registering the same weights of the same run again finds the same version. `--show` only prints the outcome again.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from cigpose.config import Config, load_params
from cigpose.files.addresses import without_credentials
from pipelines.lineage import content_digest, file_sha256, project_root, read_shard_index
from pipelines.registry.package import Package, figure_rows, log_package, model_card, read_lineage, shards_location
from pipelines.registry.versions import (
    CHALLENGER,
    CHAMPION,
    RUN_TAG,
    WEIGHTS_TAG,
    Decision,
    Measurement,
    Registry,
    protocol_of,
)
from pipelines.tracking import run as tracking

log = logging.getLogger(__name__)

MODEL, REPORT = Path("data/model"), Path("data/report")
METRICS, REGISTERED = Path("data/metrics/evaluate.json"), Path("data/registered.json")
UPLOAD_S = 30.0
"""Seconds without an answer after which MLflow is given up: it answers an upload once it has stored the file."""
LARGEST_REPORT_FILE = 50_000_000
"""Bytes; larger files of the report (predictions, results of a big set) stay with DVC."""


class RegisterError(RuntimeError):
    """Why a model cannot be registered."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Register, or show what was registered; 1 on failure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="print the outcome of the last registration again")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    tracking.be_impatient(UPLOAD_S)
    try:
        config = load_params()
        if not options.show:
            write_json(REGISTERED, register(config, Path.cwd()))
        print(summary(read_json(REGISTERED), flat_metrics(read_json(METRICS))))
    except tracking.UnreachableError as err:
        advice = "Nothing is lost: start it, or correct registry.tracking_uri (MLFLOW_TRACKING_URI), and run again."
        print(f"register: {err} {advice}", file=sys.stderr)
        return 1
    except MlflowException as err:
        print(without_credentials(f"register: MLflow: {str(err).splitlines()[0]}"), file=sys.stderr)
        return 1
    except (RegisterError, ValueError, OSError) as err:
        print(without_credentials(f"register: {err}"), file=sys.stderr)
        return 1
    return 0


def register(config: Config, root: Path) -> dict[str, Any]:
    """Make or find the version of data/model, and settle who is champion.

    Args:
        config: the experiment.
        root: folder with data/ and dvc.lock.

    Returns: what data/registered.json holds.

    Raises:
        RegisterError: MLflow does not have the training's run, or the metric to compare by was not measured.
    """
    run_info = read_json(root / MODEL / "run.json")
    evaluation = read_evaluation(config, root)
    address = tracking.tracking_address(config)
    mlflow.set_tracking_uri(address)  # a sqlite registry looks logged models up at the global address
    client = tracking.connect(address)
    run_id = training_run(client, config, str(run_info["run_id"]), address)
    log_results(client, run_id, evaluation, root)
    registry = Registry(client, config.registry.model)
    registry.ensure(f"Pose models. Use the version with the alias `{CHAMPION}`.")
    identity = {RUN_TAG: run_id, WEIGHTS_TAG: file_sha256(root / MODEL / "model.safetensors")}
    found = registry.find(run_id, identity[WEIGHTS_TAG])
    if found is not None:
        version = int(found.version)
        registry.tag(version, evaluation.tags())  # the same weights may have been evaluated in another way
    else:
        package = make_package(config, root, {**run_info, "run_id": run_id}, evaluation)
        with tempfile.TemporaryDirectory(prefix="cigpose-register-") as folder:
            model_id = log_package(client, package, run_id, Path(folder) / "model", root)
            log_figures(client, run_id, evaluation, model_id)
        tags = identity | evaluation.tags() | origin_tags(package)
        version = registry.add(model_id, run_id, tags, description=model_card(package))
    decision = registry.settle(version, evaluation, config.evaluate.metric, config.registry.margin)
    return outcome(client, config, run_id, version, decision, registry)


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
    index = read_shard_index(shards_location(config, config.data.val, root))
    return Measurement(metrics=metrics, data=content_digest(index), protocol=protocol_of(config))


def training_run(client: MlflowClient, config: Config, run_id: str, address: str) -> str:
    """MLflow's id of the run that made data/model, once all its history is delivered.

    Raises:
        RegisterError: MLflow has no such run.
    """
    found = tracking.resolve_run_id(client, config, run_id, project_root() / ".runs", address)
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


def make_package(config: Config, root: Path, run_info: Mapping[str, Any], evaluation: Measurement) -> Package:
    """Gather the parts of a complete model.

    Raises:
        FileNotFoundError: one of them is not there.
    """
    report = root / REPORT
    pictures = [path for path in sorted((report / "pictures").glob("*")) if path.suffix in (".jpg", ".png")]
    package = Package(
        config=config,
        weights=root / MODEL / "model.safetensors",
        params=root / MODEL / "params.yaml",
        onnx=report / "model.onnx",
        evaluation=evaluation,
        lineage=read_lineage(config, root),
        pictures=pictures[: config.registry.pictures],
        run=run_info,
    )
    for path in (package.weights, package.params, package.onnx):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not found. `dvc repro` makes it.")
    return package


def origin_tags(package: Package) -> dict[str, str]:
    """Tags of a version that say where it comes from."""
    lineage = package.lineage
    tags = {f"data.{name}": facts["content"] for name, facts in lineage["datasets"].items()}
    tags |= {"git.revision": lineage["git_revision"] or "none", "dvc.lock": lineage["dvc_lock"] or "none"}
    return tags | {"cigpose.preset": package.config.name, "keypoints": package.config.keypoint_set.name}


def outcome(
    client: MlflowClient, config: Config, run_id: str, version: int, decision: Decision, registry: Registry
) -> dict[str, Any]:
    """The content of data/registered.json."""
    address = tracking.tracking_address(config)
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
        "url": tracking.run_url(address, client.get_run(run_id).info.experiment_id, run_id),
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


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
