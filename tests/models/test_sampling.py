import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rdfkern.models.sampling import epoch_batches, fill_batches, shares
from rdfkern.models.schedule import learning_rate_at, step_seed

LENGTHS = st.lists(st.integers(0, 50), max_size=20)


@settings(max_examples=80, deadline=None)
@given(LENGTHS, st.integers(1, 80), st.none() | st.integers(1, 4), st.integers(0, 5))
def test_batches_cover_every_dialogue_once_within_the_budget(lengths, budget, most, epoch):
    batches = epoch_batches(lengths, budget, most, seed=3, epoch=epoch)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert batch and (most is None or len(batch) <= most)
        assert sum(lengths[index] for index in batch) <= budget or len(batch) == 1
    assert batches == epoch_batches(lengths, budget, most, seed=3, epoch=epoch)


def test_order_changes_with_epoch_and_seed():
    orders = [epoch_batches([1] * 20, 100, None, *key)[0] for key in ((0, 0), (0, 1), (1, 0))]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_batches_are_filled_and_a_long_meeting_is_alone():
    assert fill_batches([0, 1, 2, 3], [300, 300, 3400, 10], 600) == [[0, 1], [2], [3]]
    assert fill_batches([0, 1, 2], [1, 1, 1], 600, dialogues=2) == [[0, 1], [2]]


@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.integers(1, 4))
def test_shares_split_a_batch(lengths, ranks):
    parts = shares(range(len(lengths)), lengths, ranks)
    assert len(parts) == ranks
    assert sorted(index for part in parts for index in part) == list(range(len(lengths)))
    loads = [sum(lengths[index] for index in part) for part in parts]
    assert max(loads) - min(loads) <= max(lengths, default=0)


def test_learning_rate_rises_then_falls_to_zero():
    rates = [learning_rate_at(step, 100, 2.0, 0.1) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert rates[10] == 2.0 and rates[100] == pytest.approx(0.0)
    assert rates[55] == pytest.approx(1.0)
    assert all(np.diff(rates[10:]) < 0)
    assert learning_rate_at(0, 1, 2.0, 0.0) == 2.0


def test_step_seeds_differ():
    seeds = {step_seed(*key) for key in np.ndindex(3, 20, 4)}
    assert len(seeds) == 3 * 20 * 4
