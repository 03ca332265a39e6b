"""`make soak HOURS=1`: trainings, retrainings and registrations in a tiny project, killed at random moments.

    python tests/faults/soak.py --hours 0.1 --seed 7

Each round has its own params: the stages train, evaluate and register are run until they end well, and what is at work
is killed now and then: the stage's process, or all of its processes at once. At the end every model has the bits of a
training without Ray, without kills and in one piece; nothing but the kept results is left, and memory has not grown.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "support")]

import psutil
import yaml
from lab import JOBS, CellError, Ended, Lab, marked
from nested import change
from page import SOAK

from cigpose.files.atomic import write_json
from cigpose.files.digest import sha256_of

STAGES = ("train", "evaluate", "register")
MODEL = "data/model/model.safetensors"
DRAWN = ("model", "metrics", "plots", "report", "registered.json")


class Soak:
    """One soak.

    Args:
        lab: where.
        seed: of the moments of kills.
        mean_s: mean time from the start of a command to its kill; every other command is left alone.
    """

    def __init__(self, lab: Lab, seed: int, mean_s: float) -> None:
        self.lab, self.random, self.mean_s = lab, random.Random(seed), mean_s
        self.kills: Counter[str] = Counter()
        self.commands = 0
        self.memory: list[float] = []
        self.models: dict[int, str] = {}

    def round(self, number: int) -> None:
        """Train with params of its own, evaluate, register; through all kills."""
        self._params(number)
        for job in STAGES:
            while not self._run(job):
                continue
        self.models[number] = sha256_of(self.lab.project / MODEL)

    def _params(self, number: int) -> None:
        path = self.lab.project / "params.yaml"
        values = change(yaml.safe_load(path.read_text()), seed=number)
        path.write_text(yaml.safe_dump(values, sort_keys=False))

    def _run(self, job: str) -> bool:
        """One try of a stage; whether it ended well."""
        self.commands += 1
        process, mark = self.lab.start(JOBS[job].command)
        moment = self.random.expovariate(1 / self.mean_s) if self.random.random() < 0.5 else None
        whom = self.random.choice(["driver", "all", "a worker"])
        killed = moment is not None and self._kill(process.pid, mark, moment, whom)
        ended = self.lab.end(process, mark)
        if killed:
            self.kills[f"{job}, {whom}"] += 1
        self._check(job, ended, killed)
        return ended.code == 0

    def _kill(self, main: int, mark: str, moment: float, whom: str) -> bool:
        deadline = time.monotonic() + moment
        while time.monotonic() < deadline:
            time.sleep(0.05)
            if not psutil.pid_exists(main) or psutil.Process(main).status() == psutil.STATUS_ZOMBIE:
                return False
        processes = marked(mark)
        self.memory.append(sum(_resident(process) for process in processes))
        if whom == "driver":
            processes = [process for process in processes if process.pid == main]
        elif whom == "a worker":
            processes = [process for process in processes if "RayTrainWorker" in " ".join(_title(process))]
        for process in processes:
            with suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        return bool(processes)

    def _check(self, job: str, ended: Ended, killed: bool) -> None:
        if ended.left:
            raise CellError(f"{job}: processes are left: {ended.left}")
        if ended.code not in (0, -signal.SIGKILL) and not killed:
            raise CellError(f"{job} ended with {ended.code} by itself: {ended.err[-1500:]}")
        if ended.code not in (0, -signal.SIGKILL) and "Traceback" in ended.err:
            raise CellError(f"{job}: a traceback: {ended.err[-1500:]}")

    def undisturbed(self, number: int) -> str:
        """The digest of the model of a round, trained in one piece without Ray."""
        for name in DRAWN:
            path = self.lab.project / "data" / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        shutil.rmtree(self.lab.project / ".runs/loop", ignore_errors=True)
        self._params(number)
        ended = self.lab.run(JOBS["training"].command)
        if ended.code:
            raise CellError(f"undisturbed, round {number} ended with {ended.code}: {ended.err[-1500:]}")
        return sha256_of(self.lab.project / MODEL)

    def left(self) -> list[str]:
        """Files that no run leaves."""
        unfinished = (".part", ".old", ".partial")
        runs = self.lab.project / ".runs"
        half = [path for path in self.lab.project.rglob("*") if path.suffix in unfinished or ".partial-" in path.name]
        ray = [*runs.glob("*/ray-*"), *self.lab.temporary.glob("cigpose-*"), *self.lab.temporary.glob("ray*")]
        return sorted(str(path) for path in [*half, *ray, *runs.glob("*/checkpoints/step-*")])


def _resident(process: psutil.Process) -> float:
    with suppress(psutil.Error):
        return process.memory_info().rss / 2**30
    return 0.0


def _title(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return process.cmdline()
    return []


def main() -> int:
    """Soak; 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mean-s", type=float, default=15.0, help="mean seconds from a start to a kill")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="lab-"))
    lab = Lab(folder)
    lab.restore("sharded")
    soak, began, sizes = Soak(lab, given.seed, given.mean_s), time.monotonic(), []
    shared = set(Path("/dev/shm").iterdir())
    try:
        while time.monotonic() - began < 3600 * given.hours or len(soak.models) < 2:
            soak.round(len(soak.models))
            sizes.append(_size(lab.project))
            print(f"round {len(soak.models)}: {soak.commands} commands, {soak.kills.total()} kills", flush=True)
        facts = _facts(soak, time.monotonic() - began, sizes, shared)
    except CellError as err:
        print(f"soak: seed {given.seed}, round {len(soak.models)}: {err}", file=sys.stderr)
        return 1
    write_json(SOAK, facts)
    print(json.dumps(facts, indent=1))
    shutil.rmtree(folder)
    return 0


def _facts(soak: Soak, seconds: float, sizes: list[int], shared: set[Path]) -> dict[str, Any]:
    """What the page says. Semaphores (32 bytes) stay when all processes are killed at once; a machine's end takes them.

    Raises:
        CellError: something is left, or a model has other bits.
    """
    if left := soak.left():
        raise CellError(f"left behind: {left[:8]}")
    if more := {path for path in set(Path("/dev/shm").iterdir()) - shared if not path.name.startswith("sem.mp-")}:
        raise CellError(f"shared memory is left: {more}")
    wrong = [number for number, digest in soak.models.items() if soak.undisturbed(number) != digest]
    if wrong:
        raise CellError(f"other bits than an undisturbed run: rounds {wrong}")
    growth = (sizes[-1] - sizes[0]) / max(len(sizes) - 1, 1) / 2**20
    return {
        "hours": f"{seconds / 3600:.2f}",
        "commands": soak.commands,
        "kills survived": f"{soak.kills.total()}: "
        + ", ".join(f"{n} {what}" for what, n in sorted(soak.kills.items())),
        "models trained, evaluated and registered": len(soak.models),
        "of them with the bits of an undisturbed run": len(soak.models),
        "processes, temporary files, shared memory left": 0,
        "disk per model (results, MLflow's files), MB": f"{growth:.1f}",
        "memory of a command when it was killed, GB": f"at most {max(soak.memory, default=0):.1f}",
        "machine": f"{len(os.sched_getaffinity(0))} cores",
    }


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    sys.exit(main())
