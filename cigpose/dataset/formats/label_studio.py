"""Label Studio's JSON export: tasks with keypoint labels, and rectangles around people where there are several."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from cigpose.dataset.labels import OwnLabels
from cigpose.files.errors import DataError, shown

_UPLOADED = re.compile(r"^[0-9a-f]{8}-")
"""What Label Studio puts before the name of an uploaded picture."""


def read_label_studio_labels(tasks: Sequence[Any], source: str, names: Sequence[str] | None) -> OwnLabels:
    """The people of a list of tasks.

    Keypoints belong to the rectangle that is their parent, else to the smallest one around them, else to the picture's
    only person. Further annotations of a task, by other people, are kept as repeats.

    Args:
        tasks: the parsed JSON.
        source: the file, for messages.
        names: of the keypoints in the order wanted; None for the order in which the file has them.

    Raises:
        DataError: it is not such a list, or a keypoint's person or name is not clear.
    """
    done = [(task, _annotations(task, source)) for task in tasks]
    found = dict.fromkeys(
        _label(item, source)
        for _, finished in done
        for results in finished
        for item in results
        if item.get("type") == "keypointlabels"
    )
    if not found:
        raise DataError(f"{source}: no task has keypoint labels. Export it from Label Studio as JSON (not JSON-MIN).")
    order = tuple(names or found)
    if unknown := [name for name in found if name not in order]:
        raise DataError(f"{source}: has keypoints {', '.join(unknown)} that --keypoints does not name. Name them all.")
    labels = OwnLabels(source=source, kind="Label Studio", images=[], people=[], names=order, num_keypoints=len(order))
    if names is None:
        labels.notes.append("Keypoints are in the order in which the labels have them; --keypoints gives another.")
    for task, finished in done:
        if not finished:
            continue
        size = _size(finished, source)
        image = {"id": len(labels.images) + 1, "file_name": _file_name(task, source)}
        labels.images.append({**image, "width": size[0], "height": size[1]})
        first: list[dict[str, Any]] = []
        for number, results in enumerate(finished):
            where = f"{source}: task {shown(task.get('id'))}"
            people = [{**person, "image_id": image["id"]} for person in _people(results, order, size, where)]
            if number == 0:
                first = people
                for person in first:
                    labels.people.append({**person, "id": len(labels.people) + 1})
            elif len(people) == len(first) == 1:
                repeat = {**people[0], "id": len(labels.repeats) + 1, "repeats": labels.people[-1]["id"]}
                labels.repeats.append(repeat)
    return labels


def _annotations(task: Any, source: str) -> list[list[Mapping[str, Any]]]:
    """Results of each annotator who finished the task."""
    if not isinstance(task, Mapping) or not isinstance(task.get("annotations"), list):
        raise DataError(f"{source}: a task has no `annotations`. Export it from Label Studio as JSON (not JSON-MIN).")
    return [a["result"] for a in task["annotations"] if a.get("result") and not a.get("was_cancelled")]


def _label(item: Mapping[str, Any], source: str) -> str:
    chosen = item.get("value", {}).get("keypointlabels")
    if not isinstance(chosen, list) or len(chosen) != 1:
        raise DataError(f"{source}: a keypoint has the labels {shown(chosen)}, expected exactly one.")
    return str(chosen[0])


def _file_name(task: Mapping[str, Any], source: str) -> str:
    data = task.get("data") or {}
    address = next((data[key] for key in ("image", "img", "picture", "photo") if data.get(key)), None) or next(
        (value for value in data.values() if isinstance(value, str) and "." in value), task.get("file_upload")
    )
    if not isinstance(address, str):
        raise DataError(f"{source}: task {shown(task.get('id'))} does not name its picture under `data`.")
    parts = urlsplit(address)
    local = parse_qs(parts.query).get("d")  # /data/local-files/?d=folder/a.jpg
    return _UPLOADED.sub("", unquote(PurePosixPath(local[0] if local else parts.path).name))


def _size(annotations: Sequence[Sequence[Mapping[str, Any]]], source: str) -> tuple[int, int]:
    for results in annotations:
        for item in results:
            if item.get("original_width") and item.get("original_height"):
                return int(item["original_width"]), int(item["original_height"])
    raise DataError(f"{source}: a task does not say `original_width` and `original_height`. Export it again.")


def _people(
    results: Sequence[Mapping[str, Any]], order: Sequence[str], size: tuple[int, int], where: str
) -> list[dict[str, Any]]:
    boxes = {
        str(item.get("id")): _box(item["value"], size) for item in results if item.get("type") == "rectanglelabels"
    }
    people = {key: {"bbox": box, "keypoints": [0.0] * (3 * len(order))} for key, box in boxes.items()}
    alone: dict[str, Any] = {"keypoints": [0.0] * (3 * len(order))}
    for item in results:
        if item.get("type") != "keypointlabels":
            continue
        x, y = item["value"]["x"] / 100 * size[0], item["value"]["y"] / 100 * size[1]
        name = str(item["value"]["keypointlabels"][0])
        person = people.get(str(item.get("parentID"))) or _around(people, x, y) or alone
        at = 3 * order.index(name)
        if person["keypoints"][at + 2]:
            raise DataError(
                f"{where}: two keypoints {name!r} belong to one person. Draw a rectangle around each person, and make "
                "it the parent of the person's keypoints."
            )
        person["keypoints"][at : at + 3] = [x, y, 2.0]
    return [person for person in (*people.values(), alone) if any(person["keypoints"][2::3])]


def _around(people: Mapping[str, dict[str, Any]], x: float, y: float) -> dict[str, Any] | None:
    """Who has the smallest box around a point; the only one has all points."""
    if len(people) == 1:
        return next(iter(people.values()))
    inside = [
        person
        for person in people.values()
        if 0 <= x - person["bbox"][0] <= person["bbox"][2] and 0 <= y - person["bbox"][1] <= person["bbox"][3]
    ]
    return min(inside, key=lambda person: float(person["bbox"][2] * person["bbox"][3]), default=None)


def _box(value: Mapping[str, Any], size: tuple[int, int]) -> list[float]:
    return [value[key] / 100 * size[axis] for key, axis in (("x", 0), ("y", 1), ("width", 0), ("height", 1))]
