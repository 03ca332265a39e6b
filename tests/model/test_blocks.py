"""Building blocks against the original's numbers, and against their definition written out edge by edge."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cigpose.config import CausalConfig
from cigpose.keypoints import COCO_WHOLEBODY, CROWDPOSE, KeypointSet
from cigpose.model import hgnn, losses
from cigpose.model.causal import CausalIntervention, confounding_score
from cigpose.model.estimator import forward_flip_test, images_for, normalize
from cigpose.model.gau import GatedAttentionUnit, ScaleNorm
from cigpose.model.hgnn import HGNN, EdgeConv, GroupAttention, directed_edges, group_membership


@pytest.fixture
def unit(golden):
    """Inputs and outputs of one block, as tensors."""

    def load(name):
        return {key: torch.from_numpy(value) for key, value in np.load(golden / "units" / f"{name}.npz").items()}

    return load


def parameters_of(unit):
    return {key.removeprefix("p/"): value for key, value in unit.items() if key.startswith("p/")}


@pytest.mark.slow
def test_scale_norm_and_attention_match_the_original(unit):
    expected = unit("gau")
    norm = ScaleNorm(8).double()
    torch.nn.init.constant_(norm.g, expected["scalenorm_g"].item())
    torch.testing.assert_close(norm(expected["x"]), expected["scalenorm_out"], rtol=0, atol=1e-14)
    gau = GatedAttentionUnit(8, 4).double()
    gau.load_state_dict(parameters_of(expected))
    torch.testing.assert_close(gau(expected["x"]), expected["out"], rtol=0, atol=1e-14)


def test_scale_norm_of_a_zero_row_is_zero():
    assert not ScaleNorm(8)(torch.zeros(1, 2, 8)).any()


def test_graph_network_matches_the_original_in_both_modes(unit):
    expected = unit("hgnn")
    hgnn = HGNN(12, 2, CROWDPOSE).double()
    hgnn.load_state_dict(parameters_of(expected))
    # the group means are float32 thirds
    torch.testing.assert_close(hgnn.eval()(expected["x"]), expected["out_eval"], rtol=0, atol=1e-6)
    torch.testing.assert_close(hgnn.train()(expected["x"]), expected["out_train"], rtol=0, atol=1e-6)
    for key, value in hgnn.state_dict().items():
        if f"after_train/{key}" in expected:
            torch.testing.assert_close(value, expected[f"after_train/{key}"], rtol=0, atol=1e-6)


def message_sum_by_definition(layer, x, edges):
    """Edge by edge: SiLU(BN(W [x_i, x_j - x_i])), added up at i."""
    convolution, norm = layer.conv
    weight = convolution.weight.flatten(1)
    linear = torch.stack([torch.cat((x[:, i], x[:, j] - x[:, i]), -1) @ weight.T for i, j in edges], 1)
    mean, variance = linear.mean((0, 1)), linear.var((0, 1), unbiased=False)
    messages = F.silu((linear - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias)
    total = torch.zeros_like(x)
    for number, (i, _) in enumerate(edges):
        total[:, i] = total[:, i] + messages[:, number]
    return total


@settings(max_examples=20, deadline=None)
@given(
    st.sets(st.tuples(st.integers(0, 5), st.integers(0, 5)).filter(lambda e: e[0] < e[1]), min_size=1),
    st.integers(1, 3),
)
def test_edge_convolution_is_the_sum_over_edges_of_its_definition(edges, batch):
    torch.manual_seed(0)
    index = directed_edges(edges)
    layer = EdgeConv(4, 6, index).double().train()
    torch.nn.init.normal_(layer.conv[1].weight)
    x = torch.randn(batch, 6, 4, dtype=torch.float64, requires_grad=True)
    own, expected = layer(x), message_sum_by_definition(layer, x, index.T.tolist())
    torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-9)
    upstream_gradient = torch.randn_like(own)
    (own_gradient,) = torch.autograd.grad(own, x, upstream_gradient, retain_graph=True)
    (expected_gradient,) = torch.autograd.grad(expected, x, upstream_gradient)
    torch.testing.assert_close(own_gradient, expected_gradient, rtol=1e-7, atol=1e-7)
    assert not own[:, sorted(set(range(6)) - {i for edge in edges for i in edge})].any(), "no edge, no message"


@pytest.mark.parametrize("keypoints", [COCO_WHOLEBODY, CROWDPOSE], ids=lambda keypoints: keypoints.name)
def test_edges_as_matrices_give_what_edges_as_indices_give(keypoints, monkeypatch):
    torch.manual_seed(0)
    net = HGNN(8, 1, keypoints).double().train()
    x = torch.randn(2, len(keypoints), 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    results = []
    for as_matrices in (False, True):
        monkeypatch.setattr(hgnn, "sums_in_any_order", lambda _x, as_matrices=as_matrices: as_matrices)
        out = net(x)
        trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
        results.append([out, *torch.autograd.grad((out * weight).sum(), [x, *trained])])
    for by_matrix, by_index in zip(*reversed(results), strict=True):
        torch.testing.assert_close(by_matrix, by_index, rtol=1e-9, atol=1e-11)


def test_group_attention_averages_the_gates_of_a_keypoints_groups():
    torch.manual_seed(0)
    groups = ((0, 1), (1, 2, 3))
    attention = GroupAttention(8, group_membership(groups, 5)).eval()
    gate_of_group = attention.gate_matrix.new_zeros(0)

    def keep(_module, _inputs, output):
        nonlocal gate_of_group
        gate_of_group = output.sigmoid()

    attention.aggregate_linear.register_forward_hook(keep)
    gates = attention(torch.randn(2, 5, 8))
    torch.testing.assert_close(gates[:, 0], gate_of_group[:, 0])
    torch.testing.assert_close(gates[:, 1], gate_of_group.mean(1))
    torch.testing.assert_close(gates[:, 3], gate_of_group[:, 1])
    assert not gates[:, 4].any(), "a keypoint in no group"


def test_graph_network_takes_a_set_without_edges_or_with_one_group():
    alone = KeypointSet.from_mapping({"name": "pair", "names": ["a", "b"], "sigmas": [0.1, 0.1], "edges": []})
    x = torch.randn(3, 2, 8)
    hgnn = HGNN(8, 1, alone)
    for mode in (True, False):
        out = hgnn.train(mode)(x)
        assert out.shape == x.shape
        assert out.isfinite().all()
    assert all(value.isfinite().all() for value in hgnn.state_dict().values()), "statistics of nothing"
    out.sum().backward()
    assert all(p.grad is not None for p in hgnn.parameters() if p.requires_grad), "data-parallel training needs all"


def test_whole_body_graph_has_the_originals_edges_and_groups(golden):
    import json

    graph = json.loads((golden / "graphs.json").read_text())["wholebody"]
    index = directed_edges(COCO_WHOLEBODY.edges)
    assert index.shape == (2, 2 * len(graph["edges"]))
    assert torch.bincount(index[0], minlength=133).tolist() == graph["degree"]
    membership = group_membership(COCO_WHOLEBODY.groups, 133)
    assert membership.sum(1).tolist() == graph["group_membership_count"]


@pytest.mark.parametrize("top_k", [0, 1, 3, 9])
def test_intervention_matches_the_original(unit, top_k):
    expected = unit("cim")
    cim = CausalIntervention(7, 5, CausalConfig(train_top_k=top_k)).double().train()
    cim.load_state_dict({"canonical_features.weight": expected["canonical"]})
    intervened = cim.select(confounding_score(expected["h_x"], expected["h_y"]))
    assert torch.equal(intervened, expected[f"train_k{top_k}_mask"])
    torch.testing.assert_close(cim(expected["f"], intervened), expected[f"train_k{top_k}_out"], rtol=0, atol=0)


def test_intervention_by_threshold_matches_the_original(unit):
    expected = unit("cim")
    config = CausalConfig(train_top_k=1, strategy="threshold", threshold=0.55)
    cim = CausalIntervention(7, 5, config).double()
    cim.load_state_dict({"canonical_features.weight": expected["canonical"]})
    intervened = cim.select(confounding_score(expected["h_x"], expected["h_y"]))
    assert torch.equal(intervened, expected["threshold0.55_mask"])
    torch.testing.assert_close(cim(expected["f"], intervened), expected["threshold0.55_out"], rtol=0, atol=0)


def test_keypoint_loss_and_its_gradient_match_the_original(unit):
    expected = unit("loss_kpt")
    logits = tuple(expected[f"pred_{axis}"].requires_grad_() for axis in "xy")
    labels = (expected["target_x"], expected["target_y"])
    loss = losses.keypoint_loss(logits, labels, expected["weight"], beta=10.0)
    torch.testing.assert_close(loss, expected["loss"], rtol=1e-12, atol=0)
    for gradient, axis in zip(torch.autograd.grad(loss, logits), "xy", strict=True):
        torch.testing.assert_close(gradient, expected[f"grad_{axis}"], rtol=1e-9, atol=1e-15)


def test_counterfactual_loss_and_its_gradient_match_the_original(unit):
    expected = unit("loss_cf")
    observed = tuple(expected[f"obs_{axis}"].requires_grad_() for axis in "xy")
    logits = tuple(expected[f"cf_{axis}"].requires_grad_() for axis in "xy")
    compared = (expected["weight"] > 0) & ~expected["intervened"]
    loss = 0.1 * losses.counterfactual_loss(observed, logits, compared)
    torch.testing.assert_close(loss, expected["loss"], rtol=1e-9, atol=0)
    loss.backward()
    for before, after, axis in zip(observed, logits, "xy", strict=True):
        assert before.grad is None
        torch.testing.assert_close(after.grad, expected[f"grad_cf_{axis}"], rtol=1e-7, atol=1e-15)
    nothing = losses.counterfactual_loss(observed, logits, torch.zeros_like(compared))
    assert nothing.item() == expected["loss_when_all_intervened"].item() == 0


def labels_at(keypoints, bins):
    """Labels that decode to given keypoints in half pixels."""
    return torch.nn.functional.one_hot((keypoints * 2).round().long().clamp(0, bins - 1), bins).float()


def test_accuracy_divides_x_by_the_height_and_y_by_the_width():
    size = (100, 200)
    truth = torch.tensor([[[50.0, 50.0], [50.0, 50.0], [50.0, 50.0]]])
    # 9 / 200 < 0.05 <= 9 / 100, so upstream's swap decides
    moved = truth + torch.tensor([[[9.0, 0.0], [0.0, 9.0], [0.0, 0.0]]])
    logits, labels = ((labels_at(points[..., 0], 200), labels_at(points[..., 1], 400)) for points in (moved, truth))
    accuracy = losses.keypoint_accuracy(logits, labels, torch.tensor([[1.0, 1.0, 0.0]]), size, 2.0)
    assert accuracy.item() == 0.5
    assert losses.keypoint_accuracy(logits, labels, torch.zeros(1, 3), size, 2.0).item() == 0


def test_accuracy_is_the_originals_mean_over_keypoints_with_a_sample(unit):
    expected, fine = unit("accuracy"), 64.0  # bins so fine that no distance crosses the threshold
    logits, labels = (
        tuple(
            F.one_hot((expected[points][..., axis] * fine).round().long(), int(side * fine)).float()
            for axis, side in enumerate((192, 256))
        )
        for points in ("pred_keypoints", "gt_keypoints")
    )
    accuracy = losses.keypoint_accuracy(logits, labels, expected["mask"].float(), (192, 256), fine)
    assert accuracy.item() == pytest.approx(expected["avg_acc"].item(), rel=1e-6)


def test_flip_test_mirrors_and_averages_as_the_original(unit):
    expected = unit("flip_vectors")
    passes = iter([(torch.zeros_like(expected["x"]), torch.zeros_like(expected["y"])), (expected["x"], expected["y"])])
    simcc_x, simcc_y = forward_flip_test(lambda _: next(passes), torch.zeros(2, 3, 8, 8), expected["flip_indices"])
    torch.testing.assert_close(simcc_x * 2, expected["out_x"], rtol=0, atol=0)
    torch.testing.assert_close(simcc_y * 2, expected["out_y"], rtol=0, atol=0)


def test_crops_are_normalised_per_channel_of_rgb():
    crops = torch.zeros(2, 4, 6, 3, dtype=torch.uint8)
    crops[1, ..., 2] = 255
    images = normalize(crops)
    assert images.shape == (2, 3, 4, 6)
    assert images.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(
        images[0, :, 0, 0], -torch.tensor([123.675, 116.28, 103.53]) / images.new_tensor([58.395, 57.12, 57.375])
    )
    assert images[1, 2, 0, 0].item() == pytest.approx((255 - 103.53) / 57.375)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_images_lie_in_memory_as_the_weights_do(layout: torch.memory_format) -> None:
    network = torch.nn.Conv2d(3, 8, 3).to(memory_format=layout)
    crops = torch.randint(0, 256, (2, 16, 12, 3), dtype=torch.uint8)
    images = images_for(network, crops)
    assert images.is_contiguous(memory_format=layout)
    assert torch.equal(images, normalize(crops))
    assert images_for(torch.nn.Identity(), crops).is_contiguous()
