"""The Triton kernels: on a GPU if there is one, else in Triton's interpreter, which is slow."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bkcore import LanguageModel
from bkcore.core import causal_sweep_parts
from bkcore.errors import BackendError
from bkcore.kernels import attention, describe_backends, product, sweep, sweep_step, use_backend
from bkcore.kernels.backends import selection, triton
from bkcore.kernels.backends.triton import launch
from tests.kernels.ops import test_attention, test_sweep, test_sweep_codes
from tests.kernels.ops.test_sweep import BACKWARD_CONSTANT, DTYPES, FORMS, Arguments, arguments
from tests.slow import combinations

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def forced() -> Iterator[None]:
    with use_backend("triton"):
        yield


@pytest.fixture
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 4 sites, and groups of 3 blocks: every kernel is needed for a few sites."""
    monkeypatch.setattr(launch, "_SHORTEST", 4)
    monkeypatch.setattr(launch, "_GROUP", 3)


def moved(args: Arguments) -> Arguments:
    return tuple(x.to(DEVICE) if isinstance(x, Tensor) else x for x in args)


def gradients(args: Arguments, grad: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.cpu() for x in test_sweep.gradients(moved(args), grad.to(DEVICE)))


def wide(args: Arguments) -> Arguments:
    return tuple(x.double() if isinstance(x, Tensor) else x for x in args)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_site", [False, True])
@pytest.mark.parametrize(("batch", "sites", "lanes"), [(2, 1, 3), (1, 2, 33), (1, 27, 2)])
def test_matches_the_dense_oracle(short_blocks, form, dtype, per_site, batch, sites, lanes):
    args = arguments(form, batch, sites, lanes, dtype, per_site)
    got = sweep(*moved(args)).cpu().double()
    assert (got - test_sweep.expected(args)).abs().max() <= test_sweep.forward_tolerance(args)


@pytest.mark.parametrize(
    ("form", "per_site"),
    combinations(FORMS, [False, True], quick=[("psi", True), ("two_sided", False)]),
)
def test_blocks_and_groups_are_exact(short_blocks, form, per_site):
    """float64 inside: the sequential result, rounded once. 39 sites are 10 blocks in 4 groups, and
    these are in 2."""
    args = arguments(form, 2, 39, 3, torch.float32, per_site)
    with use_backend("reference"):
        want = sweep(*wide(args))
        grad = torch.randn_like(want)
        exact = test_sweep.gradients(wide(args), grad)
    got = (sweep(*moved(args)).cpu(), *gradients(args, grad.float()))
    for a, b in zip(got, (want, *exact), strict=True):
        # The adjoint starts from outputs that are rounded to float32, and sums products of up to
        # 1 / eta^2 = 25 of them.
        limit = 25 if b is not want else 1
        assert (a - b).abs().max() <= limit * torch.finfo(torch.float32).eps * b.abs().max()


@pytest.mark.slow
@settings(max_examples=8)
@given(
    st.sampled_from(FORMS),
    st.booleans(),
    st.integers(1, 3),
    st.integers(1, 40),
    st.sampled_from([1, 5, 37]),
    st.integers(0, 99),
)
def test_equals_the_cpu_backend_on_any_shape(form, per_site, batch, sites, lanes, seed):
    args = arguments(form, batch, sites, lanes, torch.float64, per_site, seed)
    with use_backend("cpu"):
        want = sweep(*args)
        grad = torch.randn_like(want)
        exact = test_sweep.gradients(args, grad)
    args = tuple(x.float() if isinstance(x, Tensor) else x for x in args)
    got = (sweep(*moved(args)).cpu(), *gradients(args, grad.float()))
    for a, b in zip(got, (want, *exact), strict=True):
        # Arguments rounded to float32; adjoints as in the tests of the other backends.
        assert (a - b).abs().max() <= 1e3 * torch.finfo(torch.float32).eps * b.abs().max()


