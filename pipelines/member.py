"""Which member of a `foreach` stage a process is to make.

dvc.yaml does not write `${key}` into `cmd`: DVC puts it into a shell line as it stands, and a key is a user's text. DVC
names the stage it runs in the environment (`render@people`), which no shell reads.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def asked_member(stage: str, table: str, arguments: Sequence[str] | None = None) -> str:
    """The key given on the command line, else that of the DVC stage this process runs in.

    Args:
        stage: name of the stage and of its module.
        table: the table of params.yaml that has the keys, for the message.
        arguments: command line without the program; None for this process's own.

    Raises:
        SystemExit: neither names one key.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    running, _, key = os.environ.get("DVC_STAGE", "").partition("@")
    if len(arguments) == 1:
        return arguments[0]
    if not arguments and running.rpartition(":")[2] == stage and key:
        return key
    raise SystemExit(f"python -m pipelines.{stage} KEY: expected one key of {table} in params.yaml, got {arguments}.")
