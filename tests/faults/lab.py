"""Runs one cell of the matrix: a tiny real project, a real command, one fault, and a look at what is left.

A project always lies at the same place, `<lab>/project`, because MLflow keeps absolute paths; its states (rendered,
sharded, trained, ...) are made once by the stages themselves and copied there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import yaml
from faults import (
    At,
    Cell,
    Clock,
    DiskFull,
    EveryChange,
    Memory,
    NoNetwork,
    OpenFiles,
    Proof,
    ReadOnly,
    SyncOrder,
    Twice,
)
from nested import change
from project import TINY

from cigpose.config import load_preset

ROOT = Path(__file__).resolve().parents[2]
CHILD, SUPPORT = Path(__file__).parent / "child", ROOT / "tests/support"
MARK = "CIGPOSE_FAULT_LAB"
GONE_S = 15.0
"""Seconds that what a command started has to be gone after its end, on a busy machine."""
LONGEST_S = 400.0
PARAMS: dict[str, Any] = {
    **TINY,
    "train__log_every_steps": 1,
    "train__checkpoint": {"every_steps": 2, "every_minutes": None, "keep": 2},
    "train__ema": {"enabled": True, "momentum": 0.01, "gamma": 10.0},
    "data__sharding__processes": 2,
}
UNFINISHED = re.compile(
    r"(^|/)\.(?!runs/)|\.(part|partial|old|done)(/|$)|\.partial[-/]|^\.runs/register/|^mlartifacts/"
)
"""Names that say that what has them may be half of it; and MLflow's own files, which it never syncs."""
PASSING = re.compile(r"\.lock$|-wal$|-shm$|\.pyc$|__pycache__$|(pictures|validation)(/epoch-\d+-\d+\.jpg)?$")
"""Names that may be there or not: locks, and pictures that a driver shows while it is there."""
KEYS = ("rendered-train", "rendered-val")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A command, the state of the project it needs, and what it makes."""

    command: tuple[str, ...]
    needs: str
    makes: tuple[str, ...]
    """Files and folders whose bytes are the result."""
    facts: Callable[[Path], Any] = lambda project: None
    """What else is the result, where its bytes hold times or random names."""
    says: str = ""
    """How its sentences begin."""


def _registered(project: Path) -> Any:
    """Versions, aliases and decisions in the registry, and the outcome, without what is random."""
    from mlflow import MlflowClient

    from pipelines.registry.versions import WEIGHTS_TAG

    address = f"sqlite:///{project}/mlflow.db"
    client = MlflowClient(tracking_uri=address, registry_uri=address)
    [model] = client.search_registered_models()
    versions = {
        version.version: {name: tag for name, tag in version.tags.items() if name.startswith(("decision", "evaluat"))}
        | {"weights": version.tags[WEIGHTS_TAG], "status": version.status}
        for version in client.search_model_versions(f"name = '{model.name}'")
    }
    tags = {name: tag for name, tag in model.tags.items() if not name.startswith("mlflow.")}
    outcome = json.loads((project / "data/registered.json").read_text())
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    drop = ("run_id", "url")
    return {
        "versions": versions,
        "aliases": model.aliases,
        "model": tags,
        "runs": [run.info.status for run in runs],
        "outcome": {name: value for name, value in outcome.items() if name not in drop},
    }


def _module(name: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", f"pipelines.{name}", *arguments)


JOBS = {
    "render": Job(command=_module("render", KEYS[0]), needs="empty", makes=(f"data/raw/{KEYS[0]}",), says="render: "),
    "shard": Job(
        command=_module("shard", KEYS[0]), needs="rendered", makes=(f"data/shards/{KEYS[0]}",), says="shard: "
    ),
    "shard with labels": Job(
        command=_module("shard", KEYS[1]), needs="rendered", makes=(f"data/shards/{KEYS[1]}",), says="shard: "
    ),
    "training": Job(
        command=(sys.executable, str(Path(__file__).with_name("loop.py"))),
        needs="sharded",
        makes=("data/model",),
        says="loop: ",
    ),
    "train": Job(
        command=_module("train"),
        needs="sharded",
        makes=("data/model/model.safetensors", "data/model/params.yaml", "data/metrics/train.json", "data/plots"),
        says="train: ",
    ),
    "evaluate": Job(
        command=_module("evaluate"),
        needs="trained",
        makes=("data/report/results.json", "data/metrics/evaluate.json", "data/plots/parts.csv"),
        says="evaluate: ",
    ),
    "register": Job(command=_module("register"), needs="evaluated", makes=(), facts=_registered, says="register: "),
}
STATES = {  # state -> the one before, and the commands that lead to it
    "empty": (None, ()),
    "rendered": ("empty", tuple(_module("render", key) for key in KEYS)),
    "sharded": ("rendered", tuple(_module("shard", key) for key in KEYS)),
    "trained": ("sharded", (JOBS["train"].command,)),
    "evaluated": ("trained", (JOBS["evaluate"].command,)),
}


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str
    seconds: float
    left: list[str] = field(default_factory=list)
    """Processes that were still there."""

    @property
    def sentences(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.strip()]


class CellError(AssertionError):
    """A cell that does not hold."""


class Lab:
    """A place to break things in.

    Args:
        folder: for states that are kept from cell to cell, and the project; made if it is not there. Its path is short,
            since Ray makes sockets below it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.project = folder, folder / "project"
        self.temporary, self.notes = folder / "t", folder / "notes"
        self.folder.mkdir(parents=True, exist_ok=True)

    def state(self, name: str) -> Path:
        """A folder with a state of the project, made by its stages if need be."""
        kept = self.folder / "states" / name
        if kept.is_dir():
            return kept
        before, commands = STATES[name]
        kept_before = self.state(before) if before else None
        self._fresh()
        if kept_before is None:
            self.project.mkdir()
            values = change(load_preset("quickstart").to_mapping(), **PARAMS)
            (self.project / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        else:
            shutil.copytree(kept_before, self.project, symlinks=True)
        for command in commands:
            ended = self.run(command)
            if ended.code:
                raise CellError(f"undisturbed, {command} ended with {ended.code}: {ended.err[-2000:]}")
        part = kept.with_name(f"{name}.part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(self.project, part, symlinks=True)
        part.rename(kept)
        return kept

    def expected(self, job: str) -> dict[str, Any]:
        """What an undisturbed run makes, and what it leaves."""
        kept = self.folder / "expected.json"
        known: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
        if job not in known:
            self.restore(JOBS[job].needs)
            ended = self.run(JOBS[job].command)
            if ended.code or ended.left:
                raise CellError(f"undisturbed, {job} ended with {ended.code}, left {ended.left}: {ended.err[-2000:]}")
            known[job] = json.loads(json.dumps({"result": self.result(job), "tree": self.tree()}))
            kept.write_text(json.dumps(known))
        return known[job]

    def restore(self, state: str) -> None:
        """Let the project be in a state."""
        kept = self.state(state)
        self._fresh()
        shutil.copytree(kept, self.project, symlinks=True)

    def _fresh(self) -> None:
        for folder in (self.project, self.temporary, self.notes):
            shutil.rmtree(folder, ignore_errors=True)
        for folder in (self.temporary, self.notes):
            folder.mkdir()

    def result(self, job: str) -> Any:
        """The digests of what a job has made, and its facts."""
        files = {
            str(path.relative_to(self.project)): hashlib.sha256(path.read_bytes()).hexdigest()
            for made in JOBS[job].makes
            for path in sorted([self.project / made, *(self.project / made).rglob("*")])
            if path.is_file()
        }
        return {"files": files, "facts": JOBS[job].facts(self.project)}

    def tree(self) -> list[str]:
        """Names of all that is in the project and in the folder for temporary files; random parts of names are ID."""
        names = [path.relative_to(self.folder) for top in (self.project, self.temporary) for path in top.rglob("*")]
        plain = {re.sub(r"[0-9a-f]{32}", "ID", str(name)) for name in names}
        return sorted(name for name in plain if not PASSING.search(name))

    def start(
        self,
        command: Sequence[str],
        points: Sequence[At] = (),
        *,
        wrap: Sequence[str] = (),
        record: bool = False,
        limits: Callable[[], None] | None = None,
    ) -> tuple[subprocess.Popen[str], str]:
        """Start a command with faults in it; and the mark that it and all it starts have."""
        mark = uuid.uuid4().hex
        plan = {
            "project": str(self.project),
            "notes": str(self.notes),
            "points": [asdict(point) for point in points],
            "record": record,
        }
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("MLFLOW_", "PREFECT_", "RAY_", "CIGPOSE_"))
        }
        paths = [*([str(CHILD)] if points or record else []), str(ROOT), str(SUPPORT)]
        environment = {
            **kept,
            "PYTHONPATH": os.pathsep.join(paths),
            "TMPDIR": str(self.temporary),
            "CIGPOSE_NO_PROGRESS": "1",
            "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "OMP_NUM_THREADS": "1",
            MARK: mark,
            **({"CIGPOSE_FAULTS": json.dumps(plan)} if points or record else {}),
        }
        process = subprocess.Popen(
            [*wrap, *command],
            cwd=self.project,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=(self.folder / f"{mark}.out").open("w"),
            stderr=(self.folder / f"{mark}.err").open("w"),
            text=True,
            start_new_session=True,
            preexec_fn=limits,
        )
        return process, mark

    def end(self, process: subprocess.Popen[str], mark: str, timeout_s: float = LONGEST_S) -> Ended:
        """Wait for a command and for all that it started; what stays is ended here, and named."""
        began, outputs = time.monotonic(), [self.folder / f"{mark}.{name}" for name in ("out", "err")]
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            code = -1000
        except BaseException:
            for one in marked(mark):
                with contextlib.suppress(psutil.Error):
                    one.kill()
            raise
        deadline = time.monotonic() + GONE_S
        while (left := marked(mark)) and code != -1000 and time.monotonic() < deadline:
            time.sleep(0.1)
        names = []
        for one in left:
            with contextlib.suppress(psutil.Error):
                names.append(" ".join(one.cmdline())[:160])
                one.kill()
        process.wait()
        out, err = (path.read_text(errors="replace") for path in outputs)
        for path in outputs:
            path.unlink()
        if code == -1000:
            raise CellError(f"hangs: {timeout_s:.0f} s; {err[-800:]}")
        return Ended(code=code, out=out, err=err, seconds=time.monotonic() - began, left=names)

    def run(self, command: Sequence[str], points: Sequence[At] = (), **options: Any) -> Ended:
        """A command from its start to its end."""
        return self.end(*self.start(command, points, **options))

    def has_fired(self) -> bool:
        """Whether the last fault was met."""
        return (self.notes / "fired").is_file()


