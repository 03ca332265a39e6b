from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cigpose.cli import main
from cigpose.config import load_params, load_preset


def test_use_writes_a_complete_params_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "params.yaml"
    assert main(["use", "cigpose-l_coco_384x288", "--params", str(file)]) == 0
    assert load_params(file) == load_preset("cigpose-l_coco_384x288")
    assert "cigpose-l_coco_384x288" in capsys.readouterr().out


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


def test_help_does_not_load_torch() -> None:
    code = "import sys; from cigpose.cli import main\ntry: main(['--help'])\nfinally: print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("False")
