"""Parameters and multiply-adds against those of the original."""

from __future__ import annotations

import json

import pytest
import torch
from paper_presets import PRESETS

from cigpose.config import load_preset
from cigpose.model.complexity import complexity
from cigpose.model.estimator import build_model


@pytest.mark.parametrize("original", PRESETS)
def test_size_and_cost_are_the_published_ones(golden, original):
    expected = next(entry for entry in json.loads((golden / "zoo.json").read_text()) if entry["config"] == original)
    size = complexity(load_preset(PRESETS[original]))
    assert size.parameters == expected["params_total"]
    assert size.parameters - size.trained_parameters == expected["params_never_trained"]
    assert size.multiply_adds_edgewise == expected["flops"]["mmengine_get_model_complexity_info"]
    assert size.backbone_multiply_adds < size.multiply_adds < size.multiply_adds_edgewise
    published = expected["upstream_readme"].get("flops_g")
    assert published is None or round(size.multiply_adds_edgewise / 1e9, 1) == published


@pytest.mark.parametrize("original", PRESETS)
def test_the_backbone_and_the_layers_without_gradient_are_the_original_ones(golden, original):
    expected = next(entry for entry in json.loads((golden / "zoo.json").read_text()) if entry["config"] == original)
    with torch.device("meta"):
        model = build_model(load_preset(PRESETS[original]))
    assert sum(p.numel() for p in model.backbone.parameters()) == expected["params_backbone"]
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == expected["never_trained"]


def test_the_counter_agrees_with_a_model_that_computes(tiny_config):
    from torch.utils.flop_counter import FlopCounterMode

    config = tiny_config()
    model = build_model(config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 64, 64))
    without_norms = counter.get_total_flops() // 2
    assert without_norms < complexity(config).multiply_adds < 1.2 * without_norms