def marked(mark: str) -> list[psutil.Process]:
    """Living processes that have a mark in their environment."""
    found = []
    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(psutil.Error, OSError):
            if process.info["status"] == psutil.STATUS_ZOMBIE:
                continue
            if f"{MARK}={mark}".encode() in Path(f"/proc/{process.pid}/environ").read_bytes():
                found.append(process)
    return found


@contextlib.contextmanager
def shared_memory() -> Iterator[None]:
    """Fails if a segment of shared memory is left that nobody has mapped."""
    place = Path("/dev/shm")
    before = set(place.iterdir())
    yield
    deadline = time.monotonic() + 5
    while new := [path for path in set(place.iterdir()) - before if _is_left(path)]:
        if time.monotonic() > deadline:
            raise CellError(f"shared memory is left: {sorted(map(str, new))}")
        time.sleep(0.5)


def _is_left(path: Path) -> bool:
    """Whether nobody has it mapped; what faketime makes for itself is not the product's.

    Beside other tests, some of which kill trainings too, nobody can tell whose a semaphore is.
    """
    if path.name.startswith("sem.mp-") and "PYTEST_XDIST_WORKER" in os.environ:
        return False
    if path.is_dir() and path.name.startswith("tmp"):
        return False  # jobs of an MLflow server elsewhere on this machine; no cell starts one
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            if str(path) in maps.read_text():
                return False
    return "faketime" not in path.name


