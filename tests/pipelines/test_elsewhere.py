"""A project that has nothing of its own: shards on S3, checkpoints on S3, a registered model here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from project import TINY, make_project
from shard_index import shard_index
from train_stage import Stage

from cigpose.config import load_preset
from cigpose.config.params_file import write_params
from cigpose.shard.index import parse_index
from pipelines import locate


def located(key: str, locations: dict[str, str]) -> int:
    """The status that the stage `locate` ends with, in the working directory."""
    config = load_preset("quickstart")
    config.data.locations.update(locations)
    write_params(config, Path("params.yaml"))
    return locate.main([key])


def test_the_index_behind_http_is_kept_whole_and_only_then(
    tmp_path: Path, host: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = json.dumps(shard_index("people", 4))
    host.put("/people/index.json", text.encode())
    secret = host.address.replace("//", "//me:SECRET@")
    locations = {"people": f"{secret}/people", "nobody": f"{secret}/nobody"}
    assert located("people", locations) == 0
    assert f"{host.address}/people: 1 shards, 8 persons" in capsys.readouterr().out
    kept = tmp_path / "data/shards/people.json"
    assert parse_index(kept.read_text(), "kept") == parse_index(text, "there")
    assert located("nobody", locations) == 1
    sentence = f"locate: {host.address}/nobody/index.json: HTTP 404. Correct the address in params.yaml.\n"
    assert capsys.readouterr().err == sentence
    host.put("/people/index.json", text.replace("cd" * 32, "../..").encode())
    assert located("people", locations) == 1
    assert "the sha256 of people-00000.tar is '../..'" in capsys.readouterr().err
    assert parse_index(kept.read_text(), "kept") == parse_index(text, "there")
    assert located("strangers", {}) == 1
    assert "params.yaml: data.locations has no 'strangers'. Known: none." in capsys.readouterr().err


@pytest.mark.slow
def test_shards_and_checkpoints_on_s3_make_a_registered_model(stage: Stage, s3: Any, tmp_path: Path) -> None:
    s3.create_bucket(Bucket="people")
    shards = stage.folder / "data/shards"
    for file in filter(Path.is_file, shards.rglob("*")):
        s3.upload_file(str(file), "people", f"shards/{file.relative_to(shards)}")
    project = make_project(tmp_path / "project")
    project.change(**TINY)
    project.change(
        data__render={},
        data__datasets={},
        data__locations={name: f"s3://people/shards/{name}" for name in ("rendered-train", "rendered-val")},
        train__checkpoint__address="s3://people/run",
        train__loader__cache=str(tmp_path / "cache"),
    )
    project.run("dvc", "repro")
    registered = json.loads((project.folder / "data/registered.json").read_text())
    assert (registered["model"], int(registered["version"])) == ("cigpose-quickstart", 1)
    assert sorted(path.name for path in (project.folder / "data/shards").iterdir()) == [
        "rendered-train.json",
        "rendered-val.json",
    ]
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".tar", ".lock"}
    kept = [entry["Key"] for entry in s3.list_objects_v2(Bucket="people", Prefix="run/")["Contents"]]
    assert any(key.endswith("/complete.json") for key in kept)
