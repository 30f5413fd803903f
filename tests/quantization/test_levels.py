"""Tables of levels that are not evenly spaced."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bkcore.quantization import levels
from bkcore.quantization.levels import LevelTable
from bkcore.quantization.observers import HistogramObserver
from bkcore.quantization.quantizers import GroupWiseQuantizer


def fitted(values: Tensor, bits: int, norm: int = 1, scale: float = 1.0) -> LevelTable:
    observer = HistogramObserver(1)
    observer.observe(values[:, None], torch.zeros(1, dtype=torch.int64))
    table = LevelTable(bits)
    table.fit(observer, torch.tensor([scale]), torch.tensor([0]), norm)
    return table


def quantizer(bits: int, channels: int = 6, group_size: int = 4) -> GroupWiseQuantizer:
    made = GroupWiseQuantizer(
        channels, group_size, bits, symmetric=False, learnable=True, nonuniform=True
    )
    made.calibrate(torch.randn(400, channels))
    return made


@pytest.mark.parametrize("bits", [4, 8])
def test_even_values_get_even_levels(bits):
    """Of values spread evenly over a range, the k-th level is at (k + 1/2) / 2^bits of it."""
    table = fitted(torch.linspace(-1, 1, 200_001), bits)
    even = (torch.arange(2**bits) + 0.5) * (2 / 2**bits) - 1
    # Steps and the first level are stored with 8 significant bits; a histogram has 2,048 bins.
    tolerance = (2 + 1) * 2**-9 + 2 / 2048
    torch.testing.assert_close(table.values.detach(), even, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("norm", "power"), [(1, 1 / 2), (2, 1 / 3)])
def test_normal_values_get_levels_of_the_best_density(norm, power):
    """A normal density to the power a is normal again, with a deviation of a^(-1/2)."""
    table = fitted(torch.randn(400_000), 8, norm, scale=0.05)
    middle = 0.05 * table.values.detach()[24:232].double()
    share = (torch.arange(24, 232).double() + 0.5) / 256
    wanted = torch.special.ndtri(share) / power**0.5
    torch.testing.assert_close(middle, wanted, rtol=0.03, atol=0.03)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    bits=st.sampled_from([4, 8]),
    scale=st.floats(-30, 30),
    kind=st.sampled_from(["normal", "one", "two", "heavy"]),
)
def test_levels_ascend_whatever_was_seen(seed, bits, scale, kind):
    torch.manual_seed(seed)
    values = {
        "normal": torch.randn(50),
        "one": torch.full((3,), 1.7),
        "two": torch.tensor([-1.0, 5.0]),
        "heavy": torch.randn(50).exp() ** 4,
    }[kind] * 2.0**scale
    made = GroupWiseQuantizer(1, 1, bits, symmetric=False, learnable=True, nonuniform=True)
    made.calibrate(values[:, None])
    table = made.table
    assert table is not None
    assert (table.values.diff() > 0).all()
    x = values[:, None]
    assert torch.equal(made.dequantize(made.quantize(x)), made.fake_quantize(x))
    with torch.no_grad():
        table.log_steps.add_(torch.randn_like(table.log_steps) * 1e6)
        table.first_level.mul_(-1e9)
    assert (table.values.diff() > 0).all()


@given(st.lists(st.integers(1, 9), min_size=15, max_size=15), st.floats(-200, 200))
def test_the_nearest_level_halfway_the_lower(steps, place):
    """Among whole numbers, whose halves are exact, by exact distances: float64 rounds ties."""
    values = torch.tensor([-60, *steps]).cumsum(0).float()
    halves = values[:-1] + values.diff() / 2
    places = torch.cat((values, halves, torch.tensor([place, -1e9, 1e9])))
    for found, x in zip(levels.nearest(places, values).tolist(), places.tolist(), strict=True):
        distances = [abs(Fraction(x) - Fraction(level)) for level in values.tolist()]
        assert found == distances.index(min(distances))


@pytest.mark.parametrize("bits", [4, 8])
def test_frozen_saved_and_loaded_the_values_stay(bits):
    made, x = quantizer(bits), torch.randn(50, 6)
    x[0, 0] = torch.nan
    before = made.fake_quantize(x).detach()
    fresh = quantizer(bits)
    fresh.load_state_dict(made.state_dict())
    assert torch.equal(fresh.fake_quantize(x)[1:], before[1:])
    made.freeze()
    assert not list(made.parameters())
    assert torch.equal(made.fake_quantize(x)[1:], before[1:])
    assert before[0, 0].isnan()
    assert made.fake_quantize(x)[0, 0].isnan()
    fresh = quantizer(bits)
    fresh.load_state_dict(made.state_dict())
    assert torch.equal(fresh.half().fake_quantize(x)[1:], before[1:])
    assert fresh.table is not None
    assert fresh.table.stored_levels.dtype == torch.bfloat16
    assert made.storage_bytes == 2 * 3 + {4: 32, 8: 48}[bits]


@pytest.mark.parametrize("bits", [4, 8])
def test_gradients(bits):
    """Of levels and scale by what the output is made of; of x straight through, 0 beyond."""
    x = torch.tensor([-50.0, -0.4, 0.0, 0.3, 90.0], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    zero, table = torch.tensor(1), LevelTable(bits)
    values = torch.linspace(-4, 5, 2**bits, requires_grad=True)
    assert table.learnable
    out = levels.fake_quantize(x, scale, zero, values)
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    (out * weight).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, weight * torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0]))
    index = levels.nearest(x / scale + zero, values)
    expected = torch.zeros(2**bits).index_add(0, index, weight * 0.5)
    torch.testing.assert_close(values.grad, expected)
    moved = values[index] - zero - torch.where(x.abs() < 10, x / scale, 0)
    torch.testing.assert_close(scale.grad, (weight * moved).sum().detach())


@pytest.mark.parametrize("bits", [4, 8])
def test_they_beat_even_ones(bits):
    x = torch.randn(4000, 6)
    errors = {}
    for nonuniform in (False, True):
        made = GroupWiseQuantizer(6, 6, bits, learnable=True, nonuniform=nonuniform)
        made.calibrate(torch.randn(4000, 6))
        errors[nonuniform] = float((made.fake_quantize(x) - x).detach().abs().mean())
    assert errors[True] < {4: 0.95, 8: 0.8}[bits] * errors[False]


def test_values_whose_errors_cost_next_to_nothing_count_alike():
    x = torch.randn(200, 3)
    tables = []
    for weight in (None, torch.full_like(x, 1e-6)):
        made = GroupWiseQuantizer(3, 3, 4, learnable=True, nonuniform=True, observer="minmax")
        made.start_calibration()
        made.observe(x, weight)
        made.end_calibration()
        assert made.table is not None
        tables.append(made.table.values)
    assert torch.equal(*tables)


@pytest.mark.parametrize("bits", [4, 8])
def test_levels_may_be_chosen_by_the_calibration_alone(bits):
    x = torch.randn(400, 3)
    learned, stored = (
        GroupWiseQuantizer(3, 3, bits, learnable=learnable, nonuniform=True)
        for learnable in (True, False)
    )
    for quantizer in (learned, stored):
        quantizer.calibrate(x)
    assert not list(stored.parameters())
    learned.freeze()
    assert learned.table is not None
    assert stored.table is not None
    assert torch.equal(learned.table.values, stored.table.values)
    assert torch.equal(learned.fake_quantize(x), stored.fake_quantize(x))


def test_a_table_of_inference_mode_is_worked_out_again_when_it_is_loaded():
    x = torch.randn(400, 3)
    with torch.inference_mode():
        one, other = (GroupWiseQuantizer(3, 3, 4, nonuniform=True) for _ in range(2))
        for quantizer, data in ((one, x), (other, x**3)):
            quantizer.calibrate(data)
            quantizer.fake_quantize(x)
        one.load_state_dict(other.state_dict())
        assert one.table is not None
        assert other.table is not None
        assert torch.equal(one.table.values, other.table.values)
        assert torch.equal(one.fake_quantize(x), other.fake_quantize(x))
