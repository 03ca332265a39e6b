"""From whatever a user has to `OwnLabels` whose pictures are there: formats are told by their content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
import orjson

from cigpose.dataset.formats.coco import read_coco_labels
from cigpose.dataset.formats.cvat import read_cvat_labels
from cigpose.dataset.formats.label_studio import read_label_studio_labels
from cigpose.dataset.formats.ultralytics import read_ultralytics_labels
from cigpose.dataset.labels import OwnLabels, complete_people
from cigpose.files.archives import Extent, ExtentReader, MemberLookup, list_members
from cigpose.files.errors import DataError
from cigpose.files.jpeg import is_jpeg, jpeg_size

HEAD = 1 << 16
"""Bytes in which a JPEG says its size, nearly always."""
PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
EXPECTED = (
    "Expected COCO-keypoints JSON, a Label Studio export (JSON), CVAT for images (XML), or an Ultralytics data.yaml"
)


class Photographs:
    """The pictures of a folder, or of a zip; nothing is ever written to them."""

    def __init__(self, path: Path) -> None:
        """See what is there.

        Raises:
            FileNotFoundError: nothing.
            DataError: a zip that cannot be read.
        """
        if not path.exists():
            raise FileNotFoundError(f"{path}: not found. Give the folder, or the zip, of your pictures.")
        self.path = path
        self.members: Mapping[str, Extent] = list_members(path)
        self._lookup = MemberLookup(self.members)

    def find(self, file_name: str) -> Extent | None:
        """The picture that labels mean by this name."""
        return self._lookup.find(file_name.replace("\\", "/"))

    def size(self, picture: Extent) -> tuple[int, int]:
        """(width, height) as decoders show it.

        Raises:
            DataError: no picture.
        """
        with ExtentReader() as reader:
            head = reader.head(picture, HEAD)
            if is_jpeg(head):
                try:
                    return jpeg_size(head)
                except DataError:
                    pass  # the header is longer
            height, width = self.decode(picture).shape[:2]
            return width, height

    def decode(self, picture: Extent) -> np.ndarray:
        """The uint8 (H, W, 3) BGR picture.

        Raises:
            DataError: no picture that OpenCV can decode.
        """
        with ExtentReader() as reader:
            data = np.frombuffer(reader.read(picture), dtype=np.uint8)
            image = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
        if image is None:
            raise DataError(f"{picture.where}: cannot be decoded. Replace it, or take it out of the labels.")
        return image


def read_labels(
    path: Path, photographs: Photographs, category: str | None = None, names: Sequence[str] | None = None
) -> OwnLabels:
    """People, pictures and keypoints of a file of labels, each person with a box and an area.

    Pictures that are not there are left out with their people, and told of in `notes`.

    Args:
        path: of the labels.
        photographs: what they are of.
        category: whose people, where several have keypoints.
        names: of the keypoints, in the order wanted, where the user says it.

    Raises:
        FileNotFoundError: it is not there.
        DataError: it cannot be read, or names no picture that is there.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found. Give the file of your labels.")
    labels = _read(path, photographs, category, names)
    if not labels.num_people:
        raise DataError(f"{path}: nobody in it has a labelled keypoint. Is this the right file?")
    _keep_what_is_there(labels, photographs)
    if not labels.num_people:
        raise DataError(f"{path}: nobody is labelled on the pictures that are in {photographs.path}. Give all of them.")
    _number(labels)
    complete_people(labels)
    return labels


def _read(path: Path, photographs: Photographs, category: str | None, names: Sequence[str] | None) -> OwnLabels:
    ending = path.suffix.lower()
    if ending == ".xml":
        return read_cvat_labels(path, category)
    if ending in (".yaml", ".yml"):
        pictures = {
            name: partial(photographs.size, member)
            for name, member in photographs.members.items()
            if PurePosixPath(name).suffix.lower() in PICTURES
        }
        return read_ultralytics_labels(path, pictures, category)
    if ending != ".json":
        raise DataError(f"{path}: not a kind of labels that is known. {EXPECTED}.")
    try:
        document = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as err:
        raise DataError(f"{path}: not valid JSON ({err}). Export it again.") from err
    if isinstance(document, dict) and "annotations" in document:
        return read_coco_labels(document, str(path), category)
    if isinstance(document, list) and document and isinstance(document[0], dict) and "annotations" in document[0]:
        return read_label_studio_labels(document, str(path), names)
    raise DataError(f"{path}: JSON of another kind. {EXPECTED}.")


def _keep_what_is_there(labels: OwnLabels, photographs: Photographs) -> None:
    """Leave out pictures that are not there, and have the true size of those that are."""
    kept, missing, wrong = {}, [], 0
    for image in labels.images:
        picture = photographs.find(str(image["file_name"]))
        if picture is None:
            missing.append(str(image["file_name"]))
            continue
        size = photographs.size(picture)
        wrong += (image.get("width", size[0]), image.get("height", size[1])) != size
        kept[image["id"]] = {**image, "file_name": picture.name, "width": size[0], "height": size[1]}
    if not kept:
        raise DataError(
            f"{photographs.path}: none of the {len(missing)} pictures that {labels.source} names is there, such as "
            f"{missing[0]}. Give the folder they are in."
        )
    if missing:
        labels.notes.append(
            f"{len(missing)} pictures that the labels name are not there and were left out, such as {missing[0]}."
        )
    if wrong:
        labels.notes.append(f"{wrong} pictures have another size than the labels say; the true one is taken.")
    labels.images = list(kept.values())
    for name in ("people", "repeats"):
        setattr(labels, name, [person for person in getattr(labels, name) if person["image_id"] in kept])


def _number(labels: OwnLabels) -> None:
    """Whole numbers as ids, as COCO has them, where a tool wrote others."""
    for what, key in (("images", "image_id"), ("people", "repeats")):
        entries = getattr(labels, what)
        ids = [entry.get("id") for entry in entries]
        if all(type(number) is int and number >= 0 for number in ids) and len(set(ids)) == len(ids):
            continue
        if what == "images" and len(set(map(str, ids))) != len(ids):
            raise DataError(f"{labels.source}: two of its images have the same id. Export it again.")
        new = {str(old): number for number, old in enumerate(ids, 1)}
        for number, entry in enumerate(entries, 1):
            entry["id"] = number
        others = [*labels.people, *labels.repeats] if what == "images" else labels.repeats
        for other in others:
            other[key] = new.get(str(other.get(key)), other.get(key))
        labels.notes.append(f"The ids of its {what} are not whole numbers, each once; they were numbered anew.")
