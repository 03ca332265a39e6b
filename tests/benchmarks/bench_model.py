"""The whole model: training steps, inference, and where the time goes.

    python tests/benchmarks/bench_model.py [--presets NAME ...] [--batch 8] [--threads 2] [--rounds 3] [--compile]

A training step is normalisation, loss, backward, clipping and AdamW. The share outside the backbone is one minus the
time of the backbone's own forward and backward on the same batch. Variants (memory format, bf16 autocast, compiled) are
given as ratios to float32, contiguous, eager in the same round. bf16 is left out where the processor only emulates it.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
from collections.abc import Callable
from contextlib import nullcontext

import torch
from rounds import timed
from torch import Tensor

from cigpose.config import Config, load_preset
from cigpose.model.estimator import build_model, normalize

Step = Callable[[], object]


def make_batch(config: Config, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random crops, keypoints and visibility."""
    width, height = config.model.input_size
    num_keypoints = len(config.keypoint_set)
    crops = torch.randint(0, 256, (batch, height, width, 3), dtype=torch.uint8)
    return crops, torch.rand(batch, num_keypoints, 2) * torch.tensor([width, height]), torch.ones(batch, num_keypoints)


def make_training_step(config: Config, batch: int, *, channels_last: bool, bf16: bool, compiled: bool) -> Step:
    """One optimiser step of a model of its own."""
    torch.manual_seed(0)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    model = build_model(config).train().to(memory_format=memory_format)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    crops, keypoints, visible = make_batch(config, batch)
    loss_of = torch.compile(model.loss, fullgraph=True) if compiled else model.loss

    def step() -> None:
        optimizer.zero_grad()
        images = normalize(crops).contiguous(memory_format=memory_format)
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            loss = loss_of(images, keypoints, visible)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 35)
        optimizer.step()

    return step


def make_backbone_step(config: Config, batch: int) -> Step:
    """Forward and backward of the backbone alone, channels-last."""
    torch.manual_seed(0)
    backbone = build_model(config).train().to(memory_format=torch.channels_last).backbone
    images = normalize(make_batch(config, batch)[0])
    gradient = torch.randn_like(backbone(images))

    def step() -> None:
        backbone.zero_grad()
        backbone(images).backward(gradient)

    return step


def make_inference(config: Config, batch: int, *, compiled: bool) -> tuple[Step, Step]:
    """A forward pass of the whole model, and of its backbone."""
    model = build_model(config).eval().to(memory_format=torch.channels_last)
    images = normalize(make_batch(config, batch)[0])
    whole = torch.compile(model, fullgraph=True) if compiled else model
    return torch.inference_mode()(lambda: whole(images)), torch.inference_mode()(lambda: model.backbone(images))


def ratios(times: dict[str, list[float]], name: str, to: str) -> list[float]:
    """Time of one step over that of another, round by round, ascending."""
    return sorted(a / b for a, b in zip(times[name], times[to], strict=True))


def report_training(config: Config, options: argparse.Namespace) -> None:
    """Print times of training steps."""
    reference = "fp32"
    kinds = {"fp32": (False, False, False), "fp32 channels-last": (True, False, False)}
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        kinds |= {"bf16": (False, True, False), "bf16 channels-last": (True, True, False)}
    if options.compile:
        kinds |= {"fp32 channels-last compiled": (True, False, True)}
    steps = {
        name: make_training_step(config, options.batch, channels_last=last, bf16=bf16, compiled=compiled)
        for name, (last, bf16, compiled) in kinds.items()
    }
    times = timed(
        {**steps, "backbone": make_backbone_step(config, options.batch)},
        options.rounds,
        threads=torch.get_num_threads(),
    )
    print(f"{'training step':<30} {'crops/s':>8} {'of fp32':>8} {'spread':>14}")
    for name in kinds:
        found = ratios(times, name, reference)
        speed = options.batch / statistics.median(times[name])
        print(f"{name:<30} {speed:>8.1f} {statistics.median(found):>7.2f}x {found[0]:>6.2f} - {found[-1]:.2f}")
    share = [1 - ratio for ratio in ratios(times, "backbone", "fp32 channels-last")]
    print(
        f"outside the backbone: {100 * statistics.median(share):.0f}% ({100 * share[-1]:.0f} - {100 * share[0]:.0f}%)"
    )


def report_inference(config: Config, options: argparse.Namespace) -> None:
    """Print times of forward passes."""
    print(f"{'inference, channels-last':<30} {'crops/s':>8} {'ms':>8}   in the backbone")
    for batch in (1, 8):
        for compiled in (False, True) if options.compile else (False,):
            whole, backbone = make_inference(config, batch, compiled=compiled)
            times = timed({"whole": whole, "backbone": backbone}, 3 * options.rounds, threads=torch.get_num_threads())
            median = statistics.median(times["whole"])
            share = 100 * statistics.median(ratios(times, "backbone", "whole"))
            name = f"batch {batch}{', compiled' if compiled else ''}"
            part = "" if compiled else f"{share:>10.0f}%"
            print(f"{name:<30} {batch / median:>8.1f} {median * 1e3:>8.0f} {part}")


def main() -> None:
    """Print the report of each preset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ["cigpose-m_coco-wholebody_256x192", "cigpose-l_coco-wholebody_384x288"]
    parser.add_argument("--presets", nargs="+", default=default)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="with torch.compile too: minutes of compiling")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{platform.platform()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__},")
    print(f"{options.threads} threads, {torch.backends.cpu.get_cpu_capability()}, training batch {options.batch}")
    for name in options.presets:
        config = load_preset(name)
        print(f"\n{name}")
        report_training(config, options)
        report_inference(config, options)


if __name__ == "__main__":
    main()
