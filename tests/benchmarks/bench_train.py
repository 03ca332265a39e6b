"""Where a training's time goes.

    python tests/benchmarks/bench_train.py [split] [overhead] [workers] [--preset NAME] [--steps 6]

split     one training step of --preset (cigpose-m_coco-wholebody_256x192) at batch 16 on 2 threads: data wait, forward,
          backward, optimiser, EMA; the share outside forward and backward
overhead  Ray, MLflow and checkpoints against the bare loop in this process, the same model and data, start-up apart
workers   one Ray worker of one thread against two of one thread each

Data are people rendered for the occasion. Ratios are of one run of this script; the load of the machine is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pipelines  # noqa: F401  isort: skip  (quiets the tools before they are imported)
import torch

from cigpose.config import Config, RenderConfig, config_from_mapping, load_preset
from cigpose.loader.batches import train_loader
from cigpose.model.estimator import build_model
from cigpose.render import render_dataset
from cigpose.shard.write import write_dataset
from cigpose.train.build import state_around
from cigpose.train.checkpoints import CheckpointStore
from cigpose.train.loop import Place, train
from cigpose.train.state import TrainState
from cigpose.train.step import train_step
from pipelines.tracking.courier import tracked
from pipelines.training import driver as cluster
from pipelines.training.watch import Watch

CPU = torch.device("cpu")


def make_shards(root: Path, images: int, size: tuple[int, int]) -> None:
    """Rendered people in root/data/shards."""
    config = load_preset("quickstart")
    for seed, (name, count) in enumerate({"rendered-train": images, "rendered-val": 4}.items()):
        render_dataset(
            RenderConfig(seed=seed, num_images=count, image_size=size, max_persons=2), root / "data/raw" / name
        )
        write_dataset(config, name, root / "data/raw", root / "data/shards")


def on_rendered_people(preset: str, **train_changes: Any) -> Config:
    """A preset that reads the rendered shards."""
    values, rendered = load_preset(preset).to_mapping(), load_preset("quickstart").to_mapping()
    values["data"] = rendered["data"]
    values["model"]["backbone"]["pretrained"] = None
    values["train"] |= train_changes
    return config_from_mapping(values)


class Clock:
    """Adds up the time spent in functions that it wraps."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, timed under `name`."""

        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds.setdefault(name, []).append(time.perf_counter() - began)

        return timed


@contextlib.contextmanager
def watched(state: TrainState, clock: Clock) -> Iterator[None]:
    """Time the parts of the real training step."""
    backward = torch.Tensor.backward
    state.losses.forward = clock.wrap("forward", state.losses.forward)  # type: ignore[method-assign]
    state.optimizer.step = clock.wrap("optimiser", state.optimizer.step)  # type: ignore[method-assign]
    if state.ema is not None:
        state.ema.update = clock.wrap("EMA", state.ema.update)  # type: ignore[method-assign]
    torch.Tensor.backward = clock.wrap("backward", backward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.backward = backward  # type: ignore[method-assign]


def bench_split(root: Path, preset: str, steps: int) -> None:
    """Print the split of a step."""
    torch.set_num_threads(2)
    values = load_preset(preset).to_mapping()["train"]["loader"] | {"processes": 0}
    one = {"num_workers": 1}
    config = on_rendered_people(preset, batch_total=16, loss_batch=64, accumulate_steps=1, loader=values, cluster=one)
    state = state_around(build_model(config), config, CPU)
    clock = Clock()
    batches = iter(train_loader(config, epoch=0, rank=0, world=1, root=root / "data/shards"))
    following = clock.wrap("data wait", lambda: next(batches))
    step = clock.wrap("whole step", lambda: train_step(state, [following()], rate=1e-4, clip_grad_norm=35.0))
    with watched(state, clock):
        for _ in range(steps):
            step()
    medians = {name: statistics.median(values[1:]) for name, values in clock.seconds.items()}
    whole = medians.pop("whole step")
    medians["rest (norm, clip, checks)"] = whole - sum(medians.values())
    print(f"\nsplit: {preset}, batch 16, 2 threads, {steps - 1} steps, medians; a step {whole:.2f} s")
    for name, seconds in medians.items():
        print(f"  {name:26s} {seconds * 1000:8.1f} ms  {seconds / whole:6.1%}")
    outside = 1 - (medians["forward"] + medians["backward"]) / whole
    print(f"  outside forward and backward {outside:.1%} (goal: below 8%)")


class Times:
    """Listener of the bare loop: when records came."""

    def __init__(self) -> None:
        self.at: dict[int, float] = {}

    def on_log(self, record: dict[str, Any]) -> None:
        """Note the time."""
        self.at[record["step"]] = time.perf_counter()

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


def seconds_per_step(at: dict[int, float]) -> float:
    """Between the first and the last record, which leaves out start-up."""
    first, last = min(at), max(at)
    return (at[last] - at[first]) / (last - first)


def bare(config: Config, root: Path) -> float:
    """Seconds per step of the loop in this process."""
    torch.set_num_threads(1)
    times = Times()
    store = CheckpointStore(root / "bare", 1)
    never = dataclasses.replace(config.train.checkpoint, every_steps=None, every_minutes=None)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, checkpoint=never))
    place = Place(rank=0, world=1, device=CPU, shards=root / "data/shards", root=root, store=store, params={})
    train(config, place, times)
    store.clear()
    return seconds_per_step(times.at)


