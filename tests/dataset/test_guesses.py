from __future__ import annotations

import numpy as np
import pytest

from cigpose.config import config_from_mapping
from cigpose.dataset.labels import OwnLabels
from cigpose.dataset.limbs import limb_groups
from cigpose.dataset.names import coco_spelling, guess_flip_pairs, known_set, published_sigmas
from cigpose.dataset.plan import Machine, choose_size, crop_size, make_plan
from cigpose.dataset.split import held_out_share, refuse_shared_pictures, split_pictures
from cigpose.dataset.table import make_table, names_asked_for
from cigpose.files.errors import DataError
from cigpose.keypoints import COCO, CROWDPOSE, KeypointSet


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("left_wrist", "left_wrist"), ("Left Wrist", "left_wrist"), ("LWrist", "left_wrist"), ("l_wrist", "left_wrist"),
        ("wrist-R", "right_wrist"), ("RIGHT_ANKLE", "right_ankle"), ("rightAnkle", "right_ankle"),
        ("head_top", "top_head"), ("nose", "nose"), ("left_thumb1", "left_thumb_1"), ("lower_lip", "lower_lip"),
    ],
)  # fmt: skip
def test_names_in_any_spelling_are_the_same(name: str, plain: str) -> None:
    assert coco_spelling(name) == plain


@pytest.mark.parametrize("known", [COCO, CROWDPOSE], ids=lambda known: known.name)
def test_mates_guessed_from_published_names_are_the_published_ones(known: KeypointSet) -> None:
    assert guess_flip_pairs(known.names) == (known.flip_pairs, ())
    assert known_set([name.title().replace("_", " ") for name in known.names]) is known


def test_mates_are_found_in_any_place_and_those_without_are_named() -> None:
    pairs, alone = guess_flip_pairs(["tail", "paw_front_L", "R_ear", "paw_front_R", "L_ear", "left_horn"])
    assert (set(pairs), alone) == ({(1, 3), (2, 4)}, ("left_horn",))


def test_limbs_of_crowdpose_are_those_of_its_authors_and_its_head_has_the_shoulders_too() -> None:
    found = {frozenset(group) for group in limb_groups(14, CROWDPOSE.edges, CROWDPOSE.flip_pairs)}
    theirs = {frozenset(group) for group in CROWDPOSE.groups}
    assert found - theirs == {frozenset((0, 1, 12, 13))}
    assert theirs - found == {frozenset((13, 6, 7)), frozenset((12, 13))}


@pytest.mark.parametrize(
    ("count", "edges", "groups"),
    [
        (3, [], {(0, 1, 2)}),
        (4, [(0, 1), (2, 3)], {(0, 1), (2, 3)}),
        (4, [(0, 1), (1, 2), (2, 0)], {(0, 1, 2)}),
        (5, [(0, 1), (1, 2), (2, 3), (3, 4)], {(0, 1, 2, 3, 4)}),
        (4, [(0, 1), (0, 2), (0, 3)], {(0, 1, 2, 3)}),
        (6, [(0, 1), (1, 2), (2, 3), (3, 0), (0, 4), (4, 5)], {(0, 1, 2, 3), (0, 4, 5)}),
    ],
    ids=["no lines", "two sticks", "ring", "snake", "star", "ring with a tail"],
)
def test_limbs_of_odd_skeletons(count: int, edges: list[tuple[int, int]], groups: set[tuple[int, ...]]) -> None:
    assert set(limb_groups(count, edges, ())) == groups


def labels_of(names: tuple[str, ...] = (), people: int = 10, **more: object) -> OwnLabels:
    count = len(names) or 3
    images = [{"id": i, "file_name": f"day{i % 5}/{i}.jpg", "width": 40, "height": 40} for i in range(people)]
    persons = [
        {"id": i, "image_id": i, "keypoints": [1.0, 1.0, 2.0] * count, "bbox": [0, 0, 30, 40], "area": 600}
        for i in range(people)
    ]
    values = {"source": "l.json", "kind": "COCO", "images": images, "people": persons, "names": names}
    return OwnLabels(**{**values, "num_keypoints": count, **more})  # type: ignore[arg-type]


def test_names_of_a_published_set_take_its_table() -> None:
    assert make_table(labels_of(CROWDPOSE.names), "mine", None, None).value == "crowdpose"
    assert names_asked_for("crowdpose") == CROWDPOSE.names


def test_sigmas_are_published_ones_by_name_and_otherwise_said_to_be_assumed() -> None:
    table = make_table(labels_of(("left_wrist", "right_wrist", "club")), "golf", None, None)
    keypoints = table.keypoints
    assert keypoints.sigmas == (0.062, 0.062, 0.079)
    assert keypoints.sigmas_origin == "published by COCO (2 of 3), assumed to be 0.079 (1 of 3)"
    assert any("club" in note and "0.079" in note for note in table.notes)
    assert set(published_sigmas(["neck", "left_heel", "club"])) == {"neck", "left_heel"}


def test_lines_of_a_file_without_skeleton_are_published_ones_and_told_of() -> None:
    table = make_table(labels_of(("LWrist", "LElbow", "LShoulder")), "arm", None, None)
    assert table.keypoints.edges == ((2, 1), (1, 0))
    assert any("no skeleton: 2 lines" in note for note in table.notes)
    alone = make_table(labels_of(("tail", "horn", "hoof")), "cow", None, None)
    assert any("no skeleton and the names tell none" in note for note in alone.notes)


