from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cigpose import codec

INPUT_SIZE, SIGMA = (192, 256), (4.9, 5.66)


def encode(*points, visible=1.0):
    keypoints = torch.tensor([points], dtype=torch.float32)
    return codec.encode(keypoints, torch.full(keypoints.shape[:2], visible), INPUT_SIZE, SIGMA)


@pytest.mark.parametrize(
    ("size", "sigma"), [((192, 256), (4.9, 5.66)), ((288, 384), (6.0, 6.93))], ids=["256x192", "384x288"]
)
def test_encode_matches_the_original(golden, size, sigma):
    expected = np.load(golden / "units" / f"encode_{size[1]}x{size[0]}.npz")
    keypoints, visible = (torch.from_numpy(expected[name]) for name in ("keypoints", "visible"))
    x, y, weight = codec.encode(keypoints, visible, size, sigma)
    # exp differs by a unit in the last place, and values below 1e-35 are not followed down to zero
    np.testing.assert_allclose(x.numpy(), expected["x"], atol=1e-7)
    np.testing.assert_allclose(y.numpy(), expected["y"], atol=1e-7)
    np.testing.assert_array_equal(weight.numpy(), expected["weights"])


def test_labels_of_real_crops_match_the_original(golden):
    files = sorted((golden / "transforms").glob("labels_*_ann*.npz"))
    assert len(files) == 6
    for file in files:
        expected = np.load(file)
        large = "384x288" in file.name
        size, sigma = ((288, 384), (6.0, 6.93)) if large else (INPUT_SIZE, SIGMA)
        names = sorted(expected.files)
        keypoints = torch.from_numpy(expected["keypoints"]).reshape(1, -1, 2)
        visible = torch.from_numpy(expected["visible"]).reshape(1, -1)
        x, y, weight = codec.encode(keypoints, visible, size, sigma)
        np.testing.assert_allclose(x.numpy(), expected["x"].reshape(x.shape), atol=1e-7, err_msg=f"{file} {names}")
        np.testing.assert_allclose(y.numpy(), expected["y"].reshape(y.shape), atol=1e-7)
        np.testing.assert_array_equal(weight.numpy(), expected["weights"].reshape(weight.shape))


def test_decode_matches_the_original(golden):
    expected = np.load(golden / "units" / "decode.npz")
    keypoints, scores = codec.decode(torch.from_numpy(expected["simcc_x"]), torch.from_numpy(expected["simcc_y"]))
    np.testing.assert_array_equal(keypoints.numpy(), expected["keypoints"])
    np.testing.assert_array_equal(scores.numpy(), expected["scores"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 191.5, width=32), st.floats(0, 255.5, width=32)), min_size=1, max_size=5))
def test_decode_of_encoded_keypoints_is_within_half_a_bin(points):
    x, y, weight = encode(*points)
    keypoints, scores = codec.decode(x, y)
    assert (weight == 1).all()
    assert (scores == 1).all()
    assert (keypoints - torch.tensor(points, dtype=torch.float32)).abs().max() <= 0.25


@pytest.mark.parametrize(
    ("point", "weight"),
    [
        pytest.param((0.0, 0.0), 1, id="corner"),
        pytest.param((191.9, 255.9), 1, id="opposite corner"),
        pytest.param((-7.7, 10.0), 1, id="outside, its label reaches in"),
        pytest.param((-8.0, 10.0), 0, id="too far left"),
        pytest.param((199.5, 10.0), 0, id="too far right"),
        pytest.param((10.0, -9.5), 0, id="too far up"),
        pytest.param((10.0, 265.0), 0, id="too far down"),
    ],
)
def test_a_keypoint_counts_while_three_sigmas_reach_the_crop(point, weight):
    x, y, found = encode(point)
    assert found.tolist() == [[weight]]
    assert bool(x.any()) == bool(y.any()) == bool(weight)


def test_invisible_keypoints_have_no_label_and_keep_their_weight():
    x, y, weight = encode((10.0, 10.0), (1e9, -1e9), visible=0.25)
    assert not x.any()
    assert not y.any()
    assert weight.tolist() == [[0.25, 0.25]]


def test_bins_half_way_round_to_even_as_numpy_does():
    x, _, _ = encode((0.25, 0.0), (0.75, 0.0), (1.25, 0.0))
    assert x.argmax(-1).tolist() == [[0, 2, 2]]


def test_scores_that_are_not_positive_give_no_place():
    keypoints, scores = codec.decode(
        torch.tensor([[[-1.0, -2.0], [0.0, 3.0]]]), torch.tensor([[[1.0, 2.0], [0.0, -1]]])
    )
    assert scores.tolist() == [[-1.0, 0.0]]
    assert (keypoints == codec.NOWHERE).all()


def test_an_empty_batch_encodes_and_decodes():
    x, y, weight = codec.encode(torch.zeros(0, 17, 2), torch.zeros(0, 17), INPUT_SIZE, SIGMA)
    assert (x.shape, y.shape, weight.shape) == ((0, 17, 384), (0, 17, 512), (0, 17))
    keypoints, scores = codec.decode(x, y)
    assert (keypoints.shape, scores.shape) == ((0, 17, 2), (0, 17))


def test_labels_stay_float32_whatever_comes_in():
    x, y, weight = codec.encode(torch.zeros(1, 2, 2).double(), torch.ones(1, 2, dtype=torch.int64), INPUT_SIZE, SIGMA)
    assert {x.dtype, y.dtype, weight.dtype} == {torch.float32}
    keypoints, _ = codec.decode(x.bfloat16(), y.bfloat16())
    assert keypoints.dtype == torch.float32
