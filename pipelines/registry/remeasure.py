"""An old version measured by today's protocol on today's people, so that the gate can compare it again."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from cigpose.config import Config
from cigpose.deploy.onnx import onnx_figures
from cigpose.evaluate.checkpoint import evaluate_checkpoint
from pipelines.registry.card import description
from pipelines.registry.gate import Decision, Rules
from pipelines.registry.measurement import MATCHES, Measurement, write_measurement
from pipelines.registry.publish import model_of
from pipelines.registry.results import log_figures, log_matches
from pipelines.registry.versions import CHALLENGER, CHAMPION, Registry


def measure_again(
    client: MlflowClient, registry: Registry, version: ModelVersion, config: Config, shards: Path, device: str | None
) -> Measurement:
    """Evaluate a version's weights, and let the version keep the figures with their protocol.

    Args:
        client: of MLflow.
        registry: of the model.
        version: which one.
        config: people and protocol; network and crop are the version's own.
        shards: folder of the shard folders.
        device: None: the GPU if there is one.

    Raises:
        FileNotFoundError, ValueError: weights, shards or labels are missing, or do not fit each other.
    """
    assert version.run_id is not None  # we made it
    with tempfile.TemporaryDirectory() as place:
        package = Path(mlflow.artifacts.download_artifacts(str(version.source), dst_path=place))
        weights = package / "artifacts/model.safetensors"
        evaluation = evaluate_checkpoint(weights, config, shards_root=shards, device=device)
        assert evaluation is not None  # one process: this is rank 0
        exported = weights.with_name("model.onnx")
        figures = onnx_figures(exported, evaluation.config, shards) if exported.is_file() else {}
        measured = write_measurement(evaluation, evaluation.metrics | figures, Path(place), shards)
        measured = replace(measured, matches=log_matches(client, version.run_id, Path(place) / MATCHES))
    before = Measurement.from_tags(version.tags)
    if (before.data, before.protocol) == (measured.data, measured.protocol):
        measured = replace(measured, robustness=before.robustness)
    registry.tag(int(version.version), measured.tags())
    log_figures(client, version.run_id, measured, model_of(version))
    said = description(measured, Decision.from_tags(version.tags))
    client.update_model_version(registry.model, str(version.version), said)
    return measured


def ask_again(client: MlflowClient, registry: Registry, version: ModelVersion, rules: Rules) -> Decision | None:
    """Settle what could not be compared before `version` was measured again; None if nothing waited for that.

    Where it is the champion that was measured, the challenger may have waited; else the version itself.
    """
    champion = registry.by_alias(CHAMPION)
    waiting = registry.by_alias(CHALLENGER) if champion and champion.version == version.version else version
    decision = Decision.from_tags(waiting.tags) if waiting else None
    if waiting is None or decision is None or decision.verdict != "not_comparable":
        return None
    waiting = registry.get(str(waiting.version))
    evaluation = Measurement.from_tags(waiting.tags)
    settled = registry.settle(int(waiting.version), evaluation, rules)
    client.update_model_version(registry.model, str(waiting.version), description(evaluation, settled))
    return settled
