"""What a GPU makes of the training: `make gpu-check`, at most ten minutes on one GPU, without Ray and MLflow.

    python tests/gpu/check.py [--minutes 10] [--target docs/performance.md]

Runs test_real_gpu.py, then measures what `timings` can: the step of three presets, eager and compiled, in bf16 and
fp32, their evaluation, their loader, and the memory, each in a process of its own, and writes the tables into the page
with the card's name. What finds no time left says so in its row.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

try:
    import pytest  # noqa: F401
    import timings
    import torch

    from cigpose.config import Config, config_from_mapping, load_preset
    from cigpose.files.atomic import write_text
except ModuleNotFoundError as err:
    raise SystemExit(
        f"gpu-check: {err.name} is not installed for {sys.executable}; expected what the library needs and pytest: "
        "`pip install -e . pytest` beside a torch for CUDA."
    ) from err

PRESETS = {  # persons per GPU, as the paper trains
    "cigpose-m_coco-wholebody_256x192": 64,
    "cigpose-l_coco-wholebody_384x288": 32,
    "cigpose-x_coco-wholebody_384x288": 32,
}
LOADERS = list(PRESETS)[:2]
"""Crops of x are those of l."""
Case = tuple[Any, ...]
Found = dict[Case, dict[str, Any] | str]
"""Case -> what was measured, or why nothing was."""
STEPS: list[Case] = [
    ("step", preset, precision, compiled)
    for compiled in (False, True)
    for precision in ("bf16", "fp32")
    for preset in PRESETS
]
# what takes longest and is missed least comes last: compiling
CASES: list[Case] = [("bandwidth",), *(("loader", preset) for preset in LOADERS), *STEPS]
PEAKS = {
    "H100": {"bf16": 989e12, "fp32": 495e12},
    "H200": {"bf16": 989e12, "fp32": 495e12},
    "A100": {"bf16": 312e12, "fp32": 156e12},
}
"""Operations a second of dense matrices by the maker's sheet; of fp32 as TF32, in which torch lets cuDNN convolve."""
LONGEST_TESTS = 0.4
"""Share of the time that the tests may take."""
PICTURES, EPOCHS = 300, 12
"""Of the loader's measurement: about 7,000 crops."""
BEGIN, END = "<!-- measured: make gpu-check -->", "<!-- end of measured -->"


def config_of(preset: str, precision: str = "bf16", compiled: bool = False) -> Config:
    """A preset on one GPU, from random weights."""
    values = load_preset(preset).to_mapping()
    values["model"]["backbone"]["pretrained"] = None
    persons = PRESETS[preset]
    values["train"] |= {"precision": precision, "compile": compiled, "batch_total": persons, "accumulate_steps": 1}
    values["train"]["cluster"] = {"num_workers": 1}
    return config_from_mapping(values)


def measure(case: Case) -> dict[str, Any]:
    """Measure a case on the first GPU, in this process."""
    device = torch.device("cuda", 0)
    match case:
        case ("bandwidth",):
            return {"bytes_per_s": timings.measure_bandwidth(device)}
        case ("loader", preset):
            return measure_loader(config_of(preset))
        case ("step", preset, precision, compiled):
            return timings.measure_step(config_of(preset, precision, compiled), device)
    raise ValueError(f"no case {case}")


