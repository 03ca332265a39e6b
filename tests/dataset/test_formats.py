"""What annotation tools write, and what is read from it. The pictures are 40 x 20 pixels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from cigpose.dataset.reading import Photographs, read_labels
from cigpose.files.errors import DataError

NAMES = ["nose", "left_hand", "right_hand"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures a.jpg, b.jpg and day/c.png."""
    for name in ("a.jpg", "b.jpg", "day/c.png"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.zeros((20, 40, 3), dtype=np.uint8))
    return tmp_path


def coco(**changes: Any) -> dict[str, Any]:
    """Two people on two pictures."""
    images = [{"id": i, "file_name": name, "width": 40, "height": 20} for i, name in enumerate(("a.jpg", "c.png"))]
    person = {"category_id": 1, "keypoints": [10, 5, 2, 30, 15, 1, 0, 0, 0], "bbox": [5, 0, 30, 20], "area": 300}
    people = [{**person, "id": 7 + i, "image_id": i} for i in range(2)]
    category = {"id": 1, "name": "person", "keypoints": NAMES, "skeleton": [[1, 2], [1, 3]]}
    return {"images": images, "annotations": people, "categories": [category]} | changes


def read(folder: Path, text: str, name: str = "labels.json", **how: Any) -> Any:
    (folder / name).write_text(text, encoding="utf-8")
    return read_labels(folder / name, Photographs(folder / "photos"), **how)


def test_coco_json_keeps_its_people_and_finds_pictures_in_folders(folder: Path) -> None:
    labels = read(folder, json.dumps(coco()))
    assert [image["file_name"] for image in labels.images] == ["a.jpg", "day/c.png"]
    assert (labels.names, labels.edges, labels.num_people) == (tuple(NAMES), ((0, 1), (0, 2)), 2)
    assert labels.people[1] | {"image_id": 1, "id": 8, "area": 300} == labels.people[1]
    assert labels.notes == []


def test_a_skeleton_that_counts_from_0_is_taken_so_and_told_of(folder: Path) -> None:
    document = coco()
    document["categories"][0]["skeleton"] = [[0, 1], [0, 2]]
    labels = read(folder, json.dumps(document))
    assert labels.edges == ((0, 1), (0, 2))
    assert "from 0" in labels.notes[0]


def test_people_without_box_and_area_get_them_and_it_is_told(folder: Path) -> None:
    document = coco()
    for person in document["annotations"]:
        del person["bbox"], person["area"]
    labels = read(folder, json.dumps(document))
    x, y, w, h = labels.people[0]["bbox"]
    assert x < 10 and y < 5 and x + w > 30 and y + h > 15 and x + w <= 40 and y + h <= 20
    assert labels.people[0]["area"] == pytest.approx(0.53 * w * h)
    assert [note[:20] for note in labels.notes] == ["2 people have no box", "2 people have no are"]


def test_people_without_keypoints_and_crowds_are_not_counted_and_told_of(folder: Path) -> None:
    document = coco()
    document["annotations"][0]["keypoints"] = [0] * 9
    document["annotations"].append(document["annotations"][1] | {"id": 30, "iscrowd": 1})
    labels = read(folder, json.dumps(document))
    assert (labels.num_people, len(labels.people)) == (1, 3)  # evaluation wants the crowds
    assert labels.notes == ["2 people are crowds or have no keypoint labelled: they are not trained on."]


def test_missing_pictures_and_wrong_sizes_are_told_of(folder: Path) -> None:
    document = coco()
    document["images"][0]["file_name"] = "gone.jpg"
    document["images"][1]["width"] = 400
    labels = read(folder, json.dumps(document))
    assert labels.num_people == 1 and labels.images[0]["width"] == 40
    assert "gone.jpg" in labels.notes[0] and "another size" in labels.notes[1]


def test_ids_that_are_texts_are_numbered_anew(folder: Path) -> None:
    document = coco()
    for entry in document["images"]:
        entry["id"] = f"picture-{entry['id']}"
    for person in document["annotations"]:
        person["image_id"] = f"picture-{person['image_id']}"
    labels = read(folder, json.dumps(document))
    assert [person["image_id"] for person in labels.people] == [image["id"] for image in labels.images] == [1, 2]


def broken(change: Callable[[dict[str, Any]], None]) -> str:
    document = coco()
    change(document)
    return json.dumps(document)


def with_other_category(document: dict[str, Any]) -> None:
    document["categories"].append({"id": 2, "name": "dog"})
    document["annotations"][0]["category_id"] = 2


def without_the_picture_of_the_only_person(document: dict[str, Any]) -> None:
    document["images"][0]["file_name"] = "x.jpg"
    document["annotations"].pop()


