"""The first weights of one network from another."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cigpose.keypoints import COCO_WHOLEBODY, CROWDPOSE
from cigpose.model import transfer
from cigpose.model.estimator import build_model
from cigpose.model.weights import WeightsError

SHUFFLED = {
    "name": "mine",
    "names": ["right_knee", "tail", "nose"],
    "sigmas": [0.1, 0.1, 0.1],
    "edges": [["right_knee", "tail"]],
    "groups": [["nose", "tail"]],
}


def with_keypoints(tiny_config: Any, known: Any, **changes: Any) -> Any:
    metric = "whole/AP" if known == "coco_wholebody" else "body/AP"
    changes |= {"evaluate__metric": metric, "train__validation__metric": metric, "model__causal__train_top_k": 1}
    return tiny_config(keypoints=known, **changes)


def built(config: Any, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return build_model(config).eval()


@pytest.mark.parametrize("kind", ["cigpose", "rtmpose"])
def test_the_tensors_with_an_axis_of_keypoints_are_those_whose_shape_follows_their_number(
    tiny_config: Any, kind: str
) -> None:
    configs = [with_keypoints(tiny_config, known, model__head__kind=kind) for known in ("coco_wholebody", "crowdpose")]
    first, second = (
        {name: tensor.shape for name, tensor in built(config, 0).state_dict().items()} for config in configs
    )
    assert first.keys() == second.keys()
    changing = {name for name in first if first[name] != second[name]}
    assert changing == {name for name in transfer.BY_KEYPOINT if name in first}
    assert all(first[name][0] == 133 and second[name] == (14, *first[name][1:]) for name in changing)


@pytest.mark.parametrize("kind", ["cigpose", "rtmpose"])
def test_the_tensors_that_follow_the_size_of_the_crop_are_interpolated(tiny_config: Any, kind: str) -> None:
    first, second = (
        built(tiny_config(model__input_size=size, model__head__kind=kind), 0).state_dict()
        for size in ([64, 64], [96, 96])
    )
    changing = {name for name in first if first[name].shape != second[name].shape}
    config, source = (
        tiny_config(model__input_size=[96, 96], model__head__kind=kind),
        tiny_config(model__head__kind=kind),
    )
    found = transfer.start_from(built(config, 1), first, config, source, "there")
    assert set(found.interpolated) == changing and not found.anew


@pytest.mark.parametrize("known", ["crowdpose", SHUFFLED], ids=["crowdpose", "own table"])
def test_rows_of_keypoints_come_from_those_of_the_same_name_and_the_others_stay_as_they_are(
    tiny_config: Any, known: Any
) -> None:
    source, config = tiny_config(), with_keypoints(tiny_config, known)
    given, model = built(source, 0).state_dict(), built(config, 1)
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = transfer.start_from(model, given, config, source, "there")
    own = model.state_dict()
    for name in transfer.BY_KEYPOINT:
        for row, keypoint in enumerate(config.keypoint_set.names):
            is_known = keypoint in COCO_WHOLEBODY.names
            expected = given[name][COCO_WHOLEBODY.names.index(keypoint)] if is_known else fresh[name][row]
            assert torch.equal(own[name][row], expected), (name, keypoint)
    assert set(found.mapped) == set(transfer.BY_KEYPOINT) and not found.anew and not found.unused
    assert all(torch.equal(own[name], given[name]) for name in found.taken)
    assert {*found.taken, *found.mapped} == set(own)
    if known == "crowdpose":
        assert found.keypoints["matched"] == list(CROWDPOSE.names[:12])
        assert found.keypoints["anew"] == ["top_head", "neck"]
        assert found.summary() == (
            f"{len(own) - 3} taken, 3 mapped of {len(own)} tensors; "
            "12 of 14 keypoints by name from coco_wholebody (anew: top_head, neck)"
        )
        assert found.lines()[1] == (
            "mapped (12 of 14 keypoints): head.final_layer.weight, head.final_layer.bias, "
            "head.cim.canonical_features.weight"
        )


def test_a_keypoint_that_stands_elsewhere_in_a_set_of_equal_size_is_found_by_its_name(tiny_config: Any) -> None:
    turned = {**SHUFFLED, "name": "turned", "names": SHUFFLED["names"][::-1]}
    source, config = (with_keypoints(tiny_config, known) for known in (SHUFFLED, turned))
    given, model = built(source, 0).state_dict(), built(config, 1)
    transfer.start_from(model, given, config, source, "there")
    for name in transfer.BY_KEYPOINT:
        assert torch.equal(model.state_dict()[name], given[name].flip(0))


def test_a_network_starts_from_itself_with_every_tensor(tiny_config: Any) -> None:
    config = tiny_config()
    given, model = built(config, 0).state_dict(), built(config, 1)
    found = transfer.start_from(model, given, config, config, "there")
    assert found.taken == list(given) and not (found.mapped or found.interpolated or found.anew or found.unused)
    assert all(torch.equal(tensor, given[name]) for name, tensor in model.state_dict().items())


def test_a_classifier_over_other_bins_gives_the_old_logits_read_between_its_bins() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(40, 8), torch.randn(5, 8)
    finer = x @ transfer.resample_bins(weight, 80).T
    logits = x @ weight.T
    torch.testing.assert_close(finer[:, ::2], logits)
    torch.testing.assert_close(finer[:, 1:-1:2], (logits[:, :-1] + logits[:, 1:]) / 2)
    torch.testing.assert_close(x @ transfer.resample_bins(weight, 20).T, logits[:, ::2])
    assert transfer.resample_bins(weight[:, 0], 60).shape == (60,)


def test_a_map_of_more_cells_that_shows_the_same_gives_the_same_embedding() -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 6 * 4)
    y, x = torch.meshgrid(torch.linspace(0, 1, 12), torch.linspace(0, 1, 8), indexing="ij")
    shown = torch.sin(3 * y) + x  # smooth, at twice the resolution
    coarse = torch.nn.functional.avg_pool2d(shown[None, None], 2).flatten()
    finer = transfer.resample_cells(weight, (6, 4), (12, 8))
    expected = weight @ coarse
    assert (finer @ shown.flatten() - expected).norm() < 0.1 * expected.norm()  # the rims of the map are what differs
    torch.testing.assert_close(finer.sum(1), weight.sum(1), rtol=1e-4, atol=1e-4)


def test_what_depends_on_crops_of_another_shape_is_made_anew_and_named(tiny_config: Any) -> None:
    source, config = tiny_config(), tiny_config(model__input_size=[64, 96])
    model = built(config, 1)
    before = model.state_dict()["head.cls_gy.weight"].clone()
    found = transfer.start_from(model, built(source, 0).state_dict(), config, source, "there")
    assert not found.interpolated
    assert set(found.anew) == {
        "head.mlp.1.weight", "head.mlp_pre_gau.1.weight", "head.cls_y.weight", "head.cls_gy.weight",
        "head.cls_gy.bias", "head.initial_pred_y.weight", "head.initial_pred_y.bias",
    }  # fmt: skip
    assert set(found.anew.values()) == {"crops of another aspect ratio"}
    assert torch.equal(model.state_dict()["head.cls_gy.weight"], before)


def test_cells_in_another_order_are_not_taken_for_the_same_because_there_are_as_many(tiny_config: Any) -> None:
    source, config = tiny_config(model__input_size=[64, 96]), tiny_config(model__input_size=[96, 64])
    found = transfer.start_from(built(config, 1), built(source, 0).state_dict(), config, source, "there")
    assert set(transfer.BY_CELL) <= set(found.anew)


@pytest.mark.parametrize("kinds", [("rtmpose", "cigpose"), ("cigpose", "rtmpose")], ids="-to-".join)
def test_between_the_heads_goes_what_leads_to_the_attention_unit_under_its_other_name(
    tiny_config: Any, kinds: tuple[str, str]
) -> None:
    source, config = (tiny_config(model__head__kind=kind) for kind in kinds)
    given, model = built(source, 0).state_dict(), built(config, 1)
    given |= {name: tensor + 1 for name, tensor in given.items() if name.endswith(".0.g")}
    found = transfer.start_from(model, given, config, source, "there")
    names = {"rtmpose": "head.mlp", "cigpose": "head.mlp_pre_gau"}
    there, here = (names[kind] for kind in kinds)
    for layer in ("0.g", "1.weight"):
        assert torch.equal(model.state_dict()[f"{here}.{layer}"], given[f"{there}.{layer}"])
        assert found.mapped[f"{here}.{layer}"] == f"as the other head's {there}.{layer}"
    assert f"{there}.1.weight" not in found.unused
    assert {
        name for name in found.anew if not name.startswith(("head.cim", "head.gcn", "head.cls", "head.init"))
    } == set()
    assert all(torch.equal(model.state_dict()[name], given[name]) for name in given if name.startswith("head.gau"))


def test_of_a_file_that_does_not_say_its_keypoints_none_is_taken(tiny_config: Any) -> None:
    config = tiny_config()
    found = transfer.start_from(built(config, 1), built(config, 0).state_dict(), config, None, "there")
    assert set(found.anew) == set(transfer.BY_KEYPOINT) and "does not say which keypoints" in found.summary()


def test_a_file_of_which_nothing_fits_is_one_sentence(tiny_config: Any) -> None:
    config, other = tiny_config(), tiny_config(model__backbone__widen_factor=0.25, model__head__hidden=24)
    model = built(config, 1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scalars = {name: tensor for name, tensor in built(other, 0).state_dict().items() if tensor.numel() == 1}
    for given in ({"teacher.weight": torch.ones(3, 3)}, scalars):
        with pytest.raises(
            WeightsError, match=r"^train.start_from: nothing of there fits quickstart: none of its .*\.$"
        ):
            transfer.start_from(model, given, config, None, "there")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    broken = {"head.gau.o.weight": torch.full_like(before["head.gau.o.weight"], torch.nan)}
    with pytest.raises(WeightsError, match="not finite"):
        transfer.start_from(model, broken, config, None, "there")


def test_on_the_meta_device_the_same_is_told_and_nothing_copied(tiny_config: Any) -> None:
    source, config = tiny_config(), with_keypoints(tiny_config, "crowdpose", model__input_size=[128, 128])
    given = built(source, 0).state_dict()
    with torch.device("meta"):
        planned = build_model(config)
    told = transfer.start_from(
        planned, {name: tensor.to("meta") for name, tensor in given.items()}, config, source, "there"
    )
    assert told == transfer.start_from(built(config, 1), given, config, source, "there")
    assert told.interpolated and told.mapped
