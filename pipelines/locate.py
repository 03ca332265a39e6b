"""Stage `locate`: data/shards/KEY.json, the index of the shards at the address `data.locations.KEY` of params.yaml.

    python -m pipelines.locate KEY

Without KEY it is the one whose stage DVC runs. DVC cannot see when shards elsewhere change, so it runs this at every
`dvc repro`; as long as the index there (which has the sha256 of every shard) is the same, nothing that follows runs.
"""

from __future__ import annotations

import dataclasses
import sys

from cigpose.config import Config
from cigpose.files.addresses import without_credentials
from cigpose.files.atomic import write_json
from cigpose.shard.index import read_index
from pipelines.paths import SHARDS
from pipelines.stage import stage


@stage("locate", member_of="data.locations")
def main(config: Config, key: str) -> None:
    """Keep the index of one dataset that lies elsewhere."""
    locations = config.data.locations
    if key not in locations:
        raise ValueError(f"params.yaml: data.locations has no {key!r}. Known: {', '.join(locations) or 'none'}.")
    index = read_index(locations[key])
    write_json(SHARDS / f"{key}.json", dataclasses.asdict(index))
    print(f"{without_credentials(locations[key])}: {len(index.shards)} shards, {index.persons} persons")


if __name__ == "__main__":
    sys.exit(main())
