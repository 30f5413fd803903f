"""Quantized weights, and the integer products with them."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bkcore.errors import CalibrationError, InputError
from bkcore.kernels import use_backend
from bkcore.kernels.backends import selection
from bkcore.kernels.backends.reference.codes import integer_product, quantize_rows
from bkcore.kernels.int4_levels import INT4_LEVELS, nearest_codes
from bkcore.quantization import affine
from bkcore.quantization.gptq import InputMoments, pack_weight_by_moments
from bkcore.quantization.linear import QuantizedEmbedding, QuantizedLinear
from bkcore.quantization.weights import (
    HalfWeight,
    PackedWeight,
    TrainableWeight,
    pack_weight,
    search_weight_scales,
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def trainable(weight: Tensor, bits: int, group_size: int) -> TrainableWeight:
    scales = search_weight_scales(weight, bits, group_size)
    return TrainableWeight.from_float(weight, scales, bits, group_size)


def oracle(
    codes: Tensor, token_scale: Tensor, weight_codes: Tensor, scales: Tensor, group_size: int
) -> np.ndarray:
    """int64 sums inside groups; then float32, group after group, the token's scale last."""
    x, w = codes.numpy().astype(np.int64), weight_codes.numpy().astype(np.int64)
    total = np.zeros((len(x), len(w)), dtype=np.float32)
    for group in range(scales.shape[1]):
        columns = slice(group * group_size, (group + 1) * group_size)
        sums = (x[:, columns] @ w[:, columns].T).astype(np.float32)
        total = total + sums * scales.numpy()[:, group]
    return total * token_scale.numpy()


