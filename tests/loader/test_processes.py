from __future__ import annotations

import dataclasses
import errno
import mmap
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from cigpose.config.params_file import write_params
from cigpose.loader.batches import TrainLoader, eval_loader, train_loader

WORLD: dict[str, Any] = {"rank": 0, "world": 1}


def assert_same(left: Iterable[dict[str, Any]], right: Iterable[dict[str, Any]]) -> None:
    left, right = list(left), list(right)
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if name == "keys":
                assert a[name] == b[name]
            else:
                assert torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype


def wait_until(fact: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_processes_live_through_the_epochs_of_a_training_and_give_what_none_would(tiny_shards: Any) -> None:
    tiny_shards.write("a", [5, 4])
    plain, parallel = (
        TrainLoader(tiny_shards.config("a", loader={"processes": n}), root=tiny_shards.root, **WORLD) for n in (0, 2)
    )
    pids = []
    for epoch, start in ((0, 2), (1, 0), (2, 0)):
        assert_same(parallel.batches(epoch, start), plain.batches(epoch, start))
        pids.append({child.pid for child in multiprocessing.active_children()})
    assert len(pids[0]) == 2 and pids[0] == pids[1] == pids[2]
    assert_same(parallel.batches(1), plain.batches(1))  # not what comes next: they begin anew
    assert pids[0].isdisjoint(child.pid for child in multiprocessing.active_children())
    parallel.close()
    plain.close()
    assert not multiprocessing.active_children()


def test_the_first_batch_of_the_next_epoch_is_made_before_it_is_asked_for(
    tiny_shards: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_shards.write("a", [5, 4])
    loader = TrainLoader(tiny_shards.config("a"), root=tiny_shards.root, **WORLD)
    expected = list(train_loader(tiny_shards.config("a"), epoch=1, root=tiny_shards.root, **WORLD))
    list(loader.batches(0))
    running = loader._running
    assert running is not None
    ready = running.gi_frame.f_locals["ready"]
    wait_until(lambda: ready.full())
    monkeypatch.setattr("cigpose.loader.epochs.Epoch.make", None)
    assert_same([next(loader.batches(1))], expected[:1])
    loader.close()


def test_a_picture_of_more_persons_than_fit_into_the_batches_being_made_holds_nobody_up(tiny_shards: Any) -> None:
    tiny_shards.write("a", [3, 3], persons=(1, 40, 2))
    options: dict[str, Any] = {"open_shards": 2, "shuffle_buffer": 0}
    plain, parallel = (
        train_loader(
            tiny_shards.config("a", batch=2, loader={**options, "processes": n}),
            epoch=0,
            root=tiny_shards.root,
            **WORLD,
        )
        for n in (0, 3)
    )
    assert_same(parallel, plain)


@pytest.mark.parametrize("boxes", ["ground_truth", "detections"])
def test_evaluation_batches_are_the_same_from_processes(tiny_shards: Any, boxes: str) -> None:
    tiny_shards.write("a", [3, 4], detections=2)
    plain, parallel = (
        eval_loader(
            tiny_shards.config("a", loader={"processes": n}, evaluate={"boxes": boxes}),
            "a",
            root=tiny_shards.root,
            **WORLD,
        )
        for n in (0, 2)
    )
    assert_same(parallel, plain)


def test_a_killed_loader_process_is_one_sentence_and_takes_the_others_with_it(tiny_shards: Any) -> None:
    tiny_shards.write("a", [50])
    loader = TrainLoader(tiny_shards.config("a", loader={"processes": 2}), root=tiny_shards.root, **WORLD)
    batches = loader.batches(0)
    next(batches)
    os.kill(int(multiprocessing.active_children()[0].pid or 0), signal.SIGKILL)
    with pytest.raises(ChildProcessError, match=r"a loader process ended with signal 9 \(out of memory\?\)\. Run"):
        list(batches)
    wait_until(lambda: not multiprocessing.active_children())


TRAINS = """
import multiprocessing, sys, time
from pathlib import Path
from cigpose.config import load_params
from cigpose.loader.batches import TrainLoader
loader = TrainLoader(load_params(Path(sys.argv[1])), rank=0, world=1, root=Path(sys.argv[2]))
next(loader.batches(0))
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_a_killed_training_leaves_no_loader_process_and_no_shared_memory(tiny_shards: Any, tmp_path: Path) -> None:
    tiny_shards.write("a", [50])
    write_params(tiny_shards.config("a", loader={"processes": 2}), tmp_path / "params.yaml")
    before = set(os.listdir("/dev/shm"))
    command = [sys.executable, "-c", TRAINS, str(tmp_path / "params.yaml"), str(tiny_shards.root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as training:
        try:
            assert training.stdout is not None
            pids = list(map(int, training.stdout.readline().split()))
            assert len(pids) == 2 and all(map(is_alive, pids))
            assert not {name for name in set(os.listdir("/dev/shm")) - before if "cigpose" in name or "torch" in name}
        finally:
            training.kill()
    wait_until(lambda: not any(map(is_alive, pids)))


def test_memory_that_cannot_be_had_is_named_with_what_to_lower(
    tiny_shards: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_shards.write("a", [5])

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    config = tiny_shards.config("a", loader={"processes": 1})
    loader = train_loader(config, epoch=0, root=tiny_shards.root, **WORLD)
    with pytest.raises(OSError, match=r"no \d+\.\d GB of shared memory .* Lower train\.loader\.shuffle_buffer"):
        list(loader)
    assert not multiprocessing.active_children()


def test_a_fault_of_ours_in_a_process_is_raised_with_its_place(
    tiny_shards: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_shards.write("a", [5])
    monkeypatch.setattr("cigpose.loader.epochs.Epoch.make", lambda *_: dataclasses.replace(1))  # type: ignore[type-var]
    config = tiny_shards.config("a", loader={"processes": 1})
    with pytest.raises(RuntimeError, match=r"in a loader process:\n(.*\n)*TypeError: replace"):
        list(train_loader(config, epoch=0, root=tiny_shards.root, **WORLD))
