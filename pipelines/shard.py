"""Stage `shard`: `python -m pipelines.shard KEY` makes data/shards/KEY from data/raw.

Without KEY it is the one whose stage DVC runs.
"""

from __future__ import annotations

import sys

from cigpose.config import Config
from cigpose.shard.write import write_dataset
from pipelines.paths import RAW, SHARDS
from pipelines.stage import stage


@stage("shard", member_of="data.datasets")
def main(config: Config, key: str) -> None:
    """Shard one dataset."""
    index = write_dataset(config, key, RAW, SHARDS)
    dropped = ", ".join(f"{count} {reason}" for reason, count in index.dropped.items()) or "none"
    print(
        f"{index.dataset}: {index.persons} persons on {index.images} images in {len(index.shards)} shards; "
        f"dropped: {dropped}; unreadable: {index.bad['count']}"
    )


if __name__ == "__main__":
    sys.exit(main())
