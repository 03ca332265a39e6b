from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from whole_people import whole_people

from cigpose.cli.main import main
from cigpose.config import Config, EvaluateConfig, RobustnessConfig, load_preset
from cigpose.config.params_file import write_params
from cigpose.deploy.export import export_onnx
from cigpose.evaluate.checkpoint import (
    Evaluation,
    dataset_truth,
    evaluate_checkpoint,
    open_shards,
    predict_share,
    refuse_incomplete,
    sample_pictures,
)
from cigpose.evaluate.coco import measure_persons, score_persons, write_coco_results
from cigpose.evaluate.predictions import Predictions
from cigpose.evaluate.results import read_coco_results
from cigpose.keypoints import COCO_WHOLEBODY
from cigpose.model.weights import load_checkpoint

from .conftest import PERSONS_PER_IMAGE, Project, make_config


def evaluated(project: Project, config: Config, **options: Any) -> Evaluation:
    found = evaluate_checkpoint(project.checkpoint, config, shards_root=project.shards, device="cpu", **options)
    assert found is not None
    return found


def test_every_person_is_predicted_once(project: Project) -> None:
    found = evaluated(project, project.config)
    assert sorted(found.predictions.person_id) == list(range(100, 100 + sum(PERSONS_PER_IMAGE)))
    assert len(found.truth.images) == len(PERSONS_PER_IMAGE)
    assert set(found.metrics) >= {"body/AP", "body/AR"}


def test_three_workers_together_measure_what_one_measures(project: Project) -> None:
    alone = evaluated(project, project.config)
    shards = open_shards(project.config, "people", project.shards)
    model = load_checkpoint(project.checkpoint)
    shares = [predict_share(model, project.config, shards, project.shards, "cpu", rank, 3) for rank in (1, 2)]
    together = evaluated(project, project.config, rank=0, world=3, gather=lambda share: [share, *shares])
    assert together.metrics == alone.metrics
    gathered: list[Predictions] = []
    other = evaluate_checkpoint(
        project.checkpoint,
        project.config,
        shards_root=project.shards,
        device="cpu",
        rank=1,
        world=3,
        gather=gathered.append,
    )
    assert other is None and len(gathered[0]) == len(shares[0])


def test_detected_boxes_are_all_predicted(project: Project) -> None:
    found = evaluated(project, make_config(boxes="detections"))
    assert len(found.predictions) == 2 * sum(PERSONS_PER_IMAGE)
    assert sorted(set(found.predictions.box_score.round(3))) == [0.5, 0.9]


def test_a_person_missing_or_twice_is_an_error(project: Project) -> None:
    found = evaluated(project, project.config)
    shards = open_shards(project.config, "people", project.shards)
    everyone = np.arange(len(found.predictions))
    for rows, number in ((everyone[1:], 9), (np.r_[everyone, 0], 11)):
        with pytest.raises(ValueError, match=rf"{number} predictions of .* the index lists 10"):
            refuse_incomplete(found.predictions.select(rows), shards, project.config)


def test_a_model_of_other_keypoints_is_refused(project: Project) -> None:
    wrong = dataclasses.replace(load_preset("quickstart"), data=project.config.data)
    with pytest.raises(ValueError, match=r"predicts 17 keypoints \(coco\), but params.yaml asks for 133"):
        evaluate_checkpoint(project.checkpoint, wrong, shards_root=project.shards)


def test_several_workers_need_a_way_to_gather(project: Project) -> None:
    with pytest.raises(ValueError, match="2 workers need a `gather`"):
        evaluate_checkpoint(project.checkpoint, project.config, shards_root=project.shards, world=2)


def test_shards_without_ground_truth_are_refused(project: Project) -> None:
    shards = open_shards(project.config, "people", project.shards)
    without = dataclasses.replace(shards, index=dataclasses.replace(shards.index, ground_truth=None))
    with pytest.raises(ValueError, match=r"has no ground truth\. Set data\.datasets\.people\.ground_truth: true"):
        dataset_truth(without, project.config)


def _bigger_areas(truth: dict[str, Any]) -> None:
    for annotation in truth["annotations"]:
        annotation["area"] *= 100


def _moved_keypoint(truth: dict[str, Any]) -> None:
    truth["annotations"][0]["keypoints"][0] += 50


def _person_less(truth: dict[str, Any]) -> None:
    truth["annotations"].pop()


