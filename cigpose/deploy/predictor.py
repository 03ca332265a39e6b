"""Poses of people in pictures: five lines from a photograph to keypoints.

    import cigpose
    predictor = cigpose.Predictor.load("models:/cigpose-quickstart@champion", detector="yolox_nano.onnx")
    for person in predictor("photo.jpg"):
        print(person["left_wrist"].x, person["left_wrist"].score)

N persons, K keypoints. Boxes of persons come from the caller, else from the detector; without one the whole picture is
the box of one person.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Self, TypeAlias, overload

import numpy as np
import torch
from torch import nn

from cigpose.config import Config, load_preset
from cigpose.crop import box_to_center_scale, crop_image, crop_matrix, crop_to_image, fix_aspect_ratio
from cigpose.deploy.detector import Detector
from cigpose.deploy.images import MAX_MEGAPIXELS, Image, read_image
from cigpose.deploy.models import calibration_beside, find_model, preset_of
from cigpose.deploy.onnx import CONFIG_KEY, OnnxModel
from cigpose.deploy.poses import Keypoint, PosedPerson, Poses
from cigpose.deploy.public_onnx import META_KEY, PublicOnnxModel
from cigpose.deploy.recipe import Recipe
from cigpose.deploy.sessions import open_session
from cigpose.evaluate.calibration import Calibration
from cigpose.evaluate.oks import person_scores
from cigpose.evaluate.predict import predict_crops
from cigpose.model.device import choose_device
from cigpose.model.weights import load_checkpoint

__all__ = ["MAX_MEGAPIXELS", "Image", "Keypoint", "PosedPerson", "Poses", "Predictor", "check_boxes", "read_image"]

Boxes: TypeAlias = np.ndarray | Sequence[Sequence[float]]
"""(N, 4) x0, y0, x1, y1 of persons in image pixels, or (N, 5) with a score."""

PICTURES_AT_ONCE = 16
"""Pictures of a generator that are in memory together."""


class Predictor:
    """A pose model with everything around it: detecting, cropping, batching, decoding, un-cropping, calibrating.

    Several threads may use one predictor at once.

    Args:
        model: gives (simcc_x, simcc_y) of float32 images; a network of ours or one of onnxruntime.
        config: of the model, or the recipe of another network.
        device: where the model runs; it is moved there. None: the GPU if there is one.
        flip_test: average with the mirror image: twice the work for about a point of AP, as papers report it.
        detector: finds the people where no boxes are given.
        calibration: makes probabilities of scores.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config | Recipe,
        *,
        device: torch.device | str | None = None,
        flip_test: bool = False,
        detector: Detector | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        on_cpu = device is None and isinstance(model, (OnnxModel, PublicOnnxModel))
        self.device = choose_device("cpu" if on_cpu else device)
        self.model = model.to(self.device).eval()
        self.recipe = Recipe.of(config) if isinstance(config, Config) else config
        self.keypoint_set = self.recipe.keypoint_set
        self.flip_test, self.detector, self.calibration = flip_test, detector, calibration
        index = torch.as_tensor(self.keypoint_set.flip_index, device=self.device)
        self._flip_index = index if flip_test else None

    @classmethod
    def load(
        cls,
        model: str | Path,
        config: Config | None = None,
        *,
        device: torch.device | str | None = None,
        flip_test: bool = False,
        detector: str | Path | Detector | None = None,
        threads: int = 0,
    ) -> Self:
        """A predictor from a file, a folder or a registry.

        Args:
            model: our model.safetensors or .onnx, an .onnx of cigpose-onnx's format, an official .pth, a folder with
                model.safetensors, or `models:/NAME@champion` (see `cigpose.deploy.models.find_model`).
            config: needed for an official .pth that is not named as a preset.
            device: see `Predictor`.
            flip_test: see `Predictor`.
            detector: a `Detector`, or its ONNX file.
            threads: of onnxruntime; 0 leaves it the choice.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it cannot be used, or the registry does not have it.
        """
        path = find_model(model)
        finder = Detector(detector, threads=threads) if isinstance(detector, (str, Path)) else detector
        network, recipe = _load_network(path, config, threads)
        calibration = calibration_beside(path)
        return cls(network, recipe, device=device, flip_test=flip_test, detector=finder, calibration=calibration)

    @overload
    def __call__(self, images: Image, boxes: Boxes | None = None) -> Poses: ...

    @overload
    def __call__(
        self, images: list[Image] | tuple[Image, ...], boxes: Sequence[Boxes | None] | None = None
    ) -> list[Poses]: ...

    @overload
    def __call__(self, images: Iterator[Image], boxes: Iterable[Boxes | None] | None = None) -> Iterator[Poses]: ...

    def __call__(self, images, boxes=None):  # type: ignore[no-untyped-def]  # the overloads say it
        """The poses of a picture, of a list of pictures, or, as they come, of a generator of pictures.

        Args:
            images: a picture is a path, the bytes of a file, uint8 (H, W, 3) **BGR** as OpenCV has it, a tensor
                (3, H, W) **RGB** (uint8, or floats from 0 to 1), or a picture of Pillow.
            boxes: of the picture's persons, (N, 4) x0, y0, x1, y1 in image pixels, or (N, 5) with a score; for several
                pictures as many of these. None: those the detector finds; without a detector the whole picture.

        Returns: `Poses`; for a list a list of them, for a generator a generator.

        Raises:
            FileNotFoundError: there is no such picture.
            ValueError: it cannot be decoded, or the boxes are not boxes.
        """
        if isinstance(images, (list, tuple)):
            boxes = [None] * len(images) if boxes is None else boxes
            if len(boxes) != len(images):
                raise ValueError(f"boxes: {len(boxes)} for {len(images)} pictures; give one entry a picture, or None.")
            return self.predict_many(images, boxes)
        if isinstance(images, Iterator):
            return self._predict_stream(images, itertools.repeat(None) if boxes is None else iter(boxes))
        return self.predict_many([images], [boxes])[0]

    def predict_many(self, images: Iterable[Image], boxes: Iterable[Boxes | None]) -> list[Poses]:
        """The poses of several pictures; crops of different pictures share batches.

        Args:
            images: see `__call__`.
            boxes: as many entries, see `__call__`.
        """
        crops: list[np.ndarray] = []
        people = []
        for image, wanted in zip(images, boxes, strict=True):
            pixels = read_image(image)
            if wanted is None and self.detector is not None:
                wanted = self.detector(pixels)
            corners, box_scores = check_boxes(wanted, (pixels.shape[1], pixels.shape[0]))
            center, scale = box_to_center_scale(corners, self.recipe.box_padding)
            scale = fix_aspect_ratio(scale, self.recipe.input_size)
            crops += [self._crop(pixels, c, s) for c, s in zip(center, scale, strict=True)]
            people.append((pixels, corners, box_scores, center, scale))
        keypoints, scores = self._predict_crops(crops)
        poses, start = [], 0
        for pixels, corners, box_scores, center, scale in people:
            rows = slice(start, start := start + len(corners))
            moved = crop_to_image(keypoints[rows], center, scale, self.recipe.input_size)
            poses.append(self._poses(pixels, moved, scores[rows], corners, box_scores))
        return poses

    def _predict_stream(self, images: Iterator[Image], boxes: Iterator[Boxes | None]) -> Iterator[Poses]:
        while group := list(itertools.islice(images, PICTURES_AT_ONCE)):
            wanted = list(itertools.islice(boxes, len(group)))
            if len(wanted) < len(group):
                raise ValueError("boxes: they end before the pictures do; give one entry a picture, or None.")
            yield from self.predict_many(group, wanted)

    def _poses(
        self, image: np.ndarray, keypoints: np.ndarray, raw: np.ndarray, corners: np.ndarray, box_scores: np.ndarray
    ) -> Poses:
        if self.calibration is None:
            scores = np.clip(raw, 0, 1)
        else:
            scores = self.calibration.probabilities(raw, self.keypoint_set)
        counts = raw > self.recipe.keypoint_score_threshold
        mean = np.where(counts, scores, 0).sum(axis=1, dtype=np.float64) / np.maximum(counts.sum(axis=1), 1)
        return Poses(
            keypoint_set=self.keypoint_set,
            keypoints=keypoints.astype(np.float32),
            scores=scores,
            raw_scores=raw,
            person_scores=np.clip(box_scores, 0, 1) * mean,
            raw_person_scores=person_scores(box_scores, raw, self.recipe.keypoint_score_threshold),
            bbox_xyxy=corners,
            box_scores=box_scores,
            image_size=(image.shape[1], image.shape[0]),
            calibrated=self.calibration is not None,
            image=image,
        )

    def _crop(self, pixels: np.ndarray, center: np.ndarray, scale: np.ndarray) -> np.ndarray:
        matrix = crop_matrix(center, scale, 0.0, self.recipe.input_size)
        return crop_image(pixels, matrix, self.recipe.input_size)[..., ::-1]  # RGB

    def _predict_crops(self, crops: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Crop pixels (N, K, 2) and scores (N, K)."""
        num_keypoints, batch = len(self.keypoint_set), self.recipe.batch
        keypoints = np.zeros((len(crops), num_keypoints, 2), dtype=np.float32)
        scores = np.zeros((len(crops), num_keypoints), dtype=np.float32)
        for start in range(0, len(crops), batch):
            some = torch.from_numpy(np.stack(crops[start : start + batch])).to(self.device)
            rows = slice(start, start + batch)
            keypoints[rows], scores[rows] = predict_crops(self.model, some, self._flip_index)
        if not np.isfinite(scores).all():
            raise ValueError("model: gives scores that are NaN or infinite. Its weights are broken; use another file.")
        return keypoints, scores


def _load_network(path: Path, config: Config | None, threads: int) -> tuple[nn.Module, Config | Recipe]:
    if path.suffix == ".onnx":
        session = open_session(path, threads)
        metadata = session.get_modelmeta().custom_metadata_map
        if META_KEY in metadata and CONFIG_KEY not in metadata:
            public = PublicOnnxModel(session, path)
            return public, public.recipe
        exported = OnnxModel(path, threads=threads)
        return exported, exported.config
    if config is None and (preset := preset_of(path)):
        config = load_preset(preset)
    model = load_checkpoint(path, config)
    return model, model.config


def check_boxes(boxes: Boxes | None, image_size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Boxes of persons as they are used.

    Args:
        boxes: see `Predictor.__call__`.
        image_size: (width, height) of the picture.

    Returns: corners (N, 4) float32 and box scores (N,) float64, 1 where not given.

    Raises:
        ValueError: they are not boxes, or not of this picture: beside it, or beyond it by more than its own size, so
            that their keypoints could not be in it.
    """
    if boxes is None:
        boxes = [[0.0, 0.0, float(image_size[0]), float(image_size[1])]]
    table = np.asarray(boxes, dtype=np.float64)
    if table.size == 0:
        return np.zeros((0, 4), dtype=np.float32), np.zeros(0)
    if table.ndim != 2 or table.shape[1] not in (4, 5):
        raise ValueError(f"boxes: expected (N, 4) x0, y0, x1, y1, or (N, 5) with a score; got shape {table.shape}.")
    bad = ~(np.isfinite(table).all(axis=1) & (table[:, 2] > table[:, 0]) & (table[:, 3] > table[:, 1]))
    if bad.any():
        box = table[np.flatnonzero(bad)[0]].tolist()
        raise ValueError(
            f"boxes: {box} is not a box; expected x0, y0, x1, y1 with x1 > x0 and y1 > y0. Is it x, y, w, h?"
        )
    size = np.array(image_size)
    first, last = table[:, 0:2], table[:, 2:4]
    away = (last <= 0) | (first >= size) | (first < -size) | (last > 2 * size)
    if away.any():
        box = table[np.flatnonzero(away.any(axis=1))[0], :4].tolist()
        raise ValueError(
            f"boxes: {box} is beside the picture of {image_size[0]} x {image_size[1]} pixels, or beyond it by more "
            "than its size. Are the boxes of this picture, in its pixels?"
        )
    return table[:, :4].astype(np.float32), table[:, 4] if table.shape[1] == 5 else np.ones(len(table))
