"""What the registry has, as plain values: a version, all of them, two beside each other, one in a folder."""

from __future__ import annotations

import re
import shutil
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from cigpose.config import Config
from cigpose.files.atomic import write_json, written_folder
from pipelines.registry.gate import Change, Decision, Rules, compare, incomparable
from pipelines.registry.measurement import Measurement
from pipelines.registry.versions import CHAMPION, ROLLED_BACK_TAG, Registry, RegistryError
from pipelines.tracking.address import connect, run_url, tracking_address
from pipelines.tracking.database import database_path

_ADDRESS = re.compile(r"models:/?(?P<model>[^/@]+)(/(?P<number>\d+)|@(?P<alias>[^/@]+))?")


def open_registry(config: Config, model: str | None = None) -> tuple[MlflowClient, Registry]:
    """The registry of an experiment, and the client it is reached by: `registry_at` its address.

    Args:
        config: says where MLflow is.
        model: registered model; None: `registry.model`.
    """
    return registry_at(tracking_address(config), model or config.registry.model)


def registry_at(address: str, model: str) -> tuple[MlflowClient, Registry]:
    """The registry at an address of MLflow, and the client it is reached by.

    Raises:
        RegistryError: nothing was registered under that name; no database is made for whoever only looks.
        UnreachableError, MlflowException: MLflow does not answer, or with an error.
    """
    path = database_path(address)
    if path is not None and not path.is_file():
        raise RegistryError(
            f"{path}: no registry there. `dvc repro` in the project's folder makes it; MLFLOW_TRACKING_URI may name "
            "another."
        )
    mlflow.set_tracking_uri(address)  # a sqlite registry looks logged models up at the global address
    client = connect(address)
    try:
        client.get_registered_model(model)
    except MlflowException as err:
        if err.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise RegistryError(f"{model}: no model of that name is registered. `dvc repro` registers one.") from err
    return client, Registry(client, model)


def version_facts(client: MlflowClient, config: Config, version: ModelVersion, metric: str) -> dict[str, Any]:
    """A version as plain values."""
    evaluation, decision = Measurement.from_tags(version.tags), Decision.from_tags(version.tags)
    part, _, figure = metric.partition("/")
    run = client.get_run(version.run_id) if version.run_id else None
    return {
        "model": version.name,
        "version": int(version.version),
        "aliases": sorted(version.aliases),
        "preset": version.tags.get("preset"),
        "run": run.info.run_name if run else None,
        "registered": datetime.fromtimestamp(version.creation_timestamp / 1000, UTC).isoformat(timespec="seconds"),
        "metric": metric,
        "value": evaluation.metrics.get(metric),
        "interval": evaluation.intervals.get(part) if figure == "AP" else None,
        "decision": decision.verdict if decision else None,
        "decision_text": decision.text if decision else None,
        "rolled_back": version.tags.get(ROLLED_BACK_TAG),
        "evaluation": evaluation.to_json(),
        "git_revision": version.tags.get("git.revision"),
        "run_id": version.run_id,
        "url": run_url(tracking_address(config), run.info.experiment_id, run.info.run_id) if run else None,
    }


def compared(registry: Registry, first: ModelVersion, second: ModelVersion, rules: Rules) -> list[Change]:
    """Every part of the second version, one of `registry`'s, beside the first's, which may be of another model.

    Raises:
        RegistryError: they are one version, or were not measured by the same protocol on the same people.
    """
    if (first.name, first.version) == (second.name, second.version):
        raise RegistryError(f"{first.name}: both are version {first.version}. Name another one.")
    theirs, ours = (Measurement.from_tags(version.tags) for version in (first, second))
    if not ours.metrics or not theirs.metrics:
        nameless = first if not theirs.metrics else second
        raise RegistryError(
            f"version {nameless.version} has no figures. `cigpose models evaluate {nameless.version}` measures it."
        )
    if difference := incomparable(ours, theirs, rules.metric):
        raise RegistryError(
            f"versions {first.version} and {second.version} cannot be compared: of version {first.version}, "
            f"{difference} `cigpose models evaluate` measures either as params.yaml says now."
        )
    parts = [name.removesuffix("/AP") for name in theirs.metrics if name.endswith("/AP")]
    every = Rules(  # the parts without a limit too
        metric=rules.metric,
        margin=rules.margin,
        max_loss=dict.fromkeys(parts, 1.0) | dict(rules.max_loss),
        max_robustness_loss=rules.max_robustness_loss,
    )
    return list(compare(ours, theirs, every, registry.paired(int(second.version), ours, first)))


def split_name(name: str) -> tuple[str | None, str]:
    """Model and version (or alias) of `models:/NAME@ALIAS`, `models:/NAME/VERSION`, or of a version or alias alone.

    `models:/NAME` is its champion.

    Raises:
        RegistryError: it is none of these.
    """
    if not name.startswith("models:"):
        return None, name
    asked = _ADDRESS.fullmatch(name)
    if not asked:
        raise RegistryError(f"{name}: expected models:/NAME@ALIAS or models:/NAME/VERSION.")
    return asked["model"], asked["number"] or asked["alias"] or CHAMPION


def pull(client: MlflowClient, version: ModelVersion, folder: Path) -> None:
    """Copy a version's files into a new folder: weights, params, ONNX file, figures, report, pictures, model card.

    Raises:
        RegistryError: there is something at `folder` already.
        MlflowException, OSError: its files cannot be had.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RegistryError(f"{folder}: there is something already, which is not written over. Name a new folder.")
    with tempfile.TemporaryDirectory() as place, written_folder(folder) as part:
        found = Path(mlflow.artifacts.download_artifacts(str(version.source), dst_path=place))
        shutil.copytree(found / "artifacts", part, dirs_exist_ok=True)
        for name in ("README.md", "requirements.txt"):
            if (found / name).is_file():
                shutil.copyfile(found / name, part / name)
        evaluation = Measurement.from_tags(version.tags)
        write_json(part / "metrics.json", evaluation.to_json())  # it may have been measured again since
        about = {"model": version.name, "version": int(version.version), "run_id": version.run_id}
        write_json(part / "version.json", about)
