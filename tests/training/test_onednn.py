"""Products by oneDNN are float32 ones, whoever computes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bkcore.training import onednn
from bkcore.training.onednn import onednn_products

# The largest error of a sum of n products, whatever its order, is about n units of its terms' sum
# of magnitudes (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1).
UNIT = 2.0**-24

MKLDNN: Any = torch.backends.mkldnn  # whose type lacks `matmul`


def factors(*shape: int) -> torch.Tensor:
    """Positive numbers that bfloat16 rounds down, by 2^-9: in no sum does that cancel."""
    return torch.exp2(torch.randint(-3, 4, shape)) * (1 + 2.0**-9)


@pytest.mark.parametrize(
    "shape", [(1, 192, 780), (37, 192, 64), (4096, 288, 192), (780, 4096, 192)]
)
def test_they_round_as_float32_does(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    torch.manual_seed(0)
    a, b = factors(m, k), factors(n, k)
    assert (a.bfloat16() < a).all()
    with onednn_products():
        for product in (a @ b.t(), torch.nn.functional.linear(a, b)):
            exact = a.double() @ b.double().t()
            assert ((product - exact).abs() <= k * UNIT * exact).all()


def test_gradients_do_too() -> None:
    torch.manual_seed(0)
    x, weight = factors(500, 96).requires_grad_(), factors(130, 96).requires_grad_()
    slope = factors(500, 130)
    with onednn_products():
        torch.nn.functional.linear(x, weight).backward(slope)
    assert x.grad is not None
    assert weight.grad is not None
    exact = slope.double() @ weight.detach().double(), slope.double().t() @ x.detach().double()
    for grad, wanted, terms in zip((x.grad, weight.grad), exact, (130, 500), strict=True):
        assert ((grad - wanted).abs() <= terms * UNIT * wanted).all()


def test_the_setting_is_put_back() -> None:
    before = MKLDNN.matmul.fp32_precision
    with pytest.raises(ZeroDivisionError), onednn_products():
        raise ZeroDivisionError
    assert MKLDNN.matmul.fp32_precision == before


def test_rounded_factors_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    before = MKLDNN.matmul.fp32_precision
    monkeypatch.setattr(onednn, "_is_exact", lambda size: size < 100)
    with onednn_products():
        assert MKLDNN.matmul.fp32_precision == before


def test_bfloat16_is_seen() -> None:
    assert onednn._is_exact(64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not onednn._is_exact(64)


def test_the_old_name_warns() -> None:
    from bkcore import products

    with pytest.warns(DeprecationWarning, match=r"is bkcore\.training\.onednn\.onednn_prod"):
        assert products.onednn_products is onednn_products
