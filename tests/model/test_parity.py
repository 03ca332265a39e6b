"""Agreement with the original implementation (golden/README.md, sections 1 and 5)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cigpose import codec
from cigpose.model.causal import confounding_score
from cigpose.model.estimator import build_model

pytestmark = pytest.mark.slow

# Their true gradient is zero, since batch norm follows; what is recorded is rounding noise.
BIASES_BEFORE_BATCH_NORM = ("conv_input.bias", "conv_down_linear.bias")


def relative_error(value, expected):
    """Largest deviation, in units of the largest expected magnitude."""
    value = np.asarray(value.detach() if isinstance(value, torch.Tensor) else value, np.float64)
    return np.abs(value - expected).max() / np.abs(expected).max()


class Recorder:
    """Outputs of named submodules during a forward pass."""

    def __init__(self, model, names):
        self.outputs = {name: [] for name in names}
        for name in names:
            model.get_submodule(name).register_forward_hook(
                lambda _module, _inputs, output, name=name: self.outputs[name].append(output.detach())
            )

    def __getitem__(self, name):
        return self.outputs[name][0]


def test_state_dict_has_the_names_shapes_and_order_of_official_checkpoints(golden_model):
    own = {key: tuple(value.shape) for key, value in golden_model.build().state_dict().items()}
    assert list(own.items()) == list(golden_model.shapes.items())


@torch.no_grad()
def test_forward_and_every_intermediate_value_match(golden_model):
    model, expected = golden_model.build(), golden_model.eval
    stages = [f"backbone.{name}" for name, _ in model.backbone.named_children()]
    seen = Recorder(model, [*stages, "head.final_layer", "head.mlp_pre_gau", "head.gau", "head.gcn"])
    simcc_x, simcc_y = model(golden_model.images)

    statistics = [(seen[stage].double().mean(), seen[stage].double().std()) for stage in stages]
    np.testing.assert_allclose(np.array(statistics), expected["backbone_stage_mean_std"], rtol=1e-5)
    features = seen["backbone.stage4"]
    assert relative_error(features[:, ::32], expected["feat_sub"]) < 1e-5
    assert relative_error(features.mean((2, 3)), expected["feat_channel_mean"]) < 1e-5
    assert relative_error(seen["head.final_layer"][0].flatten(1), expected["final_layer_0"]) < 1e-5
    assert relative_error(seen["head.mlp_pre_gau"][0], expected["mlp_pre_gau_0"]) < 2e-5
    for name, key in (("head.gau", "gau"), ("head.gcn", "hgnn")):
        assert relative_error(seen[name][0], expected[f"{key}_0"]) < 5e-5
        assert relative_error(seen[name][1, :, ::8], expected[f"{key}_1_sub"]) < 5e-5
    assert relative_error(simcc_x, expected["simcc_x"]) < 1e-4
    assert relative_error(simcc_y, expected["simcc_y"]) < 1e-4


def test_flip_test_matches(golden_model):
    for value, axis in zip(golden_model.flip_logits, "xy", strict=True):
        assert relative_error(value, golden_model.eval[f"flip_simcc_{axis}"]) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("mirrored", [False, True], ids=["plain", "mirrored"])
def test_the_same_keypoints_are_replaced_at_evaluation(golden_model, mirrored):
    model, prefix = golden_model.build(), "flip_" if mirrored else ""
    images = golden_model.images.flip(3) if mirrored else golden_model.images
    score = confounding_score(*model.head.initial_prediction(model.head.embed(model.backbone(images))))
    assert np.abs(score.numpy() - golden_model.eval[f"{prefix}confound_score"]).max() < 1e-5
    np.testing.assert_array_equal(model.head.cim.select(score).numpy(), golden_model.eval[f"{prefix}cim_mask"])


@pytest.mark.parametrize("flip_test", [False, True], ids=["plain", "flip"])
def test_decoded_keypoints_are_identical_but_for_ties(golden_model, flip_test):
    expected, prefix = golden_model.eval, "flip_" if flip_test else ""
    logits = golden_model.flip_logits if flip_test else golden_model.logits
    keypoints, scores = codec.decode(*logits)
    np.testing.assert_allclose(scores.numpy(), expected[f"{prefix}scores"], rtol=1e-4)
    # Bins closer than ten times the error of the logits may change places (README, top1_top2_margin).
    error = max(np.abs(x.numpy() - expected[f"{prefix}simcc_{a}"]).max() for x, a in zip(logits, "xy", strict=True))
    tie = expected[f"{prefix}top1_top2_margin"] < 10 * error
    assert tie.mean() < 0.01
    np.testing.assert_array_equal(keypoints.numpy()[~tie], expected[f"{prefix}keypoints"][~tie])


@pytest.mark.parametrize(
    ("dtype", "record", "tolerance"),
    [
        (torch.float32, "sequence", {"loss_kpt": 1e-5, "loss_cf": 1e-3, "loss": 1e-5, "gradient": 1e-3}),
        (torch.float64, "sequence_float64", {"loss_kpt": 5e-8, "loss_cf": 5e-8, "loss": 5e-8, "gradient": 1e-6}),
    ],
    ids=["float32", "float64"],
)
def test_losses_gradients_and_replaced_keypoints_of_a_training_step_match(golden_model, dtype, record, tolerance):
    model = golden_model.build().train().to(dtype)
    chosen = []
    model.head.cim.register_forward_hook(lambda _module, inputs, _output: chosen.append(inputs[1]))
    losses = model.loss(golden_model.images.to(dtype), golden_model.keypoints, golden_model.visible)
    losses["loss"].backward()

    expected = golden_model.train_numbers[record][0]
    for name in ("loss_kpt", "loss_cf", "loss"):
        assert losses[name].item() == pytest.approx(expected[name], rel=tolerance[name]), name
    assert losses["acc_pose"].item() == pytest.approx(expected["acc_pose"], rel=1e-6)
    assert [sorted(row.nonzero().flatten().tolist()) for row in chosen[0]] == [
        sorted(row) for row in expected["cim_mask_indices"]
    ]

    suffix = "_float64" if dtype == torch.float64 else ""
    norms = golden_model.train_numbers[f"grad_norm{suffix}"]
    for name, parameter in model.named_parameters():
        if norms[name] is None:
            assert parameter.grad is None, name
        elif not name.endswith(BIASES_BEFORE_BATCH_NORM):
            norm = parameter.grad.double().norm().item()
            assert norm == pytest.approx(norms[name], rel=tolerance["gradient"]), name
    rows = model.head.cim.canonical_features.weight.grad.abs().sum(1).nonzero().flatten().tolist()
    assert rows == golden_model.train_numbers["canonical_rows_with_grad"], "only replaced keypoints send gradient"
    total = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert total.item() == pytest.approx(expected["grad_norm_total"], rel=tolerance["gradient"])


def test_parameters_without_gradient_are_the_original_ones(golden_model):
    frozen = [name for name, p in golden_model.build().named_parameters() if not p.requires_grad]
    assert frozen == golden_model.train_numbers["no_grad_params"]


@torch.no_grad()
def test_batch_norms_of_the_graph_move_twice_in_a_training_step(golden_model):
    model = golden_model.build().train()
    model.loss(golden_model.images, golden_model.keypoints, golden_model.visible)
    own = model.state_dict()
    buffers = {key.removeprefix("bn1/"): value for key, value in golden_model.train.items() if key.startswith("bn1/")}
    assert len(buffers) > 10
    for key, expected in buffers.items():
        if key.endswith("num_batches_tracked"):
            assert own[key].item() == expected == (2 if "gcn" in key else 1), key
        else:
            assert relative_error(own[key], expected) < 1e-4, key


def test_weights_of_targets_match(golden_model):
    model = golden_model.build()
    _, weight = model.head.targets(golden_model.keypoints, golden_model.visible)
    np.testing.assert_array_equal(weight.numpy(), golden_model.train["keypoint_weights"])


def test_every_head_parameter_starts_as_in_the_original(golden_model, golden: Path):
    all_statistics = json.loads((golden / "head_init_statistics.json").read_text())
    name = next(n for n in all_statistics if _same_shapes(all_statistics[n], golden_model.shapes))
    torch.manual_seed(0)
    head = dict(build_model(golden_model.config).named_parameters())
    for key, expected in all_statistics[name].items():
        value = head[key].detach().double()
        if expected["std"] == 0:
            assert value.unique().tolist() == [expected["mean"]], key
        elif key.endswith(("gamma", "beta")):
            assert 0 <= value.min() < 0.1 and 0.9 < value.max() < 1, key
        else:
            # Five standard errors of the mean and of the deviation of a normal sample, theirs and ours.
            count = value.numel()
            assert abs(value.mean()) < 5 * 0.01 / count**0.5, key
            assert abs(value.std() / expected["std"] - 1) < 10 / (2 * count) ** 0.5, key


def _same_shapes(statistics, shapes):
    return all(tuple(value["shape"]) == shapes.get(key) for key, value in statistics.items())
