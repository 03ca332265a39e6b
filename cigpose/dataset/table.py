"""The table of keypoints: from what a file says, from published sets, or guessed; and what was guessed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cigpose.dataset.labels import OwnLabels
from cigpose.dataset.limbs import limb_groups
from cigpose.dataset.names import (
    ASSUMED_SIGMA,
    coco_spelling,
    guess_flip_pairs,
    halves,
    known_set,
    part_of,
    published_sigmas,
)
from cigpose.files.errors import DataError
from cigpose.keypoints import Edge, KeypointSet, keypoint_set


@dataclass(frozen=True, kw_only=True)
class Table:
    """`keypoints` of params.yaml, and what a user should know of it."""

    value: str | dict[str, Any]
    """As it stands in params.yaml."""
    notes: tuple[str, ...] = field(default=())

    @property
    def keypoints(self) -> KeypointSet:
        """The set."""
        return keypoint_set(self.value)


def names_asked_for(text: str) -> tuple[str, ...]:
    """What `--keypoints` names: a published set, or names with commas."""
    return tuple(name.strip() for name in text.split(",")) if "," in text else keypoint_set(text).names


def make_table(
    labels: OwnLabels, name: str, names: Sequence[str] | None, given_sigmas: Mapping[str, float] | None
) -> Table:
    """The table of a file of labels.

    Args:
        labels: of people; their skeleton is completed where the file has none.
        name: of the set, where it is one of the user's own.
        names: of the keypoints, by the user; None: as the file says.
        given_sigmas: keypoint -> sigma, by the user.

    Raises:
        DataError: the keypoints have no names, or another number of them.
    """
    names = _names(labels, names)
    notes: list[str] = []
    sigmas = dict(zip(names, labels.sigmas, strict=True)) if labels.sigmas else {}
    origin = f"of {Path(labels.source).name}" if sigmas else ""
    if given_sigmas is not None:
        if unknown := sorted(given_sigmas.keys() - set(names)):
            raise DataError(f"sigmas: {unknown[0]!r} is not one of the keypoints {', '.join(names)}. Correct it.")
        sigmas, origin = {**sigmas, **given_sigmas}, "given by the user"
    known = known_set(names)
    if known is not None and not sigmas:
        known = _with_fields(known, labels)
        notes.append(f"The names are those of {known.name}: its flip pairs, groups, parts and sigmas are taken.")
        labels.edges = labels.edges or known.lines
        return Table(value=known.name, notes=tuple(notes))
    pairs, alone = labels.flip_pairs, tuple[str, ...]()
    if pairs is None:
        pairs, alone = guess_flip_pairs(names)
    if alone:
        notes.append(f"No mate was found for {', '.join(alone)}: a mirrored person keeps them as they are.")
    if not pairs:
        notes.append("No keypoint has a mate (left_..., right_...): pictures are not mirrored, in training or test.")
    if not labels.edges and (lines := _known_edges(names)):
        labels.edges = lines
        notes.append(f"The file has no skeleton: {len(lines)} lines are those of COCO or CrowdPose, by the names.")
    if not labels.edges:
        notes.append("The file has no skeleton and the names tell none: all keypoints are one group, without lines.")
    values, origin = _sigmas(names, sigmas, origin, notes)
    return Table(value=_mapping(name, names, pairs, labels.edges, values, origin), notes=tuple(notes))


def _names(labels: OwnLabels, names: Sequence[str] | None) -> tuple[str, ...]:
    count = labels.num_keypoints
    if names is None and not labels.names:
        known = {14: ", or crowdpose if they are CrowdPose's", 17: ", or coco if they are COCO's"}.get(count, "")
        raise DataError(
            f"{labels.source}: does not name its {count} keypoints. Name them by --keypoints NAME,NAME,...{known}."
        )
    names = tuple(names or labels.names)
    if len(names) != count:
        raise DataError(f"{labels.source}: its people have {count} keypoints, --keypoints names {len(names)}.")
    if len(set(names)) != len(names):
        raise DataError(f"{labels.source}: two keypoints have the same name: {', '.join(names)}. Rename one.")
    return names


def _with_fields(known: KeypointSet, labels: OwnLabels) -> KeypointSet:
    """COCO-WholeBody in place of COCO, where the people have its other fields."""
    whole = keypoint_set("coco_wholebody")
    has_fields = all(whole.annotation_fields.keys() <= person.keys() for person in labels.people[:100])
    return whole if known.name == "coco" and has_fields else known


def _known_edges(names: Sequence[str]) -> tuple[Edge, ...]:
    """Lines of published skeletons between keypoints of these names."""
    place = {coco_spelling(name): i for i, name in enumerate(names)}
    for known in (keypoint_set("crowdpose"), keypoint_set("coco")) if "neck" in place else (keypoint_set("coco"),):
        plain = [coco_spelling(name) for name in known.names]
        edges = [(place[plain[a]], place[plain[b]]) for a, b in known.lines if plain[a] in place and plain[b] in place]
        if edges:
            return tuple(edges)
    return ()


def _sigmas(names: Sequence[str], given: Mapping[str, float], origin: str, notes: list[str]) -> tuple[list[float], str]:
    """One for each keypoint, and a line on where they come from."""
    published = {name: value for name, value in published_sigmas(names).items() if name not in given}
    assumed = [name for name in names if name not in given and name not in published]
    told = [f"{origin} ({len(given)} of {len(names)})" if len(given) < len(names) else origin] if given else []
    for whose in sorted({whose for _, whose in published.values()}):
        count = sum(entry[1] == whose for entry in published.values())
        told.append(f"published by {whose}" + (f" ({count} of {len(names)})" if count < len(names) else ""))
    if assumed:
        told.append(f"assumed to be {ASSUMED_SIGMA} ({len(assumed)} of {len(names)})")
        notes.append(
            f"Nobody publishes sigmas for {', '.join(assumed)}: {ASSUMED_SIGMA}, that of COCO's shoulders, is assumed. "
            "Once there is a model, or people were labelled twice, `cigpose dataset sigmas` estimates them."
        )
    values = [given.get(name, published.get(name, (ASSUMED_SIGMA, ""))[0]) for name in names]
    return values, ", ".join(told)


def _mapping(
    name: str,
    names: Sequence[str],
    pairs: Sequence[Edge],
    edges: Sequence[Edge],
    sigmas: list[float],
    origin: str,
) -> dict[str, Any]:
    parts: dict[str, list[str]] = {}
    for keypoint in names:
        parts.setdefault(part_of(keypoint), []).append(keypoint)
    if "body" not in parts or len(parts) == 1:
        parts = {"body": list(names)}
    upper, lower = halves(names)
    groups = limb_groups(len(names), edges, pairs)
    return {
        "name": name,
        "names": list(names),
        "sigmas": sigmas,
        "sigmas_origin": origin,
        "flip_pairs": [[names[a], names[b]] for a, b in pairs],
        "edges": [[names[a], names[b]] for a, b in edges],
        "groups": [[names[k] for k in group] for group in groups],
        "parts": {"body": parts.pop("body"), **parts},
        "upper_body": list(upper),
        "lower_body": list(lower),
    }


def read_sigmas(path: Path) -> dict[str, float]:
    """A JSON file of keypoint -> sigma.

    Raises:
        FileNotFoundError: it is not there.
        DataError: it holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f'{path}: not found. Give a JSON file such as {{"nose": 0.026}}.')
    try:
        values = json.loads(path.read_bytes())
    except ValueError as err:
        raise DataError(f"{path}: not valid JSON ({err}).") from err
    is_table = isinstance(values, dict) and all(isinstance(v, (int, float)) and 0 < v <= 10 for v in values.values())
    if not is_table:
        raise DataError(f'{path}: expected a JSON object of keypoint to sigma above 0, such as {{"nose": 0.026}}.')
    return {str(name): float(value) for name, value in values.items()}
