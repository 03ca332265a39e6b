"""Trains a few steps with one worker on whole batches, and with two on their halves; run by test_loop.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.multiprocessing as mp
from tiny_training import make_config
from torch import distributed

from cigpose.model.estimator import build_model
from cigpose.train.build import state_around
from cigpose.train.step import train_step
from cigpose.train.workers import copy_rank_0, mean_over_workers

STEPS = 3


def train(rank: int, world: int, synchronized: bool, path: Path, rendezvous: Path) -> None:
    torch.set_num_threads(1)
    if world > 1:
        distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    # no CIM or graph batch norms: those of the head are each worker's own, as upstream
    config = make_config(
        train__sync_batch_norm=synchronized,
        train__batch_total=8,
        train__cluster={"num_workers": world},
        model__head__kind="rtmpose",
    )
    torch.manual_seed(0)
    state = state_around(build_model(config).double(), config, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        batch = {
            "crops": torch.randint(0, 256, (8, 64, 48, 3), dtype=torch.uint8, generator=generator),
            "keypoints": torch.rand(8, 133, 2, generator=generator) * 48,
            "visible": torch.ones(8, 133),
            "keys": [str(i) for i in range(8)],
        }
        share = {key: value[rank::world] for key, value in batch.items()}
        metrics = train_step(state, [share], rate=1e-3, clip_grad_norm=35.0)
        losses.append(mean_over_workers(metrics, 1)["loss"])
    copy_rank_0([state.model])
    if rank == 0:
        norms = [tensor.double().norm().item() for tensor in state.model.state_dict().values()]
        path.write_text(json.dumps({"loss": losses, "norms": norms}))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    train(0, 1, False, folder / "one.json", folder / "none")
    for name, synchronized in (("two", True), ("plain", False)):
        mp.spawn(train, (2, synchronized, folder / f"{name}.json", folder / f"meet-{name}"), nprocs=2)
