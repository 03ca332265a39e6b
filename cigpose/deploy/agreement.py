"""Whether an exported file computes what torch computes.

B crops, K keypoints.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cigpose.config import Config
from cigpose.deploy.sessions import open_session
from cigpose.model.causal import CausalIntervention
from cigpose.model.estimator import normalize

TOLERANCE = 1e-4
"""Largest difference between onnxruntime and torch, relative to the largest output. Sums of a few thousand float32
products in another order differ by about 1e-5; a wrong operator differs by more than 0.1."""

_MEDIAN = {"float16": 0.02, "int8": 0.1}  # of the differences; CIM may choose otherwise and move some for good
_TIE = 2e-6  # confounding scores (0 to 1) so close that rounding decides which is higher
_MAX_TIED_CHOICES = 512
_CHECK_BATCHES = (1, 3)


def example_crops(config: Config, batch: int, seed: int = 0) -> Tensor:
    """Random patches, uint8 (B, H, W, 3)."""
    width, height = config.model.input_size
    rng = np.random.default_rng(seed)
    patches = rng.integers(0, 256, (batch, -(-height // 16), -(-width // 16), 3), dtype=np.uint8)
    crops = patches.repeat(16, axis=1).repeat(16, axis=2)[:, :height, :width]
    return torch.from_numpy(crops)


@torch.inference_mode()
def refuse_different(
    module: nn.Module,
    file: Path,
    path: Path,
    config: Config,
    tolerance: float,
    *,
    decoded: bool,
    numbers: str = "float32",
    crops: Tensor | None = None,
) -> None:
    """See that a file computes what torch does, in batches of several sizes.

    Args:
        module: what was exported, in float32.
        file: the file.
        path: its name, for messages.
        config: of the model.
        tolerance: largest difference of float32.
        decoded: whether it takes uint8 crops.
        numbers: of float16 and int8 the median difference is looked at.
        crops: uint8 (B, H, W, 3) to look at; None: random ones.

    Raises:
        ValueError: it does not.
    """
    session = open_session(file, threads=1)
    names = [output.name for output in session.get_outputs()]
    for batch in _CHECK_BATCHES:
        pixels = example_crops(config, batch, seed=batch) if crops is None else crops[:batch]
        example = pixels if decoded else normalize(pixels).contiguous()
        found = session.run(names, {session.get_inputs()[0].name: example.numpy()})
        if numbers == "float32":
            nearest, allowed = max(_nearest(module, example, found, tolerance)), tolerance
        else:
            nearest, allowed = _median(found, module(example)), _MEDIAN[numbers]
        if not nearest <= allowed:
            raise ValueError(
                f"{path}: onnxruntime differs from torch by {nearest:.2g} of the largest output, allowed is "
                f"{allowed:.2g}. Nothing was written; try another version of torch or onnxruntime."
            )


def _nearest(module: nn.Module, example: Tensor, found: list[np.ndarray], tolerance: float) -> list[float]:
    """Distance of each crop to what torch gives, whichever way it breaks the ties of CIM."""
    distances = _distance(found, module(example)).tolist()
    for row, distance in enumerate(distances):
        crop, outputs = example[row : row + 1], [output[row : row + 1] for output in found]
        for choice in () if distance <= tolerance else _tied_choices(module, crop):
            if distances[row] <= tolerance:
                break
            distances[row] = np.fmin(distances[row], _distance(outputs, _choosing(module, crop, _always(choice)))[0])
    return distances


def _median(found: list[np.ndarray], expected: tuple[Tensor, ...]) -> float:
    """Median difference, relative to the largest output; of the output in which it is largest."""
    pairs = [(ours, theirs.numpy()) for ours, theirs in zip(found, expected, strict=True)]
    return max(float(np.median(np.abs(a - b)) / max(np.abs(b).max(), 1e-12)) for a, b in pairs)


def _distance(found: list[np.ndarray], expected: tuple[Tensor, ...]) -> np.ndarray:
    """(B,) largest difference of each crop's outputs, relative to the largest output.

    Of decoded keypoints the median counts: two bins may be equally high, and the coordinate jumps.
    """
    each = []
    for ours, theirs in zip(found, (tensor.numpy() for tensor in expected), strict=True):
        if ours.shape != theirs.shape:
            return np.full(len(ours), np.inf)
        away = np.abs(ours - theirs).reshape(len(ours), -1) / max(float(np.abs(theirs).max()), 1e-12)
        each.append(np.median(away, axis=1) if ours.shape[-1] == 2 else away.max(axis=1))
    return np.max(each, axis=0)


def _tied_choices(module: nn.Module, crop: Tensor) -> list[Tensor]:
    """What CIM may replace in one crop where confounding scores tie and rounding picks: masks (1, K).

    Every logit of a person follows that choice. Ties are rare in a trained network and the rule in a fresh one.
    """
    cim = next((part for part in module.modules() if isinstance(part, CausalIntervention)), None)
    if cim is None or cim.strategy != "top_k" or cim.eval_top_k == 0:
        return []
    seen: list[Tensor] = []

    def note(score: Tensor) -> Tensor:
        seen.append(score[0])
        return CausalIntervention.select(cim, score)

    _choosing(module, crop, note)
    score = seen[0]
    cut = score.topk(cim.eval_top_k).values[-1]
    sure = torch.nonzero(score > cut + _TIE).flatten().tolist()
    tied = torch.nonzero((score - cut).abs() <= _TIE).flatten().tolist()
    choices = []
    for rest in itertools.islice(itertools.combinations(tied, cim.eval_top_k - len(sure)), _MAX_TIED_CHOICES):
        mask = torch.zeros(1, len(score), dtype=torch.bool)
        mask[0, [*sure, *rest]] = True
        choices.append(mask)
    return choices


def _choosing(module: nn.Module, crop: Tensor, select: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    """Outputs of one crop when CIM replaces what `select` says of the scores (1, K)."""
    cim = next(part for part in module.modules() if isinstance(part, CausalIntervention))
    cim.__dict__["select"] = select
    try:
        outputs: tuple[Tensor, ...] = module(crop)
    finally:
        del cim.__dict__["select"]
    return outputs


def _always(mask: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda score: mask
