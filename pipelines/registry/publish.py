"""One registration: what MLflow lacks of a model is sent, and the gate decides. Doing it again changes nothing.

The order is what makes it safe to be killed anywhere: files first, then the version that points at them, then the
decision, and the model card, whose presence says that all the rest is there, last.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from pipelines.registry.card import description, model_card
from pipelines.registry.gate import Decision, Rules
from pipelines.registry.measurement import Measurement
from pipelines.registry.package import Package, create_logged_model, origin_tags, upload
from pipelines.registry.results import EVALUATION, log_figures, log_results
from pipelines.registry.versions import UNFINISHED_TAG, WEIGHTS_TAG, Registry

CARD = "README.md"
OPEN_VERDICTS = ("not_comparable", "rolled_back")
"""What the gate is asked again about: it depends on what others did meanwhile."""


def publish_version(
    client: MlflowClient,
    registry: Registry,
    package: Package,
    run_id: str,
    weights: str,
    rules: Rules,
    *,
    root: Path,
    staging: Path,
) -> tuple[int, Decision]:
    """Have the version of these weights of this run, whole, and a decision about it.

    Args:
        client: of MLflow.
        registry: of the model.
        package: what it is made of.
        run_id: MLflow's id of the training's run.
        weights: their sha256.
        rules: what decides.
        root: the project, whose dvc.lock is kept.
        staging: empty folder for what MLflow is given.

    Returns: number of the version, and the decision.
    """
    evaluation = package.evaluation
    found = registry.find(run_id, weights)
    is_whole = found is not None and has_files(client, found)
    is_same = found is not None and Measurement.from_tags(found.tags).to_json() == evaluation.to_json()
    decided = Decision.from_tags(found.tags) if found and UNFINISHED_TAG not in found.tags else None
    if found and is_whole and is_same and decided and is_final(decided, rules):
        return int(found.version), decided
    if not (is_whole and is_same):
        log_results(client, run_id, evaluation, root)
    if found is None:
        model_id = create_logged_model(client, package.config, run_id)
        upload(client, package, run_id, model_id, root=root, staging=staging)
        tags = {WEIGHTS_TAG: weights} | origin_tags(package) | evaluation.tags()
        version = registry.add(model_id, run_id, tags, description=description(evaluation, None))
    else:
        version, model_id = int(found.version), model_of(found)
        if not is_whole:
            upload(client, package, run_id, model_id, root=root, staging=staging)
        registry.tag(version, evaluation.tags())  # the same weights may have been evaluated in another way
    log_figures(client, run_id, evaluation, model_id)
    decision = registry.settle(version, evaluation, rules)
    finish(client, registry.model, version, model_id, package, decision, staging)
    return version, decision


def is_final(decided: Decision, rules: Rules) -> bool:
    """Whether a recorded decision holds, so that the gate need not be asked again."""
    return decided.verdict == "by_hand" or (decided.verdict not in OPEN_VERDICTS and decided.rules == rules)


def has_files(client: MlflowClient, version: ModelVersion) -> bool:
    """Whether the model's folder and the report of its run are there, as far as their last files tell."""
    with suppress(MlflowException, OSError):
        assert version.run_id is not None  # we made it
        model = {file.path for file in client.list_logged_model_artifacts(model_of(version))}
        report = client.list_artifacts(version.run_id, EVALUATION)
        return {CARD, "MLmodel"} <= model and bool(report)
    return False


def model_of(version: ModelVersion) -> str:
    """Id of the logged model behind a version."""
    return str(version.source).removeprefix("models:/")


def finish(
    client: MlflowClient,
    name: str,
    version: int,
    model_id: str,
    package: Package,
    decision: Decision,
    staging: Path,
) -> None:
    """Description of the version and model card, which tell of the decision."""
    if decision.verdict == "is_champion":  # what it became champion by is the better story
        decision = Decision.from_tags(client.get_model_version(name, str(version)).tags) or decision
    client.update_model_version(name, str(version), description(package.evaluation, decision))
    has_detector = package.detector is not None
    card = model_card(
        package.config, package.evaluation, package.lineage, package.run, decision, has_detector=has_detector
    )
    path = staging / CARD
    path.write_text(card, encoding="utf-8")
    client.log_model_artifact(model_id, str(path))
