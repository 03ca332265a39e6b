from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
import torch

from cigpose.model.estimator import build_model
from cigpose.train.build import for_world, state_around
from cigpose.train.checkpoints import CheckpointError
from cigpose.train.state import (
    influential_params,
    random_state,
    refuse_changed_params,
    seed_everything,
    set_random_state,
)
from cigpose.train.step import train_step

CPU = torch.device("cpu")


def fresh(config: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    return state_around(build_model(config), config, CPU)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_state_that_was_saved_and_loaded_takes_the_same_steps(tiny_config: Any, batch: Any, precision: str) -> None:
    config = tiny_config(train__precision=precision)
    first = fresh(config, 0)
    for seed in range(3):
        train_step(first, [batch(4, seed)], rate=0.01, clip_grad_norm=35.0)
    first.epoch, first.step_in_epoch, first.step = 1, 2, 7
    first.best, first.weights, first.history = {"value": 0.5}, "weights-1.safetensors", [{"kind": "log", "step": 7}]
    tensors, values = first.state_dict()
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    values = json.loads(json.dumps(values))

    second = fresh(config, 1)  # other weights, a moved optimiser, another scale: nothing of it may remain
    train_step(second, [batch(4, 9)], rate=0.1, clip_grad_norm=None)
    second.load_state_dict(tensors, values)
    for seed in range(3, 6):
        for state in (first, second):
            train_step(state, [batch(4, seed)], rate=0.01, clip_grad_norm=35.0)
    one, other = first.state_dict(), second.state_dict()
    assert one[1] == other[1]
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(one[0][key], other[0][key]) for key in one[0])


def test_the_state_holds_the_moments_of_every_trained_parameter(tiny_config: Any, batch: Any) -> None:
    state = fresh(tiny_config(), 0)
    train_step(state, [batch(4)], rate=0.01, clip_grad_norm=None)
    names = {key.removeprefix("optimizer.exp_avg.") for key in state.state_dict()[0] if ".exp_avg." in key}
    assert names == {name for name, parameter in state.model.named_parameters() if parameter.requires_grad}


def test_a_checkpoint_of_another_model_is_refused(tiny_config: Any) -> None:
    saved = fresh(tiny_config(), 0).state_dict()
    with pytest.raises(CheckpointError, match="does not fit this model"):
        fresh(tiny_config(model__head__hidden=32), 0).load_state_dict(*saved)


def test_a_checkpoint_of_weights_that_are_no_numbers_is_refused(tiny_config: Any) -> None:
    tensors, values = fresh(tiny_config(), 0).state_dict()
    key = next(key for key in tensors if key.startswith("model.") and key.endswith(".weight"))
    broken = {**tensors, key: torch.full_like(tensors[key], torch.nan)}
    with pytest.raises(CheckpointError, match=rf"{key}.*--restart begins anew"):
        fresh(tiny_config(), 1).load_state_dict(broken, values)


def test_the_first_weights_belong_to_what_a_result_depends_on(tiny_config: Any) -> None:
    config = tiny_config(model__backbone__pretrained="https://host/mine.pth?signature=of-today")
    saved = influential_params(config, {}, "aaa")
    assert "of-today" not in str(saved)
    with pytest.raises(CheckpointError, match=r"pretrained.sha256: 'aaa' there, 'bbb' now"):
        refuse_changed_params(saved, influential_params(config, {}, "bbb"), "here")


def test_the_network_that_a_run_started_from_belongs_to_it_and_its_address_does_not(tiny_config: Any) -> None:
    config = tiny_config(train__start_from="https://me:secret@host/mine.pth")
    saved = influential_params(config, {}, None, "aaa")
    assert "secret" not in str(saved)
    with pytest.raises(CheckpointError, match=r"start_from.sha256: 'aaa' there, 'bbb' now"):
        refuse_changed_params(saved, influential_params(config, {}, None, "bbb"), "here")


