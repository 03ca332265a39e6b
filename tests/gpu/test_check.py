from __future__ import annotations

import runpy
import subprocess
from pathlib import Path

import pytest
import torch


@pytest.mark.slow
def test_gpu_check_without_a_gpu_says_so_and_leaves_the_page(root: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    page = root / "docs" / "performance.md"
    before = page.read_bytes()
    answer = subprocess.run(["make", "gpu-check"], cwd=root, capture_output=True, text=True)
    assert answer.returncode != 0
    assert "sees no CUDA GPU here, so nothing was run or written" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert page.read_bytes() == before


def test_gpu_check_writes_its_table_between_its_marks(root: Path, tmp_path: Path) -> None:
    check = runpy.run_path(str(root / "tests" / "gpu" / "check.py"))
    result = {"ms": 12.34, "host_ms": 5.0, "crops_per_s": 5186.0, "gib": 20.5, "mfu": 0.11}
    cases = dict(zip(check["CASES"], [result, "no time left"], strict=False))
    page = tmp_path / "performance.md"
    page.write_bytes((root / "docs" / "performance.md").read_bytes())
    for _ in range(2):
        check["put_on_page"](page, check["make_table"](cases))
        text = page.read_text()
        assert text.count("| 12.3 | 5.0 | 5,186 | 20.5 | 11.0% |") == 1
        assert text.count("no time left") == 1
    assert text.startswith((root / "docs" / "performance.md").read_text().split(check["BEGIN"])[0])
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="the table has no place"):
        check["put_on_page"](page, "table")
