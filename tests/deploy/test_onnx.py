from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from cigpose.config import Config
from cigpose.deploy.agreement import TOLERANCE, refuse_different
from cigpose.deploy.export import META_KEY, export_onnx
from cigpose.deploy.onnx import OnnxModel, require_packages
from cigpose.deploy.quantize import to_float16, to_int8
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
    runs = OnnxModel(path)
    found_keypoints, found_scores = predict_crops(runs, torch.from_numpy(crops))
    assert runs.decoded and np.array_equal(found_scores, scores)
    with pytest.raises(ValueError, match="keypoints do not average"):
        predict_crops(runs, torch.from_numpy(crops), torch.arange(len(config.keypoint_set)))
    seen = scores > 0  # the others have no place
    assert np.array_equal(found_keypoints[seen], keypoints[seen])


def test_the_file_says_all_that_other_runtimes_ask_for(exported: Path, config: Config) -> None:
    session = onnxruntime.InferenceSession(str(exported), providers=["CPUExecutionProvider"])
    assert [item.name for item in session.get_inputs()] == ["input"]
    assert [item.name for item in session.get_outputs()] == ["simcc_x", "simcc_y"]
    meta = json.loads(session.get_modelmeta().custom_metadata_map[META_KEY])
    assert (meta["input_w"], meta["input_h"], meta["split_ratio"]) == (64, 96, config.model.simcc.split_ratio)
    assert meta["padding"] == config.augmentation.box_padding and meta["keypoint_set"] == "coco_wholebody"
    assert len(meta["mean"]) == len(meta["std"]) == 3 and tuple(meta["keypoint_names"]) == config.keypoint_set.names


def test_the_file_names_no_path_of_the_machine(exported: Path) -> None:
    content = exported.read_bytes()
    for trace in (b".py", b"site-packages", b"stack_trace", str(Path.cwd()).encode(), b"cigpose.model"):
        assert trace not in content


def test_float16_is_loaded_and_takes_and_gives_float32(exported: Path, model: PoseEstimator, tmp_path: Path) -> None:
    path = tmp_path / "half.onnx"
    path.write_bytes(to_float16(exported).SerializeToString())
    assert path.stat().st_size < 0.6 * exported.stat().st_size
    images = torch.randn(3, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = model(images), OnnxModel(path)(images)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().median() <= 0.02 * theirs.abs().max()  # CIM may choose another keypoint


def test_int8_quantizes_the_backbone_and_leaves_the_head(exported: Path, model: PoseEstimator, tmp_path: Path) -> None:
    path = tmp_path / "int8.onnx"
    images = torch.randn(4, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    graph = to_int8(exported, images.numpy())
    path.write_bytes(graph.SerializeToString())
    names = {node.output[0]: node.op_type for node in graph.graph.node}
    for node in graph.graph.node:
        if node.op_type in ("Conv", "MatMul"):
            assert (names.get(node.input[0]) == "DequantizeLinear") == (node.op_type == "Conv"), node.name
    with torch.no_grad():
        expected, found = model(images), OnnxModel(path)(images)
    for ours, theirs in zip(found, expected, strict=True):
        assert 0 < (ours - theirs).abs().median() <= 0.1 * theirs.abs().max()
    with pytest.raises(ValueError, match="no crops to calibrate with"):
        to_int8(exported, images.numpy()[:0])


def test_the_model_is_left_as_it_was(model: PoseEstimator, exported: Path) -> None:
    assert not model.training and next(model.parameters()).dtype == torch.float32


def test_a_file_that_computes_something_else_is_refused(model: PoseEstimator, config: Config, exported: Path) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.head.cls_gx.weight[:, 0] += 0.01
    with pytest.raises(ValueError, match=r"model\.onnx: onnxruntime differs from torch by .* Nothing was written"):
        refuse_different(other, exported, exported, config, TOLERANCE, decoded=False)


def test_an_export_that_fails_leaves_no_file(
    model: PoseEstimator, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: None)
    with pytest.raises(ValueError, match="gave no program"):
        export_onnx(model, config, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_no_exports_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no ONNX file there"):
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
            require_packages("no_such_package")
