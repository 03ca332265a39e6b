"""Keypoint sets: names, parts, flip pairs, OKS sigmas, skeleton edges and semantic groups.

Names, order, flip pairs and sigmas are those of COCO, COCO-WholeBody v1.0 and CrowdPose; edges and groups are the
graphs of CIGPose's HGNN (arXiv 2603.09418). Left and right are the person's. Indices start at 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

Edge = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class KeypointSet:
    """What a dataset calls its K keypoints, and how they belong together."""

    name: str
    names: tuple[str, ...]
    """K names, unique, in the order of the coordinates."""
    flip_pairs: tuple[Edge, ...]
    """Left-right pairs; a keypoint in no pair maps to itself under a mirror."""
    sigmas: tuple[float, ...]
    """K OKS sigmas, as COCO defines them."""
    parts: Mapping[str, tuple[int, ...]]
    """Evaluation part -> keypoints. The first is the body, the one whose labels decide whether a person counts."""
    annotation_fields: Mapping[str, int]
    """Annotation field -> number of keypoints; concatenated in this order they give the K keypoints."""
    upper_body: tuple[int, ...]
    lower_body: tuple[int, ...]
    """Keypoints of the half-body augmentation."""
    edges: tuple[Edge, ...]
    """Undirected edges of the HGNN."""
    groups: tuple[tuple[int, ...], ...]
    """Semantic groups of the HGNN's attention; a keypoint may be in several or none."""
    skeleton: tuple[Edge, ...] = field(default=())
    """Lines to draw; the HGNN's edges where a set has none of its own."""
    sigmas_origin: str = "given in params.yaml"
    """Where the sigmas come from, as it stands beside each AP."""

    def __post_init__(self) -> None:
        """Refuse a table whose columns do not fit each other."""
        num = len(self.names)
        where = f"keypoint set {self.name!r}"
        if num == 0 or len(set(self.names)) != num:
            raise ValueError(f"{where}: names must be non-empty and unique, got {list(self.names)}.")
        if len(self.sigmas) != num or not all(0 < sigma < np.inf for sigma in self.sigmas):
            raise ValueError(f"{where}: expected {num} positive sigmas, got {len(self.sigmas)}: {list(self.sigmas)}.")
        if sum(self.annotation_fields.values()) != num:
            raise ValueError(
                f"{where}: annotation_fields hold {sum(self.annotation_fields.values())} keypoints, names {num}."
            )
        used = {
            "flip_pairs": [i for pair in self.flip_pairs for i in pair],
            "edges": [i for edge in self.edges for i in edge],
            "groups": [i for group in self.groups for i in group],
            "parts": [i for part in self.parts.values() for i in part],
            "upper_body": self.upper_body,
            "lower_body": self.lower_body,
            "skeleton": [i for edge in self.skeleton for i in edge],
        }
        for column, indices in used.items():
            if bad := sorted({i for i in indices if not 0 <= i < num}):
                raise ValueError(f"{where}: {column} names keypoints {bad}, but there are only 0 to {num - 1}.")
        if len(set(used["flip_pairs"])) != len(used["flip_pairs"]):
            raise ValueError(f"{where}: a keypoint stands in two flip_pairs: {list(self.flip_pairs)}.")
        if any(a == b for a, b in self.edges):
            raise ValueError(f"{where}: edges must join two different keypoints.")
        if len({frozenset(edge) for edge in self.edges}) != len(self.edges):
            raise ValueError(f"{where}: an edge is listed twice; edges are undirected.")
        if not self.parts:
            raise ValueError(f"{where}: parts must name at least one part, the body.")

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def flip_index(self) -> np.ndarray:
        """(K,) int64: keypoint i of the mirrored person is keypoint flip_index[i] of the original."""
        index = np.arange(len(self))
        for a, b in self.flip_pairs:
            index[a], index[b] = b, a
        return index

    @property
    def lines(self) -> tuple[Edge, ...]:
        """The lines to draw."""
        return self.skeleton or self.edges

    @classmethod
    def from_mapping(cls, table: Mapping[str, Any]) -> KeypointSet:
        """A user's own set, as written under `keypoints` in params.yaml.

        Args:
            table: `name`, `names`, `sigmas` and, by choice, `sigmas_origin` (a line of text), `flip_pairs`, `edges`
                (pairs of names), `groups`, `parts`, `upper_body`, `lower_body` (lists of names). Without `groups` all
                keypoints are one group; without `edges` consecutive keypoints are joined; without `parts` all are
                `body`.

        Raises:
            ValueError: a key or a name that does not exist, or columns that do not fit each other.
        """
        known = {field for field in cls.__dataclass_fields__ if field not in ("annotation_fields", "skeleton")}
        if missing := {"name", "names", "sigmas"} - set(table):
            raise ValueError(f"keypoints: {sorted(missing)} missing. A set of your own needs name, names and sigmas.")
        if unknown := set(table) - known:
            raise ValueError(f"keypoints: unknown keys {sorted(unknown)}, expected some of {sorted(known)}.")
        names = tuple(str(name) for name in table["names"])
        position = {name: i for i, name in enumerate(names)}
        if len(position) != len(names):
            raise ValueError(f"keypoints.names: every name must be unique, got {list(names)}.")

        def indices(column: str, members: Iterable[str]) -> tuple[int, ...]:
            try:
                return tuple(position[member] for member in members)
            except KeyError as err:
                raise ValueError(f"keypoints.{column}: {err.args[0]!r} is not one of the names {list(names)}.") from err

        def pairs(column: str, default: list[Any]) -> tuple[Edge, ...]:
            rows = [indices(column, row) for row in table.get(column, default)]
            if any(len(row) != 2 for row in rows):
                raise ValueError(f"keypoints.{column}: every entry must be a pair of names.")
            return tuple((row[0], row[1]) for row in rows)

        everyone = list(names)
        return cls(
            name=str(table["name"]),
            names=names,
            sigmas=tuple(float(sigma) for sigma in table["sigmas"]),
            flip_pairs=pairs("flip_pairs", []),
            edges=pairs("edges", [list(pair) for pair in itertools.pairwise(names)]),
            groups=tuple(indices("groups", group) for group in table.get("groups", [everyone])),
            parts={part: indices("parts", members) for part, members in table.get("parts", {"body": everyone}).items()},
            annotation_fields={"keypoints": len(names)},
            upper_body=indices("upper_body", table.get("upper_body", [])),
            lower_body=indices("lower_body", table.get("lower_body", [])),
            sigmas_origin=str(table.get("sigmas_origin", cls.sigmas_origin)),
        )


