from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.coco
import pytest
from pycocotools.cocoeval import COCOeval
from whole_people import coco_rows, whole_people
from whole_people import plain_pycocotools as plain_figures

from cigpose.config import EvaluateConfig
from cigpose.config.outcome import metric_names
from cigpose.evaluate.coco import evaluate_predictions, score_persons
from cigpose.evaluate.oks import oks, oks_nms
from cigpose.evaluate.predictions import Predictions
from cigpose.keypoints import COCO, COCO_WHOLEBODY, CROWDPOSE, KeypointSet, parts_with_whole

# Reference names -> ours.
FIGURES = {
    "AP": "AP", "AP .5": "AP50", "AP .75": "AP75", "AP (M)": "AP_M", "AP (L)": "AP_L",
    "AR": "AR", "AR .5": "AR50", "AR .75": "AR75", "AR (M)": "AR_M", "AR (L)": "AR_L",
    "AP(E)": "AP_easy", "AP(M)": "AP_medium", "AP(H)": "AP_hard",
}  # fmt: skip
PARTS = {"lefthand": "left_hand", "righthand": "right_hand", "wholebody": "whole", "crowd": "body"}
SETS = {"wholebody": COCO_WHOLEBODY, "coco": COCO, "crowdpose": CROWDPOSE}


@dataclasses.dataclass
class Case:
    keypoint_set: KeypointSet
    predictions: Predictions
    truth: dict[str, Any]
    expected: dict[str, Any]
    results: dict[str, np.ndarray]
    """The reference's result file: `row` of the predictions and `score` of each person, in its order."""
    config: EvaluateConfig


@pytest.fixture(scope="module", params=list(SETS))
def case(request: pytest.FixtureRequest, golden: Path) -> Case:
    return load_case(golden, request.param)


def load_case(golden: Path, name: str) -> Case:
    folder = golden / "eval" / name
    rows = np.load(folder / "predictions.npz")
    predictions = Predictions(
        image_id=rows["img_id"],
        person_id=rows["id"],
        keypoints=rows["keypoints"],
        keypoint_scores=rows["keypoint_scores"],
        center=(rows["bbox_xyxy"][:, :2] + rows["bbox_xyxy"][:, 2:]) / 2,
        scale=rows["bbox_scale_wh"],
        bbox_xyxy=rows["bbox_xyxy"],
        box_score=rows["bbox_score"],
    )
    return Case(
        keypoint_set=SETS[name],
        predictions=predictions,
        truth=json.loads(lzma.decompress((folder / "gt.json.xz").read_bytes())),
        expected=json.loads((folder / "expected.json").read_text()),
        results=dict(np.load(folder / "results.npz")),
        config=EvaluateConfig(area="box" if name == "crowdpose" else "annotation"),
    )


def agree(metrics: dict[str, float], part: str, expected: dict[str, float], tolerance: float = 0.0) -> None:
    for name, value in expected.items():
        ours = metrics[f"{PARTS.get(part, part)}/{FIGURES[name.rpartition('/')[2]]}"]
        # The three figures of crowding are rounded to four decimals in the reference.
        allowed = 5.1e-5 if name.rpartition("/")[2] in ("AP(E)", "AP(M)", "AP(H)") else tolerance
        assert abs(ours - value) <= allowed, (part, name, ours, value)


def test_every_figure_of_every_part_equals_the_reference(case: Case) -> None:
    metrics = evaluate_predictions(case.predictions, case.truth, case.keypoint_set, case.config)
    assert set(metrics) == set(metric_names(case.keypoint_set, crowding=case.keypoint_set.name == "crowdpose"))
    for part, expected in case.expected["stats"].items():
        agree(metrics, part, expected)
    main = "whole" if len(case.keypoint_set.parts) > 1 else "body"
    agree(metrics, main, case.expected["returned_by_metric"])


@pytest.mark.slow
def test_every_variant_of_the_protocol_equals_the_reference(case: Case) -> None:
    rules = {"bbox": "box", "keypoint": "keypoints"}
    for name, variant in case.expected["variants"].items():
        settings = variant["settings"]
        changes: dict[str, Any] = {}
        if "score_mode" in settings:
            changes["person_score"] = rules[settings["score_mode"]]
        if "nms_mode" in settings:
            changes["oks_nms_threshold"] = None
        if "nms_thr" in settings:
            changes["oks_nms_threshold"] = settings["nms_thr"]
        if "keypoint_score_thr" in settings:
            changes["keypoint_score_threshold"] = settings["keypoint_score_thr"]
        config = dataclasses.replace(case.config, **changes)
        metrics = evaluate_predictions(case.predictions, case.truth, case.keypoint_set, config)
        # At 0.5 many persons score exactly 0; the reference orders such ties by an unstable sort.
        main = "whole" if len(case.keypoint_set.parts) > 1 else "body"
        agree(metrics, main, variant["result"], tolerance=5e-6 if name == "keypoint_score_thr_0.5" else 0.0)


