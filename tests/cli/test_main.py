from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from cigpose.cli.main import main
from cigpose.config import config_from_mapping, load_params, load_preset
from cigpose.config.schema import leaves
from cigpose.deploy.predictor import Predictor
from cigpose.model.estimator import build_model
from cigpose.model.weights import save_weights


def test_use_writes_a_complete_params_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "params.yaml"
    assert main(["use", "cigpose-l_coco_384x288", "--params", str(file)]) == 0
    assert load_params(file) == load_preset("cigpose-l_coco_384x288")
    assert "cigpose-l_coco_384x288" in capsys.readouterr().out


def test_a_reader_of_the_output_who_has_gone_is_not_told_of_as_a_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # as `cigpose presets | head` leaves it
    with os.fdopen(writer, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        status = main(["presets", "quickstart"])
    assert (status, capsys.readouterr().err) == (141, "")


def test_use_fast_changes_how_it_is_computed_and_its_name_and_nothing_else(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("paper.yaml", "fast.yaml")]
    for path, switch in zip(paths, ([], ["--fast"]), strict=True):
        assert main(["use", "cigpose-l_coco_384x288", "--params", str(path), *switch]) == 0
    paper, fast = (leaves(load_params(path).to_mapping()) for path in paths)
    assert {key: fast[key] for key in fast if fast[key] != paper[key]} == {
        "name": "cigpose-l_coco_384x288-fast",
        "augmentation.device": "auto",
        "train.precision": "bf16",
        "train.compile": True,
        "train.cudnn_benchmark": True,
    }
    assert paper["augmentation.device"] == "cpu"
    assert (paper["train.precision"], paper["train.compile"], paper["train.cudnn_benchmark"]) == ("fp32", False, False)


def test_use_of_an_unknown_preset_is_one_sentence_and_leaves_the_old_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "params.yaml"
    file.write_text("old")
    assert main(["use", "no-such", "--params", str(file)]) == 2
    assert file.read_text() == "old"
    error = capsys.readouterr().err
    assert error.startswith("cigpose: preset 'no-such' does not exist. Known: ")
    assert "Traceback" not in error


def test_presets_prints_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets", "quickstart"]) == 0
    assert "name: quickstart" in capsys.readouterr().out


@pytest.mark.slow
def test_presets_lists_computed_sizes_beside_published_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert "133" in lines["cigpose-x_coco-ubody_384x288"]
    assert "60.8M" in lines["cigpose-x_coco-ubody_384x288"]
    assert "67.5" in lines["cigpose-x_coco-ubody_384x288"]


COMMANDS = (
    *(["presets"], ["use"], ["shards"], ["shards", "inspect"], ["evaluate"], ["predict"], ["export"]),
    *(["detectors"], ["detectors", "list"], ["detectors", "pull"]),
    *(["dataset"], ["dataset", "init"], ["dataset", "check"], ["dataset", "sigmas"]),
)


def test_every_command_explains_itself_in_a_fresh_process_without_torch() -> None:
    code = """
import sys
from cigpose.cli.main import main
for command in [[], *%r]:
    try:
        main([*command, "--help"])
    except SystemExit as end:
        assert end.code == 0, command
assert "torch" not in sys.modules and "cv2" not in sys.modules
"""
    result = fresh_process("-c", code % (COMMANDS,))
    assert result.returncode == 0, result.stderr
    for command in COMMANDS:
        assert f"usage: cigpose {' '.join(command)} [-h]" in result.stdout
    listed = result.stdout.split("commands:")[1].split("usage:")[0]
    assert {line.split()[0] for line in listed.splitlines() if line.startswith("    ") and line[4] != " "} == {
        *(command[0] for command in COMMANDS),
    }


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    """Weights of a network so small that starting Python takes most of a command's time."""
    values = load_preset("quickstart").to_mapping()
    values["model"]["input_size"] = [64, 96]
    values["model"]["backbone"] |= {"widen_factor": 0.125}
    values["model"]["head"] |= {"hidden": 32, "gau_s": 16}
    config = config_from_mapping(values)
    save_weights(tmp_path / "model.safetensors", build_model(config).state_dict(), config)
    return tmp_path / "model.safetensors"


@pytest.mark.slow  # an export takes seconds
def test_exports_work_first_thing_in_a_process_and_leave_predictions_alone(tiny_model: Path, tmp_path: Path) -> None:
    light = np.random.default_rng(0).integers(0, 256, (80, 60, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "photo.png"), light)
    code = """
import os, sys
from cigpose.cli.main import main
predict = ["predict", "photo.png", "--device", "cpu", "--no-flip-test"]
assert main(["export", "--model", sys.argv[1], "--out", "decoded.onnx", "--decoded"]) == 0
assert main([*predict, "--model", sys.argv[1], "--out", "torch"]) == 0
assert main(["export", "--model", os.path.dirname(sys.argv[1]), "--out", "model.onnx"]) == 0
assert main([*predict, "--model", "model.onnx", "--out", "onnx"]) == 0
"""
    result = fresh_process("-c", code, str(tiny_model), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("compared with torch") == 2
    predictor = Predictor.load(tiny_model, device="cpu", flip_test=False)
    expected = predictor(tmp_path / "photo.png").to_records()
    for out in ("torch", "onnx"):
        assert f"{out}: 1 person in 1 picture\n" in result.stdout
        (found,) = json.loads((tmp_path / out / "poses.json").read_text())
        assert abs(found["score"] - expected[0]["raw_score"]) < 2e-3
    (record,) = map(json.loads, (tmp_path / "torch" / "poses.jsonl").read_text().splitlines())
    assert record["persons"] == expected


@pytest.mark.slow
def test_a_command_without_its_files_is_a_sentence_in_a_fresh_process(tmp_path: Path) -> None:
    code = """
from cigpose.cli.main import main
for command in (["evaluate"], ["export"], ["predict", "photo.jpg"], ["shards", "inspect", "shards"], ["use", "no"]):
    assert main(command) == 2, command
assert main(["presets", "quickstart"]) == 0
"""
    result = fresh_process("-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(result.stderr.splitlines()) == 5
    assert all(line.startswith("cigpose: ") for line in result.stderr.splitlines())
    assert list(tmp_path.iterdir()) == []


def fresh_process(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, env=environment)
