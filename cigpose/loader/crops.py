"""One picture in, the crops of its persons out: what a loader process does. Each picture is decoded once."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import zlib
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np

from cigpose.config import AugmentationStage, Config
from cigpose.crop import box_to_center_scale, crop_image, fix_aspect_ratio, transform_points
from cigpose.files.errors import DataError
from cigpose.loader.augment import PersonBox, augment_person, person_matrix
from cigpose.loader.pixels import NUM_DRAWN, PixelAugmentation, PixelDraw
from cigpose.loader.samples import read_record
from cigpose.loader.shards import AGAIN

_REDUCED = {
    1: getattr(cv2, "IMREAD_COLOR_RGB", cv2.IMREAD_COLOR),  # from OpenCV 4.11 on
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
"""Factor -> flag. The picture is turned by its EXIF orientation, as the original reads it."""


@dataclass(frozen=True, slots=True)
class WantedPicture:
    """An image of a shard and the persons wanted of it."""

    dataset: str
    shard: int
    """Its position in the dataset's index."""
    sample: dict[str, Any]
    """As webdataset gives it: `__key__`, `__url__`, `jpg` and `json` bytes."""
    persons: tuple[int, ...]
    """Their places in the record."""
    slots: tuple[int, ...]
    """When they are due."""
    places: tuple[int, ...]
    """Their places in the rank's epoch."""
    numbers: tuple[int, ...]
    """Their numbers in the order of the whole dataset or epoch."""

    @property
    def key(self) -> str:
        """The image's key."""
        return str(self.sample["__key__"])

    @property
    def where(self) -> str:
        """The image as messages name it."""
        return f"{self.sample['__url__']}: {self.key}.jpg"


@dataclass(slots=True)
class Crops:
    """Persons cut out of some pictures, in no batch yet. N persons."""

    places: list[int]
    arrays: dict[str, np.ndarray]
    """Batch field -> (N, ...)."""
    keys: list[str]


@dataclass
class _Rows:
    """Values of each batch field, person by person."""

    keys: list[str] = field(default_factory=list)
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def add(self, key: str, **values: Any) -> None:
        self.keys.append(key)
        for name, value in values.items():
            self.columns.setdefault(name, []).append(value)