@settings(max_examples=60)
@given(
    rows=st.integers(1, 40),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 40),
    group_size=st.integers(1, 80),
    bits=st.sampled_from([4, 8]),
    seed=st.integers(0, 2**16),
)
@example(rows=2, inputs=1, outputs=3, group_size=1, bits=8, seed=0)
def test_integer_product_equals_an_int64_oracle(rows, inputs, outputs, group_size, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    scales = search_weight_scales(weight, bits, group_size)
    packed = pack_weight(weight, bits, group_size)
    assert torch.equal(packed.scales(), scales)
    x = torch.randn(rows, inputs, generator=generator)
    codes, token_scale = quantize_rows(x)
    product = integer_product(codes, token_scale, packed.codes(), scales, group_size)
    expected = oracle(codes, token_scale, packed.codes(), scales, group_size)
    assert product.dtype == torch.float32
    assert np.array_equal(product.numpy(), expected)
    assert torch.equal(QuantizedLinear(packed)(x), product)


def test_sums_beyond_float32_are_exact_integers_first():
    """2,001 products of 127 * 127 exceed 2^24, where adding float32 would start to round."""
    inputs = 2001
    codes = torch.full((2, inputs), 127, dtype=torch.int8)
    weight = torch.full((3, inputs), 127, dtype=torch.int8)
    weight[1, ::2] = 126
    weight[2] = -128
    one = torch.ones(3, 1)
    product = integer_product(codes, torch.ones(2, 1), weight, one, inputs)
    exact = codes.long() @ weight.long().t()
    assert exact.abs().max() > 2**24
    assert torch.equal(product, exact.float())


def test_tokens_are_quantized_each_with_its_own_scale():
    x = torch.randn(50, 9) * 10 ** torch.empty(50, 1).uniform_(-6, 6)
    codes, scale = quantize_rows(x)
    assert codes.dtype == torch.int8
    assert (codes.abs().amax(1) == 127).all()
    # Half a step, and float32 roundings of codes below 2^7.
    assert ((codes * scale - x).abs() <= scale * (0.5 + 2.0**-16)).all()


def test_a_row_does_not_depend_on_the_others():
    layer = QuantizedLinear(pack_weight(torch.randn(33, 70), 4, 32))
    x = torch.randn(300, 70)
    whole = layer(x)
    for rows in (slice(0, 1), slice(5, 8), slice(17, 200)):
        assert torch.equal(layer(x[rows]), whole[rows])


def test_rows_of_zeros_and_of_nan():
    layer = QuantizedLinear(pack_weight(torch.randn(5, 6), 8, 6))
    x = torch.randn(4, 6)
    x[1] = 0
    x[2, 3] = torch.nan
    x[3, 0] = torch.inf
    out = layer(x)
    assert torch.isfinite(out[0]).all()
    assert (out[1] == 0).all()
    assert not torch.isfinite(out[2]).any()
    assert not torch.isfinite(out[3]).any()


@pytest.mark.parametrize("lead", [(1,), (4,), (2, 3)])
def test_any_leading_shape(lead):
    layer = QuantizedLinear(pack_weight(torch.randn(5, 6), 8, 6))
    x = torch.randn(*lead, 6)
    assert torch.equal(layer(x), layer(x.view(-1, 6)).view(*lead, 5))


# ---- weights -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "group_size", "columns", "groups"), [(8, 11, 11, 1), (4, 4, 11, 3), (4, 11, 11, 1)]
)
def test_packed_weight(bits, group_size, columns, groups):
    weight = torch.randn(7, columns)
    packed = pack_weight(weight, bits, group_size)
    assert packed.packed.dtype == {8: torch.int8, 4: torch.uint8}[bits]
    assert packed.packed.shape == (7, columns if bits == 8 else (columns + 1) // 2)
    assert packed.stored_scales.dtype == torch.bfloat16
    assert packed.scales().shape == (7, groups)
    scale = packed.scales().repeat_interleave(group_size, 1)[:, :columns]
    codes = packed.codes()
    allowed = torch.arange(-128, 128) if bits == 8 else torch.tensor(INT4_LEVELS)
    assert torch.isin(codes, allowed).all()
    error = (codes * scale - weight).abs()
    nearest = (allowed * scale[..., None] - weight[..., None]).abs().amin(-1)
    assert (error <= nearest + scale * 2.0**-16).all()
    assert torch.equal(packed.rows(torch.arange(7)), codes * scale)


@pytest.mark.parametrize(("bits", "gain"), [(4, 0.9), (8, 1.0)])
def test_searched_weight_scales_beat_min_max(bits, gain):
    weight = torch.distributions.Laplace(0.0, 1.0).sample((50, 128))
    packed = pack_weight(weight, bits, 128)
    searched = (packed.rows(torch.arange(50)) - weight).square().mean()
    scale = affine.storable(weight.abs().amax(1, keepdim=True) / 127)
    min_max = (scale * nearest_codes(weight / scale, bits) - weight).square().mean()
    assert searched <= gain * min_max


def test_uneven_levels_beat_even_ones_for_weights_of_heavy_tails():
    """A Laplace density and groups of 128, as weights have: the squared error of 16 levels."""
    weight = torch.distributions.Laplace(0.0, 1.0).sample((500, 128))
    uneven = (pack_weight(weight, 4, 128).rows(torch.arange(500)) - weight).square().mean()
    errors = []
    for fraction in torch.linspace(0.4, 1.0, 30):
        scale = fraction * weight.abs().amax(1, keepdim=True) / 7.5
        errors.append((affine.fake_quantize(weight, scale, 0, 4) - weight).square().mean(1))
    assert uneven < 0.8 * torch.stack(errors).amin(0).mean()


def test_groups_of_a_weight_have_their_own_scales():
    weight = torch.randn(3, 12)
    weight[:, 8:] *= 1000
    scales = search_weight_scales(weight, 4, 8)
    assert scales.shape == (3, 2)
    for columns, group in ((slice(0, 8), 0), (slice(8, 12), 1)):
        alone = search_weight_scales(weight[:, columns], 4, 8)
        assert torch.equal(scales[:, group : group + 1], alone)


def test_per_tensor_is_one_scale():
    scales = search_weight_scales(torch.randn(4, 10), 8, 10, per_tensor=True)
    assert scales.shape == (4, 1)
    assert len(scales.unique()) == 1


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-42, 1e30])
@pytest.mark.parametrize("bits", [4, 8])
def test_extreme_weights(value, bits):
    packed = pack_weight(torch.full((2, 6), value), bits, 6)
    assert (packed.scales() > 0).all()
    rows = packed.rows(torch.arange(2))
    # bfloat16 scales: 2^-9; the smallest of all round to zero.
    assert torch.allclose(rows, torch.full((2, 6), value), rtol=2.0**-8, atol=1e-38)


