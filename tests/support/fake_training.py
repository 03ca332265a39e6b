"""One training on fake CUDA tensors, in a process of its own: `python fake_training.py SHIM CASE...`.

A case is JSON with changes of the tiny configuration and `world`, the number of ranks, or `preset` in place of the tiny
configuration; what was seen is printed as a line of JSON for each.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_cuda

if __name__ == "__main__":
    fake_cuda.load(Path(sys.argv[1]))

import numpy as np
import torch
from nested import change
from tiny_training import make_config
from torch import distributed

from cigpose.codec import decode
from cigpose.config import Config, config_from_mapping, load_preset
from cigpose.loader import device
from cigpose.model.estimator import Normalize, build_model, forward_flip_test
from cigpose.train.build import state_around
from cigpose.train.snapshots import Snapshot
from cigpose.train.state import TrainState
from cigpose.train.step import to_device, train_step

CUDA = torch.device("cuda", 0)
PERSONS = 2
DRAWN = np.array([[1, 5, 30, -30, 3, 0, 0, 0, 8, 8], [1, 0, 0, 0, 0, 7, 0, 0, 0, 0]], dtype=np.int16)
"""As the host has it, which fake tensors cannot hold: colours for both, a blur for each, a hole in one."""


def make_batch(config: Config) -> dict[str, Any]:
    """Fake persons on the host, as a loader gives them that leaves their pixels to the device."""
    width, height = config.model.input_size
    keypoints = len(config.keypoint_set)
    return {
        "crops": torch.zeros(PERSONS, height, width, 3, dtype=torch.uint8),
        "keypoints": torch.zeros(PERSONS, keypoints, 2),
        "visible": torch.ones(PERSONS, keypoints),
        "keys": [str(number) for number in range(PERSONS)],
        "drawn": SimpleNamespace(numpy=lambda: DRAWN),
    }


def look_at_step(state: TrainState, config: Config) -> Any:
    """What a step does on the device, the one before having been made already."""
    batches = [make_batch(config) for _ in range(config.train.accumulate_steps)]
    with fake_cuda.watch() as seen:
        batches = [to_device(batch, CUDA) for batch in batches]
        metrics = train_step(state, batches, rate=1e-3, clip_grad_norm=35.0)
    assert {(value.device, value.dtype) for value in metrics.values()} == {(CUDA, torch.float32)}
    return seen


def look_at_case(case: dict[str, Any]) -> dict[str, Any]:
    """Steps, a resume from a checkpoint on the host, an evaluation with the flip test."""
    shown, world = dict(case), case.pop("world", 1)
    config = read_config(case)
    if world > 1:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    device._tables.cache_clear()
    with fake_cuda.fake_cuda():
        state = state_around(build_model(config).to(CUDA), config, CUDA)
        look_at_step(state, config)
        step = look_at_step(state, config)
        with fake_cuda.watch():
            tensors, values = state.state_dict()
        with fake_cuda.watch() as snapshot:
            Snapshot().take(tensors)
        with fake_cuda.watch():
            state.load_state_dict({key: tensor.cpu() for key, tensor in tensors.items()}, values)
        moments = {tensor.device.type for moments in state.optimizer.state.values() for tensor in moments.values()}
        resumed = look_at_step(state, config)
        evaluation = look_at_flip_test(state, config)
    if world > 1:
        distributed.destroy_process_group()
    watches = (step, resumed, evaluation)
    return {
        "case": shown,
        "snapshot": snapshot.waits,
        "waits": [watch.waits for watch in watches],
        "mixed": [operation for watch in watches for operation in watch.mixed],
        "log_softmax": sorted({str(dtype) for name, dtype in step.dtypes if name == "_log_softmax"}),
        "convolutions": sorted({str(dtype) for name, dtype in step.dtypes if name == "convolution"}),
        "moments": sorted(moments),
        "ema_updates": state.ema.updates if state.ema else None,
    }


def read_config(case: dict[str, Any]) -> Config:
    """The configuration of a case."""
    if "preset" not in case:
        return make_config(model__backbone__deepen_factor=0.1, **case)
    values = change(load_preset(case.pop("preset")).to_mapping(), model__backbone__pretrained=None, **case)
    return config_from_mapping(values)


def look_at_flip_test(state: TrainState, config: Config) -> Any:
    """Logits and keypoints of the averaged model."""
    model = state.evaluated.eval()
    normalize = Normalize().to(CUDA)
    flip_index = torch.zeros(len(config.keypoint_set), dtype=torch.int64, device=CUDA)
    crops = to_device(make_batch(config), CUDA)["crops"]
    with fake_cuda.watch() as seen, torch.inference_mode():
        keypoints, scores = decode(*forward_flip_test(model, normalize(crops), flip_index))
    assert keypoints.device == scores.device == CUDA
    return seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    for text in sys.argv[2:]:
        print(json.dumps(look_at_case(json.loads(text))), flush=True)
