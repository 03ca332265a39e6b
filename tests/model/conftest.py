"""The reference models one by one (tests/golden/README.md), and a model small enough for fast tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from golden_models import GOLDEN_MODELS, GoldenModel, load_golden_model
from nested import change

from cigpose.config import Config, config_from_mapping, load_preset


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