def try_cell(lab: Lab, cell: Cell) -> int:
    """Try a cell; the number of tries that held.

    Raises:
        CellError: one does not hold.
        ImpossibleError: this machine does not allow it.
    """
    if isinstance(cell.fault, Proof):
        return _prove(cell.fault)
    if isinstance(cell.fault, EveryChange):
        for tries in range(10_000):
            number = cell.fault.first + tries * cell.fault.step
            point = At(at="disk", nth=number, whom="all")
            if not _try(lab, replace(cell, fault=point), must_fire=False):
                return tries
    if isinstance(cell.fault, SyncOrder):
        _check_order(lab, cell)
    else:
        _try(lab, cell)
    return 1


class ImpossibleError(Exception):
    """What this machine does not allow."""


def _prove(proof: Proof) -> int:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", proof.test]
    environment = {**os.environ, "CIGPOSE_HOSTILE": "300"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    found = re.search(r"(\d+) passed", done.stdout)
    if done.returncode or not found:
        raise (ImpossibleError if "skipped" in done.stdout and not done.returncode else CellError)(done.stdout[-1500:])
    return int(found[1])


def unsynced(calls: Sequence[dict[str, Any]], project: Path) -> list[str]:
    """What a power cut could have spoilt: files and folders that took a final name before they were on the disk.

    Args:
        calls: as `child/sitecustomize.py` notes them.
        project: what is outside does not matter.
    """
    on_disk: dict[tuple[int, int], int] = {}
    faults, waiting = [], {}
    for call in calls:
        path = Path(call["path"])
        if call["call"] == "fsync":
            device, number, changed = call["state"]
            on_disk[device, number] = changed
            waiting.pop(path, None)
        elif path.is_relative_to(project) and not UNFINISHED.search(str(path.relative_to(project))):
            for name, (device, number, changed) in call["states"].items():
                if on_disk.get((device, number)) != changed:
                    faults.append(f"{path.relative_to(project) / name} has its name before its bytes are on the disk")
            waiting[path.parent] = path
    return faults + [f"the name of {path.relative_to(project)} is never synced" for path in waiting.values()]


def _check_order(lab: Lab, cell: Cell) -> None:
    job = JOBS[cell.job]
    lab.restore(job.needs)
    ended = lab.run(job.command, record=True)
    if ended.code or ended.left:
        raise CellError(f"undisturbed, it ended with {ended.code}, left {ended.left}: {ended.err[-800:]}")
    calls = [json.loads(line) for line in (lab.notes / "disk").read_text().splitlines()]
    if not any(call["call"] == "rename" for call in calls):
        raise CellError("nothing was renamed")
    if faults := unsynced(calls, lab.project):
        raise CellError("; ".join(faults))


def _try(lab: Lab, cell: Cell, must_fire: bool = True) -> bool:
    job, expected = JOBS[cell.job], lab.expected(cell.job)
    lab.restore(job.needs)
    power = getattr(cell.fault, "whom", "") == "all"  # /dev/shm does not outlive that
    with contextlib.nullcontext() if power else shared_memory():
        with _circumstances(lab, cell) as options:
            ended = _twice(lab, cell) if isinstance(cell.fault, Twice) else lab.run(job.command, **options)
        fired = lab.has_fired() or not options.get("points")
        if not fired:
            if must_fire:
                raise CellError(f"the line was never reached; exit status {ended.code}: {ended.err[-800:]}")
            return False
        _check(ended, cell, job)
        if ended.code != 0:
            _go_on(lab, job)
        _check_result(lab, cell.job, expected)
    return True


def _check(ended: Ended, cell: Cell, job: Job) -> None:
    if ended.left:
        raise CellError(f"processes are left {GONE_S:.0f} s after its end: {ended.left}")
    if "Traceback" in ended.err + ended.out and cell.holds != "dies":
        raise CellError(f"a traceback: {ended.err[-1500:]}")
    if cell.holds == "dies":
        if ended.code >= 0 and ended.code < 128:
            raise CellError(f"it lives, with exit status {ended.code}: {ended.err[-800:]}")
        return
    if ended.code == 0 and cell.holds in ("recovers", "either"):
        return
    own = [line for line in ended.sentences if line.startswith(job.says)]
    if ended.code != 1 or cell.holds == "recovers" or len(own) != 1:
        raise CellError(f"exit status {ended.code}, expected {cell.holds}: {ended.err[-1500:]}")
    if not re.search(cell.says, own[0]):
        raise CellError(f"the sentence lacks {cell.says!r}: {own[0]}")


def _go_on(lab: Lab, job: Job) -> None:
    """The same command once more; it must not have lost a checkpoint."""
    steps = [int(path.parent.name[5:]) for path in lab.project.glob(".runs/*/checkpoints/step-*/complete.json")]
    finished = any(lab.project.glob(".runs/*/DONE"))
    ended = lab.run(job.command)
    if ended.code or ended.left or "Traceback" in ended.err:
        raise CellError(f"the next run ended with {ended.code}, left {ended.left}: {ended.err[-1500:]}")
    resumed = re.search(r"resumed at step (\d+)", ended.out + ended.err)
    if steps and not finished and (resumed is None or int(resumed[1]) < max(steps)):
        raise CellError(
            f"there was a checkpoint of step {max(steps)}; the next run said: {(ended.out + ended.err)[-500:]}"
        )


def _check_result(lab: Lab, job: str, expected: dict[str, Any]) -> None:
    found = json.loads(json.dumps({"result": lab.result(job), "tree": lab.tree()}))
    if found["result"] != expected["result"]:
        raise CellError(f"another result: {_difference(expected['result'], found['result'])}")
    more, less = (
        sorted(set(a) - set(b)) for a, b in ((found["tree"], expected["tree"]), (expected["tree"], found["tree"]))
    )
    if more or less:
        raise CellError(f"left behind: {more[:8]}; missing: {less[:8]}")


def _difference(expected: Any, found: Any, where: str = "") -> str:
    if isinstance(expected, dict) and isinstance(found, dict):
        keys = sorted({*expected, *found}, key=str)
        lines = [_difference(expected.get(key), found.get(key), f"{where}/{key}") for key in keys]
        return "; ".join(line for line in lines if line)
    return "" if expected == found else f"{where}: {str(expected)[:200]} became {str(found)[:200]}"


@contextlib.contextmanager
def _circumstances(lab: Lab, cell: Cell) -> Iterator[dict[str, Any]]:
    """What `Lab.run` needs for a fault; it is over when the block ends."""
    fault = cell.fault
    if isinstance(fault, At):
        yield {"points": [fault]}
    elif isinstance(fault, Clock):
        found = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
        if not found:
            raise ImpossibleError("faketime is not installed")
        # Monotonic time moves along: without that, time.sleep fails under libfaketime 0.9.10 (EINVAL).
        wrap = ["env", f"LD_PRELOAD={found[0]}", f"FAKETIME={fault.offset}"]
        yield {"points": [fault.kill], "wrap": wrap}
    elif isinstance(fault, OpenFiles):
        yield {"limits": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (fault.number, fault.number))}
    elif isinstance(fault, NoNetwork):
        yield {"wrap": _namespace("--net", "ip link set lo up 2>/dev/null || ifconfig lo up")}
    elif isinstance(fault, Memory):
        yield {"wrap": _namespace("--mount", f"mount -t tmpfs -o size={fault.kib}k tmpfs /dev/shm")}
    elif isinstance(fault, ReadOnly):
        (lab.project / fault.folder).mkdir(parents=True, exist_ok=True)
        yield {
            "wrap": _namespace(
                "--mount", f"mount --bind {fault.folder} {fault.folder} && mount -o remount,bind,ro {fault.folder}"
            )
        }
    elif isinstance(fault, DiskFull):
        with _small_disk(lab, fault):
            yield {}
    else:
        yield {}


