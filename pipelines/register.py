"""DVC stage `register`: the trained and evaluated model becomes a version in the MLflow registry.

    reads   data/model/  data/report/  params.yaml
    writes  data/registered.json, results into the training's MLflow run, a registered version

Nothing else is needed: what was trained and measured on one machine is registered on another. Registering the same
weights of the same run again finds the same version; what MLflow has lost of it is sent again, and since nobody but
MLflow knows that, `dvc repro` asks each time. `--show` only prints the outcome again.
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
from cigpose.files.atomic import claimed, clear_leftovers, write_json
from cigpose.files.digest import sha256_of
from pipelines.lineage import project_root
from pipelines.paths import CHAMPION_FIGURES, MODEL, REGISTERED, REPORT, RUNS, WEIGHTS
from pipelines.registry.gate import Rules
from pipelines.registry.outcome import champion_figures, identity, outcome, summary
from pipelines.registry.package import Package, read_detector, read_lineage
from pipelines.registry.publish import publish_version
from pipelines.registry.results import RegisterError, read_evaluation, read_json, training_run
from pipelines.registry.versions import CHAMPION, Registry
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
            outcome_now = register(config, Path.cwd())
            with claimed(RUNS / "registered.lock", "the note of a registration", wait=True):
                clear_leftovers(REGISTERED)
                write_json(REGISTERED, outcome_now)
        except UnreachableError as err:
            if is_registered(config, Path.cwd()):
                print(f"register: {err} Whether it still has what {REGISTERED} says could not be asked.")
                return
            advice = "Nothing is lost: start it, or correct registry.tracking_uri (MLFLOW_TRACKING_URI), and run again."
            raise RegisterError(f"{err} {advice}") from err
        except MlflowException as err:
            raise RegisterError(f"MLflow: {str(err).splitlines()[0]}") from err
    print(summary(read_json(REGISTERED), read_evaluation(config, Path.cwd())[0], config))


def is_registered(config: Config, root: Path) -> bool:
    """Whether data/registered.json is about this model, this measurement and these rules."""
    if not (root / REGISTERED).is_file():
        return False
    about = identity(config, sha256_of(root / WEIGHTS), read_evaluation(config, root)[0])
    return about.items() <= read_json(root / REGISTERED).items()


def register(config: Config, root: Path) -> dict[str, Any]:
    """Make or find the version of data/model, and settle who is champion.

    Args:
        config: the experiment.
        root: folder with data/ and dvc.lock.

    Returns: what data/registered.json holds.

    Raises:
        RegisterError: nobody has the training's run, or the metric to compare by was not measured.
    """
    run_info = read_json(root / MODEL / "run.json")
    evaluation, dataset = read_evaluation(config, root)
    package = Package(
        config=config,
        folder=root / MODEL,
        report=root / REPORT,
        evaluation=evaluation,
        lineage=read_lineage(config, root, run_info, dataset),
        run=run_info,
        detector=read_detector(config, root),
    )
    package.files()  # before anything is sent
    address = tracking_address(config)
    mlflow.set_tracking_uri(address)  # a sqlite registry looks logged models up at the global address
    client = connect(address)
    run_id = training_run(client, config, str(run_info["run_id"]), root, address)
    registry = Registry(client, config.registry.model)
    registry.ensure(f"Pose models. Use the version with the alias `{CHAMPION}`.")
    weights = sha256_of(root / WEIGHTS)
    with _staging() as folder:
        version, decision = publish_version(
            client, registry, package, run_id, weights, Rules.of(config), root=root, staging=folder
        )
    write_json(project_root() / CHAMPION_FIGURES, champion_figures(registry))
    return outcome(client, identity(config, weights, evaluation), run_id, version, decision, registry)


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
