"""Parameters and multiply-adds against those of the original."""

from __future__ import annotations

import json

import pytest
import torch

from cigpose.config import load_preset
from cigpose.model.complexity import complexity
from cigpose.model.estimator import build_model

PRESETS = {
    "cigpose-m_8xb64-420e_coco-wholebody-256x192": "cigpose-m_coco-wholebody_256x192",
    "cigpose-l_8xb64-420e_coco-wholebody-256x192": "cigpose-l_coco-wholebody_256x192",
    "cigpose-l_8xb32-420e_coco-wholebody-384x288": "cigpose-l_coco-wholebody_384x288",
    "cigpose-x_8xb32-420e_coco-wholebody-384x288": "cigpose-x_coco-wholebody_384x288",
    "cigpose-l_8xb32-420e_coco-ubody-256x192": "cigpose-l_coco-ubody_256x192",
    "cigpose-l_8xb32-420e_coco-ubody-384x288": "cigpose-l_coco-ubody_384x288",
    "cigpose-x_8xb32-420e_coco-ubody-384x288": "cigpose-x_coco-ubody_384x288",
    "cigpose-m_1xb384-420e_coco-256x192": "cigpose-m_coco_256x192",
    "cigpose-l_1xb256-420e_coco-256x192": "cigpose-l_coco_256x192",
    "cigpose-l_1xb64-420e_coco-384x288": "cigpose-l_coco_384x288",
    "cigpose-m_1xb64-210e_crowdpose-256x192": "cigpose-m_crowdpose_256x192",
    "cigpose-l_1xb64-210e_crowdpose-256x192": "cigpose-l_crowdpose_256x192",
    "cigpose-l_1xb64-210e_crowdpose-384x288": "cigpose-l_crowdpose_384x288",
    "cigpose-x_1xb64-210e_crowdpose-384x288": "cigpose-x_crowdpose_384x288",
}


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


def test_the_counter_agrees_with_a_model_that_computes(tiny_config):
    from torch.utils.flop_counter import FlopCounterMode

    config = tiny_config()
    model = build_model(config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 64, 64))
    without_norms = counter.get_total_flops() // 2
    assert without_norms < complexity(config).multiply_adds < 1.2 * without_norms
