from __future__ import annotations

import time

import pytest
from webhook import SECRET, webhook_here

from cigpose.config import NotifyConfig, config_from_mapping, load_preset
from cigpose.config.schema import ConfigError
from pipelines.retraining.notice import tell_people
from pipelines.ui import free_port


def test_a_webhook_is_told_in_slacks_words() -> None:
    with webhook_here() as webhook:
        options = NotifyConfig(webhook=webhook.address)
        assert (
            tell_people(options, "promoted", "retrain-1", "toy: AP 0.7 > 0.6 <&>", "http://127.0.0.1:5000/#/r") is None
        )
        assert tell_people(options, "failed", "retrain-2", "train: http://u:pw@h/x is not there.") is None
    told, failed = webhook.messages
    assert told["type"] == "application/json" and told["path"] == SECRET
    assert told["text"].splitlines() == [
        ":trophy: New champion: retrain-1",
        "toy: AP 0.7 &gt; 0.6 &lt;&amp;&gt;",
        "http://127.0.0.1:5000/#/r",
    ]
    assert failed["text"] == ":x: Retraining failed: retrain-2\ntrain: http://h/x is not there."


@pytest.mark.parametrize("fault", ["dead", "refuses", "drips", "wrong"])
def test_a_webhook_that_is_ill_costs_a_bounded_time_and_its_address_is_not_told(fault: str) -> None:
    with webhook_here() as webhook:
        webhook.status, webhook.drips = (404 if fault == "refuses" else 200), fault == "drips"
        address = {"dead": f"http://127.0.0.1:{free_port()}{SECRET}", "wrong": f"http://[::1{SECRET}"}
        options = NotifyConfig(webhook=address.get(fault, webhook.address), timeout_s=0.4)
        started = time.monotonic()
        reason = tell_people(options, "failed", "retrain-1", "train: no.")
        assert time.monotonic() - started < 2
    reasons = {"dead": "ConnectionError", "refuses": "answered 404", "drips": "no answer within 0.4 s"}
    assert reason is not None and reasons.get(fault, "") in reason and "S3CRET" not in reason


def test_without_a_webhook_nobody_is_told_and_a_wrong_one_is_refused_without_being_shown() -> None:
    assert tell_people(NotifyConfig(), "failed", "retrain-1", "train: no.") is None
    values = load_preset("quickstart").to_mapping()
    values["notify"]["webhook"] = "hooks.slack.com/S3CRET"
    with pytest.raises(ConfigError, match=r"^notify\.webhook must be an http or https address") as refused:
        config_from_mapping(values)
    assert "S3CRET" not in str(refused.value)
