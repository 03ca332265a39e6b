"""Networks as ONNX in the format of cigpose-onnx: what others exported, with little said about it.

Input `input`: float32 (1 or B, 3, H, W) normalised RGB; outputs `simcc_x` and `simcc_y`, logits over bins. The metadata
entry `cigpose_meta` is JSON: `input_w`, `input_h`, `split_ratio`, and by choice `mean`, `std`, `padding` and
`keypoint_names`. What it does not say is as that project has it: ImageNet's statistics, boxes enlarged by 1.25, and the
keypoint set that has as many keypoints.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cigpose.deploy.recipe import Recipe
from cigpose.keypoints import KeypointSet, keypoint_set
from cigpose.model.estimator import MEAN_RGB, STD_RGB

META_KEY = "cigpose_meta"
_OUTPUTS = ["simcc_x", "simcc_y"]
_PADDING = 1.25
_SETS = {133: "coco_wholebody", 17: "coco", 14: "crowdpose"}
_BATCH = 32
_COUNTED = 0.2  # keypoints below do not count in a person's score; the evaluation's default


class PublicOnnxModel(nn.Module):
    """A network that is called like ours: float32 images in, (simcc_x, simcc_y) out; several threads may.

    Args:
        session: `cigpose.deploy.sessions.open_session` of the file.
        path: of the file, for messages.

    Raises:
        ValueError: it is not of this format.
    """

    def __init__(self, session: Any, path: Path) -> None:
        super().__init__()
        self._session, self._path = session, path
        meta = self._meta()
        inputs = {item.name: item.shape for item in session.get_inputs()}
        outputs = {item.name: item.shape for item in session.get_outputs()}
        if len(inputs) != 1 or not set(_OUTPUTS) <= set(outputs):
            raise ValueError(
                f"{path}: takes {', '.join(inputs)} and gives {', '.join(outputs)}; expected one input, and simcc_x "
                "and simcc_y. Export it again."
            )
        (self._input, shape), *_ = inputs.items()
        self._batch = shape[0] if isinstance(shape[0], int) else None
        self._scale, self._shift = self._normalisation(meta)
        num_keypoints = outputs["simcc_x"][1]
        self.recipe = Recipe(
            name=path.stem,
            keypoint_set=self._keypoints(meta, num_keypoints),
            input_size=(int(meta["input_w"]), int(meta["input_h"])),
            box_padding=float(meta.get("padding", _PADDING)),
            batch=_BATCH,
            keypoint_score_threshold=_COUNTED,
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of (B, 3, H, W) images that are normalised by ImageNet's statistics."""
        pixels = images.detach().cpu().numpy()
        if self._scale is not None:
            pixels = pixels * self._scale + self._shift
        step = self._batch or max(len(pixels), 1)
        parts = []
        for start in range(0, len(pixels), step):
            some = pixels[start : start + step]
            rows = len(some)
            if rows < step:
                some = np.concatenate([some, np.repeat(some[-1:], step - rows, axis=0)])
            feed = {self._input: np.ascontiguousarray(some, dtype=np.float32)}
            parts.append([output[:rows] for output in self._session.run(_OUTPUTS, feed)])
        simcc_x, simcc_y = (np.concatenate(axis) for axis in zip(*parts, strict=True))
        return torch.from_numpy(simcc_x).to(images.device), torch.from_numpy(simcc_y).to(images.device)

    def _meta(self) -> Mapping[str, Any]:
        text = self._session.get_modelmeta().custom_metadata_map.get(META_KEY)
        try:
            meta = json.loads(text or "")
            if not (meta["input_w"] > 0 and meta["input_h"] > 0 and meta["split_ratio"] > 0):
                raise ValueError("sizes that are not positive")
        except (ValueError, KeyError, TypeError) as err:
            raise ValueError(
                f"{self._path}: its metadata {META_KEY} is not JSON with input_w, input_h and split_ratio ({err}). "
                "Export it again."
            ) from err
        return meta

    def _normalisation(self, meta: Mapping[str, Any]) -> tuple[np.ndarray | None, np.ndarray | float]:
        """From our normalisation to the file's, where it has another; in pixels of 0 to 255, or of 0 to 1."""
        mean, std = (np.asarray(meta.get(key, own), np.float32) for key, own in (("mean", MEAN_RGB), ("std", STD_RGB)))
        if mean.shape != (3,) or std.shape != (3,) or not (std > 0).all():
            raise ValueError(f"{self._path}: its metadata has mean {mean.tolist()} and std {std.tolist()}, not RGB's.")
        if std.max() <= 1:
            mean, std = 255 * mean, 255 * std
        own_mean, own_std = np.array(MEAN_RGB, np.float32), np.array(STD_RGB, np.float32)
        if np.allclose(mean, own_mean, atol=1e-2) and np.allclose(std, own_std, atol=1e-2):
            return None, 0.0
        return (own_std / std).reshape(3, 1, 1), ((own_mean - mean) / std).reshape(3, 1, 1)

    def _keypoints(self, meta: Mapping[str, Any], count: Any) -> KeypointSet:
        names = tuple(meta.get("keypoint_names") or ())
        if not isinstance(count, int):
            count = len(names) or "an unknown number of"
        if count in _SETS:
            known = keypoint_set(_SETS[count])
            if names in ((), known.names):
                return known
        if not names or len(names) != count:
            raise ValueError(
                f"{self._path}: gives {count} keypoints and does not name them; known are {', '.join(_SETS.values())}."
            )
        return KeypointSet.from_mapping(
            {
                "name": str(meta.get("keypoint_set", self._path.stem)),
                "names": list(names),
                "sigmas": [0.05] * len(names),
            }
        )
