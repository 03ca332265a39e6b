"""CVAT for images 1.1 (XML): skeletons, or polygons of points with one point a keypoint."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from html import unescape
from pathlib import Path
from typing import Any

from cigpose.dataset.labels import OwnLabels
from cigpose.files.errors import DataError, shown
from cigpose.keypoints import Edge


def read_cvat_labels(path: Path, category: str | None) -> OwnLabels:
    """The people of one label of a CVAT export.

    A keypoint that is outside has none, one that is occluded is labelled and hidden.

    Args:
        path: annotations.xml.
        category: name of the label; None for the only one that has keypoints.

    Raises:
        DataError: it is not such a file, or its people do not fit each other.
    """
    try:
        tree = ET.parse(path).getroot()
    except ET.ParseError as err:
        raise DataError(f"{path}: not valid XML ({err}). Export it again as `CVAT for images`.") from err
    images = tree.findall("image")
    if not images:
        raise DataError(f"{path}: has no <image>. Export it as `CVAT for images 1.1`.")
    kind = "skeleton" if tree.find("image/skeleton") is not None else "points"
    shapes = [shape for image in images for shape in image.findall(kind)]
    found = list(dict.fromkeys(shape.get("label", "") for shape in shapes))
    if not shapes or (category is not None and category not in found):
        raise DataError(
            f"{path}: nobody has skeletons or points of {category or 'any label'}. It has {found or 'none'}."
        )
    if category is None and len(found) > 1:
        raise DataError(f"{path}: several labels have keypoints: {', '.join(found)}. Choose one by --category.")
    wanted = category or found[0]
    names, edges = _skeleton(tree, wanted) if kind == "skeleton" else ((), ())
    if kind == "skeleton" and not names:
        of_all = (point.get("label", "") for shape in shapes for point in shape.findall("points"))
        names = tuple(dict.fromkeys(of_all))
    labels = OwnLabels(source=str(path), kind=f"CVAT, {kind}", images=[], people=[], names=names, edges=edges)
    for image in images:
        entry = _image(image, path, len(labels.images) + 1)
        labels.images.append(entry)
        for shape in image.findall(kind):
            if shape.get("label") == wanted:
                where = f"{path}: {entry['file_name']}"
                keypoints = _of_skeleton(shape, names, where) if kind == "skeleton" else _of_points(shape, where)
                person = {"id": len(labels.people) + 1, "image_id": entry["id"], "keypoints": keypoints}
                labels.people.append(person)
    counts = {len(person["keypoints"]) // 3 for person in labels.people}
    if len(counts) != 1:
        raise DataError(
            f"{path}: people have {sorted(counts)} points, expected one number for all. Mend or use skeletons."
        )
    labels.num_keypoints = counts.pop()
    return labels


def _image(image: ET.Element, path: Path, number: int) -> dict[str, Any]:
    try:
        sides = {side: int(float(image.get(side, ""))) for side in ("width", "height")}
    except ValueError as err:
        raise DataError(f"{path}: image {shown(image.get('name'))} has no width and height. Export it again.") from err
    return {"id": number, "file_name": image.get("name", ""), **sides}


def _skeleton(tree: ET.Element, wanted: str) -> tuple[tuple[str, ...], tuple[Edge, ...]]:
    """Names and lines, as the label's drawing has them."""
    names: list[str] = []
    svg = ""
    for label in tree.iter("label"):
        if label.findtext("parent") == wanted and (name := label.findtext("name")):
            names.append(name)
        if label.findtext("name") == wanted:
            svg = unescape(label.findtext("svg") or "")
    nodes = {}
    for circle in re.findall(r"<circle\b[^>]*>", svg):
        about = _attributes(circle)
        if about.get("data-label-name") in names:
            nodes[about.get("data-node-id", about.get("data-element-id", ""))] = names.index(about["data-label-name"])
    edges = []
    for line in re.findall(r"<line\b[^>]*>", svg):
        about = _attributes(line)
        ends = about.get("data-node-from", ""), about.get("data-node-to", "")
        if ends[0] in nodes and ends[1] in nodes and ends[0] != ends[1]:
            edges.append((nodes[ends[0]], nodes[ends[1]]))
    return tuple(dict.fromkeys(names)), tuple(dict.fromkeys((min(edge), max(edge)) for edge in edges))


def _attributes(tag: str) -> Mapping[str, str]:
    return dict(re.findall(r'([\w-]+)="([^"]*)"', tag))


def _of_skeleton(shape: ET.Element, names: tuple[str, ...], where: str) -> list[float]:
    keypoints = [0.0] * (3 * len(names))
    for point in shape.findall("points"):
        if point.get("label") not in names:
            raise DataError(f"{where}: a skeleton has a point {shown(point.get('label'))}, expected one of {names}.")
        if point.get("outside") == "1":
            continue
        x, y = _coordinates(point.get("points", ""), where)[0]
        at = 3 * names.index(point.get("label", ""))
        keypoints[at : at + 3] = [x, y, 1.0 if point.get("occluded") == "1" else 2.0]
    return keypoints


def _of_points(shape: ET.Element, where: str) -> list[float]:
    visible = 1.0 if shape.get("occluded") == "1" else 2.0
    return [value for x, y in _coordinates(shape.get("points", ""), where) for value in (x, y, visible)]


def _coordinates(text: str, where: str) -> list[tuple[float, float]]:
    try:
        pairs = [tuple(map(float, pair.split(","))) for pair in text.split(";") if pair]
        return [(x, y) for x, y in pairs]
    except ValueError as err:
        raise DataError(f"{where}: points {shown(text)} are no x,y;x,y. Export it again.") from err
