"""The operator on every backend: values against the dense oracle, gradients, and its promises."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bkcore.core import oracle
from bkcore.errors import BackendError, DTypeError, InputError, ShapeError
from bkcore.kernels import sweep, use_backend
from bkcore.kernels.backends.cpu import native

BACKENDS = ["reference", "cpu"]
DTYPES = [torch.float32, torch.float64]
FORMS = ["g", "psi", "two_sided"]
Arguments = tuple[Any, ...]
"""v, source or None, energy, eta, hopping, two_sided."""


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def arguments(
    form: str,
    batch: int = 2,
    sites: int = 5,
    lanes: int = 3,
    dtype: torch.dtype = torch.float64,
    per_site: bool = False,
    seed: int = 0,
) -> Arguments:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    v = 2 * normal(batch, sites, lanes)
    source = normal(batch, sites, lanes) if form == "psi" else None
    eta = 0.2 + normal(sites if per_site else 1, lanes).abs()
    hopping = normal(max(sites - 1, 1) if per_site else 1, lanes)
    tensors = (v, source, normal(lanes), eta, hopping)
    cast = [None if x is None else x.to(dtype) for x in tensors]
    return *cast, form == "two_sided"


def expected(args: Arguments) -> Tensor:
    """The oracle's parts, float64, from the very numbers the sweep was given."""
    v, source, energy, eta, hopping, two_sided = (
        x.double() if isinstance(x, Tensor) else x for x in args
    )
    batch, sites, lanes = v.shape
    parts = torch.empty(batch, sites, 2 if source is None else 4, lanes, dtype=torch.float64)
    green = oracle.diagonal if two_sided else oracle.left_connected
    for b, h in itertools.product(range(batch), range(lanes)):
        z = torch.complex(energy[h].expand(sites), eta[:, h].expand(sites))
        bonds = hopping[:, h].expand(sites - 1)
        g = green(v[b, :, h], z, hopping=bonds, onsite=0.0)
        parts[b, :, :2, h] = torch.view_as_real(g)
        if source is not None:
            psi = oracle.propagated(v[b, :, h], source[b, :, h], z, hopping=bonds, onsite=0.0)
            parts[b, :, 2:, h] = torch.view_as_real(psi)
    return parts


def forward_tolerance(args: Arguments) -> float:
    """Backward stability times conditioning.

    The computed g is exact for diagonals off by about 10 u (|A| + t^2 |g|), |g| <= 1/eta, and a
    resolvent bounded by 1/eta moves by at most 1/eta^2 times that (times ||b|| for psi).
    """
    v, source, energy, eta, hopping, _ = args
    low, hop = eta.min().item(), hopping.abs().max().item() ** 2
    size = (v.abs().max() + energy.abs().max() + eta.max()).item() + 2 * hop / low
    drive = 1.0 if source is None else max(1.0, source.square().sum(1).sqrt().max().item())
    return 20 * torch.finfo(v.dtype).eps * size * drive / low**2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_site", [False, True])
@pytest.mark.parametrize(
    ("batch", "sites", "lanes"),
    [(2, 1, 3), (1, 2, 1), (2, 3, 17), (1, 13, 2), (3, 4, 1), (1, 2, 37), (1, 66, 1)],
)
def test_matches_the_dense_oracle(backend, form, dtype, per_site, batch, sites, lanes):
    args = arguments(form, batch, sites, lanes, dtype, per_site)
    error = (sweep(*args).double() - expected(args)).abs().max().item()
    assert error <= forward_tolerance(args)


def backward_errors(args: Arguments, parts: Tensor) -> list[Tensor]:
    """|1/g_i - (A_i - t^2 g_{i-1})| / (|A_i| + t^2 |g_{i-1}|), likewise for psi / g; float64."""
    v, source, energy, eta, hopping, _ = (x.double() if isinstance(x, Tensor) else x for x in args)
    parts = parts.double()
    t = hopping.expand(v.shape[1] - 1, -1)
    a = torch.complex(v - energy, (-eta).expand_as(v))
    g = torch.complex(parts[:, :, 0], parts[:, :, 1])
    left = torch.zeros_like(g)
    left[:, 1:] = t.square() * g[:, :-1]
    errors = [(1 / g - (a - left)).abs() / (a.abs() + left.abs())]
    if source is not None:
        psi = torch.complex(parts[:, :, 2], parts[:, :, 3])
        carried = torch.zeros_like(psi)
        carried[:, 1:] = t * psi[:, :-1]
        scale = source.abs() + carried.abs()
        errors.append(((psi / g) - (source + carried)).abs() / scale.clamp_min(1e-300))
    return errors


# Every lane rounds v - E, t^2, one product and one sum, then |d|^2, its reciprocal and the products
# with it: under 10 roundings, each of at most u times the terms of the denominator.
BACKWARD_CONSTANT = 10

