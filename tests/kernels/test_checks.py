"""No operator takes a tensor that it would misread, and none is left out of these tests."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from bkcore import kernels
from bkcore.errors import DTypeError, InputError, ShapeError
from bkcore.kernels.backends.interface import Backend
from bkcore.kernels.checks import count_groups, fit_group_size
from tests.kernels.operators import EVERY, FUNCTIONS, OPERATORS, arguments, call, tensors

PAIRS = [(name, tensor) for name in EVERY for tensor in tensors(arguments(name))]
ALONE = [pair for pair in PAIRS if len(tensors(arguments(pair[0]))) == 1]  # it has to fit nothing
DTYPES = [
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.int8, torch.uint8, torch.int32, torch.bool, torch.complex64),
]
# What a tensor may be besides, with all others as they are.
OTHER_DTYPES = {
    **{("sweep_backward", name): {torch.bfloat16} for name in ("v", "source")},
    **{("sweep_codes", name): {torch.float32} for name in ("in_zero", "out_zero")},
    ("dense_product", "weight"): {torch.float16, torch.bfloat16},
    # The functions take one each, the operator both.
    **{
        (f"torch.ops.{name}", "scale"): {torch.float32}
        for name in ("round_channels", "round_channels_backward")
    },
}
# Rows, of which there may be any number, along any number of axes.
ROWS = {
    *(("product", "x"), ("round_channels", "x"), ("round_channels_straight_through", "x")),
    *(("rms_norm", "x"), ("dense_product", "x")),
}
# Axes but the last of any length.
FREE = ROWS | {
    *(("short_convolution", "x"), ("short_convolution", "weight")),
    *(("dense_product", "weight"), ("sweep_rounded", "v")),
}


def short(name: str) -> str:
    return name.removeprefix("torch.ops.")


def test_no_operator_is_left_out() -> None:
    names = {x.removeprefix("bkcore::") for x in torch._C._dispatch_get_all_op_names()
             if x.startswith("bkcore::")}  # fmt: skip
    assert {name.partition(".")[0] for name in names} == set(OPERATORS)


def test_no_other_function_is_left_out() -> None:
    no_tensors = {
        *("BackendInfo", "describe_backends", "in_order", "use_backend"),
    }
    assert set(kernels.__all__) - no_tensors == set(FUNCTIONS)
    described = {"name", "absent", "refuses", "describe", "reads_bfloat16"}
    of_backends = {field.name for field in dataclasses.fields(Backend)} - described
    assert of_backends == set(OPERATORS) | {"sweep_step"}


@pytest.mark.parametrize("name", EVERY)
def test_every_tensor_of_the_schema_is_among_the_arguments(name) -> None:
    if not name.startswith("torch.ops."):
        return
    schema = getattr(torch.ops.bkcore, short(name)).default._schema
    wanted = {x.name for x in schema.arguments if "Tensor" in str(x.type)}
    assert set(tensors(arguments(name))) == wanted


@pytest.mark.parametrize(("name", "tensor"), PAIRS)
def test_another_dtype_is_refused(name, tensor) -> None:
    args = arguments(name)
    good = args[tensor]
    others = [OTHER_DTYPES.get((key, tensor), set()) for key in (name, short(name))]
    allowed = {good.dtype}.union(*others)
    for dtype in set(DTYPES) - allowed:
        args[tensor] = good.to(dtype)
        with pytest.raises(DTypeError):
            call(name, args)
    for dtype in allowed:
        args[tensor] = good.to(dtype)
        call(name, args)


@pytest.mark.parametrize(("name", "tensor"), PAIRS)
def test_another_device_is_refused(name, tensor) -> None:
    args = arguments(name)
    args[tensor] = args[tensor].to("meta")
    if (name, tensor) in ALONE:
        assert call(name, args)[0].is_meta
        return
    with pytest.raises(InputError) as caught:
        call(name, args)
    assert not isinstance(caught.value, ShapeError)


@pytest.mark.parametrize(("name", "tensor"), [pair for pair in PAIRS if pair not in ALONE])
def test_another_shape_is_refused(name, tensor) -> None:
    # Groups of 1, so that one channel more is one group more.
    args = arguments(name, **({"group_size": 1} if "group_size" in arguments(name) else {}))
    good = args[tensor]
    rows, free = ((short(name), tensor) in some for some in (ROWS, FREE))
    wrong = [] if rows else [good[None], good[..., None], good.flatten()[:1].squeeze()]
    for axis in range(good.ndim - 1 if free else 0, good.ndim):
        wrong.append(torch.cat((good, good.narrow(axis, 0, 1)), axis))
        wrong.append(good.narrow(axis, 0, good.shape[axis] - 1))
    for x in wrong:
        args[tensor] = x.contiguous()
        with pytest.raises(ShapeError):
            call(name, args)


def in_other_memory(x: Tensor) -> list[Tensor]:
    """The same numbers, laid out in other ways."""
    spaced = torch.repeat_interleave(x, 2, -1)[..., ::2]
    behind = torch.cat((x.flatten(), x.flatten()))[x.numel() :].view(x.shape)
    reversed_axes = list(range(x.ndim))[::-1]
    turned = x.permute(reversed_axes).contiguous().permute(reversed_axes)
    others = [spaced, behind, turned]
    if x.is_floating_point():
        others.append(torch._neg_view(-x))
    return others


@pytest.mark.parametrize(("name", "tensor"), PAIRS)
def test_strides_change_no_bit_or_are_refused(name, tensor) -> None:
    expected = call(name, arguments(name))
    for index in range(4):
        args = arguments(name)
        others = in_other_memory(args[tensor])
        if index == len(others):
            break
        args[tensor] = others[index]
        try:
            results = call(name, args)
        except ShapeError:
            assert name == "sweep_step"  # a copy would lose what is done in place
            continue
        for got, want in zip(results, expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize(("name", "tensor"), PAIRS)
def test_a_sparse_tensor_is_refused(name, tensor) -> None:
    args = arguments(name)
    args[tensor] = args[tensor].to_sparse()
    with pytest.raises(InputError, match=f"{tensor} must be dense, not torch.sparse_coo"):
        call(name, args)


WITH_BITS = [name for name in EVERY if "bits" in arguments(name)]
WITH_GROUPS = [name for name in EVERY if "group_size" in arguments(name)]


@pytest.mark.parametrize("name", WITH_BITS)
@pytest.mark.parametrize("bits", [-8, 0, 3, 16, 2**40])
def test_other_bits_are_refused(name, bits) -> None:
    with pytest.raises(InputError, match=f"^bits must be 4 or 8, not {bits}$"):
        call(name, {**arguments(name), "bits": bits})


@pytest.mark.parametrize("name", WITH_GROUPS)
@pytest.mark.parametrize("group_size", [0, -1, -(2**63)])
def test_no_group_size_below_1(name, group_size) -> None:
    with pytest.raises(InputError, match="group_size must be an integer >= 1"):
        call(name, {**arguments(name), "group_size": group_size})


@pytest.mark.parametrize("name", WITH_GROUPS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [6, 3 * 10**8, 2**31, 2**63 - 1])
def test_a_group_size_beyond_what_there_is_means_one_group(name, backend, bits, group_size) -> None:
    with kernels.use_backend(backend):
        expected = call(name, arguments(name, bits=bits, group_size=5))
        found = call(name, arguments(name, bits=bits, group_size=group_size))
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)


def test_a_group_size_fits_what_there_is() -> None:
    assert fit_group_size(2**70, 16) == 16
    assert fit_group_size(3, 16) == 3
    assert fit_group_size(3, 0) == 1
    assert [count_groups(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
    wrongs: list[Any] = [True, 1.0, None]
    for wrong in wrongs:
        with pytest.raises(InputError, match="group_size must be an integer >= 1"):
            fit_group_size(wrong, 4)


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-40, torch.inf, torch.nan])
@pytest.mark.parametrize(
    ("name", "scale"),
    [("sweep_codes", "in_scale"), ("sweep_codes", "out_scale"), ("sweep_rounded", "scale")],
)
def test_scales_of_codes_have_to_be_normal_numbers(name, scale, value) -> None:
    args = arguments(name)
    args[scale].view(-1)[-1] = value
    with pytest.raises(InputError, match=f"^{scale} must be positive, normal float32 numbers"):
        call(name, args)


def test_levels_have_to_be_finite_and_ascend() -> None:
    for value in (torch.inf, torch.nan):
        for name, levels in (("sweep_codes", "in_levels"), ("sweep_rounded", "levels")):
            args = arguments(name)
            args[levels][0, -1] = value
            with pytest.raises(InputError, match=f"{levels} must be ascending, finite numbers"):
                call(name, args)
