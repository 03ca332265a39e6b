"""Faults that need no judgement of poses: outside, twice, flags that contradict, lengths that cannot be.

What most of a set does is its custom, not its fault: it is said once, as a note. N people, K keypoints, E limbs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse.csgraph import minimum_spanning_tree

from cigpose.dataset.check_labels import LabelledPeople
from cigpose.dataset.faults import SHOWN, Finding
from cigpose.keypoints import Edge

CUSTOM = 0.2
"""Share of those concerned from which on something is the custom of a set."""
_TWIN_DISTANCE = 0.06  # of two labellings of a person, by its size
_LEAST_IN_COMMON = 3
_TWIN_BOXES = 0.9
_ROUNDS = 6
_LEAST_OF_A_LIMB = 30
_SAMPLE = 2000
_LONG = 4.5  # spreads of the upper half beyond the middle at which a limb is as likely wrong as not


@dataclass(frozen=True, kw_only=True)
class Ruled:
    """What the rules found."""

    findings: list[Finding]
    notes: list[str]
    """Of the whole set."""


def check_rules(people: LabelledPeople) -> Ruled:
    """All of this module."""
    notes: list[str] = []
    findings = [
        *_outside(people, notes),
        *_bad_boxes(people),
        *_contradicting_flags(people, notes),
        *_same_places(people, notes),
        *_twins(people),
        *_repeated_ids(people),
        *_copies(people),
        *_long_limbs(people),
    ]
    return Ruled(findings=findings, notes=notes)


def person_sizes(people: LabelledPeople) -> np.ndarray:
    """(N,) float64: diagonal of the extent of the labelled keypoints, or of the box if that is larger; at least 1."""
    low, high = extents(people.keypoints)
    extent = np.hypot(*(high - low).T)
    box = np.nan_to_num(np.hypot(*np.maximum(people.bbox_xywh[:, 2:], 0).T))
    return np.maximum(np.where(np.isfinite(extent), np.maximum(extent, 0.5 * box), box), 1.0)


def extents(keypoints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, 2) smallest and (N, 2) largest x, y of the labelled keypoints; NaN where there are none."""
    points = np.where(keypoints[..., 2:] > 0, keypoints[..., :2], np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmin(points, axis=1), np.nanmax(points, axis=1)


def _of(people: LabelledPeople, row: int) -> dict[str, Any]:
    return {
        "annotation_id": int(people.annotation_id[row]),
        "image_id": people.pictures[int(people.picture[row])].image_id,
    }


def _names(people: LabelledPeople, members: np.ndarray) -> tuple[str, ...]:
    return tuple(people.keypoint_set.names[k] for k in np.flatnonzero(members))


def _listed(names: tuple[str, ...]) -> str:
    words = [name.replace("_", " ") for name in names]
    return ", ".join(words) if len(words) < 6 else f"{', '.join(words[:4])} and {len(words) - 4} more"


def _outside(people: LabelledPeople, notes: list[str]) -> Iterator[Finding]:
    """Keypoints beyond the picture's edges, and beyond the box's."""
    size, labelled, points = person_sizes(people), people.labelled, people.keypoints[..., :2]
    limits = people.image_sizes
    over = np.maximum(-points, points - limits[:, None]).max(axis=2)
    over = np.where(labelled & np.isfinite(over) & (over > 1), over, 0) / size[:, None]
    yield from _beyond(people, over, 0.01, "outside picture", "the picture", notes)
    first, extent = people.bbox_xywh[:, None, :2], people.bbox_xywh[:, None, 2:]
    with np.errstate(invalid="ignore"):
        past = np.maximum(first - points, points - first - extent).max(axis=2)
        past = np.where(labelled & (extent > 0).all(axis=2) & (past > 1) & (over == 0), past, 0) / size[:, None]
    yield from _beyond(people, past, 0.05, "outside box", "the box", notes)


def _beyond(
    people: LabelledPeople, over: np.ndarray, half: float, kind: str, what: str, notes: list[str]
) -> Iterator[Finding]:
    """By how much, as a share of the person's size; at `half` it is as likely wrong as not."""
    worst = over.max(axis=1, initial=0)
    concerned = people.labelled.any(axis=1)
    share = float((worst[concerned] > 0).mean()) if concerned.any() else 0.0
    if share >= CUSTOM:  # the set does so: what it does usually is half as suspicious as it would be
        half = max(half, 2 * float(np.median(worst[worst > 0])))
        notes.append(f"{share:.0%} of the people have labels outside {what}; only those far outside are counted.")
    for row in np.flatnonzero(worst > 0).tolist():
        suspicion = worst[row] / (worst[row] + half)
        if suspicion >= SHOWN:
            names = _names(people, over[row] > 0)
            text = f"{_listed(names)}: up to {worst[row]:.0%} of the person's size outside {what}"
            yield Finding(kind=kind, suspicion=float(suspicion), text=text, keypoints=names, **_of(people, row))


def _bad_boxes(people: LabelledPeople) -> Iterator[Finding]:
    box, limits = people.bbox_xywh, people.image_sizes
    empty = np.any(box[:, 2:] <= 0, axis=1)
    with np.errstate(invalid="ignore"):
        away = np.any((box[:, :2] >= limits) | (box[:, :2] + box[:, 2:] <= 0), axis=1) & ~empty
    for row in np.flatnonzero(empty | away).tolist():
        where = "has no area" if empty[row] else "lies outside the picture"
        text = f"the box {[round(value, 1) for value in box[row].tolist()]} {where}"
        yield Finding(kind="box", suspicion=0.98, text=text, **_of(people, row))


def _contradicting_flags(people: LabelledPeople, notes: list[str]) -> Iterator[Finding]:
    """Coordinates without a label, labels without coordinates, flags that do not exist, counts that do not fit."""
    v, placed = people.keypoints[..., 2], (people.keypoints[..., :2] != 0).any(axis=2)
    labelled = v > 0
    body = list(range(next(iter(people.keypoint_set.annotation_fields.values()))))
    counts = labelled[:, body].sum(axis=1), (v[:, body] == 2).sum(axis=1)  # COCO's custom, CrowdPose's
    stated = people.stated >= 0
    wrong = min((stated & (people.stated != count) for count in counts), key=lambda rows: int(rows.sum()))
    cases = (
        ((v == 0) & placed, v == 0, "coordinates, but v = 0, which is not labelled"),
        (labelled & ~placed, labelled, "labelled at 0, 0"),
        (~np.isin(v, (0, 1, 2)), np.ones_like(labelled), "another v than 0, 1 or 2"),
        (wrong[:, None], stated[:, None], "num_keypoints"),
    )
    for found, concerned, text in cases:
        share = found.sum() / max(int((concerned & np.ones_like(found)).sum()), 1)
        subject = f"{share:.0%} of the people have another num_keypoints than labels"
        if share >= CUSTOM:
            others = f"{share:.0%} of the keypoints concerned: {text}"
            notes.append(f"{subject if text == 'num_keypoints' else others}: the custom of this set, not counted.")
            continue
        for row in np.flatnonzero(found.any(axis=1)).tolist():
            if text == "num_keypoints":
                names: tuple[str, ...] = ()
                said = f"num_keypoints is {people.stated[row]}, {counts[0][row]} are labelled"
            else:
                names = _names(people, found[row])
                said = f"{_listed(names)}: {text}"
            yield Finding(kind="visibility", suspicion=0.97, text=said, keypoints=names, **_of(people, row))


def _same_places(people: LabelledPeople, notes: list[str]) -> Iterator[Finding]:
    """Two labelled keypoints at the very same coordinates."""
    labelled = people.labelled
    place = np.where(labelled, people.keypoints[..., 0] + 1j * people.keypoints[..., 1], np.nan)
    order = np.argsort(place, axis=1, kind="stable")
    ordered = np.take_along_axis(place, order, axis=1)
    equal = ordered[:, 1:] == ordered[:, :-1]
    rows = np.flatnonzero(equal.any(axis=1))
    share = len(rows) / max(int((labelled.sum(axis=1) > 1).sum()), 1)
    if share >= CUSTOM:
        notes.append(f"{share:.0%} of the people have keypoints at the very same place: not counted.")
        return
    for row in rows.tolist():
        twins = np.zeros(labelled.shape[1], bool)
        twins[order[row, 1:][equal[row]]] = twins[order[row, :-1][equal[row]]] = True
        names = _names(people, twins)
        text = f"{_listed(names)} have the very same coordinates"
        yield Finding(kind="same place", suspicion=0.9, text=text, keypoints=names, **_of(people, row))


def _twins(people: LabelledPeople) -> Iterator[Finding]:
    """Two annotations of one picture that lie on each other."""
    order = np.argsort(people.picture, kind="stable")
    picture, size = people.picture[order], person_sizes(people)[order]
    points, labelled, box = people.keypoints[order, :, :2], people.labelled[order], people.bbox_xywh[order]
    for lag in range(1, len(order)):
        first = np.flatnonzero(picture[lag:] == picture[:-lag])
        if not len(first):
            break
        second = first + lag
        both = labelled[first] & labelled[second]
        count = both.sum(axis=1)
        apart = np.hypot(*np.moveaxis(points[first] - points[second], 2, 0))
        apart = np.where(both, apart, 0).sum(axis=1) / np.maximum(count, 1) / np.minimum(size[first], size[second])
        bare = (labelled[first].sum(axis=1) == 0) | (labelled[second].sum(axis=1) == 0)
        alike = np.where(bare, overlap(box[first], box[second]), 0)
        by_points = np.where(count >= _LEAST_IN_COMMON, 1 / (1 + (apart / _TWIN_DISTANCE) ** 4), 0)
        suspicion = np.where(alike >= _TWIN_BOXES, 0.7, by_points)
        for i in np.flatnonzero(suspicion >= SHOWN).tolist():
            a, b = int(order[first[i]]), int(order[second[i]])
            says = "overlapping boxes" if alike[i] >= _TWIN_BOXES else f"on average {apart[i]:.1%} of its size apart"
            other = int(people.annotation_id[a])
            text = f"the same person as annotation {other}: {says}"
            certain = min(float(suspicion[i]), 0.99)
            yield Finding(kind="duplicate person", suspicion=certain, text=text, other=other, **_of(people, b))


def overlap(first_xywh: np.ndarray, second_xywh: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes (..., 4) that are paired by broadcasting; 0 where one is no box."""
    low = np.maximum(first_xywh[..., :2], second_xywh[..., :2])
    high = np.minimum(first_xywh[..., :2] + first_xywh[..., 2:], second_xywh[..., :2] + second_xywh[..., 2:])
    shared = np.maximum(high - low, 0).prod(axis=-1)
    union = first_xywh[..., 2:].prod(axis=-1) + second_xywh[..., 2:].prod(axis=-1) - shared
    return np.asarray(np.nan_to_num(np.where(union > 0, shared / np.maximum(union, 1e-9), 0)))


def _repeated_ids(people: LabelledPeople) -> Iterator[Finding]:
    _, first, counts = np.unique(people.annotation_id, return_index=True, return_counts=True)
    for row, count in zip(first[counts > 1].tolist(), counts[counts > 1].tolist(), strict=True):
        text = f"{count} annotations have this id"
        yield Finding(kind="unreadable", suspicion=0.99, text=text, **_of(people, row))


def _copies(people: LabelledPeople) -> Iterator[Finding]:
    """Exactly the same coordinates in different pictures."""
    rows = np.flatnonzero(people.labelled.sum(axis=1) >= min(5, len(people.keypoint_set)))
    content = np.ascontiguousarray(people.keypoints[rows].reshape(len(rows), -1))
    same = content.view(np.dtype((np.void, content.shape[1] * content.itemsize))).ravel() if len(rows) else content
    _, first, group = np.unique(same, return_index=True, return_inverse=True)
    for place, row in enumerate(rows.tolist()):
        original = int(rows[first[group[place]]])
        if people.picture[row] != people.picture[original]:
            other = _of(people, original)
            text = f"the very coordinates of annotation {other['annotation_id']} in picture {other['image_id']}"
            about = _of(people, row) | {"other": other["annotation_id"]}
            yield Finding(kind="copied labels", suspicion=0.96, text=text, **about)


def find_limbs(people: LabelledPeople) -> tuple[Edge, ...]:
    """The lines of the set; where it has none, those that join what keeps its distance best (a spanning tree)."""
    if people.keypoint_set.lines:
        return people.keypoint_set.lines
    rows = np.flatnonzero(people.labelled.sum(axis=1) >= 2)[:_SAMPLE]
    points = np.where(people.labelled[rows, :, None], people.keypoints[rows, :, :2], np.nan)
    apart = np.linalg.norm(points[:, :, None] - points[:, None], axis=3) / person_sizes(people)[rows, None, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        middle = np.nanquantile(apart, 0.9, axis=0)
    cost = np.nan_to_num(middle, nan=10.0) + 1e-6
    np.fill_diagonal(cost, 0)
    tree = minimum_spanning_tree(cost).tocoo()
    return tuple(sorted((int(a), int(b)) for a, b in zip(tree.row, tree.col, strict=True)))


def _long_limbs(people: LabelledPeople) -> Iterator[Finding]:
    """Limbs that are too long for the person, by the lengths of all its limbs and of everybody's.

    Log lengths are a person's size plus a limb's own (median polish). A limb is often foreshortened, hence short, but
    hardly ever too long: the upper half of the rest is judged by its own spread.
    """
    limbs = np.array(find_limbs(people), dtype=np.int64).reshape(-1, 2)
    both = people.labelled[:, limbs[:, 0]] & people.labelled[:, limbs[:, 1]]
    length = np.linalg.norm(people.keypoints[:, limbs[:, 0], :2] - people.keypoints[:, limbs[:, 1], :2], axis=2)
    rest = np.log(np.where(both & (length > 0), length, np.nan))
    enough = (np.isfinite(rest).sum(axis=0) >= _LEAST_OF_A_LIMB) if len(limbs) else np.zeros(0, bool)
    rest, limbs = rest[:, enough], limbs[enough]
    several = np.isfinite(rest).sum(axis=1) >= 4
    if not len(limbs) or not several.any():
        return
    rows, rest = np.flatnonzero(several), rest[several]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for _ in range(_ROUNDS):
            rest = rest - np.nanmedian(rest, axis=0)
            rest = rest - np.nanmedian(rest, axis=1, keepdims=True)
        middle, upper = np.nanquantile(rest, [0.5, 0.9], axis=0)
    spread = np.maximum((upper - middle) / 1.2816, 0.02)
    far = np.nan_to_num((rest - middle) / spread, nan=-np.inf)
    suspicion = 1 / (1 + np.exp(-2 * np.clip(far - _LONG, -30, 30)))
    for i in np.flatnonzero(suspicion.max(axis=1) >= SHOWN).tolist():
        limb = int(suspicion[i].argmax())
        a, b = (people.keypoint_set.names[k] for k in limbs[limb].tolist())
        times = float(np.exp(rest[i, limb] - middle[limb]))
        text = f"{_listed((a,))} to {_listed((b,))} is {times:.1f} times as long as this person's other limbs allow"
        about = _of(people, int(rows[i]))
        yield Finding(
            kind="limb length", suspicion=min(float(suspicion[i, limb]), 0.98), text=text, keypoints=(a, b), **about
        )
