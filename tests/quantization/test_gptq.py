"""INT4 weights that make up for their rounding errors, and the moments that say how."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bkcore.errors import CalibrationError
from bkcore.kernels.int4_levels import INT4_LEVELS, nearest_codes
from bkcore.quantization import affine
from bkcore.quantization.gptq import InputMoments, gptq, pack_weight_by_moments
from bkcore.quantization.weights import (
    each_column,
    pack_weight,
    search_weight_scales,
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def correlated(tokens: int, columns: int, rank: int, seed: int) -> Tensor:
    """Activations (T, K) that mostly lie in a space of few dimensions, some columns larger."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(tokens, rank, generator=generator)
    mixed = factors @ torch.randn(rank, columns, generator=generator)
    noise = 0.3 * torch.randn(tokens, columns, generator=generator)
    return (mixed + noise) * torch.rand(columns, generator=generator).exp()


def moments_of(x: Tensor) -> Tensor:
    return x.double().t() @ x.double()


def output_error(x: Tensor, weight: Tensor, codes: Tensor, scales: Tensor, size: int) -> float:
    values = codes * each_column(scales, size, weight.shape[1])
    return float((x.double() @ (weight - values).double().t()).norm())


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(4, 20),
    columns=st.integers(16, 70),
    group_size=st.integers(8, 80),
    rank=st.integers(1, 8),
    per_tensor=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_outputs_never_change_more_than_by_plain_rounding(
    rows, columns, group_size, rank, per_tensor, seed
):
    x = correlated(300, columns, rank, seed)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 1))
    codes, scales = gptq(weight, moments_of(x), 4, group_size, per_tensor=per_tensor)
    plain = pack_weight(weight, 4, group_size, per_tensor)
    error = output_error(x, weight, codes, scales, group_size)
    # Rows that plain rounding serves better keep it, and all of a few may.
    assert error <= output_error(x, weight, plain.codes(), plain.scales(), group_size)

    assert codes.dtype == torch.int8
    assert codes.shape == weight.shape
    assert torch.isin(codes, torch.tensor(INT4_LEVELS)).all()
    assert scales.shape == plain.scales().shape
    assert torch.equal(affine.storable(scales), scales)
    assert not per_tensor or len(scales.unique()) == 1
    again = gptq(weight, moments_of(x), 4, group_size, per_tensor=per_tensor)
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], scales)


def test_the_gain_on_correlated_activations_is_large():
    x, weight = correlated(500, 64, 4, 0), torch.randn(32, 64)
    plain = pack_weight(weight, 4, 32)
    codes, scales = gptq(weight, moments_of(x), 4, 32)
    error = output_error(x, weight, codes, scales, 32)
    assert error < 0.5 * output_error(x, weight, plain.codes(), plain.scales(), 32)


@pytest.mark.parametrize("seed", range(5))
def test_no_row_is_worse_than_by_plain_rounding(seed):
    """Two columns and one token, where making up for an error can do harm: it is not taken."""
    x = torch.randn(1, 3, generator=torch.Generator().manual_seed(seed))
    weight = torch.randn(200, 3, generator=torch.Generator().manual_seed(seed + 10))
    codes, scales = gptq(weight, moments_of(x), 4, 3)
    plain = pack_weight(weight, 4, 3)
    for row in range(len(weight)):
        one = slice(row, row + 1)
        error = output_error(x, weight[one], codes[one], scales[one], 3)
        before = output_error(x, weight[one], plain.codes()[one], plain.scales()[one], 3)
        assert error <= before * (1 + 1e-12)


@pytest.mark.parametrize("group_size", [8, 12, 40])
def test_columns_without_correlation_are_rounded_each_by_itself(group_size):
    weight = torch.randn(9, 40)
    plain = pack_weight(weight, 4, group_size)
    for scale in (1.0, 1e-20, 1e20):
        codes, scales = gptq(weight, scale * torch.eye(40, dtype=torch.float64), 4, group_size)
        assert torch.equal(codes, plain.codes())
        assert torch.equal(scales, plain.scales())
    # With moments that differ, the scales are those that weigh the columns by them.
    diagonal = torch.rand(40).double() + 0.1
    codes, scales = gptq(weight, diagonal.diag(), 4, group_size)
    importance = (diagonal / diagonal.mean()).float()
    expected = search_weight_scales(weight, 4, group_size, importance=importance)
    assert torch.equal(scales, expected)
    ratio = weight / each_column(scales, group_size, 40)
    assert torch.equal(codes.float(), nearest_codes(ratio, 4))


@pytest.mark.parametrize("damping", [1e-4, 0.01, 1.0])
def test_what_is_left_is_the_optimum_given_the_codes_before(damping):
    """Column by column with a linear solve for all that are left, the definition of the method."""
    columns = 12
    m = moments_of(correlated(100, columns, 3, 0)).numpy()
    weight = torch.randn(7, columns)
    codes, scales = gptq(weight, torch.from_numpy(m), 4, columns, per_tensor=True, damping=damping)

    def nearest(ratio):
        return np.array(INT4_LEVELS)[np.abs(ratio[:, None] - INT4_LEVELS).argmin(1)]

    damped = m + damping * np.trace(m) / columns * np.eye(columns)
    step = float(scales[0, 0])
    for row in range(len(weight)):
        w = weight[row].double().numpy()
        found = np.zeros(columns)
        for j in range(columns):
            error = (w - found)[:j]
            change = np.linalg.solve(damped[j:, j:], damped[j:, :j] @ error) if j else 0.0
            found[j] = step * nearest((w[j:] + change)[:1] / step)[0]
        plain = step * nearest(w / step)
        best = min(found, plain, key=lambda values: (w - values) @ m @ (w - values))
        assert np.array_equal(codes[row].numpy(), np.round(best / step))