def parts_with_whole(keypoint_set: KeypointSet) -> dict[str, tuple[int, ...]]:
    """Part -> keypoints; `whole`, all of them, is added where there are several parts."""
    parts = dict(keypoint_set.parts)
    return parts | ({"whole": tuple(range(len(keypoint_set)))} if len(parts) > 1 else {})


def _path(*points: int) -> tuple[Edge, ...]:
    """Edges along a path of keypoints."""
    return tuple(itertools.pairwise(points))


def _span(first: int, last: int) -> tuple[int, ...]:
    """Keypoints first to last, both included."""
    return tuple(range(first, last + 1))


def _hand_names(side: str) -> tuple[str, ...]:
    fingers = ("thumb", "forefinger", "middle_finger", "ring_finger", "pinky_finger")
    return (f"{side}_hand_root", *(f"{side}_{finger}{joint}" for finger in fingers for joint in range(1, 5)))


def _hand_edges(root: int) -> tuple[Edge, ...]:
    """A finger is a path of its own; all but the thumb are joined to the root as well."""
    thumb = _path(*_span(root, root + 4))
    fingers = [_path(*_span(first, first + 3)) for first in range(root + 5, root + 21, 4)]
    return (*thumb, *(edge for finger in fingers for edge in finger), *((root, root + f) for f in (5, 9, 13, 17)))


def _hand_groups(wrist: int, root: int) -> tuple[tuple[int, ...], ...]:
    fingers = tuple(_span(first, first + 3) for first in range(root + 1, root + 21, 4))
    return (_span(root, root + 20), *fingers, (wrist, root))


_BODY_NAMES = (
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow",
    "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle",
    "right_ankle",
)  # fmt: skip
_FOOT_NAMES = ("left_big_toe", "left_small_toe", "left_heel", "right_big_toe", "right_small_toe", "right_heel")

