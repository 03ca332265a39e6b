from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cigpose.cli.main import main
from cigpose.deploy.detector import MAX_OVERLAP, MIN_SCORE, Detector, suppress
from cigpose.download import detectors as table
from cigpose.download.sources import SourceFile
from cigpose.files.digest import sha256_of


@pytest.fixture(scope="module")
def nano(shared: Path) -> Path:
    return shared / "detectors" / "yolox_nano.onnx"


@pytest.fixture(scope="module")
def photographs(shared: Path) -> list[tuple[bytes, np.ndarray]]:
    """128 pictures of COCO (JPEG), each with the boxes of its people with labelled keypoints."""
    labels = json.loads((shared / "coco128" / "keypoints.json").read_text())
    people: dict[int, list[list[float]]] = {}
    for person in labels["annotations"]:
        if person["num_keypoints"] and not person["iscrowd"]:
            x, y, width, height = person["bbox"]
            people.setdefault(person["image_id"], []).append([x, y, x + width, y + height])
    with zipfile.ZipFile(shared / "coco128" / "images.zip") as archive:
        members = {name.rpartition("/")[2]: name for name in archive.namelist()}
        return [
            (archive.read(members[image["file_name"]]), np.array(people.get(image["id"], [])).reshape(-1, 4))
            for image in labels["images"]
        ]


def decoded(content: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)


def overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(N, M) intersection over union."""
    low, high = np.maximum(boxes[:, None, :2], others[:, :2]), np.minimum(boxes[:, None, 2:], others[:, 2:])
    shared = np.maximum(high - low, 0).prod(axis=2)
    areas, other_areas = ((item[:, 2:] - item[:, :2]).prod(axis=1) for item in (boxes, others))
    return shared / (areas[:, None] + other_areas - shared)


@pytest.mark.slow  # 128 pictures
def test_nine_of_ten_labelled_people_of_more_than_64_pixels_are_found(nano: Path, photographs) -> None:
    detector, found, wanted = Detector(nano, threads=1), 0, 0
    for image, people in photographs:
        large = people[(people[:, 2:] - people[:, :2]).prod(axis=1) > 64**2]
        if len(large):
            wanted += len(large)
            found += int((overlaps(large, detector(decoded(image))[:, :4]).max(axis=1, initial=0) >= 0.5).sum())
    assert wanted == 117
    assert found >= 0.9 * wanted, f"{found} of {wanted}"


def with_suppression(source: Path, target: Path) -> Path:
    """YOLOX with decoding and suppression inside, by onnxruntime's own operators: dets and labels as MMDeploy's."""
    model = onnx.load(str(source))
    grid = [np.mgrid[: 416 // s, : 416 // s][::-1].reshape(2, -1).T for s in (8, 16, 32)]
    strides = np.concatenate([np.full((len(g), 1), s) for g, s in zip(grid, (8, 16, 32), strict=True)])
    constants = {
        "grid": np.concatenate(grid)[None].astype(np.float32),
        "strides": strides[None].astype(np.float32),
        "half": np.float32([0.5]),
        "most": np.int64([500]),
        "overlap": np.float32([MAX_OVERLAP]),
        "least": np.float32([MIN_SCORE]),
        "last": np.int64([2]),
        "class_column": np.int64([1]),
        "flattened": np.int64([-1]),
        **{f"i{value}": np.int64([value]) for value in (0, 2, 4, 5, 6)},
    }
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())

    def part(name: str, start: str, stop: str) -> onnx.NodeProto:
        return helper.make_node("Slice", ["output", start, stop, "last"], [name])

    node = helper.make_node
    model.graph.node.extend(
        [
            *(part("centre", "i0", "i2"), part("log_size", "i2", "i4")),
            *(part("object", "i4", "i5"), part("person", "i5", "i6")),
            *(node("Add", ["centre", "grid"], ["moved"]), node("Mul", ["moved", "strides"], ["c"])),
            *(node("Exp", ["log_size"], ["relative"]), node("Mul", ["relative", "strides"], ["size"])),
            node("Mul", ["size", "half"], ["h"]),
            *(node("Sub", ["c", "h"], ["low"]), node("Add", ["c", "h"], ["high"])),
            node("Concat", ["low", "high"], ["corners"], axis=2),
            node("Mul", ["object", "person"], ["score"]),
            node("Transpose", ["score"], ["by_class"], perm=[0, 2, 1]),
            node("NonMaxSuppression", ["corners", "by_class", "most", "overlap", "least"], ["chosen"]),
            node("Gather", ["chosen", "i2"], ["rows"], axis=1),
            node("Reshape", ["rows", "flattened"], ["flat"]),
            node("Concat", ["corners", "score"], ["all"], axis=2),
            node("Gather", ["all", "flat"], ["dets"], axis=1),
            node("Gather", ["chosen", "class_column"], ["classes"], axis=1),
            node("Transpose", ["classes"], ["labels"], perm=[1, 0]),
        ]
    )
    del model.graph.output[:]
    model.graph.output.extend(
        [
            helper.make_tensor_value_info("dets", TensorProto.FLOAT, [1, "M", 5]),
            helper.make_tensor_value_info("labels", TensorProto.INT64, [1, "M"]),
        ]
    )
    onnx.save(model, str(target))
    return target


def test_cells_are_decoded_and_suppressed_as_a_graph_that_does_it_inside(nano: Path, photographs, tmp_path) -> None:
    ours, theirs = Detector(nano, threads=1), Detector(with_suppression(nano, tmp_path / "inside.onnx"), threads=1)
    assert (ours.kind, theirs.kind) == ("cells", "suppressed")
    several = [decoded(image) for image, people in photographs if len(people) > 1][:8]
    counts = []
    for image in several:
        people, expected = ours(image), theirs(image)
        assert len(people) == len(expected)
        assert np.allclose(people, expected, rtol=1e-4, atol=1e-2)
        counts.append(len(people))
    assert sum(counts) > 16


def tiny(path: Path, first: str, outputs: dict[str, list], steps: list[onnx.NodeProto], **weights: np.ndarray) -> Path:
    """A graph that takes 64 x 64 pixels."""
    graph = helper.make_graph(
        [helper.make_node(first, ["images", *weights], ["x"]), *steps],
        "detector",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 64, 64])],
        [helper.make_tensor_value_info(name, *kind) for name, kind in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), str(path))
    return path


@pytest.fixture
def rtmdet(tmp_path: Path) -> Path:
    """Begins with a convolution: its box is a known function of the normalised mean colour."""
    weights = np.zeros((5, 3, 1, 1), np.float32)
    weights[[0, 1, 2], [0, 1, 2]] = 10.0
    node = helper.make_node
    labels = numpy_helper.from_array(np.zeros((1, 1), np.int64), "zero")
    steps = [
        node("GlobalAveragePool", ["x"], ["mean"]),
        node("Constant", [], ["shape"], value=numpy_helper.from_array(np.int64([1, 1, 5]), "shape")),
        node("Reshape", ["mean", "shape"], ["dets"]),
        node("Constant", [], ["labels"], value=labels),
    ]
    outputs = {"dets": [TensorProto.FLOAT, [1, 1, 5]], "labels": [TensorProto.INT64, [1, 1]]}
    return tiny(
        tmp_path / "rtmdet.onnx", "Conv", outputs, steps, weights=weights, bias=np.float32([0, 0, 20, 50, 0.75])
    )


def test_rtmdet_gets_normalised_pixels(rtmdet: Path) -> None:
    blue, green, red = 160, 200, 150
    image = np.full((128, 128, 3), (blue, green, red), np.uint8)
    (person,) = Detector(rtmdet, threads=1)(image)
    expected = [10 * (blue - 103.53) / 57.375, 10 * (green - 116.28) / 57.12, 20 + 10 * (red - 123.675) / 58.395, 50]
    assert np.allclose(person, [*(2 * np.array(expected)), 0.75], atol=1e-3)


def test_boxes_that_were_decoded_inside_are_taken_as_they_are(tmp_path: Path) -> None:
    rows = np.zeros((1, 84, 85), np.float32)
    rows[0, :, :2] = 60  # cells far away
    rows[0, 5, :6] = 20, 30, 10, 40, 1, 0.5
    step = helper.make_node("Constant", [], ["output"], value=numpy_helper.from_array(rows, "rows"))
    path = tiny(tmp_path / "decoded.onnx", "Identity", {"output": [TensorProto.FLOAT, [1, 84, 85]]}, [step])
    detector = Detector(path, threads=1)
    assert detector.kind == "boxes"
    assert np.allclose(detector(np.zeros((128, 64, 3), np.uint8)), [[30, 20, 50, 100, 0.5]])


def test_a_graph_of_another_kind_is_one_sentence(tmp_path: Path) -> None:
    path = tiny(tmp_path / "other.onnx", "Identity", {"x": [TensorProto.FLOAT, [1, 3, 64, 64]]}, [])
    with pytest.raises(ValueError, match=r"other.onnx: gives x \(1, 3, 64, 64\); expected one output \(1, cells"):
        Detector(path)
    page = tmp_path / "page.onnx"
    page.write_text("<!doctype html><html>")
    with pytest.raises(ValueError, match=r"page.onnx: not an ONNX file but a web page"):
        Detector(page)
    with pytest.raises(FileNotFoundError, match=r"none.onnx: no ONNX file there"):
        Detector(tmp_path / "none.onnx")


def test_the_worse_of_two_boxes_that_overlap_goes() -> None:
    corners = np.array([[0, 0, 100, 100], [2, 2, 100, 100], [200, 0, 300, 100], [60, 0, 160, 100]], dtype=float)
    assert suppress(corners, np.array([0.5, 0.9, 0.3, 0.4]), 0.45).tolist() == [1, 3, 2]
    assert suppress(corners[:0], np.zeros(0), 0.45).tolist() == []


# --- cigpose detectors ---


@pytest.fixture
def releases(monkeypatch: pytest.MonkeyPatch, nano: Path, host) -> Iterator[str]:
    """Address of a mirror that has the shared file as both detectors; its digest is published for one of them."""
    paths = {}
    for name, source in table.DETECTORS.items():
        host.put(f"/{source.urls[0].removeprefix('https://')}", nano.read_bytes())
        facts = {"bytes": nano.stat().st_size, "sha256": sha256_of(nano)} if source.sha256 else {}
        paths[name] = SourceFile(name=source.name, urls=source.urls, licence=source.licence, **facts)
    monkeypatch.setattr(table, "DETECTORS", paths)
    return host.address


def test_a_pulled_detector_is_checked_and_stays(releases: str, host, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "detectors"
    pull = ["detectors", "pull", "yolox-nano", "yolox-m", "--mirror", releases, "--folder", str(folder)]
    assert main(pull) == 0
    assert f"{folder}/yolox-m/yolox_m.onnx: ready." in capsys.readouterr().out
    assert main(["detectors", "list", "--json", "--folder", str(folder)]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["path"] for row in rows] == [f"{folder}/yolox-nano/yolox_nano.onnx", f"{folder}/yolox-m/yolox_m.onnx"]
    host.requests.clear()
    assert main(pull) == 0
    assert not [target for target, *_ in host.requests if target.endswith(".onnx")]
    (folder / "yolox-m" / "yolox_m.onnx").write_bytes(b"another")  # its digest was recorded at the first download
    assert main(pull) == 2
    assert "recorded in" in capsys.readouterr().err


def test_a_detector_with_another_digest_is_refused(releases: str, host, tmp_path: Path, capsys) -> None:
    source = table.DETECTORS["yolox-nano"]
    host.put(f"/{source.urls[0].removeprefix('https://')}", b"x" * (source.bytes or 0))
    folder = tmp_path / "detectors"
    assert main(["detectors", "pull", "yolox-nano", "--mirror", releases, "--folder", str(folder)]) == 2
    assert "gives a wrong file" in capsys.readouterr().err
    assert not list(folder.rglob("*.onnx"))


def test_a_detector_that_is_not_in_the_table_is_named(capsys) -> None:
    assert main(["detectors", "pull", "yolox-huge"]) == 2
    assert capsys.readouterr().err == (
        "cigpose: detectors: 'yolox-huge' is not in the table. Known: yolox-nano, yolox-m.\n"
    )
