"""What several subcommands take."""

from __future__ import annotations

from pathlib import Path


def model_file(text: str) -> Path:
    """The file of a model: itself, or the weights in a folder, such as `cigpose models pull` makes."""
    path = Path(text)
    return path / "model.safetensors" if path.is_dir() else path