def test_the_result_file_holds_the_persons_of_the_reference_in_its_order(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    evaluate_predictions(case.predictions, case.truth, case.keypoint_set, case.config, path)
    written = json.loads(path.read_text())
    found, rows, scores = case.predictions, case.results["row"], case.results["score"]
    has_score = (found.keypoint_scores[rows] > 0).any(axis=1)
    rows, scores = rows[has_score], scores[has_score]
    fields = list(case.keypoint_set.annotation_fields)
    points = np.array([np.concatenate([np.reshape(row[name], (-1, 3)) for name in fields]) for row in written])
    corners = found.bbox_xyxy[rows]
    assert [row["image_id"] for row in written] == found.image_id[rows].tolist()
    assert {row["category_id"] for row in written} == {1}
    np.testing.assert_allclose([row["score"] for row in written], scores, rtol=1e-6)  # theirs is a float32 mean
    # written with four decimals
    np.testing.assert_allclose(points[..., :2], found.keypoints[rows], rtol=0, atol=6e-5)
    np.testing.assert_allclose(points[..., 2], found.keypoint_scores[rows], rtol=0, atol=6e-5)
    if len(case.keypoint_set.parts) > 1:
        assert not any("bbox" in row for row in written), "as in the reference's whole-body files"
    else:
        boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
        np.testing.assert_allclose([row["bbox"] for row in written], boxes, rtol=0, atol=6e-5)


def test_body_result_file_scores_identically_in_plain_pycocotools(golden: Path, tmp_path: Path) -> None:
    case = load_case(golden, "coco")
    path = tmp_path / "results.json"
    metrics = evaluate_predictions(case.predictions, case.truth, COCO, case.config, path)
    run = plain_pycocotools(case.truth, json.loads(path.read_text()))
    assert [metrics[f"body/{name}"] for name in list(FIGURES.values())[:10]] == run


@pytest.mark.parametrize(("field", "part"), [("foot_kpts", "foot"), ("righthand_kpts", "right_hand")])
def test_wholebody_result_file_scores_identically_part_by_part(
    golden: Path, tmp_path: Path, field: str, part: str
) -> None:
    case = load_case(golden, "wholebody")
    path = tmp_path / "results.json"
    metrics = evaluate_predictions(case.predictions, case.truth, COCO_WHOLEBODY, case.config, path)
    rows = json.loads(path.read_text())
    for row in rows:
        body = np.reshape(row["keypoints"], (-1, 3))[:, :2]
        row["body_area"] = float(np.ptp(body, axis=0).prod())
        row["keypoints"], row["score"] = row[field], row[field.replace("kpts", "score")]
    truth = copy.deepcopy(case.truth)
    for row in truth["annotations"]:
        row["keypoints"] = row[field]
        row["num_keypoints"] = sum(v > 0 for v in row[field][2::3])
    rows = [row for row in rows if max(row["keypoints"][2::3]) > 0]
    sigmas = np.array(COCO_WHOLEBODY.sigmas, dtype=np.float32)[list(COCO_WHOLEBODY.parts[part])]
    assert [metrics[f"{part}/{name}"] for name in list(FIGURES.values())[:10]] == plain_pycocotools(truth, rows, sigmas)


def plain_pycocotools(
    truth: dict[str, Any], rows: list[dict[str, Any]], sigmas: np.ndarray | None = None
) -> list[float]:
    with contextlib.redirect_stdout(io.StringIO()):
        reference = pycocotools.coco.COCO()
        reference.dataset = copy.deepcopy(truth)
        reference.createIndex()
        results = reference.loadRes(rows)
        for row in results.dataset["annotations"]:
            row["area"] = row.get("body_area", row["area"])
        run = COCOeval(reference, results, "keypoints")
        run.params.kpt_oks_sigmas = np.array(COCO.sigmas, dtype=np.float32) if sigmas is None else sigmas
        run.evaluate()
        run.accumulate()
        run.summarize()
    return [float(value) for value in run.stats]


def small_truth(keypoint_set: KeypointSet, persons: int = 2, **image: Any) -> dict[str, Any]:
    rng = np.random.default_rng(5)
    annotations = []
    for i in range(persons):
        row: dict[str, Any] = {"id": i, "image_id": 7, "category_id": 1, "iscrowd": 0, "area": 9000.0}
        row["bbox"] = [10.0 + 150 * i, 10.0, 100.0, 180.0]
        for name, count in keypoint_set.annotation_fields.items():
            points = rng.uniform((10 + 150 * i, 10), (110 + 150 * i, 190), (count, 2)).round(2)
            row[name] = np.concatenate([points, np.full((count, 1), 2.0)], axis=1).ravel().tolist()
        annotations.append(row)
    return {
        "images": [{"id": 7, "width": 400, "height": 200, **image}],
        "categories": [{"id": 1, "name": "person"}],
        "annotations": annotations,
    }


def perfect_predictions(truth: dict[str, Any], keypoint_set: KeypointSet) -> Predictions:
    rows = truth["annotations"]
    points = np.array([np.concatenate([row[name] for name in keypoint_set.annotation_fields]) for row in rows])
    boxes = np.array([row["bbox"] for row in rows])
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    return Predictions(
        image_id=np.array([row["image_id"] for row in rows]),
        person_id=np.array([row["id"] for row in rows]),
        keypoints=points.reshape(len(rows), -1, 3)[..., :2],
        keypoint_scores=np.full((len(rows), len(keypoint_set)), 0.9),
        center=boxes[:, :2] + boxes[:, 2:] / 2,
        scale=boxes[:, 2:] * 1.25,
        bbox_xyxy=corners,
        box_score=np.ones(len(rows)),
    )


CUSTOM = KeypointSet.from_mapping(
    {
        "name": "stick",
        "names": ["left_end", "middle", "right_end"],
        "sigmas": [0.05, 0.05, 0.05],
        "parts": {"body": ["middle"], "ends": ["left_end", "right_end"]},
    }
)


@pytest.mark.parametrize("keypoint_set", [COCO, COCO_WHOLEBODY, CROWDPOSE, CUSTOM], ids=lambda known: known.name)
def test_perfect_predictions_score_one_in_every_part_even_with_id_zero(keypoint_set: KeypointSet) -> None:
    truth = small_truth(keypoint_set)
    metrics = evaluate_predictions(perfect_predictions(truth, keypoint_set), truth, keypoint_set, EvaluateConfig())
    names = {*keypoint_set.parts, *(["whole"] if len(keypoint_set.parts) > 1 else [])}
    for part in names:
        assert metrics[f"{part}/AP"] == pytest.approx(1.0) and metrics[f"{part}/AR"] == 1.0
    assert {name.partition("/")[0] for name in metrics} - {"hand"} == names


def test_the_hand_figure_is_the_mean_of_both_hands(golden: Path) -> None:
    case = load_case(golden, "wholebody")
    metrics = evaluate_predictions(case.predictions, case.truth, COCO_WHOLEBODY, case.config)
    assert metrics["hand/AP"] == (metrics["left_hand/AP"] + metrics["right_hand/AP"]) / 2


def test_no_predictions_score_zero_and_write_an_empty_list(tmp_path: Path) -> None:
    truth = small_truth(COCO)
    metrics = evaluate_predictions(Predictions.empty(17), truth, COCO, EvaluateConfig(), tmp_path / "results.json")
    assert metrics["body/AP"] == metrics["body/AR"] == 0.0
    assert json.loads((tmp_path / "results.json").read_text()) == []


def test_without_any_labelled_person_there_is_nothing_to_measure() -> None:
    truth = small_truth(COCO_WHOLEBODY)
    predictions = perfect_predictions(truth, COCO_WHOLEBODY)
    for row in truth["annotations"]:
        row["lefthand_kpts"] = [0] * 63
        row["righthand_kpts"] = [0] * 63
    metrics = evaluate_predictions(predictions, truth, COCO_WHOLEBODY, EvaluateConfig())
    assert metrics["left_hand/AP"] == metrics["hand/AP"] == -1.0
    assert metrics["whole/AP"] == pytest.approx(1.0)


def test_crowds_need_no_keypoints() -> None:
    truth = small_truth(COCO)
    crowd = {"id": 99, "image_id": 7, "category_id": 1, "iscrowd": 1, "area": 5.0, "bbox": [0, 0, 10, 10]}
    predictions = perfect_predictions(truth, COCO)
    truth["annotations"].append(crowd)
    assert evaluate_predictions(predictions, truth, COCO, EvaluateConfig())["body/AP"] == pytest.approx(1.0)


def test_evaluation_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    truth = small_truth(COCO)
    evaluate_predictions(perfect_predictions(truth, COCO), truth, COCO, EvaluateConfig())
    printed = capsys.readouterr()
    assert printed.out == printed.err == ""


def break_truth(truth: dict[str, Any], change: str) -> dict[str, Any]:
    row = truth["annotations"][0]
    if change == "no categories":
        del truth["categories"]
    elif change == "two categories":
        truth["categories"] = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    elif change == "short keypoints":
        row["keypoints"] = row["keypoints"][:15]
    elif change == "no keypoints":
        del row["keypoints"]
    elif change == "no area":
        del row["area"]
    elif change == "no box":
        del row["bbox"]
    elif change == "stray image":
        row["image_id"] = 12345
    return truth


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no categories", "expected a COCO file with images, annotations and categories"),
        ("two categories", r"found \['cat', 'dog'\]"),
        ("short keypoints", "annotation 0 has 15 numbers in keypoints, expected 51"),
        ("no keypoints", "annotation 0 has no keypoints, expected 51"),
        ("no area", "annotation 0 has no area. Set `area: box`"),
        ("no box", "annotation 0 has no bbox"),
        ("stray image", "annotations name image 12345"),
    ],
)
def test_unusable_labels_are_refused_in_a_sentence(change: str, message: str) -> None:
    truth = small_truth(COCO)
    predictions = perfect_predictions(truth, COCO)
    with pytest.raises(ValueError, match=message):
        evaluate_predictions(predictions, break_truth(truth, change), COCO, EvaluateConfig())


