from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from paper_presets import PRESETS
from torch import nn

from cigpose.config import CosineConfig, EMAConfig, OptimizerConfig, ScheduleConfig, load_preset
from cigpose.train import optim

FAMILIES = ("wholebody", "ubody", "crowdpose", "coco")


def _rates(golden: Path, preset: str, steps_per_epoch: int) -> tuple[str, np.ndarray]:
    """The family of a paper model, and the rates of its preset from the base rate of the reference's arrays."""
    family = next(name for name in FAMILIES if name in preset)
    train, facts = load_preset(preset).train, json.loads((golden / "schedules_lr.json").read_text())[family]
    assert train.epochs == facts["epochs"]
    return family, optim.learning_rates(facts["base_lr"], train.schedule, steps_per_epoch, train.epochs)


# Both sides are recursions over thousands of float64 steps, hence 1e-10.


@pytest.mark.parametrize("preset", PRESETS.values())
def test_learning_rates_of_every_paper_model_equal_the_original_ones(golden: Path, preset: str) -> None:
    for file, steps, kept in (("schedules_lr.npz", 20, "[::7]"), ("schedules_lr_5_iters_per_epoch.npz", 5, "")):
        family, rates = _rates(golden, preset, steps)
        expected = np.load(golden / file)[family + kept]
        np.testing.assert_allclose(rates[::7] if kept else rates, expected, rtol=1e-10, err_msg=file)


def test_learning_rates_equal_every_one_of_the_large_set(golden: Path, large_golden: Path) -> None:
    with np.load(large_golden / "schedules_lr.npz") as expected:
        for preset in PRESETS.values():
            family, rates = _rates(golden, preset, 20)
            np.testing.assert_allclose(rates, expected[family], rtol=1e-10, err_msg=preset)


def test_learning_rate_without_pieces_is_constant() -> None:
    rates = optim.learning_rates(0.5, ScheduleConfig(warmup_steps=0), 3, 4)
    assert rates.tolist() == [0.5] * 12


@pytest.mark.parametrize("warmup_steps, expected", [(0, 1.0), (1, 1.0), (2, 1e-5), (100, 1e-5)])
def test_warm_up_starts_at_its_factor(warmup_steps: int, expected: float) -> None:
    rates = optim.learning_rates(1.0, ScheduleConfig(warmup_steps=warmup_steps), 5, 2)
    assert rates[0] == pytest.approx(expected)
    if warmup_steps <= 2:
        assert rates[1:] == pytest.approx(1.0)


def test_cosine_after_the_warm_up_is_the_closed_form() -> None:
    schedule = ScheduleConfig(warmup_steps=3, cosines=(CosineConfig(begin_epoch=1, end_epoch=3, final_factor=0.1),))
    rates = optim.learning_rates(2.0, schedule, 10, 4)
    step = np.arange(20)
    np.testing.assert_allclose(rates[10:30], 0.2 + 1.8 * (1 + np.cos(np.pi * step / 20)) / 2, rtol=1e-12)
    assert np.all(rates[30:] == rates[29])


class _Toy(nn.Module):
    def __init__(self, values: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(values, dtype=dtype))
        self.register_buffer("average", torch.zeros(values, dtype=dtype))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def fill(self, weight: np.ndarray, average: np.ndarray, count: int) -> None:
        with torch.no_grad():
            self.weight.copy_(torch.from_numpy(weight))
        self.average.copy_(torch.from_numpy(average))
        self.count.fill_(int(count))


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-14), ("float32", 5e-7)])
def test_ema_equals_the_original_one_buffers_too(golden: Path, dtype: str, tolerance: float) -> None:
    table = np.load(golden / f"ema_{dtype}.npz")
    model = _Toy(table["param_in"].shape[1], getattr(torch, dtype))
    model.fill(table["param_in"][0], table["buffer_in"][0], 0)
    ema = optim.EMA(model, EMAConfig())
    for row in range(200):
        model.fill(table["param_in"][row + 1], table["buffer_in"][row + 1], table["count_in"][row])
        ema.update(model)
        np.testing.assert_allclose(ema.module.weight.numpy(), table["param_out"][row], rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(ema.module.average.numpy(), table["buffer_out"][row], rtol=tolerance, atol=tolerance)
        assert ema.module.count.item() == table["count_out"][row]


def test_ema_leaves_the_model_alone() -> None:
    model = nn.BatchNorm1d(3)
    ema = optim.EMA(model, EMAConfig())
    for _ in range(3):
        ema.update(model)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert not ema.module.training and not any(p.requires_grad for p in ema.module.parameters())
    with torch.no_grad():
        model.weight.add_(1)
    assert not torch.equal(model.weight, ema.module.weight)


def test_norm_layers_and_biases_do_not_decay() -> None:
    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.g = nn.Parameter(torch.ones(1))

    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LayerNorm(4), Gain(), nn.Embedding(5, 4), nn.Linear(4, 2)
    )
    model[5].weight.requires_grad_(False)
    decay, no_decay = optim.parameter_groups(model, 0.05)
    assert [tuple(p.shape) for p in decay["params"]] == [(4, 3, 3, 3), (1,), (5, 4)]
    assert len(no_decay["params"]) == 6
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.05, 0.0)


def test_optimizer_rate_follows_set_learning_rate() -> None:
    optimizer = optim.build_optimizer(nn.Linear(2, 2), OptimizerConfig(learning_rate=1.0, learning_rate_batch=1))
    optim.set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
