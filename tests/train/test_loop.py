from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from recorded import KilledError, Recorder, deterministic, final_state, place

from cigpose.files.errors import DataError
from cigpose.loader.plan import train_batch_sizes
from cigpose.model.estimator import build_model
from cigpose.train import loop, validation
from cigpose.train.build import for_world
from cigpose.train.checkpoints import CheckpointError, CheckpointStore
from cigpose.train.loop import train
from cigpose.train.place import StartingModel


def test_a_training_logs_validates_and_keeps_checkpoints(whole_run: Any) -> None:
    folder, recorder, result = whole_run
    start, total = recorder.started
    assert (start, result["step"]) == (0, total)
    steps = [record["step"] for record in recorder.logs]
    assert steps[-1] == total and steps[0] == 2
    assert {"loss", "loss_kpt", "loss_cf", "acc_pose", "grad_norm", "lr", "data_wait", "eta_s"} <= recorder.logs[
        0
    ].keys()
    assert [record["epoch"] for record in recorder.validations] == [1, 2]
    assert len(recorder.predictions[0]) == len(recorder.predictions[1]) > 0
    assert len(CheckpointStore(folder / "checkpoints").names()) == 2
    assert recorder.crops is not None and recorder.crops.dtype == np.uint8
    assert result["history"] == sorted(recorder.logs + recorder.validations, key=lambda r: (r["step"], r["kind"]))


def test_the_best_epoch_is_that_of_the_chosen_metric(whole_run: Any) -> None:
    _, recorder, result = whole_run
    values = [record["whole/AP"] for record in recorder.validations]
    assert result["best"]["value"] == max(values)
    assert result["best"]["epoch"] == 1 + values.index(max(values))


def test_epochs_are_measured_by_their_own_protocol_and_not_by_that_of_the_finished_model(
    tiny_config: Any, shards: Path, tmp_path: Path, whole_run: Any
) -> None:
    # no set of these has detections
    config = tiny_config(evaluate__boxes="detections", evaluate__metric="body/AP", train__validation__metric="whole/AR")
    result = train(config, place(config, shards, tmp_path), Recorder())
    assert result["best"]["metric"] == "whole/AR"
    assert deterministic(result["history"]) == deterministic(whole_run[2]["history"])


@pytest.mark.slow
@pytest.mark.parametrize("killed_at", [2, 4, 8], ids=["before a checkpoint", "between two", "second epoch"])
def test_a_resumed_training_ends_bit_equal_to_one_never_interrupted(
    tiny_config: Any, shards: Path, tmp_path: Path, whole_run: Any, killed_at: int
) -> None:
    config = tiny_config()
    with pytest.raises(KilledError):
        train(config, place(config, shards, tmp_path), Recorder(killed_at))
    torch.rand(5)  # generators stand elsewhere in the new process
    recorder = Recorder()
    train(config, place(config, shards, tmp_path), recorder)
    assert recorder.started[0] == 3 * (killed_at // 3)
    ours, theirs = final_state(tmp_path), final_state(whole_run[0])
    assert ours[0].keys() == theirs[0].keys()
    assert all(torch.equal(ours[0][key], theirs[0][key]) for key in ours[0])
    assert ours[1]["random"] == theirs[1]["random"]
    validations = [[r for r in deterministic(v["history"]) if r["kind"] == "validation"] for v in (ours[1], theirs[1])]
    assert validations[0] == validations[1]


@pytest.fixture
def starting(tiny_config: Any) -> StartingModel:
    """Another network, of other keypoints, as a training may start from it."""
    protocol = {"evaluate__metric": "body/AP", "train__validation__metric": "body/AP"}
    source = tiny_config(keypoints="coco", **protocol)
    torch.manual_seed(11)
    content = safetensors.torch.save(build_model(source).state_dict())
    return StartingModel(
        read=lambda: content, config=source, where="elsewhere", sha256=hashlib.sha256(content).hexdigest()
    )


@pytest.mark.slow
def test_a_training_that_starts_from_another_network_with_a_frozen_part_ends_as_if_it_had_not_been_killed(
    tiny_config: Any, shards: Path, tmp_path: Path, starting: StartingModel
) -> None:
    changes = {"train__ema": {"enabled": False}, "train__epochs": 2}  # validated are the trained weights themselves
    config = tiny_config(train__optimizer__learning_rate_factors={"backbone": 0.0, "head.gau": 0.1}, **changes)
    places = [replace(place(config, shards, tmp_path / name), start=starting) for name in ("whole", "killed")]
    train(config, places[0], Recorder())
    with pytest.raises(KilledError):
        train(config, places[1], Recorder(8))  # in the second epoch, after a validation
    train(config, places[1], Recorder())
    (ours, _), (theirs, _) = final_state(tmp_path / "killed"), final_state(tmp_path / "whole")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs) and ours.keys() == theirs.keys()
    given = safetensors.torch.load(starting.read())
    backbone = [key for key in given if key.startswith("backbone.")]
    assert all(torch.equal(ours[f"model.{key}"], given[key]) for key in backbone)  # its statistics too
    moved = {key for key in given if key.startswith("head.gau") and not torch.equal(ours[f"model.{key}"], given[key])}
    assert moved
    changed = replace(starting, read=lambda: b"other")
    with pytest.raises(DataError, match=r"^elsewhere: sha256 is .*, the weights that the run began with have "):
        train(config, replace(place(config, shards, tmp_path / "third"), start=changed), Recorder())


