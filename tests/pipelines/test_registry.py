"""Who becomes champion when several ask at once, when one is killed on the way, and when someone moves the alias."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from postgres import Postgres

from pipelines.registry import turns
from pipelines.registry.gate import Rules
from pipelines.registry.measurement import Measurement
from pipelines.registry.versions import Registry
from pipelines.tracking.address import connect

MODEL = "raced"
ROUNDS = int(os.environ.get("CIGPOSE_TEST_RACES", "5"))


def evaluation(ap: float) -> Measurement:
    return Measurement(metrics={"whole/AP": ap}, data="d1", protocol="{}")


class Raced:
    """A registry with versions whose weights are nobody's business."""

    def __init__(self, address: str) -> None:
        self.address, self.client = address, connect(address)
        self.registry = Registry(self.client, MODEL)
        self.registry.ensure("")

    def add(self, ap: float) -> int:
        version = self.client.create_model_version(MODEL, "s3://nowhere/model", tags=evaluation(ap).tags())
        return int(version.version)

    def settle(self, version: int) -> str:
        kept = Measurement.from_tags(self.tags(version))
        return self.registry.settle(version, kept, Rules(metric="whole/AP")).verdict

    def aliases(self) -> dict[str, int]:
        return {name: int(number) for name, number in self.client.get_registered_model(MODEL).aliases.items()}

    def tags(self, version: int) -> dict[str, str]:
        return self.client.get_model_version(MODEL, str(version)).tags

    def queue(self) -> list[str]:
        return [name for name in self.client.get_registered_model(MODEL).tags if name.startswith("cigpose.turn.")]


@pytest.fixture
def raced(project: Path) -> Raced:
    return Raced(f"sqlite:///{project}/mlflow.db")


def _settle(address: str, version: int, barrier: object, calls: int) -> None:
    """In a process of its own: wait for the others, settle, and be killed at the n-th call to MLflow if asked to."""
    raced, left = Raced(address), calls
    original: Callable[..., object] = MlflowClient.__getattribute__

    def counted(self: MlflowClient, name: str) -> object:
        nonlocal left
        if name.startswith(("get_", "set_", "delete_", "search_")):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return original(self, name)

    if calls:
        MlflowClient.__getattribute__ = counted  # type: ignore[method-assign]
    barrier.wait(60)  # type: ignore[attr-defined]
    raced.settle(version)