def test_weights_that_are_not_finite_are_refused():
    for bad in (torch.nan, torch.inf):
        weight = torch.randn(2, 6)
        weight[1, 1] = bad
        with pytest.raises(CalibrationError, match="NaN or infinity"):
            pack_weight(weight, 8, 6)
        with pytest.raises(CalibrationError, match="float16's range"):
            HalfWeight.from_float(weight)
    with pytest.raises(CalibrationError, match="float16's range"):
        HalfWeight.from_float(torch.full((1, 1), 7e4))


# ---- training through codes ----------------------------------------------------------------


@pytest.mark.parametrize(("bits", "group_size"), [(8, 20), (4, 8)])
def test_training_forward_is_the_integer_forward(bits, group_size):
    weight, x = torch.randn(9, 20), torch.randn(15, 20)
    training = trainable(weight, bits, group_size)
    with torch.no_grad():
        training.weight.add_(0.1 * torch.randn_like(weight))
        training.log_scales.add_(0.05 * torch.randn_like(training.log_scales))
    packed = training.pack()
    assert isinstance(packed, PackedWeight)
    assert torch.equal(QuantizedLinear(training)(x), QuantizedLinear(packed)(x))
    index = torch.tensor([[0, 8], [3, 3]])
    assert torch.equal(training.rows(index), packed.rows(index))
    untrained, direct = trainable(weight, bits, group_size), pack_weight(weight, bits, group_size)
    assert torch.equal(untrained.pack().packed, direct.packed)
    assert torch.equal(untrained.scales(), direct.scales())


@pytest.mark.parametrize(("bits", "group_size"), [(8, 20), (4, 8)])
def test_training_backward_is_that_of_the_dequantized_product(bits, group_size):
    training = trainable(torch.randn(9, 20), bits, group_size)
    x, cotangent = torch.randn(15, 20, requires_grad=True), torch.randn(15, 9)
    QuantizedLinear(training)(x).backward(cotangent)
    leaves = (x, training.weight, training.log_scales)
    found = [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]

    training.zero_grad()
    codes, token_scale = quantize_rows(x.detach())
    used = (codes * token_scale).requires_grad_()
    (used @ training.codes_and_values()[1].t()).backward(cotangent)
    expected = (used.grad, training.weight.grad, training.log_scales.grad)
    for one, other in zip(found, expected, strict=True):
        assert one.abs().max() > 0
        # The same sums of 15 or 20 products in another order.
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_wild_steps_leave_trainable_weights_usable():
    training = trainable(torch.randn(9, 20), 4, 8)
    x = torch.randn(5, 20)
    for log_scale in (-1e4, -100.0, -87.0, -60.0, 79.9, 1e4):
        with torch.no_grad():
            training.log_scales.fill_(log_scale)
        training.zero_grad()
        out = QuantizedLinear(training)(x)
        out.sum().backward()
        assert (training.scales() > 0).all()
        assert torch.isfinite(out).all()
        gradients = [parameter.grad for parameter in training.parameters()]
        assert all(grad is not None and torch.isfinite(grad).all() for grad in gradients)


# ---- embedding -----------------------------------------------------------------------------


def embeddings() -> dict[str, QuantizedEmbedding]:
    weight = torch.randn(10, 6)
    kinds: dict[str, Any] = {
        "int8": pack_weight(weight, 8, 6),
        "int4": pack_weight(weight, 4, 4),
        "half": HalfWeight.from_float(weight),
        "training": trainable(weight, 4, 4),
    }
    return {name: QuantizedEmbedding(kind) for name, kind in kinds.items()}


