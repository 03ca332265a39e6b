"""Faults of labels are found, named and ranked; what is only a custom of a set is said once."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from spoilt_labels import GEOMETRIC, Spoiler, found_first

from cigpose.cli.main import main
from cigpose.config import load_preset
from cigpose.dataset import plausibility
from cigpose.dataset.check import LabelCheck, check_labels
from cigpose.dataset.check_labels import LabelledPeople, read_labelled_people
from cigpose.dataset.check_pictures import find_unlabelled
from cigpose.dataset.repairs import all_repairs
from cigpose.files.errors import DataError
from cigpose.keypoints import COCO, COCO_WHOLEBODY
from cigpose.render.annotate import CATEGORY
from cigpose.render.scene import render_image

PICTURES = 160


@pytest.fixture(scope="session")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with labels.json of rendered people, and photos/ with a few of the pictures."""
    folder = tmp_path_factory.mktemp("rendered-people")
    (folder / "photos").mkdir()
    config = load_preset("quickstart").data.render["rendered-train"]
    images: list[dict[str, Any]] = []
    people: list[dict[str, Any]] = []
    for number in range(PICTURES):
        picture, persons = render_image(config, number)
        height, width = picture.shape[:2]
        images.append({"id": number, "file_name": f"{number:04d}.jpg", "width": width, "height": height})
        cv2.imwrite(str(folder / "photos" / f"{number:04d}.jpg"), picture[..., ::-1])
        for person in persons:
            slim = {key: person[key] for key in ("category_id", "iscrowd", "bbox", "num_keypoints", "keypoints")}
            people.append({"id": len(people) + 1, "image_id": number, **slim})
    document = {"images": images, "annotations": people, "categories": [CATEGORY]}
    (folder / "labels.json").write_text(json.dumps(document))
    return folder


@pytest.fixture(scope="session")
def spoilt(rendered: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Spoiler]:
    """The labels with 36 faults of six kinds."""
    spoiler = Spoiler(json.loads((rendered / "labels.json").read_text()), COCO.names, seed=3)
    for kind in GEOMETRIC:
        spoiler.spoil(kind, 6)
    path = tmp_path_factory.mktemp("spoilt") / "labels.json"
    path.write_text(json.dumps(spoiler.document))
    return path, spoiler


@pytest.fixture(scope="session")
def spoilt_check(spoilt: tuple[Path, Spoiler]) -> LabelCheck:
    return check_labels(read_labelled_people(spoilt[0]))


def people_of(folder: Path, document: dict[str, Any], **options: Any) -> LabelledPeople:
    path = folder / "some.json"
    path.write_text(json.dumps(document))
    return read_labelled_people(path, **options)


def small_document(count: int = 3) -> dict[str, Any]:
    """People in a row, one a picture, all of the same pose."""
    points = [[20 + 3 * k, 30 + 5 * k, 2] for k in range(17)]
    flat = [float(value) for point in points for value in point]
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 200, "height": 200} for i in range(count)],
        "categories": [CATEGORY],
        "annotations": [
            {
                "id": 100 + i,
                "image_id": i,
                "category_id": 1,
                "bbox": [10, 20, 80, 100],
                "num_keypoints": 17,
                "keypoints": [value + 0.01 * i * (place % 3 < 2) for place, value in enumerate(flat)],
            }
            for i in range(count)
        ],
    }


def kinds_of(check: LabelCheck) -> dict[int | None, set[str]]:
    found: dict[int | None, set[str]] = {}
    for suspect in check.suspects:
        found.setdefault(suspect.annotation_id, set()).update(f.kind for f in suspect.findings if f.suspicion >= 0.5)
    return {annotation_id: kinds for annotation_id, kinds in found.items() if kinds}


@pytest.mark.slow
def test_nineteen_of_twenty_faults_of_rendered_people_are_among_as_many_suspects(
    spoilt: tuple[Path, Spoiler], spoilt_check: LabelCheck
) -> None:
    shares = found_first(spoilt_check, spoilt[1].truth)
    print(shares)
    assert shares["all"] >= 0.95


