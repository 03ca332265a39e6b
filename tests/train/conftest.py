"""A model and data small enough that a training takes a second."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded import Recorder, place
from tiny_training import make_config

from cigpose.config import Config, RenderConfig
from cigpose.render import render_dataset
from cigpose.shard.write import write_dataset
from cigpose.train.loop import train


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


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with _one_thread():
        yield


@pytest.fixture(scope="session")
def whole_run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recorder, dict[str, Any]]:
    """A training that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    config, recorder = make_config(), Recorder()
    with _one_thread():
        return folder, recorder, train(config, place(config, shards, folder), recorder)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
