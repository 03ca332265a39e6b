"""The training step on a GPU against the CPU. Skipped without one; `make gpu-check` runs these first."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recorded import KilledError, Recorder, place
from tiny_training import make_config
from torch import Tensor, nn

from cigpose.config import AugmentationStage, Config, config_from_mapping, load_preset
from cigpose.keypoints import COCO_WHOLEBODY
from cigpose.loader.pixels import PixelDraw
from cigpose.model.estimator import build_model
from cigpose.model.hgnn import HGNN
from cigpose.render import render_dataset
from cigpose.shard.write import write_dataset
from cigpose.train.build import state_around
from cigpose.train.divergence import NonFiniteLossError
from cigpose.train.loop import train
from cigpose.train.snapshots import Snapshot
from cigpose.train.state import TrainState
from cigpose.train.step import Copier, train_step

CPU = torch.device("cpu")


def make_quickstart(precision: str) -> Config:
    """The quickstart with its network and recipe, on fewer people: a minute at most on any GPU."""
    values = load_preset("quickstart").to_mapping()
    values["data"]["render"]["rendered-train"] |= {"num_images": 160}
    values["data"]["render"]["rendered-val"] |= {"num_images": 16}
    values["train"] |= {"epochs": 3, "precision": precision, "log_every_steps": 10}
    values["train"]["schedule"] = {
        "warmup_steps": 10,
        "cosines": [{"begin_epoch": 0, "end_epoch": 3, "final_factor": 0.1}],
    }
    values["train"]["checkpoint"] |= {"every_steps": 20, "every_minutes": None}
    values["train"]["cluster"] = {"num_workers": 1}
    return config_from_mapping(values)


@pytest.fixture
def gpu() -> torch.device:
    """The first GPU; tests that need it are skipped without."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA GPU here")
    return torch.device("cuda", 0)


def make_state(device: torch.device, **changes: Any) -> TrainState:
    config = make_config(**changes)
    torch.manual_seed(0)
    return state_around(build_model(config).to(device), config, device)


def make_host_batch(device: torch.device, seed: int = 0, size: int = 8) -> dict[str, Any]:
    """As of a loader that leaves pixels to the device."""
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    draw = PixelDraw(AugmentationStage(blur_prob=0.5, median_blur_prob=0.5, dropout_prob=0.7), (48, 64))
    batch = {
        "crops": torch.randint(0, 256, (size, 64, 48, 3), dtype=torch.uint8, generator=generator),
        "keypoints": torch.rand(size, 133, 2, generator=generator) * torch.tensor([48, 64]),
        "visible": torch.ones(size, 133),
        "drawn": torch.from_numpy(np.stack([draw(rng) for _ in range(size)])),
    }
    if device.type == "cuda":
        batch = {name: value.pin_memory() for name, value in batch.items()}
    return {**batch, "keys": [f"random/{seed}-{number}" for number in range(size)]}


def make_batch(device: torch.device, seed: int = 0) -> dict[str, Any]:
    return Copier(device)(make_host_batch(device, seed))


def take_steps(state: TrainState, device: torch.device, seeds: range) -> list[float]:
    losses = [train_step(state, [make_batch(device, s)], rate=1e-3, clip_grad_norm=35.0)["loss"] for s in seeds]
    state.settle()
    return [loss.item() for loss in losses]


@pytest.fixture
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 is float32: TF32, in which torch lets cuDNN convolve, has ten bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait is an error; an event that was asked for is not."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_pixels_are_those_of_the_cpu(gpu: torch.device) -> None:
    found, expected = (make_batch(device, seed=3)["crops"].cpu().int() for device in (gpu, CPU))
    difference = (found - expected).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.01


EVERY = {"model__causal__train_top_k": 133}
"""All keypoints are replaced: where a few are, another rounding may choose others."""


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-3), ("bf16", 0.03), ("fp16", 0.03)])
def test_steps_are_those_of_the_cpu_within_the_error_of_the_precision(
    gpu: torch.device, precision: str, tolerance: float
) -> None:
    expected = take_steps(make_state(CPU, train__precision="fp32", **EVERY), CPU, range(3))
    found = take_steps(make_state(gpu, train__precision=precision, **EVERY), gpu, range(3))
    assert found == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_operation_of_a_step_waits(gpu: torch.device, precision: str, request: pytest.FixtureRequest) -> None:
    state, copier = make_state(gpu, train__precision=precision), Copier(gpu)
    batches = [make_host_batch(gpu, seed) for seed in range(3)]
    for batch in batches[:2]:
        train_step(state, [copier(batch)], rate=1e-3, clip_grad_norm=35.0)
    request.getfixturevalue("no_waiting")
    train_step(state, [copier(batches[2])], rate=1e-3, clip_grad_norm=35.0)
    with pytest.raises(RuntimeError, match=r"[Ss]ynchroniz"):
        next(state.model.parameters()).sum().item()