def test_predictions_of_another_dataset_set_or_a_diverged_model_are_refused() -> None:
    truth = small_truth(COCO)
    good = perfect_predictions(truth, COCO)
    with pytest.raises(ValueError, match="2 images that the ground truth lacks, the first is 8"):
        evaluate_predictions(dataclasses.replace(good, image_id=np.array([8, 9])), truth, COCO, EvaluateConfig())
    with pytest.raises(ValueError, match="predictions have 14 keypoints, set 'coco' has 17"):
        evaluate_predictions(Predictions.empty(14), truth, COCO, EvaluateConfig())
    broken = dataclasses.replace(good, keypoints=np.where(np.arange(17)[:, None] == 3, np.nan, good.keypoints))
    with pytest.raises(ValueError, match="2 of 2 persons are not finite"):
        evaluate_predictions(broken, truth, COCO, EvaluateConfig())


def test_missing_or_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json: no ground truth there\. Set ground_truth: true"):
        evaluate_predictions(Predictions.empty(17), tmp_path / "nowhere.json", COCO, EvaluateConfig())
    (tmp_path / "cut.json").write_text('{"images": [')
    with pytest.raises(ValueError, match=r"cut\.json: not valid JSON"):
        evaluate_predictions(Predictions.empty(17), tmp_path / "cut.json", COCO, EvaluateConfig())