@pytest.mark.parametrize(
    ("form", "per_site", "sites"),
    combinations(FORMS, [False, True], [1, 3], quick=[("psi", True, 3), ("two_sided", False, 3)]),
)
def test_gradcheck_on_every_input(form, per_site, sites):
    *tensors, two_sided = moved(arguments(form, 1, sites, 2, per_site=per_site))
    inputs = [x.requires_grad_() for x in tensors if x is not None]

    def call(*given: Any) -> Tensor:
        v, *rest = *given, two_sided
        source = rest.pop(0) if form == "psi" else None
        return sweep(v, source, *rest)

    assert torch.autograd.gradcheck(call, inputs)


log_eta = st.floats(-6, 3)
log_v = st.floats(-6, 6)
hop = st.floats(0, 10, width=32)


@settings(max_examples=10)
@given(log_eta, log_v, hop, st.integers(0, 99))
def test_blocks_are_backward_stable(log_eta, log_v, hop, seed):
    v, source, energy, eta, hopping, _ = arguments("psi", 1, 70, 2, torch.float32, seed=seed)
    v, eta, hopping = v * 10**log_v, torch.full_like(eta, 10**log_eta), torch.full_like(eta, hop)
    args = (v, source, energy, eta, hopping, False)
    parts = sweep(*moved(args)).cpu()
    assert parts.isfinite().all()
    for error in test_sweep.backward_errors(args, parts):
        assert error.max().item() <= BACKWARD_CONSTANT * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("form", combinations(FORMS, quick=["psi", "two_sided"]))
def test_every_output_element_is_written(short_blocks, form):
    for per_site, (batch, sites, lanes) in [(False, (2, 1, 1)), (True, (1, 17, 33))]:
        args = arguments(form, batch, sites, lanes, torch.float32, per_site)
        parts = sweep(*moved(args)).cpu()
        assert parts.isfinite().all()
        assert all(x.isfinite().all() for x in gradients(args, torch.ones_like(parts)))


@pytest.mark.parametrize("form", ["g", "psi"])
def test_causal_to_the_last_bit(short_blocks, form):
    v, source, *rest = moved(arguments(form, 1, 20, 3, torch.float32))
    before = sweep(v, source, *rest)
    v[:, 13] += 1
    if source is not None:
        source[:, 13] -= 1
    after = sweep(v, source, *rest)
    assert torch.equal(before[:, :13], after[:, :13])
    assert not torch.equal(before[:, 13], after[:, 13])


def test_nan_goes_through_and_stays_in_its_lane_and_part(short_blocks):
    v, source, *rest = moved(arguments("psi", 1, 20, 3, torch.float32))
    v[0, 3, 0], source[0, 3, 1] = torch.nan, torch.nan
    parts = sweep(v, source, *rest)[0]
    assert parts[3:, :, 0].isnan().all()
    assert parts[3:, 2:, 1].isnan().all()
    parts[3:, :, 0] = 0
    parts[3:, 2:, 1] = 0
    assert parts.isfinite().all()


@pytest.mark.parametrize(("batch", "lanes"), [(0, 3), (2, 0)])
def test_empty_batch_and_no_lanes(batch, lanes):
    args = arguments("psi", batch, 40, lanes, torch.float32)
    parts = sweep(*moved(args)).cpu()
    assert parts.shape == (batch, 40, 4, lanes)
    assert gradients(args, parts)[2].shape == (lanes,)


