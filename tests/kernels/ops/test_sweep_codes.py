"""The sweep on integer codes equals decoding, the float sweep and encoding, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bkcore.errors import DTypeError, InputError, ShapeError
from bkcore.kernels import sweep, sweep_codes, use_backend
from bkcore.kernels.backends.cpu import native
from bkcore.quantization import affine
from bkcore.quantization.packing import pack_int4, unpack_int4

FORMS = ["g", "psi", "two_sided"]


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(request.param):
        yield request.param


def problem(
    form: str,
    bits: int,
    shape: tuple[int, int, int],
    *,
    rows: int = 1,
    width: float = 1.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Random codes and quantizers; `width` shrinks the output scales, so that codes saturate."""
    generator = torch.Generator().manual_seed(seed)
    lanes = shape[2]
    low, high = affine.code_range(bits)
    inputs, outputs = (2, 4) if form == "psi" else (1, 2)

    def codes(*size: int) -> Tensor:
        return torch.randint(low, high + 1, size, generator=generator, dtype=torch.int8)

    def scales(parts: int, size: float) -> Tensor:
        random = torch.rand(parts, rows, lanes, generator=generator)
        return affine.storable(size * (0.5 + random) / high)

    return {
        "v": codes(*shape),
        "source": codes(*shape) if form == "psi" else None,
        "energy": torch.randn(lanes, generator=generator),
        "eta": 0.3 + torch.rand(1, lanes, generator=generator),
        "hopping": torch.ones(1, lanes),
        "in_scale": scales(inputs, 3.0),
        "in_zero": codes(inputs, rows, lanes),
        "out_scale": scales(outputs, width),
        "out_zero": codes(outputs, rows, lanes),
        "bits": bits,
        "two_sided": form == "two_sided",
    }


def call(p: dict[str, Any]) -> Tensor:
    """The operator, on packed codes where they are packed, with its codes unpacked."""
    if p["bits"] == 8:
        return sweep_codes(**p)
    packed = {k: pack_int4(p[k]) for k in ("v", "source") if p[k] is not None}
    return unpack_int4(sweep_codes(**{**p, **packed}), p["v"].shape[2])


def expected(p: dict[str, Any]) -> Tensor:
    decoded: list[Any] = [
        None if p[k] is None else affine.dequantize(p[k].float(), p["in_scale"][n], p["in_zero"][n])
        for n, k in enumerate(("v", "source"))
    ]
    parts = sweep(decoded[0], decoded[1], p["energy"], p["eta"], p["hopping"], p["two_sided"])
    scale, zero = p["out_scale"].transpose(0, 1), p["out_zero"].transpose(0, 1)
    return affine.quantize(parts, scale, zero, p["bits"]).to(torch.int8)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("per_site", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 1), (1, 1, 16), (3, 21, 45), (1, 40, 300), (2, 9, 1100)])
def test_equals_decode_sweep_encode(backend, form, bits, per_site, shape):
    p = problem(form, bits, shape, rows=shape[1] if per_site else 1)
    assert torch.equal(call(p), expected(p))


@settings(max_examples=40)
@given(
    st.sampled_from(FORMS),
    st.sampled_from([4, 8]),
    st.floats(-38, 6),
    st.integers(1, 40),
    st.integers(1, 70),
    st.integers(0, 999),
)
def test_saturation_and_extreme_scales(form, bits, log_width, sites, lanes, seed):
    p = problem(form, bits, (1, sites, lanes), width=10**log_width, seed=seed)
    for isa in native.supported_isas():
        with native.use_isa(isa):
            assert torch.equal(call(p), expected(p))


def levels(parts: int, bits: int, seed: int) -> Tensor:
    """Ascending levels in the range of the codes, on a grid on which their bounds are exact."""
    low, high = affine.code_range(bits)
    random = torch.rand(parts, 2**bits, generator=torch.Generator().manual_seed(seed))
    sums = low + (high - low) * (0.01 + random).cumsum(1) / (2**bits * 0.51)
    return (sums * 256).round() / 256


def expected_with_levels(p: dict[str, Any]) -> Tensor:
    """By definition: every level is tried."""
    low, _ = affine.code_range(p["bits"])
    decoded: list[Any] = [
        None
        if p[k] is None
        else p["in_scale"][n] * (p["in_levels"][n][p[k].long() - low] - p["in_zero"][n])
        for n, k in enumerate(("v", "source"))
    ]
    parts = sweep(decoded[0], decoded[1], p["energy"], p["eta"], p["hopping"], p["two_sided"])
    ratio = parts / p["out_scale"].transpose(0, 1) + p["out_zero"].transpose(0, 1)
    distance = (ratio.double().unsqueeze(-1) - p["out_levels"][:, None]).abs()
    return (distance.argmin(-1) + low).to(torch.int8)


