"""How much a model loses when the picture changes and the person does not.

Two measurements, each per part:
- corruptions: the same crops blurred, compressed, darkened, made noisy or partly covered. What happens to a crop is a
  function of the corruption's name and the person's key alone, so that two models see the same;
- a pair of datasets of the same scenes (say, with and without a spurious context): the difference with a bootstrap
  interval over scenes.

Corruptions are made to crops after cropping: what a better or worse detector does is not measured here.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from cigpose.config import Config
from cigpose.evaluate.checkpoint import Evaluation
from cigpose.evaluate.coco import evaluate_predictions
from cigpose.evaluate.predict import predict
from cigpose.loader.batches import eval_loader
from cigpose.model.device import choose_device
from cigpose.model.weights import load_checkpoint

Corruption = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""(H, W, 3) uint8 RGB crop and its own generator -> the same shape."""


def blur(crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gaussian blur, sigma 1/64 of the crop's width: 3 pixels at 192."""
    return cv2.GaussianBlur(crop, (0, 0), crop.shape[1] / 64)


def jpeg(crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """JPEG of quality 8."""
    encoded = cv2.imencode(".jpg", crop[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 8])[1]
    decoded = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
    assert decoded is not None
    return decoded[..., ::-1]


def low_light(crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A quarter of the light, with the shot noise of so few photons and 8-bit steps."""
    dark = crop.astype(np.float32) * 0.25
    return np.clip(
        np.rint(dark + rng.standard_normal(crop.shape, dtype=np.float32) * np.sqrt(dark + 1)), 0, 255
    ).astype(np.uint8)


def noise(crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise of 30 grey levels."""
    noisy = crop.astype(np.float32) + rng.standard_normal(crop.shape, dtype=np.float32) * 30
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def occlusion(crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A rectangle of noise over 10 percent of the crop, anywhere."""
    height, width = crop.shape[:2]
    aspect = rng.uniform(0.6, 1.6)
    h = min(height, round((0.1 * height * width * aspect) ** 0.5))
    w = min(width, round((0.1 * height * width / aspect) ** 0.5))
    top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
    covered = crop.copy()
    covered[top : top + h, left : left + w] = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
    return covered


CORRUPTIONS: dict[str, Corruption] = {
    "blur": blur,
    "jpeg": jpeg,
    "low_light": low_light,
    "noise": noise,
    "occlusion": occlusion,
}


def corrupted(batches: Iterable[Mapping[str, Any]], name: str) -> Iterator[dict[str, Any]]:
    """Evaluation batches with one corruption made to every crop.

    Args:
        batches: as `eval_loader` gives them.
        name: one of `CORRUPTIONS`.

    Raises:
        ValueError: an unknown name.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"corruption {name!r} is not known, expected one of {', '.join(CORRUPTIONS)}.")
    for batch in batches:
        crops = np.asarray(batch["crops"])
        changed = [
            CORRUPTIONS[name](crop, np.random.default_rng(zlib.crc32(f"{name}/{key}".encode())))
            for crop, key in zip(crops, batch["keys"], strict=True)
        ]
        yield {**batch, "crops": torch.from_numpy(np.stack(changed))}


@dataclass(frozen=True, kw_only=True)
class CorruptionTable:
    """Figures of the clean crops and under each corruption."""

    clean: Mapping[str, float]
    """`<part>/<figure>` -> value."""
    corrupted: Mapping[str, Mapping[str, float]]
    """Corruption -> the same."""

    def drop(self, name: str, part: str) -> float:
        """AP lost; nan where there was nothing to measure."""
        before, after = self.clean[f"{part}/AP"], self.corrupted[name][f"{part}/AP"]
        return before - after if before >= 0 and after >= 0 else float("nan")

    def to_markdown(self) -> str:
        """A table of AP, a row per part, and of what each corruption costs."""
        parts = [name.removesuffix("/AP") for name in self.clean if name.endswith("/AP")]
        lines = ["| part | clean | " + " | ".join(self.corrupted) + " |"]
        lines.append("| --- |" + " ---: |" * (1 + len(self.corrupted)))
        for part in parts:
            clean = self.clean[f"{part}/AP"]
            drops = [self.drop(name, part) for name in self.corrupted]
            cells = [f"{-drop:+.3f}" if np.isfinite(drop) else "-" for drop in drops]
            lines.append(f"| {part} | {f'{clean:.3f}' if clean >= 0 else '-'} | " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"


def evaluate_corruptions(
    checkpoint: str | Path,
    config: Config,
    clean: Evaluation,
    *,
    names: Sequence[str] = tuple(CORRUPTIONS),
    shards_root: Path = Path("data/shards"),
    dataset: str | None = None,
    device: torch.device | str | None = None,
) -> CorruptionTable:
    """Measure a model again under each corruption.

    Args:
        checkpoint: as `evaluate_checkpoint` got it.
        config: likewise.
        clean: what `evaluate_checkpoint` gave.
        names: of `CORRUPTIONS`.
        shards_root: folder of the shard folders.
        dataset: None: `config.data.val`.
        device: None: the GPU if there is one.
    """
    device = choose_device(device)
    model = load_checkpoint(checkpoint, None if Path(checkpoint).suffix == ".safetensors" else config).to(device)
    protocol, keypoint_set = clean.config, clean.config.keypoint_set
    table = {}
    for name in names:
        batches = eval_loader(protocol, dataset or config.data.val, rank=0, world=1, root=shards_root)
        flip_test = protocol.evaluate.flip_test
        predictions = predict(model, corrupted(batches, name), keypoint_set, device=device, flip_test=flip_test)
        table[name] = evaluate_predictions(predictions, clean.truth, keypoint_set, protocol.evaluate)
    return CorruptionTable(clean=clean.metrics, corrupted=table)
