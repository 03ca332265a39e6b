"""The head against a direct transcription of its equations, group by group and edge by edge.

    python tests/benchmarks/bench_head.py [--preset NAME] [--batch 16] [--threads 2] [--rounds 5]

Two references, kept here, with the parameters of the head under test: `edge by edge` builds the 2 C features of each
directed edge, and adds its message to its node, one edge after the other; `edges at once` gathers and adds all edges in
one operation. Both go through groups and their keypoints in a loop. Everything else of the head is the same code.
Forward and backward of the training loss; each round times all, ratios are medians over the rounds. Memory: the
largest resident set of a process that makes two steps, above what it holds before.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cigpose.config import Config, load_preset
from cigpose.model.estimator import build_model
from cigpose.model.head import CIGPoseHead
from cigpose.model.hgnn import HGNN

VARIANTS = ("ours", "edges at once", "edge by edge")


def normalize(norm: nn.Module, x: Tensor) -> Tensor:
    """Batch norm of (B, C, N)."""
    return norm(x)


class DirectHGNN(nn.Module):
    """The graph network as its equations read, in upstream's layout (B, C, K)."""

    def __init__(self, hgnn: HGNN, config: Config, *, one_by_one: bool) -> None:
        super().__init__()
        self.hgnn = hgnn
        self.one_by_one = one_by_one
        keypoints = config.keypoint_set
        self.groups = keypoints.groups
        self.edges = sorted(pair for a, b in keypoints.edges for pair in ((a, b), (b, a)))
        numbers = range(len(self.groups))
        self.group_edges = [(i, j) for i in numbers for j in numbers if i != j]

    def edge_conv(self, layer: nn.Module, x: Tensor, edges: list[tuple[int, int]]) -> Tensor:
        """(B, C, N) -> the same."""
        receivers, senders = [i for i, _ in edges], [j for _, j in edges]
        if self.one_by_one:
            features = torch.stack([torch.cat((x[:, :, i], x[:, :, j] - x[:, :, i]), 1) for i, j in edges], 2)
        else:
            features = torch.cat((x[:, :, receivers], x[:, :, senders] - x[:, :, receivers]), 1)  # (B, 2 C, E)
        convolved = F.conv2d(features.unsqueeze(-1), layer.conv[0].weight).squeeze(-1)
        messages = F.silu(normalize(layer.conv[1], convolved))  # (B, C, E)
        total = torch.zeros_like(x)
        if not self.one_by_one:
            return total.index_add(2, torch.tensor(receivers), messages)
        for number, i in enumerate(receivers):
            total[:, :, i] += messages[:, :, number]
        return total

    def attention(self, layer: nn.Module, x: Tensor) -> Tensor:
        """(B, C, K) -> gates of the same shape."""
        reduced = layer.conv_down_linear(x.transpose(1, 2)).transpose(1, 2)
        reduced = F.silu(normalize(layer.bn_down, reduced))
        groups = torch.stack([reduced[:, :, list(group)].mean(2) for group in self.groups], 2)  # (B, C / 4, G)
        groups = self.edge_conv(layer.edge_conv_groups, groups, self.group_edges)
        gates = layer.aggregate_linear(groups.transpose(1, 2)).transpose(1, 2).sigmoid()  # (B, C, G)
        total, count = torch.zeros_like(x), torch.zeros(x.shape[2])
        for number, group in enumerate(self.groups):
            for keypoint in group:
                total[:, :, keypoint] += gates[:, :, number]
                count[keypoint] += 1
        return total / count.clamp(min=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, K, C) -> the same."""
        net = self.hgnn
        x = net.conv_input(x).transpose(1, 2)
        x = F.silu(normalize(net.bn_input, x))
        for edge_conv, attention, norm in zip(net.edgeconv_layers, net.attention_modules, net.bn_layers, strict=True):
            update = normalize(norm, self.edge_conv(edge_conv, x, self.edges))
            x = F.silu(update * self.attention(attention, update) + x)
        return x.transpose(1, 2)


def make_head(config: Config, variant: str) -> CIGPoseHead:
    """The head of a preset, in training mode, with the graph network of a variant."""
    torch.manual_seed(0)
    head = build_model(config).train().head
    if variant != "ours":
        head.gcn = DirectHGNN(copy.deepcopy(head.gcn), config, one_by_one=variant == "edge by edge")
    return head


def make_step(head: CIGPoseHead, config: Config, batch: int) -> Callable[[], Tensor]:
    """Forward and backward of the head's loss; gives the gradient at its input."""
    width, height = config.model.input_size
    generator = torch.Generator().manual_seed(0)
    shape = (batch, head.final_layer.in_channels, height // 32, width // 32)
    features = torch.randn(shape, generator=generator).requires_grad_()
    num_keypoints = len(config.keypoint_set)
    keypoints = torch.rand(batch, num_keypoints, 2, generator=generator) * torch.tensor([width, height])
    visible = torch.ones(batch, num_keypoints)

    def step() -> Tensor:
        features.grad = None
        head.zero_grad()
        head.loss(features, keypoints, visible)["loss"].backward()
        return features.grad

    return step


def make_graph_step(head: CIGPoseHead, batch: int, num_keypoints: int) -> Callable[[], None]:
    """What the head does with its graph network in one training step: a pass with gradient and one without."""
    hidden = head.cls_gx.in_features
    x = torch.randn(batch, num_keypoints, hidden, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def step() -> None:
        head.gcn(x).square().sum().backward()
        with torch.no_grad():
            head.gcn(x)

    return step


def seconds(step: Callable[[], object]) -> float:
    """Time of one call: of the wall, or with one thread of the processor, which a busy machine disturbs less."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    step()
    return clock() - start


def compare(steps: dict[str, Callable[[], object]], rounds: int, title: str) -> None:
    """Print times of all variants and their ratios to ours."""
    for step in steps.values():
        step()
    times = [{name: seconds(step) for name, step in steps.items()} for _ in range(rounds)]
    print(f"\n{title}\n{'':<16} {'median ms':>10} {'fastest':>8} {'times ours':>11} {'spread':>14}")
    for name in steps:
        own = sorted(row[name] * 1e3 for row in times)
        ratios = sorted(row[name] / row["ours"] for row in times)
        spread = f"{ratios[0]:.1f} - {ratios[-1]:.1f}"
        print(
            f"{name:<16} {statistics.median(own):>10.0f} {own[0]:>8.0f} {statistics.median(ratios):>11.1f} {spread:>14}"
        )


def print_memory(options: argparse.Namespace) -> None:
    """Print the peak memory of each variant, each in a process of its own."""
    print(f"\npeak memory of two steps above that of the model, batch {options.batch}")
    for variant in VARIANTS:
        command = [sys.executable, __file__, "--memory-of", variant, "--preset", options.preset]
        command += ["--batch", str(options.batch), "--threads", str(options.threads)]
        answer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{variant:<16} {answer['megabytes']:>7.0f} MB")


def measure_memory(options: argparse.Namespace) -> None:
    """The child's part of `print_memory`."""
    config = load_preset(options.preset)
    step = make_step(make_head(config, options.memory_of), config, options.batch)
    before = resident_kilobytes("VmRSS")
    step()
    step()
    print(json.dumps({"megabytes": (resident_kilobytes("VmHWM") - before) / 1024}))


def resident_kilobytes(field: str) -> int:
    """Linux' own figure of this process: now (VmRSS) or at most so far (VmHWM).

    getrusage would give a child the largest set of its parent.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="cigpose-l_coco-wholebody_256x192")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        measure_memory(options)
        return
    print(f"{platform.platform()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, ")
    print(
        f"{options.threads} threads, {torch.backends.cpu.get_cpu_capability()}; {options.preset}, batch {options.batch}"
    )
    config = load_preset(options.preset)
    heads = {variant: make_head(config, variant) for variant in VARIANTS}
    steps = {variant: make_step(head, config, options.batch) for variant, head in heads.items()}
    expected = steps["ours"]()
    for variant in VARIANTS[1:]:
        error = (steps[variant]() - expected).norm() / expected.norm()
        assert error < 1e-3, f"{variant} computes something else: {error}"
    compare(steps, options.rounds, "whole head, forward and backward of the loss")
    num_keypoints = len(config.keypoint_set)
    graphs = {variant: make_graph_step(head, options.batch, num_keypoints) for variant, head in heads.items()}
    compare(graphs, options.rounds, "graph network alone: a pass with gradient, a pass without")
    print_memory(options)


if __name__ == "__main__":
    main()
