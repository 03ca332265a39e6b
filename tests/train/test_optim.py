from __future__ import annotations

import json
import re
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


class _Parts(nn.Module):
    """Two parts, one within the other's, each with a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Sequential(nn.Linear(3, 3)))
        self.head = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        self.never = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x))


def _optimizer(factors: dict[str, float]) -> OptimizerConfig:
    return OptimizerConfig(learning_rate=1.0, learning_rate_batch=1, learning_rate_factors=factors)


def test_every_parameter_has_the_rate_of_the_innermost_part_that_is_named() -> None:
    model = _Parts()
    factors = {"backbone": 0.1, "backbone.2": 0.5}
    optimizer = optim.build_optimizer(model, _optimizer(factors))
    optim.set_learning_rate(optimizer, 0.02)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    expected = {"backbone.0": 0.002, "backbone.1": 0.002, "backbone.2": 0.01, "head.0": 0.02, "head.1": 0.02}
    for name, parameter in model.named_parameters():
        if not name.startswith("never"):
            part = next(part for part in expected if name.startswith(part))
            assert rates[id(parameter)] == pytest.approx(expected[part])
    assert len(rates) == 10
    decaying = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decaying == {id(model.get_parameter(f"{name}.weight")) for name in ("backbone.0", "backbone.2.0", "head.0")}


def test_a_part_that_begins_like_another_is_not_within_it() -> None:
    assert optim.factor_of("head.cls_gx.weight", {"head.cls": 0.1, "head.cls_gx": 0.2}) == 0.2
    assert optim.factor_of("head.cls_gy.weight", {"head.cls": 0.1}) == 1.0


def test_a_frozen_part_stays_as_it_is_with_its_statistics() -> None:
    torch.manual_seed(0)
    model, factors = _Parts(), {"backbone": 0.0, "backbone.2": 1.0}
    optim.freeze_parts(model, factors)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = optim.build_optimizer(model, _optimizer(factors))
    model(torch.randn(8, 2)).square().sum().backward()
    optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.rpartition(".")[0] for name in moved} == {"backbone.2.0", "head.0", "head.1"}
    assert "head.1.running_mean" in moved
    assert model.training and model.head.training and not model.backbone[1].training


@pytest.mark.parametrize(
    "factors, message",
    [
        ({"bakbone": 0.1}, "the network has no part 'bakbone'. Did you mean 'backbone'?"),
        ({"head.0.weight": 0.1}, "the network has no part 'head.0.weight'"),
        ({"backbone": 0.0, "head": 0.0}, "everything is frozen"),
    ],
)
def test_parts_that_do_not_exist_and_a_training_of_nothing_are_refused(factors: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"train.optimizer.learning_rate_factors: {message}")):
        optim.refuse_unknown_parts(_Parts(), factors)
    optim.refuse_unknown_parts(_Parts(), {"backbone": 0.0, "head": 0.1})