def test_sigmas_of_the_file_and_of_the_user_come_first() -> None:
    names = ("left_wrist", "right_wrist", "club")
    table = make_table(labels_of(names, sigmas=(0.1, 0.2, 0.3)), "golf", None, None)
    assert (table.keypoints.sigmas, table.keypoints.sigmas_origin) == ((0.1, 0.2, 0.3), "of l.json")
    table = make_table(labels_of(names), "golf", None, {"club": 0.5})
    assert table.keypoints.sigmas == (0.062, 0.062, 0.5)
    assert table.keypoints.sigmas_origin == "given by the user (1 of 3), published by COCO (2 of 3)"
    with pytest.raises(DataError, match="'clubs' is not one of the keypoints"):
        make_table(labels_of(names), "golf", None, {"clubs": 0.5})


@pytest.mark.parametrize(
    ("labels", "names", "said"),
    [
        (labels_of(), None, "does not name its 3 keypoints"),
        (labels_of(num_keypoints=14), None, "crowdpose if they are CrowdPose's"),
        (labels_of(), ("a", "b"), "people have 3 keypoints, --keypoints names 2"),
        (labels_of(), ("a", "b", "a"), "two keypoints have the same name"),
    ],
)
def test_a_table_without_names_is_refused(labels: OwnLabels, names: tuple[str, ...] | None, said: str) -> None:
    with pytest.raises(DataError) as refused:
        make_table(labels, "mine", names, None)
    assert said in str(refused.value)


def test_a_picture_keeps_its_side_when_others_join() -> None:
    few, many = labels_of(people=50), labels_of(people=80)
    before, after = (split_pictures(labels, 0.2) for labels in (few, many))
    for old, new in zip(before, after, strict=True):
        assert {image["file_name"] for image in old} <= {image["file_name"] for image in new}
    assert 3 <= len(before[1]) <= 20


def test_pictures_of_a_folder_stay_together() -> None:
    train, val = split_pictures(labels_of(people=50), 0.3, "folder")
    folders = [{image["file_name"].split("/")[0] for image in side} for side in (train, val)]
    assert not folders[0] & folders[1] and folders[0] | folders[1] == {f"day{i}" for i in range(5)}


def test_the_sides_that_the_labels_say_are_kept() -> None:
    labels = labels_of(people=4)
    labels.sides = {image["file_name"]: "val" if image["id"] == 2 else "train" for image in labels.images}
    assert [image["id"] for image in split_pictures(labels, 0.9)[1]] == [2]


def test_a_side_without_people_and_a_picture_on_both_sides_are_refused() -> None:
    with pytest.raises(DataError, match="no people are left to measure on"):
        split_pictures(labels_of(people=3), 1e-9)
    with pytest.raises(DataError, match=r"1 of its pictures are trained on too, such as day0/0\.jpg"):
        refuse_shared_pictures(labels_of().images, labels_of().images[:1], "val.json")


@pytest.mark.parametrize(("people", "share"), [(100, 0.3), (1000, 0.2), (2000, 0.1), (100_000, 0.1)])
def test_more_is_held_out_of_few_people(people: int, share: float) -> None:
    assert held_out_share(people) == pytest.approx(share)


@pytest.mark.parametrize(
    ("box", "spread", "size"),
    [((300, 400), 0.0, (136, 184)), ((400, 300), 0.0, (184, 136)), ((400, 400), 1.0, (160, 160)),
     ((60, 80), 0.0, (72, 96))],
    ids=["upright", "lying", "all ways", "small"],
)  # fmt: skip
def test_the_crop_has_the_shape_and_at_most_the_size_of_people(
    box: tuple[int, int], spread: float, size: tuple[int, int]
) -> None:
    factor = np.exp(np.linspace(-spread, spread, 101))
    boxes = np.stack([0 * factor, 0 * factor, box[0] * factor, box[1] / factor], axis=1)
    assert crop_size(boxes, 160 * 160, 8)[0] == size


@pytest.mark.parametrize(
    ("people", "gpus", "name"),
    [(100, 0, "cigpose-tiny"), (10**6, 0, "cigpose-tiny"), (100, 1, "cigpose-s"), (20_000, 1, "cigpose-m"),
     (60_000, 8, "cigpose-l")],
)  # fmt: skip
def test_the_model_fits_people_and_machine(people: int, gpus: int, name: str) -> None:
    assert choose_size(people, Machine(cores=8, gpus=gpus))[0].name == name


@pytest.mark.parametrize("gpus", [0, 1, 3])
@pytest.mark.parametrize("people", [1, 40, 20_000])
def test_every_plan_is_a_whole_experiment(gpus: int, people: int) -> None:
    plan = make_plan(
        name="golf",
        table=make_table(labels_of(("head", "club", "ball")), "golf", None, None),
        boxes_xywh=np.array([[0, 0, 300, 400]]),
        num_train=people,
        num_val=10,
        datasets={
            f"golf-{side}": {"raw": "golf", "reader": "coco", "images": "images", "annotations": f"{side}.json"}
            for side in ("train", "val")
        },
        has_areas=False,
        machine=Machine(cores=4, gpus=gpus),
        minutes=10,
        measure_speed=lambda config: 50.0,
    )
    config = config_from_mapping(plan.config.to_mapping())
    assert config.keypoint_set.sigmas_origin == plan.config.keypoint_set.sigmas_origin
    assert plan.config.augmentation.stage1.flip_prob == 0 and not plan.config.evaluate.flip_test  # nothing has a mate
    assert plan.config.evaluate.area == "box"
    assert plan.config.train.epochs >= 3 and plan.seconds == pytest.approx(
        plan.config.train.epochs * (people + 10 / 12) / 50
    )
    assert people * plan.config.train.epochs / 50 <= max(600, 3 * people / 50)
