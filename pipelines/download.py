"""Stages `download`, data/raw/KEY from `data.download.sources.KEY` of params.yaml, and `pretrained`.

    python -m pipelines.download KEY
    python -m pipelines.download pretrained     # data/raw/pretrained: what `model.backbone.pretrained` and
                                                # `train.start_from` name

Without KEY it is the one whose stage DVC runs. Resumable: kill it and run it again.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cigpose.config import Config
from cigpose.deploy.models import find_model
from cigpose.download.fetch import fetch
from cigpose.download.sources import TABLE
from cigpose.files.addresses import file_name_of, is_remote, without_credentials
from cigpose.files.objects import fetch_object
from cigpose.train.build import LARGEST_WEIGHTS, pretrained_path
from pipelines.lineage import project_root
from pipelines.paths import RAW
from pipelines.stage import stage
from pipelines.training.start import FILE, forget_start, keep_start


@stage("download", member_of="data.download.sources", when_stopped="The same command goes on from where it stopped.")
def main(config: Config, key: str) -> None:
    """Fetch the files of one key."""
    first = (*first_weights(config), start_in_table(config))
    sources = {**config.data.download.sources, "pretrained": tuple(filter(None, first))}
    if key not in sources:
        raise ValueError(f"params.yaml: data.download.sources has no {key!r}. Known: {', '.join(sources)}.")
    fetch(RAW / key, sources[key], config.data.download, say=say)
    if key == "pretrained":
        fetch_first_weights(config)
        fetch_start(config)


def say(line: str) -> None:
    """A line for the user, at once."""
    print(without_credentials(line), flush=True)


def first_weights(config: Config) -> tuple[str, ...]:
    """The file of the download table that `model.backbone.pretrained` names.

    Returns: none for null, for an address (`fetch_first_weights`), and for a user's own file that is there.

    Raises:
        FileNotFoundError: the name is not in the download table, and there is no such file.
    """
    name = config.model.backbone.pretrained
    if name is None or is_remote(name):
        return ()
    if name not in TABLE:
        if not (RAW / "pretrained" / name).is_file():
            raise FileNotFoundError(
                f"model.backbone.pretrained: {name!r} is neither in the download table nor in {RAW}/pretrained. "
                "Put your file there, or correct the name."
            )
        return ()
    return (name,)


def fetch_first_weights(config: Config) -> None:
    """Fetch `model.backbone.pretrained` where it is an address; DVC then keeps the md5 of what it gave.

    Raises:
        FetchError: it does not give the file.
    """
    address = config.model.backbone.pretrained
    if address is not None and is_remote(address):
        target = pretrained_path(config, Path.cwd())
        fetch_object(address, target, LARGEST_WEIGHTS)
        say(f"{RAW / 'pretrained' / target.name}: from {address}")


def start_in_table(config: Config) -> str | None:
    """The official model of the download table that `train.start_from` names; None for everything else."""
    asked = config.train.start_from
    is_official = asked is not None and asked in TABLE and asked.endswith(".pth")
    return asked if is_official and not (project_root() / str(asked)).exists() else None


def fetch_start(config: Config) -> None:
    """Keep the model that `train.start_from` names among the first weights, and none that it named before.

    Raises:
        FileNotFoundError, FetchError: there is no such thing.
        ValueError: it is no model, the registry does not have it, or a user's own file is in its place.
    """
    if (asked := config.train.start_from) is None:
        forget_start()
        return
    with _found(config, asked) as (path, origin):
        keep_start(asked, path, origin)
    say(f"{FILE}: from {origin}")


@contextlib.contextmanager
def _found(config: Config, asked: str) -> Iterator[tuple[Path, str]]:
    """The file that `train.start_from` means, and where it comes from, as it may be shown."""
    if asked.startswith("models:"):
        from pipelines.registry.fetch import fetch_model, resolve_version  # MLflow is heavy

        version = resolve_version(asked)
        yield fetch_model(version), version
    elif is_remote(asked):
        with tempfile.TemporaryDirectory(prefix="cigpose-") as scratch:
            path = Path(scratch) / file_name_of(asked)
            fetch_object(asked, path, LARGEST_WEIGHTS)
            yield path, without_credentials(asked)
    elif name := start_in_table(config):
        yield RAW / "pretrained" / name, name
    else:
        yield find_model(project_root() / Path(asked).expanduser()), asked


if __name__ == "__main__":
    sys.exit(main())
