from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cigpose.config import EvaluateConfig, RobustnessConfig
from cigpose.config.outcome import CORRUPTION_NAMES, CROP_SHIFT
from cigpose.config.params_file import write_params
from cigpose.crop import crop_to_image
from cigpose.evaluate.coco import evaluate_predictions, run_part, score_persons
from cigpose.evaluate.corruptions import CORRUPTIONS, SEVERITIES, SHIFT_SHARES, corrupted
from cigpose.evaluate.ground_truth import load_ground_truth
from cigpose.evaluate.paired import compare_models, compare_paired, paired_table
from cigpose.evaluate.predictions import Predictions
from cigpose.evaluate.robustness import Robustness, measure_robustness
from cigpose.keypoints import COCO
from cigpose.loader.batches import eval_loader
from cigpose.model.estimator import normalize
from pipelines import robustness as stage

from .conftest import Project


def batch() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    smooth = rng.integers(60, 200, (4, 12, 9, 3)).repeat(8, axis=1).repeat(8, axis=2)
    return {"crops": torch.from_numpy(smooth.astype(np.uint8)), "keys": [f"set/{i}#{i}" for i in range(4)]}


@pytest.mark.parametrize("name", list(CORRUPTIONS))
def test_a_corruption_changes_every_crop_more_with_each_severity_and_depends_on_the_person_alone(name: str) -> None:
    rows = batch()
    before = rows["crops"].float()
    changes = []
    for severity in SEVERITIES:
        crops = corrupted(rows, name, severity)["crops"]
        assert crops.dtype == torch.uint8 and crops.shape == rows["crops"].shape
        assert all((crops[i] != rows["crops"][i]).any() for i in range(4))
        changes.append(float((crops.float() - before).abs().mean()))
        turned = {"crops": rows["crops"].flip(0), "keys": rows["keys"][::-1]}
        assert torch.equal(corrupted(turned, name, severity)["crops"].flip(0), crops)
    assert changes == sorted(changes)


def test_every_corruption_of_params_exists() -> None:
    assert set(CORRUPTION_NAMES) == {*CORRUPTIONS, CROP_SHIFT} and len(SHIFT_SHARES) == len(SEVERITIES)


@pytest.mark.parametrize(("severity", "share"), [(1, 0.03), (3, 0.1), (5, 0.3)])
def test_occlusion_covers_its_share_of_the_crop(severity: int, share: float) -> None:
    rows = {"crops": torch.zeros(20, 96, 72, 3, dtype=torch.uint8), "keys": [f"set/{i}#0" for i in range(20)]}
    covered = corrupted(rows, "occlusion", severity)["crops"].any(dim=3).float().mean(dim=(1, 2))
    assert ((covered > 0.85 * share) & (covered < 1.15 * share)).all()


def test_a_shifted_crop_shows_what_lies_beside_the_box_and_finds_the_same_places_in_the_picture(
    project: Project,
) -> None:
    def first(shift: float) -> dict[str, Any]:
        return next(iter(eval_loader(project.config, "people", rank=0, world=1, root=project.shards, shift=shift)))

    there, beside = first(0.0), first(0.2)
    assert there["keys"] == beside["keys"] and torch.equal(there["bbox_xyxy"], beside["bbox_xyxy"])
    assert torch.equal(there["scale"], beside["scale"])
    box = there["bbox_xyxy"][:, 2:] - there["bbox_xyxy"][:, :2]
    away = ((beside["center"] - there["center"]) / box).norm(dim=1)
    assert torch.allclose(away, torch.full_like(away, 0.2), atol=1e-4)
    assert len({tuple(offset.tolist()) for offset in (beside["center"] - there["center"]).round()}) > 1
    size = there["crops"].shape[2], there["crops"].shape[1]
    places = [
        crop_to_image(rows["keypoints"].numpy(), rows["center"].numpy(), rows["scale"].numpy(), size)
        for rows in (there, beside)
    ]
    np.testing.assert_allclose(*places, atol=1e-3)


class Remembering(torch.nn.Module):
    """Knows the labels of crops it was shown, and nothing of others: what is changed it does not recognise."""

    def __init__(self, batches: list[dict[str, Any]], bins: tuple[int, int]) -> None:
        super().__init__()
        self.known = {
            crop.numpy().tobytes(): points
            for b in batches
            for crop, points in zip(b["crops"], b["keypoints"], strict=True)
        }
        self.bins = bins

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        width, height = self.bins
        x, y = torch.zeros(len(images), 17, width), torch.zeros(len(images), 17, height)
        for i, image in enumerate(images):
            crop = denormalized(image).numpy().tobytes()
            for k, (px, py) in enumerate(self.known.get(crop, torch.zeros(17, 2)).tolist()):
                x[i, k, int(np.clip(round(px * 2), 0, width - 1))] = 1
                y[i, k, int(np.clip(round(py * 2), 0, height - 1))] = 1
        return x, y


