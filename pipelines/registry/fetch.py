"""`python -m pipelines.registry.fetch models:/NAME@ALIAS`: the weights of a registered version, for whoever asks.

Prints the path of model.safetensors in the user's cache, with the calibration of its scores beside it. The library,
which knows no registry, runs this as a process of its own (`cigpose.deploy.models`).
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from pathlib import Path

import mlflow
import platformdirs
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from cigpose.config import load_params
from cigpose.evaluate.calibration import FILE as CALIBRATION
from cigpose.files.addresses import without_credentials
from cigpose.files.atomic import claimed, clear_leftovers, written_folder
from cigpose.files.digest import sha256_of
from pipelines.lineage import project_root
from pipelines.registry.versions import CHAMPION, WEIGHTS_TAG
from pipelines.tracking.address import be_impatient, connect, tracking_address
from pipelines.tracking.database import database_path

WEIGHTS = "model.safetensors"
_ADDRESS = re.compile(r"models:/(?P<name>[^/@]+)(/(?P<version>\d+)|@(?P<alias>[^/@]+))?")


def fetch_model(address: str, cache: Path | None = None) -> Path:
    """The weights of a registered version; fetched once, then taken from the cache.

    Args:
        address: models:/NAME/VERSION, models:/NAME@ALIAS, or models:/NAME for the champion.
        cache: folder; None for the user's.

    Raises:
        ValueError: it is no such address, there is no such version, or what was fetched is not what was registered.
        OSError: the registry does not answer.
    """
    where = _registry()
    place, version = without_credentials(where), _asked_version(address, where)
    identity = f"{place} {version.name} {version.version} {version.source} {version.creation_timestamp}"
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    folder = (cache or Path(platformdirs.user_cache_dir("cigpose")) / "models") / f"{version.name}-{key}"
    with claimed(folder.with_name(f"{folder.name}.lock"), f"fetching {address}", wait=True):
        clear_leftovers(folder)
        if not (folder / WEIGHTS).is_file():
            mlflow.set_tracking_uri(where)  # a sqlite registry looks logged models up at the global address
            with written_folder(folder) as part:
                _download(version, part, address)
    return folder / WEIGHTS


def resolve_version(address: str) -> str:
    """The address models:/NAME/VERSION of what an address means now, as its alias may mean another version tomorrow.

    Raises:
        ValueError: it is no such address, or there is no such version.
        OSError: the registry does not answer.
    """
    version = _asked_version(address, _registry())
    return f"models:/{version.name}/{version.version}"


def _asked_version(address: str, registry: str) -> ModelVersion:
    asked = _ADDRESS.fullmatch(address)
    if not asked:
        raise ValueError(f"{address}: expected models:/NAME@ALIAS or models:/NAME/VERSION.")
    alias = asked["alias"] or CHAMPION
    return _version(connect(registry), asked["name"], asked["version"], alias, without_credentials(registry))


def _registry() -> str:
    """Address of MLflow: of the project in the working directory, else MLFLOW_TRACKING_URI."""
    root, params = project_root(), project_root() / "params.yaml"
    if params.is_file():
        address = tracking_address(load_params(params), root)
    else:
        address = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root}/mlflow.db"
    path = database_path(address)
    if path is not None and not path.is_file():
        raise ValueError(f"{path}: no registry there. Go to the project's folder, or set MLFLOW_TRACKING_URI.")
    return address


def _version(client: MlflowClient, name: str, number: str | None, alias: str, place: str) -> ModelVersion:
    try:
        return client.get_model_version(name, number) if number else client.get_model_version_by_alias(name, alias)
    except MlflowException as err:
        wanted = f"version {number}" if number else f"version with the alias {alias!r}"
        raise ValueError(f"{place}: has no {wanted} of a model {name!r}.") from err


def _download(version: ModelVersion, folder: Path, address: str) -> None:
    source = f"models:/{version.name}/{version.version}/artifacts"
    try:
        there = {Path(item.path).name for item in mlflow.artifacts.list_artifacts(source) or ()}
        for name in (WEIGHTS, *({CALIBRATION} & there)):
            got = Path(mlflow.artifacts.download_artifacts(f"{source}/{name}", dst_path=str(folder / "got")))
            os.replace(got, folder / name)
    except (MlflowException, OSError) as err:
        raise ValueError(f"{address}: its files cannot be fetched ({str(err).splitlines()[0]:.200}).") from err
    for path in sorted((folder / "got").rglob("*"), reverse=True):
        path.rmdir()
    (folder / "got").rmdir()
    registered = version.tags.get(WEIGHTS_TAG)
    if registered and sha256_of(folder / WEIGHTS) != registered:
        raise ValueError(f"{address}: its weights are not those that were registered ({registered[:12]}...).")


def main(arguments: list[str]) -> int:
    """Print the path; one sentence and 1 where there is none."""
    if len(arguments) != 1:
        print("usage: python -m pipelines.registry.fetch models:/NAME@ALIAS", file=sys.stderr)
        return 2
    be_impatient()
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    try:
        print(fetch_model(arguments[0]))
    except (ValueError, OSError, MlflowException) as err:
        print(without_credentials(str(err).splitlines()[0]), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