@pytest.mark.slow
def test_faults_get_their_names(spoilt: tuple[Path, Spoiler], spoilt_check: LabelCheck) -> None:
    found = kinds_of(spoilt_check)
    names = {
        "swapped limb": {"swapped limb"},
        "outside": {"outside box", "outside picture"},
        "shifted": {"shifted"},
        "visibility": {"visibility"},
    }
    right = [bool(found.get(person, set()) & names[kind]) for person, kind in spoilt[1].truth.items() if kind in names]
    assert np.mean(right) >= 0.9
    twins = {person for person, kind in spoilt[1].truth.items() if kind == "duplicate"}
    named = {person % 10_000_000 for person, kinds in found.items() if person and "duplicate person" in kinds}
    assert twins <= named


def test_the_command_writes_a_page_and_json_and_touches_nothing_else(rendered: Path, tmp_path: Path) -> None:
    document = json.loads((rendered / "labels.json").read_text())
    document["annotations"] = document["annotations"][:30]  # too few to learn from: the rules alone
    for person in document["annotations"][:3]:
        person["num_keypoints"] = 40
    labels, photos, out = tmp_path / "labels.json", rendered / "photos", tmp_path / "out"
    labels.write_text(json.dumps(document))
    before = {path: path.stat().st_mtime_ns for path in [labels, *photos.iterdir()]}
    command = [sys.executable, "-m", "cigpose.cli.main", "dataset", "check", photos, labels, "--out", out, "--top", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page, report = (out / "check.html").read_text(), json.loads((out / "check.json").read_text())
    assert page.count("data:image/jpeg;base64,") == 2
    assert 'src="http' not in page and "<script" not in page
    assert {suspect["annotation_id"] for suspect in report["suspects"][:3]} == {1, 2, 3}
    assert report["counts"]["visibility"] == 3
    assert {row["name"] for row in report["keypoints"]} == set(COCO.names)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    kept = page
    assert main(list(map(str, command[3:]))) == 2
    assert (out / "check.html").read_text() == kept


def test_of_two_checks_at_once_both_keep_their_page(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    cv2.imwrite(str(tmp_path / "photos" / "0.jpg"), np.zeros((200, 200, 3), np.uint8))
    (tmp_path / "labels.json").write_text(json.dumps(small_document(6)))
    command = [sys.executable, "-m", "cigpose.cli.main", "dataset", "check", "photos", "labels.json"]
    pair = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(2)]
    said = [process.communicate(timeout=100)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said
    assert {path.parent.name for path in tmp_path.glob("*/check.html")} == {"label-check", "label-check-2"}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("cut", b'{"annotations": [{"id": 1', "cut"),
        ("no keypoints", b'{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "--keypoints"),
        ("nobody", json.dumps({**small_document(), "annotations": []}).encode(), "none of its 0 annotations"),
    ],
)
def test_labels_that_cannot_be_read_are_one_sentence_and_status_1(
    name: str, content: bytes, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "labels.json").write_bytes(content)
    (tmp_path / "photos").mkdir()
    arguments = ["dataset", "check", str(tmp_path / "photos"), str(tmp_path / "labels.json"), "--json"]
    assert main(arguments) == 1
    said = capsys.readouterr()
    assert says in said.err and said.err.count("\n") == 1 and not said.out


def test_nothing_is_written_into_the_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "labels.json").write_text(json.dumps(small_document()))
    arguments = [str(tmp_path / "photos"), str(tmp_path / "labels.json")]
    assert main(["dataset", "check", *arguments, "--out", str(tmp_path / "photos" / "page")]) == 2
    assert "within the pictures" in capsys.readouterr().err
    assert not any((tmp_path / "photos").iterdir())