def denormalized(image: torch.Tensor) -> torch.Tensor:
    zero, one = normalize(torch.tensor([[[[0] * 3]], [[[255] * 3]]], dtype=torch.uint8))
    return ((image - zero) / (one - zero) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()


def test_a_model_that_recognises_nothing_changed_retains_nothing_and_one_that_does_not_look_retains_all(
    project: Project,
) -> None:
    options = RobustnessConfig(corruptions=("noise", "crop_shift"), severities=(1, 4), samples=20, persons=None)
    protocol = dataclasses.replace(project.config.evaluate, flip_test=False)
    config = dataclasses.replace(project.config, robustness=options, evaluate=protocol)
    batches = list(eval_loader(config, "people", rank=0, world=1, root=project.shards))
    width, height = config.model.input_size
    found = measure_robustness(
        Remembering(batches, (2 * width, 2 * height)), config, shards_root=project.shards, device="cpu"
    )
    summary = found.summary()
    share, low, high = summary["retained"]["body"]
    assert (found.people, found.pictures) == (10, 7)
    assert summary["clean"]["body"] > 0.9 and low <= share <= high and share < 0.2
    assert summary["AP"]["body"] == pytest.approx(share * summary["clean"]["body"])
    assert [row.corruption for row in found.retained] == ["all", "noise", "crop_shift"]
    assert Robustness.from_mapping(json.loads(json.dumps(found.to_mapping())), where="x") == found
    assert "| body |" in found.to_markdown()
    same = dataclasses.replace(config, data=dataclasses.replace(config.data, val="people"))
    same = dataclasses.replace(
        same, robustness=RobustnessConfig(corruptions=("blur",), severities=(1,), samples=10, reversed_context="people")
    )
    blind = measure_robustness(Blind((2 * width, 2 * height)), same, shards_root=project.shards, device="cpu")
    assert all(row.ap == row.clean for row in blind.retained)
    assert [row.difference for row in blind.reversed_context] == [0.0]


class Blind(torch.nn.Module):
    """Says the same of every crop."""

    def __init__(self, bins: tuple[int, int]) -> None:
        super().__init__()
        self.bins = bins

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = (torch.eye(17, size)[None].repeat(len(images), 1, 1) for size in self.bins)
        return x, y


def test_a_subsample_takes_whole_pictures_and_the_same_ones_again(project: Project) -> None:
    options = RobustnessConfig(corruptions=("blur",), severities=(1,), samples=10, persons=5)
    config = dataclasses.replace(project.config, robustness=options)
    width, height = config.model.input_size
    blind = Blind((2 * width, 2 * height))
    found = [measure_robustness(blind, config, shards_root=project.shards, device="cpu") for _ in range(2)]
    assert found[0] == found[1] and 0 < found[0].people < 10 and found[0].pictures < 7


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"corruptions": ("fog",)}, "'fog' is not known, expected some of occlusion"),
        ({"severities": (0,)}, "severities must be between 1 and 5"),
        ({"severities": (1, 1)}, "name one or more, each once"),
        ({"corruptions": ()}, "name one or more"),
    ],
)
def test_robustness_of_unknown_corruptions_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RobustnessConfig(**values)


