"""Versions of a model in the MLflow registry, and which of them is the champion.

Two versions are compared only where that means something: by the same metric, measured by the same protocol on the same
people. The alias `champion` is then moved if the challenger is better by more than the margin. The newest version that
is not the champion has the alias `challenger`. What was decided, by which numbers, is kept in the version's tags.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

from cigpose.config import Config
from pipelines.lineage import digest_of
from pipelines.registry.turns import turn

CHAMPION, CHALLENGER = "champion", "challenger"
RUN_TAG, WEIGHTS_TAG = "cigpose.run_id", "cigpose.weights_sha256"
DATA_TAG, PROTOCOL_TAG = "evaluation.data", "evaluation.protocol"

UNFINISHED_TAG = "decision.unfinished"
"""Of a version whose decision is being carried out: the decision's own tags, as JSON."""
PROMOTED_TAG = "cigpose.champion"
"""Of the registered model: the version that was made champion last, or was found as champion by someone's hand."""
ROLLED_BACK_TAG = "rolled_back"
"""Of a version that was champion until someone moved the alias by hand."""

Verdict = Literal["first", "better", "not_better", "not_comparable", "is_champion", "not_measured", "rolled_back"]
PROMOTING = ("first", "better")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a version was measured to do, and how."""

    metrics: Mapping[str, float]
    """`<part>/<figure>` -> value."""
    data: str
    """Digest of the people it was measured on."""
    protocol: str
    """JSON of all that decides a figure besides the people."""

    def tags(self) -> dict[str, str]:
        """As a version keeps it."""
        figures = {name: f"{value:.6f}" for name, value in self.metrics.items()}
        return {DATA_TAG: self.data, PROTOCOL_TAG: self.protocol, **figures}

    @classmethod
    def from_tags(cls, tags: Mapping[str, str]) -> Measurement:
        """The evaluation that a version keeps."""
        metrics = {}
        for name, value in tags.items():
            if "/" in name:
                try:
                    metrics[name] = float(value)
                except ValueError:
                    continue
        return cls(metrics=metrics, data=tags.get(DATA_TAG, ""), protocol=tags.get(PROTOCOL_TAG, ""))


def protocol_of(config: Config) -> str:
    """The evaluation protocol as JSON: settings that change figures, not those that change speed."""
    evaluate = config.to_mapping()["evaluate"]
    settings = {name: value for name, value in evaluate.items() if name not in ("batch", "metric")}
    keypoints = config.keypoint_set
    table = [keypoints.names, keypoints.sigmas, {part: list(index) for part, index in keypoints.parts.items()}]
    return json.dumps(settings | {"keypoints": keypoints.name, "keypoint_table": digest_of(table)}, sort_keys=True)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Whether a version becomes champion, and why."""

    verdict: Verdict
    text: str
    """One sentence with both numbers."""
    value: float
    champion_version: int | None = None
    champion_value: float | None = None

    @property
    def promotes(self) -> bool:
        """Whether the alias `champion` moves."""
        return self.verdict in PROMOTING


def decide(
    version: int, evaluation: Measurement, champion: tuple[int, Measurement] | None, metric: str, margin: float
) -> Decision:
    """Compare a version with the champion.

    Args:
        version: number of the challenger.
        evaluation: of the challenger; has `metric`.
        champion: number and evaluation of the champion, if there is one.
        metric: `<part>/<figure>`, higher is better.
        margin: the challenger must be better by more than this.
    """
    value = evaluation.metrics[metric]
    if champion is not None and champion[0] == version:
        text = f"version {version} is the champion already."
        return Decision(
            verdict="is_champion",
            text=text,
            value=value,
            champion_version=version,
            champion_value=champion[1].metrics.get(metric),
        )
    if not is_measured(value):
        text = (
            f"version {version} stays challenger: {metric} is {value:g}, so nothing it can do was measured. Does "
            "data.val label that part, and did the training get anywhere?"
        )
        number, theirs = (champion[0], champion[1].metrics.get(metric)) if champion else (None, None)
        return Decision(verdict="not_measured", text=text, value=value, champion_version=number, champion_value=theirs)
    if champion is None:
        text = f"version {version} is the first champion, with {metric} {value:.4f}."
        return Decision(verdict="first", text=text, value=value)
    number, reigning = champion
    theirs = reigning.metrics.get(metric)
    facts = {"value": value, "champion_version": number, "champion_value": theirs}
    difference = incomparable(evaluation, reigning, metric)
    if difference:
        text = (
            f"version {version} ({metric} {value:.4f}) was not compared with champion {number}: {difference} "
            f"It stays challenger; evaluate version {number} as this one was, or move the alias yourself."
        )
        return Decision(verdict="not_comparable", text=text, **facts)  # type: ignore[arg-type]
    assert theirs is not None
    needed = f"{metric} {value:.4f} against {theirs:.4f} of version {number}, margin {margin:g}"
    if value > theirs + margin or not is_measured(theirs):
        return Decision(verdict="better", text=f"version {version} is the new champion: {needed}.", **facts)  # type: ignore[arg-type]
    return Decision(verdict="not_better", text=f"version {version} stays challenger: {needed}.", **facts)  # type: ignore[arg-type]


