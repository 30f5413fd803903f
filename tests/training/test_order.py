"""The order of windows: whole permutations, from any step, shared without overlap."""

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bkcore.errors import DataError
from bkcore.training.order import WindowOrder

SIZES = st.tuples(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(0, 5)
)


@given(SIZES, st.integers(1, 30), st.integers(0, 30), st.integers(0, 2**31))
def test_it_begins_at_any_step_as_if_it_had_come_there(
    sizes: tuple[int, ...], steps: int, start: int, seed: int
) -> None:
    parts, processes, share, batches, rest = sizes
    batch_size = parts * processes * share
    windows = batches * batch_size + rest
    for process in range(processes):
        order = WindowOrder(
            windows, batch_size, steps, seed, parts=parts, process=process, processes=processes
        )
        whole = list(order)
        assert len(whole) == len(order)
        order.start = start
        assert list(order) == whole[start * parts * share :]
        assert len(order) == len(whole)


@given(SIZES, st.integers(0, 2**31))
def test_a_batch_is_the_same_for_any_number_of_processes(sizes: tuple[int, ...], seed: int) -> None:
    parts, processes, share, batches, rest = sizes
    batch_size = parts * processes * share
    windows, steps = batches * batch_size + rest, 2 * batches + 1
    alone = iter(WindowOrder(windows, batch_size, steps, seed))
    shares = [
        iter(
            WindowOrder(
                windows, batch_size, steps, seed, parts=parts, process=p, processes=processes
            )
        )
        for p in range(processes)
    ]
    for _ in range(steps):
        together = [list(islice(share_, parts * share)) for share_ in shares]
        # Each process has its piece of every part, in the order of the parts.
        batch = [
            index
            for part in range(parts)
            for mine in together
            for index in mine[part * share : (part + 1) * share]
        ]
        assert batch == list(islice(alone, batch_size))


def test_every_epoch_is_another_permutation() -> None:
    order = list(WindowOrder(windows=12, batch_size=4, steps=9, seed=3))
    epochs = [order[start : start + 12] for start in (0, 12, 24)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_another_seed_is_another_order_in_every_epoch() -> None:
    orders = [list(WindowOrder(50, 50, 2, seed)) for seed in (1, 2)]
    epochs = [tuple(order[start : start + 50]) for order in orders for start in (0, 50)]
    assert len(set(epochs)) == 4


def test_what_fills_no_batch_is_left_out_once_an_epoch() -> None:
    order = list(WindowOrder(windows=11, batch_size=4, steps=4, seed=0))
    assert len(set(order[:8])) == len(set(order[8:])) == 8


def test_fewer_windows_than_a_batch() -> None:
    with pytest.raises(DataError, match="3 training windows, fewer than one batch of 4"):
        WindowOrder(3, 4, 10, 0)
