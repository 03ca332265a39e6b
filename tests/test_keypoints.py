from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cigpose.keypoints import COCO, COCO_WHOLEBODY, CROWDPOSE, KeypointSet, keypoint_set

SETS = [COCO, COCO_WHOLEBODY, CROWDPOSE]
TOY = {
    "name": "toy",
    "names": ["head", "left_hand", "right_hand", "left_foot", "right_foot"],
    "sigmas": [0.05, 0.05, 0.05, 0.08, 0.08],
    "flip_pairs": [["left_hand", "right_hand"], ["left_foot", "right_foot"]],
    "edges": [["head", "left_hand"], ["head", "right_hand"], ["head", "left_foot"], ["head", "right_foot"]],
    "parts": {
        "body": ["head", "left_hand", "right_hand", "left_foot", "right_foot"],
        "hands": ["left_hand", "right_hand"],
    },
}


@pytest.mark.parametrize("known", SETS, ids=lambda known: known.name)
def test_flipping_twice_is_the_identity(known: KeypointSet) -> None:
    np.testing.assert_array_equal(known.flip_index[known.flip_index], np.arange(len(known)))


@pytest.mark.parametrize("known", SETS, ids=lambda known: known.name)
def test_flip_pairs_swap_left_and_right_in_the_names(known: KeypointSet) -> None:
    for a, b in known.flip_pairs:
        if not known.names[a].startswith("face"):
            assert {known.names[a].split("_")[0], known.names[b].split("_")[0]} == {"left", "right"}
            assert known.names[a].split("_", 1)[1] == known.names[b].split("_", 1)[1]


def test_wholebody_parts_cover_every_keypoint_once() -> None:
    covered = [i for part in COCO_WHOLEBODY.parts.values() for i in part]
    assert sorted(covered) == list(range(133))


@pytest.mark.parametrize(
    ("known", "metainfo", "graph"),
    [(COCO, "coco", "coco"), (COCO_WHOLEBODY, "coco_wholebody", "wholebody"), (CROWDPOSE, "crowdpose", "crowdpose")],
    ids=["coco", "coco_wholebody", "crowdpose"],
)
def test_tables_equal_the_reference(known: KeypointSet, metainfo: str, graph: str, golden: Path) -> None:
    meta = json.loads((golden / "metainfo.json").read_text())[metainfo]
    graphs = json.loads((golden / "graphs.json").read_text())[graph]
    assert list(known.names) == meta["names"]
    assert known.flip_index.tolist() == meta["flip_indices"]
    assert list(known.upper_body) == meta["upper_body_ids"]
    assert list(known.lower_body) == meta["lower_body_ids"]
    np.testing.assert_allclose(known.sigmas, meta["sigmas"], atol=1e-6)
    assert {frozenset(edge) for edge in known.edges} == {frozenset(edge) for edge in graphs["edges"]}
    assert len(known.edges) == len(graphs["edges"])
    assert sorted(map(sorted, known.groups)) == sorted(map(sorted, graphs["groups"]))


def test_a_table_of_ones_own_is_read_by_names() -> None:
    toy = keypoint_set(TOY)
    assert len(toy) == 5
    assert toy.flip_index.tolist() == [0, 2, 1, 4, 3]
    assert toy.parts["hands"] == (1, 2)
    assert toy.groups == ((0, 1, 2, 3, 4),)
    assert toy.annotation_fields == {"keypoints": 5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigmas": [0.1]}, "expected 5 positive sigmas, got 1"),
        ({"names": ["head", "head", "a", "b", "c"]}, "unique"),
        ({"flip_pairs": [["left_hand", "nose"]]}, "flip_pairs: 'nose' is not one of the names"),
        ({"flip_pairs": [["left_hand", "right_hand"], ["left_hand", "head"]]}, "two flip_pairs"),
        ({"flip_pairs": [["left_hand"]]}, "pair of names"),
        ({"edges": [["head", "head"]]}, "two different keypoints"),
        ({"edges": [["head", "left_hand"], ["left_hand", "head"]]}, "listed twice"),
        ({"colour": "red"}, "unknown keys"),
        ({"parts": {}}, "parts must name at least one part"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_table_that_does_not_fit_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        keypoint_set({**TOY, **change})


def test_an_incomplete_table_names_what_is_missing() -> None:
    with pytest.raises(ValueError, match=r"\['sigmas'\] missing"):
        keypoint_set({"name": "toy", "names": ["a"]})


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="coco_wholebody"):
        keypoint_set("coco_whole_body")


def test_an_index_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"groups names keypoints \[17\]"):
        replace(COCO, groups=((16, 17),))