@pytest.mark.parametrize("form", combinations(FORMS, quick=["psi"]))
def test_order_in_memory_changes_no_bit(short_blocks, form):
    args = moved(arguments(form, 2, 20, 3, torch.float32))
    v, source, *rest = args

    def sites_last(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    other = (sites_last(v), None if source is None else sites_last(source), *rest)
    parts = sweep(*args)
    grad = parts.cos()
    assert torch.equal(sweep(*other), parts)
    pairs = zip(gradients(other, grad), gradients(args, grad), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", ["triton", "cpu", "reference"])
@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_is_read_and_computed_with_in_float32(name, form):
    if name == "cpu" and DEVICE != "cpu":
        pytest.skip("it takes CPU tensors only")
    v, source, *rest = moved(arguments(form, 2, 6, 3, torch.float32))
    half: list[Any] = [None if x is None else x.bfloat16() for x in (v, source)]
    same: list[Any] = [None if x is None else x.float() for x in half]
    with use_backend(name):
        parts = sweep(*half, *rest)
        assert parts.dtype == torch.float32
        assert torch.equal(parts, sweep(*same, *rest))
        got = test_sweep.gradients((*half, *rest), parts)
        want = test_sweep.gradients((*same, *rest), parts)
    assert got[0].dtype == torch.bfloat16
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b.to(a.dtype))


def test_the_public_sweep_leaves_bfloat16_to_the_kernel(monkeypatch):
    read = []

    def spy(args):
        read.append(args.v.dtype)
        return triton.BACKEND.sweep(args)

    monkeypatch.setitem(selection._BACKENDS, "triton", replace(triton.BACKEND, sweep=spy))
    v = torch.randn(1, 3, 2, device=DEVICE, dtype=torch.bfloat16)
    for source in (None, v, v.float()):
        causal_sweep_parts(v, source, energy=0.0, eta=1.0)
    assert read == [torch.bfloat16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize(
    ("form", "bits", "per_site"),
    combinations(
        *(FORMS, [4, 8], [False, True]),
        quick=[("psi", 4, True), ("psi", 8, False), ("two_sided", 8, True), ("g", 4, False)],
    ),
)
def test_codes_equal_decode_sweep_encode(short_blocks, form, bits, per_site):
    for shape in [(2, 1, 1), (1, 18, 35)]:
        p = on_device(test_sweep_codes.problem(form, bits, shape, rows=shape[1] if per_site else 1))
        assert torch.equal(test_sweep_codes.call(p), test_sweep_codes.expected(p))


@pytest.mark.parametrize("per_site", ["scale", "zero"])
@pytest.mark.parametrize("form", FORMS)
def test_codes_with_a_scale_for_all_sites_and_a_zero_for_each(short_blocks, form, per_site):
    p = test_sweep_codes.problem(form, 8, (1, 9, 5), rows=9)
    for name in ("in", "out"):
        shared = f"{name}_{'zero' if per_site == 'scale' else 'scale'}"
        p[shared] = p[shared][:, :1].contiguous()
    p = on_device(p)
    assert torch.equal(test_sweep_codes.call(p), test_sweep_codes.expected(p))


def test_lanes_may_lie_far_apart():
    """Further than 2^31 numbers from the first; of the 4 GiB a few pages are touched."""
    far = torch.UntypedStorage(2**32 + 16, device=DEVICE)  # torch.empty is poisoned here
    v = torch.empty(0, dtype=torch.bfloat16, device=DEVICE)
    v.set_(far, 0, (1, 2, 3), (3 * 2**30, 1, 2**30))
    v.copy_(torch.arange(6.0).view(1, 2, 3))
    rest = moved(arguments("g", 1, 2, 3, torch.float32))[1:]
    assert torch.equal(sweep(v, *rest), sweep(v.clone(), *rest))


@pytest.mark.parametrize("width", [1e-38, 1e6])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_saturate(bits, width):
    p = on_device(test_sweep_codes.problem("psi", bits, (1, 4, 9), width=width))
    assert torch.equal(test_sweep_codes.call(p), test_sweep_codes.expected(p))


@pytest.mark.parametrize(
    ("form", "bits"), combinations(FORMS, [4, 8], quick=[("psi", 4), ("two_sided", 8)])
)
def test_levels_are_looked_up_and_the_nearest_is_found(short_blocks, form, bits):
    p = test_sweep_codes.problem(form, bits, (1, 18, 5))
    p["in_levels"] = test_sweep_codes.levels(len(p["in_scale"]), bits, 0)
    p["out_levels"] = test_sweep_codes.levels(len(p["out_scale"]), bits, 1)
    p = on_device(p)
    assert torch.equal(test_sweep_codes.call(p), test_sweep_codes.expected_with_levels(p))


def test_nan_becomes_the_lowest_code():
    p = test_sweep_codes.problem("psi", 8, (1, 4, 5))
    p["eta"][0, 3] = torch.nan
    p = on_device(p)
    assert (test_sweep_codes.call(p)[..., 3] == -128).all()
    p["out_levels"] = test_sweep_codes.levels(4, 8, 0).to(DEVICE)
    assert (test_sweep_codes.call(p)[..., 3] == -128).all()


def on_device(p: dict[str, Any]) -> dict[str, Any]:
    return {k: x.to(DEVICE) if isinstance(x, Tensor) else x for k, x in p.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_source", [False, True])
def test_steps_equal_the_sweep(dtype, with_source):
    v, source = torch.randn(2, 2, 12, 35, dtype=dtype, device=DEVICE)
    energy, hopping = torch.randn(2, 35, dtype=dtype, device=DEVICE)
    eta = 0.2 + torch.rand(35, dtype=dtype, device=DEVICE)
    want = sweep(v, source if with_source else None, energy, eta[None], hopping[None])
    state = torch.zeros(2, 4 if with_source else 2, 35, dtype=dtype, device=DEVICE)
    for i in range(12):
        site = source[:, i].contiguous() if with_source else None
        sweep_step(state, v[:, i].contiguous(), site, energy, eta, hopping)
        # A state is rounded at every site and the sweep's is not; with eta >= 0.2 errors contract.
        scale = want[:, i].abs().max().item()
        assert (state - want[:, i]).abs().max() <= 100 * torch.finfo(dtype).eps * scale


@pytest.mark.parametrize(
    ("shape", "first", "dtype"),
    [
        pytest.param((2, 1, 2, 3, 4), True, torch.float64, marks=pytest.mark.slow),
        ((1, 37, 2, 17, 5), True, torch.float64),
        ((1, 33, 1, 4, 18), False, torch.float32),
    ],
)
def test_attention_and_its_gradients(shape, first, dtype):
    p = test_attention.problem(*shape, first=first, eta=0.3)
    with use_backend("reference"):
        want = attention_results(p, torch.float64, "cpu")
    for a, b in zip(attention_results(p, dtype, DEVICE), want, strict=True):
        # Condition 20 and sums of up to 37 terms, as in the tests of the other backends.
        assert (a.cpu() - b).abs().max() <= 400 * torch.finfo(dtype).eps * b.abs().max()


def attention_results(p: dict[str, Any], dtype: torch.dtype, device: str) -> list[Tensor]:
    leaves: dict[str, Any] = {
        k: None if x is None else x.to(device, dtype).detach().requires_grad_()
        for k, x in p.items()
    }
    results = attention(**leaves)
    waves = (torch.arange(x.numel(), device=device).cos().to(dtype).view(x.shape) for x in results)
    torch.stack([(x * w).sum() for x, w in zip(results, waves, strict=True)]).sum().backward()
    return [*(x.detach() for x in results), *(x.grad for x in leaves.values() if x is not None)]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "group"), [(3, 70, 33, 32), (17, 129, 70, 64), (1, 1, 1, 9)]
)
def test_product_equals_the_reference_to_the_last_bit(bits, rows, inputs, outputs, group):
    x = torch.randn(rows, inputs, device=DEVICE)
    x[0] = 0
    low, dtype = (-128, torch.int8) if bits == 8 else (0, torch.uint8)
    width = inputs if bits == 8 else -(-inputs // 2)
    weight = torch.randint(low, low + 256, (outputs, width), device=DEVICE).to(dtype)
    scales = (0.1 + torch.rand(outputs, -(-inputs // group), device=DEVICE)).bfloat16()
    got = product(x, weight, scales, group, bits)
    with use_backend("reference"):
        want = product(x.cpu(), weight.cpu(), scales.cpu(), group, bits)
    assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize(
    ("batch", "sites", "lanes", "dtype", "length"),
    [
        (8, 4096, 1024, torch.float32, 128),
        (1, 1 << 20, 64, torch.float32, 256),
        (1, 1 << 26, 64, torch.float32, 1024),
        (1, 100, 3, torch.float32, 32),
        (64, 4096, 4096, torch.float32, 4096),
        (1, 5000, 3, torch.float64, 5000),
    ],
)
def test_the_block_length_follows_from_the_shape(batch, sites, lanes, dtype, length):
    assert launch.block_length(batch, sites, lanes, dtype) == length


def test_it_is_named_among_the_backends_and_never_gets_cpu_tensors_by_itself():
    info = describe_backends()["triton"]
    assert info.available
    with use_backend("auto"):
        assert describe_backends()["triton"].used_for == ("cuda",)
        assert selection.select(torch.empty(1)).name == "cpu"


def test_without_the_interpreter_it_refuses_cpu_tensors(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(BackendError, match="takes CUDA tensors, not cpu"):
        sweep(*arguments("g"))


def test_no_gpu_is_a_clear_sentence(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match=r"'triton' was requested, but PyTorch sees no GPU"):
        use_backend("triton").__enter__()


def test_missing_triton_is_a_clear_sentence_and_only_when_asked_for(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "triton" else find(n))
    reason = describe_backends()["triton"].reason
    assert reason == "Triton is not installed; pip install 'bkcore[gpu]'"
    with pytest.raises(BackendError, match=r"pip install 'bkcore\[gpu\]'"):
        use_backend("triton").__enter__()
    with use_backend("auto"):
        sweep(*arguments("g"))
        monkeypatch.setattr(selection, "_warned", set())
        with pytest.warns(UserWarning, match=r"reference on CUDA tensors, because Triton is not"):
            assert selection._automatic("cuda").name == "reference"


def test_importing_bkcore_does_not_import_triton():
    code = "import sys, bkcore.kernels; assert not {'triton', 'numba'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_every_kernel_compiles_for_a_gpu():
    """To machine code for compute capability 9.0, which needs no GPU."""
    script = Path(__file__).parent / "compile_triton.py"
    run = subprocess.run(
        [sys.executable, script], env=without_interpreter(), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    names = {line.split()[0] for line in run.stdout.splitlines()}
    assert names == {
        *("sweep_maps", "compose", "enter", "causal", "two_sided", "one_site", "product"),
        *("causal_adjoint_maps", "causal_adjoint", "two_sided_adjoint_maps", "two_sided_adjoint"),
        *("states", "outputs", "adjoint_states", "adjoint"),
    }


def without_interpreter() -> dict[str, str]:

    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


@pytest.mark.parametrize("mode", combinations([None, "ptq_int4"], quick=[None]))
def test_a_language_model_runs_on_it(mode):
    torch.manual_seed(0)
    model = LanguageModel(50, 16, 1, num_experts=2, expert_size=16).eval()
    ids = torch.randint(0, 50, (1, 12))
    if mode is not None:
        model.configure_quantization(mode)
        model.calibrate_quantization([ids])
    logits = []
    for name, device in (("reference", "cpu"), ("triton", DEVICE)):
        with use_backend(name):
            logits.append(model.to(device)(ids.to(device)).logits.cpu())
    # The backends round differently, and a code may be one step off where they do.
    limit = 1e-4 if mode is None else 0.05
    assert (logits[0] - logits[1]).abs().max() <= limit * logits[0].abs().max()