@pytest.mark.slow  # predicts everybody three times
def test_the_stage_leaves_empty_results_where_it_is_off_and_full_ones_where_it_is_on(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(project.folder, tmp_path / "p", ignore=shutil.ignore_patterns("report", "raw"))
    monkeypatch.chdir(tmp_path / "p")
    assert stage.main([]) == 0
    assert json.loads(Path("data/metrics/robustness.json").read_text()) == {}
    assert Path("data/plots/robustness.csv").read_text() == "corruption,retained,AP\n"
    assert Robustness.from_mapping(json.loads(Path("data/robustness/robustness.json").read_text()), where="") is None
    options = RobustnessConfig(enabled=True, corruptions=("noise", "jpeg"), severities=(2,), samples=10)
    write_params(dataclasses.replace(project.config, robustness=options), Path("params.yaml"))
    assert stage.main([]) == 0
    assert len(json.loads(Path("data/metrics/robustness.json").read_text())["retained"]["body"]) == 3
    rows = Path("data/plots/robustness.csv").read_text().splitlines()
    assert [row.partition(",")[0] for row in rows] == ["corruption", "all", "noise", "jpeg"]


def scenes(num: int, noise: float, seed: int) -> tuple[Predictions, dict[str, Any]]:
    """Two persons per picture, predicted with an error; the last picture has no person."""
    rng = np.random.default_rng(0)
    images = [{"id": i + 1, "width": 400, "height": 300} for i in range(num + 1)]
    annotations = []
    for image_id in range(1, num + 1):
        for side in range(2):
            points = rng.uniform((200 * side, 0), (200 * side + 150, 250), (17, 2))
            row = {"id": len(annotations) + 1, "image_id": image_id, "category_id": 1, "iscrowd": 0, "area": 20000.0}
            row |= {"bbox": [200.0 * side, 0.0, 150.0, 250.0], "num_keypoints": 17}
            annotations.append(row | {"keypoints": np.c_[points, np.full(17, 2)].ravel().tolist()})
    labels = np.array([row["keypoints"] for row in annotations]).reshape(-1, 17, 3)
    rng = np.random.default_rng(seed)
    predictions = Predictions(
        image_id=np.array([row["image_id"] for row in annotations]),
        person_id=np.array([row["id"] for row in annotations]),
        keypoints=labels[..., :2]
        + rng.normal(0, noise, labels[..., :2].shape) * rng.uniform(0, 2, (len(labels), 1, 1)),
        keypoint_scores=rng.uniform(0.3, 1, labels.shape[:2]),
        center=np.full((len(labels), 2), 100.0),
        scale=np.full((len(labels), 2), 250.0),
        bbox_xyxy=np.tile([0.0, 0, 150, 250], (len(labels), 1)),
        box_score=rng.uniform(0.5, 1, len(labels)),
    )
    return predictions, {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}


def test_paired_figures_are_those_of_pycocotools_and_the_interval_holds_the_difference() -> None:
    first, second = scenes(25, 8.0, 1), scenes(25, 14.0, 2)
    config = EvaluateConfig()
    pair = [(predictions, load_ground_truth(truth, COCO)) for predictions, truth in (first, second)]
    (found,) = compare_paired(pair[0], pair[1], COCO, config, samples=100)
    expected = [evaluate_predictions(*both, COCO, config)["body/AP"] for both in (first, second)]
    assert [found.first, found.second] == pytest.approx(expected, abs=1e-12)
    assert found.low < found.difference < found.high < 0
    assert "| body |" in paired_table([found], ("with", "without")) and found.scenes == 26


def test_equal_predictions_differ_by_nothing() -> None:
    predictions, truth = scenes(6, 10.0, 3)
    labels = load_ground_truth(truth, COCO)
    (found,) = compare_paired((predictions, labels), (predictions, labels), COCO, EvaluateConfig(), samples=20)
    assert found.difference == found.low == found.high == 0.0


def test_images_drawn_twice_count_twice() -> None:
    predictions, truth = scenes(5, 12.0, 4)
    doubled = {**truth, "images": list(truth["images"]), "annotations": list(truth["annotations"])}
    copies = []
    for row in truth["annotations"]:
        if row["image_id"] == 2:
            copies.append({**row, "id": row["id"] + 1000, "image_id": 99})
    doubled["images"].append({"id": 99, "width": 400, "height": 300})
    doubled["annotations"] += copies
    again = predictions.select(predictions.image_id == 2)
    again = dataclasses.replace(again, image_id=np.full(len(again), 99))
    twice = Predictions.concatenate([predictions, again])
    labels = load_ground_truth(truth, COCO)
    run = run_part(score_persons(predictions, labels, COCO, EvaluateConfig()), labels, COCO, range(17))
    weights = np.array([1, 2, 1, 1, 1, 1])
    expected = evaluate_predictions(twice, doubled, COCO, EvaluateConfig())["body/AP"]
    assert run.matches.average_precision(weights) == pytest.approx(expected, abs=1e-12)


def test_datasets_without_a_common_scene_cannot_be_paired() -> None:
    predictions, truth = scenes(2, 10.0, 5)
    first = load_ground_truth(truth, COCO)
    other = load_ground_truth({**truth, "images": [{"id": 77}], "annotations": []}, COCO)
    with pytest.raises(ValueError, match="no image id in common"):
        compare_paired((predictions, first), (Predictions.empty(17), other), COCO, EvaluateConfig())


def test_two_models_are_compared_person_by_person() -> None:
    (good, truth), (bad, _) = scenes(12, 6.0, 1), scenes(12, 14.0, 2)
    labels = load_ground_truth(truth, COCO)
    config = EvaluateConfig(oks_nms_threshold=None)
    better, worse = (score_persons(predictions, labels, COCO, config) for predictions in (good, bad))
    found = compare_models(worse, better, labels, COCO, samples=100)
    assert found.people == 24 and found.better > found.worse and found.better + found.worse == 24
    assert 0 < found.low < found.difference < found.high
    whole = [compute_oks(good, labels), compute_oks(bad, labels)]
    assert found.difference == pytest.approx(float(np.mean(whole[0] - whole[1])), abs=1e-6)
    assert "better on" in found.to_markdown(("bad", "good"))
    nobody = compare_models(better, better, labels, COCO, samples=20)
    assert (nobody.better, nobody.worse, nobody.difference, nobody.low, nobody.high) == (0, 0, 0.0, 0.0, 0.0)


def compute_oks(predictions: Predictions, labels: Any) -> np.ndarray:
    """OKS of each prediction to the label of its own person."""
    away = np.square(predictions.keypoints - labels.keypoints[..., :2]).sum(axis=2)
    return np.exp(-away / (2 * labels.area[:, None] * (2 * np.array(COCO.sigmas)) ** 2)).mean(axis=1)
