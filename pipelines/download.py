"""Stage `download`: data/raw/KEY from `data.download.sources.KEY` of params.yaml.

    python -m pipelines.download KEY

Resumable: kill it and run it again.
"""

from __future__ import annotations

import sys
from pathlib import Path

from cigpose.config import load_params
from cigpose.data.download import fetch
from cigpose.files.addresses import without_credentials

RAW = Path("data/raw")


def say(line: str) -> None:
    """A line for the user, at once."""
    print(without_credentials(line), flush=True)


def main() -> None:
    """Run the stage; a user's mistake ends it with one sentence and exit status 1."""
    if len(sys.argv) != 2:
        sys.exit("Usage: python -m pipelines.download KEY, a key of data.download.sources in params.yaml.")
    key = sys.argv[1]
    try:
        options = load_params().data.download
        if key not in options.sources:
            sys.exit(
                f"params.yaml: data.download.sources has no {key!r}. Known: {', '.join(options.sources) or 'none'}."
            )
        fetch(RAW / key, options.sources[key], options, say=say)
    except (ValueError, FileNotFoundError) as err:
        sys.exit(without_credentials(str(err)))
    except KeyboardInterrupt:
        sys.exit(f"Interrupted. Run again: {RAW / key} goes on from where it stopped.")


if __name__ == "__main__":
    main()
