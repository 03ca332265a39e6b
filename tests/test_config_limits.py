"""Every leaf of params.yaml with every wrong value: refused by name, or known to work."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest

from cigpose.config import config_from_mapping, load_params, load_preset
from cigpose.config.schema import ConfigError

HUGE = 10**18
QUICKSTART = load_preset("quickstart").to_mapping()
WORKS: dict[str, tuple[Any, ...]] = {
    "seed": (0, HUGE),
    "data.render.*.seed": (0, HUGE),
    "data.render.*.clutter": (0,),
    "data.render.*.turn": (0,),
    "data.render.*.bent_legs": (0,),
    "data.render.*.close_ups": (0,),
    "data.render.*.occlusion": (0,),
    "data.render.*.spurious_context": (0,),
    "data.render.*.context": (0,),
    "data.render.*.hide_arm": (0,),
    "data.sharding.max_bad_share": (0,),
    "data.sharding.processes": (0,),
    "model.causal.train_top_k": (0,),
    "model.causal.eval_top_k": (0,),
    "model.causal.threshold": (-1, 0, HUGE, -1e300, 1e300),  # every keypoint, or none, is replaced
    "model.causal.counterfactual_weight": (0,),
    "model.hgnn.num_layers": (0,),
    **{
        f"augmentation.{stage}.{name}": (0,)
        for stage in ("stage1", "stage2")
        for name in (
            *(f"{what}_prob" for what in ("flip", "half_body", "shift", "scale", "rotate", "blur", "median_blur")),
            "dropout_prob",
            "shift_factor",
            "rotate_degrees",
            "hsv_delta[0]",
            "hsv_delta[1]",
            "hsv_delta[2]",
        )
    },
    "augmentation.stage2_from_epoch": (0, HUGE),
    "train.optimizer.learning_rate": (HUGE,),  # the loss says so at once
    "train.optimizer.learning_rate_batch": (HUGE,),
    "train.optimizer.weight_decay": (0,),
    "train.optimizer.betas[0]": (0,),
    "train.optimizer.betas[1]": (0,),
    "train.optimizer.clip_grad_norm": (HUGE,),
    "train.schedule.warmup_steps": (0, HUGE),
    "train.schedule.cosines[0].begin_epoch": (0,),
    "train.schedule.cosines[0].final_factor": (0,),
    "train.ema.momentum": (0,),
    "train.validate_every_epochs": (HUGE,),  # once, at the end
    "train.log_every_steps": (HUGE,),
    "train.checkpoint.every_steps": (HUGE,),
    "train.checkpoint.every_minutes": (0,),
    "train.loader.processes": (0,),
    "train.loader.cache_gb": (0,),
    "train.loader.shuffle_buffer": (0,),
    "train.cluster.max_failures": (0,),
    **{
        f"{protocol}.{name}": (0,)
        for protocol in ("evaluate", "train.validation")
        for name in ("keypoint_score_threshold", "oks_nms_threshold")
    },
    "registry.margin": (0,),
    "published.ap": (0,),
    **{f"registry.max_loss.{part}": (0,) for part in QUICKSTART["registry"]["max_loss"]},
    "registry.max_robustness_loss": (0,),
}
"""Leaf -> those of the values tried that it takes."""


def numbers(values: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all numbers."""
    if isinstance(values, dict | list):
        items = values.items() if isinstance(values, dict) else enumerate(values)
        return [found for key, item in items for found in numbers(item, (*path, key))]
    return [path] if isinstance(values, int | float) and not isinstance(values, bool) else []


