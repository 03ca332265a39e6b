from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from cigpose.config import Config, config_from_mapping, load_preset
from cigpose.deploy.export import export_onnx
from cigpose.model.estimator import PoseEstimator, build_model
from cigpose.model.weights import save_weights


def tiny_config(**evaluate: object) -> Config:
    values = load_preset("quickstart").to_mapping()
    values["model"]["input_size"] = [64, 96]
    values["model"]["backbone"] |= {"widen_factor": 0.125}
    values["model"]["head"] |= {"hidden": 32, "gau_s": 16}
    values["evaluate"] |= {"batch": 4, **evaluate}
    return config_from_mapping(values)


@pytest.fixture(scope="session")
def config() -> Config:
    return tiny_config()


@pytest.fixture(scope="session")
def model(config: Config) -> PoseEstimator:
    """Perturbed away from its nearly constant start, so that equality of outputs means something."""
    torch.manual_seed(0)
    model = build_model(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="session")
def checkpoint(model: PoseEstimator, config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_weights(path, model.state_dict(), config)
    return path


@pytest.fixture(scope="session")
def picture() -> np.ndarray:
    """Smooth blobs: (120, 160, 3) uint8 BGR."""
    rng = np.random.default_rng(3)
    small = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return small.repeat(10, axis=0).repeat(10, axis=1)


@pytest.fixture(scope="session")
def exported(model: PoseEstimator, config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as ONNX; takes seconds."""
    return export_onnx(model, config, tmp_path_factory.mktemp("onnx") / "model.onnx")


def well_conditioned(model: PoseEstimator, images: torch.Tensor) -> torch.Tensor:
    """(B,) bool: crops for which rounding does not decide which keypoint CIM replaces."""
    with torch.no_grad():
        single, double = model(images)[0], copy.deepcopy(model).double()(images.double())[0]
    return (single - double).abs().amax(dim=(1, 2)) < 1e-3
