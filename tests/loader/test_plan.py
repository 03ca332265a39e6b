from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cigpose.loader.plan import Counts, RankPlan, Shuffle, eval_plan, train_batch_sizes, train_plan

shard_persons = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda counts: sum(counts) > 0)


def shards_of(counts: list[int]) -> Counts:
    """Shards of three datasets."""
    return {name: np.array(counts[i::3], dtype=np.int64) for i, name in enumerate("abc")}


def persons_of(plan: RankPlan) -> list[tuple[int, int]]:
    """(shard, place in it) of every person of a rank, stream after stream."""
    return [
        (3 * s.number + "abc".index(s.dataset), place)
        for stream in plan.streams
        for s in stream.segments
        for place in range(s.first, s.last)
    ]


def everyone(counts: list[int]) -> list[tuple[int, int]]:
    return [(shard, place) for shard, persons in enumerate(counts) for place in range(persons)]


@given(
    counts=shard_persons,
    world=st.integers(1, 8),
    batch=st.integers(1, 9),
    accumulate=st.integers(1, 3),
    streams=st.integers(1, 7),
    seed=st.integers(0, 3),
)
@settings(max_examples=150, deadline=None)
def test_a_training_epoch_holds_every_person_once_in_equally_many_batches(
    counts: list[int], world: int, batch: int, accumulate: int, streams: int, seed: int
) -> None:
    options = {"seed": seed, "epoch": 1, "world": world, "batch": batch, "accumulate": accumulate}
    options |= {"buffer": 13, "streams": streams}
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
        assert len(persons_of(plan)) == plan.num_persons == plan.batch_sizes.sum()
        assert sorted(plan.places[range(plan.num_persons)]) == list(range(plan.num_persons))
        lengths = [sum(map(len, stream.segments)) for stream in plan.streams]
        assert len(lengths) == streams and lengths == sorted(lengths, reverse=True) and np.ptp(lengths) <= 1


@given(counts=shard_persons, world=st.integers(1, 8), batch=st.integers(1, 9), streams=st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_an_evaluation_sees_every_person_once_in_order(counts: list[int], world: int, batch: int, streams: int) -> None:
    shards = {"a": np.array(counts)}
    plans = [eval_plan(shards, rank=rank, world=world, batch=batch, streams=streams) for rank in range(world)]
    found = [(s // 3, place) for plan in plans for s, place in persons_of(plan)]
    assert found == everyone(counts)
    firsts = [(s.first_person, sum(map(len, s.segments))) for plan in plans for s in plan.streams]
    assert [first for first, _ in firsts] == [0, *np.cumsum([length for _, length in firsts])[:-1]]
    assert np.ptp([plan.num_persons for plan in plans]) <= 1
    for plan in plans:
        assert (plan.batch_sizes[:-1] == batch).all() and plan.batch_sizes.sum() == plan.num_persons


@pytest.mark.parametrize(
    ("total", "expected"),
    [(32, [[4, 4]] * 4), (35, [[4, 4]] * 4 + [[2, 1]]), (33, [[4, 4]] * 3 + [[5, 4]]), (2, [[1, 1]])],
    ids=["even", "rest shared", "rest joins the last step", "one each"],
)
def test_the_rest_of_an_epoch_is_shared_evenly(total: int, expected: list[list[int]]) -> None:
    assert train_batch_sizes(total, batch=4, world=2).tolist() == expected


def slots_in_order(shuffle: Shuffle) -> np.ndarray:
    """Who has each place."""
    return np.argsort(shuffle[range(shuffle.num_slots)])


@pytest.mark.parametrize("num", [0, 1, 4095, 4097, 20_000])
@pytest.mark.parametrize("buffer", [0, 1, 100, 3000])
def test_a_shuffle_is_an_order_of_all_in_which_nobody_is_moved_far(num: int, buffer: int) -> None:
    shuffle = Shuffle(num, buffer, (0, 1, 2))
    places = np.array(shuffle[range(num)], dtype=int)
    assert sorted(places.tolist()) == list(range(num))
    assert np.abs(places - np.arange(num)).max(initial=0) <= shuffle.reach == buffer


@pytest.mark.parametrize("buffer", [0, 50, 5000])
def test_the_last_slot_of_some_places_is_known(buffer: int) -> None:
    shuffle = Shuffle(9000, buffer, (1,))
    last = np.maximum.accumulate(slots_in_order(shuffle))
    for places in (1, 64, 4096, 4097, 6000, 8999, 9000):
        assert shuffle.last_slot_of(places) == last[places - 1]


def test_a_shuffle_asked_for_any_slots_in_any_order_says_the_same() -> None:
    whole = Shuffle(20_000, 1000, (3,))[range(20_000)]
    slots = np.random.default_rng(0).permutation(20_000)[:500].tolist()
    assert Shuffle(20_000, 1000, (3,))[slots] == [whole[slot] for slot in slots]
    assert Shuffle(20_000, 1000, (4,))[slots] != [whole[slot] for slot in slots]


def test_a_shuffle_holds_less_than_its_buffer_moves_persons_far_and_starts_early() -> None:
    order = slots_in_order(Shuffle(20_000, 2000, (0,)))
    # A person at a place leaves when everybody before has come; until then all who came but left are held.
    held = np.maximum.accumulate(order) + 1 - np.arange(20_000)
    assert 900 < held[5000:15_000].mean() < 1300 and held.max() < 2000
    assert np.abs(order - np.arange(20_000)).mean() > 400
    assert np.maximum.accumulate(order)[64] <= 630  # not 2000


def test_the_order_depends_on_seed_epoch_and_nothing_else() -> None:
    def plan(**changes: int) -> RankPlan:
        options = {"seed": 3, "epoch": 5, "rank": 1, "world": 2, **changes}
        return train_plan(shards_of([50] * 8), batch=4, accumulate=1, streams=3, buffer=20, **options)

    base, people = plan(), range(200)
    assert plan().streams == base.streams
    assert plan().places[people] == base.places[people]
    for change in ({"seed": 4}, {"epoch": 6}):
        assert plan(**change).streams != base.streams
        assert plan(**change).places[people] != base.places[people]