def on_ray(config: Config, root: Path) -> float:
    """Seconds per step with Ray, MLflow and checkpoints."""
    folder = root / f"run-{time.monotonic_ns()}"
    times = Times()
    with tracked(config, folder) as run:
        watch = Watch(config, run, root / "data/shards")

        def on_event(event: dict[str, Any]) -> None:
            if event["event"] == "log":
                times.on_log(event["record"])
            watch.on_event(event)

        settings = {"root": str(root), "run_folder": str(folder), "checkpoints": str(folder / "c"), "params": {}}
        cluster.train_on_ray(config, settings | {"shown_images": watch.shown_images, "start": None}, on_event)
        watch.close()
    return seconds_per_step(times.at)


def small(workers: int, batch: int = 16) -> Config:
    """The quickstart, as long as a benchmark may be."""
    kept = {"every_steps": 25, "every_minutes": None, "keep": 2}
    return on_rendered_people(
        "quickstart",
        epochs=2,
        batch_total=batch,
        loss_batch=batch,
        log_every_steps=2,
        validate_every_epochs=2,
        checkpoint=kept,
        cluster={"num_workers": workers},
    )


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["split", "overhead", "workers"])
    parser.add_argument("--preset", default="cigpose-m_coco-wholebody_256x192")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--images", type=int, default=120)
    options = parser.parse_args()
    os.environ["CIGPOSE_NO_PROGRESS"] = "1"
    load = f"load {os.getloadavg()[0]:.1f}"
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {load}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory(prefix="bench-train-") as name:
        root = Path(name)
        os.chdir(root)
        make_shards(root, options.images, (400, 320))
        if "split" in options.parts:
            bench_split(root, options.preset, options.steps)
        if "overhead" in options.parts:
            alone, whole = bare(small(1), root), on_ray(small(1), root)
            print(
                f"\noverhead: bare loop {alone * 1000:.0f} ms a step, with Ray, MLflow and a checkpoint every 25 steps"
            )
            print(f"  {whole * 1000:.0f} ms: {whole / alone - 1:+.1%} (goal: below 5%)")
        if "workers" in options.parts:
            one, two = on_ray(small(1, batch=8), root), on_ray(small(2, batch=16), root)
            print(f"\nworkers: one {8 / one:.1f} persons/s, two {16 / two:.1f}")
            print(f"  speed-up {2 * one / two:.2f} (goal: 1.7 on 2 cores)")


if __name__ == "__main__":
    main()
