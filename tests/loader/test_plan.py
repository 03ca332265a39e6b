from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cigpose.loader.plan import RankPlan, ShardCount, eval_plan, shuffled_positions, train_batch_sizes, train_plan

shard_persons = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda counts: sum(counts) > 0)


def shards_of(counts: list[int]) -> list[ShardCount]:
    return [ShardCount("abc"[i % 3], i, persons) for i, persons in enumerate(counts)]


def persons_of(plan: RankPlan) -> list[tuple[int, int]]:
    """(shard, place in it) of every person of a rank."""
    return [(s.number, place) for s in plan.segments for place in range(s.first, s.last)]


def everyone(counts: list[int]) -> list[tuple[int, int]]:
    return [(shard, place) for shard, persons in enumerate(counts) for place in range(persons)]


@given(
    counts=shard_persons,
    world=st.integers(1, 8),
    batch=st.integers(1, 9),
    accumulate=st.integers(1, 3),
    seed=st.integers(0, 3),
)
@settings(max_examples=150, deadline=None)
def test_a_training_epoch_holds_every_person_once_in_equally_many_batches(
    counts: list[int], world: int, batch: int, accumulate: int, seed: int
) -> None:
    options = {"seed": seed, "epoch": 1, "world": world, "batch": batch, "accumulate": accumulate, "buffer": 13}
    if sum(counts) < world * accumulate:
        with pytest.raises(ValueError, match="Use fewer workers"):
            train_plan(shards_of(counts), rank=0, **options)
        return
    plans = [train_plan(shards_of(counts), rank=rank, **options) for rank in range(world)]
    assert sorted(person for plan in plans for person in persons_of(plan)) == everyone(counts)
    assert len({len(plan.batch_sizes) for plan in plans}) == 1
    assert len(plans[0].batch_sizes) % accumulate == 0
    sizes = np.stack([plan.batch_sizes for plan in plans], axis=1)
    assert (sizes[:-accumulate] == batch).all()
    assert sizes.min() >= 1 and sizes.max() <= batch + 1
    assert np.ptp(sizes[-accumulate:]) <= 1
    for plan in plans:
        assert len(persons_of(plan)) == plan.batch_sizes.sum()
        assert sorted(plan.positions.tolist()) == list(range(len(plan.positions)))


@given(counts=shard_persons, world=st.integers(1, 8), batch=st.integers(1, 9))
@settings(max_examples=150, deadline=None)
def test_an_evaluation_sees_every_person_once_in_order(counts: list[int], world: int, batch: int) -> None:
    plans = [eval_plan(shards_of(counts), rank=rank, world=world, batch=batch) for rank in range(world)]
    assert [person for plan in plans for person in persons_of(plan)] == everyone(counts)
    numbers = [plan.first_person + i for plan in plans for i in range(len(plan.positions))]
    assert numbers == list(range(sum(counts)))
    assert np.ptp([len(plan.positions) for plan in plans]) <= 1
    for plan in plans:
        assert (plan.batch_sizes[:-1] == batch).all() and plan.batch_sizes.sum() == len(plan.positions)


@pytest.mark.parametrize(
    ("total", "expected"),
    [(32, [[4, 4]] * 4), (35, [[4, 4]] * 4 + [[2, 1]]), (33, [[4, 4]] * 3 + [[5, 4]]), (2, [[1, 1]])],
    ids=["even", "rest shared", "rest joins the last step", "one each"],
)
def test_the_rest_of_an_epoch_is_shared_evenly(total: int, expected: list[list[int]]) -> None:
    assert train_batch_sizes(total, batch=4, world=2).tolist() == expected


@pytest.mark.parametrize("buffer", [0, 1, 10, 64, 5000])
def test_a_shuffle_buffer_never_holds_more_than_its_size(buffer: int) -> None:
    num = 1000
    positions = shuffled_positions(num, buffer, np.random.default_rng(0))
    assert sorted(positions.tolist()) == list(range(num))
    # A person at position p leaves when everybody up to p has arrived; until then all arrived ones but p are held.
    arrivals = np.argsort(positions)
    arrived = np.maximum.accumulate(arrivals) + 1
    assert (arrived - np.arange(num)).max() <= buffer + 1
    if buffer == 0:
        np.testing.assert_array_equal(positions, np.arange(num))


def test_a_shuffle_buffer_moves_persons_far_and_starts_early() -> None:
    positions = shuffled_positions(20_000, 2000, np.random.default_rng(0))
    moved = np.abs(positions - np.arange(20_000))
    assert np.mean(moved) > 700
    arrivals = np.argsort(positions)
    assert np.maximum.accumulate(arrivals)[64] <= 630  # capacity 250 + arrivals / 2: not 2000


def test_the_order_depends_on_seed_epoch_and_nothing_else() -> None:
    def plan(**changes: int) -> RankPlan:
        options = {"seed": 3, "epoch": 5, "rank": 1, "world": 2, **changes}
        return train_plan(shards_of([50] * 8), batch=4, accumulate=1, buffer=20, **options)

    base = plan()
    assert plan().segments == base.segments
    np.testing.assert_array_equal(plan().positions, base.positions)
    for change in ({"seed": 4}, {"epoch": 6}):
        assert plan(**change).segments != base.segments
        assert not np.array_equal(plan(**change).positions, base.positions)


def test_pools_cover_the_segments_in_order() -> None:
    plan = train_plan(shards_of([7, 9, 4, 0, 12]), seed=0, epoch=0, rank=0, world=1, batch=4, accumulate=1, buffer=4)
    pools = plan.pools(2)
    assert [segment for _, group in pools for segment in group] == list(plan.segments)
    assert [arrival for arrival, _ in pools] == [0, *np.cumsum([sum(map(len, g)) for _, g in pools])[:-1]]
