"""Ultralytics pose: data.yaml, and beside the folder `images` a folder `labels` with a .txt for each picture.

A line of a .txt is one person: class, box (centre x, centre y, width, height), then x, y and perhaps visibility of each
keypoint; all but class and visibility as shares of the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from cigpose.config.document import read_yaml
from cigpose.config.schema import ConfigError
from cigpose.dataset.labels import OwnLabels
from cigpose.files.archives import list_members
from cigpose.files.errors import DataError, shown
from cigpose.keypoints import Edge

Sizes = Mapping[str, Callable[[], tuple[int, int]]]
"""Name of a picture -> what tells its (width, height)."""


def read_ultralytics_labels(path: Path, pictures: Sizes, category: str | None) -> OwnLabels:
    """The people of a data.yaml and its folder of labels.

    Args:
        path: data.yaml; `labels` lies in its folder, in the folder it names as `path`, or further below.
        pictures: those there are.
        category: name of the class; None for the only one.

    Raises:
        DataError: data.yaml is none, no label belongs to a picture, or a line cannot be read.
    """
    about = _about(path)
    num, values = _keypoint_shape(about, path)
    wanted = _class(about, path, category)
    root = path.parent / str(about.get("path") or "")
    texts = _texts(path.parent if not root.is_dir() else root)
    labels = OwnLabels(source=str(path), kind="Ultralytics pose", images=[], people=[], num_keypoints=num)
    labels.flip_pairs = _flip_pairs(about, num, path)
    labels.names = tuple(str(name) for name in _keypoint_names(about, wanted))
    if labels.names and len(labels.names) != num:
        raise DataError(f"{path}: kpt_names has {len(labels.names)} names, kpt_shape says {num} keypoints. Mend it.")
    sides = {side: str(about[side]).strip("./").removeprefix("images/") for side in ("train", "val") if about.get(side)}
    for name, size in pictures.items():
        text = texts.get(_bare(name))
        if text is None:
            continue
        image = {"id": len(labels.images) + 1, "file_name": name, "width": 0, "height": 0}
        image["width"], image["height"] = size()
        labels.images.append(image)
        for number, line in enumerate(text.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip() and int(float(line.split()[0])) == wanted:
                person = _person(line, num, values, image, f"{text}: line {number}")
                labels.people.append({"id": len(labels.people) + 1, **person})
        folder = str(PurePosixPath(name).parent)
        for side, place in sides.items():
            if f"/{folder}/".endswith((f"/{place}/", f"/{place.removesuffix('/images')}/images/")):
                labels.sides[name] = side
    if not labels.images:
        raise DataError(
            f"{path}: {len(texts)} files of labels are below its folder, and none is of one of the {len(pictures)} "
            "pictures. Expected labels/.../NAME.txt for images/.../NAME.jpg."
        )
    if values == 2:
        labels.notes.append("The labels have no visibility: a keypoint at 0, 0 is taken for unlabelled.")
    return labels


def _about(path: Path) -> Mapping[str, Any]:
    try:
        about = read_yaml(path.read_text(encoding="utf-8"))
    except (ConfigError, UnicodeDecodeError) as err:
        raise DataError(f"{path}: {err}") from err
    if not isinstance(about, Mapping) or "kpt_shape" not in about:
        raise DataError(f"{path}: has no kpt_shape, expected Ultralytics' data.yaml of a pose dataset.")
    return about


def _keypoint_shape(about: Mapping[str, Any], path: Path) -> tuple[int, int]:
    shape = about["kpt_shape"]
    is_shape = isinstance(shape, list) and len(shape) == 2 and all(type(value) is int for value in shape)
    if not is_shape or shape[0] < 1 or shape[1] not in (2, 3):
        raise DataError(f"{path}: kpt_shape is {shown(shape)}, expected [number of keypoints, 2 or 3].")
    return shape[0], shape[1]


def _class(about: Mapping[str, Any], path: Path, category: str | None) -> int:
    names = about.get("names") or {0: "person"}
    table = dict(enumerate(names)) if isinstance(names, list) else {int(key): name for key, name in names.items()}
    if category is None and len(table) > 1:
        raise DataError(f"{path}: has several classes: {', '.join(map(str, table.values()))}. Choose by --category.")
    if category is None:
        return next(iter(table))
    for number, name in table.items():
        if str(name) == category:
            return number
    raise DataError(f"{path}: has no class {category!r}, only {', '.join(map(str, table.values()))}.")


def _keypoint_names(about: Mapping[str, Any], wanted: int) -> list[Any]:
    names = about.get("kpt_names") or []
    if isinstance(names, Mapping):
        names = names.get(wanted, names.get(str(wanted), []))
    return list(names)


def _flip_pairs(about: Mapping[str, Any], num: int, path: Path) -> tuple[Edge, ...] | None:
    index = about.get("flip_idx")
    if index is None:
        return None
    if not isinstance(index, list) or sorted(map(str, index)) != sorted(map(str, range(num))):
        raise DataError(f"{path}: flip_idx is {shown(index)}, expected each of 0 to {num - 1} once. Mend it.")
    if any(index[index[k]] != k for k in range(num)):
        raise DataError(f"{path}: flip_idx does not lead back from each keypoint's mate to itself. Mend it.")
    return tuple((k, index[k]) for k in range(num) if k < index[k])


def _texts(root: Path) -> dict[str, Path]:
    """Name of a picture without `images` and ending -> its labels."""
    return {
        _bare(name): Path(member.path)
        for name, member in list_members(root).items()
        if name.endswith(".txt") and "labels" in PurePosixPath(name).parts
    }


def _bare(name: str) -> str:
    parts = [part for part in PurePosixPath(name).with_suffix("").parts if part not in ("images", "labels")]
    return "/".join(parts)


def _person(line: str, num: int, values: int, image: Mapping[str, Any], where: str) -> dict[str, Any]:
    try:
        numbers = [float(word) for word in line.split()]
    except ValueError:
        numbers = []
    if len(numbers) != 5 + num * values:
        raise DataError(f"{where}: expected {5 + num * values} numbers (class, box, {num} x {values}). Mend it.")
    width, height = image["width"], image["height"]
    x, y, w, h = numbers[1] * width, numbers[2] * height, numbers[3] * width, numbers[4] * height
    keypoints: list[float] = []
    for k in range(num):
        point = numbers[5 + k * values : 5 + (k + 1) * values]
        visible = point[2] if values == 3 else 2.0 * (point[0] != 0 or point[1] != 0)
        keypoints += [point[0] * width, point[1] * height, visible] if visible > 0 else [0.0, 0.0, 0.0]
    return {"image_id": image["id"], "bbox": [x - w / 2, y - h / 2, w, h], "keypoints": keypoints}