class CropMaker:
    """Cuts the persons of pictures out: augmented for training, plain for evaluation.

    Whatever is random depends on (seed, epoch, dataset, image, person) alone.
    """

    def __init__(
        self,
        config: Config,
        *,
        epoch: int | None,
        boxes: str = "ground_truth",
        shift: float = 0.0,
        on_device: bool = False,
    ) -> None:
        """A maker of crops.

        Args:
            config: the experiment.
            epoch: of the training crops; None makes evaluation crops.
            boxes: `ground_truth` or `detections`.
            shift: of evaluation crops, see `cigpose.loader.batches.eval_loader`.
            on_device: leave pixels of training crops to `device.change_pixels`, and say in `drawn` what it is to do.
        """
        self.input_size = config.model.input_size
        self.keypoint_set = config.keypoint_set
        self.padding = config.augmentation.box_padding
        self.scaled_decode = config.train.loader.scaled_decode
        self.seed = config.seed
        self.epoch = epoch
        self.boxes = boxes
        self.shift = shift
        self.on_device = on_device
        self._pixels: PixelAugmentation | PixelDraw | None = None
        self.stage: AugmentationStage | None = None
        if epoch is not None:
            stages = config.augmentation
            self.stage = stages.stage1 if epoch < stages.stage2_from_epoch else stages.stage2

    def fields(self) -> dict[str, tuple[Any, tuple[int, ...]]]:
        """Name -> (dtype, shape of one person) of what crops have."""
        width, height = self.input_size
        num = len(self.keypoint_set)
        found: dict[str, tuple[Any, tuple[int, ...]]] = {
            "crops": (np.uint8, (height, width, 3)),
            "keypoints": (np.float32, (num, 2)),
            "visible": (np.float32, (num,)),
        }
        if self.stage is None:
            found |= {name: (np.float32, (2,)) for name in ("center", "scale")}
            found |= {name: (np.int64, ()) for name in ("number", "image_id", "person_id")}
            found |= {"bbox_xyxy": (np.float32, (4,)), "box_score": (np.float32, ())}
        elif self.on_device:
            found["drawn"] = (np.int16, (NUM_DRAWN,))
        return found

    def make(self, pictures: list[WantedPicture]) -> Crops:
        """The crops of some pictures.

        Raises:
            DataError: a picture cannot be decoded, or is not the one its record describes.
        """
        rows = _Rows()
        crops = np.empty((sum(len(p.persons) for p in pictures), *self.input_size[::-1], 3), dtype=np.uint8)
        row = 0
        for picture in pictures:
            last = row + len(picture.persons)
            if self.stage is None:
                self._evaluate(picture, crops[row:last], rows)
            else:
                self._train(picture, crops[row:last], rows, self.stage)
            row = last
        arrays = {name: np.stack(values) for name, values in rows.columns.items()}
        places = [place for picture in pictures for place in picture.places]
        return Crops(places=places, arrays={"crops": crops, **arrays}, keys=rows.keys)

    def _train(self, picture: WantedPicture, out: np.ndarray, rows: _Rows, stage: AugmentationStage) -> None:
        record = read_record(picture.sample)
        keys = [f"{picture.dataset}/{picture.key}#{record['persons'][i]['id']}" for i in picture.persons]
        rngs = [self.generator(key) for key in keys]
        persons = [
            augment_person(self._person(record, i), rng, stage, self.keypoint_set)
            for i, rng in zip(picture.persons, rngs, strict=True)
        ]
        if self._pixels is None:
            is_left = self.on_device and not stage.extra
            self._pixels = PixelDraw(stage, self.input_size) if is_left else PixelAugmentation(stage, self.keypoint_set)
        pixels = self._pixels
        matrices = self._crop(picture, record, persons, out)
        for i, (person, rng) in enumerate(zip(persons, rngs, strict=True)):
            points, visible = transform_points(matrices[i], person.keypoints), person.visible
            drawn = np.zeros(NUM_DRAWN, dtype=np.int16)
            if isinstance(pixels, PixelDraw):
                drawn = pixels(rng)
            else:
                out[i], points, visible = pixels(out[i], points, visible, rng)
            values = {"keypoints": points.astype(np.float32), "visible": visible}
            rows.add(keys[i], **values, **({"drawn": drawn} if self.on_device else {}))

    def _evaluate(self, picture: WantedPicture, out: np.ndarray, rows: _Rows) -> None:
        record = read_record(picture.sample)
        detected = self.boxes == "detections"
        persons = [self._person(record, i) for i in picture.persons]
        if self.shift:
            where = f"{picture.dataset}/{picture.key}"
            persons = [self._shifted(one, f"{where}#{i}") for one, i in zip(persons, picture.persons, strict=True)]
        matrices = self._crop(picture, record, persons, out)
        for i, (person, place, number) in enumerate(zip(persons, picture.persons, picture.numbers, strict=True)):
            entry = record["detections" if detected else "persons"][place]
            person_id = number if detected else entry["id"]
            rows.add(
                f"{picture.dataset}/{picture.key}#{person_id}",
                keypoints=transform_points(matrices[i], person.keypoints).astype(np.float32),
                visible=person.visible,
                center=person.center,
                scale=fix_aspect_ratio(person.scale, self.input_size).astype(np.float32),
                number=np.int64(number),
                image_id=np.int64(record["image_id"]),
                person_id=np.int64(person_id),
                bbox_xyxy=np.asarray(entry["bbox_xyxy"], dtype=np.float32),
                box_score=np.float32(entry.get("score", 1.0)),
            )

    def _person(self, record: dict[str, Any], place: int) -> PersonBox:
        entry = record["detections" if self.boxes == "detections" else "persons"][place]
        center, scale = box_to_center_scale(np.asarray(entry["bbox_xyxy"]), self.padding)
        if "keypoints" in entry:
            points = np.fromiter(itertools.chain.from_iterable(entry["keypoints"]), np.float64).reshape(-1, 3)
        else:
            points = np.zeros((len(self.keypoint_set), 3))
        return PersonBox(
            keypoints=points[:, :2],
            visible=(points[:, 2] > 0).astype(np.float32),
            center=center,
            scale=scale,
            image_size=(record["width"], record["height"]),
        )

    def _shifted(self, person: PersonBox, key: str) -> PersonBox:
        """The box beside where it belongs, in a direction that is the person's own."""
        angle = 2 * np.pi * zlib.crc32(key.encode()) / 2**32
        offset = self.shift / self.padding * person.scale * [np.cos(angle), np.sin(angle)]
        return dataclasses.replace(person, center=(person.center + offset).astype(person.center.dtype))

    def _crop(
        self, picture: WantedPicture, record: dict[str, Any], persons: list[PersonBox], out: np.ndarray
    ) -> list[np.ndarray]:
        """Cut the persons out into `out`; their matrices, image (mirrored or not) to crop."""
        matrices = [person_matrix(person, self.input_size) for person in persons]
        size = (int(record["width"]), int(record["height"]))
        factor = _reduction(matrices) if self.scaled_decode else 1
        image = decode_picture(picture.where, picture.sample["jpg"], factor, size)
        for person, matrix, crop in zip(persons, matrices, out, strict=True):
            if factor > 1:
                matrix = reduced_matrix(matrix, factor, size[0], image.shape[1], person.mirrored)
            crop_image(image, matrix, self.input_size, person.mirrored, out=crop)
        return matrices

    def generator(self, key: str) -> np.random.Generator:
        """The generator of one person in this epoch, by its key `<dataset>/<image key>#<person id>`."""
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        return np.random.default_rng([self.seed, self.epoch or 0, int.from_bytes(digest, "little")])


