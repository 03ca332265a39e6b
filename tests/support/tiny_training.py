"""A configuration small enough that a training takes a second."""

from __future__ import annotations

from typing import Any

from nested import change

from cigpose.config import Config, config_from_mapping, load_preset


def make_config(**changes: Any) -> Config:
    """The quickstart at a fraction of its size, with changes at dotted paths (`train__epochs=3`)."""
    values = load_preset("quickstart").to_mapping()
    values["name"] = "tiny"
    values["data"]["sharding"]["images_per_shard"] = 10
    values["model"] |= {"input_size": [48, 64]}
    values["model"]["backbone"] |= {"widen_factor": 0.125}
    values["model"]["head"] |= {"hidden": 16, "gau_s": 16, "final_kernel_size": 3}
    values["train"] |= {"epochs": 2, "batch_total": 8, "loss_batch": 8, "log_every_steps": 2, "precision": "fp32"}
    values["train"]["optimizer"] |= {"learning_rate": 0.0012, "learning_rate_batch": 8}
    values["train"]["schedule"] = {
        "warmup_steps": 3,
        "cosines": [{"begin_epoch": 0, "end_epoch": 2, "final_factor": 0.1}],
    }
    values["train"]["validate_every_epochs"] = 1
    values["train"]["ema"] = {"enabled": True, "momentum": 0.01, "gamma": 10.0}
    values["train"]["checkpoint"] = {"every_steps": 3, "every_minutes": None, "keep": 2}
    values["train"]["cluster"] = {"num_workers": 1}
    return config_from_mapping(change(values, **changes))
