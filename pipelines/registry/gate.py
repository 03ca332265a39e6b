"""Whether a version becomes champion: a pure function of two measurements and the rules.

Two versions are compared only where that means something: by the same metric, measured by the same protocol on the same
people. The challenger must then be better by more than the margin, and lose no part of the person for it.

A loss counts if it is more than the rules allow and more than chance makes: the 95 percent interval of the difference
must lie below zero. How that interval is known is part of the decision:

    paired      both were measured on the same resampled pictures (`cigpose.evaluate.tables`); the narrowest
    intervals   from the interval of each alone, as if the two were independent, which makes it too wide
    figures     nothing is known about chance, and the figures decide alone
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from cigpose.config import Config
from pipelines.registry.measurement import DECIMALS, Estimate, Measurement, is_measured

Verdict = Literal[
    "first", "better", "not_better", "loses", "not_comparable", "is_champion", "not_measured", "rolled_back", "by_hand"
]
PROMOTING = ("first", "better", "by_hand")
How = Literal["paired", "intervals", "figures"]
_HOW: dict[How, str] = {
    "paired": "paired",
    "intervals": "from the interval of each",
    "figures": "no interval is known",
}
Intervals = Mapping[str, tuple[float, float]]
"""Part -> 95 percent interval of the challenger's AP less the champion's, paired."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What decides (`registry` and `evaluate.metric` of params.yaml)."""

    metric: str
    """`<part>/<figure>`, higher is better."""
    margin: float = 0.0
    max_loss: Mapping[str, float] = field(default_factory=dict)
    max_robustness_loss: float = 1.0

    @classmethod
    def of(cls, config: Config) -> Rules:
        """Those of an experiment."""
        registry = config.registry
        return cls(
            metric=config.evaluate.metric,
            margin=registry.margin,
            max_loss=registry.max_loss,
            max_robustness_loss=registry.max_robustness_loss,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "metric": self.metric,
            "margin": self.margin,
            "max_loss": dict(self.max_loss),
            "max_robustness_loss": self.max_robustness_loss,
        }


