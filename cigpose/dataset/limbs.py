"""Groups of keypoints from the lines of a skeleton."""

from __future__ import annotations

from collections.abc import Sequence

from cigpose.keypoints import Edge


def limb_groups(count: int, edges: Sequence[Edge], flip_pairs: Sequence[Edge]) -> tuple[tuple[int, ...], ...]:
    """Semantic groups as CIGPose's own sets have them: limbs, mates that are joined, and what hangs together besides.

    A limb is a path of the skeleton from one end or branching to the next, both included, of three keypoints or more;
    a line between two mates (left and right hip) counts as a branching of both, and makes them a group. Keypoints in
    neither are grouped with those they have a line to. A skeleton without lines is one group.

    Args:
        count: K.
        edges: undirected, from 0.
        flip_pairs: mates.

    Returns: groups of at least two keypoints, each ascending, the longest path first; all K as one if there are none.
    """
    near: dict[int, list[int]] = {k: [] for k in range(count)}
    for a, b in edges:
        near[a].append(b)
        near[b].append(a)
    mates = {frozenset(pair) for pair in flip_pairs}
    joined = [edge for edge in edges if frozenset(edge) in mates]
    ends = {k for k, others in near.items() if len(others) != 2} | {k for edge in joined for k in edge}
    groups = [path for path in _paths(near, ends) if len(path) >= 3] + joined
    left = set(near) - {k for group in groups for k in group}
    while left:
        found, new = set(), {min(left)}
        while new:
            found |= new
            new = {b for a in new if a in left for b in near[a]} - found
        left -= found
        if len(found) > 1:
            groups.append(tuple(found))
    distinct = dict.fromkeys(tuple(sorted(group)) for group in groups)
    return tuple(distinct) or (tuple(range(count)),)


def _paths(near: dict[int, list[int]], ends: set[int]) -> list[tuple[int, ...]]:
    """Paths from end to end; each once."""
    found: dict[frozenset[int], tuple[int, ...]] = {}
    for end in sorted(ends):
        for step in near[end]:
            path = [end, step]
            while path[-1] not in ends:
                further = [k for k in near[path[-1]] if k != path[-2]]
                path += further[:1]
            found.setdefault(frozenset(path), tuple(dict.fromkeys(path)))
    return sorted(found.values(), key=lambda path: (-len(path), path))
