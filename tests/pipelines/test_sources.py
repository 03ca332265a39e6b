from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from shard_index import shard_index
from toy_stages import dvc, make_toy

from cigpose.config import Config, DownloadConfig, config_from_mapping
from cigpose.download.fetch import fetch
from cigpose.download.manifest import MANIFEST, read_manifest
from cigpose.download.sources import SourceFile, table_of
from pipelines.retraining import sources
from pipelines.retraining.workspace import Workspace, make_workspace

HOST = "pictures.example"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address it is served at, as a mirror of HOST."""
    folder = tmp_path / "mirror"
    (folder / HOST).mkdir(parents=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


PEOPLE = "people.json"


def a_table(sha256: str | None = None) -> dict[str, SourceFile]:
    return table_of(SourceFile(name=PEOPLE, urls=(f"http://{HOST}/{PEOPLE}",), licence="none", sha256=sha256))


def with_sources(config: Config, mirror: str | None) -> Config:
    values = config.to_mapping()
    values["data"]["download"] |= {"sources": {"people": [PEOPLE]}, "mirror": mirror, "timeout_s": 2, "max_attempts": 1}
    return config_from_mapping(values)


def a_workspace(root: Path) -> Workspace:
    return Workspace(root=root, folder=root / "copy", baseline="", edited=(), left_out=())


def fetched(workspace: Workspace, options: DownloadConfig, table: dict[str, SourceFile]) -> None:
    fetch(workspace.folder / "data/raw/people", [PEOPLE], options, table=table, say=lambda line: None)


def look(workspace: Workspace, config: Config, table: dict[str, SourceFile]) -> sources.News:
    news = sources.News()
    sources.look_at_downloads(workspace, config, news, table)
    return news


def test_a_file_that_its_host_changed_is_new_data_until_it_has_been_fetched(
    tmp_path: Path, mirror: tuple[Path, str], config: Config
) -> None:
    """No digest is published: what the host tells decides."""
    (folder, address), table, workspace = mirror, a_table(), a_workspace(tmp_path)
    file, config = folder / HOST / PEOPLE, with_sources(config, address)
    file.write_text('{"people": 1}')
    fetched(workspace, config.data.download, table)
    first = look(workspace, config, table)
    assert (first.reasons, first.remarks) == ([], [])
    sources.keep_seen(tmp_path, first)
    assert look(workspace, config, table).reasons == []

    file.write_text('{"people": 1, "more": 2}')
    news = look(workspace, config, table)
    assert news.reasons == [f"people/{PEOPLE}: size was 13, is 24"]
    assert look(workspace, config, table).reasons == news.reasons, "as long as no run has come to its end"
    sources.drop_outdated(workspace, news)
    assert not (workspace.folder / "data/raw/people" / PEOPLE).exists()
    fetched(workspace, config.data.download, table)
    sources.keep_seen(tmp_path, news)
    assert (workspace.folder / "data/raw/people" / PEOPLE).read_text() == file.read_text()
    assert look(workspace, config, table).reasons == []

    file.unlink()
    gone = look(workspace, config, table)
    assert (gone.reasons, gone.remarks) == ([], [f"people/{PEOPLE}: {address.removeprefix('http://')} did not tell"])
    assert gone.sentence().startswith("No shard would change: people/people.json: 127.0.0.1:")


def test_of_a_file_with_a_published_digest_no_other_is_fetched_and_a_mirrors_index_decides_alone(
    tmp_path: Path, mirror: tuple[Path, str], config: Config
) -> None:
    (folder, address), workspace = mirror, a_workspace(tmp_path)
    file, config = folder / HOST / PEOPLE, with_sources(config, address)
    file.write_text("{}")
    table = a_table(sha256=hashlib.sha256(b"{}").hexdigest())
    fetched(workspace, config.data.download, table)
    sources.keep_seen(tmp_path, look(workspace, config, table))
    file.write_text("[1, 2]")
    news = look(workspace, config, table)
    assert news.reasons == [] and "but the published digest holds; it is not fetched" in news.remarks[0]

    entry = {"path": f"{HOST}/{PEOPLE}", "bytes": 6, "sha256": hashlib.sha256(b"[1, 2]").hexdigest()}
    (folder / MANIFEST).write_text(json.dumps([entry]))
    news = look(workspace, config, table)
    assert news.reasons == [f"people/{PEOPLE}: the mirror's index names another sha256 ({entry['sha256'][:12]})"]
    sources.drop_outdated(workspace, news)
    fetched(workspace, config.data.download, table)
    assert read_manifest(workspace.folder / "data/raw/people")[PEOPLE].sha256 == entry["sha256"]
    assert look(workspace, config, table).reasons == []


def test_shards_elsewhere_are_new_data_when_their_index_is_another(tmp_path: Path, config: Config) -> None:
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "copy"
    values = config.to_mapping()
    values["data"]["locations"] = {"people": str(elsewhere), "gone": str(tmp_path / "gone")}
    config = config_from_mapping(values)
    (folder / "data/shards").mkdir(parents=True)
    elsewhere.mkdir()

    (elsewhere / "index.json").write_text(json.dumps(shard_index("people", 160)))
    news = sources.News()
    sources.look_at_locations(folder, config, news)
    assert news.reasons == [f"people: the shards at {elsewhere} are others"] and "gone: " in news.remarks[0]
    index = sources.read_index(elsewhere)
    (folder / "data/shards/people.json").write_text(json.dumps(dataclasses.asdict(index)))
    same = sources.News()
    sources.look_at_locations(folder, config, same)
    assert same.reasons == []
    (elsewhere / "index.json").write_text(json.dumps(shard_index("people", 161)))
    sources.look_at_locations(folder, config, same)
    assert same.reasons == news.reasons


@pytest.mark.slow
def test_a_folder_of_the_users_own_is_new_data_when_it_changes_and_a_changed_training_is_none(
    project: Path, config: Config
) -> None:
    toy = make_toy(project, config)
    stages = yaml.safe_load((toy / "dvc.yaml").read_text())
    stages["stages"]["shard"] = {
        "cmd": "python stage.py shard data/shards/people",
        "deps": ["data/raw/mine"],
        "params": ["seed"],
        "outs": ["data/shards/people"],
    }
    (toy / "dvc.yaml").write_text(yaml.safe_dump(stages, sort_keys=False))
    (toy / "data/raw/mine").mkdir(parents=True)
    (toy / "data/raw/mine/annotations.json").write_text("{}")
    assert sources.data_stages(toy) == {"render", "download", "shard"}
    workspace = make_workspace(toy)
    first = sources.look_at_sources(workspace)
    assert (
        first.sentence()
        == "No shard would change: nothing has been made yet, and the first run is somebody's to start."
    )
    dvc(workspace.folder, "repro", "--quiet")

    (toy / "data/raw/mine/annotations.json").write_text('{"annotations": []}')
    news = sources.look_at_sources(make_workspace(toy))
    assert news.reasons == ["shard: data/raw/mine is modified"], news.reasons
    assert news.sentence() == "New data: shard: data/raw/mine is modified."
    (toy / "data/raw/mine/annotations.json").write_text("{}")
    params = (toy / "params.yaml").read_text()
    (toy / "params.yaml").write_text(params.replace("epochs: 4", "epochs: 5"))
    workspace = make_workspace(toy)
    assert sources.look_at_sources(workspace).sentence() == "No shard would change: all sources are as they were."
    (toy / "params.yaml").write_text(params.replace("seed: 0", "seed: 3", 1))
    assert sources.look_at_sources(make_workspace(toy)).reasons == ["shard: seed is modified"]
