"""DVC stage `render`: draw one rendered dataset.

`python -m pipelines.render KEY` reads data.render[KEY] from params.yaml and writes data/raw/KEY/{images.zip,
annotations.json}. Without KEY it is the one whose stage DVC runs.
"""

from __future__ import annotations

from cigpose.config import load_params
from cigpose.render import render_dataset
from pipelines.member import asked_member
from pipelines.paths import RAW


def main(arguments: list[str] | None = None) -> None:
    """Render one dataset."""
    key = asked_member("render", "data.render", arguments)
    try:
        datasets = load_params().data.render
        if key not in datasets:
            raise ValueError(
                f"params.yaml: data.render has no {key!r}, only {sorted(datasets)}. Add it, or name another."
            )
        counts = render_dataset(datasets[key], RAW / key)
    except (ValueError, OSError) as err:
        raise SystemExit(str(err)) from err
    print(f"{RAW / key}: {counts['images']} images, {counts['persons']} persons")


if __name__ == "__main__":
    main()
