"""Tells people how a retraining ended, through a webhook that takes Slack's JSON.

A webhook that is dead, slow or wrong costs at most `notify.timeout_s` and changes nothing else. Its address is a
secret: no message has it.
"""

from __future__ import annotations

import threading
from typing import Literal

import requests

from cigpose.config import NotifyConfig
from cigpose.files.addresses import without_credentials

Ending = Literal["failed", "promoted", "not promoted"]
_HEADINGS: dict[Ending, str] = {
    "failed": ":x: Retraining failed",
    "promoted": ":trophy: New champion",
    "not promoted": ":small_blue_diamond: Retrained, not promoted",
}


def tell_people(options: NotifyConfig, ending: Ending, run: str, sentence: str, link: str | None = None) -> str | None:
    """Post a message, if there is a webhook.

    Args:
        options: its address, and how long it may take.
        ending: what became of the retraining.
        run: name of the flow run.
        sentence: the reason, or the decision.
        link: a page with more; an address without credentials.

    Returns: why the message was not taken, for the log; None when it was, or where nobody is to be told.
    """
    address = options.webhook
    if address is None:
        return None
    lines = [f"{_HEADINGS[ending]}: {run}", without_credentials(sentence), *([link] if link else [])]
    message = {"text": _escaped("\n".join(lines))}
    answer: list[str] = []
    # A thread, as a reply that drips never reaches the time-out of `requests`, which is for each read.
    thread = threading.Thread(target=_post, args=(address, message, options.timeout_s, answer), daemon=True)
    thread.start()
    thread.join(options.timeout_s)
    reason = answer[0] if answer else f"no answer within {options.timeout_s:g} s"
    return f"The webhook (notify.webhook) did not take the message: {reason}." if reason else None


def _post(address: str, message: dict[str, str], timeout_s: float, answer: list[str]) -> None:
    try:
        with requests.post(address, json=message, timeout=timeout_s, allow_redirects=False, stream=True) as reply:
            answer.append("" if reply.status_code // 100 == 2 else f"it answered {reply.status_code}")
    except requests.RequestException as err:  # its text names the address
        answer.append(type(err).__name__)
    except ValueError:  # not an address after all
        answer.append("it is no address")


def _escaped(text: str) -> str:
    """As Slack wants it: the three characters that begin its own marks."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