def is_measured(value: float) -> bool:
    """Whether a figure says that a model can do something; pycocotools gives -1 where nothing is labelled."""
    return math.isfinite(value) and value > 0


def incomparable(one: Measurement, other: Measurement, metric: str) -> str | None:
    """Why two evaluations cannot be compared, as a sentence about the second; None if they can."""
    if one.data != other.data:
        return f"it was evaluated on other people (data {other.data or 'unknown'}, here {one.data})."
    if one.protocol != other.protocol:
        ours, theirs = json.loads(one.protocol or "{}"), json.loads(other.protocol or "{}")
        names = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
        pairs = ", ".join(f"{name} {theirs.get(name)!r}, here {ours.get(name)!r}" for name in names)
        return f"it was evaluated by another protocol ({pairs})."
    if metric not in other.metrics:
        return f"it has no {metric}."
    return None


class Registry:
    """The versions of one registered model."""

    def __init__(self, client: MlflowClient, model: str) -> None:
        self._client, self.model = client, model

    def ensure(self, description: str) -> None:
        """Make the registered model if there is none yet."""
        try:
            self._client.create_registered_model(self.model, description=description)
        except MlflowException as err:
            if err.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def find(self, run_id: str, weights_sha256: str) -> ModelVersion | None:
        """The version made of these weights by this run, if there is one."""
        for version in self._client.search_model_versions(f"name = '{self.model}'"):
            if version.tags.get(RUN_TAG) == run_id and version.tags.get(WEIGHTS_TAG) == weights_sha256:
                return version
        return None

    def add(self, model_id: str, run_id: str, tags: Mapping[str, str], description: str) -> int:
        """Register a logged model, unless another process has just registered the same weights of the same run.

        Returns: the number of the version.
        """
        with turn(self._client, self.model):
            found = self.find(tags[RUN_TAG], tags[WEIGHTS_TAG])
            return int(found.version) if found else self._create(model_id, run_id, tags, description)

    def _create(self, model_id: str, run_id: str, tags: Mapping[str, str], description: str) -> int:
        version = self._client.create_model_version(
            self.model,
            f"models:/{model_id}",
            run_id=run_id,
            tags=dict(tags),
            description=description,
            model_id=model_id,
        )
        link = [{"name": self.model, "version": version.version}]  # what the page of the logged model shows
        self._client.set_logged_model_tags(model_id, {MLFLOW_MODEL_VERSIONS: json.dumps(link)})
        return int(version.version)

    def by_alias(self, alias: str) -> ModelVersion | None:
        """The version with an alias, if there is one."""
        try:
            return self._client.get_model_version_by_alias(self.model, alias)
        except MlflowException as err:
            if err.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    def settle(self, version: int, evaluation: Measurement, metric: str, margin: float) -> Decision:
        """Compare a version with the champion, move the aliases, and write down why; one process at a time.

        What a killed process had decided is carried out by the next call. A champion whose alias someone moved by hand
        is not promoted again, as long as it has the tag `rolled_back`.

        Raises:
            TurnLostError: another process has the turn and does not give it back.
        """
        with turn(self._client, self.model) as mine:
            self._finish_interrupted()
            self._note_moves_by_hand()
            reigning = self.by_alias(CHAMPION)
            champion = (int(reigning.version), Measurement.from_tags(reigning.tags)) if reigning else None
            decision = decide(version, evaluation, champion, metric, margin)
            if decision.promotes and ROLLED_BACK_TAG in self._tags(version):
                decision = _kept_back(decision, version)
            if decision.verdict != "is_champion":  # a champion keeps the record of how it became one
                tags = _decision_tags(decision, metric, margin)
                mine.keep()
                self.tag(version, {UNFINISHED_TAG: json.dumps(tags)})
                self._carry_out(version, tags)
        return decision

    def _carry_out(self, version: int, tags: Mapping[str, str]) -> None:
        """Record a decision and move the alias; each step may be done again."""
        self.tag(version, tags)
        if tags["decision"] in PROMOTING:
            self._client.set_registered_model_tag(self.model, PROMOTED_TAG, str(version))
            self._client.set_registered_model_alias(self.model, CHAMPION, str(version))
            challenger = self.by_alias(CHALLENGER)
            if challenger and int(challenger.version) == version:
                self._client.delete_registered_model_alias(self.model, CHALLENGER)
        else:
            self._client.set_registered_model_alias(self.model, CHALLENGER, str(version))
        self._client.delete_model_version_tag(self.model, str(version), UNFINISHED_TAG)

    def _finish_interrupted(self) -> None:
        """Carry out what a killed process had decided, unless someone moved the champion's alias meanwhile."""
        for found in self._client.search_model_versions(f"name = '{self.model}'"):
            if UNFINISHED_TAG not in found.tags:
                continue
            tags, reigning = json.loads(found.tags[UNFINISHED_TAG]), self.by_alias(CHAMPION)
            number = str(reigning.version) if reigning else "none"
            if tags["decision"] not in PROMOTING or number in (tags["decision.champion_version"], str(found.version)):
                self._carry_out(int(found.version), tags)
            else:
                self._client.delete_model_version_tag(self.model, str(found.version), UNFINISHED_TAG)

    def _note_moves_by_hand(self) -> None:
        """Remember of a champion that someone took the alias from it, so that it is not promoted again."""
        promoted = self._client.get_registered_model(self.model).tags.get(PROMOTED_TAG)
        reigning = self.by_alias(CHAMPION)
        number = str(reigning.version) if reigning else None
        if promoted == number:
            return
        if promoted and promoted != "none":
            where = f"version {number}" if number else "no version"
            with suppress(MlflowException):  # it may have been deleted
                self.tag(int(promoted), {ROLLED_BACK_TAG: f"the alias was moved by hand, to {where}"})
        if reigning and ROLLED_BACK_TAG in reigning.tags:
            self._client.delete_model_version_tag(self.model, str(number), ROLLED_BACK_TAG)
        self._client.set_registered_model_tag(self.model, PROMOTED_TAG, number or "none")

    def _tags(self, version: int) -> dict[str, str]:
        return self._client.get_model_version(self.model, str(version)).tags

    def tag(self, version: int, tags: Mapping[str, Any]) -> None:
        """Set tags of a version."""
        for name, value in tags.items():
            self._client.set_model_version_tag(self.model, str(version), name, str(value))


def _kept_back(decision: Decision, version: int) -> Decision:
    text = (
        f"version {version} stays as it is: it was champion until someone moved the alias by hand. Delete its tag "
        f"`{ROLLED_BACK_TAG}` to let it compete again, or set the alias yourself."
    )
    return replace(decision, verdict="rolled_back", text=text)


def _decision_tags(decision: Decision, metric: str, margin: float) -> dict[str, str]:
    return {
        "decision": decision.verdict,
        "decision.text": decision.text,
        "decision.metric": metric,
        "decision.margin": f"{margin:g}",
        "decision.value": f"{decision.value:.6f}",
        "decision.champion_version": str(decision.champion_version or "none"),
        "decision.champion_value": "none" if decision.champion_value is None else f"{decision.champion_value:.6f}",
    }
