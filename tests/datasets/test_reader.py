"""Batches with a position: ranks share the global order, a state continues it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gddlab.datasets import BatchReader, digits, open_dataset, order
from gddlab.distill.distributed import World
from gddlab.errors import GddlabError


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(n=st.integers(1, 30), seed=st.integers(0, 2**40), start=st.integers(0, 100), steps=st.lists(st.integers(0, 20)))
def test_the_order_depends_on_position_alone(n: int, seed: int, start: int, steps: list[int]) -> None:
    """Any division into steps reads the same sequence; every epoch is a permutation."""
    begin, parts = start, []
    for step in steps:
        parts.append(order(n, seed, begin, step))
        begin += step
    total = sum(steps)
    assert torch.equal(torch.cat([*parts, torch.zeros(0, dtype=torch.int64)]), order(n, seed, start, total))
    epoch = start // n
    assert order(n, seed, epoch * n, n).sort().values.tolist() == list(range(n))


def test_epochs_and_seeds_differ() -> None:
    assert not torch.equal(order(10, 3, 0, 10), order(10, 3, 10, 10))
    assert not torch.equal(order(10, 3, 0, 10), order(10, 4, 0, 10))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_together_read_the_global_order(size: int) -> None:
    data = digits()
    readers = [BatchReader(data, batch=8, seed=3, rank=r, world_size=size) for r in range(size)]
    worlds = [World(r, size, torch.device("cpu")) for r in range(size)]
    for step in range(3):
        index = order(len(data), 3, 8 * step, 8)
        parts = [r.next() for r in readers]
        assert torch.equal(torch.cat([x for x, _ in parts]), data.images(index))
        assert torch.equal(torch.cat([y for _, y in parts]), data.labels(index))
        for world, (x, _) in zip(worlds, parts, strict=True):
            assert torch.equal(x, data.images(world.shard(index)))  # as the trainer takes its part
        assert all(r.position == 8 * (step + 1) for r in readers)


def test_a_state_continues_with_other_ranks_and_batches() -> None:
    data = digits()
    whole = BatchReader(data, batch=1797, seed=0)
    first, second = whole.next()[0], whole.next()[0]  # across the end of an epoch
    reader = BatchReader(data, batch=600, seed=0)
    seen = [reader.next()[0] for _ in range(2)]
    state = reader.state_dict()
    ranks = [BatchReader(data, batch=1194, seed=0, rank=r, world_size=2) for r in range(2)]
    for r in ranks:
        r.load_state_dict(state)
    seen += [r.next()[0] for r in ranks]
    assert torch.equal(torch.cat(seen), torch.cat([first, second])[: 1200 + 1194])


def test_states_of_others_are_refused() -> None:
    data = digits()
    state = BatchReader(data, batch=4, seed=0).state_dict()
    with pytest.raises(GddlabError, match="is of seed=0, here it is 1"):
        BatchReader(data, batch=4, seed=1).load_state_dict(state)
    with pytest.raises(GddlabError, match="is of dataset_sha256='5d7c4425"):
        BatchReader(open_dataset("digits", max_images=9), batch=4, seed=0).load_state_dict(state)
    reader = BatchReader(data, batch=4, seed=0)
    for bad, words in (
        ({}, "is of seed=None"),
        (state | {"position": -1}, "position=-1"),
        (state | {"position": 1.5}, "1.5"),
    ):
        with pytest.raises(GddlabError, match=words):
            reader.load_state_dict(bad)
    assert reader.position == 0
    for fields, words in (
        ({"batch": 5}, "multiple of 2"),
        ({"batch": 0}, "multiple"),
        ({"rank": 2}, "ranks count from 0"),
    ):
        with pytest.raises(GddlabError, match=words):
            BatchReader(data, **({"batch": 4, "seed": 0, "rank": 0, "world_size": 2} | fields))