def test_without_tokens_a_weight_is_rounded_plainly_and_says_so():
    weight = torch.randn(5, 20)
    packed = pack_weight_by_moments(weight, InputMoments(20), 4, 8)
    plain = pack_weight(weight, 4, 8)
    assert torch.equal(packed.packed, plain.packed)
    assert torch.equal(packed.stored_scales, plain.stored_scales)
    assert packed.tokens_seen == plain.tokens_seen == 0
    moments = InputMoments(20)
    moments.observe(torch.randn(30, 20))
    assert pack_weight_by_moments(weight, moments, 4, 8).tokens_seen == 30


@pytest.mark.parametrize("dead", [0, 7, 19])
def test_an_input_that_is_always_zero(dead):
    x = correlated(100, 20, 3, 0)
    x[:, dead] = 0
    weight = torch.randn(5, 20)
    codes, scales = gptq(weight, moments_of(x), 4, 8)
    assert torch.isfinite(scales).all()
    error = output_error(x, weight, codes, scales, 8)
    plain = pack_weight(weight, 4, 8)
    assert error < output_error(x, weight, plain.codes(), plain.scales(), 8)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused(bad):
    weight, moments = torch.randn(3, 4), torch.eye(4, dtype=torch.float64)
    with pytest.raises(CalibrationError, match="second moments"):
        gptq(weight, torch.where(moments > 0, bad, moments), 4, 4)
    weight[0, 0] = bad
    with pytest.raises(CalibrationError, match="a weight holds NaN or infinity"):
        gptq(weight, moments, 4, 4)
    watched = InputMoments(4)
    with pytest.raises(CalibrationError, match="inputs of a linear layer"):
        watched.observe(weight)
    assert not watched.second.any()
    assert watched.tokens == 0


# ---- moments -------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 60), max_size=5),
    spread=st.floats(0, 2),
    seed=st.integers(0, 2**16),
)
def test_moments_are_the_same_in_any_order_and_any_batches(cuts, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** (spread * torch.rand(60, 1, generator=generator))
    x = sizes * torch.randn(60, 9, generator=generator)
    whole, parts = InputMoments(9), InputMoments(9)
    whole.observe(x)
    shuffled = x[torch.randperm(60, generator=generator)]
    for part in shuffled.tensor_split(sorted(cuts)):
        parts.observe(part)
    assert torch.equal(whole.second, parts.second)
    assert whole.tokens == parts.tokens == 60


def test_moments_are_those_of_the_inputs_to_eight_bits():
    x = torch.randn(50, 9) * 10 ** torch.empty(50, 1).uniform_(-6, 6)
    moments = InputMoments(9)
    moments.observe(x.view(5, 10, 9))
    exact = moments_of(x)
    # Each value is off by half a step of its token, 2^-7 of the token's largest value at most.
    bound = 2 * 2.0**-7 * x.double().abs().amax(1).square().sum()
    assert (moments.second - exact).abs().max() <= bound


def test_padding_does_not_count_and_memory_does_not_grow():
    layer, moments = nn.Linear(9, 4, bias=False), InputMoments(9)
    x = torch.randn(10, 9)
    x[6:] = 0
    moments.watch(layer)
    for _ in range(3):
        layer(x)
    assert moments.tokens == 18
    assert sum(t.numel() for t in moments.buffers()) == 81 + 1
    moments.unwatch()
    layer(x)
    assert moments.tokens == 18


def test_few_rows_wait_and_all_of_them_count():
    layer, moments, whole = nn.Linear(9, 4, bias=False), InputMoments(9), InputMoments(9)
    parts = [torch.randn(rows, 9) for rows in (0, 1, 100, 0, 255, 0, 300, 7)]
    moments.watch(layer)
    for part in parts:
        layer(part)
        assert sum(map(len, moments._waiting)) < 256
        assert all(map(len, moments._waiting))
    assert moments._waiting
    moments.unwatch()
    whole.observe(torch.cat(parts))
    assert torch.equal(moments.second, whole.second)
    assert moments.tokens == whole.tokens == 663


def test_rows_that_wait_are_added_before_the_moments_move():
    layer, moments = nn.Linear(9, 4, bias=False), InputMoments(9)
    moments.watch(layer)
    layer(torch.ones(3, 9))
    moments.to("cpu")
    assert not moments._waiting
    assert moments.second[0, 0] == 3


def test_moments_stay_float64_when_a_module_is_cast():
    moments = InputMoments(3)
    moments.observe(torch.randn(5, 3))
    before = moments.second.clone()
    assert torch.equal(moments.half().second, before)
