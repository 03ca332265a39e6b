"""Versions of a model in the MLflow registry, and which of them is the champion.

The alias `champion` moves by the rules of `pipelines.registry.gate`, or by someone's hand. The newest version that is
not the champion has the alias `challenger`. What was decided, by which numbers, is kept in the version's tags.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

from cigpose.evaluate.tables import MatchTables, paired_intervals
from pipelines.registry.gate import PROMOTING, Decision, Intervals, Rules, decide, incomparable, kept_back
from pipelines.registry.measurement import Measurement
from pipelines.registry.turns import turn

CHAMPION, CHALLENGER = "champion", "challenger"
WEIGHTS_TAG = "weights_sha256"
UNFINISHED_TAG = "decision.unfinished"
"""Of a version whose decision is being carried out: the decision's own tags, as JSON."""
PROMOTED_TAG = "cigpose.champion"
"""Of the registered model: the version that was made champion last, or was found as champion by someone's hand."""
ROLLED_BACK_TAG = "rolled_back"
"""Of a version that was champion until someone moved the alias by hand."""


class RegistryError(ValueError):
    """What the registry cannot do, in one sentence."""


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

    def all(self) -> list[ModelVersion]:
        """Every version, the newest first."""
        found: list[ModelVersion] = []
        token: str | None = None
        while token != "":
            page = self._client.search_model_versions(f"name = '{self.model}'", page_token=token)
            found += page
            token = page.token or ""
        return sorted(found, key=lambda version: -int(version.version))

    def find(self, run_id: str, weights_sha256: str) -> ModelVersion | None:
        """The version made of these weights by this run, if there is one."""
        for version in self.all():
            if version.run_id == run_id and version.tags.get(WEIGHTS_TAG) == weights_sha256:
                return version
        return None

    def get(self, name: str) -> ModelVersion:
        """A version by its number or alias.

        Raises:
            RegistryError: there is none.
        """
        if name.isdigit():
            with suppress(MlflowException):
                return self._client.get_model_version(self.model, name)
        elif (found := self.by_alias(name)) is not None:
            return found
        known = ", ".join(str(version.version) for version in self.all()[:8]) or "none"
        aliases = ", ".join(sorted(self._client.get_registered_model(self.model).aliases)) or "none"
        raise RegistryError(f"{self.model} has no version {name}. The newest: {known}; aliases: {aliases}.")

    def add(self, model_id: str, run_id: str, tags: Mapping[str, str], description: str) -> int:
        """Register a logged model, unless another process has just registered the same weights of the same run.

        Returns: the number of the version.
        """
        with turn(self._client, self.model):
            found = self.find(run_id, tags[WEIGHTS_TAG])
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

    def settle(self, version: int, evaluation: Measurement, rules: Rules) -> Decision:
        """Compare a version with the champion, move the aliases, and write down why; one process at a time.

        What a killed process had decided is carried out by the next call. A champion whose alias someone moved by hand
        is not promoted again, as long as it has the tag `rolled_back`.

        Raises:
            TurnLostError: another process has the turn and does not give it back.
        """
        compared: dict[tuple[str, str], Intervals | None] = {}
        while True:
            reigning = self.by_alias(CHAMPION)  # the bootstrap takes seconds: not in a turn that others wait for
            if reigning and _state(reigning) not in compared:
                compared[_state(reigning)] = self.paired(version, evaluation, reigning)
            with turn(self._client, self.model) as mine:
                self._finish_interrupted()
                self._note_moves_by_hand()
                reigning = self.by_alias(CHAMPION)
                if reigning and _state(reigning) not in compared:
                    continue  # there is another champion now
                champion = (int(reigning.version), Measurement.from_tags(reigning.tags)) if reigning else None
                paired = compared[_state(reigning)] if reigning else None
                decision = decide(version, evaluation, champion, rules, paired)
                if decision.promotes and ROLLED_BACK_TAG in self._tags(version):
                    decision = kept_back(decision, version, ROLLED_BACK_TAG)
                if decision.verdict != "is_champion":  # a champion keeps the record of how it became one
                    mine.keep()
                    self.tag(version, {UNFINISHED_TAG: json.dumps(decision.tags())})
                    self._carry_out(version, decision.tags())
                return decision

    def paired(self, version: int, evaluation: Measurement, reigning: ModelVersion) -> Intervals | None:
        """Intervals of the differences to another version, where both have their matches; None where they have not."""
        theirs = Measurement.from_tags(reigning.tags)
        is_itself = (reigning.name, int(reigning.version)) == (self.model, version)
        if is_itself or incomparable(evaluation, theirs, next(iter(evaluation.metrics), "")):
            return None
        ours = self._client.get_model_version(self.model, str(version))
        first, second = self.matches(reigning.run_id, theirs), self.matches(ours.run_id, evaluation)
        if first is None or second is None:
            return None
        with suppress(ValueError):  # other pictures
            return paired_intervals(first, second)
        return None

    def matches(self, run_id: str | None, evaluation: Measurement) -> MatchTables | None:
        """What a version keeps for comparisons picture by picture; None where it is not to be had."""
        if not run_id or not evaluation.matches:
            return None
        with tempfile.TemporaryDirectory() as folder, suppress(MlflowException, OSError, ValueError):
            return MatchTables.load(Path(self._client.download_artifacts(run_id, evaluation.matches, folder)))
        return None

    def promote(self, version: int, why: str, *, is_return: bool = False) -> ModelVersion | None:
        """Make a version champion by somebody's wish; the one before is not promoted again by itself.

        Args:
            version: its number.
            why: what is recorded.
            is_return: it was champion before, and what was champion before it is kept as that.

        Returns: the champion before.
        """
        with turn(self._client, self.model) as mine:
            self._finish_interrupted()
            self._note_moves_by_hand()
            reigning = self.by_alias(CHAMPION)
            if reigning and int(reigning.version) == version:
                return reigning
            deposed = int(reigning.version) if reigning else None
            before = self.before(self.get(str(version))) if is_return else deposed
            numbers = {"champion_version": before, "deposed": deposed}
            tags = {"decision": "by_hand", "decision.text": why, "values.decision": json.dumps(numbers)}
            mine.keep()
            self.tag(version, {UNFINISHED_TAG: json.dumps(tags)})
            self._carry_out(version, tags)
            return reigning

    def before(self, champion: ModelVersion) -> int | None:
        """The version that was champion before this one; None where none is known."""
        number = json.loads(champion.tags.get("values.decision") or "{}").get("champion_version")
        return int(number) if number else None

    def _carry_out(self, version: int, tags: Mapping[str, str]) -> None:
        """Record a decision and move the alias; each step may be done again."""
        self.tag(version, tags)
        if tags["decision"] == "by_hand":
            before = json.loads(tags["values.decision"])["deposed"]
            self._note_move(str(before) if before else None, str(version))
        if tags["decision"] in PROMOTING:
            self._client.set_registered_model_tag(self.model, PROMOTED_TAG, str(version))
            self._client.set_registered_model_alias(self.model, CHAMPION, str(version))
            self._drop_challenger(version)
        else:
            self._client.set_registered_model_alias(self.model, CHALLENGER, str(version))
        self._client.delete_model_version_tag(self.model, str(version), UNFINISHED_TAG)

    def _drop_challenger(self, version: int) -> None:
        challenger = self.by_alias(CHALLENGER)
        if challenger and int(challenger.version) == version:
            self._client.delete_registered_model_alias(self.model, CHALLENGER)

    def _finish_interrupted(self) -> None:
        """Carry out what a killed process had decided, unless someone moved the champion's alias meanwhile."""
        for found in self._client.search_model_versions(f"name = '{self.model}'"):
            if UNFINISHED_TAG not in found.tags:
                continue
            tags, reigning = json.loads(found.tags[UNFINISHED_TAG]), self.by_alias(CHAMPION)
            number = int(reigning.version) if reigning else None
            numbers = json.loads(tags["values.decision"])
            before = numbers.get("deposed", numbers["champion_version"])
            if tags["decision"] not in PROMOTING or number in (before, int(found.version)):
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
        self._note_move(None if promoted == "none" else promoted, number)
        self._client.set_registered_model_tag(self.model, PROMOTED_TAG, number or "none")

    def _note_move(self, before: str | None, now: str | None) -> None:
        if before:
            where = f"version {now}" if now else "no version"
            with suppress(MlflowException):  # it may have been deleted
                self.tag(int(before), {ROLLED_BACK_TAG: f"the alias was moved by hand, to {where}"})
        if now and ROLLED_BACK_TAG in self._tags(int(now)):
            self._client.delete_model_version_tag(self.model, now, ROLLED_BACK_TAG)

    def _tags(self, version: int) -> dict[str, str]:
        return self._client.get_model_version(self.model, str(version)).tags

    def tag(self, version: int, tags: Mapping[str, Any]) -> None:
        """Set tags of a version."""
        for name, value in tags.items():
            self._client.set_model_version_tag(self.model, str(version), name, str(value))


def _state(version: ModelVersion) -> tuple[str, str]:
    """A version, and what it was measured to do."""
    return str(version.version), json.dumps(Measurement.from_tags(version.tags).to_json())
