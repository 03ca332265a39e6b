"""Whether the data that shards are made of have changed, and how one knows.

- Folders and params: DVC's digests, in the workspace (`dvc status` of the stages that make raw data and shards).
- Shards elsewhere (`data.locations`): the index there, which has the sha256 of every shard, beside the one in use.
- Downloads: the mirror's index where there is one; else what the host tells of the file (ETag, size, date) beside what
  it told before, `.runs/sources.json`. A published digest decides alone: another file would be refused.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
import yaml

from cigpose.config import Config, DownloadConfig, load_params
from cigpose.download.drive import is_drive
from cigpose.download.fetcher import mirrored
from cigpose.download.http import Patience
from cigpose.download.manifest import Entry, MirrorIndex, read_manifest, read_mirror_index, write_manifest
from cigpose.download.sources import TABLE, SourceFile
from cigpose.files.addresses import host_of, without_credentials
from cigpose.files.atomic import write_json
from cigpose.shard.index import read_index
from pipelines.paths import RAW, RUNS, SHARDS
from pipelines.retraining.workspace import Workspace, changes_by_stage, locked_outputs

SEEN = RUNS / "sources.json"
Told = dict[str, str | None]
"""What a host tells of a file: `etag`, `bytes`, `modified`."""


@dataclass(kw_only=True)
class News:
    """What a look at the sources found."""

    reasons: list[str] = field(default_factory=list)
    """Why the shards would change; one is enough."""
    remarks: list[str] = field(default_factory=list)
    """What could not be asked, or differs and changes no shard."""
    files: list[Path] = field(default_factory=list)
    """Downloads to fetch anew, from the project's folder."""
    told: dict[str, Told] = field(default_factory=dict)
    """Address -> what its host tells of the file now."""

    def sentence(self) -> str:
        """All of it, for the state of a flow run."""
        if self.reasons:
            return f"New data: {'; '.join(self.reasons)}."
        return f"No shard would change: {'; '.join(self.remarks) or 'all sources are as they were'}."


def look_at_sources(workspace: Workspace, table: Mapping[str, SourceFile] = TABLE) -> News:
    """Find out whether shards would change; nothing is fetched.

    Raises:
        ConfigError: the workspace's params.yaml is wrong.
        WorkspaceError: DVC cannot read the project.
    """
    config, news = load_params(workspace.folder / "params.yaml"), News()
    if not locked_outputs(workspace.folder):
        news.remarks.append("nothing has been made yet, and the first run is somebody's to start")
        return news
    for stage, reasons in changes_by_stage(workspace.folder).items():
        if stage.partition("@")[0] in data_stages(workspace.folder):
            news.reasons += [f"{stage}: {reason}" for reason in reasons]
    look_at_locations(workspace.folder, config, news)
    look_at_downloads(workspace, config, news, table)
    return news


