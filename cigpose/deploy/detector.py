"""Boxes of people in pictures, by a detector that others trained: YOLOX or RTMDet as ONNX.

Three kinds of file, told apart by what the graph gives:

- one output (1, M, 5 + classes): YOLOX (arXiv 2107.08430) as its authors' tool exports it; M cells of the strides 8, 16
  and 32 (and 64), centre and log size relative to the cell, or decoded already (`--decode_in_inference`);
- `dets` (1, M, 5) and `labels` (1, M): any detector that MMDeploy exported with its suppression inside. Whether the
  picture goes in as it is (YOLOX, whose first step regroups pixels) or normalised (RTMDet, which begins with a
  convolution) is read off the graph's first step.

The person is class 0, as in COCO. A picture is made smaller to fit in the input's top left corner, the rest is grey.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from cigpose.deploy.sessions import MissingPackageError, open_session
from cigpose.model.estimator import MEAN_RGB, STD_RGB

MIN_SCORE = 0.2
"""Boxes below are left out. Of 117 labelled people of COCO larger than 64 x 64 pixels YOLOX-Nano finds 91.5 % from here
on, with a false box in every second picture; docs/predict.md has the table."""
MAX_OVERLAP = 0.45
"""Of two boxes with a larger intersection over union the worse is left out; YOLOX's own."""

_GREY = 114
_SIDE = 640  # of files that take any size
_STRIDES = ((8, 16, 32), (8, 16, 32, 64))
_REGROUPING = {"Slice", "Split", "Reshape", "SpaceToDepth", "Gather"}  # how exporters write YOLOX's Focus
_EXPECTED = (
    "expected one output (1, cells, 5 + classes) as YOLOX's authors export it, or dets (1, M, 5) and labels (1, M) as "
    "MMDeploy exports YOLOX and RTMDet"
)

Kind = Literal["cells", "boxes", "suppressed"]


