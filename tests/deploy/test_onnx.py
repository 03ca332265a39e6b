from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from cigpose.config import Config
from cigpose.deploy import onnx as deployment
from cigpose.deploy.onnx import OnnxModel, export_onnx
from cigpose.evaluate.predict import predict_crops
from cigpose.model.estimator import PoseEstimator, normalize

from .conftest import well_conditioned

pytestmark = pytest.mark.slow  # an export takes seconds


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_any_batch_gives_the_logits_of_torch(exported: Path, model: PoseEstimator, batch: int) -> None:
    images = torch.randn(batch, 3, 96, 64, generator=torch.Generator().manual_seed(batch))
    with torch.no_grad():
        expected, found = model(images), OnnxModel(exported)(images)
    certain = well_conditioned(model, images)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs)[certain].abs().max() <= 1e-5 * theirs.abs().max()  # sums in another order


def test_the_file_is_alone_and_carries_its_configuration(exported: Path, config: Config) -> None:
    assert [file.name for file in exported.parent.iterdir()] == ["model.onnx"]
    assert OnnxModel(exported).config == config


def test_the_decoded_file_takes_pixels_and_gives_keypoints(
    model: PoseEstimator, config: Config, tmp_path: Path
) -> None:
    path = export_onnx(model, config, tmp_path / "decoded.onnx", decoded=True)
    crops = np.random.default_rng(0).integers(0, 256, (5, 96, 64, 3), dtype=np.uint8)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    keypoints, scores = session.run(["keypoints", "scores"], {"crops": crops})
    expected_keypoints, expected_scores = predict_crops(model, torch.from_numpy(crops))
    certain = well_conditioned(model, normalize(torch.from_numpy(crops))).numpy()
    assert np.allclose(scores[certain], expected_scores[certain], rtol=0, atol=1e-5 * np.abs(expected_scores).max())
    moved = np.abs(keypoints - expected_keypoints)[certain].max(axis=2)
    assert (moved == 0).mean() > 0.99  # equal bins may tie
    with pytest.raises(ValueError, match=r"gives keypoints and scores, expected simcc_x and simcc_y"):
        OnnxModel(path)


def test_the_model_is_left_as_it_was(model: PoseEstimator, exported: Path) -> None:
    assert not model.training and next(model.parameters()).dtype == torch.float32


def test_a_file_that_computes_something_else_is_refused(model: PoseEstimator, config: Config, exported: Path) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.head.cls_gx.weight[:, 0] += 0.01
    with pytest.raises(ValueError, match=r"model\.onnx: onnxruntime differs from torch by .* Nothing was written"):
        deployment._compare(other, exported, exported, config, deployment.TOLERANCE, decoded=False)


def test_an_export_that_fails_leaves_no_file(
    model: PoseEstimator, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: None)
    with pytest.raises(ValueError, match="gave no program"):
        export_onnx(model, config, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_no_exports_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`cigpose export` writes one"):
        OnnxModel(tmp_path / "model.onnx")
    (tmp_path / "model.onnx").write_bytes(b"not protobuf")
    with pytest.raises(ValueError, match="onnxruntime cannot load it"):
        OnnxModel(tmp_path / "model.onnx")
    (tmp_path / "model.onnx").write_bytes(b"<!DOCTYPE html><title>404</title>")
    with pytest.raises(ValueError, match="not an ONNX file but a web page"):
        OnnxModel(tmp_path / "model.onnx")


def test_an_export_replaces_nothing_but_an_export(model: PoseEstimator, config: Config, tmp_path: Path) -> None:
    mine = tmp_path / "model.safetensors"
    mine.write_bytes(b"precious")
    with pytest.raises(ValueError, match="exists, and `cigpose export` did not write it"):
        export_onnx(model, config, mine)
    with pytest.raises(ValueError, match=r"is a folder\. Give the name of a file"):
        export_onnx(model, config, tmp_path)
    assert mine.read_bytes() == b"precious"


def test_missing_packages_are_named() -> None:
    for kind in (ModuleNotFoundError, ValueError):  # the command line reports the latter in a sentence
        with pytest.raises(kind, match="no_such_package not installed, which ONNX files need"):
            deployment._require("no_such_package")
