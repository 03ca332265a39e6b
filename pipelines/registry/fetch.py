"""`python -m pipelines.registry.fetch models:/NAME@ALIAS`: the weights of a registered version, for whoever asks.

Prints the path of model.safetensors in the user's cache, with the calibration of its scores beside it. The library,
which knows no registry, runs this as a process of its own (`cigpose.deploy.models`).
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import mlflow
import platformdirs
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from cigpose.config import load_params
from cigpose.evaluate.calibration import FILE as CALIBRATION
from cigpose.files.addresses import without_credentials
from cigpose.files.atomic import claimed, clear_leftovers, written_folder
from cigpose.files.digest import sha256_of
from pipelines.lineage import project_root
from pipelines.registry.catalogue import registry_at, split_name
from pipelines.registry.versions import WEIGHTS_TAG, RegistryError
from pipelines.tracking.address import be_impatient, tracking_address

WEIGHTS = "model.safetensors"


def fetch_model(address: str, cache: Path | None = None) -> Path:
    """The weights of a registered version; fetched once, then taken from the cache.

    Args:
        address: models:/NAME/VERSION, models:/NAME@ALIAS, or models:/NAME for the champion.
        cache: folder; None for the user's.

    Raises:
        RegistryError: it is no such address, or there is no such version.
        ValueError: what was fetched is not what was registered.
        OSError: the registry does not answer.
    """
    where = _registry_address()
    version, place = _asked_version(address, where), without_credentials(where)
    identity = f"{place} {version.name} {version.version} {version.source} {version.creation_timestamp}"
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    folder = (cache or Path(platformdirs.user_cache_dir("cigpose")) / "models") / f"{version.name}-{key}"
    with claimed(folder.with_name(f"{folder.name}.lock"), f"fetching {address}", wait=True):
        clear_leftovers(folder)
        if not (folder / WEIGHTS).is_file():
            with written_folder(folder) as part:
                _download(version, part, address)
    return folder / WEIGHTS


def resolve_version(address: str) -> str:
    """The address models:/NAME/VERSION of what an address means now, as its alias may mean another version tomorrow.

    Raises:
        RegistryError: it is no such address, or there is no such version.
        OSError: the registry does not answer.
    """
    version = _asked_version(address, _registry_address())
    return f"models:/{version.name}/{version.version}"


def _asked_version(address: str, registry_address: str) -> ModelVersion:
    model, number = split_name(address)
    if model is None:
        raise RegistryError(f"{address}: expected models:/NAME@ALIAS or models:/NAME/VERSION.")
    _, registry = registry_at(registry_address, model)
    return registry.get(number)


def _registry_address() -> str:
    """Address of MLflow: of the project in the working directory, else MLFLOW_TRACKING_URI."""
    root, params = project_root(), project_root() / "params.yaml"
    if params.is_file():
        return tracking_address(load_params(params), root)
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root}/mlflow.db"


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
    except (RegistryError, ValueError, OSError, MlflowException) as err:
        print(without_credentials(str(err).splitlines()[0]), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
