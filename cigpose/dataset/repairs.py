"""What may have been mixed up in a person's labels: permutations of keypoints that would put it right.

K keypoints. A permutation p repairs a person as `keypoints[p]`: keypoint k gets what was labelled as p[k].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cigpose.keypoints import KeypointSet

SWAPPED_PERSON, SWAPPED_LIMB, SHIFTED = "swapped person", "swapped limb", "shifted"
_MOST_SWAPS = 48
"""Of a set with a face and hands the finer ones are left out."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Repair:
    """One thing that may have happened, and its undoing."""

    kind: str
    keypoints: tuple[int, ...]
    """Those that get other coordinates."""
    order: np.ndarray
    """(K,) int64."""


def all_repairs(keypoint_set: KeypointSet) -> list[Repair]:
    """Left and right exchanged, of the whole person and of every limb and pair; all labels one place on or back."""
    num, pairs = len(keypoint_set), keypoint_set.flip_pairs
    found = []
    for members in _swaps(keypoint_set):
        order = np.arange(num)
        for a, b in (pairs[member] for member in members):
            order[a], order[b] = b, a
        kind = SWAPPED_PERSON if len(members) == len(pairs) else SWAPPED_LIMB
        moved = tuple(np.flatnonzero(order != np.arange(num)).tolist())
        found.append(Repair(kind=kind, keypoints=moved, order=order))
    if num >= 3:
        for step in (1, -1):
            order = np.roll(np.arange(num), step)
            found.append(Repair(kind=SHIFTED, keypoints=tuple(range(num)), order=order))
    return found


def _swaps(keypoint_set: KeypointSet) -> list[frozenset[int]]:
    """Sets of flip pairs (their numbers) that may have been swapped together: pairs, ends of limbs, limbs, all."""
    pairs = keypoint_set.flip_pairs
    number = {k: i for i, pair in enumerate(pairs) for k in pair}
    side = {k: s for pair in pairs for s, k in enumerate(pair)}
    edges = {
        frozenset((number[a], number[b]))
        for a, b in keypoint_set.lines
        if a in number and b in number and side[a] == side[b] and number[a] != number[b]
    }
    limbs: set[frozenset[int]] = set()
    for edge in edges:
        first, second = edge
        ends = _connected(first, edges - {edge}), _connected(second, edges - {edge})
        if ends[0] != ends[1]:  # without this edge there are two sides to it
            limbs |= {ends[0], ends[1], ends[0] | {second}, ends[1] | {first}}
    body = [frozenset([i]) for i, pair in enumerate(pairs) if pair[0] in next(iter(keypoint_set.parts.values()))]
    half = [limb for limb in limbs if len(limb) <= len(pairs) // 2]  # the rest exchanged is the same, turned about
    chosen = [frozenset(range(len(pairs)))] if pairs else []
    chosen += body + sorted(half, key=lambda limb: (-len(limb), sorted(limb)))
    return list(dict.fromkeys(chosen))[:_MOST_SWAPS]


def _connected(start: int, edges: set[frozenset[int]]) -> frozenset[int]:
    seen, new = {start}, [start]
    while new:
        at = new.pop()
        near = {other for edge in edges if at in edge for other in edge} - seen
        seen |= near
        new += near
    return frozenset(seen)