log_eta = st.floats(-6, 3)
log_v = st.floats(-6, 6)
hop = st.floats(0, 10, width=32)


@settings(max_examples=40)
@given(log_eta, log_v, hop, st.sampled_from(DTYPES), st.sampled_from(BACKENDS), st.integers(0, 99))
def test_backward_error_in_hostile_settings(log_eta, log_v, hop, dtype, name, seed):
    v, source, energy, eta, hopping, _ = arguments("psi", 1, 24, 2, dtype, seed=seed)
    v, eta, hopping = v * 10**log_v, torch.full_like(eta, 10**log_eta), torch.full_like(eta, hop)
    args = (v, source, energy, eta, hopping, False)
    with use_backend(name):
        parts = sweep(*args)
    assert parts.isfinite().all()
    for error in backward_errors(args, parts):
        assert error.max().item() <= BACKWARD_CONSTANT * torch.finfo(dtype).eps


@settings(max_examples=30)
@given(log_eta, log_v, hop, st.sampled_from(DTYPES), st.sampled_from(BACKENDS), st.integers(0, 99))
def test_two_sided_backward_error_in_hostile_settings(log_eta, log_v, hop, dtype, name, seed):
    v, _, energy, eta, hopping, _ = arguments("g", 1, 24, 2, dtype, seed=seed)
    v, eta, hopping = v * 10**log_v, torch.full_like(eta, 10**log_eta), torch.full_like(eta, hop)
    with use_backend(name):
        center = torch.complex(*sweep(v, None, energy, eta, hopping, True).double().unbind(2))
        left = torch.complex(*sweep(v, None, energy, eta, hopping).double().unbind(2))
        mirrored = sweep(v.flip(1), None, energy, eta, hopping).flip(1)
        right = torch.complex(*mirrored.double().unbind(2))
    t2 = hopping.double().square()
    zero = torch.zeros_like(left[:, :1])
    left = t2 * torch.cat((zero, left[:, :-1]), 1)
    right = t2 * torch.cat((right[:, 1:], zero), 1)
    a = torch.complex(v.double() - energy.double(), (-eta.double()).expand_as(v))
    error = (1 / center - (a - left - right)).abs() / (a.abs() + left.abs() + right.abs())
    assert error.max().item() <= BACKWARD_CONSTANT * torch.finfo(dtype).eps


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("per_site", [False, True])
@pytest.mark.parametrize("sites", [1, 2, 4])
def test_gradcheck_on_every_input(backend, form, per_site, sites):
    *tensors, two_sided = arguments(form, 2, sites, 2, per_site=per_site)
    inputs = [x.requires_grad_() for x in tensors if x is not None]

    def call(*given: Any) -> Tensor:
        v, *rest = *given, two_sided
        source = rest.pop(0) if form == "psi" else None
        return sweep(v, source, *rest)

    assert torch.autograd.gradcheck(call, inputs)


def gradients(args: Arguments, grad: Tensor) -> tuple[Tensor, ...]:
    inputs = [x.detach().clone().requires_grad_() for x in args[:-1] if x is not None]
    given = iter(inputs)
    leaves: Arguments = (*(None if x is None else next(given) for x in args[:-1]), args[-1])
    parts = sweep(*leaves)
    return torch.autograd.grad(parts, inputs, grad)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_site", [False, True])
def test_native_gradients_equal_the_reference(form, dtype, per_site):
    args = arguments(form, 3, 70, 19, dtype, per_site)
    grad = torch.randn(sweep(*args).shape, dtype=dtype)
    with use_backend("cpu"):
        native = gradients(args, grad)
    with use_backend("reference"):
        exact = gradients(tuple(x.double() if isinstance(x, Tensor) else x for x in args), grad)
    for got, want in zip(native, exact, strict=True):
        # Adjoints sum products of up to 1/eta^2 = 25 along the chain; 1e3 u leaves room for both.
        scale = want.abs().max().item()
        assert (got - want).abs().max().item() <= 1e3 * torch.finfo(dtype).eps * scale


@pytest.mark.parametrize("form", FORMS)
def test_second_derivative_raises(backend, form):
    args = arguments(form)
    v = args[0].requires_grad_()
    (first,) = torch.autograd.grad(sweep(*args).square().sum(), v, create_graph=True)
    with pytest.raises(BackendError, match="only once"):
        first.sum().backward()


