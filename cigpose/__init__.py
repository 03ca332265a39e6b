"""CIGPose whole-body pose estimation: the paper's model, its data, training and evaluation.

>>> import cigpose
>>> config = cigpose.load_preset("cigpose-m_coco-wholebody_256x192")
>>> model = cigpose.build_model(config)                      # model(images) -> (simcc_x, simcc_y)
>>> model = cigpose.load_checkpoint("model.safetensors")     # ours, or an official .pth with its config
>>> predictor = cigpose.Predictor.load("model.safetensors", detector="yolox_nano.onnx")
>>> for person in predictor("photo.jpg"):
...     print(person["left_wrist"])                          # Keypoint(x=..., y=..., score=..., raw_score=...)

Nothing heavy is imported until it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cigpose.config import Config, load_params, load_preset, presets

if TYPE_CHECKING:
    from cigpose import codec
    from cigpose.deploy.predictor import Predictor
    from cigpose.model.estimator import build_model
    from cigpose.model.weights import load_checkpoint

__all__ = ["Config", "Predictor", "build_model", "codec", "load_checkpoint", "load_params", "load_preset", "presets"]


def __getattr__(name: str) -> Any:
    """What needs torch, which takes longer to import than a preset to print."""
    if name == "codec":
        import cigpose.codec

        return cigpose.codec
    if name == "build_model":
        from cigpose.model.estimator import build_model

        return build_model
    if name == "Predictor":
        from cigpose.deploy.predictor import Predictor

        return Predictor
    if name == "load_checkpoint":
        from cigpose.model.weights import load_checkpoint

        return load_checkpoint
    raise AttributeError(f"module 'cigpose' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