@pytest.mark.parametrize("change", [_bigger_areas, _moved_keypoint, _person_less])
def test_labels_changed_behind_the_index_are_refused(project: Project, tmp_path: Path, change: Any) -> None:
    folder = tmp_path / "people"
    shutil.copytree(project.shards / "people", folder)
    assert len(dataset_truth(open_shards(project.config, "people", tmp_path), project.config))
    truth = json.loads((folder / "annotations.json").read_text())
    change(truth)
    (folder / "annotations.json").write_text(json.dumps(truth))
    with pytest.raises(ValueError, match=r"people/annotations.json: sha256 is \w+\.\.\., index.json says \w+"):
        dataset_truth(open_shards(project.config, "people", tmp_path), project.config)


def test_labels_beside_an_index_of_format_1_have_no_digest_and_are_read(project: Project, tmp_path: Path) -> None:
    folder = tmp_path / "people"
    shutil.copytree(project.shards / "people", folder)
    index = json.loads((folder / "index.json").read_text())
    del index["ground_truth_sha256"]
    (folder / "index.json").write_text(json.dumps({**index, "format": 1}))
    assert len(dataset_truth(open_shards(project.config, "people", tmp_path), project.config))


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (1, 1), (3, 3), (100, 6)])
def test_sample_pictures_are_spread_over_the_dataset(project: Project, count: int, expected: int) -> None:
    shards = open_shards(project.config, "people", project.shards)
    found = list(sample_pictures(shards, count))
    assert len(found) == expected and len({image_id for image_id, _ in found}) == expected
    assert all(image.shape == (120, 160, 3) for _, image in found)
    if count == 3:
        assert {found[0][0], found[-1][0]} == {1, 7}