def test_pictures_missing_broken_twice_and_of_another_size_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "labels.json").write_text(json.dumps(small_document(6)))
    image = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as photos:
        for number, picture in enumerate((image, image, image[:150], image[::-1])):
            photos.writestr(f"{number}.jpg", cv2.imencode(".jpg", picture)[1].tobytes())
        photos.writestr("4.jpg", b"no picture")
    assert main(["dataset", "check", str(tmp_path / "photos.zip"), str(tmp_path / "labels.json"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    found = {
        (suspect["image_id"], finding["kind"]): finding["text"]
        for suspect in report["suspects"]
        for finding in suspect["findings"]
        if suspect["annotation_id"] is None
    }
    assert found.keys() == {(1, "duplicate picture"), (2, "picture"), (4, "picture"), (5, "picture")}
    assert "200 x 150 pixels, the labels say 200 x 200" in found[2, "picture"]
    assert "missing" in found[5, "picture"]


def test_contradictions_are_found_without_anybody_to_learn_from(tmp_path: Path) -> None:
    document = small_document(25)
    people = document["annotations"]
    people[0]["keypoints"][0:3] = [-30.0, 20.0, 2.0]
    people[1]["keypoints"][48:51] = [68.0, 170.0, 2.0]
    people[2]["bbox"] = [10, 20, 0, 100]
    people[3]["keypoints"][9:12] = [0.0, 0.0, 2.0]
    people[4]["num_keypoints"] = 12
    people[5]["keypoints"][3:6] = people[5]["keypoints"][0:3]
    people[6]["keypoints"] = people[7]["keypoints"]
    people.append({**people[8], "id": 300, "bbox": [11, 21, 80, 100]})
    check = check_labels(people_of(tmp_path, document))
    assert kinds_of(check) == {
        100: {"outside picture"},
        101: {"outside box"},
        102: {"box"},
        103: {"visibility", "outside box"},
        104: {"visibility"},
        105: {"same place"},
        107: {"copied labels"},
        300: {"duplicate person"},
    }
    assert any("were not compared" in note for note in check.notes)


def test_what_most_of_a_set_does_is_a_note_and_no_fault(tmp_path: Path) -> None:
    document = small_document(10)
    for person in document["annotations"]:
        person["keypoints"][2] = 0.0  # coordinates are kept where nothing is labelled
        person["num_keypoints"] = 3
    check = check_labels(people_of(tmp_path, document))
    assert kinds_of(check) == {}
    assert sum("not counted" in note for note in check.notes) == 2


def test_entries_that_cannot_be_used_are_suspects_and_the_others_are_read(tmp_path: Path) -> None:
    document = small_document(6)
    people = document["annotations"]
    people[0]["keypoints"] = people[0]["keypoints"][:48]
    people[1]["keypoints"][4] = "x"
    people[2]["image_id"] = 77
    people[3]["keypoints"][0] = float("nan")
    people[4]["bbox"] = None
    read = people_of(tmp_path, document)
    assert read.annotation_id.tolist() == [104, 105]
    assert {entry["annotation_id"] for entry in read.unreadable} == {100, 101, 102, 103}
    assert np.isnan(read.bbox_xywh[0]).all()


def test_a_table_of_ones_own_gets_its_pairs_and_limbs(tmp_path: Path) -> None:
    document = small_document(4)
    names = ["snout", "L_ear", "R_ear", "kneeLeft", "kneeRight"]
    document["categories"] = [{"id": 7, "name": "dog", "keypoints": names, "skeleton": [[1, 2], [1, 3]]}]
    for person in document["annotations"]:
        person["category_id"] = 7
        person["keypoints"] = person["keypoints"][:15]
    keypoints = people_of(tmp_path, document).keypoint_set
    assert keypoints.flip_pairs == ((1, 2), (3, 4)) and keypoints.lines == ((0, 1), (0, 2))
    document["categories"].append({"id": 8, "name": "cat", "keypoints": names})
    with pytest.raises(DataError, match="--category"):
        people_of(tmp_path, document)
    assert people_of(tmp_path, document, category="dog").keypoint_set.names == tuple(names)


@pytest.mark.parametrize("keypoint_set", [COCO, COCO_WHOLEBODY], ids=["coco", "wholebody"])
def test_repairs_undo_themselves_and_hold_limbs_and_the_whole_person(keypoint_set: Any) -> None:
    repairs = all_repairs(keypoint_set)
    swaps = [repair for repair in repairs if repair.kind != "shifted"]
    assert all((repair.order[repair.order] == np.arange(len(keypoint_set))).all() for repair in swaps)
    assert (swaps[0].order == keypoint_set.flip_index).all() and swaps[0].kind == "swapped person"
    members = {repair.keypoints for repair in swaps}
    assert {(9, 10), (13, 14, 15, 16)} <= members or keypoint_set is COCO_WHOLEBODY
    assert len(members) == len(swaps) <= 48


def test_a_detected_person_without_labels_is_found_and_labelled_ones_are_not(tmp_path: Path) -> None:
    people = people_of(tmp_path, small_document(2))
    boxes = np.array([[12, 22, 90, 118, 0.9], [120, 20, 190, 190, 0.8], [130, 30, 180, 180, 0.3]])
    found = find_unlabelled(people, {1: boxes, 0: np.zeros((0, 5))})
    assert [(f.image_id, f.bbox_xywh, f.suspicion) for f in found] == [(1, (120.0, 20.0, 70.0, 170.0), 0.8)]


def sure_model(truth: np.ndarray, mirrored_rows: set[int], moved: dict[int, int]) -> Any:
    """Stands for a model that sees exactly what is in the pictures, but for a pixel of noise."""

    def predict(
        people: LabelledPeople, rows: np.ndarray, pictures: np.ndarray, *, mirrored: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        points = np.empty((len(rows), 17, 2))
        random = np.random.default_rng(int(mirrored))
        for place, (row, picture) in enumerate(zip(rows.tolist(), pictures.tolist(), strict=True)):
            own = int(people.picture[row])
            seen = truth[row].copy()
            if picture != moved.get(row, own):  # somebody else, some of whose joints are where this person has them
                seen[7:] = 200 * random.random((10, 2))
            turned = (row in mirrored_rows and picture == own) != mirrored
            points[place] = np.where(turned, [200, 0] + seen[COCO.flip_index] * [-1, 1], seen) if turned else seen
        return points + random.normal(0, 1, points.shape), np.full((len(rows), 17), 0.9)

    return predict


def test_a_model_tells_people_swapped_mirrored_and_of_the_next_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plausibility, "MOST_STEPS", 10)
    random = np.random.default_rng(1)
    document = small_document(60)
    for number, person in enumerate(document["annotations"]):  # nothing that geometry could learn
        points = random.uniform(10, 190, (17, 2)).round(2)
        person["keypoints"] = np.column_stack([points, np.full(17, 2)]).ravel().tolist()
        person["bbox"] = [0, 0, 200, 200]
        document["images"][number]["file_name"] = f"{number:04d}.jpg"
    truth = np.array([a["keypoints"] for a in document["annotations"]]).reshape(-1, 17, 3)[..., :2]
    for number in (5, *range(41, 60)):  # so many that they must not use up the second looks
        swapped = np.array(document["annotations"][number]["keypoints"]).reshape(17, 3)[COCO.flip_index]
        document["annotations"][number]["keypoints"] = swapped.ravel().tolist()
    document["annotations"][6]["keypoints"][27:29] = [3.0, 3.0]
    people = people_of(tmp_path, document)
    check = check_labels(people, predict=sure_model(truth, {20, 21}, {30: 31, 40: 39}))
    first = {s.annotation_id: s.findings[0] for s in check.suspects if s.suspicion >= 0.5}
    said = {person: finding.kind for person, finding in first.items()}
    assert {said[person] for person in (105, *range(141, 160))} == {"swapped person"} and said[106] == "misplaced"
    assert first[106].keypoints[0] == "left_wrist"
    assert said[120] == said[121] == "mirrored picture"
    assert said[130] == said[140] == "other picture"
    assert (first[130].other, first[140].other) == (31, 39)


def test_the_same_labels_give_the_same_report(rendered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plausibility, "MOST_STEPS", 10)
    people = read_labelled_people(rendered / "labels.json")
    order = np.argsort(people.annotation_id)[:60]
    some = LabelledPeople(
        keypoint_set=people.keypoint_set,
        pictures=people.pictures,
        **{
            name: getattr(people, name)[order]
            for name in ("annotation_id", "picture", "keypoints", "bbox_xywh", "stated")
        },
        crowd_picture=people.crowd_picture,
        crowd_bbox_xywh=people.crowd_bbox_xywh,
    )
    first, second = (check_labels(some, seed=4).suspects for _ in range(2))
    assert [suspect.suspicion for suspect in first] == [suspect.suspicion for suspect in second]
