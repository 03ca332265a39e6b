"""Which keypoints of a person the causal intervention module (CIM) replaced."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import nn

from cigpose.crop import crop_image, crop_matrix
from cigpose.evaluate.predict import predict_crops
from cigpose.model.causal import CausalIntervention


@torch.inference_mode()
def intervened_keypoints(
    model: nn.Module, image: np.ndarray, center: np.ndarray, scale: np.ndarray, input_size: tuple[int, int]
) -> np.ndarray | None:
    """Predict one person again and see what was replaced.

    Args:
        model: in evaluation mode.
        image: uint8 (H, W, 3) BGR.
        center: (2,) of the crop in image pixels, as in `Predictions`.
        scale: (2,) likewise.
        input_size: (width, height) of the crop.

    Returns: (K,) bool; None if the model has no such module, or it is off.
    """
    module = next((part for part in model.modules() if isinstance(part, CausalIntervention)), None)
    if module is None or module.is_off:
        return None
    seen: list[np.ndarray] = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[1][0].cpu().numpy()))
    try:
        crop = np.empty((input_size[1], input_size[0], 3), dtype=np.uint8)
        rgb = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
        crop_image(rgb, crop_matrix(center, scale, 0.0, input_size), input_size, False, out=crop)
        device = next(model.parameters()).device
        predict_crops(model, torch.from_numpy(crop)[None].to(device))
    finally:
        hook.remove()
    return seen[0] if seen else None
