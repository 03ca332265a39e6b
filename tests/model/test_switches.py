"""The switches of `model.causal`, `model.hgnn` and `model.head`."""

from __future__ import annotations

import pytest
import torch

from cigpose.model.estimator import RTMPose, build_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 64, 64, generator=generator)
    keypoints = torch.rand(4, 133, 2, generator=generator) * 64
    return images, keypoints, (torch.rand(4, 133, generator=generator) > 0.2).float()


def build(config):
    torch.manual_seed(0)
    return build_model(config)


def replaced_by(model, images):
    """Which keypoints a forward pass replaces, (B, K), or None."""
    masks = []
    handle = model.head.cim.register_forward_hook(lambda _module, inputs, _output: masks.append(inputs[1]))
    model(images)
    handle.remove()
    return masks[0] if masks else None


@torch.no_grad()
@pytest.mark.parametrize("top_k", [1, 5, 133])
def test_eval_top_k_replaces_so_many_keypoints(tiny_config, batch, top_k):
    model = build(tiny_config(model__causal__eval_top_k=top_k)).eval()
    assert replaced_by(model, batch[0]).sum(1).tolist() == [top_k] * 4


@torch.no_grad()
def test_eval_top_k_of_zero_turns_the_intervention_off(tiny_config, batch):
    model = build(tiny_config(model__causal__eval_top_k=0)).eval()
    assert replaced_by(model, batch[0]) is None
    torch.nn.init.constant_(model.head.cim.canonical_features.weight, 1e6)
    assert model(batch[0])[0].abs().max() < 1e3


@torch.no_grad()
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_threshold_replaces_what_is_less_certain(tiny_config, batch, mode):
    for threshold, expected in ((0.0, True), (1.0, False)):
        config = tiny_config(model__causal__strategy="threshold", model__causal__threshold=threshold)
        replaced = replaced_by(build(config).train(mode), batch[0])
        assert (replaced == expected).all()


@pytest.mark.parametrize("top_k", [0, 133], ids=["none replaced", "all replaced"])
def test_training_at_the_ends_of_top_k_stays_finite_and_trains_every_parameter(tiny_config, batch, top_k):
    model = build(tiny_config(model__causal__train_top_k=top_k)).train()
    losses = model.loss(*batch)
    losses["loss"].backward()
    # nothing moves when nothing is replaced, and nothing is compared when everything is
    assert losses["loss_cf"].item() == pytest.approx(0, abs=1e-9)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("num_layers", [0, 1, 3])
def test_number_of_graph_layers(tiny_config, batch, num_layers):
    model = build(tiny_config(model__hgnn__num_layers=num_layers)).train()
    assert len(model.head.gcn.edgeconv_layers) == num_layers
    model.loss(*batch)["loss"].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_baseline_has_neither_intervention_nor_graph(tiny_config, batch):
    model = build(tiny_config(model__head__kind="rtmpose")).train()
    assert isinstance(model, RTMPose)
    assert {key.split(".")[1] for key in model.state_dict() if key.startswith("head.")} == {
        "final_layer", "mlp", "gau", "cls_x", "cls_y",
    }  # fmt: skip
    losses = model.loss(*batch)
    assert losses["loss_cf"] == 0
    assert losses["loss"] == losses["loss_kpt"]
    losses["loss"].backward()
    assert all(p.grad is not None for p in model.parameters()), "nothing in it is dead"


def test_parts_add_up_to_the_loss_and_carry_its_gradient(tiny_config, batch):
    model = build(tiny_config(model__causal__supervise_uncertainty=True)).train()
    losses = model.loss(*batch)
    parts = [value for key, value in losses.items() if key.startswith("loss_")]
    assert len(parts) == 3
    torch.testing.assert_close(sum(parts), losses["loss"])
    whole, summed = (
        torch.autograd.grad(total, model.head.gau.o.weight, retain_graph=True)[0]
        for total in (losses["loss"], sum(parts))
    )
    torch.testing.assert_close(whole, summed)
    assert not losses["acc_pose"].requires_grad


def test_supervised_uncertainty_changes_the_gradient_of_no_other_parameter(tiny_config, batch):
    gradients = {}
    for supervised in (False, True):
        # the rank of keypoints depends on the layer norm; with all replaced it does not matter
        config = tiny_config(model__causal__supervise_uncertainty=supervised, model__causal__train_top_k=133)
        model = build(config).train()
        model.loss(*batch)["loss"].backward()
        gradients[supervised] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    new = set(gradients[True]) - set(gradients[False])
    assert new == {f"head.initial_pred_{axis}.{kind}" for axis in "xy" for kind in ("weight", "bias")}
    for name, gradient in gradients[False].items():
        assert torch.equal(gradient, gradients[True][name]), name
    total = torch.nn.utils.get_total_norm(gradients[True].values())
    assert torch.nn.utils.get_total_norm([gradients[True][name] for name in new]) < 0.05 * total


@pytest.mark.slow
@pytest.mark.parametrize("features", ["usual", "huge"])
def test_supervised_uncertainty_learns_and_does_not_collapse_the_rest(tiny_config, batch, features):
    """Naive supervision let its unbounded logits eat the shared gradient clip; even at huge embeddings it must not."""
    images, keypoints, visible = batch
    curves = {}
    for supervised in (False, True):
        model = build(
            tiny_config(model__causal__supervise_uncertainty=supervised, model__causal__train_top_k=3)
        ).train()
        if features == "huge":
            torch.nn.init.constant_(model.head.gau.res_scale.scale, 100.0)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
        curves[supervised] = []
        for _ in range(40):
            optimizer.zero_grad()
            losses = model.loss(images, keypoints, visible)
            losses["loss"].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.2)
            optimizer.step()
            curves[supervised].append({key: value.item() for key, value in losses.items()})
    with_it, without = curves[True], curves[False]
    assert with_it[-1]["loss_uncertainty"] < 0.8 * with_it[0]["loss_uncertainty"]
    assert with_it[-1]["loss_kpt"] < 0.8 * with_it[0]["loss_kpt"]
    assert with_it[-1]["loss_kpt"] < 1.1 * without[-1]["loss_kpt"]