@settings(max_examples=30)
@given(st.sampled_from(FORMS), st.sampled_from([4, 8]), st.integers(1, 70), st.integers(0, 999))
def test_levels_are_looked_up_and_the_nearest_is_found(form, bits, lanes, seed):
    p = problem(form, bits, (2, 7, lanes), seed=seed)
    p["in_levels"] = levels(len(p["in_scale"]), bits, seed)
    p["out_levels"] = levels(len(p["out_scale"]), bits, seed + 1)
    # Backends round the sweep differently in its last bits, which may be what decides.
    with use_backend("reference"):
        assert torch.equal(call(p), expected_with_levels(p))
    for isa in native.supported_isas():
        with native.use_isa(isa):
            assert torch.equal(call(p), expected_with_levels(p))


@pytest.mark.parametrize("bits", [4, 8])
def test_uniform_levels_change_no_code(backend, bits):
    p = problem("psi", bits, (2, 9, 37))
    low, high = affine.code_range(bits)
    uniform = torch.arange(low, high + 1).float()
    table = {"in_levels": uniform.expand(2, -1), "out_levels": uniform.expand(4, -1)}
    with_table, without = call({**p, **table}), call(p)
    # Halfway between two codes the tables give the lower and rounding gives the even one.
    assert (with_table != without).float().mean() < 1e-3
    assert ((with_table.int() - without.int()).abs() <= 1).all()


def test_nan_takes_the_lowest_level(backend):
    p = problem("psi", 8, (1, 4, 20))
    p["out_levels"] = levels(4, 8, 0)
    p["eta"][0, 3] = torch.nan
    assert (call(p)[..., 3] == -128).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("form", FORMS)
def test_thread_count_changes_no_code(form, bits):
    p = problem(form, bits, (3, 50, 130))
    before = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(call(p))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("bits", [4, 8])
def test_quantizers_shared_by_lanes_or_sites(bits):
    p = problem("two_sided", bits, (2, 12, 33), rows=12)
    for name in ("in_scale", "in_zero", "out_scale", "out_zero"):
        p[name] = p[name][..., :1].expand(-1, -1, 33)
    assert torch.equal(call(p), expected(p))


def test_nan_becomes_the_lowest_code(backend):
    p = problem("psi", 8, (1, 4, 20))
    p["eta"][0, 3] = torch.nan
    codes = call(p)
    assert (codes[..., 3] == -128).all()
    assert not (codes == -128).all()


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(backend, form):
    p = problem(form, 8, (2, 5, 18))
    p["in_levels"], p["out_levels"] = levels(len(p["in_scale"]), 8, 0), None
    order = [argument.name for argument in torch.ops.bkcore.sweep_codes.default._schema.arguments]
    torch.library.opcheck(torch.ops.bkcore.sweep_codes.default, tuple(p[name] for name in order))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"bits": 2}, InputError, "4 or 8"),
        ({"bits": 4}, ShapeError, "4-bit codes"),
        ({"v": torch.zeros(2, 5, 18)}, DTypeError, "int8"),
        ({"source": torch.zeros(2, 5, 1, dtype=torch.int8)}, ShapeError, "source"),
        ({"energy": torch.zeros(18).double()}, DTypeError, "energy must be torch.float32"),
        ({"out_scale": torch.ones(2, 1, 18)}, ShapeError, r"out_scale must be \(4, 1, 18\)"),
        ({"in_zero": torch.zeros(2, 4, 18)}, ShapeError, "in_zero"),
        (
            {"in_levels": torch.arange(16.0).expand(2, -1)},
            ShapeError,
            r"in_levels must be \(2, 256",
        ),
        ({"out_levels": torch.zeros(4, 256)}, InputError, "out_levels must be ascending"),
        ({"in_levels": torch.full((2, 256), torch.nan)}, InputError, "in_levels must be ascending"),
        ({"in_scale": torch.zeros(2, 1, 18)}, InputError, "in_scale must be positive"),
        (
            {"out_scale": torch.full((4, 1, 18), torch.nan)},
            InputError,
            "out_scale must be positive",
        ),
        ({"in_scale": torch.ones(2, 1, 18, device="meta")}, InputError, "in_scale is on meta"),
    ],
)
def test_bad_input_raises(changes, error, message):
    with pytest.raises(error, match=message):
        sweep_codes(**{**problem("psi", 8, (2, 5, 18)), **changes})
