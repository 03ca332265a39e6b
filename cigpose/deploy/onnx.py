"""An exported network as a network: what `cigpose export` wrote, run by onnxruntime.

B crops, K keypoints, (W, H) of the crop in pixels. The file carries its configuration, so that a `Predictor` needs
nothing else.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cigpose.codec import num_bins
from cigpose.config import Config, config_from_mapping
from cigpose.deploy.sessions import MissingPackageError, open_session
from cigpose.evaluate.checkpoint import measure
from cigpose.model.estimator import Normalize

CONFIG_KEY = "cigpose_config"
OUTPUTS_KEY = "cigpose_outputs"
LOGITS = ("simcc_x", "simcc_y")
DECODED = ("keypoints", "scores")


class OnnxModel(nn.Module):
    """An exported network that is called like the original: float32 images in, (simcc_x, simcc_y) out.

    Whatever its numbers are inside, float32, float16 or int8. One that gives keypoints and scores (`--decoded`) gives
    logits that decode to these; to average them with those of a mirror image means nothing (`decoded`).

    Args:
        path: a file that `export_onnx` wrote.
        threads: of onnxruntime; 0 leaves it the choice.

    Raises:
        FileNotFoundError: there is no such file.
        MissingPackageError: onnxruntime is not installed.
        ValueError: it is not such a file.
    """

    decoded: bool
    """Whether the file gives keypoints and scores in place of logits."""

    def __init__(self, path: str | Path, *, threads: int = 0) -> None:
        super().__init__()
        path = Path(path)
        self.session = open_session(path, threads)
        metadata = self.session.get_modelmeta().custom_metadata_map
        if CONFIG_KEY not in metadata:
            raise ValueError(
                f"{path}: carries no configuration, so it was not written by `cigpose export`. Export again."
            )
        self.config = config_from_mapping(json.loads(metadata[CONFIG_KEY]))
        found = tuple(metadata.get(OUTPUTS_KEY, "").split())
        if found not in (LOGITS, DECODED):
            raise ValueError(
                f"{path}: gives {' and '.join(found)}, expected {' and '.join(LOGITS)}, or {' and '.join(DECODED)}. "
                "Export again."
            )
        self.decoded = found == DECODED
        self.normalize = Normalize()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits as of `PoseEstimator.forward`, computed by onnxruntime on the CPU."""
        if self.decoded:
            simcc_x, simcc_y = self._encode(*self.predict_crops(self.normalize.inverse(images)))
        else:
            simcc_x, simcc_y = self._run(LOGITS, images.detach().cpu().numpy())
        return torch.from_numpy(simcc_x).to(images.device), torch.from_numpy(simcc_y).to(images.device)

    def predict_crops(self, crops: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """What a file of `--decoded` says of crops.

        Args:
            crops: uint8 (B, H, W, 3) RGB.

        Returns: keypoints (B, K, 2) in crop pixels and scores (B, K), float32.
        """
        keypoints, scores = self._run(DECODED, crops.cpu().numpy())
        return keypoints, scores

    def _run(self, outputs: tuple[str, str], pixels: np.ndarray) -> list[np.ndarray]:
        return self.session.run(list(outputs), {self.session.get_inputs()[0].name: np.ascontiguousarray(pixels)})

    def _encode(self, keypoints: np.ndarray, scores: np.ndarray) -> list[np.ndarray]:
        """Logits that have these maxima, at these places."""
        simcc = self.config.model.simcc
        axes = []
        for axis, bins in enumerate(num_bins(self.config.model.input_size, simcc.split_ratio)):
            place = np.rint(keypoints[..., axis] * simcc.split_ratio).astype(np.int64).clip(0, bins - 1)
            logits = np.full((*scores.shape, bins), np.minimum(scores.min(initial=0), 0) - 1, np.float32)
            np.put_along_axis(logits, place[..., None], scores[..., None], axis=2)
            axes.append(logits)
        return axes


def require_packages(*modules: str) -> None:
    """See that packages are there which only ONNX files need.

    Raises:
        MissingPackageError: some are not.
    """
    missing = []
    for module in modules:
        try:
            __import__(module)
        except ModuleNotFoundError:
            missing.append(module)
    if missing:
        raise MissingPackageError(
            f"{', '.join(missing)} not installed, which ONNX files need. Run `pip install {' '.join(missing)}`."
        )


def onnx_figures(exported: Path, config: Config, shards_root: Path) -> dict[str, float]:
    """`whole_onnx/<figure>` -> value of an exported file over all keypoints, where `registry.measure_onnx` asks for it.

    Raises:
        FileNotFoundError, ValueError: shards or labels are missing, or do not fit.
    """
    if not config.registry.measure_onnx:
        return {}
    figures = measure(OnnxModel(exported), config, shards_root=shards_root)
    return {
        name.replace("whole/", "whole_onnx/"): value for name, value in figures.items() if name.startswith("whole/")
    }
