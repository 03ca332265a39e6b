"""The reference models: their weights and inputs by recipe, the original's numbers, and what our model makes of them.

The recipe is told in tests/golden/README.md.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import zlib
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cigpose import codec
from cigpose.config import Config, load_preset
from cigpose.model.causal import confounding_score
from cigpose.model.estimator import CIGPose, build_model, forward_flip_test, normalize

GOLDEN_MODELS = {
    "cigpose-m_crowdpose_256x192": "cigpose-m_1xb64-210e_crowdpose-256x192",
    "cigpose-l_coco_256x192": "cigpose-l_1xb256-420e_coco-256x192",
    "cigpose-m_coco-wholebody_256x192": "cigpose-m_8xb64-420e_coco-wholebody-256x192",
}
"""Preset -> folder of tests/golden/models."""


def _gain(key: str) -> float:
    if key.endswith("pointwise_conv.conv.weight"):
        return 1.0
    if key.startswith("backbone."):
        return math.sqrt(2)
    if key.endswith("aggregate_linear.weight"):
        return 0.1
    return 0.4 if key in ("head.cls_gx.weight", "head.cls_gy.weight") else 1.0


def recipe_tensor(key: str, shape: tuple[int, ...]) -> Tensor:
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


def recipe_crops(input_size: tuple[int, int]) -> Tensor:
    """The reference's two crops of noise: (2, H, W, 3) uint8 RGB."""
    width, height = input_size
    bgr = np.random.RandomState(0).randint(0, 256, size=(2, height, width, 3)).astype(np.uint8)
    return torch.from_numpy(np.ascontiguousarray(bgr[..., ::-1]))


def recipe_targets(num_keypoints: int, input_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The reference's training targets: (2, K, 2) crop pixels, some outside, and (2, K) visibility."""
    rng = np.random.RandomState(3)
    keypoints = ((rng.rand(2, num_keypoints, 2) * 1.2 - 0.1) * input_size).astype(np.float32)
    visible = (rng.rand(2, num_keypoints) >= 0.15).astype(np.float32)
    return torch.from_numpy(keypoints), torch.from_numpy(visible)


@dataclass
class GoldenModel:
    """One reference model: how to build it, what the original code made of it, and what ours makes of it."""

    name: str
    """Its original configuration, and its folder below `models/`."""
    config: Config
    shapes: dict[str, tuple[int, ...]]
    state_dict: dict[str, Tensor]
    crops: Tensor
    eval: dict[str, np.ndarray]
    train: dict[str, np.ndarray]
    train_numbers: dict[str, Any]
    images: Tensor = field(init=False)
    """(2, 3, H, W) float32, normalised."""
    keypoints: Tensor = field(init=False)
    visible: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.images = normalize(self.crops).contiguous()
        self.keypoints, self.visible = recipe_targets(len(self.config.keypoint_set), self.config.model.input_size)

    @functools.cached_property
    def _pristine(self) -> CIGPose:
        model = build_model(self.config)
        assert isinstance(model, CIGPose)
        model.load_state_dict(self.state_dict)
        return model.eval()

    def build(self) -> CIGPose:
        """A model with the reference's weights, in evaluation mode."""
        return copy.deepcopy(self._pristine)

    @functools.cached_property
    @torch.no_grad()
    def outputs(self) -> dict[str, np.ndarray]:
        """What our model makes of the images, plain and mirrored, under the names of the reference's `eval.npz`."""
        model, seen = self.build(), _Recorder()
        stages = [f"backbone.{name}" for name, _ in model.backbone.named_children()]
        for name in (*stages, "head", "head.final_layer", "head.mlp_pre_gau", "head.gau", "head.cim", "head.gcn"):
            seen.watch(name, model.get_submodule(name))
        flip_logits = forward_flip_test(model, self.images, torch.from_numpy(self.config.keypoint_set.flip_index))
        features = seen.outputs["backbone.stage4"][0]
        found: dict[str, Any] = {
            "backbone_stage_mean_std": np.array([_mean_and_std(seen.outputs[stage][0]) for stage in stages]),
            "feat_channel_mean": features.mean((2, 3)),
            "feat_channel_std": features.std((2, 3), correction=0),
            "feat_sub": features[:, ::32],
            "final_layer_0": seen.outputs["head.final_layer"][0][0].flatten(1),
            "mlp_pre_gau_0": seen.outputs["head.mlp_pre_gau"][0][0],
        }
        for module, name in (("head.gau", "gau"), ("head.gcn", "hgnn")):
            first, second = seen.outputs[module][0]
            found |= {f"{name}_0": first, f"{name}_1_sub": second[:, ::8]}
        for number, prefix in enumerate(("", "flip_")):
            score = confounding_score(*model.head.initial_prediction(seen.outputs["head.gau"][number]))
            found |= {f"{prefix}confound_score": score, f"{prefix}cim_mask": seen.inputs["head.cim"][number][1]}
        for prefix, (simcc_x, simcc_y) in (("", seen.outputs["head"][0]), ("flip_", flip_logits)):
            keypoints, scores = codec.decode(simcc_x, simcc_y)
            found |= {f"{prefix}simcc_x": simcc_x, f"{prefix}simcc_y": simcc_y}
            found |= {f"{prefix}keypoints": keypoints, f"{prefix}scores": scores}
        return {name: np.asarray(value) for name, value in found.items()}


class _Recorder:
    """Inputs and outputs of submodules, call by call."""

    def __init__(self) -> None:
        self.inputs: dict[str, list[Any]] = defaultdict(list)
        self.outputs: dict[str, list[Any]] = defaultdict(list)

    def watch(self, name: str, module: torch.nn.Module) -> None:
        def keep(_module: torch.nn.Module, inputs: Any, output: Any) -> None:
            self.inputs[name].append(inputs)
            self.outputs[name].append(output)

        module.register_forward_hook(keep)


def _mean_and_std(values: Tensor) -> tuple[float, float]:
    return values.double().mean().item(), values.double().std().item()


@functools.cache
def load_golden_model(golden: Path, preset: str) -> GoldenModel:
    """A reference model; the same object for all tests of a session."""
    folder = golden / "models" / GOLDEN_MODELS[preset]
    config = load_preset(preset)
    shapes = {key: tuple(s) for key, s in json.loads((folder / "state_dict_shapes.json").read_text()).items()}
    return GoldenModel(
        name=folder.name,
        config=config,
        shapes=shapes,
        state_dict={key: recipe_tensor(key, shape) for key, shape in shapes.items()},
        crops=recipe_crops(config.model.input_size),
        eval=dict(np.load(folder / "eval.npz")),
        train=dict(np.load(folder / "train.npz")),
        train_numbers=json.loads((folder / "train.json").read_text()),
    )
