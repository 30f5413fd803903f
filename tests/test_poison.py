"""In a test, what was never written is NaN or the largest integer, in PyTorch and in NumPy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from bkcore.kernels import sweep
from bkcore.kernels.layout import empty_like_sites, empty_parts

LIKE = torch.zeros(2, 3)
MAKERS: dict[str, Callable[[torch.dtype], Tensor]] = {
    "empty": lambda dtype: torch.empty(2, 3, dtype=dtype),
    "empty_like": lambda dtype: torch.empty_like(LIKE, dtype=dtype),
    "empty_strided": lambda dtype: torch.empty_strided((2, 3), (1, 2), dtype=dtype),
    "empty_permuted": lambda dtype: torch.empty_permuted((2, 3), (1, 0), dtype=dtype),
    "new_empty": lambda dtype: LIKE.new_empty(2, 3, dtype=dtype),
    "new_empty_strided": lambda dtype: LIKE.new_empty_strided((2, 3), (3, 1), dtype=dtype),
}
each_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@each_maker
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_floats_are_nan(make: Callable[[torch.dtype], Tensor], dtype: torch.dtype) -> None:
    assert make(dtype).dtype == dtype
    assert make(dtype).isnan().all()


@each_maker
def test_both_parts_of_complex_numbers_are_nan(make: Callable[[torch.dtype], Tensor]) -> None:
    assert torch.view_as_real(make(torch.complex64)).isnan().all()


@each_maker
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64], ids=str)
def test_integers_are_the_largest(
    make: Callable[[torch.dtype], Tensor], dtype: torch.dtype
) -> None:
    assert (make(dtype) == torch.iinfo(dtype).max).all()


def test_arrays_are_poisoned() -> None:
    assert np.isnan(np.empty(3)).all()
    assert np.isnan(np.empty_like(np.zeros(3, np.complex64)).imag).all()
    assert (np.empty(3, np.uint16) == 65535).all()


def test_what_kernels_write_to_is_poisoned() -> None:
    v = torch.zeros(2, 3, 4)
    for parts in (empty_parts(v, 2), empty_parts(v.transpose(1, 2), 2)):
        assert parts.isnan().all()
    assert empty_like_sites(empty_parts(v, 2)).isnan().all()


def test_parameters_can_be_poisoned_in_any_mode() -> None:
    x = torch.empty(3, requires_grad=True)
    assert x.requires_grad
    assert x.is_leaf
    assert x.isnan().all()
    with torch.inference_mode():
        assert torch.empty(3).isnan().all()
    assert torch.vmap(lambda row: row.new_empty(2))(LIKE).isnan().all()


def test_a_device_for_a_block_reaches_it() -> None:
    with torch.device("meta"):
        assert torch.empty(3).is_meta
    with torch.device("cpu"):
        assert torch.empty(3).isnan().all()


def test_a_compiler_sees_nothing_of_it() -> None:
    def work(x: Tensor) -> Tensor:
        return torch.empty_like(x).copy_(x) + x.new_empty(x.shape).zero_()

    found = torch.compile(work, backend="eager", fullgraph=True)(LIKE)
    assert torch.equal(found, LIKE)
    exported = torch.export.export(_Module(), (LIKE,))
    assert not any("fill" in str(node.target) for node in exported.graph.nodes)


class _Module(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return sweep(x[None], None, x[0], x[:1].abs() + 1, x[:1], False) + torch.empty(1).zero_()
