"""Poses of people in pictures: boxes in, keypoints in image pixels out.

N persons, K keypoints. A detector is out of scope: boxes come from the caller; without them the whole picture is the
box of one person.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import nn

from cigpose.config import Config
from cigpose.crop import box_to_center_scale, crop_image, crop_matrix, crop_to_image, fix_aspect_ratio
from cigpose.deploy.onnx import OnnxModel
from cigpose.draw import draw_poses
from cigpose.evaluate.oks import person_scores
from cigpose.evaluate.predict import predict_crops
from cigpose.files.errors import DataError
from cigpose.files.jpeg import jpeg_size
from cigpose.model.device import choose_device
from cigpose.model.weights import load_checkpoint

Image = str | Path | bytes | np.ndarray
"""A file, the bytes of one, or uint8 (H, W, 3) BGR."""


MAX_MEGAPIXELS = 200
"""Larger JPEGs and PNGs are refused before they are decoded (no camera gives them; 1 MB of PNG may unpack to 6 GB).
OpenCV itself refuses any format from 1,074 megapixels on."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Poses:
    """The people of one picture, in the order of their boxes."""

    keypoints: np.ndarray
    """(N, K, 2) float32 x, y in image pixels."""
    scores: np.ndarray
    """(N, K) float32, raw SimCC maxima."""
    person_scores: np.ndarray
    """(N,) float64: box score times the mean score of the keypoints above the threshold of the evaluation."""
    bbox_xyxy: np.ndarray
    """(N, 4) float32."""
    image_size: tuple[int, int]
    """(width, height)."""

    def __len__(self) -> int:
        return len(self.keypoints)

    @classmethod
    def from_records(
        cls, persons: Sequence[Mapping[str, Any]], image_size: tuple[int, int], num_keypoints: int
    ) -> Poses:
        """What `to_records` was made of, as exactly as it was written."""
        triples = np.array([person["keypoints"] for person in persons], np.float32).reshape(-1, num_keypoints, 3)
        return cls(
            keypoints=triples[..., :2],
            scores=triples[..., 2],
            person_scores=np.array([person["score"] for person in persons], np.float64),
            bbox_xyxy=np.array([person["bbox_xyxy"] for person in persons], np.float32).reshape(-1, 4),
            image_size=image_size,
        )

    def to_records(self) -> list[dict[str, Any]]:
        """One JSON-ready mapping per person: `bbox_xyxy`, `score`, `keypoints` [[x, y, score], ...]."""
        triples = np.concatenate([self.keypoints, self.scores[..., None]], axis=2).astype(np.float64)
        return [
            {
                "bbox_xyxy": np.round(box.astype(np.float64), 2).tolist(),
                "score": round(float(score), 4),
                "keypoints": [[round(x, 2), round(y, 2), round(confidence, 4)] for x, y, confidence in person.tolist()],
            }
            for box, score, person in zip(self.bbox_xyxy, self.person_scores, triples, strict=True)
        ]