def test_what_a_run_did_not_know_when_it_began_makes_no_other_run_of_it(tiny_config: Any) -> None:
    names = influential_params(tiny_config(), {})
    assert not any("start_from" in name or "learning_rate_factors" in name for name in names)


def test_random_generators_go_on_where_they_were() -> None:
    seed_everything(3, rank=1)
    state = json.loads(json.dumps(random_state()))
    drawn = random.random(), np.random.rand(), torch.rand(2).tolist()
    seed_everything(4, rank=0)
    set_random_state(state)
    assert (random.random(), np.random.rand(), torch.rand(2).tolist()) == drawn


def test_workers_draw_differently() -> None:
    seed_everything(3, rank=0)
    first = torch.rand(1)
    seed_everything(3, rank=1)
    assert not torch.equal(first, torch.rand(1))


@pytest.mark.parametrize(
    "change, matters",
    [
        ({"train__optimizer__learning_rate": 0.5}, True),
        ({"train__optimizer__learning_rate_factors": {"backbone": 0.1}}, True),
        ({"model__head__gau_s": 8}, True),
        ({"seed": 9}, True),
        ({"train__cluster": {"num_workers": 2}}, True),
        ({"train__validation__metric": "body/AP"}, True),
        ({"train__validation__flip_test": False}, True),
        ({"train__loader__open_shards": 3}, True),
        ({"train__loader__shuffle_buffer": 3}, True),
        ({"train__loader__prefetch_batches": 3}, False),
        ({"data__locations": {"rendered-train": "s3://me:secret@elsewhere"}}, False),
        ({"evaluate__metric": "body/AP"}, False),
        ({"evaluate__person_score": "box"}, False),
        ({"train__cluster": {"num_workers": 1, "threads_per_worker": 4, "max_failures": 1}}, False),
        ({"train__checkpoint__keep": 9}, False),
        ({"train__log_every_steps": 9}, False),
        ({"train__compile": True}, False),
        ({"registry__model": "other"}, False),
        ({"evaluate__batch": 3}, False),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else str(value),
)
def test_params_that_change_the_result_are_told_from_those_that_do_not(
    tiny_config: Any, change: Any, matters: bool
) -> None:
    before = influential_params(tiny_config(), {"rendered-train": "a"})
    after = influential_params(tiny_config(**change), {"rendered-train": "a"})
    assert (before != after) == matters


def test_changed_params_are_refused_by_name_with_both_values(tiny_config: Any) -> None:
    saved = influential_params(tiny_config(), {"rendered-train": "aaa"})
    refuse_changed_params(saved, json.loads(json.dumps(saved)), "here")
    current = influential_params(tiny_config(train__optimizer__learning_rate=0.5), {"rendered-train": "bbb"})
    with pytest.raises(CheckpointError) as caught:
        refuse_changed_params(saved, current, "runs/a")
    message = str(caught.value)
    former = tiny_config().train.optimizer.learning_rate
    assert f"train.optimizer.learning_rate: {former} there, 0.5 now" in message
    assert "shards.rendered-train: 'aaa' there, 'bbb' now" in message
    assert "--restart" in message
    assert "weight_decay" not in message


@pytest.mark.parametrize(
    "workers, batch, accumulate, world, expected",
    [
        (4, 512, 1, 4, (512, 1)),
        (4, 512, 1, 2, (512, 2)),
        (4, 512, 1, 3, (516, 2)),
        (32, 2048, 1, 24, (2064, 2)),
        (2, 16, 1, 1, (16, 2)),
    ],
)
def test_fewer_workers_keep_the_total_batch(
    tiny_config: Any, workers: int, batch: int, accumulate: int, world: int, expected: tuple[int, int]
) -> None:
    config = tiny_config(
        train__batch_total=batch, train__accumulate_steps=accumulate, train__cluster={"num_workers": workers}
    )
    changed = for_world(config, world)
    assert (changed.train.batch_total, changed.train.accumulate_steps) == expected
    assert changed.train.cluster.num_workers == world
    assert changed.train.batch_per_worker <= config.train.batch_per_worker