@dataclass(frozen=True, kw_only=True)
class Change:
    """A part of the challenger beside the champion's."""

    part: str
    of: Literal["AP", "robustness"]
    ours: float
    theirs: float
    interval: tuple[float, float] | None
    """95 percent interval of `ours - theirs`."""
    how: How
    allowed: float | None
    """What may be lost; None: anything."""

    @property
    def is_loss(self) -> bool:
        """Whether it is more than is allowed, and than chance makes."""
        if self.allowed is None or not self.theirs - self.ours > self.allowed:
            return False
        return self.interval is None or self.interval[1] < 0

    def sentence(self) -> str:
        """Both figures, and how sure the difference is."""
        sure = _HOW[self.how]
        if self.interval is not None:
            low, high = self.interval
            sure = f"95 % interval of the difference {low:+.3f} to {high:+.3f}, {sure}"
        figure = "AP" if self.of == "AP" else "share of its AP left on spoilt pictures"
        allowed = "any loss" if self.allowed is None else f"{self.allowed:g}"
        return f"{self.part}: {figure} {self.ours:.4f} against {self.theirs:.4f} ({sure}; may lose {allowed})"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "part": self.part,
            "of": self.of,
            "ours": round(self.ours, DECIMALS),
            "theirs": round(self.theirs, DECIMALS),
            "interval": None if self.interval is None else [round(end, DECIMALS) for end in self.interval],
            "how": self.how,
            "allowed": self.allowed,
            "is_loss": self.is_loss,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Change:
        """What `to_json` gave."""
        known = {name: value for name, value in values.items() if name != "is_loss"}
        return cls(**known | {"interval": tuple(known["interval"]) if known["interval"] else None})


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Whether a version becomes champion, and why."""

    verdict: Verdict
    text: str
    """One sentence with both numbers."""
    rules: Rules
    value: float
    champion_version: int | None = None
    champion_value: float | None = None
    changes: tuple[Change, ...] = ()

    @property
    def promotes(self) -> bool:
        """Whether the version gets the alias `champion`."""
        return self.verdict in PROMOTING

    def tags(self) -> dict[str, str]:
        """As the version keeps it."""
        numbers = {
            "value": round(self.value, DECIMALS) if math.isfinite(self.value) else None,
            "champion_version": self.champion_version,
            "champion_value": self.champion_value,
            "rules": self.rules.to_json(),
            "changes": [change.to_json() for change in self.changes],
        }
        return {"decision": self.verdict, "decision.text": self.text, "values.decision": json.dumps(numbers)}

    @classmethod
    def from_tags(cls, tags: Mapping[str, str]) -> Decision | None:
        """The decision that a version keeps; None if it keeps none."""
        if "values.decision" not in tags:
            return None
        numbers = json.loads(tags["values.decision"])
        rules, value = numbers.get("rules"), numbers.get("value")
        return cls(
            verdict=tags["decision"],  # type: ignore[arg-type]
            text=tags["decision.text"],
            rules=Rules(**rules) if rules else Rules(metric=""),
            value=math.nan if value is None else value,
            champion_version=numbers.get("champion_version"),
            champion_value=numbers.get("champion_value"),
            changes=tuple(Change.from_json(change) for change in numbers.get("changes", ())),
        )


def decide(
    version: int,
    evaluation: Measurement,
    champion: tuple[int, Measurement] | None,
    rules: Rules,
    paired: Intervals | None = None,
) -> Decision:
    """What becomes of a version.

    Args:
        version: its number.
        evaluation: what it was measured to do.
        champion: number and evaluation of the champion, if there is one.
        rules: what decides.
        paired: intervals of the differences to that champion, where both have their matches.
    """
    number, reigning = champion or (None, None)
    metric, value = rules.metric, evaluation.metrics[rules.metric]
    theirs = reigning.metrics.get(metric) if reigning else None
    about = Decision(
        verdict="is_champion",
        text=f"version {version} is the champion already.",
        rules=rules,
        value=value,
        champion_version=number,
        champion_value=theirs,
    )
    if number == version:
        return about
    if not is_measured(value):
        text = (
            f"version {version} stays challenger: {metric} is {value:g}, so nothing it can do was measured. Does "
            "data.val label that part, and did the training get anywhere?"
        )
        return replace(about, verdict="not_measured", text=text)
    if reigning is None:
        return replace(
            about, verdict="first", text=f"version {version} is the first champion, with {metric} {value:.4f}."
        )
    if difference := incomparable(evaluation, reigning, metric):
        text = (
            f"version {version} ({metric} {value:.4f}) was not compared with champion {number}: {difference} "
            f"It stays challenger; `cigpose models evaluate {number}` measures version {number} as this one was."
        )
        return replace(about, verdict="not_comparable", text=text)
    assert theirs is not None
    changes = tuple(compare(evaluation, reigning, rules, paired))
    return _weighed(version, replace(about, changes=changes))


def _weighed(version: int, about: Decision) -> Decision:
    """The decision between two that can be compared."""
    rules, theirs = about.rules, about.champion_value
    assert theirs is not None
    part = rules.metric.partition("/")[0]
    needed = f"{rules.metric} {about.value:.4f} against {theirs:.4f} of version {about.champion_version}"
    for change in about.changes:
        if rules.metric == f"{change.part}/AP" and change.of == "AP" and change.interval is not None:
            low, high = change.interval
            needed += f", difference {low:+.3f} to {high:+.3f} ({change.how})"
    needed += f", margin {rules.margin:g}"
    if is_measured(theirs) and not about.value > theirs + rules.margin:
        return replace(about, verdict="not_better", text=f"version {version} stays challenger: {needed}.")
    losses = [change.sentence() for change in about.changes if change.is_loss]
    if losses:
        text = f"version {version} stays challenger: better by {needed}, but it loses too much of {'; '.join(losses)}."
        return replace(about, verdict="loses", text=text)
    guarded = [change for change in about.changes if change.allowed is not None and change.part != part]
    kept = f"; no more than allowed is lost of {', '.join(sorted({c.part for c in guarded}))}" if guarded else ""
    return replace(about, verdict="better", text=f"version {version} is the new champion: {needed}{kept}.")


def compare(ours: Measurement, theirs: Measurement, rules: Rules, paired: Intervals | None = None) -> Iterator[Change]:
    """Every part that the champion was measured on, in the order of its figures; then robustness.

    A part that the challenger was not measured on is lost altogether.
    """
    parts = [name.removesuffix("/AP") for name in theirs.metrics if name.endswith("/AP")]
    for part in parts:
        before, after = theirs.metrics[f"{part}/AP"], ours.metrics.get(f"{part}/AP", 0.0)
        if not is_measured(before) or part not in {*rules.max_loss, *theirs.intervals, *ours.intervals}:
            continue
        after = after if is_measured(after) else 0.0
        estimates = _estimate(after, ours.intervals.get(part)), _estimate(before, theirs.intervals.get(part))
        interval, how = (paired[part], "paired") if paired and part in paired else difference_interval(*estimates)
        yield Change(
            part=part,
            of="AP",
            ours=after,
            theirs=before,
            interval=interval,
            how=how,
            allowed=rules.max_loss.get(part),
        )
    for part, estimate in theirs.robustness.items():
        if part in ours.robustness:
            interval, how = difference_interval(ours.robustness[part], estimate)
            yield Change(
                part=part,
                of="robustness",
                ours=ours.robustness[part][0],
                theirs=estimate[0],
                interval=interval,
                how=how,
                allowed=rules.max_robustness_loss,
            )


def _estimate(value: float, ends: tuple[float, float] | None) -> Estimate:
    return (value, *ends) if ends else (value, None, None)


def difference_interval(ours: Estimate, theirs: Estimate) -> tuple[tuple[float, float] | None, How]:
    """95 percent interval of `ours - theirs` from that of each, as of independent figures; None if one has none."""
    (value, low, high), (other, other_low, other_high) = ours, theirs
    if low is None or high is None or other_low is None or other_high is None:
        return None, "figures"
    down, up = math.hypot(value - low, other_high - other), math.hypot(high - value, other - other_low)
    return (value - other - down, value - other + up), "intervals"


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


def kept_back(decision: Decision, version: int, tag: str) -> Decision:
    """The decision about a better version that someone took the alias from."""
    text = (
        f"version {version} stays as it is: it was champion until someone moved the alias by hand. "
        f"`cigpose models promote {version}` makes it champion again; without its tag `{tag}` it competes again."
    )
    return replace(decision, verdict="rolled_back", text=text)
