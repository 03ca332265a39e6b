"""Stage `render`: `python -m pipelines.render KEY` draws the people of data.render.KEY.

data/raw/KEY/images.zip         pictures
data/raw/KEY/annotations.json   their labels, as COCO-WholeBody has them

Without KEY it is the one whose stage DVC runs.
"""

from __future__ import annotations

import sys

from cigpose.config import Config
from cigpose.render import render_dataset
from pipelines.paths import RAW
from pipelines.stage import stage


@stage("render", member_of="data.render")
def main(config: Config, key: str) -> None:
    """Render one dataset."""
    datasets = config.data.render
    if key not in datasets:
        raise ValueError(f"params.yaml: data.render has no {key!r}, only {sorted(datasets)}. Add it, or name another.")
    counts = render_dataset(datasets[key], RAW / key)
    print(f"{RAW / key}: {counts['images']} images, {counts['persons']} persons")


if __name__ == "__main__":
    sys.exit(main())
