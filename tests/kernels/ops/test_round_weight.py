"""Rounding of a weight to codes and values, against plain PyTorch."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bkcore.errors import DTypeError, InputError, ShapeError
from bkcore.kernels import round_weight, use_backend
from bkcore.kernels.backends.cpu import native
from bkcore.kernels.int4_levels import INT4_LEVELS
from bkcore.quantization import affine

ISAS = native.supported_isas()


def problem(rows, columns, group_size, seed):
    generator = torch.Generator().manual_seed(seed)
    scale = affine.storable(0.1 + torch.rand(rows, -(-columns // group_size), generator=generator))
    each = scale.repeat_interleave(group_size, 1)[:, :columns]
    weight = torch.randn(rows, columns, generator=generator) * each * 100
    return weight, scale, each


def oracle(weight, each, bits, grad):
    """Codes, and the gradients by the weight and by the scale of each number, in float64."""
    if bits == 8:
        codes = affine.quantize(weight, each, 0, bits)
        wide: list[Any] = [weight.double().requires_grad_(), each.double().requires_grad_()]
        return codes, *torch.autograd.grad(
            affine.fake_quantize(wide[0], wide[1], 0, bits), wide, grad
        )
    ratio, levels = weight / each, torch.tensor(INT4_LEVELS).double()
    # Of two levels that are equally near the first, which is the lower one.
    codes = levels[(ratio.double()[..., None] - levels).abs().argmin(-1)]
    inside = ratio.abs() <= 127
    return codes.float(), grad * inside, grad * (codes - inside * weight.double() / each)


def on(name):
    """The reference, or an instruction set of the CPU backend."""
    backend = use_backend("reference" if name == "reference" else "cpu")
    return backend, native.use_isa(name) if name in ISAS else nullcontext()


@settings(max_examples=60)
@given(
    rows=st.integers(0, 70),
    columns=st.integers(1, 70),
    group_size=st.integers(1, 80),
    bits=st.sampled_from([4, 8]),
    seed=st.integers(0, 2**16),
)
def test_it_is_the_rounding_of_each_group(rows, columns, group_size, bits, seed):
    weight, scale, each = problem(rows, columns, group_size, seed)
    grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    # By scale in float64, where only the rounding of the result to float32 is left to differ.
    codes, by_weight, by_each = oracle(weight, each, bits, grad.double())
    leaves: list[Any] = [weight.requires_grad_(), scale.requires_grad_()]
    padded = torch.nn.functional.pad(by_each, (0, -columns % group_size))
    by_scale = padded.unflatten(1, (-1, group_size)).sum(-1)
    for name in ("reference", *ISAS):
        backend, isa = on(name)
        with backend, isa:
            found, values = round_weight(leaves[0], leaves[1], group_size, bits)
            got = torch.autograd.grad(values, leaves, grad)
        assert found.dtype == torch.int8
        assert torch.equal(found.float(), codes)
        assert torch.equal(values, affine.dequantize(codes, each, 0))
        # A quotient within rounding of a bound may fall on its other side in float64.
        moved = got[0] != by_weight.float()
        assert moved.sum() <= moved.numel() // 200
        if not moved.any():
            size = 2.0**8 * min(group_size, columns) ** 0.5
            assert (got[1] - by_scale).abs().max() <= 4e-6 * size if rows else not got[1].numel()


@pytest.mark.parametrize(
    ("bits", "ties", "codes_of_ties", "lowest"),
    [(8, [0.5, 1.5, -2.5], [0, 2, -2], -128), (4, [6.0, 6.01, -5.5], [0, 12, -11], -127)],
)
@pytest.mark.parametrize("name", ["reference", *ISAS])
def test_extremes(name, bits, ties, codes_of_ties, lowest):
    backend, isa = on(name)
    scale = torch.tensor([[1.0], [2.0**-126]])
    weight = torch.tensor([[torch.nan, torch.inf, -torch.inf, 1e38, *ties]] * 2)
    weight.requires_grad_()
    with backend, isa:
        codes, values = round_weight(weight, scale, 7, bits)
    # Ties to even at 8 bits, to the lower level at 4.
    assert codes[0, 1:].tolist() == [127, lowest, 127, *codes_of_ties]
    assert codes[1, 1:].tolist() == [127, lowest, 127, 127, 127, lowest]
    assert values[:, 0].isnan().all()
    assert torch.equal(values[:, 1:], codes[:, 1:] * scale)
    (grad,) = torch.autograd.grad(values, weight, torch.ones_like(values))
    assert grad[0, 1:].tolist() == [0, 0, 0, 1, 1, 1]
    assert not grad[1, 1:].any()


@pytest.mark.parametrize("name", ["reference", *ISAS])
def test_an_infinite_ratio_leaves_the_gradient_of_the_scale_finite(name):
    backend, isa = on(name)
    scale = torch.full((1, 1), 2.0**-126, requires_grad=True)
    with backend, isa:
        _, values = round_weight(torch.tensor([[1e38, -1e38]]), scale, 2, 8)
        (grad,) = torch.autograd.grad(values.sum(), scale)
    assert float(grad) == 127 - 128


def test_it_does_not_depend_on_threads():
    weight, scale, _ = problem(600, 100, 33, 0)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            leaves: list[Any] = [weight.clone().requires_grad_(), scale.clone().requires_grad_()]
            codes, values = round_weight(leaves[0], leaves[1], 33, 4)
            results.append((codes, values, *torch.autograd.grad(values, leaves, torch.cos(weight))))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_it_has_a_fake_form():
    weight, scale, _ = problem(5, 40, 16, 0)
    utils = ("test_schema", "test_faketensor", "test_autograd_registration")
    ops = torch.ops.bkcore
    torch.library.opcheck(ops.round_weight.default, (weight, scale, 16, 4), test_utils=utils)
    torch.library.opcheck(
        ops.round_weight_backward.default, (weight, weight, scale, 16, 4), test_utils=utils
    )


def test_what_does_not_fit_is_refused():
    weight, scale, _ = problem(5, 40, 16, 0)
    with pytest.raises(InputError, match="bits must be 4 or 8, not 2"):
        round_weight(weight, scale, 16, 2)
    with pytest.raises(InputError, match="group_size must be an integer >= 1, not 0"):
        round_weight(weight, scale, 0, 4)
    with pytest.raises(ShapeError, match=r"weight must be \(O, K\), not \(40,\)"):
        round_weight(weight[0], scale, 16, 4)
    with pytest.raises(
        ShapeError, match=r"scale must be \(5, 2\) for a weight \(5, 40\) in groups"
    ):
        round_weight(weight, scale, 32, 4)
    with pytest.raises(
        DTypeError, match=r"weight must be torch.float32 for a weight .* not torch.float64"
    ):
        round_weight(weight.double(), scale, 16, 4)
