"""DVC stage `register`: the trained and evaluated model becomes a version in the MLflow registry.

    reads   data/model/  data/report/  data/metrics/evaluate.json  params.yaml  the index.json of the shards
    writes  data/registered.json, results into the training's MLflow run, a registered version

Registering the same weights of the same run again finds the same version. `--show` only prints the outcome again.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException

from cigpose.config import Config
from cigpose.files.atomic import claimed, write_json
from cigpose.files.digest import sha256_of
from pipelines.lineage import project_root
from pipelines.paths import METRICS, MODEL, REGISTERED, RUNS, WEIGHTS
from pipelines.registry.outcome import outcome, summary
from pipelines.registry.package import (
    log_package,
    make_package,
    model_card,
    origin_tags,
)
from pipelines.registry.results import (
    RegisterError,
    flat_metrics,
    log_figures,
    log_results,
    read_evaluation,
    read_json,
    training_run,
)
from pipelines.registry.versions import (
    CHAMPION,
    RUN_TAG,
    WEIGHTS_TAG,
    Registry,
)
from pipelines.stage import stage
from pipelines.tracking.address import UnreachableError, be_impatient, connect, tracking_address

UPLOAD_S = 30.0
"""Seconds without an answer after which MLflow is given up: it answers an upload once it has stored the file."""


@stage(
    "register",
    flags={"--show": "print the outcome of the last registration again"},
    errors=(RegisterError,),
    when_stopped="The same command finds again what it registered.",
)
def main(config: Config, show: bool) -> None:
    """Register, or show what was registered."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    be_impatient(UPLOAD_S)
    if not show:
        try:
            write_json(REGISTERED, register(config, Path.cwd()))
        except UnreachableError as err:
            advice = "Nothing is lost: start it, or correct registry.tracking_uri (MLFLOW_TRACKING_URI), and run again."
            raise RegisterError(f"{err} {advice}") from err
        except MlflowException as err:
            raise RegisterError(f"MLflow: {str(err).splitlines()[0]}") from err
    print(summary(read_json(REGISTERED), flat_metrics(read_json(METRICS))))


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
    address = tracking_address(config)
    mlflow.set_tracking_uri(address)  # a sqlite registry looks logged models up at the global address
    client = connect(address)
    run_id = training_run(client, config, str(run_info["run_id"]), address)
    log_results(client, run_id, evaluation, root)
    registry = Registry(client, config.registry.model)
    registry.ensure(f"Pose models. Use the version with the alias `{CHAMPION}`.")
    identity = {RUN_TAG: run_id, WEIGHTS_TAG: sha256_of(root / WEIGHTS)}
    with _staging() as folder:
        found = registry.find(run_id, identity[WEIGHTS_TAG])
        if found is not None:
            version = int(found.version)
            registry.tag(version, evaluation.tags())  # the same weights may have been evaluated in another way
        else:
            package = make_package(config, root, {**run_info, "run_id": run_id}, evaluation)
            model_id = log_package(client, package, run_id, folder / "model", root)
            log_figures(client, run_id, evaluation, model_id)
            tags = identity | evaluation.tags() | origin_tags(package)
            version = registry.add(model_id, run_id, tags, description=model_card(package))
    decision = registry.settle(version, evaluation, config.evaluate.metric, config.registry.margin)
    return outcome(client, config, run_id, version, decision, registry)


@contextlib.contextmanager
def _staging() -> Iterator[Path]:
    """A folder for what MLflow is given, for one registration of the project at a time; a killed one's is removed."""
    folder = project_root() / RUNS / "register"
    with claimed(folder.with_suffix(".lock"), "a registration", wait=True):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