def test_a_loss_that_is_no_number_moves_no_weight_and_stops_a_step_later(gpu: torch.device) -> None:
    state = make_state(gpu)
    take_steps(state, gpu, range(1))
    before = copy.deepcopy(dict(state.model.named_parameters()))
    bad = make_batch(gpu, seed=7)
    bad["keypoints"][:] = torch.nan
    train_step(state, [bad], rate=1e-3, clip_grad_norm=35.0)
    for name, parameter in state.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    with pytest.raises(NonFiniteLossError, match="random/7-0"):
        train_step(state, [make_batch(gpu)], rate=1e-3, clip_grad_norm=35.0)


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-3), ("bf16", 0.03)])
def test_a_compiled_training_takes_the_steps_of_a_plain_one(
    gpu: torch.device, precision: str, tolerance: float
) -> None:
    plain, compiled = (
        take_steps(make_state(gpu, train__compile=chosen, train__precision=precision, **EVERY), gpu, range(3))
        for chosen in (False, True)
    )
    assert compiled == pytest.approx(plain, rel=tolerance)


@pytest.mark.usefixtures("exact_products")
def test_a_training_goes_on_from_what_was_saved(gpu: torch.device) -> None:
    through, first, second = (make_state(gpu, **EVERY) for _ in range(3))
    expected = take_steps(through, gpu, range(4))[2:]
    take_steps(first, gpu, range(2))
    tensors, values = first.state_dict()
    second.load_state_dict({key: tensor.cpu() for key, tensor in tensors.items()}, values)
    assert take_steps(second, gpu, range(2, 4)) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_quickstart_learns_on_the_gpu_and_a_killed_one_goes_on(
    gpu: torch.device, tmp_path: Path, precision: str
) -> None:
    config = make_quickstart(precision)
    for name in (*config.data.train, config.data.val):
        render_dataset(config.data.render[name], tmp_path / "raw" / name)
        write_dataset(config, name, tmp_path / "raw", tmp_path / "shards")
    where = dataclasses.replace(place(config, tmp_path / "shards", tmp_path), device=gpu)
    with pytest.raises(KilledError):
        train(config, where, Recorder(killed_at=30))
    recorder = Recorder()
    result = train(config, where, recorder)
    assert recorder.started == [20, result["step"]], "from the checkpoint of step 20 to the end"
    logs = [record for record in result["history"] if record["kind"] == "log"]
    assert [log["step"] for log in logs] == sorted({*range(10, result["step"], 10), *(28, 56, 84)}), "each step once"
    assert logs[-1]["loss"] < 0.9 * logs[0]["loss"]
    assert len(recorder.predictions[-1]) > 0 and result["best"]["value"] >= 0


def test_a_snapshot_is_of_its_moment_and_nothing_waits_for_it(
    gpu: torch.device, request: pytest.FixtureRequest
) -> None:
    state, snapshot, batch = make_state(gpu), Snapshot(), make_batch(gpu)
    take_steps(state, gpu, range(2))
    tensors, _ = state.state_dict()
    snapshot.take(tensors)  # pinned memory is taken the first time, which waits
    snapshot.read()
    expected = {key: tensor.clone() for key, tensor in tensors.items()}
    request.getfixturevalue("no_waiting")
    snapshot.take(tensors)
    train_step(state, [batch], rate=1e-3, clip_grad_norm=35.0)
    torch.cuda.set_sync_debug_mode("default")
    kept = snapshot.read()
    assert all(tensor.is_pinned() for tensor in kept.values())
    assert all(torch.equal(kept[key], tensor.cpu()) for key, tensor in expected.items())
    name, moved = next(state.model.named_parameters())
    assert not torch.equal(moved.cpu(), kept[f"model.{name}"])


def test_the_graph_gives_the_same_bits_twice(gpu: torch.device) -> None:
    torch.manual_seed(0)
    net: nn.Module = HGNN(32, 1, COCO_WHOLEBODY).to(gpu)
    x = torch.randn(8, 133, 32, device=gpu, requires_grad=True)

    def gradients() -> list[Tensor]:
        trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
        return list(torch.autograd.grad(net(x).square().sum(), [x, *trained]))

    assert all(torch.equal(first, second) for first, second in zip(gradients(), gradients(), strict=True))
