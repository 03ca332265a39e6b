from __future__ import annotations

import json
import runpy
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import make_config


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


@pytest.fixture
def check(root: Path) -> dict[str, Any]:
    return runpy.run_path(str(root / "tests" / "gpu" / "check.py"))


def test_gpu_check_writes_its_tables_between_its_marks(root: Path, tmp_path: Path, check: dict[str, Any]) -> None:
    step = {"crops": 64, "seconds": 0.01234, "host_seconds": 0.005, "gib": 20.5}
    step |= {"operations": 1.2e12, "bytes": 30e9, "evaluated_per_s": 9000.0}
    found = {case: "no time left" for case in check["CASES"]}
    found[check["STEPS"][0]] = step
    found[check["STEPS"][-1]] = {**step, "bytes": None, "evaluated_per_s": None}
    found["bandwidth",] = {"bytes_per_s": 3e12}
    found["loader", check["LOADERS"][0]] = {"processes": 10, "per_s": 5000.0, "cpu_seconds": 0.0018}
    page = tmp_path / "performance.md"
    page.write_bytes((root / "docs" / "performance.md").read_bytes())
    for _ in range(2):
        check["put_on_page"](page, check["make_tables"](found, check["PEAKS"]["H100"]))
        text = page.read_text()
        assert text.count("Memory: 3,000 GB/s") == 1
        assert text.count("| bf16 | eager | 64 | 12.3 | 5.0 | 5,186 | 20.5 | 9.8% | 81% | 9,000 |") == 1
        assert text.count("| fp32 | compiled | 64 | 12.3 | 5.0 | 5,186 | 20.5 | 19.6% | - | - |") == 1
        assert text.count("| 10 | 5,000 | 1.80 |") == 1
        assert f"{len(found) - 4} of {len(found)} measurements had no time left" in text
    assert text.startswith((root / "docs" / "performance.md").read_text().split(check["BEGIN"])[0])
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="the table has no place"):
        check["put_on_page"](page, "table")


def test_what_gpu_check_begins_too_late_says_so_and_the_rest_is_kept(check: dict[str, Any]) -> None:
    def run(case: Any, left: float) -> Any:
        return {"bytes_per_s": 1.0} if case == ("bandwidth",) else check["run_case"](case, left)

    began = time.monotonic()
    found = check["run_cases"](check["CASES"], began + 5, run)
    assert time.monotonic() - began < 2
    assert found.pop(("bandwidth",)) == {"bytes_per_s": 1.0}
    assert len(found) == 14 and set(found.values()) == {"no time left"}


@pytest.mark.slow
def test_what_gpu_check_measures_it_measures_on_a_cpu_too(check: dict[str, Any], one_thread: None) -> None:
    import timings  # which check.py has put on the path

    cpu, config = torch.device("cpu"), make_config(train__validation__boxes="ground_truth")
    step = timings.measure_step(config, cpu, warm_up=1, steps=2)
    assert step["crops"] == 8 and 0 < step["host_seconds"] <= step["seconds"] < 5
    assert step["gib"] > 0.05 and step["evaluated_per_s"] > 1
    parameters = sum(p.numel() for p in timings.build_model(config).parameters())
    assert step["bytes"] > 7 * 4 * parameters, "the optimiser alone reads four and writes three numbers each"
    twice = timings.measure_step(make_config(train__batch_total=16), cpu, warm_up=1, steps=1)
    assert twice["operations"] == 2 * step["operations"]
    assert step["bytes"] < twice["bytes"] < 2 * step["bytes"]
    speed = timings.measure_bandwidth(cpu, num_bytes=8 << 20, rounds=3)
    assert 1e8 < speed < 1e13
    loader = check["measure_loader"](make_config(train__loader__processes=2), pictures=16, epochs=2)
    assert loader["processes"] <= 2 and loader["per_s"] > 10 and 1e-5 < loader["cpu_seconds"] < 1
    found = {check["STEPS"][0]: step, ("bandwidth",): {"bytes_per_s": speed}, ("loader", check["LOADERS"][0]): loader}
    table = check["make_tables"]({case: json.loads(json.dumps(result)) for case, result in found.items()}, None)
    assert table.count("| - |") == 1, "what share of a peak a CPU reaches"


def test_traffic_counts_what_is_read_and_written_and_no_views(check: dict[str, Any]) -> None:
    import timings

    x, y = torch.ones(100), torch.ones(100)
    cases = {
        "one is read, one written": (lambda: x.neg(), 800),
        "in its place": (lambda: x.add_(1), 800),
        "two are read, one written": (lambda: torch.add(x, y, out=y), 1200),
        "a view": (lambda: x.view(10, 10).T, 0),
        "room": (lambda: torch.empty(100), 0),
        "one number that looks like a hundred": (lambda: torch.neg(x[:1].expand(100), out=y), 4 + 400),
    }
    for name, (run, expected) in cases.items():
        with timings.Traffic() as traffic:
            run()
        assert traffic.total == expected, name