def race(contenders: list[tuple[str, int]], calls: int = 0) -> list[int | None]:
    """Settle versions at addresses at once, each in a process; exit codes."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(len(contenders))
    children = [context.Process(target=_settle, args=(*contender, barrier, calls)) for contender in contenders]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    return [child.exitcode for child in children]


def run_races(raced: Raced, addresses: tuple[str, str], rounds: int, start: float = 0.1) -> None:
    rng = random.Random(0)
    for i in range(rounds):
        better, worse = raced.add(start + i / 1000), raced.add(start + (i - 0.5) / 1000)
        versions = [better, worse]
        rng.shuffle(versions)
        assert race(list(zip(addresses, versions, strict=True))) == [0, 0]
        assert raced.aliases()["champion"] == better
        assert raced.tags(better)["decision"] in ("first", "better")
        # Where both were champion, the better one came second and knew of the other.
        follows = json.loads(raced.tags(better)["values.decision"])["champion_version"]
        assert raced.tags(worse)["decision"] == "not_better" or follows == worse
        assert raced.queue() == []


@pytest.mark.slow
def test_of_two_that_settle_at_once_the_better_is_champion(raced: Raced) -> None:
    """CIGPOSE_TEST_RACES says how many rounds."""
    run_races(raced, (raced.address, raced.address), ROUNDS)


@pytest.mark.slow
def test_of_two_that_settle_at_a_server_or_one_at_its_database_the_better_is_champion(
    project: Path, mlflow_server
) -> None:
    mlflow_server.start()
    raced = Raced(mlflow_server.address)
    run_races(raced, (raced.address, raced.address), max(2, ROUNDS // 2))
    run_races(raced, (raced.address, f"sqlite:///{mlflow_server.folder}/mlflow.db"), 1, start=0.5)


@pytest.mark.slow
def test_of_two_that_settle_on_postgres_the_better_is_champion(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("psycopg2", reason="the driver of PostgreSQL is not installed")
    monkeypatch.setenv("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")  # no connection is inherited by a fork
    address = postgres.make_database("races")
    run_races(Raced(address), (address, address), int(os.environ.get("CIGPOSE_TEST_RACES", "10")))


@pytest.mark.slow
def test_a_promotion_killed_anywhere_leaves_no_half_state(raced: Raced) -> None:
    raced.settle(raced.add(0.1))
    killed = 0
    for calls in (3, 9, 14, 17, 19, 21, 22, 23, 24, 25):
        before = raced.aliases()["champion"]
        version = raced.add(0.1 + calls / 100)
        killed += race([(raced.address, version)], calls) == [-signal.SIGKILL]
        worse = raced.add(0.05)
        raced.settle(worse)  # somebody else's
        champion = raced.aliases()["champion"]
        assert champion in (before, version)
        assert (raced.tags(version).get("decision") == "better") == (champion == version)
        assert raced.aliases()["challenger"] == worse
        assert raced.settle(version) == ("is_champion" if champion == version else "better")
        assert raced.aliases() == {"champion": version, "challenger": worse}
        assert raced.queue() == [] and "decision.unfinished" not in raced.tags(version)
    assert killed >= 7


def test_a_place_in_the_queue_whose_process_is_silent_is_taken_away(
    raced: Raced, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "DEAD_AFTER_S", 0.5)
    silent = turns.Turn(raced.client, MODEL)
    silent.wait()
    entry = json.dumps({"number": 1, "beat": 1, "owner": "another machine 1"})
    raced.client.set_registered_model_tag(MODEL, raced.queue()[0], entry)
    assert raced.settle(raced.add(0.1)) == "first"
    with pytest.raises(turns.TurnLostError, match="lost its turn"):
        silent.keep()


def test_who_waits_too_long_is_told_for_whom(raced: Raced, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "WAIT_S", 0.3)
    version = raced.add(0.1)
    with turns.turn(raced.client, MODEL), pytest.raises(turns.TurnLostError, match=f"has the turn .*{os.getpid()}"):
        raced.settle(version)
    assert raced.settle(version) == "first"


def test_what_measured_nothing_is_no_champion(raced: Raced) -> None:
    version = raced.add(-1.0)
    assert raced.settle(version) == "not_measured"
    assert raced.aliases() == {"challenger": version}
    assert raced.settle(raced.add(0.2)) == "first"


@pytest.mark.slow
def test_a_champion_that_was_put_back_by_hand_is_not_promoted_again(raced: Raced) -> None:
    first, second = raced.add(0.1), raced.add(0.2)
    assert (raced.settle(first), raced.settle(second)) == ("first", "better")
    raced.client.set_registered_model_alias(MODEL, "champion", str(first))
    assert raced.settle(second) == "rolled_back"
    assert raced.aliases()["champion"] == first
    assert raced.tags(second)["rolled_back"] == f"the alias was moved by hand, to version {first}"
    assert raced.settle(second) == "rolled_back"
    third = raced.add(0.15)
    assert raced.settle(third) == "better"  # another model may still win
    assert raced.settle(second) == "rolled_back"
    raced.client.set_registered_model_alias(MODEL, "champion", str(second))  # and back again, by hand
    assert raced.settle(second) == "is_champion"
    assert "rolled_back" not in raced.tags(second)
    assert "rolled_back" in raced.tags(third)
    raced.client.delete_model_version_tag(MODEL, str(third), "rolled_back")
    assert raced.settle(third) == "not_better"
