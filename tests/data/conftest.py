from __future__ import annotations

import hashlib
import io
import json
import tarfile
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import cv2
import numpy as np
import pytest

from cigpose.config import CausalConfig, Config, DatasetConfig, LoaderConfig, ShardingConfig, load_preset
from cigpose.shard.index import ShardIndex
from cigpose.shard.write import write_dataset
from cigpose.shard.tars import members


@dataclass
class Act:
    """How a host treats one request; a plain answer where nothing is said."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    """With `status`: sent in place of the file."""
    drop_after: int | None = None
    """Close the connection after so many bytes of the body."""
    stall_after: int | None = None
    """Send so many bytes of the body, then nothing."""
    ignore_range: bool = False
    shift: int = 0
    """A wrong server: answers a Range with bytes from elsewhere, and says so."""


class Host:
    """A web host with files in memory that does, request by request, what its script says."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.etags: dict[str, str | None] = {}
        self.script: dict[str, deque[Act]] = {}
        self.requests: list[tuple[str, str | None, str | None]] = []
        """(target, Range, If-Range) of every request."""
        self.sent: dict[str, int] = {}
        """Bytes of bodies sent, by path."""
        self.over = threading.Event()
        self.length_told = True
        self.bytes_per_s: float | None = None
        host = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                host.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # clients that are killed
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"

    def put(self, path: str, content: bytes, *acts: Act, etag: str | None = '"one"') -> str:
        """Serve a file, after these acts plainly; its address."""
        self.files[path], self.etags[path], self.script[path] = content, etag, deque(acts)
        return self.address + path

    def ranges(self) -> list[str | None]:
        """The Range of each request, in order."""
        return [asked for _, asked, _ in self.requests]

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = urlsplit(request.path).path
        asked, condition = request.headers.get("Range"), request.headers.get("If-Range")
        self.requests.append((request.path, asked, condition))
        acts = self.script.get(path)
        act = acts.popleft() if acts else Act()
        if act.status is not None or path not in self.files:
            return self._send(request, act.status or 404, act.headers, act.body, Act())
        content, etag = self.files[path], self.etags[path]
        headers = {"Content-Type": "application/octet-stream", **({"ETag": etag} if etag else {}), **act.headers}
        start = 0
        if asked and not act.ignore_range and condition in (None, etag):
            start = int(asked.removeprefix("bytes=").rstrip("-")) + act.shift
            if start >= len(content):
                return self._send(request, 416, {"Content-Range": f"bytes */{len(content)}"}, b"", Act())
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(request, 206 if "Content-Range" in headers else 200, headers, content[start:], act)

    def _send(
        self, request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes, act: Act
    ) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        if self.length_told or status not in (200, 206):
            request.send_header("Content-Length", str(len(body)))
        else:
            request.send_header("Connection", "close")
            request.close_connection = True
        request.end_headers()
        end = min(value for value in (len(body), act.drop_after, act.stall_after) if value is not None)
        step = int(self.bytes_per_s / 50) if self.bytes_per_s else 1 << 20
        for begin in range(0, end, step):
            piece = body[begin : min(begin + step, end)]
            request.wfile.write(piece)
            path = urlsplit(request.path).path
            self.sent[path] = self.sent.get(path, 0) + len(piece)
            if self.bytes_per_s and self.over.wait(0.02):
                return
        if end == act.stall_after:
            self.over.wait(60)
        if end < len(body):
            request.close_connection = True