REFUSED = {
    "not json": ("{", "not valid JSON"),
    "other json": ("{}", "JSON of another kind"),
    "no images": (json.dumps({"images": [], "annotations": [{}]}), "has no list `images`"),
    "counts differ": (broken(lambda d: d["annotations"][0].update(keypoints=[1, 2, 2])), "one count for all"),
    "no keypoints": (broken(lambda d: [a.pop("keypoints") for a in d["annotations"]]), "no numbers of `keypoints`"),
    "words": (broken(lambda d: d["annotations"][0].update(keypoints=["x"] * 9)), "expected numbers x, y, v"),
    "names of others": (broken(lambda d: d["categories"][0].update(keypoints=["a"])), "names 1 keypoints"),
    "skeleton beyond": (broken(lambda d: d["categories"][0].update(skeleton=[[1, 4]])), "joins keypoints 1 to 4"),
    "sigmas": (broken(lambda d: d["categories"][0].update(sigmas=[0.1, 0, 1])), "expected 3 numbers above 0"),
    "two categories": (broken(with_other_category), "Choose one by --category"),
    "nobody": (broken(lambda d: [a.update(keypoints=[0] * 9) for a in d["annotations"]]), "nobody in it has"),
    "nobody here": (broken(without_the_picture_of_the_only_person), "nobody is labelled on the pictures"),
    "no picture": (broken(lambda d: [i.update(file_name="x.jpg") for i in d["images"]]), "none of the 2 pictures"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "said"), REFUSED.values(), ids=REFUSED)
def test_a_file_that_cannot_be_used_is_refused_in_one_sentence(folder: Path, text: str, said: str) -> None:
    with pytest.raises(DataError, match=r"labels\.json|photos") as refused:
        read(folder, text)
    assert said in str(refused.value)


@pytest.mark.parametrize(("category", "num"), [("person", 1), ("dog", 1)])
def test_one_of_several_categories_can_be_chosen(folder: Path, category: str, num: int) -> None:
    assert read(folder, broken(with_other_category), category=category).num_people == num


YAML = "path: .\ntrain: images/train\nval: images/val\nkpt_shape: [3, 3]\nflip_idx: [0, 2, 1]\nnames: {0: person}\n"


def ultralytics(tmp_path: Path, line: str, about: str = YAML) -> Any:
    for side in ("train", "val"):
        (tmp_path / "images" / side).mkdir(parents=True)
        (tmp_path / "labels" / side).mkdir(parents=True)
        cv2.imwrite(str(tmp_path / "images" / side / "a.jpg"), np.zeros((20, 40, 3), dtype=np.uint8))
        (tmp_path / "labels" / side / "a.txt").write_text(f"{line}\n\n")
    (tmp_path / "data.yaml").write_text(about)
    return read_labels(tmp_path / "data.yaml", Photographs(tmp_path / "images"))


def test_ultralytics_labels_become_pixels_and_keep_their_sides_and_mates(tmp_path: Path) -> None:
    labels = ultralytics(tmp_path, "0 0.5 0.5 0.5 0.5  0.25 0.5 2  0.75 0.5 1  0 0 0")
    assert labels.people[0]["keypoints"] == [10, 10, 2, 30, 10, 1, 0, 0, 0]
    assert labels.people[0]["bbox"] == [10, 5, 20, 10]
    assert labels.sides == {"train/a.jpg": "train", "val/a.jpg": "val"}
    assert (labels.flip_pairs, labels.names, labels.num_keypoints) == (((1, 2),), (), 3)


def test_ultralytics_keypoints_without_visibility_are_unlabelled_at_zero(tmp_path: Path) -> None:
    about = YAML.replace("[3, 3]", "[3, 2]") + f"kpt_names: {{0: {json.dumps(NAMES)}}}\n"
    labels = ultralytics(tmp_path, "0 0.5 0.5 0.5 0.5  0.25 0.5  0.75 0.5  0 0", about)
    assert labels.people[0]["keypoints"] == [10, 10, 2, 30, 10, 2, 0, 0, 0]
    assert labels.names == tuple(NAMES)


@pytest.mark.parametrize(
    ("line", "about", "said"),
    [
        ("0 0.5 0.5 0.5 0.5 0.25", YAML, "line 1: expected 14 numbers"),
        ("0 x 0.5 0.5 0.5" + " 0" * 9, YAML, "line 1: expected 14 numbers"),
        ("", YAML.replace("kpt_shape: [3, 3]", ""), "has no kpt_shape"),
        ("", YAML.replace("[3, 3]", "[3, 4]"), "kpt_shape is [3, 4]"),
        ("", YAML.replace("[0, 2, 1]", "[0, 1, 1]"), "flip_idx is [0, 1, 1]"),
        ("", YAML.replace("[0, 2, 1]", "[1, 2, 0]"), "does not lead back"),
        ("", YAML.replace("{0: person}", "[person, dog]"), "several classes"),
    ],
)
def test_ultralytics_faults_are_named(tmp_path: Path, line: str, about: str, said: str) -> None:
    with pytest.raises(DataError) as refused:
        ultralytics(tmp_path, line, about)
    assert said in str(refused.value)


