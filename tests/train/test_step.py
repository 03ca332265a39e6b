from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cigpose.model.estimator import build_model
from cigpose.train.build import state_around
from cigpose.train.divergence import NonFiniteLossError, refuse_diverged
from cigpose.train.meter import Meter
from cigpose.train.step import Losses, resolved_precision, train_step

compile_module = nn.Module.compile
CPU = torch.device("cpu")


class Plain(nn.Module):
    """A model without batch statistics, so that batches can be cut anywhere."""

    def __init__(self, bad_key: float | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 266)
        self.bad_value = bad_key

    def loss(self, images: torch.Tensor, keypoints: torch.Tensor, visible: torch.Tensor) -> dict[str, torch.Tensor]:
        predicted = self.linear(images.mean((2, 3))).view(-1, 133, 2)
        error = ((predicted - keypoints / 50) ** 2).sum(-1) * visible
        loss_kpt = error.sum() / 133
        loss_cf = 0.1 * predicted.abs().mean()
        if self.bad_value is not None:
            loss_kpt = loss_kpt * self.bad_value
        return {"loss": loss_kpt + loss_cf, "loss_kpt": loss_kpt, "loss_cf": loss_cf, "acc_pose": error.mean().detach()}


def plain_state(tiny_config: Any, bad_value: float | None = None, **changes: Any) -> Any:
    torch.manual_seed(0)
    return state_around(Plain(bad_value), tiny_config(**changes), CPU)


def weights(state: Any) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in state.model.state_dict().items()}


def cut(batch: dict[str, Any], *sizes: int) -> list[dict[str, Any]]:
    parts, start = [], 0
    for size in sizes:
        parts.append({key: value[start : start + size] for key, value in batch.items()})
        start += size
    return parts


def test_accumulated_micro_batches_take_the_step_of_the_whole_batch(tiny_config: Any, batch: Any) -> None:
    persons = batch(8)
    whole, parts = plain_state(tiny_config), plain_state(tiny_config)
    for _ in range(3):
        first = train_step(whole, [persons], rate=0.01, clip_grad_norm=None)
        second = train_step(parts, cut(persons, 4, 4), rate=0.01, clip_grad_norm=None)
    for key in first:
        torch.testing.assert_close(second[key], first[key])
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-5, atol=1e-6)


def test_the_summed_loss_is_stated_for_loss_batch_persons(tiny_config: Any, batch: Any) -> None:
    config = tiny_config(train__loss_batch=64)
    state = plain_state(tiny_config, train__loss_batch=64)
    persons = batch(8)
    losses = Losses(state.model, config)(persons["crops"], persons["keypoints"], persons["visible"])
    images = Losses(state.model, config)
    eight = batch(8)
    eightfold = {key: torch.cat([value] * 8) if torch.is_tensor(value) else value * 8 for key, value in eight.items()}
    whole = images(eightfold["crops"], eightfold["keypoints"], eightfold["visible"])
    torch.testing.assert_close(losses["loss"], whole["loss"])
    torch.testing.assert_close(losses["loss"].detach(), losses["loss_kpt"] + losses["loss_cf"])


@pytest.mark.parametrize("bad_value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_before_the_optimiser_moves(
    tiny_config: Any, batch: Any, bad_value: float
) -> None:
    state = plain_state(tiny_config, bad_value)
    before = weights(state)
    with pytest.raises(NonFiniteLossError, match=r"random/3-0#1, random/3-1#1.*the optimiser was not moved"):
        train_step(state, [batch(2, seed=3)], rate=0.01, clip_grad_norm=35.0)
    torch.testing.assert_close(weights(state), before, rtol=0, atol=0)
    assert state.ema.updates == 0
    assert not state.optimizer.state


def test_the_bad_one_of_several_micro_batches_is_named(tiny_config: Any, batch: Any) -> None:
    state = plain_state(tiny_config)
    bad = batch(2, seed=5)
    bad["keypoints"][0, 0, 0] = torch.nan
    bad["visible"][:] = 1
    with pytest.raises(NonFiniteLossError, match="random/5-0#1") as caught:
        train_step(state, [batch(2, seed=4), bad], rate=0.01, clip_grad_norm=None)
    assert "random/4" not in str(caught.value)


