"""What is wrong with the labels of a data set, most suspicious first.

Rules say what contradicts itself (`check_rules`), the other people of the set what is implausible (`plausibility`), a
model, if there is one, what it sees elsewhere (`residuals`). N people, K keypoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from cigpose.dataset.check_labels import LabelledPeople
from cigpose.dataset.check_rules import check_rules, person_sizes
from cigpose.dataset.faults import COUNTED, KINDS, SHOWN, Finding, probability
from cigpose.dataset.plausibility import LEAST_PEOPLE, judge_poses
from cigpose.dataset.repairs import SHIFTED, SWAPPED_LIMB, SWAPPED_PERSON, Repair, all_repairs
from cigpose.dataset.residuals import Residuals

PRIOR = 0.01
"""How often a kind of fault is taken to happen, before anything is seen of a person."""
_SECOND_LOOK = 1.0  # log ratio of the whole person being elsewhere from which other pictures are tried
_MOST_SECOND_LOOKS = 0.2  # share of the people
_LIMIT = 0.99


class Predict(Protocol):
    """A model's poses of people in given boxes of given pictures."""

    def __call__(
        self, people: LabelledPeople, rows: np.ndarray, pictures: np.ndarray, *, mirrored: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Look for the people `rows` (M,) of the labels in `pictures` (M,), rows of their own list.

        Returns: points (M, K, 2) in pixels of the picture that was looked at, NaN where there is none, and scores
            (M, K).
        """


@dataclass(frozen=True, kw_only=True, eq=False)
class Suspect:
    """A person, or a picture, and all that is suspicious about it."""

    annotation_id: int | None
    image_id: int | None
    suspicion: float
    """That anything is wrong, taking the findings for independent."""
    findings: tuple[Finding, ...]
    """Most suspicious first."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelCheck:
    """The outcome."""

    people: LabelledPeople
    suspects: list[Suspect]
    """Most suspicious first."""
    notes: list[str]
    """Of the whole set."""
    predicted: np.ndarray | None = field(default=None)
    """(N, K, 2) points of the model, if there is one."""

    def counts(self) -> dict[str, int]:
        """Kind -> findings that count, of the kinds that there are."""
        counts = dict.fromkeys(KINDS, 0)
        for suspect in self.suspects:
            for finding in suspect.findings:
                counts[finding.kind] += finding.suspicion >= COUNTED
        return {kind: count for kind, count in counts.items() if count}

    def num_suspicious(self) -> int:
        """Suspects that count."""
        return sum(suspect.suspicion >= COUNTED for suspect in self.suspects)


def check_labels(
    people: LabelledPeople, *, findings: Iterable[Finding] = (), predict: Predict | None = None, seed: int = 0
) -> LabelCheck:
    """Check and rank.

    Args:
        people: the labels.
        findings: what was found of the pictures.
        predict: a model.
        seed: of what is learnt of the set.
    """
    ruled = check_rules(people)
    notes = list(ruled.notes)
    repairs = all_repairs(people.keypoint_set)
    evidence = judge_poses(people.keypoints, people.keypoint_set, repairs, seed)
    due, without = evidence.repairs, evidence.without
    if not np.isfinite(due).any():
        notes.append(f"fewer than {LEAST_PEOPLE} people are labelled: poses were not compared with each other.")
    whole = np.full(len(people), -np.inf)
    more: list[Finding] = []
    predicted = None
    if predict is not None:
        predicted, scores = predict(people, np.arange(len(people)), people.picture)
        residuals = Residuals.measure(people.keypoints, person_sizes(people), predicted, scores)
        labelled = people.labelled
        changes = np.stack([labelled[:, list(repair.keypoints)].any(axis=1) for repair in repairs], axis=1)
        due = np.where(changes, np.where(np.isfinite(due), due, 0) + residuals.repairs(repairs), -np.inf)
        without = np.where(labelled, np.where(np.isfinite(without), without, 0) + residuals.without(), -np.inf)
        whole = np.minimum(residuals.whole(), -np.log(residuals.missed))  # it misses some people altogether
        more += _second_look(people, residuals, predict, due)
        notes += _custom_of_sides(people, residuals, repairs)
    elsewhere = {finding.annotation_id for finding in more}
    judged = [
        finding for finding in _judged(people, repairs, due, without, whole) if finding.annotation_id not in elsewhere
    ]
    bad = [
        Finding(kind="unreadable", suspicion=_LIMIT, text=entry["text"], **_ids(entry)) for entry in people.unreadable
    ]
    suspects = _ranked([*ruled.findings, *judged, *more, *bad, *findings])
    return LabelCheck(people=people, suspects=suspects, notes=notes, predicted=predicted)


def _ids(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"annotation_id": entry["annotation_id"], "image_id": entry["image_id"]}


def _judged(
    people: LabelledPeople, repairs: list[Repair], due: np.ndarray, without: np.ndarray, whole: np.ndarray
) -> list[Finding]:
    """Of every person the one thing that most likely happened, if anything did."""
    columns = [due, without, whole[:, None]]
    everything = np.concatenate([column for column in columns if column.shape[1]], axis=1)
    best = everything.argmax(axis=1)
    suspicion = np.minimum(probability(everything.max(axis=1), PRIOR), _LIMIT)
    names, found = people.keypoint_set.names, []
    for row in np.flatnonzero(suspicion >= SHOWN).tolist():
        choice = int(best[row])
        if choice < len(repairs):
            repair = repairs[choice]
            kind, members = repair.kind, [k for k in repair.keypoints if people.keypoints[row, k, 2] > 0]
            text = _explained(repair, people)
        elif choice < everything.shape[1] - 1:
            at = choice - len(repairs)
            likely = np.flatnonzero(probability(without[row], PRIOR) >= COUNTED).tolist()
            members = [at, *(k for k in likely if k != at)]
            kind = "misplaced"
            text = f"{', '.join(names[k].replace('_', ' ') for k in members)}: more plausible elsewhere"
        else:
            kind, members, text = "disagreement", [], "the model sees this person elsewhere, or in another pose"
        found.append(
            Finding(
                kind=kind,
                suspicion=float(suspicion[row]),
                text=text,
                annotation_id=int(people.annotation_id[row]),
                image_id=people.pictures[int(people.picture[row])].image_id,
                keypoints=() if len(members) == len(names) else tuple(names[k] for k in members),
            )
        )
    return found


def _explained(repair: Repair, people: LabelledPeople) -> str:
    if repair.kind == SWAPPED_PERSON:
        return "left and right are more plausible the other way round, all of them"
    if repair.kind == SHIFTED:
        step = "next" if repair.order[1] == 0 else "previous"
        return f"labels are more plausible if each is given to the {step} keypoint of the list"
    assert repair.kind == SWAPPED_LIMB
    names = people.keypoint_set.names
    pairs = [f"{names[a]} and {names[b]}" for a, b in people.keypoint_set.flip_pairs if a in repair.keypoints]
    return f"more plausible exchanged: {'; '.join(pairs)}".replace("_", " ")


def _second_look(people: LabelledPeople, residuals: Residuals, predict: Predict, due: np.ndarray) -> list[Finding]:
    """Whoever is not where the labels say: in the mirrored picture, or in the one before or after?"""
    doubt = residuals.whole() - np.maximum(due.max(axis=1, initial=0), 0)  # which no exchange explains
    rows = np.flatnonzero(doubt > _SECOND_LOOK)
    rows = rows[np.argsort(-doubt[rows], kind="stable")][: max(20, int(_MOST_SECOND_LOOKS * len(people)))]
    best: dict[int, tuple[float, Finding]] = {}
    for kind, step in (("mirrored picture", 0), ("other picture", 1), ("other picture", -1)):
        pictures = people.picture[rows] + step
        inside = (pictures >= 0) & (pictures < len(people.pictures))
        some, pictures = rows[inside], pictures[inside]
        points, _ = predict(people, some, pictures, mirrored=step == 0)
        ratios = residuals.instead(some, points)
        better = ratios > due[some].max(axis=1, initial=-np.inf)  # than an exchange in the picture as it is
        for row, picture, ratio in zip(*(column[better].tolist() for column in (some, pictures, ratios)), strict=True):
            suspicion = min(float(probability(ratio, PRIOR)), _LIMIT)
            if suspicion < COUNTED or (row in best and best[row][0] >= ratio):
                continue
            entry = people.pictures[picture]
            text = "the model finds the labelled pose in the mirrored picture"
            if step:
                text = f"the model finds the labelled pose in {entry.file_name} (picture {entry.image_id})"
            finding = Finding(
                kind=kind,
                suspicion=suspicion,
                text=text,
                annotation_id=int(people.annotation_id[row]),
                image_id=people.pictures[int(people.picture[row])].image_id,
                other=entry.image_id if step else None,
            )
            best[row] = ratio, finding
    return [finding for _, finding in best.values()]


def _custom_of_sides(people: LabelledPeople, residuals: Residuals, repairs: list[Repair]) -> list[str]:
    """Whether the model has left and right the other way round in most of the set."""
    whole = [repair for repair in repairs if repair.kind == SWAPPED_PERSON]
    if not whole:
        return []
    pairs = list(whole[0].keypoints)
    apart = [
        np.linalg.norm(residuals.points - people.keypoints[:, order, :2], axis=2)[:, pairs]
        for order in (np.arange(len(people.keypoint_set)), whole[0].order)
    ]
    known = people.labelled[:, pairs] & np.isfinite(apart[0] + apart[1])
    if known.sum() < LEAST_PEOPLE or (apart[1] < apart[0])[known].mean() < 0.6:
        return []
    return [
        "the model has left and right the other way round in most of the set: are they the person's here, and there?"
    ]


def _ranked(findings: list[Finding]) -> list[Suspect]:
    grouped: dict[tuple[int | None, int | None, int], list[Finding]] = {}
    for number, finding in enumerate(findings):
        alone = number if finding.annotation_id is None else -1  # pictures' and boxes' findings each stand alone
        grouped.setdefault((finding.annotation_id, finding.image_id, alone), []).append(finding)
    suspects = [
        Suspect(
            annotation_id=annotation_id,
            image_id=image_id,
            suspicion=float(1 - np.prod([1 - finding.suspicion for finding in some])),
            findings=tuple(sorted(some, key=lambda finding: -finding.suspicion)),
        )
        for (annotation_id, image_id, _), some in grouped.items()
    ]
    return sorted(suspects, key=lambda suspect: (-suspect.suspicion, suspect.annotation_id or 0, suspect.image_id or 0))