@pytest.mark.parametrize("form", ["g", "psi"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("site", [0, 3, 8])
def test_causal_to_the_last_bit(backend, form, dtype, site):
    v, source, *rest = arguments(form, 2, 9, 19, dtype)
    before = sweep(v, source, *rest)
    v[:, site] += 1
    if source is not None:
        source[:, site] -= 1
    after = sweep(v, source, *rest)
    assert torch.equal(before[:, :site], after[:, :site])
    assert not torch.equal(before[:, site], after[:, site])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_goes_through(backend, form, dtype):
    args = arguments(form, 1, 6, 19, dtype)
    args[0][0, 2, 5] = torch.nan
    parts = sweep(*args)
    first = 0 if form == "two_sided" else 2
    assert parts[:, first:, :, 5].isnan().all()
    parts[:, first:, :, 5] = 0
    assert parts.isfinite().all()
    dv = gradients(args, torch.ones_like(parts))[0]
    assert dv[0, :, 5].isnan().all()
    assert dv[0, :, [*range(5), *range(6, 19)]].isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("per_site", [False, True])
def test_every_output_element_is_written(backend, form, per_site):
    for batch, sites, lanes in [(1, 1, 1), (2, 3, 17), (3, 65, 33)]:
        args = arguments(form, batch, sites, lanes, torch.float32, per_site)
        parts = sweep(*args)
        assert parts.isfinite().all()
        assert all(x.isfinite().all() for x in gradients(args, torch.ones_like(parts)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(1, 40, 300), (3, 30, 130), (16, 40, 33), (200, 60, 1)])
def test_thread_count_changes_no_bit(backend, threads, form, shape):
    batch, sites, lanes = shape
    args = arguments(form, batch, sites, lanes, torch.float32, per_site=batch == 3)
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        parts = sweep(*args)
        results.append((parts, *gradients(args, parts.cos())))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lanes", [1, 16, 45])
def test_every_instruction_set(form, dtype, lanes):
    args = arguments(form, 2, 20, lanes, dtype)
    want, tolerance = expected(args), forward_tolerance(args)
    grad = torch.randn(want.shape, dtype=dtype)
    results = {}
    with use_backend("cpu"):
        for isa in native.supported_isas():
            with native.use_isa(isa):
                results[isa] = (sweep(*args), *gradients(args, grad))
            assert (results[isa][0] - want).abs().max().item() <= tolerance
    # All fuse the same multiply-adds, so the width of the vectors is the only difference.
    for got in results.values():
        pairs = zip(got, results["baseline"], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("per_site", [False, True])
@pytest.mark.parametrize(("batch", "sites", "lanes"), [(1, 1024, 1), (1, 3001, 1), (2, 1500, 3)])
def test_blocks_of_long_chains(backend, form, per_site, batch, sites, lanes):
    """Few chains are cut into blocks, float64 inside: the result is the sequential one, rounded."""
    args = arguments(form, batch, sites, lanes, torch.float32, per_site)
    wide: Arguments = tuple(x.double() if isinstance(x, Tensor) else x for x in args)
    with use_backend("reference"):
        want = sweep(*wide)
    got = sweep(*args)
    limit = torch.finfo(torch.float32).eps * (1 if backend == "cpu" else 1e3)
    assert (got - want).abs().max().item() <= limit * want.abs().max().item()
    exact = sweep(*wide)
    # float64 with eta >= 0.2 along 3,000 sites: the map of a block costs a few more roundings.
    assert (exact - want).abs().max().item() <= 1e-12 * want.abs().max().item()


@settings(max_examples=25)
@given(log_eta, log_v, hop, st.sampled_from(DTYPES), st.integers(1024, 5000), st.integers(0, 99))
def test_blocks_are_backward_stable(log_eta, log_v, hop, dtype, sites, seed):
    v, source, energy, eta, hopping, _ = arguments("psi", 1, sites, 1, dtype, seed=seed)
    v, eta, hopping = v * 10**log_v, torch.full_like(eta, 10**log_eta), torch.full_like(eta, hop)
    args = (v, source, energy, eta, hopping, False)
    parts = sweep(*args)
    assert parts.isfinite().all()
    # Where blocks meet, float64 disagrees with itself by the conditioning, at most 1 / eta.
    limit = BACKWARD_CONSTANT * torch.finfo(dtype).eps
    if dtype == torch.float64:
        limit *= max(1.0, sites / 10**log_eta)
    for error in backward_errors(args, parts):
        assert error.max().item() <= limit


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_site", [False, True])
@pytest.mark.parametrize(
    ("batch", "sites", "lanes"), [(1, 70, 300), (1, 5, 3), (3, 130, 21), (40, 67, 2), (130, 9, 1)]
)
def test_order_in_memory_changes_no_bit(form, dtype, per_site, batch, sites, lanes):
    args = arguments(form, batch, sites, lanes, dtype, per_site)
    grad = torch.randn(sweep(*args).shape, dtype=dtype)
    v, source, *rest = args

    def sites_last(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    moved = (sites_last(v), None if source is None else sites_last(source), *rest)
    for got, want in zip(
        (sweep(*moved), *gradients(moved, grad)),
        (sweep(*args), *gradients(args, grad)),
        strict=True,
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lanes", [16, 40, 96, 2064])
def test_writing_past_the_caches_changes_no_bit(monkeypatch, form, dtype, lanes):
    args = arguments(form, 2, 70, lanes, dtype)
    want = sweep(*args)
    grad = torch.randn_like(want)
    kept = gradients(args, grad)
    monkeypatch.setattr(native, "CACHE_BYTES", 0)
    assert torch.equal(sweep(*args), want)
    assert all(torch.equal(a, b) for a, b in zip(gradients(args, grad), kept, strict=True))


@pytest.mark.parametrize("per_site", [False, True])
def test_many_tiles(per_site):
    """The two-sided sweep keeps checkpoints; here it has several of them."""
    args = arguments("two_sided", 1, 5000, 16, torch.float64, per_site)
    grad = torch.randn_like(sweep(*args))
    with use_backend("reference"):
        want = (sweep(*args), *gradients(args, grad))
    for got, exact in zip((sweep(*args), *gradients(args, grad)), want, strict=True):
        assert (got - exact).abs().max().item() <= 1e-12 * exact.abs().max().item()


def test_unknown_instruction_set_raises():
    with pytest.raises(BackendError, match=r"choose from .*baseline"), native.use_isa("avx1024"):
        pass
    assert native.isa() == native.supported_isas()[0]


def test_strided_inputs(backend):
    v, source, energy, eta, hopping, _ = arguments("psi", 2, 6, 4)
    strided = v.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    rest = (energy.repeat_interleave(2)[::2], eta.t().contiguous().t(), hopping.expand(5, -1))
    got = sweep(strided, source.flip(0).flip(0), *rest)
    torch.testing.assert_close(got, sweep(v, source, energy, eta, hopping), rtol=1e-14, atol=0)
    assert got.permute(0, 3, 1, 2).is_contiguous()


@pytest.mark.parametrize(("batch", "lanes"), [(0, 3), (2, 0)])
def test_empty_batch_and_no_lanes(backend, batch, lanes):
    args = arguments("psi", batch, 4, lanes)
    parts = sweep(*args)
    assert parts.shape == (batch, 4, 4, lanes)
    assert gradients(args, parts)[2].shape == (lanes,)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("per_site", [False, True])
def test_opcheck(backend, form, per_site):
    args = arguments(form, per_site=per_site)
    *tensors, two_sided = args
    inputs = [None if x is None else x.clone().requires_grad_() for x in tensors]
    torch.library.opcheck(torch.ops.bkcore.sweep.default, (*inputs, two_sided))
    parts = sweep(*args)
    v, *rest = tensors
    torch.library.opcheck(
        torch.ops.bkcore.sweep_backward.default,
        (torch.ones_like(parts), parts, v if two_sided else None, *rest, two_sided),
    )


def replace(args: Arguments, **changes: object) -> list[Any]:
    names = ("v", "source", "energy", "eta", "hopping", "two_sided")
    return [changes.get(name, value) for name, value in zip(names, args, strict=True)]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"v": torch.zeros(2, 5, 3, dtype=torch.int64)}, DTypeError, "v must be float32"),
        ({"v": torch.zeros(2, 5, 3, dtype=torch.float16)}, DTypeError, "v must be float32"),
        (
            {"v": torch.zeros(2, 5, 3, dtype=torch.bfloat16)},
            DTypeError,
            "energy must be torch.float32 for v of torch.bfloat16",
        ),
        ({"v": torch.zeros(5, 3).double()}, ShapeError, r"v must be \(B, N, H\)"),
        ({"v": torch.zeros(2, 0, 3).double()}, ShapeError, "N >= 1"),
        ({"source": torch.zeros(2, 5, 4).double()}, ShapeError, r"source must be \(2, 5, 3\)"),
        ({"source": torch.zeros(2, 5, 3)}, DTypeError, "source must be torch.float64"),
        ({"energy": torch.zeros(1, 3).double()}, ShapeError, r"energy must be \(3,\)"),
        ({"eta": torch.ones(3).double()}, ShapeError, "eta must be"),
        ({"eta": torch.ones(4, 3).double()}, ShapeError, r"\(5, 3\)"),
        ({"hopping": torch.ones(5, 3).double()}, ShapeError, r"\(4, 3\)"),
        ({"hopping": torch.ones(1, 3)}, DTypeError, "hopping must be torch.float64"),
        ({"energy": torch.zeros(3, device="meta").double()}, InputError, "energy is on meta"),
        ({"two_sided": True}, InputError, "takes no source"),
    ],
)
def test_bad_input_raises(changes, error, message):
    with pytest.raises(error, match=message):
        sweep(*replace(arguments("psi"), **changes))
