"""Products with a weight in codes: every instruction set against an integer oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bkcore.errors import DTypeError, InputError, ShapeError
from bkcore.kernels import product, use_backend
from bkcore.kernels.backends.cpu import native
from bkcore.kernels.backends.reference.codes import quantize_rows
from bkcore.kernels.int4_levels import INT4_LEVELS
from bkcore.quantization.packing import pack_int4

ISAS = native.supported_isas()


def oracle(x: Tensor, weight: Tensor, scales: Tensor, group_size: int) -> np.ndarray:
    """From the codes of x and of the weight: int64 sums, then float32 in the order of groups."""
    codes, row_scale = quantize_rows(x)
    q, w = codes.numpy().astype(np.int64), weight.numpy().astype(np.int64)
    total = np.zeros((len(x), len(weight)), dtype=np.float32)
    for group in range(scales.shape[1]):
        columns = slice(group * group_size, (group + 1) * group_size)
        sums = (q[:, columns] @ w[:, columns].T).astype(np.float32)
        total = total + sums * scales.float().numpy()[:, group]
    return total * row_scale.numpy()


def problem(rows, inputs, outputs, group_size, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (outputs, inputs), generator=generator, dtype=torch.int8)
    groups = -(-inputs // group_size)
    scales = torch.rand(outputs, groups, generator=generator).add(0.01).bfloat16()
    x = torch.randn(rows, inputs, generator=generator) * torch.logspace(-8, 8, rows)[:, None]
    return x, codes, scales


@settings(max_examples=150)
@given(
    rows=st.integers(0, 20),
    inputs=st.integers(1, 300),
    outputs=st.integers(1, 140),
    group_size=st.integers(1, 310),
    bits=st.sampled_from([4, 8]),
    seed=st.integers(0, 2**16),
)
@example(rows=1, inputs=1, outputs=1, group_size=1, bits=8, seed=0)
@example(rows=4, inputs=257, outputs=65, group_size=128, bits=4, seed=0)
@example(rows=2, inputs=131, outputs=17, group_size=65, bits=4, seed=0)  # groups begin inside bytes
@example(rows=385, inputs=70, outputs=64, group_size=64, bits=8, seed=0)  # two chunks of rows
def test_every_instruction_set_equals_the_oracle(rows, inputs, outputs, group_size, bits, seed):
    x, codes, scales = problem(rows, inputs, outputs, group_size, bits, seed)
    weight = codes if bits == 8 else pack_int4(codes)
    stands_for = codes if bits == 8 else torch.tensor(INT4_LEVELS)[codes.long() + 8]
    expected = oracle(x, stands_for, scales, group_size)
    for isa in ISAS:
        with native.use_isa(isa):
            assert np.array_equal(product(x, weight, scales, group_size, bits).numpy(), expected)
    with use_backend("reference"):
        assert np.array_equal(product(x, weight, scales, group_size, bits).numpy(), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 11])
def test_a_row_does_not_depend_on_the_others_or_on_threads(isa, bits, rows):
    x, codes, scales = problem(800, 300, 150, 128, bits, 0)
    weight = codes if bits == 8 else pack_int4(codes)
    threads = torch.get_num_threads()
    with native.use_isa(isa):
        torch.set_num_threads(1)
        whole = product(x, weight, scales, 128, bits)
        torch.set_num_threads(3)
        try:
            assert torch.equal(product(x, weight, scales, 128, bits), whole)
            part = product(x[390 : 390 + rows], weight, scales, 128, bits)
        finally:
            torch.set_num_threads(threads)
    assert torch.equal(part, whole[390 : 390 + rows])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 9])
def test_the_largest_sums_are_exact(isa, rows):
    """132,104 products of -128 and 127 fill an int32; partial sums are corrected modulo 2^32."""
    inputs = (2**31 - 1) // (128 * 127)
    x = torch.ones(rows, inputs)
    weight = torch.tensor([[-128], [127]], dtype=torch.int8).repeat(1, inputs)
    one = torch.full((2, 1), 127.0).bfloat16()
    with native.use_isa(isa):
        out = product(x, weight, one, inputs, 8)
    sums = np.array([-128 * 127 * inputs, 127 * 127 * inputs]).astype(np.float32)
    expected = sums * np.float32(127) * (np.float32(1) / np.float32(127))
    assert np.array_equal(out.numpy(), np.broadcast_to(expected, (rows, 2)))
    with pytest.raises(InputError, match="overflow"):
        product(torch.ones(1, inputs + 1), weight.new_zeros(2, inputs + 1), one, inputs + 1, 8)


@pytest.mark.parametrize("isa", [*ISAS, "reference"])
@pytest.mark.parametrize("rows", [1, 7])
def test_rows_of_zeros_of_the_smallest_and_of_no_numbers(isa, rows):
    x, codes, scales = problem(4, 40, 33, 16, 4, 0)
    x[0] = 0
    x[1] = 1e-40
    x[2, 5] = torch.nan
    x[3, 5] = -torch.inf
    x = torch.cat((x, x, x))
    weight = pack_int4(codes)
    for first in range(0, len(x), rows):
        part = x[first : first + rows]
        if isa == "reference":
            with use_backend(isa):
                out = product(part, weight, scales, 16, 4)
        else:
            with native.use_isa(isa):
                out = product(part, weight, scales, 16, 4)
        for row, values in enumerate(out, start=first):
            assert values.isnan().all() if row % 4 >= 2 else (values == 0).all()


def test_the_spare_half_of_an_odd_row_is_not_read():
    x, codes, scales = problem(3, 33, 20, 16, 4, 0)
    clean, dirty = pack_int4(codes), pack_int4(codes)
    dirty[:, -1] |= 0xF0
    for isa in ISAS:
        for rows in (x[:1], x.repeat(3, 1)):
            with native.use_isa(isa):
                expected = product(rows, clean, scales, 16, 4)
                assert torch.equal(product(rows, dirty, scales, 16, 4), expected)


def test_tensors_that_do_not_fit_are_refused():
    x, codes, scales = problem(3, 40, 20, 16, 8, 0)
    with pytest.raises(InputError, match="bits must be 4 or 8, not 3"):
        product(x, codes, scales, 16, 3)
    with pytest.raises(DTypeError, match=r"weight must be torch\.uint8 at 4 bits"):
        product(x, codes, scales, 16, 4)
    with pytest.raises(DTypeError, match=r"x must be torch\.float32"):
        product(x.double(), codes, scales, 16, 8)
    with pytest.raises(ShapeError, match=r"weight must be \(20, 39\)"):
        product(x[:, :39], codes, scales, 16, 8)
    with pytest.raises(ShapeError, match=r"scales must be \(20, 4\)"):
        product(x, codes, scales, 10, 8)
    with pytest.raises(ShapeError, match=r"weight must be \(800, 40\).*not \(800,\)"):
        product(x, codes.flatten(), scales, 16, 8)
    with pytest.raises(InputError, match="at least 1 wide"):
        product(x[0, 0], codes, scales, 16, 8)
    with pytest.raises(InputError, match="group_size must be an integer >= 1, not 0"):
        product(x, codes, scales, 0, 8)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rows_have_any_number_of_axes(backend):
    x, codes, scales = problem(6, 40, 20, 16, 8, 0)
    with use_backend(backend):
        whole = product(x, codes, scales, 16, 8)
        assert torch.equal(product(x.view(2, 3, 40), codes, scales, 16, 8), whole.view(2, 3, 20))
        assert torch.equal(product(x[4], codes, scales, 16, 8), whole[4])
        assert product(x.view(2, 3, 40)[:0], codes, scales, 16, 8).shape == (0, 3, 20)


def test_it_compiles_and_has_no_derivative():
    x, codes, scales = problem(3, 40, 20, 16, 8, 0)
    torch.library.opcheck(
        torch.ops.bkcore.product.default,
        (x, codes, scales, 16, 8),
        test_utils=("test_schema", "test_faketensor"),
    )