@pytest.mark.parametrize("kind", ["int8", "int4", "half", "training"])
def test_rows_and_logits_share_one_weight(kind):
    embedding = embeddings()[kind]
    rows = embedding(torch.arange(10))
    assert rows.dtype == torch.float32
    index = torch.tensor([[3, 0], [9, 3]])
    assert torch.equal(embedding(index), rows[index])
    assert torch.equal(embedding(index.int()), rows[index])
    hidden = torch.randn(4, 6)
    if kind == "half":
        assert torch.equal(embedding.logits(hidden), torch.nn.functional.linear(hidden, rows))
        return
    codes, scale = quantize_rows(hidden)
    # Six products: the order of the float sums may differ.
    torch.testing.assert_close(
        embedding.logits(hidden), (codes * scale) @ rows.t(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["int8", "int4", "half", "training"])
@pytest.mark.parametrize("token", [-1, 10])
def test_an_unknown_token_raises_as_in_a_float_embedding(kind, token):
    with pytest.raises(IndexError):
        embeddings()[kind](torch.tensor([token]))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_scales_keep_their_dtype_when_a_module_is_cast(bits, dtype):
    """3e5 is no float16 and 1/3 rounds differently in it: the codes would get other scales."""
    torch.manual_seed(0)
    weight = torch.randn(6, 32)
    weight[0] *= 3e6
    layer = QuantizedLinear(pack_weight(weight, bits, 16))
    x = torch.randn(3, 32)
    expected = layer(x)
    assert torch.equal(layer.to(dtype)(x), expected)
    assert layer.weight.stored_scales.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("forward", "backward", "runs"),
    [("reference", None, "reference"), (None, "reference", "cpu"), ("cpu", "reference", "cpu")],
)
def test_a_backward_pass_runs_where_its_forward_pass_did(monkeypatch, forward, backward, runs):
    calls = []
    for name in ("cpu", "reference"):
        backend = selection._BACKENDS[name]

        def spied(function, backend=backend):
            def spy(*args):
                calls.append(backend.name)
                return getattr(backend, function)(*args)

            return spy

        functions = ("product", "round_rows", "round_weight", "round_weight_backward")
        spies = {function: spied(function) for function in functions}
        monkeypatch.setitem(selection._BACKENDS, name, replace(backend, **spies))
    layer = QuantizedLinear(trainable(torch.randn(6, 8), 4, 4))
    calls.clear()
    with nullcontext() if forward is None else use_backend(forward):
        out = layer(torch.randn(3, 8, requires_grad=True))
    with nullcontext() if backward is None else use_backend(backward):
        out.sum().backward()
    assert calls == [runs] * 4


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [17, 3 * 10**8, 2**63 - 1, 2**70])
def test_a_group_size_beyond_the_columns_is_one_group(bits, group_size):
    weight, x = torch.randn(5, 16), torch.randn(3, 16)
    moments = InputMoments(16)
    moments.observe(x)
    for pack in (
        lambda size: pack_weight(weight, bits, size),
        lambda size: pack_weight_by_moments(weight, moments, bits, size),
        lambda size: trainable(weight, bits, size).pack(),
    ):
        found, expected = pack(group_size), pack(16)
        assert found.group_size == 16
        assert torch.equal(found.packed, expected.packed)
        assert torch.equal(found.stored_scales, expected.stored_scales)
        assert torch.equal(found.rows(torch.arange(5)), expected.rows(torch.arange(5)))
        assert torch.equal(QuantizedLinear(found)(x), QuantizedLinear(expected)(x))
    grads = []
    for size in (group_size, 16):
        layer = QuantizedLinear(trainable(weight, bits, size))
        layer(x).square().sum().backward()
        grads.append((layer.weight.weight.grad, layer.weight.log_scales.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("kind", [PackedWeight, TrainableWeight])
def test_weights_of_other_bits_or_without_groups_are_refused(kind):
    with pytest.raises(InputError, match="bits must be 4 or 8, not 3"):
        kind((5, 16), 3, 16)
    with pytest.raises(InputError, match="group_size must be an integer >= 1, not 0"):
        kind((5, 16), 4, 0)