_BODY_SIGMAS = (
    0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072, 0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089,
    0.089,
)  # fmt: skip
_FOOT_SIGMAS = (0.068, 0.066, 0.066, 0.092, 0.094, 0.094)
_FACE_SIGMAS = (
    0.042, 0.043, 0.044, 0.043, 0.040, 0.035, 0.031, 0.025, 0.020, 0.023, 0.029, 0.032, 0.037, 0.038, 0.043, 0.041,
    0.045, 0.013, 0.012, 0.011, 0.011, 0.012, 0.012, 0.011, 0.011, 0.013, 0.015, 0.009, 0.007, 0.007, 0.007, 0.012,
    0.009, 0.008, 0.016, 0.010, 0.017, 0.011, 0.009, 0.011, 0.009, 0.007, 0.013, 0.008, 0.011, 0.012, 0.010, 0.034,
    0.008, 0.008, 0.009, 0.008, 0.008, 0.007, 0.010, 0.008, 0.009, 0.009, 0.009, 0.007, 0.007, 0.008, 0.011, 0.008,
    0.008, 0.008, 0.010, 0.008,
)  # fmt: skip
_HAND_SIGMAS = (
    0.029, 0.022, 0.035, 0.037, 0.047, 0.026, 0.025, 0.024, 0.035, 0.018, 0.024, 0.022, 0.026, 0.017, 0.021, 0.021,
    0.032, 0.020, 0.019, 0.022, 0.031,
)  # fmt: skip

_BODY_FLIP = tuple((i, i + 1) for i in range(1, 17, 2))
_FACE_FLIP = (
    (23, 39), (24, 38), (25, 37), (26, 36), (27, 35), (28, 34), (29, 33), (30, 32), (40, 49), (41, 48), (42, 47),
    (43, 46), (44, 45), (54, 58), (55, 57), (59, 68), (60, 67), (61, 66), (62, 65), (63, 70), (64, 69), (71, 77),
    (72, 76), (73, 75), (78, 82), (79, 81), (83, 87), (84, 86), (88, 90),
)  # fmt: skip

