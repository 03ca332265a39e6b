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

from cigpose.config import Config, EvaluateConfig
from cigpose.evaluate.checkpoint import Evaluation
from cigpose.evaluate.coco import evaluate_predictions, run_part, score_persons
from cigpose.evaluate.ground_truth import GroundTruth
from cigpose.evaluate.predict import predict
from cigpose.evaluate.predictions import Predictions
from cigpose.keypoints import KeypointSet, parts_with_whole
from cigpose.loader.batches import eval_loader
from cigpose.model.device import choose_device
from cigpose.model.weights import load_checkpoint

Corruption = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""(H, W, 3) uint8 RGB crop and its own generator -> the same shape."""

_RECALLS = np.linspace(0.0, 1.0, 101)


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


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """AP of one part on two versions of the same scenes."""

    part: str
    first: float
    second: float
    low: float
    """2.5 percent quantile of `second - first` over resampled scenes."""
    high: float
    """97.5 percent quantile."""
    scenes: int

    @property
    def difference(self) -> float:
        """`second - first`."""
        return self.second - self.first


def compare_paired(
    first: tuple[Predictions, GroundTruth],
    second: tuple[Predictions, GroundTruth],
    keypoint_set: KeypointSet,
    config: EvaluateConfig,
    *,
    samples: int = 500,
    seed: int = 0,
) -> list[PairedDifference]:
    """AP on two datasets of the same scenes, and how sure the difference is.

    Scenes, not persons, are resampled, and both datasets with the same ones: persons of a scene are not independent,
    and what makes a scene hard makes it hard in both.

    Args:
        first: predictions and labels of one dataset.
        second: of the other; scenes are paired by image id, those in one only are left out.
        keypoint_set: its parts.
        config: the protocol.
        samples: bootstrap samples.
        seed: of the resampling.

    Returns: one entry per part that has a labelled person in both.

    Raises:
        ValueError: no image id is in both datasets.
    """
    shared = sorted(first[1].images.keys() & second[1].images.keys())
    if not shared:
        raise ValueError("paired comparison: the two datasets have no image id in common. Render both with one seed.")
    draws = np.random.default_rng(seed).multinomial(len(shared), np.full(len(shared), 1 / len(shared)), size=samples)
    scored = [score_persons(predictions, truth, keypoint_set, config) for predictions, truth in (first, second)]
    found = []
    for part, members in parts_with_whole(keypoint_set).items():
        tables = [
            _Matches.of(run_part(people, truth, keypoint_set, members, shared))
            for people, (_, truth) in zip(scored, (first, second), strict=True)
        ]
        if min(table.num_truths.sum() for table in tables) == 0:
            continue
        once = np.ones(len(shared), dtype=np.int64)
        differences = np.array([tables[1].average_precision(d) - tables[0].average_precision(d) for d in draws])
        low, high = np.nanquantile(differences, [0.025, 0.975])
        before, after = (table.average_precision(once) for table in tables)
        found.append(PairedDifference(part=part, first=before, second=after, low=low, high=high, scenes=len(shared)))
    return found


def paired_table(differences: Sequence[PairedDifference], names: tuple[str, str]) -> str:
    """A markdown table of paired differences.

    Args:
        differences: as `compare_paired` gives them.
        names: of the two datasets.
    """
    lines = [f"| part | {names[0]} | {names[1]} | difference | 95 % interval |", "| --- | ---: | ---: | ---: | ---: |"]
    for row in differences:
        interval = f"{row.low:+.3f} to {row.high:+.3f}"
        lines.append(f"| {row.part} | {row.first:.3f} | {row.second:.3f} | {row.difference:+.3f} | {interval} |")
    scenes = differences[0].scenes if differences else 0
    return "\n".join(lines) + f"\n\nAP over {scenes} scenes; bootstrap over scenes, paired.\n"


@dataclass(frozen=True, kw_only=True, eq=False)
class _Matches:
    """pycocotools' matches of one part, sorted by score: D predictions, T thresholds, I images."""

    image: np.ndarray
    """(D,) position of the image."""
    hit: np.ndarray
    """(T, D) bool."""
    counted: np.ndarray
    """(T, D) bool: not matched to an ignored person."""
    num_truths: np.ndarray
    """(I,)."""

    @classmethod
    def of(cls, run: Any) -> _Matches:
        """From a finished evaluation; all areas."""
        images = run.evalImgs[: len(run.params.imgIds)]
        thresholds = len(run.params.iouThrs)
        filled = [(i, entry) for i, entry in enumerate(images) if entry is not None]
        empty = [np.zeros((thresholds, 0))]
        scores = np.concatenate([np.zeros(0), *(entry["dtScores"] for _, entry in filled)])
        order = np.argsort(-scores, kind="mergesort")
        matched = np.concatenate(empty + [entry["dtMatches"] for _, entry in filled], axis=1)[:, order] > 0
        ignored = np.concatenate(empty + [entry["dtIgnore"] for _, entry in filled], axis=1)[:, order] > 0
        positions = np.concatenate([np.full(len(entry["dtScores"]), i) for i, entry in filled] or [np.zeros(0)])
        num_truths = np.zeros(len(images), dtype=np.int64)
        for i, entry in filled:
            num_truths[i] = np.count_nonzero(np.asarray(entry["gtIgnore"]) == 0)
        return cls(
            image=positions[order].astype(np.int64), hit=matched & ~ignored, counted=~ignored, num_truths=num_truths
        )

    def average_precision(self, times: np.ndarray) -> float:
        """AP as pycocotools has it, each image taken so many times, (I,); nan without a labelled person."""
        total = int(self.num_truths @ times)
        if total == 0:
            return float("nan")
        weight = times[self.image]
        hits = np.cumsum(self.hit * weight, axis=1)  # (T, D)
        shown = np.cumsum(self.counted * weight, axis=1)
        precision = hits / np.maximum(shown, 1)
        envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        recall = hits / total
        values = []
        for row, steps in zip(envelope, recall, strict=True):
            at = np.searchsorted(steps, _RECALLS, side="left")
            values.append(np.append(row, 0.0)[at])
        return float(np.mean(values))
