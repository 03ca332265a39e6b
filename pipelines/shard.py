"""Stage `shard`: `python -m pipelines.shard KEY` makes data/shards/KEY from data/raw.

Without KEY it is the one whose stage DVC runs.
"""

from __future__ import annotations

import sys

from cigpose.config import load_params
from cigpose.files.addresses import without_credentials
from cigpose.shard.write import write_dataset
from pipelines.member import asked_member
from pipelines.paths import RAW, SHARDS


def main() -> None:
    """Shard one dataset; errors are one sentence and exit code 1."""
    key = asked_member("shard", "data.datasets")
    try:
        index = write_dataset(load_params(), key, RAW, SHARDS)
    except (ValueError, OSError) as err:
        sys.exit(without_credentials(f"shard: {err}"))
    dropped = ", ".join(f"{count} {reason}" for reason, count in index.dropped.items()) or "none"
    print(
        f"{index.dataset}: {index.persons} persons on {index.images} images in {len(index.shards)} shards; "
        f"dropped: {dropped}; unreadable: {index.bad['count']}"
    )


if __name__ == "__main__":
    main()