_BODY_GROUPS = (_span(0, 4), (5, 7, 9), (6, 8, 10), (11, 12), (11, 13, 15), (12, 14, 16))
_BODY_SKELETON = (
    (15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (6, 8), (7, 9), (8, 10), (1, 2),
    (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6),
)  # fmt: skip

# Contours and rings of the 68-point face.
_FACE_LINES = (
    *_path(*_span(23, 39)), *_path(*_span(40, 44)), *_path(*_span(45, 49)), *_path(*_span(50, 53)),
    *_path(*_span(54, 58)), *_path(*_span(59, 64), 59), *_path(*_span(65, 70), 65), *_path(*_span(71, 82), 71),
    *_path(*_span(83, 90), 83),
)  # fmt: skip

_WHOLEBODY_EDGES = (
    *_BODY_SKELETON,
    # nose to ears and shoulders
    (0, 3), (0, 4), (0, 5), (0, 6),
    # feet; the left knows its ankle by toes and heel, the right likewise
    (16, 20), (16, 21), (16, 22), (20, 22), (21, 22), (17, 19), (18, 19), (15, 17), (15, 18), (15, 19),
    *_FACE_LINES,
    # nose bridge to eyes, brows and nostrils
    (50, 62), (50, 65), (53, 54), (53, 58), (53, 56), (44, 62), (44, 50), (45, 50), (45, 65),
    # nostrils to mouth, outer to inner lips
    (54, 74), (74, 58), (56, 74), (71, 74), (74, 77), (80, 77), (80, 71), (71, 83), (87, 77),
    # body joints of the head to the face around them
    (0, 53), (0, 52), (0, 51), (0, 50), *((1, i) for i in range(65, 71)), *((2, i) for i in range(59, 65)),
    (3, 39), (3, 38), (3, 37), (4, 23), (4, 24), (4, 25),
    *_hand_edges(91), *_hand_edges(112),
    # wrists to the hands' roots and thumbs
    (9, 91), (9, 92), (10, 112), (10, 113),
)  # fmt: skip

COCO = KeypointSet(
    name="coco",
    sigmas_origin="published by COCO",
    names=_BODY_NAMES,
    flip_pairs=_BODY_FLIP,
    sigmas=_BODY_SIGMAS,
    parts={"body": _span(0, 16)},
    annotation_fields={"keypoints": 17},
    upper_body=_span(0, 10),
    lower_body=_span(11, 16),
    edges=_BODY_SKELETON,
    groups=_BODY_GROUPS,
)

COCO_WHOLEBODY = KeypointSet(
    name="coco_wholebody",
    sigmas_origin="published by COCO-WholeBody",
    names=(
        *_BODY_NAMES,
        *_FOOT_NAMES,
        *(f"face-{i}" for i in range(68)),
        *_hand_names("left"),
        *_hand_names("right"),
    ),
    flip_pairs=(*_BODY_FLIP, (17, 20), (18, 21), (19, 22), *_FACE_FLIP, *((i, i + 21) for i in range(91, 112))),
    sigmas=(*_BODY_SIGMAS, *_FOOT_SIGMAS, *_FACE_SIGMAS, *_HAND_SIGMAS, *_HAND_SIGMAS),
    parts={
        "body": _span(0, 16),
        "foot": _span(17, 22),
        "face": _span(23, 90),
        "left_hand": _span(91, 111),
        "right_hand": _span(112, 132),
    },
    annotation_fields={"keypoints": 17, "foot_kpts": 6, "face_kpts": 68, "lefthand_kpts": 21, "righthand_kpts": 21},
    upper_body=_span(0, 10),
    lower_body=_span(11, 22),
    edges=_WHOLEBODY_EDGES,
    groups=(
        *_BODY_GROUPS,
        # jaw, brows, nose, eyes, mouth, face
        _span(23, 39), _span(40, 44), _span(45, 49), _span(50, 58), _span(59, 64), _span(65, 70), _span(71, 90),
        _span(23, 90),
        *_hand_groups(9, 91), *_hand_groups(10, 112),
        # feet, without and with their ankles
        (17, 18, 19), (20, 21, 22), (15, 17, 18, 19), (16, 20, 21, 22),
    ),
    skeleton=(
        *_BODY_SKELETON, (15, 17), (15, 18), (15, 19), (16, 20), (16, 21), (16, 22), *_FACE_LINES,
        *_hand_edges(91), *_hand_edges(112), (9, 91), (10, 112),
    ),
)  # fmt: skip

CROWDPOSE = KeypointSet(
    name="crowdpose",
    sigmas_origin="published by CrowdPose",
    names=(
        "left_shoulder", "right_shoulder", "left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hip",
        "right_hip", "left_knee", "right_knee", "left_ankle", "right_ankle", "top_head", "neck",
    ),
    flip_pairs=tuple((i, i + 1) for i in range(0, 12, 2)),
    sigmas=(0.079, 0.079, 0.072, 0.072, 0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089, 0.089, 0.079, 0.079),
    parts={"body": _span(0, 13)},
    annotation_fields={"keypoints": 14},
    upper_body=(0, 1, 2, 3, 4, 5, 12, 13),
    lower_body=_span(6, 11),
    edges=(
        (0, 2), (2, 4), (1, 3), (3, 5), (1, 13), (0, 13), (12, 13), (1, 7), (0, 6), (6, 7), (7, 9), (6, 8), (9, 11),
        (8, 10),
    ),
    groups=((0, 2, 4), (1, 3, 5), (6, 7), (6, 8, 10), (7, 9, 11), (13, 6, 7), (13, 12)),
)  # fmt: skip

_SETS = {known.name: known for known in (COCO, COCO_WHOLEBODY, CROWDPOSE)}


def keypoint_set(spec: str | Mapping[str, Any]) -> KeypointSet:
    """The keypoint set that `keypoints` in params.yaml names or spells out.

    Raises:
        ValueError: an unknown name, or a table that does not fit (see `KeypointSet.from_mapping`).
    """
    if isinstance(spec, Mapping):
        return KeypointSet.from_mapping(spec)
    if spec not in _SETS:
        raise ValueError(f"keypoints: {spec!r} is not one of {sorted(_SETS)}. A table of your own may stand here too.")
    return _SETS[spec]
