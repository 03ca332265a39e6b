"""A model and data small enough that a training takes a second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cigpose.config import Config, RenderConfig, config_from_mapping, load_preset
from cigpose.data.rendered import render_dataset
from cigpose.data.shards import write_dataset


def make_config(**changes: Any) -> Config:
    """The quickstart at a fraction of its size, with changes at dotted paths (`train__epochs=3`)."""
    values = load_preset("quickstart").to_mapping()
    values["name"] = "tiny"
    values["data"]["sharding"]["images_per_shard"] = 10
    values["model"] |= {"input_size": [48, 64]}
    values["model"]["backbone"] |= {"widen_factor": 0.125}
    values["model"]["head"] |= {"hidden": 16, "gau_s": 16, "final_kernel_size": 3}
    values["train"] |= {"epochs": 2, "batch_total": 8, "loss_batch": 8, "log_every_steps": 2, "precision": "fp32"}
    values["train"]["optimizer"] |= {"learning_rate": 0.0012, "learning_rate_batch": 8}
    values["train"]["schedule"] = {
        "warmup_steps": 3,
        "cosines": [{"begin_epoch": 0, "end_epoch": 2, "final_factor": 0.1}],
    }
    values["train"]["validate_every_epochs"] = 1
    values["train"]["ema"] = {"enabled": True, "momentum": 0.01, "gamma": 10.0}
    values["train"]["checkpoint"] = {"every_steps": 3, "every_minutes": None, "keep": 2}
    values["train"]["cluster"] = {"num_workers": 1}
    for path, value in changes.items():
        *parents, last = path.split("__")
        section = values
        for parent in parents:
            section = section[parent]
        section[last] = value
    return config_from_mapping(values)


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., Config]:
    return make_config


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of some rendered people, for training and validation."""
    folder = tmp_path_factory.mktemp("data")
    for seed, (name, images) in enumerate({"rendered-train": 20, "rendered-val": 4}.items()):
        rendered = RenderConfig(seed=seed, num_images=images, image_size=(160, 128), max_persons=2)
        render_dataset(rendered, folder / "raw" / name)
        write_dataset(make_config(), name, folder / "raw", folder / "shards")
    return folder / "shards"


@pytest.fixture
def batch() -> Callable[..., dict[str, Any]]:
    """Random persons: `batch(size, seed)`."""

    def make(size: int, seed: int = 0, input_size: tuple[int, int] = (48, 64)) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        width, height = input_size
        return {
            "crops": torch.randint(0, 256, (size, height, width, 3), dtype=torch.uint8, generator=generator),
            "keypoints": torch.rand(size, 133, 2, generator=generator) * torch.tensor([width, height]),
            "visible": (torch.rand(size, 133, generator=generator) > 0.2).float(),
            "keys": [f"random/{seed}-{i}#1" for i in range(size)],
        }

    return make
