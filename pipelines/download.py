"""Stages `download`, data/raw/KEY from `data.download.sources.KEY` of params.yaml, and `pretrained`.

    python -m pipelines.download KEY
    python -m pipelines.download pretrained     # data/raw/pretrained: what `model.backbone.pretrained` names

Without KEY it is the one whose stage DVC runs. Resumable: kill it and run it again.
"""

from __future__ import annotations

import sys
from pathlib import Path

from cigpose.config import Config
from cigpose.download.fetch import fetch
from cigpose.download.sources import TABLE
from cigpose.files.addresses import is_remote, without_credentials
from cigpose.files.objects import fetch_object
from cigpose.train.build import LARGEST_WEIGHTS, pretrained_path
from pipelines.paths import RAW
from pipelines.stage import stage


@stage("download", member_of="data.download.sources", when_stopped="The same command goes on from where it stopped.")
def main(config: Config, key: str) -> None:
    """Fetch the files of one key."""
    sources = {**config.data.download.sources, "pretrained": first_weights(config)}
    if key not in sources:
        raise ValueError(f"params.yaml: data.download.sources has no {key!r}. Known: {', '.join(sources)}.")
    fetch(RAW / key, sources[key], config.data.download, say=say)
    if key == "pretrained":
        fetch_first_weights(config)


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


if __name__ == "__main__":
    sys.exit(main())