SVG = (
    (
        '<svg><line data-type="edge" data-node-from="1" data-node-to="2"></line>'
        '<circle data-element-id="1" data-node-id="1" data-label-name="nose"></circle>'
        '<circle data-element-id="2" data-node-id="2" data-label-name="left_hand"></circle></svg>'
    )
    .replace("<", "&lt;")
    .replace(">", "&gt;")
)
CVAT = f"""<?xml version="1.0"?><annotations><meta><task><labels>
<label><name>person</name><type>skeleton</type><svg>{SVG}</svg></label>
<label><name>nose</name><type>points</type><parent>person</parent></label>
<label><name>left_hand</name><type>points</type><parent>person</parent></label>
<label><name>right_hand</name><type>points</type><parent>person</parent></label></labels></task></meta>
<image id="0" name="a.jpg" width="40" height="20"><skeleton label="person">
<points label="left_hand" outside="0" occluded="1" points="30.0,15.0"/>
<points label="nose" outside="0" occluded="0" points="10.0,5.0"/>
<points label="right_hand" outside="1" occluded="0" points="1.0,1.0"/></skeleton></image></annotations>"""


def test_cvat_skeletons_keep_order_lines_and_visibility(folder: Path) -> None:
    labels = read(folder, CVAT, "annotations.xml")
    assert (labels.names, labels.edges) == (tuple(NAMES), ((0, 1),))
    assert labels.people[0]["keypoints"] == [10, 5, 2, 30, 15, 1, 0, 0, 0]


def test_cvat_points_are_a_person_each(folder: Path) -> None:
    image = '<image name="a.jpg" width="40" height="20"><points label="p" points="1,2;3,4"/></image>'
    text = f"<annotations>{image}</annotations>"
    labels = read(folder, text, "annotations.xml")
    assert (labels.names, labels.people[0]["keypoints"]) == ((), [1, 2, 2, 3, 4, 2])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<a", "not valid XML"),
        ("<annotations/>", "has no <image>"),
        (CVAT.replace("<skeleton", "<box").replace("</skeleton", "</box"), "nobody has skeletons or points"),
        (CVAT.replace("30.0,15.0", "30.0"), "are no x,y"),
        (CVAT.replace('points label="nose"', 'points label="tail"'), "has a point 'tail'"),
        (CVAT.replace('width="40" height', 'width="" height'), "has no width and height"),
    ],
)  # fmt: skip
def test_cvat_faults_are_named(folder: Path, text: str, said: str) -> None:
    with pytest.raises(DataError) as refused:
        read(folder, text, "annotations.xml")
    assert said in str(refused.value)


def studio(*people: list[tuple[str, float, float]], boxes: int = 0, **task: Any) -> str:
    """A task; each annotator has labelled these keypoints, in percent; boxes are halves of the picture."""
    size = {"original_width": 40, "original_height": 20}
    rectangles = [
        {"id": f"r{i}", "type": "rectanglelabels", "value": {"x": 50 * i, "y": 0, "width": 50, "height": 100}, **size}
        for i in range(boxes)
    ]
    annotations = [
        {"result": rectangles + [
            {"type": "keypointlabels", "value": {"x": x, "y": y, "keypointlabels": [name]}, **size}
            for name, x, y in points
        ]}
        for points in people
    ]  # fmt: skip
    image = {"img": "/data/upload/1/0123abcd-a.jpg"}
    return json.dumps([{"id": 1, "data": image, "annotations": annotations} | task])


def test_label_studio_keypoints_become_a_person_and_further_annotators_repeats(folder: Path) -> None:
    labels = read(folder, studio([("nose", 25, 25), ("left_hand", 75, 75)], [("nose", 30, 25)]), names=NAMES)
    assert labels.images[0]["file_name"] == "a.jpg"
    assert labels.people[0]["keypoints"] == [10, 5, 2, 30, 15, 2, 0, 0, 0]
    assert (labels.repeats[0]["repeats"], labels.repeats[0]["keypoints"][0]) == (labels.people[0]["id"], 12)


def test_label_studio_keypoints_belong_to_the_rectangle_around_them(folder: Path) -> None:
    labels = read(folder, studio([("nose", 25, 25), ("nose", 75, 50)], boxes=2))
    assert [person["keypoints"][:2] for person in labels.people] == [[10, 5], [30, 10]]
    assert [person["bbox"] for person in labels.people] == [[0, 0, 20, 20], [20, 0, 20, 20]]


@pytest.mark.parametrize(
    ("text", "how", "said"),
    [
        (studio([("nose", 1, 1), ("nose", 2, 2)]), {}, "two keypoints 'nose' belong to one person"),
        (studio([]), {}, "no task has keypoint labels"),
        (studio([("nose", 1, 1)]), {"names": ["tail"]}, "that --keypoints does not name"),
        (studio([("nose", 1, 1)], data={}), {}, "does not name its picture"),
        (studio([("nose", 1, 1)]).replace("original_width", "w"), {}, "does not say `original_width`"),
        (studio([("nose", 1, 1)]).replace('["nose"]', '["nose", "ear"]'), {}, "expected exactly one"),
    ],
)
def test_label_studio_faults_are_named(folder: Path, text: str, how: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as refused:
        read(folder, text, **how)
    assert said in str(refused.value)
