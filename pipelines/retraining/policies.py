"""What a stage that fails gets in the flow: time, and another try where one may help."""

from __future__ import annotations

import math
from dataclasses import dataclass

HOUR = 3600


class StageError(RuntimeError):
    """A stage that failed, in its own last words."""

    seconds: float = math.inf
    """How long it had been running."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How long a stage may take, and how often it is tried again."""

    timeout_s: int
    retries: int = 0
    retry_delay_s: int = 0
    retry_after_s: float = 0.0
    """No second try for a stage that failed sooner: what stops it at once, such as a wrong parameter, stays wrong."""
    retry_if: str = ""
    """But for one whose sentence has these words."""

    def allows_retry(self, error: BaseException) -> bool:
        """Whether another try may help after this error."""
        if not isinstance(error, StageError):
            return False
        return error.seconds >= self.retry_after_s or bool(self.retry_if and self.retry_if in str(error))


POLICIES = {
    "render": Policy(timeout_s=6 * HOUR),
    "download": Policy(timeout_s=48 * HOUR, retries=2, retry_delay_s=60),  # goes on where it stopped
    "pretrained": Policy(timeout_s=6 * HOUR, retries=2, retry_delay_s=60),
    "shard": Policy(timeout_s=12 * HOUR),
    "locate": Policy(timeout_s=HOUR, retries=2, retry_delay_s=30),
    "train": Policy(
        timeout_s=14 * 24 * HOUR, retries=1, retry_delay_s=10, retry_after_s=120
    ),  # goes on from its checkpoint
    "robustness": Policy(timeout_s=24 * HOUR),
    "evaluate": Policy(timeout_s=12 * HOUR),
    "register": Policy(  # finds again what it registered
        timeout_s=HOUR, retries=4, retry_delay_s=30, retry_after_s=30, retry_if="does not answer"
    ),
}
OTHER = Policy(timeout_s=24 * HOUR)