def test_the_command_line_prints_the_table_and_writes_what_is_asked(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = RobustnessConfig(corruptions=("noise",), severities=(3,), samples=10)
    write_params(dataclasses.replace(project.config, robustness=changed), tmp_path / "params.yaml")
    options = ["--model", str(project.checkpoint), "--params", str(tmp_path / "params.yaml")]
    options += ["--shards", str(project.shards), "--device", "cpu", "--out", str(tmp_path), "--corruptions"]
    assert main(["evaluate", *options]) == 0
    printed = capsys.readouterr().out
    assert "| body |" in printed and "| part | all | noise |" in printed
    assert "body/AP with ground-truth boxes: " in printed
    assert f", sigmas {project.config.keypoint_set.sigmas_origin}" in printed
    assert set(json.loads((tmp_path / "metrics.json").read_text())["body"]) >= {"AP", "AR"}
    assert isinstance(json.loads((tmp_path / "results.json").read_text()), list)
    assert main(["evaluate", *options, "--dataset", "elsewhere"]) == 2
    assert "elsewhere" in capsys.readouterr().err


@pytest.fixture(scope="module")
def kinds(project: Project, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model in every form that can be evaluated."""
    folder = tmp_path_factory.mktemp("kinds")
    model = load_checkpoint(project.checkpoint)
    torch.save({"state_dict": model.state_dict()}, folder / "official.pth")
    export_onnx(model, project.config, folder / "model.onnx")
    options = ["--params", str(project.folder / "params.yaml"), "--shards", str(project.shards), "--device", "cpu"]
    assert main(["evaluate", "--model", str(project.checkpoint), *options, "--out", str(folder)]) == 0
    return {
        "folder": project.checkpoint.parent,
        "pth": folder / "official.pth",
        "onnx": folder / "model.onnx",
        "results": folder / "results.json",
    }


@pytest.mark.slow  # exports a model, starts a process for each kind
@pytest.mark.parametrize("kind", ["folder", "pth", "onnx", "results"])
def test_every_form_of_a_model_has_the_same_figures_in_a_fresh_process(
    project: Project, kinds: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    expected = json.loads((kinds["results"].parent / "metrics.json").read_text())["body"]
    command = [
        sys.executable,
        "-m",
        "cigpose.cli.main",
        "evaluate",
        "--model",
        str(kinds[kind]),
        "--out",
        str(tmp_path),
    ]
    command += ["--params", str(project.folder / "params.yaml"), "--shards", str(project.shards), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["body"] == pytest.approx(expected, abs=1e-3 if kind == "onnx" else 1e-12)
    boxes = "boxes of another tool" if kind == "results" else "ground-truth boxes"
    assert found["protocol"]["boxes"] == boxes and f"body/AP with {boxes}: " in done.stdout


def test_a_model_compared_with_its_own_results_differs_by_nothing(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--params", str(project.folder / "params.yaml"), "--shards", str(project.shards), "--device", "cpu"]
    options += ["--model", str(project.checkpoint)]
    assert main(["evaluate", *options, "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    assert main(["evaluate", *options, "--against", str(tmp_path / "results.json")]) == 0
    printed = capsys.readouterr().out
    assert "| body |" in printed and "+0.000 | +0.000 to +0.000" in printed and "OKS +0.0000" in printed


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("results.json", '{"images": []}', "expected a list of persons"),
        ("results.json", "[1", "not valid JSON"),
        ("results.json", '[{"image_id": 1, "score": 0.5}]', "person 0 has no keypoints, expected 51"),
        ("results.json", '[{"score": 0.5, "keypoints": [' + ",".join(["1"] * 51) + "]}]", "lacks image_id or score"),
        (
            "results.json",
            '[{"image_id": 99, "score": 0.5, "keypoints": [' + ",".join(["1"] * 51) + "]}]",
            "names 1 images that the labels lack, the first is 99",
        ),
        ("results.json", '[{"image_id": 1, "score": 1, "keypoints": [' + ",".join(["NaN"] * 51) + "]}]", "not finite"),
        ("model.onnx", "no onnx", "model.onnx: "),
        ("model.pth", "no pickle at all", "not a torch checkpoint but text"),
        ("model.safetensors", "", "an empty file"),
    ],
)
def test_files_that_are_nothing_to_evaluate_are_one_sentence(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    options = ["--params", str(project.folder / "params.yaml"), "--shards", str(project.shards), "--device", "cpu"]
    assert main(["evaluate", "--model", str(tmp_path / name), *options]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and name in said and "Traceback" not in said and len(said.splitlines()) == 1


def test_results_of_parts_in_fields_or_in_one_list_have_the_figures_of_the_predictions(tmp_path: Path) -> None:
    predictions, truth = whole_people(12, 60, 20)
    scored = score_persons(predictions, truth, COCO_WHOLEBODY, EvaluateConfig())
    expected = measure_persons(scored, truth, COCO_WHOLEBODY)
    path = write_coco_results(tmp_path / "results.json", scored, COCO_WHOLEBODY)
    assert measure_persons(read_coco_results(path, truth, COCO_WHOLEBODY), truth, COCO_WHOLEBODY) == expected
    rows = json.loads(path.read_text())
    for row in rows:
        row["keypoints"] = [number for name in COCO_WHOLEBODY.annotation_fields for number in row.pop(name)]
    path.write_text(json.dumps(rows))
    assert measure_persons(read_coco_results(path, truth, COCO_WHOLEBODY), truth, COCO_WHOLEBODY) == expected


@pytest.mark.slow  # exports the model
def test_the_stage_writes_report_metrics_and_plot(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipelines import evaluate

    monkeypatch.chdir(project.folder)
    Path("data/report/pictures").mkdir(parents=True, exist_ok=True)
    for half in (".model.onnx.0badcafe.part", "pictures/.page-00.jpg.0badcafe.part"):
        (Path("data/report") / half).write_text("of a killed evaluation")
    Path("data/report/.model.onnx.q1n_r2li.part").mkdir()
    assert evaluate.main([]) == 0
    assert "people: body/AP" in capsys.readouterr().out
    metrics = json.loads(Path("data/metrics/evaluate.json").read_text())
    assert set(metrics) == {"body"}
    assert Path("data/plots/parts.csv").read_text().startswith("part,AP,AP50,AP75,AR\nbody,")
    written = {file.relative_to("data/report").as_posix() for file in Path("data/report").rglob("*.*")}
    assert written == {
        *("results.json", "predictions.npz", "report.html", "model.onnx", "pictures/page-00.jpg"),
        *("measurement.json", "matches.npz"),
    }
    assert cv2.imread("data/report/pictures/page-00.jpg") is not None
    page = Path("data/report/report.html").read_text()
    assert "<dd>ground truth</dd>" in page and "PCK@0.05" in page
    assert len(Predictions.load("data/report/predictions.npz")) == 10


def test_as_many_pictures_are_drawn_as_params_ask_for_and_not_as_the_model_was_trained_with(project: Project) -> None:
    asked = dataclasses.replace(project.config.registry, pictures=1)
    evaluation = evaluated(project, dataclasses.replace(project.config, registry=asked))
    assert evaluation.config.registry == asked


def test_the_stage_fails_with_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipelines import evaluate

    monkeypatch.chdir(tmp_path)
    assert evaluate.main([]) == 1
    assert capsys.readouterr().err.startswith("evaluate: params.yaml: not found")
