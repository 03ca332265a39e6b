"""How many graphs the compiler makes of a training step, and where it breaks: `python tests/gpu/graphs.py [PRESET...]`.

On any machine: the step is captured, and run without being compiled further. Batches of two sizes, for the last one of
an epoch is smaller, make two graphs where shapes are static.
"""

from __future__ import annotations

import sys
import time

import torch
from torch import nn

from cigpose.config import config_from_mapping, fast_variant, load_preset
from cigpose.model.estimator import build_model
from cigpose.train.build import state_around
from cigpose.train.step import train_step

PRESETS = (
    "cigpose-m_coco-wholebody_256x192",
    "cigpose-l_coco-wholebody_256x192",
    "cigpose-l_coco-wholebody_384x288",
    "cigpose-x_coco-wholebody_384x288",
)


def count_graphs(preset: str) -> tuple[int, int]:
    """Graphs and breaks of a preset's step with `--fast`."""
    values = fast_variant(load_preset(preset)).to_mapping()
    values["model"]["backbone"]["pretrained"] = None
    values["train"]["precision"] = "fp32"  # not all processors have another
    config = config_from_mapping(values)
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    state = state_around(build_model(config), config, torch.device("cpu"))
    (width, height), keypoints = config.model.input_size, len(config.keypoint_set)
    for persons in (3, 2, 3, 2):
        batch = {
            "crops": torch.randint(0, 256, (persons, height, width, 3), dtype=torch.uint8),
            "keypoints": torch.rand(persons, keypoints, 2) * width,
            "visible": torch.ones(persons, keypoints),
            "keys": ["random"] * persons,
        }
        train_step(state, [batch], rate=1e-4, clip_grad_norm=35.0)
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


if __name__ == "__main__":
    compile_module = nn.Module.compile
    nn.Module.compile = lambda module, **options: compile_module(module, backend="eager", **options)
    for name in sys.argv[1:] or PRESETS:
        began = time.perf_counter()
        graphs, breaks = count_graphs(name)
        print(f"{name}: {graphs} graphs, {breaks} breaks ({time.perf_counter() - began:.0f} s)", flush=True)
