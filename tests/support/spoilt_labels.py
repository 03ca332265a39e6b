"""Faults put into clean COCO-keypoints documents, and how many of them a check ranks first.

Written without the library's own repairs, so that a check is not asked what it was taught.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np

from cigpose.dataset.check import LabelCheck

Document = dict[str, Any]
LIMBS = (("elbow", "wrist"), ("knee", "ankle"), ("wrist",), ("ankle",), ("knee",), ("elbow",))
GEOMETRIC = ("swapped limb", "misplaced", "outside", "shifted", "duplicate", "visibility")
"""What the labels alone can show."""
OF_PICTURES = ("swapped person", "mirrored picture", "other picture")
"""What it takes a look at the picture to see."""
_APART = 0.15  # of the person's size: what is nearer than that is no fault to be seen when it is exchanged
_FAR = 0.35


class Spoiler:
    """Spoils people of a document, each in one way.

    Args:
        document: COCO keypoints; not changed.
        names: of the keypoints.
        seed: of everything random.
    """

    def __init__(self, document: Document, names: Sequence[str], seed: int) -> None:
        self.document = copy.deepcopy(document)
        self.names, self.random = list(names), np.random.default_rng(seed)
        self.pictures = {image["id"]: image for image in self.document["images"]}
        self.truth: dict[int, str] = {}
        self.mirrored: set[int] = set()
        people = [
            a for a in self.document["annotations"] if not a.get("iscrowd") and sum(v > 0 for v in _flags(a)) >= 8
        ]
        alone = {a["image_id"]: 0 for a in people}
        for person in self.document["annotations"]:
            if person["image_id"] in alone:
                alone[person["image_id"]] += 1
        self.alone = {image_id for image_id, count in alone.items() if count == 1}
        self.left = [people[i] for i in self.random.permutation(len(people))]

    def spoil(self, kind: str, count: int) -> None:
        """Put a kind of fault into so many people who have none yet."""
        how: Callable[[dict[str, Any], int], bool] = getattr(self, f"_{kind.replace(' ', '_')}")
        for number in range(count):
            for place, person in enumerate(self.left):
                if how(person, number):
                    del self.left[place]
                    self.truth[person["id"]] = kind
                    break
            else:
                raise AssertionError(f"{kind}: nobody left for number {number}")

    def _swapped_limb(self, person: dict[str, Any], number: int) -> bool:
        points, flags, size = _arrays(person)
        limb = LIMBS[number % len(LIMBS)]
        left, right = ([self.names.index(f"{side}_{joint}") for joint in limb] for side in ("left", "right"))
        apart = np.linalg.norm(points[left] - points[right], axis=1).mean()
        if not flags[left + right].all() or apart < _APART * size:
            return False
        _put(person, left + right, points[right + left], flags[right + left])
        return True

    def _swapped_person(self, person: dict[str, Any], number: int) -> bool:
        points, flags, size = _arrays(person)
        order = list(range(len(self.names)))
        for k, name in enumerate(self.names):
            for side, other in (("left_", "right_"), ("right_", "left_")):
                if name.startswith(side):
                    order[k] = self.names.index(other + name.removeprefix(side))
        both = flags.astype(bool) & flags[order].astype(bool)
        if np.linalg.norm(points - points[order], axis=1)[both].mean() < _APART * size:
            return False
        _put(person, list(range(len(order))), points[order], flags[order])
        return True

    def _misplaced(self, person: dict[str, Any], number: int) -> bool:
        points, flags, size = _arrays(person)
        k = int(self.random.choice(np.flatnonzero(flags)))
        seen = points[flags > 0]
        for _ in range(50):
            place = self.random.uniform(seen.min(axis=0), seen.max(axis=0))
            if np.linalg.norm(place - points[k]) > _FAR * size:
                _put(person, [k], place[None], flags[[k]])
                return True
        return False

    def _outside(self, person: dict[str, Any], number: int) -> bool:
        points, flags, size = _arrays(person)
        k = int(self.random.choice(np.flatnonzero(flags)))
        x, y, w, h = person["bbox"]
        away = self.random.uniform(0.1, 0.6) * size
        place = points[k].copy()
        place[number % 2] = (x, y)[number % 2] - away if number % 4 < 2 else (x + w, y + h)[number % 2] + away
        _put(person, [k], place[None], flags[[k]])
        return True

    def _shifted(self, person: dict[str, Any], number: int) -> bool:
        points, flags, _ = _arrays(person)
        step = 1 if number % 2 else -1
        _put(person, list(range(len(flags))), np.roll(points, step, axis=0), np.roll(flags, step))
        return True

    def _duplicate(self, person: dict[str, Any], number: int) -> bool:
        points, flags, size = _arrays(person)
        twin = copy.deepcopy(person)
        twin["id"] = 10_000_000 + person["id"]
        jitter = self.random.normal(0, 0.012 * size, points.shape)
        _put(twin, list(range(len(flags))), (points + jitter) * (flags > 0)[:, None], flags)
        self.document["annotations"].append(twin)
        return True

    def _visibility(self, person: dict[str, Any], number: int) -> bool:
        points, flags, _ = _arrays(person)
        k = int(self.random.choice(np.flatnonzero(flags)))
        if number % 3 == 0:
            _put(person, [k], points[[k]], np.array([0]))
            person["num_keypoints"] = int((flags > 0).sum()) - 1
        elif number % 3 == 1:
            _put(person, [k], np.zeros((1, 2)), np.array([2]))
        else:
            person["num_keypoints"] = int((flags > 0).sum()) + 2
        return True

    def _mirrored_picture(self, person: dict[str, Any], number: int) -> bool:
        """The picture is turned over, the labels are not: `read` gives it so."""
        if person["image_id"] not in self.alone:
            return False
        self.mirrored.add(person["image_id"])
        return True

    def _other_picture(self, person: dict[str, Any], number: int) -> bool:
        """Box and keypoints of the person in the next picture of the list."""
        ids = [image["id"] for image in self.document["images"]]
        following = ids[(ids.index(person["image_id"]) + 1) % len(ids)]
        donor = next((a for a in self.left if a["image_id"] == following and following in self.alone), None)
        if donor is None or person["image_id"] not in self.alone:
            return False
        noise = self.random.normal(0, 0.5, (len(self.names), 2))  # labelled again, not copied
        points, flags, _ = _arrays(donor)
        _put(person, list(range(len(flags))), (points + noise) * (flags > 0)[:, None], flags)
        person["bbox"] = list(donor["bbox"])
        person["num_keypoints"] = donor.get("num_keypoints", int((flags > 0).sum()))
        return True

    def picture(self, image_id: int, jpeg: bytes) -> bytes:
        """The bytes of a picture, turned over where that is the fault."""
        if image_id not in self.mirrored:
            return jpeg
        image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
        return cv2.imencode(".jpg", image[:, ::-1])[1].tobytes()


def found_first(check: LabelCheck, truth: dict[int, str]) -> dict[str, float]:
    """Kind -> share of the spoilt people among the N most suspicious, N the number of all the spoilt; `all` of all."""
    first = []
    for suspect in check.suspects:
        person = None if suspect.annotation_id is None else suspect.annotation_id % 10_000_000
        if person is not None and person not in first:
            first.append(person)
        if len(first) == len(truth):
            break
    kinds = {kind: [person for person in truth if truth[person] == kind] for kind in truth.values()}
    shares = {kind: float(np.isin(people, first).mean()) for kind, people in kinds.items()}
    return {**shares, "all": float(np.isin(list(truth), first).mean())}


def _flags(person: dict[str, Any]) -> list[float]:
    return list(person["keypoints"][2::3])


def _arrays(person: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, float]:
    """Points (K, 2), flags (K,) and the diagonal of the labelled ones' extent."""
    table = np.array(person["keypoints"], dtype=np.float64).reshape(-1, 3)
    seen = table[table[:, 2] > 0, :2]
    return table[:, :2].copy(), table[:, 2].copy(), float(np.hypot(*np.ptp(seen, axis=0)))


def _put(person: dict[str, Any], members: list[int], points: np.ndarray, flags: np.ndarray) -> None:
    table = np.array(person["keypoints"], dtype=np.float64).reshape(-1, 3)
    table[members] = np.concatenate([points.round(2), np.asarray(flags)[:, None]], axis=1)
    person["keypoints"] = table.ravel().tolist()
