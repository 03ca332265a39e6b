"""A run is its folder: what MLflow is to know stands there, and `pipelines.tracking.sync` brings MLflow up to it.

    <run folder>/run.json        its id, name, tags, inputs, files to be shown, status; replaced whole
    <run folder>/params.yaml     the experiment, without what is private
    <run folder>/history.jsonl   a line per measurement: {"kind": "log", "step": 20, "time": 1790000000000, "loss": 0.5}
    <run folder>/system.jsonl    the same, of the machine
    <run folder>/sync.json       which run of which MLflow it is; written by the delivery alone

Times are milliseconds since 1970, and are written once: they are part of a metric's identity in MLflow.
"""

from __future__ import annotations

import functools
import json
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import yaml

from cigpose.config import Config, load_preset, presets
from cigpose.config.schema import leaves
from cigpose.files.addresses import is_remote, without_credentials
from cigpose.files.atomic import clear_leftovers, write_json, write_text
from cigpose.shard.index import read_index
from pipelines.lineage import content_digest, dvc_hashes, git_revision, shards_digest

log = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]
PARAMS, STATE = "params.yaml", "sync.json"
RECORD = "record"
"""Folder of data/model with a copy of the run's folder."""
LOCAL = "local-"
"""Start of the id of a run that MLflow does not know yet."""
CHANGES_NAMED = 3
"""Changes against the preset that a run's name tells."""


class Run:
    """The folder of one run. One process writes to it (`pipelines.train` holds its lock); any may read it.

    Attributes:
        folder: absolute.
        facts: what run.json holds; empty where no run was begun.
        on_change: called after each change; to be set by who listens.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.history, self.system = self.folder / "history.jsonl", self.folder / "system.jsonl"
        facts = read_facts(self.folder / "run.json")
        self.facts = facts if "id" in facts else {}
        self.on_change: Callable[[], object] = dict  # nobody listens

    def begin(self, config: Config, kind: str, address: str) -> None:
        """Begin the run, or go on with the one that was begun here; it keeps its id, start, files and params.

        Args:
            config: the experiment.
            kind: what the run is, as tag `cigpose.kind`.
            address: MLflow's, where it is to be delivered.
        """
        for name in ("run.json", PARAMS, self.history.name):
            clear_leftovers(self.folder / name)
        if not self.facts:
            write_text(self.folder / PARAMS, yaml.safe_dump(config.to_public_mapping(), sort_keys=False))
            self.facts = {"id": LOCAL + uuid.uuid4().hex, "started": _now(), "files": {PARAMS: None}, "inputs": []}
        started = datetime.fromtimestamp(self.facts["started"] / 1000)
        about = {
            "name": f"{run_name(config)}, {started:%Y-%m-%d %H:%M}",
            "experiment": config.registry.experiment,
            "tags": _tags(config, kind),
        }
        self._update(**about, address=without_credentials(address), status="RUNNING", ended=None)

    def end(self, status: Status) -> None:
        """Nothing is recorded after this."""
        self._update(status=status, ended=_now())

    def copy(self, folder: Path) -> None:
        """Make a folder of the same run, finished now, that MLflow can be told from on any machine.

        It lacks what the run took of this machine (system.jsonl).
        """
        folder.mkdir(parents=True)
        here = [name for name in (*self.facts["files"], self.history.name) if (self.folder / name).is_file()]
        for name in here:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / name, folder / name)
        write_json(folder / "run.json", {**self.facts, "address": None, "status": "FINISHED", "ended": _now()})

    def _update(self, **facts: Any) -> None:
        self.facts = {**self.facts, **facts}
        write_json(self.folder / "run.json", self.facts)
        self.on_change()

    @property
    def run_id(self) -> str:
        """MLflow's id; the run's own, `local-...`, as long as MLflow could not be reached."""
        return read_facts(self.folder / STATE).get("run_id") or self.facts["id"]

    def log_record(self, record: Mapping[str, Any]) -> None:
        """Append numbers measured at a step: `kind`, `step`, and a value by name; not two of a kind at a step."""
        append_record(self.history, record)
        self.on_change()

    def restart_history(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Let the history be these records: those of a checkpoint. What is in it already keeps its time."""
        times = {(record["kind"], record["step"]): record["time"] for record in read_records(self.history)}
        timed = ({**record, "time": times.get((record["kind"], record["step"]), _now())} for record in records)
        write_text(self.history, "".join(json.dumps(record) + "\n" for record in timed))
        self.on_change()

    def note_file(self, path: Path, to: str | None = None) -> None:
        """Show a file of the run's folder, in folder `to` of the MLflow run, as it is when it is delivered."""
        self._update(files={**self.facts["files"], str(path.resolve().relative_to(self.folder)): to})

    def note_inputs(self, locations: Iterable[str | Path], context: str) -> None:
        """Tell which shards are read: name, digest of their content, and what DVC knows them by.

        Args:
            locations: folders or addresses of shards, each with an index.json.
            context: what they are read for: `training`, `validation`.
        """
        hashes = dvc_hashes(Path("dvc.lock"))
        described = [_describe_shards(location, context, hashes) for location in locations]
        self._update(inputs=[*(item for item in self.facts["inputs"] if item not in described), *described])


