"""Agreement with the original implementation (tests/golden/README.md)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cigpose.crop import crop_to_image
from cigpose.model.estimator import build_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

# Their true gradient is zero, since batch norm follows; what is recorded is rounding noise.
BIASES_BEFORE_BATCH_NORM = ("conv_input.bias", "conv_down_linear.bias")

# Largest deviation of each output, in units of its largest magnitude; float32 itself deviates from float64 by half.
TOLERANCES = {
    "backbone_stage_mean_std": 1e-5, "feat_channel_mean": 1e-5, "feat_channel_std": 1e-5, "feat_sub": 1e-5,
    "final_layer_0": 1e-5, "mlp_pre_gau_0": 2e-5, "gau_0": 5e-5, "gau_1_sub": 5e-5, "hgnn_0": 5e-5, "hgnn_1_sub": 5e-5,
    "simcc_x": 1e-4, "simcc_y": 1e-4, "flip_simcc_x": 1e-4, "flip_simcc_y": 1e-4,
}  # fmt: skip


def relative_error(value, expected):
    """Largest deviation, in units of the largest expected magnitude."""
    value = np.asarray(value.detach() if isinstance(value, torch.Tensor) else value, np.float64)
    assert value.shape == expected.shape
    return np.abs(value - expected).max() / np.abs(expected).max()


def as_stored(value, how):
    """An output as the small set stores it: whole, every so many values of it, or its mean and deviation."""
    if how == "mean, std":
        return np.array([value.mean(dtype=np.float64), value.std(dtype=np.float64)])
    return value.ravel()[:: int(how.lstrip(":"))] if how else value


def deviations(outputs, expected):
    """(stored name, name of the output, relative error) of everything that a file of reference values holds."""
    for stored, value in expected.items():
        name, _, how = stored.rstrip("]").partition("[")
        if name in TOLERANCES:
            yield stored, name, relative_error(as_stored(outputs[name], how), value)


def error_of_logits(outputs, expected, prefix):
    """Largest deviation of the logits of both axes."""
    found = (
        np.abs(as_stored(outputs[name], how) - value).max()
        for stored, value in expected.items()
        for name, _, how in [stored.rstrip("]").partition("[")]
        if name in (f"{prefix}simcc_x", f"{prefix}simcc_y") and "std" not in how
    )
    return max(found)


def test_state_dict_has_the_names_shapes_and_order_of_official_checkpoints(golden_model):
    own = {key: tuple(value.shape) for key, value in golden_model.build().state_dict().items()}
    assert list(own.items()) == list(golden_model.shapes.items())


def test_forward_flip_test_and_every_intermediate_value_match(golden_model):
    checked = set()
    for stored, name, error in deviations(golden_model.outputs, golden_model.eval):
        assert error < TOLERANCES[name], stored
        checked.add(name)
    assert checked == set(TOLERANCES)


def test_they_match_in_every_value_of_the_large_set(golden_model, large_golden):
    with np.load(large_golden / "models" / golden_model.name / "eval.npz") as expected:
        for stored, name, error in deviations(golden_model.outputs, expected):
            assert golden_model.outputs[name].shape == expected[stored].shape
            assert error < TOLERANCES[name], stored


@pytest.mark.parametrize("prefix", ["", "flip_"], ids=["plain", "mirrored"])
def test_the_same_keypoints_are_replaced_at_evaluation(golden_model, prefix):
    own, expected = golden_model.outputs, golden_model.eval
    assert np.abs(own[f"{prefix}confound_score"] - expected[f"{prefix}confound_score"]).max() < 1e-5
    np.testing.assert_array_equal(own[f"{prefix}cim_mask"], expected[f"{prefix}cim_mask"])


@pytest.mark.parametrize("prefix", ["", "flip_"], ids=["plain", "flip"])
def test_decoded_keypoints_are_identical_but_for_ties(golden_model, prefix):
    own, expected = golden_model.outputs, golden_model.eval
    np.testing.assert_allclose(own[f"{prefix}scores"], expected[f"{prefix}scores"], rtol=1e-4)
    # Where the two highest bins are closer than ten times the error of the logits, they may change places.
    tie = expected[f"{prefix}top1_top2_margin"] < 10 * error_of_logits(own, expected, prefix)
    assert tie.mean() < 0.01
    np.testing.assert_array_equal(own[f"{prefix}keypoints"][~tie], expected[f"{prefix}keypoints"][~tie])


@pytest.mark.parametrize("prefix", ["", "flip_"], ids=["plain", "flip"])
def test_decoded_keypoints_come_to_the_same_place_in_the_image(golden_model, prefix):
    expected, size = golden_model.eval, golden_model.config.model.input_size
    center, scale = np.array([100.0, 200.0]), 1.3 * np.array(size)
    for crop, image in zip(expected[f"{prefix}keypoints"], expected[f"{prefix}keypoints_image"], strict=True):
        np.testing.assert_allclose(crop_to_image(crop, center, scale, size), image, atol=1e-4)


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


def test_targets_and_their_weights_match(golden_model):
    np.testing.assert_array_equal(golden_model.keypoints.numpy(), golden_model.train["keypoints"])
    np.testing.assert_array_equal(golden_model.visible.numpy(), golden_model.train["visible"])
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
