"""What the names of keypoints say: which are mates, which half of the body, whose sigmas are published."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cigpose.keypoints import COCO, COCO_WHOLEBODY, CROWDPOSE, Edge, KeypointSet

KNOWN_SETS = (COCO, CROWDPOSE, COCO_WHOLEBODY)
ASSUMED_SIGMA = 0.079
"""Of a keypoint that nobody has measured: that of COCO's shoulders, in the middle of the body's (.025 to .107)."""

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_SIDES = {"left": "right", "right": "left", "l": "r", "r": "l", "lt": "rt", "rt": "lt"}
_FULL = {"l": "left", "lt": "left", "r": "right", "rt": "right"}
_SAME = {
    "head_top": "top_head", "top_of_head": "top_head", "headtop": "top_head", "upper_neck": "neck",
    "bigtoe": "big_toe", "smalltoe": "small_toe", "little_toe": "small_toe",
}  # fmt: skip
_UPPER = {
    "head", "nose", "eye", "ear", "neck", "shoulder", "elbow", "wrist", "hand", "thorax", "chest", "chin", "mouth",
}  # fmt: skip
_LOWER = {"hip", "knee", "ankle", "foot", "heel", "toe", "pelvis"}


def words_of(name: str) -> list[str]:
    """Lower-case words of a name in any spelling: `LShoulder` is l and shoulder."""
    return [word.lower() for word in _WORD.findall(name)]


def coco_spelling(name: str) -> str:
    """The name as COCO would write it: `L-Wrist` and `leftWrist` are left_wrist."""
    words = [_FULL.get(word, word) for word in words_of(name)]
    sides = [word for word in words if word in ("left", "right")]
    rest = "_".join(word for word in words if word not in ("left", "right"))
    return "_".join([*sides[:1], _SAME.get(rest, rest)])


def guess_flip_pairs(names: Sequence[str]) -> tuple[tuple[Edge, ...], tuple[str, ...]]:
    """Mates by their names, and the names of those that have a side and no mate."""
    place = {tuple(words_of(name)): i for i, name in enumerate(names)}
    pairs, alone = [], []
    for i, name in enumerate(names):
        words = words_of(name)
        sided = [at for at, word in enumerate(words) if word in _SIDES]
        if not sided:
            continue
        mirrored = tuple(_SIDES[word] if at == sided[0] else word for at, word in enumerate(words))
        mate = place.get(mirrored)
        if mate is None:
            alone.append(name)
        elif i < mate:
            pairs.append((i, mate))
    return tuple(pairs), tuple(alone)


def known_set(names: Sequence[str]) -> KeypointSet | None:
    """The published set of exactly these names in this order, in whatever spelling."""
    plain = [coco_spelling(name) for name in names]
    for known in KNOWN_SETS:
        if len(known) == len(plain) and plain == [coco_spelling(name) for name in known.names]:
            return known
    return None


def published_sigmas(names: Sequence[str]) -> dict[str, tuple[float, str]]:
    """Name -> sigma and whose it is, for those that COCO, CrowdPose or COCO-WholeBody publish."""
    table: dict[str, tuple[float, str]] = {}
    titles = {"coco": "COCO", "crowdpose": "CrowdPose", "coco_wholebody": "COCO-WholeBody"}
    for known in KNOWN_SETS:
        for name, sigma in zip(known.names, known.sigmas, strict=True):
            table.setdefault(coco_spelling(name), (sigma, titles[known.name]))
    return {name: table[coco_spelling(name)] for name in names if coco_spelling(name) in table}


def part_of(name: str) -> str:
    """The evaluation part that COCO-WholeBody has this keypoint in; body for others."""
    plain = coco_spelling(name)
    for part, members in COCO_WHOLEBODY.parts.items():
        if any(plain == coco_spelling(COCO_WHOLEBODY.names[member]) for member in members):
            return part
    return "body"


def halves(names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the upper and of the lower body, by their words."""
    upper = tuple(name for name in names if _UPPER & set(words_of(name)) and not _LOWER & set(words_of(name)))
    lower = tuple(name for name in names if _LOWER & set(words_of(name)))
    return upper, lower
