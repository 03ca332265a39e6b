"""A champion by somebody's wish: with the gate's leave, against it, or one that was champion before."""

from __future__ import annotations

from mlflow.entities.model_registry import ModelVersion

from pipelines.registry.gate import Rules, decide
from pipelines.registry.measurement import Measurement
from pipelines.registry.versions import CHAMPION, Registry, RegistryError


def promote(registry: Registry, version: ModelVersion, rules: Rules, *, anyway: bool) -> str:
    """Make a version champion.

    Args:
        registry: of the model.
        version: which one.
        rules: the gate's.
        anyway: also where the gate would not; one that can do nothing never becomes champion.

    Returns: what was done.

    Raises:
        RegistryError: the gate is against it.
    """
    number, evaluation = int(version.version), Measurement.from_tags(version.tags)
    if rules.metric not in evaluation.metrics:
        raise RegistryError(f"version {number} has no {rules.metric}. `cigpose models evaluate {number}` measures it.")
    reigning = registry.by_alias(CHAMPION)
    champion = (int(reigning.version), Measurement.from_tags(reigning.tags)) if reigning else None
    paired = registry.paired(number, evaluation, reigning) if reigning else None
    decision = decide(number, evaluation, champion, rules, paired)
    if decision.verdict == "is_champion":
        return decision.text
    if decision.verdict == "not_measured":
        raise RegistryError(decision.text)
    if not decision.promotes and not anyway:
        raise RegistryError(f"{decision.text} `--anyway` makes it champion all the same.")
    before = f" in place of version {reigning.version}" if reigning else ""
    said = f"version {number} was made champion by hand{before}."
    registry.promote(number, said if decision.promotes else f"{said} The gate: {decision.text}")
    return said


def roll_back(registry: Registry, to: ModelVersion | None) -> tuple[int, str]:
    """Give the alias back to the champion before, or to `to`; the one it is taken from is not promoted by itself again.

    Returns: the champion now, and what was done.

    Raises:
        RegistryError: there is no champion, or none before it.
    """
    reigning = registry.by_alias(CHAMPION)
    if reigning is None:
        raise RegistryError(f"{registry.model} has no champion, so that there is nothing to go back from.")
    number = int(to.version) if to else registry.before(reigning)
    if number is None:
        raise RegistryError(
            f"version {reigning.version} is the first champion of {registry.model}. `--to VERSION` names another."
        )
    registry.get(str(number))  # is it there?
    said = f"version {number} is champion again; version {reigning.version} was rolled back."
    registry.promote(number, said, is_return=True)
    return number, said
