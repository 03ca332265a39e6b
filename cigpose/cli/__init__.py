"""The `cigpose` command. Each module adds its subcommands, and imports what they run when they run: help stays fast."""

from cigpose.cli.main import main

__all__ = ["main"]
