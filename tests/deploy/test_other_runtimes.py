"""Our file in the hands of programs that others wrote: cigpose-onnx and rtmlib, as they are on the package registry.

Each runs in an environment of its own (cigpose-onnx installs a package that is called `cigpose` too).
"""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from fresh_environment import make_environment, needs_registry, run_alone
from golden_models import recipe_tensor

from cigpose.config import Config, load_preset
from cigpose.deploy.export import export_onnx
from cigpose.deploy.onnx import OnnxModel
from cigpose.deploy.predictor import Predictor
from cigpose.model.estimator import build_model, normalize

CIGPOSE_ONNX = """
import json, sys
import cv2
from cigpose import inference
onnx, picture, boxes = sys.argv[1:]
session, width, height, ratio = inference.load_pose_model(onnx)
frame, found = cv2.imread(picture), []
for box in json.loads(boxes):
    tensor, region = inference.preprocess_person(frame, box, width, height)
    simcc = session.run(None, {"input": tensor})
    keypoints, scores = inference.decode_simcc(*simcc, width, height, ratio)
    found.append(inference.remap_to_frame(keypoints, region, width, height).tolist())
print(json.dumps({"size": [width, height], "keypoints": found}))
"""
RTMLIB = """
import contextlib, json, sys
import cv2
from rtmlib import RTMPose
onnx, picture, boxes = sys.argv[1:]
with contextlib.redirect_stdout(sys.stderr):
    model = RTMPose(onnx, model_input_size=(192, 256), backend="onnxruntime", device="cpu")
rgb = cv2.cvtColor(cv2.imread(picture), cv2.COLOR_BGR2RGB)
keypoints, scores = model(rgb, json.loads(boxes))
print(json.dumps({"keypoints": keypoints.tolist()}))
"""
OPENVINO = """
import json, sys
import numpy, openvino
onnx, images = sys.argv[1:]
compiled = openvino.Core().compile_model(onnx, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
outputs = compiled(numpy.load(images))
numpy.savez("openvino.npz", **{name: outputs[name] for name in ("simcc_x", "simcc_y")})
"""
ONE_TO_ONE = [[60.0, 40.0], [123.0, 17.0], [200.0, 90.0], [300.0, 200.0]]
"""Upper left corners of crops of 192 x 256 pixels that lie in the picture, one crop pixel a picture pixel."""


@pytest.fixture(scope="module")
def config() -> Config:
    return load_preset("cigpose-m_coco-wholebody_256x192")


@pytest.fixture(scope="module")
def m256(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIGPose-m 256x192 with weights of which every keypoint depends on every pixel, as ONNX."""
    network = build_model(config).eval()
    network.load_state_dict(
        {key: recipe_tensor(key, tuple(value.shape)) for key, value in network.state_dict().items()}
    )
    return export_onnx(network, config, tmp_path_factory.mktemp("m256") / "m256.onnx")


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    small = np.random.default_rng(5).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    cv2.imwrite(str(path), cv2.resize(small, (640, 480), interpolation=cv2.INTER_CUBIC))
    return path


def box_of(corner: list[float]) -> list[float]:
    """The box whose crop, enlarged by 1.25, is 192 x 256 pixels at that corner; a hair on, against rounding down."""
    x, y = corner[0] + 96 + 1e-3, corner[1] + 128 + 1e-3
    half_width, half_height = 192 / 1.25 / 2, 256 / 1.25 / 2
    return [x - half_width, y - half_height, x + half_width, y + half_height]


@needs_registry
@pytest.mark.parametrize(
    ("package", "script"),
    [("cigpose-onnx==1.0.1", CIGPOSE_ONNX), ("rtmlib==0.0.16", RTMLIB)],
    ids=["cigpose-onnx", "rtmlib"],
)
def test_other_programs_find_our_keypoints(
    package: str, script: str, m256: Path, picture: Path, config: Config, tmp_path: Path
) -> None:
    boxes = [box_of(corner) for corner in ONE_TO_ONE]
    poses = Predictor.load(m256, flip_test=False)(picture, np.array(boxes))
    python = make_environment(tmp_path / "venv", package)
    found = json.loads(run_alone(python, script, m256, picture, json.dumps(boxes), folder=tmp_path))
    away = np.linalg.norm(np.array(found["keypoints"]) - poses.keypoints, axis=2)[poses.scores > 0]
    print(f"{package}: {len(away)} keypoints, {(away <= 1).mean():.1%} within 1 px, median {np.median(away):.3f} px")
    assert (away <= 1).all()


@needs_registry
def test_openvino_gives_the_logits_of_onnxruntime(m256: Path, config: Config, tmp_path: Path) -> None:
    crops = torch.randint(0, 256, (2, 256, 192, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = normalize(crops).contiguous()
    np.save(tmp_path / "images.npy", images.numpy())
    python = make_environment(tmp_path / "venv", "openvino")
    run_alone(python, OPENVINO, m256, tmp_path / "images.npy", folder=tmp_path)
    with np.load(tmp_path / "openvino.npz") as found:
        for name, expected in zip(("simcc_x", "simcc_y"), OnnxModel(m256)(images), strict=True):
            away = np.abs(found[name] - expected.numpy()).max() / expected.abs().max().item()
            print(f"openvino: {name} differs by {away:.1e} of the largest")
            assert away < 1e-3