def _namespace(kind: str, command: str) -> list[str]:
    """A wrapper that runs a command in a namespace of its own, after another command."""
    wrap = ["unshare", kind, "sh", "-c", f'{command} && exec "$@"', "sh"]
    tried = subprocess.run([*wrap[:2], "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        raise ImpossibleError(f"unshare {kind}: {tried.stderr.strip()}")
    return wrap


@contextlib.contextmanager
def _small_disk(lab: Lab, fault: DiskFull) -> Iterator[None]:
    """The project on a disk of its own that is nearly full; with room again, and on the old disk, afterwards."""
    kept = lab.folder / "whole"
    shutil.rmtree(kept, ignore_errors=True)
    lab.project.rename(kept)
    lab.project.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1g,mode=755", "tmpfs", str(lab.project)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        shutil.rmtree(lab.project)
        kept.rename(lab.project)
        raise ImpossibleError(f"mount: {mounted.stderr.strip()}")
    try:
        shutil.copytree(kept, lab.project, symlinks=True, dirs_exist_ok=True)
        facts = os.statvfs(lab.project)
        used, files = (facts.f_blocks - facts.f_bfree) * facts.f_frsize >> 10, facts.f_files - facts.f_ffree
        size = f"size={used + fault.kib}k" if fault.kib is not None else "size=1g"
        inodes = f",nr_inodes={files + fault.inodes}" if fault.inodes is not None else ""
        subprocess.run(["mount", "-o", f"remount,{size}{inodes}", str(lab.project)], check=True)
        yield
        shutil.rmtree(kept)
        shutil.copytree(lab.project, kept, symlinks=True)
    finally:
        subprocess.run(["umount", "-l", str(lab.project)], check=True)
        shutil.rmtree(lab.project, ignore_errors=True)
        kept.rename(lab.project)


def _twice(lab: Lab, cell: Cell) -> Ended:
    """The first is held at a line; how the second ends, which came meanwhile. The first must end well."""
    assert isinstance(cell.fault, Twice)
    command = JOBS[cell.job].command
    first = lab.start(command, [replace(cell.fault.hold, do="STOP")])
    deadline = time.monotonic() + LONGEST_S
    while not lab.has_fired():
        if first[0].poll() is not None or time.monotonic() > deadline:
            raise CellError(f"the first was never held: {lab.end(*first).err[-800:]}")
        time.sleep(0.05)
    second = lab.run(command)
    for process in marked(first[1]):
        with contextlib.suppress(psutil.Error):
            process.resume()
    ended = lab.end(*first)
    if ended.code or ended.left or "Traceback" in ended.err:
        raise CellError(f"the first ended with {ended.code}, left {ended.left}: {ended.err[-1500:]}")
    return second


def make_lab(name: str = "lab") -> Lab:
    """A lab with a short path, for Ray's sockets, which the next `make faults` finds again."""
    note = ROOT / f".faults/{name}"
    if note.is_file() and Path(note.read_text()).is_dir():
        return Lab(Path(note.read_text()))
    folder = Path(tempfile.mkdtemp(prefix="lab-"))
    note.parent.mkdir(exist_ok=True)
    note.write_text(str(folder))
    return Lab(folder)


def stop(process: subprocess.Popen[str]) -> None:
    """Ctrl-C."""
    process.send_signal(signal.SIGINT)