def data_stages(folder: Path) -> set[str]:
    """Names of the stages of dvc.yaml that write raw data or shards; `pretrained` writes neither."""
    stages = yaml.safe_load((folder / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    return {name for name, about in stages.items() if _writes_data(about.get("do", about).get("outs", ()))}


def _writes_data(outs: Any) -> bool:
    paths = [next(iter(out)) if isinstance(out, Mapping) else out for out in outs]
    return (
        any(Path(path).is_relative_to(folder) for path in paths for folder in (RAW, SHARDS))
        and str(RAW / "pretrained") not in paths
    )


def look_at_locations(folder: Path, config: Config, news: News) -> None:
    """Compare the index of shards elsewhere with the one that the stage `locate` left."""
    for key, address in config.data.locations.items():
        try:
            there = json.loads(json.dumps(dataclasses.asdict(read_index(address))))
        except (OSError, ValueError) as err:
            news.remarks.append(without_credentials(f"{key}: {err}".rstrip(".")))
            continue
        with suppress(OSError, ValueError):
            if json.loads((folder / SHARDS / f"{key}.json").read_text(encoding="utf-8")) == there:
                continue
        news.reasons.append(without_credentials(f"{key}: the shards at {address} are others"))


def look_at_downloads(workspace: Workspace, config: Config, news: News, table: Mapping[str, SourceFile]) -> None:
    """Compare what hosts and mirror tell of downloaded files with what is there."""
    options = config.data.download
    index = _mirror_index(options, news) if options.sources else None
    before = read_seen(workspace.root)
    for key, source, entry in _downloaded(workspace.folder, options, table):
        path, ours = RAW / key / source.name, f"{key}/{source.name}"
        expected = next(filter(None, (index.expected(url) for url in source.urls)), None) if index else None
        if expected is not None and expected.sha256 is not None:
            if expected.sha256 != entry.sha256:
                news.reasons.append(f"{ours}: the mirror's index names another sha256 ({expected.sha256[:12]})")
                news.files.append(path)
            continue
        url = next((url for url in source.urls if not is_drive(url)), None)
        if url is None:
            news.remarks.append(f"{ours}: Google Drive tells nothing of a file before it is fetched")
            continue
        asked = mirrored(url, options.mirror)
        told = _told_of(asked, options.timeout_s)
        if told is None:
            news.remarks.append(f"{ours}: {host_of(asked)} did not tell")
            continue
        news.told[url] = told
        if difference := _difference(before.get(url, {"bytes": str(entry.bytes)}), told):
            if source.sha256 or source.md5:
                news.remarks.append(f"{ours}: {difference}, but the published digest holds; it is not fetched")
            else:
                news.reasons.append(f"{ours}: {difference}")
                news.files.append(path)


def _downloaded(
    folder: Path, options: DownloadConfig, table: Mapping[str, SourceFile]
) -> Iterator[tuple[str, SourceFile, Entry]]:
    """Key, source and record of each file that is there; the others make the stage stale by themselves."""
    for key, names in options.sources.items():
        entries: dict[str, Entry] = {}
        with suppress(ValueError):
            entries = read_manifest(folder / RAW / key)
        for name in names:
            if name in entries and name in table and (folder / RAW / key / name).exists():
                yield key, table[name], entries[name]


def _mirror_index(options: DownloadConfig, news: News) -> MirrorIndex | None:
    if options.mirror is None:
        return None
    try:
        patience = Patience(max_attempts=1, timeout_s=options.timeout_s)
        return read_mirror_index(options.mirror.rstrip("/"), patience, lambda reason, wait_s: None)
    except ValueError as err:
        news.remarks.append(without_credentials(str(err).rstrip(".")))
        return None


def _told_of(url: str, timeout_s: float) -> Told | None:
    try:
        with requests.head(
            url, allow_redirects=True, timeout=timeout_s, headers={"Accept-Encoding": "identity"}
        ) as reply:
            names = {"etag": "ETag", "bytes": "Content-Length", "modified": "Last-Modified"}
            told = {ours: reply.headers.get(theirs) for ours, theirs in names.items()}
            return told if reply.ok and any(told.values()) else None
    except requests.RequestException:
        return None


def _difference(before: Mapping[str, str | None], now: Told) -> str | None:
    """What differs of what was told both times; an ETag that stays decides, whatever the date says."""
    if before.get("etag") and before["etag"] == now["etag"]:
        return None
    for name in ("etag", "bytes", "modified"):
        if before.get(name) and now[name] and before[name] != now[name]:
            return f"{'size' if name == 'bytes' else name} was {before[name]}, is {now[name]}"
    return None


def read_seen(root: Path) -> dict[str, Told]:
    """Address -> what its host told when the project's data were last made or looked at."""
    with suppress(OSError, ValueError):
        found = json.loads((root / SEEN).read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def keep_seen(root: Path, news: News) -> None:
    """Remember what hosts tell, once nothing more is to be done about it."""
    if news.told:
        write_json(root / SEEN, read_seen(root) | news.told, sort_keys=True)


def drop_outdated(workspace: Workspace, news: News) -> None:
    """Take files that are others now out of the workspace, so that the stage `download` fetches them anew."""
    for path in news.files:
        folder = workspace.folder / path.parent
        (folder / path.name).unlink(missing_ok=True)
        entries = read_manifest(folder)
        entries.pop(path.name, None)
        write_manifest(folder, entries.values())
