"""The sweep between roundings equals rounding, sweeping and rounding whole tensors, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bkcore.errors import DTypeError, InputError, ShapeError
from bkcore.kernels import sweep, sweep_rounded, use_backend
from bkcore.kernels.backends.cpu import native
from bkcore.quantization import affine


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(request.param):
        yield request.param


def problem(
    batch: int,
    sites: int,
    lanes: int,
    *,
    bits: int = 8,
    two_sided: bool = True,
    group_size: int = 64,
    tables: bool = False,
    chains_first: bool = True,
    width: float = 1.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Random potentials and quantizers; `width` shrinks the scales, so that codes saturate."""
    generator = torch.Generator().manual_seed(seed)
    low, high = affine.code_range(bits)
    groups = -(-sites // group_size)
    shape = (batch, lanes, sites) if chains_first else (batch, sites, lanes)
    v = 2 * torch.randn(shape, generator=generator)
    size = torch.tensor([[4.0], [1.0], [1.0]]) * width / high
    levels = (torch.arange(low, high + 1) + 0.4 * torch.rand(3, 2**bits, generator=generator)) * 0.9
    return {
        "v": v.transpose(1, 2) if chains_first else v,
        "energy": torch.randn(lanes, generator=generator),
        "eta": 0.3 + torch.rand(1, lanes, generator=generator),
        "hopping": torch.ones(1, lanes),
        "scale": affine.storable(size * (0.5 + torch.rand(3, groups, generator=generator))),
        "zero": torch.randint(low, high + 1, (3, groups), generator=generator).float() // 2,
        "group_size": group_size,
        "bits": bits,
        "two_sided": two_sided,
        "levels": levels if tables else None,
    }


def rounded(x: Tensor, p: dict[str, Any], part: int) -> Tensor:
    """x (..., N, H) as the quantizer of a part rounds it."""
    groups = torch.arange(x.shape[1]) // p["group_size"]
    scale, zero = p["scale"][part][groups, None], p["zero"][part][groups, None]
    levels = p["levels"]
    if levels is None:
        return affine.fake_quantize(x, scale, zero, p["bits"])
    between = levels[part][:-1] + levels[part].diff() / 2
    level = levels[part][torch.bucketize((x / scale + zero).contiguous(), between)]
    return torch.where(x.isnan(), x, scale * (level - zero))


def expected(p: dict[str, Any]) -> Tensor:
    v = rounded(p["v"], p, 0)
    parts = sweep(v, None, p["energy"], p["eta"], p["hopping"], p["two_sided"])
    return torch.stack([rounded(parts[:, :, c], p, 1 + c) for c in range(2)], 2)


shapes = st.tuples(st.integers(1, 3), st.integers(1, 150), st.integers(1, 70))


@settings(max_examples=40)
@given(shapes, st.sampled_from([4, 8]), st.data())
def test_equals_the_three_steps(
    shape: tuple[int, int, int], bits: int, data: st.DataObject
) -> None:
    p = problem(
        *shape,
        bits=bits,
        two_sided=data.draw(st.booleans()),
        group_size=data.draw(st.integers(1, 160)),
        tables=data.draw(st.booleans()),
        chains_first=data.draw(st.booleans()),
        width=data.draw(st.sampled_from([1.0, 0.2])),
        seed=data.draw(st.integers(0, 99)),
    )
    for isa in native.supported_isas():
        with native.use_isa(isa):
            assert torch.equal(sweep_rounded(**p), expected(p)), isa


@pytest.mark.parametrize("two_sided", [False, True])
def test_few_long_chains_equal_the_three_steps(two_sided: bool) -> None:
    # Blocks round differently in the last bit, which turns one code in some 10^5.
    p = problem(1, 400_000, 3, two_sided=two_sided, group_size=128)
    assert torch.equal(sweep_rounded(**p), expected(p))


@pytest.mark.parametrize("tables", [False, True])
@pytest.mark.parametrize("two_sided", [False, True])
def test_reference_equals_the_three_steps(two_sided: bool, tables: bool) -> None:
    p = problem(2, 9, 5, two_sided=two_sided, tables=tables, group_size=4)
    with use_backend("reference"):
        assert torch.equal(sweep_rounded(**p), expected(p))


@pytest.mark.parametrize("tables", [False, True])
def test_nan_and_infinity(backend: str, tables: bool) -> None:
    p = problem(1, 40, 20, two_sided=False, tables=tables)
    p["v"][0, 25, 3] = torch.nan
    p["v"][0, 30, 7] = torch.inf
    found = sweep_rounded(**p)
    assert torch.equal(found, expected(p)) or torch.equal(found.isnan(), expected(p).isnan())
    assert found[0, 25:, :, 3].isnan().all()
    assert found.isnan().sum() == 2 * 15
    torch.testing.assert_close(found, expected(p), rtol=0, atol=0, equal_nan=True)


def test_layout_of_the_result_is_that_of_v(backend: str) -> None:
    for chains_first in (False, True):
        p = problem(2, 30, 20, chains_first=chains_first)
        plain = sweep(p["v"], None, p["energy"], p["eta"], p["hopping"], True)
        assert sweep_rounded(**p).stride() == plain.stride()


def test_threads_change_no_bit() -> None:
    p = problem(1, 600, 300)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = sweep_rounded(**p)
        torch.set_num_threads(2)
        assert torch.equal(sweep_rounded(**p), one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"bits": 3}, InputError, "4 or 8"),
        ({"scale": torch.ones(2, 1)}, ShapeError, r"scale must be \(3, 1\) for 5 sites"),
        ({"group_size": 2}, ShapeError, r"scale must be \(3, 3\)"),
        ({"group_size": 0}, InputError, ">= 1"),
        ({"scale": torch.ones(3, 1).double()}, DTypeError, "float32"),
        ({"scale": torch.zeros(3, 1)}, InputError, "positive"),
        ({"scale": torch.full((3, 1), torch.nan)}, InputError, "positive"),
        ({"levels": torch.zeros(3, 256)}, InputError, "ascending"),
        ({"levels": torch.zeros(3, 16)}, ShapeError, "a level for every code"),
        ({"v": torch.zeros(1, 5, 4).double()}, DTypeError, "v"),
    ],
)
def test_what_does_not_fit_is_named(
    change: dict[str, object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        sweep_rounded(**{**problem(1, 5, 4), **change})


def test_opcheck() -> None:
    p = problem(2, 9, 5)
    args = (
        "v",
        "energy",
        "eta",
        "hopping",
        "scale",
        "zero",
        "levels",
        "group_size",
        "bits",
        "two_sided",
    )
    torch.library.opcheck(torch.ops.bkcore.sweep_rounded.default, tuple(p[name] for name in args))