class Predictor:
    """A pose model with everything around it: decoding, cropping, flip test, batching, un-cropping.

    Args:
        model: gives (simcc_x, simcc_y) of float32 images; a network of ours or an `OnnxModel`.
        config: of the model: keypoint set, input size, box padding, flip test, batch.
        device: where the model runs; it is moved there. None: the GPU if there is one.
        flip_test: average with the mirror image; None: as `config.evaluate` says.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        *,
        device: torch.device | str | None = None,
        flip_test: bool | None = None,
    ) -> None:
        self.device = choose_device("cpu" if device is None and isinstance(model, OnnxModel) else device)
        self.model = model.to(self.device).eval()
        self.config = config
        self.keypoint_set = config.keypoint_set
        self.flip_test = config.evaluate.flip_test if flip_test is None else flip_test
        index = torch.as_tensor(self.keypoint_set.flip_index, device=self.device)
        self._flip_index = index if self.flip_test else None

    @classmethod
    def load(
        cls,
        path: str | Path,
        config: Config | None = None,
        *,
        device: torch.device | str | None = None,
        flip_test: bool | None = None,
        threads: int = 0,
    ) -> Predictor:
        """A predictor from a file.

        Args:
            path: our model.safetensors or .onnx, or an official .pth.
            config: needed for files that do not carry it (.pth).
            device: see `Predictor`.
            flip_test: see `Predictor`.
            threads: of onnxruntime, for .onnx; 0 leaves it the choice.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it cannot be used.
        """
        path = Path(path)
        if path.suffix == ".onnx":
            exported = OnnxModel(path, threads=threads)
            return cls(exported, exported.config, device=device, flip_test=flip_test)
        model = load_checkpoint(path, config)
        return cls(model, model.config, device=device, flip_test=flip_test)

    def __call__(self, image: Image, boxes_xyxy: np.ndarray | Sequence[Sequence[float]] | None = None) -> Poses:
        """The poses of one picture.

        Args:
            image: file, bytes of a file, or uint8 (H, W, 3) BGR array.
            boxes_xyxy: (N, 4) boxes of persons in image pixels, or (N, 5) with a score; None: the whole picture.

        Raises:
            FileNotFoundError: there is no such picture.
            ValueError: it cannot be decoded, or the boxes are not boxes.
        """
        return self.predict_many([image], [boxes_xyxy])[0]

    def predict_many(
        self, images: Iterable[Image], boxes_xyxy: Iterable[np.ndarray | Sequence[Sequence[float]] | None]
    ) -> list[Poses]:
        """The poses of several pictures; crops of different pictures share batches.

        Args:
            images: see `__call__`.
            boxes_xyxy: as many entries, see `__call__`.
        """
        crops, people = [], []
        for image, boxes in zip(images, boxes_xyxy, strict=True):
            pixels = read_image(image)
            size = pixels.shape[1], pixels.shape[0]
            corners, box_scores = check_boxes(boxes, size)
            center, scale = box_to_center_scale(corners, self.config.augmentation.box_padding)
            scale = fix_aspect_ratio(scale, self.config.model.input_size)
            crops += [self._crop(pixels, c, s) for c, s in zip(center, scale, strict=True)]
            people.append((size, corners, box_scores, center, scale))
        keypoints, scores = self._predict_crops(crops)
        poses, start = [], 0
        for size, corners, box_scores, center, scale in people:
            rows = slice(start, start := start + len(corners))
            moved = crop_to_image(keypoints[rows], center, scale, self.config.model.input_size)
            threshold = self.config.evaluate.keypoint_score_threshold
            poses.append(
                Poses(
                    keypoints=moved.astype(np.float32),
                    scores=scores[rows],
                    person_scores=person_scores(box_scores, scores[rows], threshold),
                    bbox_xyxy=corners,
                    image_size=size,
                )
            )
        return poses

    def draw(self, image: Image, poses: Poses, **options: Any) -> np.ndarray:
        """The picture with the poses on it, uint8 (H, W, 3) BGR; options of `draw_poses`."""
        return draw_poses(read_image(image), poses.keypoints, poses.scores, self.keypoint_set, **options)

    def _crop(self, pixels: np.ndarray, center: np.ndarray, scale: np.ndarray) -> np.ndarray:
        matrix = crop_matrix(center, scale, 0.0, self.config.model.input_size)
        return crop_image(pixels, matrix, self.config.model.input_size)[..., ::-1]  # RGB

    def _predict_crops(self, crops: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Crop pixels (N, K, 2) and scores (N, K)."""
        num_keypoints, batch = len(self.keypoint_set), self.config.evaluate.batch
        keypoints = np.zeros((len(crops), num_keypoints, 2), dtype=np.float32)
        scores = np.zeros((len(crops), num_keypoints), dtype=np.float32)
        for start in range(0, len(crops), batch):
            some = torch.from_numpy(np.stack(crops[start : start + batch])).to(self.device)
            rows = slice(start, start + batch)
            keypoints[rows], scores[rows] = predict_crops(self.model, some, self._flip_index)
        if not np.isfinite(scores).all():
            raise ValueError("model: gives scores that are NaN or infinite. Its weights are broken; use another file.")
        return keypoints, scores


def read_image(image: Image) -> np.ndarray:
    """Pixels of a picture, turned as its EXIF says: uint8 (H, W, 3) BGR.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no picture OpenCV can decode, too large (`MAX_MEGAPIXELS`), or an array of another kind.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(f"picture: expected a uint8 (H, W, 3) BGR array, got {image.dtype} {image.shape}.")
        return image
    name = "picture" if isinstance(image, bytes) else os.fsencode(image).decode("utf-8", "backslashreplace")
    if isinstance(image, bytes):
        content = image
    else:
        if not Path(image).is_file():
            raise FileNotFoundError(f"{name}: no such picture.")
        content = Path(image).read_bytes()
    width, height = _declared_size(content)
    if width * height > MAX_MEGAPIXELS * 1e6:
        raise ValueError(f"{name}: {width} x {height} pixels, allowed are {MAX_MEGAPIXELS} million. Make it smaller.")
    try:
        pixels = cv2.imdecode(np.frombuffer(content, dtype=np.uint8), cv2.IMREAD_COLOR) if content else None
    except cv2.error as err:  # more pixels than OpenCV takes
        raise ValueError(f"{name}: OpenCV refuses to decode it ({err.err}). Give a smaller picture.") from err
    if pixels is None:
        raise ValueError(f"{name}: OpenCV cannot decode these {len(content)} bytes. Give a JPEG, PNG, WebP or BMP.")
    return pixels


def _declared_size(content: bytes) -> tuple[int, int]:
    """(width, height) that a JPEG or PNG says it has; (0, 0) if it says nothing, or is of another format."""
    if content.startswith(b"\x89PNG\r\n\x1a\n") and len(content) >= 24:
        return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")
    with contextlib.suppress(DataError):
        return jpeg_size(content)
    return 0, 0


def check_boxes(
    boxes: np.ndarray | Sequence[Sequence[float]] | None, image_size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
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