@pytest.mark.parametrize("seed", [0, 1])
def test_every_figure_equals_plain_pycocotools_on_crowded_pictures_of_many_boxes(seed: int) -> None:
    predictions, truth = whole_people(30, 700, 60, seed=seed)
    metrics = evaluate_predictions(predictions, truth, COCO_WHOLEBODY, EvaluateConfig())
    scored = score_persons(predictions, truth, COCO_WHOLEBODY, EvaluateConfig())
    for part, members in parts_with_whole(COCO_WHOLEBODY).items():
        figures = plain_figures(coco_rows(scored, truth, members), members)
        assert [metrics[f"{part}/{name}"] for name in list(FIGURES.values())[:10]] == figures, part
        assert 0 < figures[0] < 1


@pytest.mark.parametrize("threshold", [0.05, 0.6, 0.9, 1.0])
def test_suppression_in_all_pictures_at_once_keeps_whom_it_keeps_picture_by_picture(threshold: float) -> None:
    predictions, _ = whole_people(12, 300, 20)
    people = predictions.select(np.argsort(predictions.image_id, kind="stable"))
    close = people.select(np.repeat(np.arange(len(people)), 2))
    moved = close.keypoints + np.random.default_rng(0).normal(0, 1, (len(close), 1, 1)).astype(np.float32)
    sigmas, areas = np.asarray(COCO_WHOLEBODY.sigmas, np.float32), close.scale.astype(float).prod(axis=1)
    kept = oks_nms(moved, close.box_score, areas, sigmas, threshold, close.image_id)
    expected: list[int] = []
    for image in np.unique(close.image_id):
        order = [i for i in np.argsort(close.box_score, kind="stable")[::-1] if close.image_id[i] == image]
        while order:
            best, *order = order
            expected.append(int(best))
            order = [i for i in order if oks(moved[best], areas[best], moved[[i]], areas[[i]], sigmas)[0] <= threshold]
    assert kept.tolist() == expected
    assert threshold == 1.0 or len(kept) < len(close)
