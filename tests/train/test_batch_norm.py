from __future__ import annotations

from typing import Any

import pytest
import torch
import two_ranks
from torch import distributed, nn

from cigpose.train.batch_norm import SynchronizedBatchNorm, synchronize_batch_norm


@pytest.fixture
def alone(tmp_path: Any) -> Any:
    """A group of one worker: the arithmetic of all of them, without the others."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_outputs_gradients_and_statistics_equal_batch_norm(alone: None, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    x = (torch.randn(6, 3, 5, 4, dtype=dtype) * 2 + 7).requires_grad_()
    theirs = nn.BatchNorm2d(3, eps=1e-5, momentum=0.1).to(dtype)
    with torch.no_grad():
        theirs.weight.uniform_(0.5, 2)
        theirs.bias.normal_()
    ours = SynchronizedBatchNorm(3).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    gradients = []
    for layer in (theirs, ours):
        loss = (layer(x) * torch.linspace(-1, 1, x.numel(), dtype=dtype).view_as(x)).sum()
        gradients.append(torch.autograd.grad(loss, [x, layer.weight, layer.bias]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=tolerance, atol=tolerance)


def test_conversion_keeps_names_values_and_parameters(alone: None) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4, eps=1e-3, momentum=0.03)), nn.BatchNorm1d(4)
    )
    weight = model[1][0].weight
    before = {key: value.clone() for key, value in model.state_dict().items()}
    converted = synchronize_batch_norm(model)
    assert isinstance(converted[1][0], SynchronizedBatchNorm)
    assert type(converted[2]) is nn.BatchNorm1d
    assert converted[1][0].weight is weight
    assert (converted[1][0].eps, converted[1][0].momentum) == (1e-3, 0.03)
    torch.testing.assert_close(converted.state_dict(), before)


@pytest.fixture(scope="module")
def answers() -> list[Any]:
    """What each of two workers found."""
    return two_ranks.run(two_ranks.both)


@pytest.mark.slow
def test_two_workers_normalise_as_torchs_own_does_in_each_of_its_ways(answers: Any) -> None:
    by_rank = [norms for norms, _training, _received in answers]
    layer, (x, weights) = two_ranks.make_layer().double(), two_ranks.make_values()
    joint = x.double().requires_grad_()
    out = layer(joint)
    (out * weights).sum().backward()
    for rank, found in enumerate(by_rank):
        expected = {"out": out.detach(), "d_input": joint.grad}
        expected = {name: value.split(two_ranks.SIZES)[rank].float() for name, value in expected.items()}
        expected |= {"d_weight": layer.weight.grad.float(), "d_bias": layer.bias.grad.float()}
        expected |= {"running_mean": layer.running_mean.float(), "running_var": layer.running_var.float()}
        assert found.keys() == {"torch", "plain", "captured", "kernels"}
        for way, values in found.items():
            for name, value in values.items():
                for reference in (expected[name], found["torch"][name]):
                    assert (value - reference).abs().max() < 1e-6 * reference.abs().max(), (way, name)


@pytest.mark.slow
def test_two_compiled_workers_have_a_graph_for_each_size_of_batch_and_take_plain_steps(
    answers: Any,
) -> None:
    by_rank = [training for _norms, training, _received in answers]
    for found in by_rank:
        assert not found["eager"]["warnings"], "gradients are laid out as the buckets are"
        assert found["compiled"]["graphs"] == 2
        assert not found["compiled"]["breaks"]
        assert found["compiled"]["losses"] == pytest.approx(found["eager"]["losses"], rel=1e-5)
    assert by_rank[0]["eager"]["losses"] != by_rank[1]["eager"]["losses"]
    assert by_rank[0]["compiled"]["weights"] == by_rank[1]["compiled"]["weights"]


@pytest.mark.slow
def test_a_worker_receives_the_tensors_that_rank_0_has_read(answers: Any) -> None:
    for _norms, _training, received in answers:
        expected = two_ranks.make_tensors()
        assert {key: tensor.dtype for key, tensor in received.items()} == {k: t.dtype for k, t in expected.items()}
        assert all(torch.equal(received[key], tensor) for key, tensor in expected.items())
