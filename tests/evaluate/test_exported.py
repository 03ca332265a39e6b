"""What an exported file loses, measured as every model is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cigpose.cli.main import main
from cigpose.deploy.onnx import OnnxModel
from cigpose.evaluate.checkpoint import measure

from .conftest import Project

pytestmark = pytest.mark.slow  # exports take seconds


def test_int8_is_calibrated_on_training_crops_and_its_loss_printed(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project.folder)
    out = tmp_path / "int8.onnx"
    assert main(["export", "--int8", "--calibration-crops", "6", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "on people, ground_truth boxes, with flip test" in printed
    before, after, lost = map(float, re.search(r"^body +(\S+) +(\S+) +(\S+)$", printed, re.MULTILINE).groups())
    exported = OnnxModel(out)
    assert b"DequantizeLinear" in out.read_bytes()
    assert after == pytest.approx(measure(exported, project.config, shards_root=project.shards)["body/AP"], abs=1e-4)
    assert lost == pytest.approx(before - after, abs=2e-4)


def test_int8_without_training_data_is_one_sentence(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project.folder)
    arguments = ["export", "--int8", "--shards", str(tmp_path), "--out", str(tmp_path / "int8.onnx")]
    assert main(arguments) == 2
    assert "index.json: " in capsys.readouterr().err
    assert not (tmp_path / "int8.onnx").exists()