def _now() -> int:
    return time.time_ns() // 1_000_000


def read_facts(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none, or one that a power cut spoilt."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(facts, dict):
            raise ValueError(f"{facts!r} is no JSON object")
    except FileNotFoundError:
        return {}
    except ValueError as err:
        log.warning("%s: not readable (%s), taken for missing.", path, err)
        return {}
    return facts


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Append a line. Half a line, of a killed process or a full disk, stays a line of its own, which nobody reads."""
    line = json.dumps({**record, "time": _now()}) + "\n"
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, 2)
            line = line if file.read() == b"\n" else "\n" + line
        file.write(line.encode())


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file of records, the last one first; one that does not end yet is being written."""
    content = path.read_bytes() if path.is_file() else b""
    for line in reversed(content[: content.rfind(b"\n") + 1].splitlines()):
        try:
            record = json.loads(line)
            yield {**record, "kind": record["kind"], "step": record["step"], "time": record["time"]}
        except (ValueError, KeyError, TypeError):
            _tell_once("%s: %r is no record, and is left out.", path, line[:60])


_tell_once = functools.cache(log.warning)


def flatten(values: Mapping[str, Any]) -> dict[str, str]:
    """Nested parameters as `section.key` -> text; lists and empty mappings as JSON."""
    return {path: value if isinstance(value, str) else json.dumps(value) for path, value in leaves(values).items()}


def run_name(config: Config) -> str:
    """The preset, and what differs from it: `quickstart, epochs 3, rendered-val.seed 1`."""
    preset = flatten(load_preset(config.name).to_public_mapping()) if config.name in presets() else {}
    here = flatten(config.to_public_mapping()) if preset else {}
    changed = [key for key, value in here.items() if preset.get(key) != value and not key.startswith("registry.")]
    words = [f"{_short_name(key, here)} {here[key]}" for key in changed[:CHANGES_NAMED]]
    more = len(changed) - len(words)
    return ", ".join([config.name, *(word[:40] for word in words), *([f"{more} more"] if more else [])])


def _short_name(key: str, keys: Iterable[str]) -> str:
    """The end of a dotted key that no other key has: `num_images` stands in several places, `epochs` in one."""
    others = [f".{other}" for other in keys if other != key]
    words = key.split(".")
    ends = (".".join(words[first:]) for first in reversed(range(len(words))))
    return next((end for end in ends if not any(other.endswith(f".{end}") for other in others)), key)


def _tags(config: Config, kind: str) -> dict[str, str]:
    tags = {"cigpose.kind": kind, "cigpose.preset": config.name, "mlflow.source.name": f"pipelines.{kind}"}
    if revision := git_revision():
        tags |= {"git.revision": revision, "mlflow.source.git.commit": revision.partition("+")[0]}
    return tags


def _describe_shards(location: str | Path, context: str, hashes: Mapping[str, str]) -> dict[str, Any]:
    index = read_index(location)
    address = str(location).rstrip("/")
    tags = {"mlflow.data.context": context, "content": content_digest(index)}
    md5 = hashes.get(address) or hashes.get(f"data/shards/{Path(address).name}")
    if md5 and not is_remote(address):
        tags["dvc_md5"] = md5
    counts = {name: getattr(index, name) for name in ("images", "persons", "detections")}
    profile = counts | {"shards": len(index.shards)}
    uri = without_credentials(address) if "://" in address else str(Path(address).resolve())
    dataset = {
        "name": index.dataset,
        "digest": shards_digest(index),
        "source_type": next((scheme for scheme in ("http", "s3") if address.startswith(scheme)), "local"),
        "source": json.dumps({"uri": uri}),
        "profile": json.dumps(profile),
    }
    return {"dataset": dataset, "tags": tags}
