"""Stage `locate`: data/shards/KEY.json, the index of the shards at the address `data.locations.KEY` of params.yaml.

    python -m pipelines.locate KEY

Without KEY it is the one whose stage DVC runs. DVC cannot see when shards elsewhere change, so it runs this at every
`dvc repro`; as long as the index there (which has the sha256 of every shard) is the same, nothing that follows runs.
"""

from __future__ import annotations

import dataclasses
import sys

from cigpose.config import load_params
from cigpose.files.addresses import without_credentials
from cigpose.files.atomic import write_json
from cigpose.shard.index import read_index
from pipelines.member import asked_member
from pipelines.paths import SHARDS


def main() -> None:
    """Run the stage; errors are one sentence and exit code 1."""
    key = asked_member("locate", "data.locations")
    try:
        locations = load_params().data.locations
        if key not in locations:
            sys.exit(f"params.yaml: data.locations has no {key!r}. Known: {', '.join(locations) or 'none'}.")
        index = read_index(locations[key])
        write_json(SHARDS / f"{key}.json", dataclasses.asdict(index))
    except (ValueError, OSError) as err:
        sys.exit(without_credentials(f"locate: {err}"))
    print(f"{without_credentials(locations[key])}: {len(index.shards)} shards, {index.persons} persons")


if __name__ == "__main__":
    main()
