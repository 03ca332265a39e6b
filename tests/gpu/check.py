"""What a GPU makes of the training step: `make gpu-check`, at most ten minutes on one GPU, without Ray and MLflow.

    python tests/gpu/check.py [--minutes 10] [--target docs/performance.md]

Runs test_real_gpu.py, then times the step of three presets, eager and compiled, in bf16 and fp32, each in a process of
its own, and writes the table into the page with the card's name. A case that finds no time left says so in the table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

try:
    import pytest  # noqa: F401
    import torch

    from cigpose.config import config_from_mapping, load_preset
    from cigpose.files.atomic import write_text
    from cigpose.model.complexity import complexity
    from cigpose.model.estimator import build_model
    from cigpose.train.build import state_around
    from cigpose.train.step import Copier, train_step
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
CASES = [
    (preset, precision, compiled) for compiled in (False, True) for precision in ("bf16", "fp32") for preset in PRESETS
]
PEAKS = {
    "H100": {"bf16": 989e12, "fp32": 495e12},
    "H200": {"bf16": 989e12, "fp32": 495e12},
    "A100": {"bf16": 312e12, "fp32": 156e12},
}
"""Operations a second of dense matrices by the maker's sheet; of fp32 as TF32, in which torch lets cuDNN convolve."""
WARM_UP, STEPS = 5, 30
BEGIN, END = "<!-- measured: make gpu-check -->", "<!-- end of measured -->"


def measure(preset: str, precision: str, compiled: bool) -> dict[str, Any]:
    """Time one training step; in this process."""
    device, persons = torch.device("cuda", 0), PRESETS[preset]
    values = load_preset(preset).to_mapping()
    values["model"]["backbone"]["pretrained"] = None
    values["train"] |= {"precision": precision, "compile": compiled, "batch_total": persons, "accumulate_steps": 1}
    values["train"]["cluster"] = {"num_workers": 1}
    config = config_from_mapping(values)
    torch.manual_seed(0)
    state = state_around(build_model(config).to(device), config, device)
    (width, height), keypoints = config.model.input_size, len(config.keypoint_set)
    batch = {
        "crops": torch.randint(0, 256, (persons, height, width, 3), dtype=torch.uint8).pin_memory(),
        "keypoints": (torch.rand(persons, keypoints, 2) * torch.tensor([width, height])).pin_memory(),
        "visible": torch.ones(persons, keypoints).pin_memory(),
        "keys": ["random"] * persons,
    }
    copier, host = Copier(device), 0.0
    for number in range(WARM_UP + STEPS):
        if number == WARM_UP:
            state.settle()
            torch.cuda.synchronize()
            began, host = time.perf_counter(), 0.0
        queued = time.perf_counter()
        train_step(state, [copier(batch)], rate=1e-4, clip_grad_norm=35.0)
        host += time.perf_counter() - queued
    state.settle()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / STEPS
    # forward and backward: three times the forward, two operations to a multiply-add
    operations = 6 * complexity(config).multiply_adds * persons
    peak = next((peaks[precision] for name, peaks in PEAKS.items() if name in torch.cuda.get_device_name()), None)
    return {
        "ms": seconds * 1e3,
        "host_ms": host / STEPS * 1e3,
        "crops_per_s": persons / seconds,
        "gib": torch.cuda.max_memory_allocated() / 2**30,
        "mfu": operations / seconds / peak if peak else None,
    }


def run_case(preset: str, precision: str, compiled: bool, timeout_s: float) -> dict[str, Any] | str:
    """`measure` in a process of its own; why there is no answer, if there is none."""
    if timeout_s < 10:
        return "no time left"
    command = [sys.executable, __file__, "--case", json.dumps([preset, precision, compiled])]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return "no time left"
    if answer.returncode:
        print(answer.stderr[-2000:], file=sys.stderr)
        return f"failed: {(answer.stderr.strip() or 'no message').splitlines()[-1][:80]}"
    return json.loads(answer.stdout.splitlines()[-1])


def make_table(found: dict[tuple[str, str, bool], dict[str, Any] | str]) -> str:
    """The cases as Markdown."""
    rows = [
        "| preset | precision | | crops | ms a step | of which the host | crops/s | GiB | MFU |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (preset, precision, compiled), result in found.items():
        case = f"| {preset} | {precision} | {'compiled' if compiled else 'eager'} | {PRESETS[preset]} |"
        if isinstance(result, str):
            rows.append(f"{case} {result} | | | | |")
            continue
        mfu = "" if result["mfu"] is None else f"{result['mfu']:.1%}"
        rows.append(
            f"{case} {result['ms']:.1f} | {result['host_ms']:.1f} | {result['crops_per_s']:,.0f} | "
            f"{result['gib']:.1f} | {mfu} |"
        )
    return "\n".join(rows)


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
        print(json.dumps(measure(*options.case)))
        return
    ends = time.monotonic() + 60 * options.minutes
    # the suite's conftest.py is for more than the library
    tests = [sys.executable, "-m", "pytest", "-q", "--noconftest", "tests/gpu/test_real_gpu.py"]
    passed = subprocess.run(tests, cwd=ROOT).returncode == 0
    found = {}
    for case in CASES:
        found[case] = run_case(*case, timeout_s=ends - time.monotonic())
        print(*case, found[case], flush=True)
    card, said = torch.cuda.get_device_name(), "passed" if passed else "FAILED"
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}"
    measured = f"{card}, {versions}. tests/gpu/test_real_gpu.py {said}.\n\n{make_table(found)}"
    print(measured)
    put_on_page(options.target, measured)
    has_failed = any(isinstance(result, str) and result.startswith("failed") for result in found.values())
    raise SystemExit(1 if has_failed or not passed else 0)


if __name__ == "__main__":
    main()
