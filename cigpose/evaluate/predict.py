"""What a model says about every person of a dataset, in image pixels.

B persons of a batch, K keypoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from cigpose.codec import decode
from cigpose.crop import crop_to_image
from cigpose.evaluate.predictions import FIELDS, Predictions
from cigpose.keypoints import KeypointSet
from cigpose.model.estimator import forward_flip_test, images_for

__all__ = ["Predictions", "predict", "predict_crops"]


def predict(
    model: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    keypoint_set: KeypointSet,
    *,
    device: torch.device | str,
    flip_test: bool = True,
    autocast: torch.dtype = torch.float32,
    progress: Callable[[int], object] | None = None,
) -> Predictions:
    """Run a model over evaluation batches.

    Args:
        model: gives (simcc_x, simcc_y); put into eval mode here, and back afterwards.
        loader: evaluation batches (`cigpose.loader.batches.eval_loader`); every person should come once.
        keypoint_set: its flip pairs are used by the flip test.
        device: where the model is.
        flip_test: average the outputs of the crop and of its mirror image.
        autocast: what the network computes in; logits are float32.
        progress: called after each batch with its number of persons.

    Returns: all persons, in the order of the shards where the batches say their `number`; empty if there are none.
    """
    flip_index = torch.as_tensor(keypoint_set.flip_index, device=device) if flip_test else None
    in_training = [module for module in model.modules() if module.training]  # not all: parts may be frozen
    model.eval()
    parts: list[Predictions] = []
    numbers: list[np.ndarray] = []
    try:
        for batch in loader:
            parts.append(_predict_batch(model, batch, device, flip_index, autocast))
            numbers += [np.asarray(batch["number"])] if "number" in batch else []
            if progress is not None:
                progress(len(parts[-1]))
    finally:
        for module in in_training:
            module.training = True
    if not parts:
        return Predictions.empty(len(keypoint_set))
    predictions = Predictions.concatenate(parts)
    return predictions.select(np.argsort(np.concatenate(numbers))) if numbers else predictions


@torch.inference_mode()
def _predict_batch(
    model: nn.Module,
    batch: Mapping[str, Any],
    device: torch.device | str,
    flip_index: torch.Tensor | None,
    autocast: torch.dtype,
) -> Predictions:
    columns = {  # not the labels, which the batch calls `keypoints` too
        name: np.asarray(batch[name]) for name in FIELDS if name in batch and not name.startswith("keypoint")
    }
    keypoints, scores = predict_crops(model, batch["crops"].to(device, non_blocking=True), flip_index, autocast)
    height, width = batch["crops"].shape[1:3]
    image_keypoints = crop_to_image(keypoints, columns["center"], columns["scale"], (width, height))
    return Predictions(**columns, keypoints=image_keypoints, keypoint_scores=scores)


@torch.inference_mode()
def predict_crops(
    model: nn.Module,
    crops: torch.Tensor,
    flip_index: torch.Tensor | None = None,
    autocast: torch.dtype = torch.float32,
) -> tuple[np.ndarray, np.ndarray]:
    """Keypoints of a batch of crops, in crop pixels.

    Args:
        model: in eval mode.
        crops: uint8 (B, H, W, 3) RGB, on the model's device.
        flip_index: (K,) int64 on the same device to average with the mirror image, or None.
        autocast: what the network computes in.

    Returns: keypoints (B, K, 2) and scores (B, K), float32.

    Raises:
        ValueError: a flip test of a model whose outputs are decoded already.
    """
    if flip_index is not None and getattr(model, "decoded", False):
        raise ValueError("flip test: this file was exported with --decoded; keypoints do not average. Leave it out.")
    images = images_for(model, crops)
    enabled = autocast != torch.float32
    with torch.autocast(crops.device.type, autocast if enabled else None, enabled=enabled):
        simcc_x, simcc_y = model(images) if flip_index is None else forward_flip_test(model, images, flip_index)
    keypoints, scores = decode(simcc_x, simcc_y, simcc_x.shape[-1] / crops.shape[2])
    return keypoints.float().cpu().numpy(), scores.float().cpu().numpy()
