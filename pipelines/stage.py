"""What the commands of all stages have in common: the command line, params.yaml, how they end.

    @stage("shard", member_of="data.datasets")
    def main(config: Config, key: str) -> None: ...

`python -m pipelines.shard KEY` then reads params.yaml and ends with 0, or with one sentence for the user: 1 for what
went wrong, 2 for a command line that is none, 130 for Ctrl-C.

dvc.yaml does not write into `cmd` which member of a `foreach` is meant: DVC puts it into a shell line as it stands, and
a key is a user's text. DVC names the stage it runs in the environment (`render@people`), which no shell reads.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cigpose.config import load_params
from cigpose.files.addresses import without_credentials
from cigpose.files.atomic import claimed, clear_leftovers, clear_leftovers_in
from pipelines.paths import RUNS


def stage(
    name: str,
    *,
    member_of: str | None = None,
    flags: Mapping[str, str] | None = None,
    writes: Sequence[Path] = (),
    errors: tuple[type[Exception], ...] = (),
    when_stopped: str = "The same command begins anew; what was there before is untouched.",
) -> Callable[[Callable[..., None]], Callable[..., int]]:
    """Make a function the command of a stage; `--help` is the docstring of its module.

    Args:
        name: of the stage, and of its module.
        member_of: the table of params.yaml that a `foreach` goes through; the function then gets the asked `key`.
        flags: switch -> its help; the function gets each as a bool of its name.
        writes: files and folders that the stage alone writes: it claims them, and clears what a killed one has left.
        errors: what else than ValueError and OSError is a user's matter, whose text is for the user.
        when_stopped: what becomes of work that Ctrl-C has ended.

    Returns: a decorator of `function(config, ...)`, which gives `main(arguments=None) -> exit status`.
    """
    expected: tuple[type[Exception], ...] = (ValueError, OSError, *errors)

    def decorate(function: Callable[..., None]) -> Callable[..., int]:
        @functools.wraps(function)
        def main(arguments: Sequence[str] | None = None) -> int:
            given = _parse(name, function.__globals__["__doc__"], member_of, flags or {}, arguments)
            try:
                config = load_params()
                with _alone(name, writes):
                    function(config, **given)
            except expected as err:
                print(without_credentials(f"{name}: {err}"), file=sys.stderr)
                return 1
            except KeyboardInterrupt:
                print(f"{name}: stopped. {when_stopped}", file=sys.stderr)
                return 130
            return 0

        return main

    return decorate


@contextlib.contextmanager
def _alone(name: str, writes: Sequence[Path]) -> Iterator[None]:
    """Be the only one at work on `writes`, if there are any."""
    if not writes:
        yield
        return
    with claimed(RUNS / f"{name}.lock", f"The stage {name} of this project"):
        for target in writes:
            clear_leftovers(target)
            for folder in [target, *target.rglob("*/")] if target.is_dir() else ():
                clear_leftovers_in(folder)
        yield


def _parse(
    name: str, about: str, member_of: str | None, flags: Mapping[str, str], arguments: Sequence[str] | None
) -> dict[str, Any]:
    """The command line as arguments of the stage's function."""
    parser = argparse.ArgumentParser(
        prog=f"python -m pipelines.{name}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if member_of is not None:
        running, _, member = os.environ.get("DVC_STAGE", "").partition("@")
        asked = member if running.rpartition(":")[2] == name else ""
        parser.add_argument("key", nargs="?", default=asked, metavar="KEY", help=f"one of {member_of} in params.yaml")
    for flag, meaning in flags.items():
        parser.add_argument(flag, action="store_true", help=meaning)
    given = vars(parser.parse_args(arguments))
    if given.get("key") == "":
        parser.error(f"name one key of {member_of} in params.yaml.")
    return given