def test_a_finished_training_has_nothing_left_to_do(tiny_config: Any, shards: Path, whole_run: Any) -> None:
    folder, _, result = whole_run
    recorder = Recorder()
    config = tiny_config()
    again = train(config, place(config, shards, folder), recorder)
    assert recorder.logs == []
    assert again == json.loads(json.dumps(result))


def test_a_checkpoint_of_other_params_is_refused(tiny_config: Any, shards: Path, whole_run: Any) -> None:
    former = tiny_config().train.optimizer.learning_rate
    config = tiny_config(train__optimizer__learning_rate=0.5)
    with pytest.raises(CheckpointError, match=rf"train.optimizer.learning_rate: {former} there, 0.5 now.*--restart"):
        train(config, place(config, shards, whole_run[0]), Recorder())


def test_every_step_of_an_epoch_can_be_gone_on_from_with_any_number_of_workers(tiny_config: Any) -> None:
    persons = 83

    def epoch(workers: int) -> tuple[int, int]:
        """Batches of an epoch, and of a step, where so many of eight workers are left."""
        train = for_world(tiny_config(train__batch_total=16, train__cluster={"num_workers": 8}), workers).train
        sizes = train_batch_sizes(
            persons, batch=train.batch_per_worker, world=workers, accumulate=train.accumulate_steps
        )
        return len(sizes), train.accumulate_steps

    epochs = [epoch(workers) for workers in range(1, 9)]
    assert len({batches // accumulate for batches, accumulate in epochs}) > 1  # of several lengths
    for (former, per_step), (batches, accumulate) in itertools.product(epochs, repeat=2):
        steps = range(former // per_step + 1)
        starts = [loop.first_batch(step, batches // accumulate, accumulate) for step in steps]
        assert starts == [min(step * accumulate, batches) for step in steps]


def test_a_checkpoint_beyond_the_end_of_the_epoch_goes_on_with_the_next(
    tiny_config: Any, shards: Path, tmp_path: Path, whole_run: Any
) -> None:
    config = tiny_config()
    with pytest.raises(KilledError):
        train(config, place(config, shards, tmp_path), Recorder(killed_at=4))
    store = CheckpointStore(tmp_path / "checkpoints")
    _, tensors, values = store.load_newest()
    values["step_in_epoch"] += 100  # as after more workers, whose epoch had more steps
    store.save(values["step"], tensors, values)
    recorder = Recorder()
    result = train(config, place(config, shards, tmp_path), recorder)
    assert [record["epoch"] for record in recorder.validations] == [1, 2]
    assert result["step"] == 3 + whole_run[2]["step"] // 2
    assert store.load_newest()[2]["weights"] == result["weights"]


def test_the_next_batch_is_on_its_way_to_the_device_while_a_step_is_computed(
    tiny_config: Any, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    class Watched(loop.Copier):
        def begin(self, batch: Any) -> Any:
            order.append("copy")
            return super().begin(batch)

    def step(state: Any, *_: Any, **__: Any) -> dict[str, torch.Tensor]:
        order.append("step")
        return {"loss": torch.zeros(())}

    monkeypatch.setattr(loop, "Copier", Watched)
    monkeypatch.setattr(loop, "train_step", step)
    config = tiny_config()
    training = loop._Training(config, place(config, shards, tmp_path), Recorder())
    training._run_epoch()
    steps = training.steps_per_epoch
    assert order == ["copy"] + ["copy", "step"] * (steps - 1) + ["step"]


def test_an_unknown_metric_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"train.validation.metric: 'whole/PCK' is not among .*whole/AP"):
        validation.chosen_metric({"whole/AP": 0.1}, "whole/PCK")


def test_checkpoints_can_follow_the_clock(
    tiny_config: Any, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    minutes = iter(range(10_000))
    monkeypatch.setattr(
        loop.time, "monotonic", lambda: 60.0 * next(minutes)
    )  # every look at the clock is a minute later
    config = tiny_config(train__epochs=1, train__checkpoint={"every_steps": None, "every_minutes": 0.5, "keep": 9})
    recorder = Recorder()
    train(config, place(config, shards, tmp_path), recorder)
    steps = [int(name.removeprefix("step-")) for name in recorder.checkpoints]
    assert steps[:-1] == [step for step in range(2, steps[-1], 2)]


@pytest.mark.slow
def test_two_workers_on_half_batches_equal_one_on_the_whole(tmp_path: Path) -> None:
    """With synchronised batch norm, in float64, over real gradient averaging: the same losses and weights."""
    script = Path(__file__).parents[1] / "support/halves.py"
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    one, two, plain = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two", "plain"))
    np.testing.assert_allclose(two["loss"], one["loss"], rtol=1e-9)
    np.testing.assert_allclose(two["norms"], one["norms"], rtol=1e-7)
    # without it the workers' own batch statistics make a difference, small at first
    np.testing.assert_allclose(plain["loss"], one["loss"], rtol=0.01)
    assert not np.allclose(plain["loss"], one["loss"], rtol=1e-6)