def measure_loader(config: Config, pictures: int = PICTURES, epochs: int = EPOCHS) -> dict[str, Any]:
    """The loader on rendered people in shards made on the fly, with no more processes than there are cores."""
    options = dataclasses.replace(
        config.train.loader, processes=min(config.train.loader.processes, len(os.sched_getaffinity(0)))
    )
    sharding = dataclasses.replace(config.data.sharding, images_per_shard=max(pictures // 16, 1))
    data = dataclasses.replace(config.data, sharding=sharding)
    config = dataclasses.replace(config, data=data, train=dataclasses.replace(config.train, loader=options))
    with tempfile.TemporaryDirectory(prefix="cigpose-") as folder:
        config = timings.with_people(config, Path(folder), num_images=pictures)
        return timings.measure_loader(config, Path(folder) / "shards", epochs=epochs)


def run_case(case: Case, timeout_s: float) -> dict[str, Any] | str:
    """`measure` in a process of its own; why there is no answer, if there is none."""
    if timeout_s < 10:
        return "no time left"
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return "no time left"
    if answer.returncode:
        print(answer.stderr[-2000:], file=sys.stderr)
        return f"failed: {(answer.stderr.strip() or 'no message').splitlines()[-1][:80]}"
    return json.loads(answer.stdout.splitlines()[-1])


def run_cases(cases: list[Case], ends: float, run: Callable[[Case, float], dict[str, Any] | str] = run_case) -> Found:
    """What each case gives, until the clock (`time.monotonic`) says `ends`."""
    found: Found = {}
    for case in cases:
        found[case] = run(case, ends - time.monotonic())
        print(*case, found[case], flush=True)
    return found


def make_tables(found: Found, peaks: dict[str, float] | None) -> str:
    """The cases as Markdown.

    Args:
        found: of `CASES`; those that are missing are left out.
        peaks: precision -> operations a second of this card at most, None if they are not known.
    """
    memory = found.get(("bandwidth",), "not measured")
    speed = None if isinstance(memory, str) else memory["bytes_per_s"]
    said = memory if speed is None else f"{speed / 1e9:,.0f} GB/s, read and written by a kernel that does nothing else"
    rows = [
        f"Memory: {said}.",
        "",
        "| preset | precision | | crops | ms a step | of which the host | crops/s | GiB | MFU | of the memory's speed "
        "| evaluated crops/s |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(_step_row(case, found[case], speed, peaks) for case in STEPS if case in found),
        "",
        "| loader | processes | crops/s | CPU ms a crop |",
        "| --- | ---: | ---: | ---: |",
        *(_loader_row(case[1], result) for case, result in found.items() if case[0] == "loader"),
    ]
    late = sum(result == "no time left" for result in found.values())
    if late:
        rows += ["", f"{late} of {len(found)} measurements had no time left; `--minutes` gives them more."]
    return "\n".join(rows)


def _step_row(case: Case, result: dict[str, Any] | str, speed: float | None, peaks: dict[str, float] | None) -> str:
    _, preset, precision, compiled = case
    row = f"| {preset} | {precision} | {'compiled' if compiled else 'eager'} |"
    if isinstance(result, str):
        return f"{row} {PRESETS[preset]} | {result} | | | | | | |"
    seconds = result["seconds"]
    mfu = f"{result['operations'] / seconds / peaks[precision]:.1%}" if peaks else "-"
    share = f"{result['bytes'] / seconds / speed:.0%}" if speed and result["bytes"] else "-"
    evaluated = f"{result['evaluated_per_s']:,.0f}" if result["evaluated_per_s"] else "-"
    return (
        f"{row} {result['crops']} | {seconds * 1e3:.1f} | {result['host_seconds'] * 1e3:.1f} | "
        f"{result['crops'] / seconds:,.0f} | {result['gib']:.1f} | {mfu} | {share} | {evaluated} |"
    )


def _loader_row(preset: str, result: dict[str, Any] | str) -> str:
    if isinstance(result, str):
        return f"| {preset} | | {result} | |"
    return f"| {preset} | {result['processes']} | {result['per_s']:,.0f} | {result['cpu_seconds'] * 1e3:.2f} |"


def run_tests(timeout_s: float) -> str:
    """What became of test_real_gpu.py: "passed", "FAILED", or that it did not end."""
    # the suite's conftest.py is for more than the library
    tests = [sys.executable, "-m", "pytest", "-q", "-rs", "--noconftest", "tests/gpu/test_real_gpu.py"]
    try:
        return "passed" if subprocess.run(tests, cwd=ROOT, timeout=timeout_s).returncode == 0 else "FAILED"
    except subprocess.TimeoutExpired:
        return f"did NOT END within {timeout_s:.0f} s"


def put_on_page(page: Path, measured: str) -> None:
    """Replace what the page says was measured."""
    text = page.read_text(encoding="utf-8")
    before, marked, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not marked or not ended:
        raise SystemExit(f"{page}: the lines {BEGIN} and {END} are not there, so the table has no place; restore them.")
    write_text(page, f"{before}{BEGIN}\n{measured}\n{END}{after}")


def main() -> None:
    """Check and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--target", type=Path, default=ROOT / "docs" / "performance.md")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(f"gpu-check: torch {torch.__version__} sees no CUDA GPU here, so nothing was run or written.")
    if options.case:
        print(json.dumps(measure(tuple(options.case))))
        return
    ends = time.monotonic() + 60 * options.minutes
    outcome = run_tests(LONGEST_TESTS * 60 * options.minutes)
    found = run_cases(CASES, ends)
    card = torch.cuda.get_device_name()
    peaks = next((peaks for name, peaks in PEAKS.items() if name in card), None)
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}"
    measured = f"{card}, {versions}. tests/gpu/test_real_gpu.py {outcome}.\n\n{make_tables(found, peaks)}"
    print(measured)
    put_on_page(options.target, measured)
    has_failed = any(isinstance(result, str) and result.startswith("failed") for result in found.values())
    raise SystemExit(1 if has_failed or outcome != "passed" else 0)


if __name__ == "__main__":
    main()