class Detector:
    """Finds people; several threads may use one.

    Args:
        path: the ONNX file.
        min_score: boxes below are left out.
        threads: of onnxruntime for one picture; 0 leaves it the choice.

    Raises:
        FileNotFoundError: there is no such file.
        MissingPackageError: onnxruntime is not installed, or onnx, which files with suppression inside need.
        ValueError: it is not such a detector.
    """

    def __init__(self, path: str | Path, *, min_score: float = MIN_SCORE, threads: int = 0) -> None:
        self.path, self.min_score = Path(path), min_score
        if not 0 <= min_score <= 1:
            raise ValueError(f"detector: a smallest score of {min_score} was asked for, expected 0 to 1.")
        self._session = open_session(self.path, threads)
        self._input, self._size = self._read_input()
        self._outputs = self._read_outputs()
        self.kind: Kind = self._read_kind()
        self._normalises = self.kind == "suppressed" and self._begins_with_convolution()
        if self.kind == "cells":
            self._cells, self._strides = self._grid()

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """The people of a picture.

        Args:
            image: uint8 (H, W, 3) BGR.

        Returns: (N, 5) float64 x0, y0, x1, y1 in image pixels, within the picture, and score; best first.
        """
        pixels, ratio = self._letterboxed(image)
        found = self._run(pixels)
        if self.kind == "suppressed":
            dets, labels = found
            people = dets[0][(labels[0] == 0) & (dets[0][:, 4] >= self.min_score)].astype(np.float64)
            people[:, :4] /= ratio
            people = people[np.argsort(-people[:, 4], kind="stable")]
        else:
            people = self._people_of(found[0][0].astype(np.float64), ratio)
        limits = np.array([image.shape[1], image.shape[0]] * 2)
        people[:, :4] = np.clip(people[:, :4], 0, limits)
        return people[(people[:, 2:4] - people[:, :2] >= 1).all(axis=1)]

    def _letterboxed(self, image: np.ndarray) -> tuple[np.ndarray, float]:
        width, height = self._size
        ratio = min(height / image.shape[0], width / image.shape[1])
        fitted = max(int(image.shape[1] * ratio), 1), max(int(image.shape[0] * ratio), 1)
        canvas = np.full((height, width, 3), _GREY, dtype=np.uint8)
        canvas[: fitted[1], : fitted[0]] = cv2.resize(image, fitted, interpolation=cv2.INTER_LINEAR)
        pixels = canvas.transpose(2, 0, 1)[None].astype(np.float32)
        if self._normalises:
            mean, std = (np.array(values[::-1], np.float32).reshape(1, 3, 1, 1) for values in (MEAN_RGB, STD_RGB))
            pixels = (pixels - mean) / std
        return np.ascontiguousarray(pixels), ratio

    def _run(self, pixels: np.ndarray) -> list[np.ndarray]:
        try:
            return self._session.run(self._outputs, {self._input: pixels})
        except Exception as err:  # onnxruntime's own exceptions have no common base
            reason = str(err).strip().splitlines()[0][:200]
            raise ValueError(f"{self.path}: onnxruntime cannot run it ({reason}). Export it again.") from err

    def _people_of(self, rows: np.ndarray, ratio: float) -> np.ndarray:
        """(N, 5) of YOLOX's (M, 5 + classes): cx, cy, w, h, objectness, class scores."""
        scores = rows[:, 4] * rows[:, 5]
        likely = scores >= self.min_score
        rows, scores = rows[likely], scores[likely]
        centers, sizes = rows[:, :2], rows[:, 2:4]
        if self.kind == "cells":
            strides = self._strides[likely]
            centers, sizes = (centers + self._cells[likely]) * strides, np.exp(sizes) * strides
        corners = np.concatenate([centers - sizes / 2, centers + sizes / 2], axis=1) / ratio
        return np.concatenate([corners, scores[:, None]], axis=1)[suppress(corners, scores, MAX_OVERLAP)]

    def _read_input(self) -> tuple[str, tuple[int, int]]:
        inputs = self._session.get_inputs()
        shape = inputs[0].shape
        if len(inputs) != 1 or len(shape) != 4 or shape[1] != 3 or inputs[0].type != "tensor(float)":
            found = ", ".join(f"{item.name} {item.shape} {item.type}" for item in inputs)
            raise ValueError(
                f"{self.path}: takes {found}; expected one picture as float32 (1, 3, height, width). Is it a detector?"
            )
        height, width = (side if isinstance(side, int) else _SIDE for side in shape[2:])
        return inputs[0].name, (width, height)

    def _read_outputs(self) -> list[str]:
        """Names: of rows, or of detections and labels in this order."""
        outputs = {item.name: item for item in self._session.get_outputs()}
        if len(outputs) == 1:
            return list(outputs)
        named = [next((name for name in outputs if word in name.lower()), None) for word in ("dets", "labels")]
        if None in named:
            raise ValueError(f"{self.path}: gives {', '.join(outputs)}; {_EXPECTED}. Export it so.")
        return [name for name in named if name]

    def _read_kind(self) -> Kind:
        """By what comes out for a grey picture: shapes in the file may be symbols."""
        width, height = self._size
        found = self._run(np.full((1, 3, height, width), _GREY, dtype=np.float32))
        if len(found) == 2:
            if found[0].ndim == 3 and found[0].shape[2] == 5 and found[1].shape == found[0].shape[:2]:
                return "suppressed"
        elif found[0].ndim == 3 and found[0].shape[2] > 5:
            # Offsets within a cell are small numbers; decoded centres reach over the whole input.
            return "boxes" if np.abs(found[0][..., :2]).max() > min(self._size) / 2 else "cells"
        shapes = ", ".join(f"{name} {item.shape}" for name, item in zip(self._outputs, found, strict=True))
        raise ValueError(f"{self.path}: gives {shapes}; {_EXPECTED}. Export it so.")

    def _begins_with_convolution(self) -> bool:
        try:
            import onnx
        except ModuleNotFoundError as err:
            raise MissingPackageError(
                f"{self.path}: onnx is not installed, by which a detector with suppression inside is looked at. Run "
                "`pip install onnx`."
            ) from err
        graph = onnx.load(str(self.path), load_external_data=False).graph
        first = {node.op_type for node in graph.node if self._input in node.input and node.op_type != "Shape"}
        if first == {"Conv"}:
            return True
        if first and first <= _REGROUPING | {"Sub", "Div", "Mul", "Cast"}:  # YOLOX, or one that normalises inside
            return False
        steps = ", ".join(sorted(first)) or "nothing"
        raise ValueError(
            f"{self.path}: begins with {steps}; expected YOLOX or RTMDet as MMDeploy exports them. Whether it takes "
            "normalised pixels cannot be told."
        )

    def _grid(self) -> tuple[np.ndarray, np.ndarray]:
        """Column and row of each cell (M, 2), and its stride (M, 1)."""
        width, height = self._size
        found = self._run(np.full((1, 3, height, width), _GREY, dtype=np.float32))[0].shape[1]
        for strides in _STRIDES:
            shapes = [(height // stride, width // stride) for stride in strides]
            if sum(rows * columns for rows, columns in shapes) == found:
                cells = [np.mgrid[:rows, :columns][::-1].reshape(2, -1).T for rows, columns in shapes]
                sides = [np.full((len(cell), 1), stride) for cell, stride in zip(cells, strides, strict=True)]
                return np.concatenate(cells).astype(np.float64), np.concatenate(sides).astype(np.float64)
        raise ValueError(
            f"{self.path}: gives {found} cells for {width} x {height} pixels, which strides 8, 16, 32 (and 64) do not. "
            "Is it YOLOX?"
        )


def suppress(corners: np.ndarray, scores: np.ndarray, max_overlap: float) -> np.ndarray:
    """Rows of the boxes that remain when each removes those that overlap it too much, best first.

    Args:
        corners: (N, 4) x0, y0, x1, y1. Sides count one pixel more than their difference, as YOLOX's authors do.
        scores: (N,).
        max_overlap: a box is removed when its intersection over union with a kept one is above.
    """
    sides = corners[:, 2:] - corners[:, :2] + 1
    areas = sides.prod(axis=1)
    order, kept = np.argsort(-scores, kind="stable"), []
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        low = np.maximum(corners[best, :2], corners[order, :2])
        high = np.minimum(corners[best, 2:], corners[order, 2:])
        shared = np.maximum(high - low + 1, 0).prod(axis=1)
        order = order[shared / (areas[best] + areas[order] - shared) <= max_overlap]
    return np.array(kept, dtype=np.int64)