def decode_picture(where: str, jpeg: bytes, factor: int, size: tuple[int, int]) -> np.ndarray:
    """The decoded image, RGB uint8, `factor` times smaller.

    Args:
        where: what messages call it.
        jpeg: its file.
        factor: 1, 2, 4 or 8.
        size: (width, height) of the whole picture, as its record says.

    Raises:
        DataError: it cannot be decoded, or has another size (width, height) than its record says.
    """
    try:
        image = cv2.imdecode(np.frombuffer(jpeg, dtype=np.uint8), _REDUCED[factor])
    except cv2.error as err:
        raise DataError(f"{where}: cannot be decoded ({err.err}). {AGAIN}") from err
    if image is None:
        raise DataError(f"{where}: cannot be decoded; {len(jpeg)} bytes, starting with {jpeg[:4]!r}. {AGAIN}")
    expected = (-(-size[0] // factor), -(-size[1] // factor))
    if image.shape[1::-1] != expected:
        raise DataError(
            f"{where}: decodes to {image.shape[1]} x {image.shape[0]} pixels, its record says {expected[0]} x"
            f" {expected[1]}. Correct the annotations' width and height (or the picture's EXIF orientation) and shard"
            " again."
        )
    if _REDUCED[factor] == getattr(cv2, "IMREAD_COLOR_RGB", None):
        return image
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)


def _reduction(matrices: list[np.ndarray]) -> int:
    """By how much a picture can be reduced so that no crop is magnified: 1, 2, 4 or 8."""
    shrink = 1 / max(float(np.hypot(matrix[0, 0], matrix[1, 0])) for matrix in matrices)
    return max((factor for factor in _REDUCED if factor <= shrink), default=1)


def reduced_matrix(matrix: np.ndarray, factor: int, width: int, reduced_width: int, mirrored: bool) -> np.ndarray:
    """A crop's matrix for the reduced picture, whose pixel covers factor x factor pixels.

    Args:
        matrix: (2, 3), from pixels of the full picture, mirrored or not.
        factor: how many times smaller the decoded picture is.
        width: of the full picture.
        reduced_width: of the decoded one, width / factor rounded up.
        mirrored: whether `matrix` is for the mirrored picture.
    """
    center = (factor - 1) / 2
    x = width - 1 - factor * (reduced_width - 1) - center if mirrored else center
    return np.column_stack([matrix[:, :2] * factor, matrix[:, :2] @ [x, center] + matrix[:, 2]])