@pytest.fixture
def host() -> Iterator[Host]:
    """A host on the loopback whose every answer a test can script."""
    host = Host()
    thread = threading.Thread(target=host.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield host
    host.over.set()
    host.server.shutdown()
    host.server.server_close()


@pytest.fixture(scope="session")
def act() -> type[Act]:
    """How a host treats one request: `act(status=503)`, `act(drop_after=1000)`, ..."""
    return Act


class Sharder:
    """Shards one dataset, `people`, into a folder of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "people"

    def config(
        self,
        keypoints: str | Mapping[str, Any] = "coco_wholebody",
        sharding: Mapping[str, Any] | None = None,
        **dataset: Any,
    ) -> Config:
        base = load_preset("quickstart")
        data = replace(
            base.data,
            datasets={**base.data.datasets, "people": DatasetConfig(**{"raw": ".", "reader": "coco", **dataset})},
            sharding=ShardingConfig(**{"processes": 1, **(sharding or {})}),
        )
        model = replace(base.model, causal=CausalConfig(train_top_k=1))
        evaluate = replace(base.evaluate, metric="body/AP")  # which every set has
        return replace(base, data=data, model=model, keypoints=keypoints, evaluate=evaluate)

    def __call__(self, raw: Path, **options: Any) -> ShardIndex:
        return write_dataset(self.config(**options), "people", raw, self.root)

    def files(self) -> dict[str, bytes]:
        """Every member of every shard, in order."""
        return {name: data for tar in sorted(self.folder.glob("*.tar")) for name, data in members(tar)}

    def samples(self) -> dict[str, dict[str, Any]]:
        """Key -> JSON of each sample."""
        return {
            name.removesuffix(".json"): json.loads(data) for name, data in self.files().items() if name[-5:] == ".json"
        }

    def persons(self) -> dict[int, dict[str, Any]]:
        """Id -> person."""
        return {person["id"]: person for sample in self.samples().values() for person in sample["persons"]}


@pytest.fixture
def sharder(tmp_path: Path) -> Sharder:
    """Writes shards below a temporary folder."""
    return Sharder(tmp_path / "shards")


@pytest.fixture(scope="session")
def mirror(shared: Path) -> Path:
    """A few MB that look like the hosts of the datasets, good files and broken ones."""
    return shared / "mirror"


@dataclass
class TinyShards:
    """Shards of noise, written directly: 17 keypoints, pictures of 96 x 80, crops of 32 x 64."""

    root: Path

    def write(
        self,
        name: str,
        images: Sequence[int],
        *,
        persons: Sequence[int] = (2, 1, 3),
        seed: int = 0,
        detections: int = 0,
    ) -> Path:
        """A dataset with so many `images` in each shard; `persons` of each in turn, `detections` of every second."""
        rng, folder = np.random.default_rng(seed), self.root / name
        folder.mkdir(parents=True)
        number, entries = 0, []
        for shard, num_images in enumerate(images):
            entry = {"name": f"{name}-{shard:05d}.tar", "images": num_images, "persons": 0, "detections": 0}
            samples = {}
            for _ in range(num_images):
                record = self._record(rng, number, persons[number % len(persons)], detections * (number % 2))
                entry["persons"] += len(record["persons"])
                entry["detections"] += len(record["detections"])
                picture = cv2.resize(rng.integers(0, 256, (10, 12, 3), dtype=np.uint8), (96, 80))
                samples[f"{number:06d}.jpg"] = cv2.imencode(".jpg", picture)[1].tobytes()
                samples[f"{number:06d}.json"] = json.dumps(record, separators=(",", ":")).encode()
                number += 1
            self.pack(folder / entry["name"], samples)
            entries.append(entry)
        self.index(folder, entries)
        return folder

    @staticmethod
    def _record(rng: np.random.Generator, number: int, num_persons: int, num_detections: int) -> dict[str, Any]:
        def box() -> list[float]:
            x, y, width, height = rng.uniform([0, 0, 20, 20], [50, 40, 45, 40]).round(2).tolist()
            return [x, y, x + width, y + height]

        people = [
            {
                "id": 10 * number + i,
                "bbox_xyxy": box(),
                "area": 400.0,
                "keypoints": np.column_stack([rng.uniform(0, 90, (17, 2)).round(2), rng.integers(0, 3, 17)]).tolist(),
            }
            for i in range(num_persons)
        ]
        detections = [{"bbox_xyxy": box(), "score": 0.5} for _ in range(num_detections)]
        size = {"width": 96, "height": 80}
        names = {"image_id": 1000 + number, "file_name": f'a "keypoints": {number}.jpg'}
        return {**names, **size, "persons": people, "detections": detections}

    @staticmethod
    def pack(path: Path, samples: Mapping[str, bytes]) -> None:
        """A tar of these members."""
        with tarfile.open(path, "w") as tar:
            for name, data in samples.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))

    def index(self, folder: Path, entries: list[dict[str, Any]]) -> None:
        """Write index.json for the tars as they are now."""
        for entry in entries:
            data = (folder / entry["name"]).read_bytes()
            entry.update(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
        totals = {what: sum(entry[what] for entry in entries) for what in ("images", "persons", "detections")}
        facts = {"format": 1, "dataset": folder.name, "keypoints": "coco", "num_keypoints": 17}
        rest = {"dropped": {}, "sources": {}, "ground_truth": None, "shards": entries}
        (folder / "index.json").write_text(json.dumps({**facts, **totals, **rest}))

    def config(
        self,
        *train: str,
        loader: Mapping[str, Any] | None = None,
        evaluate: Mapping[str, Any] | None = None,
        locations: Mapping[str, str] | None = None,
        batch: int = 4,
        workers: int = 1,
        input_size: tuple[int, int] = (32, 64),
        **changes: Any,
    ) -> Config:
        """An experiment on these datasets, with batches of `batch` a worker."""
        base = load_preset("cigpose-m_coco_256x192")
        data = replace(
            base.data,
            datasets={name: DatasetConfig(raw=".", reader="coco", images=".", annotations=".") for name in train},
            train=train,
            val=train[0],
            locations=dict(locations or {}),
        )
        options = {"shuffle_buffer": 6, "open_shards": 2, **(loader or {})}
        training = replace(
            base.train,
            batch_total=batch * workers,
            accumulate_steps=1,
            loader=LoaderConfig(**options),
            cluster=replace(base.train.cluster, num_workers=workers),
        )
        return replace(
            base,
            data=data,
            model=replace(base.model, input_size=input_size),
            train=training,
            evaluate=replace(base.evaluate, **{"batch": batch, "boxes": "ground_truth", **(evaluate or {})}),
            **changes,
        )


@pytest.fixture
def tiny_shards(tmp_path: Path) -> TinyShards:
    """Writes small datasets below `root`, and configurations that read them."""
    return TinyShards(tmp_path / "shards")
