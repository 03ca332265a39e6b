"""Golden models: the deterministic weights, inputs and numbers of the reference (golden/README.md, section 1)."""

from __future__ import annotations

import copy
import functools
import json
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nested import change

from cigpose.config import Config, config_from_mapping, load_preset
from cigpose.model.estimator import CIGPose, build_model, forward_flip_test, normalize

GOLDEN_MODELS = {
    "cigpose-m_crowdpose_256x192": "cigpose-m_1xb64-210e_crowdpose-256x192",
    "cigpose-l_coco_256x192": "cigpose-l_1xb256-420e_coco-256x192",
    "cigpose-m_coco-wholebody_256x192": "cigpose-m_8xb64-420e_coco-wholebody-256x192",
}
"""Preset -> folder of golden/models."""


def _gain(key: str) -> float:
    if key.endswith("pointwise_conv.conv.weight"):
        return 1.0
    if key.startswith("backbone."):
        return math.sqrt(2)
    if key.endswith("aggregate_linear.weight"):
        return 0.1
    return 0.4 if key in ("head.cls_gx.weight", "head.cls_gy.weight") else 1.0


def recipe_tensor(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The reference's value of a tensor, from its name and shape alone."""
    rng = np.random.RandomState(zlib.crc32(key.encode()) & 0xFFFFFFFF)
    last = key.rsplit(".", 1)[-1]
    if last == "num_batches_tracked":
        return torch.zeros((), dtype=torch.int64)
    if last == "running_var":
        value = 0.5 + rng.rand(*shape)
    else:
        value = rng.randn(*shape)
        if last == "gamma":
            value = 0.4 + 0.1 * value
        elif last in ("g", "scale") or (last == "weight" and len(shape) == 1):
            value = 1 + 0.1 * value
        elif last in ("running_mean", "beta", "bias") or key.endswith("canonical_features.weight"):
            value = 0.1 * value
        else:
            value = _gain(key) * value / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(np.asarray(value, np.float32))


@dataclass
class GoldenModel:
    """One reference model: how to build it, and what the original code made of it."""

    config: Config
    shapes: dict[str, tuple[int, ...]]
    state_dict: dict[str, torch.Tensor]
    images: torch.Tensor
    """(2, 3, H, W) float32, normalised."""
    eval: dict[str, np.ndarray]
    train: dict[str, np.ndarray]
    train_numbers: dict[str, Any]
    keypoints: torch.Tensor = field(init=False)
    visible: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.keypoints = torch.from_numpy(self.train["keypoints"])
        self.visible = torch.from_numpy(self.train["visible"])

    @functools.cached_property
    def _pristine(self) -> CIGPose:
        model = build_model(self.config)
        model.load_state_dict(self.state_dict)
        return model.eval()

    def build(self) -> CIGPose:
        """A model with the reference's weights, in evaluation mode."""
        return copy.deepcopy(self._pristine)

    @functools.cached_property
    @torch.no_grad()
    def logits(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the model makes of the images."""
        return self._pristine(self.images)

    @functools.cached_property
    @torch.no_grad()
    def flip_logits(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The same with the flip test."""
        flip_index = torch.from_numpy(self.config.keypoint_set.flip_index)
        return forward_flip_test(self._pristine, self.images, flip_index)


@functools.cache
def load_golden_model(golden: Path, preset: str) -> GoldenModel:
    folder = golden / "models" / GOLDEN_MODELS[preset]
    config = load_preset(preset)
    shapes = {key: tuple(s) for key, s in json.loads((folder / "state_dict_shapes.json").read_text()).items()}
    width, height = config.model.input_size
    bgr = np.random.RandomState(0).randint(0, 256, size=(2, height, width, 3)).astype(np.uint8)
    crops = torch.from_numpy(np.ascontiguousarray(bgr[..., ::-1]))
    return GoldenModel(
        config=config,
        shapes=shapes,
        state_dict={key: recipe_tensor(key, shape) for key, shape in shapes.items()},
        images=normalize(crops).contiguous(),
        eval=dict(np.load(folder / "eval.npz")),
        train=dict(np.load(folder / "train.npz")),
        train_numbers=json.loads((folder / "train.json").read_text()),
    )


@pytest.fixture(params=GOLDEN_MODELS)
def golden_model(request: pytest.FixtureRequest, golden: Path) -> GoldenModel:
    """Each of the reference models in turn."""
    return load_golden_model(golden, request.param)


@pytest.fixture
def small_golden_model(golden: Path) -> GoldenModel:
    """The reference model with the fewest parameters."""
    return load_golden_model(golden, "cigpose-m_crowdpose_256x192")


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., Config]:
    """A function that gives the configuration of a model small enough for fast tests, with changes at dotted paths."""

    def make(**changes: Any) -> Config:
        values = load_preset("quickstart").to_mapping()
        values["model"] |= {"input_size": [64, 64]}
        values["model"]["backbone"] |= {"widen_factor": 0.125, "out_stage": 3}
        values["model"]["head"] |= {"hidden": 32, "gau_s": 16, "final_kernel_size": 3}
        return config_from_mapping(change(values, **changes))

    return make