def leaves(values: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values that are no table."""
    if isinstance(values, dict) and values:
        return [found for key, item in values.items() for found in leaves(item, (*path, key))]
    return [path]


def name(path: tuple[Any, ...]) -> str:
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")
    return text.replace("rendered-train", "*").replace("rendered-val", "*")


def put(values: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    values = copy.deepcopy(values)
    section: Any = values
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    return values


COMPLETE = put(put(QUICKSTART, ("train", "checkpoint", "every_steps"), 5), ("train", "cluster", "min_workers"), 1)
COMPLETE["published"] = {"ap": 60.0, "source": "a paper", "gflops": 2.0}
VALUES = (-1, 0, HUGE, -1e300, 1e300, math.nan, math.inf, -math.inf, 16**5000, "many", True, [], {})


@pytest.mark.parametrize("path", numbers(COMPLETE), ids=lambda path: ".".join(map(str, path)))
def test_a_number_that_cannot_be_used_is_refused_by_name(path: tuple[Any, ...]) -> None:
    taken = []
    for value in VALUES:
        try:
            config_from_mapping(put(COMPLETE, path, value))
        except ConfigError as err:
            field = str(path[-1] if isinstance(path[-1], str) else path[-2])
            assert field in str(err)
            assert len(str(err)) < 600
        else:
            taken.append(value)
    assert taken == list(WORKS.get(name(path), ()))


@pytest.mark.parametrize("path", leaves(QUICKSTART), ids=lambda path: ".".join(map(str, path)))
def test_a_value_of_another_type_is_refused_by_name(path: tuple[Any, ...]) -> None:
    for value in (object(), [[[]]], {"a": {"b": 1}}, b"bytes"):
        if path == ("keypoints",) and isinstance(value, dict):
            continue  # a table of keypoints, see below
        with pytest.raises(ConfigError, match=str(path[-1])):
            config_from_mapping(put(QUICKSTART, path, value))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.head.final_kernel_size", 4, "final_kernel_size must be odd"),
        ("augmentation.stage1.scale_range", [2.0, 1.0], r"scale_range must be \[smallest, largest\]"),
        ("augmentation.stage2.extra", [{"Blur": {}}, "Blur"], r"augmentation.stage2.extra\[1\]: expected a mapping"),
        ("augmentation.stage2.extra", [{"Blur": [3]}], r"augmentation.stage2.extra\[0\] must be one transform of alb"),
        (
            "augmentation.stage2.extra",
            [{"Blur": {}, "ToGray": {}}],
            r"augmentation.stage2.extra\[0\] must be one trans",
        ),
        ("train.cluster.min_workers", 3, "train.cluster.min_workers must be between 1 and 2, got 3"),
        ("train.accumulate_steps", 0, "train.accumulate_steps must be between 1 and 1000000, got 0"),
        ("train.epochs", -1, "train.epochs must be between 1 and 100000, got -1"),
        ("evaluate.batch", 0, "evaluate.batch must be between 1 and 100000, got 0"),
        ("keypoints", {"name": "a", "names": ["x"], "sigmas": [math.nan]}, "expected 1 positive sigmas"),
    ],
)
def test_a_refusal_says_what_is_expected(path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_mapping(put(QUICKSTART, tuple(path.split(".")), value))


LAUGHS = "\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  epochs: 3\n  batch_total: 8\n  epochs: 4\n", "'epochs' stands on line 2 and again on line 4"),
        ("seed: 1\n'seed': 2\n", "'seed' stands on line 1 and again on line 2"),
        (LAUGHS, "stands for more than 100000 values by its aliases"),
        ("a: &a [*a]", "stands for more than 100000 values by its aliases"),
        ("name: " + "[" * 5000, "not valid yaml"),
        ("name: " + "[" * 5000 + "]" * 5000, "nested hundreds of levels deep"),
        ("train:\n" + "".join(f"{' ' * i}k:\n" for i in range(1, 3000)), "nested hundreds of levels deep"),
        (f"seed: {'9' * 5000}", "params.yaml: "),
        ("name: 2024-13-45", "params.yaml: "),
        ("? [a, b]\n: 1", "params.yaml: not valid yaml"),
        ("", "params: expected a mapping, got None"),
    ],
    ids=[
        "twice",
        "twice, quoted",
        "laughs",
        "itself",
        "lists left open",
        "lists",
        "tables",
        "long",
        "date",
        "list as key",
        "empty",
    ],
)
def test_yaml_that_may_mean_anything_is_refused_in_one_sentence(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_params(file)
    assert message in str(caught.value) and str(caught.value).startswith(str(file))
    assert len(str(caught.value)) < 1000


def test_text_that_is_not_utf8_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(ConfigError, match=r"params.yaml: is not UTF-8 text"):
        load_params(tmp_path / "params.yaml")