def test_weights_that_are_no_numbers_are_not_kept(tiny_config: Any) -> None:
    state = plain_state(tiny_config)
    refuse_diverged(state.model)
    with torch.no_grad():
        state.model.linear.weight[0, 0] = torch.inf
    with pytest.raises(NonFiniteLossError, match="no checkpoint was written"):
        refuse_diverged(state.model)


def test_clipping_limits_the_gradient_and_reports_its_norm_before(tiny_config: Any, batch: Any) -> None:
    state = plain_state(tiny_config)
    norm = train_step(state, [batch(4)], rate=0.01, clip_grad_norm=0.5)["grad_norm"]
    assert norm > 0.5
    clipped = nn.utils.get_total_norm([p.grad for p in state.model.parameters()])
    torch.testing.assert_close(clipped, torch.tensor(0.5), rtol=1e-4, atol=0)


def test_ema_follows_every_step(tiny_config: Any, batch: Any) -> None:
    state = plain_state(tiny_config)
    train_step(state, [batch(4)], rate=0.01, clip_grad_norm=None)
    assert state.ema.updates == 1
    torch.testing.assert_close(state.evaluated.state_dict(), state.model.state_dict(), rtol=0, atol=0)
    train_step(state, [batch(4)], rate=0.01, clip_grad_norm=None)
    assert not torch.equal(state.evaluated.linear.weight, state.model.linear.weight)


def test_a_step_that_the_loss_scaler_skips_enters_neither_ema_nor_means(tiny_config: Any, batch: Any) -> None:
    state, meter = plain_state(tiny_config, train__precision="fp16"), Meter(CPU)
    before = weights(state)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=1e38)  # no gradient survives it
    meter.add(train_step(state, [batch(4)], rate=0.01, clip_grad_norm=35.0), 4)
    assert meter.is_empty
    assert state.ema.updates == 0
    torch.testing.assert_close(weights(state), before, rtol=0, atol=0)
    assert state.scaler.get_scale() < 1e38
    state.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    metrics = train_step(state, [batch(4)], rate=0.01, clip_grad_norm=35.0)
    meter.add(metrics, 4)
    assert meter.read(1)["grad_norm"] == pytest.approx(metrics["grad_norm"].item())
    assert state.ema.updates == 1


def test_a_gradient_that_is_no_number_stops_before_the_optimiser_moves(tiny_config: Any, batch: Any) -> None:
    state = plain_state(tiny_config)
    before = weights(state)
    state.model.linear.weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(NonFiniteLossError, match=r"the gradient is not finite on the batch of random/0-0#1.*not moved"):
        train_step(state, [batch(2)], rate=0.01, clip_grad_norm=35.0)
    torch.testing.assert_close(weights(state), before, rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "auto"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_every_precision_and_layout_lowers_the_loss(
    tiny_config: Any, batch: Any, precision: str, channels_last: bool
) -> None:
    config = tiny_config(train__precision=precision, train__channels_last=channels_last)
    torch.manual_seed(0)
    state = state_around(build_model(config), config, CPU)
    persons = batch(4)
    losses = [train_step(state, [persons], rate=0.002, clip_grad_norm=35.0)["loss"].item() for _ in range(6)]
    assert losses[-1] < losses[0]
    assert all(parameter.dtype == torch.float32 for parameter in state.model.parameters())


def test_auto_precision_is_bf16_only_where_the_processor_has_it(tiny_config: Any, monkeypatch: Any) -> None:
    config = tiny_config(train__precision="auto")
    for has_it, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has_it=has_it: has_it)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert resolved_precision(config, CPU) == expected


@pytest.mark.slow
def test_a_compiled_training_takes_the_same_step(tiny_config: Any, batch: Any, monkeypatch: Any) -> None:
    # captured and differentiated by the compiler, but not turned into machine code, which takes minutes
    monkeypatch.setattr(
        nn.Module, "compile", lambda module, **options: compile_module(module, backend="aot_eager", **options)
    )
    losses = []
    for compiled in (False, True):
        state = plain_state(tiny_config, train__compile=compiled)
        losses.append([train_step(state, [batch(4)], rate=0.01, clip_grad_norm=None)["loss"].item() for _ in range(2)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
